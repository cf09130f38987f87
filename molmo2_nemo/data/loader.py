"""Loaders of packed micro-batches: Energon reads, blends and shuffles shards, `Encoder` and `PackedRows` do the rest.

Samples travel as raw bytes until their row is chosen. All that is random for a sample comes from a hash of the seed
and the sample's place in the stream, never from a global generator, so that a restored stream continues exactly.
"""

import atexit
import contextlib
import hashlib
import io
import json
import logging
import pickle
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
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
from megatron.energon.wrappers.base import BaseWrapperDataset

from molmo2_nemo.config import DataConfig, VisionConfig
from molmo2_nemo.data.blend import Source, check_blend, write_metadataset
from molmo2_nemo.data.encode import Encoder, dropped
from molmo2_nemo.data.packing import Batch, PackedRows, Planned, Row, collate, make_row

log = logging.getLogger(__name__)

# Shards of one source that a worker reads at a time: two open files each, and a blend has a hundred sources.
PARALLEL_SHARDS = 4
# Consecutive samples of a shard read in one go; smaller mixes better, larger keeps the state small.
SAMPLES_PER_SLICE = 16
# A worker's state is a snapshot this old at most, plus batches to replay.
SNAPSHOT_SECONDS = 15
# Broken samples that a process reports one by one; further ones are only counted.
MAX_REPORTS = 20
# The blend as Energon reads it, in the run's folder.
METADATASET = "energon_blend.yaml"


@edataclass
class RawSample(Sample):
    """A sample as it lies in the shard: its parts by name, undecoded."""

    parts: dict[str, bytes]


@stateless
def cook(sample: dict) -> RawSample:
    """Energon's crude sample -> RawSample. Parts are the keys without Energon's own."""
    parts = {name: data for name, data in sample.items() if not name.startswith("__")}
    return RawSample(**basic_sample_keys(sample), parts=parts)


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

    held_out: plans depend on the sample alone, not on its place in the stream, and iterations are finite; `shard` and
    `micro_batch_size` are PackedRows' then.
    """

    decoder = None  # Energon would decode every part on reading
    cookers = [Cooker(cook)]

    def __init__(
        self, data: DataConfig, vision: VisionConfig, sources: list[Source], *, held_out: bool = False,
        shard: tuple[int, int] = (0, 1), micro_batch_size: int = 1,
    ):  # fmt: skip
        self.data = data
        self.encoder = Encoder(data, vision)
        self.source_index = {source.name: index for index, source in enumerate(sources)}
        self.held_out, self.shard, self.micro_batch_size = held_out, shard, micro_batch_size
        self._reports = 0

    @stateless
    def preencode_sample(self, sample: RawSample) -> Planned:
        """Plan a sample; one that cannot be used becomes a plan without tokens, to be counted."""
        source = sample.__subflavors__["source"]
        place = "" if self.held_out else repr(sample.__restore_key__)
        rng = np.random.default_rng(list(_digest(self.data.seed, source, sample.__key__, place)))
        try:
            plan = self.encoder.plan(_json(sample.parts), rng)
        except ValueError as error:
            self._report(f"Sample {sample.__key__} of {source} is malformed: {error}")
            plan = dropped("malformed")
        media = {name: data for name, data in sample.parts.items() if name != "json"} if plan.num_tokens else {}
        return Planned.derive_from(sample, plan=plan, media=media, source=self.source_index[source])

    def make_row(self, samples: list[Planned]) -> Row:
        """Decode the pixels of the chosen samples and concatenate; samples that cannot be decoded are counted."""
        counters, decoded = Counter(), []
        for sample in samples:
            if not sample.plan.num_tokens:
                counters += sample.plan.counters
                continue
            try:
                decoded.append((sample.plan, sample.source, self.encoder.pixels(sample.plan, sample.media)))
            except ValueError as error:
                self._report(f"Sample {sample.__key__} cannot be decoded: {error}")
                counters["dropped_undecodable"] += 1
        plans, sources, pixels = zip(*decoded) if decoded else ((), (), ())
        visual = self.encoder.visual
        nothing = (
            np.zeros((0, visual.patches_per_crop, visual.patch_dim), dtype=np.uint8),
            np.zeros((0, visual.window), dtype=np.int64),
        )
        fields = make_row(plans, sources, pixels, self.data.seq_length, self.encoder.pad_id, nothing, counters)
        return Row(__key__=",".join(sample.__key__ for sample in samples), __restore_key__=(), **fields)

    def _report(self, message: str) -> None:
        self._reports += 1
        if self._reports <= MAX_REPORTS:
            log.warning(message)

    @stateless
    def batch(self, samples: list[Row]) -> Batch:
        return collate(samples, self.encoder.visual.token_ids)

    def build_batch(self, dataset, *, batch_size, worker_config, batch_drop_last=False, packing_buffer_size=None):
        """PackedRows in the place of Energon's packing, then its batching."""
        rows = PackedRows(
            dataset, packing_buffer_size, self.data.seq_length, self.data.max_crops, self.make_row,
            worker_config=worker_config, finite=self.held_out, shard=self.shard, multiple=self.micro_batch_size,
        )  # fmt: skip
        return super().build_batch(rows, batch_size=batch_size, worker_config=worker_config)

    def build_val_datasets(self, *, datasets, worker_config, batch_size, packing_buffer_size, **_):
        """All sources in turn, so that the first rows hold something of each."""
        sources = RoundRobin([self._load_dataset(d, 0, worker_config) for d in datasets], worker_config=worker_config)
        planned = self.build_encode_sample(sources, worker_config=worker_config)
        return self.build_batch(
            planned, batch_size=batch_size, packing_buffer_size=packing_buffer_size, worker_config=worker_config
        )


