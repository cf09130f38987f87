"""Means of scores with 95 % confidence intervals, and the comparison of two models on the same questions.

Answers about one picture are not independent. So where samples have several questions, samples are drawn for the
intervals, with all their questions, and not questions.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE, DRAWS = 0.95, 2000


@dataclass
class Line:
    """The mean of a metric over the answers of a source ("all": of all sources) that have it."""

    metric: str
    source: str
    mean: float
    low: float
    high: float
    number: int  # of answers
    method: str  # of the interval: wilson or bootstrap


@dataclass
class Counts:
    """What became of the questions; nothing is left out."""

    questions: int
    scored: int
    without_metric: int
    empty: int  # of the answered ones
    cut: int  # of the answered ones, at the most tokens
    names_no_option: int  # of the answered ones: scored by the option that is nearest in its letters
    errors: dict[str, int]  # why there is no answer -> questions, the commonest first

    @property
    def failed(self) -> int:
        return sum(self.errors.values())


def counts(records: Sequence[dict]) -> Counts:
    answered = [record for record in records if "error" not in record]
    return Counts(
        len(records),
        sum(bool(record["scores"]) for record in answered),
        sum(not record["scores"] for record in answered),
        sum(not record["said"] for record in answered),
        sum(record.get("cut", False) for record in answered),
        sum(record.get("names_no_option", False) for record in answered),
        dict(Counter(record["error"] for record in records if "error" in record).most_common()),
    )


def lines(records: Sequence[dict]) -> list[Line]:
    """Of each metric and source, first over all sources."""
    by_metric: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for record in records:
        for metric, value in record.get("scores", {}).items():
            for source in ("all", record["source"]):
                by_metric.setdefault(metric, {}).setdefault(source, []).append((record["sample"], value))
    found = []
    for metric, sources in by_metric.items():
        if len(sources) == 2:  # "all" is the only one
            sources.pop("all")
        for source, scored in sources.items():
            values = [value for _, value in scored]
            low, high, method = interval(scored)
            found.append(Line(metric, source, float(np.mean(values)), low, high, len(values), method))
    return found


def interval(scored: Sequence[tuple[str, float]]) -> tuple[float, float, str]:
    """(low, high, method) of the mean of (sample, score) pairs.

    Wilson's interval of a share, where every score is 0 or 1 and every sample has one, or where the samples' means do
    not vary, as those of one sample, of which a bootstrap says nothing: then of as many as there are samples, and wide
    enough, since no scores from 0 to 1 vary more than those that are either. Otherwise the percentile bootstrap over
    samples.
    """
    samples, values = [sample for sample, _ in scored], [value for _, value in scored]
    sums, numbers = _by_sample(samples, values)
    is_share = set(values) <= {0.0, 1.0} and len(sums) == len(values)
    if is_share or np.ptp(sums / numbers) == 0:
        return *_wilson(float(np.mean(values)), len(sums)), "wilson"
    return *_bootstrap(sums, numbers), "bootstrap"


def _wilson(share: float, number: int) -> tuple[float, float]:
    """Wilson's interval of a share of `number` (E. B. Wilson, 1927, without a correction for continuity)."""
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _by_sample(samples: Sequence[str], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of a sample's scores, and their number."""
    _, which = np.unique(np.array(samples), return_inverse=True)
    return np.bincount(which, values), np.bincount(which)


def _bootstrap(sums: np.ndarray, numbers: np.ndarray) -> tuple[float, float]:
    if len(sums) == 1 or np.ptp(sums / numbers) == 0:  # nothing varies
        mean = float(sums.sum() / numbers.sum())
        return mean, mean
    found = stats.bootstrap(
        (sums, numbers),
        lambda one, other, axis: one.sum(axis) / other.sum(axis),
        paired=True,
        confidence_level=CONFIDENCE,
        n_resamples=DRAWS,
        method="percentile",
        rng=np.random.default_rng(0),
        vectorized=True,
        batch=100,
    ).confidence_interval
    return float(found.low), float(found.high)


def text(found: Sequence[Line]) -> str:
    """The table for a terminal."""
    rows = [("metric", "source", "mean", "95 % interval", "answers", "")]
    for line in found:
        between = f"{line.low:.3f} to {line.high:.3f}"
        rows.append((line.metric, line.source, f"{line.mean:.3f}", between, f"{line.number:,}", line.method))
    return columns(rows, "llrrrl")


def columns(rows: Sequence[Sequence[str]], sides: str) -> str:
    """sides: l or r for each column."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if side == "l" else cell.rjust(width) for cell, width, side in zip(row, widths, sides)
        ).rstrip()
        for row in rows
    )


# Two models


@dataclass
class Difference:
    """B less A, of a metric over the questions that both have answered."""

    metric: str
    source: str
    first: float
    second: float
    low: float
    high: float
    p: float
    number: int
    test: str  # mcnemar or permutation


def compare(first: Sequence[dict], second: Sequence[dict]) -> tuple[list[Difference], int]:
    """The differences, and how many questions only one of them has a score for.

    Tests are paired and two-sided: McNemar's exact one where every score is 0 or 1 and every sample has one question,
    otherwise signs of the samples' differences are flipped at random. ValueError: the questions are not the same.
    """
    one, other = ({record["id"]: record for record in records} for records in (first, second))
    if not one.keys() & other.keys():
        raise ValueError("the two evaluations have no question in common: they are of different data")
    for name in one.keys() & other.keys():
        for what in ("question", "label"):
            if one[name].get(what) != other[name].get(what) and what in one[name] and what in other[name]:
                raise ValueError(f"{name} has another {what} in the second evaluation: compare runs on the same data")
    groups: dict[tuple[str, str], list[tuple[str, float, float]]] = {}
    unpaired = len(one.keys() ^ other.keys())
    for name in sorted(one.keys() & other.keys()):
        scores = [records[name].get("scores", {}) for records in (one, other)]
        unpaired += scores[0].keys() != scores[1].keys()
        for metric in [name for name in scores[0] if name in scores[1]]:
            pair = (one[name]["sample"], scores[0][metric], scores[1][metric])
            for source in ("all", one[name]["source"]):
                groups.setdefault((metric, source), []).append(pair)
    sources_of = Counter(metric for metric, _ in groups)  # "all" is one of them
    return [
        _difference(metric, source, pairs)
        for (metric, source), pairs in groups.items()
        if sources_of[metric] > 2 or source != "all"
    ], unpaired


def _difference(metric: str, source: str, pairs: Sequence[tuple[str, float, float]]) -> Difference:
    samples = [sample for sample, *_ in pairs]
    first, second = (np.array([pair[side] for pair in pairs]) for side in (1, 2))
    sums, numbers = _by_sample(samples, second - first)
    low, high = _bootstrap(sums, numbers)
    if len(sums) == len(pairs) and set(first) | set(second) <= {0.0, 1.0}:
        better, changed = int((second > first).sum()), int((second != first).sum())
        p, test = (stats.binomtest(better, changed).pvalue if changed else 1.0), "mcnemar"
    else:
        p, test = _flipped_signs(sums), "permutation"
    return Difference(metric, source, float(first.mean()), float(second.mean()), low, high, float(p), len(pairs), test)


def _flipped_signs(sums: np.ndarray) -> float:
    if not sums.any():
        return 1.0
    if len(sums) == 1:
        return 1.0  # a sign and its opposite are all there is
    found = stats.permutation_test(
        (sums, np.zeros_like(sums)),
        lambda one, other, axis: (one - other).mean(axis),
        permutation_type="samples",
        n_resamples=DRAWS,
        vectorized=True,
        batch=100,
        rng=np.random.default_rng(0),
    )
    return found.pvalue


def text_of_differences(found: Sequence[Difference]) -> str:
    rows = [("metric", "source", "A", "B", "B - A", "95 % interval", "p", "answers", "test")]
    for line in found:
        between = f"{line.low:+.3f} to {line.high:+.3f}"
        means = (f"{line.first:.3f}", f"{line.second:.3f}", f"{line.second - line.first:+.3f}")
        rows.append((line.metric, line.source, *means, between, f"{line.p:.3f}", f"{line.number:,}", line.test))
    return columns(rows, "llrrrrrrl")
