"""The metadata of sources on a shared file system: read by one rank of a node, whatever they are like."""

import os
import shutil
from pathlib import Path

import pytest
import sources as world

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.data import blend, loader, node_metadata


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Two sources and their blend, for a process that is one of the two ranks of its node."""
    for name in ("a", "b"):
        write(tmp_path / "shared" / name, name)
    world.write_blend(tmp_path / "blend.yaml", "a", "b")
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "node"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    return tmp_path


def write(folder: Path, name: str) -> None:
    world.write_source(folder, [{"json": world.chat(f"Q {name}{i}")} for i in range(30)], 10)


def load(here: Path, **changes):
    data = world.config(here / "shared", blend=str(here / "blend.yaml"), **changes)
    found = blend.load_blend(data)
    blend.check_shards(found, data.max_error_rate)
    return data, found


def keys(here: Path) -> list[str]:
    data, found = load(here)
    stream = loader.train_loader(data, world.VISION, found, 0, 1, None, 1)
    return [next(stream).__key__[0] for _ in range(6)]


def test_the_second_rank_asks_the_shared_file_system_for_nothing(ranks, monkeypatch):
    _, first = load(ranks)
    assert all(Path(source.path).is_relative_to(ranks / "node") for source in first)
    assert [source.shards for source in first] == [str(ranks / "shared" / name) for name in "ab"]
    hidden = ranks / "elsewhere"
    (ranks / "shared").rename(hidden)
    assert load(ranks)[1] == first
    monkeypatch.setattr(node_metadata, "HOLDS_FOR", -1)  # too long ago, or another launch
    with pytest.raises(ConfigError, match="2 of the 2 sources of .* are not on disk under data.root="):
        load(ranks)


@pytest.mark.slow
def test_samples_are_those_of_a_process_alone(ranks, monkeypatch):
    together = keys(ranks)
    monkeypatch.delenv("WORLD_SIZE")
    assert all(source.path == source.shards for source in load(ranks)[1])
    assert keys(ranks) == together


def test_a_node_without_a_folder_for_copies_reads_in_place(ranks, monkeypatch):
    (ranks / "file").touch()
    monkeypatch.setenv("SLURM_TMPDIR", str(ranks / "file"))
    assert [source.path for source in load(ranks)[1]] == [str(ranks / "shared" / name) for name in "ab"]


def test_faults_are_told_with_the_path_on_the_shared_file_system(ranks, monkeypatch):
    monkeypatch.setattr(node_metadata, "HOLDS_FOR", -1)
    a, meta = ranks / "shared" / "a", ranks / "shared" / "a" / ".nv-meta"
    (a / "train-1.tar").unlink()
    os.mkfifo(a / "train-1.tar")
    with pytest.raises(ConfigError, match=f"lacks 1 of 3 shards .* the first of them {a}/train-1.tar"):
        load(ranks)
    (meta / "split.yaml").write_text("split_parts: {train: [../x.tar]}")
    with pytest.raises(ConfigError, match=f"a is not accepted: {meta}/split.yaml has .*energon prepare {a} "):
        load(ranks)
    (meta / "split.yaml").unlink()
    os.mkfifo(meta / "split.yaml")  # to be read for ever
    with pytest.raises(ConfigError, match=f"not prepared \\({meta}/split.yaml is no file\\): run energon prepare {a} "):
        load(ranks)
    (meta / ".info.json").write_text("[" * 10**5)
    with pytest.raises(ConfigError, match=f"the source a is not prepared|{meta}/.info.json is damaged"):
        load(ranks)
    shutil.rmtree(meta)
    with pytest.raises(ConfigError, match=f"the source a is not prepared \\({meta}/.info.json is no file\\)"):
        load(ranks)


def test_a_folder_that_is_listed_by_two_names_is_found_through_links(ranks):
    shutil.rmtree(ranks / "shared" / "b")
    (ranks / "shared" / "b").symlink_to(ranks / "shared" / "a")
    for _ in range(2):  # read, and handed on
        with pytest.raises(ConfigError, match="lists .*/shared/b twice, as a and b: keep one"):
            load(ranks)
