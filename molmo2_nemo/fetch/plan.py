"""What a download of data sets takes: bytes, time, what the user has to bring, and what is left out of a budget.

This module only reads.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.datasets import Catalogue, DataSet
from molmo2_nemo.catalogue.mixture import blend_of, rounds
from molmo2_nemo.catalogue.raw import read_note, size_on_disk
from molmo2_nemo.catalogue.resized import share_left
from molmo2_nemo.fetch.inventory import state_of
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.fetch.on_disk import bytes_broken
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.prepare.records import Provenance

GB = 10**9
# For sets of unknown size: bytes of a picture (mean of public mirrors of PixMo's pictures), of a video (FunQA: 24.5 GB
# for about 4,300 videos), and of a row of annotations.
IMAGE_BYTES, VIDEO_BYTES, ROW_BYTES = 250_000, 5_700_000, 5_000
# Bytes of all that a set takes, media by hand included. None: there is no bound.
TIERS = {"small": 500 * GB, "medium": 1000 * GB, "full": None}
CHOSEN = ("fetch", "by hand")  # actions of rows that belong to what is got


@dataclass(frozen=True)
class Size:
    """Bytes of a data set."""

    fetched: int  # that a program downloads
    fetched_estimated: bool  # from the numbers of rows, pictures and videos
    by_hand: int  # that the user brings: media, and annotations where these are by hand, too
    by_hand_estimated: bool
    source: str = ""  # of the figure by hand, where somebody has published it


@dataclass(frozen=True)
class PlannedDownload:
    """A data set's row in `plan`."""

    name: str
    action: str  # fetch | there | by hand | refused | no room
    gigabytes: float  # that a program downloads
    estimated: bool
    seconds: float | None
    why: str
    by_hand_gb: float = 0.0  # that the user brings
    by_hand_estimated: bool = False
    by_hand_source: str = ""
    annotations_only: bool = False  # the fetch brings no media, and the set has some
    share: float | None = None  # of the stage's samples
    rounds: float | None = None  # how often each of its samples comes round in the stage's schedule
    media_of: str | None = None  # the set whose media it uses, where they are counted there


@dataclass(frozen=True)
class Total:
    """Sums of a plan: of the sets that a program fetches as a whole, and of those for which the user brings files."""

    automatic: int  # sets
    automatic_gb: float
    by_hand: int
    by_hand_fetched_gb: float  # their annotations
    by_hand_gb: float


def size_of(entry: DataSet, max_side: int | None = None) -> Size:
    """What a data set takes. max_side: pixels to which pictures of a list of addresses are resized."""
    known = entry.disk_gb or (None if entry.by_hand else entry.size_gb)
    visuals = int(entry.counts.get("paper_visual") or entry.examples or 0)
    rows = int(entry.counts.get("paper_annotations") or entry.examples or 0) * ROW_BYTES
    video = entry.modality == "video"
    media = 0 if entry.modality == "text" else visuals * (VIDEO_BYTES if video else IMAGE_BYTES)
    by_hand, source = 0, ""
    if entry.by_hand:
        # The stage list's sizes are those of the media. What is in an archive that disk_gb counts is fetched.
        given = entry.media_size.gb if entry.media_size else entry.size_gb
        by_hand = int(given * GB) if given else media + (rows if entry.source.kind == "manual" else 0)
        source = entry.media_size.source if entry.media_size else ""
    if entry.source.kind == "manual":
        fetched, estimated = 0, False
    elif known:
        fetched, estimated = int(known * GB), False
    else:
        fetched, estimated = rows + (0 if entry.by_hand or entry.media.kind == "render" else media), True
    if max_side and entry.media.kind == "url-list" and not video and visuals:
        share = share_left(max_side, fetched / visuals)
        fetched, estimated = int(fetched * share), estimated or share < 1
    by_hand_estimated = entry.by_hand and not (entry.media_size or entry.size_gb)
    return Size(fetched, estimated, by_hand, by_hand_estimated, source)


