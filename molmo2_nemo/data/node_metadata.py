"""Where the sources of a blend are, and their metadata (.nv-meta), which one rank of a node reads for all of its ranks.

A source is in one of three places:

    object storage, or anywhere with data.cache_dir    the shards are read through the node's cache (node_cache.py)
    a file system, and a launcher has started several  the shards are read where they are; one rank copies .nv-meta and
    ranks                                              the list of files to the node's disk, for the other ranks, too
    a file system, and this process is alone           everything is read where it is

On a parallel file system it is the number of opened and looked at files that is dear, and each rank would ask for the
same ones: 16 opened and 61 looked at for each source (tools/bench/start_reads.py).
"""

import contextlib
import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path

from molmo2_nemo import storage
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import DataConfig
from molmo2_nemo.data.node_cache import CachedSource, NodeCache, open_cache, write_whole
from molmo2_nemo.data.shard_index import MAX_BYTES
from molmo2_nemo.environment import world_size_from_environment
from molmo2_nemo.files import disk_errors_told, locked
from molmo2_nemo.storage import Missing, StorageError

# Files of .nv-meta that training reads.
META = (".info.json", "split.yaml", "dataset.yaml")
LISTING = "listing.json"  # names of a source's files
HANDED_ON = "handed_on"  # what has been found, for the other ranks
# Seconds for which what a rank has read of a source's metadata holds for it and for all that its launcher has started.
HOLDS_FOR = 120
# Requests of one process at a time: each waits for a round trip, and costs next to nothing on this side.
REQUESTS = 128


@dataclass(frozen=True)
class Place:
    """A source as this process reads it.

    folder: has .nv-meta: the source's own one, or a copy on this node. real: the source's path with symbolic links
    followed, or its address. cached: its shards, if they are read through the node's cache.
    """

    there: bool
    folder: Path
    real: str
    cached: CachedSource | None = None


def is_cached(path: str, cache_dir: str | None) -> bool:
    """Whether a source, at a local path or an address, is read through the cache."""
    return storage.is_remote(path) or bool(cache_dir)


def located(data: DataConfig, paths: list[str]) -> list[Place]:
    """Where the sources at these paths and addresses are; all of them are asked at the same time.

    ConfigError: an address cannot be one, or the cache cannot be used. StorageError: the storage does not answer.
    """
    cached = [path for path in dict.fromkeys(paths) if is_cached(path, data.cache_dir)]
    for path in filter(storage.is_remote, cached):
        storage.check(path, "data.root" if path.startswith(str(data.root)) else "a source's address")
    found = {}
    if cached:
        cache = open_cache(data.cache_dir, data.cache_size)
        with disk_errors_told(cache.folder, 0, "the cache of shards"):
            told = bring(cache, cached)
        for path in cached:
            source = cache.source(path)
            found[path] = Place(told[path]["there"], source.folder, told[path]["real"], source)
    rest, parents = [path for path in paths if path not in found], {}
    if rest and world_size_from_environment() > 1:
        found |= _handed_on(rest)
    for path in rest:
        if path not in found:
            found[path] = Place(os.path.isdir(path), Path(path), _real(path, parents))
    return [found[path] for path in paths]


def are_there(data: DataConfig, paths: list[str]) -> list[bool]:
    """Whether there is a source at each of these paths and addresses. Raises as `located`."""
    return [place.there for place in located(data, paths)]


def cached_sources(paths: list[str], cache_dir: str | None) -> dict[str, CachedSource]:
    """Those of these paths and addresses that are read through the cache, with their .nv-meta brought here.

    ConfigError, StorageError: an address cannot be used, or there is no source.
    """
    cached = [path for path in paths if is_cached(path, cache_dir)]
    if not cached:
        return {}
    cache = open_cache(cache_dir, None)
    for path, told in bring(cache, cached).items():
        if not told["there"]:
            raise ConfigError(f"{storage.shown(path)} has no .nv-meta/{META[0]}: correct the address, or upload it.")
    return {path: cache.source(path) for path in cached}


def files_of(folder: Path, shards: str | Path, names: dict[str, int]) -> set[str]:
    """The files of a source with these shards, relative to it.

    folder: as of its Place, which has a list of them if it is a copy; shards: where they are.
    """
    if Path(folder) != Path(shards):
        return set(json.loads((folder / LISTING).read_text()))
    return set(_listed(Path(shards), names))


