"""A start from a language model and a vision tower of their own: against those models, as transformers runs them."""

import json
import shutil

import pytest
import torch
from hf_models import V
from programs import python, succeeded
from safetensors.torch import load_file, save_file

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.hf import base_models, convert


@pytest.mark.slow
@pytest.mark.parametrize(
    "llm, vision", [("qwen3", "siglip"), ("qwen3_tied", "siglip_with_text"), ("olmo3", "siglip_with_text")]
)
def test_both_halves_compute_what_they_did(llm, vision, bases, tmp_path):
    from transformers import AutoModelForCausalLM, Molmo2ForConditionalGeneration, SiglipModel, SiglipVisionModel

    model = base_models.import_base_models(bases[llm], bases[vision], tmp_path / "ckpt", progress=lambda line: None)
    assert model.tie_embeddings == (llm == "qwen3_tied") and model.vit.num_layers == 7
    convert.export_hf(tmp_path / "ckpt", tmp_path / "out", progress=lambda line: None)
    ours = Molmo2ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)

    ids = torch.randint(0, V, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(bases[llm], dtype=torch.float32)(input_ids=ids).logits
        found = ours(input_ids=ids).logits[..., :V]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    whole = vision == "siglip_with_text"
    tower = (SiglipModel if whole else SiglipVisionModel).from_pretrained(bases[vision], dtype=torch.float32)
    tower = tower.vision_model if whole else tower
    # 72 pixels hold 5 patches of 14 a side; the last two pixels are in none.
    pixels = torch.randn(3, 3, 70, 70, generator=torch.Generator().manual_seed(2))
    patches = pixels.reshape(3, 3, 5, 14, 5, 14).permute(0, 2, 4, 3, 5, 1).reshape(3, 25, 588)
    with torch.no_grad():
        hidden = tower(torch.nn.functional.pad(pixels, (0, 2, 0, 2)), output_hidden_states=True).hidden_states
        layers = ours.model.vision_tower(patches, output_hidden_states=True).hidden_states
    assert model.vit.feature_layers == [6, 0]
    for block in model.vit.feature_layers:
        torch.testing.assert_close(layers[block + 1], hidden[block + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_is_new_is_drawn_alike_from_the_same_seed(bases, tmp_path):
    def fresh(name, seed):
        model = base_models.import_base_models(
            bases["qwen3"], bases["siglip"], tmp_path / name, seed=seed, progress=str
        )
        return {
            name: tensor
            for name, tensor in convert.released_tensors(tmp_path / name, model)
            if "image_p" in name or "new_embedding" in name
        }

    first, again, other = fresh("a", 1), fresh("b", 1), fresh("c", 2)
    assert len(first) == 12
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if name.endswith(".bias"):
            assert not tensor.any()
        else:
            assert (
                not torch.equal(tensor, other[name]) and abs(tensor.std() - 0.02) < 0.002 and abs(tensor.mean()) < 0.002
            )


def test_padding_rows_of_the_vocabulary_are_left_out_and_missing_ones_refused(bases, tmp_path):
    padded = tmp_path / "padded"
    shutil.copytree(bases["qwen3_tied"], padded)
    tensors = load_file(padded / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"model.embed_tokens.weight": torch.cat([table, table[:56]])}, padded / "model.safetensors")
    model = base_models.import_base_models(padded, bases["siglip"], tmp_path / "ckpt", progress=str)
    found = dict(convert.released_tensors(tmp_path / "ckpt", model))
    assert torch.equal(found["model.transformer.wte.embedding"], table)
    save_file(tensors | {"model.embed_tokens.weight": table[:150].clone()}, padded / "model.safetensors")
    with pytest.raises(ConfigError, match="embed_tokens.weight has 150 rows, not 200"):
        base_models.import_base_models(padded, bases["siglip"], tmp_path / "other", progress=str)
    assert not (tmp_path / "other").exists()


def test_models_that_do_not_fit_are_named(bases, tmp_path):
    model = base_models.base_model_config(bases["qwen3"], bases["siglip"])
    model.hidden_size = 64
    with pytest.raises(ConfigError, match="has model.hidden_size=48, this run has 64"):
        base_models.check_base_models(bases["qwen3"], bases["siglip"], model)
    with pytest.raises(ConfigError, match="a vision tower is one of siglip"):
        base_models.base_model_config(bases["qwen3"], bases["qwen3"])
    model = base_models.base_model_config(bases["qwen3_tied"], bases["siglip"])
    with pytest.raises(ConfigError, match="model.tie_embeddings=true, but .* has a head of its own"):
        base_models.check_base_models(bases["qwen3"], bases["siglip"], model)


def test_the_tool_writes_a_checkpoint_and_refuses_pickles(bases, tmp_path):
    command = ["tools/import_hf.py", "--llm", bases["olmo3"], "--vision", bases["siglip"]]
    result = succeeded(python(*command, tmp_path / "ckpt"))
    assert "4 decoder layers, 7 ViT layers, head its own" in result.stdout
    assert checkpoint_dir.read_model(tmp_path / "ckpt").rope_scaling_layers == [3]
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(bases["siglip"] / "config.json", pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    result = python(*command[:-1], pickled, tmp_path / "other")
    assert result.returncode != 0 and "only safetensors are read, never pickles" in result.stderr
    assert json.loads((tmp_path / "ckpt" / "complete.json").read_text())["stage"] == "imported"
