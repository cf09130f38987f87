"""A cache of shards on a node's own disk, shared by all ranks and loader workers of the node, and by later jobs.

What is fetched is what is read: the samples of a slice, by one request for their range of bytes, and not whole shards,
of which a worker reads sixteen samples here and there. So no byte is fetched twice while it is in the cache, and a pass
over data that do not fit into it fetches what the pass reads. The folder of the cache has for each source

    .nv-meta/                as the source has it; Energon reads it here (node_metadata.py)
    SHARD.tar.idx            the shard's index: where its samples begin
    SHARD.tar.data           the shard with holes where nothing was fetched yet (a sparse file)
    SHARD.tar.map            a line about the shard, then for each sample its CRC-32 and whether it is in .data

A sample counts as there when the map says so and the CRC-32 of its bytes agrees: what was being written when a process
was killed, and what a bad disk has changed, is fetched again. Locks are the kernel's, and go with their holder: of a
range of the map while its samples are fetched, so that two workers never fetch the same, and of the map while a shard
is in use, so that it is not evicted. The least recently used shards go first.

multi-storage-client has a cache, too (1.3.1), which does not do: it fetches lines of 64 MB (or whole objects) where we
need 3, keeps its bound only every five minutes, and believes what it finds on the disk.
"""

import contextlib
import fcntl
import json
import os
import stat
import struct
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molmo2_nemo import storage
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.files import (
    bytes_of,
    disk_error_behind,
    disk_errors_told,
    free_bytes,
    locked,
    readable_size,
    sha256_of_text,
)
from molmo2_nemo.storage import StorageError

# Of the cache's disk, without data.cache_size: the share of what is free or the cache's already.
SHARE_OF_DISK = 0.8
# Down to which share of its bound the cache is emptied, so that it is not done for every sample.
EVICT_TO = 0.9
# Bytes of one request at most, unless one sample has more: they are in memory until they are on the disk.
LARGEST_REQUEST = 2**24
HEADER = 4096  # bytes of a map before its first record
BLOCK = 4096  # bytes by which a file system hands out its disk; a range of bytes may take two more
RECORD = np.dtype([("crc", "<u4"), ("there", "<u4")])
THERE = 0x7EA51DE5  # no value that a hole or a damaged file has by itself
# Indexes of shards that a process keeps in memory for each source, 8 bytes a sample.
KEPT_INDEXES = 512
# Shards of a source that a process keeps open, two files each: as many as a worker reads at a time (loader.py).
KEPT_OPEN = 4
# Seconds after which a shard that is read is noted as used again.
NOTED_FOR = 1.0


class Replaced(StorageError):
    """A shard is another one than when its index was read."""


class _Evicted(Exception):
    """A shard has left the cache between two steps."""


@dataclass(frozen=True)
class NodeCache:
    """folder: of this user on this node; size: bytes that it may take."""

    folder: Path
    size: int

    def source(self, address: str) -> "CachedSource":
        """The shards below an address or a local folder, as they are read through the cache."""
        digest = sha256_of_text(address.rstrip("/"))[:16]
        return CachedSource(self, address.rstrip("/"), self.folder / f"{digest}-{storage.name(address)[:40]}")

    def used(self) -> int:
        """Bytes on the disk now, by looking at every file."""
        return sum(size for _, size, _ in self._shards())

    def count(self, more: int) -> None:
        """Count bytes that are about to be written; evict what was not used for longest if they are too many."""
        if more > self.size:
            raise StorageError(
                f"data.cache_size={readable_size(self.size)} is less than the {readable_size(more)} that one slice of"
                " samples takes: make it larger."
            )
        if self._add(more + 2 * BLOCK) > self.size:
            with locked(self.folder / "evict.lock", wait=True):
                if self._add(0) > self.size:  # or another process has done it
                    self.evict(self.size * EVICT_TO - more)

    def evict(self, most: float) -> int:
        """Remove shards that nobody uses, the least recently used first, until `most` bytes are left; what is left."""
        shards = self._shards()
        left = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if left <= most:
                break
            if _remove(path):
                left -= size
        with self._counter() as counter:
            os.pwrite(counter, struct.pack("<q", left), 0)
        return left

    def _shards(self) -> list[tuple[float, int, Path]]:
        """(time of the last use, bytes on the disk, the map) of each shard."""
        found = []
        for path in self.folder.rglob("*.map"):
            with contextlib.suppress(FileNotFoundError):
                data, index = os.stat(path.with_suffix(".data")), os.stat(path.with_suffix(".idx"))
                map = os.stat(path)
                found.append((map.st_mtime, 512 * (data.st_blocks + index.st_blocks + map.st_blocks), path))
        return found

    @contextlib.contextmanager
    def _counter(self) -> Iterator[int]:
        file = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock_range(file, 0, 8)
            yield file
        finally:
            os.close(file)

    def counted(self) -> int:
        """Bytes on the disk as far as processes have counted them."""
        return self._add(0)

    def _add(self, more: int) -> int:
        with self._counter() as counter:
            found = os.pread(counter, 8, 0)
            total = more + (struct.unpack("<q", found)[0] if len(found) == 8 else self.used())
            os.pwrite(counter, struct.pack("<q", total), 0)
        return total


