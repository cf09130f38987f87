"""The architecture survives the way from and to transformers' configuration, in its native and its released form."""

import json

import hf_models
import pytest

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.hf.architecture import hf_config, model_config_from_hf

V = 200


def saved(folder, config: dict):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", hf_models.configs())
def test_native_configurations_survive(name, tmp_path):
    config = hf_models.configs()[name]
    config.save_pretrained(tmp_path)
    again = hf_config(model_config_from_hf(tmp_path))
    for part in ("text_config", "vision_config", "adapter_config"):
        ours, theirs = getattr(again, part).to_dict(), getattr(config, part).to_dict()
        for key in theirs:
            if key not in ("dtype", "transformers_version", "_name_or_path"):
                assert ours[key] == theirs[key], (part, key)


def test_a_released_configuration_is_read(tmp_path):
    """Key names of the config.json on the Hub (public `olmo/hf_model/`): 27-layer ViT, scaling on some layers only."""
    released = dict(
        model_type="molmo2",
        auto_map={"AutoConfig": "configuration_molmo2.Molmo2Config"},
        vit_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=27,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            hidden_act="gelu_pytorch_tanh",
            image_default_input_size=[378, 378],
            image_patch_size=14,
            image_num_pos=729,
            float32_attention=True,
        ),
        adapter_config=dict(
            vit_layers=[-3, -9],
            pooling_attention_mask=True,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            hidden_act="silu",
            intermediate_size=40,
            text_hidden_size=64,
        ),
        text_config=dict(
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            vocab_size=V,
            additional_vocab_size=128,
            qkv_bias=False,
            num_hidden_layers=4,
            intermediate_size=96,
            max_position_embeddings=65536,
            rope_theta=500000.0,
            rope_scaling_layers=[3],
            qk_norm_type="olmo",
            rope_scaling=dict(
                rope_type="yarn",
                factor=8.0,
                attention_factor=1.2079441541679836,
                beta_fast=32,
                beta_slow=1,
                original_max_position_embeddings=8192,
            ),
            layer_norm_eps=1e-6,
            norm_after=True,
        ),
        image_start_token_id=V,
        image_end_token_id=V + 1,
        image_patch_id=V + 2,
        low_res_image_start_token_id=V + 4,
        frame_start_token_id=V + 7,
        frame_end_token_id=V + 8,
    )
    model = model_config_from_hf(saved(tmp_path / "hub", released))
    assert (model.vit.num_layers, model.vit.feature_layers) == (25, [24, 18])
    assert (model.qk_norm, model.norm_after, model.rope_scaling_layers) == ("full_width", True, [3])
    assert (model.rope_theta, model.rope_scaling["factor"]) == (500000.0, 8.0)
    assert (model.vision.image_size, model.vision.overlap_margin) == (378, 4)


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("text_config", "attention_bias", True),
        ("vision_config", "hidden_act", "relu"),
        ("adapter_config", "mlp_bias", True),
    ],
)
def test_what_is_not_built_is_refused(part, key, value, tmp_path):
    config = hf_models.configs()["olmo3"].to_dict()
    config[part][key] = value
    with pytest.raises(ConfigError, match=f"{part}.{key}={value!r} is not supported"):
        model_config_from_hf(saved(tmp_path / "other", config))


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="only molmo2 can be read"):
        model_config_from_hf(saved(tmp_path / "llama", {"model_type": "llama"}))
