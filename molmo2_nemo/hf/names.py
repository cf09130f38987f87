"""A table of each checkpoint tensor, the released Hugging Face tensors that it is made of, and both conversions.

Released names are those of the checkpoints on the Hub (and of transformers' `save_pretrained`); native names are
the module names of transformers' Molmo2ForConditionalGeneration. Sources: public `olmo/hf_model/` of
allenai/molmo2, transformers `conversion_mapping.py`.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2_nemo.config.schema import ModelConfig, padded_vocab_size

# The norms of a decoder layer's attention and MLP: on a sublayer's input, or on its output (OLMo 3).
NORMS_BEFORE = ("input_layernorm", "pre_mlp_layernorm")
NORMS_AFTER = ("post_attention_norm", "post_mlp_norm")


@dataclass(frozen=True)
class Entry:
    """A tensor of our checkpoint. `join` makes it from the released ones, `split` undoes that bit for bit."""

    key: str
    shape: tuple[int, ...]
    released: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


def interleave_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Megatron's fused projection. Its rows are, for each key/value head, those of its query heads, key and value."""
    parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


def separate_qkv(qkv: Tensor, groups: int, head_dim: int) -> list[Tensor]:
    """Undo `interleave_qkv`."""
    grouped = qkv.reshape(groups, -1, *qkv.shape[1:])
    q, k, v = grouped.split([grouped.shape[1] - 2 * head_dim, head_dim, head_dim], dim=1)
    return [x.reshape(-1, *qkv.shape[1:]) for x in (q, k, v)]


