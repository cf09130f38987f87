"""Annotations in the formats that people have: each small file becomes the samples that it means.

The files are written here in the forms that the documents named in molmo2_nemo/prepare/formats/ show.
"""

import base64
import io
import json
import tarfile

import pytest
from own_pictures import example_of, examples, make_pictures, pointed, read, read_file

from molmo2_nemo.data.schema import Message, read_example
from molmo2_nemo.prepare import own_data
from molmo2_nemo.prepare.formats import coco as coco_format

ASKED = [Message("user", "What is it?"), Message("assistant", "A cat.")]
STYLES = ["pointing", "point_count", "counting"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("own") / "pictures").resolve()


# -- conversations ----------------------------------------------------------------------------------------------------


def llava(question="<image>\nWhat is it?", answer="A cat.", **keys):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "1/2", "image": "cat.jpg", "conversations": turns} | keys


def messages(*contents, **keys):
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents)]} | keys


def data_url(pictures):
    return "data:image/jpeg;base64," + base64.b64encode((pictures / "cat.jpg").read_bytes()).decode()


TYPED_TEXT, TYPED_ANSWER = {"type": "text", "text": "What is it?"}, [{"type": "text", "text": "A cat."}]
ONE_PICTURE = [
    llava(),
    llava("What is it?\n<image>"),
    llava("What is it?"),
    llava(image=["cat.jpg"]),
    messages("<image>What is it?", "A cat.", images=["cat.jpg"]),
    messages("<image>What is it?", "A cat.", image="cat.jpg"),
    messages("<image>What is it?", "A cat.", images=[{"path": "cat.jpg"}]),
    messages("<image>What is it?", "A cat.", images=[{"bytes": None, "path": "cat.jpg"}]),
    messages([{"type": "image", "path": "cat.jpg"}, TYPED_TEXT], TYPED_ANSWER),
    messages([{"type": "image", "image": "file://cat.jpg"}, TYPED_TEXT], "A cat."),
    messages([{"type": "image_url", "image_url": {"url": "cat.jpg"}}, TYPED_TEXT], "A cat."),
    messages([{"type": "image"}, TYPED_TEXT], TYPED_ANSWER, images=["cat.jpg"]),
    {"instruction": "<image>What is it?", "input": "", "output": "A cat.", "images": ["cat.jpg"]},
    {"query": "<image>What is it?", "response": "A cat.", "images": ["cat.jpg"], "history": []},
    {"conversation": [{"human": "<image>What is it?", "assistant": "A cat."}], "images": ["cat.jpg"]},
]


@pytest.mark.parametrize("line", ONE_PICTURE)
def test_a_question_about_one_picture(pictures, line):
    example = example_of(pictures, line)
    assert example.branches == [ASKED] and [image.width for image in example.images] == [451]


def test_a_picture_inside_of_the_line(pictures):
    part = {"type": "image_url", "image_url": {"url": data_url(pictures)}}
    outcome = read(pictures, messages([part, TYPED_TEXT], "A cat."))
    [(name, file)] = outcome.sample.files
    assert name == "img0.jpeg" and file.read_bytes() == (pictures / "cat.jpg").read_bytes()


TWO = {"images": ["cat.jpg", "deep/turned.jpg"]}
TEXTS = [
    # All pictures come first, so placeholders at the edge of the first question say nothing.
    (messages("<image><image>Which?", "A.", **TWO), ["Which?", "A."]),
    (messages("<image>\n<image>\nWhich?", "A.", **TWO), ["Which?", "A."]),
    # Elsewhere they name a picture, as Molmo2 does before each of several.
    (messages("Is <image> like <image>?", "No.", **TWO), ["Is Image 1 like Image 2?", "No."]),
    (messages("<image>is a cat, <image>?", "A cup.", **TWO), ["Image 1 is a cat, Image 2?", "A cup."]),
    (messages("<image>What?", "A.", "<image>And?", "B.", **TWO), ["Image 1 What?", "A.", "Image 2 And?", "B."]),
    (messages("In <image> I see", "a cat.", images=["cat.jpg"]), ["In the image I see", "a cat."]),
    (messages("Hello", "Hi.", "<image>What?", "A cat.", images=["cat.jpg"]), ["Hello", "Hi.", "What?", "A cat."]),
    (messages("<video>What?", "Bikes.", videos=["bikes.mp4"]), ["What?", "Bikes."]),
    (messages([{"type": "video", "path": "bikes.mp4"}, {"type": "text", "text": "What?"}], "B."), ["What?", "B."]),
    (llava("<image>\nWhat?", "Bikes.") | {"video": "bikes.mp4", "image": None}, ["What?", "Bikes."]),
    (messages("Hello", "Hi.", images=[], system="Be kind."), ["Be kind.", "Hello", "Hi."]),
    ({"instruction": "Add.", "input": "2 + 2", "output": "4", "history": [["Hi", "Hello"]]}, None),
]


