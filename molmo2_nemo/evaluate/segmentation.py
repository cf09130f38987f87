"""Masks of what is tracked: the points that SAM 2 makes them from, and J&F of the masks that came back.

Molmo2's report gets masks from the answers' points with SAM 2. It is not part of this project: `write_prompts` writes
what it needs, and `read_masks` reads its masks, a line of JSON for each object and frame:

    {"id": ID OF THE QUESTION, "object": 1, "seconds": 0.5, "size": [height, width], "counts": "COCO's run lengths"}

J and F are those of DAVIS (Perazzi et al., CVPR 2016, sections 5.1 and 5.2; bound of the contours: that of the DAVIS
2017 evaluation, 0.008 of the diagonal). The masks of all objects of an expression are one, as in MeViS and
Ref-YouTube-VOS.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as coco
from scipy.ndimage import distance_transform_edt

from molmo2_nemo.data.points import SAME_TIME, Tracks, parse
from molmo2_nemo.data.schema import Region, Tracking
from molmo2_nemo.evaluate.samples import Samples
from molmo2_nemo.evaluate.tasks import questions
from molmo2_nemo.files import write_atomically

PROMPTS, VIDEOS = "sam2/points.jsonl", "sam2/videos"
METRICS = ("j", "f", "j_and_f")
CONTOUR_BOUND = 0.008  # of the diagonal: how far apart pixels of two contours may be
# (seconds, COCO's run-length mask {"size", "counts"}) of one expression; of several objects, each has its own.
Masks = Sequence[tuple[float, dict]]


# Measures


def region_similarity(found: np.ndarray, wanted: np.ndarray) -> float:
    """J: intersection over union of two masks, bool [H, W]; 1 if both are empty."""
    union = (found | wanted).sum()
    return float((found & wanted).sum() / union) if union else 1.0


def contour_accuracy(found: np.ndarray, wanted: np.ndarray) -> float:
    """F: of the pixels of two masks' contours, bool [H, W], those that are near the other one.

    The harmonic mean of the shares of both; 1 if neither has a contour, 0 if one of them has none.
    """
    reach = math.ceil(CONTOUR_BOUND * math.hypot(*found.shape))
    lines = contour(found), contour(wanted)
    if not all(line.any() for line in lines):
        return float(not any(line.any() for line in lines))
    precision, recall = (
        (distance_transform_edt(~other)[line] <= reach).mean() for line, other in (lines, reversed(lines))
    )
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their neighbour on the right, below, or both; bool [H, W]. An edge of the picture is
    none."""
    edged = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ edged[:-1, 1:]) | (mask ^ edged[1:, :-1]) | (mask ^ edged[1:, 1:])


def j_and_f(found: Masks, regions: Sequence[Region]) -> dict[str, float]:
    """Means over the frames that have a mask in `found` or in the label. ValueError: the masks have another size."""
    wanted = [(time, {"size": region.size, "counts": rle}) for region in regions for time, rle in region.masks]
    size = tuple(regions[0].size)
    for _, rle in found:
        if tuple(rle["size"]) != size:
            raise ValueError(f"masks of {list(rle['size'])} pixels, and the labelled ones have {list(size)}")
    times: list[float] = []
    for time in sorted(time for time, _ in [*wanted, *found]):
        if not times or time - times[-1] >= SAME_TIME:
            times.append(time)
    scores = []
    for time in times:
        pair = [_union(masks, time, size) for masks in (found, wanted)]
        if any(mask.any() for mask in pair):
            scores.append((region_similarity(*pair), contour_accuracy(*pair)))
    j, f = np.mean(scores, axis=0).tolist() if scores else (1.0, 1.0)
    return dict(zip(METRICS, (j, f, (j + f) / 2)))


def _union(masks: Masks, time: float, size: tuple[int, int]) -> np.ndarray:
    there = [rle for when, rle in masks if 0 <= when - time < SAME_TIME]
    if not there:
        return np.zeros(size, dtype=bool)
    return coco.decode(coco.merge([rle | {"counts": rle["counts"].encode()} for rle in there])).astype(bool)


# Files


def tracked(samples: Samples, records: Sequence[dict]) -> Iterator[tuple[dict, object, Tracking]]:
    """(record, what was read of its sample, task) of the answered questions about tracks that have masks."""
    for record in records:
        if "error" in record or "track" not in record["style"]:
            continue
        read = samples.read(record["index"])
        asked = next((one for one in questions(read.example, read.name) if one.id == record["id"]), None)
        if asked is not None and isinstance(asked.branch, Tracking) and asked.branch.regions:
            yield record, read, asked.branch


def write_prompts(out: Path, samples: Samples, records: Sequence[dict]) -> int:
    """OUT/sam2/points.jsonl, a line for each question, and the videos; returns how many questions there are.

    A line: id; video, a file beside the lines; start, the seconds of the video that are second 0; size, [height, width]
    in pixels; points, [{object, seconds, x, y}], x and y in pixels of that size.
    """
    lines = []
    for record, read, task in tracked(samples, records):
        video, (height, width) = read.example.video, task.regions[0].size
        file = out / VIDEOS / f"{record['index']:06d}{Path(video.part).suffix}"
        if not file.exists():
            write_atomically(file, read.parts[video.part])
        points = [
            {"object": name, "seconds": seconds, "x": x * width, "y": y * height}
            for entry in parse(record["said"])
            if isinstance(entry, Tracks)
            for seconds, objects in entry.frames
            for name, x, y in objects
        ]
        about = {"id": record["id"], "video": f"videos/{file.name}", "start": video.start, "size": [height, width]}
        lines.append(json.dumps(about | {"points": points}) + "\n")
    write_atomically(out / PROMPTS, "".join(lines))
    return len(lines)


def read_masks(file: Path) -> dict[str, list[tuple[float, dict]]]:
    """Question -> its masks. ValueError, one sentence with the number of the line: it holds no mask."""
    found = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                mask = json.loads(line)
                rle = {"size": [int(side) for side in mask["size"]], "counts": str(mask["counts"])}
                coco.decode(rle | {"counts": rle["counts"].encode()})
                found.setdefault(str(mask["id"]), []).append((float(mask["seconds"]), rle))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {number}: no mask with id, object, seconds, size and counts ({error})"
                ) from None
    return found


def add_scores(file: Path, samples: Samples, records: Sequence[dict]) -> str:
    """Put J, F and their mean into the records of tracks; returns a sentence for the table's end.

    An answer without a mask has no masks: it is scored so. ValueError: the file is damaged, or about nothing of this.
    """
    masks, number, without = read_masks(file), 0, 0
    for record, _, task in tracked(samples, records):
        found = masks.pop(record["id"], [])
        try:
            record["scores"] = record["scores"] | j_and_f(found, task.regions)
        except ValueError as error:
            raise ValueError(f"{file}: {record['id']} has {error}") from error
        number, without = number + 1, without + (not found)
    if not number:
        raise ValueError(f"--masks {file}: this evaluation has no answered question about tracks with masks")
    if masks:
        raise ValueError(f"{file} has masks of {next(iter(masks))}, which is no such question of this evaluation")
    return f"{number:,} answers have J&F by {file}, {without:,} of them without a mask"
