"""Rows of public evaluation sets that are not as published: each is left out with its reason, or asked rightly."""

import json
from types import SimpleNamespace

import numpy as np
import published_sets as published
import pytest
from PIL import Image

from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.evaluate import public_sets, tasks
from molmo2_nemo.prepare.converters import evaluation, evaluation_tracking
from molmo2_nemo.prepare.converters.common import Draft
from molmo2_nemo.prepare.spool import converted

CATALOGUE = load_catalogue(public_sets.CATALOGUE)
PICTURE = {"bytes": b"picture"}
HOW = "\nPlease answer directly with only the letter of the correct option and nothing else."
OTHER_TYPE = "a value of another type than expected"
MASK = {"size": [2, 4], "counts": [0, 4, 4]}
TRACK = {
    "clip": "c",
    "exp": "the cat",
    "fps": 1,
    "w": 4,
    "h": 2,
    "points": [{"object_id": "7", "points": [[0.5, 0.5]]}],
    "masks": [{"object_id": "7", "masks": [MASK]}],
}


def results(name, *rows):
    """(drafts, reasons) of the rows of a set."""
    [entry] = CATALOGUE.find([name])
    raw = SimpleNamespace(rows=lambda split: rows, info={})
    found = [result for row in converted(entry.model_dump(), raw) for result in row]
    drafts = [result for result in found if isinstance(result, Draft)]
    return drafts, [result.reason for result in found if not isinstance(result, Draft)]


def choices(drafts):
    """(question, options, the right one) of each draft."""
    asked = [draft.branches[0] for draft in drafts]
    return [(task["question"], task["options"], task["options"][task["answer"]]) for task in asked]


@pytest.mark.parametrize(
    "text, answer, asked",
    [
        ("Where?\n A. Left\nB. Right\n C. Ahead", "B", ("Where?", ["Left", "Right", "Ahead"], "Right")),
        ("Where?\nA. Stop\nfor all\nB. Go\nC. Wait", "C", ("Where?", ["Stop for all", "Go", "Wait"], "Wait")),
        ("Which?\nI. one\nII. two\n(A) I\n(B) II", "(B)", ("Which?\nI. one\nII. two", ["I", "II"], "II")),
        ("Where?\nA. Left\nC. Right", "A", None),
        ("Where?\nA. Left\nB. Right\nA. Ahead\nC. Back", "C", None),
        ("Where?\nA. Left\nB.\nC. Right", "C", None),
        ("Where?\nA. Left\nB. Right", "b", None),
        ("Where?\nA. Left\nB. Right", "C", None),
        ("Where?", "A", None),
    ],
)
def test_options_that_are_lines_of_a_text(text, answer, asked):
    """In three sets; an option that is missing must not move the others."""
    drafts = results("realworldqa", {"question": text + HOW, "answer": answer, "image": PICTURE})[0]
    assert choices(drafts) == ([asked] if asked else [])
    rows = [{"key": "k", "video_path": "v.mp4", "qa": [{"question": text, "answer": answer}, {"question": "?"}]}]
    for name in ("lvbench", "motionbench-val"):
        drafts, reasons = results(name, *rows)
        assert choices(drafts) == ([asked] if asked else []) and len(drafts) + len(reasons) == 2


MUIR = {"question": "Which?", "options": ["a", "b"], "answer": "A", "image_list": [PICTURE]}
MMMU = {"question_type": "multiple-choice", "question": "Which?", "options": "['a', 'b']", "answer": "A"}
BLINK = {"prompt": "Which?", "choices": ["a", "b"], "answer": "(A)", "image_1": PICTURE}
MMIU = {"question": "Which?", "options": "A: x\nB: y", "output": "A", "input_image_path": ["a.png"]}
COUNT = {"label": "cats", "count": 3, "image_url": "http://x/a.png"}
NEXTQA = {"video": 1, "question": "Why?", **{f"a{number}": f"option {number}" for number in range(5)}, "answer": 2}
PERCEPTION = {"video_name": "v", "question": "Which?", "options": ["a", "b"], "answer_id": 0}


