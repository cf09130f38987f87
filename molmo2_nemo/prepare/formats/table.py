"""Tables, CSV or parquet: a column for each key of a line, or named on the command line, `--columns label=class x=px`.

Rows with `x` and `y` are points: those of one picture become one sample, and a row without numbers says that there is
no such thing. Other rows are samples of their own: `text`, `question` and `answer`, or any record that is recognised.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from molmo2_nemo.catalogue.raw import read_rows
from molmo2_nemo.prepare.formats.line import Row, Unpacked

TEXT_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
POINT_KEYS = {"x", "y", "label"}
# What a value of a sample is called in a row.
NAMES = {"answers[0]": "answer"}
# Keys of a sample that a column may have.
KEYS = ("image", "video", "label", "x", "y", "unit", "text", "question", "answer", "answers", "style", "id")


def rows(file: Path, number: int, columns: dict[str, str], unpacked: Unpacked) -> Iterator[Row]:
    """columns: key of ours -> the table's. ValueError: the table lacks one, or none says what is to be learnt."""
    records = _records(file, columns, unpacked)
    first = next(records, None)
    if first is None:
        return
    names = first[1].keys()
    everything = _chain(first, records)
    if {"x", "y"} <= names:
        if missing := (POINT_KEYS | {"image"}) - names:
            raise ValueError(_advice(file, names, min(missing)))
        yield from _points(everything, number)
        return
    is_sample = names & {"task", "messages", "conversations", "conversation", "branches", "instruction", "query"}
    if not is_sample and not ("text" in names or {"question", "answer"} <= names or {"question", "answers"} <= names):
        raise ValueError(_advice(file, names, "text, question and answer, or x and y"))
    for k, (place, record) in enumerate(everything):
        yield Row(place, number + k, record if is_sample else _sample(record), None if is_sample else "table")


def _advice(file: Path, names: Iterable[str], missing: str) -> str:
    return (
        f"{file} has the columns {', '.join(names)}, and none is called {missing}: say which they are, for example "
        "--columns image=file label=class x=px y=py"
    )


def _chain(first: tuple, others: Iterator[tuple]) -> Iterator[tuple]:
    yield first
    yield from others


def _records(file: Path, columns: dict[str, str], unpacked: Unpacked) -> Iterator[tuple[str, dict]]:
    """(place, record) of each row, without empty cells, columns renamed and files inside of cells unpacked."""
    if file.suffix.lower() in TEXT_SUFFIXES:
        numbered = _text_rows(file)
    else:
        numbered = ((f"row {k}", row) for k, row in enumerate(read_rows(file), 1))
    ours = {theirs: key for key, theirs in columns.items()}
    for place, row in numbered:
        if missing := [theirs for theirs in ours if theirs not in row]:
            raise ValueError(f"{file} has no column {missing[0]} (--columns), but {', '.join(map(str, row))}")
        renamed = {ours.get(key, key): value for key, value in row.items() if key in ours or key not in columns}
        yield place, {key: _unpack(value, unpacked) for key, value in renamed.items()}


def _text_rows(file: Path) -> Iterator[tuple[str, dict]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            header = lines.readline()
            # The commonest of the delimiters that the header has; Excel writes semicolons in many countries.
            delimiter = max("\t;,", key=header.count)
            lines.seek(0)
            reader = csv.DictReader(lines, delimiter=delimiter)
            for row in reader:
                if None in row:
                    raise ValueError(f"{file} line {reader.line_num} has more cells than the first line")
                yield f"line {reader.line_num}", {key: value for key, value in row.items() if value is not None}
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{file} is no table of text: {error}") from error


def _unpack(value, unpacked: Unpacked):
    """A cell with the bytes of files (Hugging Face `datasets`: {"bytes", "path"}) replaced by their paths."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return unpacked.keep(value["bytes"], value.get("path") or _suffix(value["bytes"]))
    if isinstance(value, bytes):
        return unpacked.keep(value, _suffix(value))
    if isinstance(value, list):
        return [_unpack(item, unpacked) for item in value]
    if isinstance(value, dict):
        return {key: _unpack(item, unpacked) for key, item in value.items() if item is not None}
    return value


def _suffix(data: bytes) -> str:
    """Of a picture without a name."""
    magic = ((b"\xff\xd8\xff", "x.jpg"), (b"\x89PNG", "x.png"), (b"GIF8", "x.gif"), (b"RIFF", "x.webp"))
    return next((name for start, name in magic if data.startswith(start)), "x.bin")


def _points(records: Iterable[tuple[str, dict]], number: int) -> Iterator[Row]:
    """A row for each picture, at the place of its first."""
    pictures: dict[str, tuple[str, dict]] = {}
    for place, record in records:
        image = record.get("image") or ""
        _, document = pictures.setdefault(image, (place, {"image": image, "branches": {}}))
        for key in ("unit", "style"):
            if record.get(key) and document.setdefault(key, record[key]) != record[key]:
                raise ValueError(f'{place}: {key}="{record[key]}" differs from an earlier row of "{image}"')
        points = document["branches"].setdefault(str(record.get("label") or ""), [])
        x, y = record.get("x"), record.get("y")
        if x not in (None, "") or y not in (None, ""):
            points.append([_number(x, f"{place}: x"), _number(y, f"{place}: y")])
    for k, (place, document) in enumerate(pictures.values()):
        branches = [{"task": "pointing", "label": label, "points": p} for label, p in document["branches"].items()]
        yield Row(place, number + k, document | {"branches": branches}, "table")


def _number(cell, name: str) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} = {json.dumps(cell)} is not a number, with a point before its decimals") from error


def _sample(record: dict) -> dict:
    """A row of texts as a line with a task; what is neither of a line nor of a task is left out."""
    document = {key: record[key] for key in ("image", "video", "style") if record.get(key)}
    if "question" in record:
        answers = record.get("answers", record.get("answer"))
        answers = answers if isinstance(answers, list) else ["" if answers is None else str(answers)]
        return document | {"task": "question", "question": record["question"], "answers": answers}
    return document | {"task": "caption", "text": record.get("text") or ""}
