"""What tasks become: every kind, style and layout, and how often."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.data import prompts
from molmo2_nemo.data.frames import Shown
from molmo2_nemo.data.points import Points, Tracks, parse, render_content
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.data.tasks import EVALUATION_LAYOUT, Talk

IMAGE = {"part": "img0.jpg", "width": 64, "height": 48}
VIDEO = {"part": "video.mp4", "width": 64, "height": 48, "duration": 30.0, "fps": 30.0}
DRAWS = 1500


def talk(branches, seed=0, templates=True, images=1, times=None, options=None, **sample):
    """(style, [(role, text), ...]) of each conversation that is about something shown."""
    branches = branches if isinstance(branches, list) else [branches]
    if "video" not in sample:
        sample["images"] = [IMAGE] * images
    example = read_example(json.dumps({"branches": branches, **sample}))
    rng, prompts = np.random.default_rng(seed), "templates" if templates else "none"
    shown = times and Shown(times, 0.0, times[-1], whole=False)
    return [
        (c.style, [(m.role, render_content(m.content, m.points)) for m in c.messages])
        for c in Talk(example, rng, prompts, **(options or {})).conversations(shown)
        if c
    ]


def one(task, seed=0, **options):
    """Question and answer of a single turn."""
    [(_, [(first, question), (second, answer)])] = talk(task, seed, **options)
    assert (first, second) == ("user", "assistant")
    return question, answer


def often(share, of=DRAWS):
    """Bounds of a share that is seen within four standard errors."""
    error = 4 * math.sqrt(share * (1 - share) / of)
    return pytest.approx(share, abs=error)


def pointing(points=((1, [(0.5, 0.25), (0.1, 0.2)]),), **more):
    return {"task": "pointing", "label": "Cat", "points": points} | more


# --- texts ----------------------------------------------------------------------------------------------------------


def test_captions_are_asked_for_in_many_ways_or_by_their_style_alone():
    for style, choices in [
        ("long_caption", prompts.CAPTION),
        ("short_caption", prompts.SHORT_CAPTION),
        ("transcript", prompts.TRANSCRIPT),
    ]:
        task = {"task": "caption", "text": "A cat.", "style": style}
        asked = {one(task, seed) for seed in range(300)}
        assert asked == {(choice.format(medium="image"), "A cat.") for choice in choices}
        assert one(task, templates=False) == ("", "A cat.")
    asked = {one({"task": "caption", "text": "x"}, seed, video=VIDEO)[0] for seed in range(300)}
    assert asked == {choice.format(medium="video") for choice in prompts.CAPTION}
    assert talk({"task": "caption", "text": "x"}, video=VIDEO)[0][0] == "video_long_caption"


def test_the_commonest_answer_is_taught_and_ties_are_drawn():
    task = {"task": "question", "question": "Who?", "answers": ["a", "b", "b", "c", "b"]}
    assert {one(task, seed) for seed in range(50)} == {("Who?", "b")}
    task["answers"] = ["a", "b", "b", "a", "c"]
    drawn = Counter(one(task, seed)[1] for seed in range(DRAWS))
    assert set(drawn) == {"a", "b"} and drawn["a"] / DRAWS == often(0.5)


def test_explanations_come_before_the_answer():
    task = {"task": "question", "question": "Why?", "answers": ["so"], "explanation": "It is so.", "style": "x_exp"}
    for seed in range(40):
        question, answer = one(task, seed)
        assert question.removeprefix("Why? ") in prompts.EXPLAIN and answer == "It is so. Answer: so"
    assert one(task, templates=False)[0] == "Why?"


def test_counting_questions_of_people_want_no_points_where_a_source_says_so():
    plain, wants = "How many cats are there?", {"options": {"counts_without_points": True}}
    chat = [{"role": "user", "content": plain}, {"role": "assistant", "content": "two"}]
    other = [{"role": "user", "content": "Is it red?"}, chat[1]]
    for style in ("user_qa", "correction_qa", "vqa2", None):
        assert one([chat], style=style)[0] == plain  # nobody's own question is changed
    question = {"task": "question", "question": plain, "answers": ["two"]}
    for branch in ([chat], question):
        asked = {one(branch, seed, **wants)[0] for seed in range(200)}
        assert asked == {f"{before} {plain}" for before in prompts.NO_POINTS}
    assert one([chat], templates=False, **wants)[0] == plain
    assert one([chat], images=0, **wants)[0] == plain  # nothing to point to
    entry = {"type": "points", "label": "cat", "groups": [[1, [[0.1, 0.1]]]], "kind": "image"}
    pointed = [chat[0], {"role": "assistant", "content": "<points 0/>", "points": [entry]}]
    assert one([pointed], **wants)[0] == plain
    assert one([other], **wants)[0] == "Is it red?"
    # Each question that counts, wherever it stands; and tasks of pointing are left alone.
    [(_, turns)] = talk([[*other, *chat, *other, *chat]], **wants)
    changed = [text != said["content"] for (_, text), said in zip(turns, [*other, *chat, *other, *chat])]
    assert changed == [False, False, True, False] * 2
    assert one(pointing(style="counting", question=plain), **wants)[0] == plain


# --- multiple choice ------------------------------------------------------------------------------------------------


def test_layouts_of_multiple_choice():
    options = ["red paint", "green paint", "blue paint"]
    task = {"task": "multiple_choice", "question": "Which?", "options": options, "answer": 1}
    seen = Counter()
    for seed in range(DRAWS):
        question, answer = one(task, seed)
        places = [question.index(option) for option in options]
        assert places == sorted(places) and question.startswith("Which?")
        if EVALUATION_LAYOUT in question:
            seen["evaluation"] += 1
            lines = ["Which?", EVALUATION_LAYOUT, *[f"{x}. {o}" for x, o in zip("ABC", options)]]
            assert question == "\n".join(lines) and answer == "B. green paint"
            continue
        seen["free"] += 1
        inline = "\n" not in question
        seen["inline"] += inline
        head, *rest = question.split(", ") if inline else question.split("\n")
        seen["instructed"] += any(choice in head for choice in prompts.CHOOSE)
        shown = rest[-2].strip()  # "B. green paint" or the like
        label = shown.removesuffix("green paint")
        seen["labelled"] += bool(label)
        if label:
            core = re.search(r"\b(B|b|2|ii)\b", label)[0]
            assert answer in (shown, core)
            seen["label only"] += answer == core
            seen[f"numbering {core}"] += 1
            seen["common"] += re.sub(r"B|b|2|ii", "X", label, count=1) in ("X. ", "X) ", "(X) ")
        else:
            assert answer == "green paint"
    assert seen["evaluation"] / DRAWS == often(0.1)
    free, labelled = seen["free"], seen["labelled"]
    assert seen["inline"] / free == often(0.1, free) and seen["instructed"] / free == often(0.5, free)
    assert labelled / free == often(0.8, free) and seen["label only"] / labelled == often(0.25, labelled)
    assert seen["common"] / labelled == often(0.8, labelled)
    assert all(seen[f"numbering {core}"] / labelled == often(0.25, labelled) for core in ("B", "b", "2", "ii"))


def test_multiple_choice_with_an_explanation_asks_for_one():
    options = ["red paint", "green paint"]
    task = {"task": "multiple_choice", "question": "Which?", "options": options, "answer": 1, "explanation": "Grass."}
    for seed in range(60):
        question, answer = one(task, seed)
        assert any(question.startswith(f"Which? {asked}") for asked in prompts.EXPLAIN), question
        assert EVALUATION_LAYOUT not in question and not any(choice in question for choice in prompts.CHOOSE)
        assert answer.startswith("Grass. Answer: ")
    assert one(task, templates=False) == ("Which?\nA. red paint\nB. green paint", "Grass. Answer: B. green paint")


# --- points ---------------------------------------------------------------------------------------------------------

TAG = '<points coords="1 1 100 200 2 500 250">cat</points>'


@pytest.mark.parametrize(
    "style, answer, none",
    [
        ("pointing", TAG, "There are none."),
        ("cosyn_point", TAG, "There are none."),
        ("point_count", f"Counting the {TAG} shows a total of 2.", "There are none."),
        ("count_point", f"There are 2 {TAG}.", "There are none."),
        ("counting", "2", "There are none."),
    ],
)
def test_modes_of_pointing(style, answer, none):
    for seed in range(20):
        question, told = one(pointing(style=style), seed)
        assert told == answer and "cat" in question.lower()
        assert one(pointing([], style=style), seed)[1] == none
        assert one(pointing([[1, []]], style=style), seed)[1] == none
    assert one(pointing(style=style), templates=False)[0] == "cat"
    assert one(pointing(style=style, question="Where?", count_question="How many?"))[0] == "Where?"
    for templates in (True, False):
        asked = one(pointing(style=style, count_question="How many?"), templates=templates)[0]
        assert (asked == "How many?") == ("coun" in style), asked
    assert one(pointing(style=style, unanswerable="It is too dark."))[1] == "It is too dark."


def test_a_style_is_drawn_from_a_list_and_by_default():
    for options, styles in [
        ({}, ["pointing", "point_count"]),
        ({"images": 3}, ["multi_image_pointing", "multi_image_point_then_count"]),
        ({"video": VIDEO}, ["video_point", "video_point_count"]),
    ]:
        drawn = Counter(talk(pointing(), seed, **options)[0][0] for seed in range(400))
        assert set(drawn) == set(styles) and drawn[styles[0]] / 400 == often(0.5, 400)
    assert {talk(pointing(style=["counting", "pointing"]), s)[0][0] for s in range(40)} == {"counting", "pointing"}
    with pytest.raises(ValueError, match="says nothing of how to point"):
        one(pointing(style="vqa2"))


def test_pointing_in_some_of_several_images():
    groups = [[k, [[0.1 * k, 0.5]]] for k in (1, 2, 3)]
    task = pointing(groups, style="multi_image_point_then_count", images=[3, 1])
    for seed in range(30):
        question, answer = one(task, seed, images=3)
        assert "image_1, image_3" in question and "shows a total of 2" in answer
        assert [frame for frame, _ in parse(answer)[0].groups] == [1, 3]
    everywhere = [one(pointing(groups, style="multi_image_pointing"), s, images=3)[0] for s in range(DRAWS)]
    assert sum("all images" in question for question in everywhere) / DRAWS == often(0.5)
    counting = [one(pointing(groups, style="multi_image_counting"), s, images=3)[0] for s in range(40)]
    assert all("all images" in question for question in counting)
    with pytest.raises(ValueError, match="none of 2"):
        one(pointing(groups), images=2)


def test_labels_keep_their_case_but_for_those_of_a_single_image():
    groups = [[1, [[0.1, 0.5]]], [2, [[0.2, 0.5]]]]
    several = {one(pointing(groups, style="multi_image_pointing"), seed, images=2) for seed in range(40)}
    assert all("Cat" in question and ">Cat<" in answer for question, answer in several)
    single = {one(pointing(style="pointing"), seed) for seed in range(40)}
    assert all("cat" in question and ">cat<" in answer for question, answer in single)


def test_only_the_first_images_are_kept_and_what_is_about_them():
    most = {"options": {"max_images": 2}, "images": 3}
    groups = [[k, [[0.1 * k, 0.5]]] for k in (1, 2, 3)]
    _, answer = one(pointing(groups, style="multi_image_point_then_count"), **most)
    assert [frame for frame, _ in parse(answer)[0].groups] == [1, 2] and "a total of 2" in answer
    question, answer = one(pointing(groups, style="multi_image_counting", images=[1, 3]), **most)
    assert "image_1" in question and "image_3" not in question and answer == "1"
    assert one(pointing([[3, []]], style="multi_image_pointing"), **most)[1] == "There are none."
    for lost in (pointing(groups[2:]), pointing(groups, images=[3])):
        assert talk(lost, **most) == []
    entry = {"type": "points", "label": "cat", "groups": groups, "kind": "image"}
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<points 0/>", "points": [entry]}]
    assert talk([chat], **most) == []
    entry["groups"] = groups[:2]
    assert len(talk([chat], **most)) == 1


def test_a_label_with_an_article_is_asked_for_with_one_article():
    asked = {one(pointing(label="the red dot"), seed)[0] for seed in range(60)}
    assert any("the red dot" in text for text in asked) and not any("the the" in text.lower() for text in asked)
    asked, _ = one(pointing(label="the red dot"), templates=False)
    assert asked == "the red dot"  # what stage 1 asks, and what answers say, is the label itself


def test_points_of_a_video_are_at_half_seconds():
    groups = [[0.74, [[0.5, 0.5]]], [0.5, [[0.2, 0.5]]], [3.0, [[0.1, 0.1]]], [2.9999999, [[0.3, 0.3]]]]
    _, answer = one(pointing(groups, style="video_point_count"), video=VIDEO)
    assert (
        answer
        == 'Counting the <points coords="0.5 1 200 500 2 500 500;3.0 3 100 100 4 300 300">Cat</points> shows a total'
        " of 4."
    )


# --- tracks ---------------------------------------------------------------------------------------------------------

# b is hidden from 1.0 to 1.5, and a is gone after 2.0; also annotations off the task's rate.
FRAMES = [
    [k / 4, [["b", 0.8, k / 100]] * (not 1 <= k / 4 < 2) + [["a", 0.2, k / 100]] * (k / 4 <= 2)] for k in range(17)
]


def tracking(style, fps=2, **more):
    return {"task": "tracking", "label": "dog", "frames": FRAMES, "fps": fps, "style": style} | more


def expected(keep):
    """Brute force: {time: {object: (x, y)}} of what is kept, from the lists above."""
    return {t: {n: (x, y) for n, x, y in objects if keep(t, n)} for t, objects in FRAMES if (2 * t) % 1 == 0}


def told(answer):
    [tracks] = parse(answer)
    assert isinstance(tracks, Tracks) and tracks.label == "dog"
    # a, on the left, is object 1 wherever both start together
    return {t: {number: (x, y) for number, x, y in objects} for t, objects in tracks.frames}


def test_every_frame_at_the_rate_of_the_task():
    _, answer = one(tracking("video_point_track_per_frame"), video=VIDEO)
    want = {t: {"ab".index(n) + 1: p for n, p in f.items()} for t, f in expected(lambda t, n: True).items() if f}
    assert told(answer) == want
    questions = [one(tracking("video_point_track_per_frame"), s, video=VIDEO)[0] for s in range(DRAWS)]
    assert sum("2 fps" in q or "2 " in q for q in questions) / DRAWS == often(0.5)
    assert all(
        re.search(r"\b1 ", one(tracking("video_point_track_per_frame", fps=1), s, video=VIDEO)[0]) for s in range(50)
    )


def test_first_and_last_of_what_is_seen():
    style = "video_point_ground_start_end"
    _, answer = one(tracking(style), video=VIDEO)
    assert {t: set(f) for t, f in told(answer).items()} == {0.0: {1, 2}, 2.0: {1}, 4.0: {2}}
    # Only frames that were sampled count: the last of what is left is another.
    _, answer = one(tracking(style), video=VIDEO, times=[0.5, 1.0, 1.5])
    assert {t: set(f) for t, f in told(answer).items()} == {0.5: {1, 2}, 1.5: {1}}
    # Nothing is taught of what is not shown.
    for other in ("video_point_track_per_frame", style, "video_single_point_track_per_frame"):
        assert talk(tracking(other), video=VIDEO, times=[29.0]) == []


def test_one_object_from_a_point_on():
    starts = Counter()
    for seed in range(DRAWS):
        question, answer = one(tracking("video_single_point_track_per_frame"), seed, video=VIDEO)
        [point] = parse(question)
        assert isinstance(point, Points) and point.label == "dog"
        [(start, [(x, y)])] = point.groups
        name = {0.2: "a", 0.8: "b"}[x]
        assert expected(lambda t, n: True)[start][name] == (x, y)
        # What follows begins after the point of the question, as in the released models' training data.
        assert told(answer) == {t: {1: f[name]} for t, f in expected(lambda t, n: t > start).items() if name in f}
        starts[name, start] += 1
    assert (starts["a", 0.0] + starts["b", 0.0]) / DRAWS == pytest.approx(0.8 + 0.2 * (1 / 4 + 1 / 6) / 2, abs=0.04)
    assert sum(n for (name, _), n in starts.items() if name == "a") / DRAWS == often(0.5)
    assert len(starts) == 4 + 6  # nothing follows the last point of each


def test_one_object_among_those_that_are_seen_twice():
    style = "video_single_point_track_per_frame"
    for seed in range(60):
        question, answer = one(tracking(style), seed, video=VIDEO, times=[0.5, 1.0, 1.5])
        assert parse(question)[0].groups[0][1][0][0] == 0.2  # b is hidden from 1.0 on
        assert set(told(answer)) <= {1.0, 1.5}
    assert talk(tracking(style), video=VIDEO, times=[0.5, 29.0]) == []
    # Where nothing can be followed, another style is drawn.
    styles = {talk(tracking(None), seed, video=VIDEO, times=[0.5])[0][0] for seed in range(60)}
    assert styles == {"video_point_track_per_frame", "video_point_ground_start_end"}


def test_tracking_that_makes_no_sense():
    with pytest.raises(ValueError, match="video"):
        one(tracking("video_point_track_per_frame"))
    with pytest.raises(ValueError, match="how to track"):
        one(tracking("pointing"), video=VIDEO)
    with pytest.raises(ValueError, match="there is none"):
        one(tracking("video_single_point_track_per_frame", frames=[]), video=VIDEO)
    assert one(tracking("video_point_track_per_frame", frames=[]), video=VIDEO)[1] == "No tracks available."


# --- times and turns ------------------------------------------------------------------------------------------------


def test_times_in_questions_are_seconds_or_a_clock_and_in_answers_seconds():
    chat = [
        {"role": "user", "content": "What is at <time 3725.25/> and <time 59.96/>?"},
        {"role": "assistant", "content": "A cat until <time 3725.25/>."},
    ]
    asked = Counter()
    for seed in range(400):
        question, answer = one([chat], seed, video=VIDEO)
        assert answer == "A cat until 3725.2."
        asked[question] += 1
    clock, seconds = "What is at 01:02:05.2 and 00:01:00.0?", "What is at 3725.2 and 60.0?"
    assert set(asked) == {clock, seconds} and asked[clock] / 400 == often(0.5, 400)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 90000))
def test_both_spellings_of_a_time_are_the_same_time(time):
    chat = [{"role": "user", "content": f"<time {time:.3f}/>"}, {"role": "assistant", "content": "x"}]
    spelt = {one([chat], seed, video=VIDEO)[0] for seed in range(20)}
    values = {sum(60**k * float(part) for k, part in enumerate(reversed(text.split(":")))) for text in spelt}
    assert len(spelt) == 2 and max(values) - min(values) < 1e-6 and abs(max(values) - time) <= 0.051


def test_branches_become_turns_as_often_as_asked():
    branches = [
        [{"role": "system", "content": "S"}, {"role": "user", "content": "1"}, {"role": "assistant", "content": "one"}],
        {"task": "question", "question": "2", "answers": ["two"]},
        {"task": "question", "question": "3", "answers": ["three"]},
    ]
    orders = Counter()
    joined = 0
    for seed in range(DRAWS):
        conversations = talk(branches, seed, multi_turn=0.2)
        if len(conversations) == 1:
            [(_, messages)] = conversations
            joined += 1
            assert [m for m in messages if m[0] == "system"] == messages[: messages[0][0] == "system"]
            turns = [m for m in messages if m[0] != "system"]
            assert [role for role, _ in turns] == ["user", "assistant"] * 3
            assert {tuple(t for _, t in turns[i : i + 2]) for i in (0, 2, 4)} == {
                ("1", "one"),
                ("2", "two"),
                ("3", "three"),
            }
            orders[tuple(text for _, text in turns[::2])] += 1
        else:
            assert [c[1][-1][1] for c in conversations] == ["one", "two", "three"]
    assert joined / DRAWS == often(0.2) and len(orders) == 6
    assert len(talk(branches)) == 3


def test_the_same_generator_gives_the_same_conversation():
    tasks = [
        pointing(),
        {"task": "caption", "text": "x"},
        {"task": "multiple_choice", "question": "q", "options": ["a", "b"], "answer": 0},
    ]
    for seed in range(20):
        assert talk(tasks, seed) == talk(tasks, seed)


def test_a_label_with_an_article_gets_no_second_one():
    sets = [v for k, v in vars(prompts).items() if isinstance(v, tuple)]
    with_label = [sentence for sentences in sets for sentence in sentences if "{label}" in sentence]
    values = {"images": "image_1", "fps": "2"}
    for label in ("the red dot", "A dog", "an owl"):
        asked = [prompts.fill(sentence, label, **values) for sentence in with_label]
        doubled = r"(?i)\b(the|every|each|all|any|many|number of) (the|an?) "
        assert len(asked) > 50 and not [question for question in asked if re.search(doubled, question)]
    assert prompts.fill("Where is the {label}?", "the red dot") == "Where is the red dot?"
    assert prompts.fill("Point to {label}.", "the red dot") == "Point to the red dot."
    assert prompts.fill("Where is the {label}?", "theatre") == "Where is the theatre?"
    assert prompts.fill("Where is the {label}?", "A") == "Where is the A?"
