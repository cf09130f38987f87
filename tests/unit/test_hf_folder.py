"""Hugging Face folders that are damaged, quantised or malicious: each ends in one sentence that names the file."""

import errno
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from hf_models import V, as_released, assert_same
from safetensors.torch import load_file, save_file

from molmo2_nemo.command_line import compose
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config, TrainConfig
from molmo2_nemo.hf import base_models, convert
from molmo2_nemo.hf.architecture import model_config_from_hf
from molmo2_nemo.training import start

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 5678\n"
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def edit_config(folder: Path, **values) -> None:
    """Set keys of the language model's or the vision tower's configuration; ... removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    part = config.get("text_config", config)
    for key, value in values.items():
        if value is ...:
            part.pop(key, None)
        else:
            part[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / MODEL)
    edit(tensors)
    save_file(tensors, folder / MODEL)


def split(folder: Path, edit=lambda index: None) -> None:
    """Replace the one file by two shards and their index."""
    tensors = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    names, weight_map = sorted(tensors), {}
    for file, part in zip(SHARDS, (names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(edit(index) or index))


def a_matrix(tensors: dict) -> str:
    """An attention projection, which every kind of model reads."""
    return next(n for n in sorted(tensors) if n.endswith(("att_proj.weight", "self_attn.q_proj.weight")) and ".0." in n)


def write(name: str, content: str | bytes):
    def damage(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def cut(name: str, size: int):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


def replaced(name: str, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


def sharded(edit=lambda index: None, then=lambda folder: None):
    def damage(folder):
        split(folder, edit)
        then(folder)

    return damage


def config(**values):
    return lambda folder: edit_config(folder, **values)


def at_top(**values):
    """Keys of config.json itself, not of its language model."""

    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def tensor(change):
    """Change one tensor."""

    def edit(tensors):
        name = a_matrix(tensors)
        tensors[name] = change(tensors[name]).contiguous()

    return lambda folder: edit_tensors(folder, edit)


def add(suffix: str, value: torch.Tensor):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({a_matrix(tensors) + suffix: value}))


def first_file_is(name):
    return lambda index: index["weight_map"].update({next(iter(index["weight_map"])): name})


DAMAGES = {
    # Safetensors.
    "pointer": (write(MODEL, POINTER), f"{MODEL} is a Git LFS pointer, .* run git lfs pull in "),
    "cut": (cut(MODEL, -100), f"{MODEL} is cut off or no safetensors file .*download it again"),
    "cut in its header": (cut(MODEL, 50), f"{MODEL} is cut off or no safetensors file"),
    "no safetensors": (write(MODEL, b"PK\3\4" * 100), f"{MODEL} is cut off or no safetensors file"),
    "empty": (write(MODEL, ""), f"{MODEL} is empty: download it again"),
    "a folder": (replaced(MODEL, Path.mkdir), f"{MODEL} is a folder, not a file"),
    "a pipe": (replaced(MODEL, os.mkfifo), f"{MODEL} is a device or a pipe, not a file"),
    "a dead link": (
        replaced(MODEL, lambda p: p.symlink_to("../blobs/1234")),
        f"{MODEL} is a link to .*blobs/1234, which",
    ),
    "unreadable": (lambda folder: (folder / MODEL).chmod(0), f"{MODEL} cannot be read .*Permission denied"),
    "pickle": (replaced(MODEL, lambda p: torch.save({}, p.with_name("pytorch_model.bin"))), "never pickles"),
    # The index and its shards.
    "shard missing": (
        sharded(then=lambda f: (f / SHARDS[1]).unlink()),
        f"{INDEX} names {SHARDS[1]}, which is not there",
    ),
    "shard is a pointer": (sharded(then=write(SHARDS[1], POINTER)), f"{SHARDS[1]} is a Git LFS pointer"),
    "shard cut": (sharded(then=cut(SHARDS[0], -1)), f"{SHARDS[0]} is cut off"),
    "other shard": (
        sharded(then=lambda f: shutil.copy(f / SHARDS[0], f / SHARDS[1])),
        f"{INDEX} says .* but it is not",
    ),
    "index empty": (sharded(then=write(INDEX, "")), f"{INDEX} is empty"),
    "index is a pointer": (sharded(then=write(INDEX, POINTER)), f"{INDEX} is a Git LFS pointer"),
    "index no JSON": (sharded(then=write(INDEX, '{"weight_map": ')), f"{INDEX} is no JSON"),
    "index without a map": (sharded(then=write(INDEX, '{"metadata": {}}')), f"{INDEX} has no weight_map"),
    "index with an empty map": (sharded(then=write(INDEX, '{"weight_map": {}}')), f"{INDEX} has no weight_map"),
    "index with a list": (sharded(then=write(INDEX, '{"weight_map": ["a"]}')), f"{INDEX} has no weight_map"),
    "index with numbers": (sharded(first_file_is(5)), f"{INDEX} has no weight_map"),
    "index of a tensor too many": (
        sharded(lambda index: index["weight_map"].update(more=SHARDS[0])),
        f"{INDEX} says that more is in {SHARDS[0]}, but it is not",
    ),
    "index of another folder": (sharded(first_file_is("../x.safetensors")), f"{INDEX} names '../x.safetensors', which"),
    "index of another place": (sharded(first_file_is("/tmp/x.safetensors")), f"{INDEX} names '/tmp/x.safetensors'"),
    "index of a parent": (sharded(first_file_is("..")), f"{INDEX} names '..', which is no safetensors file"),
    "index of a pickle": (sharded(first_file_is("pytorch_model.bin")), f"{INDEX} names 'pytorch_model.bin'"),
    # config.json as a file.
    "config no JSON": (write("config.json", "{'model_type': 1}"), "config.json is no JSON .*download it again"),
    "config empty": (write("config.json", ""), "config.json is empty"),
    "config is a pointer": (write("config.json", POINTER), "config.json is a Git LFS pointer"),
    "config is a list": (write("config.json", "[1]"), "config.json holds a list, not a JSON object"),
    "config is a number": (write("config.json", "3"), "config.json holds a int, not a JSON object"),
    "config too deep": (write("config.json", "[" * 200_000), "config.json is no JSON"),
    "config in Latin-1": (write("config.json", '{"model_type": "é"}'.encode("latin-1")), "config.json is not UTF-8"),
    "config in UTF-16": (write("config.json", "{}".encode("utf-16")), "config.json is not UTF-8"),
    "config with a BOM": (write("config.json", b"\xef\xbb\xbf{}"), "config.json begins with a byte order mark"),
    "config a folder": (replaced("config.json", Path.mkdir), "config.json is a folder, not a file"),
    "config unreadable": (lambda folder: (folder / "config.json").chmod(0), "config.json cannot be read"),
    "config missing": (
        lambda folder: (folder / "config.json").unlink(),
        "has no config.json|config.json does not exist",
    ),
    # What it says.
    "no model_type": (at_top(model_type=None), "config.json says model_type=.?None"),
    "model_type is a list": (at_top(model_type=["molmo2"]), "config.json says model_type="),
    "text for a number": (config(hidden_size="48"), "config.json: .*hidden_size='48' is no whole number"),
    "truth for a number": (config(num_hidden_layers=True), "num_hidden_layers=True is no whole number"),
    "negative": (config(num_hidden_layers=-2), "num_hidden_layers=-2 is no whole number from 1 to 1,000"),
    "huge": (config(num_hidden_layers=10**9), "num_hidden_layers=1000000000 is no whole number from 1 to 1,000"),
    "huge with a point": (config(num_hidden_layers=1e9), "num_hidden_layers=1000000000.0 is no whole number"),
    "zero": (config(num_attention_heads=0), "num_attention_heads=0 is no whole number"),
    "another size": (config(intermediate_size=64), "config.json says .*download both again"),
    "heads that do not divide": (config(num_attention_heads=5), "config.json.*download both again"),
    "key missing": (config(hidden_size=...), "config.json.*(download both again|is not supported)"),
    "text for an activation": (config(hidden_act=3), "config.json is refused by transformers|hidden_act=3 is not supp"),
    "quantised, says config": (at_top(quantization_config={"quant_method": "fp8"}), "weights are quantised .fp8."),
    "fewer layers": (
        config(num_hidden_layers=1, layer_types=...),
        "says num_hidden_layers=1, but the weights have [249] layers",
    ),
    # What the tensors are.
    "tensor missing": (lambda f: edit_tensors(f, lambda t: t.pop(a_matrix(t))), "which its config.json asks for"),
    "another shape": (tensor(lambda x: x[:-1]), "config.json.*download both again"),
    "a vector": (tensor(lambda x: x[0]), "config.json.*download both again"),
    "a number": (tensor(lambda x: x[0, 0].clone()), "config.json.*download both again"),
    "integers": (tensor(torch.Tensor.long), f"{MODEL}: .* is I64, and only F32, BF16, F16 are read"),
    "doubles": (tensor(torch.Tensor.double), f"{MODEL}: .* is F64, and only F32, BF16, F16 are read"),
    "FP8": (tensor(lambda x: x.to(torch.float8_e4m3fn)), f"{MODEL} holds quantised weights .* is F8_E4M3"),
    "INT8": (tensor(lambda x: x.to(torch.int8)), f"{MODEL} holds quantised weights .* is I8"),
    "4 bits": (tensor(lambda x: x.to(torch.uint8)), f"{MODEL} holds quantised weights .* is U8"),
    "scales of FP8": (add("_scale_inv", torch.ones(1)), f"{MODEL} holds quantised weights .*weight_scale_inv is F32"),
    "scales of compressed-tensors": (add("_scale", torch.ones(1)), "holds quantised weights .*weight_scale is F32"),
    "bitsandbytes": (add(".absmax", torch.ones(1)), "holds quantised weights .*absmax is F32"),
}
# What only a language model has.
OF_LANGUAGE_MODELS = {
    "number of layers missing": (config(num_hidden_layers=...), "config.json (asks for|is refused by transformers)"),
    "vocabulary too large": (config(vocab_size=V + 1000), f"rows, not .*{V + 1000 + 128}|rows, not {V + 1000}"),
    "head is a number": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(())})),
        "(lm_head.weight|output_layer.weight) .*config.json.*download both again",
    ),
    "no head": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight")),
        "lacks lm_head.weight, and its config.json does not say tie_word_embeddings=true",
    ),
    "rope_theta is a text": (
        config(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
        "rope_theta='x' is no",
    ),
    "unknown scaling": (config(rope_parameters={"rope_type": "nonsense", "rope_theta": 1e4}), "config.json.*nonsense"),
    "half a scaling": (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "config.json.*(yarn|factor)"),
}
# What only a Molmo2 has.
OF_MOLMO2 = {
    "processor no JSON": (write("processor_config.json", "{"), "processor_config.json is no JSON"),
    "processor is a list": (
        write("processor_config.json", '{"image_processor": []}'),
        "processor_config.json: image_processor or video_processor is no JSON object",
    ),
    "pooling is a text": (
        write("preprocessor_config.json", '{"pooling_size": "2"}'),
        "preprocessor_config.json: pooling_size='2' is no list of whole numbers",
    ),
    "layers that are not there": (
        lambda folder: at_top(
            adapter_config=json.loads((folder / "config.json").read_text())["adapter_config"]
            | {"vision_feature_layer": [99]}
        )(folder),
        "config.json is refused by transformers",
    ),
}
# The two folders of a start from base models are read by the same code: these show that it is asked.
OF_BASE_MODELS = [
    *("pointer", "cut", "shard missing", "config no JSON", "no model_type", "text for a number", "huge", "key missing"),
    *("fewer layers", "quantised, says config", "tensor missing", "another shape", "a number", "integers", "FP8"),
    "scales of FP8",
]
CASES = [
    *(("molmo2", name) for name in DAMAGES | OF_LANGUAGE_MODELS | OF_MOLMO2),
    *(("llm", name) for name in [*OF_BASE_MODELS, *OF_LANGUAGE_MODELS]),
    *(("vision", name) for name in OF_BASE_MODELS),
]


@pytest.fixture
def root_is_a_user(monkeypatch):
    """Files without a right to read them cannot be read by root either."""
    really = io.open

    def opened(file, *arguments, **options):
        if isinstance(file, str | Path) and os.path.isfile(file) and not os.stat(file).st_mode & 0o400:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return really(file, *arguments, **options)

    monkeypatch.setattr(io, "open", opened)


@pytest.mark.parametrize("part, damage", CASES, ids=[f"{part}: {damage}" for part, damage in CASES])
def test_damage_is_named_in_one_sentence_and_nothing_is_written(
    part, damage, hf_models, bases, tmp_path, root_is_a_user
):
    """By tools/import_hf.py's functions, and by a stage that starts from the folder."""
    folders = (
        {"molmo2": hf_models["qwen3_gqa"]} if part == "molmo2" else {"llm": bases["qwen3"], "vision": bases["siglip"]}
    )
    model = (
        model_config_from_hf(folders["molmo2"])
        if part == "molmo2"
        else base_models.base_model_config(*folders.values())
    )
    broken = folders[part] = shutil.copytree(folders[part], tmp_path / "broken")
    spoil, sentence = (DAMAGES | OF_LANGUAGE_MODELS | OF_MOLMO2)[damage]
    spoil(broken)
    given, written = list(folders.values()), tmp_path / "out" / "step_00000000"
    run = Config(
        run_dir=str(tmp_path / "run"),
        model=model,
        train=TrainConfig(init_from=str(broken) if part == "molmo2" else [str(folder) for folder in given]),
    )

    def by_hand():
        make = convert.import_hf if part == "molmo2" else base_models.import_base_models
        make(*given, written, progress=str)

    def by_a_stage():
        start._convert(start.find_start(run).hugging_face, written, run, str)

    for way in (by_hand, by_a_stage):
        with pytest.raises(ConfigError) as error:
            way()
        said = str(error.value)
        assert str(broken) in said and "\n" not in said and len(said) < 700
        assert way == by_a_stage or re.search(sentence, said), said
        assert not written.parent.exists()


