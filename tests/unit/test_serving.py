"""What vLLM reads of an export, by tables of what its own Molmo2 asks for: vLLM itself needs a GPU to be of use.

Source of the tables: vLLM v0.33.0, vllm/model_executor/models/molmo2.py (the data classes VitConfig, AdapterConfig and
TextConfig, `_get_prompt_updates`, the modules and their `hf_to_vllm_mapper`) and vllm/multimodal/video.py.
"""

import json
import pickle
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.config.schema import ModelConfig
from molmo2_nemo.hf import convert
from molmo2_nemo.hf.architecture import model_config_from_hf
from molmo2_nemo.hf.layouts import LAYOUTS
from molmo2_nemo.hf.model_card import model_card

ATTENTION = ["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_act"]
FIELDS = {
    "vit_config": [*ATTENTION, "num_hidden_layers", "layer_norm_eps", "image_default_input_size", "image_patch_size"]
    + ["image_num_pos"],
    "adapter_config": [*ATTENTION, "vit_layers", "pooling_attention_mask", "text_hidden_size"],
    "text_config": [*ATTENTION, "vocab_size", "additional_vocab_size", "qkv_bias", "num_hidden_layers"]
    + ["max_position_embeddings", "rope_theta", "use_qk_norm", "qk_norm_type", "layer_norm_eps", "norm_after"]
    + ["rope_scaling_layers", "rope_parameters"],
}
TOKENS = {
    "image_patch_id": "<im_patch>",
    "image_col_id": "<im_col>",
    "image_start_token_id": "<im_start>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "image_end_token_id": "<im_end>",
    "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
    "image_low_res_id": "<im_low>",
}
OF_THE_PROCESSOR = ["image_use_col_tokens", "use_single_crop_col_tokens", "use_single_crop_start_token"]
OF_THE_PROCESSOR += ["video_use_col_tokens", "use_frame_special_tokens"]
OF_IMAGES = ["size", "patch_size", "pooling_size", "max_crops", "overlap_margins"]
OF_VIDEOS = ["size", "patch_size", "pooling_size", "num_frames", "max_fps", "sampling_fps", "frame_sample_mode"]


@pytest.fixture(scope="module")
def folders(export, tmp_path_factory):
    """Layout -> an export of the tiny model in it, with tokenizer and processor."""
    root = tmp_path_factory.mktemp("served")
    convert.import_hf(export, root / "ckpt", progress=str)
    for layout in LAYOUTS:
        convert.export_hf(root / "ckpt", root / layout, tokenizer=str(export), layout=layout, progress=str)
    return {layout: root / layout for layout in LAYOUTS}


@pytest.fixture
def trusted(folders, tmp_path, monkeypatch):
    """The configuration that a server gets with --trust-remote-code."""
    from transformers import AutoConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    return AutoConfig.from_pretrained(folders["released"], trust_remote_code=True)


def inputs_of(folder):
    from transformers import AutoProcessor

    processor, picture = AutoProcessor.from_pretrained(folder), Image.radial_gradient("L").convert("RGB")
    return processor(text="<|image|>Where?", images=[picture.resize((150, 90))], return_tensors="pt")


def test_transformers_sees_the_same_model_in_both_layouts(folders, export):
    from transformers import Molmo2ForConditionalGeneration

    inputs = inputs_of(export)
    expected = Molmo2ForConditionalGeneration.from_pretrained(export, dtype=torch.float32)(**inputs).logits
    for folder in folders.values():
        found = Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(found(**inputs).logits, expected)
    assert [(folder / "configuration_molmo2.py").exists() for folder in folders.values()] == [True, False]


