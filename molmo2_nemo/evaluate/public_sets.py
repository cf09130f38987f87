"""Public evaluation sets: from what tools/download.py has fetched to shards, ROOT/evaluation/NAME."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
from molmo2_nemo.prepare.find_media import ABSENT
from molmo2_nemo.prepare.spool import about_of, converted, reason_of
from molmo2_nemo.prepare.webdataset import write_shards

CATALOGUE = CONF_DIR / "evaluations.yaml"
# Of what converters make of the sets: a change of a question needs another number, so that older shards are made anew.
VERSION = 2
MADE = "made.json"
SHOWN_REASONS = 5


@dataclass
class Made:
    """How a folder of shards was made."""

    version: int
    fetched: str  # SHA-256 of fetched.json
    dropped: dict[str, int]  # annotations that were left out, by reason


def prepared_set(name: str, root: Path, report: Callable[[str], None]) -> Path:
    """The folder of the set's shards, which are made if they are not there, if the set was fetched again, or if another
    version of this project made them. report: is told what was left out.

    ValueError, one sentence: there is no such set, it is not fetched, or no sample can be made of it.
    """
    (entry,) = load_catalogue(CATALOGUE).find([name])
    raw, folder = RawSource(root, entry.name, entry.catalogue), root / "evaluation" / entry.name
    try:
        with locked(root / "evaluation" / f".{entry.name}.lock"):
            made = _made(folder)
            if made is None or made.fetched != _fetched(raw, made.fetched):
                with published(folder, replace=True) as partial:
                    made = _write(entry, raw, partial)
    except LockHeld:
        raise ValueError(f"another tools/evaluate.py is preparing {folder}: wait for its end") from None
    for reason, number in list(made.dropped.items())[:SHOWN_REASONS]:
        report(f"{entry.name}: {number:,} annotations are left out: {reason}")
    if ABSENT in made.dropped:
        report(f"{entry.name}: when the missing ones are there, remove {folder}, so that it is made anew")
    return folder


def _made(folder: Path) -> Made | None:
    """None: there is no folder, or not one of this version."""
    try:
        made = Made(**json.loads((folder / MADE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return made if made.version == VERSION else None


def _fetched(raw: RawSource, gone: str | None = None) -> str | None:
    """SHA-256 of fetched.json; `gone` where the raw folder was removed, which shards do not need."""
    note = raw.folder / "fetched.json"
    return sha256_of_text(note.read_text()) if note.is_file() else gone


def _write(entry: DataSet, raw: RawSource, folder: Path) -> Made:
    fetch, info, dropped = ("fetch", entry.name), raw.info, Counter()
    if info.get("stopped") or info.get("limit") or (info.get("complete") is False and info.get("waiting")):
        command = download_command(*fetch, root=raw.root, catalogue=entry.catalogue)
        raise ValueError(f"{entry.name} is fetched in part, so that its scores would be of another set: run {command}")
    counts = write_shards(folder, {"test": _samples(entry, raw, dropped)})
    if not counts["test"]:
        reasons = ", ".join(f"{number:,} x {reason}" for reason, number in dropped.most_common(3))
        raise ValueError(f"{entry.name} has no sample: {reasons or 'there are no rows'}")
    made = Made(VERSION, _fetched(raw), dict(dropped.most_common()))
    (folder / MADE).write_text(json.dumps(asdict(made)))
    return made


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
