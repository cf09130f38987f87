"""The page of an evaluation: the table, and the worst answers first, with labelled and answered points drawn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from molmo2_nemo.ask.model import Asker
from molmo2_nemo.data.marks import Visual, draw_both
from molmo2_nemo.evaluate.samples import Read, Samples, see
from molmo2_nemo.evaluate.table import Counts, Line
from molmo2_nemo.files import write_atomically
from molmo2_nemo.templates import template

PAGE, PICTURES = "index.html", "pictures"
PICTURE_SIDE = 420  # pixels of the longer side of a picture


def worst_first(records: Sequence[dict], most: int) -> list[dict]:
    """Questions without an answer, then by their mean score, then those without one."""

    def place(record: dict) -> tuple:
        scores = record.get("scores", {})
        return ("error" not in record, np.mean(list(scores.values())) if scores else 2.0, record["id"])

    return sorted(records, key=place)[:most]


def write_page(
    out: Path,
    samples: Samples,
    asker: Asker,
    records: Sequence[dict],
    table: Sequence[Line],
    counts: Counts,
    settings: dict,
    most: int,
) -> Path:
    """OUT/index.html and the pictures of the `most` worst answers. OSError: they cannot be written."""
    (out / PICTURES).mkdir(exist_ok=True)
    shown = []
    for number, record in enumerate(worst_first(records, most)):
        picture = _picture(samples.read(record["index"]), asker, record)
        if picture is not None:
            picture.save(out / PICTURES / f"{number:04d}.jpg", quality=90)
        shown.append(record | {"picture": f"{PICTURES}/{number:04d}.jpg" if picture is not None else None})
    page = template(Path(__file__).parent / "page.html").render(
        settings=settings, table=table, counts=counts, records=shown, number=len(records)
    )
    write_atomically(out / PAGE, page.encode(errors="replace"))
    return out / PAGE


def _picture(read: Read, asker: Asker, record: dict) -> Image.Image | None:
    """None: the sample is broken, or is text alone."""
    if read.example is None:
        return None
    try:
        seen = see(read, asker)
    except ValueError:
        return None
    example, drawn = read.example, []
    for number, visual in enumerate(seen.visuals):
        size = example.video or example.images[number]
        scale = PICTURE_SIDE / max(size.width, size.height)
        picture = Image.fromarray(visual.crops[0])
        picture = picture.resize((max(1, round(size.width * scale)), max(1, round(size.height * scale))))
        drawn.append(Visual([np.asarray(picture)], visual.seconds))
    return draw_both(drawn, record.get("label", ""), record.get("said", ""))
