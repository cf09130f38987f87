"""Checks of a sample's annotations against its pictures or video, and their change to what the schema wants."""

from dataclasses import replace

import numpy as np

from molmo2_nemo.data.points import NO_TRACKS, SAME_TIME, Points, from_json, render_content
from molmo2_nemo.data.schema import Chat, Example, Pointing, Tracking
from molmo2_nemo.data.tasks import converse
from molmo2_nemo.data.video import annotation_times

# Of coordinates.
UNITS = ("fraction", "percent", "pixels")
# A point that is outside the picture by less than this share of its side is moved to the border: it was rounded.
SLACK = 0.005


def use_fractions(example: Example, unit: str) -> None:
    """Change coordinates to fractions, in place. ValueError: one is outside its picture, or of no picture."""

    def size(frame: float) -> tuple[int, int]:
        """Width and height of what the coordinates of a frame are of."""
        video = example.video
        if video and frame > video.seconds + SAME_TIME:
            raise ValueError(f"points are at {frame:g} seconds, and the video has {video.seconds:g}")
        if not video and frame not in range(1, len(example.images) + 1):
            raise ValueError(f"points are of image {frame:g}, and there are {len(example.images)}")
        seen = video or example.images[int(frame) - 1]
        return seen.width, seen.height

    def fraction(value: float, side: int) -> float:
        value /= {"fraction": 1, "percent": 100, "pixels": side}[unit]
        if not -SLACK <= value <= 1 + SLACK:
            raise ValueError(
                f"a coordinate is {value:.3f} of the picture's side, outside of it: is unit={unit} right? "
                f"({', '.join(UNITS)})"
            )
        return min(max(value, 0.0), 1.0)

    def scaled(frame: float, points: list[tuple]) -> list[tuple]:
        width, height = size(frame)
        return [(*name, fraction(x, width), fraction(y, height)) for *name, x, y in points]

    for branch in example.branches:
        if isinstance(branch, Pointing):
            branch.points = [(frame, scaled(frame, points)) for frame, points in branch.points]
        elif isinstance(branch, Tracking):
            branch.frames = [(seconds, scaled(seconds, objects)) for seconds, objects in branch.frames]
        else:
            messages = branch if isinstance(branch, list) else branch.messages if isinstance(branch, Chat) else []
            for entry in (from_json(entry) for message in messages for entry in message.points):
                if unit != "fraction":
                    raise ValueError("points of messages are fractions: leave out unit")
                if (isinstance(entry, Points) and entry.kind == "image") == bool(example.video):
                    raise ValueError("points of a message are of an image, and the sample has a video, or the reverse")
                for frame, points in entry.groups if isinstance(entry, Points) else entry.frames:
                    scaled(frame, points)


def check_rates(example: Example) -> None:
    """Set the video's annotation_fps from its tracks, if it is not given. ValueError: the video has no frames there."""
    video, tracks = example.video, [branch for branch in example.branches if isinstance(branch, Tracking)]
    if tracks and video.annotation_fps is None:
        video.annotation_fps = min(task.fps for task in tracks)
    if video.annotation_fps is not None:
        annotation_times(video.seconds, 1, video.annotation_fps, video.fps)


def check_answers(example: Example) -> None:
    """ValueError: a branch cannot be asked in one of its styles, or an answer is empty."""
    for branch in example.branches:
        styles = getattr(branch, "style", None)
        if styles == []:
            raise ValueError("style is an empty list")
        for style in styles if isinstance(styles, list) else [styles]:
            styled = branch if isinstance(branch, list) else replace(branch, style=style)
            [talk] = converse(replace(example, branches=[styled]), np.random.default_rng(0), "templates")
            answers = [render_content(m.content, m.points) for m in talk.messages if m.role == "assistant"]
            if not all(answer.strip() for answer in answers):
                raise ValueError("an answer is empty")
            if isinstance(branch, Tracking) and NO_TRACKS in answers:
                raise ValueError(f"no track is at a multiple of 1 / fps = {1 / branch.fps:g} seconds")


def without_nothing(value):
    """The JSON without keys whose value is the default: null, and multi_turn 0."""
    if isinstance(value, dict):
        return {k: without_nothing(v) for k, v in value.items() if v is not None and (k, v) != ("multi_turn", 0)}
    return [without_nothing(item) for item in value] if isinstance(value, list | tuple) else value