def masked(**changes):
    return TRACK | {"masks": [{"object_id": "7", "masks": [MASK | changes]}]}


@pytest.mark.parametrize(
    "name, row, reason",
    [
        ("realworldqa", {"question": "How many?\nA. 3\nB. 4", "answer": "A", "image": PICTURE}, "how to answer"),
        ("mmiu", MMIU | {"options": "A: x\nB:\nC: z"}, "an empty one"),
        ("mmiu", MMIU | {"options": None}, "letters are not"),
        ("mmiu", MMIU | {"input_image_path": []}, "no image"),
        ("muirbench", MUIR | {"question": "<image> or <image>?"}, "picture is missing"),
        ("muirbench", MUIR | {"image_list": []}, "no image"),
        ("mmmu-val", MMMU | {"question": "<image 3>?", "image_1": PICTURE}, "picture is missing"),
        ("mmmu-val", MMMU | {"image_1": None, "image_2": PICTURE}, "picture is missing"),
        ("mmmu-val", MMMU, "no image"),
        ("blink-val", BLINK | {"prompt": None}, "an empty text"),
        ("blink-val", BLINK | {"image_1": None}, "no image"),
        ("pixmo-count-val", COUNT | {"label": None}, "an empty text"),
        ("pixmo-count-val", COUNT | {"count": 3.7}, "no whole number"),
        ("pixmo-count-val", COUNT | {"count": -1}, "no whole number"),
        ("nextqa-test", NEXTQA | {"answer": 2.7}, "no whole number"),
        ("nextqa-test", NEXTQA | {"answer": 5}, "none of the options"),
        ("perception-test-val", PERCEPTION | {"options": "yes"}, "no list"),
        ("perception-test-val", PERCEPTION | {"video_name": None}, "an empty text"),
        ("perception-test-val", None, OTHER_TYPE),
        ("textvqa-val", {"image": "a.png", "message_list": [{"question": "?", "answers": [None]}]}, "no answer"),
        ("Molmo2-VideoTrackEval", TRACK | {"exp": None}, "an empty text"),
        ("Molmo2-VideoTrackEval", masked(counts=[1, 10**6, 3]), "RLE"),
        ("Molmo2-VideoTrackEval", masked(size=[10**7, 10**7]), "of a size"),
        ("Molmo2-VideoTrackEval", masked(counts=[8]), "without a pixel"),
    ],
)
def test_a_row_that_does_not_fit_is_left_out(name, row, reason):
    drafts, [said] = results(name, row)
    assert not drafts and reason in said


def test_one_question_of_a_diagram_takes_no_other_along(tmp_path):
    file = tmp_path / "1.png.json"
    good = {"questionId": "1-0", "abcLabel": False, "answerTexts": ["a", "b"], "correctAnswer": 1}
    asked = {"Good?": good, "Far?": good | {"correctAnswer": 9}, "None?": {"abcLabel": False}, "Empty?": None}
    file.write_text(json.dumps({"questions": asked}))
    found = list(evaluation.CONVERTERS["ai2d-test"].convert({"image": "1.png", "file": file, "boxes": tmp_path / "no"}))
    assert [one.branches[0]["question"] for one in found if isinstance(one, Draft)] == ["Good?"] and len(found) == 4