def test_what_vllm_asks_of_the_configuration_is_there(folders, trusted, export):
    from transformers import AutoConfig, Molmo2Config

    model, stored = model_config_from_hf(export), json.loads((folders["released"] / "config.json").read_text())
    for part, names in FIELDS.items():
        for name in names:
            found = getattr(getattr(trusted, part), name)  # as vLLM does: a missing name is an AttributeError
            if name not in ("rope_parameters", "rope_scaling_layers"):  # which transformers fills in
                assert found == stored[part][name], (part, name)
    vit, adapter, text = trusted.vit_config, trusted.adapter_config, trusted.get_text_config()
    assert vit.image_num_pos == model.vision.patches_per_crop and vit.num_hidden_layers == model.vit.num_layers
    assert [layer % model.vit.num_layers for layer in model.vit.feature_layers] == adapter.vit_layers
    assert adapter.pooling_attention_mask and text.use_qk_norm and text.qk_norm_type == "qwen3"
    assert text.rope_theta == text.rope_parameters["rope_theta"] == model.rope_theta
    # vLLM's patch_rope_parameters: sets what it found, and lets transformers check it.
    text.standardize_rope_params()
    text.validate_rope()
    assert text.rope_parameters["rope_theta"] == model.rope_theta
    # It is what transformers itself builds from, and plain transformers does not run the file.
    assert isinstance(trusted, Molmo2Config)
    assert type(AutoConfig.from_pretrained(folders["released"])) is Molmo2Config
    with pytest.raises(
        AttributeError, match="'Molmo2Config' object has no attribute 'vit_config'"
    ):  # troubleshooting.md
        _ = AutoConfig.from_pretrained(folders["native"]).vit_config


def test_a_scaled_rope_reaches_vllm(hf_models, tmp_path, monkeypatch):
    """OLMo 3: vLLM scales the layers that rope_scaling_layers names, by rope_parameters."""
    from transformers import AutoConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    convert.import_hf(hf_models["olmo3_yarn"], tmp_path / "ckpt", progress=str)
    convert.export_hf(tmp_path / "ckpt", tmp_path / "out", progress=str)
    found = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).text_config
    native = AutoConfig.from_pretrained(hf_models["olmo3_yarn"]).text_config
    assert native.rope_parameters["rope_type"] == "yarn" and native.norm_after
    for name in ("rope_parameters", "rope_scaling_layers", "norm_after", "qk_norm_type"):
        assert getattr(found, name) == getattr(native, name), name


