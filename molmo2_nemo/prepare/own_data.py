"""A user's own annotations, a sample a line (docs/own_data.md), checked against their pictures and videos."""

import hashlib
import json
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from molmo2_nemo.data.schema import UNITS, Example, Origin, Pointing, Tracking, ValueMistake, read_example, said_of
from molmo2_nemo.data.video import IsPicture
from molmo2_nemo.prepare.annotations import (
    check_answers,
    check_rates,
    doubts,
    mistakes_in,
    use_fractions,
    without_nothing,
)
from molmo2_nemo.prepare.formats import files, table
from molmo2_nemo.prepare.formats.line import Line, Row, Unpacked, file_name
from molmo2_nemo.prepare.line_names import LineNames, with_groups
from molmo2_nemo.prepare.media import MAX_MEDIA, IsVideo, image_facts, suffix, video_facts
from molmo2_nemo.prepare.mistakes import (
    TASKS,
    LineMistakes,
    mistakes_of_form,
    nearest_key,
    shown,
    task_keys,
    task_meant,
    unknown_key,
)
from molmo2_nemo.prepare.webdataset import KEY

MAX_ID = 64  # characters; --repeat appends to it
MEDIA = ("image", "images", "video")
OF_VIDEO = ("clip", "annotation_fps", "subtitles", "time_unit")
TAUGHT = ("task", "messages", "branches")
# Formats whose files have pictures on which nothing is marked.
EXPORTS = ("coco", "cvat", "label_studio")
NOTHING_MARKED = "a picture on which nothing is marked, left out"
# What is taken for true of a file that cannot be read.
UNREAD, MAX_SECONDS = {"width": 1, "height": 1}, 1e6
# Frames a second of tracks for which no rate is given, or the nearest that there is (Molmo2's tracks have mostly 2).
USUAL_FPS = 2.0


class _LineDocument(BaseModel):
    """The keys of a line beside those of its task, its messages or its branches.

    A key that is left out is None; null is refused. A field's description says what is wrong with a refused value.
    """

    model_config = ConfigDict(extra="allow", strict=True)

    id: Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)] = Field(
        None,
        pattern=f"^{KEY.pattern}$",
        max_length=MAX_ID,
        description=f"is not up to {MAX_ID} letters, digits, - and _",
    )
    image: str = Field(None, min_length=1, description="names no file; for several, write images")
    images: list[Annotated[str, Field(min_length=1)]] = Field(
        None, description='is not a list of files: write ["FILE"], or image'
    )
    video: str = Field(None, min_length=1, description="names no file")
    unit: Literal[UNITS] = Field(None, description=f"is not one of {', '.join(UNITS)}")
    time_unit: Literal["seconds", "frames"] = Field(None, description="is not one of seconds, frames")
    # The schema of samples checks these.
    clip: Any = None
    annotation_fps: Any = None
    subtitles: Any = None
    style: Any = None
    multi_turn: Any = None


@dataclass(frozen=True)
class Reading:
    """How lines are read. folder: of pictures and videos, resolved; unpacked: of files that were inside of others."""

    folder: Path
    unpacked: Path
    unit: str = "fraction"
    form: str | None = None  # a key of formats.line.FORMATS; None: each line's is recognised
    follow_links: bool = False


@dataclass
class OwnSample:
    """A line that can be used, as it will be stored."""

    key: str
    sample: bytes  # JSON of a schema.Example
    files: list[tuple[str, Path]]  # (part, file)
    tasks: list[str]
    contents: list[str]  # SHA-256 of each file in hexadecimal digits; of a sample without files, of what is taught

    def size(self) -> int:
        """Bytes."""
        return len(self.sample) + sum(file.stat().st_size for _, file in self.files)


@dataclass
class Outcome:
    """What became of a row: a sample, or what is wrong with it."""

    place: str
    form: str | None = None
    sample: OwnSample | None = None
    mistakes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what of it is not used, and why


