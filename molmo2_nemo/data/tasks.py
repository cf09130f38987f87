"""How tasks become conversations, which are drawn again each time a sample is used.

Source: arXiv 2601.10611 and public allenai/molmo2.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from molmo2_nemo.data import prompts as sets
from molmo2_nemo.data.counting import asks_for_a_count
from molmo2_nemo.data.frames import Shown, messages_of
from molmo2_nemo.data.points import (
    NO_POINTS,
    SAME_TIME,
    Points,
    Tracks,
    format_points,
    from_json,
    point_time,
    to_json,
    written_seconds,
)
from molmo2_nemo.data.schema import (
    Branch,
    Caption,
    Chat,
    Example,
    Message,
    MultipleChoice,
    Pointing,
    Question,
    Task,
    TrackFrame,
    Tracking,
)
from molmo2_nemo.data.video import is_multiple

# How the answer of a pointing style is written.
POINTS_ONLY = frozenset(["pointing", "cosyn_point", "video_point", "multi_image_pointing"])
POINTS_THEN_COUNT = frozenset(["point_count", "video_point_count", "multi_image_point_then_count"])
COUNT_THEN_POINTS = frozenset(["count_point", "video_count_point", "multi_image_count_then_point"])
COUNT_ONLY = frozenset(["counting", "count", "video_count", "multi_image_counting"])
# Captions that are asked for by their style alone, which is written in place of a question
# (allenai/molmo2: data_formatter.py, get_user_prompt).
STYLE_ALONE = frozenset(["video_merged_caption"])
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
# Styles whose options are letters that are in the picture, and get none of their own in the layout of evaluations.
LETTERS_SHOWN = frozenset(["ai2_diagram_no_letter"])
ROMAN = "i ii iii iv v vi vii viii ix x xi xii xiii xiv xv xvi xvii xviii xix xx xxi xxii xxiii xxiv xxv xxvi".split()
ONLY_POINTS = re.compile(r"\s*<points [0-9]{1,4}/>\s*")
TIME = re.compile(r"<time ([0-9]{1,7}(?:\.[0-9]{1,6})?)/>")


@dataclass
class Conversation:
    """[system] (user assistant)+ of one style. Points and tracks are still entries that `<points k/>` refers to."""

    style: str
    messages: list[Message]
    # What was changed because of the frames that are shown: names of counters.COUNTERS.
    counts: Counter = field(default_factory=Counter, compare=False)


class NotShown(Exception):
    """The frames that are shown do not show what a branch is about."""


class Talk:
    """The conversations about one sample. All is drawn once; they are written for the frames that are shown.

    prompts: "templates": questions of tasks are drawn from prompts.py; "none": a task asks by its label alone, or by
    nothing, because the style is written before it (stage 1). counts_without_points: questions of people that count
    are asked with a sentence that wants no points. turns: of a conversation at most. max_images: of the sample; what
    is about others is left out.
    """

    def __init__(
        self,
        example: Example,
        rng: np.random.Generator,
        prompts: str,
        *,
        counts_without_points: bool = False,
        turns: int | None = None,
        max_images: int | None = None,
    ):
        self.example = _first_images(example, max_images)
        self.num_images_left_out = len(example.images) - len(self.example.images)
        self.templates, self.counts_without_points, self.turns = prompts == "templates", counts_without_points, turns
        branches = self.example.branches
        self._seeds = rng.integers(2**63, size=len(branches)).tolist()
        in_turn = len(branches) > 1 and rng.random() < example.multi_turn
        self._order = rng.permutation(len(branches)).tolist() if in_turn else None

    @property
    def number(self) -> int:
        """Of conversations."""
        return 1 if self._order else len(self.example.branches)

    def conversations(self, shown: Shown | None = None) -> list[Conversation | None]:
        """One for each branch, in their order, or one of all of them if multi_turn was drawn.

        shown: the frames of the video; None: everything. Instead of a conversation that is about nothing that is
        shown comes None. ValueError: a task makes no sense.
        """
        talks = [self._talk(branch, seed, shown) for branch, seed in zip(self.example.branches, self._seeds)]
        if self._order and any(talks):
            seen = [talks[index] for index in self._order if talks[index]]
            first, *others = seen
            turns = [message for other in others for message in other.messages if message.role != "system"]
            counts = sum((talk.counts for talk in seen), Counter(unseen_branches=len(talks) - len(seen)))
            talks = [Conversation(first.style, first.messages + turns, counts)]
        elif self._order:
            talks = [None]
        return [talk and self._beginning(talk) for talk in talks]

    def _talk(self, branch: Branch, seed: int, shown: Shown | None) -> Conversation | None:
        try:
            return _conversation(branch, _Draw(self, np.random.default_rng(seed), shown))
        except NotShown:
            return None

    def _beginning(self, talk: Conversation) -> Conversation:
        if self.turns is None:
            return talk
        ends = [index for index, message in enumerate(talk.messages) if message.role == "assistant"][: self.turns]
        return replace(talk, messages=talk.messages[: ends[-1] + 1])


def converse(example: Example, rng: np.random.Generator, prompts: str) -> list[Conversation]:
    """The conversations of a Talk, written for a video all of which is shown. ValueError: a task makes no sense."""
    return Talk(example, rng, prompts).conversations()


class _Draw:
    """One writing of one branch: by what it is drawn, and for which frames."""

    def __init__(self, talk: Talk, rng: np.random.Generator, shown: Shown | None):
        self.example, self.templates = talk.example, talk.templates
        self.counts_without_points = talk.counts_without_points
        self.rng, self.shown, self.counts = rng, shown, Counter()
        self._at_rate: list[TrackFrame] | None = None

    def one(self, items: Sequence):
        return items[int(self.rng.integers(len(items)))]

    def stamp(self, seconds: float) -> float | None:
        """Of the frame that was annotated at this time; None: it is not shown."""
        return self.shown.stamp(seconds) if self.shown else seconds

    def points(self, groups: list) -> list:
        """Groups of points of a video at the stamps of the frames that show them."""
        kept = []
        for seconds, points in groups:
            time = point_time(seconds)
            stamp = self.stamp(time)
            if stamp is None:
                self.counts["unseen_points"] += len(points)
            elif points:
                self.counts["moved_times"] += abs(seconds - time) > SAME_TIME
                kept.append((stamp, points))
        return kept

    def tracks(self, frames: list[TrackFrame]) -> list[TrackFrame]:
        """Frames of tracks at the stamps of those that are shown; what was annotated nearest to a frame comes first."""
        if self.shown is None:
            return frames
        near = []
        for seconds, objects in frames:
            stamp = self.stamp(seconds)
            if stamp is None:
                self.counts["unseen_points"] += len(objects)
            else:
                near.append((abs(seconds - self.shown.start - stamp), stamp, objects))
        return [(stamp, objects) for _, stamp, objects in sorted(near, key=lambda item: item[0])]

    def at_rate(self, task: Tracking) -> list[TrackFrame]:
        """The frames at the rate of the branch's task that are shown."""
        if self._at_rate is None:
            self._at_rate = self.tracks([frame for frame in task.frames if is_multiple(frame[0], task.fps)])
        return self._at_rate


