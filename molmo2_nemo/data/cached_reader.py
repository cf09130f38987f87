"""Energon's reader of a source, sample by sample, from the node's cache or a file system, and what is fetched ahead.

Energon reads, shuffles and resumes as it does by itself: only the two places where its reader opens a file are other
ones. Each sample is read by one request, and a shard's index once. Energon itself opens an index for each slice, and
reads by Python's buffers, which are as large as the file system says: megabytes on Lustre.

What comes next is known exactly: a copy of the source's stream runs ahead of it (compat.upcoming_samples).
"""

import contextlib
import gc
import itertools
import math
import os
import queue
import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

import numpy as np
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset

from molmo2_nemo import compat
from molmo2_nemo.data.node_cache import CachedSource, Replaced
from molmo2_nemo.storage import Missing, StorageError, connect, is_remote, join, shown

# Indexes of shards on a file system that a process keeps in memory for each source, 8 bytes a sample.
KEPT_INDEXES = 16
# Requests of a loader worker at a time, and at its start, when each source is opened by three that wait for each other.
THREADS = 16
THREADS_AT_START = 128
# Samples of all sources together that are being fetched ahead, at about: a source's part is its weight.
SAMPLES_AHEAD = 256
MOST_OF_A_SOURCE = 64
# Samples that are fetched by one request at most; a slice of the training stream has as many (loader.py).
PIECE = 16


class CachedTar:
    """In the place of the path of a shard: opens it in the cache."""

    def __init__(self, source: CachedSource, shard: str, samples: int):
        self.source, self.shard, self.samples = source, shard, samples

    def index(self) -> Sequence[int]:
        """Where samples begin. Missing, StorageError; Replaced: there are not as many as .nv-meta says."""
        index = self.source.index(self.shard)
        if len(index) != self.samples + 1:
            raise Replaced(
                f"{shown(join(self.source.address, self.shard))} has {len(index) - 1:,} samples and .nv-meta says"
                f" {self.samples:,}: prepare the source again, or upload all of it again."
            )
        return index

    def open(self, mode: str = "rb") -> "SampleFile":
        return SampleFile(self.index, lambda number, index: self.source.sample(self.shard, number))


class PlainTar:
    """In the place of the path of a shard: opens it on a file system. indexes: those that are kept of the source."""

    def __init__(self, path: str, indexes: OrderedDict[str, np.ndarray]):
        self.path, self.indexes = path, indexes

    def index(self) -> np.ndarray:
        """Where samples begin, uint64 [samples + 1]. OSError."""
        if self.path not in self.indexes:
            self.indexes[self.path] = np.fromfile(f"{self.path}.idx", "<u8")
            while len(self.indexes) > KEPT_INDEXES:
                self.indexes.popitem(last=False)
        self.indexes.move_to_end(self.path)
        return self.indexes[self.path]

    def open(self, mode: str = "rb") -> "SampleFile":
        file = open(self.path, mode, buffering=0)

        def read(number: int, index: np.ndarray) -> bytes:
            begin = int(index[number])
            return os.pread(file.fileno(), int(index[number + 1]) - begin, begin)

        return SampleFile(self.index, read, file)


class SampleFile:
    """A file open for reading, with what tarfile asks of one. It holds one sample in memory.

    index: returns where samples begin; sample: the bytes of one, by its number and that index. file: to be closed.
    """

    def __init__(self, index: Callable, sample: Callable, file: BinaryIO | None = None):
        self.index, self.sample, self.file = index, sample, file
        self.position, self.begin, self.held = 0, 0, b""

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> int:
        self.position = position
        return position

    def read(self, size: int) -> bytes:
        """At most to the end of the sample at this place. Missing, StorageError, OSError."""
        if not self.begin <= self.position < self.begin + len(self.held):
            index = self.index()
            number = bisect_right(index, self.position) - 1
            if number + 1 >= len(index):
                return b""
            self.begin, self.held = int(index[number]), self.sample(number, index)
        begin = self.position - self.begin
        found = self.held[begin : begin + size]
        self.position += len(found)
        return found

    def close(self) -> None:
        self.held = b""
        if self.file:
            self.file.close()


class Offsets:
    """In the place of Energon's reader of index files. tars: by their shards' paths. indexes: what PlainTar keeps."""

    def __init__(self, tars: dict[str, CachedTar | PlainTar], indexes: OrderedDict[str, np.ndarray]):
        self.tars, self.indexes = tars, indexes

    def get_itar_byte_offset(self, path, sample_offset: int = 0) -> tuple[int, int]:
        """(first byte, bytes) of a sample of the shard with this path."""
        index = self.tars[str(path)].index()
        return int(index[sample_offset]), int(index[sample_offset + 1] - index[sample_offset])

    def forget(self) -> None:
        """Read from now on what is on the disk by then."""
        self.indexes.clear()


def read_samples_whole(reader: ShardInfosITarReader, shards: str, cached: CachedSource | None) -> None:
    """Have Energon's reader of a source read shards below `shards` sample by sample; cached: through the cache."""
    tars, indexes = {}, OrderedDict()
    for shard in reader.shard_infos:
        if cached:
            tars[str(shard.path)] = CachedTar(cached, shard.name, shard.count)
        else:
            tars[str(shard.path)] = PlainTar(join(shards, shard.name), indexes)
    reader.tar_filepaths = [tars[str(path)] for path in reader.tar_filepaths]
    reader.cached_offset_reader = Offsets(tars, indexes)


def fetch_samples(reader: ShardInfosITarReader, source: CachedSource, indices: list[int]) -> None:
    """Bring samples into the cache, side by side. Those of a shard that is not there are left out. StorageError."""

    def fetch(index: int) -> None:
        number = bisect_right(reader.shard_count_cumsum, index) - 1
        sample = index - reader.shard_count_cumsum[number]
        with contextlib.suppress(Missing):
            source.load(reader.shard_infos[number].name, sample, sample + 1)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(fetch, indices))


