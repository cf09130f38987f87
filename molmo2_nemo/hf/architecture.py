"""Our ModelConfig from and to transformers' Molmo2Config, and RoPE tables by transformers' own formulas."""

from pathlib import Path

import torch

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import ConnectorConfig, ModelConfig, VisionConfig, VitConfig, vision_token_ids
from molmo2_nemo.hf.folder import first, is_there, parsed, read_config, read_json


def model_config_from_hf(path: Path) -> ModelConfig:
    """The architecture in a Hugging Face folder's config.json (native or released layout), its processor's geometry.

    tie_embeddings is what config.json says, whatever the weights are. Raises ConfigError for a folder that is no
    Molmo2, is damaged, or needs a feature that is not supported.
    """
    from transformers import Molmo2Config

    raw = read_config(path)
    if raw.get("model_type") != "molmo2":
        raise ConfigError(f"{path}/config.json says model_type={raw.get('model_type')!r}: only molmo2 can be read.")
    hf = parsed(path, Molmo2Config, raw)
    text, vit, adapter = hf.text_config, hf.vision_config, hf.adapter_config

    def require(key, value, expected):
        if value != expected:
            raise ConfigError(f"{path}/config.json: {key}={value!r} is not supported, only {expected!r}.")

    require("text_config.attention_bias", text.attention_bias, False)
    require("text_config.hidden_act", text.hidden_act, "silu")
    require("vision_config.hidden_act", vit.hidden_act, "gelu_pytorch_tanh")
    require("vision_config.num_key_value_heads", vit.num_key_value_heads, vit.num_attention_heads)
    require("vision_config.attention_bias", vit.attention_bias, True)
    require("adapter_config.num_key_value_heads", adapter.num_key_value_heads, adapter.num_attention_heads)
    require("adapter_config.attention_bias", adapter.attention_bias, True)
    require("adapter_config.hidden_act", adapter.hidden_act, "silu")
    require("adapter_config.mlp_bias", adapter.mlp_bias, False)
    require("adapter_config.hidden_size", adapter.hidden_size, vit.hidden_size)
    require("adapter_config.text_hidden_size", adapter.text_hidden_size, text.hidden_size)
    require("vision_config.image_size", len(set(vit.image_size)), 1)
    rope = dict(text.rope_parameters or {})
    if "rope_theta" not in rope:
        raise ConfigError(f"{path}/config.json: text_config.rope_parameters has no rope_theta: download it again.")
    theta = rope.pop("rope_theta")
    scaled = rope.get("rope_type", "default") != "default"
    all_layers = list(text.rope_scaling_layers) == list(range(text.num_hidden_layers))
    model = ModelConfig(
        name=path.name,
        tokenizer=str(path),
        vision=_vision_geometry(path, vit.image_size[0], vit.patch_size),
        vit=VitConfig(
            num_layers=vit.num_hidden_layers,
            hidden_size=vit.hidden_size,
            num_attention_heads=vit.num_attention_heads,
            head_dim=vit.head_dim,
            ffn_hidden_size=vit.intermediate_size,
            layernorm_epsilon=vit.layer_norm_eps,
            feature_layers=list(adapter.vision_feature_layer),
        ),
        connector=ConnectorConfig(
            hidden_size=adapter.hidden_size,
            num_attention_heads=adapter.num_attention_heads,
            head_dim=adapter.head_dim,
            ffn_hidden_size=adapter.intermediate_size,
        ),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        head_dim=text.head_dim,
        ffn_hidden_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        additional_vocab_size=text.additional_vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        layernorm_epsilon=text.rms_norm_eps,
        qk_norm="per_head" if text.qk_norm_type == "qwen3" else "full_width",
        norm_after=text.norm_after,
        tie_embeddings=bool(hf.tie_word_embeddings or text.tie_word_embeddings),
        rope_theta=theta,
        rope_scaling=rope if scaled else None,
        rope_scaling_layers=list(text.rope_scaling_layers) if scaled and not all_layers else None,
        init_std=text.initializer_range,
        vision_token_ids={name: getattr(hf, name) for name in _TOKEN_FIELDS},
    )
    check_rope(path, model)
    return model


