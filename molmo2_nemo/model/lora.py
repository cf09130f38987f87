"""Low-rank adapters on the matrices of a model that is otherwise frozen (LoRA, arXiv 2106.09685).

An adapter is a module `lora` of the linear layer that it belongs to, whose output it adds to. It is split as that layer
is: where tensor parallel ranks hold rows of the matrix, they hold the rows of B and a whole A; where they hold columns,
those of A and a whole B. What crosses ranks is rank numbers for each token, not the hidden state.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from molmo2_nemo.config.errors import refuse
from molmo2_nemo.config.lora import Matrix, adapted_matrices, scale
from molmo2_nemo.config.schema import LoraConfig, ModelConfig
from molmo2_nemo.model.layers import ColumnWeights, RowWeights
from molmo2_nemo.model.new_adapters import random_a


class Adapter(nn.Module):
    """scale x B A of one matrix, this rank's part. a: [parts x rank, columns], b: [rows, rank], see config/lora.py.

    group: the tensor parallel ranks that share the matrix; None: it is whole. sequence_parallel: hidden states outside
    of matrix products are split over them, too.
    """

    def __init__(self, matrix: Matrix, lora: LoraConfig, dtype: torch.dtype, group, sequence_parallel: bool):
        super().__init__()
        self.matrix, self.rank, self.scale, self.dropout = matrix, lora.rank, scale(lora), lora.dropout
        self.group, self.ranks = group, 1 if group is None else group.size()
        self.sequence_parallel = sequence_parallel and self.ranks > 1
        rows = matrix.rows // (self.ranks if matrix.split == "rows" else 1)
        columns = matrix.columns // (self.ranks if matrix.split == "columns" else 1)
        parts = len(matrix.parts)
        self.a = nn.Parameter(torch.empty(parts * lora.rank, columns, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(rows, lora.rank, dtype=dtype))
        if matrix.split is not None:
            cut, whole, axis = (self.b, self.a, 0) if matrix.split == "rows" else (self.a, self.b, 1)
            set_tensor_model_parallel_attributes(cut, True, axis, 1)
            # Each rank has its part of the row's gradient: Megatron sums those so marked.
            whole.sequence_parallel = self.sequence_parallel
        if parts > 1:
            part = torch.tensor(matrix.part_of_row(self.ranks)).view(-1, 1, 1)
            mask = (part == torch.arange(parts).view(-1, 1)).to(dtype)
            self.register_buffer("part_of_row", mask, persistent=False)  # 1 where a row is of a part, [rows, parts, 1]

    def draw(self, seed: int) -> None:
        """Give A its first values, the same at any layout; B is zero."""
        whole = random_a(self.matrix, self.rank, seed)
        width = self.a.shape[1]
        first = self.group.rank() * width if self.matrix.split == "columns" and self.ranks > 1 else 0
        with torch.no_grad():
            self.a.copy_(whole[:, first : first + width])

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """The linear layer's input [..., columns of this rank] and output [..., rows of this rank] -> their sum with
        the adapter, like the output."""
        inner = F.linear(self._dropped(x), self.a) * self.scale
        if self.ranks > 1 and self.matrix.split == "rows":
            gather = gather_from_sequence_parallel_region if self.sequence_parallel else None
            gather = gather or copy_to_tensor_model_parallel_region
            inner = gather(inner, group=self.group)
        elif self.ranks > 1:
            reduce = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else None
            reduce = reduce or reduce_from_tensor_model_parallel_region
            inner = reduce(inner, group=self.group)
        # Product and sum are one operation: the output is read and written once.
        return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), self._b_of_parts().t()).view_as(output)

    def product(self) -> Tensor:
        """scale x B A, this rank's part of what is added to the matrix, [rows, columns]."""
        return (self._b_of_parts() @ self.a) * self.scale

    def _b_of_parts(self) -> Tensor:
        """B [rows, parts x rank], in which a row takes from the A of its own part alone."""
        return self.b if len(self.matrix.parts) == 1 else (self.b.unsqueeze(1) * self.part_of_row).flatten(1)

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        if self.ranks > 1 and (self.sequence_parallel or self.matrix.split == "columns"):
            with get_cuda_rng_tracker().fork():  # ranks hold different parts of the input
                return F.dropout(x, self.dropout)
        return F.dropout(x, self.dropout)

    def sharded(self, prefix: str, key: str) -> dict:
        """Megatron's sharded tensors under prefix + name, with keys that do not depend on the layout.

        Those that are whole on every rank get their replica's number from the model.
        """
        if self.matrix.split is None:
            return {f"{prefix}{n}": make_sharded_tensor_for_checkpoint(p, key + n) for n, p in self.named_parameters()}
        groups = dict(
            tp_group=self.group, dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        cut, whole, axis = ("b", "a", 0) if self.matrix.split == "rows" else ("a", "b", 1)
        tensor = make_tp_sharded_tensor_for_checkpoint(getattr(self, cut), key + cut, axis, **groups)
        if cut == "b" and len(self.matrix.parts) > 1 and self.matrix.repeats == 1:
            tensor = apply_swiglu_sharded_factory(tensor, (), tp_group=self.group)  # a share of each half
        whole_tensor = make_sharded_tensor_for_checkpoint(getattr(self, whole), key + whole)
        return {prefix + cut: tensor, prefix + whole: whole_tensor}


def add_adapters(modules: dict[str, nn.Module], m: ModelConfig, lora: LoraConfig, config, group, seed: int) -> None:
    """Give the linear layers that this rank has their adapters. The vision tower's are not split.

    modules: by their names, with the layer's number in the whole model. config: the decoder's TransformerConfig.
    group: the tensor parallel ranks. seed: of the random values, see `random_a`. Raises ConfigError for dropout
    where a layer gives its weight and is not called with its input.
    """
    for matrix in adapted_matrices(m, lora):
        linear = modules.get(matrix.name)
        if linear is None:
            continue  # of another pipeline stage
        refuse(
            isinstance(linear, ColumnWeights | RowWeights) and lora.dropout > 0,
            f"lora.dropout={lora.dropout} on the vision transformer needs parallel.kernels=plain: set it, or "
            "lora.dropout=0.",
        )
        in_vision = matrix.split is None
        shared_by = None if in_vision else group
        adapter = Adapter(matrix, lora, config.params_dtype, shared_by, config.sequence_parallel)
        adapter.draw(seed)
        for parameter in adapter.parameters():
            parameter.vision_data_parallel = in_vision
        linear.lora = adapter
        linear.register_forward_hook(_add)


def _add(linear: nn.Module, inputs: tuple, output):
    """A hook: the output of a linear layer, Megatron's with its bias apart, with what its adapter adds."""
    if not inputs:  # the layer gives its weight, to be used by fused_vit.py
        return (output[0] + linear.lora.product(), *output[1:])
    if isinstance(output, tuple):
        return (linear.lora(inputs[0], output[0]), *output[1:])
    return linear.lora(inputs[0], output)


def has_dropout(model: nn.Module) -> bool:
    """Whether adapters drop inputs now."""
    return model.training and any(isinstance(module, Adapter) and module.dropout for module in model.modules())


def put_adapters(state: dict, model: nn.Module, prefix: str) -> None:
    """Into a model's sharded state dict, each under the key of the matrix that it belongs to."""
    for name, module in model.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(module, Adapter):
            key = state[name.removesuffix("lora") + "weight"].key.removesuffix("weight") + "lora."
            state.update(module.sharded(f"{name}.", key))
