"""What converters share: drafts of samples, functions that make tasks in the schema's JSON, readers of files.

A converter is a function from one raw row to drafts. It opens no picture and no video: sizes, durations and the change
of coordinates to fractions come later (prepare/draft_to_sample.py), where also the drafts of one picture or
video are joined.
"""

import csv
import json
import math
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from molmo2_nemo.catalogue import raw as raw_files
from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.files import sha256_of_text
from molmo2_nemo.limits import VIDEO_SUFFIXES

LETTERS = string.ascii_uppercase
OPTION = re.compile(r"\(?([A-Z])[.):]\s*(.*)", re.DOTALL)  # with its letter: "A. a cat", "(A) a cat", "A: a cat"
MAX_POINTS = 60  # of a pointing answer (molmo2: olmo/data, "max_points")


# Where Molmo2's videos of YouTube are, as ID/ID.mp4. One may be in several of them; the first is taken (allenai/molmo2:
# olmo/data/molmo2_datasets.py, YOUTUBE_SUBDIRS).
YOUTUBE_FOLDERS = ("youtube-cc-exist", "youtube-cc-kw", "youtube-cc-temporal")


@dataclass
class Clip:
    """A video file, or the seconds `start` to `end` of it. Names are tried in their order.

    `cut`: names of a file that holds these seconds alone. `frames`: names of a folder of pictures, `fps` a second,
    of which a video is made. `native_fps`: there are so many a second in the folder, or in the video, and every
    round(native_fps / fps)-th of them is taken. `FOLDER/**/NAME` is any NAME below a FOLDER, for videos and frames.
    `seconds`: length of the whole video, where the rate of its pictures is not sure.
    """

    names: list[str] = field(default_factory=list)
    start: float | None = None
    end: float | None = None
    cut: list[str] = field(default_factory=list)
    frames: list[str] = field(default_factory=list)
    fps: float | None = None
    native_fps: float | None = None
    seconds: float | None = None
    annotation_fps: float | None = None
    may_be_cut: bool = False  # the file of one of the names holds these seconds alone if it is as long as they are
    subtitles: list[tuple[float, float, str]] = field(default_factory=list)  # seconds of the whole video


@dataclass
class Draft:
    """A sample before its media are looked at.

    images: each the bytes of a file, a name (an address, a path below the raw folder's media, or one that starts with
    "./" below the raw folder itself), a list of names to try, {"name", "boxes", "opacity"} or {"name", "clock"}, see
    draft_to_sample.py.
    unit: of the coordinates of pointing tasks: fraction, percent or pixels.
    about: what is held out together; None: the names of the media.
    tree: drafts with the same media become one sample if this is the same, too; None: never.
    """

    branches: list[dict]
    images: list = field(default_factory=list)
    video: Clip | None = None
    unit: str = "fraction"
    multi_turn: float = 0.0
    about: str | None = None
    tree: str | None = ""


@dataclass
class Drop:
    """An annotation that is not used: by a rule of its set, or because the row is not as expected (unfit)."""

    reason: str
    unfit: bool = False


Rows = Callable[[RawSource, str | None], Iterator[dict]]


@dataclass(frozen=True)
class Converter:
    """convert: a row -> drafts. rows: how to read rows that raw.rows cannot (no plain tables)."""

    convert: Callable[[dict], Iterable[Draft | Drop]]
    rows: Rows | None = None
    max_branches: int = 64  # of a sample; more are divided evenly among several samples
    most_branches: int | None = None  # of a picture or video; the others are dropped, chosen by a hash
    max_points: int | None = None  # of all branches of a sample


# -- tasks, in the schema's JSON --------------------------------------------------------------------------------------


def question(text: str, answers: str | list[str], style: str, explanation: str | None = None) -> dict:
    """A question task. ValueError: nothing is asked or answered."""
    answers = [answers] if isinstance(answers, str) else list(answers)
    answers = [str(answer).strip() for answer in answers if answer is not None and str(answer).strip()]
    text = str(text or "").strip()
    if not text or not answers:
        raise ValueError("no answer" if text else "no question")
    task = {"task": "question", "question": text, "answers": answers, "style": style}
    return task | ({"explanation": explanation.strip()} if explanation and explanation.strip() else {})


def choice(text: str, options: list, answer: int, style: str) -> dict:
    """A multiple choice task. answer: index from 0. ValueError: fewer than two options, or answer is none."""
    if isinstance(options, str) or int(answer) != float(answer):
        raise ValueError("options that are no list, or an answer that is no whole number")
    options, answer = [_text(option) for option in options], int(answer)
    if not text or not str(text).strip():
        raise ValueError("no question")
    if len(options) < 2 or not all(options):
        raise ValueError("fewer than two options, or an empty one")
    if not 0 <= answer < len(options):
        raise ValueError("the right answer is none of the options")
    return {
        "task": "multiple_choice",
        "question": str(text).strip(),
        "options": options,
        "answer": answer,
        "style": style,
    }


