"""Files of a raw folder that were put away, so that a data set can be larger than the disk on which it is prepared.

    raw/NAME/parked.sqlite   which object has the bytes of which file, from where on, and their checksum
    raw/NAME/.held/          bytes that were brought back, a folder for each reader

A file that was put away keeps its name, its size and its time, and takes no room: it is a hole, which
molmo2_nemo/prepare/parking.py makes. So whatever looks for files finds what it would find on a large disk, and whatever
reads one asks `RawSource.content` for it.
"""

import errno
import os
import sqlite3
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from molmo2_nemo import storage

FILE = "parked.sqlite"
HELD = ".held"
CHUNK = 8 * 2**20  # bytes of a large file that are brought back at once


@dataclass(frozen=True)
class ParkedFile:
    """Where a file's bytes are."""

    name: str  # relative to the set's folder
    pack: int  # number of the object
    offset: int
    bytes: int
    crc: int  # zlib.crc32 of them


class Parked:
    """The files of the raw folder `folder` that were put away. StorageError: their object cannot be read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._held: dict[Path, int] = {}  # bytes of what was brought back, the oldest first

    @classmethod
    def of(cls, folder: Path) -> "Parked | None":
        return cls(folder) if (folder / FILE).exists() else None

    @cached_property
    def _database(self) -> sqlite3.Connection:
        return sqlite3.connect(self.folder / FILE)

    @cached_property
    def _settings(self) -> tuple[str, int]:
        """The address of the folder of objects, and how many bytes are brought back at once."""
        return self._database.execute("SELECT address, window FROM settings").fetchone()

    @cached_property
    def _home(self) -> tempfile.TemporaryDirectory:
        (self.folder / HELD).mkdir(exist_ok=True)
        return tempfile.TemporaryDirectory(dir=self.folder / HELD)

    @contextmanager
    def _written(self) -> Iterator[sqlite3.Connection]:
        """The database, for changes that are on the disk afterwards. OSError: they are not."""
        try:
            with self._database as database:
                yield database
        except sqlite3.Error as error:
            raise OSError(errno.EIO, f"it cannot be written ({error})", str(self.folder / FILE)) from error

    def begin(self, address: str, window: int) -> None:
        """Make the file, for objects below an address."""
        with self._written() as database:
            database.execute("CREATE TABLE IF NOT EXISTS settings (address TEXT, window INTEGER)")
            database.execute(
                "CREATE TABLE IF NOT EXISTS files"
                " (name TEXT PRIMARY KEY, pack INTEGER, offset INTEGER, bytes INTEGER, crc INTEGER)"
            )
            database.execute("CREATE INDEX IF NOT EXISTS places ON files (pack, offset)")
            database.execute("DELETE FROM settings")
            database.execute("INSERT INTO settings VALUES (?, ?)", (address, window))

    def add(self, files: Iterable[ParkedFile]) -> None:
        """Note files whose object is written and checked; they are on the disk once this returns."""
        rows = [(file.name, file.pack, file.offset, file.bytes, file.crc) for file in files]
        with self._written() as database:
            database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)

    def find(self, name: str) -> ParkedFile | None:
        row = self._database.execute("SELECT * FROM files WHERE name = ?", (name,)).fetchone()
        return ParkedFile(*row) if row else None

    def held_at_once(self) -> int:
        """Bytes that one reader of pictures and videos may hold."""
        media = "SELECT max(bytes) FROM files WHERE name NOT LIKE '%.parquet'"
        largest = self._database.execute(media).fetchone()[0]
        return max(largest, 2 * self._settings[1]) if largest else 0

    def next_pack(self) -> int:
        return (self._database.execute("SELECT max(pack) FROM files").fetchone()[0] or 0) + 1

    def address_of(self, pack: int) -> str:
        return storage.join(self._settings[0], f"{pack:06d}")

    def content(self, path: Path) -> Path:
        """A file with the bytes of `path`: itself, if it was not put away, else one that was brought back.

        Files that follow it in its object are brought back with it, since they are likely to be read next. It stays
        until another call.
        """
        wanted = self.find(os.path.relpath(path, self.folder))
        if wanted is None:
            return path
        if (held := self._place(wanted)).exists():
            return held
        address, window = self.address_of(wanted.pack), self._settings[1]
        if wanted.bytes > window:
            fresh = [wanted]
            self._make_room(wanted.bytes)
            with held.open("wb") as file:
                for start in range(0, wanted.bytes, CHUNK):
                    file.write(storage.read(address, wanted.offset + start, min(CHUNK, wanted.bytes - start)))
            _check(wanted, crc_of(held), address)
        else:
            fresh = self._following(wanted, window)
            total = fresh[-1].offset + fresh[-1].bytes - wanted.offset
            self._make_room(total)
            data = memoryview(storage.read(address, wanted.offset, total))
            for one in fresh:
                part = data[one.offset - wanted.offset :][: one.bytes]
                _check(one, zlib.crc32(part), address)
                self._place(one).write_bytes(part)
        self._held |= {self._place(one): one.bytes for one in fresh}
        return held

    def _place(self, file: ParkedFile) -> Path:
        return Path(self._home.name, f"{file.pack}-{file.offset}{Path(file.name).suffix}")

    def _following(self, wanted: ParkedFile, window: int) -> list[ParkedFile]:
        """The files from `wanted` on that lie within the next `window` bytes of its object."""
        rows = self._database.execute(
            "SELECT * FROM files WHERE pack = ? AND offset >= ? AND offset + bytes <= ? ORDER BY offset",
            (wanted.pack, wanted.offset, wanted.offset + window),
        )
        return [ParkedFile(*row) for row in rows]

    def _make_room(self, size: int) -> None:
        """Remove the oldest files, so that no more than two windows, or a large file, are held at once."""
        while self._held and sum(self._held.values()) + size > 2 * self._settings[1]:
            path = next(iter(self._held))
            path.unlink(missing_ok=True)
            del self._held[path]


def crc_of(path: Path) -> int:
    """CRC-32 of a file, which is read in pieces."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _check(file: ParkedFile, crc: int, address: str) -> None:
    if crc != file.crc:
        raise storage.StorageError(
            f"{storage.shown(address)} was changed after {file.name} had been put there: remove the folder of this data"
            " set from --scratch and start again."
        )