def bring(cache: NodeCache, addresses: list[str]) -> dict[str, dict]:
    """Bring .nv-meta and the list of files of each source here, all of them side by side.

    One process of a node does it for all that the same launcher has started. Address -> there: whether there is a
    source; real: as of a Place. StorageError, OSError: of the cache's disk.
    """
    launch, parents = _launch(), {}
    folders = {address: cache.source(address).folder for address in addresses}
    with locked(cache.folder / "meta.lock", wait=True), ThreadPoolExecutor(REQUESTS) as threads:
        found = {address: _told(folder, launch) for address, folder in folders.items()}
        asked = {}
        for address in [address for address, told in found.items() if told is None]:
            jobs = [(_fetch, file) for file in (*META, LISTING)] if storage.is_remote(address) else [(_copy, parents)]
            asked[address] = [
                threads.submit(copy_context().run, job, address, folders[address], *of) for job, *of in jobs
            ]
        try:
            for address, answers in asked.items():
                results = [answer.result() for answer in answers]
                real = address if storage.is_remote(address) else results[0]
                found[address] = {"launch": launch, "there": all(results), "real": real}
                write_whole(folders[address] / HANDED_ON, json.dumps(found[address]).encode())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _handed_on(paths: list[str]) -> dict[str, Place]:
    """Sources on a file system, by copies of their metadata that one rank of the node makes.

    None, if the node has no folder for them: then each rank reads for itself.
    """
    try:
        cache = open_cache(None, None)
        told = bring(cache, list(dict.fromkeys(paths)))
    except StorageError:
        raise
    except (ConfigError, OSError):
        return {}
    return {path: Place(of["there"], cache.source(path).folder, of["real"]) for path, of in told.items()}


def _told(folder: Path, launch: str) -> dict | None:
    """What another rank of this launch has just found; None: none has looked."""
    told = folder / HANDED_ON
    if told.exists() and time.time() - told.stat().st_mtime < HOLDS_FOR:
        found = json.loads(told.read_text())
        return found if found["launch"] == launch else None
    return None


def _fetch(address: str, folder: Path, file: str) -> bool:
    """Bring a file of .nv-meta, or the list of files, from a storage; whether the source has it."""
    if file == LISTING:
        write_whole(folder / LISTING, json.dumps(sorted(storage.list_files(address))).encode())
        return True
    path = folder / ".nv-meta" / file
    try:
        write_whole(path, storage.read(storage.join(address, ".nv-meta", file)))
    except Missing:
        path.unlink(missing_ok=True)
        return file != META[0]
    return True


def _copy(address: str, folder: Path, parents: dict[str, str]) -> str | None:
    """Copy .nv-meta of a source on a file system, and the list of its files; `_real`, or None if there is no folder."""
    content = {}
    try:
        for file in META:
            content[file] = _read(os.path.join(address, ".nv-meta", file), MAX_BYTES[file] + 1)
        try:
            shards = json.loads(content[META[0]] or "{}")["shard_counts"]
            files = _listed(Path(address), shards)
        except (ValueError, KeyError, TypeError, RecursionError):  # read_index will say what is wrong with it
            files = []
        there = content[META[0]] is not None or os.path.isdir(address)
        real = _real(address, parents) if there else None
    except OSError as error:
        raise StorageError(f"cannot read {address}: {error.strerror}: correct the path or its rights.") from None
    for file, data in content.items():
        if data is None:
            (folder / ".nv-meta" / file).unlink(missing_ok=True)
        else:
            write_whole(folder / ".nv-meta" / file, data)
    write_whole(folder / LISTING, json.dumps(sorted(files)).encode())
    return real


def _real(path: str, parents: dict[str, str]) -> str:
    """The path with symbolic links followed. parents: those of the folders that sources are in, found once."""
    above, name = os.path.split(path)
    if above not in parents:
        parents[above] = os.path.realpath(above)
    real = os.path.join(parents[above], name)
    return os.path.realpath(real) if os.path.islink(real) else real


def _read(path: str, most: int) -> bytes | None:
    """A file's first bytes, by one request; None if there is no such file, or it is a pipe or a device."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = os.fstat(file)
        return os.read(file, min(found.st_size, most)) if stat.S_ISREG(found.st_mode) else None
    finally:
        os.close(file)


def _listed(root: Path, shards: dict) -> list[str]:
    """The files in the folders of these shards, relative to root: one listing is cheaper than asking for every file.

    Pipes and devices are none: reading them would never end.
    """
    found = []
    for folder in {os.path.dirname(shard) for shard in shards}:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found += [os.path.join(folder, entry.name) for entry in os.scandir(root / folder) if entry.is_file()]
    return found


def _launch() -> str:
    """What the ranks that one launcher has started on this node have in common; alone, what tells a process apart."""
    process = os.getpid() if world_size_from_environment() == 1 else os.getppid() or os.getpid()
    started = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): starttime
    return f"{process} {started} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