def read_row(row: Row, reading: Reading) -> Outcome:
    """A row that can be used. LineMistakes, ValueError, OSError: what is wrong with it, in its own names."""
    record = _record(row)
    line = (
        Line(record, row.form, table.NAMES if row.form == "table" else {}, row.sizes)
        if row.form
        else files.to_line(record, reading.form, Unpacked(reading.unpacked))
    )
    if line.form in EXPORTS and not line.document["branches"]:
        return Outcome(row.place, line.form, notes=[*row.notes, *line.notes, NOTHING_MARKED])
    document = _checked(line.document)
    media, parts, names, contents, problems = _media(document, line, reading)
    branches, grouped = _branches(document, media.get("video") or {})
    said = LineNames(line, document, grouped)
    sample = media | {name: document[name] for name in ("style", "multi_turn") if name in document}
    if "task" in document:
        sample.pop("style", None)  # it is the task's, where it may be a list
    try:
        example = read_example(json.dumps(sample | {"branches": branches}))
        if problems:
            wrong = [*mistakes_in(example), *doubts(example, line.form in EXPORTS)]
            raise LineMistakes([*problems, *map(said.of, wrong)])
        moved = _check(example, document, line, names, reading)
    except ValueMistake as mistake:
        raise LineMistakes([*problems, said.of(mistake)]) from mistake
    except ValueError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        raise LineMistakes([*problems, *map(said.of, mistakes_of_form(error.__cause__, branches))]) from error
    except ExceptionGroup as group:
        raise LineMistakes(map(said.of, group.exceptions)) from group
    example.origin = _origin(row, document, parts, reading)
    tasks = ["chat" if isinstance(branch, list) else branch.task for branch in example.branches]
    text = json.dumps(without_nothing(asdict(example))).encode()
    key = document["id"] if "id" in document else f"{row.number:08d}"
    contents = contents or [hashlib.sha256(json.dumps(branches, sort_keys=True).encode()).hexdigest()]
    return Outcome(
        row.place, line.form, OwnSample(str(key), text, parts, tasks, contents), [], row.notes + line.notes + moved
    )


def _origin(row: Row, document: dict, parts: list[tuple[str, Path]], reading: Reading) -> Origin:
    """For tools/inspect_data.py. The same wherever the files are."""
    folder = reading.folder
    media = [str(file.relative_to(folder)) if file.is_relative_to(folder) else file.name for _, file in parts]
    # Names of files, and of members of a tar file, need not be UTF-8.
    file, place, *media = (name.encode(errors="replace").decode() for name in (row.file, row.place, *media))
    return Origin(file, place, document.get("unit") or reading.unit, media)


def _record(row: Row) -> dict:
    record = row.content
    if isinstance(record, bytes):
        if len(record) > files.MAX_LINE:
            raise ValueError(f"the line has more than {files.MAX_LINE:,} bytes")
        try:
            record = json.loads(record)
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON: {error.msg}, at its column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    try:
        json.dumps(record, ensure_ascii=False, default=repr).encode()
    except UnicodeEncodeError as error:
        half = json.dumps(error.object[error.start])
        raise ValueError(f"it holds half of a surrogate pair, {half}: write the character itself, as UTF-8") from error
    return record


def _checked(document: dict) -> dict:
    """The document, without `images` if it is empty. LineMistakes: its keys, or values of those that all lines have."""
    named = [name for name in MEDIA if name in document]
    if len(named) > 1:
        raise ValueError(f"it has {' and '.join(named)}: one of them is enough")
    mistakes = _unknown_keys(document)
    try:
        _LineDocument.model_validate(document)
    except ValidationError as error:
        for key in dict.fromkeys(detail["loc"][0] for detail in error.errors(include_url=False)):
            mistakes.append(f"{key} = {shown(document[key])} {_LineDocument.model_fields[key].description}")
    if "video" not in document and (stray := [name for name in OF_VIDEO if name in document]):
        mistakes.append(f"it has {stray[0]} and no video")
    if mistakes:
        raise LineMistakes(mistakes)
    return {key: value for key, value in document.items() if key != "images" or value}


