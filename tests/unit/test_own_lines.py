"""One line of a user's own annotations: what is accepted, and the sentence for each mistake, in the line's names."""

import re

import pytest
from own_pictures import example_of, make_pictures, read

from molmo2_nemo.prepare.mistakes import kind_of

TURN = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
CAT, BIKES = {"image": "cat.jpg"}, {"video": "bikes.mp4"}  # 451 x 300 pixels; 10 s, 25 fps, 640 x 272


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("own") / "pictures").resolve()


POINTS = {"task": "pointing", "label": "x", "points": [[0.1, 0.2]]}
TRACKS = {"video": "bikes.mp4", "task": "tracking", "label": "x", "fps": 2.5, "frames": [[0.4, [["a", 0.1, 0.2]]]]}
CHOICE = CAT | {"task": "multiple_choice", "question": "Which?", "options": ["cat", "dog"], "answer": 0}
GROUPS = {"type": "points", "label": "x", "groups": [[1, [[0.1, 0.2]]]], "kind": "image"}
BAD = [
    ('{"image": "cat.jpg"', "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ("[" * 100_000, "not JSON"),
    ('{"image": "' + "x" * 2**24 + '"}', "more than 16,777,216 bytes"),
    ({"image": "../secret.jpg", "messages": TURN}, "leads out of"),
    ({"image": "deep/../cat.jpg", "messages": TURN}, "leads out of"),
    ({"image": "link.jpg", "messages": TURN}, "leads out of"),
    ({"image": "/etc/hostname", "messages": TURN}, "leads out of"),
    ({"image": "dog.jpg", "messages": TURN}, 'image = "dog.jpg" is not in'),
    ({"image": "deep", "messages": TURN}, 'image = "deep" is not in'),
    ({"image": "x" * 5000, "messages": TURN}, "name too long"),
    ({"image": 3, "messages": TURN}, "image = 3 names no file"),
    ({"image": "empty.jpg", "messages": TURN}, 'image = "empty.jpg" is empty'),
    ({"video": "empty.jpg", "messages": TURN}, 'video = "empty.jpg" is empty'),
    ({"image": "data:image/png;base64,eHg=", "messages": TURN}, 'image = "data:image/png;base64,...": The image'),
    ({"images": "cat.jpg", "messages": TURN}, 'images = "cat.jpg" is not a list'),
    ({"image": "cut.jpg", "messages": TURN}, 'image = "cut.jpg": The image cannot be decoded'),
    (
        {"image": "bikes.mp4", "messages": TURN},
        'image = "bikes.mp4": The file is a video, not a picture: write "video"',
    ),
    ({"video": "cut.mp4", "messages": TURN}, 'video = "cut.mp4": The video cannot be opened'),
    ({"video": "cat.jpg", "image": "cat.jpg", "messages": TURN}, "image and video: one of them"),
    ({"image": "cat.jpg", "clip": [0, 1], "messages": TURN}, "clip and no video"),
    ({"video": "bikes.mp4", "clip": [5, 11], "messages": TURN}, "no part of 10.0 seconds"),
    ({"image": "cat.jpg", "messages": TURN[:1]}, "not user and assistant in turn"),
    (
        {"image": "cat.jpg", "messages": [TURN[0], {"role": "assistant", "content": " "}]},
        "messages[1].content is empty",
    ),
    ({"image": "cat.jpg", "messages": TURN, "colour": 1}, 'the key "colour", which is unknown'),
    ({"image": "cat.jpg", "messages": TURN, "branches": [TURN]}, "the key branches"),
    ({"image": "cat.jpg"}, "no task, no messages"),
    ({"image": "cat.jpg"} | POINTS | {"points": [[120, 80]]}, "unit=fraction right?"),
    ({"image": "cat.jpg"} | POINTS | {"points": [[2, [[0.1, 0.2]]]]}, "image 2, and there are 1"),
    ({"images": ["cat.jpg"] * 2} | POINTS, "are for one image"),
    ('{"image": "cat.jpg", "task": "pointing", "label": "x", "points": [[NaN, 0.1]]}', "finite"),
    ({"image": "cat.jpg"} | POINTS | {"style": "vqa2"}, "how to point"),
    ({"image": "cat.jpg"} | POINTS | {"style": ["pointing", "vqa2"]}, "how to point"),
    ({"image": "cat.jpg"} | POINTS | {"style": []}, "style is an empty list"),
    ({"image": "cat.jpg"} | POINTS | {"images": [1]}, "image and images"),
    ({"image": "cat.jpg", "task": "guessing"}, 'task = "guessing" is unknown: it is one of pointing'),
    ({"video": "bikes.mp4"} | POINTS | {"points": [[10.2, [[0.1, 0.2]]]]}, "at 10.2 seconds, and the video has 10"),
    (TRACKS | {"frames": [[12, []]]}, "at 12 seconds, and the video has 10"),
    (
        TRACKS | {"frames": [[0.5, [["a", 0.1, 0.2]]]], "style": "video_point_track_per_frame"},
        "have nothing at a multiple",
    ),
    (TRACKS | {"frames": []}, "frames is empty: there is nothing to follow"),
    (TRACKS | {"fps": 2, "frames": [[0.1, [["a", 0.1, 0.2]]]]}, "write the times of such frames, as 0.5 and 1, or the"),
    (TRACKS | {"unit": "pixels", "frames": [[0.4, [["a", 645, 0]]]]}, "frames[0][1][0] = [645.0, 0.0] is outside"),
    (
        {
            "image": "cat.jpg",
            "messages": [TURN[0], TURN[1] | {"content": "<points 0/>", "points": [GROUPS | {"kind": "video"}]}],
        },
        "of an image, and the sample has a video",
    ),
    ({"image": "cat.jpg", "messages": [TURN[0], TURN[1] | {"content": "<points 1/>", "points": [GROUPS]}]}, "no entry"),
    ({"id": "a/b", "messages": TURN}, "letters, digits"),
    ({"id": "a" * 65, "messages": TURN}, "letters, digits"),
    ({"id": None, "messages": TURN}, "letters, digits"),
    ({"image": "cat.jpg", "unit": "inches", "messages": TURN}, 'unit = "inches" is not one of'),
]


VALUES = [
    (CAT | {"task": "question", "question": "Colour?", "answers": ["", "red"]}, "answers[0] is empty"),
    (CAT | {"task": "question", "question": " ", "answers": ["red"]}, "question is empty"),
    (CAT | {"task": "question", "question": "Colour?", "answers": ["red"], "explanation": ""}, "explanation is empty"),
    (CAT | {"task": "caption", "text": ["A cat.", "\n"]}, "text[1] is empty"),
    (CAT | {"task": "caption", "text": ""}, "text is empty"),
    (CAT | POINTS | {"label": ""}, "label is empty"),
    (CAT | POINTS | {"label": "cat\ndog"}, "label has a line break"),
    (CAT | POINTS | {"points": [], "unanswerable": ""}, "unanswerable is empty"),
    (CAT | {"messages": [{"role": "system", "content": ""}, *TURN]}, "messages[0].content is empty"),
    (BIKES | {"messages": TURN, "subtitles": [[0, 1, "Hm."], [1, 2, " "]]}, "subtitles[1][2] is empty"),
    (CHOICE | {"options": ["cat", ""]}, "options[1] is empty"),
    (CHOICE | {"options": ["cat", "dog\nhorse"]}, "options[1] has a line break"),
    (CHOICE | {"options": ["cat", "dog", "cat "]}, "options[2] is the same as option 0, 'cat'"),
    (CHOICE | {"options": ["A. cat", "B. dog"]}, "options begin with their letters"),
    (CHOICE | {"answer": "B"}, 'answer = "B" is not the index of an option, from 0: write 1'),
    (CHOICE | {"answer": "dog"}, "write 1"),
    (CHOICE | {"answer": 2}, "answer = 2 is none of 0 to 1"),
    # Nothing is there to see.
    (
        {"images": [], "task": "caption", "text": "A cat."},
        "Nothing is there to see, and the task caption needs an image",
    ),
    ({"task": "pointing", "label": "cat", "points": []}, "the task pointing needs an image"),
    # What only a program can have put into a text.
    (CAT | {"task": "caption", "text": "A cat.<|im_end|>"}, "text holds the special token <|im_end|>"),
    (CAT | {"task": "caption", "text": "<im_patch> A cat."}, "text holds the special token <im_patch>"),
    (CAT | {"task": "question", "question": "<image>What?", "answers": ["A cat."]}, "question holds <image>"),
    (CAT | POINTS | {"label": 'cat</points><points coords="1 1 1 1">'}, "label holds the tag '</points>'"),
    (
        CAT | {"messages": [TURN[0], {"role": "assistant", "content": '<points coords="1 1 500 500">cat</points>'}]},
        "messages[1].content holds the tag '<points coords=\"1 1 500 500\">': put <points 0/> in its place",
    ),
    (CAT | {"messages": [TURN[0], {"role": "assistant", "content": "<points 0/>"}]}, "messages[1] has the marker"),
    ('{"task": "question", "question": "\\ud83d?", "answers": ["a"]}', "half of a surrogate pair"),
    (CAT | {"task": "question", "question": "<image_1> What?", "answers": ["A cat."]}, "question holds <image_1>"),
    (CAT | {"task": "caption", "text": "A cat. {image}"}, "write { image}"),
    (CAT | {"task": "caption", "text": "[INST] A cat.</s>"}, "text holds [INST]"),
    (
        CAT
        | {"messages": [TURN[0], {"role": "assistant", "content": '<point x="50.0" y="50.0" alt="cat">cat</point>'}]},
        'messages[1].content holds the tag \'<point x="50.0" y="50.0" alt="cat">\': put <points 0/> in its place',
    ),
    (CAT | {"task": "question", "question": "Colour?", "answers": ["\u200b"]}, "answers[0] is empty"),
    (CAT | {"task": "caption", "text": "A\0 cat."}, "text holds the control character U+0000"),
    (
        CAT | {"messages": [TURN[0], TURN[1] | {"points": [GROUPS]}]},
        "messages[1].points[0] is not used: put <points 0/> where it belongs",
    ),
    # Times.
    (BIKES | {"task": "caption", "text": "At <time 25/>."}, "text holds <time 25/>, and the video has 10 seconds"),
    (BIKES | {"task": "question", "question": "At <time 99/>?", "answers": ["a"]}, "question holds <time 99/>"),
    (BIKES | {"task": "caption", "text": "At <time 1:30/>."}, "is no time in seconds: write <time 90/>"),
    (CAT | {"task": "caption", "text": "At <time 1.5/>."}, "there is no video: write 1.5"),
    (BIKES | {"messages": TURN, "subtitles": [[3, 2, "Hm."]]}, "subtitles[0] ends at 2 seconds, before it starts"),
    (BIKES | {"messages": TURN, "subtitles": [[12, 13, "Hm."]]}, "subtitles[0] is at 12 seconds, and the video has 10"),
    (BIKES | {"messages": TURN, "subtitles": "bikes.srt"}, 'is not a list: write [[start, end, "text"], ...]'),
    # The same thing twice.
    (CAT | POINTS | {"points": [[0.1, 0.2], [0.3, 0.2], [0.1, 0.2]]}, "points[2] = [0.1, 0.2] is point 0 again"),
    (
        TRACKS | {"frames": [[0.4, [["a", 0.1, 0.2], ["a", 0.9, 0.9]]]]},
        "frames[0] has the object a twice at 0.4 seconds",
    ),
    # Of the other medium.
    (CAT | POINTS | {"style": "video_point"}, "style = video_point is for videos: leave it out"),
    (TRACKS | {"video": None}, "video = null names no file"),
    (
        CAT | {"task": "tracking", "label": "x", "fps": 2, "frames": [[0, [["a", 0.1, 0.2]]]]},
        "The task tracking needs a video",
    ),
    # Units.
    (CAT | POINTS | {"unit": "pixels"}, "as fractions are, and unit=pixels puts them into the upper left corner"),
    (CAT | POINTS | {"unit": "percent"}, 'write "unit": "fraction"'),
    (
        CAT | POINTS | {"points": [[0.5, 0.5], [50, 60]]},
        "points[1] = [50.0, 60.0] is outside of its picture of 451 x 300",
    ),
    (CAT | POINTS | {"points": [[40, 20]]}, 'If not, write "unit": "pixels"'),
    (BIKES | POINTS | {"points": [[1, [[40, 500]]]]}, "give fractions, percent or pixels of it"),
    # Files.
    ({"video": "cat.jpg", "messages": TURN}, 'video = "cat.jpg": The file is a picture, not a video: write "image"'),
    ({"image": "https://example.org/cat.jpg", "messages": TURN}, "is an address: download the file"),
    ({"image": "pictures/cat.jpg", "messages": TURN}, "--images "),
    ({"image": "deep/Turned.JPG", "messages": TURN}, "there is turned.jpg beside it"),
    ({"image": "link.jpg", "messages": TURN}, "by a link: --follow-links allows that"),
    ({"image": "deep", "messages": TURN}, "is not in"),
    ({"image": "deep", "messages": TURN}, ": it is a folder"),
    ({"image": "nothing.jpg", "messages": TURN}, "the link to gone.jpg leads to nothing"),
    ({"image": "cat.jpeg", "messages": TURN}, "there is cat.jpg beside it"),
    ({"image": "deep\\turned.jpg", "messages": TURN}, 'write "deep/turned.jpg"'),
    ({"image": "cat.jpg ", "messages": TURN}, 'write "cat.jpg"'),
    ({"image": "cafe\u0301.jpg", "messages": TURN}, 'write "caf\u00e9.jpg"'),
    ({"image": "icon.ico", "messages": TURN}, "none of JPEG"),
    ({"image": "page.pdf", "messages": TURN}, "none of JPEG"),
    ({"video": "page.pdf", "messages": TURN}, "The file is no video, although there is a JPEG picture in it"),
    ({"video": "icon.ico", "messages": TURN}, "The file is a picture, not a video"),
    ({"image": ["cat.jpg"], "messages": TURN}, "names no file; for several, write images"),
    # Keys.
    (
        CAT | {"task": "pointing", "label": "x", "Points": [[0.1, 0.2]]},
        'the key "Points", which is unknown: write points',
    ),
    (CAT | {"task": "question", "question": "Colour?", "answer": "red"}, "write answers"),
    ({"Image": "cat.jpg", "messages": TURN}, 'the key "Image", which is unknown: write image'),
    (CAT | {"tsak": "caption", "text": "A cat."}, 'the key "tsak", which is unknown: write task'),
    (CAT | {"task": "Pointing", "label": "x", "points": []}, 'task = "Pointing" is unknown: write "pointing"'),
    (CAT | {"label": "eye", "points": [[0.1, 0.2]]}, 'add "task": "pointing"'),
    (CAT | {"question": "Colour?", "answer": "red"}, 'add "task": "question", and answers for answer as a list'),
    (CAT | {"prompt": "Colour?", "response": "red"}, "and question for prompt, and answers for response as a list"),
    (CAT | {"caption": "A cat."}, 'add "task": "caption", and text for caption'),
    (CAT | {"branches": [{"task": "caption", "txt": "A cat."}]}, 'branches[0] has the key "txt", which is unknown'),
    # Forms.
    (CAT | {"task": "pointing", "label": "x"}, "it has no points, which pointing needs"),
    (CAT | POINTS | {"label": 3}, 'label = 3 is not a text: write "3"'),
    (CAT | POINTS | {"points": [0.1, 0.2]}, "write [[0.1, 0.2]]"),
    (CAT | POINTS | {"points": "0.1, 0.2"}, 'points = "0.1, 0.2" is not a list: write [[x, y], ...]'),
    (CAT | POINTS | {"points": [[0.1, 0.2], [0.1, 0.2, 0.3]]}, "points[1] = [0.1, 0.2, 0.3] has 3 values"),
    (CAT | POINTS | {"points": [["0.1", 0.2]]}, 'points[0][0] = "0.1" is not a number'),
    (
        CAT | {"task": "question", "question": "Colour?", "answers": "red"},
        'answers = "red" is not a list: write ["red"]',
    ),
    (CAT | {"task": "caption", "text": 3}, "text = 3 is neither a text nor a list"),
    (CAT | {"messages": [TURN[0] | {"role": "robot"}, TURN[1]]}, 'messages[0].role="robot" is none of user'),
    (TRACKS | {"fps": -1}, "fps = -1 is not above 0"),
    (TRACKS | {"frames": [[0.4, [[0.1, 0.2]]]]}, "has too few values: write [object, x, y]"),
    (TRACKS | {"time_unit": "hours"}, 'time_unit = "hours" is not one of seconds, frames'),
    (TRACKS | {"video": "uneven.mkv", "time_unit": "frames"}, "needs a video with a constant rate"),
]


@pytest.mark.parametrize("line, reason", BAD + VALUES)
def test_every_mistake_has_its_sentence(pictures, line, reason):
    mistakes = read(pictures, line).mistakes
    assert any(reason in mistake for mistake in mistakes), mistakes
    # In the names of the line, and not in ours.
    assert not re.search(r"branches\.0|branches\[0\]" if "branches" not in str(line) else r"branches\.", str(mistakes))


QUESTION = CAT | {"task": "question", "question": "Colour?", "answers": ["red"]}
MENDED = [  # a line with a mistake, and as its sentence says to write it
    (CAT | {"question": "Colour?", "answer": "red"}, QUESTION),
    (CAT | {"caption": "A cat."}, CAT | {"task": "caption", "text": "A cat."}),
    (BIKES | {"task": "caption", "text": "At <time 0:05/>."}, BIKES | {"task": "caption", "text": "At <time 5/>."}),
    (CAT | {"task": "caption", "text": "An <img> tag."}, CAT | {"task": "caption", "text": "An < img> tag."}),
    (CAT | {"task": "caption", "text": "At <time 1.5/>."}, CAT | {"task": "caption", "text": "At 1.5."}),
    (CAT | POINTS | {"style": "video_point"}, CAT | POINTS),
    (
        TRACKS | {"fps": 2, "frames": [[0.1, [["a", 0.1, 0.2]]]]},
        TRACKS | {"fps": 2, "frames": [[0.5, [["a", 0.1, 0.2]]], [1, [["a", 0.1, 0.2]]]]},
    ),
    (TRACKS | {"frames": [[0.4, [[0.1, 0.2]]]]}, TRACKS),
    (
        CAT | {"messages": [TURN[0], TURN[1] | {"points": [GROUPS]}]},
        CAT | {"messages": [TURN[0], TURN[1] | {"points": [GROUPS], "content": "Here: <points 0/>."}]},
    ),
    (BIKES | {"messages": TURN, "subtitles": "a.srt"}, BIKES | {"messages": TURN, "subtitles": [[0, 1.5, "Hm."]]}),
    ({"image": "deep\\turned.jpg", "messages": TURN}, {"image": "deep/turned.jpg", "messages": TURN}),
    ({"image": ["cat.jpg"], "messages": TURN}, {"images": ["cat.jpg"], "messages": TURN}),
]


@pytest.mark.parametrize("wrong, mended", MENDED)
def test_a_line_that_follows_the_sentence_is_accepted(pictures, wrong, mended):
    assert read(pictures, wrong).mistakes
    example_of(pictures, mended)


def part(kind, **keys):
    return {
        "messages": [{"role": "user", "content": [{"type": kind, **keys}, {"type": "text", "text": "Q?"}]}, TURN[1]]
    }


def test_parts_of_others_are_read_whole_or_said(pictures):
    data = {"role": "user", "content": [{"type": "input_image", "image_url": "cat.jpg"}]}
    data["content"].append({"type": "input_text", "text": "Q?"})
    assert len(example_of(pictures, {"messages": [data, TURN[1]]}).images) == 1
    cut = part("video", video="bikes.mp4", video_start=0.5, video_end=2, fps=2.0)
    assert example_of(pictures, cut).video.clip == (0.5, 2.0)
    assert read(pictures, cut).notes == ["the key fps of a part of the type video is not used"]
    [note] = read(pictures, part("video", video="bikes.mp4", video_start=0.5)).notes
    assert note == "the key video_start of a part of the type video is not used"


OTHERS = [
    ({"image": "", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "names no file"),
    (
        {"image": "cat.jpg", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<image>A"}]},
        "conversations[1].value has <image>, and an answer shows no image",
    ),
    (
        {"videos": [["a.jpg", "b.jpg"]], "messages": TURN},
        "videos[0] is a list of frames: make a video file of them, or give them as images",
    ),
]


@pytest.mark.parametrize("line, reason", OTHERS)
def test_lines_of_others_that_cannot_be_meant(pictures, line, reason):
    [mistake] = read(pictures, line).mistakes
    assert reason in mistake


def test_an_instruction_that_is_empty_leaves_its_input_as_the_question(pictures):
    line = {"instruction": "", "input": "Only this?", "output": "Yes."}
    assert example_of(pictures, line).branches[0][0].content == "Only this?"


def test_all_mistakes_of_a_line_are_named(pictures):
    line = CAT | {"task": "question", "question": "", "answers": ["", "red", "<image>"]}
    assert [m.split(" ")[0] for m in read(pictures, line).mistakes] == ["question", "answers[0]", "answers[2]"]
    line = {"images": ["dog.jpg", "cut.jpg"], "task": "question", "question": "", "answers": ["red"]}
    assert [m.split(" ")[0] for m in read(pictures, line).mistakes] == ["images[0]", "images[1]", "question"]
    line = CAT | {"task": "pointing", "label": 3, "Points": [], "colour": 1}
    assert len(read(pictures, line).mistakes) == 2  # the two keys; the others when these are right


TRACK_TASK = BIKES | {"task": "tracking", "label": "bike"}


def test_tracks_whose_rate_does_not_divide_the_video_s(pictures):
    """2 fps of 25: a multiple of half a second lies between two frames, and either may have been annotated."""
    near = [[seconds, [["a", 0.1, 0.2]]] for seconds in (0, 0.48, 1.0, 1.52, 1.7)]
    outcome = read(pictures, TRACK_TASK | {"fps": 2, "frames": near})
    example = example_of(pictures, TRACK_TASK | {"fps": 2, "frames": near})
    assert [seconds for seconds, _ in example.branches[0].frames] == [0, 0.5, 1, 1.5]
    # Without the video's rate its frames are looked for where the annotations are.
    assert (example.video.annotation_fps, example.video.fps) == (2, None)
    assert sorted(outcome.notes) == [
        "frames of tracks between multiples of 1 / fps, left out",
        *["frames of tracks moved to the nearest multiple of 1 / fps"] * 2,
    ]
    # Where all are elsewhere, the rate that the sentence says to write is accepted.
    elsewhere = [[k / 2.5, [["a", 0.1, 0.2]]] for k in range(1, 5)]
    [mistake] = read(pictures, TRACK_TASK | {"fps": 1, "frames": elsewhere}).mistakes
    assert mistake.endswith('write "fps": 2.5')
    assert example_of(pictures, TRACK_TASK | {"fps": 2.5, "frames": elsewhere}).video.fps == 25


@pytest.mark.parametrize("step, fps, times", [(1, 2, [0, 0.5, 1]), (5, 2.5, [0, 0.4, 0.8]), (10, 2.5, [0, 0.4, 0.8])])
def test_times_as_numbers_of_frames(pictures, step, fps, times):
    frames = [[number, [["a", 0.1, 0.2]]] for number in range(0, 26, step)]
    task = example_of(pictures, TRACK_TASK | {"time_unit": "frames", "frames": frames}).branches[0]
    assert task.fps == fps and [seconds for seconds, _ in task.frames][:3] == times


def test_links_are_followed_on_request(pictures):
    line = {"image": "link.jpg", "messages": TURN}
    assert read(pictures, line).mistakes and not read(pictures, line, follow_links=True).mistakes
    assert read(pictures, {"image": "../secret.jpg", "messages": TURN}, follow_links=True).mistakes
    # A path in full, if it is below the folder.
    assert not read(pictures, {"image": str(pictures / "cat.jpg"), "messages": TURN}).mistakes


def test_points_as_objects(pictures):
    line = CAT | POINTS | {"points": [{"x": 0.25, "y": 0.5}]}
    assert example_of(pictures, line).branches[0].points == [(1, [(0.25, 0.5)])]


def test_kinds_of_mistakes():
    assert kind_of('image = "a.jpg" is not in /x') == kind_of('image = "b.jpg" is not in /x')
    assert kind_of("points[3] = [0.5, 2.0] is outside") == kind_of("points[12] = [1.5, 0.0] is outside")
    assert kind_of("answers[0] is empty") != kind_of("options[0] is empty")
