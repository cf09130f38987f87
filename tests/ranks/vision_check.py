"""Run by test_vision_chunks.py, alone or under torchrun: the vision tower in chunks against the tower all at once.

    python vision_check.py TENSOR_PARALLEL_SIZE CONTEXT_PARALLEL_SIZE

Rank 0 prints one JSON line: the gradients' figures of each rank and, of one rank alone, bytes of memory.
"""

import gc
import json
import math
import sys
import weakref

import numpy as np
import torch
import torch.distributed as dist

from molmo2_nemo import compat, parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.schema import ParallelConfig
from molmo2_nemo.random_batches import pack, random_documents
from molmo2_nemo.training.step import build_model, forward_backward, global_names, global_weight

TP, CP = (int(argument) for argument in sys.argv[1:])
LAYOUT = ParallelConfig(tensor_model_parallel_size=TP, context_parallel_size=CP, sequence_parallel=TP > 1)
MODEL = compose("stage1", ["model=tiny", "data=sample", "schedule=quickstart"]).model
KINDS = ("all", "text", "image", "video")
# (crops in a chunk, or 0 for all at once; whether and how the backward pass encodes them again)
CHUNKS = ((0, True), (1, True), (2, True), (2, False), (2, "layers"), (4, True), (32, "layers"))
parallel.initialize(LAYOUT, "cpu", timeout_minutes=2, seed=0)


class PeakBytes(compat.dispatch_mode()):
    """Counts the bytes of the tensors that were made inside and are alive, and the largest count."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in compat.tensors_in(out):
            if tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known[storage] = True
                weakref.finalize(storage, self.freed, storage.nbytes())
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
        return out

    def freed(self, size: int) -> None:
        self.alive -= size


def model_of(chunk_crops: int, recompute: bool | str):
    parallel.seed_everything(3)
    return build_model(MODEL, LAYOUT, "cpu", "fp32", vision_chunk_crops=chunk_crops, vision_recompute=recompute)


def gradients_of(model, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    for chunk in model:
        chunk.zero_grad_buffer()
    weighted = forward_backward(model, batches, global_weight(batches))
    return sum(float(x[0].double().sum()) for x in weighted), {
        name: parameter.main_grad.clone() for name, parameter in global_names(model[0].module)
    }


def largest_difference(found: dict, expected: dict) -> float:
    """Norm of the difference over the gradient's norm, of the worst parameter."""
    # Some gradients are nothing but rounding (key biases): they are compared with the size of all of them.
    floor = 1e-3 * sum(float(g.norm()) ** 2 for g in expected.values()) ** 0.5
    return max(float((found[n] - g).norm() / max(float(g.norm()), floor)) for n, g in expected.items())


def batches_of(kind: str) -> list[dict]:
    """One row: everything; text alone; one image of several crops (one rank has it); a video."""
    documents = random_documents(MODEL, seed=0)
    chosen = {"all": documents, "text": documents[:1], "image": documents[1:2], "video": documents[3:4]}[kind]
    return pack(chosen, 1, MODEL, 0, 8)[0]


def without_gradient(gradients: dict) -> list[str]:
    """Names of the vision tower's parameters whose gradient is zero."""
    return [name for name, gradient in gradients.items() if name.startswith("vision.") and not gradient.any()]


def alone(model) -> dict[str, int]:
    """A backward of the tower alone, for a row of text: how many parameters it reaches, and with what."""
    tower, batch = model[0].module.vision, batches_of("text")[0]
    tokens = tower(batch["crops"], batch["pooling"], batch["vision_units"])
    reached = torch.autograd.grad(tokens.sum(), list(tower.parameters()), allow_unused=True)
    return {
        "not_reached": sum(gradient is None for gradient in reached),
        "not_zero": sum(gradient is not None and bool(gradient.any()) for gradient in reached),
    }


def gradient_figures() -> dict:
    """Of this rank: the tower all at once, and each way to chunk it against that.

    A context parallel rank may have no token that carries loss: its losses are 0 and have to be equal.
    """
    plain = model_of(0, False)
    expected = {kind: gradients_of(plain, batches_of(kind)) for kind in KINDS}
    found = {
        "unit_crops": [int(crops) for crops, _ in batches_of("all")[0]["vision_units"]],
        "vision_parameters": sum(name.startswith("vision.") for name in expected["all"][1]),
        "without_gradient": {kind: len(without_gradient(expected[kind][1])) for kind in ("all", "text")},
        "chunked": [],
    }
    for chunk_crops, recompute in CHUNKS:
        model, differences = model_of(chunk_crops, recompute), {}
        for kind, (loss, gradients) in expected.items():
            own_loss, own = gradients_of(model, batches_of(kind))
            differences[kind] = {
                "loss": 0.0 if own_loss == loss else abs(own_loss - loss) / abs(loss) if loss else math.inf,
                "gradients": largest_difference(own, gradients),
                "without_gradient": len(without_gradient(own)),
            }
        found["chunked"].append({"chunk": [chunk_crops, recompute], "kinds": differences, "alone": alone(model)})
    return found


def tower_peak(crops: int, chunk_crops: int, recompute: bool | str, unit: int = 1) -> int:
    """Peak bytes that forward and backward over `crops` make, in images of `unit` crops."""
    tower = model_of(chunk_crops, recompute)[0].module.vision
    patches, rng = MODEL.vision.patches_per_crop, np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (crops, patches, MODEL.vision.patch_dim), dtype=np.uint8))
    pooling = torch.from_numpy(rng.integers(0, unit * patches, (crops, 1, 4)))
    pooling = (pooling + torch.arange(crops).view(-1, 1, 1) // unit * unit * patches).view(-1, 4)
    units = torch.tensor([(unit, unit)] * (crops // unit))
    made = PeakBytes()
    for tensor in (pixels, pooling, *tower.parameters()):
        made.known[tensor.untyped_storage()] = True
    gc.collect()
    with made:
        tower(pixels, pooling, units).square().sum().backward()
    return made.peak


def memory_figures() -> dict[str, float]:
    """Peak bytes: of a crop where all are encoded at once, and what 48 more crops, or larger chunks, add to chunks."""
    crop = (tower_peak(64, 0, False) - tower_peak(16, 0, False)) / 48
    small = tower_peak(64, 4, True)
    return {
        "crop": crop,
        "hidden_states": MODEL.vision.patches_per_crop * MODEL.vit.hidden_size * 4,
        "more_crops": small - tower_peak(16, 4, True),
        "larger_chunks": tower_peak(64, 16, True) - small,
        # Images of more crops than a chunk leave their features behind.
        "more_large_images": tower_peak(64, 2, True, unit=8) - tower_peak(16, 2, True, unit=8),
    }


def main() -> None:
    figures, ranks = gradient_figures(), [None] * (TP * CP)
    dist.all_gather_object(ranks, figures)
    memory = memory_figures() if TP * CP == 1 else None
    if dist.get_rank() == 0:
        print(json.dumps({"ranks": ranks, "memory": memory}), flush=True)


if __name__ == "__main__":
    main()