def test_vllm_lays_out_images_and_frames_as_the_processor_does(folders, trusted):
    """vLLM replaces <|image|> by tokens of its own counting, from the ids of config.json and the processor's flags."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folders["released"])
    tokenizer = processor.tokenizer
    ids = {name: getattr(trusted, name) for name in TOKENS}
    assert ids == {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    flags = [getattr(processor, name) for name in OF_THE_PROCESSOR]
    assert flags == [True, False, True, False, True]
    for part, names in ((processor.image_processor, OF_IMAGES), (processor.video_processor, OF_VIDEOS)):
        assert all(getattr(part, name) is not None for name in names)
    assert processor.video_processor.frame_sample_mode == "uniform_last_frame"

    inputs = inputs_of(folders["released"])
    patch, column, end = ids["image_patch_id"], ids["image_col_id"], ids["image_end_token_id"]
    low_rows, low_columns, rows, columns = inputs["image_grids"][0].tolist()
    expected = [ids["low_res_image_start_token_id"], *[patch] * (low_rows * low_columns), end]
    expected += [ids["image_start_token_id"], *([patch] * columns + [column]) * rows, end]
    found = inputs["input_ids"][0].tolist()
    # vLLM begins the prompt with the first token, or the last where there is none.
    assert found[0] == (tokenizer.bos_token_id or tokenizer.eos_token_id)
    assert found[1 : len(expected) + 1] == expected
    assert inputs["image_num_crops"].sum() == len(inputs["pixel_values"])
    assert {"<|image|>", "<|video|>"} <= set(tokenizer.get_vocab())


# vLLM's hf_to_vllm_mapper: parts of names, then beginnings.
PARTS = {
    **{f"image_pooling_2d.w{one}": f"image_pooling_2d.{one}_proj" for one in "qkvo"},
    "image_projector.w1": "image_projector.gate_proj",
    "image_projector.w3": "image_projector.up_proj",
    "image_projector.w2": "image_projector.down_proj",
    "att_proj": "qkv_proj",
    "attn_out": "o_proj",
    "ff_proj": "up_gate_proj",
    "ff_out": "down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
BEGINNINGS = {
    "model.vision_backbone.": "vision_backbone.",
    "model.transformer.blocks.": "model.layers.",
    "model.transformer.ln_f.": "model.norm.",
}


def vllm_tensors(c) -> dict[str, tuple[int, ...]]:
    """Names after the mapping -> shapes of the tensors that vLLM's modules take, from its configuration."""
    found, vit, adapter, text = {}, c.vit_config, c.adapter_config, c.text_config

    def linear(name, rows, columns, bias=True):
        found[f"{name}.weight"] = (rows, columns)
        found.update({f"{name}.bias": (rows,)} if bias else {})

    tower, width = "vision_backbone.image_vit", vit.hidden_size
    linear(f"{tower}.patch_embedding", width, vit.image_patch_size**2 * 3)
    found[f"{tower}.positional_embedding"] = (vit.image_num_pos, width)
    for i in range(max(vit_layer % vit.num_hidden_layers for vit_layer in adapter.vit_layers) + 1):
        block = f"{tower}.transformer.resblocks.{i}"
        for one in ("wq", "wk", "wv", "wo"):
            linear(f"{block}.attention.{one}", width, width)
        linear(f"{block}.feed_forward.w1", vit.intermediate_size, width)
        linear(f"{block}.feed_forward.w2", width, vit.intermediate_size)
        for norm in ("attention_norm", "ffn_norm"):
            found |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    pooling, projector = "vision_backbone.image_pooling_2d", "vision_backbone.image_projector"
    inner = adapter.num_attention_heads * adapter.head_dim
    for one in "qkv":
        linear(f"{pooling}.{one}_proj", inner, width * len(adapter.vit_layers))
    linear(f"{pooling}.o_proj", adapter.hidden_size, inner)
    for one in ("gate_proj", "up_proj"):
        linear(f"{projector}.{one}", adapter.intermediate_size, adapter.hidden_size, bias=False)
    linear(f"{projector}.down_proj", adapter.text_hidden_size, adapter.intermediate_size, bias=False)

    width, heads, groups = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    found["model.embed_tokens.weight"] = (text.vocab_size + text.additional_vocab_size, width)
    for i in range(text.num_hidden_layers):
        layer = f"model.layers.{i}"
        linear(f"{layer}.self_attn.qkv_proj", (heads + 2 * groups) * text.head_dim, width, bias=False)
        linear(f"{layer}.self_attn.o_proj", width, heads * text.head_dim, bias=False)
        for norm in ("q_norm", "k_norm"):
            found[f"{layer}.self_attn.{norm}.weight"] = (text.head_dim,)
        linear(f"{layer}.mlp.up_gate_proj", 2 * text.intermediate_size, width, bias=False)
        linear(f"{layer}.mlp.down_proj", width, text.intermediate_size, bias=False)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = (width,)
    return found | {"model.norm.weight": (width,), "lm_head.weight": (text.vocab_size, width)}


def test_vllm_finds_every_weight_with_its_shape(folders, trusted):
    tensors = load_file(folders["released"] / "model.safetensors")
    # vLLM joins the two parts of the embedding before anything else.
    parts = [tensors.pop(f"model.transformer.wte.{name}") for name in ("embedding", "new_embedding")]
    found = {"model.embed_tokens.weight": tuple(torch.cat(parts).shape)}
    for name, tensor in tensors.items():
        for part, other in PARTS.items():
            name = name.replace(part, other)
        for start, other in BEGINNINGS.items():
            name = re.sub(f"^{re.escape(start)}", other, name)
        found[name] = tuple(tensor.shape)
    assert found == vllm_tensors(trusted)


