"""Whether a fetched data set can be used: the first of its rows are made into samples, until one is."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.prepare.converters import converter_of
from molmo2_nemo.prepare.converters.common import Drop
from molmo2_nemo.prepare.draft_to_sample import Dropped, pack
from molmo2_nemo.prepare.spool import MAX_USELESS_ROWS, converted


@dataclass(frozen=True)
class Trial:
    """What became of the first rows."""

    rows: int  # that were looked at
    works: bool  # one of them became a sample
    reason: str | None = None  # the commonest, where none did


def try_rows(entry: dict, root: Path, most: int = MAX_USELESS_ROWS) -> Trial:
    """Look at up to `most` rows of the set, an entry of the catalogue, below root/raw."""
    raw, reasons, rows = RawSource(root, entry["name"]), Counter(), 0
    try:
        converter_of(entry)
        for results in converted(entry, raw):
            rows += 1
            for result in results:
                if isinstance(result, Drop):
                    reasons[result.reason] += 1
                    continue
                try:
                    pack(result, raw)
                except Dropped as error:
                    reasons[str(error)] += 1
                else:
                    return Trial(rows, True)
            if rows == most:
                break
    except (ValueError, OSError) as error:
        return Trial(rows, False, str(error).rstrip("."))
    reason = reasons.most_common(1)[0][0] if reasons else "there are no rows" if not rows else "none of them is meant"
    return Trial(rows, False, reason)
