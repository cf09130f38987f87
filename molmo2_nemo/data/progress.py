"""How far a training stream is: what the state file of a data-parallel rank holds, and how to continue from it.

    one line of JSON   the manifest (what the stream was made from), and the sizes of the two arrays
    consumed, ahead    zlib, uint16: one number for each training sample of the blend, source after source
    pickle             Energon's own state of the rank's workers

Where the manifest is the same, Energon's state continues exactly. Where it is not (another number of data-parallel
ranks or loader workers, another row length, another blend), it cannot, since every worker owns a part of each source.
Then the data are dealt anew: the stream starts again in another order, and leaves out what is ahead: of a sample that
was handed out n times, in a source whose samples were handed out m times or more, the first n - m appearances. So
nothing is lost, and a sample comes again only when all others of its worker's part have been read as often. Samples
that were read but not handed out yet count as unread. A source that is new, or has another number of samples than
before, is read from its beginning.
"""

import io
import json
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from megatron.energon.savable_loader import SavableDataLoaderState

from molmo2_nemo import compat
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.data.blend import Source
from molmo2_nemo.data.vocabulary import MAX_HEADER, TOKENIZER

# Keys of a manifest. Another value of VISION or TOKENIZER is refused: the model has learned what they decide.
RANK, RANKS, ORDER, RESTART = "data-parallel rank", "data-parallel size", "sources in order", "train.restart_data"
VISION = "model.vision"
# Counts stop here: differences between samples seen more often than this are forgotten.
MAX_COUNT = 60_000


@dataclass
class StreamPosition:
    """How often each training sample of the blend was handed out, in uint16 arrays over all sources' samples.

    consumed: by this rank, since the stream was last dealt out. ahead: by all ranks before that, less the least of the
    sample's source. starts: where each source begins. energon: Energon's state; None: start from the beginning.
    note: one sentence on why the data were dealt anew when this was read, and what was carried over; "": they were not.
    """

    consumed: np.ndarray
    ahead: np.ndarray
    starts: list[int]
    times_dealt: int = 0
    energon: object = field(default=None, repr=False)
    note: str = ""

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


def source_entry(source: Source) -> list:
    """What a manifest says of a source, under `source NAME`."""
    return [source.weight, source.num_samples, asdict(source.options)]


def read(saved: Sequence[Path], manifest: dict, sources: Sequence[Source]) -> StreamPosition:
    """Continue from the state files of all data-parallel ranks, in order, as the rank that `manifest` says.

    ConfigError, one sentence: a file is missing or damaged, or the model was trained with another tokenizer.
    """
    manifest = json.loads(json.dumps(manifest))
    rank = min(manifest[RANK], len(saved) - 1)
    old, progress = _read_file(saved[rank], rank)
    if len(saved) != old[RANKS]:
        raise ConfigError(
            f"the checkpoint holds the data state of {len(saved)} of {old[RANKS]} data-parallel ranks: use another "
            "checkpoint, or start a new run from its weights."
        )
    for key, name in ((TOKENIZER, "data.tokenizer"), (VISION, "model.vision")):
        if old[key] != manifest[key]:
            raise ConfigError(
                f"{name} is not what the checkpoint was trained with, which the model cannot unlearn: set the old "
                "value (the run's config.yaml has it), or start a new run with train.init_from=CHECKPOINT."
            )
    restart = manifest.get(RESTART) and not old.get(RESTART)
    changed = [key for key in old.keys() | manifest.keys() if key != RANK and old.get(key) != manifest.get(key)]
    if not restart and set(changed) <= {RESTART}:
        return progress
    dealt = beginning(sources)
    dealt.times_dealt = progress.times_dealt + 1
    if restart:
        dealt.note = "training data start again from the beginning, in another order (train.restart_data)"
        return dealt
    total = progress.ahead.astype(np.uint32)
    for rank, path in enumerate(saved):
        total += _read_file(path, rank)[1].consumed
    before = dict(zip(old[ORDER], zip(progress.starts, progress.starts[1:])))
    anew = []
    for source, start, end in zip(sources, dealt.starts, dealt.starts[1:]):
        old_start, old_end = before.get(source.name, (0, -1))
        if old_end - old_start == source.num_samples:
            counts = total[old_start:old_end]
            dealt.ahead[start:end] = np.minimum(counts - counts.min(), MAX_COUNT)
        else:
            anew.append(source.name)
    dealt.note = _note(old, manifest, sorted(changed), anew)
    return dealt


def _read_file(path: Path, rank: int) -> tuple[dict, StreamPosition]:
    """The state file of data-parallel rank `rank`: its own manifest, and what it holds."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline(MAX_HEADER))
            old = {RESTART: False, **header["manifest"]}
            if old[RANK] != rank:
                raise ValueError(f"{path.name} is of rank {old[RANK]}")
            if not {RANKS, TOKENIZER, VISION} <= old.keys():
                raise ValueError("it does not say what the stream was made of")
            starts = [0, *accumulate(int(old[f"source {name}"][1]) for name in old[ORDER])]
            consumed, ahead = (_decompressed(file.read(int(size)), starts[-1]) for size in header["sizes"])
            energon = _StateUnpickler(file).load()
            if not isinstance(energon, SavableDataLoaderState | None):
                raise ValueError("it holds no loader's state")
            return old, StreamPosition(consumed, ahead, starts, int(header["times_dealt"]), energon)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises errors of any type
        raise ConfigError(
            f"{path} is damaged ({error}): move {path.parent} away to go on from the checkpoint before it, or start a "
            f"new run with train.init_from={path.parent}."
        ) from error


def _note(old: dict, new: dict, changed: list[str], anew: list[str]) -> str:
    """One sentence: which keys have other values than in the checkpoint, and which sources are read from the beginning.

    anew: sources of the new manifest that are new or have another number of samples.
    """
    what = [
        f"{key} was {old.get(key, 'unset')} and is {new.get(key, 'unset')}"
        for key in changed
        if not key.startswith("source ") and key not in (ORDER, RESTART)
    ]
    for name in old[ORDER]:
        if f"source {name}" not in new:
            what.append(f"source {name} was left out")
    for name in new[ORDER]:
        key = f"source {name}"
        if key not in old:
            what.append(f"source {name} is new")
        elif old[key][1] != new[key][1]:
            what.append(f"source {name} had {old[key][1]:,} samples and has {new[key][1]:,}")
        elif old[key][2] != new[key][2]:
            what.append(f"source {name} has other options")
    what = what or ["the sources of the blend have other shares or another order"]
    kept = len(new[ORDER]) - len(anew)
    rest = f"; read from the beginning: {', '.join(anew)}" if anew else ""
    return (
        f"training data dealt anew, in another order, since {'; '.join(what)}: first comes what was not trained on yet "
        f"of {kept} of {len(new[ORDER])} sources{rest}"
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
