"""Samples as they are stored in the shards of a blend, for a person to look at: by their index, or each once."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.structs import ShardInfo

from molmo2_nemo.config.schema import DataConfig
from molmo2_nemo.data import progress
from molmo2_nemo.data.blend import Source
from molmo2_nemo.data.cached_reader import fetch_samples, read_samples_whole
from molmo2_nemo.data.encode import Encoder
from molmo2_nemo.data.loader import Molmo2TaskEncoder, stored_samples
from molmo2_nemo.data.node_cache import CachedSource
from molmo2_nemo.data.packing import Batch
from molmo2_nemo.data.schema import Example, read_example
from molmo2_nemo.data.shard_index import read_index
from molmo2_nemo.storage import is_for_all


@dataclass
class Stored:
    """A sample of a shard. parts: by name, undecoded; without the sample none. example: None if its JSON is not one."""

    shard: str = ""
    number: int = 0  # in the shard, from 1
    parts: dict[str, bytes] = field(default_factory=dict)
    example: Example | None = None

    @property
    def json(self) -> str:
        return self.parts.get("json", b"").decode("utf-8", "replace")

    @property
    def tasks(self) -> list[str]:
        """The kinds of its branches, each once."""
        branches = self.example.branches if self.example else []
        return list(dict.fromkeys("chat" if isinstance(branch, list) else branch.task for branch in branches))


def each_sample(data: DataConfig, encoder: Encoder, sources: list[Source]) -> Iterator[tuple[str, Batch]]:
    """Every sample once, source by source in the order of the shards: (split part, a batch of one row with it alone).

    part: train, or after these val. Planned, decoded and laid out by the code that makes rows for training, at its
    first draw. What is broken is counted in the batch, as in training.
    """
    training = Molmo2TaskEncoder(data, encoder, sources, progress.beginning(sources))
    for source in sources:
        for part in ("train", "val"):
            for sample in stored_samples(data, encoder, [source], part):
                yield part, training.batch([training.make_row([training.preencode_sample(sample)])])


class StoredSamples:
    """Reads samples of a split part by index into it."""

    def __init__(self, sources: list[Source]):
        self.sources = {source.name: source for source in sources}
        self._readers: dict[tuple[str, str], ShardInfosITarReader] = {}

    def read(self, source: str, index: int, key: str, part: str = "train") -> Stored:
        """What can be read of a sample: `index` is that of Batch.examples, `source` a name, `part` train or val.

        key: as inspection.UsedSample has it. Where the shards hold another sample at this place by now, it is not read.
        """
        try:
            reader = self._reader(source, part)
            number = bisect_right(reader.shard_count_cumsum, index) - 1
            stored = Stored(reader.shard_infos[number].name, index - reader.shard_count_cumsum[number] + 1)
        except (KeyError, IndexError, OSError, ValueError) as error:  # no such source any more, or other shards
            if is_for_all(error):
                raise
            return Stored()
        try:
            parts = reader[index]
            if key not in (parts["__key__"], f"number {index}"):
                return Stored()
            stored.parts = {name: data for name, data in parts.items() if not name.startswith("__")}
            stored.example = read_example(stored.parts["json"])
        except MemoryError:
            raise
        except Exception as error:  # tarfile's are of many types; the batch's errors say what is wrong
            if is_for_all(error):
                raise
            reader.close()
        return stored

    def fetch(self, source: str, indices: list[int], part: str = "train") -> None:
        """Where a source is read through the node's cache, bring these samples into it, side by side.

        StorageError: the storage cannot be used.
        """
        if self.sources[source].cached:
            fetch_samples(self._reader(source, part), self.sources[source].cached, indices)

    def _reader(self, source: str, part: str) -> ShardInfosITarReader:
        if (source, part) not in self._readers:
            found = self.sources[source]
            self._readers[source, part] = shard_reader(source, Path(found.path), part, found.shards, found.cached)
        return self._readers[source, part]


def shard_reader(
    name: str, folder: Path, part: str, shards: str | None = None, cached: CachedSource | None = None
) -> ShardInfosITarReader:
    """Reads the samples of a split part by index, through the node's cache if they are `cached`.

    folder: has .nv-meta; shards: where they are, None: there, too. ConfigError: as of read_index.
    """
    counts = read_index(name, folder, shards)[part]
    infos = [ShardInfo(name=name, path=EPath(folder / name), count=count) for name, count in counts.items()]
    reader = ShardInfosITarReader(EPath(folder), infos)
    read_samples_whole(reader, shards or str(folder), cached)
    return reader
