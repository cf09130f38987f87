"""Raw rows of every data set of the catalogue, in their true columns, become tasks of the schema."""

import csv
import io
import json
import random

import pytest
from programs import REPOSITORY
from pydantic import TypeAdapter

from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.data.schema import Branch
from molmo2_nemo.prepare.converters import CONVERTERS, converter_of
from molmo2_nemo.prepare.converters.common import Draft, Drop, json_items

BRANCH = TypeAdapter(Branch)
PNG = {"bytes": b"\x89PNG picture", "path": "x.png"}
ENTRIES = {entry.name: entry.model_dump() for entry in load_catalogue(REPOSITORY / "conf" / "datasets.yaml").sets}


def convert(name, *rows):
    """Drafts of rows; every branch is one of the schema's. Drops come as their reasons."""
    results = []
    for row in rows:
        for result in converter_of(ENTRIES[name]).convert(row):
            if isinstance(result, Draft):
                for branch in result.branches:
                    BRANCH.validate_json(json.dumps(branch))
                json.dumps({**vars(result), "images": None, "video": result.video and vars(result.video)})
            results.append(result.reason if isinstance(result, Drop) else result)
    return results


def source(tmp_path, name, files, splits=None):
    """A raw folder with these files; what is no text is written as JSON."""
    folder = tmp_path / "raw" / name
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "fetched.json").write_text(json.dumps({"name": name, "splits": splits or {}, "complete": True}))
    return RawSource(tmp_path, name)


def read(tmp_path, name, files, splits=None, split=None):
    """Drafts of a set whose rows are read from several files."""
    raw = source(tmp_path, name, files, splits)
    return convert(name, *converter_of(ENTRIES[name]).rows(raw, split))


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


# -- the unusual ones -------------------------------------------------------------------------------------------------


def points_row(label, points, method="pointing", url="https://a.b/c.jpg"):
    return {
        "image_url": url,
        "image_sha256": "0" * 64,
        "points": [{"x": x, "y": y} for x, y in points],
        "count": len(points),
        "label": label,
        "collection_method": method,
    }


def test_points_of_a_label_are_at_most_sixty_and_one_is_needed_where_there_is_a_count():
    rows = [points_row("dot", [(1, k) for k in range(61)]), points_row("dot", [(1, k) for k in range(60)], "counting")]
    many, sixty = convert("pixmo-points", *rows)
    assert many == "more than 60 points" and len(sixty.branches[0]["points"][0][1]) == 60
    with pytest.raises(ValueError, match="no label"):
        convert("pixmo-points", points_row("", [(1, 1)]))
    # Rows of the validation split have counts without points.
    row = {"image_url": "https://f.r/1.jpg", "count": 2, "points": None, "label": "cars"}
    assert convert("pixmo-count", row) == ["a count without points"]
    asked = {"id": "c1", "image": PNG, "questions": ["Where?", "Dots?"], "names": [None, "dots"]}
    points = [{"x": [1.0], "y": [3.0]}, {"x": [1.0] * 61, "y": [3.0] * 61}]
    kept, dropped = convert("cosyn-point", asked | {"answer_points": points})
    assert [branch["label"] for branch in kept.branches] == ["Where?"] and dropped == "more than 60 points"


def test_pixmo_cap_qa_is_split_into_turns():
    def turns(text, **more):
        [draft] = convert("pixmo-cap-qa", {"image_url": "u://x", "question": text, "answer": "Blue.", **more})
        return [message["content"] for message in draft.branches[0]["messages"]]

    assert turns("Which colour?") == ["Which colour?", "Blue."]
    assert turns(None, messages=["Hi", "Hello"]) == turns(None, messages=[{"content": "Hi"}, {"content": "Hello"}])
    with pytest.raises(ValueError, match="alternate"):
        turns("[USER] a [USER] b [ASSISTANT]")


