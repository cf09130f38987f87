"""Read a data set as it was fetched: the rows of its annotations, and the media files that they name.

    $DATA_ROOT/raw/NAME/
      hub/            annotation files as they were published (those of the Hub's repository, or of plain addresses)
      media/          pictures and videos of a list of addresses: sha256(url)[:2]/sha256(url).EXT
      extracted/      a folder for each archive, with its contents
      manual/         what the user provides, in the layout of `tools/download.py how NAME`
      fetched.json    written last: name, revision, license, splits, counts, bytes, time, complete

tools/download.py writes this folder. This module only reads, holds one batch of rows in memory, and may be used by many
processes at once.
"""

import codecs
import csv
import json
import os
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

import ijson
from pydantic import ConfigDict, TypeAdapter, with_config

from molmo2_nemo import limits
from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.parked import Parked
from molmo2_nemo.files import sha256_of_text

# Suffixes of files in media/; the writer chooses by content.
MEDIA_SUFFIXES = tuple(dict.fromkeys((*limits.DOWNLOADED_IMAGES.values(), *limits.DOWNLOADED_VIDEOS.values())))
ROW_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")
SPLITS = ("train", "validation", "val", "test")
# With more folders than this in extracted/ or manual/, they are not searched one by one.
MAX_FOLDERS = 64
# Rows held at once; a row may hold pictures.
BATCH_ROWS = 64
# Rows of a file that is no parquet whose keys are its columns.
COLUMN_ROWS = 64
# Bytes of a JSON file that may be held as a whole where reading its array item by item fails.
MAX_WHOLE = 2**30


class UnreadableFile(ValueError):
    """A file of rows is broken, or of another form than its suffix says; `reason` says so without naming the file."""

    def __init__(self, path: Path, error: Exception | str):
        super().__init__(path, error)  # as they are, so that it comes back whole from another process
        self.path, self.reason = path, " ".join(str(error).split())

    def __str__(self) -> str:
        return f"{self.path} cannot be read: {self.reason}."


def media_name(url: str) -> str:
    """Path, relative to media/ and without suffix, of the file from this address."""
    digest = sha256_of_text(url)
    return f"{digest[:2]}/{digest}"


@with_config(ConfigDict(extra="allow", strict=True))
class FetchNote(TypedDict, total=False):
    """fetched.json, which a fetch writes last. Notes written by hand may leave out anything."""

    name: str | None
    complete: bool | None
    stopped: str | None  # why the fetch ended before its end
    waiting: list[str] | None  # what is missing, in words
    limit: int | None  # rows of a sample (fetch --limit)
    filter: str | None  # of the catalogue: rows that are meant
    splits: dict[str, list[str]] | None  # split -> annotation files, relative to the data set's folder
    revision: str | None  # commit of the repository on the Hub
    repo: str | None
    license: str | None
    terms: str | None
    max_side: int | None  # pixels to which larger pictures were resized on arrival
    works: bool | None  # a sample could be made of one of the first rows
    useless: str | None  # why of none
    searched: int | None  # annotations whose pictures or videos were looked for after the fetch
    found: int | None  # of these, those whose media were there
    held_out: str | None  # "checked" or "not checked" against the pictures of evaluations
    counts: dict[str, Any] | None  # files, rows
    media: dict[str, Any] | None  # kind, and what became of the addresses of a list
    bytes: int | None  # on the disk
    fetched_bytes: int | None
    seconds: float | None
    time: str | None


_NOTE = TypeAdapter(FetchNote)


