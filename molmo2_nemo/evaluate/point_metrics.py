"""Points and tracks of an answer against masks, or where there are none against labelled points.

Definitions: allenai/molmo2 at f3cb108, olmo/eval/evaluators.py (PointingEval, VixMoPointEval) and
object_tracking_utils.py; HOTA: arXiv 2009.07736. A point is (where, x, y): where is an image from 1 or seconds, x and y
are fractions of width and height.
"""

from collections.abc import Callable, Sequence

import numpy as np
from pycocotools import mask as coco
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from molmo2_nemo.data.points import Points, Tracks, is_same_time
from molmo2_nemo.data.schema import Region, TrackFrame
from molmo2_nemo.training.score import HIT_DISTANCE

FRAME_METRICS = ("frame_precision", "frame_recall", "frame_f1")
TRACKING_METRICS = ("hota", "det_a", "ass_a")
# Times and places of a video are compared on one scale, its length and sides being 100 (normalize_timestamps_and_points
# of the public code, which rounds them to tenths as we do).
SCALE = 100


def encode_mask(mask: np.ndarray) -> str:
    """COCO's compressed run lengths of a mask, bool [H, W]."""
    return coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode("ascii")


class Masks:
    """The masks of one thing, each decoded when it is first asked for."""

    def __init__(self, region: Region):
        self.region, self._decoded = region, {}

    def holds(self, point: tuple[float, float, float]) -> bool:
        """Whether the nearest pixel of the mask at the point's image or time is set; no mask there: no."""
        where, x, y = point
        time, counts = min(self.region.masks, key=lambda mask: abs(mask[0] - where), default=(np.inf, ""))
        if not is_same_time(time, where):
            return False
        if counts not in self._decoded:
            self._decoded[counts] = coco.decode({"size": list(self.region.size), "counts": counts.encode()})
        height, width = self.region.size
        column, row = round(x * width), round(y * height)
        return 0 <= row < height and 0 <= column < width and bool(self._decoded[counts][row, column])


def flat_points(entries: Sequence[Points | Tracks]) -> list[tuple[float, float, float]]:
    """(image or seconds, x, y) of each point, in order; tracks have none."""
    return [
        (float(where), x, y)
        for entry in entries
        if isinstance(entry, Points)
        for where, group in entry.groups
        for x, y in group
    ]


def f1(hits: int, found: int, wanted: int) -> tuple[float, float, float]:
    """Precision, recall and F1. Where nothing is wanted, 1 if nothing was found, otherwise 0."""
    if not wanted:
        return (float(not found),) * 3
    if not found or not hits:
        return 0.0, 0.0, 0.0
    precision, recall = hits / found, hits / wanted
    return precision, recall, 2 * precision * recall / (precision + recall)


def masked_points(
    found: Sequence[tuple], wanted: Sequence[tuple], regions: Sequence[Region], seconds: float | None
) -> tuple[float, float, float]:
    """Precision, recall and F1 of the points of an answer.

    The points are matched with the labelled ones so that the sum of distances is least: in pixels of the masks, or in a
    video of `seconds` by time and place, as parts of its length and sides. A point hits if it is in the mask of the one
    that it is matched with. found, wanted: see flat_points; regions: of `wanted`.
    """
    if not found or not wanted:
        return f1(0, len(found), len(wanted))
    height, width = regions[0].size
    if seconds is None:
        scale = np.array([1e6, width, height])  # points of another image are no match
        one, other = np.array(found) * scale, np.array(wanted) * scale
    else:
        scale = SCALE / np.array([max(seconds, 1e-6), 1, 1])
        one, other = (np.round(np.array(points) * scale, 1) for points in (found, wanted))
    pairs = zip(*linear_sum_assignment(cdist(one, other)))
    hits = sum(Masks(regions[column]).holds(found[row]) for row, column in pairs)
    return f1(hits, len(found), len(wanted))


# Of the points of an answer in a frame, [(object, x, y)], and the labelled ones: bool [labelled, answered].
Hits = Callable[[float, list, list], np.ndarray]


