"""How far a training stream is: what the state file of a data-parallel rank holds, and how to continue from it.

    one line of JSON   the manifest (what the stream was made from), and the sizes of the two arrays
    consumed, ahead    zlib, uint16: one number for each training sample of the blend, source after source
    pickle             Energon's own state of the rank's workers

With the same numbers of data-parallel ranks and loader workers, Energon's state continues exactly. With others it
cannot, since every worker owns a part of each source. Then the stream starts again in another order, and leaves out
what is ahead: of a sample that was handed out n times, in a source whose samples were handed out m times or more, the
first n - m appearances. So nothing is lost, and a sample comes again only when all others of its worker's part have
been read as often. Samples that were read but not handed out yet count as unread.
"""

import io
import json
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from megatron.energon.savable_loader import SavableDataLoaderState

from molmo2_nemo import compat
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.data.blend import Source

# The keys of a manifest that a run may change on resuming. Without them it is the same stream, dealt out otherwise.
RANK, RANKS, WORKERS = "data-parallel rank", "data-parallel size", "data.num_workers"
# Counts stop here: differences between samples seen more often than this are forgotten.
MAX_COUNT = 60_000
# Bytes; a manifest has a few hundred for each source.
MAX_HEADER = 2**24


@dataclass
class StreamPosition:
    """How often each training sample of the blend was handed out, in uint16 arrays over all sources' samples.

    consumed: by this rank, since the stream was last dealt out. ahead: by all ranks before that, less the least of the
    sample's source. starts: where each source begins. energon: Energon's state; None: start from the beginning.
    """

    consumed: np.ndarray
    ahead: np.ndarray
    starts: list[int]
    times_dealt: int = 0
    energon: object = field(default=None, repr=False)

    def add(self, examples: torch.Tensor) -> None:
        """Count a batch's `examples`, int64 [N, 2] (source, index)."""
        source, index = examples.numpy().T
        place = np.asarray(self.starts)[source] + index
        np.add.at(self.consumed, place, self.consumed[place] < MAX_COUNT)

    def ahead_in(self, source: int) -> np.ndarray:
        """`ahead` of one source's samples (a view)."""
        return self.ahead[self.starts[source] : self.starts[source + 1]]


def beginning(sources: Sequence[Source]) -> StreamPosition:
    """Nothing handed out yet."""
    starts = [0, *accumulate(source.num_samples for source in sources)]
    return StreamPosition(np.zeros(starts[-1], np.uint16), np.zeros(starts[-1], np.uint16), starts)


def write(progress: StreamPosition, manifest: dict, energon) -> bytes:
    """The state file. energon: Energon's state of this rank now."""
    arrays = [zlib.compress(array, level=1) for array in (progress.consumed, progress.ahead)]
    header = {"manifest": manifest, "times_dealt": progress.times_dealt, "sizes": [len(array) for array in arrays]}
    pickled = io.BytesIO()
    _StatePickler(pickled).dump(energon)
    return b"".join([json.dumps(header).encode(), b"\n", *arrays, pickled.getvalue()])


def read(saved: Sequence[Path], manifest: dict, sources: Sequence[Source]) -> StreamPosition:
    """Continue from the state files of all data-parallel ranks, in order, as the rank that `manifest` says.

    ConfigError, one sentence: the stream was made from something else, or a file is missing or damaged.
    """
    rank = min(manifest[RANK], len(saved) - 1)
    old, progress = _read_file(saved[rank], rank, manifest, sources)
    if len(saved) != old[RANKS]:
        raise ConfigError(
            f"the checkpoint holds the data state of {len(saved)} of {old[RANKS]} data-parallel ranks: use another "
            "checkpoint, or start a new run from its weights."
        )
    if all(old[key] == manifest[key] for key in (RANKS, WORKERS)):
        return progress
    total = progress.ahead.astype(np.uint32)
    for rank, path in enumerate(saved):
        total += _read_file(path, rank, manifest, sources)[1].consumed
    dealt = beginning(sources)
    for start, end in zip(dealt.starts, dealt.starts[1:]):
        counts = total[start:end]
        dealt.ahead[start:end] = np.minimum(counts - counts.min(), MAX_COUNT)
    dealt.times_dealt = progress.times_dealt + 1
    return dealt


def _read_file(path: Path, rank: int, manifest: dict, sources: Sequence[Source]) -> tuple[dict, StreamPosition]:
    """The state file of data-parallel rank `rank`: its own manifest, and what it holds."""
    progress = beginning(sources)
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline(MAX_HEADER))
            old = dict(header["manifest"])
            _refuse_another_stream(old, manifest)
            if old[RANK] != rank:
                raise ValueError(f"{path.name} is of rank {old[RANK]}")
            progress.times_dealt = int(header["times_dealt"])
            progress.consumed, progress.ahead = (
                _decompressed(file.read(int(size)), len(progress.ahead)) for size in header["sizes"]
            )
            progress.energon = _StateUnpickler(file).load()
            if not isinstance(progress.energon, SavableDataLoaderState | None):
                raise ValueError("it holds no loader's state")
    except (MemoryError, ConfigError):  # the latter: the state is whole, but of another stream
        raise
    except Exception as error:  # a damaged pickle raises errors of any type
        raise ConfigError(f"the saved data state is damaged ({error}): start a new run from the weights.") from error
    return old, progress


def _refuse_another_stream(old: dict, manifest: dict) -> None:
    for key in sorted((old.keys() | manifest.keys()) - {RANK, RANKS, WORKERS}):
        before, now = old.get(key), json.loads(json.dumps(manifest.get(key)))
        if before != now:
            raise ConfigError(
                f"the data state was saved with {key}={before}, this run has {key}={now}: set the old value, or start "
                "a new run from the checkpoint's weights."
            )


def _decompressed(data: bytes, count: int) -> np.ndarray:
    """`count` numbers, uint16; not a byte more is decompressed, whatever the data would expand to."""
    size = 2 * count
    found = zlib.decompressobj().decompress(data, max_length=size + 1)
    if len(found) != size:
        raise ValueError(f"{len(found) // 2} counts of {count} samples")
    return np.frombuffer(bytearray(found), dtype=np.uint16)


class _StatePickler(pickle.Pickler):
    """Writes tensors as arrays: torch's own form calls an unrestricted unpickler when it is read."""

    def reducer_override(self, obj):
        return (_tensor, (obj.numpy(),)) if isinstance(obj, torch.Tensor) else NotImplemented


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


class _StateUnpickler(pickle.Unpickler):
    """Knows the types of Energon's loader state: a checkpoint is data, not a program."""

    ALLOWED = {
        "megatron.energon.savable_loader": {
            "SavableDataLoaderState",
            "SavableDatasetCheckpoint",
            "SavableDatasetState",
        },
        "megatron.energon.state": {"FlexState"},
        "megatron.energon.rng": {"SystemRngState"},
        "megatron.energon.flavors.webdataset.sample_loader": {"SliceState"},
        __name__: {"_tensor"},
        "numpy": {"dtype", "ndarray"},
        **compat.PICKLED_ARRAYS,
    }

    def find_class(self, module: str, name: str):
        if name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"it holds {module}.{name}, which is no part of one")