def lettered_choice(text: str, options: list, letter: str, style: str) -> dict:
    """A choice whose answer is a letter, as "B" or "(B)". Letters that all options begin with, as "B. a cat", are left
    out: they are written with the question. ValueError: as of choice, or the answer is no letter."""
    found = [OPTION.fullmatch(_text(option)) for option in options]
    if all(found) and [match[1] for match in found] == list(LETTERS[: len(found)]):
        options = [match[2] for match in found]
    name = str(letter).strip().strip("().")
    if len(name) != 1 or name not in LETTERS:
        raise ValueError("the right answer is no letter")
    return choice(text, options, LETTERS.index(name), style)


def options_of(text: str) -> tuple[str, list[str]]:
    """A text whose last lines are options with the letters A, B, C, ...: what is before them, and the options.

    A line without a letter goes on with the option before it. Letters before A belong to the text: I. and II. may be
    part of a question. ValueError: a letter is missing, or is not in its place.
    """
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    letters = [match[1] if (match := OPTION.fullmatch(line)) else "" for line in lines]
    first = letters.index("A") if "A" in letters else len(lines)
    options: list[str] = []
    for line, letter in zip(lines[first:], letters[first:]):
        if letter == LETTERS[len(options)]:
            options.append(line)
        elif letter:
            raise ValueError("options whose letters are not A, B, C, ...")
        else:
            options[-1] += f" {line}"
    return "\n".join(lines[:first]), options


def shuffled_choice(text: str, right: str, wrong: Iterable[str], style: str, *seed) -> dict:
    """A choice whose order of options depends on the seed alone."""
    options = list(dict.fromkeys(map(_text, [right, *wrong])))
    right = options[0]
    fixed_random(text, *seed).shuffle(options)
    return choice(text, options, options.index(right), style)


def said(value) -> str:
    """A text of a row. ValueError: there is none."""
    if value is None or not str(value).strip():
        raise ValueError("an empty text")
    return str(value).strip()


def _text(option) -> str:
    return "" if option is None else str(option).strip()


def caption(text: str | list[str], style: str) -> dict:
    texts = [text] if isinstance(text, str) else list(text or [])
    texts = [item.strip() for item in texts if item and item.strip()]
    if not texts:
        raise ValueError("no caption")
    return {"task": "caption", "text": texts if len(texts) > 1 else texts[0], "style": style}


def pointing(label: str, groups: list, style: str | list[str], text: str | None = None, **more) -> dict:
    """A pointing task. groups: [[image from 1 or seconds, [[x, y], ...]], ...].

    ValueError: there is no label, or a coordinate is not a number.
    """
    label = str(label or "").strip()
    if not label:
        raise ValueError("no label")
    if not all(math.isfinite(value) for _, points in groups for point in points for value in point):
        raise ValueError("a coordinate is no number")
    task = {"task": "pointing", "label": label, "points": groups, "style": style}
    return task | ({"question": text.strip()} if text else {}) | more


def chat(turns: Iterable[str], style: str, system: str | None = None) -> dict:
    """A conversation of user and assistant in turn. ValueError: a turn is empty, or the last one is the user's."""
    turns = [str(turn).strip() for turn in turns]
    if len(turns) < 2 or len(turns) % 2 or not all(turns):
        raise ValueError("the turns are not user and assistant, or one is empty")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"task": "chat", "messages": messages, "style": style}


def xy(points) -> list[list[float]]:
    """Points given as [{x, y}, ...], {x: [...], y: [...]} or None, as [[x, y], ...]. ValueError: one is missing."""
    if not points:
        return []
    if isinstance(points, dict):
        xs, ys = points["x"] or [], points["y"] or []
        if len(xs) != len(ys):
            raise ValueError("unlike numbers of x and y")
        pairs = list(zip(xs, ys))
    else:
        pairs = [(point["x"], point["y"]) if isinstance(point, dict) else (point[0], point[1]) for point in points]
    if any(value is None for pair in pairs for value in pair):
        raise ValueError("a coordinate is missing")
    return [[float(x), float(y)] for x, y in pairs]


def usable(make: Callable[..., dict | Drop], items: Iterable) -> list[dict | Drop]:
    """`make(item)` of each item: a task, or a Drop by a rule.

    An item that is not as expected becomes a Drop, too, and takes no other along.
    """
    tasks: list[dict | Drop] = []
    for item in items:
        try:
            tasks.append(make(item))
        except ValueError as error:
            tasks.append(Drop(str(error), unfit=True))
        except KeyError as error:
            tasks.append(Drop(f"no column {error}", unfit=True))
        except (TypeError, LookupError, AttributeError):
            tasks.append(Drop("a value of another type than expected", unfit=True))
    return tasks


def drafts_of(tasks: Iterable[dict | Drop], images: list, **more) -> Iterator[Draft | Drop]:
    """One draft of what is `usable`, and what is not. ValueError: there is nothing at all."""
    tasks = list(tasks)
    if not tasks:
        raise ValueError("nothing is asked")
    if branches := [task for task in tasks if isinstance(task, dict)]:
        yield Draft(branches, images, **more)
    yield from (task for task in tasks if isinstance(task, Drop))


