"""Adapters of LoRA by the linear layers of transformers' native Molmo2, and merged with their weights.

Our checkpoints join the parts of a matrix (config/lora.py): here they are taken apart and put together, bit for bit.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from molmo2_nemo.config.lora import Matrix, adapted_matrices
from molmo2_nemo.config.schema import LoraConfig, ModelConfig
from molmo2_nemo.hf.names import Entry, native_parts, tensor_table

# Where the A of a projection is among those of its matrix: the order of the parts in config/lora.py.
_PART = {"k_proj": 1, "v_proj": 2, "up_proj": 1}


@dataclass(frozen=True)
class Adapted:
    """A matrix with an adapter, and the linear layers of transformers' Molmo2 that it is made of."""

    matrix: Matrix
    entry: Entry  # of its weights

    def keys(self) -> tuple[str, str]:
        """Of A and B in a checkpoint."""
        return f"{self.matrix.name}.lora.a", f"{self.matrix.name}.lora.b"

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and B in a checkpoint."""
        return (len(self.matrix.parts) * rank, self.matrix.columns), (self.matrix.rows, rank)

    @cached_property
    def layers(self) -> dict[str, int]:
        """Native names of the linear layers, and which part of the matrix each of them is."""
        names = [name.removesuffix(".weight") for released in self.entry.released for name in native_parts(released)]
        return {name: _PART.get(name.rsplit(".", 1)[-1], 0) if len(names) > 1 else 0 for name in names}

    def rows(self, layer: str) -> int:
        return self.matrix.parts[self.layers[layer]] * self.matrix.repeats

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """[rows, n] in the order of our matrix -> those of each linear layer."""
        pieces = {}
        for released, tensor in zip(self.entry.released, self.entry.split(rows)):
            layers = [name.removesuffix(".weight") for name in native_parts(released)]
            pieces.update(zip(layers, tensor.split([self.rows(layer) for layer in layers])))
        return pieces

    def join(self, pieces: dict[str, Tensor]) -> Tensor:
        """Undo `split`."""
        released = []
        for name in self.entry.released:
            released.append(torch.cat([pieces[part.removesuffix(".weight")] for part in native_parts(name)]))
        return self.entry.join(released).contiguous()


def adapted(model: ModelConfig, lora: LoraConfig) -> list[Adapted]:
    """All matrices that have adapters."""
    entries = {entry.key: entry for entry in tensor_table(model)}
    return [Adapted(matrix, entries[f"{matrix.name}.weight"]) for matrix in adapted_matrices(model, lora)]


def of_layers(one: Adapted, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Native layer -> its (A [rank, in], B [out, rank]), of an adapter as our checkpoints have it."""
    parts = a.chunk(len(one.matrix.parts))
    return {layer: (parts[one.layers[layer]], rows) for layer, rows in one.split(b).items()}


def merge(one: Adapted, weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """W + factor x (B A) in float32, [out, in] in our matrix's order. factor: config/lora.scale."""
    merged = {}
    adapters, weights = of_layers(one, a.float(), b.float()), one.split(weight.float())
    for layer, (a_part, b_part) in adapters.items():
        merged[layer] = weights[layer] + (b_part @ a_part) * factor
    return one.join(merged)