def test_multi_image_points_ask_once_of_each_image_of_all_or_of_some_and_of_the_others():
    row = {
        "image_urls": [f"https://a.b/{k}" for k in range(3)],
        "labels": ["Cats", "a dog", " the cat. "],
        "points": [[{"x": 1.0, "y": 2.0}], [{"x": 8.0, "y": 8.0}], [{"x": 3.0, "y": 4.0}, {"x": 5.0, "y": 6.0}]],
    }
    every = {"Cats": {1: [[1.0, 2.0]], 3: [[3.0, 4.0], [5.0, 6.0]]}, "a dog": {2: [[8.0, 8.0]]}}
    parts = []
    for k in range(200):
        [draft] = convert("Molmo2-MultiImagePoint", row | {"image_urls": [f"{u}-{k}" for u in row["image_urls"]]})
        asked = {}
        for task in draft.branches:
            of = task.get("images", [1, 2, 3])
            assert task["points"] == [[k, p] for k, p in every[task["label"]].items() if k in of]
            asked.setdefault(task["label"], []).append(of)
        assert all(sorted(sum(of, [])) == [1, 2, 3] for of in asked.values()) and set(asked) == set(every)
        parts += [tuple(map(tuple, of)) for of in asked.values()]
    assert set(parts) >= {((1, 2, 3),), ((1,), (2, 3)), ((2,), (1, 3)), ((1, 2), (3,)), ((2, 3), (1,))}
    # Half of them, and a sixth of the others, where all three are drawn.
    share = sum(len(of) == 1 for of in parts) / len(parts)
    assert share == pytest.approx(0.5 + 0.5 / 3, abs=0.08)
    many = [[{"x": 1.0, "y": 1.0}] * 61, *row["points"][1:]]
    kept, *dropped = convert("Molmo2-MultiImagePoint", row | {"points": many})
    assert {task["label"] for task in kept.branches} >= {"a dog"} and set(dropped) == {"more than 60 points"}


def test_a_wrong_question_takes_no_other_of_its_row_along():
    asked = [
        {"question": "Q?", "answers": ["a"]},
        {"question": "", "answers": ["b"]},
        {"question": "R?", "answers": [""]},
    ]
    kept, *dropped = convert("vqa-v2", {"image": "i.jpg", "message_list": asked})
    assert [task["question"] for task in kept.branches] == ["Q?"] and dropped == ["no question", "no answer"]
    odd = MANTIS | {"choices": [["yes"]], "oe_question": [None]}
    assert convert("nlvr2", odd) == ["no question"]
    with pytest.raises(ValueError, match="nothing is asked"):
        convert("vqa-v2", {"image": "i.jpg", "message_list": []})


def video_point_row(**more):
    return {
        "video_id": "abc",
        "video_source": "youtube",
        "video_duration": 200.0,
        "category": "animal",
        "label": "cow",
        "question": "How many?",
        "count": 2,
        "points": [[{"x": 10.0, "y": 20.0}], [{"x": 30.0, "y": 40.0}]],
        "two_fps_timestamps": [70.5, 71.0],
        "raw_timestamps": [70.4, 71.0],
        "raw_frames": [1, 2],
        "clip_start": 63.0,
        "clip_end": 126.0,
        "annotator_unsure": True,
        **more,
    }


def test_video_points_count_time_from_the_start_of_their_window():
    [draft] = convert("Molmo2-VideoPoint", video_point_row())
    assert (draft.video.start, draft.video.end) == (63.0, 126.0) and "abc.mp4" in draft.video.names
    assert draft.branches[0]["points"] == [[7.5, [[10.0, 20.0]]], [8.0, [[30.0, 40.0]]]]
    assert draft.branches[0]["style"] == ["video_point", "video_point_count"] and draft.unit == "percent"
    assert draft.tree is None
    # Queries of a short video share a sample, a fifth of the time as one conversation.
    [short] = convert(
        "Molmo2-VideoPoint",
        video_point_row(video_duration=63.0, clip_start=0.0, clip_end=63.0, two_fps_timestamps=[1.0, 2.5]),
    )
    assert short.video.start is None and short.tree == "" and short.multi_turn == 0.2
    full = [[{"x": 1.0, "y": 1.0}] * 31, [{"x": 1.0, "y": 1.0}] * 30]
    assert convert("Molmo2-VideoPoint", video_point_row(points=full)) == ["more than 60 points"]


def track_row(**more):
    frames = [
        {
            "frame": 0,
            "time": 0.0,
            "points": [
                {"id": 1, "point": [64.0, 36.0], "occluded": False},
                {"id": 2, "point": [1.0, 1.0], "occluded": True},
            ],
        },
        {"frame": 15, "time": 0.5, "points": [{"id": 2, "point": [128.0, 72.0], "occluded": False}]},
        {"frame": 30, "time": 1.0, "points": [{"id": 1, "point": [5.0, 5.0], "occluded": True}]},
    ]
    return {
        "id": "x",
        "video": "v1",
        "expression": "the red car",
        "fps": 30,
        "sampling_fps": 2,
        "width": 640,
        "height": 360,
        "n_frames": 90,
        "mask_id": ["1", "2"],
        "obj_id": [1, 2],
        "anno_id": [0],
        "qid": "q",
        "frame_trajectories": frames,
        **more,
    }


