"""What has been done, one JSON object a line, appended as it happens.

A line that a kill or a full disk cut off is dropped when the file is opened again. The last record of a key counts. No
database: a plain file that is only appended to works on any file system, and a person can read it.
"""

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any, TypedDict

from pydantic import ConfigDict, TypeAdapter, with_config

from molmo2_nemo.files import write_atomically

# What a line of each file must say; it may say more.
_MORE = ConfigDict(extra="allow", strict=True)


@with_config(_MORE)
class RecordedFile(TypedDict):
    """A line of files.jsonl: a file of a data set, or the folder of an archive's contents."""

    file: str  # relative to the data set's folder
    bytes: int


@with_config(_MORE)
class FetchedMedia(TypedDict):
    """A line of media/index.jsonl: what an address gave."""

    url: str
    file: str  # relative to media/
    bytes: int
    sha256: str


@with_config(_MORE)
class LostAddress(TypedDict):
    """A line of media/lost.jsonl: why an address gave nothing."""

    url: str  # or the id of a YouTube video
    kind: str  # as that of molmo2_nemo.fetch.web.Lost, or "held out", or "duplicate"
    reason: str
    runs: int  # that asked for it
    not_before: str  # ISO date before which it is not asked for again


RECORDS = {"files.jsonl": RecordedFile, "index.jsonl": FetchedMedia, "lost.jsonl": LostAddress}


class Journal:
    """Records of a file by their field `key`. Lines that are no such record (see RECORDS) are left out."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self._record = TypeAdapter(RECORDS.get(path.name, dict[str, Any]))
        self.records: dict[str, dict] = {}
        self._file = None
        self._lines = 0
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    if isinstance(record, dict) and isinstance(record.get(key), str):
                        self._put(record if record.get("removed") else self._record.validate_python(record))
                self._lines += 1
            if len(whole) < len(content):
                os.truncate(path, len(whole))

    def _put(self, record: dict) -> None:
        if record.get("removed"):
            self.records.pop(record[self.key], None)
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
            write_atomically(self.path, text)
        else:
            self.path.unlink()
        self._lines = len(self.records)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