def _unknown_keys(document: dict) -> list[str]:
    """What is wrong with the names of a line's keys, or with that of its task."""
    own, keys = set(_LineDocument.model_fields), set(document)
    task, known, owner = document.get("task"), own | set(TAUGHT), "a line"
    if "task" in document:
        if not isinstance(task, str) or task not in TASKS:
            meant = nearest_key(task, TASKS) if isinstance(task, str) else None
            advice = f'write "{meant}"' if meant else f"it is one of {', '.join(TASKS)}"
            return [f"task = {shown(task)} is unknown: {advice}"]
        known, owner = own | {"task", *task_keys(task)}, f"a line with the task {task}"
    elif "messages" in document or "branches" in document:
        name = "messages" if "messages" in document else "branches"
        if stray := sorted(set(TAUGHT) & keys - {name}):
            return [f"it has {name} and the key {stray[0]}, which goes with no {name}"]
        known, owner = own | {name}, f"a line with {name}"
    unknown = [f"it {unknown_key(key, known, owner)}" for key in document if key not in known]
    if keys & set(TAUGHT):
        return unknown
    if meant := [key for key in document if key not in own and nearest_key(key, TAUGHT)]:
        return [f"it {unknown_key(key, TAUGHT, 'a line')}" for key in meant]
    missing = "it has no task, no messages and no list of branches"
    if meant := task_meant(keys):
        task, names = meant
        spelt = "".join(f", and {ours} for {key}" for key, ours in names.items())
        lists = " as a list" if "answers" in names.values() else ""
        return [f'{missing}: add "task": "{task}"{spelt}{lists}']
    return [f"{missing}, but {', '.join(map(shown, sorted(keys))) or 'nothing'}: see docs/own_data.md for what is read"]


# -- pictures and videos ----------------------------------------------------------------------------------------------


def _media(
    document: dict, line: Line, reading: Reading
) -> tuple[dict, list[tuple[str, Path]], list[str], list[str], list[str]]:
    """`images` or `video` of the sample, the (part, file) of each, their names, their contents' hashes, and what is
    wrong with the files.

    A file that cannot be read has the size of UNREAD, so that the rest of the line can be checked.
    """
    if "video" in document:
        names, kind, look = [document["video"]], "video", video_facts
    else:
        names = document.get("images") or ([document["image"]] if "image" in document else [])
        kind, look = "image" if "image" in document else "images", image_facts
    media, parts, contents, problems = [], [], [], []
    for index, name in enumerate(names):
        key = line.names.get(kind, f"images[{index}]" if kind == "images" else kind)
        facts, file = UNREAD | ({"duration": MAX_SECONDS} if kind == "video" else {}), Path(name)
        try:
            file = _find(name, key, line, reading)
            facts, content = _facts(Unpacked(reading.unpacked).said(name), key, file, look)
            contents.append(content)
        except (ValueError, OSError, RuntimeError) as error:  # pathlib raises RuntimeError for a circle of links
            problems.append(str(error))
        parts.append((f"{'video' if kind == 'video' else f'img{index}'}{suffix(file)}", file))
        media.append({"part": parts[-1][0], **facts})
    if kind == "video":
        given = {name: document[name] for name in OF_VIDEO if name in document and name != "time_unit"}
        return {"video": media[0] | given}, parts, names, contents, problems
    return {"images": media} if media else {}, parts, names, contents, problems


def _find(name: str, key: str, line: Line, reading: Reading) -> Path:
    """The file of that name below the folder. ValueError: it is elsewhere, not there, or too large."""
    try:
        name = file_name(name, Unpacked(reading.unpacked))
    except ValueError as error:
        raise ValueError(said_of(key, str(error))) from error
    folder, tried = reading.folder, [name, *line.tries.get(name, [])]
    if len(tried) > 1:
        tried = [path for path in tried if (folder / path).is_file()] or [name]
    file = folder / tried[0]
    roots = (folder, reading.unpacked)
    if ".." in file.parts or not any(file.is_relative_to(root) for root in roots):
        raise ValueError(f'{key} = "{name}" leads out of {folder}: name files below the folder --images')
    resolved = file.resolve()
    if not reading.follow_links and not any(resolved.is_relative_to(root) for root in roots):
        raise ValueError(f'{key} = "{name}" leads out of {folder} by a link: --follow-links allows that')
    if not resolved.is_file():
        raise ValueError(f'{key} = "{name}" is not in {folder}{_place_of(name, folder)}')
    if (size := resolved.stat().st_size) > MAX_MEDIA:
        raise ValueError(f'{key} = "{name}" has {size:,} bytes, more than {MAX_MEDIA:,}: cut it')
    return resolved