class RawSource:
    """The fetched data set `name` under the data root `root`. catalogue: the file of its entry, for messages."""

    def __init__(self, root: Path, name: str, catalogue: str | None = None):
        self.name, self.root, self.catalogue = name, root, catalogue
        self.folder = Path(root).expanduser() / "raw" / name

    @cached_property
    def info(self) -> FetchNote:
        """What fetched.json says. ValueError, one sentence: it is missing or broken, so the set is not fetched."""
        try:
            return _NOTE.validate_json((self.folder / "fetched.json").read_bytes())
        except (OSError, ValueError) as error:
            note = self.folder / "fetched.json"
            why = f" ({note} cannot be read)" if note.exists() else ""
            fetch = download_command("fetch", self.name, root=self.root, catalogue=self.catalogue)
            raise ValueError(f"{self.name} is not fetched{why}: run {fetch}.") from error

    def files(self, split: str | None = None) -> list[Path]:
        """Annotation files of a split, or of all, in a fixed order. ValueError: there is no such split."""
        splits = self.info.get("splits")
        if splits is None:
            splits = self._guessed_splits()
        if split is not None and split not in splits:
            raise ValueError(f"{self.name} has no split {split}: it has {', '.join(splits) or 'none'}.")
        chosen = [name for key, names in splits.items() if split in (None, key) for name in names]
        return [self.folder / name for name in dict.fromkeys(chosen)]

    def rows(self, split: str | None = None) -> Iterator[dict]:
        """Rows of parquet, JSON lines, JSON (a list's items, or one object), CSV and TSV files with a header line.

        Rows that the catalogue's filter does not select are left out; a sample (`fetch --limit N`) ends after N rows.
        ValueError, one sentence: a file cannot be read.
        """
        left, condition = self.info.get("limit"), self.info.get("filter")
        for path in self.files(split):
            if path.suffix.lower() not in ROW_SUFFIXES:
                continue
            for row in read_rows(self.content(path)):
                if not matches(row, condition):
                    continue
                if left is not None:
                    if left == 0:
                        return
                    left -= 1
                yield row

    def content(self, path: Path) -> Path:
        """A file of the folder, to be read at once: itself, or what is brought back for one that was put away."""
        return self._parked.content(path) if self._parked else path

    @cached_property
    def _parked(self) -> Parked | None:
        return Parked.of(self.folder)

    def media(self, key: str) -> Path | None:
        """The file of an address or of a relative name in a row; None: it was lost, held out, or never fetched.

        A name is searched for in media/, extracted/, each archive's folder, manual/ and hub/. One that is not there is
        tried again without its first folders, as long as a folder is left.
        """
        if "://" in key:
            stem = self.folder / "media" / media_name(key)
            return next((path for suffix in MEDIA_SUFFIXES if (path := stem.with_suffix(suffix)).is_file()), None)
        parts = PurePosixPath(key.replace("\\", "/")).parts
        if not parts or ".." in parts or parts[0] == "/" or "\0" in key:
            return None
        while True:
            for root in self._media_roots:
                path = root.joinpath(*parts)
                if path.is_file():
                    return path
            if len(parts) <= 2:
                return None
            parts = parts[1:]

    @cached_property
    def _media_roots(self) -> list[Path]:
        roots = [self.folder / "media"]
        for name in ("extracted", "manual"):
            folder = self.folder / name
            inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
            inside = [path for path in inside if not path.name.startswith(".")]
            # If each of thousands of videos has an archive of its own, names begin with the archive's name.
            roots += [folder, *(inside if len(inside) <= MAX_FOLDERS else [])]
        return [root for root in (*roots, self.folder / "hub") if root.is_dir()]

    def _guessed_splits(self) -> dict[str, list[str]]:
        """Splits of files in hub/ that fetched.json does not list: by the first word of a file or its folder."""
        splits: dict[str, list[str]] = {}
        for path in sorted((self.folder / "hub").rglob("*")):
            relative = path.relative_to(self.folder)
            if path.suffix.lower() in ROW_SUFFIXES and not any(part.startswith(".") for part in relative.parts):
                words = [part.replace("_", "-").replace(".", "-").split("-")[0] for part in relative.parts[1:]]
                split = next((word for word in reversed(words) if word in SPLITS), "train")
                splits.setdefault(split, []).append(str(relative))
        return splits


def read_note(root: Path, name: str) -> FetchNote | None:
    """fetched.json of a set; None: it is missing or broken."""
    try:
        return RawSource(root, name).info
    except ValueError:
        return None


def read_rows(path: Path, suffix: str | None = None) -> Iterator[dict]:
    """Rows of one file, of the type that `suffix` or its own says. ValueError, one sentence, names file and line."""
    suffix = (suffix or path.suffix).lower()
    try:
        if suffix == ".parquet":
            for batch in _parquet(path).iter_batches(batch_size=BATCH_ROWS):
                yield from batch.to_pylist()
        elif suffix == ".arrow":
            yield from _arrow_rows(path)
        elif suffix == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _object(json.loads(line), f"line {number}")
        elif suffix == ".json":
            for number, value in enumerate(json_values(path), 1):
                yield _object(value, f"item {number}")
        elif suffix in (".csv", ".tsv"):
            with path.open(newline="", encoding="utf-8-sig") as lines:
                yield from csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
        else:
            raise ValueError(f"its suffix is none of {', '.join(ROW_SUFFIXES)}")
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UnreadableFile(path, error) from error