@pytest.mark.parametrize("line, texts", TEXTS)
def test_what_placeholders_become(pictures, line, texts):
    line = {key: value for key, value in line.items() if value is not None}
    [talk] = example_of(pictures, line).branches
    assert [message.content for message in talk] == (texts or ["Hi", "Hello", "Add.\n2 + 2", "4"])


REFUSED = [
    (
        messages("<image><image>Which?", "A.", images=["cat.jpg"]),
        "messages have <image> 2 times, and there is 1 image:",
    ),
    (messages("<image>Which?", "A."), "messages have <image> 1 times, and there are 0 images"),
    (llava("<image>\n<image>\nWhich?"), "conversations have <image> 2 times"),
    (llava(answer=""), "conversations[1].value is empty"),
    (llava("<image>"), "conversations[0].value is empty"),
    (llava("<image>\nWhat <bbox>?"), "conversations[0].value holds <bbox>, which stands for nothing here"),
    (llava(image="dog.jpg"), 'image = "dog.jpg" is not in'),
    (llava() | {"conversations": [{"from": "robot", "value": "x"}]}, 'conversations[0].from="robot" is none of user'),
    (messages("<audio>What?", "A.", audios=["a.wav"]), "audios: sounds are not read"),
    (messages("<image>A <ref-object>?", "A.", images=["cat.jpg"], objects={"ref": ["a"]}), "objects: write the boxes"),
    (messages("<image><video>Q", "A.", images=["cat.jpg"], videos=["bikes.mp4"]), "one video, or images"),
    (messages([{"type": "audio", "path": "a.wav"}], "A."), 'messages[0].content[0] is a part of the type "audio"'),
    (messages([{"type": "image", "url": "https://a.b/c.jpg"}], "A."), "is an address: download"),
    (messages([{"type": "image"}], "A."), "names no image, and there is none beside the messages"),
    ({"instruction": "What?", "output": " "}, "output is empty"),
    ({"query": "", "response": "A."}, "query is empty"),
]


@pytest.mark.parametrize("line, reason", REFUSED)
def test_conversations_that_cannot_be_understood(pictures, line, reason):
    mistakes = read(pictures, line).mistakes
    assert any(reason in mistake for mistake in mistakes), mistakes


def test_keys_that_are_not_used_are_said(pictures):
    outcome = read(pictures, llava(source="web", height=3))
    assert outcome.notes == ["the key height is not used", "the key source is not used"]


# -- files ------------------------------------------------------------------------------------------------------------


