"""Compiles the GPU path's kernels for an H100, and reads what each of them takes of a multiprocessor.

FlexAttention, forward and backward, and the block mask's, as torch.compile makes them of this package's own functions;
and the fused kernels, ours and liger-kernel's, as their functions launch them.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from molmo2_nemo import compat
from molmo2_nemo.config.schema import Config, padded_vocab_size
from molmo2_nemo.model import attention, fused, fused_vit, loss, mask

# Tiles of FlexAttention: (BLOCK_M, BLOCK_N, warps, stages) forward, (M1, N1, M2, N2, warps, stages) backward, and
# whether by the tensor memory accelerator. The first are torch's own choice for an H100.
SWEEP = (
    ((128, 64, 8, 3), (64, 128, 128, 64, 8, 3), False),
    ((128, 64, 8, 3), (64, 128, 128, 64, 8, 3), True),
    ((128, 64, 8, 2), (64, 128, 128, 64, 8, 2), False),
    ((128, 128, 8, 2), (32, 128, 128, 32, 8, 3), False),
    ((64, 64, 4, 3), (64, 64, 64, 64, 4, 3), False),
    ((64, 64, 4, 2), (64, 64, 64, 64, 4, 2), False),
    ((128, 64, 4, 3), (64, 64, 64, 64, 8, 2), False),
    ((128, 32, 4, 3), (32, 64, 64, 32, 4, 3), False),
)


@dataclass(frozen=True)
class Shape:
    """Attention of one rank. B rows, N heads of queries, G of keys, Q queries of S tokens, D wide."""

    B: int
    N: int
    G: int
    Q: int
    S: int
    D: int

    def __str__(self):
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())


@dataclass(frozen=True)
class Widths:
    """What the fused kernels of a rank are made for: sizes of the decoder, the ViT, the connector and the head."""

    hidden: int
    inner: int
    heads: int
    groups: int
    D: int
    whole_norm: bool
    vit: int
    vit_inner: int
    vit_D: int
    connector: int
    vocabulary: int

    def __str__(self):
        return "fused kernels: " + ", ".join(f"{name} {value}" for name, value in vars(self).items())


@dataclass
class Kernel:
    """A compiled kernel. registers: of a thread; spills: bytes stored and loaded by a thread; shared: bytes of a
    block."""

    of: str  # mask, forward, backward, fused, or other
    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    tiles: dict[str, int] = field(default_factory=dict)


def shape_of(config: Config) -> Shape:
    """The shape of attention on a rank (model/attention.py, PackedAttention)."""
    model, p, S = config.model, config.parallel, config.data.seq_length
    t, c = p.tensor_model_parallel_size, p.context_parallel_size
    N, G, Q = model.num_attention_heads // t, max(1, model.num_query_groups // t), S
    if c > 1 and p.cp_comm_type == "a2a":
        G = N if G % c else G
        N, G = N // c, G // c
    elif c > 1:
        Q = S // c
    return Shape(config.train.micro_batch_size, N, G, Q, S, model.head_dim)


def widths_of(config: Config) -> Widths:
    """What decides about the fused kernels of a rank."""
    m, t = config.model, config.parallel.tensor_model_parallel_size
    return Widths(
        hidden=m.hidden_size,
        inner=m.ffn_hidden_size // t,
        heads=m.num_attention_heads // t,
        groups=max(1, m.num_query_groups // t),
        D=m.head_dim,
        whole_norm=m.qk_norm != "per_head",
        vit=m.vit.hidden_size,
        vit_inner=m.vit.ffn_hidden_size,
        vit_D=m.vit.head_dim,
        connector=m.connector.ffn_hidden_size,
        vocabulary=padded_vocab_size(m.vocab_size) // t,
    )


def compiled(shape: Shape, options: dict | None = None, dtype: torch.dtype = torch.bfloat16) -> Iterator[Kernel]:
    """Every kernel of attention at that shape. `hopper.install` comes before.

    options: FlexAttention's kernel options in place of the model's own; without the mask's kernels then.
    """
    compat.forget_compiled()
    made = {"mask": [], "attention": []}
    offset = shape.S - shape.Q  # of the last context parallel rank
    with compat.fake_tensor_mode():
        segments = torch.zeros(shape.B, shape.S, dtype=torch.int64, device="cuda")
        visual = torch.zeros(shape.B, shape.S, dtype=torch.bool, device="cuda")
        create = mask.compiled_create_block_mask.__wrapped__(compat.collecting_backend(made["mask"]))
        rule = mask.mask_mod(segments, visual, offset)
        blocks = create(rule, shape.B, None, shape.Q, shape.S, device=segments.device)
        query, key, value = (
            torch.empty(length, shape.B, heads, shape.D, dtype=dtype, device="cuda").permute(1, 2, 0, 3)
            for heads, length in ((shape.N, shape.Q), (shape.G, shape.S), (shape.G, shape.S))
        )
        attend = attention.compiled_flex_attention.__wrapped__(compat.collecting_backend(made["attention"]))
        attend(
            *(x.requires_grad_() for x in (query, key, value)),
            block_mask=blocks,
            scale=shape.D**-0.5,
            enable_gqa=shape.N != shape.G,
            kernel_options=attention.flex_options("triton", shape.D, dtype) if options is None else options,
        )
    for of, sources in made.items():
        for name, source in sources:
            if options is None or kind(of, name) in ("forward", "backward"):
                yield measure(kind(of, name), name, *compat.compile_triton_source(name, source))


def fused_kernels(widths: Widths) -> Iterator[Kernel]:
    """Every kernel between matrix products at a rank's widths, of this package and of liger-kernel, in bf16.

    Each function is called with a few rows on the host; its kernels are compiled as it launches them, and do not run.
    """
    w, found, seen = widths, [], set()
    with compat.collecting_launches(found):
        _launch_decoders(w)
        _launch_vision_towers(w)
    for binary in found:
        kernel = measure("fused", binary.metadata.name, binary, dict(warps=binary.metadata.num_warps))
        if (key := (kernel.name, kernel.registers, kernel.shared)) not in seen:
            seen.add(key)
            yield kernel


def _launch_decoders(w: Widths) -> None:
    eps, rows = 1e-6, (4, 1)
    x, y, scale = _numbers(*rows, w.hidden), _numbers(*rows, w.hidden), _numbers(w.hidden)
    _both_passes(fused.rms_norm, x, scale, eps)
    _both_passes(fused.rms_norm_and_residual, x, scale, eps)
    _both_passes(fused.dropout_add, x, y, None, 0.1)
    _both_passes(fused.dropout_add, x, y, torch.ones(*rows, 1, dtype=torch.bool), 0.1)
    _both_passes(fused.swiglu, _numbers(*rows, 2 * w.inner))
    angles = [torch.zeros(4, w.D // 2) for _ in range(2)]
    if w.whole_norm:
        for heads in (w.heads, w.groups):
            _both_passes(fused.rms_norm, _numbers(*rows, heads * w.D), _numbers(heads * w.D), eps)
            _both_passes(fused.rotate, _numbers(*rows, heads, w.D), *angles)
    else:
        qkv = _numbers(*rows, (w.heads + 2 * w.groups) * w.D)
        _both_passes(fused.split_norm_rotate, qkv, _numbers(w.D), _numbers(w.D), *angles, w.groups, eps)
    logits, index, numbers = _numbers(4, w.vocabulary).detach(), torch.zeros(4, dtype=torch.int64), torch.zeros(4)
    loss.logit_statistics(logits, index, w.vocabulary - 1)
    loss.logit_gradient_(logits, index, numbers, numbers, numbers, w.vocabulary - 1)


def _launch_vision_towers(w: Widths) -> None:
    x, delta, inner = _numbers(1, 4, w.vit), _numbers(1, 4, w.vit), _numbers(1, 4, w.vit_inner)
    weights = [_numbers(w.vit) for _ in range(3)]
    _both_passes(fused_vit.add_norm, x, None, None, *weights[1:], 1e-6)
    _both_passes(fused_vit.add_norm, x, delta, *weights, 1e-6)
    fused_vit.normalise(x, torch.zeros(4), torch.zeros(4), *weights[1:])
    heads = _numbers(1, 4, w.vit // w.vit_D, w.vit_D)
    fused_vit.join_heads(heads, heads, heads)
    _both_passes(fused.bias_gelu, inner, _numbers(w.vit_inner))
    fused.bias_gelu_again(inner.detach(), inner.detach(), _numbers(w.vit_inner))
    _both_passes(fused.bias_add, x, weights[0], delta)
    _both_passes(fused.swiglu, _numbers(1, 4, 2 * w.connector))


def _numbers(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device="cpu", requires_grad=True)


def _both_passes(function, *inputs) -> None:
    outputs = function(*inputs)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(y) for y in outputs])


def options_of(forward: tuple, backward: tuple, tma: bool) -> dict:
    """FlexAttention's kernel options of an entry of SWEEP."""
    names = {"fwd": ("BLOCK_M", "BLOCK_N"), "bwd": ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2")}
    options = {}
    for side, values in (("fwd", forward), ("bwd", backward)):
        keys = (*names[side], "num_warps", "num_stages")
        options |= {f"{side}_{key}": value for key, value in zip(keys, values, strict=True)}
    return options | ({"USE_TMA": True} if tma else {})


def kind(of: str, name: str) -> str:
    """mask, forward, backward, or other: which of attention's kernels a name of torch's compiler belongs to."""
    if of == "mask" or "flex_attention" not in name:
        return of if of == "mask" else "other"
    return "backward" if "backward" in name else "forward"


def measure(of: str, name: str, binary, tiles: dict) -> Kernel:
    """Ask NVIDIA's assembler what a kernel takes that Triton compiled for sm_90."""
    with tempfile.TemporaryDirectory() as folder:
        assembly = Path(folder) / "kernel.ptx"
        assembly.write_text(binary.asm["ptx"])
        arch = re.search(r"^\.target (\w+)", binary.asm["ptx"], re.MULTILINE).group(1)
        command = [compat.ptxas(), "-v", f"--gpu-name={arch}", assembly, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    return Kernel(of, name, registers, *map(int, spills.groups()), binary.metadata.shared, tiles)


def warps_at_a_time(kernel: Kernel) -> int:
    """Warps of a kernel that a multiprocessor has room for, of 64, by registers and shared memory.

    A thread's registers are given out by 8 and a warp's by 256, of 65,536; 228 KB of shared memory, of which each
    block takes 1 KB more (CUDA programming guide, compute capability 9.0).
    """
    warps = kernel.tiles["warps"]
    by_registers = 65_536 // (-(-kernel.registers // 8) * 8 * 32) // warps
    by_shared = 228 * 1024 // (kernel.shared + 1024)
    return min(by_registers, by_shared, 64 // warps) * warps