@pytest.mark.parametrize(
    "line, kept",
    [
        ({"timestamp": [1.0, 2.0], "text": "Hello."}, 1),
        ({"timestamp": [1.0, 2.0], "text": None}, 0),
        ({"timestamp": [None, 2.0], "text": "Hello."}, 0),
        ({"timestamp": [float("nan"), 2.0], "text": "Hello."}, 0),
        ({"text": "Hello."}, 0),
        (None, 0),
    ],
)
def test_a_broken_line_of_subtitles_leaves_out_its_video_alone(tmp_path, line, kept):
    (tmp_path / "subtitles").mkdir()
    (tmp_path / "subtitles" / "s.json").write_text(json.dumps([line]))
    row = {"video_path": "v.mp4", "subtitle_path": "s.json", "starting_timestamp_for_subtitles": 0, "duration": 4.0}
    row |= {"question": "?", "candidates": ["a", "b"], "correct_choice": 0}
    rows = [row, row | {"subtitle_path": ".."}, row | {"subtitle_path": None}, row | {"subtitle_path": "../../x.json"}]
    (tmp_path / "lvb_val.json").write_text(json.dumps([*rows, 3]))
    [entry] = CATALOGUE.find(["longvideobench-val"])
    folder = tmp_path / "raw" / entry.name / "manual"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tmp_path)
    raw = public_sets.RawSource(tmp_path, entry.name)
    (raw.folder / "fetched.json").write_text("{}")
    found = [result for row in converted(entry.model_dump(), raw) for result in row]
    assert len(found) == 5 and sum(isinstance(result, Draft) for result in found) == kept


def test_a_set_of_which_nothing_is_left_says_so(tmp_path):
    folder = tmp_path / "raw" / "nextqa-test"
    (folder / "manual" / "MC").mkdir(parents=True)
    row = {"video": 4, "question": "?", **{f"a{n}": f"o{n}" for n in range(5)}, "answer": 2}
    file = folder / "manual" / "MC" / "test-0.parquet"
    file.write_bytes(published.rows_file([row], ".parquet"))
    (folder / "fetched.json").write_text(json.dumps({"splits": {"test": ["manual/MC/test-0.parquet"]}}))
    with pytest.raises(ValueError, match="has no sample: 1 x its picture or video is not on disk"):
        public_sets.prepared_set("nextqa-test", tmp_path, print)


@pytest.mark.parametrize(
    "mode, colour, hit",
    [
        ("L", 255, True),
        ("RGB", (255,) * 3, True),
        ("RGBA", (255, 255, 255, 0), True),
        ("L", 254, False),
        ("L", 1, False),
    ],
)
def test_only_white_pixels_are_a_mask_whatever_their_transparency(tmp_path, mode, colour, hit):
    folder = tmp_path / "raw" / "x" / "manual" / "Annotations" / "a_1"
    folder.mkdir(parents=True)
    image = Image.new(mode, (4, 2), 0 if mode == "L" else (0,) * len(mode))
    image.paste(colour, (0, 0, 2, 2))
    image.save(folder / "00000.png")
    masks_of = evaluation_tracking.white(public_sets.RawSource(tmp_path, "x"), lambda row: "Annotations/a_1")
    row = {
        "video": "v",
        "expression": "the cat",
        "fps": 1,
        "sampling_fps": 1,
        "width": 4,
        "height": 2,
        "mask_id": ["0"],
        "frame_trajectories": [
            {"frame": 0, "time": 0.0, "points": [{"id": "0", "point": [0.5, 0.5], "occluded": False}]}
        ],
        "masks_of": masks_of,
    }
    if not hit:
        with pytest.raises(ValueError, match="masks without a pixel"):
            list(evaluation_tracking.tracks(row))
        return
    [draft] = evaluation_tracking.tracks(row)
    video = {"part": "v.mp4", "width": 4, "height": 2, "fps": 1, "duration": 1.0, "num_frames": 1}
    example = read_example(json.dumps({"video": video, "branches": draft.branches}))
    [asked] = tasks.questions(example, "x/0")
    right, wrong = (f'<tracks coords="0.0 1 {x} 250">the cat</tracks>' for x in (125, 900))
    assert np.isclose(tasks.score_of(asked, example, right)["hota"], 1)
    assert tasks.score_of(asked, example, wrong)["hota"] == 0
