"""A user's own annotations, one JSON object a line (docs/own_data.md), checked against their pictures and videos."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from molmo2_nemo.data.schema import read_example
from molmo2_nemo.prepare.annotations import UNITS, check_answers, check_rates, use_fractions, without_nothing
from molmo2_nemo.prepare.media import MAX_MEDIA, image_facts, suffix, video_facts
from molmo2_nemo.prepare.webdataset import KEY

MAX_LINE = 16 * 2**20  # bytes
MAX_ID = 64  # characters; --repeat appends to it
MEDIA = ("image", "images", "video")
OF_VIDEO = ("clip", "annotation_fps", "subtitles")


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
    image: str = Field(None, min_length=1, description="names no file")
    images: list[Annotated[str, Field(min_length=1)]] = Field(None, description="is not a list of files")
    video: str = Field(None, min_length=1, description="names no file")
    unit: Literal[UNITS] = Field(None, description=f"is not one of {', '.join(UNITS)}")
    # The schema of samples checks these.
    clip: Any = None
    annotation_fps: Any = None
    subtitles: Any = None
    style: Any = None
    multi_turn: Any = None


@dataclass
class OwnSample:
    """A line that can be used, as it will be stored."""

    key: str
    sample: bytes  # JSON of a schema.Example
    files: list[tuple[str, Path]]  # (part, file)
    tasks: list[str]

    def size(self) -> int:
        """Bytes."""
        return len(self.sample) + sum(file.stat().st_size for _, file in self.files)


def read_line(text: bytes, number: int, folder: Path, unit: str) -> OwnSample:
    """ValueError, one sentence: what is wrong with the line."""
    if len(text) > MAX_LINE:
        raise ValueError(f"the line has more than {MAX_LINE:,} bytes")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    _refuse_mixed_media(record)
    try:
        line = _LineDocument.model_validate(record)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = problem["loc"][0]
        raise ValueError(f"{key}={record[key]!r} {_LineDocument.model_fields[key].description}") from None
    media, files = _media(record, folder)
    sample = media | {name: record[name] for name in ("style", "multi_turn") if name in record}
    sample["branches"] = _branches(record)
    if "task" in record:
        sample.pop("style", None)  # it is the task's, where it may be a list
    example = read_example(json.dumps(sample))
    use_fractions(example, line.unit or unit)
    if example.video:
        check_rates(example)
    check_answers(example)
    tasks = ["chat" if isinstance(branch, list) else branch.task for branch in example.branches]
    return OwnSample(line.id or f"{number:08d}", json.dumps(without_nothing(asdict(example))).encode(), files, tasks)


def _refuse_mixed_media(record: dict) -> None:
    named = [name for name in MEDIA if name in record]
    if len(named) > 1:
        raise ValueError(f"it has {' and '.join(named)}: one of them is enough")
    if "video" not in record and (stray := [name for name in OF_VIDEO if name in record]):
        raise ValueError(f"it has {stray[0]} and no video")


def _media(record: dict, folder: Path) -> tuple[dict, list[tuple[str, Path]]]:
    """`images` or `video` of the sample, and the (part, file) of each."""
    if not any(name in record for name in MEDIA):
        return {}, []
    if "video" in record:
        file, data = _read(folder, record["video"])
        part = f"video{suffix(file)}"
        given = {name: record[name] for name in OF_VIDEO if name in record}
        return {"video": {"part": part, **_facts(record["video"], data, video_facts), **given}}, [(part, file)]
    names = record["images"] if "images" in record else [record["image"]]
    images, files = [], []
    for index, name in enumerate(names):
        file, data = _read(folder, name)
        files.append((f"img{index}{suffix(file)}", file))
        images.append({"part": files[-1][0], **_facts(name, data, image_facts)})
    return {"images": images}, files


def _branches(record: dict) -> list:
    """The branches of the sample: those of the line, its one conversation, or the task written into it."""
    keys = record.keys() - set(_LineDocument.model_fields)
    if "task" in record:
        task = {name: record[name] for name in record if name in keys or name == "style"}
        return [_with_groups(task, record)]
    for name in ("branches", "messages"):
        if name in record and len(keys) > 1:
            raise ValueError(f"it has {name} and the key {min(keys - {name})}, which goes with no {name}")
    if "messages" in record:
        return [record["messages"]]
    if not isinstance(record.get("branches"), list):
        raise ValueError("it has no task, no messages and no list of branches")
    return [_with_groups(branch, record) for branch in record["branches"]]


def _with_groups(branch, record: dict):
    """The branch with its points in groups: a plain list of [x, y] means the only image."""
    points = branch.get("points") if isinstance(branch, dict) else None
    if not isinstance(points, list) or not points or not all(map(_is_pair, points)):
        return branch
    if "image" not in record and len(record.get("images", [])) != 1:
        raise ValueError(
            "points that are [[x, y], ...] are for one image: write [[image or seconds, [[x, y], ...]], ...]"
        )
    return branch | {"points": [[1, points]]}


def _is_pair(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)


def _read(folder: Path, name: str) -> tuple[Path, bytes]:
    """A file of the folder. ValueError: it is elsewhere, not there, or too large."""
    file = (folder / name).resolve()
    if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_relative_to(folder):
        raise ValueError(f"{name} leads out of {folder}")
    if not file.is_file():
        raise ValueError(f"{name} is not in {folder}")
    if file.stat().st_size > MAX_MEDIA:
        raise ValueError(f"{name} has {file.stat().st_size:,} bytes, more than {MAX_MEDIA:,}: cut it")
    return file, file.read_bytes()


def _facts(name: str, data: bytes, look: Callable[[bytes], dict]) -> dict:
    try:
        return look(data)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _numbered(file: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that are not blank. Of a line that is too long only the beginning is kept."""
    with file.open("rb") as lines:
        for number in count(1):
            line = rest = lines.readline(MAX_LINE + 1)
            if not line:
                return
            while rest and not rest.endswith(b"\n"):
                rest = lines.readline(MAX_LINE)
            if line.strip():
                yield number, line


