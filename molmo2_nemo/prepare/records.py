"""What is written about the work on a data set, and read back by later runs: the JSON files beside its shards."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from molmo2_nemo.files import write_json


class Document(BaseModel):
    """A JSON file of known keys. What is damaged, or was written by something else, counts as absent."""

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The file's content; None: it is not there, or not of this kind."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            return None

    def write(self, path: Path) -> None:
        """Write the file in one step; it is on the disk afterwards."""
        write_json(path, self.model_dump())


class RowCounts(Document):
    """rows.json: what became of the rows of a set."""

    rows: int
    drafts: int
    dropped: dict[str, int]  # annotations by reason


class SpoolMark(Document):
    """spool.json: what a folder of drafts was made from. It is written last."""

    fingerprint: str
    buckets: list[str]


class ShardCounts(Document):
    """One shard, as it is listed in provenance.json."""

    shard: str  # name of the file, which is not there if it has no samples
    samples: int = 0
    branches: int = 0
    images: int = 0
    videos: int = 0
    moved_points: int = 0  # that lay outside of their picture
    dropped: dict[str, int] = {}  # annotations by reason
    bytes: int = 0
    sha256: str | None = None


class ShardRecord(ShardCounts):
    """records/SHARD.json: a shard that is written as a whole."""

    fingerprint: str


class Provenance(Document):
    """provenance.json: where a finished set comes from, and what is in it."""

    fingerprint: str
    source: dict[str, Any]  # shard_plan.source_of
    rows: int
    train_samples: int
    val_samples: int
    branches: int
    images: int
    videos: int
    bytes: int
    moved_points: int
    catalogue_samples: int | None  # as the catalogue has them, from the paper or the release
    catalogue_annotations: int | None
    catalogue_rows: int | None
    dropped: dict[str, int]  # annotations by reason, the most frequent first
    dropped_share: float
    shards: list[ShardCounts]
