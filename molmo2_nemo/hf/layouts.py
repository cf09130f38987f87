"""config.json of an export, in one of two layouts; the weights have the same names in both.

- `released`: the names of the checkpoints on the Hub (allenai/molmo2 at f3cb108, olmo/hf_model/configuration_molmo2.py,
  convert_molmo2_to_hf.py), which vLLM's own Molmo2 and transformers read. The folder also holds configuration_molmo2.py
  of this folder, which transformers runs only when it is told to trust it.
- `native`: what transformers' Molmo2Config writes. No file of code, and no server of the two reads it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from molmo2_nemo.config.schema import EXTRA_TOKENS, ModelConfig, vision_token_ids
from molmo2_nemo.hf import configuration_molmo2
from molmo2_nemo.hf.architecture import hf_config
from molmo2_nemo.hf.folder import CONFIG_FILE

LAYOUTS = ("released", "native")
CODE_FILE = Path(configuration_molmo2.__file__).name
# Tokens that transformers' configuration has no name for, and the released one has.
_OTHER_TOKENS = {"image_col_id": "<im_col>", "image_low_res_id": "<im_low>"}


def write_config(folder: Path, model: ModelConfig, dtype: str, layout: str, tokenizer=None) -> None:
    """Write config.json, and what it refers to, into a folder. dtype: `float32` or `bfloat16`; layout: of LAYOUTS.

    tokenizer: whose ids the column and low-resolution tokens have; None: those after the base vocabulary.
    """
    assert layout in LAYOUTS
    if layout == "native":
        hf_config(model, dtype).save_pretrained(folder)
        return
    (folder / CONFIG_FILE).write_text(json.dumps(released_config(model, dtype, tokenizer), indent=2) + "\n")
    shutil.copyfile(configuration_molmo2.__file__, folder / CODE_FILE)


def released_config(model: ModelConfig, dtype: str = "float32", tokenizer=None) -> dict[str, Any]:
    """config.json in the layout of the checkpoints on the Hub. Arguments as of `write_config`."""
    native = hf_config(model, dtype)
    text, vit, adapter = native.text_config, native.vision_config, native.adapter_config
    others = {
        name: model.vocab_size + EXTRA_TOKENS.index(token)
        if tokenizer is None
        else tokenizer.convert_tokens_to_ids(token)
        for name, token in _OTHER_TOKENS.items()
    }
    return {
        "architectures": native.architectures,
        "auto_map": {"AutoConfig": f"{Path(CODE_FILE).stem}.Molmo2Config"},
        "model_type": native.model_type,
        "dtype": dtype,
        "text_config": {
            "model_type": text.model_type,
            **_same(text, "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act"),
            **_same(text, "num_attention_heads", "num_key_value_heads", "head_dim"),
            **_same(text, "vocab_size", "additional_vocab_size", "max_position_embeddings"),
            **_same(text, "qk_norm_type", "norm_after", "initializer_range", "use_cache", "tie_word_embeddings"),
            "qkv_bias": text.attention_bias,
            "use_qk_norm": True,
            "layer_norm_eps": text.rms_norm_eps,
            "rope_theta": model.rope_theta,
            "rope_scaling": dict(model.rope_scaling) if model.rope_scaling else None,
            "rope_scaling_layers": model.rope_scaling_layers,
            "embedding_dropout": 0.0,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
        },
        "vit_config": {
            **_same(vit, "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act", "layer_norm_eps"),
            **_same(vit, "num_attention_heads", "num_key_value_heads", "head_dim", "initializer_range"),
            "image_default_input_size": vit.image_size,
            "image_patch_size": vit.patch_size,
            "image_num_pos": vit.num_position_embeddings,
            "float32_attention": True,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
        },
        "adapter_config": {
            **_same(adapter, "hidden_size", "intermediate_size", "text_hidden_size", "hidden_act"),
            **_same(adapter, "num_attention_heads", "num_key_value_heads", "head_dim", "initializer_range"),
            "vit_layers": [layer % vit.num_hidden_layers for layer in adapter.vision_feature_layer],
            # The average over a window leaves out what lies outside of the picture.
            "pooling_attention_mask": True,
            "float32_attention": True,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "image_feature_dropout": 0.0,
        },
        **vision_token_ids(model),
        **others,
        "use_frame_special_tokens": True,
        "initializer_range": native.initializer_range,
        "use_cache": True,
        "tie_word_embeddings": False,
    }


def _same(config, *names: str) -> dict[str, Any]:
    """Settings that have one name in both layouts."""
    return {name: getattr(config, name) for name in names}