def _first_images(example: Example, most: int | None) -> Example:
    """The example with its first images alone, and without points of others; it may have no branch left."""
    if most is None or len(example.images) <= most:
        return example
    branches = []
    for branch in example.branches:
        if isinstance(branch, Pointing):
            asked = branch.images and [number for number in branch.images if number <= most]
            points = [group for group in branch.points if group[0] <= most]
            if (asked or branch.images is None) and (any(p for _, p in points) or not any(p for _, p in branch.points)):
                branches.append(replace(branch, images=asked, points=points))
        else:
            entries = [from_json(entry) for message in messages_of(branch) for entry in message.points]
            if all(frame <= most for entry in entries if isinstance(entry, Points) for frame, _ in entry.groups):
                branches.append(branch)
    first = copy.copy(example)
    first.images, first.branches = example.images[:most], branches
    return first


def _conversation(branch: Branch, draw: _Draw) -> Conversation:
    """NotShown: it is about nothing that is shown."""
    task = Chat(branch) if isinstance(branch, list) else branch
    style = _style(task, draw)
    if isinstance(task, Chat):
        messages = [_seen_message(message, draw) for message in task.messages]
    else:
        write: Callable = _WRITERS[type(task)]
        messages = write(task, style, draw)
    if draw.counts_without_points and draw.templates and isinstance(task, Chat | Question):
        messages = _without_pointing(messages, draw)
    return Conversation(style, [replace(m, content=_spell_times(m, draw)) for m in messages], draw.counts)


def _style(task: Task, draw: _Draw) -> str:
    """The task's, or one of them; nothing that tracks one object, if there is no object to follow."""
    styles = task.style or draw.example.style or _default_style(task, draw.example)
    if isinstance(styles, str):
        return styles
    if isinstance(task, Tracking) and not _followed(draw.at_rate(task)):
        styles = [style for style in styles if style not in TRACK_ONE] or styles
    return draw.one(styles)


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


def _caption(task: Caption, style: str, draw: _Draw) -> list[Message]:
    if "transcript" in style:
        choices = sets.TRANSCRIPT
    else:
        choices = sets.SHORT_CAPTION if "short" in style else sets.CAPTION
    medium = "video" if draw.example.video else "image" if len(draw.example.images) < 2 else "set of images"
    text = task.text if isinstance(task.text, str) else draw.one(task.text)
    asked = draw.templates and style not in STYLE_ALONE
    return _turn(draw.one(choices).format(medium=medium) if asked else "", text)


