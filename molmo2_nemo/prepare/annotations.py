"""Checks of a sample's annotations against its pictures or video, and their change to what the schema wants."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np

from molmo2_nemo.data.frames import messages_of
from molmo2_nemo.data.points import NO_TRACKS, SAME_TIME, Points, from_json, render_content
from molmo2_nemo.data.schema import (
    UNITS,
    Caption,
    Chat,
    Example,
    Message,
    MultipleChoice,
    Place,
    Pointing,
    Tracking,
    ValueMistake,
)
from molmo2_nemo.data.tasks import TIME, TRACK_ALL, converse
from molmo2_nemo.data.video import annotation_times

# A point that is outside the picture by less than this share of its side is moved to the border: it was rounded.
SLACK = 0.005

MARKER = re.compile(r"<points [0-9]{1,4}/>")
POINTS_TAG = re.compile(r"</?(?:points|tracks)\b[^>]*>?")
# Molmo's points (allenai/Molmo-7B-D-0924), which Molmo2 does not write.
POINT_OF_MOLMO = re.compile(r"<point\s[^>]*>")
TIME_TAG = re.compile(r"</?time\b[^>]*>?")
CLOCK = re.compile(r"<time (?:(\d{1,2}):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)/>")
# What other programs replace by a picture, a video, a sound or a box before their model sees the text (LLaVA,
# ms-swift's docs/source_en/Customization/Custom-dataset.md, <image_1> of MMMU's prompts, <ImageHere> of
# InternLM-XComposer, [IMG] of Pixtral), or that ends or frames a turn of Llama's and Mistral's chats. In ours nothing
# replaces them.
PLACEHOLDER = re.compile(
    r"</?(?:image|video|audio|img|bbox|box|ref-object)>|<(?:image|video|img)[ _-]?\d+>|<ImageHere>|\{(?:image|video)\}"
    r"|\[IMG\]|</s>|\[/?INST\]",
    re.IGNORECASE,
)
# Tokens that chat models and Molmo2 keep for themselves (allenai/molmo2: olmo/tokenizer.py).
SPECIAL_TOKEN = re.compile(
    r"<\|[A-Za-z0-9_]{1,40}\|>|<(?:im_start|im_end|im_patch|im_col|low_res_im_start|im_low|frame_start|frame_end)>"
)
# Options that begin with labels of their own: "A. red", "B) green".
LABELLED = re.compile(r"\(?([A-Za-z])[.):]\s")


# -- coordinates ------------------------------------------------------------------------------------------------------


def use_fractions(example: Example, unit: str) -> None:
    """Change coordinates to fractions, in place. ValueMistake: one is outside its picture, or of no picture."""

    def side_of(frame: float) -> tuple[int, int]:
        """Width and height of what the coordinates of a frame are of."""
        video = example.video
        if video and frame > video.seconds + SAME_TIME:
            raise ValueError(f"is at {frame:g} seconds, and the video has {video.seconds:g}")
        if not video and frame not in range(1, len(example.images) + 1):
            raise ValueError(f"is of image {frame:g}, and there are {len(example.images)}")
        seen = video or example.images[int(frame) - 1]
        return seen.width, seen.height

    def in_fractions(place: Place, groups: list) -> list:
        """The (frame, points) of a task, or of an entry of a message's points."""
        sides = [_at((*place, index), side_of, frame) for index, (frame, _) in enumerate(groups)]
        points = [
            ((*place, index, 1, k), side, point[-2:])
            for index, ((_, group), side) in enumerate(zip(groups, sides))
            for k, point in enumerate(group)
        ]
        _check_unit(points, unit)
        return [
            (frame, [(*name, *_fractions((x, y), side, unit)) for *name, x, y in group])
            for (frame, group), side in zip(groups, sides)
        ]

    for number, branch in enumerate(example.branches):
        here = ("branches", number)
        if isinstance(branch, Pointing):
            branch.points = in_fractions((*here, "points"), branch.points)
        elif isinstance(branch, Tracking):
            branch.frames = in_fractions((*here, "frames"), branch.frames)
        else:
            for place, entry in _entries(branch, here):
                value = _at(place, from_json, entry)
                if unit != "fraction":
                    raise ValueMistake(place, "are fractions, as all points of messages: leave out unit")
                if (isinstance(value, Points) and value.kind == "image") == bool(example.video):
                    raise ValueMistake(
                        place, "is of an image, and the sample has a video, or the reverse: correct its kind"
                    )
                is_points = isinstance(value, Points)
                in_fractions((*place, "groups" if is_points else "frames"), value.groups if is_points else value.frames)


