"""Weights survive the way in and out bit for bit, under either set of names and whatever the split."""

import contextlib
import gc
import json
import os
import re
import resource
import shutil
import weakref
from types import SimpleNamespace

import export_hf
import pytest
import torch
from hf_models import V, as_released, assert_same, released_file
from programs import python, succeeded
from safetensors.torch import load_file, save_file

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.byte_progress import ByteProgress
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config, ModelConfig
from molmo2_nemo.files import sha256_of
from molmo2_nemo.hf import base_models, convert
from molmo2_nemo.hf.architecture import model_config_from_hf
from molmo2_nemo.hf.layouts import LAYOUTS
from molmo2_nemo.training import start


@pytest.mark.slow
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


@pytest.mark.slow
def test_memory_of_an_import_does_not_grow_with_the_model(tmp_path, monkeypatch):
    """Tensors of one file, and no more, are alive when the next one is made."""
    monkeypatch.setattr(convert, "BYTES_OF_A_FILE", 8 * 1024)
    alive, most, lines = weakref.WeakSet(), 0, []

    def make():
        nonlocal most
        gc.collect()
        most = max(most, len(alive))
        tensor = torch.ones(512)
        alive.add(tensor.untyped_storage())  # the writer makes another tensor of it
        return tensor

    state = {f"layers.{i}.weight": torch.empty(512, device="meta") for i in range(40)}
    progress = ByteProgress(40 * 2048, lines.append, seconds=0)
    model = ModelConfig(name="m")
    convert.write_checkpoint(tmp_path / "ckpt", model, state, dict.fromkeys(state, make), {"step": 0}, progress)
    files = sorted((tmp_path / "ckpt").glob("*.distcp"))
    assert len(files) == 10 and most <= 5
    assert "80.0 KiB of 80.0 KiB" in lines[-1] and "0 s left (layers.39.weight)" in lines[-1] and len(lines) == 40
    wanted = dict.fromkeys(state, ((512,), torch.float32))
    assert all(tensor.eq(1).all() for tensor in convert.read_tensors(tmp_path / "ckpt", wanted).values())


def test_others_can_read_an_export(hf_models, tmp_path):
    convert.import_hf(hf_models["olmo3"], tmp_path / "ckpt", progress=str)
    umask = os.umask(0o022)
    try:
        convert.export_hf(tmp_path / "ckpt", tmp_path / "out", progress=str)
    finally:
        os.umask(umask)
    rights = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in rights and set(rights.values()) == {0o644}