def checkpoint_of(folder, step, data, config=None, **info):
    """A complete checkpoint without tensors, which is all that a card reads."""
    path = folder / "checkpoints" / checkpoint_dir.step_name(step)
    temporary = checkpoint_dir.aside(path)
    (temporary / checkpoint_dir.INDEX).write_bytes(pickle.dumps({}))
    if config is not None:
        (temporary / "config.yaml").write_text(yaml.safe_dump(config))
    counts = {name: {"examples": examples} for name, examples in data.items()}
    checkpoint_dir.publish(temporary, path, ModelConfig(name="m"), {"step": step, "data": counts, **info})
    return path


def test_the_card_of_a_chain_of_runs_tells_what_is_known_and_what_is_not(tmp_path):
    start = tmp_path / "hub" / "models--allenai--Molmo2-8B" / "snapshots" / "abc"
    first = checkpoint_of(tmp_path / "one", 9, {"pixmo-cap": 5}, {"train": {"init_from": str(start)}}, stage="stage2")
    config = {"train": {"init_from": str(tmp_path / "one"), "global_batch_size": 4}, "optim": {"llm": {"lr": 1e-5}}}
    data = {"pixmo-cap": 2, "my|own": 1_000, "vqa-v2": 0}
    last = checkpoint_of(tmp_path / "two", 20, data, config, stage="finetune", tokens_seen=12_345)
    lines = [{"kind": "validation", "step": 10, "loss": 9.0}, {"kind": "validation", "step": 20, "loss": 0.5}]
    lines.append({"kind": "answers", "step": 20, "point_f1": {"all": 0.25, "captions": 1.0}, "seconds": 3.0})
    (tmp_path / "two" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    text = model_card(last, "my model", "released", "apache-2.0")
    head = ModelCard(text).data  # the Hub's own reading of the YAML
    assert (head.base_model, head.datasets, head.license) == ("allenai/Molmo2-8B", ["allenai/pixmo-cap"], "apache-2.0")
    assert (head.pipeline_tag, head.library_name) == ("image-text-to-text", "transformers")
    assert "| [pixmo-cap](https://huggingface.co/datasets/allenai/pixmo-cap) | 7 | odc-by" in text
    assert "| my\\|own | 1,000 | not known: it is no set of the catalogue |" in text and "vqa-v2" not in text
    assert text.index("## Training: stage2") < text.index("## Training: finetune") and "12,345 tokens" in text
    assert "| `optim.llm.lr` | 1e-05 |" in text and "| `train.global_batch_size` | 4 |" in text
    assert "0.5000" in text and "| point_f1 of answers to held-out questions | 0.2500 |" in text and "9.0" not in text
    assert "vllm serve" in text and str(tmp_path) not in text
    assert "measured nothing" not in text and "in no run" in model_card(first, "one", "native")
    assert (
        "vllm serve" not in model_card(first, "one", "native")
        and "license" not in ModelCard(model_card(first, "one", "native")).data.to_dict()
    )


@pytest.mark.parametrize(
    "info, config, said",
    [
        ({"stage": "imported", "source": "/data/my_base"}, None, "a folder named my\\_base|a folder named my_base"),
        ({}, None, "## Weights it began with\n\nNot known."),
        ({}, {"train": {"init_from": None}}, "## Weights it began with\n\nRandom weights."),
        ({}, {"train": {"init_from": ["/m/Qwen3-8B", "/m/siglip"]}}, "named Qwen3-8B, .*\n- a folder named siglip,"),
        ({}, {"train": {"init_from": "/gone/Molmo2-4B"}}, "allenai/Molmo2-4B"),
    ],
)
def test_the_card_does_not_guess_where_the_weights_came_from(info, config, said, tmp_path):
    text = model_card(checkpoint_of(tmp_path, 0, {}, config, **info), "m", "released")
    assert re.search(said, text), text
    assert "does not say which data" in text and "None: the checkpoint lies in no run" in text and "/m/" not in text


def test_the_code_of_a_card_runs(folders, tmp_path, monkeypatch, capsys):
    text = (folders["released"] / "README.md").read_text()
    assert text == model_card(folders["released"].parent / "ckpt", "released", "released")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), "red").save("photo.png")
    exec(code.replace("THIS_FOLDER", str(folders["released"])).replace("=200", "=3"), {})
    assert capsys.readouterr().out.strip()