def test_what_is_in_a_file_is_recognised(pictures, tmp_path):
    line = {"image": "cat.jpg", "task": "caption", "text": "A cat."}
    texts = {
        "array.json": json.dumps([line, llava()]),
        "pretty.json": json.dumps(line, indent=1),
        "lines.json": f"{json.dumps(line)}\n{json.dumps(llava())}\n",
        "lines.txt": f"\ufeff{json.dumps(line)}\n\n{json.dumps(llava())}",
        "array.jsonl": json.dumps([line]),
    }
    places = {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = read_file(pictures, tmp_path / name)
        assert all(example for _, example in found)
        places[name] = [(outcome.place, outcome.form) for outcome, _ in found]
    assert places["array.json"] == [("item 1", "own"), ("item 2", "conversations")]
    assert places["lines.json"] == [("line 1", "own"), ("line 2", "conversations")]
    assert places["lines.txt"] == [("line 1", "own"), ("line 3", "conversations")]
    assert places["pretty.json"] == [("the object", "own")] and places["array.jsonl"] == [("item 1", "own")]
    # A format that is forced is that of every line.
    (tmp_path / "lines.txt").write_text(json.dumps(line))
    [(outcome, _)] = read_file(pictures, tmp_path / "lines.txt", form="conversations")
    assert "it is not in the format conversations" in outcome.mistakes[0]
    (tmp_path / "broken.json").write_text("[" + json.dumps(line) + ", {")
    with pytest.raises(ValueError, match="broken.json cannot be read: it is broken after item 1"):
        read_file(pictures, tmp_path / "broken.json")


def test_texts_that_are_no_lines_of_utf8(pictures, tmp_path):
    line, file = {"image": "cat.jpg", "task": "caption", "text": "Eine Kätzin."}, tmp_path / "lines.jsonl"
    text = json.dumps(line, ensure_ascii=False)
    # Objects that are broken into lines, or that no line break parts, are told apart.
    for objects in (json.dumps(line, indent=1) + "\n\n" + json.dumps(line, indent=1), text + text, text + "\r" + text):
        file.write_bytes(objects.encode())
        found = read_file(pictures, file)
        assert [example.branches[0].text for _, example in found] == ["Eine Kätzin."] * 2
    file.write_text("\n" + json.dumps(line, indent=1) + "\n" + json.dumps(line))
    assert [outcome.place for outcome, _ in read_file(pictures, file)] == ["object 1 (line 2)", "object 2 (line 7)"]
    file.write_text(json.dumps(line, indent=1) + "\n{")
    with pytest.raises(ValueError, match="objects that are broken into lines: write one object a line"):
        read_file(pictures, file)
    file.write_text('{"image": "cat.jpg"\n' + json.dumps(line))  # one line is broken, and not all of them
    broken, whole = read_file(pictures, file)
    assert "it is not JSON" in broken[0].mistakes[0] and whole[1]
    # A line of Latin-1 among others, and files of it and of UTF-16.
    file.write_bytes(text.encode("latin-1") + b"\n" + text.encode())
    latin, utf8 = read_file(pictures, file)
    assert latin[0].mistakes == ["it is not UTF-8 text: save the file as UTF-8"] and utf8[1]
    for name, content in (
        ("array.json", f"[{text}]".encode("latin-1")),
        ("rows.csv", "image,text\ncat.jpg,Kätzin".encode("latin-1")),
        *[(name, text.encode(code)) for name in ("a.jsonl", "a.json", "a.csv") for code in ("utf-16", "utf-16-le")],
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} .*not UTF-8 text.*: save (it|the file) as UTF-8"):
            read_file(pictures, tmp_path / name)
    for suffix in ("json", "jsonl", "csv", "xml", "parquet", "tar"):
        (tmp_path / f"nothing.{suffix}").write_bytes(b"")
        with pytest.raises(ValueError, match=f"nothing.{suffix} is empty"):
            read_file(pictures, tmp_path / f"nothing.{suffix}")


def coco(**changes):
    return {
        "images": [{"id": 7, "file_name": "cat.jpg", "width": 451, "height": 300}]
        + [{"id": 8, "file_name": "deep/turned.jpg", "width": 400, "height": 600}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "person", "keypoints": ["left_eye", "right_eye"]}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 90.2, 60], "iscrowd": 0},
            {"image_id": 7, "category_id": 1, "bbox": [90.2, 0, 90.2, 60]},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 451, 300], "keypoints": [45.1, 30, 2, 90.2, 30, 1]},
        ],
    } | changes