def open_cache(cache_dir: str | None, cache_size: str | None) -> NodeCache:
    """The cache of data.cache_dir and data.cache_size, made if it is not there.

    ConfigError: it cannot be written, is somebody else's, or the size is none.
    """
    parent = Path(cache_dir or os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()).expanduser().absolute()
    folder = parent / f"molmo2-nemo-cache-{os.getuid()}"
    said = f"data.cache_dir={cache_dir}" if cache_dir else f"data.cache_dir (unset, so that {parent} is taken)"
    with storage.named(said), disk_errors_told(parent, 0, "the cache of shards"):
        parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise ConfigError(f"{said}: {folder} is no folder that only you can write to: name another folder.")
        (folder / "evict.lock").touch()
        cache = NodeCache(folder, 0)
        if not cache_size:
            return NodeCache(folder, int(SHARE_OF_DISK * (free_bytes(folder) + cache.counted())))
    try:
        return NodeCache(folder, bytes_of(cache_size))
    except ValueError as error:
        raise ConfigError(f"data.cache_size={cache_size}: {error}; write it like 500GB.") from None


# Bytes that must be free for a cache to be of use: some slices of every worker.
LEAST_ROOM = 10**9


def check_room(cache: NodeCache) -> None:
    """Refuse a disk that has no room for the cache. ConfigError, one sentence."""
    wanted = min(cache.size, LEAST_ROOM)
    free = free_bytes(cache.folder) + cache.counted()
    if free < wanted:
        raise ConfigError(
            f"the cache {cache.folder} has {readable_size(free)} of disk, and at least {readable_size(wanted)} are"
            " wanted: make room, or set data.cache_dir to a folder on another disk."
        )


