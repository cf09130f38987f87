"""How tasks become conversations, which are drawn again each time a sample is used.

Source: arXiv 2601.10611 and public allenai/molmo2.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from molmo2_nemo.data import prompts as sets
from molmo2_nemo.data.points import NO_POINTS, Points, Tracks, format_points, to_json
from molmo2_nemo.data.schema import (
    Caption,
    Chat,
    Example,
    Message,
    MultipleChoice,
    Pointing,
    Question,
    Task,
    Tracking,
)

# How the answer of a pointing style is written.
POINTS_ONLY = frozenset(["pointing", "cosyn_point", "video_point", "multi_image_pointing"])
POINTS_THEN_COUNT = frozenset(["point_count", "video_point_count", "multi_image_point_then_count"])
COUNT_THEN_POINTS = frozenset(["count_point", "video_count_point", "multi_image_count_then_point"])
COUNT_ONLY = frozenset(["counting", "count", "video_count", "multi_image_counting"])
# The variants of tracking: everything, each object's first and last point, one object from a point on.
TRACK_ALL = frozenset(["video_point_track_per_frame"])
TRACK_ENDS = frozenset(["video_point_ground_start_end", "video_point_track_start_end"])
TRACK_ONE = frozenset(["video_single_point_track_per_frame", "video_single_point_track_start_end"])

# How often a task about all of several images does not say that it means all of them.
IMAGES_UNNAMED_SHARE = 0.5
# How often tracking one object starts at its first point instead of at any of its points.
FIRST_POINT_SHARE = 0.8
# How often a task of tracking at 2 fps, the usual rate, does not name the rate.
NO_RATE_SHARE = 0.5
# How often the times in a question are written as seconds instead of HH:MM:SS.s.
SECONDS_SHARE = 0.5

EVALUATION_LAYOUT = "Only return the correct answer option."
# How often a multiple choice question is asked as evaluations ask it.
EVALUATION_LAYOUT_SHARE = 0.1
# Otherwise: how often the options have labels (A, b, 1, iv), the answer is the label alone, the options stand on one
# line, the question says to choose, and the label is marked in a common way.
LABELLED_SHARE, LABEL_ONLY_SHARE, ONE_LINE_SHARE, INSTRUCTION_SHARE, COMMON_MARKER_SHARE = 0.8, 0.25, 0.1, 0.5, 0.8
COMMON_MARKERS = ("{}. ", "{}) ", "({}) ")
UNUSUAL_MARKERS = ("{}: ", "[{}] ", "{} - ", "<{}> ", "{} | ", "Option {}: ")
ROMAN = "i ii iii iv v vi vii viii ix x xi xii xiii xiv xv xvi xvii xviii xix xx xxi xxii xxiii xxiv xxv xxvi".split()
# Styles of questions by people: "how many" in them may or may not ask for points.
OPEN_STYLES = frozenset(["user_qa", "correction_qa"])
COUNTING = re.compile(r"\b(how many|count (the|all|each|every)|number of|total (of|number))\b", re.IGNORECASE)
TIME = re.compile(r"<time ([0-9]{1,7}(?:\.[0-9]{1,6})?)/>")


@dataclass
class Conversation:
    """[system] (user assistant)+ of one style. Points and tracks are still entries that `<points k/>` refers to."""

    style: str
    messages: list[Message]


def converse(example: Example, rng: np.random.Generator, prompts: str) -> list[Conversation]:
    """One conversation for each branch, in their order, or one of all of them if multi_turn was drawn.

    prompts: "templates": questions of tasks are drawn from prompts.py; "none": a task asks by its label alone, or by
    nothing, because the style is written before it (stage 1). ValueError: a task makes no sense.
    """
    conversations = [_conversation(branch, example, rng, prompts == "templates") for branch in example.branches]
    if len(conversations) > 1 and rng.random() < example.multi_turn:
        conversations = [conversations[i] for i in rng.permutation(len(conversations))]
        first, *others = conversations
        turns = [message for other in others for message in other.messages if message.role != "system"]
        conversations = [Conversation(first.style, first.messages + turns)]
    return conversations


def _conversation(branch: list[Message] | Task, example: Example, rng: np.random.Generator, templates: bool):
    task = Chat(branch) if isinstance(branch, list) else branch
    style = task.style or example.style or _default_style(task, example)
    style = style if isinstance(style, str) else _draw(rng, style)
    if isinstance(task, Chat):
        messages = list(task.messages)
    else:
        write: Callable = _WRITERS[type(task)]
        messages = write(task, style, example, rng, templates)
    visual = bool(example.images or example.video)
    if templates and visual and style in OPEN_STYLES and not any(message.points for message in messages):
        messages = _without_pointing(messages, rng)
    return Conversation(style, [replace(m, content=_spell_times(m, rng)) for m in messages])


def _default_style(task: Task, example: Example) -> str | list[str]:
    if isinstance(task, Pointing):
        if example.video:
            return ["video_point", "video_point_count"]
        if len(example.images) > 1:
            return ["multi_image_pointing", "multi_image_point_then_count"]
        return ["pointing", "point_count"]
    if isinstance(task, Tracking):
        return ["video_point_track_per_frame", "video_point_ground_start_end", "video_single_point_track_per_frame"]
    if isinstance(task, Caption):
        return "video_long_caption" if example.video else "long_caption"
    if isinstance(task, MultipleChoice):
        if example.video:
            return "video_multiple_choice"
        return "multi_image_mc" if len(example.images) > 1 else "a_okvqa_mc"
    return "user_qa" if example.images or example.video else "text_sft"


def _turn(question: str, answer: str, entry: Points | Tracks | None = None) -> list[Message]:
    return [Message("user", question), Message("assistant", answer, [to_json(entry)] if entry else [])]


def _draw(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


def _caption(task: Caption, style: str, example: Example, rng: np.random.Generator, templates: bool) -> list[Message]:
    if "transcript" in style:
        choices = sets.TRANSCRIPT
    else:
        choices = sets.SHORT_CAPTION if "short" in style else sets.CAPTION
    medium = "video" if example.video else "image" if len(example.images) < 2 else "set of images"
    text = task.text if isinstance(task.text, str) else _draw(rng, task.text)
    return _turn(_draw(rng, choices).format(medium=medium) if templates else "", text)


def _question(task: Question, style: str, example: Example, rng: np.random.Generator, templates: bool):
    counts = Counter(task.answers)
    most = max(counts.values())
    answer = _draw(rng, [answer for answer in counts if counts[answer] == most])
    if task.explanation is None:
        return _turn(task.question, answer)
    question = f"{task.question} {_draw(rng, sets.EXPLAIN)}" if templates else task.question
    return _turn(question, f"{task.explanation} Answer: {answer}")


def _multiple_choice(task: MultipleChoice, style: str, example: Example, rng: np.random.Generator, templates: bool):
    right, asked = task.options[task.answer], task.question
    if task.explanation is not None and templates:
        asked = f"{asked} {_draw(rng, sets.EXPLAIN)}"
    # In the layout of evaluations the answer is the option alone.
    if not templates or (rng.random() < EVALUATION_LAYOUT_SHARE and task.explanation is None):
        lines = [f"{_label('A', i)}. {option}" for i, option in enumerate(task.options)]
        question = "\n".join([asked, *([EVALUATION_LAYOUT] if task.explanation is None else []), *lines])
        answer = lines[task.answer]
    else:
        has_labels = rng.random() < LABELLED_SHARE
        answer_is_label = rng.random() < LABEL_ONLY_SHARE
        on_one_line = rng.random() < ONE_LINE_SHARE
        has_instruction = rng.random() < INSTRUCTION_SHARE
        markers = COMMON_MARKERS if rng.random() < COMMON_MARKER_SHARE else UNUSUAL_MARKERS
        marker, kind = _draw(rng, markers), _draw(rng, "Aa1i")
        labels = [_label(kind, i) for i in range(len(task.options))]
        options = [marker.format(x) + o for x, o in zip(labels, task.options)] if has_labels else task.options
        question = f"{asked} {_draw(rng, sets.CHOOSE)}" if has_instruction and task.explanation is None else asked
        question = f"{question} {', '.join(options)}" if on_one_line else "\n".join([question, *options])
        answer = (labels[task.answer] if answer_is_label else options[task.answer]) if has_labels else right
    return _turn(question, answer if task.explanation is None else f"{task.explanation} Answer: {answer}")


def _label(kind: str, index: int) -> str:
    if kind == "1":
        return str(index + 1)
    return ROMAN[index] if kind == "i" else chr(ord(kind) + index)


def _pointing(task: Pointing, style: str, example: Example, rng: np.random.Generator, templates: bool):
    chosen = set(task.images or range(1, len(example.images) + 1))
    groups = task.points
    if not example.video:
        if not {frame for frame, _ in groups} | chosen <= set(range(1, len(example.images) + 1)):
            raise ValueError(f"A task points to an image that is none of {len(example.images)}.")
        groups = [(int(frame), points) for frame, points in groups if frame in chosen]
    else:
        # Where two times fall into the same half second, the annotation's later points join the earlier.
        groups = [(np.floor(2 * seconds + 1e-6).item() / 2, points) for seconds, points in groups]
    groups = [(frame, points) for frame, points in groups if points]
    count = sum(len(points) for _, points in groups)
    if style in POINTS_ONLY:
        choices, several, answer = sets.POINT, sets.POINT_IMAGES, "<points 0/>"
    elif style in POINTS_THEN_COUNT:
        choices, several = sets.POINT_COUNT, sets.POINT_COUNT_IMAGES
        answer = f"Counting the <points 0/> shows a total of {count}."
    elif style in COUNT_THEN_POINTS:
        choices, several, answer = sets.POINT_COUNT, sets.POINT_COUNT_IMAGES, f"There are {count} <points 0/>."
    elif style in COUNT_ONLY:
        choices, several, answer = sets.COUNT, sets.COUNT_IMAGES, str(count)
    else:
        known = ", ".join(sorted(POINTS_ONLY | POINTS_THEN_COUNT | COUNT_THEN_POINTS | COUNT_ONLY))
        raise ValueError(f"The style {style} says nothing of how to point; those that do are {known}.")
    if task.question is not None:
        question = task.question
    elif not templates:
        question = task.label.lower()
    else:
        everywhere = chosen == set(range(1, len(example.images) + 1))
        # Without a word about which images are meant.
        plain = len(example.images) < 2 or (everywhere and style in POINTS_ONLY and rng.random() < IMAGES_UNNAMED_SHARE)
        images = "all images" if everywhere else ", ".join(f"image_{k}" for k in sorted(chosen))
        question = sets.fill(_draw(rng, choices if plain else several), task.label, images=images)
    if task.unanswerable is not None:
        return _turn(question, task.unanswerable)
    if not count and style not in COUNT_ONLY:
        return _turn(question, NO_POINTS)
    points = Points(task.label, groups, "video" if example.video else "image")
    return _turn(question, answer, None if style in COUNT_ONLY else points)


def _tracking(task: Tracking, style: str, example: Example, rng: np.random.Generator, templates: bool):
    if not example.video:
        raise ValueError("Only a video can have tracks.")
    frames = [frame for frame in task.frames if _is_multiple(frame[0], task.fps)]
    fps = f"{task.fps:g}"
    if style in TRACK_ONE:
        seen = [(seconds, *thing) for seconds, objects in sorted(frames, key=lambda f: f[0]) for thing in objects]
        if not seen:
            raise ValueError("A task tracks one object, and there is none.")
        name = _draw(rng, list(dict.fromkeys(thing[1] for thing in seen)))
        visible = [thing for thing in seen if thing[1] == name]
        from_first_point = rng.random() < FIRST_POINT_SHARE
        start, _, x, y = visible[0] if from_first_point else _draw(rng, visible)
        point = format_points(Points(task.label, [(start, [(x, y)])], "video"))
        frames = [(t, [o for o in objects if o[0] == name]) for t, objects in frames if t >= start]
        question = _draw(rng, sets.TRACK_POINT) if templates else "{point}"
        question = question.format(point=point, fps=fps) if task.question is None else f"{task.question} {point}"
    elif style in TRACK_ALL | TRACK_ENDS:
        if style in TRACK_ENDS:
            choices = sets.TRACK_ENDS
        else:
            choices = sets.TRACK if task.fps == 2 and rng.random() < NO_RATE_SHARE else sets.TRACK_FPS
        question = sets.fill(_draw(rng, choices), task.label, fps=fps) if templates else task.label
        question = task.question or question
    else:
        known = ", ".join(sorted(TRACK_ALL | TRACK_ENDS | TRACK_ONE))
        raise ValueError(f"The style {style} says nothing of how to track; those that do are {known}.")
    ends = style.endswith("start_end")
    return _turn(question, "<points 0/>", Tracks(task.label, frames, ends))


def _is_multiple(seconds: float, fps: float) -> bool:
    return abs(seconds * fps - round(seconds * fps)) < 0.01 * max(1.0, fps)


def _without_pointing(messages: list[Message], rng: np.random.Generator) -> list[Message]:
    """Questions that count get a sentence that wants no points, before the first question."""
    index = next(i for i, message in enumerate(messages) if message.role == "user")
    question = messages[index]
    if not COUNTING.search(question.content):
        return messages
    asked = replace(question, content=f"{_draw(rng, sets.NO_POINTS)} {question.content}")
    return [*messages[:index], asked, *messages[index + 1 :]]


def _spell_times(message: Message, rng: np.random.Generator) -> str:
    """The content with `<time s/>` as seconds, in half of the questions as HH:MM:SS.s."""

    def spell(match: re.Match) -> str:
        tenths = round(float(match[1]) * 10)
        if message.role == "assistant" or seconds:
            return f"{tenths / 10:.1f}"
        minutes, rest = divmod(tenths, 600)
        return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest / 10:04.1f}"

    if "<time " not in message.content:
        return message.content
    seconds = rng.random() < SECONDS_SHARE
    return TIME.sub(spell, message.content)


_WRITERS = {
    Caption: _caption,
    Question: _question,
    MultipleChoice: _multiple_choice,
    Pointing: _pointing,
    Tracking: _tracking,
}
