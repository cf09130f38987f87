"""Weights survive the way in and out bit for bit, under either set of names and whatever the split."""

import json
import shutil

import pytest
import torch
from hf_models import V, as_released, assert_same, released_file
from programs import python, succeeded
from safetensors.torch import load_file, save_file

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.hf import convert


def test_import_and_export_are_bit_identical(hf_models, tmp_path):
    for name, folder in hf_models.items():
        checkpoint, out = tmp_path / f"{name}-ckpt", tmp_path / f"{name}-out"
        model = convert.import_hf(folder, checkpoint, progress=lambda line: None)
        assert model.tie_embeddings == name.endswith("_tied")
        convert.export_hf(checkpoint, out, progress=lambda line: None)
        assert_same(released_file(out), as_released(folder))


def test_export_keeps_released_shapes_in_several_shards(hf_models, tmp_path):
    convert.import_hf(hf_models["olmo3"], tmp_path / "ckpt", progress=lambda line: None)
    convert.export_hf(tmp_path / "ckpt", tmp_path / "out", max_shard_bytes=100_000, progress=lambda line: None)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and all((tmp_path / "out" / name).stat().st_size < 300_000 for name in files)
    found = {}
    for name in files:
        found.update(load_file(tmp_path / "out" / name))
    assert_same(found, as_released(hf_models["olmo3"]))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())


@pytest.mark.parametrize("name", ["qwen3_gqa", "olmo3_yarn", "qwen3_tied"])
def test_native_names_import_like_released_ones(name, hf_models, tmp_path):
    from transformers import Molmo2ForConditionalGeneration

    model = Molmo2ForConditionalGeneration.from_pretrained(hf_models[name], dtype=torch.float32)
    native = tmp_path / name
    native.mkdir()
    shutil.copy(hf_models[name] / "config.json", native)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, native / "model.safetensors")
    convert.import_hf(native, tmp_path / "ckpt", progress=lambda line: None)
    found = dict(convert.released_tensors(tmp_path / "ckpt", checkpoint_dir.read_model(tmp_path / "ckpt")))
    assert_same(found, as_released(hf_models[name]))


@pytest.mark.parametrize("cut", [1, 100, V, V + 60])
def test_the_embedding_may_be_cut_anywhere(cut, hf_models, tmp_path):
    tensors = as_released(hf_models["qwen3_gqa"])
    table = torch.cat([tensors["model.transformer.wte.embedding"], tensors["model.transformer.wte.new_embedding"]])
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(hf_models["qwen3_gqa"] / "config.json", other)
    halves = {
        "model.transformer.wte.embedding": table[:cut].clone(),
        "model.transformer.wte.new_embedding": table[cut:].clone(),
    }
    save_file({**tensors, **halves}, other / "model.safetensors")
    model = convert.import_hf(other, tmp_path / "ckpt", progress=lambda line: None)
    assert_same(dict(convert.released_tensors(tmp_path / "ckpt", model)), as_released(hf_models["qwen3_gqa"]))


def test_transformers_loads_an_export_and_gives_the_same_logits(hf_models, tmp_path):
    from transformers import Molmo2ForConditionalGeneration

    ids = torch.randint(0, V, (1, 20), generator=torch.Generator().manual_seed(0))
    for name in ("qwen3_gqa", "olmo3_yarn"):
        convert.import_hf(hf_models[name], tmp_path / f"{name}-ckpt", progress=lambda line: None)
        convert.export_hf(tmp_path / f"{name}-ckpt", tmp_path / name, progress=lambda line: None)
        logits = [
            Molmo2ForConditionalGeneration.from_pretrained(path, dtype=torch.float32)(input_ids=ids).logits
            for path in (hf_models[name], tmp_path / name)
        ]
        assert torch.equal(*logits)


def test_tools_say_what_is_wrong(hf_models, tmp_path):
    def error(*command):
        result = python(*command)
        assert result.returncode != 0 and "Traceback" not in result.stderr
        return result.stderr.strip().splitlines()[-1]

    assert "has no config.json" in error("tools/import_hf.py", tmp_path, tmp_path / "c")
    broken = tmp_path / "broken"
    shutil.copytree(hf_models["olmo3"], broken)
    tensors = released_file(broken)
    del tensors["model.transformer.ln_f.weight"]
    save_file(tensors, broken / "model.safetensors")
    assert "lacks model.language_model.norm.weight, which its config.json asks for" in error(
        "tools/import_hf.py", broken, tmp_path / "c"
    )
    assert not (tmp_path / "c").exists()

    succeeded(python("tools/import_hf.py", hf_models["olmo3"], tmp_path / "step_00000000"))
    assert "exists" in error("tools/export_hf.py", tmp_path / "step_00000000", tmp_path)
    data = next((tmp_path / "step_00000000").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    assert "is damaged" in error("tools/export_hf.py", tmp_path / "step_00000000", tmp_path / "out")


def test_a_checkpoint_index_that_is_not_one_is_not_unpickled(hf_models, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'exploded')!r}, 'w')",))

    checkpoint = tmp_path / "step_00000000"
    convert.import_hf(hf_models["olmo3"], checkpoint, progress=lambda line: None)
    payload = pickle.dumps(Bomb())
    (checkpoint / ".metadata").write_bytes(payload)
    marker = json.loads((checkpoint / "complete.json").read_text())
    marker["files"][".metadata"] = len(payload)
    (checkpoint / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(ConfigError, match="is not a checkpoint index"):
        checkpoint_dir.read_model(checkpoint)
    assert not (tmp_path / "exploded").exists()
