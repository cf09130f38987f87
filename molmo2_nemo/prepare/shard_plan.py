"""How one data set is divided into shards, and what decides their content: known before a row is read."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.raw import RawSource, size_on_disk
from molmo2_nemo.prepare.code_hash import code_hash
from molmo2_nemo.prepare.converters import converter_of

# Held out for validation: this share of the pictures and videos, chosen by a hash, and so the same ones in every set.
VAL_SHARE = 0.01
VAL_PER_SHARD = 500  # samples
# Samples of a shard of a small set, if the number in the catalogue is right.
MIN_SAMPLES = 200
# Number of files (buckets) among which drafts are divided, at least: each is read into memory as a whole.
MIN_BUCKETS = 64
# Keys of fetched.json that decide what the shards hold; the others describe how it was fetched.
DECISIVE = ("revision", "repo", "limit", "filter", "splits", "counts", "media")
VAL = "val"


@dataclass(frozen=True)
class ShardPlan:
    """How one data set becomes shards.

    $out/NAME/ is the finished data set, $out/.prepare/NAME/ what is not finished.
    """

    entry: dict  # of the catalogue
    root: Path  # holds raw/
    out: Path
    num_train: int  # shards
    num_val: int
    val_share: float  # of the pictures and videos, held out for validation
    fingerprint: str  # a hash of everything that decides what the shards hold

    @property
    def name(self) -> str:
        return self.entry["name"]

    @property
    def final(self) -> Path:
        return self.out / self.name

    @property
    def work(self) -> Path:
        return self.out / ".prepare" / self.name

    @property
    def shards(self) -> list[str]:
        return [f"train-{k:05d}" for k in range(self.num_train)] + [f"{VAL}-{k:05d}" for k in range(self.num_val)]

    def num_buckets(self) -> int:
        """Number of files for the drafts of the training shards, a multiple of the number of shards."""
        return self.num_train * math.ceil(MIN_BUCKETS / self.num_train)

    def buckets(self, shard: str) -> list[str]:
        """Files whose drafts a shard takes. All validation shards read one file, and each takes a part of it."""
        split, number = shard.rsplit("-", 1)
        if split == VAL:
            return [VAL]
        each = self.num_buckets() // self.num_train
        return [f"{k:05d}" for k in range(int(number) * each, (int(number) + 1) * each)]


def make_plan(entry: dict, root: Path, out: Path, num_shards: int, partial: bool = False) -> ShardPlan:
    """ValueError, one sentence: the set has no converter, is not fetched, or not as a whole (unless `partial`).

    A sample (fetch --limit) counts as whole.
    """
    converter_of(entry)
    name, raw = entry["name"], RawSource(root, entry["name"], entry.get("catalogue"))
    info = raw.info
    place = {"root": root, "catalogue": entry.get("catalogue")}
    if info.get("stopped"):
        fetch = download_command("fetch", name, **place)
        raise ValueError(f"{name} is not fetched to its end ({info['stopped']}): run {fetch}.")
    if info.get("complete") is False and info.get("waiting") and not partial:
        raise ValueError(
            f"{name} is fetched in part ({'; '.join(info['waiting'])}): see "
            f"{download_command('doctor', name, **place)}, or take what is there with --partial."
        )
    expected = expected_samples(entry, info)
    num_train = min(num_shards, math.ceil(expected / MIN_SAMPLES))
    num_val = min(num_train, math.ceil(expected * VAL_SHARE / VAL_PER_SHARD))
    what = {
        "code": code_hash(),
        "raw": {key: info.get(key) for key in DECISIVE},
        "shards": num_train,
        "by_hand": size_on_disk(raw.folder / "manual"),
        "val": [num_val, VAL_SHARE],
        "source": entry["source"],
        "convert": entry.get("convert"),
    }
    fingerprint = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
    return ShardPlan(entry, root, out, num_train, num_val, VAL_SHARE, fingerprint)


def expected_samples(entry: dict, info: dict) -> int:
    """A rough number of samples of a set. It decides the number of shards only, so that it may be wrong."""
    counts = entry.get("counts") or {}
    known = [counts.get(key) for key in ("paper_examples", "released_rows", "paper_visual")] + [entry.get("examples")]
    expected = next((number for number in known if number), 1000)
    rows = (info.get("counts") or {}).get("rows")
    return min(number for number in (expected, rows, info.get("limit")) if number)


def bucket_of(plan: ShardPlan, about: str) -> str:
    """The file of a draft, by the first 8 bytes of the hash `about`; the next 8 decide what is held out."""
    return f"{int(about[:16], 16) * plan.num_buckets() >> 64:05d}"


def source_of(plan: ShardPlan) -> dict:
    """Where the data of a set come from, for provenance.json."""
    info, source = RawSource(plan.root, plan.name).info, plan.entry["source"]
    hub, urls = source.get("hf") or {}, source.get("urls") or [None]
    return {
        "name": plan.name,
        "from": info.get("repo") or hub.get("repo") or source.get("page") or urls[0],
        "config": hub.get("config"),
        "revision": info.get("revision"),
        "license": plan.entry.get("license") or info.get("license"),
        "terms": plan.entry.get("terms"),
        "max_side": info.get("max_side"),
        "resized": (info.get("media") or {}).get("resized", 0),
    }
