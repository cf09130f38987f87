"""A rank's training step at full size without a GPU: its tensors have shapes and no memory, and all it does is
counted."""
