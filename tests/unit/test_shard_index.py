"""What is accepted of a folder of shards: nothing that Energon would run, read elsewhere, or expand without end."""

import json
import os
import re
import shutil
import sys

import inspect_data
import plan
import preflight
import pytest
import yaml
from omegaconf import OmegaConf
from sources import chat, write_blend, write_source

from molmo2_nemo.command_line import compose
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.data.shard_index import DATASET, read_index
from molmo2_nemo.prepare.webdataset import write_shards
from molmo2_nemo.training.run import run_stage


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Shards of our own, and others with Energon's index and its dataset.yaml, which has the lines in another order."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "own").mkdir()
    samples = [(f"{number}", {"json": json.dumps(chat()).encode()}) for number in range(7)]
    write_shards(root / "own", {"train": samples[:5], "val": samples[5:]}, shard_samples=2)
    write_source(root / "theirs", [{"json": chat()}] * 6, shard_size=3)
    lines = [f"{key}: {value}\n" for key, value in DATASET.items()]
    (root / "theirs" / ".nv-meta" / "dataset.yaml").write_text("".join(lines))
    return root


@pytest.fixture
def root(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data"


def test_what_energon_and_we_write_is_accepted(root):
    assert {path.name for path in (root / "own" / ".nv-meta").iterdir()} == {
        ".info.json",
        "dataset.yaml",
        "index.sqlite",
        "index.uuid",
        "split.yaml",
    }
    train = {"train-00000.tar": 2, "train-00001.tar": 2, "train-00002.tar": 1}
    assert read_index("own", root / "own") == {"train": train, "val": {"val-00000.tar": 2}, "test": {}}
    assert read_index("theirs", root / "theirs") == {
        "train": {"train-0.tar": 3, "train-1.tar": 3},
        "val": {},
        "test": {},
    }


LOADER = "open({!r}, 'w')\nsample_loader = part_filter = lambda *_: {{}}\n"


@pytest.mark.parametrize(
    "document, key, value",
    [
        ({"sample_type": DATASET, "sample_loader": "own.py:sample_loader", "part_filter": "own.py:part_filter"}, 0, 0),
        (DATASET | {"part_filter": "own.py:part_filter"}, "part_filter", "own.py:part_filter"),
        (DATASET | {"cookers": [1]}, "cookers:", ""),
        ({"__module__": "os", "__function__": "mkdir", "path": "ran"}, "__function__", "mkdir"),
        (DATASET | {"__class__": "Metadataset"}, "__class__", "Metadataset"),
        (DATASET | {"__module__": "posix"}, "__module__", "posix"),
        (DATASET | {"subflavors": {}}, "subflavors", "{}"),
        ({"__class__": "CrudeWebdataset"}, "__module__", None),
    ],
)
def test_a_dataset_yaml_of_anything_else_is_refused(root, document, key, value):
    (root / "own" / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(document))
    about = f"dataset.yaml has {key}={value!r}, but" if key else "dataset.yaml has part_filter='own.py:part_filter'"
    fix = ".*__module__: megatron.energon and __class__: CrudeWebdataset: write these two lines"
    with pytest.raises(ConfigError, match=re.escape(about) + fix) as refused:
        read_index("own", root / "own")
    assert "\n" not in str(refused.value)
    # The advice.
    (root / "own" / ".nv-meta" / "dataset.yaml").write_text("".join(f"{k}: {v}\n" for k, v in DATASET.items()))
    read_index("own", root / "own")


@pytest.mark.parametrize(
    "text",
    [
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n# x\n__class__: X\n",
        "__module__: megatron.energon\r__class__: CrudeWebdataset\n",
        "{__module__: megatron.energon, __class__: CrudeWebdataset, part_filter: own.py:part_filter}",
        "---\n__module__: megatron.energon\n__class__: CrudeWebdataset\n---\npart_filter: own.py:part_filter\n",
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n__class__: CrudeWebdataset\n",
        "&a __module__: megatron.energon\n__class__: CrudeWebdataset\n",
        "",
        "x" * 5000,
    ],
)
def test_no_parser_can_find_more_in_a_dataset_yaml(root, text):
    (root / "own" / ".nv-meta" / "dataset.yaml").write_text(text)
    with pytest.raises(ConfigError, match="the source own is not accepted"):
        read_index("own", root / "own")


def test_no_reader_runs_code_of_the_shards(root, tmp_path, monkeypatch, capsys):
    """Energon alone would: a Python file beside dataset.yaml, named in it, makes a file."""
    from megatron.energon import WorkerConfig
    from megatron.energon.dataset_config import get_dataset_from_config

    ran, meta = tmp_path / "ran", root / "own" / ".nv-meta"
    (meta / "own.py").write_text(LOADER.format(str(ran)))
    (meta / "dataset.yaml").write_text(yaml.safe_dump(DATASET | {"part_filter": "own.py:part_filter"}))
    get_dataset_from_config(root / "own", worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0))
    assert ran.exists()
    ran.unlink()
    blend = write_blend(tmp_path / "blend.yaml", "theirs", "own")
    words = ["model=tiny", "schedule=quickstart", f"data.root={root}", f"data.blend={blend}"]
    config = compose("stage2", [*words, f"run_dir={tmp_path / 'run'}"])
    refused = f"the source own is not accepted: {meta / 'dataset.yaml'} has part_filter='own.py:part_filter', but"
    assert preflight.data_fault(config).startswith(refused)
    with pytest.raises(ConfigError, match=re.escape(refused)):
        inspect_data.inspect(config, 1, None)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--config-name", "stage2", "gpus=1", *words])
    assert plan.main() == 2 and refused in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_stage(OmegaConf.structured(config))
    assert refused in capsys.readouterr().err
    assert not ran.exists()


