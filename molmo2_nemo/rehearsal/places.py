"""Which part of the model, and which line of code, an operation belongs to."""

import inspect

from molmo2_nemo import compat
from molmo2_nemo.paths import PACKAGE

# File -> part. Of several that are on the stack the first of `WHOLE` counts, else the innermost.
PARTS = {
    f"{PACKAGE.name}/model/vision.py": "vision",
    f"{PACKAGE.name}/model/fused_vit.py": "vision",
    f"{PACKAGE.name}/model/loss.py": "head",
    f"{PACKAGE.name}/training/optimizer.py": "optimizer",
    f"{PACKAGE.name}/rehearsal/rows.py": "inputs",
    "megatron/core/transformer/transformer_layer.py": "decoder",
    "megatron/core/transformer/transformer_block.py": "decoder",
    "megatron/core/distributed/param_and_grad_buffer.py": "gradients",
    "megatron/core/distributed/finalize_model_grads.py": "gradients",
    "megatron/core/distributed/distributed_data_parallel.py": "gradients",
}
WHOLE = ("vision", "head", "optimizer")
LAYERS = (
    "megatron/core/transformer/transformer_layer.py",
    *(f"{PACKAGE.name}/model/{name}.py" for name in ("fused_vit", "layers")),
)
ENGINE = "torch/autograd/graph.py"  # calls the backward pass
# Wrappers around calls of others.
TRANSPARENT = (f"{PACKAGE.name}/cpu.py", f"{PACKAGE.name}/compat.py")


class Places:
    """Remembers where each operation of a forward pass was, for its backward pass."""

    def __init__(self):
        self.in_layer = False  # whether the place that was asked for last is inside a layer
        self.of_operation: dict[int, tuple[str, str, bool]] = {}  # autograd's number -> part, line, in_layer
        self.names: dict[str, str | None] = {}  # file -> its name from the package on, None for others' files

    def here(self, phase: str) -> tuple[str, str]:
        """(part, line) of the operation that runs now; in its backward pass, of the operation in the forward pass."""
        parts, line, self.in_layer = [], None, False
        frame = inspect.currentframe().f_back
        while frame is not None:
            file = frame.f_code.co_filename
            if file not in self.names:
                self.names[file] = name_of(file)
            name = self.names[file]
            if name == ENGINE:
                # What called the backward pass is not what is done in it.
                number = compat.sequence_number_of_backward()
                part, forward, in_layer = self.of_operation.get(number, ("rest", "?", False))
                self.in_layer |= in_layer
                if line is None:
                    return part, f"{forward} (backward)"
                parts = parts or [part]
                break
            if name is not None:
                line = line or f"{name}:{frame.f_lineno}"
                self.in_layer |= name in LAYERS
                if name in PARTS:
                    parts.append(PARTS[name])
            frame = frame.f_back
        part = next((part for part in WHOLE if part in parts), parts[0] if parts else "rest")
        if phase == "build" and part not in ("gradients", "optimizer"):
            part = "weights"
        self.of_operation.setdefault(compat.next_sequence_number() - 1, (part, line or "?", self.in_layer))
        return part, line or "?"


def name_of(file: str) -> str | None:
    """A file's name from its package on, for files of this package, of Megatron, and for ENGINE."""
    for package in (PACKAGE.name, "megatron", "torch"):
        _, found, rest = file.rpartition(f"/{package}/")
        name = f"{package}/{rest}"
        if found and (package == PACKAGE.name or name.startswith("megatron/core/") or name == ENGINE):
            is_ours = name.startswith(f"{PACKAGE.name}/rehearsal/") or name in TRANSPARENT
            return None if is_ours and name not in PARTS else name
    return None
