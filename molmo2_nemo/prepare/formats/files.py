"""What is in a file of annotations: JSON lines, a JSON array, a table, shards, or the export of a tool."""

import codecs
import json
import re
import tarfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from molmo2_nemo.catalogue.raw import MAX_WHOLE, UnreadableFile, json_items
from molmo2_nemo.prepare.formats import coco, conversations, cvat, label_studio, shards, table
from molmo2_nemo.prepare.formats.line import FORMATS, Line, Refused, Row, Unpacked
from molmo2_nemo.prepare.mistakes import LineMistakes

MAX_LINE = 16 * 2**20  # bytes
CONVERSATIONS = ("conversations", "conversation")
BINARY = (".parquet", ".arrow", ".tar", ".tgz", ".gz")
_NO_BLANK = re.compile(r"\S")
WRITE_UTF8 = "it is not UTF-8 text: save the file as UTF-8"


def rows(file: Path, number: int, form: str | None, columns: dict[str, str], unpacked: Unpacked) -> Iterator[Row]:
    """The records of a file, `number` being that of the first. form: of --format; None: whatever it is.

    ValueError: it is empty, not in that format, or broken as a whole. A record that is broken is a Row with a Refused.
    """
    suffix = file.suffix.lower()
    if not file.stat().st_size:
        raise ValueError(f"{file} is empty")
    if columns and suffix not in table.SUFFIXES:
        raise ValueError(f"--columns is for tables ({', '.join(table.SUFFIXES)}), and {file} is none")
    start = _start(file)
    if suffix not in (*BINARY, ".xml") and (
        start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start
    ):
        raise ValueError(f"{file} is not UTF-8 text (UTF-16, it seems): save it as UTF-8")
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
                raise ValueError(f"{file} is not JSON: {_said(error)}") from error
            return _objects(file, number)  # one a line, as is common
        if form == "coco" or (form is None and coco.is_coco(document)):
            return coco.rows(file, number)
        return iter([Row("the object", number, document)])
    return _objects(file, number)


def recognised(record: dict) -> str:
    """The format of a record, by its keys."""
    if isinstance(record, Refused):
        return record.form
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
    """A record as a line of ours. form: None: recognise it. ValueError: it cannot be understood; LineMistakes: it was
    refused by its reader."""
    if isinstance(record, Refused):
        raise LineMistakes(record.sentences)
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


def _said(error: Exception) -> str:
    return WRITE_UTF8 if isinstance(error, UnicodeDecodeError) else str(error)


def _items(file: Path, number: int) -> Iterator[Row]:
    try:
        for k, item in enumerate(json_items(file)):
            yield Row(f"item {k + 1}", number + k, item)
    except ValueError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise ValueError(f"{file} cannot be read: {WRITE_UTF8}") from error
        raise UnreadableFile(file, error) from error


def _objects(file: Path, number: int) -> Iterator[Row]:
    """JSON objects, one a line; or if the first line is none, one after another, however they are broken into lines.

    ValueError: they are broken into lines, and cannot be told apart.
    """
    with file.open("rb") as lines:
        first = next((line.strip() for line in lines if line.strip()), b"").removeprefix(codecs.BOM_UTF8)
    if not first.startswith(b"{") or _is_json(first) or file.stat().st_size > MAX_WHOLE:
        return _lines(file, number)
    try:
        return iter(_stream(file.read_bytes().decode("utf-8-sig"), number))
    except (ValueError, RecursionError) as error:
        if first != b"{":  # that line is broken, and others may be whole
            return _lines(file, number)
        raise ValueError(f"{file} has objects that are broken into lines: write one object a line ({error})") from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _stream(text: str, number: int) -> list[Row]:
    """The values of a text of JSON, one after another. ValueError: there is something else."""
    rows, decoder, end, line = [], json.JSONDecoder(), 0, 1
    while (start := _NO_BLANK.search(text, end)) is not None:
        line += text.count("\n", end, start.start())
        value, end = decoder.raw_decode(text, start.start())
        rows.append(Row(f"object {len(rows) + 1} (line {line})", number + len(rows), value))
        line += text.count("\n", start.start(), end)
    return rows


def _lines(file: Path, number: int) -> Iterator[Row]:
    """The lines that are not blank. Of a line that is too long only the beginning is kept."""
    with file.open("rb") as lines:
        for k in count():
            line = rest = lines.readline(MAX_LINE + 1)
            if not line:
                return
            while rest and not rest.endswith(b"\n"):
                rest = lines.readline(MAX_LINE)
            if not line.strip():
                continue
            content = line.removeprefix(codecs.BOM_UTF8) if not k else line
            yield Row(f"line {k + 1}", number + k, content if _is_utf8(line) else Refused([WRITE_UTF8]))


def _is_utf8(line: bytes) -> bool:
    """A line that was cut may end within a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(line)
    except UnicodeDecodeError:
        return False
    return True
