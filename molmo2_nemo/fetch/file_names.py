"""Names on the disk of files from plain addresses."""

import re
import urllib.parse
from pathlib import Path

from molmo2_nemo.files import sha256_of_text


def direct(url: str) -> str:
    """The download address of a Google Drive page; other addresses unchanged."""
    match = re.fullmatch(r"https://drive\.google\.com/file/d/([\w-]+)/view.*", url)
    return f"https://drive.usercontent.google.com/download?id={match[1]}&export=download&confirm=t" if match else url


def file_name(url: str, named: str | None, kind: str | None) -> str:
    """A safe file name for what an address gave. kind: zip, tar, json, or something else."""
    name = named or urllib.parse.unquote(urllib.parse.urlsplit(url).path).rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^\w.-]", "_", name).lstrip(".")[-100:]
    if not Path(name).suffix or name in ("view", "download", "main"):
        name = f"{name or 'file'}-{sha256_of_text(url)[:8]}"
        name += {"zip": ".zip", "tar": ".tar", "json": ".json"}.get(kind or "", "")
    return name


def other_name(name: str, what: str) -> str:
    """Another name for a file whose name is taken, always the same for the same `what`."""
    folder, _, name = name.rpartition("/")
    return f"{folder}/{sha256_of_text(what)[:8]}-{name}"
