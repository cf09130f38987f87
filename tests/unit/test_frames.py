"""What answers about videos say, against the frames that are shown: times, counts and coordinates."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from test_encode import ENCODER, REAL, TOKENIZER, assistant, make_encoder, plan_of, rng, sample_of, user, video_of

from molmo2_nemo.data.frames import annotated, choose
from molmo2_nemo.data.points import Points, parse, point_time
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.data.tasks import COUNT_ONLY, COUNT_THEN_POINTS, POINTS_ONLY, POINTS_THEN_COUNT, TRACK_ALL, TRACK_ENDS
from molmo2_nemo.data.tasks import TRACK_ONE as ONE

POINT_STYLES = sorted(s for s in POINTS_ONLY | POINTS_THEN_COUNT | COUNT_THEN_POINTS | COUNT_ONLY if "video" in s)
TRACK_STYLES = sorted(TRACK_ALL | TRACK_ENDS | ONE)
# Seeds of samples of all kinds.
SAMPLES = range(100)


def place(seconds, name=0):
    """Where the thing is at this time: a point that tells time and thing."""
    return [0.001 * (1 + name), 0.001 * round(seconds * 4)]


def random_video(draw):
    """A video and some branches about it, with coordinates by `place`."""
    length = float(draw.choice([4.0, 20.0, 29.98, 63.0, 120.0, 200.0]))
    rate = draw.choice([None, None, 1, 2])
    video = video_of(length, fps=30, num_frames=int(30 * length))
    if rate:
        video["annotation_fps"] = int(rate)
    if draw.random() < 0.3:
        video["clip"] = [float(draw.integers(0, 3)) / 2, length]
    if draw.random() < 0.2:
        video["subtitles"] = [[0.5, 2.0, "hello"], [length - 1, length, "bye"]]
    length = video["clip"][1] - video["clip"][0] if "clip" in video else length
    kinds = {"points": points, "tracks": tracks, "chat": chat, "times": times, "caption": caption}
    chosen = draw.choice(["points", "points", "tracks", *kinds], size=int(draw.integers(1, 4)))
    if draw.random() < 0.5:
        chosen = [kind for kind in chosen if kind in ("points", "tracks")] or ["points"]
    branches = [kinds[kind](draw, length, rate or 2) for kind in chosen]
    return sample_of(branches=branches, video=video, style=None)[0] | {"multi_turn": float(draw.choice([0.0, 0.5]))}


def some_times(draw, length, most):
    """Half seconds, now and then some time in between."""
    times = draw.integers(0, int(2 * length) + 1, size=int(draw.integers(1, most))) / 2
    return sorted({min(float(t + (draw.random() < 0.2) * draw.uniform(0, 0.45)), length) for t in times})


def points(draw, length, rate):
    groups = [[t, [place(point_time(t), k) for k in range(draw.integers(0, 4))]] for t in some_times(draw, length, 9)]
    task = {"task": "pointing", "label": "dot", "points": groups, "style": str(draw.choice(POINT_STYLES))}
    return task | ({"question": "Where are the dots?"} if draw.random() < 0.3 else {})


def tracks(draw, length, rate):
    first, last = sorted(draw.uniform(0, length, size=2).tolist())
    times = np.arange(0, length, 1 / rate)
    frames = [
        [float(t), [[f"o{k}", *place(t, k)] for k in range(2) if first <= t <= last and draw.random() < 0.8]]
        for t in times
    ]
    return {
        "task": "tracking",
        "label": "dot",
        "frames": frames,
        "fps": float(rate),
        "style": str(draw.choice(TRACK_STYLES)),
    }


def chat(draw, length, rate):
    groups = [[t, [place(point_time(t))]] for t in some_times(draw, length, 4)]
    entry = {"type": "points", "label": "dot", "kind": "video", "groups": groups}
    if draw.random() < 0.5:
        entry = {
            "type": "tracks",
            "label": "dot",
            "frames": [[t, [["a", *place(t)]]] for t in np.arange(0, length, 0.5).tolist()],
        }
        return [user("Follow it."), assistant("<points 0/>") | {"points": [entry]}]
    text = f"I count <points 0/>: a total of {len(groups)}."
    return [user("Count."), assistant(text) | {"points": [entry]}]


def times(draw, length, rate):
    start, end = sorted(draw.uniform(0, length, size=2).tolist())
    return [user(f"What is at <time {start:.2f}/>?"), assistant(f"A dot until <time {end:.2f}/>.")]


def caption(draw, length, rate):
    return {"task": "caption", "text": "A dot comes and goes."}


def turns(plan):
    """(question, answer) of all branches, from the tokens."""
    ids = plan.input_ids.tolist()
    text = TOKENIZER.decode([*ids, plan.labels[-1]])
    found = re.findall(
        r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)(?=<\|im_|$)", text, re.DOTALL
    )
    return [(question, answer.removesuffix("<|im_end|>")) for question, answer in found]


def stamps(plan):
    """What stands before the frames, from the tokens."""
    text = TOKENIZER.decode(plan.input_ids)
    return [float(number) for number in re.findall(r"(\d+\.\d) <frame_start>", text)]


@pytest.mark.slow
@pytest.mark.parametrize("seq_length, max_frames", [(4096, 128), (2048, 40), (700, 16), (400, 128)])
def test_every_time_is_a_frame_and_every_count_is_what_is_shown(seq_length, max_frames):
    encoder = make_encoder(seq_length=seq_length, max_frames=max_frames, max_crops=max_frames)
    seen = Counter()
    for seed in SAMPLES:
        sample = random_video(rng(seed))
        plan = plan_of(encoder, sample, rng(seed))
        if not plan.num_tokens or plan.counters["truncated"]:
            continue
        shown = stamps(plan)
        # Pixels are taken from here on; coordinates tell the time since the start of the sample's clip.
        start = plan.video.start - sample["video"].get("clip", [0.0])[0]
        assert shown == [round(time, 1) for time in plan.times] and shown == sorted(shown)
        assert plan.times[-1] + plan.video.start <= sample["video"]["duration"] + 1e-6
        seen += plan.counters
        for question, answer in turns(plan):
            told = [*parse(question), *parse(answer)]
            named = [t for entry in told for t, _ in (entry.groups if isinstance(entry, Points) else entry.frames)]
            named += [float(number) for number in re.findall(r"until (\d+\.\d)", answer)]
            assert set(named) <= set(shown)
            for entry in told:
                groups = entry.groups if isinstance(entry, Points) else entry.frames
                for time, group in groups:
                    assert all(y == pytest.approx(place(time + start)[1], abs=0.0011) for *_, x, y in group)
            counted = re.search(r"a total of (\d+)|There are (\d+) <|^(\d+)$", answer)
            if counted and counted[3] is None:
                number = int(counted[1] or counted[2])
                assert number == sum(len(group) for entry in told for _, group in entry.groups)
                seen["counts"] += 1
            elif counted:
                tasks = [b for b in sample["branches"] if isinstance(b, dict) and b.get("style") in COUNT_ONLY]
                at = [sum(len(g) for t, g in b["points"] if plan.shown.stamp(point_time(t)) is not None) for b in tasks]
                assert int(counted[3]) in at
                seen["bare counts"] += 1
            if 'coords="' in question:
                [query], [follows] = parse(question), parse(answer)
                assert query.groups[0][0] < min(time for time, _ in follows.frames)
                seen["queries"] += 1
            if answer == "There are none.":
                assert any(
                    isinstance(b, dict) and not any(g for _, g in b.get("points", [[0, [1]]]))
                    for b in sample["branches"]
                )
            assert answer != "No tracks available." or any(
                isinstance(b, dict) and "frames" in b and not any(f for _, f in b["frames"]) for b in sample["branches"]
            )
            seen["answers"] += 1
    assert seen["answers"] > 100 and seen["counts"] > 10 and seen["queries"] > 2
    assert seen["videos_cut"] and seen["unseen_points"] and seen["unseen_branches"] and seen["moved_times"]


def pointing(groups, style="video_point_count", **more):
    return {"task": "pointing", "label": "dot", "points": groups, "style": style, **more}


# The default of stage 2 on the released geometry: a row of 4,096 tokens has room for 45 frames.
DEFAULT = make_encoder(REAL, seq_length=4096, max_crops=128, max_frames=128)


@pytest.mark.parametrize(
    "length, times, keys",
    [
        (63.0, [1.0, 20.0], {}),
        (63.0, [1.0, 20.0, 62.5], {}),  # too far apart for a clip
        (63.0, [2.5, 59.5], {"annotation_fps": 2}),
        (120.0, [45.0, 60.0], {"annotation_fps": 2}),
        (30.0, [k / 2 for k in range(0, 40, 3)], {}),
        (600.0, [3.5, 123.5, 500.0], {}),
    ],
)
def test_points_keep_their_frames(length, times, keys):
    video = video_of(length, **keys)
    task = pointing([[t, [place(t)]] for t in times])
    for seed in range(8):
        plan = plan_of(DEFAULT, sample_of(branches=[task], video=video)[0], rng(seed))
        [(_, answer)] = turns(plan)
        [entry] = parse(answer)
        start = plan.video.start
        if keys and max(times) - min(times) > 22:  # cut at the annotations' rate, as the video wants it
            assert plan.counters["unseen_points"] == plan.counters["recounted_answers"] == 1
            assert "a total of 1." in answer
        else:
            assert [t + start for t, _ in entry.groups] == times and f"a total of {len(times)}." in answer
            assert not plan.counters["unseen_points"] and not plan.counters["recounted_answers"]
        assert plan.num_tokens > 3900


def test_a_clip_is_at_two_frames_a_second_and_anywhere_around_the_points():
    sample = sample_of(branches=[pointing([[20.0, [place(20.0)]], [30.0, [place(30.0)]]])], video=video_of(63.0))[0]
    plans = [plan_of(DEFAULT, sample, rng(seed)) for seed in range(40)]
    starts = {plan.video.start for plan in plans}
    assert len(starts) > 8 and min(starts) < 12 and max(starts) > 15
    for plan in plans:
        assert set(np.diff(plan.times).tolist()) == {0.5} and plan.counters["videos_cut"] == 1
        assert plan.video.clip[0] + plan.times[-1] == plan.video.clip[1] <= 63.0
        (_, answer), *_ = turns(plan)
        [entry] = parse(answer)
        assert [t + plan.video.start for t, _ in entry.groups] == [20.0, 30.0]
        assert all(y == pytest.approx(place(t + plan.video.start)[1]) for t, [(_, y)] in entry.groups)


def test_the_whole_video_is_shown_where_something_is_said_of_it():
    task = pointing([[20.0, [place(20.0)]], [30.5, [place(30.5)]]])
    for other in (
        {"task": "caption", "text": "It moves."},
        pointing([[1.0, [place(1.0)]]], question="Point to the dot at <time 1.0/>."),
        [user("Who?"), assistant("Nobody.")],
    ):
        plan = plan_of(DEFAULT, sample_of(branches=[task, other], video=video_of(63.0))[0], rng())
        assert {20.0, 30.5} <= set(plan.times) and plan.times[0] == 0.0 and plan.times[-1] == 63.0
        assert not plan.counters["videos_cut"] and max(np.diff(plan.times)) <= 3.0
        # The frames of the points do not stand out.
        assert all(time % 0.5 == 0 for time in plan.times)


def test_what_fits_is_shown_as_the_sampler_has_it():
    """Nothing is chosen where all frames fit: Ai2's clips of 63 seconds have 127 frames, their last one included."""
    wide = make_encoder(seq_length=16384, max_crops=128, max_frames=128)
    sample = sample_of(branches=[pointing([[62.5, [place(62.5)]]])], video=video_of(63.0))[0]
    plan = plan_of(wide, sample, rng())
    assert plan.times == [k / 2 for k in range(127)] and not plan.counters["videos_cut"]