def _place_of(name: str, folder: Path) -> str:
    """What is there in the place of a file that is not: a folder, a link to nothing, or one of nearly this name."""
    path = folder / name
    if path.is_dir():
        return ": it is a folder"
    if path.is_symlink():
        return f": the link to {os.readlink(path)} leads to nothing"
    if (folder.parent / name).is_file():
        return f" but in {folder.parent}: --images {folder.parent}"
    for meant in (name.replace("\\", "/"), name.strip(), *(unicodedata.normalize(f, name) for f in ("NFC", "NFD"))):
        if meant != name and (folder / meant).is_file():
            return f": write {shown(meant)}"
    names = _names_in(path.parent)
    spelt = names.get(path.name.lower()) or next(
        (other for lower, other in names.items() if lower.rpartition(".")[0] == path.stem.lower()), None
    )
    return f": there is {spelt} beside it" if spelt else ""


@lru_cache(maxsize=16)
def _names_in(folder: Path) -> dict[str, str]:
    """Names of the files of a folder by their lower case."""
    try:
        return {entry.name.lower(): entry.name for entry in os.scandir(folder)}
    except OSError:
        return {}


def _facts(name: str, key: str, file: Path, look: Callable[[bytes], dict]) -> tuple[dict, str]:
    """What `look` finds in the file, and the SHA-256 of it. name: what the writer of the line calls it."""
    data = file.read_bytes()
    if not data:
        raise ValueError(f'{key} = "{name}" is empty')
    try:
        return look(data), hashlib.sha256(data).hexdigest()
    except ValueError as error:
        other = "video" if isinstance(error, IsVideo) else "image" if isinstance(error, IsPicture) else None
        reason = str(error).rstrip(".")
        raise ValueError(f'{key} = "{name}": {reason}' + (f': write "{other}" for it' if other else "")) from error


# -- tasks ------------------------------------------------------------------------------------------------------------


def _branches(document: dict, video: dict) -> tuple[list, set[int]]:
    """The branches of the sample: those of the line, its one conversation, or the task written into it; and which have
    points of one image, that were put into a group."""
    if "task" in document:
        names = set(task_keys(document["task"])) - set(_LineDocument.model_fields) | {"style"}
        branches = [{name: document[name] for name in document if name in names}]
    else:
        name = "messages" if "messages" in document else "branches"
        if not isinstance(document[name], list):
            raise ValueError(f"{name} = {shown(document[name])} is not a list")
        if name == "messages":
            return [document["messages"]], set()
        branches = list(document["branches"])
    pictures = 1 if "image" in document else len(document.get("images", []))
    grouped = set()
    for number, branch in enumerate(branches):
        if isinstance(branch, dict) and isinstance(branch.get("points"), list):
            branches[number], is_grouped = with_groups(branch, pictures)
            grouped |= {number} if is_grouped else set()
        elif _needs_rate(branch) and document.get("time_unit") == "frames" and video.get("fps"):
            branches[number] = branch | {"fps": _track_rate(branch["frames"], video["fps"])}
    return branches, grouped


def _needs_rate(branch) -> bool:
    return isinstance(branch, dict) and branch.get("task") == "tracking" and "fps" not in branch and "frames" in branch


def _track_rate(frames, video_fps: float) -> float:
    """About USUAL_FPS, at multiples of which the tracks have frames. frames: [[number, objects], ...]"""
    try:
        numbers = sorted({frame[0] for frame in frames})
        step = math.gcd(*(after - before for before, after in zip(numbers, numbers[1:])))
    except (TypeError, IndexError):
        return USUAL_FPS  # the schema says what is wrong with them
    if step <= 1:
        return min(USUAL_FPS, video_fps)
    rate = video_fps / step
    return round(rate / max(1, round(rate / USUAL_FPS)), 6)