def json_values(path: Path) -> Iterator:
    """Items of a JSON file's array, its one value, or, as is common, the values of JSON lines. ValueError: neither."""
    with path.open("rb") as file:
        start = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        yield from json_items(path)
        return
    content = path.read_bytes()
    try:
        values = json.loads(content)
    except ValueError:
        values = [json.loads(line) for line in content.splitlines() if line.strip()]
    yield from values if isinstance(values, list) else [values]


def json_items(path: Path, key: str | None = None) -> Iterator:
    """Items of the JSON array, or of the array under `key` of the JSON object, of which one is held at a time.

    NaN, Infinity and integers of more than 64 bits, which Python writes but no standard allows, are read too: such a
    file is then held as a whole. Half of a surrogate pair becomes a question mark.
    ValueError: there is no such array, or the file is broken.
    """
    number, where = 0, f" under {key}" if key else ""
    try:
        with path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            for item in ijson.items(file, f"{key}.item" if key else "item", use_float=True):
                yield item
                number += 1
            if number:
                return
            reason = f"it has no JSON array{where}"
    except ijson.JSONError as error:
        reason = f"it is broken after item {number}{where} ({_first_line(error)})"
    if path.stat().st_size > MAX_WHOLE:
        raise ValueError(reason)
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"it is broken after item {number}{where} ({error})") from error
    if key is not None:
        values = values.get(key) if isinstance(values, dict) else None
    if not isinstance(values, list):
        raise ValueError(f"it has no JSON array{where}")
    yield from values[number:]


def _first_line(error: Exception) -> str:
    """Of what ijson says, without its drawing of the place; some of it is in bytes."""
    text = error.args[0] if error.args else ""
    return (text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)).split("\n")[0]


def num_rows(path: Path) -> int:
    """Rows of one file, for parquet without reading them."""
    if path.suffix.lower() == ".parquet":
        try:
            return _parquet(path).metadata.num_rows
        except (OSError, ValueError) as error:
            raise UnreadableFile(path, error) from error
    return sum(1 for _ in read_rows(path))


def columns_of(path: Path) -> list[str]:
    """Names of the columns of a file of rows, sorted: of parquet all, else those of its first COLUMN_ROWS rows.

    ValueError, one sentence: it cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        return sorted(_parquet(path).schema_arrow.names)
    return sorted({str(column) for row in islice(read_rows(path), COLUMN_ROWS) for column in row})


def column_values(path: Path, columns: list[str]) -> Iterator[dict]:
    """As `read_rows`, but with these columns alone: a parquet file's pictures stay on the disk.

    ValueError: the file lacks a column.
    """
    if path.suffix.lower() != ".parquet":
        for row in read_rows(path):
            yield {column: row[column] for column in columns if column in row}
        return
    file = _parquet(path)
    known = file.schema_arrow.names
    try:
        for batch in file.iter_batches(batch_size=4096, columns=[column for column in columns if column in known]):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise UnreadableFile(path, error) from error


def matches(row: dict, condition: str | None) -> bool:
    """Whether a row meets a condition "COLUMN == VALUE"; without a condition, every row does."""
    column, _, value = (condition or "").partition("==")
    return not condition or str(row.get(column.strip())) == value.strip()


def size_on_disk(folder: Path) -> int:
    """Bytes of the files below a folder; a file with several names counts once, links are not followed."""
    total, seen = 0, set()
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(directory, name))
            except OSError:
                continue
            if stat.st_nlink == 1 or (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                total += stat.st_size
    return total


def _parquet(path: Path):
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError("parquet files need the package pyarrow: pip install pyarrow") from error
    try:
        return ParquetFile(path)
    except ArrowException as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error


def _arrow_rows(path: Path) -> Iterator[dict]:
    """Rows of a file that `datasets.save_to_disk` wrote, in Arrow's stream format."""
    try:
        from pyarrow import ipc, memory_map
    except ImportError as error:
        raise ValueError("arrow files need the package pyarrow: pip install pyarrow") from error
    with memory_map(str(path)) as file, ipc.open_stream(file) as batches:
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from batch.slice(start, BATCH_ROWS).to_pylist()


def _object(value, where: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    return value