class Loader:
    """Iterates an Energon loader; `close()` stops its workers, and so does the end of the process."""

    def __init__(self, loader):
        # Pinning is for a device; torch warns where there is none.
        loader.pin_memory = torch.cuda.is_available()
        loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)
        self._loader = loader

    def close(self) -> None:
        """Stop the worker processes. Safe to call again."""
        atexit.unregister(self.close)
        workers, self._loader._iterator = self._loader._iterator, None
        if workers is not None:
            workers._shutdown_workers()


class TrainLoader(Loader):
    """An endless iterator of Batch whose state can be saved at any time and restored before the first batch."""

    def __init__(self, loader, manifest: dict):
        super().__init__(loader)
        self.manifest = manifest
        self._batches = None

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            # Not before the first batch is wanted: Energon's save would hang between the two.
            self._batches = iter(self._loader)
            batch = next(self._batches)
            # Last registered is first called: before torch and multiprocessing wait for the workers.
            atexit.register(self.close)
            return batch
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
        yield from batches


def train_loader(
    data: DataConfig, vision: VisionConfig, sources: list[Source], rank: int, world_size: int,
    data_parallel_group: torch.distributed.ProcessGroup | None, micro_batch_size: int, run_dir: Path,
) -> TrainLoader:  # fmt: skip
    """The training stream of data-parallel rank `rank` of `world_size`; endless, each rank reads its own samples.

    Writes METADATASET to run_dir. Workers are forked at the first batch: ask for one before large allocations. With
    data.num_workers=0 all is done in this process, for debugging. ValueError: a source is too small for so many workers, there is no usable tokenizer, or a process may
    not open enough files.
    """
    check_blend(sources, world_size, data.num_workers)
    _allow_open_files(2 * PARALLEL_SHARDS * len(sources) + 256)
    path = Path(run_dir) / METADATASET
    write_metadataset(sources, path)
    encoder = Molmo2TaskEncoder(data, vision, sources)
    with _quiet():
        dataset = get_train_dataset(
            str(path.absolute()),
            worker_config=_worker_config(data, rank, world_size, data.num_workers, data_parallel_group),
            batch_size=micro_batch_size,
            packing_buffer_size=data.packing_buffer_size,
            shuffle_buffer_size=data.shuffle_buffer_size,
            max_samples_per_sequence=SAMPLES_PER_SLICE,
            parallel_shard_iters=PARALLEL_SHARDS,
            task_encoder=encoder,
        )
        loader = get_savable_loader(dataset, checkpoint_every_sec=SNAPSHOT_SECONDS)
    manifest = _manifest(data, vision, sources, rank, world_size, micro_batch_size)
    manifest["tokenizer"] = _digest(sorted(encoder.encoder.tokenizer.get_vocab().items())).hex()[:16]
    return TrainLoader(loader, manifest)


def validation_loader(
    data: DataConfig, vision: VisionConfig, sources: list[Source], rank: int, world_size: int,
    data_parallel_group: torch.distributed.ProcessGroup | None, micro_batch_size: int, run_dir: Path,
) -> ValidationLoader:  # fmt: skip
    """The held-out split of all sources in turn, packed; finite, and the same in every iteration.

    Rows are made of the whole split and dealt to the data-parallel ranks, so that they do not depend on world_size,
    and every rank gets the same number of micro-batches (the last may hold empty rows). ValueError: nothing is held
    out.
    """
    if not any(source.num_validation_samples for source in sources):
        raise ValueError(f"no source of data.blend={data.blend} has a split part val: prepare one, or do not validate.")
    path = Path(run_dir) / METADATASET
    write_metadataset(sources, path)
    encoder = Molmo2TaskEncoder(
        data, vision, sources, held_out=True, shard=(rank, world_size), micro_batch_size=micro_batch_size
    )
    with _quiet():
        dataset = get_val_dataset(
            str(path.absolute()),
            worker_config=_worker_config(data, 0, 1, min(1, data.num_workers), None),
            batch_size=micro_batch_size,
            packing_buffer_size=data.packing_buffer_size,
            task_encoder=encoder,
        )
        return ValidationLoader(get_loader(dataset))


