"""Whether a fetched data set is what its entry describes: some of its rows are made into samples, and the rest counted.

`tools/download.py verify NAME` shows all of it; `tools/prepare.py` refuses a set that loses too much of such a sample.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.datasets import DataSet
from molmo2_nemo.catalogue.raw import ROW_SUFFIXES, RawSource, read_rows
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.fetch.on_disk import missing_layout
from molmo2_nemo.limits import MAX_DROPPED, MAX_MOVED
from molmo2_nemo.prepare.converters import converter_of
from molmo2_nemo.prepare.converters.common import Draft, Drop
from molmo2_nemo.prepare.draft_to_sample import Dropped, pack
from molmo2_nemo.prepare.find_media import ABSENT
from molmo2_nemo.prepare.spool import converted

# Samples that are made, and rows that are read for each of them, so that they are not all about one picture or video.
SAMPLES, ROWS_A_SAMPLE = 50, 8
# Media of which some are gone; a fetch counts them, and they say nothing about the set's form.
PARTLY_GONE = ("url-list", "youtube-ids")
# Those that media/index.jsonl lists as fetched are no such media.
REMOVED = (
    "its picture or video was fetched and is no longer on disk: python tools/download.py doctor finds such, "
    "fetch --verify gets them again"
)
# What a reason is about, by a part of it.
KINDS = {
    "columns": ("no column", "another type", "unlike length", "half a character"),
    "coordinates": ("far outside", "coordinate"),
    "times": ("a clip", "seconds, and the video", "rate"),
    "layout": (
        "not on disk",
        "no longer on disk",
        "several folders",
        "several files",
        "cannot be read",
        "frames of different sizes",
        "an empty file",
    ),
}


@dataclass
class Coordinates:
    """The range of the coordinates of points as they are in the rows."""

    unit: str = "fraction"
    lowest: float | None = None  # None: there are none
    highest: float | None = None

    def add(self, draft: Draft) -> None:
        values = [float(value) for point in _points(draft) for value in point[-2:]]
        if values:
            self.unit = draft.unit
            self.lowest = min([*values, *([] if self.lowest is None else [self.lowest])])
            self.highest = max([*values, *([] if self.highest is None else [self.highest])])

    @property
    def doubt(self) -> str | None:
        """Why the unit seems to be another one, a sentence; None: nothing speaks against it."""
        if self.unit == "fraction" or self.highest is None or not 0 < self.highest <= 1:
            return None
        return (
            f"all coordinates are at most 1, as fractions are, and the unit is {self.unit}: "
            "correct `unit` in the entry of the set"
        )


@dataclass
class Sampled:
    """What became of some rows of a set; numbers are of annotations, unless they say something else."""

    rows: int = 0
    kept: int = 0
    lost: Counter = field(default_factory=Counter)  # reason -> number: what is not as expected
    left_out: Counter = field(default_factory=Counter)  # reason -> number: by a rule of the set
    gone: int = 0  # whose picture or video was not fetched: no server has it any more, or the fetch is partial
    coordinates: Coordinates = field(default_factory=Coordinates)
    points: int = 0  # of the samples
    moved: int = 0  # of these, outside of their picture, so that they were moved to its border
    samples: list[dict[str, bytes]] = field(default_factory=list)  # parts of each

    @property
    def share_lost(self) -> float:
        """Of the annotations that no rule of the set leaves out."""
        lost = sum(self.lost.values())
        return lost / max(1, lost + self.kept)

    def doubt(self, most: float) -> str | None:
        """Why the unit of the points seems to be another one, a sentence; None: nothing speaks against it.

        most: share of the points that may lie outside of their picture, if it is more than MAX_MOVED.
        """
        if self.moved <= max(MAX_MOVED, most) * self.points:
            return self.coordinates.doubt
        return (
            f"{self.moved:,} of {self.points:,} points lie outside of their picture, as those of another unit than "
            f"{self.coordinates.unit} do: correct `unit` in the entry of the set"
        )

    @property
    def reasons(self) -> str:
        return "; ".join(f"{number:,} x {reason}" for reason, number in self.lost.most_common(3))


def take(entry: dict, root: Path, wanted: int = SAMPLES, partial: bool = False) -> Sampled:
    """Make samples of rows that are spread over the first of the set, an entry of the catalogue, below root/raw.

    partial: media that were not fetched are not counted as lost. ValueError, one sentence: it cannot be read at all.
    """
    raw, found = RawSource(root, entry["name"], entry.get("catalogue")), Sampled()
    converter_of(entry)
    rows = list(islice((results for results in converted(entry, raw) if results), wanted * ROWS_A_SAMPLE))
    chosen = rows if len(rows) <= wanted else [rows[len(rows) * k // wanted] for k in range(wanted)]
    may_lack, absent = partial or entry["media"]["kind"] in PARTLY_GONE, []
    for results in chosen:
        found.rows += 1
        for result in results:
            if isinstance(result, Drop):
                (found.lost if result.unfit else found.left_out)[result.reason] += 1
            elif not _make(result, raw, found):
                absent.append(result)
    fetched = Journal(raw.folder / "media" / "index.jsonl", "url").records if absent else {}
    for draft in absent:
        if any(address in fetched and raw.media(address) is None for address in _addresses(draft)):
            found.lost[REMOVED] += len(draft.branches)
        elif may_lack:
            found.gone += len(draft.branches)
        else:
            found.lost[ABSENT] += len(draft.branches)
    return found


def _make(draft: Draft, raw: RawSource, found: Sampled) -> bool:
    """One sample, and what is to be said of its coordinates. Returns whether its picture or video is on disk."""
    found.coordinates.add(draft)
    try:
        parts, moved, unfit = pack(draft, raw)
    except Dropped as error:
        if str(error) == ABSENT:
            return False
        found.lost[str(error)] += len(draft.branches)
        return True
    found.lost.update(unfit)
    found.kept += len(draft.branches) - sum(unfit.values())
    found.points += sum(1 for _ in _points(draft))
    found.moved += moved
    found.samples.append(parts)
    return True


def _addresses(draft: Draft) -> Iterator[str]:
    """Addresses, or other names, of the pictures and videos of a draft."""
    video = draft.video
    media = [image.get("name") if isinstance(image, dict) else image for image in draft.images]
    for names in (*media, *([video.names, video.cut] if video else [])):
        names = names if isinstance(names, list) else [names]
        yield from (name for name in names if isinstance(name, str))


def _points(draft: Draft) -> Iterator[list]:
    for branch in draft.branches:
        for _, points in branch.get("points") or branch.get("frames") or []:
            yield from points


def refusal(found: Sampled, name: str, most: float, verify: str | None = None) -> str | None:
    """A sentence, if the sample of a set loses more than the share `most`, or its unit is doubted; None: neither.

    verify: the command that shows more.
    """
    if doubt := found.doubt(most):
        enough = "a larger --max-dropped" if found.coordinates.doubt is None else "--max-dropped 1"
        return f"{name} does not fit: {doubt}, or take it as it is with {enough}"
    if found.share_lost <= most:
        return None
    lost = sum(found.lost.values())
    return (
        f"{name} loses {found.share_lost:.0%} of a sample ({lost:,} of {lost + found.kept:,} annotations), more than "
        f"--max-dropped {most:g} ({found.reasons}): see {verify or download_command('verify', name)}, or take what "
        "is left with a larger --max-dropped"
    )


def report(entry: DataSet, root: Path, found: Sampled, most: float = MAX_DROPPED) -> tuple[list[str], bool]:
    """Lines about layout, columns, coordinates, times and losses, and whether the set is fit for use.

    It is if no more than the share `most` of the annotations is lost, and it has a sample, all files of its layout, and
    coordinates that may be in its unit.
    """
    raw = RawSource(root, entry.name)
    lacking, unnamed = _columns(entry, raw)
    missing = missing_layout(entry, raw.folder)
    about = {kind: Counter() for kind in (*KINDS, "other")}
    for reason, number in found.lost.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in reason for part in parts)), "other")
        about[kind][reason] += number
    said = {
        kind: [f"{number:,} x {reason}" for reason, number in counts.most_common()] for kind, counts in about.items()
    }
    said["layout"] = [*(f"nothing matches manual/{pattern}" for pattern in missing), *said["layout"]]
    there = found.coordinates
    if doubt := found.doubt(most):
        said["coordinates"].insert(0, doubt)
    notes = {"layout": [], "columns": [], "coordinates": [], "times": [], "other": []}
    if lacking:
        notes["columns"].append(f"named by the entry and not in the first rows: {', '.join(lacking)}")
    if unnamed:
        notes["columns"].append(f"not named by the entry: {', '.join(unnamed)}")
    if there.lowest is not None:
        notes["coordinates"].append(f"from {there.lowest:g} to {there.highest:g} ({there.unit})")
    if found.moved:
        notes["coordinates"].append(f"{found.moved:,} of {found.points:,} points moved to the border of their picture")
    lines = [f"{entry.name}: {found.rows:,} rows became {len(found.samples):,} samples"]
    for kind in said:
        if said[kind] or notes[kind] or kind != "other":
            what = "; ".join([*said[kind], *notes[kind]])
            lines.append(f"  {kind + ':':<13}{'DOES NOT FIT: ' if said[kind] else ''}{what or 'fits'}")
    for reason, number in found.left_out.most_common():
        lines.append(f"  left out:    {number:,} x {reason} (a rule of the set)")
    if found.gone:
        lines.append(f"  gone:        {found.gone:,} whose picture or video was not fetched")
    within = f", within --max-dropped {most:g}" if 0 < found.share_lost <= most else ""
    total = found.kept + sum(found.lost.values())
    lines.append(f"  lost:        {found.share_lost:.1%} of {total:,} annotations{within}")
    return lines, found.share_lost <= most and bool(found.samples) and not missing and not doubt


def _columns(entry: DataSet, raw: RawSource) -> tuple[list[str], list[str]]:
    """Columns that the entry names and the first rows lack, and those that they have besides."""
    seen: set[str] = set()
    for path in raw.files():
        if path.suffix.lower() in ROW_SUFFIXES:
            for row in islice(read_rows(path), ROWS_A_SAMPLE):
                seen.update(row)
            break
    named = set(entry.fields or {})
    return (sorted(named - seen), sorted(seen - named)) if seen else ([], [])