def test_tracks_leave_occluded_points_out_and_the_folder_says_the_task(tmp_path):
    clip = {"clip": "v1_0_90", "video_dataset": "MOSE", "start_frame": 60, "end_frame": 149}  # with both
    files = {
        f"hub/{task}/train-00000.jsonl": lines(track_row(**clip)) for task in ("track", "ground", "single_point_track")
    }
    drafts = read(tmp_path, "Molmo2-VideoTrack", files, {"train": sorted(files)}, "train")
    assert sorted(draft.branches[0]["style"] for draft in drafts) == [
        "video_point_ground_start_end",
        "video_point_track_per_frame",
        "video_single_point_track_per_frame",
    ]
    [task] = drafts[0].branches
    assert task["frames"] == [[0.0, [["1", 0.1, 0.1]]], [0.5, [["2", 0.2, 0.2]]]] and task["fps"] == 2.0
    video = drafts[0].video
    assert video.cut[0] == "MOSE/v1_0_90.mp4" and (video.start, video.end, video.annotation_fps) == (2.0, 5.0, 2.0)
    assert video.frames == ["MOSE/v1", "MOSE/**/v1", "v1"] and video.fps == 30
    assert convert("mevis", track_row(frame_trajectories=[])) == ["nothing is visible in any frame"]


def test_single_object_sets_read_their_configuration_of_one_repository(tmp_path):
    files = {f"hub/{name}/train-0.jsonl": lines(track_row(video=name)) for name in ("lasot", "tnnlt", "vasttrack")}
    [draft] = read(tmp_path, "tnllt", files, {"train": sorted(files)}, "train")
    assert draft.video.names[0] == "tnnlt.mp4" and draft.branches[0]["style"] == "video_single_point_track_per_frame"


def test_academic_video_points_belong_to_their_subset():
    row = {
        "subset": "burst",
        "video_name": "v9",
        "dataset": "AVA",
        "category": "person",
        "count": 1,
        "timestamps": [64.0],
        "points": [[{"x": 50.0, "y": 50.0}]],
        "video_duration": 90.0,
        "clip_start_time": 30.0,
        "clip_end_time": 90.0,
    }
    [draft] = convert("academic-video-point-burst", row)
    assert draft.branches[0]["points"] == [[34.0, [[50.0, 50.0]]]] and draft.tree is None
    assert draft.video.names[0] == "AVA/v9.mp4" and (draft.video.start, draft.video.end) == (30.0, 90.0)
    assert convert("academic-video-point-ovis", row) == []
    subsets = {
        "mevis": "mevis",
        "refyoutube": "ref-youtube-vos",
        "lvvis": "lv-vis",
        "ovis": "ovis",
        "refdavis17": "ref-davis17",
    }
    for subset, name in subsets.items():
        assert len(convert(f"academic-video-point-{name}", row | {"subset": subset, "dataset": None})) == 1


def test_molmo2_cap_has_up_to_three_captions():
    row = {
        "video_id": "y",
        "video_start": 5.0,
        "video_end": 20.0,
        "video_caption": "",
        "merged_caption": "m",
        "video_frame_merged_caption": "long",
        "annotation_score": 3,
    }
    [draft] = convert("Molmo2-Cap", row)
    assert [(b["style"], b["text"]) for b in draft.branches] == [
        ("video_merged_caption", "m"),
        ("video_long_caption", "long"),
    ]
    assert (draft.video.start, draft.video.end) == (5.0, 20.0)
    assert convert("Molmo2-Cap", row | {"annotation_score": 2.5}) == ["annotation_score below 3"]