class CachedSource:
    """The shards of one source. May be used by several threads, and after a fork."""

    def __init__(self, cache: NodeCache, address: str, folder: Path):
        self.cache, self.address, self.folder = cache, address, folder
        self._indexes: OrderedDict[str, tuple[np.ndarray, str]] = OrderedDict()
        self._seen: dict[str, str] = {}  # shard -> the first line of its map when this process has looked at it
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()

    def __repr__(self) -> str:
        return f"CachedSource({storage.shown(self.address)})"

    def index(self, shard: str) -> np.ndarray:
        """Where each sample of a shard begins, and after the last one its end: uint64 [samples + 1].

        Missing: there is no such shard. StorageError; Replaced: the shard has another length than its index says.
        """
        known = self._indexes.get(shard)
        while known is None:
            with contextlib.suppress(_Evicted), self._opened(shard) as files:
                known = files.index, files.about
        return known[0]

    def sample(self, shard: str, number: int) -> bytes:
        """The bytes of a sample, headers included, from the cache or fetched. Missing, StorageError."""
        known = self._kept_open(shard)
        found = known.files.read(number, number + 1) if known else None
        if found is None:
            found = self.load(shard, number, number + 1, wanted=True)
            if not known:
                self._keep_open(shard)
        return found

    def has(self, shard: str, first: int, end: int) -> bool:
        """Whether samples `first` to `end` are in the cache, as far as that is known without opening the shard."""
        known = self._kept_open(shard)
        return known is not None and known.files.missing(first, end) is None

    def _kept_open(self, shard: str) -> "_OpenShard | None":
        """The open files of a shard that is read often; None: they are not open, or it was evicted."""
        known = self._open.get(shard)
        if known and not known.is_there():
            self._open.pop(shard, None)
            return None
        return known

    def _keep_open(self, shard: str) -> None:
        path = self.folder / f"{shard}.map"
        with contextlib.suppress(FileNotFoundError, _Damaged):
            known = _OpenShard(shard, path, self._indexes.get(shard))
            if known.files.about == self._seen.get(shard):
                self._open[shard] = known
        while len(self._open) > KEPT_OPEN:
            with contextlib.suppress(KeyError, RuntimeError):
                self._open.popitem(last=False)

    def load(self, shard: str, first: int, end: int, wanted: bool = False) -> bytes:
        """Have samples `first` to `end` of a shard in the cache; their bytes if they are `wanted`, else b"".

        Missing, StorageError.
        """
        if not wanted and end - first > 1:
            index = self.index(shard)
            cuts = [first]
            for number in range(first + 1, end):
                if index[number + 1] - index[cuts[-1]] > LARGEST_REQUEST:
                    cuts.append(number)
            if len(cuts) > 1:
                for begin, stop in zip(cuts, [*cuts[1:], end]):
                    self.load(shard, begin, stop)
                return b""
        for _ in range(100):
            with contextlib.suppress(_Evicted), self._opened(shard) as files:
                found = files.read(first, end) if wanted else b"" if files.missing(first, end) is None else None
                return found if found is not None else self._fetch(files, first, end, wanted)
        raise StorageError(
            f"{self.cache.folder} loses what is written to it: see that no other program removes files there, or set"
            " data.cache_dir."
        )

    def _fetch(self, files: "_ShardFiles", first: int, end: int, wanted: bool) -> bytes:
        _lock_range(files.map, HEADER + RECORD.itemsize * first, RECORD.itemsize * (end - first))
        try:
            span = files.missing(first, end)  # another process may have fetched them while this one waited
            if span is not None:
                begin, stop = int(files.index[span[0]]), int(files.index[span[1]])
                address = storage.join(self.address, files.shard)
                data = storage.read(address, begin, stop - begin)
                # After the bytes: they were of this version, or of one that there has been before.
                self._check_version(files, storage.info(address))
                self._store(files, span, data)
                if wanted and span == (first, end):
                    return data
            if not wanted:
                return b""
            found = files.read(first, end)
            if found is None:
                raise _Evicted
            return found
        finally:
            _lock_range(files.map, HEADER + RECORD.itemsize * first, RECORD.itemsize * (end - first), fcntl.F_UNLCK)

    def _store(self, files: "_ShardFiles", span: tuple[int, int], data: bytes) -> None:
        self._to_disk(len(data), lambda: files.write(span, data))

    def _to_disk(self, size: int, write: Callable[[], None]) -> None:
        """Write `size` bytes to the cache; where the disk is full, evict and try again. StorageError."""
        self.cache.count(size)
        for left in (0.5, 0.1, 0.0, None):
            try:
                write()
                return
            except OSError as error:
                if left is None or disk_error_behind(error) is None:
                    raise StorageError(
                        f"the cache {self.cache.folder} cannot be written ({error.strerror}): make room on its disk, or"
                        " set data.cache_dir to a folder on another one, or a smaller data.cache_size."
                    ) from None
                with locked(self.cache.folder / "evict.lock", wait=True):
                    self.cache.evict(left * self.cache.used())

    def _check_version(self, files: "_ShardFiles", now: storage.Object) -> None:
        if [now.size, now.version] != [files.size, files.version]:
            raise Replaced(
                f"{storage.shown(storage.join(self.address, files.shard))} was replaced while it is in use (it had"
                f" {files.size:,} bytes and the version {files.version}, and has {now.size:,} and {now.version}): start"
                " the run again, with an index that belongs to it."
            )

    @contextlib.contextmanager
    def _opened(self, shard: str) -> Iterator["_ShardFiles"]:
        """A shard's files, which are not evicted meanwhile. _Evicted: they are gone by now."""
        path, opened = self.folder / f"{shard}.map", []
        try:
            if not path.exists():
                self._make(shard)
            try:
                for name in (path, path.with_suffix(".data")):
                    opened.append(os.open(name, os.O_RDWR))
                fcntl.flock(opened[0], fcntl.LOCK_SH)
                files = _ShardFiles(shard, *opened, self._indexes.get(shard), path.with_suffix(".idx"))
                if os.fstat(opened[0]).st_nlink == 0:
                    raise FileNotFoundError
            except FileNotFoundError:
                raise _Evicted from None
            except _Damaged:
                _remove(path, mine=opened[0])
                raise _Evicted from None
            self._check_seen(path, files)
            self._keep(shard, files)
            os.utime(opened[0])
            yield files
        finally:
            for file in opened:
                os.close(file)

    def _check_seen(self, path: Path, files: "_ShardFiles") -> None:
        """The first time, whether what the cache has is what the storage has; later, whether it is the same still."""
        seen = self._seen.get(files.shard)
        if seen is None:
            now = storage.info(storage.join(self.address, files.shard))
            if [now.size, now.version] != [files.size, files.version]:
                if _remove(path, mine=files.map):  # of an earlier run
                    raise _Evicted
                self._check_version(files, now)
            self._seen[files.shard] = files.about
        elif seen != files.about:
            before = json.loads(seen)
            self._check_version(files, storage.Object(before["size"], before["version"]))

    def _keep(self, shard: str, files: "_ShardFiles") -> None:
        # Threads may do this at the same time: each step leaves a whole dictionary.
        self._indexes[shard] = (files.index, files.about)
        while len(self._indexes) > KEPT_INDEXES:
            with contextlib.suppress(KeyError, RuntimeError):
                self._indexes.popitem(last=False)

    def _make(self, shard: str) -> None:
        """Fetch a shard's index and begin its files, unless another process just has."""
        path = self.folder / f"{shard}.map"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "shards.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _lock_range(lock, zlib.crc32(shard.encode()), 1)
            if path.exists():
                return
            address = storage.join(self.address, shard)
            with ThreadPoolExecutor(1) as beside:
                asked = beside.submit(copy_context().run, storage.info, address)
                index = storage.read(f"{address}.idx")
                found = asked.result()
            offsets = np.frombuffer(index, "<u8") if len(index) % 8 == 0 else np.zeros(0, "<u8")
            rising = len(offsets) > 1 and offsets[0] == 0 and bool((np.diff(offsets.astype("<i8")) > 0).all())
            if not rising or offsets[-1] > found.size:
                raise Replaced(
                    f"{storage.shown(address)} has {found.size:,} bytes and does not fit its index, {shard}.idx:"
                    " prepare the source again, or upload both files again."
                )
            about = {"size": found.size, "version": found.version, "index": zlib.crc32(index)}
            line = json.dumps(about).encode() + b"\n"
            records = bytes(RECORD.itemsize * (len(offsets) - 1))

            def write():
                write_whole(path.with_suffix(".idx"), index)
                write_whole(path.with_suffix(".data"), b"", found.size)
                write_whole(path, line + bytes(HEADER - len(line)) + records)

            self._to_disk(len(index) + HEADER + len(records), write)
            self._seen[shard] = line.decode().rstrip("\n")
        finally:
            os.close(lock)


