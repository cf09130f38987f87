"""Norms, the decoder layer in its Qwen3 and OLMo 3 forms, and the layer specs that assemble them.

Where `LayerConfig.fused_kernels` is on, the work between matrix products is done by fused.py's kernels.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, get_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from molmo2_nemo.config.schema import ModelConfig
from molmo2_nemo.model import fused
from molmo2_nemo.model.attention import CropAttention, PackedAttention
from molmo2_nemo.model.collectives import all_reduce


@dataclass
class LayerConfig(TransformerConfig):
    """Megatron's TransformerConfig and what it has no field for."""

    fused_kernels: bool = False
    """Whether the work between matrix products is done by the kernels of fused.py (`parallel.kernels`)."""

    attention_kernel: str = "triton"
    """`parallel.attention_kernel`."""


class RMSNorm(nn.Module):
    """RMSNorm computed in float32.

    Megatron's torch norm refuses sequence parallelism, for which marking the weight is enough. with_residual: where
    there is a kernel, return the input, too, for Megatron's layer to take as its residual: the gradients of both are
    then added in the norm's kernel.
    """

    def __init__(self, config: LayerConfig, hidden_size: int, eps: float, with_residual: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.eps, self.with_residual, self.fused = eps, with_residual, config.fused_kernels

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.fused:
            return (fused.rms_norm_and_residual if self.with_residual else fused.rms_norm)(x, self.weight, self.eps)
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class HeadNormWeight(RMSNorm):
    """Qwen3's q/k norm where its kernel is that of RoPE: what is called, for Megatron's hooks, gives the weight."""

    def forward(self) -> Tensor:
        return self.weight


class FullWidthRMSNorm(nn.Module):
    """OLMo 3's q/k norm: one RMSNorm over all heads of a projection, before they are split.

    Under tensor parallelism a rank holds some of the heads, so the sum of squares is reduced over the group.
    The weight is kept whole on every rank and sliced in forward: its gradient is then non-zero in the own slice
    only, and Megatron's sum over ranks for q/k norms gives the whole gradient.
    """

    def __init__(self, config: LayerConfig, hidden_size: int, eps: float, num_heads: int, tp_group):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads * hidden_size, dtype=config.params_dtype))
        self.eps, self.tp_group, self.fused = eps, tp_group, config.fused_kernels

    def forward(self, x: Tensor) -> Tensor:
        """[s, B, N/t, D] -> the same."""
        if self.fused and self.tp_group.size() == 1:
            return fused.rms_norm(x.flatten(2), self.weight, self.eps).view(x.shape)
        x32 = x.float()
        square_sum = x32.pow(2).sum((-2, -1), keepdim=True)
        width, rank = x.shape[-2] * x.shape[-1], self.tp_group.rank()
        if self.tp_group.size() > 1:
            square_sum = all_reduce(square_sum, self.tp_group)
        x32 = x32 * torch.rsqrt(square_sum / (width * self.tp_group.size()) + self.eps)
        weight = self.weight[rank * width : (rank + 1) * width].view(x.shape[-2:])
        return weight * x32.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm behind Megatron's signature."""

    def __init__(self, config: LayerConfig, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


class LayerNormWeights(LayerNorm):
    """Where the kernel is one of fused_vit.py: what is called, for Megatron's hooks, gives weight and bias."""

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


class ColumnWeights(ColumnParallelLinear):
    """A layer that is not split; as LayerNormWeights."""

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


class RowWeights(RowParallelLinear):
    """A layer that is not split; as LayerNormWeights."""

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias


class FusedMLP(MLP):
    """Megatron's MLP with one kernel between its two matrix products: SwiGLU, or bias and GELU."""

    def forward(self, hidden_states: Tensor, per_token_scale=None, **kwargs) -> tuple[Tensor, Tensor | None]:
        inner, bias = self.linear_fc1(hidden_states)
        inner = fused.swiglu(inner) if self.config.gated_linear_unit else fused.bias_gelu(inner, bias)
        return self.linear_fc2(inner)


class FusedSelfAttention(SelfAttention):
    """Megatron's attention whose q/k norms and RoPE are one kernel, at the positions that each token has."""

    def forward(self, hidden_states, attention_mask, rotary_pos_emb=None, **kwargs):
        """rotary_pos_emb: float32 cosines and sines, [2, s * B, D / 2]."""
        self.rotation = rotary_pos_emb.unbind()
        return super().forward(hidden_states, attention_mask, rotary_pos_emb=None, **kwargs)

    def get_query_key_value_tensors(self, hidden_states, *args, **kwargs):
        if isinstance(self.q_layernorm, HeadNormWeight):
            qkv, _ = self.linear_qkv(hidden_states)
            weights, groups = (self.q_layernorm(), self.k_layernorm()), self.num_query_groups_per_partition
            return fused.split_norm_rotate(qkv, *weights, *self.rotation, groups, self.config.layernorm_epsilon)
        query, key, value = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        return fused.rotate(query, *self.rotation), fused.rotate(key, *self.rotation), value


class DecoderLayer(TransformerLayer):
    """A Megatron layer with its own RoPE table (OLMo 3 scales some layers only) and dropout at some positions.

    `rotary_pos_emb` is what RotaryTables makes, [2, ...]: table 0 unscaled, table 1 scaled; or [1, ...] when all layers
    agree.
    `attention_bias` is (mask, bool [s, B, 1] where residuals are dropped out, or None for everywhere, and a
    KeyValueCache or None).
    """

    rope_table = 0

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.self_attn_bda = self.mlp_bda = self._dropout_add()

    def forward(self, *args, **kwargs):
        kwargs["rotary_pos_emb"] = kwargs["rotary_pos_emb"][self.rope_table]
        # Set again when the layer is recomputed, from that micro-batch's own arguments.
        mask, self.dropout_positions, cache = kwargs["attention_bias"]
        kwargs["attention_bias"] = (mask, cache)
        return super().forward(*args, **kwargs)

    def _dropout_add(self, norm: nn.Module | None = None):
        """Megatron's bias-dropout-add, with `norm` applied to the sublayer's output first."""

        def build(training, fuse):
            add = get_bias_dropout_add(training, fuse)

            def dropout_add(output_with_bias, residual, probability):
                output, bias = output_with_bias
                output = output if norm is None else norm(output)
                if self.config.fused_kernels and training and probability and bias is None:
                    return fused.dropout_add(output, residual, self.dropout_positions, probability)
                if self.dropout_positions is None or not training or probability == 0:
                    return add((output, bias), residual, probability)
                output = output if bias is None else output + bias
                dropped = F.dropout(output, probability, training=True)
                return residual + torch.where(self.dropout_positions, dropped, output)

            return dropout_add

        return build


class PostNormDecoderLayer(DecoderLayer):
    """OLMo 3's order: x + norm(attention(x)), then x + norm(mlp(x)); nothing is normalised on the way in."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        norm = decoder_norm(config)
        self.post_attention_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.post_mlp_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attn_bda = self._dropout_add(self.post_attention_norm)
        self.mlp_bda = self._dropout_add(self.post_mlp_norm)


def layer_backend(config: LayerConfig) -> BackendSpecProvider:
    """Local torch modules, or Transformer Engine's, which is imported only if it is used."""
    return get_backend(config.transformer_impl)


def decoder_norm(config: LayerConfig):
    return layer_backend(config).layer_norm(rms_norm=True) if config.transformer_impl != "local" else RMSNorm


def _norm_before(config: LayerConfig):
    """A norm whose input is the residual, too."""
    norm = decoder_norm(config)
    # Megatron frees all that a norm returns if it is to be computed again.
    computed_again = config.recompute_granularity == "selective" and "layernorm" in config.recompute_modules
    return functools.partial(norm, with_residual=True) if norm is RMSNorm and not computed_again else norm


def _bias_dropout_add(config: LayerConfig):
    """Megatron's bias-dropout-add, for layers with biases and without dropout one kernel."""

    def build(training, fuse):
        add = get_bias_dropout_add(training, fuse)

        def bias_add(output_with_bias, residual, probability):
            output, bias = output_with_bias
            return fused.bias_add(output, bias, residual)

        return bias_add if config.fused_kernels else add

    return build


def _mlp(linear_fc1, linear_fc2):
    def build(config, pg_collection, is_mtp_layer=False, name=None, input_size=None):
        submodules = MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=linear_fc2)
        sizes = dict(ffn_hidden_size=config.ffn_hidden_size, input_size=input_size)
        return (FusedMLP if config.fused_kernels else MLP)(config, submodules, tp_group=pg_collection.tp, **sizes)

    return build