def _try_line(numbered: tuple[int, bytes], folder: Path, unit: str) -> OwnSample | str:
    number, text = numbered
    try:
        return read_line(text, number, folder, unit)
    except (ValueError, OSError, RuntimeError) as error:  # pathlib raises RuntimeError for a circle of links
        return str(error).rstrip(".")


def read_lines(file: Path, folder: Path, unit: str, workers: int) -> tuple[list[OwnSample], list[tuple[int, str]]]:
    """Usable lines, and (number, reason) of the others."""
    lines, errors, seen = [], [], {}
    with ProcessPoolExecutor(workers) as pool:
        numbered = list(_numbered(file))
        results = pool.map(partial(_try_line, folder=folder, unit=unit), numbered, chunksize=8)
        for (number, _), result in zip(numbered, results):
            if isinstance(result, OwnSample) and result.key in seen:
                result = f"id={result.key} is that of line {seen[result.key]} too"
            if isinstance(result, OwnSample):
                seen[result.key] = number
                lines.append(result)
            else:
                errors.append((number, result))
            if sys.stderr.isatty() and number % 100 == 0:
                print(f"\r{number:,} lines", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    return lines, errors


def held_out_keys(lines: list[OwnSample], share: float) -> set[str]:
    """Keys of the samples for validation: those with the lowest hashes, so that most of them stay when the file grows.

    Samples with the same first picture or video are held out together or not at all.
    """
    groups = {}
    for line in lines:
        name = str(line.files[0][1]) if line.files else line.key
        groups.setdefault(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest(), []).append(line.key)
    most, keys = min(math.ceil(share * len(lines)), len(lines) - 1), set()
    for _, group in sorted(groups.items()):
        if len(keys) + len(group) <= most:
            keys.update(group)
    return keys


def samples(lines: list[OwnSample], repeat: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, parts by name) of all lines, `repeat` times under different keys."""
    for number in range(repeat):
        for line in lines:
            key = f"{line.key}_r{number}" if repeat > 1 else line.key
            yield key, {"json": line.sample, **{part: file.read_bytes() for part, file in line.files}}