def tensor_table(model: ModelConfig) -> list[Entry]:
    """All tensors of a checkpoint of this architecture, the extra and base embeddings included."""
    entries = []

    def add(key, shape, *released, join=lambda xs: xs[0], split=lambda x: [x]):
        entries.append(Entry(key, tuple(shape), released, join, split))

    def linear(key, name, rows, columns):
        add(f"{key}.weight", (rows, columns), f"{name}.weight")
        add(f"{key}.bias", (rows,), f"{name}.bias")

    def norm(key, name, width, bias=False):
        add(f"{key}.weight", (width,), f"{name}.weight")
        if bias:
            add(f"{key}.bias", (width,), f"{name}.bias")

    # Vision transformer.
    vit, vision, backbone = model.vit, model.vision, "model.vision_backbone"
    H, inner, heads = vit.hidden_size, vit.num_attention_heads * vit.head_dim, vit.num_attention_heads
    linear("vision.vit.patch_embedding", f"{backbone}.image_vit.patch_embedding", H, vision.patch_dim)
    add("vision.vit.position_embedding", (vision.patches_per_crop, H), f"{backbone}.image_vit.positional_embedding")
    for i in range(vit.num_layers):
        key, name = f"vision.vit.encoder.layers.{i}", f"{backbone}.image_vit.transformer.resblocks.{i}"
        norm(f"{key}.input_layernorm", f"{name}.attention_norm", H, bias=True)
        norm(f"{key}.pre_mlp_layernorm", f"{name}.ffn_norm", H, bias=True)
        for kind, shape in (("weight", (3 * inner, H)), ("bias", (3 * inner,))):
            add(
                f"{key}.self_attention.linear_qkv.{kind}",
                shape,
                *(f"{name}.attention.{w}.{kind}" for w in ("wq", "wk", "wv")),
                join=lambda xs: interleave_qkv(*xs, groups=heads),
                split=lambda x: separate_qkv(x, heads, vit.head_dim),
            )
        linear(f"{key}.self_attention.linear_proj", f"{name}.attention.wo", H, inner)
        linear(f"{key}.mlp.linear_fc1", f"{name}.feed_forward.w1", vit.ffn_hidden_size, H)
        linear(f"{key}.mlp.linear_fc2", f"{name}.feed_forward.w2", H, vit.ffn_hidden_size)

    # Connector.
    connector = model.connector
    features, inner = H * len(vit.feature_layers), connector.num_attention_heads * connector.head_dim
    pooling, projector = f"{backbone}.image_pooling_2d", f"{backbone}.image_projector"
    for ours, theirs in (("query", "wq"), ("key", "wk"), ("value", "wv")):
        linear(f"vision.connector.{ours}", f"{pooling}.{theirs}", inner, features)
    linear("vision.connector.output", f"{pooling}.wo", connector.hidden_size, inner)
    # w1 is the gate, w3 the other factor: ours is [gate; up].
    add(
        "vision.connector.projector.linear_fc1.weight",
        (2 * connector.ffn_hidden_size, connector.hidden_size),
        f"{projector}.w1.weight",
        f"{projector}.w3.weight",
        join=torch.cat,
        split=lambda x: list(x.chunk(2)),
    )
    shape = (model.hidden_size, connector.ffn_hidden_size)
    add("vision.connector.projector.linear_fc2.weight", shape, f"{projector}.w2.weight")

    # Language model.
    H, D, groups = model.hidden_size, model.head_dim, model.num_query_groups
    q_width, kv_width, rows = model.num_attention_heads * D, groups * D, padded_vocab_size(model.vocab_size)

    def table(key, name):
        add(
            key,
            (rows, H),
            name,
            # Where there is nothing to pad, the largest tensor of a model is not copied.
            join=lambda xs: xs[0] if xs[0].shape[0] == rows else F.pad(xs[0], (0, 0, 0, rows - xs[0].shape[0])),
            split=lambda x: [x[: model.vocab_size]],
        )

    table("embedding.word_embeddings.weight", "model.transformer.wte.embedding")
    add("embedding.extra_embedding", (model.additional_vocab_size, H), "model.transformer.wte.new_embedding")
    for i in range(model.num_layers):
        key, name = f"decoder.layers.{i}", f"model.transformer.blocks.{i}"
        attention_norm, mlp_norm = NORMS_AFTER if model.norm_after else NORMS_BEFORE
        norm(f"{key}.{attention_norm}", f"{name}.attn_norm", H)
        norm(f"{key}.{mlp_norm}", f"{name}.ff_norm", H)
        add(
            f"{key}.self_attention.linear_qkv.weight",
            (q_width + 2 * kv_width, H),
            f"{name}.self_attn.att_proj.weight",
            join=lambda xs: interleave_qkv(*xs[0].split([q_width, kv_width, kv_width]), groups=groups),
            split=lambda x: [torch.cat(separate_qkv(x, groups, D))],
        )
        per_head = model.qk_norm == "per_head"
        norm(f"{key}.self_attention.q_layernorm", f"{name}.self_attn.q_norm", D if per_head else q_width)
        norm(f"{key}.self_attention.k_layernorm", f"{name}.self_attn.k_norm", D if per_head else kv_width)
        add(f"{key}.self_attention.linear_proj.weight", (H, q_width), f"{name}.self_attn.attn_out.weight")
        # Released rows are [up; gate], ours [gate; up].
        add(
            f"{key}.mlp.linear_fc1.weight",
            (2 * model.ffn_hidden_size, H),
            f"{name}.mlp.ff_proj.weight",
            join=lambda xs: torch.cat(xs[0].chunk(2)[::-1]),
            split=lambda x: [torch.cat(x.chunk(2)[::-1])],
        )
        add(f"{key}.mlp.linear_fc2.weight", (H, model.ffn_hidden_size), f"{name}.mlp.ff_out.weight")
    norm("decoder.final_layernorm", "model.transformer.ln_f", H)
    if not model.tie_embeddings:
        table("output_layer.weight", "lm_head.weight")
    return entries


