"""Points and tracks as text, the way Molmo2 reads and writes them (arXiv 2601.10611, section 3).

    <points coords="F i xxx yyy i xxx yyy;F i xxx yyy">label</points>
    <tracks coords="t i xxx yyy i xxx yyy;t i xxx yyy">label</tracks>

F is an image index from 1, or a time in seconds with one decimal, as t is. i numbers the points of the whole answer
from 1, or names an object of the tracks. xxx and yyy are thousandths of the width and the height, three digits at
least. Frames are separated by a tab in stage 1 and by a semicolon afterwards; inside a frame all is separated by
single spaces.
"""

import functools
import json
import math
import re
from dataclasses import asdict, dataclass

SEPARATORS = ("\t", ";")
NO_POINTS = "There are none."
NO_TRACKS = "No tracks available."
# Seconds: an annotation this close to a frame is of that frame (times are written with one decimal).
SAME_TIME = 0.05
# Points of videos are at multiples of 1 / POINT_FPS seconds (molmo2: Molmo2VideoPoint, "two_fps_timestamps").
POINT_FPS = 2
# Characters of a message at most, its points and tracks included: twice what a sample's JSON may have.
MAX_RENDERED = 2**25

_MARKER = re.compile(r"<points ([0-9]{1,4})/>")
_TAG = re.compile(r"</?(?:points|tracks)\b")
_OPENING = re.compile(r'<(points|tracks)\s(?:[^<]*?\s)?coords="([^"<]*)(?:"[^<>]*>?)?')
_FRAME = re.compile(r"\s*([0-9]{1,9})(\.[0-9]+)?(?=\s)")
_ALT = re.compile(r'\salt="([^"<>]*)"')
_TRIPLET = re.compile(r"(?<=\s)([0-9]{1,6}) +([0-9]{3,4}) +([0-9]{3,4})(?=\s|$)")


def is_same_time(first: float, second: float) -> bool:
    """Whether two times, in seconds, are of one frame. 0.75 is written as 0.8, which in floating point is a little more
    than SAME_TIME away."""
    return abs(first - second) <= SAME_TIME + 1e-9


@dataclass
class Points:
    """Points with one label.

    `groups` is a list of (frame, [(x, y), ...]): x and y are fractions (0..1) of width and height; frame is the index
    of the image from 1 if `kind` is "image", or "images" for one question about several images, and seconds from the
    start if it is "video".
    """

    label: str
    groups: list
    kind: str = "image"
    alt: str | None = None  # text of the tag's attribute of that name


@dataclass
class Tracks:
    """Objects with one label, followed over time: `frames` is a list of (seconds, [(object_id, x, y), ...]), x and y
    as fractions of width and height. Leave out an object where it cannot be seen. `ends`: only the first and the last
    point of each object are written."""

    label: str
    frames: list
    ends: bool = False


def format_points(points: Points, separator: str = ";") -> str:
    """Text of the points, ordered by frame, then x, then y; NO_POINTS if there are none.

    The label of kind "image" is lower-cased, as in Molmo2's training data. Coordinates outside the picture are
    clipped. ValueError: see `_check`, and if `kind` is unknown, an image index is not a positive integer or a
    coordinate is not finite.
    """
    _check(points.label, separator)
    if points.kind not in ("image", "images", "video"):
        raise ValueError(f"The kind of points must be image, images or video, not {points.kind!r}.")
    frames = {}
    for frame, coordinates in points.groups:
        key = written_seconds(frame) if points.kind == "video" else _image_index(frame)
        frames.setdefault(key, []).extend((_thousandths(x), _thousandths(y)) for x, y in coordinates)
    texts, count = [], 0
    for frame in sorted(frames):
        if frames[frame]:
            numbered = enumerate(sorted(frames[frame]), start=count + 1)
            texts.append(_frame_text(frame, [(i, x, y) for i, (x, y) in numbered]))
            count += len(frames[frame])
    if not texts:
        return NO_POINTS
    label = points.label.lower() if points.kind == "image" else points.label
    alt = "" if points.alt is None else f'alt="{_attribute(points.alt)}" '
    return f'<points {alt}coords="{separator.join(texts)}">{label}</points>'


def format_tracks(tracks: Tracks, separator: str = ";") -> str:
    """Text of the tracks, ordered by time, then object; NO_TRACKS if nothing is left of them.

    Objects are numbered from 1 as they first appear, by x, then y in that frame. Frames without objects are left out,
    and so is an object's second point in one frame. ValueError: see `_check`, and if a coordinate is not finite.
    """
    _check(tracks.label, separator)
    frames = {}
    for seconds, objects in tracks.frames:
        frame = frames.setdefault(written_seconds(seconds), {})
        for name, x, y in objects:
            frame.setdefault(name, (_thousandths(x), _thousandths(y)))
    if tracks.ends:
        frames = _ends(frames)
    numbers, texts = {}, []
    for seconds in sorted(frames):
        frame = frames[seconds]
        for name in sorted(frame, key=frame.get):
            numbers.setdefault(name, len(numbers) + 1)
        if frame:
            texts.append(_frame_text(seconds, sorted((numbers[name], x, y) for name, (x, y) in frame.items())))
    if not texts:
        return NO_TRACKS
    return f'<tracks coords="{separator.join(texts)}">{tracks.label}</tracks>'