def _at(place: Place, function, *args):
    """What the function returns; its ValueError becomes one with a place."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueMistake(place, str(error)) from error


def _messages(branch, here: Place) -> list[tuple[Place, Message]]:
    """The messages of a branch at the place `here`, each with its own place; none if it is a task without them."""
    inside = here if isinstance(branch, list) else (*here, "messages")
    return [((*inside, number), message) for number, message in enumerate(messages_of(branch))]


def _entries(branch, here: Place) -> Iterator[tuple[Place, dict]]:
    """The entries of `points` of a conversation's messages."""
    for place, message in _messages(branch, here):
        for k, entry in enumerate(message.points):
            yield (*place, "points", k), entry


def _fractions(point: tuple, side: tuple[int, int], unit: str) -> tuple[float, float]:
    scales = {"fraction": (1, 1), "percent": (100, 100), "pixels": side}[unit]
    return tuple(min(max(value / scale, 0.0), 1.0) for value, scale in zip(point, scales))


def _fits(point: tuple, side: tuple[int, int], unit: str) -> bool:
    scales = {"fraction": (1, 1), "percent": (100, 100), "pixels": side}[unit]
    return all(-SLACK <= value / scale <= 1 + SLACK for value, scale in zip(point, scales))


def _check_unit(points: list[tuple], unit: str) -> None:
    """points: (place, (width, height), (x, y)) of one task. ValueMistake: they cannot be in this unit."""
    for place, side, point in points:
        if not _fits(point, side, unit):
            others = [name for name in UNITS if all(_fits(p, s, name) for _, s, p in points)]
            advice = f'write "unit": "{others[-1]}"' if others else "give fractions, percent or pixels of it"
            raise ValueMistake(
                place,
                f"= {list(point)} is outside of its picture of {side[0]} x {side[1]} pixels: is unit={unit} right? "
                f"If not, {advice}",
            )
    values = [value for _, _, point in points for value in point]
    if unit != "fraction" and values and max(values) <= 1 and any(value != int(value) for value in values):
        raise ValueMistake(
            points[0][0],
            f"and all the others are at most 1, as fractions are, and unit={unit} puts them into the upper left "
            'corner: write "unit": "fraction"',
        )


# -- rates ------------------------------------------------------------------------------------------------------------


def check_rates(example: Example, nearest: bool = False) -> Counter:
    """Set the video's annotation_fps from its tracks, if it is not given.

    Without `nearest`, ValueError: the rate does not divide the video's (public allenai/molmo2 drops such samples). With
    it, the frames on screen at multiples of 1 / annotation_fps are taken, and the times of tracks are moved to the
    multiples of 1 / fps that are at most half a frame away. Returns how many frames of tracks were moved or left out.
    """
    video, moved = example.video, Counter()
    tracks = [branch for branch in example.branches if isinstance(branch, Tracking)]
    if nearest:
        for task in tracks:
            moved += _snap(task, _frame_seconds(video))
    if tracks and video.annotation_fps is None:
        video.annotation_fps = min(task.fps for task in tracks)
    if video.annotation_fps is not None:
        try:
            annotation_times(video.seconds, 1, video.annotation_fps, video.fps)
        except ValueError:
            if not nearest:
                raise
            video.fps = None  # of a video without a rate the frames on screen at the annotations' times are taken
    return moved


