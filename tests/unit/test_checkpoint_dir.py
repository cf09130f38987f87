"""Checkpoints as folders: what is damaged is found, what is hostile is not executed, what is good is not removed."""

import io
import json
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import ModelConfig
from molmo2_nemo.files import sha256_of
from molmo2_nemo.hf import convert
from molmo2_nemo.training.checkpoint import Saver


class Bomb:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.fixture
def checkpoint(tmp_path):
    state = {"weight": torch.empty(4, 3, device="meta")}
    path = tmp_path / "step_00000007"
    make = {"weight": lambda: torch.arange(12.0).reshape(4, 3)}
    convert.write_checkpoint(path, ModelConfig(name="m"), state, make, {"step": 7, "stage": "test"})
    return path


def rewrite_marker(checkpoint, **changes):
    marker = json.loads((checkpoint / "complete.json").read_text())
    marker |= changes
    (checkpoint / "complete.json").write_text(json.dumps(checkpoint_dir.sealed(marker)))


def refresh_marker(checkpoint):
    """As somebody who has replaced a file would do it."""
    files = [path for path in checkpoint.iterdir() if path.name != "complete.json"]
    sizes = {path.name: path.stat().st_size for path in files}
    rewrite_marker(checkpoint, files=sizes, sha256={path.name: sha256_of(path) for path in files})


def test_a_whole_one_is_whole(checkpoint):
    checkpoint_dir.verify(checkpoint)
    marker = checkpoint_dir.read_marker(checkpoint)
    assert set(marker["files"]) == set(marker["sha256"]) == {p.name for p in checkpoint.iterdir()} - {"complete.json"}
    assert torch.equal(convert.read_tensor(checkpoint, "weight", (4, 3), torch.float32), torch.arange(12.0).view(4, 3))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_each_file_is_somebodys_part(checkpoint, part):
    """Four flipped bytes change no size; of three ranks exactly one finds them."""
    [data] = checkpoint.glob("*.distcp")
    names = sorted(json.loads((checkpoint / "complete.json").read_text())["files"])
    victim = checkpoint / [name for name in names if name != ".metadata"][part]
    content = bytearray(victim.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(byte ^ 0xFF for byte in content[middle : middle + 4])
    victim.write_bytes(content)
    checkpoint_dir.read_marker(checkpoint)
    found = []
    for rank in range(3):
        try:
            checkpoint_dir.verify(checkpoint, rank, 3)
        except ConfigError as error:
            found.append(str(error))
    assert len(found) == 1 and victim.name in found[0] and "SHA-256" in found[0]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"step": None}, "complete.json (step: Input should be a valid integer)"),
        ({"step": "7"}, "complete.json (step: Input should be a valid integer)"),
        ({"step": -7}, "complete.json (step: Input should be greater than or equal to 0)"),
        ({"step": True}, "complete.json (step: Input should be a valid integer)"),
        ({"tokens_seen": "x"}, "complete.json (tokens_seen: Input should be a valid integer)"),
        ({"data": {"captions": 5}}, "complete.json (data.captions: Input should be a valid dictionary)"),
        ({"losses": ["low"]}, "complete.json (losses.0: Input should be a valid number)"),
        ({"best": 5}, "complete.json (best: Input should be a valid dictionary)"),
        ({"files": {"a": float("inf")}}, "complete.json (files.a: Input should be a valid integer)"),
        ({"files": {"a" * 300: 1}}, "is missing"),
        ({"files": {"a\0": 1}}, "is missing"),
        ({"step": 8}, "says step 8; give it the name step_00000008"),
        ({"files": None}, "no readable complete.json"),
        ({"files": ["a"]}, "no readable complete.json"),
        ({"files": {"a": "many"}}, "no readable complete.json"),
        ({"files": {"gone": 1}}, "gone is missing"),
        ({"files": {"config": 1, "model.json": 1}}, "is missing"),
    ],
)
def test_a_damaged_marker_is_named(checkpoint, changes, reason):
    rewrite_marker(checkpoint, **changes)
    with pytest.raises(ConfigError, match="checkpoint .*step_00000007") as error:
        checkpoint_dir.read_marker(checkpoint)
    assert reason in str(error.value)
    assert not checkpoint_dir.is_complete(checkpoint)


@pytest.mark.parametrize(
    "before, after", [('"stage"', '"stagf"'), ('"sha256": {', '"sha25": {'), ('"step": 7', '"step": 8')]
)
def test_damage_of_the_marker_itself_is_found(checkpoint, before, after):
    text = (checkpoint / "complete.json").read_text()
    assert before in text
    (checkpoint / "complete.json").write_text(text.replace(before, after, 1))
    with pytest.raises(ConfigError, match="complete.json was changed"):
        checkpoint_dir.read_marker(checkpoint)


