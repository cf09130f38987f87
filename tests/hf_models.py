"""Small random models made by transformers: the oracle's side of the parity tests, and what is damaged for others."""

from pathlib import Path

import torch
from safetensors.torch import load_file

V = 200  # not a multiple of 128, so that padded tables are tested


def _config(text: dict, vision: dict | None = None, layers=(-1, -2)):
    from transformers import Molmo2Config

    text = {
        **dict(
            hidden_size=48,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            vocab_size=V,
            additional_vocab_size=128,
            num_hidden_layers=4,
            intermediate_size=96,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        **text,
    }
    vision = {
        **dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            image_size=[70, 70],
            patch_size=14,
        ),
        **(vision or {}),
    }
    adapter = dict(
        vision_feature_layer=list(layers),
        hidden_size=vision["hidden_size"],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=40,
        text_hidden_size=text["hidden_size"],
    )
    ids = dict(
        image_start_token_id=V,
        low_res_image_start_token_id=V + 4,
        image_end_token_id=V + 1,
        image_patch_id=V + 2,
        frame_start_token_id=V + 7,
        frame_end_token_id=V + 8,
    )
    return Molmo2Config(text_config=text, vision_config=vision, adapter_config=adapter, **ids)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}


def configs() -> dict:
    """Name -> Molmo2Config: both language model forms, tied and untied heads, odd crop grids, feature layers."""
    olmo = dict(qk_norm_type="olmo", norm_after=True)
    return {
        "qwen3_gqa": _config(dict(num_key_value_heads=2), dict(image_size=[98, 98]), layers=(2, 0)),
        "qwen3_tied": _config(dict(num_attention_heads=8, head_dim=8)),
        "qwen3_wide_heads": _config(dict(num_attention_heads=8, head_dim=20)),
        "qwen3_all_layers_scaled": _config(dict(rope_parameters=YARN)),
        "olmo3": _config(olmo),
        # 4 x 4 patches: pooling windows of 3 need padding; layers out of order and counted from both ends.
        "olmo3_yarn": _config(
            dict(olmo, rope_parameters=YARN, rope_scaling_layers=[1, 3]), dict(image_size=[56, 56]), layers=(0, -1)
        ),
    }


def move_norms(model):
    """Norm weights away from one, biases away from zero: a swapped or dropped one must show."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model


def save(name: str, folder: Path, seed: int = 0) -> Path:
    """A random model of `configs()[name]` saved by transformers itself into folder / name."""
    from transformers import Molmo2ForConditionalGeneration

    torch.manual_seed(seed)
    model = Molmo2ForConditionalGeneration(configs()[name])
    move_norms(model)
    if name.endswith("_tied"):
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight[:V])
    model.save_pretrained(folder / name)
    return folder / name


def base_models() -> dict:
    """Name -> a random language model or vision tower."""
    from transformers import (
        Olmo3Config,
        Olmo3ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        SiglipConfig,
        SiglipModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(0)
    common = dict(hidden_size=48, num_attention_heads=4, intermediate_size=96, vocab_size=V, eos_token_id=0)
    # 9 blocks: blocks 6 and 0 are read, and 7 and 8 are not built.
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=9, num_attention_heads=2, image_size=72, patch_size=14
    )
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    qwen = dict(
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
    )
    yarn = {key: value for key, value in YARN.items() if key != "rope_theta"}
    return {
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**common, **qwen)),
        "qwen3_tied": Qwen3ForCausalLM(Qwen3Config(**common, **qwen, tie_word_embeddings=True)),
        "olmo3": Olmo3ForCausalLM(Olmo3Config(**common, num_hidden_layers=4, sliding_window=64, rope_scaling=yarn)),
        "siglip": SiglipVisionModel(vision),
        # As on the Hub: the vision tower beside its text tower.
        "siglip_with_text": SiglipModel(SiglipConfig(vision_config=vision.to_dict(), text_config=text)),
    }


def released_file(folder):
    return load_file(folder / "model.safetensors")


def as_released(folder):
    """What transformers wrote, with its halved embedding table cut at the base vocabulary instead."""
    tensors = released_file(folder)
    table = torch.cat([tensors[f"model.transformer.wte.{p}"] for p in ("embedding", "new_embedding")])
    return {**tensors, "model.transformer.wte.embedding": table[:V], "model.transformer.wte.new_embedding": table[V:]}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
