"""What readers of formats give: rows of a file, and each as a line of docs/own_data.md."""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

# Names of the formats of --format, and what each is.
FORMATS = {
    "own": "our own form (docs/own_data.md)",
    "conversations": "conversations of LLaVA or ShareGPT",
    "messages": "messages with <image> or typed content",
    "instructions": "instruction and output, or query and response",
    "label_studio": "tasks of Label Studio",
    "coco": "a file of COCO: boxes, keypoints or captions",
    "cvat": "an export of CVAT",
    "table": "a table, CSV or parquet",
}
_SUFFIXES = re.compile(r"\.[A-Za-z0-9]{1,6}")
NAMELESS = "file without a name"
_ODD = re.compile(r"[^\w .()+-]")  # in names of files, which others may have written into a file of theirs
_LONGEST = 80  # bytes of such a name, well below what file systems allow


class Refused(dict):
    """In the place of a record: what its reader has found wrong with it. form: as what it was read, if known."""

    def __init__(self, sentences: Iterable[str], form: str = ""):
        super().__init__()
        self.sentences, self.form = list(dict.fromkeys(sentences)), form


@dataclass
class Row:
    """A record of a file. `place` is where its writer finds it, as "line 3"; `content` the text of a JSON line, the
    record itself, or a Refused; `form` its format if the whole file has one."""

    place: str
    number: int  # from 1, over all files
    content: bytes | dict | Any
    form: str | None = None
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # as in Line
    notes: list[str] = field(default_factory=list)  # what is left out of it, and why
    file: str = ""  # its name


@dataclass
class Line:
    """A record as a line of docs/own_data.md."""

    document: dict
    form: str
    names: dict[str, str] = field(default_factory=dict)  # key of ours -> what the record calls it
    # Width and height in pixels of files as the annotations have them; coordinates in pixels are of these.
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    tries: dict[str, list[str]] = field(default_factory=dict)  # name of a file -> other names that it may have
    notes: list[str] = field(default_factory=list)


class Unpacked:
    """A folder for files that are inside of other files. The name of each is the hash of its content, and that of the
    folder it lies in what its writer calls it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def keep(self, data: bytes, name: str) -> str:
        """Write a file and return its path. name: the file's own, or words for it with a suffix."""
        name = _ODD.sub("_", re.split(r"[/\\]", name)[-1]).lstrip(".")
        suffix = Path(name).suffix
        suffix = suffix.lower() if _SUFFIXES.fullmatch(suffix) else ".bin"
        folder = self.folder / (name.encode()[-_LONGEST:].decode(errors="ignore") or "file")
        file = folder / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{file.name}.{os.getpid()}")
            partial.write_bytes(data)
            partial.replace(file)
        return str(file)

    def said(self, name: str) -> str:
        """A file's path as the writer of its record calls it: one of this folder by its own name, data: cut short."""
        if name.startswith("data:"):
            return f"{name.partition(',')[0][:40]},..."
        path = Path(name)
        return path.parent.name if path.is_relative_to(self.folder) else name


def file_name(value, unpacked: Unpacked) -> str:
    """The path of a picture or video that is given as a path, as file://, as data: (base64), or as an object with one
    of these or with bytes, as Hugging Face `datasets` has them. ValueError: it is none, or an address."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return unpacked.keep(value["bytes"], value.get("path") or NAMELESS)
        given = [value[key] for key in ("path", "url", "image", "video", "base64") if value.get(key)]
        if len(given) != 1:
            raise ValueError(f"has the keys {', '.join(value)}, not one of path, url and bytes")
        return file_name(f"data:;base64,{given[0]}" if value.get("base64") else given[0], unpacked)
    if not isinstance(value, str) or not value:
        raise ValueError("names no file")
    if value.startswith("data:"):
        kind, _, coded = value.partition(",")
        try:
            ending = kind.removeprefix("data:").split(";")[0].partition("/")[2]
            return unpacked.keep(base64.b64decode(coded, validate=True), f"data URL.{ending}")
        except binascii.Error as error:
            raise ValueError(f"is data: without base64 ({error})") from error
    if re.match(r"(?:https?|s3|gs|hf)://", value):
        raise ValueError(f'= "{value[:80]}" is an address: download the file and write its path')
    return unquote(value.removeprefix("file://")) if value.startswith("file://") else value