def parse(text: str) -> list[Points | Tracks]:
    """The points and tracks in a text, in the order of their tags; never raises.

    Made for what a model writes: a tag may be cut off or repeated, frames may be separated by a tab, colon, comma or
    semicolon, and whatever is not a frame or an (id, x, y) with x and y in 000..1000 is dropped. A tag without any
    valid point is dropped as a whole. Points count as a video's if a frame has a decimal point.
    """
    found = []
    for opening in _OPENING.finditer(text):
        end = _TAG.search(text, opening.end())
        label = text[opening.end() : end.start() if end else len(text)]
        groups, is_video = {}, False
        for part in re.split(r"[\t:,;]", opening[2]):
            start = _FRAME.match(part)
            if not start:
                continue
            is_video = is_video or start[2] is not None
            triplets = [tuple(map(int, match.groups())) for match in _TRIPLET.finditer(part, start.end())]
            triplets = [(i, x / 1000, y / 1000) for i, x, y in triplets if x <= 1000 and y <= 1000]
            if triplets:
                groups.setdefault(float(start[1] + (start[2] or "")), []).extend(triplets)
        if not is_video and opening[1] == "points":
            groups = {int(image): group for image, group in groups.items() if image >= 1}
        if groups and opening[1] == "tracks":
            found.append(Tracks(label, [(seconds, _first_of_each(group)) for seconds, group in groups.items()]))
        elif groups:
            kind, alt = "video" if is_video else "image", _ALT.search(text[opening.start() : opening.start(2)])
            points = [(frame, [p[1:] for p in group]) for frame, group in groups.items()]
            found.append(Points(label, points, kind, alt[1] if alt else None))
    return found


def to_json(value: Points | Tracks) -> dict:
    """A dictionary that `json.dumps` takes and `from_json` reads."""
    return {"type": type(value).__name__.lower(), **asdict(value)}


def from_json(value: dict) -> Points | Tracks:
    """Points or Tracks out of `to_json`'s dictionary. ValueError: it is not such a dictionary."""
    try:
        if value["type"] == "points":
            groups = [(float(frame), [(float(x), float(y)) for x, y in group]) for frame, group in value["groups"]]
            return Points(str(value["label"]), groups, value.get("kind", "image"), value.get("alt"))
        if value["type"] == "tracks":
            frames = [(float(t), [(i, float(x), float(y)) for i, x, y in frame]) for t, frame in value["frames"]]
            return Tracks(str(value["label"]), frames, bool(value.get("ends", False)))
    except (KeyError, TypeError, ValueError):
        pass
    raise ValueError(f"Neither points nor tracks: {json.dumps(value, default=repr)[:200]}")


def render_content(content: str, entries: list[dict], separator: str = ";") -> str:
    """The content of a message, each marker `<points k/>` in it replaced by entry k as text.

    entries: dictionaries of `to_json`; without any the content is returned as it is. ValueError: a marker has no
    entry, an entry cannot be formatted, or the text would have more than MAX_RENDERED characters.
    """
    if not entries:
        return content

    @functools.cache
    def entry(index: int) -> str:
        value = from_json(entries[index])
        return format_points(value, separator) if isinstance(value, Points) else format_tracks(value, separator)

    size = len(content)

    def replace(marker: re.Match) -> str:
        nonlocal size
        index = int(marker[1])
        if index >= len(entries):
            raise ValueError(f"The marker {marker[0]} has no entry among {len(entries)} points.")
        text = entry(index)
        size += len(text)
        if size > MAX_RENDERED:  # many markers may name one long entry
            raise ValueError(f"A message with its points has more than {MAX_RENDERED:,} characters.")
        return text

    return _MARKER.sub(replace, content)


def _ends(frames: dict[float, dict]) -> dict[float, dict]:
    """Of seconds -> object -> point, what is the first or the last of an object."""
    spans = {}
    for seconds in sorted(frames):
        for name in frames[seconds]:
            spans[name] = (spans.get(name, (seconds,))[0], seconds)
    return {
        seconds: {name: point for name, point in frame.items() if seconds in spans[name]}
        for seconds, frame in frames.items()
    }


def _attribute(text: str) -> str:
    """Text that cannot end an attribute or a tag."""
    return text.replace('"', "'").replace("<", "").replace(">", "")


def point_time(seconds: float) -> float:
    """The time of a point in a video, rounded down to one that points are at."""
    return math.floor(POINT_FPS * seconds + 1e-6) / POINT_FPS


def _check(label: str, separator: str) -> None:
    """ValueError: the label holds a points or tracks tag, or the separator is not one of SEPARATORS."""
    if _TAG.search(label):
        raise ValueError(f"A label cannot hold a points or tracks tag: {label!r}.")
    if separator not in SEPARATORS:
        raise ValueError(f"The separator of frames must be a tab or a semicolon, not {separator!r}.")


def _thousandths(fraction: float) -> int:
    if not math.isfinite(fraction):
        raise ValueError(f"A coordinate must be a finite number, not {fraction}.")
    return round(1000 * min(max(fraction, 0.0), 1.0))


def _image_index(value) -> int:
    if not 1 <= value < 1e8 or value != int(value):
        raise ValueError(f"The index of an image must be an integer from 1, not {value}.")
    return int(value)


def written_seconds(value: float) -> float:
    """A time as points and tracks name it, with one decimal. ValueError: it is not from 0 to 1e8."""
    if not 0 <= value < 1e8:
        raise ValueError(f"The time of a frame must be seconds from the start, not {value}.")
    return round(float(value), 1) + 0.0  # no negative zero


def _frame_text(frame: int | float, triplets: list[tuple[int, int, int]]) -> str:
    return " ".join([str(frame), *(f"{i} {x:03d} {y:03d}" for i, x, y in triplets)])


def _first_of_each(triplets: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    firsts = {}
    for triplet in triplets:
        firsts.setdefault(triplet[0], triplet)
    return list(firsts.values())