def test_subtitles_come_as_lists_as_lines_of_a_file_and_as_tagged_text(tmp_path):
    asked = {"video_id": "v", "Question": "Who?", "Answer": "Ann", "NegativeAnswers": ["Bob", "Cy"], "Category": "c"}
    spoken = [{"start": 1.0, "end": 2.5, "text": "Hi"}]
    [draft] = convert("Molmo2-VideoSubtitleQA", asked | {"AlignmentType": "a", "subtitle": spoken})
    assert draft.video.subtitles == [(1.0, 2.5, "Hi")] and sorted(draft.branches[0]["options"]) == ["Ann", "Bob", "Cy"]

    question = {
        "q": "What?",
        "a0": "v",
        "a1": "w",
        "a2": "x",
        "a3": "y",
        "a4": "z",
        "answer_idx": 3,
        "ts": "10.5-20.0",
        "vid_name": "friends_s01",
        "show_name": "Friends",
    }
    subtitles = {"vid_name": "friends_s01", "sub": [{"start": 11.0, "end": 12.0, "text": "Hello"}]}
    files = {"hub/tvqa_train.jsonl": lines(question), "hub/tvqa_preprocessed_subtitles.jsonl": lines(subtitles)}
    [draft] = read(tmp_path, "tvqa", files)
    assert (draft.video.start, draft.video.end, draft.video.fps) == (10.5, 20.0, 3)
    assert "friends_frames/friends_s01" in draft.video.frames and draft.video.subtitles == [(11.0, 12.0, "Hello")]
    assert draft.branches[0]["options"][draft.branches[0]["answer"]] == "y"

    film = {
        "video_id": "m",
        "movie_name": "M",
        "examples": [{"question": "Q?", "choices": ["a", "b"], "answer_key_position": 1}],
    }
    [draft] = convert("cinepile", film | {"subtitles": "<subtitle> Hello <b>there</b>\n<subtitle> Bye"})
    assert draft.video.subtitles == [(0.0, 1e6, "Hello  there\nBye")]
    [draft] = convert("cinepile", film | {"subtitles": "<subtitle> [1.0-2.0] Hello<subtitle> [3.5 - 4] Bye"})
    assert draft.video.subtitles == [(1.0, 2.0, "Hello"), (3.5, 4.0, "Bye")]


def test_funqa_options_are_read_from_text_and_never_run(tmp_path):
    spoken = {"task": "H2", "visual_input": "a.mp4", "instruction": "Why is it funny?", "output": "He slips."}
    options = {
        "task": "H2",
        "visual_input": "a.mp4",
        "gt": "2",
        "instruction": "Why is it funny? Choose from: ['He\\'s slow', \"He slips\"]",
    }
    files = {"hub/FunQA_train.json": [spoken, spoken | {"task": "H1"}], "hub/Funqa_mcqa_v1.json": [options]}
    oe, dropped, mc = read(tmp_path, "funqa", files)
    assert oe.branches[0]["answers"] == ["He slips."] and dropped == "asks for times"
    assert mc.branches[0]["options"] == ["He's slow", "He slips"] and mc.branches[0]["answer"] == 1
    with pytest.raises(ValueError, match="no list of options"):
        convert("funqa", options | {"instruction": "[__import__('os').system('false'), 'b']"})


def test_headless_tables_and_lines_of_text_are_clips(tmp_path):
    file = io.StringIO()
    csv.writer(file).writerow(["vid", "[12:30]", "w1", "w2, with a comma", "w3", "Who?", "me"])
    [draft] = read(tmp_path, "how2qa", {"hub/how2QA_train_release.csv": file.getvalue()})
    assert (draft.video.start, draft.video.end) == (12.0, 30.0) and draft.video.cut == ["vid_12_30.mp4"]
    task = draft.branches[0]
    assert task["options"][task["answer"]] == "me" and "w2, with a comma" in task["options"]
    with pytest.raises(ValueError, match="span"):
        convert("how2qa", {"span": "[__import__('os')]", "video_id": "v", "wrong1": "", "wrong2": "", "wrong3": ""})

    [draft] = read(
        tmp_path, "charades-sta", {"manual/charades_sta_train.txt": "AO8RW 0.0 6.9##a person opens a door.\n"}
    )
    assert draft.video.end == 6.9 and draft.branches[0]["answers"] == ["a person opens a door."]

    row = {
        "qid": 3,
        "query": "Chef cuts",
        "vid": "x_60.0_210.0",
        "duration": 150,
        "relevant_windows": [[82, 150], [0, 4]],
        "relevant_clip_ids": [1],
        "saliency_scores": [[1, 2, 3]],
    }
    files = {"hub/highlight_train_release.jsonl": lines(row, row | {"relevant_windows": [[0, 2]] * 6})}
    kept, dropped = read(tmp_path, "qvhighlights", files)
    assert kept.branches[0]["answers"] == ["Segments: [<time 0.0/>-<time 4.0/>], [<time 82.0/>-<time 150.0/>]"]
    assert "5 windows" in dropped


def test_ego4d_messages_are_ready():
    messages = [{"question": "What?", "answer": "opens", "style": "ego4d_label"}]
    row = {
        "clip": "u_1_2_custom_clip.mp4",
        "message_list": messages,
        "uid": "u",
        "start": 1.0,
        "end": 2.0,
        "corrupt": False,
    }
    [draft] = convert("ego4d", row)
    assert draft.video.cut[0] == "u_1_2_custom_clip.mp4" and draft.branches[0]["style"] == "ego4d_label"
    assert convert("ego4d", row | {"corrupt": True}) == ["marked as corrupt"]


