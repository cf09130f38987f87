"""Loaders of packed micro-batches: Energon reads, blends and shuffles shards, `Encoder` and `PackedRows` do the rest.

Samples stay raw bytes until their row is chosen. Every random choice about a sample comes from a hash of the seed and
the sample's place in the stream, never from a global generator, so that a restored stream continues exactly.
"""

import atexit
import contextlib
import ctypes
import hashlib
import os
import queue
import re
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from megatron.energon import (
    Cooker,
    Sample,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from megatron.energon.errors import reraise_exception
from megatron.energon.flavors.base_dataset import add_sample_restore_key
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from megatron.energon.savable_loader import SavableDataLoader, SavableDataLoaderState
from megatron.energon.wrappers.base import BaseWrapperDataset

from molmo2_nemo import compat
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import DataConfig, VisionConfig
from molmo2_nemo.data import progress, vocabulary
from molmo2_nemo.data.blend import Source, metadataset
from molmo2_nemo.data.cached_reader import Ahead, Stream, read_samples_whole
from molmo2_nemo.data.encode import Encoder, dropped
from molmo2_nemo.data.packing import Batch, PackedRows, Row, WaitingSample, collate, make_row
from molmo2_nemo.data.progress import StreamPosition
from molmo2_nemo.data.resources import allow_open_files, batches_per_worker
from molmo2_nemo.data.schema import Example, read_example
from molmo2_nemo.data.shard_reader import ShardReader
from molmo2_nemo.storage import StorageError, Unreachable

# Shards of one source that a worker reads at a time. Each takes two open files, and a blend has a hundred sources.
PARALLEL_SHARDS = 4
# A source with fewer samples for each worker of all ranks is not dealt out to them, but read by each as a whole:
# a worker without a sample of its own would never draw from it, and the source would miss its share.
SAMPLES_PER_WORKER = 2
# Consecutive samples of a shard that are read at once. Fewer mix the samples better, more keep the saved state small.
SAMPLES_PER_SLICE = 16
# A worker's saved state is a snapshot that is at most this old, and the batches to replay since then.
SNAPSHOT_SECONDS = 15
# Bytes of a sample's JSON at most: parsing it takes 35 times as much memory.
MAX_JSON = 2**24
# Characters of the report on a broken sample at most, since it may quote the sample.
MAX_REPORT = 300
# Interval at which the worker processes are checked for life while their states are collected.
SECONDS_BETWEEN_LOOKS = 0.01
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@edataclass
class RawSample(Sample):
    """A sample as it is stored in the shard: its parts by name, undecoded. error: why it could not be read, else ""."""

    parts: dict[str, bytes]
    error: str


@stateless
def cook(sample: dict) -> RawSample:
    """Energon's crude sample -> RawSample. Parts are the keys without Energon's own."""
    parts = {name: data for name, data in sample.items() if not name.startswith("__")}
    return RawSample(**basic_sample_keys(sample), parts=parts, error=sample.get(ShardReader.ERROR, ""))


class RoundRobin(BaseWrapperDataset):
    """One sample of each finite dataset in turn until all are exhausted."""

    def reset_state_own(self) -> None:
        pass

    def len_worker(self, worker_idx: int | None = None) -> int:
        return sum(dataset.len_worker(worker_idx) for dataset in self.datasets)

    def __iter__(self) -> Iterator:
        iterators = dict(enumerate(map(iter, self.datasets)))
        while iterators:
            for index, iterator in list(iterators.items()):
                sample = next(iterator, None)
                if sample is None:
                    del iterators[index]
                else:
                    yield add_sample_restore_key(sample, index, src=self)

    def config(self) -> dict:
        return {"type": type(self).__qualname__, "datasets": [dataset.config() for dataset in self.datasets]}


class Molmo2TaskEncoder(TaskEncoder):
    """The steps of Energon's pipeline: cook, plan (before the pool), pack, batch.

    position: of a training stream. Without it the data are held out: plans depend on the sample alone, not on its place
    in the stream, and iterations are finite; `shard` and `micro_batch_size` are then those of PackedRows.
    """

    decoder = None  # Energon would decode every part on reading
    cookers = [Cooker(cook)]

    def __init__(
        self,
        data: DataConfig,
        encoder: Encoder,
        sources: list[Source],
        position: StreamPosition | None = None,
        *,
        shard: tuple[int, int] = (0, 1),
        micro_batch_size: int = 1,
    ):
        self.data, self.encoder, self.sources, self.position = data, encoder, sources, position
        self.source_index = {source.name: index for index, source in enumerate(sources)}
        self.shard, self.micro_batch_size = shard, micro_batch_size
        self.ahead = Ahead(data.packing_buffer_size + (data.shuffle_buffer_size if position else 0))

    def _load_dataset(self, dataset, worker_rotation_offset, worker_config):
        """One source, read through a ShardReader."""
        samples = super()._load_dataset(dataset, worker_rotation_offset, worker_config)
        stream = compat.wrapped_dataset(samples, WebdatasetSampleLoaderDataset)
        number, on_rank, together = len(dataset.dataset), max(1, worker_config.num_workers), 1
        if self.position:
            ahead = self.position.ahead_in(self.source_index[dataset.dataset.subflavors["source"]])
            if number < SAMPLES_PER_WORKER * worker_config.world_size * on_rank:
                # Each reads all samples, one by one in an order of its own, as often as the source's weight says.
                together = worker_config.world_size * on_rank
                stream.workers_slice_offsets = [range(number + 1)] * on_rank
        else:
            ahead = np.zeros(number, dtype=np.uint16)
        (reader,), before = stream.join_readers, None
        source = self.sources[self.source_index[dataset.dataset.subflavors["source"]]]
        read_samples_whole(reader, source.shards or source.path, source.cached)
        if source.cached:
            weight = source.weight if self.position else 1 / len(self.sources)
            before = self.ahead.add(Stream(stream, reader, source.cached, weight))
        stream.join_readers = [ShardReader(reader, stream, ahead, together, before)]
        return samples

    @stateless
    def preencode_sample(self, sample: RawSample) -> WaitingSample:
        """Plan a sample; one that cannot be used becomes a plan without tokens, to be counted."""
        source = self.source_index[sample.__subflavors__["source"]]
        name = self.sources[source].name
        place = (self.position.times_dealt, sample.__restore_key__) if self.position else ()
        rng = np.random.default_rng(list(_digest(self.data.seed, name, sample.__key__, place)))
        options = self.sources[source].options
        if not self.position:  # higher resolution is for training (molmo2: only there)
            options = replace(options, high_res_probability=0.0)
        try:
            if sample.error:
                plan, error = dropped("unreadable"), sample.error
            else:
                plan, error = self.encoder.plan(_example(sample.parts), rng, options), ""
        except MemoryError:
            raise
        except Exception as problem:  # parsers of damaged data raise more than ValueError
            plan, error = dropped("malformed"), _reason(problem)
        wanted = [entry.part for entry in [*plan.images, plan.video] if entry]
        media = {part: sample.parts[part] for part in wanted if part in sample.parts}
        return WaitingSample.derive_from(
            sample,
            plan=plan,
            media=media,
            source=source,
            index=sample.__restore_key__[-1],
            error=error and _report(name, sample.__key__, error),
        )

    def make_row(self, samples: list[WaitingSample]) -> Row:
        """Decode the pixels of the chosen samples and concatenate; samples that cannot be decoded are counted."""
        counters, errors, decoded, outcomes = defaultdict(Counter), [], [], []
        for sample in samples:
            name, counts, error = self.sources[sample.source].name, sample.plan.counters, sample.error
            if sample.plan.num_tokens:
                try:
                    decoded.append((sample.plan, sample.source, self.encoder.pixels(sample.plan, sample.media)))
                except MemoryError:
                    raise
                except Exception as problem:
                    counts = dropped("undecodable").counters
                    error = _report(name, sample.__key__, _reason(problem))
            counters[name] += counts
            outcomes.append((dict(counts), sample.plan.video.start if sample.plan.video else 0.0))
            errors += [error] if error else []
        plans, sources, pixels = zip(*decoded) if decoded else ((), (), ())
        visual = self.encoder.visual
        nothing = (
            np.zeros((0, visual.patches_per_crop, visual.patch_dim), dtype=np.uint8),
            np.zeros((0, visual.window), dtype=np.int64),
        )
        examples = np.array([(sample.source, sample.index) for sample in samples], dtype=np.int64).reshape(-1, 2)
        return Row(
            __key__=",".join(sample.__key__ for sample in samples),
            __restore_key__=(),
            **make_row(plans, sources, pixels, self.data.seq_length, self.encoder.pad_id, nothing),
            examples=examples,
            counters=dict(counters),
            errors=errors,
            outcomes=outcomes,
        )

    @stateless
    def batch(self, samples: list[Row]) -> Batch:
        return collate(samples, self.encoder.visual.token_ids)

    def build_batch(self, dataset, *, batch_size, worker_config, batch_drop_last=False, packing_buffer_size=None):
        """PackedRows instead of Energon's packing, then Energon's batching."""
        rows = PackedRows(
            dataset,
            packing_buffer_size,
            self.data.seq_length,
            self.data.max_crops,
            self.make_row,
            worker_config=worker_config,
            finite=self.position is None,
            shard=self.shard,
            multiple=self.micro_batch_size,
        )
        return super().build_batch(
            rows, batch_size=batch_size, batch_drop_last=batch_drop_last, worker_config=worker_config
        )

    def build_val_datasets(self, *, datasets, worker_config, batch_size, packing_buffer_size, **_):
        """All sources in turn, so that the first rows hold samples of each."""
        sources = RoundRobin([self._load_dataset(d, 0, worker_config) for d in datasets], worker_config=worker_config)
        planned = self.build_encode_sample(sources, worker_config=worker_config)
        return self.build_batch(
            planned, batch_size=batch_size, packing_buffer_size=packing_buffer_size, worker_config=worker_config
        )


class StoredAsTheyAre(Molmo2TaskEncoder):
    """Stops after the first step: samples of all sources in turn, as they are stored in the shards."""

    def build_val_datasets(self, *, datasets, worker_config, **_):
        return RoundRobin([self._load_dataset(d, 0, worker_config) for d in datasets], worker_config=worker_config)


class WorkerDied(RuntimeError):
    """A worker process of a loader has ended, most likely killed by the system for lack of memory."""

    def __init__(self, pid: int):
        super().__init__(f"process {pid}")


class DataLost(RuntimeError):
    """A sample cannot be read, and none takes its place; may_return: whether another start may read it.

    error: what the storage has told.
    """

    def __init__(self, error: StorageError):
        super().__init__(str(error))
        self.may_return = isinstance(error, Unreachable)


@contextlib.contextmanager
def _without_traceback() -> Iterator[None]:
    """Errors of the storage leave this as the one sentence that they were in a worker process."""
    try:
        yield
    except StorageError as error:
        lines = str(error).strip().splitlines()
        # torch has put the worker's traceback before the sentence, whose line begins with the error's class.
        raise type(error)(lines[-1].partition(": ")[2] if len(lines) > 1 else lines[0]) from None


class Loader:
    """Iterates an Energon loader; `close()` stops its workers, and so does the end of the process."""

    def __init__(self, loader):
        # Pinning is for a device; torch warns where there is none.
        loader.pin_memory = torch.cuda.is_available()
        loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn, os.getpid())
        self._loader = loader

    def close(self) -> None:
        """Stop the worker processes. Safe to call again."""
        atexit.unregister(self.close)
        compat.stop_loader_processes(self._loader)

    @property
    def workers(self) -> list:
        """The worker processes; none before the first batch or with data.num_workers=0."""
        return compat.loader_processes(self._loader)

    def dead_worker(self) -> int | None:
        """The process id of a worker that has ended, None if there is none."""
        return next((worker.pid for worker in self.workers if not worker.is_alive()), None)


