"""The values that adapters of LoRA begin with. Needs no Megatron."""

import zlib

import torch
from torch import Tensor

from molmo2_nemo.config.lora import Matrix


def random_a(matrix: Matrix, rank: int, seed: int) -> Tensor:
    """The whole A [parts x rank, columns] of a matrix, float32 on the CPU; B is zero. Its name and the seed decide.

    The distribution is that of PEFT (and of a linear layer in torch): uniform, up to 1 / sqrt(columns).
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {matrix.name}".encode()))
    whole, bound = torch.empty(len(matrix.parts) * rank, matrix.columns, device="cpu"), matrix.columns**-0.5
    return whole.uniform_(-bound, bound, generator=generator)