def test_mistakes_of_coco_are_of_one_image_each(pictures, tmp_path):
    file, box = tmp_path / "instances.json", {"image_id": 8, "category_id": 1, "bbox": [40, 60, 40, 60]}

    def outcomes(*annotations, **changes):
        file.write_text(json.dumps(coco(annotations=[box, *annotations]) | changes))
        found = read_file(pictures, file)
        assert pointed(found[1][1].branches) == {"cat": [(0.15, 0.15)]}  # the image without a mistake
        return [(outcome.place, mistake) for outcome, _ in found for mistake in outcome.mistakes]

    for wrong, reason in (
        ({"category_id": 9, "bbox": [0, 0, 1, 1]}, "category_id=9, which is none of the categories"),
        ({"category_id": 1, "bbox": ["0", 0, 1, 1]}, 'bbox = ["0", 0, 1, 1], not 4 numbers'),
        ({"category_id": 2, "keypoints": [1, 2]}, "keypoints = [1, 2], not 6 numbers"),
    ):
        assert outcomes({"image_id": 7} | wrong) == [('image "cat.jpg"', f"an annotation has {reason}")]
    assert outcomes({"image_id": 9}, {"image_id": 9}, {"category_id": 1}) == [
        ("annotation 4", "it has no image_id"),
        ("annotation of image_id=9", "image_id=9 is none of the images, and 2 annotations have it"),
    ]
    images = [{"id": 7}, {"id": "8", "file_name": "deep/turned.jpg"}, {"id": 8, "file_name": "cat.jpg"}]
    assert [place for place, _ in outcomes(images=images)] == ["image 1", 'image "cat.jpg"']
    # Ids may be texts in one place and numbers in another, and what is not read is counted.
    segment = {"image_id": 7, "category_id": 1, "segmentation": [[0, 0, 1, 1, 2, 0]]}
    file.write_text(
        json.dumps(coco(annotations=[{"image_id": "7", "category_id": "1", "bbox": [0, 0, 9, 9]}, segment]))
    )
    outcome, example = read_file(pictures, file)[0]
    assert example and outcome.notes == [coco_format.NOTHING_READ]


def test_coco(pictures, tmp_path):
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(coco()))
    (first, example), (second, nothing) = read_file(pictures, file)
    # Centres of boxes; of keypoints those that can be seen.
    assert pointed(example.branches) == {
        "cat": [(0.1, 0.1), (0.3, 0.1)],
        "person": [(0.5, 0.5)],
        "left eye": [(0.1, 0.1)],
    }
    assert first.form == "coco" and example.branches[0].style == STYLES
    assert nothing is None and not second.mistakes and second.notes == [own_data.NOTHING_MARKED]
    # A copy of another size has the same points; a turned one does not.
    for size, mistake in (((902, 600), None), ((300, 451), "after its EXIF rotation"), ((400, 400), "another file")):
        document = coco()
        document["images"][0] |= dict(zip(("width", "height"), size))
        file.write_text(json.dumps(document))
        outcome, example = read_file(pictures, file)[0]
        assert mistake in outcome.mistakes[0] if mistake else pointed(example.branches)["cat"][0] == (0.05, 0.05)
    # Boxes of two things may have the same centre.
    boxes = [{"image_id": 7, "category_id": 1, "bbox": box} for box in ([0, 0, 90, 60], [15, 10, 60, 40])]
    file.write_text(json.dumps(coco(annotations=boxes)))
    assert len(pointed(read_file(pictures, file)[0][1].branches)["cat"]) == 2
    # Around a crowd nobody has counted, and of unlabelled keypoints nobody knows.
    document = coco()
    document["annotations"] += [
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9], "keypoints": [0] * 6},
    ]
    file.write_text(json.dumps(document))
    assert list(pointed(read_file(pictures, file)[0][1].branches)) == ["person"]
    file.write_text(json.dumps(coco(annotations=[{"image_id": 7, "caption": "A cat. "}])))
    assert examples(pictures, file)[0].branches[0].text == ["A cat."]
    file.write_text(json.dumps(coco(annotations=[{"image_id": 7, "category_id": 1, "bbox": [900, 0, 2, 2]}])))
    assert read_file(pictures, file)[0][0].mistakes[0].startswith('point 1 of "cat" = [901.0, 1.0] is outside')


IMAGES_OF_CVAT = """<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>
<image id="0" name="cat.jpg" width="451" height="300">
  <points label="eye" points="45.10,30.00;90.20,30.00" occluded="0"></points>
  <box label="cat" xtl="0" ytl="0" xbr="90.2" ybr="60" occluded="0"><attribute name="a">b</attribute></box>
  <polygon label="cat" points="0,0;180.4,0;180.4,60" occluded="0"></polygon>
  <tag label="good"></tag>
</image><image id="1" name="deep/turned.jpg" width="400" height="600"></image></annotations>"""
VIDEO_OF_CVAT = """<annotations><version>1.1</version><meta><task><source>bikes.mp4</source>
<original_size><width>640</width><height>272</height></original_size></task></meta>
<track id="3" label="bike">{}</track></annotations>"""


