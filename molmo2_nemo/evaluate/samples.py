"""The samples of a folder of shards, by their index, and which data they are."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from molmo2_nemo import storage
from molmo2_nemo.ask.model import Asker, Seen
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.data.frames import Shown, subtitle_text
from molmo2_nemo.data.node_cache import CachedSource
from molmo2_nemo.data.node_metadata import cached_sources
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.data.schema import Example, read_example
from molmo2_nemo.data.shard_index import read_index
from molmo2_nemo.data.stored import shard_reader
from molmo2_nemo.data.video import annotation_times, frame_times, pick_frames
from molmo2_nemo.evaluate.records import sampled_hash

SPLITS = ("test", "val", "train")  # the first that there is, unless one is named


@dataclass
class Read:
    """A sample as it is stored. example: None if it cannot be read; `error` says why."""

    name: str  # SOURCE/KEY
    parts: dict[str, bytes] = field(default_factory=dict)
    example: Example | None = None
    error: str = ""


@dataclass(frozen=True)
class Source:
    """A split of a folder. path: as it was given, or an address; folder: where its .nv-meta is; count: samples."""

    name: str
    path: str
    folder: Path
    split: str
    count: int
    cached: CachedSource | None


class Samples:
    """The samples of one split of some folders, counted through. ConfigError, one sentence: there are none."""

    def __init__(self, folders: Sequence[Path | str], split: str | None = None, cache_dir: str | None = None):
        """folders: local ones, or addresses. cache_dir: data.cache_dir, for addresses.

        split: train, val or test; None: the first of SPLITS that has samples, of each folder.
        """
        self.sources: list[Source] = []
        paths = [str(folder) for folder in folders]
        all_cached = cached_sources(paths, cache_dir)
        names = [storage.name(p) if storage.is_remote(p) else Path(p).resolve().name for p in paths]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"--data names two folders called {twice}: rename one, since predictions go by the name")
        for name, path in zip(names, paths):
            cached = all_cached.get(path)
            folder = cached.folder if cached else Path(path)
            if not cached and not folder.is_dir():
                raise ConfigError(f"--data {folder} is no folder: name one that tools/prepare.py has written")
            if not cached and not (folder / ".nv-meta").is_dir() and not any(folder.glob("*.tar")):
                raise ConfigError(
                    f"--data {folder} holds neither .tar files nor .nv-meta: name the folder that python"
                    " tools/prepare.py LABELS --out SHARDS --split 90/5/5 makes"
                )
            index = read_index(name, folder, cached and cached.address)
            counts = {part: sum(shards.values()) for part, shards in index.items()}
            there = [part for part in SPLITS if counts.get(part)]
            part = split or next(iter(there), "test")
            if part not in there:
                known = ", ".join(there) or "none"
                raise ConfigError(
                    f"--split {part}: {path} has no samples of it (there are {known}); prepare it with a split, or "
                    "name another"
                )
            self.sources.append(Source(name, path, folder, part, counts[part], cached))
        self._readers = {}

    def __len__(self) -> int:
        return sum(source.count for source in self.sources)

    @property
    def identity(self) -> str:
        """A hash of the shards: of a folder as `records.sampled_hash` looks at them, of an address by their versions.

        StorageError, OSError: they cannot be looked at.
        """
        digest = hashlib.sha256()
        for source in self.sources:
            shards = read_index(source.name, source.folder)[source.split]
            digest.update(json.dumps([source.name, source.split, shards]).encode())
            listed = storage.list_files(source.path) if storage.is_remote(source.path) else None
            for shard in shards:
                if listed is None:
                    digest.update(sampled_hash(Path(source.path) / shard))
                elif shard in listed:
                    digest.update(f"{shard} {listed[shard].size} {listed[shard].version}".encode())
                else:
                    raise storage.Missing(f"{storage.shown(storage.join(source.path, shard))} is not there: upload it.")
        return digest.hexdigest()

    def read(self, index: int) -> Read:
        """Never raises for what is wrong with a sample. StorageError: the storage cannot be used."""
        for source in self.sources:
            if index < source.count:
                break
            index -= source.count
        name = source.name
        if name not in self._readers:
            self._readers[name] = shard_reader(name, source.folder, source.split, source.path, source.cached)
        try:
            stored = self._readers[name][index]
        except MemoryError:
            raise
        except Exception as error:  # tarfile raises errors of many types
            if storage.is_for_all(error):
                raise
            self._readers.pop(name).close()
            return Read(f"{name}/number{index}", error=f"it cannot be read ({_reason(error)})")
        read = Read(f"{name}/{stored['__key__']}")
        read.parts = {part: data for part, data in stored.items() if not part.startswith("__")}
        try:
            read.example = read_example(read.parts["json"])
        except KeyError:
            read.error = "it has no part json"
        except ValueError as error:
            read.error = _reason(error)
        return read


def see(read: Read, asker: Asker) -> Seen:
    """Its pictures, or the frames of its video, within the limits of the model's export.

    ValueError, one sentence: a part is missing or cannot be decoded.
    """
    example = read.example
    if missing := [v.part for v in [*example.images, example.video] if v and v.part not in read.parts]:
        raise ValueError(f"the part {missing[0]} is missing")
    video = example.video
    if video is None:
        return Seen([read_image(read.parts[image.part]) for image in example.images])
    if video.annotation_fps is None:
        times = frame_times(video.seconds, asker.max_frames, asker.max_fps)
    else:
        times = annotation_times(video.seconds, asker.max_frames, video.annotation_fps, video.fps)
    frames = pick_frames(read.parts[video.part], times, video.num_frames, start=video.start)
    subtitles = subtitle_text(video, Shown(times, 0.0, video.seconds))
    return Seen([], asker.resized(frames, len(times)), times, video.seconds, subtitles)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
