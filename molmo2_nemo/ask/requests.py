"""Questions in a file, a JSON object each: on lines of their own, or in one array."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from molmo2_nemo.ask.model import check_messages

MEDIA = ("image", "images", "video")


@dataclass
class Request:
    """A question with what it is about."""

    messages: list[dict]  # as of model.check_messages
    images: list[Path] = field(default_factory=list)
    video: Path | None = None


def conversation(question: str, system: str | None = None) -> list[dict]:
    """ValueError: a text is empty."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return check_messages([*before, {"role": "user", "content": question}])


def read_records(file: Path) -> list[dict]:
    """The objects of a file of questions, as they are. ValueError, one sentence: it is no such file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise ValueError(f"{file} is empty: write one JSON object a line, with a question")
    if text.lstrip().startswith("["):
        records = _parsed(text, str(file))
        places = [f"{file}, entry {number}" for number in range(1, len(records) + 1)]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        places = [f"{file}, line {number}" for number, _ in lines]
        records = [_parsed(line, place) for place, (_, line) in zip(places, lines)]
    for place, record in zip(places, records):
        if not isinstance(record, dict):
            raise ValueError(f"{place}: it is not a JSON object")
    return records


def _parsed(text: str, place: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: it is not JSON ({error})") from error


def read_request(record: dict, folder: Path, system: str | None = None) -> Request:
    """The question of a record, whose files are relative to `folder`. ValueError, one sentence: what is wrong with it.

    A record has `question`, with `system` if it likes, or `messages`, and `image`, `images`, `video` or none of these.
    Its other keys are its own. system: of records without one.
    """
    if ("question" in record) == ("messages" in record):
        raise ValueError("it needs a question, or messages, and not both")
    if "messages" in record:
        messages = check_messages(record["messages"])
        if "system" in record:
            raise ValueError("it has messages and system: begin messages with one of the role system")
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    else:
        given = record.get("system", system)
        if not isinstance(record["question"], str) or not isinstance(given, str | None):
            raise ValueError("question and system are texts")
        messages = conversation(record["question"], given)
    named = [name for name in MEDIA if name in record]
    if len(named) > 1:
        raise ValueError(f"it has {' and '.join(named)}: one of them is enough")
    names = record.get("images", [record[named[0]]] if named else [])
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{named[0]} names no file, or is no list of files")
    files = [folder / name for name in names]
    return Request(messages, video=files[0]) if named == ["video"] else Request(messages, files)
