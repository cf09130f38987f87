"""Turn your own annotations, one JSON object a line, into shards to train on. The format: docs/own_data.md

    python tools/prepare.py my_annotations.jsonl --images DIR --out SHARDS
    python recipes/stage2_sft.py data.blend=SHARDS/blend.yaml ...

Or the public data sets of a stage, once tools/download.py has fetched them (options: --stage 1 --help):

    python tools/prepare.py --stage 1 --shards 512 --out $DATA_ROOT

Every line is read, every picture decoded and every video opened before anything is written. Lines with a mistake are
listed by number, and nothing is written unless --skip-bad says to go on without them.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path

import yaml

from molmo2_nemo.config.schema import DataConfig
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.files import published
from molmo2_nemo.prepare import stage
from molmo2_nemo.prepare.media import (
    MAX_MEDIA,
    UNITS,
    check_answers,
    check_rates,
    image_facts,
    suffix,
    use_fractions,
    video_facts,
    without_nothing,
)
from molmo2_nemo.prepare.shards import KEY, SHARD_SAMPLES, write_shards

MAX_LINE = 16 * 2**20  # bytes
MAX_ID = 64  # characters; --repeat appends to it
SHOWN_ERRORS = 20
MEDIA = ("image", "images", "video")
OF_VIDEO = ("clip", "annotation_fps", "subtitles")
OF_LINE = ("id", *MEDIA, *OF_VIDEO, "unit", "style", "multi_turn")


@dataclass
class Line:
    """A line that can be used."""

    key: str
    sample: bytes  # JSON, schema.Example
    files: list[tuple[str, Path]]  # (part, file)
    tasks: list[str]


def read_line(text: bytes, number: int, folder: Path, unit: str) -> Line:
    """ValueError, one sentence: what is wrong with the line."""
    if len(text) > MAX_LINE:
        raise ValueError(f"the line has more than {MAX_LINE:,} bytes")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    key = record.get("id", f"{number:08d}")
    if type(key) not in (str, int) or len(str(key)) > MAX_ID or not KEY.fullmatch(str(key)):
        raise ValueError(f"id={key!r} is not up to {MAX_ID} letters, digits, - and _")
    line_unit = record.get("unit", unit)
    if line_unit not in UNITS:
        raise ValueError(f"unit={line_unit!r} is not one of {', '.join(UNITS)}")
    media, files = _media(record, folder)
    sample = media | {name: record[name] for name in ("style", "multi_turn") if name in record}
    sample["branches"] = _branches(record)
    if "task" in record:
        sample.pop("style", None)  # it is the task's, where it may be a list
    example = read_example(json.dumps(sample))
    use_fractions(example, line_unit)
    if example.video:
        check_rates(example)
    check_answers(example)
    tasks = ["chat" if isinstance(branch, list) else branch.task for branch in example.branches]
    return Line(str(key), json.dumps(without_nothing(asdict(example))).encode(), files, tasks)


def _media(record: dict, folder: Path) -> tuple[dict, list[tuple[str, Path]]]:
    """`images` or `video` of the sample, and the (part, file) of each."""
    named = [name for name in MEDIA if name in record]
    if len(named) > 1:
        raise ValueError(f"it has {' and '.join(named)}: one of them is enough")
    if "video" not in record and (stray := [name for name in OF_VIDEO if name in record]):
        raise ValueError(f"it has {stray[0]} and no video")
    if not named:
        return {}, []
    if "video" in record:
        file, data = _read(folder, record["video"])
        part = f"video{suffix(file)}"
        given = {name: record[name] for name in OF_VIDEO if name in record}
        return {"video": {"part": part, **_facts(record["video"], data, video_facts), **given}}, [(part, file)]
    names = record["images"] if "images" in record else [record["image"]]
    if not isinstance(names, list):
        raise ValueError("images is not a list")
    images, files = [], []
    for index, name in enumerate(names):
        file, data = _read(folder, name)
        files.append((f"img{index}{suffix(file)}", file))
        images.append({"part": files[-1][0], **_facts(name, data, image_facts)})
    return {"images": images}, files


def _branches(record: dict) -> list:
    """The branches of the sample: those of the line, its one conversation, or the task written into it."""
    keys = record.keys() - set(OF_LINE)
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
    """A pointing task's plain list of [x, y] is of the only image."""
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


def _read(folder: Path, name) -> tuple[Path, bytes]:
    """A file of the folder. ValueError: it is elsewhere, not there, or too large."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} names no file")
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
    """(number from 1, line) of the lines that are not blank; the end of one that is too long is not kept."""
    with file.open("rb") as lines:
        for number in count(1):
            line = rest = lines.readline(MAX_LINE + 1)
            if not line:
                return
            while rest and not rest.endswith(b"\n"):
                rest = lines.readline(MAX_LINE)
            if line.strip():
                yield number, line


def _try_line(numbered: tuple[int, bytes], folder: Path, unit: str) -> Line | str:
    number, text = numbered
    try:
        return read_line(text, number, folder, unit)
    except (ValueError, OSError, RuntimeError) as error:  # pathlib calls a circle of links a RuntimeError
        return str(error).rstrip(".")


def read_lines(file: Path, folder: Path, unit: str, workers: int) -> tuple[list[Line], list[tuple[int, str]]]:
    """Usable lines, and (number, reason) of the others."""
    lines, errors, seen = [], [], {}
    with ProcessPoolExecutor(workers) as pool:
        numbered = list(_numbered(file))
        results = pool.map(partial(_try_line, folder=folder, unit=unit), numbered, chunksize=8)
        for (number, _), result in zip(numbered, results):
            if isinstance(result, Line) and result.key in seen:
                result = f"id={result.key} is that of line {seen[result.key]} too"
            if isinstance(result, Line):
                seen[result.key] = number
                lines.append(result)
            else:
                errors.append((number, result))
            if sys.stderr.isatty() and number % 100 == 0:
                print(f"\r{number:,} lines", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    return lines, errors


def held_out_keys(lines: list[Line], share: float) -> set[str]:
    """Keys of the samples for validation: those with the lowest hashes, so that a file that grows keeps most of them.

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


