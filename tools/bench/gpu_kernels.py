"""The cases of gpu.py that time attention and the vision tower alone."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel

from molmo2_nemo import parallel
from molmo2_nemo.config.schema import LAYERS, ModelConfig, ParallelConfig
from molmo2_nemo.model.attention import attend, compiled_flex_attention, flex_options
from molmo2_nemo.model.mask import dense_mask, make_mask
from molmo2_nemo.model.vision import VisionTower
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.random_batches import packed_row, visible_pairs
from molmo2_nemo.rehearsal.kernels import SWEEP, options_of


def timed(function: Callable, device: str, repeats: int = 5, warmup: int = 2) -> tuple[float, float | None]:
    """Median milliseconds, and the peak of allocated GPU memory in GiB (None on a CPU)."""
    for _ in range(warmup):
        function()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            function()
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 2**30


def model_config(name: str, **changes):
    """conf/model/NAME.yaml, without its tokenizer."""
    values = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF_DIR / "model" / f"{name}.yaml"))
    return dataclasses.replace(OmegaConf.to_object(values), **changes)


def attention(device: str, tiny: bool) -> Iterator[dict]:
    """Forward and backward of three attentions over one packed row."""
    N, G, D = (4, 2, 16) if tiny else (32, 8, 128)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = model_config("tiny" if tiny else "molmo2_4b")
    for S in (256, 512) if tiny else (4096, 16384, 36864):
        batch = packed_row(model, S, S // 128, seed=S, device=device)
        segments, vision = batch["segment_ids"], batch["vision_mask"]
        pairs, scale = visible_pairs(batch), D**-0.5
        torch.manual_seed(0)
        q, k, v, grad = (
            torch.randn(1, heads, S, D, device=device, dtype=dtype).requires_grad_(i < 3)
            for i, heads in enumerate((N, G, G, N))
        )

        def dense():
            # No fused kernel of SDPA takes both a mask and grouped heads.
            keys, values = (x.repeat_interleave(N // G, dim=1) for x in (k, v))
            backend = [SDPBackend.EFFICIENT_ATTENTION] if device == "cuda" else [SDPBackend.MATH]
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)

        def causal():
            with sdpa_kernel(
                [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if device == "cpu" else SDPBackend.FLASH_ATTENTION
            ):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

        expected = None
        for kernel, function, area in (
            ("sdpa dense", dense, pairs),
            ("flex", lambda: attend(q, k, v, mask, scale), pairs),
            ("flash causal", causal, S * (S + 1) // 2),
        ):
            row = {"tokens": S, "kernel": kernel}
            if kernel == "flex" and device == "cpu":
                yield dict(row, not_measured="not measured: FlexAttention has no backward pass on a CPU")
                continue

            def forward_backward():
                q.grad = k.grad = v.grad = None
                function().backward(grad)

            try:
                mask, mask_ms = None, None
                if kernel != "flash causal":
                    make = make_mask if kernel == "flex" else dense_mask
                    mask_ms, _ = timed(lambda: make(segments, vision), device)
                    mask = make(segments, vision)
                before = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else None
                ms, peak = timed(forward_backward, device, repeats=2 if tiny else 10, warmup=1 if tiny else 3)
                difference = None
                if kernel == "sdpa dense":
                    expected = function().detach()
                elif kernel == "flex" and expected is not None:
                    difference = ((function() - expected).norm() / expected.norm()).item()
            except torch.OutOfMemoryError:
                yield dict(row, not_measured="failed: out of GPU memory")
                continue
            row.update(
                ms=ms,
                tflops=12 * area * N * D / ms / 1e9,
                working_gib=peak - before if peak else None,
                mask_ms=mask_ms,
                visible_share=area / S**2,
                differs_from_dense_by=difference,
            )
            yield row


def tiles(device: str, tiny: bool, number: int) -> Iterator[dict]:
    """Forward and backward of FlexAttention over a packed row with tiles of the sweep; -2: those that a run takes, -1:
    the same with the tensor memory accelerator."""
    N, G, D, S = 32, 8, 128, 16384
    names = {-2: "taken", -1: "taken, tma"}
    row = {"tokens": S, "tiles": names[number] if number < 0 else str(SWEEP[number])}
    if device == "cpu":
        yield dict(row, not_measured="not measured: FlexAttention has no backward pass on a CPU")
        return
    batch = packed_row(model_config("molmo2_4b"), S, S // 128, seed=S, device=device)
    mask, scale = make_mask(batch["segment_ids"], batch["vision_mask"]), D**-0.5
    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, heads, S, D, device=device, dtype=torch.bfloat16).requires_grad_(i < 3)
        for i, heads in enumerate((N, G, G, N))
    )
    backend = "tma" if number == -1 else "triton"
    options = flex_options(backend, D, q.dtype) if number < 0 else options_of(*SWEEP[number])
    flex = compiled_flex_attention()

    def forward_backward():
        q.grad = k.grad = v.grad = None
        flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options).backward(grad)

    ms, _ = timed(forward_backward, device, repeats=10, warmup=3)
    yield dict(row, ms=ms, tflops=12 * visible_pairs(batch) * N * D / ms / 1e9)


def vision(device: str, tiny: bool, layer_spec: str, kernels: str = "auto") -> Iterator[dict]:
    """ViT and connector over video frames, one rank."""
    crops = 4 if tiny else 128
    model, layout = (
        model_config("tiny" if tiny else "molmo2_4b"),
        ParallelConfig(layer_spec=layer_spec, kernels=kernels),
    )
    parallel.initialize(layout, device, 5, 0)
    groups = parallel.solo_groups()
    side = model.vision.image_size // model.vision.patch_size
    windows, taken = (-(-side // model.vision.video_pooling)) ** 2, model.vision.video_pooling**2
    patches = model.vision.patches_per_crop
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (crops, patches, model.vision.patch_dim), dtype=torch.uint8).to(device)
    pooling = torch.randint(0, patches, (crops, windows, taken)) + torch.arange(crops).view(-1, 1, 1) * patches
    pooling = pooling.view(-1, taken).to(device)
    units = torch.tensor([(1, windows)] * crops)
    for recompute in (False, True, LAYERS):
        configs = parallel.transformer_configs(model, layout, device, "fp32" if device == "cpu" else "bf16", {})
        chunk = (2 if tiny else 32) if recompute else 0
        tower = VisionTower(model, configs["vit"], configs["connector"], groups, groups.tp, chunk, recompute)
        tower = tower.to(device).train()

        def forward_backward():
            tower.zero_grad()
            tower(pixels, pooling, units).sum().backward()

        with torch.no_grad():
            forward_ms, forward_gib = timed(lambda: tower(pixels, pooling, units), device)
        ms, gib = timed(forward_backward, device)
        yield dict(
            recompute=recompute,
            crops=crops,
            forward_ms=forward_ms,
            forward_crops_per_second=crops / forward_ms * 1e3,
            forward_peak_gib=forward_gib,
            ms=ms,
            crops_per_second=crops / ms * 1e3,
            peak_gib=gib,
        )
        tower = None  # its memory is not counted with the next one's
