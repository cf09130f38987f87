"""tools/check/object_storage.py, which tries a storage: its sentences, and its cheap checks on a folder under msc://."""

import json
import sys

import object_storage
import pytest
import swift_server

from molmo2_nemo import storage
from molmo2_nemo.config.errors import ConfigError


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["object_storage.py", *words])
    object_storage.main()


def test_a_storage_that_works_passes_and_is_left_as_it_was(disk, monkeypatch, capsys):
    monkeypatch.setattr(object_storage, "LARGE", 2**16)
    monkeypatch.setattr(object_storage, "MANY", 20)
    run(monkeypatch, "--at", "msc://disk/mine", "--only", "objects", "pages", "large", "missing", "wrong_key")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("the storage: msc://disk/mine/check-")
    assert [line.split()[:2] for line in lines[1:5]] == [
        [n, "passed"] for n in ("objects", "pages", "large", "missing")
    ]
    assert "NOT TRIED: it takes an s3:// address" in lines[5]
    assert not [path for path in disk.rglob("*") if path.is_file()]


def test_a_storage_that_loses_something_fails(disk, monkeypatch, capsys):
    kept = storage.list_files
    monkeypatch.setattr(storage, "list_files", lambda folder: dict(list(kept(folder).items())[:5]))
    monkeypatch.setattr(object_storage, "MANY", 8)
    with pytest.raises(SystemExit, match="failed: pages"):
        run(monkeypatch, "--at", "msc://disk/mine", "--only", "pages", "missing")
    assert "Failed: 5 of 8 objects are listed" in capsys.readouterr().out


def test_what_is_missing_is_one_sentence(disk, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: cannot list msc://nope/x: .*no valid profile nope"):
        run(monkeypatch, "--at", "msc://nope/x")
    monkeypatch.setattr(swift_server.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch)
    assert ended.value.code.startswith("error: Swift is not installed: apt-get install --no-install-recommends swift ")
    monkeypatch.undo()
    monkeypatch.setattr(swift_server.shutil, "which", str)

    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(swift_server.os, "setxattr", refused)
    with pytest.raises(
        ConfigError, match=r"takes no extended attributes \(Operation not supported\), which Swift needs"
    ):
        swift_server.check(tmp_path)


def test_the_catalogue_of_the_set_that_is_prepared_is_one(tmp_path):
    from molmo2_nemo.catalogue.datasets import load_catalogue

    (tmp_path / "sets.yaml").write_text(json.dumps(object_storage.entry_of("http://127.0.0.1:1")))
    [entry] = load_catalogue(tmp_path / "sets.yaml").sets
    assert entry.name == "check-set" and len(entry.media.urls) == object_storage.ARCHIVES
