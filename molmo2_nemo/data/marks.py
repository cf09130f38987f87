"""The points and tracks of an answer, and where they are in the pictures or frames that it is about."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from molmo2_nemo.data.points import SAME_TIME, Points, Tracks, parse

# RGB of objects by number: Okabe and Ito's colours, which the colour-blind can tell apart, without black and grey.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
MARK_RADIUS = 5  # pixels
# Pixels of a side that pictures with marks are enlarged to, if they are smaller.
MARKED_SIDE = 336
# Seconds: how long a point stays in a video, at least.
LEAST_HOLD = 0.5
# Seconds that a point may be after a video's end: answers have tenths.
ROUNDED = 0.05 + 1e-6
# Where an answer is drawn beside its label: pictures that are shown, those with points first.
MAX_PICTURES = 4
# Okabe and Ito's green and vermilion, which the colour-blind can tell apart; radii in pixels.
LABELLED, ANSWERED = ((0, 158, 115), 9), ((213, 94, 0), 4)


@dataclass
class Visual:
    """An image, or a frame of a video."""

    crops: list[np.ndarray]  # uint8 [H, W, 3], the whole picture first
    seconds: float | None = None  # of a frame


@dataclass
class Mark:
    """A point of an answer, where it is drawn. x, y: fractions of width and height."""

    visual: int  # index into ShownExample.visuals
    x: float
    y: float
    object: int  # index into Answer.objects


@dataclass
class Answer:
    """A run of targets, and the points and tracks in it."""

    text: str
    objects: list[tuple[int, str]] = field(default_factory=list)  # (number, label)
    marks: list[Mark] = field(default_factory=list)
    num_outside: int = 0  # points of images that the example does not have, or after its video's end
    largest_gap: float = 0.0  # seconds between a point and the frame that it is drawn on


def read_answer(text: str, visuals: list[Visual], end: float = float("inf")) -> Answer:
    """An answer with its points on the images that they name, or on the frames that are nearest in time.

    end: seconds, of the video; no frame shows what is later.
    """
    answer = Answer(text)
    times = [visual.seconds for visual in visuals if visual.seconds is not None]
    for found in parse(text):
        if isinstance(found, Points):
            number, frames = 0, []
            for where, group in found.groups:
                frames.append((where, [(number + i, x, y) for i, (x, y) in enumerate(group, start=1)]))
                number += len(group)
        else:
            frames = found.frames
        objects = {}
        for where, triplets in frames:
            if times and where <= end + ROUNDED:
                visual = min(range(len(times)), key=lambda index: abs(times[index] - where))
                answer.largest_gap = max(answer.largest_gap, abs(times[visual] - where))
            elif not times and 1 <= where <= len(visuals) and where == int(where):
                visual = int(where) - 1
            else:
                answer.num_outside += len(triplets)
                continue
            for number, x, y in triplets:
                if number not in objects:
                    objects[number] = len(answer.objects)
                    answer.objects.append((number, found.label))
                answer.marks.append(Mark(visual, x, y, objects[number]))
    return answer


@dataclass
class Path:
    """Where an object of an answer is over time."""

    number: int
    label: str
    places: list[tuple[float, float, float]]  # (seconds, x, y), ascending


def paths_of(text: str) -> list[Path]:
    """The objects of an answer about a video, in the order of Answer.objects; a point is an object of one moment."""
    result = []
    for found in parse(text):
        paths, count = {}, 0
        for time, group in found.frames if isinstance(found, Tracks) else found.groups:
            for point in group:
                count += 1
                number, x, y = point if isinstance(found, Tracks) else (count, *point)
                paths.setdefault(number, []).append((time, x, y))
        result += [Path(number, found.label, sorted(places)) for number, places in paths.items()]
    return result


def marks_at(paths: list[Path], seconds: float, step: float) -> list[Mark]:
    """Where the objects are at one moment of a video, as marks of its only visual; Mark.object: index into `paths`.

    step: seconds between the frames that the model saw. A point stays for one, and tracks move evenly between two
    points that are no further apart than two.
    """
    places = [_place(path.places, seconds, step) for path in paths]
    return [Mark(0, *place, index) for index, place in enumerate(places) if place is not None]


def _place(path: list[tuple[float, float, float]], seconds: float, step: float) -> tuple[float, float] | None:
    """Where an object is at a time. path: (seconds, x, y), ascending."""
    before = [point for point in path if point[0] <= seconds + SAME_TIME]
    after = path[len(before) :]
    if not before:
        return None
    (begin, x, y) = before[-1]
    if after and after[0][0] - begin <= 2 * step + SAME_TIME:
        share = min(max((seconds - begin) / (after[0][0] - begin), 0.0), 1.0)
        return x + share * (after[0][1] - x), y + share * (after[0][2] - y)
    return (x, y) if seconds < begin + max(step, LEAST_HOLD) else None


def colour_of(index: int) -> tuple[int, int, int]:
    return COLOURS[index % len(COLOURS)]


def draw_marks(
    picture: np.ndarray,
    answer: Answer,
    visual: int,
    colour: tuple[int, int, int] | None = None,
    mark_radius: int = MARK_RADIUS,
    font_size: int = 15,
) -> Image.Image:
    """The picture, enlarged if it is small, with the answer's points on it, each with its object's number.

    colour: of all points; None: each object has its own.
    """
    scale = max(1, round(MARKED_SIDE / max(picture.shape)))
    image = Image.fromarray(picture)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    marks = [mark for mark in answer.marks if mark.visual == visual]
    apart = 9 + mark_radius - MARK_RADIUS
    centres = [(mark.x * (image.width - 1), mark.y * (image.height - 1)) for mark in marks]
    for mark, (x, y) in zip(marks, centres):
        right = x < image.width - 2 * font_size
        draw.text(
            (x + (apart if right else -apart), y),
            str(answer.objects[mark.object][0]),
            "white",
            anchor="lm" if right else "rm",
            font_size=font_size,
            stroke_width=2,
            stroke_fill="black",
        )
    for mark, (x, y) in zip(marks, centres):
        own = colour_of(mark.object) if colour is None else colour
        for radius, fill in ((mark_radius + 2, "black"), (mark_radius + 1, "white"), (mark_radius, own)):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
    return image


def draw_both(seen: list[Visual], label: str, answer: str) -> Image.Image | None:
    """Pictures or frames with the points of a label and of an answer, up to MAX_PICTURES of them, two in a row.

    seen: at the size that they are drawn at. None: there are none.
    """
    if not seen:
        return None
    labelled, answered = (read_answer(words, seen) for words in (label, answer))
    marked = sorted({mark.visual for mark in [*labelled.marks, *answered.marks]})
    others = [number for number in range(len(seen)) if number not in marked]
    shown = [*evenly(marked, MAX_PICTURES), *evenly(others, max(0, MAX_PICTURES - len(marked)))]
    drawn = []
    for number in sorted(shown):
        picture = seen[number].crops[0]
        for marks, (colour, radius) in ((labelled, LABELLED), (answered, ANSWERED)):
            picture = np.asarray(draw_marks(picture, marks, number, colour, radius))
        drawn.append(picture)
    # Each in a cell of the largest one's size.
    width, height = (max(picture.shape[axis] for picture in drawn) + 4 for axis in (1, 0))
    columns = min(2, len(drawn))
    whole = Image.new("RGB", (columns * width - 4, -(-len(drawn) // columns) * height - 4), "white")
    for number, picture in enumerate(drawn):
        whole.paste(Image.fromarray(picture), (number % columns * width, number // columns * height))
    return whole


def evenly(items: list[int], count: int) -> list[int]:
    """At most so many of them, at equal distances."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]
