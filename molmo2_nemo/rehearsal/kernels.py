"""Compiles the kernels of the decoder's attention for an H100, and reads what each of them takes of a multiprocessor.

FlexAttention, forward and backward, and the block mask's, as torch.compile makes them of this package's own functions.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from molmo2_nemo import compat
from molmo2_nemo.config.schema import Config
from molmo2_nemo.model import attention, mask


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


@dataclass
class Kernel:
    """A compiled kernel. registers: of a thread; spills: bytes stored and loaded by a thread; shared: bytes of a
    block."""

    of: str  # mask, forward or backward
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


def compiled(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Iterator[Kernel]:
    """Every kernel of attention at that shape. `hopper.install` comes before."""
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
        )
    for of, sources in made.items():
        for name, source in sources:
            yield measure(kind(of, name), name, source)


def kind(of: str, name: str) -> str:
    """mask, forward, backward, or other: which of attention's kernels a name of torch's compiler belongs to."""
    if of == "mask" or "flex_attention" not in name:
        return of if of == "mask" else "other"
    return "backward" if "backward" in name else "forward"


def measure(of: str, name: str, source: str) -> Kernel:
    """Compile one kernel of torch.compile's with Triton for sm_90, and ask NVIDIA's assembler what it takes."""
    binary, tiles = compat.compile_triton_source(name, source)
    with tempfile.TemporaryDirectory() as folder:
        assembly = Path(folder) / "kernel.ptx"
        assembly.write_text(binary.asm["ptx"])
        arch = re.search(r"^\.target (\w+)", binary.asm["ptx"], re.MULTILINE).group(1)
        command = [compat.ptxas(), "-v", f"--gpu-name={arch}", assembly, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    return Kernel(of, name, registers, *map(int, spills.groups()), binary.metadata.shared, tiles)
