"""Whether a fetched data set can be used: some rows are converted, one is made into a sample, media are counted."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.prepare.converters import converter_of
from molmo2_nemo.prepare.converters.common import Draft, Drop
from molmo2_nemo.prepare.draft_to_sample import Dropped, pack
from molmo2_nemo.prepare.find_media import find_frames, find_media
from molmo2_nemo.prepare.spool import MAX_USELESS_ROWS, converted
from molmo2_nemo.prepare.verify import Coordinates

# Kinds of media that are in the rows, or drawn, or whose losses the fetch itself counts.
NOT_SEARCHED = ("in-parquet", "url-list", "render", "none")
# Of how many rows the media are searched: of the first ones, and then of every 50th, until so many rows were read.
# The coordinates of points are looked at in the first ones.
FIRST, EVERY, LAST = 200, 50, 20_000


@dataclass(frozen=True)
class Trial:
    """What became of the rows that were looked at."""

    rows: int
    works: bool  # one of the first became a sample
    reason: str | None = None  # the commonest, where none did
    searched: int = 0  # annotations whose pictures or videos were looked for
    found: int = 0  # of these, those whose media are all on disk
    doubt: str | None = None  # of the unit of its points, a sentence


def try_rows(entry: dict, root: Path, most: int = MAX_USELESS_ROWS) -> Trial:
    """Look at the rows of the set, an entry of the catalogue, below root/raw, up to `most` for the first sample."""
    raw, reasons, rows, searched, found = RawSource(root, entry["name"]), Counter(), 0, 0, 0
    works, search, coordinates = False, entry["media"]["kind"] not in NOT_SEARCHED, Coordinates()
    try:
        converter_of(entry)
        for results in converted(entry, raw):
            rows += 1
            for result in results:
                if isinstance(result, Drop):
                    reasons[result.reason] += not works
                    continue
                if rows <= FIRST:
                    coordinates.add(result)
                if search and (rows <= FIRST or rows % EVERY == 0):
                    searched, found = searched + 1, found + has_media(result, raw)
                if not works:
                    works = _becomes_a_sample(result, raw, reasons)
            seen = works and not search and (coordinates.lowest is None or rows >= FIRST)
            if seen or rows == (LAST if works else most):
                break
    except (ValueError, OSError) as error:
        if not works:
            return Trial(rows, False, str(error).rstrip("."))
    if works:
        return Trial(rows, True, None, searched, found, coordinates.doubt)
    condition = raw.info.get("filter")
    none = f"no row has {condition}" if condition else "there are no rows"
    reason = reasons.most_common(1)[0][0] if reasons else "none of them is meant" if rows else none
    return Trial(rows, False, reason, searched, found)


def _becomes_a_sample(draft: Draft, raw: RawSource, reasons: Counter) -> bool:
    try:
        pack(draft, raw)
    except Dropped as error:
        reasons[str(error)] += 1
        return False
    return True


def has_media(draft: Draft, raw: RawSource) -> bool:
    """Whether all pictures, or the video, of a draft are on disk."""
    try:
        for image in draft.images:
            name = image.get("name") if isinstance(image, dict) else image
            if not isinstance(name, bytes) and not (isinstance(image, dict) and "clock" in image):
                find_media(name, raw)
        return draft.video is None or _has_video(draft.video, raw)
    except Dropped:
        return False


def _has_video(video, raw: RawSource) -> bool:
    for names, find in ((video.cut, find_media), (video.names, find_media), (video.frames, find_frames)):
        try:
            if names:
                find(names, raw)
                return True
        except Dropped:
            continue
    return False