def measured_speed(root: Path) -> float | None:
    """Mean bytes/s of earlier fetches under this root that took a second or more; None: there was none."""
    total = seconds = 0.0
    for path in sorted((root / "raw").glob("*/fetched.json")):
        info = read_note(root, path.parent.name) or {}
        if (info.get("seconds") or 0) >= 1 and info.get("fetched_bytes"):
            total, seconds = total + info["fetched_bytes"], seconds + info["seconds"]
    return total / seconds if seconds else None


def plan_downloads(
    entries: list[DataSet],
    catalogue: Catalogue,
    root: Path,
    budget: float,
    speed: float | None,
    whole: bool = False,
    max_side: int | None = None,
    shares: dict[str, tuple[float, float]] | None = None,
) -> list[PlannedDownload]:
    """What to fetch, in order, within `budget` bytes, and why the rest is left out.

    What is there costs nothing. The rest is ordered by share of the mixture per byte: a stage's ratio, or the square
    root of its size. speed: bytes/s, None: unknown. whole: the budget is also for what the user brings. max_side: of
    `size_of`. shares: name of a set -> its share of the stage's samples, and the rounds of each of them.
    """
    ready, planned, manual = [], [], []
    damaged: set[str] = set()  # names of sets
    got: set[str] = set()  # names of sets whose media are there, or are brought before
    archives: set[str] = set()  # that are there or are fetched before; several sets may use the same

    def row(entry: DataSet, action: str, size: Size, why: str) -> PlannedDownload:
        is_there = action in ("there", "refused")
        share, times = (shares or {}).get(entry.name, (None, None))
        return PlannedDownload(
            entry.name,
            action,
            size.fetched / GB,
            size.fetched_estimated,
            size.fetched / speed if speed and action in ("fetch", "no room") else None,
            why,
            0.0 if is_there else size.by_hand / GB,
            size.by_hand_estimated,
            size.source,
            not is_there and (size.by_hand > 0 or is_counted(entry)) and not entry.disk_gb,
            share,
            times,
            None if is_there or not is_counted(entry) else entry.media_of,
        )

    def is_counted(entry: DataSet) -> bool:
        return entry.by_hand and entry.media_of in got

    def command(verb: str, entry: DataSet, *more: str) -> str:
        return download_command(verb, entry.name, *more, root=root, catalogue=entry.catalogue)

    for entry in entries:
        size, state, there = size_of(entry, max_side), state_of(entry, root), _bytes_there(root, entry)
        if entry.unsure:
            planned.append(row(entry, "refused", Size(0, False, 0, False), entry.unsure))
        elif state in ("complete", "useless", "changed"):
            why = f"changed since its fetch: {command('doctor', entry, '--deep')}" if state == "changed" else state
            planned.append(row(entry, "there", Size(there, False, 0, False), why))
            got.add(entry.name)
            archives.update(entry.media.urls)
        elif state == "damaged":
            damaged.add(entry.name)
            ready.append((entry, Size(bytes_broken(root / "raw" / entry.name), False, 0, False)))
        elif entry.source.kind == "manual" and not whole:
            manual.append((entry, size))
        else:
            ready.append((entry, replace(size, fetched=max(0, size.fetched - there))))

    def cost(size: Size) -> int:
        return size.fetched + (size.by_hand if whole else 0)

    got.update(entry.name for entry, _ in manual)
    for entry, size in manual:
        size = replace(size, by_hand=0, by_hand_estimated=False, source="") if is_counted(entry) else size
        planned.append(row(entry, "by hand", size, command("how", entry)))
    ready.sort(key=lambda item: (-_worth(item[0]) / max(cost(item[1]), 1e6), item[0].name))
    left, chosen = budget, []
    for entry, size in _after_those_of_their_media(ready):
        if is_counted(entry):
            size = replace(size, by_hand=0, by_hand_estimated=False, source="")
        shared = bool(entry.media.urls) and archives.issuperset(entry.media.urls)
        rows = int(entry.counts.get("paper_annotations") or entry.examples or 0) * ROW_BYTES
        if shared:
            size = replace(size, fetched=min(size.fetched, rows))
        elif entry.name not in damaged:
            known = sum(catalogue.archive_gb.get(url, 0) for url in archives.intersection(entry.media.urls))
            size = replace(size, fetched=max(min(size.fetched, rows), size.fetched - int(known * GB)))
        if cost(size) > left:
            planned.append(row(entry, "no room", size, f"{cost(size) / GB:,.1f} GB, {left / GB:,.1f} left"))
            continue
        left -= cost(size)
        counted = is_counted(entry)
        got.update({entry.name, entry.media_of or entry.name})
        archives.update(entry.media.urls)
        why = "annotations only; its media by hand" if entry.by_hand else ""
        why = "annotations only; another set brings its archives" if shared else why
        why = f"annotations only; its media are among those of {entry.media_of}" if counted else why
        why = "files of it are missing or have another size" if entry.name in damaged else why
        new = row(entry, "by hand" if entry.source.kind == "manual" else "fetch", size, why)
        chosen.append(new if counted else replace(new, media_of=None))
    order = {"no room": 0, "by hand": 1, "refused": 2, "there": 3}
    return chosen + sorted(planned, key=lambda item: (order[item.action], item.name))