def test_a_mixture_of_types_is_kept_and_named(hf_models, tmp_path):
    folder = shutil.copytree(hf_models["olmo3"], tmp_path / "mixed")
    tensors = load_file(folder / "model.safetensors")
    kept = [name for name in tensors if "wte" in name]  # both parts of the embedding
    tensors = {name: tensor if name in kept else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    said = []
    convert.import_hf(folder, tmp_path / "ckpt", progress=said.append)
    convert.export_hf(tmp_path / "ckpt", tmp_path / "out", progress=said.append)
    assert len(kept) == 2
    assert (
        f"each keeps its own: {len(dict(convert.checkpoint_dtypes(tmp_path / 'ckpt'))) - 2} bfloat16, 2 float32"
        in said[0]
    )
    assert any("of bfloat16" in line and "config.json names the first" in line for line in said[1:])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(released_file(tmp_path / "out"), as_released(folder))


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_loads_an_export_and_gives_the_same_logits(layout, hf_models, tmp_path):
    from transformers import Molmo2ForConditionalGeneration

    ids = torch.randint(0, V, (1, 20), generator=torch.Generator().manual_seed(0))
    for name in ("qwen3_gqa", "olmo3_yarn"):
        convert.import_hf(hf_models[name], tmp_path / f"{name}-ckpt", progress=lambda line: None)
        convert.export_hf(tmp_path / f"{name}-ckpt", tmp_path / name, progress=lambda line: None, layout=layout)
        assert ("vit_config" in json.loads((tmp_path / name / "config.json").read_text())) == (layout == "released")
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


@contextlib.contextmanager
def files_of_at_most(size):
    """A disk that takes no larger files: the tensors of a checkpoint do not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["import", "base models", "start", "export"])
def test_a_full_disk_is_said_before_and_nothing_is_left_after(way, hf_models, bases, tmp_path, monkeypatch):
    def write(target):
        if way == "import":
            convert.import_hf(hf_models["olmo3"], target, progress=str)
        elif way == "base models":
            base_models.import_base_models(bases["qwen3"], bases["siglip"], target, progress=str)
        elif way == "start":
            config = Config(run_dir=str(tmp_path / "run"), model=model_config_from_hf(hf_models["olmo3"]))
            start._convert([hf_models["olmo3"]], target, config, str)
        else:
            convert.export_hf(tmp_path / "ckpt", target, tokenizer="molmo2_nemo/data/tokenizer", progress=str)

    convert.import_hf(hf_models["olmo3"], tmp_path / "ckpt", progress=str)
    target = tmp_path / "out" / "step_00000000"
    # What a killed attempt has left makes room.
    left = checkpoint_dir.aside(target)
    (left / "half").write_bytes(b"x" * 1000)
    with monkeypatch.context() as small:
        small.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0 if (left / "half").exists() else 5000))
        with pytest.raises(
            ConfigError, match=r" needs [\d.]+ KiB, .* has 4.9 KiB free, [\d.]+ KiB are missing: make"
        ) as error:
            write(target)
    assert not any(target.parent.iterdir())
    for size in (100_000, 3_000):
        with (
            files_of_at_most(size),
            pytest.raises(ConfigError, match=r"cannot be written \(File too large\); .*ulimit"),
        ):
            write(target)
        assert not any(target.parent.iterdir())
    # With a little more than what it asks for, it fits.
    [needed] = re.findall(r" needs ([\d.]+) KiB", str(error.value))
    write(target)
    data = next(path for path in target.iterdir() if path.suffix in (".distcp", ".safetensors"))
    assert 0.8 < float(needed) * 1024 / data.stat().st_size < 1.1


@pytest.mark.parametrize("out", ["file", "file/below", "dead link"])
def test_an_export_to_what_is_no_new_folder_is_refused(out, hf_models, tmp_path):
    convert.import_hf(hf_models["olmo3"], tmp_path / "ckpt", progress=str)
    (tmp_path / "file").touch()
    (tmp_path / "dead link").symlink_to(tmp_path / "gone")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="exists: remove it|cannot be written .Not a directory.; name another folder"):
        convert.export_hf(tmp_path / "ckpt", tmp_path / out, progress=str)
    assert sorted(tmp_path.iterdir()) == before


def test_an_export_without_a_tokenizer_says_how_to_name_one(hf_models, tmp_path):
    """At once, before gigabytes are written; the advice works."""
    convert.import_hf(hf_models["olmo3"], tmp_path / "ckpt", progress=str)
    with pytest.raises(ConfigError, match="--tokenizer=.*olmo3 holds no tokenizer .*: set it to a folder with one"):
        convert.export_hf(tmp_path / "ckpt", tmp_path / "out", tokenizer=str(hf_models["olmo3"]), progress=str)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    convert.export_hf(tmp_path / "ckpt", tmp_path / "out", tokenizer="molmo2_nemo/data/tokenizer", progress=str)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def rewrite(path, content):
    """Replace a file of a checkpoint, and its size in the marker."""
    path.write_text(content)
    marker = json.loads((path.parent / "complete.json").read_text())
    marker["files"][path.name] = path.stat().st_size
    marker["sha256"][path.name] = sha256_of(path)
    (path.parent / "complete.json").write_text(json.dumps(checkpoint_dir.sealed(marker)))


@pytest.mark.parametrize(
    "file, content, sentence",
    [
        ("model.json", {"num_layers": 10**9}, r"in model.json, model.num_layers=1000000000 is not from 1 to 1,000"),
        ("model.json", {"vocab_size": -1}, r"in model.json, model.vocab_size=-1 is not from 1 to"),
        ("model.json", {"hidden_size": "wide"}, "model.json is not an architecture .*'wide'"),
        ("model.json", {"no_such_key": 1}, "model.json is not an architecture .*no_such_key"),
        ("model.json", {"hidden_size": 64}, "vision.connector.* cannot be read .*Size mismatch"),
        ("model.json", {"num_layers": 5}, "lacks decoder.layers.4.* its model.json does not describe it"),
        ("model.json", "{", "model.json is not an architecture"),
        ("model.json", "[]", "model.json is not an architecture"),
        ("model.json", "{}", "model.json is not an architecture"),
        ("config.yaml", "a: [", "config.yaml is no configuration of a run"),
        ("config.yaml", "text", "config.yaml is no configuration of a run"),
        ("config.yaml", "data: 3", "config.yaml is no configuration of a run"),
        ("complete.json", {"step": "abc"}, "no readable complete.json .step: Input should be a valid integer"),
        ("complete.json", {"step": ...}, "no readable complete.json .step: "),
    ],
)
def test_an_export_of_a_damaged_checkpoint_is_one_sentence(file, content, sentence, hf_models, tmp_path, monkeypatch):
    checkpoint = tmp_path / "step_00000000"
    convert.import_hf(hf_models["olmo3"], checkpoint, progress=str)
    if isinstance(content, dict):
        values = json.loads((checkpoint / file).read_text()) | content
        values = {key: value for key, value in values.items() if value is not ...}
        content = json.dumps(checkpoint_dir.sealed(values) if file == "complete.json" else values)
    (checkpoint / file).write_text(content) if file == "complete.json" else rewrite(checkpoint / file, content)
    command = ["export_hf.py", str(checkpoint), str(tmp_path / "out"), "--tokenizer", "molmo2_nemo/data/tokenizer"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        export_hf.main()
    said = str(ended.value.code)
    assert said.startswith("error: ") and str(checkpoint) in said and "\n" not in said
    assert re.search(sentence, said), said
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