def test_cvat(pictures, tmp_path):
    file = tmp_path / "annotations.xml"
    file.write_text(IMAGES_OF_CVAT)
    [example] = examples(pictures, file)
    assert pointed(example.branches) == {"eye": [(0.1, 0.1), (0.2, 0.1)], "cat": [(0.1, 0.1), (0.2, 0.1)]}
    shape = '<box frame="{}" xtl="0" ytl="0" xbr="{}" ybr="136" outside="{}" occluded="0" keyframe="1"></box>'
    file.write_text(VIDEO_OF_CVAT.format("".join(shape.format(k, 128 + 5.12 * k, int(k > 30)) for k in range(60))))
    [example] = examples(pictures, file)
    [task] = example.branches
    # Every frame is annotated, so those nearest to half seconds are taken: 0, 12 or 13, 25.
    assert task.fps == 2 and [seconds for seconds, _ in task.frames] == [0, 0.5, 1]
    assert task.frames[0][1] == [("3", 0.1, 0.25)] and task.frames[2][1] == [("3", 0.2, 0.25)]
    for text, reason in (("<annotations><image", "is not XML"), ("<dataset/>", "has <dataset> on top")):
        file.write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_file(pictures, file)
    # A shape that is not read spoils its picture, and no other.
    cat, cup = IMAGES_OF_CVAT.split("<image")[1:]
    cup = cup.replace("></image>", '><mask label="cup"/><box xtl="a"/><box label="x" xtl="a"/></image>')
    file.write_text(f"<annotations><image{cat}<image{cup}")
    (first, example), (second, _) = read_file(pictures, file)
    assert example and first.notes == ["attributes of shapes, not used", "tags of a whole picture, not used"]
    assert second.place == 'image "deep/turned.jpg"' and [m.split(" (")[0] for m in second.mistakes] == [
        "the shape <mask> is not read: draw points or boxes",
        "a <box> has no label",
        "a <box> has coordinates that are no numbers",
    ]
    # The advice works: a file without <source>, and with it.
    tracks = shape.format(0, 128, 0) + shape.format(25, 128, 0)
    file.write_text(VIDEO_OF_CVAT.replace("<source>bikes.mp4</source>", "").format(tracks))
    [(outcome, _)] = read_file(pictures, file)
    assert "add <source>FILE</source> to the <task>" in outcome.mistakes[0]
    file.write_text(VIDEO_OF_CVAT.format(tracks))
    assert examples(pictures, file)
    file.write_text(VIDEO_OF_CVAT.format(tracks.replace('frame="25"', "")))
    assert read_file(pictures, file)[0][0].mistakes == ["a <box> of the track 3 has no frame, or one that is no number"]


def test_skeletons_of_cvat(pictures, tmp_path):
    """As cvat/apps/dataset_manager/formats/cvat.py writes them: the frame is that of the <skeleton>."""
    file = tmp_path / "annotations.xml"
    point = '<points label="{}" keyframe="1" outside="{}" occluded="0" points="{},27.20"></points>'
    skeletons = [
        f'<skeleton frame="{k}" keyframe="1" z_order="0">{point.format("nose", 0, 64 + k)}'
        f"{point.format('eye', int(k > 20), 128)}</skeleton>"
        for k in range(26)
    ]
    file.write_text(VIDEO_OF_CVAT.format("".join(skeletons)))
    [example] = examples(pictures, file)
    # The frame of the half second is 12 or 13 of 25.
    tracks = {
        task.label: [(seconds, name, round(640 * x)) for seconds, [(name, x, _)] in task.frames]
        for task in example.branches
    }
    assert tracks["eye"] == [(0, "3", 128), (0.5, "3", 128)]
    assert [(seconds, x) for seconds, _, x in tracks["nose"]] in (
        [(0, 64), (0.5, 64 + 12), (1, 89)],
        [(0, 64), (0.5, 64 + 13), (1, 89)],
    )
    file.write_text(
        '<annotations><image id="0" name="cat.jpg" width="451" height="300"><skeleton label="person">'
        f"{point.format('nose', 0, 45.1)}{point.format('eye', 1, 90)}</skeleton></image></annotations>"
    )
    [example] = examples(pictures, file)
    assert list(pointed(example.branches)) == ["nose"]


PROJECT_OF_CVAT = """<annotations><version>1.1</version><meta><project><tasks>
<task><id>5</id>{size}<subset>{subset}</subset><start_frame>10</start_frame><frame_filter>step=2</frame_filter>
<source>uneven.mkv</source></task>
<task><id>6</id><size>250</size><subset>Train</subset><start_frame>0</start_frame><stop_frame>249</stop_frame>
<source>bikes.mp4</source></task></tasks></project></meta>
<track id="0" label="bike" task_id="6">{shapes}</track></annotations>"""