def samples(lines: list[Line], repeat: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(repeat):
        for line in lines:
            key = f"{line.key}_r{number}" if repeat > 1 else line.key
            yield key, {"json": line.sample, **{part: file.read_bytes() for part, file in line.files}}


def main() -> None:
    if any(argument.split("=")[0] == "--stage" for argument in sys.argv[1:]):
        return stage.main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="JSON lines, see docs/own_data.md")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images and videos")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="folder to make")
    parser.add_argument("--name", help="of the source in the blend (default: the folder's)")
    parser.add_argument("--unit", choices=UNITS, default="fraction", help="of coordinates, if a line does not say")
    parser.add_argument("--val-share", type=float, default=0.02, help="held out for validation (default 0.02)")
    parser.add_argument("--repeat", type=int, default=1, help="write training samples so often, for very small sets")
    parser.add_argument("--shard-size", type=int, default=SHARD_SAMPLES, help=f"samples (default {SHARD_SAMPLES})")
    parser.add_argument("--skip-bad", action="store_true", help="go on without the lines that have a mistake")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that check media")
    arguments = parser.parse_args()
    try:
        prepare(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit("error: a process that checks media was killed: if memory was short, use fewer --workers")


def prepare(arguments: argparse.Namespace) -> None:
    if not arguments.images.is_dir():
        raise ValueError(f"--images {arguments.images} is no folder")
    if not 0 <= arguments.val_share < 1:
        raise ValueError(f"--val-share {arguments.val_share} is not from 0 to below 1")
    for name in ("repeat", "shard_size", "workers"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is below 1")
    with published(arguments.out) as folder:
        images = arguments.images.resolve()
        lines, errors = read_lines(arguments.annotations, images, arguments.unit, arguments.workers)
        for number, reason in errors[:SHOWN_ERRORS]:
            print(f"line {number}: {reason}", file=sys.stderr)
        if len(errors) > SHOWN_ERRORS:
            print(f"... and {len(errors) - SHOWN_ERRORS} more", file=sys.stderr)
        total = len(lines) + len(errors)
        if errors and not arguments.skip_bad:
            raise ValueError(f"{len(errors)} of {total} lines cannot be used (--skip-bad leaves them out)")
        if not lines:
            raise ValueError(f"{arguments.annotations} has {total} lines and none to train on")
        held_out = held_out_keys(lines, arguments.val_share)
        splits = {"train": samples([line for line in lines if line.key not in held_out], arguments.repeat)}
        if held_out:
            splits["val"] = samples([line for line in lines if line.key in held_out], 1)
        counts = write_shards(folder, splits, arguments.shard_size)
        name, path = arguments.name or arguments.out.resolve().name, str(arguments.out.resolve())
        blend = {"weighting": "sqrt", "sources": {name: {"path": path}}}
        (folder / "blend.yaml").write_text(yaml.safe_dump(blend, sort_keys=False))
    report(arguments, lines, len(errors), counts)


def report(arguments: argparse.Namespace, lines: list[Line], left_out: int, counts: dict[str, int]) -> None:
    """Print what was written, and what to do with it."""
    media = Counter("videos" if part.startswith("video") else "images" for line in lines for part, _ in line.files)
    tasks = Counter(task for line in lines for task in line.tasks)
    repeated = f" ({counts['train'] // arguments.repeat:,} x {arguments.repeat})" if arguments.repeat > 1 else ""
    rows = {
        "training samples": f"{counts['train']:,}{repeated}",
        "held-out samples": f"{counts.get('val', 0):,}",
        "images, videos": f"{media['images']:,}, {media['videos']:,}",
        "branches": ", ".join(f"{number:,} {task}" for task, number in tasks.most_common()),
        "bytes of shards": f"{sum(file.stat().st_size for file in arguments.out.glob('*.tar')):,}",
    }
    if left_out:
        rows["left out"] = f"{left_out:,} lines with a mistake"
    print(f"{arguments.out}")
    for name, value in rows.items():
        print(f"  {name:<18}{value}")
    limit = DataConfig.max_images
    many = [len(line.files) for line in lines if len(line.files) > limit]
    if many:
        print(f"{len(many):,} samples have more than {limit} images and train only with data.max_images={max(many)}")
    blend = shlex.quote(f"data.blend={arguments.out / 'blend.yaml'}")
    print("\nLook at them, then train on them:")
    print(f"  python tools/inspect_data.py --config-name stage2 {blend} --samples 20 --html runs/inspect")
    print(f"  python recipes/stage2_sft.py {blend} train.init_from=CHECKPOINT")


if __name__ == "__main__":
    main()