def test_tulu_keeps_alternating_turns_behind_a_system_turn():
    def talk(*roles):
        return [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]

    row = {"id": "1", "messages": talk("system", "user", "assistant", "user"), "source": "ai2/flan"}
    [draft] = convert("tulu-v2-sft-mixture", row)
    assert [m["role"] for m in draft.branches[0]["messages"]] == ["system", "user", "assistant"] and not draft.images
    dropped = convert(
        "tulu-v2-sft-mixture",
        row | {"category": "code"},
        row | {"category": "non-english"},
        row | {"source": "ai2-adapt-dev/tulu_hard_coded_repeated_10"},
        row | {"has_special_token": True},
        row | {"first_message_qwen3_tokens": 5000},
        row | {"messages": talk("user", "user", "assistant")},
    )
    assert len(dropped) == 6 and all(isinstance(reason, str) for reason in dropped)


def test_other_odd_files(tmp_path):
    head = ["record_id", "vid_filename", "q_body", "option0", "option1", "option2", "option3", "answer"]
    [draft] = read(
        tmp_path,
        "sutd-trafficqa",
        {"manual/R2_train.jsonl": lines(head, [1, "b.mp4", "Crash?", "", "yes", "no", "", 2])},
    )
    assert draft.branches[0]["options"] == ["yes", "no"] and draft.branches[0]["answer"] == 1

    action = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\ntumblr_1\tdoes what?\tjump\trun\tsit\teat\tcry\t4\n"
    count = "gif_name\tquestion\tanswer\ntumblr_1\thow often?\t3\n"
    files = {
        f"hub/Train_{kind}_question.csv": action if kind in ("action", "transition") else count
        for kind in ("action", "count", "transition", "frameqa")
    }
    drafts = read(tmp_path, "tgif", files)
    assert [len(draft.branches) for draft in drafts] == [2, 1, 2, 1]
    assert drafts[0].branches[0]["answer"] == 4 and drafts[0].branches[1]["answers"] == ["cry"]

    pair = {"rel_vid_path": "videos/1.webm", "label": "opening", "label_action_antonym_clip_text": "closing"}
    ego = {
        "video_uid": "u",
        "clip_start": 1.5,
        "clip_end": 2.5,
        "clip_text": "C lifts",
        "action_antonym_clip_text": "C drops",
    }
    folder = "hub/ego4d/egoclip_subset_action_antonyms_train_val_test_split/train.jsonl"
    first, second = read(tmp_path, "paxion", {"hub/ssv2/antonyms/train_with_rel_path.json": [pair], folder: lines(ego)})
    assert set(first.branches[0]["options"]) == {"opening", "closing", "Not sure"}
    assert second.video.start == 1.5 and second.branches[0]["options"][second.branches[0]["answer"]] == "C lifts"

    files = {
        "hub/countix_train_mapped.csv": "video_path,class,count\na/b.mp4,hula hooping,4\n",
        "hub/class_to_question.json": {"hula hooping": ["How many turns?"]},
    }
    [draft] = read(tmp_path, "countix", files)
    assert draft.branches[0]["question"] == "How many turns?" and draft.branches[0]["answers"] == ["4"]

    asked = [
        {"question": "What colour?", "answer": "red"},
        {
            "question": "Which?",
            "choices": [
                {"choice": "a", "choice_id": 0, "answer": "wrong"},
                {"choice": "b", "choice_id": 1, "answer": "correct"},
            ],
        },
        {"question": "Which two?", "choices": [{"choice": c, "choice_id": 0, "answer": "correct"} for c in "ab"]},
    ]
    files = {"hub/train.json": [{"video_filename": "video_01234.mp4", "questions": asked}]}
    dropped, options, spoken = read(tmp_path, "clevrer", files)
    assert dropped == "not exactly one right choice" and options.branches[0]["answer"] == 1
    assert spoken.branches[0]["answers"] == ["red"] and "video_01000-02000/video_01234.mp4" in options.video.names


# -- the others: a row of their true columns --------------------------------------------------------------------------