_NATIVE_RULES = [
    (r"^model\.vision_backbone\.image_vit\.transformer\.resblocks\.", "model.vision_tower.layers."),
    (r"^model\.vision_backbone\.image_vit\.", "model.vision_tower."),
    (r"^model\.vision_backbone\.", "model.multi_modal_projector."),
    (r"^model\.transformer\.ln_f\.", "model.language_model.norm."),
    (r"^model\.transformer\.blocks\.", "model.language_model.layers."),
    (r"\.attention\.wq\.", ".self_attn.q_proj."),
    (r"\.attention\.wk\.", ".self_attn.k_proj."),
    (r"\.attention\.wv\.", ".self_attn.v_proj."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.fc1."),
    (r"\.feed_forward\.w2\.", ".mlp.fc2."),
    (r"\.attention_norm\.", ".layer_norm1."),
    (r"\.ffn_norm\.", ".layer_norm2."),
    (r"image_pooling_2d\.w([qkvo])\.", r"image_pooling_2d.\1_proj."),
    (r"image_projector\.w1\.", "image_projector.gate_proj."),
    (r"image_projector\.w2\.", "image_projector.down_proj."),
    (r"image_projector\.w3\.", "image_projector.up_proj."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ff_norm\.", ".post_attention_layernorm."),
    (r"\.self_attn\.attn_out\.", ".self_attn.o_proj."),
    (r"\.mlp\.ff_out\.", ".mlp.down_proj."),
]


def native_parts(released: str) -> list[str]:
    """Native names whose rows, one above the other, make the released tensor (embeddings are read apart)."""
    name = released
    for pattern, replacement in _NATIVE_RULES:
        name = re.sub(pattern, replacement, name)
    if name.endswith(".self_attn.att_proj.weight"):
        return [name.replace("att_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
    if name.endswith(".mlp.ff_proj.weight"):
        return [name.replace("ff_proj", part) for part in ("up_proj", "gate_proj")]
    return [name]


# Where the tensors of a base model are: native name without its prefix -> the base model's own.
_BASE_RULES = {
    # OLMo 3 norms the output of a sublayer, and calls it so.
    "olmo3": [
        (r"\.post_attention_layernorm\.", ".post_feedforward_layernorm."),
        (r"\.input_layernorm\.", ".post_attention_layernorm."),
    ],
    "qwen3": [],
    "siglip": [
        (r"^layers\.", "encoder.layers."),
        (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
        (r"^patch_embedding\.", "embeddings.patch_embedding."),
        (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    ],
}


def base_parts(released: str, family: str) -> list[str]:
    """Names in a base model (`qwen3`, `olmo3`, `siglip`) whose rows, one above the other, make the released tensor.

    Without the prefix that depends on the class it was saved from. Sources: the modules of transformers.
    """
    names = []
    for name in native_parts(released):
        name = re.sub(r"^model\.(language_model|vision_tower)\.", "", name)
        for pattern, replacement in _BASE_RULES[family]:
            name = re.sub(pattern, replacement, name)
        names.append(name)
    return names


EMBEDDING_PARTS = ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding")
NATIVE_EMBEDDING = "model.language_model.embed_tokens.weight"


class WrongShape(Exception):
    """A tensor has other dimensions than the architecture asks for."""


# Rows of a table that is split over tensors are copied so many at a time.
_ROWS_AT_ONCE = 4096


def read_released(
    name: str,
    model: ModelConfig,
    available: dict[str, int],
    read: Callable[[str, slice | None], Tensor],
    rows: slice | None = None,
) -> Tensor:
    """The released tensor `name` from a folder that holds released or native names.

    available: rows of each tensor of the folder. read(name, rows): a tensor of it, or these of its rows. rows: of an
    embedding, these alone.
    The joined embedding may have been cut anywhere (transformers 5.23 halves it): it is read as one, and cut at the
    base vocabulary's size. Raises KeyError naming what is missing, and WrongShape.
    """
    if name in EMBEDDING_PARTS:
        parts = [part for part in EMBEDDING_PARTS if part in available] or [NATIVE_EMBEDDING]
        lengths = [available[part] for part in parts]
        expected = model.vocab_size + model.additional_vocab_size
        if sum(lengths) != expected:
            raise WrongShape(f"{' + '.join(parts)} have {sum(lengths)} rows, not {expected}")
        whole = slice(0, model.vocab_size) if name == EMBEDDING_PARTS[0] else slice(model.vocab_size, expected)
        return _rows_of_parts(parts, lengths, read, whole if rows is None else rows)
    if name in available:
        return read(name, rows)
    return torch.cat([read(part, None) for part in native_parts(name)])


def _rows_of_parts(parts: list[str], lengths: list[int], read: Callable, rows: slice) -> Tensor:
    """Rows of a table that tensors make together, one below the other; nothing is held twice."""
    pieces, offset = [], 0
    for part, length in zip(parts, lengths):
        first, last = max(rows.start - offset, 0), min(rows.stop - offset, length)
        if first < last:
            pieces.append((part, first, last))
        offset += length
    if len(pieces) == 1:
        part, first, last = pieces[0]
        whole = (first, last) == (0, lengths[parts.index(part)])
        return read(part, None if whole else slice(first, last))
    samples = [read(part, slice(first, first + 1)) for part, first, _ in pieces]
    dtype = functools.reduce(torch.promote_types, [sample.dtype for sample in samples])
    table = samples[0].new_empty((rows.stop - rows.start, *samples[0].shape[1:]), dtype=dtype)
    at = 0
    for part, first, last in pieces:
        for start in range(first, last, _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, last)
            table[at : at + stop - start] = read(part, slice(start, stop))
            at += stop - start
    return table