def _after_those_of_their_media(ready: list[tuple[DataSet, Size]]) -> list[tuple[DataSet, Size]]:
    """The same order, but a set whose media are another's comes after that one."""
    place = {entry.name: number for number, (entry, _) in enumerate(ready)}
    return sorted(ready, key=lambda item: max(place[item[0].name], place.get(item[0].media_of, -1) + 0.5))


def totals(rows: list[PlannedDownload]) -> Total:
    """Sums of what is chosen: rows whose action is fetch, or by hand."""
    chosen = [row for row in rows if row.action in CHOSEN]
    automatic = [row for row in chosen if not (row.by_hand_gb or row.media_of)]
    by_hand = [row for row in chosen if row.by_hand_gb or row.media_of]
    return Total(
        len(automatic),
        sum(row.gigabytes for row in automatic),
        len(by_hand),
        sum(row.gigabytes for row in by_hand),
        sum(row.by_hand_gb for row in by_hand),
    )


def shares_of(catalogue: Catalogue, stage: int, out: Path, schedule: str = "seed") -> dict[str, tuple[float, float]]:
    """Share of a stage's samples, and rounds of each sample in its schedule, of each source of the stage's blend.

    out: holds prepared sets, whose samples are counted; of others the number is that of the catalogue, about.
    """
    steps = yaml.safe_load((CONF_DIR / "schedule" / f"{schedule}.yaml").read_text())[f"stage{stage}"]
    samples = {}
    for entry in catalogue.of_stage(stage):
        made = Provenance.read(out / entry.name / "provenance.json")
        samples[entry.name] = made.train_samples if made else entry.samples
    return rounds(blend_of(catalogue, stage), samples, steps["max_steps"] * steps["global_batch_size"])


def _worth(entry: DataSet) -> float:
    # A stage-1 set's ratio puts it before all that only later stages need.
    return 1e6 * entry.ratio if entry.ratio else math.sqrt(max(1, entry.size))


def _bytes_there(root: Path, entry: DataSet) -> int:
    """Bytes that a fetch need not download again, also after one that was stopped."""
    info = read_note(root, entry.name) or {}
    if isinstance(info.get("bytes"), int):
        return info["bytes"]
    folder = root / "raw" / entry.name
    records = [*Journal(folder / "files.jsonl", "file").records.values()]
    records += Journal(folder / "media" / "index.jsonl", "url").records.values()
    parts = sum(size_on_disk(path) for path in [*folder.glob("media/.part"), *(folder / "hub").rglob(".part")])
    return sum(record["bytes"] for record in records) + parts
