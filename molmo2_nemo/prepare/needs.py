"""What scratch a data set needs, known before its first byte comes: by what its servers list."""

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path

from molmo2_nemo.catalogue.datasets import DataSet, HubFiles
from molmo2_nemo.catalogue.raw import ROW_SUFFIXES
from molmo2_nemo.fetch import hub
from molmo2_nemo.fetch.archives import SUFFIXES
from molmo2_nemo.fetch.file_names import direct
from molmo2_nemo.fetch.plan import size_of
from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.fetch.web import length_of
from molmo2_nemo.files import readable_size
from molmo2_nemo.prepare.shard_plan import MIN_SAMPLES, expected_samples


@dataclass(frozen=True)
class Need:
    """total: bytes that come from the network, as far as is known. least: of scratch, and why it is so much."""

    total: int
    least: int
    why: str


def needs_of(entry: DataSet, root: Path, rules: Rules, shards: int, max_side: int | None = None) -> Need:
    """Of a set that is not fetched yet. shards: of a data set, at most.

    A file is there beside what comes out of it: an archive beside its contents, which are at least as large. Rows stay,
    unless pictures are inside. What cannot be learned is taken from the catalogue. ValueError, one sentence: its
    repository cannot be read.
    """
    rows, archives, others = {}, {}, {}
    for source, is_media in ((entry.source.hf, False), (entry.media.hf, True)):
        for name, size in _listed(source, root, rules).items() if source else ():
            if name.lower().endswith(SUFFIXES):
                archives[name] = size
            elif not is_media and name.lower().endswith(ROW_SUFFIXES):
                rows[name] = size
            else:
                others[name] = size
    for url in dict.fromkeys([*entry.source.urls, *entry.media.urls]):
        size = asyncio.run(length_of(direct(url), rules)) or 0
        is_row = url in entry.source.urls and url.lower().endswith(ROW_SUFFIXES)
        (rows if is_row else archives)[url] = size
    inside = entry.media.kind == "in-parquet"
    known = sum((*rows.values(), *archives.values(), *others.values()))
    total = max(known, size_of(entry, max_side).fetched) if entry.media.kind == "url-list" or not known else known
    stays = 0 if inside else sum(rows.values())
    shard = total // max(1, min(shards, math.ceil(expected_samples(entry.model_dump(), {}) / MIN_SAMPLES)))
    reasons = [(shard, f"a shard of it is about {readable_size(shard)}: more --shards make them smaller")]
    for name, size in archives.items():
        reasons.append((2 * size, f"{name} has {readable_size(size)}, and what comes out of it is as large again"))
    for name, size in {**others, **(rows if inside else {})}.items():
        reasons.append((2 * size if inside else size, f"{name} has {readable_size(size)}"))
    least, why = max(reasons)
    return Need(total, stays + least, why)


def _listed(files: HubFiles, root: Path, rules: Rules) -> dict[str, int]:
    """Bytes of the files that a source names."""
    repository = hub.open_repository(files, root, rules)
    names = [name for names in hub.choose_files(repository, files).values() for name in names]
    return {name: repository.files[name].size or 0 for name in (*names, *files.also) if name in repository.files}