class TrainLoader(Loader):
    """An endless iterator of Batch whose state can be saved at any time."""

    def __init__(self, loader, manifest: dict, position: StreamPosition, note: str | None = None):
        super().__init__(loader)
        self.manifest, self.position = manifest, position
        self.note = note  # a sentence about the configuration for the user, to be logged once
        self._batches = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            # Not before the first batch is asked for: Energon's save_state_rank would hang between iter() and next().
            self._batches = iter(self._loader)
            batch = self._next()
            # What is registered last is called first: before torch and multiprocessing wait for the workers.
            atexit.register(self.close)
        else:
            batch = self._next()
        self.position.add(batch.examples)
        return batch

    def _next(self) -> Batch:
        with _without_traceback():
            return next(self._batches)

    def can_restore_sample(self) -> bool:
        """Whether the state can be restored: every step between shard and pool is repeatable."""
        return self._loader.can_restore_sample()


class ValidationLoader(Loader):
    """Iterable over the held-out micro-batches; every iteration gives the same ones."""

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        atexit.unregister(self.close)
        atexit.register(self.close)
        with _without_traceback():
            yield from batches


def train_loader(
    data: DataConfig,
    vision: VisionConfig,
    sources: list[Source],
    rank: int,
    world_size: int,
    data_parallel_group: torch.distributed.ProcessGroup | None,
    micro_batch_size: int,
    saved: Sequence[Path] = (),
    restart: bool = False,
    micro_batches: int = 1,
) -> TrainLoader:
    """The training stream of data-parallel rank `rank` of `world_size`; endless, each rank reads its own samples.

    saved: files with what `save_state` gave on each data-parallel rank of the run to continue, in order. If all that
    decides the stream is as it was then, it continues exactly after the last batch handed out; else in another order,
    with what had not been handed out first (progress.py), and the loader's position.note says so. restart: begin again,
    unless the run to continue was told so already. micro_batches: of a step; workers make so many ahead, if their
    pixels fit into resources.BYTES_AHEAD. It changes nothing of the stream or of its state.

    Workers are forked at the first batch: ask for one before large allocations. With
    data.num_workers=0 all is done in this process, for debugging. ConfigError: there is no usable tokenizer, a process
    may not open enough files, or `saved` is damaged or of another tokenizer. Broken samples raise nothing: they are in
    the batches' counters and errors.
    """
    allow_open_files(2 * PARALLEL_SHARDS * len(sources) + 256)
    encoder = Encoder(data, vision)
    manifest = _manifest(data, vision, sources, rank, world_size, micro_batch_size, encoder)
    manifest[progress.RESTART] = restart
    position = progress.read(saved, manifest, sources) if saved else progress.beginning(sources)
    seed = data.seed
    if position.times_dealt:
        seed = int.from_bytes(_digest(data.seed, position.times_dealt)[:4])
    with _quiet():
        dataset = get_train_dataset(
            metadataset(sources),
            worker_config=_worker_config(rank, world_size, data.num_workers, data_parallel_group, seed),
            batch_size=micro_batch_size,
            packing_buffer_size=data.packing_buffer_size,
            shuffle_buffer_size=data.shuffle_buffer_size,
            max_samples_per_sequence=SAMPLES_PER_SLICE,
            parallel_shard_iters=PARALLEL_SHARDS,
            task_encoder=Molmo2TaskEncoder(data, encoder, sources, position),
        )
        ahead = batches_per_worker(data, vision, micro_batch_size, micro_batches)
        # Energon's watchdog prints the variables of all threads where a sample takes a minute. With object storage that
        # may be a request with its credentials, and storage.py says what it waits for.
        watched = {"watchdog_timeout_seconds": None} if any(source.cached for source in sources) else {}
        loader = get_savable_loader(dataset, checkpoint_every_sec=SNAPSHOT_SECONDS, prefetch_factor=ahead, **watched)
    _restore(loader, position.energon)
    if data.num_workers:
        compat.answer_before_the_start(loader)
    return TrainLoader(loader, manifest, position, encoder.frames_note())


