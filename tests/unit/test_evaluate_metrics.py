"""Metrics of evaluations against other implementations (TrackEval, TorchMetrics) and tables made by hand."""

import json

import numpy as np
import pytest
from scipy import stats

from molmo2_nemo.data.points import parse
from molmo2_nemo.data.schema import Region, read_example
from molmo2_nemo.evaluate import point_metrics, table, tasks, text_metrics

# -- texts ------------------------------------------------------------------------------------------------------------


def test_edit_distance_is_that_of_torchmetrics():
    from torchmetrics.functional.text import edit_distance

    rng = np.random.default_rng(0)
    pairs = [["".join(rng.choice(list("abc "), rng.integers(0, 9))) for _ in range(2)] for _ in range(60)]
    expected = edit_distance([one for one, _ in pairs], [other for _, other in pairs], reduction="none")
    assert [text_metrics.edit_distance(*pair) for pair in pairs] == [int(number) for number in expected]


@pytest.mark.parametrize(
    "said, right, score",
    [
        ("Paris", ["paris"], 1.0),
        ("Answer: Paris", ["paris"], 1.0),
        ("Pariss", ["Paris", "Rome"], 1 - 1 / 6),
        ("Rome", ["Rom", "Romes"], 1 - 1 / 5),  # the best of 3/4 and 4/5
        ("abcd", ["abxy"], 0.0),  # a distance of a half is none
        ("", ["Paris"], 0.0),
    ],
)
def test_anls(said, right, score):
    assert text_metrics.anls(said, right) == pytest.approx(score)


@pytest.mark.parametrize(
    "said, right, score",
    [
        ("105", ["100"], 1),
        ("95", ["100"], 1),
        ("106", ["100"], 0),
        ("10.5%", ["10%"], 1),
        ("0.1", ["10%"], 1),
        ("10", ["10%"], 0),
        ("0.01", ["0"], 0),
        ("0", ["0"], 1),
        ("-95", ["-100"], 1),
        ("Red", ["red"], 1),
        ("red and blue", ["red"], 0),
        ("7", ["red", "7.2"], 1),
    ],
)
def test_relaxed_accuracy_of_charts(said, right, score):
    assert text_metrics.relaxed(said, right) == score


@pytest.mark.parametrize(
    "said, right, score",
    [
        ("dog", ["dog"] * 2 + ["cat"] * 8, 2 / 3),
        ("dog", ["dog"] * 3 + ["cat"] * 7, 1.0),
        ("The dog.", ["dog"] * 10, 1.0),
        ("two", ["2"] * 4, 1.0),
        ("none", ["0"] * 4, 1.0),
        ("dont", ["don't"] * 4, 1.0),
        ("1,000", ["1000"] * 4, 1.0),
        ("red/blue", ["red blue"] * 4, 1.0),
        ("yes, it is", ["yes it is"] * 4, 1.0),
        ("3.5", ["3.5"] * 4, 1.0),
        ("3.5", ["35"] * 4, 0.0),
        ("", ["dog"] * 10, 0.0),
        ("dog", ["dog"], 1.0),
    ],
)
def test_soft_score_of_vqa(said, right, score):
    assert text_metrics.vqa_score(said, right) == pytest.approx(score)


@pytest.mark.parametrize(
    "said, index",
    [
        ("B. red", 1),
        ("b", 1),
        ("B", 1),
        ("B. red, since it is", 1),
        ("green", 2),
        ("blu", 0),
        ("D. grean", 2),
        ("(B)", 1),
        ("**B**", 1),
        ("B:", 1),
        ("The answer is B.", 1),
        ("Option C", 2),
        ("a", 0),
        ("", None),
    ],
)
def test_the_option_that_an_answer_means(said, index):
    options = ["A. blue", "B. red", "C. green"]
    assert text_metrics.chosen(said, options) == index
    assert text_metrics.named(said, options) == (None if said == "D. grean" else index)


def test_an_answer_that_names_no_option_is_marked():
    branch = {"task": "multiple_choice", "question": "Which?", "options": ["blue", "red"], "answer": 1}
    [asked] = tasks.questions(read_example(json.dumps({"branches": [branch]})), "s/0")
    said = {"B": False, "red": False, "B. red": False, "rod": True, "": False}
    assert {answer: tasks.names_no_option(asked, answer) for answer in said} == said
    [question] = tasks.questions(
        read_example(json.dumps({"branches": [{"task": "question", "question": "?", "answers": ["a"]}]})), "s/0"
    )
    assert not tasks.names_no_option(question, "rod")