def _check(example: Example, document: dict, line: Line, names: list[str], reading: Reading) -> list[str]:
    """Check the annotations and change them to what is stored, in place; returns what was left out of them.

    ValueMistake, or an ExceptionGroup of them: what is wrong.
    """
    if document.get("time_unit") == "frames":
        _use_seconds(example)
    if wrong := [*mistakes_in(example), *doubts(example, line.form in EXPORTS)]:
        raise ExceptionGroup("values that cannot be taught", wrong)
    media = example.images or ([example.video] if example.video else [])
    measured = [(medium.width, medium.height) for medium in media]
    for medium, name in zip(media, names):
        if size := line.sizes.get(name):
            medium.width, medium.height = _same_shape(name, size, (medium.width, medium.height))
    use_fractions(example, document.get("unit") or reading.unit)
    for medium, size in zip(media, measured):
        medium.width, medium.height = size
    moved = check_rates(example, nearest=True) if example.video else {}
    check_answers(example)
    return [reason for reason, number in moved.items() for _ in range(number)]


def _use_seconds(example: Example) -> None:
    fps = example.video.fps
    if not fps:
        raise ValueMistake(("time_unit",), "= frames needs a video with a constant rate: give seconds")
    for branch in example.branches:
        if isinstance(branch, Pointing):
            branch.points = [(number / fps, points) for number, points in branch.points]
        elif isinstance(branch, Tracking):
            branch.frames = [(number / fps, objects) for number, objects in branch.frames]


def _same_shape(name: str, annotated: tuple[int, int], measured: tuple[int, int]) -> tuple[int, int]:
    """The size that coordinates in pixels are of. ValueMistake: it is not the file's, and not a scaled copy's."""
    if min(annotated) <= 0:
        raise ValueMistake((), f'The annotations give "{name}" {annotated[0]} x {annotated[1]} pixels')
    scales = [a / m for a, m in zip(annotated, measured)]
    if max(scales) <= 1.02 * min(scales) or all(abs(a - m) <= 1 for a, m in zip(annotated, measured)):
        return annotated
    sizes = f"{annotated[0]} x {annotated[1]} pixels, and the file has {measured[0]} x {measured[1]}"
    turned = " (as displayed, after its EXIF rotation: turn the file, or annotate it as it is displayed)"
    swapped = abs(annotated[0] / annotated[1] - measured[1] / measured[0]) < 0.02 * annotated[0] / annotated[1]
    raise ValueMistake(
        (), f'The annotations are of a "{name}" of {sizes}{turned if swapped else ": it is another file"}'
    )


# -- all lines --------------------------------------------------------------------------------------------------------


def _try_row(row: Row, reading: Reading) -> Outcome:
    try:
        return read_row(row, reading)
    except LineMistakes as error:
        return Outcome(row.place, _form_of(row, reading), mistakes=error.sentences)
    except ValueError as error:
        return Outcome(row.place, _form_of(row, reading), mistakes=LineMistakes([str(error)]).sentences)


def _form_of(row: Row, reading: Reading) -> str | None:
    """As what a row that has mistakes was read; None: it is no record."""
    try:
        return row.form or reading.form or files.recognised(_record(row))
    except ValueError:
        return None


def read_files(
    annotations: list[Path], reading: Reading, columns: dict[str, str], workers: int
) -> Iterator[tuple[Path, Outcome]]:
    """What becomes of each row of the files, in their order. ValueError: a file is broken as a whole."""
    seen: dict[str, str] = {}
    number = 1
    with ProcessPoolExecutor(workers) as pool:
        for file in annotations:
            rows = list(files.rows(file, number, reading.form, columns, Unpacked(reading.unpacked)))
            for row in rows:
                row.file = file.name
            number = rows[-1].number + 1 if rows else number
            for outcome in pool.map(partial(_try_row, reading=reading), rows, chunksize=8):
                place = f"{file.name} {outcome.place}" if len(annotations) > 1 else outcome.place
                if outcome.sample and (twice := seen.setdefault(outcome.sample.key, place)) != place:
                    outcome.mistakes.append(f"id={outcome.sample.key} is that of {twice} too")
                    outcome.sample = None
                outcome.place = place
                if sys.stderr.isatty() and len(seen) % 100 == 0:
                    print(f"\r{len(seen):,} lines", end="", file=sys.stderr)
                yield file, outcome
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)


def samples(lines: list[OwnSample], repeat: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, parts by name) of all lines, `repeat` times under different keys."""
    for number in range(repeat):
        for line in lines:
            key = f"{line.key}_r{number}" if repeat > 1 else line.key
            yield key, {"json": line.sample, **{part: file.read_bytes() for part, file in line.files}}