def _frame_seconds(video) -> float:
    """How long a frame of the video is on screen, if it is known."""
    if video.fps:
        return 1 / video.fps
    return video.duration / video.num_frames if video.num_frames else 0.0


def _snap(task: Tracking, frame_seconds: float) -> Counter:
    """Move the times of tracks to multiples of 1 / fps that are at most half a frame away; leave out the others."""
    reach, nearest, moved = max(0.01 / task.fps, 0.51 * frame_seconds), {}, Counter()
    for seconds, objects in sorted(task.frames, key=lambda frame: frame[0]):
        multiple = round(seconds * task.fps)
        away = abs(seconds - multiple / task.fps)
        if away > reach or (multiple in nearest and nearest[multiple][0] <= away):
            moved["frames of tracks between multiples of 1 / fps, left out"] += bool(objects)
            continue
        nearest[multiple] = (away, objects)
        moved["frames of tracks moved to the nearest multiple of 1 / fps"] += away > 1e-3
    if not nearest and any(objects for _, objects in task.frames):
        return Counter()  # check_answers says what is wrong
    task.frames = [(multiple / task.fps, objects) for multiple, (_, objects) in sorted(nearest.items())]
    return +moved


def _rate_of(frames: list) -> float | None:
    """The rate at which most of the tracks' frames follow one another, if there are frames at multiples of 1 / rate."""
    times = sorted({seconds for seconds, objects in frames if objects})
    if len(times) < 2:
        return None
    rate = round(1 / float(np.median(np.diff(times))), 3)
    return rate if any(abs(seconds * rate - round(seconds * rate)) < 0.01 for seconds in times) else None


# -- answers and texts ------------------------------------------------------------------------------------------------


def check_answers(example: Example) -> None:
    """ValueMistake: a value cannot be taught, or a branch cannot be asked in one of its styles."""
    for mistake in mistakes_in(example):
        raise mistake
    for number, branch in enumerate(example.branches):
        place: Place = ("branches", number)
        styles = getattr(branch, "style", None)
        if styles == []:
            raise ValueMistake((*place, "style"), "is an empty list")
        tried = styles if isinstance(styles, list) else [styles]
        if isinstance(branch, Tracking) and branch.frames:
            tried = [*TRACK_ALL, *tried]  # the plainest first: without a track, the others say less of why
        for style in tried:
            styled = branch if isinstance(branch, list) else replace(branch, style=style)
            [talk] = _at(place, converse, replace(example, branches=[styled]), np.random.default_rng(0), "templates")
            answers = [_at(place, render_content, m.content, m.points) for m in talk.messages if m.role == "assistant"]
            if isinstance(branch, Tracking) and NO_TRACKS in answers:
                rate, step = _rate_of(branch.frames), 1 / branch.fps
                advice = (
                    f'; their times follow one another at {rate:g} fps: write "fps": {rate:g}'
                    if rate
                    else f": write the times of such frames, as {step:g} and {2 * step:g}, or the fps of your times"
                )
                raise ValueMistake(
                    (*place, "frames"), f"have nothing at a multiple of 1 / fps = {step:g} seconds{advice}"
                )