def validation_loader(
    data: DataConfig,
    vision: VisionConfig,
    sources: list[Source],
    rank: int,
    world_size: int,
    micro_batch_size: int,
) -> ValidationLoader:
    """The held-out split of all sources in turn, packed; finite, and the same in every iteration.

    Rows are made of the whole split and dealt to the data-parallel ranks, so that they do not depend on world_size,
    and every rank gets the same number of micro-batches (the last may hold empty rows). ConfigError: nothing is held
    out.
    """
    if not any(source.num_validation_samples for source in sources):
        raise ConfigError(
            f"nothing is held out in {data.said}: prepare a source with a split part val, or set "
            "train.validation_batches=0."
        )
    encoder = Molmo2TaskEncoder(
        data, Encoder(data, vision), sources, shard=(rank, world_size), micro_batch_size=micro_batch_size
    )
    with _quiet():
        dataset = get_val_dataset(
            metadataset(sources),
            worker_config=_worker_config(0, 1, min(1, data.num_workers), None, data.seed),
            batch_size=micro_batch_size,
            packing_buffer_size=data.packing_buffer_size,
            task_encoder=encoder,
        )
        # Energon's watchdog starts a thread for every iteration, which stays when the iteration is left before its end.
        return ValidationLoader(get_loader(dataset, watchdog_timeout_seconds=None))