MANTIS = {
    "subset": "s",
    "example_id": "e",
    "images": ["a.jpg", "b.jpg"],
    "mc_question": ["Same?"],
    "oe_question": ["Same or not?"],
    "direct_answer": ["no"],
    "choices": [["yes", "no"]],
    "correct_choice_idx": [1],
}
FIVE = {"question": "why", "a0": "v", "a1": "w", "a2": "x", "a3": "y", "a4": "z", "answer": "3", "type": "CW"}
ASKED = {"Question": "Who?", "Answer": "Ann", "NegativeAnswers": ["Bob"], "Category": "c"}
# Data set -> a row, how many branches it has, and what the first answers.
ROWS = {
    "Molmo2-AskModelAnything": ({"video_id": "v", "question": "Q?", "answer": "A"}, 1, "A"),
    "Molmo2-VideoCapQA": ({"video_id": "v", **ASKED}, 1, "Ann"),
    "nextqa": ({"video": "1", "file": "1164/1", **FIVE}, 1, "y"),
    "intentqa": ({"video_id": "1", **FIVE}, 1, "y"),
    "perception-test": (
        {"video": "v", "mc_question": [{"question": "Q?", "options": ["a", "b", "c"], "answer_id": 2}]},
        1,
        "c",
    ),
    "activitynet-qa": ({"video_name": "abc", "question": "who is it", "question_id": "q", "answer": "Ann"}, 1, "Ann"),
    "llava-video-academic": (
        {
            "id": "1",
            "data_source": "0_30_s_nextqa",
            "video": "v.mp4",
            "conversations": [
                {"from": "human", "value": "<image>\nWhy?\nA. one\nB. two\nAnswer with the letter."},
                {"from": "gpt", "value": "B."},
            ],
        },
        1,
        "two",
    ),
    "newsvideoqa": ({"uni_clipped_id": "c", "question": "Q?", "answer": "A"}, 1, "A"),
    "social-iq-2": ({"vid_name": "v", "q": "Q?", "a0": "a", "a1": "b", "a2": "c", "a3": "d", "answer_idx": 0}, 1, "a"),
    "sports-qa": ({"video": "x/1", "question": "Q?", "answer": "A"}, 1, "A"),
    "star": (
        {
            "video_id": "v",
            "start": 1.0,
            "end": 4.5,
            "question": "Q?",
            "answer": "The door.",
            "choices": [{"choice": "The bed."}, {"choice": "The door."}],
        },
        2,
        "The door.",
    ),
    "video-localized-narratives-qa": (
        {"video_name": "v", "qa_pairs": [{"raw_question": "Q?", "raw_answer": "A", "question_id": 1}]},
        1,
        "A",
    ),
    "video-localized-narratives-caption": (
        {"id": "1", "video": "oops/v.mp4", "captions": ["It runs.", "It sits."], "actor_names": ["dog", "cat"]},
        2,
        "It runs.",
    ),
    "roadtextvqa": ({"video": "v.mp4", "question": "Q?", "answer": ["A", "A"], "questionId": 1}, 1, "A"),
    "camerabench": ({"video_path": "v.mp4", "mc_qa_list": [ASKED, ASKED]}, 2, "Ann"),
    "motionbench": ({"video_path": "v.mp4", "motion_caption": "It turns."}, 1, "It turns."),
    "moments-in-time": ({"video_path": "juggling/1.mp4", "label": "slam+dunking"}, 1, "slam dunking"),
    "kinetics": ({"video": "a/1.mp4", "part": "k600", "label": "juggling"}, 1, "juggling"),
    "coin": ({"video": "v", "segment": [3.0, 9.0], "label": "cut bread", "id": "1"}, 1, "cut bread"),
    "epic-kitchens": (
        {
            "participant_id": "P01",
            "video_id": "P01_01",
            "start_timestamp": "00:01:00.50",
            "stop_timestamp": "00:01:02.00",
            "narration": "open door",
        },
        1,
        "open door",
    ),
    **{
        name: (track_row(), 1, None)
        for name in (
            "mevis",
            "refvos",
            "vicas",
            "revos",
            "lv-vis",
            "burst",
            "ref-davis17",
            "youtube-vis",
            "moca",
            "trackingnet",
            "vasttrack",
            "got10k",
            "webuav",
            "lasot",
            "tnl2k",
            "webuot",
            "lvos-v2",
            "lvos-v1",
            "latot",
            "uw-cot220",
        )
    },
}
# Those with tests of their own, above.
UNUSUAL = {
    "Molmo2-VideoPoint",
    "Molmo2-VideoTrack",
    "tnllt",
    "Molmo2-Cap",
    "Molmo2-VideoSubtitleQA",
    "tvqa",
    "cinepile",
    "funqa",
    "how2qa",
    "charades-sta",
    "qvhighlights",
    "ego4d",
    "sutd-trafficqa",
    "tgif",
    "paxion",
    "countix",
    "clevrer",
    "youcook2",
    *(f"academic-video-point-{s}" for s in ("mevis", "ref-youtube-vos", "lv-vis", "ovis", "burst", "ref-davis17")),
}
UNKNOWN = {"videochatgpt"}
# Those of tests/unit/test_published.py.
PUBLISHED = {path.stem for path in (REPOSITORY / "tests" / "published").glob("*.yaml")}


