"""Public evaluation sets: from what tools/download.py has fetched to shards, ROOT/evaluation/NAME."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.datasets import DataSet, load_catalogue
from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.files import LockHeld, locked, published, sha256_of_text
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.prepare.converters import converter_of
from molmo2_nemo.prepare.converters.common import Draft, Drop
from molmo2_nemo.prepare.dataset_shards import packed
from molmo2_nemo.prepare.spool import about_of, converted, reason_of
from molmo2_nemo.prepare.webdataset import write_shards

CATALOGUE = CONF_DIR / "evaluations.yaml"
DROPPED = "dropped.json"
SHOWN_REASONS = 5


def prepared_set(name: str, root: Path, report: Callable[[str], None]) -> Path:
    """The folder of the set's shards, which are made if they are not there. report: is told what was left out.

    ValueError, one sentence: there is no such set, it is not fetched, or no sample can be made of it.
    """
    (entry,) = load_catalogue(CATALOGUE).find([name])
    folder = root / "evaluation" / entry.name
    try:
        with locked(root / "evaluation" / f".{entry.name}.lock"):
            if not folder.is_dir():
                with published(folder) as partial:
                    _write(entry, root, partial)
    except LockHeld:
        raise ValueError(f"another tools/evaluate.py is preparing {folder}: wait for its end") from None
    dropped = json.loads((folder / DROPPED).read_text())
    for reason, number in list(dropped.items())[:SHOWN_REASONS]:
        report(f"{entry.name}: {number:,} annotations are left out: {reason}")
    return folder


def _write(entry: DataSet, root: Path, folder: Path) -> None:
    raw, fetch = RawSource(root, entry.name, entry.catalogue), ("fetch", entry.name)
    info, dropped = raw.info, Counter()
    if info.get("stopped") or info.get("limit") or (info.get("complete") is False and info.get("waiting")):
        command = download_command(*fetch, root=root, catalogue=entry.catalogue)
        raise ValueError(f"{entry.name} is fetched in part, so that its scores would be of another set: run {command}")
    counts = write_shards(folder, {"test": _samples(entry, raw, dropped)})
    if not counts["test"]:
        reasons = ", ".join(f"{number:,} x {reason}" for reason, number in dropped.most_common(3))
        raise ValueError(f"{entry.name} has no sample: {reasons or 'there are no rows'}")
    (folder / DROPPED).write_text(json.dumps(dict(dropped.most_common())))


def _samples(entry: DataSet, raw: RawSource, dropped: Counter) -> Iterator[tuple[str, dict[str, bytes]]]:
    """In the order of a hash of their pictures or videos, so that the first ones are no special ones."""
    values, about = entry.model_dump(), {}
    converter = converter_of(values)
    for results in converted(values, raw):
        for result in results:
            if isinstance(result, Drop):
                dropped[reason_of(dropped, result.reason)] += 1
            else:
                about.setdefault(sha256_of_text(about_of(result)), []).append(result)
    for name in sorted(about):
        drafts: list[Draft] = about.pop(name)
        numbers = count()
        for _, parts, *_ in packed(drafts, converter, raw, dropped):
            yield f"{name[:20]}_{next(numbers)}", parts