def change(meta, file, **changes):
    """Change keys of a file; None removes one."""
    load, dump = (json.loads, json.dumps) if file == ".info.json" else (yaml.safe_load, yaml.safe_dump)
    document = load((meta / file).read_text()) | changes
    (meta / file).write_text(dump({key: value for key, value in document.items() if value is not None}))


INFO, SPLIT = ".info.json", "split.yaml"
TRAIN = "train-00000.tar"


@pytest.mark.parametrize(
    "file, changes, words",
    [
        (INFO, {"shard_counts": {"../other/train-00000.tar": 2}}, "shard_counts='../other/train-00000.tar', but"),
        (INFO, {"shard_counts": {"/etc/a.tar": 2}}, "shard_counts='/etc/a.tar', but a shard is a .tar file below"),
        (INFO, {"shard_counts": {"a/./b.tar": 2}}, "shard_counts='a/./b.tar'"),
        (INFO, {"shard_counts": {"msc://bucket/a.tar": 2}}, "shard_counts='msc://bucket/a.tar'"),
        (INFO, {"shard_counts": {"a\n.tar": 2}}, r"shard_counts='a\n.tar'"),
        (INFO, {"shard_counts": {"passwd": 2}}, "shard_counts='passwd'"),
        (INFO, {"shard_counts": {TRAIN: -1}}, "shard_counts.train-00000.tar=-1, but it is a number of samples"),
        (INFO, {"shard_counts": {TRAIN: True}}, "shard_counts.train-00000.tar=True"),
        (INFO, {"shard_counts": {TRAIN: 2.0}}, "shard_counts.train-00000.tar=2.0"),
        (INFO, {"shard_counts": {TRAIN: 10**12}}, "shard_counts.train-00000.tar=1000000000000"),
        (INFO, {"shard_counts": [TRAIN]}, "shard_counts=['train-00000.tar'], but it is a dict"),
        (INFO, {"shard_counts": None}, "lacks the key shard_counts"),
        (INFO, {"energon_version": 7}, "energon_version=7, but it is a text"),
        (INFO, {"__module__": "os"}, "__module__='os', but the only keys are shard_counts and energon_version"),
        (SPLIT, {"split_parts": {"train": ["../a.tar"]}}, "split_parts.train='../a.tar', but it lists shards of"),
        (SPLIT, {"split_parts": {"train": ["train-00009.tar"]}}, "split_parts.train='train-00009.tar'"),
        (SPLIT, {"split_parts": {"train": [TRAIN, TRAIN]}}, "split_parts.train='train-00000.tar', but"),
        (SPLIT, {"split_parts": {"train": ["train-{00000..99999999}.tar"]}}, "split_parts.train='train-{00000..9"),
        (SPLIT, {"split_parts": {"train": ["{0..9}" * 40]}}, "split_parts.train='{0..9}{0..9}"),
        (SPLIT, {"split_parts": {"train": ["{a,b}" * 40]}}, "split_parts.train='{a,b}"),
        (SPLIT, {"split_parts": {"train": TRAIN}}, "split_parts.train='train-00000.tar', but it is a list of shards"),
        (SPLIT, {"split_parts": {"train": [{"__module__": "os"}]}}, "split_parts.train={'__module__': 'os'}"),
        (SPLIT, {"split_parts": {"own": [3]}}, "split_parts.own=3, but it lists"),
        (SPLIT, {"split_parts": [TRAIN]}, "split_parts=['train-00000.tar'], but it is a dict"),
        (SPLIT, {"exclude": [f"{TRAIN}/0"]}, "exclude='train-00000.tar/0', but it lists shards of .info.json"),
        (SPLIT, {"exclude": 3}, "exclude=3, but it is a list"),
        (SPLIT, {"__class__": "X"}, "__class__='X', but the only keys are split_parts and exclude"),
    ],
)
def test_other_keys_and_values_are_refused(root, file, changes, words):
    meta = root / "own" / ".nv-meta"
    change(meta, file, **changes)
    with pytest.raises(ConfigError) as refused:
        read_index("own", root / "own")
    sentence = str(refused.value)
    assert sentence.startswith(f"the source own is not accepted: {meta / file} ") and words in sentence
    assert f"run energon prepare {root / 'own'} --non-interactive --force-overwrite " in sentence
    assert "\n" not in sentence and len(sentence) < 700