def test_tracks_are_cut_at_the_end_and_only_where_they_begin_late_before():
    def frames(first, last):
        return [[k / 2, [["a", *place(k / 2)]]] for k in range(int(2 * first), int(2 * last))]

    for first, begins in ((0, 0.0), (10, 0.0), (40, None)):
        task = {"task": "tracking", "label": "dot", "frames": frames(first, 60), "fps": 2, "style": sorted(ONE)}
        video = video_of(63.0, annotation_fps=2)
        plan = plan_of(DEFAULT, sample_of(branches=[task], video=video)[0], rng())
        assert plan.video.start == begins if begins is not None else 18 < plan.video.start <= 40
        [(question, answer)] = turns(plan)
        assert parse(question) and parse(answer) and plan.counters["videos_cut"]
        unseen = [t for t, _ in frames(first, 60) if plan.shown.stamp(t) is None]
        assert plan.counters["unseen_points"] == len(unseen) > 0


def test_the_rate_has_frames_at_the_points():
    frames = [[float(k), [["a", *place(k)]]] for k in range(10)]
    task = {"task": "tracking", "label": "dot", "frames": frames, "fps": 1, "style": "video_point_track_per_frame"}
    video = video_of(9.5, annotation_fps=1, fps=30)
    branches = [task, pointing([[3.5, [place(3.5)]]])]
    example = read_example(json.dumps(sample_of(branches=branches, video=video)[0]))
    for number in (30, 60, 200):
        shown = choose(example.video, annotated(example), number, 2.0, 0.5)
        assert 3.5 in shown.times and set(range(10)) <= set(shown.times)


def test_a_draw_does_not_depend_on_how_often_it_is_written():
    sample = random_video(rng(3))
    first, second = (plan_of(ENCODER, sample, rng(5)) for _ in range(2))
    assert first.input_ids.tolist() == second.input_ids.tolist() and first.video == second.video