def _question(task: Question, style: str, draw: _Draw) -> list[Message]:
    counts = Counter(task.answers)
    most = max(counts.values())
    answer = draw.one([answer for answer in counts if counts[answer] == most])
    if task.explanation is None:
        return _turn(task.question, answer)
    question = f"{task.question} {draw.one(sets.EXPLAIN)}" if draw.templates else task.question
    return _turn(question, f"{task.explanation} Answer: {answer}")


def _multiple_choice(task: MultipleChoice, style: str, draw: _Draw) -> list[Message]:
    right, asked, rng = task.options[task.answer], task.question, draw.rng
    if task.explanation is not None and draw.templates:
        asked = f"{asked} {draw.one(sets.EXPLAIN)}"
    # In the layout of evaluations the answer is the option alone.
    if not draw.templates or (rng.random() < EVALUATION_LAYOUT_SHARE and task.explanation is None):
        lines = option_lines(task.options, style)
        question = "\n".join([asked, *([EVALUATION_LAYOUT] if task.explanation is None else []), *lines])
        answer = lines[task.answer]
    else:
        has_labels = rng.random() < LABELLED_SHARE
        answer_is_label = rng.random() < LABEL_ONLY_SHARE
        on_one_line = rng.random() < ONE_LINE_SHARE
        has_instruction = rng.random() < INSTRUCTION_SHARE
        markers = COMMON_MARKERS if rng.random() < COMMON_MARKER_SHARE else UNUSUAL_MARKERS
        marker, kind = draw.one(markers), draw.one("Aa1i")
        labels = [_label(kind, i) for i in range(len(task.options))]
        options = [marker.format(x) + o for x, o in zip(labels, task.options)] if has_labels else task.options
        question = f"{asked} {draw.one(sets.CHOOSE)}" if has_instruction and task.explanation is None else asked
        question = f"{question} {', '.join(options)}" if on_one_line else "\n".join([question, *options])
        answer = (labels[task.answer] if answer_is_label else options[task.answer]) if has_labels else right
    return _turn(question, answer if task.explanation is None else f"{task.explanation} Answer: {answer}")


def option_lines(options: Sequence[str], style: str) -> list[str]:
    """How evaluations show the options of a question, and how its answers name them."""
    if style in LETTERS_SHOWN:
        return list(options)
    return [f"{_label('A', index)}. {option}" for index, option in enumerate(options)]


def _label(kind: str, index: int) -> str:
    if kind == "1":
        return str(index + 1)
    return ROMAN[index] if kind == "i" else chr(ord(kind) + index)


def _pointing(task: Pointing, style: str, draw: _Draw) -> list[Message]:
    example, groups = draw.example, [group for group in task.points if group[1]]
    chosen, everywhere = set(task.images or range(1, len(example.images) + 1)), range(1, len(example.images) + 1)
    if example.video:
        kind, seen = "video", draw.points(groups)
        if groups and not seen:
            raise NotShown
    else:
        kind = "images" if len(example.images) > 1 else "image"
        if not {frame for frame, _ in groups} | chosen <= set(everywhere):
            raise ValueError(f"A task points to an image that is none of {len(example.images)}.")
        seen = [(int(frame), points) for frame, points in groups if frame in chosen]
    # Molmo2 lower-cases the label of a single image, in the question, too; others keep the annotator's case.
    label = task.label.lower() if kind == "image" else task.label
    count = sum(len(points) for _, points in seen)
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
    question = task.question
    if question is None and style not in POINTS_ONLY:
        question = task.count_question
    if question is None and not draw.templates:
        question = task.label.lower()
    elif question is None:
        of_all = chosen == set(everywhere)
        # Without a word about which images are meant.
        plain = kind != "images" or (of_all and style in POINTS_ONLY and draw.rng.random() < IMAGES_UNNAMED_SHARE)
        images = "all images" if of_all else ", ".join(f"image_{k}" for k in sorted(chosen))
        question = sets.fill(draw.one(choices if plain else several), label, images=images)
    if task.unanswerable is not None:
        return _turn(question, task.unanswerable)
    if not count:
        return _turn(question, NO_POINTS)
    if style not in POINTS_ONLY and kind == "video":
        draw.counts["recounted_answers"] += count < sum(len(points) for _, points in groups)
    return _turn(question, answer, None if style in COUNT_ONLY else Points(label, seen, kind))