@pytest.mark.slow
def test_the_command_in_the_sentence_makes_folders_that_are_accepted(root, monkeypatch):
    """For one that was never prepared, and one with a damaged index."""
    from megatron.energon.cli.main import main

    shutil.rmtree(root / "theirs" / ".nv-meta")
    change(root / "own" / ".nv-meta", INFO, shard_counts={"../a.tar": 1})
    for name in ("theirs", "own"):
        with pytest.raises(ConfigError) as refused:
            read_index(name, root / name)
        command = re.search(r"run energon (.*)\.$", str(refused.value))[1]
        monkeypatch.setattr(sys, "argv", ["energon", *command.split()])
        main(standalone_mode=False)
        shards = {shard for part in read_index(name, root / name).values() for shard in part}
        assert shards == {path.name for path in (root / name).glob("*.tar")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, content, words",
    [
        (INFO, b"{" * 10**5, "is damaged"),
        (INFO, b'{"shard_counts": {}}\xff', "is damaged"),
        (INFO, b"[]", "lacks the key shard_counts"),
        (SPLIT, b"[" * 10**4, "is damaged"),
        (SPLIT, b"split_parts: !!python/object/apply:os.mkdir [ran]", "is damaged"),
        # A value that is enormous only when it is written out.
        (SPLIT, b"a: &a [x, x]\nb: &b [*a, *a]\nsplit_parts: {train: [[*b, *b]]}", "has a=['x', 'x'], but"),
        ("index.uuid", b"../../x", "has its content=b'../../x', but it is a UUID: remove the file."),
        ("index.uuid", b"x" * 10**5, "has more than 64 bytes"),
        ("index.sqlite", b"import os", "has its beginning=b'import os', but it is an SQLite database: remove"),
    ],
)
def test_files_of_another_form_are_refused(root, file, content, words):
    (root / "own" / ".nv-meta" / file).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_index("own", root / "own")


@pytest.mark.parametrize("file", [INFO, SPLIT, "dataset.yaml", "index.uuid", "index.sqlite"])
def test_a_pipe_is_not_waited_for(root, file):
    path = root / "own" / ".nv-meta" / file
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))} is no file"):
        read_index("own", root / "own")


def test_excluded_shards_and_what_may_be_left_out(root):
    meta = root / "own" / ".nv-meta"
    change(meta, SPLIT, exclude=["train-{00000..00001}.tar"])
    change(meta, INFO, energon_version=None)
    for file in ("index.uuid", "index.sqlite"):
        (meta / file).unlink()
    assert read_index("own", root / "own")["train"] == {"train-00002.tar": 1}