def test_a_single_file_comes_before_an_index_as_in_transformers(hf_models, tmp_path):
    from transformers import Molmo2ForConditionalGeneration

    folder = shutil.copytree(hf_models["olmo3"], tmp_path / "both")
    old = shutil.copytree(hf_models["olmo3"], tmp_path / "old")
    edit_tensors(old, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    split(old)
    for name in (INDEX, *SHARDS):
        shutil.copy(old / name, folder)
    weights = Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert weights.lm_head.weight.any()
    convert.import_hf(folder, tmp_path / "ckpt", progress=str)
    found = dict(convert.released_tensors(tmp_path / "ckpt", model_config_from_hf(folder)))
    assert_same(found, as_released(hf_models["olmo3"]))


@pytest.mark.parametrize("shards", [False, True])
def test_a_tied_head_need_not_be_there(shards, hf_models, bases, tmp_path):
    """The advice of the message about a missing head is followed."""
    folder = shutil.copytree(hf_models["qwen3_tied"], tmp_path / "tied")
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    at_top(tie_word_embeddings=True)(folder)
    if shards:
        split(folder)
    model = convert.import_hf(folder, tmp_path / "ckpt", progress=str)
    assert model.tie_embeddings
    assert_same(dict(convert.released_tensors(tmp_path / "ckpt", model)), as_released(hf_models["qwen3_tied"]))
    config = compose(
        "stage2", ["model=hf", f"model.hf_path={folder}", f"train.init_from={folder}", f"run_dir={tmp_path}/r"]
    )
    assert config.model.tie_embeddings and start.find_start(config).hugging_face == [folder]

    head = load_file(bases["qwen3_tied"] / MODEL)
    assert "lm_head.weight" not in head
    assert base_models.base_model_config(bases["qwen3_tied"], bases["siglip"]).tie_embeddings
    # A head that differs counts, whatever config.json says: transformers does not tie it either.
    other = shutil.copytree(bases["qwen3_tied"], tmp_path / "other")
    edit_tensors(other, lambda tensors: tensors.update({"lm_head.weight": torch.ones(V, 48)}))
    assert not base_models.base_model_config(other, bases["siglip"]).tie_embeddings


@pytest.mark.parametrize("name", ["qkv", "head"])
def test_each_tensor_keeps_its_type(name, hf_models, tmp_path):
    folder = shutil.copytree(hf_models["qwen3_tied"], tmp_path / "mixed")
    full = as_released(folder)
    name = "lm_head.weight" if name == "head" else a_matrix(full)
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    assert convert.head_is_tied(folder, False) == (name != "lm_head.weight")
    model = convert.import_hf(folder, tmp_path / "ckpt", progress=str)
    assert_same(dict(convert.released_tensors(tmp_path / "ckpt", model)), full | {name: full[name].bfloat16()})


def test_an_architecture_of_a_folder_without_weights_can_be_read(hf_models, tmp_path):
    folder = tmp_path / "plan"
    folder.mkdir()
    shutil.copy(hf_models["olmo3"] / "config.json", folder)
    assert not compose("stage2", ["model=hf", f"model.hf_path={folder}"]).model.tie_embeddings
    at_top(tie_word_embeddings=True)(folder)
    assert compose("stage2", ["model=hf", f"model.hf_path={folder}"]).model.tie_embeddings
    (folder / MODEL).write_text(POINTER)
    with pytest.raises(ConfigError, match="Git LFS pointer"):
        compose("stage2", ["model=hf", f"model.hf_path={folder}"])


def test_a_folder_that_is_no_model_is_called_what_it_is(tmp_path):
    for made, said in (
        ("adapters/adapter_config.json", "holds adapters alone: name the folder of a whole model"),
        ("run/checkpoints/step_00000001", "is a run or a checkpoint: python tools/export_hf.py .*run OUT makes"),
        ("step_00000001/complete.json", "is a run or a checkpoint: python tools/export_hf.py .*step_00000001 OUT"),
        ("other/README.md", "has no config.json: name a Hugging Face model folder"),
    ):
        path = tmp_path / made
        path.parent.mkdir(parents=True)
        path.touch()
        with pytest.raises(ConfigError, match=said):
            model_config_from_hf(tmp_path / made.partition("/")[0])
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        model_config_from_hf(tmp_path / "nowhere")
