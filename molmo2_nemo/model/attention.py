"""Core attention with an explicit mask, under tensor and context parallelism.

These modules stand where Megatron's layer specs expect `core_attention`. The mask arrives as `attention_bias`
because Megatron hands that argument to recomputed layers as it is, whatever its type.
"""

import functools

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from molmo2_nemo.model.collectives import all_gather, all_to_all

# FlexAttention's tiles by the width of a head, where others than torch's own are taken: the backward pass of those for
# an H100 spills. Chosen by compiling for sm_90 (tools/check/kernels.py --sweep, docs/rehearsal.md), not by time, which
# nobody has measured (tools/bench/gpu.py --only tiles).
TILES = {
    128: {
        "bwd_BLOCK_M1": 32,
        "bwd_BLOCK_N1": 128,
        "bwd_BLOCK_M2": 128,
        "bwd_BLOCK_N2": 32,
        "bwd_num_warps": 8,
        "bwd_num_stages": 3,
    }
}
# What `parallel.attention_kernel` adds: nothing, loads by the tensor memory accelerator, or another back end.
BACK_ENDS = {"triton": {}, "tma": {"USE_TMA": True}, "flash": {"BACKEND": "FLASH"}}


@functools.cache
def compiled_flex_attention(backend: str = "inductor"):
    """Compiled once for a shape, whatever the mask's contents.

    Eager FlexAttention holds all scores, [heads, S, S]: on a GPU it never runs, and fullgraph makes an error of
    what would fall back to it, such as too many shapes.
    """
    return torch.compile(flex_attention, backend=backend, dynamic=False, fullgraph=True)


def flex_options(backend: str, D: int, dtype: torch.dtype) -> dict:
    """FlexAttention's kernel options. backend: `parallel.attention_kernel`; D: width of a head."""
    tiles = {} if backend == "flash" or dtype == torch.float32 else TILES.get(D, {})
    return tiles | BACK_ENDS[backend]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | BlockMask | None,
    scale: float,
    backend: str = "triton",
) -> Tensor:
    """Attention of [B, N, Q, D] queries over [B, G, K, D] keys and values, N a multiple of G. Returns [B, N, Q, D].

    backend: of FlexAttention, for a BlockMask on a GPU (`flex_options`).
    """
    grouped = query.shape[1] != key.shape[1]
    if isinstance(mask, BlockMask):
        flex = compiled_flex_attention() if query.is_cuda else flex_attention
        options = flex_options(backend, query.shape[-1], query.dtype) if query.is_cuda else None
        return flex(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


def sequence_to_heads(x: Tensor, group) -> Tensor:
    """Ulysses: [S/c, B, N, D] on each of c ranks -> [S, B, N/c, D] (arXiv 2309.14509)."""
    c = group.size()
    s, B, N, D = x.shape
    x = x.view(s, B, c, N // c, D).permute(2, 0, 1, 3, 4).contiguous()
    return all_to_all(x, group).view(c * s, B, N // c, D)


def heads_to_sequence(x: Tensor, group) -> Tensor:
    """The way back: [S, B, N/c, D] -> [S/c, B, N, D]."""
    c = group.size()
    S, B, n, D = x.shape
    x = all_to_all(x.view(c, S // c, B, n, D).contiguous(), group)
    return x.permute(1, 2, 0, 3, 4).reshape(S // c, B, c * n, D)


class PackedAttention(MegatronModule):
    """Decoder attention over packed rows: full sequences per rank, or split over the context parallel group.

    `a2a` (Ulysses) exchanges sequence slices for heads and sees whole rows; key/value heads are repeated when
    there are fewer of them than ranks. `all_gather` keeps the local queries and gathers keys and values. Ring
    attention does not fit arbitrary masks.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type=None,
        attention_type=None,
        cp_comm_type=None,
        softmax_scale=None,
        pg_collection=None,
    ):
        super().__init__(config)
        self.layer_number = layer_number
        self.cp_group = pg_collection.cp
        self.cp_comm_type = cp_comm_type
        self.backend = config.attention_kernel
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self, query, key, value, attention_mask, /, *, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """query [s, B, N, D], key and value [s, B, G, D] with s = S / context parallel size -> [s, B, N*D].

        attention_bias: (mask, None), or (mask, the KeyValueCache that keys and values are put into and taken from).
        """
        mask, cache = attention_bias
        ranks = self.cp_group.size()
        ulysses = ranks > 1 and self.cp_comm_type == "a2a"
        if ulysses:
            if key.shape[2] % ranks:
                repeats = query.shape[2] // key.shape[2]
                key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
            query, key, value = (sequence_to_heads(x, self.cp_group) for x in (query, key, value))
        elif ranks > 1:
            key, value = all_gather(torch.stack((key, value), dim=1), self.cp_group).unbind(dim=1)
        if cache is not None:
            key, value = cache.extended(self.layer_number, key, value)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = attend(q, k, v, mask, self.scale, self.backend).permute(2, 0, 1, 3)
        if ulysses:
            out = heads_to_sequence(out.contiguous(), self.cp_group)
        return out.reshape(*out.shape[:2], -1)


class CropAttention(MegatronModule):
    """ViT attention: every patch of a crop sees every other."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type=None,
        attention_type=None,
        cp_comm_type=None,
        softmax_scale=None,
        pg_collection=None,
    ):
        super().__init__(config)
        self.scale = config.kv_channels**-0.5

    def forward(
        self, query, key, value, attention_mask, /, *, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """[C, P, N, D] each -> [C, P, N*D]."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = attend(q, k, v, None, self.scale).transpose(1, 2)
        return out.reshape(*out.shape[:2], -1)