_TOKEN_FIELDS = (
    "image_start_token_id",
    "low_res_image_start_token_id",
    "image_end_token_id",
    "image_patch_id",
    "frame_start_token_id",
    "frame_end_token_id",
)


def _vision_geometry(path: Path, image_size: int, patch_size: int) -> VisionConfig:
    """Crop geometry, with pooling and margins from the folder's processor where it has one."""
    vision = VisionConfig(image_size=image_size, patch_size=patch_size)
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = path / name
        if is_there(file):
            saved = read_json(file)
            image, video = saved.get("image_processor", saved), saved.get("video_processor", {})
            if not isinstance(image, dict) or not isinstance(video, dict):
                raise ConfigError(f"{file}: image_processor or video_processor is no JSON object: download it again.")
            margin, pooling = first(file, image, "overlap_margins"), first(file, image, "pooling_size")
            vision.overlap_margin = vision.overlap_margin if margin is None else margin
            vision.image_pooling = pooling or vision.image_pooling
            vision.video_pooling = first(file, video, "pooling_size") or vision.video_pooling
            break
    # A crop needs patches between its margins; a small model without processor files gets the largest that fits.
    vision.overlap_margin = min(vision.overlap_margin, (image_size // patch_size - 1) // 2)
    return vision


def hf_config(model: ModelConfig, dtype: str = "float32"):
    """transformers' Molmo2Config of this architecture."""
    from transformers import Molmo2Config

    vit, connector = model.vit, model.connector
    rope = {"rope_type": "default", **(model.rope_scaling or {}), "rope_theta": model.rope_theta}
    text = dict(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        additional_vocab_size=model.additional_vocab_size,
        num_hidden_layers=model.num_layers,
        intermediate_size=model.ffn_hidden_size,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters=rope,
        rope_scaling_layers=model.rope_scaling_layers,
        rms_norm_eps=model.layernorm_epsilon,
        qk_norm_type="qwen3" if model.qk_norm == "per_head" else "olmo",
        norm_after=model.norm_after,
        initializer_range=model.init_std,
    )
    vision = dict(
        hidden_size=vit.hidden_size,
        intermediate_size=vit.ffn_hidden_size,
        num_hidden_layers=vit.num_layers,
        num_attention_heads=vit.num_attention_heads,
        num_key_value_heads=vit.num_attention_heads,
        head_dim=vit.head_dim,
        layer_norm_eps=vit.layernorm_epsilon,
        patch_size=model.vision.patch_size,
        image_size=[model.vision.image_size] * 2,
    )
    adapter = dict(
        vision_feature_layer=list(vit.feature_layers),
        hidden_size=connector.hidden_size,
        num_attention_heads=connector.num_attention_heads,
        num_key_value_heads=connector.num_attention_heads,
        head_dim=connector.head_dim,
        intermediate_size=connector.ffn_hidden_size,
        text_hidden_size=model.hidden_size,
    )
    # The head is always written out, also when it is tied here (the released checkpoints do the same).
    return Molmo2Config(
        text_config=text,
        vision_config=vision,
        adapter_config=adapter,
        tie_word_embeddings=False,
        architectures=["Molmo2ForConditionalGeneration"],
        dtype=dtype,
        **vision_token_ids(model),
    )


def rope_tables(model: ModelConfig) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Inverse frequencies float32 [D/2]: plain, scaled (None without scaling), and the scaled table's factor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    exponent = torch.arange(0, model.head_dim, 2, dtype=torch.float) / model.head_dim
    plain = 1.0 / (model.rope_theta**exponent)
    if not model.rope_scaling:
        return plain, None, 1.0
    scaled, factor = ROPE_INIT_FUNCTIONS[model.rope_scaling["rope_type"]](hf_config(model).text_config)
    return plain, scaled, factor


def check_rope(path: Path, model: ModelConfig) -> None:
    """Raise ConfigError if transformers cannot make the rotary position embedding that config.json describes."""
    try:
        rope_tables(model)
    except Exception as error:  # whatever a formula makes of a missing key or a text among its numbers
        raise ConfigError(
            f"{path}/config.json: rope_parameters={model.rope_scaling} cannot be used ({type(error).__name__}: "
            f"{error}): correct it or download it again."
        ) from error