def mistakes_in(example: Example) -> Iterator[ValueMistake]:
    """Every value of the annotations that is empty or would teach something else than it says."""
    for place, text in texts_of(example):
        is_content = place[-1] == "content"
        if is_blank(text):
            yield ValueMistake(place, "is empty")
        elif "\n" in text.strip() and place[-2:-1] == ("options",):
            yield ValueMistake(place, "has a line break: options are written one a line")
        elif "\n" in text and place[-1] == "label":
            yield ValueMistake(place, "has a line break")
        elif tag := POINTS_TAG.search(MARKER.sub("", text) if is_content else text):
            yield ValueMistake(place, f"holds the tag {tag[0][:40]!r}: {_tag_advice(is_content)}")
    sees = bool(example.images or example.video)
    for number, branch in enumerate(example.branches):
        here: Place = ("branches", number)
        if isinstance(branch, Caption | Pointing | Tracking) and not sees:
            yield ValueMistake(here, f"Nothing is there to see, and the task {branch.task} needs an image or a video")
        elif isinstance(branch, Tracking) and not example.video:
            yield ValueMistake(here, "The task tracking needs a video, and these are pictures: use pointing for them")
        elif isinstance(branch, Tracking) and not branch.frames:
            yield ValueMistake((*here, "frames"), "is empty: there is nothing to follow")
        if isinstance(branch, MultipleChoice):
            yield from _mistakes_in_options(branch.options, (*here, "options"))
        for place, message in _messages(branch, here):
            if not message.points and (marker := MARKER.search(message.content)):
                yield ValueMistake(place, f"has the marker {marker[0]} and no points for it")


def doubts(example: Example, are_boxes: bool = False) -> Iterator[ValueMistake]:
    """What may well be in public data sets, but is hardly meant in a user's own.

    Texts that spell a token, a placeholder or a tag of another program, for which training would teach plain text;
    times and points that cannot be right; styles of other media. are_boxes: points may be centres of boxes, of which
    two can be the same.
    """
    for place, text in texts_of(example):
        yield from _doubts_about_text(place, text, example)
    if example.video and not example.video.clip:
        for k, (start, end, _) in enumerate(example.video.subtitles):
            if end < start:
                yield ValueMistake(("video", "subtitles", k), f"ends at {end:g} seconds, before it starts")
            elif start > example.video.duration:
                yield ValueMistake(
                    ("video", "subtitles", k), f"is at {start:g} seconds, and the video has {example.video.seconds:g}"
                )
    for number, branch in enumerate(example.branches):
        here: Place = ("branches", number)
        styles = getattr(branch, "style", None)
        for style in styles if isinstance(styles, list) else [styles]:
            if example.images and str(style).startswith("video_"):
                yield ValueMistake((*here, "style"), f"= {style} is for videos: leave it out")
        if isinstance(branch, MultipleChoice):
            yield from _doubts_about_options(branch.options, (*here, "options"))
        elif isinstance(branch, Pointing) and not are_boxes:
            yield from _same_twice(branch.points, (*here, "points"))
        elif isinstance(branch, Tracking):
            yield from _object_twice(branch.frames, (*here, "frames"))
        yield from _unused_points(branch, here)


def is_blank(text: str) -> bool:
    """Whether nothing of the text can be seen: spaces, line breaks, control and format characters."""
    return all(unicodedata.category(character)[0] in "CZ" for character in text)