def stored_samples(data: DataConfig, encoder: Encoder, sources: list[Source], part: str) -> Iterator[RawSample]:
    """The undecoded samples of a split part (train, val), each once, the sources in turn; read in this process.

    Each has its source's name in __subflavors__["source"]."""
    sources = [s for s in sources if (s.num_samples if part == "train" else s.num_validation_samples)]
    if not sources:
        return
    with _quiet():
        dataset = get_val_dataset(
            metadataset(sources),
            split_part=part,
            worker_config=_worker_config(0, 1, 0, None, data.seed),
            batch_size=1,
            task_encoder=StoredAsTheyAre(data, encoder, sources),
        )
        loader = get_loader(dataset)
    loader.pin_memory = False
    yield from loader


def save_state(loader: TrainLoader) -> bytes:
    """Where the stream of this rank is, to be continued by `train_loader`.

    WorkerDied: a worker process is dead; Energon would wait for its answer for ever.
    """
    if not loader.workers:
        return progress.write(loader.position, loader.manifest, loader._loader.save_state_rank())
    answer = queue.SimpleQueue()

    def ask():
        try:
            answer.put((loader._loader.save_state_rank(), None))
        except Exception as error:
            answer.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    while answer.empty():
        dead = loader.dead_worker()
        if dead is not None:
            raise WorkerDied(dead)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    state, error = answer.get()
    if error is not None:
        raise error
    return progress.write(loader.position, loader.manifest, state)