def test_projects_of_cvat(pictures, tmp_path):
    """The frames of a project's tasks are counted on, within a subset (class ProjectData of CVAT's bindings.py)."""
    file = tmp_path / "annotations.xml"
    shape = '<box frame="{}" xtl="0" ytl="0" xbr="128" ybr="136" outside="0" occluded="0" keyframe="1"></box>'

    def outcome(first, subset="Train", size="<size>20</size>"):
        shapes = "".join(shape.format(first + k) for k in (0, 25))
        file.write_text(PROJECT_OF_CVAT.format(subset=subset, size=size, shapes=shapes))
        [found] = read_file(pictures, file)
        return found

    for found, example in (outcome(10 + 20 * 2), outcome(0, subset="Test"), outcome(0, subset="Test", size="")):
        assert found.place == 'video "bikes.mp4"' and not found.mistakes
        assert [seconds for seconds, _ in example.branches[0].frames] == [0, 1]
    assert outcome(0)[0].mistakes == [
        "the track 0 has the frame 0, which is none of the task 6: export each task by itself"
    ]
    assert "a task before it has no <size>: export each task by itself" in outcome(0, size="")[0].mistakes[0]
    file.write_text(file.read_text().replace('task_id="6"', 'task_id="7"'))
    assert "task_id=7 is that of no <task>" in read_file(pictures, file)[0][0].mistakes[0]


def region(kind, **value):
    size = {"original_width": 451, "original_height": 300, "image_rotation": 0}
    return {"id": "a", "type": kind, "from_name": "tag", "to_name": "img", "value": value} | size


@pytest.mark.parametrize(
    "name",
    [
        "/data/upload/3/0a1b2c3d-cat.jpg",
        "/data/local-files/?d=some/where/cat.jpg",
        "s3://bucket/cat.jpg",
        "cat.jpg",
        "https://a.b/c/cat.jpg?x=1",
    ],
)
def test_label_studio(pictures, tmp_path, name):
    regions = [
        region("keypointlabels", x=10, y=20, width=0.5, keypointlabels=["eye"]),
        region("rectanglelabels", x=10, y=20, width=20, height=40, rotation=0, keypointlabels=["cat"]),
        region("ellipselabels", x=30, y=40, radiusX=5, radiusY=9, rotation=0, ellipselabels=["cat"]),
        {"type": "choices", "value": {"choices": ["good"]}},
    ]
    annotations = [{"result": [], "was_cancelled": True}, {"result": regions, "was_cancelled": False}]
    task = {"id": 5, "data": {"image": name}, "annotations": annotations, "predictions": [{"result": regions[:1]}]}
    smallest = {"image": name, "id": 5, "kp": [regions[0]["value"] | {"original_width": 451, "original_height": 300}]}
    file = tmp_path / "project.json"
    file.write_text(json.dumps([task, smallest]))
    found = read_file(pictures, file)
    assert [outcome.form for outcome, _ in found] == ["label_studio"] * 2 and all(example for _, example in found)
    assert pointed(found[0][1].branches) == {"eye": [(0.1, 0.2)], "cat": [(0.2, 0.4), (0.3, 0.4)]}
    assert pointed(found[1][1].branches) == {"eye": [(0.1, 0.2)]}


