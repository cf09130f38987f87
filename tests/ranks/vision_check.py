"""Run by test_vision_chunks.py, alone or under torchrun: the vision tower in chunks against the tower all at once.

Arguments: tensor and context parallel size. Prints "checked" from every rank.
"""

import gc
import sys
import weakref

import numpy as np
import torch

from molmo2_nemo import compat, parallel
from molmo2_nemo.config.schema import ParallelConfig
from molmo2_nemo.paths import REPOSITORY
from molmo2_nemo.training.step import build_model, forward_backward, global_names, global_weight

sys.path[:0] = [str(REPOSITORY / "tools" / folder) for folder in ("bench", "check")]
import gpu as bench_gpu  # noqa: E402
from parity import pack, random_documents  # noqa: E402

TP, CP = (int(argument) for argument in sys.argv[1:])
LAYOUT = ParallelConfig(tensor_model_parallel_size=TP, context_parallel_size=CP, sequence_parallel=TP > 1)
MODEL = bench_gpu.model_config("tiny")
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


def model_of(chunk_crops: int, recompute: bool):
    parallel.seed_everything(3)
    return build_model(MODEL, LAYOUT, "cpu", "fp32", vision_chunk_crops=chunk_crops, vision_recompute=recompute)


def gradients_of(model, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    for chunk in model:
        chunk.zero_grad_buffer()
    weighted = forward_backward(model, batches, global_weight(batches))
    return sum(float(x[0].double().sum()) for x in weighted), {
        name: parameter.main_grad.clone() for name, parameter in global_names(model[0].module)
    }


def assert_close(found: dict, expected: dict, what) -> None:
    # Some gradients are nothing but rounding (key biases): they are compared with the size of all of them.
    floor = 1e-3 * sum(float(g.norm()) ** 2 for g in expected.values()) ** 0.5
    for name, gradient in expected.items():
        difference = float((found[name] - gradient).norm() / max(float(gradient.norm()), floor))
        # Sums of float32 in another order: up to 1.4e-6 on one kind of CPU, below 1e-6 on another.
        assert difference <= 1e-5, (what, name, difference)


def batches_of(kind: str) -> list[dict]:
    """One row: everything; text alone; one image of several crops (one rank has it); a video."""
    documents = random_documents(MODEL, seed=0)
    chosen = {"all": documents, "text": documents[:1], "image": documents[1:2], "video": documents[3:4]}[kind]
    return pack(chosen, 1, MODEL, 0, 8)[0]


def check_gradients() -> None:
    plain = model_of(0, False)
    expected = {kind: gradients_of(plain, batches_of(kind)) for kind in ("all", "text", "image", "video")}
    sizes = [int(n) for n, _ in batches_of("all")[0]["vision_units"]]
    assert max(sizes) > 2 and len(sizes) > 4, sizes  # chunks of one and two crops are smaller than an image
    vision = [name for name in expected["all"][1] if name.startswith("vision.")]
    assert all(expected["all"][1][name].any() for name in vision), "a parameter of the tower without a gradient"
    assert not any(expected["text"][1][name].any() for name in vision), "no image, and yet a gradient"
    for chunk_crops, recompute in ((0, True), (1, True), (2, True), (2, False), (4, True), (32, True)):
        model = model_of(chunk_crops, recompute)
        for kind, (loss, gradients) in expected.items():
            found_loss, found = gradients_of(model, batches_of(kind))
            assert abs(found_loss - loss) <= 1e-6 * abs(loss), (chunk_crops, kind)
            assert_close(found, gradients, (chunk_crops, recompute, kind))
            assert kind != "text" or not any(found[name].any() for name in vision)
        # A backward of the tower alone reaches every parameter, images or not.
        tower, batch = model[0].module.vision, batches_of("text")[0]
        tokens = tower(batch["crops"], batch["pooling"], batch["vision_units"])
        reached = torch.autograd.grad(tokens.sum(), list(tower.parameters()), allow_unused=True)
        assert all(gradient is not None and not gradient.any() for gradient in reached)


def tower_peak(crops: int, chunk_crops: int, recompute: bool, unit: int = 1) -> int:
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


def check_memory() -> None:
    # All at once, memory grows with the crops; so many bytes of activations has each.
    crop = (tower_peak(64, 0, False) - tower_peak(16, 0, False)) / 48
    assert crop > 20 * MODEL.vision.patches_per_crop * MODEL.vit.hidden_size * 4, crop
    # In chunks it grows with the chunk, not with the crops: 48 more leave next to nothing behind.
    small, large = tower_peak(64, 4, True), tower_peak(64, 16, True)
    assert small - tower_peak(16, 4, True) < 0.02 * 48 * crop
    assert 0.5 < (large - small) / (12 * crop) < 2
    # Images of more crops than a chunk leave their features behind, an eighth of it or less here.
    assert tower_peak(64, 2, True, unit=8) - tower_peak(16, 2, True, unit=8) < 48 * crop / 8


def main() -> None:
    check_gradients()
    if TP * CP == 1:
        check_memory()
    print("checked", flush=True)


if __name__ == "__main__":
    main()
