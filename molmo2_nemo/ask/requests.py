"""Questions in a file, a JSON object each: on lines of their own, or in one array."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from molmo2_nemo.ask.model import check_messages, check_texts
from molmo2_nemo.prepare.annotations import PLACEHOLDER
from molmo2_nemo.prepare.formats import conversations
from molmo2_nemo.prepare.formats.line import Unpacked

# What a batch writes to a question's object. Where the file has these keys, from an earlier batch, they are replaced.
WRITTEN = ("said", "cut", "error", "model")
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


def placed(messages: Sequence[dict], num_images: int, has_video: bool) -> list[dict]:
    """Messages without placeholders such as <image>, which tools/prepare.py takes out in the same way.

    ValueError, one sentence: there are more or fewer of them than files, or one that stands for nothing.
    """
    texts = [message["content"] for message in messages if message["role"] != "assistant"]
    if any(map(conversations.PLACEHOLDER.search, texts)):
        files = {"images": [str(number) for number in range(num_images)], "videos": ["0"] if has_video else []}
        line = conversations.read({"messages": messages, **files}, "messages", Unpacked(Path()))
        messages = line.document["messages"]
    for message in messages:
        if message["role"] != "assistant" and (token := PLACEHOLDER.search(message["content"])):
            raise ValueError(
                f"a text holds {token[0]}, which stands for nothing here: remove it, or if it is about such a tag, "
                f"write {token[0][0]} {token[0][1:]}"
            )
    check_texts(messages)
    return list(messages)


def local_file(name: str) -> Path:
    """ValueError: it is an address."""
    if "://" in name:
        raise ValueError(f"{name[:200]} is an address, and none is fetched: download the file and give its path")
    return Path(name)


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
    files, has_video = [folder / local_file(name) for name in names], named == ["video"]
    messages = placed(messages, 0 if has_video else len(files), has_video)
    return Request(messages, video=files[0]) if has_video else Request(messages, files)