def gated_mlp(config: LayerConfig, input_size: int, pg_collection) -> MLP:
    """SwiGLU from `input_size` to `config.hidden_size` (the connector's projector)."""
    backend = layer_backend(config)
    build = _mlp(backend.column_parallel_linear(), backend.row_parallel_linear())
    return build(config, pg_collection, input_size=input_size)


def decoder_block_spec(
    model: ModelConfig, config: LayerConfig, pg_collection, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Decoder layers of this pipeline stage (of its piece `vp_stage`) and the final norm."""
    backend, norm, norm_before = layer_backend(config), decoder_norm(config), _norm_before(config)

    def qk_norm(num_heads):
        if model.qk_norm == "per_head":
            # With more ranks than groups, Megatron sorts out which heads of a group are a rank's.
            whole_groups = model.num_query_groups >= pg_collection.tp.size()
            return HeadNormWeight if config.fused_kernels and whole_groups else norm

        def build(config, hidden_size, eps):
            return FullWidthRMSNorm(config, hidden_size, eps, num_heads, pg_collection.tp)

        return build

    layer = ModuleSpec(
        module=PostNormDecoderLayer if model.norm_after else DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if model.norm_after else norm_before,
            self_attention=ModuleSpec(
                module=FusedSelfAttention if config.fused_kernels else SelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_linear(),
                    core_attention=PackedAttention,
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=qk_norm(model.num_attention_heads),
                    k_layernorm=qk_norm(model.num_query_groups),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if model.norm_after else norm_before,
            mlp=_mlp(backend.column_parallel_linear(), backend.row_parallel_linear()),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm)


def gives_weights(config: LayerConfig) -> bool:
    """Whether the vision transformer's layers are those that fused_vit.run_layers runs."""
    return config.fused_kernels and config.transformer_impl == "local"


def vit_block_spec(num_layers: int, config: LayerConfig) -> TransformerBlockSubmodules:
    """Pre-norm encoder layers with LayerNorm and biases; no final norm."""
    backend = layer_backend(config)
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    norm = LayerNorm if config.transformer_impl == "local" else backend.layer_norm(rms_norm=False)
    if gives_weights(config):
        norm, column, row = LayerNormWeights, ColumnWeights, RowWeights
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=CropAttention, linear_proj=row),
            ),
            self_attn_bda=_bias_dropout_add(config),
            pre_mlp_layernorm=norm,
            mlp=_mlp(column, row),
            mlp_bda=_bias_dropout_add(config),
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=None)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