# -- points -----------------------------------------------------------------------------------------------------------


def region(*boxes, size=(10, 20), where=1.0, name=None) -> Region:
    """Masks of boxes (left, top, right, bottom) in pixels."""
    mask = np.zeros(size, dtype=bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return Region(size, [(where, point_metrics.encode_mask(mask))], name)


def test_points_hit_the_mask_of_the_thing_that_they_are_matched_with():
    left, right = region((0, 0, 5, 10)), region((15, 0, 20, 10))
    wanted = [(1.0, 0.1, 0.5), (1.0, 0.9, 0.5)]

    def scores(text):
        found = point_metrics.flat_points(parse(text))
        return point_metrics.masked_points(found, wanted, [left, right], None)

    assert scores('<points coords="1 1 100 900 2 900 100">x</points>') == (1, 1, 1)
    assert scores('<points coords="1 1 100 900">x</points>') == pytest.approx((1, 0.5, 2 / 3))
    # Two on one thing: one of them is matched with the other thing.
    assert scores('<points coords="1 1 100 900 2 110 100">x</points>') == pytest.approx((0.5, 0.5, 0.5))
    assert scores('<points coords="1 1 100 900 2 900 100 3 500 500">x</points>') == pytest.approx((2 / 3, 1, 0.8))
    assert scores("There are none.") == (0, 0, 0)
    assert scores('<points coords="2 1 100 900">x</points>') == (0, 0, 0)  # of another image
    assert point_metrics.masked_points([], [], [], None) == (1, 1, 1)
    # The nearest pixel counts: 0.225 * 20 = 4.5 is rounded to the even 4, 0.24 * 20 = 4.8 to 5, outside.
    assert point_metrics.Masks(left).holds((1.0, 0.225, 0.5)) and not point_metrics.Masks(left).holds((1.0, 0.24, 0.5))
    assert not point_metrics.Masks(right).holds((1.0, 1.0, 0.5))  # pixel 20 of 20


def test_points_of_a_video_hit_in_any_frame_that_has_a_mask_of_their_thing():
    both = region((0, 0, 5, 10), where=1.0)
    both.masks.append((1.5, region((5, 0, 10, 10)).masks[0][1]))
    wanted = [(1.0, 0.1, 0.5)]
    for point, hit in (((1.0, 0.1, 0.5), 1), ((1.5, 0.4, 0.5), 1), ((1.5, 0.1, 0.5), 0), ((2.0, 0.1, 0.5), 0)):
        assert point_metrics.masked_points([point], wanted, [both], 10.0)[2] == hit
    # Time counts in the matching: the late point belongs to the late thing, though it is nearer to the early one.
    early, late = region((0, 0, 10, 10), where=0.0), region((0, 0, 20, 10), where=9.0)
    scores = point_metrics.masked_points(
        [(9.0, 0.2, 0.5), (0.0, 0.3, 0.5)], [(0.0, 0.2, 0.5), (9.0, 0.6, 0.5)], [early, late], 10.0
    )
    assert scores == (1, 1, 1)


# Frames (labelled objects, answered objects, which of them match), and HOTA, DetA and AssA at a threshold of a half by
# TrackEval 1.3.0 (trackeval.metrics.hota), which is not installed with the tests because it needs OpenCV.
HOTA_CASES = [
    (
        [
            ([0, 1, 2], [0, 1, 2], [[1, 1, 0], [1, 1, 0], [1, 0, 0]]),
            ([1, 2], [0, 1, 2], [[0, 1, 1], [0, 0, 1]]),
            ([0, 1, 2], [0, 1, 2], [[0, 1, 0], [1, 0, 0], [1, 0, 0]]),
            ([0, 2], [0, 2], [[0, 1], [1, 1]]),
        ],
        (0.504558, 0.615385, 0.41369),
    ),
    (
        [
            ([0, 1, 2], [0, 1, 2], [[0, 1, 1], [0, 0, 0], [0, 1, 0]]),
            ([0, 2], [0, 2], [[0, 1], [1, 1]]),
            ([0, 1], [0, 1, 2], [[0, 0, 0], [1, 0, 0]]),
            ([0, 1, 2], [0, 1, 2], [[0, 0, 1], [1, 1, 1], [0, 0, 1]]),
        ],
        (0.460331, 0.5, 0.42381),
    ),
    (
        [
            ([0, 1, 2], [0, 1, 2], [[0, 1, 1], [1, 1, 1], [0, 0, 0]]),
            ([0], [0], [[1]]),
            ([0, 1, 2], [0, 1, 2], [[0, 1, 1], [1, 0, 1], [1, 0, 1]]),
            ([0, 1, 2], [1, 2], [[1, 1], [1, 0], [0, 1]]),
        ],
        (0.633652, 0.727273, 0.552083),
    ),
    (
        [
            ([0, 1, 2], [0, 1, 2], [[0, 1, 0], [1, 0, 0], [0, 1, 1]]),
            ([0, 2], [0, 1, 2], [[0, 1, 1], [0, 1, 0]]),
            ([0, 1, 2], [1], [[1], [1], [0]]),
            ([0, 1, 2], [1, 2], [[0, 0], [1, 0], [0, 0]]),
        ],
        (0.366775, 0.428571, 0.313889),
    ),
    (
        [
            ([0, 1, 2], [0, 1, 2], [[1, 1, 0], [1, 0, 0], [0, 1, 1]]),
            ([1, 2], [0, 1, 2], [[1, 0, 0], [1, 0, 1]]),
            ([0, 1, 2], [1, 2], [[1, 0], [0, 0], [1, 0]]),
            ([1, 2], [0, 1, 2], [[0, 0, 1], [0, 0, 0]]),
        ],
        (0.431734, 0.5, 0.372789),
    ),
]


@pytest.mark.parametrize("steps, expected", HOTA_CASES)
def test_hota_is_that_of_trackeval(steps, expected):
    frames = [
        (float(time), [(name, 0, 0) for name in answered], [(name, 0, 0) for name in labelled])
        for time, (labelled, answered, _) in enumerate(steps)
    ]
    found = point_metrics.hota(frames, lambda seconds, *_: np.array(steps[int(seconds)][2], dtype=bool))
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rate", [1, 2, 3, 4, 5, 6, 8])
def test_times_of_an_answer_are_those_of_the_label_at_any_rate(rate):
    """An answer has tenths of a second: 0.75 is written as 0.8."""
    times = [number / rate for number in range(2 * rate)]
    masks = [(time, point_metrics.encode_mask(np.ones((2, 4), dtype=bool))) for time in times]
    there = point_metrics.Masks(Region((2, 4), masks))
    written = [float(f"{time:.1f}") for time in times]
    frames = point_metrics.paired_frames(
        [(time, [("1", 0.1, 0.1)]) for time in written], [(time, [("1", 0.1, 0.1)]) for time in times]
    )
    assert len(frames) == len(times) and all(answered and labelled for _, answered, labelled in frames)
    assert all(there.holds((time, 0.1, 0.1)) for time in written)


def test_frames_of_tracks():
    example = {
        "video": {"part": "v.mp4", "width": 20, "height": 10, "duration": 4.0},
        "branches": [
            {
                "task": "tracking",
                "label": "cat",
                "fps": 1.0,
                "style": "video_point_track_per_frame",
                "frames": [[0.0, [["a", 0.1, 0.5], ["b", 0.9, 0.5]]], [1.0, [["a", 0.1, 0.5]]]],
                "regions": [
                    {
                        "size": [10, 20],
                        "masks": [[t, region((0, 0, 5, 10)).masks[0][1]] for t in (0, 1)],
                        "object": "a",
                    },
                    {"size": [10, 20], "masks": [[0, region((15, 0, 20, 10)).masks[0][1]]], "object": "b"},
                ],
            }
        ],
    }
    example = read_example(json.dumps(example))
    (asked,) = tasks.questions(example, "s/k")

    def scores(coords):
        return tasks.score_of(asked, example, f'<tracks coords="{coords}">cat</tracks>')

    right = scores("0.0 1 100 500 2 900 500;1.0 1 100 500")
    assert right == dict.fromkeys((*point_metrics.TRACKING_METRICS, *point_metrics.FRAME_METRICS), 1.0)
    # The first frame has one of two, the second is right, and there is a third that should not be.
    wrong = scores("0.0 1 100 500;1.0 1 100 500;2.0 1 100 500")
    assert wrong["frame_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert wrong["frame_precision"] == pytest.approx(2 / 3) and wrong["frame_recall"] == pytest.approx(1.5 / 3)
    # HOTA: two hits of three labels and three points; the one track matched covers 2 of its 3 and all 2 of its label.
    assert wrong["det_a"] == pytest.approx(2 / 4) and wrong["ass_a"] == pytest.approx(2 / 3)
    # Tracks that change their names in the middle are as good in each frame, and not as tracks.
    swapped = scores("0.0 1 100 500 2 900 500;1.0 2 100 500")
    assert swapped["frame_f1"] == 1.0 and swapped["hota"] < 0.9


# -- tables -----------------------------------------------------------------------------------------------------------


def record(number, score, metric="exact_match", sample=None, **more):
    sample = f"s/{number}" if sample is None else sample
    return {"id": f"s/{number}", "sample": sample, "source": "s", "said": "x", "scores": {metric: score}, **more}


def test_intervals_are_wilson_of_shares_and_bootstrap_over_samples_otherwise():
    (line,) = table.lines([record(i, float(i < 8)) for i in range(10)])
    assert (line.mean, line.number, line.method) == (0.8, 10, "wilson")
    # Newcombe's form of Wilson's interval, by hand: (p + z^2/2n -+ z sqrt(p q / n + z^2 / 4 n^2)) / (1 + z^2 / n).
    z, n, p = stats.norm.ppf(0.975), 10, 0.8
    middle, half = p + z * z / 2 / n, z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert (line.low, line.high) == pytest.approx(
        ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
    )
    # Ten questions about each of four pictures that all go the same way are four observations, and not forty.
    several = [record(i, float(i < 20), sample=f"s/{i // 10}") for i in range(40)]
    (line,) = table.lines(several)
    assert line.method == "bootstrap" and line.low <= 0.1 and line.high >= 0.9
    (line,) = table.lines([record(i, 0.0, sample=f"s/{i // 10}") for i in range(40)])
    assert line.method == "wilson" and line.low == 0 and line.high > 0.4  # of four, not of forty
    # One answer, or two alike, of a score between: a bootstrap would be sure of it.
    for values, least in (([0.2], 0.7), ([0.2, 0.2], 0.6)):
        (line,) = table.lines([record(i, value, "anls") for i, value in enumerate(values)])
        assert line.method == "wilson" and line.low < 0.2 < line.high and line.high - line.low > least
    (line,) = table.lines([record(i, value) for i, value in enumerate(np.linspace(0, 1, 50))])
    error = np.linspace(0, 1, 50).std() / np.sqrt(50)
    assert (line.low, line.high) == pytest.approx((0.5 - 1.96 * error, 0.5 + 1.96 * error), abs=0.02)


def test_paired_tests():
    one = [record(i, float(i < 10)) for i in range(20)]
    other = [record(i, float(2 <= i < 18)) for i in range(20)]  # 8 better, 2 worse
    ((line,), unpaired) = table.compare(one, other)
    assert (line.test, line.first, line.second, unpaired) == ("mcnemar", 0.5, 0.8, 0)
    assert line.p == pytest.approx(2 * sum(stats.binom.pmf(k, 10, 0.5) for k in range(3)))
    assert line.low < 0.3 < line.high
    # Of four differences of one sign, 2 of 16 sign patterns are as large.
    graded = [[record(i, value, "anls") for i, value in enumerate(values)] for values in ([0.1] * 4, [0.6] * 4)]
    ((line,), _) = table.compare(*graded)
    assert line.test == "permutation" and line.p == pytest.approx(2 / 16)
    ((line,), unpaired) = table.compare(one, other[:15])
    assert line.number == 15 and unpaired == 5
    with pytest.raises(ValueError, match="no question in common"):
        table.compare(one, [record(99, 1.0)])
    with pytest.raises(ValueError, match="another question"):
        table.compare([record(1, 1.0, question="a")], [record(1, 1.0, question="b")])
    with pytest.raises(ValueError, match="another label in the second evaluation"):
        table.compare([record(1, 1.0, label="a")], [record(1, 1.0, label="b")])


def test_nothing_is_dropped_in_silence():
    records = [record(1, 1.0), record(2, 0.0, cut=True) | {"said": ""}, record(3, 0.0) | {"scores": {}}]
    records[0]["names_no_option"] = True
    records.append({"id": "s/4", "sample": "s/4", "source": "s", "error": "broken"})
    counts = table.counts(records)
    assert (counts.questions, counts.scored, counts.without_metric, counts.empty, counts.cut) == (4, 2, 1, 1, 1)
    assert counts.names_no_option == 1 and counts.failed == 1 and counts.errors == {"broken": 1}