@dataclass(eq=False)
class Job:
    """Samples of a shard to be fetched. error: why they could not be."""

    source: CachedSource
    shard: str
    first: int
    end: int
    started: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    error: StorageError | None = None

    def run(self) -> None:
        self.started = True
        try:
            self.source.load(self.shard, self.first, self.end)
        except Missing:
            pass  # whoever reads the sample counts it
        except StorageError as error:
            self.error = error
        finally:
            self.done.set()


class Stream:
    """A source as one worker reads it, and what it will read next."""

    def __init__(self, stream: WebdatasetSampleLoaderDataset, reader: ShardInfosITarReader, source, weight: float):
        self.stream, self.reader, self.source, self.weight = stream, reader, source, weight
        self.coming: deque[int] = deque()  # indices
        self.upcoming = None
        self.asked: set[int] = set()  # slices of which a job was made
        self.jobs: dict[tuple[str, int], Job] = {}  # by shard and number of a sample

    def look(self, now: int | None, wanted: int) -> list[int]:
        """Know the next `wanted` indices, while `now` is read (None: before the first); those that are new.

        None are, if `now` is no index that the stream may read.
        """
        new = []
        if now is not None and self.coming and self.coming[0] == now:
            self.coming.popleft()
        elif now is not None or self.upcoming is None:
            self.stream.ensure_slice_offsets()
            self.coming.clear()
            self.asked.clear()
            self.upcoming = compat.upcoming_samples(self.stream, now)
            if self.upcoming is None:
                return []
            if now is not None:
                new.append(next(self.upcoming))  # now itself
        ahead = list(itertools.islice(self.upcoming, max(0, wanted - len(self.coming))))
        self.coming.extend(ahead)
        return new + ahead

    def place(self, index: int) -> tuple[str, int]:
        """The shard that has the sample, and its number there."""
        number = bisect_right(self.reader.shard_count_cumsum, index) - 1
        return self.reader.shard_infos[number].name, index - self.reader.shard_count_cumsum[number]

    def piece(self, index: int) -> tuple[int, int]:
        """The samples that are fetched together with this one (first index, end): a slice, or part of a long one."""
        slices = self.stream.slice_offsets
        number = bisect_right(slices, index) - 1
        first = slices[number] + (index - slices[number]) // PIECE * PIECE
        return first, min(first + PIECE, slices[number + 1])

    def job(self, index: int, whole: bool) -> Job | None:
        """What is to be done to have the sample, and the rest of its piece; None: it was asked for already."""
        (first, end), (shard, number) = self.piece(index), self.place(index)
        if first in self.asked or (not whole and (shard, number) in self.jobs):
            return None
        if whole:
            self.asked.add(first)
            if self.source.has(shard, number, number + end - index):
                return None
        job = Job(self.source, shard, number, number + (end - index if whole else 1))
        for sample in range(job.first, job.end):
            self.jobs.setdefault((shard, sample), job)
        return job

    def forget(self, index: int) -> Job | None:
        """The job of a sample that is read now, if there was one."""
        if self.stream.slice_offsets is not None:
            first, end = self.piece(index)
            if index + 1 == end:
                self.asked.discard(first)
        return self.jobs.pop(self.place(index), None)


class Ahead:
    """Fetches into the cache what the sources of a loader worker are asked for next. soon: samples of a first batch."""

    def __init__(self, soon: int):
        self.soon, self.streams, self.process = soon, [], None
        self.jobs, self.read = None, 0

    def add(self, stream: Stream) -> Callable[[int], None]:
        """What has to be called with the index of every sample of this source before it is read."""
        self.streams.append(stream)
        return partial(self.before, stream)

    def before(self, stream: Stream, index: int) -> None:
        """Call it before a sample is read. StorageError: it was fetched ahead, and that went wrong for good."""
        if self.process != os.getpid():  # the first sample of a worker
            self._start()
            self._prime(stream)
        self.read += 1
        if self.read == 2 * self.soon:
            for _ in range(THREADS_AT_START - THREADS):
                self.jobs.put(None)
        for coming in stream.look(index, min(MOST_OF_A_SOURCE, math.ceil(SAMPLES_AHEAD * stream.weight) + 1)):
            if wanted := stream.job(coming, whole=True):
                self.jobs.put(wanted)
        job = stream.forget(index)
        if job is not None and job.started:
            job.done.wait()
            if job.error is not None:
                raise job.error

    def _prime(self, first: Stream) -> None:
        """Open all sources at the same time: the samples of a first batch, before any whole slice."""
        wanted = {stream: math.ceil(self.soon * stream.weight) for stream in self.streams if stream is not first}
        for stream, number in wanted.items():
            stream.look(None, number)
        for turn in range(max(wanted.values(), default=0)):
            for stream, number in wanted.items():
                if turn < min(number, len(stream.coming)) and (job := stream.job(stream.coming[turn], whole=False)):
                    self.jobs.put(job)

    def _start(self) -> None:
        self.process, self.jobs, self.read = os.getpid(), queue.SimpleQueue(), 0
        for stream in self.streams:
            if is_remote(stream.source.address):
                connect(stream.source.address)
        # Energon has Python collect garbage every ten batches, of what was made since its workers began. Clients are
        # 40,000 objects, which would cost 20 ms each time.
        gc.collect()
        gc.freeze()
        for _ in range(THREADS_AT_START):
            threading.Thread(target=self._work, args=(self.jobs,), daemon=True).start()

    @staticmethod
    def _work(jobs: queue.SimpleQueue) -> None:
        while job := jobs.get():  # None: there are threads enough without this one
            job.run()
