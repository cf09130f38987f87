"""What readers of formats give: rows of a file, and each as a line of docs/own_data.md."""

import base64
import binascii
import hashlib
import os
import re
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
# A file that came inside of another one has this name, and its path then lies below the folder of unpacked files.
_SUFFIXES = re.compile(r"\.[A-Za-z0-9]{1,6}")


@dataclass
class Row:
    """A record of a file. `place` is where its writer finds it, as "line 3"; `content` the text of a JSON line, or the
    record itself; `form` its format if the whole file has one."""

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
    """A folder for files that are inside of other files. The name of each is the hash of its content."""

    def __init__(self, folder: Path):
        self.folder = folder

    def keep(self, data: bytes, name: str = "") -> str:
        """Write a file and return its path. name: what its suffix is taken from."""
        suffix = Path(name).suffix
        suffix = suffix.lower() if _SUFFIXES.fullmatch(suffix) else ".bin"
        file = self.folder / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{file.name}.{os.getpid()}")
            partial.write_bytes(data)
            partial.replace(file)
        return str(file)


def file_name(value, unpacked: Unpacked) -> str:
    """The path of a picture or video that is given as a path, as file://, as data: (base64), or as an object with one
    of these or with bytes, as Hugging Face `datasets` has them. ValueError: it is none, or an address."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return unpacked.keep(value["bytes"], value.get("path") or ".bin")
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
            return unpacked.keep(base64.b64decode(coded, validate=True), f"x.{ending}")
        except binascii.Error as error:
            raise ValueError(f"is data: without base64 ({error})") from error
    if re.match(r"(?:https?|s3|gs|hf)://", value):
        raise ValueError(f'= "{value[:80]}" is an address: download the file and write its path')
    return unquote(value.removeprefix("file://")) if value.startswith("file://") else value