def hits_in(regions: Sequence[Region]) -> Hits:
    masks = {region.object: Masks(region) for region in regions}

    def hits(seconds: float, answered: list, labelled: list) -> np.ndarray:
        inside = [
            [name in masks and masks[name].holds((seconds, x, y)) for _, x, y in answered] for name, _, _ in labelled
        ]
        return np.array(inside, dtype=bool).reshape(len(labelled), len(answered))

    return hits


def hits_near(size: tuple[int, int]) -> Hits:
    """Where there are no masks: at most HIT_DISTANCE of the shorter side away. size: (width, height) of the video."""
    shape = np.array(size) / min(size)

    def hits(seconds: float, answered: list, labelled: list) -> np.ndarray:
        if not answered or not labelled:
            return np.zeros((len(labelled), len(answered)), dtype=bool)
        places = [np.array([point[1:] for point in points]) * shape for points in (labelled, answered)]
        return cdist(*places) <= HIT_DISTANCE

    return hits


def paired_frames(answered: Sequence[TrackFrame], labelled: Sequence[TrackFrame]) -> list[tuple[float, list, list]]:
    """(seconds, answered, labelled points) of each frame that has some, ascending. Times at most SAME_TIME apart are
    one frame; a point of an answer that is later than every label makes a frame, too."""
    frames: dict[float, tuple[list, list]] = {}
    for side, given in ((1, labelled), (0, answered)):
        for seconds, points in given:
            near = min(frames, key=lambda time: abs(time - seconds), default=None)
            if near is None or not is_same_time(near, seconds):
                near = float(seconds)
            frames.setdefault(near, ([], []))[side].extend(points)
    return [(time, *frames[time]) for time in sorted(frames) if any(frames[time])]


def frame_scores(frames: Sequence[tuple], hits: Hits, size: tuple[int, int]) -> tuple[float, float, float]:
    """Precision, recall and F1, each the mean over the frames; 1 where there are none. size: (width, height)."""
    scores = []
    for seconds, answered, labelled in frames:
        number = 0
        if answered and labelled:
            places = [np.array([point[1:] for point in points]) * size for points in (labelled, answered)]
            number = int(hits(seconds, answered, labelled)[linear_sum_assignment(cdist(*places))].sum())
        scores.append(f1(number, len(answered), len(labelled)))
    return tuple(np.mean(scores, axis=0).tolist()) if scores else (1.0, 1.0, 1.0)


def hota(frames: Sequence[tuple], hits: Hits) -> tuple[float, float, float]:
    """HOTA, DetA and AssA of tracks, where a point is on an object or is not, so that all thresholds are alike."""
    names = [list(dict.fromkeys(p[0] for frame in frames for p in frame[side])) for side in (2, 1)]
    if not all(names):
        return (float(not any(names)),) * 3
    labels, answers = ({name: index for index, name in enumerate(side)} for side in names)
    together = np.zeros((len(labels), len(answers)))
    label_counts, answer_counts, seen = np.zeros((len(labels), 1)), np.zeros((1, len(answers))), []
    for seconds, answered, labelled in frames:
        rows, columns = [labels[p[0]] for p in labelled], [answers[p[0]] for p in answered]
        similar = hits(seconds, answered, labelled).astype(float)
        shared = similar.sum(0)[None] + similar.sum(1)[:, None] - similar
        np.add.at(together, np.ix_(rows, columns), np.divide(similar, shared, where=shared > 0, out=similar * 0))
        np.add.at(label_counts, (rows, 0), 1)
        np.add.at(answer_counts, (0, columns), 1)
        seen.append((rows, columns, similar))
    alike = together / (label_counts + answer_counts - together)
    matches = np.zeros_like(together)
    for rows, columns, similar in seen:
        pairs = linear_sum_assignment(-alike[np.ix_(rows, columns)] * similar)
        for row, column in zip(*pairs):
            matches[rows[row], columns[column]] += similar[row, column]
    hit = matches.sum()
    det_a = hit / (label_counts.sum() + answer_counts.sum() - hit)
    ass_a = (matches * matches / (label_counts + answer_counts - matches)).sum() / max(1, hit)
    return float(np.sqrt(det_a * ass_a)), float(det_a), float(ass_a)