def answer(branch):
    if branch["task"] == "chat":
        return branch["messages"][-1]["content"]
    return (
        branch["options"][branch["answer"]]
        if "options" in branch
        else branch.get("text", branch.get("answers", [None])[0])
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_true_columns_becomes_a_sample(name):
    row, branches, first = ROWS[name]
    [draft] = convert(name, row)
    assert len(draft.branches) == branches and answer(draft.branches[0]) == first
    assert bool(draft.images) == (ENTRIES[name]["modality"] in ("image", "multi-image"))
    assert bool(draft.video) == (ENTRIES[name]["modality"] == "video")


def test_every_data_set_is_converted_or_refused_with_the_reason():
    assert len(ENTRIES) == 108 and set(ENTRIES) == UNUSUAL | set(ROWS) | UNKNOWN | PUBLISHED
    assert not UNUSUAL & set(ROWS) and set(CONVERTERS) == set(ENTRIES) - UNKNOWN
    for name in UNKNOWN:
        with pytest.raises(ValueError, match=f"{name} cannot be converted: its columns are not known"):
            converter_of(ENTRIES[name])


def test_segments_of_databases(tmp_path):
    segment = {"segment": [10.0, 20.5], "sentence": "cut the bread", "label": "cutting", "id": 0}
    videos = {
        "v": {"subset": "training", "annotation": [segment], "annotations": [segment]},
        "w": {"subset": "validation", "annotation": [segment], "annotations": [segment]},
    }
    [draft] = read(tmp_path, "coin", {"manual/COIN.json": {"database": videos}})
    assert (draft.video.start, draft.video.end) == (10.0, 20.5) and answer(draft.branches[0]) == "cutting"
    part, whole = read(tmp_path, "youcook2", {"manual/youcookii_annotations_trainval.json": {"database": videos}})
    assert part.video.start == 10.0 and whole.video.start is None and "<time 20.5/>" in whole.branches[0]["question"]
    files = {
        "manual/train_q.json": [{"video_name": "v", "question": "is it", "question_id": "1"}],
        "manual/train_a.json": [{"question_id": "1", "answer": "yes"}],
        "manual/activity_net.v1-3.min.json": {"database": videos},
    }
    whole, part = read(tmp_path, "activitynet-qa", files)
    assert answer(whole.branches[0]) == "yes" and part.video.end == 20.5 and "v_v.mp4" in whole.video.names


def test_readers_of_lists_and_maps(tmp_path):
    files = {
        "manual/k600_train_list_videos.txt": "a/1.mp4 2\n",
        "manual/k700_train_list_videos.txt": "b 2.mp4 0\n",
        "manual/k710_label_map.txt": "zero\none\ntwo\n",
        "manual/map_k600.json": {"2": 1},
        "manual/map_k700.json": [2, 0],
    }
    assert [(d.video.names[0], answer(d.branches[0])) for d in read(tmp_path, "kinetics", files)] == [
        ("k600/a/1.mp4", "one"),
        ("k700/b 2.mp4", "two"),
    ]
    for text in ("adult+male/1.mp4,adult+male\nclap/2.mp4,clapping\n", "video_path,label\nclap/2.mp4,clapping\n"):
        *_, draft = read(tmp_path, "moments-in-time", {"manual/train.csv": text})
        assert answer(draft.branches[0]) == "clapping"
    files = {
        "manual/map_vid_vidorID.json": {"1": "11/1"},
        "manual/train.csv": "video,question,answer,qid,type,a0,a1,a2,a3,a4\n1,why did he,2,0,CW,a,b,c,d,e\n",
    }
    [draft] = read(tmp_path, "nextqa", files)
    assert draft.video.names[0] == "11/1.mp4" and answer(draft.branches[0]) == "c"
    assert draft.branches[0]["question"] == "why did he?"


def test_an_own_set_of_a_known_form_needs_only_its_entry():
    def drafts(row, **entry):
        return list(converter_of({"name": "mine", "fields": dict.fromkeys(row, ""), **entry}).convert(row))

    [draft] = drafts({"image": PNG, "question": "Q?", "answer": "A"})
    assert draft.images == [PNG["bytes"]] and answer(draft.branches[0]) == "A"
    [draft] = drafts({"video_url": "https://a.b/c.mp4", "question": "Q?", "options": ["x", "y"], "answer": "B"})
    assert draft.video.names == ["https://a.b/c.mp4"] and answer(draft.branches[0]) == "y"
    [draft] = drafts({"image_url": "u", "label": "cat", "points": [{"x": 3, "y": 4}]}, convert={"unit": "pixels"})
    assert draft.unit == "pixels" and draft.branches[0]["points"] == [[1, [[3.0, 4.0]]]]
    [draft] = drafts({"file_name": "a.jpg", "text": "A cat."})
    assert draft.images == ["a.jpg"] and draft.branches[0]["task"] == "caption"
    talk = [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "Hello"}]
    [draft] = drafts({"image": {"path": "i.png"}, "conversations": talk})
    assert answer(draft.branches[0]) == "Hello" and draft.branches[0]["messages"][0]["content"] == "Hi"
    [draft] = drafts(
        {"pic": "a.jpg", "q": "Q?", "a": ["A", "A", "B"]},
        convert={"kind": "question", "style": "s", "columns": {"image": "pic", "question": "q", "answer": "a"}},
    )
    assert draft.branches[0] == {"task": "question", "question": "Q?", "answers": ["A", "A", "B"], "style": "s"}
    with pytest.raises(ValueError, match="needs the column answer"):
        drafts({"question": "Q?"}, convert={"kind": "question"})
    with pytest.raises(ValueError, match="are those of no known form"):
        drafts({"foo": 1})
    with pytest.raises(ValueError, match="one of chat, pointing"):
        drafts({"foo": 1}, convert={"kind": "magic"})