def _doubts_about_text(place: Place, text: str, example: Example) -> Iterator[ValueMistake]:
    if token := SPECIAL_TOKEN.search(text):
        yield ValueMistake(
            place, f"holds the special token {token[0]}: remove it, the chat format is written by the trainer"
        )
    elif token := PLACEHOLDER.search(text):
        name = "name the file in image, images or video and " if _is_of_media(token[0]) else ""
        yield ValueMistake(
            place,
            f"holds {token[0]}, which stands for nothing here: {name}remove it, or if the text is about such a tag, "
            f"write {token[0][0]} {token[0][1:]}",
        )
    elif tag := POINT_OF_MOLMO.search(text):
        yield ValueMistake(place, f"holds the tag {tag[0][:40]!r}: {_tag_advice(place[-1] == 'content')}")
    for tag in TIME_TAG.finditer(text):
        if problem := _time_problem(tag[0], example):
            yield ValueMistake(place, f"holds {tag[0][:40]}{problem}")
    control = next((c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\r\t"), None)
    if control is not None:
        yield ValueMistake(place, f"holds the control character U+{ord(control):04X}: remove it")


def _is_of_media(token: str) -> bool:
    return re.search("image|img|video", token, re.IGNORECASE) is not None


def _time_problem(tag: str, example: Example) -> str | None:
    """What is wrong with a `<time s/>` in a text, as the rest of a sentence."""
    time = TIME.fullmatch(tag)
    if time is None:
        clock = CLOCK.fullmatch(tag)
        seconds = 3600 * int(clock[1] or 0) + 60 * int(clock[2]) + float(clock[3]) if clock else 12.5
        return f", which is no time in seconds: write <time {seconds:g}/>"
    if not example.video:
        return f", and there is no video: write {time[1]}"
    if float(time[1]) > example.video.seconds + SAME_TIME:
        return f", and the video has {example.video.seconds:g} seconds"
    return None


def _doubts_about_options(options: list[str], place: Place) -> Iterator[ValueMistake]:
    labels = [LABELLED.match(option) for option in options]
    if all(labels) and [label[1].upper() for label in labels] == [chr(ord("A") + k) for k in range(len(labels))]:
        yield ValueMistake(
            place, f"begin with their letters, as {options[0]!r}: leave these out, training writes letters itself"
        )


def _same_twice(groups: list, place: Place) -> Iterator[ValueMistake]:
    for number, (_, points) in enumerate(groups):
        for k, point in enumerate(points):
            if (first := points.index(point)) != k:
                yield ValueMistake(
                    (*place, number, 1, k), f"= {list(point)} is point {first} again, and would be counted twice"
                )


def _object_twice(frames: list, place: Place) -> Iterator[ValueMistake]:
    for number, (seconds, objects) in enumerate(frames):
        names = [name for name, *_ in objects]
        if twice := [name for k, name in enumerate(names) if name in names[:k]]:
            yield ValueMistake(
                (*place, number),
                f"has the object {twice[0]} twice at {seconds:g} seconds: give each object a name of its own",
            )


def _unused_points(branch, here: Place) -> Iterator[ValueMistake]:
    for place, message in _messages(branch, here):
        used = {int(marker[8:-2]) for marker in MARKER.findall(message.content)}
        if used - set(range(len(message.points))):  # check_answers names a marker without an entry
            continue
        for k in range(len(message.points)):
            if k not in used:
                yield ValueMistake(
                    (*place, "points", k), f"is not used: put <points {k}/> where it belongs in the content"
                )


def texts_of(example: Example) -> Iterator[tuple[Place, str]]:
    """All texts of the annotations, each with its place."""
    for number, branch in enumerate(example.branches):
        here: Place = ("branches", number)
        if isinstance(branch, list | Chat):
            for place, message in _messages(branch, here):
                yield (*place, "content"), message.content
            for place, entry in _entries(branch, here):
                if isinstance(entry.get("label"), str):
                    yield (*place, "label"), entry["label"]
            continue
        for field in fields(branch):
            value = getattr(branch, field.name)
            if field.name in ("task", "style") or value is None:
                continue
            if isinstance(value, str):
                yield (*here, field.name), value
            elif isinstance(value, list):
                yield from (((*here, field.name, k), item) for k, item in enumerate(value) if isinstance(item, str))
    for k, (_, _, text) in enumerate(example.video.subtitles if example.video else []):
        yield ("video", "subtitles", k, 2), text


def _tag_advice(is_content: bool) -> str:
    if not is_content:
        return "write it without"
    return 'put <points 0/> in its place and the points into "points" of the message, which checks and orders them'


def _mistakes_in_options(options: list[str], place: Place) -> Iterator[ValueMistake]:
    seen: dict[str, int] = {}
    for k, option in enumerate(options):
        if option.strip() and seen.setdefault(option.strip(), k) != k:
            yield ValueMistake((*place, k), f"is the same as option {seen[option.strip()]}, {option.strip()!r}")


def without_nothing(value):
    """The JSON without keys whose value is the default: null, and multi_turn 0."""
    if isinstance(value, dict):
        return {k: without_nothing(v) for k, v in value.items() if v is not None and (k, v) != ("multi_turn", 0)}
    return [without_nothing(item) for item in value] if isinstance(value, list | tuple) else value
