"""Data: shards of conversations about images and videos -> packed micro-batches, through Megatron-Energon."""
