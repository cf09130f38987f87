"""What is in a file of annotations: JSON lines, a JSON array, a table, shards, or the export of a tool."""

import codecs
import json
import tarfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from molmo2_nemo.catalogue.raw import UnreadableFile, json_items
from molmo2_nemo.prepare.formats import coco, conversations, cvat, label_studio, shards, table
from molmo2_nemo.prepare.formats.line import FORMATS, Line, Row, Unpacked

MAX_LINE = 16 * 2**20  # bytes
CONVERSATIONS = ("conversations", "conversation")


def rows(file: Path, number: int, form: str | None, columns: dict[str, str], unpacked: Unpacked) -> Iterator[Row]:
    """The records of a file, `number` being that of the first. form: of --format; None: whatever it is.

    ValueError: it is not in that format, or broken as a whole.
    """
    suffix = file.suffix.lower()
    if columns and suffix not in table.SUFFIXES:
        raise ValueError(f"--columns is for tables ({', '.join(table.SUFFIXES)}), and {file} is none")
    start = _start(file)
    is_whole = {
        "table": suffix in table.SUFFIXES,
        "cvat": suffix == ".xml" or start.startswith(b"<"),
        "coco": suffix == ".json" and start.startswith(b"{"),
    }
    if not is_whole.get(form, True):
        raise ValueError(f"--format {form}: {file} is not {FORMATS[form]}")
    if is_whole["table"]:
        return table.rows(file, number, columns, unpacked)
    if is_whole["cvat"]:
        return cvat.rows(file, number)
    if suffix in (".tar", ".tgz") or (suffix == ".gz" and tarfile.is_tarfile(file)):
        return shards.rows(file, number, unpacked)
    if start.startswith(b"["):
        return _items(file, number)
    if is_whole["coco"]:
        try:
            document = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            if form == "coco":
                raise ValueError(f"{file} is not JSON: {error}") from error
            return _lines(file, number)  # lines, as is common
        if form == "coco" or (form is None and coco.is_coco(document)):
            return coco.rows(file, number)
        return iter([Row("the object", number, document)])
    return _lines(file, number)


def recognised(record: dict) -> str:
    """The format of a record, by its keys."""
    if any(key in record for key in CONVERSATIONS):
        return "conversations"
    if isinstance(record.get("messages"), list):
        return "messages" if _is_others(record) else "own"
    if "task" in record or "branches" in record:
        return "own"
    if {"instruction", "output"} <= record.keys() or {"query", "response"} <= record.keys():
        return "instructions"
    return "label_studio" if label_studio.is_task(record) else "own"


def to_line(record: dict, form: str | None, unpacked: Unpacked) -> Line:
    """A record as a line of ours. form: None: recognise it. ValueError: it cannot be understood."""
    form = form or recognised(record)
    try:
        if form in ("conversations", "messages", "instructions"):
            return conversations.read(record, form, unpacked)
        if form == "label_studio":
            if not label_studio.is_task(record):
                raise ValueError("it has no data with annotations")
            return label_studio.read(record)
    except (KeyError, StopIteration, TypeError, AttributeError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else f"{error}" or "it lacks its main key"
        raise ValueError(f"it is not in the format {form} ({FORMATS[form]}): {reason}") from error
    return Line(record, form)


def _is_others(record: dict) -> bool:
    """Whether messages are those of other trainers: with placeholders, typed content, or keys and roles of theirs."""
    if record.keys() & {"videos", "system", *conversations.REFUSED}:
        return True
    turns = record["messages"]
    if any(not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant") for turn in turns):
        return True
    contents = [turn.get("content") for turn in turns]
    return any(
        isinstance(content, list) or (isinstance(content, str) and conversations.PLACEHOLDER.search(content))
        for content in contents
    )


def _start(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()[:64]


def _items(file: Path, number: int) -> Iterator[Row]:
    try:
        for k, item in enumerate(json_items(file)):
            yield Row(f"item {k + 1}", number + k, item)
    except ValueError as error:
        raise UnreadableFile(file, error) from error


def _lines(file: Path, number: int) -> Iterator[Row]:
    """The lines that are not blank. Of a line that is too long only the beginning is kept."""
    with file.open("rb") as lines:
        for k in count():
            line = rest = lines.readline(MAX_LINE + 1)
            if not line:
                return
            while rest and not rest.endswith(b"\n"):
                rest = lines.readline(MAX_LINE)
            if line.strip():
                yield Row(f"line {k + 1}", number + k, line.removeprefix(codecs.BOM_UTF8) if not k else line)
