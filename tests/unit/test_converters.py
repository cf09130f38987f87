"""Raw rows become tasks of the schema: special cases, beside those of test_published.py, and sets of a known form."""

import json
import random

import pytest
from programs import REPOSITORY
from pydantic import TypeAdapter

from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.data.schema import Branch
from molmo2_nemo.evaluate import public_sets
from molmo2_nemo.prepare.converters import CONVERTERS, converter_of
from molmo2_nemo.prepare.converters.common import Draft, Drop, json_items
from molmo2_nemo.prepare.converters.pointing import normal_label

BRANCH = TypeAdapter(Branch)
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


@pytest.mark.parametrize(
    "one, other",
    [
        ("a person on a bike", "People on bikes."),
        ("leaf", "the leaves"),
        ("Wolf", "wolves"),
        ("a bus", "buses"),
        ("cherry", "cherries"),
        ("cookie", "cookies"),
        ("roof", "roofs"),
        ("glass", "glasses"),
        ("snowman", "snowmen"),
        ("specimen", "specimens"),
        ("goose", "geese"),
        ("shoe", "shoes"),
        ("lens", "lenses"),
        ("tooth", "teeth"),
    ],
)
def test_a_noun_and_its_plural_are_one_label(one, other):
    assert normal_label(one) == normal_label(other)


def test_other_words_are_other_labels():
    words = "cap cape tape tap can cane cat car care glass grass bus bush leaf lease man mouse moose horse hose house"
    assert len({normal_label(word) for word in words.split()}) == len(words.split())


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
    asked = [
        {"question": "Q?", "options": ["a", "b"], "answer_id": 1},
        {"question": "R?", "options": ["a", None], "answer_id": 0},
    ]
    kept, *dropped = convert("perception-test", {"video": "v", "mc_question": asked})
    assert [task["question"] for task in kept.branches] == ["Q?"]
    assert dropped == ["fewer than two options, or an empty one"]
    # What a question has no use for is lost; what a rule leaves out is not.
    results = list(converter_of(ENTRIES["perception-test"]).convert({"video": "v", "mc_question": asked}))
    assert [result.unfit for result in results if isinstance(result, Drop)] == [True]
    points = {"id": "c", "image": PNG, "questions": ["Q?"], "answer_points": [{"x": [1.0] * 61, "y": [3.0] * 61}]}
    assert [result.unfit for result in converter_of(ENTRIES["cosyn-point"]).convert(points)] == [False]


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
        "annotator_unsure": False,
        **more,
    }


def test_queries_of_a_short_video_share_a_sample_and_are_often_one_conversation():
    [draft] = convert("Molmo2-VideoPoint", video_point_row())
    assert draft.tree is None and draft.multi_turn == 0
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


def test_subtitles_of_films_may_have_times():
    film = {
        "video_id": "m",
        "movie_name": "M",
        "examples": [{"question": "Q?", "choices": ["a", "b"], "answer_key_position": 1}],
    }
    [draft] = convert("cinepile", film | {"subtitles": "<subtitle> [1.0-2.0] Hello<subtitle> [3.5 - 4] Bye"})
    assert draft.video.subtitles == [(1.0, 2.0, "Hello"), (3.5, 4.0, "Bye")]


def test_code_in_a_text_or_a_table_is_never_run():
    asked = {"visual_input": "H_1.mp4", "gt": "2", "instruction": "The Options are: [__import__('os').system('false')]"}
    with pytest.raises(ValueError, match="no list of options"):
        convert("funqa", asked)
    with pytest.raises(ValueError, match="span"):
        convert("how2qa", {"span": "[__import__('os')]", "video_id": "v", "wrong1": "", "wrong2": "", "wrong3": ""})


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


def answer(branch):
    if branch["task"] == "chat":
        return branch["messages"][-1]["content"]
    return (
        branch["options"][branch["answer"]]
        if "options" in branch
        else branch.get("text", branch.get("answers", [None])[0])
    )


def test_every_data_set_is_converted_and_one_without_columns_is_refused():
    evaluated = {entry.name for entry in load_catalogue(public_sets.CATALOGUE).datasets}
    assert len(ENTRIES) == 108 and set(CONVERTERS) == {*ENTRIES, *evaluated}
    with pytest.raises(ValueError, match="mine cannot be converted: its columns are not known"):
        converter_of({"name": "mine", "fields": None})


def test_another_release_of_moments_has_no_header(tmp_path):
    text = "adult+male/1.mp4,adult+male,3,0\nclap/2.mp4,clapping,3,0\n"
    dropped, draft = read(tmp_path, "moments-in-time", {"manual/trainingSet.csv": text})
    assert dropped == "a label that starts with adult or child"
    assert answer(draft.branches[0]) == "clapping" and "training/clap/2.mp4" in draft.video.names


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
    asked = {"image": "a.jpg", "question": "Q?", "options": '["x", "y, z"]', "answer": "B"}
    [draft] = drafts(asked)  # a cell of CSV
    assert answer(draft.branches[0]) == "y, z"
    for text in ("x, y", '"xy"', '{"x": 1}', "["):
        with pytest.raises(ValueError, match="options is text, it must be a list"):
            drafts(asked | {"options": text})
    for text in ('[{"x": 3, "y": 4}]', '{"x": [3], "y": [4]}', "[[3, 4]]"):
        [draft] = drafts({"image_url": "u", "label": "cat", "points": text})
        assert draft.branches[0]["points"] == [[1, [[3.0, 4.0]]]]
    clip = {"video": "v.mp4", "question": "Q?", "answer": "A", "start": 1.5, "end": 4}
    [draft] = drafts(clip)
    assert (draft.video.start, draft.video.end) == (1.5, 4)
    with pytest.raises(ValueError, match="needs start and end, and the row has one"):
        drafts(clip | {"end": None})
    with pytest.raises(ValueError, match="has the field start and no field end: a clip of a video needs both"):
        drafts({key: value for key, value in clip.items() if key != "end"})
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
