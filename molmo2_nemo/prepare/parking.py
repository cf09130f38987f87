"""Puts files of a raw folder away into storage, and leaves holes in their places.

A hole has the name, the size and the time of the file, and takes no room on the disk. What counts files, compares
their sizes or looks for them by name does not see a difference; what reads them goes through `RawSource.content`, which
brings them back. Of a parquet file its end stays, where its columns and the number of its rows are. Of a shard that was
uploaded the heads of its members stay, which is all that Energon's index is made of.
"""

import json
import os
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from molmo2_nemo import storage
from molmo2_nemo.catalogue.parked import Parked, ParkedFile, crc_of
from molmo2_nemo.catalogue.raw import MEDIA_SUFFIXES
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.files import sync, write_atomically
from molmo2_nemo.limits import VIDEO_SUFFIXES

# Suffixes of files that are read through `RawSource.content` alone. Others, such as annotations, stay on the disk.
SUFFIXES = {*MEDIA_SUFFIXES, *VIDEO_SUFFIXES, ".jpeg", ".tif", ".ppm", ".jp2", ".avif"}
# Bytes of an object of small files at most, and of what is brought back at once; less where the room is small.
PACK, WINDOW = 64 * 2**20, 8 * 2**20


# -- holes ------------------------------------------------------------------------------------------------------------


def hollow(path: Path, aside: Path, keep: Iterable[tuple[int, int]] = ()) -> None:
    """Replace a file by one of the same size and time whose bytes are holes, but for the ranges (from, to) in `keep`.

    aside: a folder on the same disk, for the new file until it is complete.
    """
    aside.mkdir(parents=True, exist_ok=True)
    partial, stat = aside / f"hole-{os.getpid()}", path.stat()
    with path.open("rb") as old, partial.open("wb") as new:
        new.truncate(stat.st_size)
        for start, end in keep:
            new.seek(start)
            new.write(_read(old, start, end))
    os.utime(partial, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    partial.replace(path)


def keep_heads(shard: Path, file: Path) -> None:
    """Write the heads of a shard's members, and where they are, to a small file."""
    with tarfile.open(shard) as tar:
        ranges = [(member.offset, member.offset_data) for member in tar]
    with shard.open("rb") as data:
        heads = b"".join(_read(data, start, end) for start, end in ranges)
    line = json.dumps({"bytes": shard.stat().st_size, "ranges": ranges}).encode()
    write_atomically(file, line + b"\n" + heads)


def from_heads(file: Path, shard: Path) -> None:
    """Make a shard of the size that it had, of which the heads are there and the rest is a hole."""
    with file.open("rb") as heads, shard.open("wb") as data:
        said = json.loads(heads.readline())
        data.truncate(said["bytes"])
        for start, end in said["ranges"]:
            data.seek(start)
            data.write(heads.read(end - start))


def _read(file, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _end_of_parquet(path: Path) -> list[tuple[int, int]]:
    """Where the description of a parquet file is: it ends with its length and four letters (parquet.apache.org)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - 8)
        length, magic = struct.unpack("<I4s", file.read(8))
    return [(max(0, size - length - 8), size)] if magic == b"PAR1" else [(0, size)]


# -- parking ----------------------------------------------------------------------------------------------------------


def park(folder: Path, address: str, room: int, parquet: bool, report: Callable[[int], None]) -> None:
    """Put all whole pictures and videos of a raw folder away, to objects below `address`. StorageError, OSError.

    room: bytes that may be taken on the disk. parquet: put files of rows away, too. report: called with the bytes of
    each object. A kill at any moment loses nothing: a file becomes a hole after its object was checked and noted.
    """
    parked, aside = Parked(folder), folder / ".hole"
    parked.begin(address, max(2**16, min(WINDOW, room // 64)))
    most = max(2**18, min(PACK, room // 16))
    waiting, size = [], 0

    def put(pack: list[Path]) -> None:
        number = parked.next_pack()
        one = pack[0] if len(pack) == 1 else None
        data = b"".join(path.read_bytes() for path in pack) if one is None else one
        storage.send(data, parked.address_of(number))
        files, offset = [], 0
        for path in pack:
            length = path.stat().st_size
            files.append(ParkedFile(os.path.relpath(path, folder), number, offset, length, crc_of(path)))
            offset += length
        parked.add(files)
        for path in pack:
            _make_hole(path, aside)
        report(offset)

    for path in _candidates(folder, parquet):
        if parked.find(os.path.relpath(path, folder)):  # a kill came before the hole was made
            _make_hole(path, aside)
            continue
        length = path.stat().st_size
        if waiting and size + length > most:
            put(waiting)
            waiting, size = [], 0
        waiting.append(path)
        size += length
    if waiting:
        put(waiting)
    sync(folder)


def _make_hole(path: Path, aside: Path) -> None:
    hollow(path, aside, _end_of_parquet(path) if path.suffix.lower() == ".parquet" else ())


def _candidates(folder: Path, parquet: bool) -> Iterator[Path]:
    """Files that can be put away and are no holes, in the order of their names, so that neighbours stay together."""
    fetched = {record["file"] for record in Journal(folder / "media" / "index.jsonl", "url").records.values()}
    for top in ("media", "hub", "extracted"):
        for directory, folders, names in os.walk(folder / top):
            folders[:] = sorted(name for name in folders if not name.startswith("."))  # what is not complete
            for name in sorted(names):
                path = Path(directory, name)
                suffix = path.suffix.lower()
                if path.is_symlink() or not (suffix in SUFFIXES or (parquet and top == "hub" and suffix == ".parquet")):
                    continue
                # A picture that is not recorded yet is looked at again by the fetch that goes on.
                if top == "media" and os.path.relpath(path, folder / top) not in fetched:
                    continue
                stat = path.stat()
                if stat.st_size and (stat.st_blocks or suffix == ".parquet"):
                    yield path