def test_regions_of_label_studio(pictures):
    def outcome(*regions, **task):
        return read(pictures, {"data": {"image": "cat.jpg"}, "annotations": [{"result": list(regions)}]} | task)

    turned = region("rectanglelabels", x=50, y=50, width=20, height=30, rotation=90, rectanglelabels=["cat"])
    # By a quarter around its upper left corner: 45.1 pixels down and 45 pixels to the left.
    [(_, [point])] = read_example(outcome(turned).sample.sample).branches[0].points
    assert point == pytest.approx((0.5 - 45 / 451, 0.5 + 45.1 / 300))
    assert "original_width" in outcome({key: turned[key] for key in ("type", "value")}).mistakes[0]
    # <KeyPoint> and <Labels> give each region twice, and only one has the label.
    pair = [region("keypoint", x=10, y=20, width=1), region("labels", x=10, y=20, width=1, labels=["eye"])]
    assert pointed(read_example(outcome(*pair).sample.sample).branches) == {"eye": [(0.1, 0.2)]}
    assert (
        'the type "brushlabels" is not read' in outcome(region("brushlabels", rle=[1], brushlabels=["a"])).mistakes[0]
    )
    assert "image_rotation is not 0" in outcome(pair[1] | {"image_rotation": 90}).mistakes[0]
    assert outcome().notes == [own_data.NOTHING_MARKED]
    # A region that nobody has named is refused, and is not taught as "image"; one with two names has both.
    nameless = region("keypoint", x=60, y=20, width=1) | {"id": "b"}
    assert outcome(*pair, nameless).mistakes == [
        'a region of the type "keypoint" has no label: give it one, or delete it'
    ]
    both = region("keypointlabels", x=10, y=20, width=1, keypointlabels=["eye", "left"])
    assert pointed(read_example(outcome(both).sample.sample).branches) == {"eye": [(0.1, 0.2)], "left": [(0.1, 0.2)]}
    words = {"type": "textarea", "value": {"text": ["a cat"]}}
    assert outcome(*pair, words, words).notes == ['a result of the type "textarea" is not used'] * 2
    # In JSON-MIN regions have no ids, and the same place makes two the same.
    values = [{"x": 10, "y": 20, "width": 1}, {"x": 10, "y": 20, "width": 1, "labels": ["eye"]}]
    row = {"image": "cat.jpg", "id": 1, "kp": values[:1], "tag": values[1:], "mood": "good", "lead_time": 3.5}
    found = read(pictures, row)
    assert pointed(read_example(found.sample.sample).branches) == {"eye": [(0.1, 0.2)]}
    assert found.notes == ["the key mood is not used"]
    assert "has no label" in read(pictures, row | {"kp": [*values[:1], {"x": 60, "y": 20, "width": 1}]}).mistakes[0]
    assert 'data.image = "dog.jpg" is not in' in outcome(pair[1], data={"image": "dog.jpg"}).mistakes[0]


def test_shards(pictures, tmp_path):
    data = (pictures / "cat.jpg").read_bytes()
    talk = json.dumps({"messages": messages("<image>What is it?", "A cat.")["messages"], "image": "0001.jpg"}).encode()
    members = {
        "a/0001.jpg": data,
        "a/0001.json": talk,
        "a/0002.jpg": data,
        "a/0002.txt": b"A cat.\n",
        "a/0002.json": b'{"url": "https://a.b/c.jpg", "width": 451}',
        "a/0003.mp4": (pictures / "bikes.mp4").read_bytes(),
        "a/0003.json": b'{"task": "caption", "text": "Bikes."}',
        "a/0004.jpg": data,
        "a/0004.json": b'{"task": "caption"',
        "a/0005.json": json.dumps(  # as this tool stores a text: where it came from is not where it comes from now
            {"branches": [messages("What is it?", "A cat.")["messages"]], "origin": {"file": "a", "place": "line 1"}}
        ).encode(),
    }
    members |= {"a/000\udcff.jpg": data, "a/000\udcff.txt": b"A cat."}  # names that are not UTF-8
    write_tar(tmp_path / "shard.tar", members)
    talked, captioned, filmed, broken, text, odd = read_file(pictures, tmp_path / "shard.tar")
    assert talked[1].branches == [ASKED] and talked[0].sample.files[0][1].read_bytes() == data
    assert captioned[1].branches[0].text == "A cat." and filmed[1].video.num_frames == 250
    assert odd[1].origin.place == 'sample "a/000?"'
    assert text[1].branches == [ASKED] and text[1].origin.place == 'sample "a/0005"'
    assert broken[0].place == 'sample "a/0004"' and "it is not JSON" in broken[0].mistakes[0]
    write_tar(
        tmp_path / "ours.tar", {"1.json": b'{"images": [{"part": "img0.jpg"}], "branches": []}', "1.img0.jpg": data}
    )
    with pytest.raises(ValueError, match="is a shard of prepared samples: name its folder in a blend"):
        read_file(pictures, tmp_path / "ours.tar")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "shard.tar").read_bytes()[:20000])
    with pytest.raises(ValueError, match="is no whole tar file"):
        read_file(pictures, tmp_path / "cut.tar")


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