def image_of(value) -> bytes | str:
    """The image of a column of the Hub, {bytes, path} or a path: its bytes, or its file's name. ValueError: neither."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value or not isinstance(value, bytes | str):
        raise ValueError("no image in the row")
    return value


def more(row, **columns):
    """A row with more columns. What is no row stays as it is: it is counted as unfit when it is converted."""
    return row | columns if isinstance(row, dict) else row


def whole_number(value) -> int:
    """A count. ValueError: it is none."""
    if int(value) != float(value) or int(value) < 0:
        raise ValueError("a count that is no whole number")
    return int(value)


def spoken(lines: Iterable[tuple]) -> list[tuple[float, float, str]]:
    """Subtitles (start, end, text) in seconds. ValueError: one has no time or no text."""
    found = [(float(start), float(end), text) for start, end, text in lines]
    if not all(isinstance(text, str) and math.isfinite(start) and math.isfinite(end) for start, end, text in found):
        raise ValueError("a subtitle without a time or a text")
    return found


def together(*lists) -> Iterator[tuple]:
    """`zip` of columns. ValueError: their lengths differ."""
    try:
        yield from zip(*lists, strict=True)
    except ValueError:
        raise ValueError("columns of unlike length") from None


def columns(table: dict | list, *names: str) -> Iterator[tuple]:
    """Tuples of a {name: [...]} or a [{name: ...}] table. ValueError: columns of unlike length."""
    if isinstance(table, dict):
        lists = [table[name] or [] for name in names]
        if len({len(values) for values in lists}) > 1:
            raise ValueError("columns of unlike length")
        yield from zip(*lists)
    else:
        for row in table or []:
            yield tuple(row[name] for name in names)


def fixed_random(*seed) -> random.Random:
    """A generator that gives the same numbers for the same seed on every machine."""
    return random.Random(digest("\0".join(map(str, seed))))


def digest(text: str) -> int:
    """The first 64 bits of the text's SHA-256."""
    return int(sha256_of_text(text)[:16], 16)


def pick(choices: tuple[str, ...], *seed) -> str:
    """One of the sentences, always the same for the same seed."""
    return choices[digest("\0".join(map(str, seed))) % len(choices)]


# -- files ------------------------------------------------------------------------------------------------------------


def find(raw: RawSource, *patterns: str) -> Path:
    """The first annotation file that one of the glob patterns names, below the raw folder, of several the shortest
    path. ValueError: there is none."""
    for pattern in patterns:
        if found := find_all(raw, pattern):
            return found[0]
    raise ValueError(f"{raw.name} has no file {' or '.join(patterns)} below {raw.folder}")


def find_all(raw: RawSource, pattern: str) -> list[Path]:
    """All files below the raw folder that match, shortest path first. media/ is left out: it holds no annotations."""
    found = []
    for name in ("hub", "manual", "extracted"):
        if (raw.folder / name).is_dir():
            found += [path for path in (raw.folder / name).rglob(pattern) if path.is_file()]
    return sorted(found, key=lambda path: (len(path.parts), str(path)))


def read_json(path: Path):
    """The content of a JSON file. ValueError, one sentence: it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def json_items(path: Path, key: str | None = None) -> Iterator[dict]:
    """Items of the JSON array, or of the array under `key` of the JSON object, without holding more than one.

    ValueError, one sentence: there is no such array, or the file is broken.
    """
    try:
        yield from raw_files.json_items(path, key)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def array_rows(pattern: str, key: str | None = None) -> Rows:
    """Rows are the items of an array in a JSON file."""
    return lambda raw, split: json_items(find(raw, pattern), key)


def jsonl(path: Path) -> Iterator[dict | list]:
    """The values of a JSON lines file. ValueError, one sentence that names the line: it is not JSON."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error


def table(path: Path, delimiter: str = ",", names: list[str] | None = None) -> Iterator[dict]:
    """Rows of a CSV file. `names`: of the columns of a file without a header line."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        yield from csv.DictReader(file, names, delimiter=delimiter)


def video_names(name: str) -> list[str]:
    """A video's name with the suffixes that it may have on disk."""
    if name.lower().endswith(VIDEO_SUFFIXES):
        return [name]
    return [*(name + suffix for suffix in VIDEO_SUFFIXES), name]


def of_youtube(name: str) -> list[str]:
    """What a video of YouTube that Molmo2's own sets show may be called: its ID, or the ID in a known folder."""
    return [name, *(f"{folder}/{name}/{name}" for folder in YOUTUBE_FOLDERS)]


def clip(name: str | list[str], start=None, end=None, cut: list[str] | None = None, **more) -> Clip:
    """A video, or the seconds `start` to `end` of it. ValueError: these are not numbers, or end before they start."""
    names = [candidate for item in ([name] if isinstance(name, str) else name) for candidate in video_names(item)]
    cut = [candidate for item in cut or [] for candidate in video_names(item)]
    if start is None or end is None:
        return Clip(names, cut=cut, **more)
    start, end = float(start), float(end)
    if not (math.isfinite(start) and math.isfinite(end) and max(start, 0.0) < end):
        raise ValueError("a clip that does not end after its start")
    return Clip(names, max(start, 0.0), end, cut, **more)
