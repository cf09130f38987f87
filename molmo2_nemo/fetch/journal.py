"""What has been done, one JSON object a line, appended as it happens.

A line that a kill or a full disk cut off is dropped when the file is opened again. The last record of a key counts. No
database: a plain file that is only appended to works on any file system, and a person can read it.
"""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

# The disk's answers, in contrast to those of the network: they end a run instead of counting as a lost file.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}


class Journal:
    """Records of a file by their field `key`. Lines that are no record of these fields are left out."""

    # What a record of each file must say: a type for each field.
    FIELDS = {
        "index.jsonl": {"file": str, "bytes": int, "sha256": str},
        "lost.jsonl": {"kind": str, "reason": str, "runs": int, "not_before": str},
        "files.jsonl": {"bytes": int},
    }

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self._fields = self.FIELDS.get(path.name, {}) | {key: str}
        self.records: dict[str, dict] = {}
        self._file = None
        self._lines = 0
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    if isinstance(record, dict) and (record.get("removed") or self._is_whole(record)):
                        self._put(record)
                self._lines += 1
            if len(whole) < len(content):
                os.truncate(path, len(whole))

    def _is_whole(self, record: dict) -> bool:
        return all(isinstance(record.get(field), kind) for field, kind in self._fields.items())

    def _put(self, record: dict) -> None:
        if record.get("removed"):
            self.records.pop(str(record.get(self.key)), None)
        else:
            self.records[record[self.key]] = record

    def append(self, record: dict) -> None:
        """Add or replace a record; it is with the operating system when this returns."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        line = json.dumps(record, sort_keys=True).encode() + b"\n"
        position = self._file.tell()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            # Half a line would spoil the next one.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), position)
            raise
        self._lines += 1
        self._put(record)

    def remove(self, key: str) -> None:
        if key in self.records:
            self.append({self.key: key, "removed": True})

    def tidy(self) -> None:
        """One line for each key, sorted: the same records give the same bytes, whatever happened on the way."""
        self.close()
        if not self.path.exists():
            return
        text = "".join(json.dumps(self.records[key], sort_keys=True) + "\n" for key in sorted(self.records))
        if text:
            write_aside(self.path, text.encode())
        else:
            self.path.unlink()
        self._lines = len(self.records)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def write_aside(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    write_aside(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def is_disk_error(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file. BlockingIOError: another process does, and `wait` is off.

    A file system without locks is taken as it is; its users see to it themselves.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        yield
