"""Scores of answers are what they are defined as."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.data.points import Points, format_points
from molmo2_nemo.training import score

# --- scores ---------------------------------------------------------------------------------------------------------


def points(*triples, label="x", kind="image") -> str:
    """(frame, x, y) of each point, as an answer."""
    return format_points(Points(label, [(frame, [(x, y)]) for frame, x, y in triples], kind))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_points_are_matched_as_the_best_of_all_pairings(seed):
    rng = np.random.default_rng(seed)
    found, wanted = rng.random((rng.integers(1, 6), 3)), rng.random((rng.integers(1, 6), 3))
    for video in (False, True):
        for array in (found, wanted):
            array[:, 0] = rng.integers(0, 3, len(array)) / 2 if video else 1
        size, seconds = ((200, 100), 4.0 if video else None)
        apart = np.hypot(*((found[:, None, 1:] - wanted[None, :, 1:]) * (2, 1)).transpose(2, 0, 1))
        later = abs(found[:, None, 0] - wanted[None, :, 0])
        cost = np.hypot(apart, later / 4) if video else apart
        near = (apart <= score.HIT_DISTANCE) & (later == 0)
        # All pairings of the fewer with as many of the more, by cost.
        few, many = sorted((len(found), len(wanted)))
        turned = len(found) > len(wanted)
        best = min(
            itertools.permutations(range(many), few),
            key=lambda order: sum((cost.T if turned else cost)[i, j] for i, j in enumerate(order)),
        )
        hits = sum((near.T if turned else near)[i, j] for i, j in enumerate(best))

        def entry(array):
            return [Points("x", [(w, [(x, y)]) for w, x, y in array], "video" if video else "image")]

        precision, recall, f1 = score.point_scores(entry(found), entry(wanted), [size], seconds)
        assert (precision, recall) == (hits / len(found), hits / len(wanted))
        assert f1 == pytest.approx(2 * hits / (len(found) + len(wanted)))


POINT = ("point_precision", "point_recall", "point_f1")
CASES = {
    "hit and miss": ("pointing", points((1, 0.2, 0.2), (1, 0.8, 0.8)), points((1, 0.21, 0.2)), (1.0, 0.5, 2 / 3)),
    "too far": ("pointing", points((1, 0.2, 0.2)), points((1, 0.3, 0.2)), (0.0, 0.0, 0.0)),
    "one too many": ("pointing", points((1, 0.2, 0.2)), points((1, 0.2, 0.2), (1, 0.21, 0.2)), (0.5, 1.0, 2 / 3)),
    "nothing there, nothing said": ("pointing", "There are none.", "there are none", (1.0, 1.0, 1.0)),
    "nothing there, a point said": ("pointing", "There are none.", points((1, 0.5, 0.5)), (0.0, 0.0, 0.0)),
    "something there, nothing said": ("pointing", points((1, 0.5, 0.5)), "There are none.", (0.0, 0.0, 0.0)),
    "another image": ("multi_image_pointing", points((2, 0.2, 0.2)), points((1, 0.2, 0.2)), (0.0, 0.0, 0.0)),
    "no such image": ("multi_image_pointing", points((2, 0.2, 0.2)), points((7, 0.2, 0.2)), (0.0, 0.0, 0.0)),
    "unanswerable": ("pointing", "Names cannot be seen.", "I see nothing.", (1.0, 1.0, 1.0)),
    "cut off": ("pointing", points((1, 0.2, 0.2), (1, 0.8, 0.8)), '<points coords="1 1 200 200 2 8', (1.0, 0.5, 2 / 3)),
    "points of a chat": ("user_qa", f"Here: {points((1, 0.2, 0.2))}", points((1, 0.2, 0.2)), (1.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_point_scores(case):
    style, label, answer, expected = CASES[case]
    sizes = [(100, 100), (300, 100)]
    assert score.score(style, label, answer, sizes) == pytest.approx(dict(zip(POINT, expected)))


def test_a_distance_is_measured_in_pixels_of_the_shorter_side():
    # 0.05 of 400 pixels is 0.2 of 100: too far to the side, near enough downwards.
    for x, y, hit in ((0.55, 0.5, 0.0), (0.5, 0.55, 1.0)):
        found = score.score("pointing", points((1, 0.5, 0.5)), points((1, x, y)), [(400, 100)])
        assert found["point_f1"] == hit


def test_points_of_a_video_need_the_exact_time_and_tracks_are_scored_in_each_frame():
    label = points((0.5, 0.2, 0.2), (1.0, 0.4, 0.2), kind="video")
    late = points((0.5, 0.2, 0.2), (1.5, 0.4, 0.2), kind="video")
    found = score.score("video_point", label, late, [(84, 84)], 2.0)
    assert found == dict.fromkeys(POINT, 0.5)
    label = '<tracks coords="0.0 1 200 200 2 800 800;0.5 1 210 200 2 800 790">x</tracks>'
    swapped = '<tracks coords="0.0 2 200 200 1 800 800;0.5 1 210 200">x</tracks>'
    found = score.score("video_point_track_per_frame", label, swapped, [(84, 84)], 2.0)
    assert found == pytest.approx({"track_precision": 1.0, "track_recall": 0.75, "track_f1": 6 / 7})
    nothing = score.score("video_point_track_per_frame", "No tracks available.", "No tracks available.", [], 2.0)
    assert nothing["track_f1"] == 1


def counted(style, label, answer):
    found = score.score(style, label, answer)
    return found["count_exact"], found["count_close"]


def test_counts_are_of_the_points_whatever_number_is_stated():
    def shows(n, total):
        return f"Counting the {points(*((1, i / 50, 0.5) for i in range(n)))} shows a total of {total}."

    assert counted("point_count", shows(3, 3), shows(3, 9)) == (1, 1)
    assert counted("point_count", shows(3, 3), shows(4, 3)) == (0, 1)
    assert counted("point_count", shows(3, 3), shows(5, 3)) == (0, 0)
    assert counted("point_count", "There are none.", "there are NONE.") == (1, 1)
    # Close: |p - g| <= 1 + floor(0.05 g).
    for label, answer, expected in ((19, 21, (0, 0)), (20, 22, (0, 1)), (40, 43, (0, 1)), (40, 44, (0, 0))):
        assert counted("counting", str(label), f"There are {answer}.") == expected
    assert counted("counting", "2", shows(2, 7)) == (1, 1) and counted("counting", "0", "There are none.") == (1, 1)
    assert counted("counting", "2", "many") == (0, 0)


def test_exact_match_and_what_has_no_score():
    for label, answer, right in (
        ("red", " Red.", 1),
        ("a red star", "a  red\nstar", 1),
        ("red", "red star", 0),
        ("B. blue", "b. blue", 1),
        ("Because. Answer: two", "I see. Answer: Two", 1),
        (f"{'Long ' * 20} Answer: two", "two", 1),
        ("-1", "1", 0),
    ):
        assert score.score("user_qa", label, answer) == {"exact_match": right}, (label, answer)
    assert score.score("long_caption", "red", "red") == score.score("video_transcript", "red", "red") == {}
    assert score.score("user_qa", "word " * 11, "word " * 11) == {}
    assert score.is_right({}) is None and score.is_right({"point_f1": 1.0, "count_exact": 0.0}) is False
    scores = [{"exact_match": 1.0}, {}, {"exact_match": 0.0}, {"point_f1": 0.5}]
    assert score.means(scores, ["a", "b", "b", "b"]) == {
        "point_f1": {"all": 0.5, "b": 0.5},
        "exact_match": {"all": 0.5, "a": 1.0, "b": 0.0},
    }


@given(st.text(alphabet='<points track="0123. ;>/ab', max_size=60))
def test_any_answer_has_a_score(text):
    for style, label in (("pointing", points((1, 0.5, 0.5))), ("counting", "3"), ("user_qa", "yes")):
        assert all(0 <= value <= 1 for value in score.score(style, label, text, [(84, 84)]).values())