def _manifest(
    data: DataConfig,
    vision: VisionConfig,
    sources: list[Source],
    rank: int,
    world_size: int,
    micro_batch_size: int,
    encoder: Encoder,
) -> dict:
    """Everything that decides the stream. Folders may move, so that paths are left out."""
    free = ("root", "blend", "own", "own_weights", "keep", "tokenizer", "skip_missing", "max_error_rate")
    free += ("cache_dir", "cache_size")
    return {
        **{f"data.{key}": value for key, value in asdict(data).items() if key not in free},
        **{f"source {source.name}": progress.source_entry(source) for source in sources},
        progress.ORDER: [source.name for source in sources],
        progress.VISION: asdict(vision),
        vocabulary.TOKENIZER: vocabulary.digest(encoder.tokenizer),
        progress.RANKS: world_size,
        progress.RANK: rank,
        "train.micro_batch_size": micro_batch_size,
        "megatron-energon": version("megatron-energon"),
    }


def _worker_config(rank: int, world_size: int, num_workers: int, group, seed: int) -> WorkerConfig:
    # Faults of a sample or a shard are counted before Energon sees them; an error that still reaches it is a bug.
    return WorkerConfig(
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        data_parallel_group=group,
        seed_offset=seed,
        global_error_handler=reraise_exception,
    )


def _restore(loader: SavableDataLoader, state: SavableDataLoaderState | None) -> None:
    """Energon's restore, made exact also when the state is saved again before every worker has had its next turn."""
    loader.restore_state_rank(state)
    if state is not None and loader.num_workers:
        # Energon does not count batches that a worker has to replay: such a save would hand them out again.
        counters = [
            (worker.state.sample_index if worker.state else 0) + worker.offset - 1 for worker in state.worker_states
        ]
        compat.set_worker_sample_counters(loader, counters)


def _init_worker(init: Callable[[int], None], parent: int, worker_id: int) -> None:
    """First thing in the process of a loader worker. init: Energon's own; parent: the rank's process."""
    # A rank that is killed cannot stop its workers, and one that waits for work would never notice: Linux ends them.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the rank ended before that
        os._exit(1)
    # A cluster sends these signals to every process of a job. The trainer finishes its step and then stops its workers
    # itself, so workers ignore them instead of running the handlers that they inherit.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    init(worker_id)


def _digest(*values) -> bytes:
    return hashlib.sha256(repr(values).encode()).digest()


def _example(parts: dict[str, bytes]) -> Example:
    if "json" not in parts:
        raise ValueError("it has no part json.")
    if len(parts["json"]) > MAX_JSON:
        raise ValueError(f"its JSON has {len(parts['json']):,} bytes, more than {MAX_JSON:,}.")
    return read_example(parts["json"])


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _report(source: str, key: str, reason: str) -> str:
    """One line of printable text, the same in every run (no addresses of objects)."""
    line = re.sub(" at 0x[0-9a-f]+", "", f"{source}: {key}: {reason}")[:MAX_REPORT]
    return " ".join("".join(c if c.isprintable() else " " for c in line).split())


@contextlib.contextmanager
def _quiet():
    """Send to stderr what Energon prints while it builds datasets; stdout belongs to the trainer."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
