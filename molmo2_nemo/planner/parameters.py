"""Every parameter of the model, by arithmetic on its configuration. Imports no torch."""

from collections.abc import Iterator

from molmo2_nemo.config.lora import adapted_matrices
from molmo2_nemo.config.schema import LoraConfig, ModelConfig, padded_vocab_size


def parameters(m: ModelConfig) -> Iterator[tuple[str, int, bool]]:
    """(name, elements, whether tensor parallel ranks split it) of every parameter, named as on a single rank."""
    vit, connector, H = m.vit, m.connector, m.hidden_size
    heads, inner = vit.num_attention_heads * vit.head_dim, connector.num_attention_heads * connector.head_dim
    features = vit.hidden_size * len(vit.feature_layers)
    v, f = vit.hidden_size, vit.ffn_hidden_size
    yield "vision.vit.position_embedding", m.vision.patches_per_crop * v, False
    yield from _linear("vision.vit.patch_embedding", m.vision.patch_dim, v, True, False)
    for layer in range(vit.num_layers):
        at = f"vision.vit.encoder.layers.{layer}"
        for norm in ("input_layernorm", "pre_mlp_layernorm"):
            yield from _linear(f"{at}.{norm}", 1, v, True, False)
        for name, width_in, width_out in (
            ("self_attention.linear_qkv", v, 3 * heads),
            ("self_attention.linear_proj", heads, v),
            ("mlp.linear_fc1", v, f),
            ("mlp.linear_fc2", f, v),
        ):
            yield from _linear(f"{at}.{name}", width_in, width_out, True, False)
    for name in ("query", "key", "value"):
        yield from _linear(f"vision.connector.{name}", features, inner, True, False)
    yield from _linear("vision.connector.output", inner, connector.hidden_size, True, False)
    projector = "vision.connector.projector"
    yield from _linear(f"{projector}.linear_fc1", connector.hidden_size, 2 * connector.ffn_hidden_size, False, False)
    yield from _linear(f"{projector}.linear_fc2", connector.ffn_hidden_size, H, False, False)
    rows = padded_vocab_size(m.vocab_size)
    yield "embedding.word_embeddings.weight", rows * H, True
    yield "embedding.extra_embedding", m.additional_vocab_size * H, False
    queries, keys = m.num_attention_heads * m.head_dim, m.num_query_groups * m.head_dim
    for layer in range(m.num_layers):
        at = f"decoder.layers.{layer}"
        norms = ("post_attention_norm", "post_mlp_norm") if m.norm_after else ("input_layernorm", "pre_mlp_layernorm")
        for norm in norms:
            yield f"{at}.{norm}.weight", H, False
        full = m.qk_norm == "full_width"
        yield f"{at}.self_attention.q_layernorm.weight", queries if full else m.head_dim, False
        yield f"{at}.self_attention.k_layernorm.weight", keys if full else m.head_dim, False
        yield f"{at}.self_attention.linear_qkv.weight", H * (queries + 2 * keys), True
        yield f"{at}.self_attention.linear_proj.weight", queries * H, True
        yield f"{at}.mlp.linear_fc1.weight", H * 2 * m.ffn_hidden_size, True
        yield f"{at}.mlp.linear_fc2.weight", m.ffn_hidden_size * H, True
    yield "decoder.final_layernorm.weight", H, False
    if not m.tie_embeddings:
        yield "output_layer.weight", rows * H, True


def adapter_parameters(m: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, int, bool]]:
    """The same of LoRA's adapters."""
    for matrix in adapted_matrices(m, lora):
        yield f"{matrix.name}.lora.a", len(matrix.parts) * lora.rank * matrix.columns, matrix.split == "columns"
        yield f"{matrix.name}.lora.b", matrix.rows * lora.rank, matrix.split == "rows"


def _linear(name: str, width_in: int, width_out: int, bias: bool, split: bool) -> Iterator[tuple[str, int, bool]]:
    yield f"{name}.weight", width_in * width_out, split
    if bias:
        yield f"{name}.bias", width_out, split