def test_long_arrays_are_read_item_by_item(tmp_path):
    items = [
        {"n": n, "text": 'a "qa_pairs": [ ] \\ ü' * (n % 7), "deep": [[n], {}]}
        for n in range(random.Random(0).randint(300, 400))
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"info": {"x": "y" * 500}, "qa_pairs": items, "more": [1]}, indent=2))
    assert list(json_items(path, "qa_pairs")) == items
    path.write_text("  " + json.dumps(items))
    assert list(json_items(path)) == items
    path.write_text(json.dumps(items)[:-30])
    with pytest.raises(ValueError, match="is broken after"):
        list(json_items(path))
    path.write_text('{"other": []}')
    with pytest.raises(ValueError, match="no JSON array under qa_pairs"):
        list(json_items(path, "qa_pairs"))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"columns": {"question": "qeury"}}, "columns.question='qeury', which is none of its fields: image, query"),
        ({"columns": {"questoin": "query"}}, "columns.questoin, which nothing reads; it may have answer, caption"),
        ({"columns": "query"}, "columns='query': it is {what: COLUMN}"),
        ({"kind": "qa"}, "kind='qa', which is none of chat, pointing"),
        ({"kind": ["question"]}, "kind=.'question'., which is none of"),
        ({"kind": "question", "columns": None}, "needs the column question: name it in convert.columns"),
        ({"unit": "pixel"}, "unit='pixel', which is none of fraction"),
        ({"style": 3}, "style=3: it is a word"),
        ({"kind": "pointing", "style": "vqa2"}, "style=vqa2, which says not how to point"),
        ({"colums": {}}, "it may have the keys columns, kind, style, unit"),
    ],
)
def test_every_mistake_of_convert_has_its_sentence(change, sentence):
    entry = {"name": "mine", "fields": dict.fromkeys(("image", "query", "answer"), ""), "media": {"kind": "in-parquet"}}
    with pytest.raises(ValueError, match=f"^mine has convert.*{sentence}"):
        converter_of(entry | {"convert": {"kind": "question", "columns": {"question": "query"}} | change})


def test_media_without_a_column_of_them_are_refused():
    entry = {"name": "mine", "fields": {"photo": "", "question": "", "answer": ""}, "media": {"kind": "in-parquet"}}
    with pytest.raises(ValueError, match="none of its fields .photo, question, answer. is known to hold pictures"):
        converter_of(entry)
    [draft] = converter_of(entry | {"convert": {"columns": {"image": "photo"}}}).convert(
        {"photo": PNG, "question": "Q?", "answer": "A"}
    )
    assert draft.images == [PNG["bytes"]]