@pytest.mark.parametrize("text", ["[" * 100_000, "", "7", "\ud800", '{"step": 7}'])
def test_what_is_no_marker_is_named(checkpoint, text):
    (checkpoint / "complete.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match="has no readable complete.json"):
        checkpoint_dir.read_marker(checkpoint)


@pytest.mark.parametrize("text", ['{"step": Infinity}', '{"step": NaN}', "[" * 100_000, '{"step": [7]}', "7", "\0"])
def test_a_damaged_note_of_the_best_one_names_none(checkpoint, text):
    (checkpoint.parent / "best.json").write_text(text)
    assert checkpoint_dir.best(checkpoint.parent) is None


def test_a_marker_of_an_older_version_is_read(checkpoint):
    marker = json.loads((checkpoint / "complete.json").read_text())
    del marker["sha256"], marker[checkpoint_dir.SEAL]
    (checkpoint / "complete.json").write_text(json.dumps(marker))
    checkpoint_dir.verify(checkpoint)


def test_the_advice_about_a_renamed_one_is_right(checkpoint):
    wrong = checkpoint.rename(checkpoint.with_name("step_00000009"))
    with pytest.raises(ConfigError, match="give it the name step_00000007"):
        checkpoint_dir.read_marker(wrong)
    checkpoint_dir.verify(wrong.rename(wrong.with_name("step_00000007")))
    # Under a name that says no step, it is used as it is.
    checkpoint_dir.verify(checkpoint.rename(checkpoint.with_name("best")))


def dotted_name() -> bytes:
    """Protocol 4 walks along the dots of a name: from a module that a check of prefixes allows to os.system."""
    return (
        b"\x80\x04"
        + b"".join(
            b"\x8c" + bytes([len(text)]) + text for text in (b"torch.distributed.checkpoint.filesystem", b"os.system")
        )
        + b"\x93\x8c\x04true\x85R."
    )


@pytest.mark.parametrize("kind", ["exec", "dotted name", "a function of torch"])
def test_an_index_is_not_executed(checkpoint, tmp_path, kind):
    index = {
        "exec": pickle.dumps(Bomb(tmp_path / "exploded")),
        "dotted name": dotted_name(),
        "a function of torch": b"\x80\x04\x8c\x05torch\x8c\x04load\x93\x8c\x01x\x85R.",
    }[kind]
    (checkpoint / ".metadata").write_bytes(index)
    refresh_marker(checkpoint)
    with pytest.raises(ConfigError, match="is not a checkpoint index"):
        checkpoint_dir.read_model(checkpoint)
    # Also if it has come there after the check.
    with pytest.raises(ConfigError, match="cannot be read"):
        convert.read_tensor(checkpoint, "weight", (4, 3), torch.float32)
    with pytest.raises(ConfigError, match="cannot be loaded|is not data"):
        convert.checkpoint_dtypes(checkpoint)
    assert not (tmp_path / "exploded").exists()


def test_the_bombs_are_ones(checkpoint, tmp_path):
    """Without our reader they do what they are made for."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()
    assert pickle.loads(dotted_name()) == 0


def test_objects_inside_of_data_files_are_not_executed(tmp_path):
    """Megatron keeps what is no tensor as a pickle in a .distcp file, and asks torch to load it whatever it is."""
    path, key = tmp_path / "step_00000001", "common_state/shard_0_1"
    bomb = [Bomb(tmp_path / "exploded")]
    dcp.save({key: bomb}, storage_writer=dcp.FileSystemWriter(path, thread_count=1), no_dist=True)
    with pytest.raises(ConfigError, match="is not data, and was not loaded"), checkpoint_dir.nothing_executed(path):
        dcp.load({key: io.BytesIO()}, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert not (tmp_path / "exploded").exists()
    dcp.load({key: io.BytesIO()}, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert (tmp_path / "exploded").exists()


def test_only_whole_checkpoints_count_when_older_ones_are_removed(checkpoint):
    folder = checkpoint.parent
    for step in (2, 3, 4, 5, 6, 8):
        other = shutil.copytree(checkpoint, folder / f"step_{step:08d}")
        rewrite_marker(other, step=step)

    def kept(step, **settings):
        Saver(folder, **settings)._prune(step)
        return [checkpoint_dir.step_of(path) for path in checkpoint_dir.find_checkpoints(folder)]

    (folder / "step_00000005" / "model.json").unlink()
    checkpoint_dir.mark_damaged(folder / "step_00000006", "a checksum")
    (folder / "best.json").write_text(json.dumps({"step": 3, "value": 1.0}))
    # 8 is newer than what was saved, 5 and 6 are damaged, 3 is the best, 2 a multiple.
    assert kept(7, keep_last=2, keep_every=2) == [2, 3, 4, 5, 6, 7, 8]
    assert kept(7, keep_last=1, keep_every=0) == [3, 5, 6, 7, 8]
    assert checkpoint_dir.newest_usable(checkpoint_dir.find_checkpoints(folder)[:-1])[0] == checkpoint


def test_a_run_whose_newest_checkpoint_is_damaged_is_not_taken_for_an_older_one(checkpoint, tmp_path):
    run = tmp_path / "run" / "checkpoints"
    for step in (7, 8):
        rewrite_marker(shutil.copytree(checkpoint, run / f"step_{step:08d}"), step=step)
    assert checkpoint_dir.resolve(str(run.parent)) == run / "step_00000008"
    (run / "step_00000008" / "model.json").unlink()
    with pytest.raises(ConfigError, match="model.json is missing.* to take it, give its path") as error:
        checkpoint_dir.resolve(str(run.parent))
    advised = str(error.value).split("whole is ")[1].split(": to take")[0]
    assert checkpoint_dir.resolve(advised) == run / "step_00000007"
    (run / "step_00000007" / "model.json").unlink()  # all of them: the reason is that of the newest
    with pytest.raises(ConfigError, match="step_00000008 is damaged: model.json is missing"):
        checkpoint_dir.resolve(str(run.parent))
    shutil.rmtree(run)
    with pytest.raises(ConfigError, match="has no complete checkpoint: name a run that has saved one"):
        checkpoint_dir.resolve(str(run.parent))
    with pytest.raises(ConfigError, match="is no folder: name a run, such as"):
        checkpoint_dir.resolve(str(run))


def test_a_folder_of_the_same_name_is_replaced_only_by_a_whole_one(checkpoint, monkeypatch):
    temporary = checkpoint_dir.aside(checkpoint)
    (temporary / ".metadata").write_bytes((checkpoint / ".metadata").read_bytes())

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_dir, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_dir.publish(temporary, checkpoint, ModelConfig(name="m"), {"step": 7})
    checkpoint_dir.verify(checkpoint)
