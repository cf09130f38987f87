"""Scores of an answer to a held-out question against its label: points, counts, exact match.

Definitions after public allenai/molmo2's evaluators and arXiv 2601.10611, appendix. Those test points against masks;
training data have none, so a point hits the labelled point that it is matched with if it is near enough.
"""

import re
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from molmo2_nemo.config.schema import METRICS, POINT_METRICS, TRACK_METRICS
from molmo2_nemo.data.points import SAME_TIME, Points, Tracks, parse
from molmo2_nemo.data.tasks import (
    COUNT_ONLY,
    COUNT_THEN_POINTS,
    POINTS_ONLY,
    POINTS_THEN_COUNT,
    TRACK_ALL,
    TRACK_ENDS,
    TRACK_ONE,
)

# Of a picture's shorter side: how far from a labelled point an answer's may be. In the sample world (shorter sides of
# 84 and 140 pixels) that is less than the radius of the smallest shape, 11 pixels.
HIT_DISTANCE = 0.075
# Words of a label: no exact match can be expected of a longer one, so it gets no score.
MAX_EXACT_WORDS = 10

POINTING = POINTS_ONLY | POINTS_THEN_COUNT | COUNT_THEN_POINTS
COUNTING = COUNT_ONLY | POINTS_THEN_COUNT | COUNT_THEN_POINTS
TRACKING = TRACK_ALL | TRACK_ENDS | TRACK_ONE
# An answer is right if those of these that it has are 1.
DECISIVE = ("point_f1", "track_f1", "count_exact", "exact_match")


def score(
    style: str, label: str, answer: str, sizes: Sequence[tuple[int, int]] = (), seconds: float | None = None
) -> dict[str, float]:
    """Metric -> value from 0 to 1; empty for captions and long texts, which have no score.

    sizes: (width, height) of each image in pixels, or of the video. seconds: length of a video; None: images.
    """
    if "caption" in style or "transcript" in style:
        return {}
    labelled, found = parse(label), {}
    if style in TRACKING or any(isinstance(entry, Tracks) for entry in labelled):
        found |= dict(zip(TRACK_METRICS, point_scores(parse(answer), labelled, sizes, seconds)))
    elif style in POINTING or labelled:
        found |= dict(zip(POINT_METRICS, point_scores(parse(answer), labelled, sizes, seconds)))
    if style in COUNTING:
        said, right = count_of(answer, style), count_of(label, style)
        if right is not None:
            found["count_exact"] = float(said == right)
            found["count_close"] = float(said is not None and abs(said - right) <= 1 + right // 20)
    if not found and len(normalised(label).split()) <= MAX_EXACT_WORDS:
        found["exact_match"] = float(normalised(answer) == normalised(label))
    return found


def is_right(scores: dict[str, float]) -> bool | None:
    """Whether nothing is missing or wrong; None for an answer without a score."""
    decisive = [scores[name] for name in DECISIVE if name in scores]
    return min(decisive) == 1 if decisive else None


def normalised(text: str) -> str:
    """Lower case, single spaces, no punctuation or quotes around it; of an explained answer what follows "Answer:"."""
    return " ".join(text.rpartition("Answer:")[2].lower().split()).strip(" .,;:!?\"'")


def count_of(text: str, style: str) -> int | None:
    """How many points there are in it, whatever number it states. Where points are not asked for, and none given, the
    first number; 0 for "There are none."; None: no number."""
    points = sum(len(group) for entry in parse(text) if isinstance(entry, Points) for _, group in entry.groups)
    if points or style not in COUNT_ONLY:
        return points
    number = re.search(r"\d{1,9}", text)
    return int(number[0]) if number else 0 if "there are none" in text.lower() else None


def point_scores(
    predicted: list[Points | Tracks],
    labelled: list[Points | Tracks],
    sizes: Sequence[tuple[int, int]],
    seconds: float | None,
) -> tuple[float, float, float]:
    """Precision, recall and F1 of the points in `points.parse`'s results.

    Points of an image, and those of tracks in a frame, are matched with its labelled points so that the sum of the
    distances is least. Points of a video are matched over all of it, by distance in time (as a part of its length), x
    and y. A matched point hits if it is in the same image, or frame, and at most HIT_DISTANCE away. Where nothing is
    labelled all are 1 if nothing is predicted, too, otherwise 0.
    """
    found, wanted = _flat(predicted), _flat(labelled)
    if not len(wanted):
        return (float(not len(found)),) * 3
    if not len(found):
        return 0.0, 0.0, 0.0
    is_video = seconds is not None
    if is_video and not any(isinstance(entry, Tracks) for entry in labelled):
        hits = _hits(found, wanted, sizes, max(seconds, 1e-6))
    else:
        hits = 0
        for where in np.unique(wanted[:, 0]):
            hits += _hits(*(points[abs(points[:, 0] - where) < SAME_TIME] for points in (found, wanted)), sizes, None)
    precision, recall = hits / len(found), hits / len(wanted)
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def _flat(entries: list[Points | Tracks]) -> np.ndarray:
    """float64 [n, 3]: image or seconds, x, y as fractions."""
    points = []
    for entry in entries:
        groups = entry.groups if isinstance(entry, Points) else entry.frames
        points += [(where, *point[-2:]) for where, group in groups for point in group]
    return np.array(points, dtype=np.float64).reshape(-1, 3)


def _hits(found: np.ndarray, wanted: np.ndarray, sizes: Sequence[tuple[int, int]], seconds: float | None) -> int:
    """seconds: the length that times are a part of; None: all points are in one picture."""
    # All points that can hit lie in pictures of the labelled points, whose sizes are known.
    number = int(wanted[0, 0]) if seconds is None and len(sizes) > 1 else 1
    width, height = sizes[number - 1] if 1 <= number <= len(sizes) else (1, 1)
    shape = np.array([width, height]) / min(width, height)
    apart = np.linalg.norm((found[:, None, 1:] - wanted[None, :, 1:]) * shape, axis=-1)
    times = abs(found[:, None, 0] - wanted[None, :, 0])
    cost = apart if seconds is None else np.hypot(apart, times / seconds)
    rows, columns = linear_sum_assignment(cost)
    return int(((apart <= HIT_DISTANCE) & (times < SAME_TIME))[rows, columns].sum())


def means(scores: Sequence[dict[str, float]], sources: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metric -> mean over the answers that have it, of "all" and of each source."""
    result = {}
    for metric in METRICS:
        by_source = {"all": []}
        for one, source in zip(scores, sources):
            if metric in one:
                by_source["all"].append(one[metric])
                by_source.setdefault(source, []).append(one[metric])
        if by_source["all"]:
            result[metric] = {source: sum(values) / len(values) for source, values in by_source.items()}
    return result
