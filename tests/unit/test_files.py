"""Atomic writing, locks between processes, checksums, full disks (files.py); JSON arrays that are read item by item."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
from programs import REPOSITORY

from molmo2_nemo.catalogue.raw import json_items, json_values, read_rows
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.files import (
    LockHeld,
    disk_errors_told,
    locked,
    missing_room,
    publish,
    published,
    readable_size,
    sha256_of,
    sha256_of_text,
    write_atomically,
    write_json,
)

# Takes the lock, forks a process that goes on alone, prints the other's id, and waits to be killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from molmo2_nemo.files import locked
with locked(Path(sys.argv[1])):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"I have let go of the lock")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    print(child, flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_holder_and_is_not_kept_by_what_that_has_forked(tmp_path):
    path = tmp_path / "folder/lock"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", HOLDER, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(LockHeld, match="is locked by another process"), locked(path):
                pass
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            os.kill(child, 0)  # is alive
            with locked(path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
    with locked(path, wait=True):  # and again, since the file stays
        assert path.exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch, code):
    def flock(file, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path / "lock"), locked(tmp_path / "lock"):
        pass
    flock_error = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr("fcntl.flock", lambda file, operation: (_ for _ in ()).throw(flock_error))
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "lock"):
        pass


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "deep/er/note.json"
    write_json(path, {"b": 1, "a": 2})
    assert path.read_text() == '{\n "b": 1,\n "a": 2\n}\n'
    write_json(path, {"b": 1, "a": 2}, sort_keys=True)
    before = path.read_bytes()
    assert before == b'{\n "a": 2,\n "b": 1\n}\n'

    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["note.json"]
    (tmp_path / "part").write_bytes(b"whole")
    with pytest.raises(OSError, match="No space"):
        publish(tmp_path / "part", tmp_path / "new/file")
    assert (tmp_path / "part").exists() and not (tmp_path / "new/file").exists()
    publish(tmp_path / "part", tmp_path / "new/file", durable=False)
    assert (tmp_path / "new/file").read_bytes() == b"whole" and not (tmp_path / "part").exists()


def test_checksums_are_those_of_hashlib(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert sha256_of_text("ü") == hashlib.sha256("ü".encode()).hexdigest()
    assert len(sha256_of_text("\ud800")) == 64


def test_a_long_json_array_does_not_lie_in_memory(tmp_path):
    path = tmp_path / "rows.json"
    with path.open("w") as file:
        file.write("[")
        file.write(",".join(json.dumps({"n": n, "text": "x" * 1000}) for n in range(20_000)))
        file.write("]")
    tracemalloc.start()
    numbers = [row["n"] for row in read_rows(path)]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == list(range(20_000)) and most < path.stat().st_size / 4


def test_json_is_read_as_pythons_own_module_reads_it(tmp_path):
    path = tmp_path / "rows.json"
    for content, values in (
        (b'\xef\xbb\xbf [{"a": 1.5}, {"a": -0.0}, {"a": "\\ud83d\\ude00 \\u0000"}]', None),
        (b'[{"a": NaN}, {"a": 1e400}]', None),
        (b'[{"a": 0.1}, {"a": 123456789012345678901234567890}, {"a": 3.3333333333333333333333}]', None),
        ('[{"a": "ü"}]'.encode("utf-16"), None),
        (b"[]", None),
        (b'{"a": [1, 2]}', [{"a": [1, 2]}]),
        (b'{"a": 1}\n\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
    ):
        path.write_bytes(content)
        assert repr(list(json_values(path))) == repr(json.loads(content) if values is None else values)
    for content, message in (
        (b'[{"a": 1}, {"a": ', "it is broken after item 1 .*line 1 column 18"),
        (b'[{"a": 1}] [{"a": 2}]', "it is broken after item 1 .*Extra data"),
        (b'[{"a": 1},]', "it is broken after item 1 "),
        (b"[1, 2", "broken after item"),
        (b'[{"a": "\xff"}]', "it is broken after item 0 "),
        (b"no JSON", "Expecting value"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(json_values(path))
    path.write_bytes(b'{"a": {"rows": [1]}, "rows": [{"b": 1}, {"b": NaN}]}')
    assert repr(list(json_items(path, "rows"))) == "[{'b': 1}, {'b': nan}]"
    path.write_bytes(b'{"rows": []}')
    assert list(json_items(path, "rows")) == []
    path.write_bytes(b'{"rows": {"a": 1}}')
    with pytest.raises(ValueError, match="it has no JSON array under rows"):
        list(json_items(path, "rows"))


def test_a_large_broken_array_is_not_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("molmo2_nemo.catalogue.raw.MAX_WHOLE", 10)
    (tmp_path / "rows.json").write_bytes(b'[{"a": 1}, {"a": NaN}]')
    monkeypatch.setattr("molmo2_nemo.catalogue.raw.json.loads", None)
    with pytest.raises(ValueError, match="it is broken after item 1 .lexical error"):
        list(json_items(tmp_path / "rows.json"))


def test_room_on_the_disk_is_counted_where_the_folder_will_be(tmp_path, monkeypatch):
    sizes = {0: "0 bytes", 1023: "1023 bytes", 1024: "1.0 KiB", 5 * 2**30: "5.0 GiB", 3 * 2**50: "3,072.0 TiB"}
    assert {size: readable_size(size) for size in sizes} == sizes
    asked = []

    def disk_usage(path):
        asked.append(path)
        return SimpleNamespace(free=3 * 2**30)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    folder = tmp_path / "not/there/yet"
    assert missing_room(folder, 3 * 2**30, "it") is None
    assert missing_room(folder, 10 * 2**30, "it") == (
        f"it needs 10.0 GiB, {folder} has 3.0 GiB free, 7.0 GiB are missing: make room or choose another folder."
    )
    assert set(asked) == {tmp_path}


def wrapped(error):
    try:
        try:
            raise error
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 (as torch does)
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error, free, sentence",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            30,
            r"\(No space left on device\); it needs 100 bytes, .* 70 by",
        ),
        (wrapped(OSError(errno.ENOSPC, "No space left on device")), 30, "70 bytes are missing"),
        (ValueError("I/O error: No space left on device (os error 28)"), 30, "70 bytes are missing"),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            500,
            "needs 100 bytes, and 500 bytes are free: look at your quota",
        ),
        (OSError(errno.EFBIG, "File too large"), 500, "ulimit -f"),
        (OSError(errno.EROFS, "Read-only file system"), 500, "name a folder that you may write to"),
        (PermissionError(errno.EACCES, "Permission denied"), 500, "name a folder that you may write to"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), 500, "name another folder"),
        (OSError(errno.EIO, "Input/output error"), 500, "repair the disk"),
    ],
)
def test_an_error_of_the_disk_becomes_one_sentence(error, free, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(ConfigError, match=sentence) as told, disk_errors_told(tmp_path / "out", 100, "it"):
        raise error
    assert str(told.value).startswith(f"{tmp_path}/out cannot be written (")


@pytest.mark.parametrize("error", [ConfigError("a setting"), ValueError("our own"), KeyError("x"), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as same, disk_errors_told(tmp_path, 1, "it"):
        raise error
    assert same.value is error


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/below cannot be made .Not a directory.: choose another folder"):
        with published(tmp_path / "file" / "below"):
            pass