class _Damaged(Exception):
    """A file of the cache is not what was written."""


class _ShardFiles:
    """An open shard of the cache. map, data: file descriptors. _Damaged: the map or the index is not whole."""

    def __init__(self, shard: str, map: int, data: int, known: tuple[np.ndarray, str] | None, index: Path):
        self.shard, self.map, self.data = shard, map, data
        self.about = os.pread(map, HEADER, 0).partition(b"\n")[0].decode(errors="replace")
        try:
            about = json.loads(self.about)
            self.size, self.version = about["size"], about["version"]
            if known and known[1] == self.about:
                self.index = known[0]
            else:
                content = index.read_bytes()
                if zlib.crc32(content) != about["index"]:
                    raise ValueError
                self.index = np.frombuffer(content, "<u8")
            if os.fstat(map).st_size != HEADER + RECORD.itemsize * (len(self.index) - 1):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise _Damaged from error

    def records(self, first: int, end: int) -> np.ndarray:
        size = RECORD.itemsize
        return np.frombuffer(os.pread(self.map, size * (end - first), HEADER + size * first), RECORD)

    def missing(self, first: int, end: int) -> tuple[int, int] | None:
        """The samples of these that have to be fetched, from the first to the last; None: none."""
        absent = np.flatnonzero(self.records(first, end)["there"] != THERE)
        return (first + int(absent[0]), first + int(absent[-1]) + 1) if len(absent) else None

    def read(self, first: int, end: int) -> bytes | None:
        """The bytes of samples; None: not all are there as they were written."""
        records = self.records(first, end)
        if (records["there"] != THERE).any():
            return None
        begin = int(self.index[first])
        data = os.pread(self.data, int(self.index[end]) - begin, begin)
        for number, record in enumerate(records, start=first):
            part = memoryview(data)[int(self.index[number]) - begin : int(self.index[number + 1]) - begin]
            if zlib.crc32(part) != record["crc"]:
                os.pwrite(self.map, bytes(RECORD.itemsize), HEADER + RECORD.itemsize * number)
                return None
        return data

    def write(self, span: tuple[int, int], data: bytes) -> None:
        """The data first, then that they are there. OSError: the disk is full."""
        first, end = span
        begin = int(self.index[first])
        records = np.zeros(end - first, RECORD)
        records["there"] = THERE
        for number in range(first, end):
            part = memoryview(data)[int(self.index[number]) - begin : int(self.index[number + 1]) - begin]
            records["crc"][number - first] = zlib.crc32(part)
        _write_all(self.data, data, begin)
        _write_all(self.map, records.tobytes(), HEADER + RECORD.itemsize * first)