def save_state(loader: TrainLoader) -> bytes:
    """Where the stream of this rank is, with a manifest of what it was made from."""
    saved = io.BytesIO(json.dumps(loader.manifest).encode() + b"\n")
    saved.seek(0, io.SEEK_END)
    _StatePickler(saved).dump(loader._loader.save_state_rank())
    return saved.getvalue()


def restore_state(loader: TrainLoader, saved: bytes) -> None:
    """Continue exactly after the last batch before `save_state`. Only before the first batch.

    ValueError: the state was saved under other settings, or is no state. Only types of Energon's state are unpickled.
    """
    header, _, pickled = saved.partition(b"\n")
    try:
        old = dict(json.loads(header))
        state = _StateUnpickler(io.BytesIO(pickled)).load()
    except (ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"the saved data state is damaged ({error}): start a new run from the weights.") from error
    for key in sorted(old.keys() | loader.manifest.keys()):
        before, now = old.get(key), json.loads(json.dumps(loader.manifest.get(key)))
        if before != now:
            raise ValueError(
                f"the data state was saved with {key}={before}, this run has {key}={now}: set the old value, or start "
                "a new run from the checkpoint's weights."
            )
    loader._loader.restore_state_rank(state)


class _StatePickler(pickle.Pickler):
    """Writes tensors as arrays: torch's own form calls an unrestricted unpickler when it is read."""

    def reducer_override(self, obj):
        return (_tensor, (obj.numpy(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


class _StateUnpickler(pickle.Unpickler):
    """Refuses everything but the types in Energon's loader state: a checkpoint is data, not a program."""

    ALLOWED = {  # fmt: skip
        "megatron.energon.savable_loader": {
            "SavableDataLoaderState", "SavableDatasetCheckpoint", "SavableDatasetState",
        },
        "megatron.energon.state": {"FlexState"},
        "megatron.energon.rng": {"SystemRngState"},
        "megatron.energon.flavors.webdataset.sample_loader": {"SliceState"},
        __name__: {"_tensor"},
        "numpy": {"dtype", "ndarray"},
        "numpy._core.multiarray": {"_reconstruct"},
        "numpy._core.numeric": {"_frombuffer"},
    }

    def find_class(self, module: str, name: str):
        if name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"it holds {module}.{name}, which is no part of one")


def _manifest(
    data: DataConfig, vision: VisionConfig, sources: list[Source], rank: int, world_size: int, micro_batch_size: int
) -> dict:
    """All that decides the stream. Folders may move, so the sources count by name, weight and size."""
    folders = ("root", "blend", "tokenizer")
    return {
        **{f"data.{key}": value for key, value in asdict(data).items() if key not in folders},
        **{f"source {s.name} [weight, samples]": [s.weight, s.num_samples] for s in sources},
        "sources in order": [source.name for source in sources],
        "model.vision": asdict(vision),
        "data-parallel size": world_size,
        "data-parallel rank": rank,
        "train.micro_batch_size": micro_batch_size,
        "megatron-energon": version("megatron-energon"),
    }


def _worker_config(data: DataConfig, rank: int, world_size: int, num_workers: int, group) -> WorkerConfig:
    # Whatever is wrong with a sample is counted on the way; what still raises is a broken shard, disk or program.
    return WorkerConfig(
        rank=rank, world_size=world_size, num_workers=num_workers, data_parallel_group=group, seed_offset=data.seed,
        global_error_handler=reraise_exception,
    )  # fmt: skip


def _init_worker(init: Callable[[int], None], worker_id: int) -> None:
    """First thing in the process of a loader worker; `init`: Energon's own."""
    # A cluster sends these to every process of a job. The trainer finishes its step and then stops its workers
    # itself; handlers inherited from it are not theirs to run.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    init(worker_id)


def _allow_open_files(needed: int) -> None:
    """Raise this process' and its workers' limit of open files. ValueError: the system does not allow so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(f"the blend needs {needed} open files, the limit is {hard}: raise it (ulimit -n {needed}).")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _digest(*values) -> bytes:
    return hashlib.sha256(repr(values).encode()).digest()


def _json(parts: dict[str, bytes]) -> dict:
    sample = json.loads(parts.get("json", b""))
    if not isinstance(sample, dict):
        raise ValueError("The sample's JSON is not an object.")
    return sample


@contextlib.contextmanager
def _quiet():
    """Energon prints while it builds; stdout is the trainer's."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