def _tracking(task: Tracking, style: str, draw: _Draw) -> list[Message]:
    if not draw.example.video:
        raise ValueError("Only a video can have tracks.")
    frames, fps = draw.at_rate(task), f"{task.fps:g}"
    if style not in TRACK_ALL | TRACK_ENDS | TRACK_ONE:
        known = ", ".join(sorted(TRACK_ALL | TRACK_ENDS | TRACK_ONE))
        raise ValueError(f"The style {style} says nothing of how to track; those that do are {known}.")
    if any(objects for _, objects in task.frames) and not any(objects for _, objects in frames) and draw.shown:
        raise NotShown
    if style in TRACK_ONE:
        followed = _followed(frames)
        if not followed and draw.shown:
            raise NotShown
        if not followed:
            raise ValueError("A task tracks one object, and there is none that is seen at two times.")
        name = draw.one(list(followed))
        points = followed[name]
        # After the last point there would be nothing to follow.
        first = points[0] if draw.rng.random() < FIRST_POINT_SHARE else draw.one(points[:-1])
        start, x, y = first
        point = format_points(Points(task.label, [(start, [(x, y)])], "video"))
        frames = [(time, [(name, x, y)]) for time, x, y in points if time > start]
        question = draw.one(sets.TRACK_POINT) if draw.templates else "{point}"
        question = question.format(point=point, fps=fps) if task.question is None else f"{task.question} {point}"
    else:
        if style in TRACK_ENDS:
            choices = sets.TRACK_ENDS
        else:
            choices = sets.TRACK if task.fps == 2 and draw.rng.random() < NO_RATE_SHARE else sets.TRACK_FPS
        question = sets.fill(draw.one(choices), task.label, fps=fps) if draw.templates else task.label
        question = task.question or question
    return _turn(question, "<points 0/>", Tracks(task.label, frames, style.endswith("start_end")))


def _followed(frames: list[TrackFrame]) -> dict[int | str, list[tuple[float, float, float]]]:
    """Object -> its points (seconds, x, y) in the order of time, of those seen at two times at least, as written."""
    seen: dict[int | str, dict[float, tuple]] = {}
    for seconds, objects in frames:
        for name, x, y in objects:
            seen.setdefault(name, {}).setdefault(written_seconds(seconds), (x, y))
    return {
        name: [(time, *points[time]) for time in sorted(points)] for name, points in seen.items() if len(points) > 1
    }


def _seen_message(message: Message, draw: _Draw) -> Message:
    """The message with its points and tracks at the stamps of the frames that show them.

    NotShown: none shows one of its tracks, or some of its points, unless the message is nothing but the points.
    """
    if not message.points or not draw.example.video:
        return message
    entries, is_answer = [], message.role == "assistant" and ONLY_POINTS.fullmatch(message.content)
    for entry in map(from_json, message.points):
        if isinstance(entry, Tracks):
            was, entry.frames = entry.frames, draw.tracks(entry.frames)
            lost = any(objects for _, objects in was) and not any(objects for _, objects in entry.frames)
        elif entry.kind == "video":
            was = [group for group in entry.groups if group[1]]
            entry.groups = draw.points(was)
            lost = len(entry.groups) < (min(1, len(was)) if is_answer else len(was))
        else:
            lost = False
        if lost:
            raise NotShown
        entries.append(to_json(entry))
    return replace(message, points=entries)


def _without_pointing(messages: list[Message], draw: _Draw) -> list[Message]:
    """Questions that count, and are not answered with points, get a sentence that wants none."""
    if not (draw.example.images or draw.example.video) or any(message.points for message in messages):
        return messages
    return [
        replace(message, content=f"{draw.one(sets.NO_POINTS)} {message.content}")
        if message.role == "user" and asks_for_a_count(message.content)
        else message
        for message in messages
    ]


def _spell_times(message: Message, draw: _Draw) -> str:
    """The content with `<time s/>` as seconds, in half of the questions as HH:MM:SS.s.

    In answers it is the stamp of the frame that shows what is there at this time, or of the nearest one. NotShown: the
    time is in no part of the video that is shown.
    """
    shown = draw.shown

    def spell(match: re.Match) -> str:
        time = float(match[1])
        if shown:
            if not shown.covers(time):
                raise NotShown
            time -= shown.start
            if message.role == "assistant":
                stamp = shown.stamp(point_time(float(match[1])))
                stamp = shown.nearest(float(match[1])) if stamp is None else stamp
                draw.counts["moved_times"] += abs(stamp - time) > SAME_TIME
                return f"{written_seconds(stamp):.1f}"
        tenths = round(time * 10)
        if message.role == "assistant" or seconds:
            return f"{tenths / 10:.1f}"
        minutes, rest = divmod(tenths, 600)
        return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest / 10:04.1f}"

    if "<time " not in message.content:
        return message.content
    seconds = draw.rng.random() < SECONDS_SHARE
    return TIME.sub(spell, message.content)


_WRITERS = {
    Caption: _caption,
    Question: _question,
    MultipleChoice: _multiple_choice,
    Pointing: _pointing,
    Tracking: _tracking,
}