class _OpenShard:
    """A shard's files, open for reading for as long as somebody has this object; that does not keep it from eviction.

    FileNotFoundError, _Damaged: as of _ShardFiles.
    """

    def __init__(self, shard: str, path: Path, known: tuple[np.ndarray, str] | None):
        self._handles = [open(name, "r+b", buffering=0) for name in (path, path.with_suffix(".data"))]
        self.files = _ShardFiles(shard, *(one.fileno() for one in self._handles), known, path.with_suffix(".idx"))
        self._noted = time.monotonic()

    def is_there(self) -> bool:
        """Whether it is still in the cache; notes that it is used."""
        if os.fstat(self.files.map).st_nlink == 0:
            return False
        if time.monotonic() > self._noted + NOTED_FOR:
            self._noted = time.monotonic()
            os.utime(self.files.map)
        return True


def _remove(path: Path, mine: int | None = None) -> bool:
    """Remove a shard's files, unless it is in use. mine: this process' own descriptor of the map, with its lock."""
    file = mine
    try:
        if file is None:
            file = os.open(path, os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in (path, path.with_suffix(".data"), path.with_suffix(".idx")):
            name.unlink(missing_ok=True)
        return True
    except FileNotFoundError:
        return True
    except OSError:
        return False
    finally:
        if mine is None and file is not None:
            os.close(file)


def _lock_range(file: int, start: int, length: int, kind: int = fcntl.F_WRLCK) -> None:
    """Wait for the lock of a range of bytes; it belongs to the open file and goes with it (fcntl(2), F_OFD_SETLKW)."""
    fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("hhqqi0q", kind, os.SEEK_SET, start, length, 0))


def write_whole(path: Path, content: bytes, size: int | None = None) -> None:
    """Write a file of the cache that is whole or not there. size: to make it longer by a hole.

    Nothing waits for the disk: what a power failure has cut is not trusted afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            if size is not None:
                file.truncate(size)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_all(file: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
