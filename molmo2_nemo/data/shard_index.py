"""What a folder of shards says of itself in .nv-meta, checked before Energon reads it.

    .info.json     shard_counts: {train-00000.tar: 1000, ...}, energon_version
    split.yaml     split_parts: {train: ['train-{00000..00099}.tar'], val: [...], test: [...]}, exclude: []
    dataset.yaml   the two lines of DATASET
    index.sqlite   Energon's table of all parts, and index.uuid, its identity: training reads neither

Energon runs what dataset.yaml names: a Python file beside it, or any class that can be imported. Shards are data that
come from elsewhere, so that nothing is accepted but what `energon prepare --sample-type CrudeWebdataset` and
molmo2_nemo/prepare/webdataset.py write, and no shard may lie outside of its folder.
"""

import json
import re
import reprlib
from math import prod
from pathlib import Path
from typing import NoReturn

import yaml
from braceexpand import braceexpand

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.storage import is_remote, shown

DATASET = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
# Bytes of a file at most: the names and counts of a million shards take 40 MB.
MAX_BYTES = {".info.json": 2**27, "split.yaml": 2**24, "dataset.yaml": 2**12, "index.uuid": 2**6}
# Samples of one shard at most: the loader keeps a count for each sample in memory.
MAX_SHARD_SAMPLES = 10**7
# Energon abbreviates runs of shards: train-{00000..00002}.tar.
RUN = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
SPECIAL = re.compile(r"[{}\\\x00-\x1f\x7f]")
UUID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\s*")
SQLITE = b"SQLite format 3\0"


def read_index(name: str, folder: Path, address: str | None = None) -> dict[str, dict[str, int]]:
    """Split part (train, val, test) -> shard -> number of its samples.

    name: of the source, and address: where the source is, if `folder` has a copy of its .nv-meta, an address or another
    folder; both are for messages.

    ConfigError, one sentence: the folder is not prepared, or a file holds anything else than what belongs there.
    """
    meta = folder / ".nv-meta"
    for file in (".info.json", "split.yaml", "dataset.yaml"):
        if not (meta / file).is_file():  # a pipe or a device would be read for ever
            path = f"{shown(address or str(folder))}/.nv-meta/{file}"
            where = f"{path} is not there" if is_remote(path) else f"{path} is no file"
            raise ConfigError(f"the source {name} is not prepared ({where}): {_prepare(folder, address)}.")
    try:
        _check_dataset(meta / "dataset.yaml")
        _check_database(meta)
        counts = _read_counts(meta / ".info.json")
        return _read_parts(meta / "split.yaml", counts)
    except _Unexpected as error:
        problem, fix = str(error), error.fix or _prepare(folder, address)
        problem = problem.replace(str(folder), shown(address or str(folder)))
        if is_remote(address or ""):
            fix = f"{fix}, and upload it again"
        raise ConfigError(f"the source {name} is not accepted: {problem}: {fix}.") from error
    except OSError as error:
        raise ConfigError(f"the source {name} cannot be read ({error}): correct its permissions.") from error


def _prepare(folder: Path, address: str | None) -> str:
    if is_remote(address or ""):
        return "prepare the folder that was uploaded, and upload its .nv-meta"
    return (
        f"run energon prepare {address or folder} --non-interactive --force-overwrite --split-ratio 99,1,0"
        " --sample-type CrudeWebdataset"
    )


class _Unexpected(Exception):
    """Something in a file that does not belong there. fix: what to do; None: prepare the folder again."""

    def __init__(self, problem: str, fix: str | None = None):
        super().__init__(problem)
        self.fix = fix


def _refuse(path: Path, key, value, expected: str, fix: str | None = None) -> NoReturn:
    # reprlib shortens: a few bytes of YAML can stand for a value without end.
    raise _Unexpected(f"{path} has {_short(key)}={reprlib.repr(value)}, but {expected}", fix)


def _short(key) -> str:
    return key if isinstance(key, str) and key.isprintable() and len(key) < 100 else reprlib.repr(key)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES[path.name] + 1)
    if len(data) > MAX_BYTES[path.name]:
        raise _Unexpected(f"{path} has more than {MAX_BYTES[path.name]:,} bytes")
    return data


def _check_dataset(path: Path) -> None:
    # Line by line: Energon's parser of YAML is another than ours, and might find more in the file.
    lines = [line.rstrip() for line in _read(path).decode(errors="replace").split("\n")]
    missing = dict(DATASET)
    fix = "write these two lines into it, and nothing else, if you trust the shards"
    expected = f"all it may have is {' and '.join(f'{key}: {value}' for key, value in DATASET.items())}"
    for line in filter(None, lines):
        key, _, value = line.partition(": ")
        if missing.pop(key, None) != value:
            _refuse(path, key, value, expected, fix)
    for key in missing:
        _refuse(path, key, None, expected, fix)


def _check_database(meta: Path) -> None:
    uuid, database = meta / "index.uuid", meta / "index.sqlite"
    for path in (uuid, database):
        if path.exists() and not path.is_file():
            raise _Unexpected(f"{path} is no file", "remove it")
    if uuid.exists() and not UUID.fullmatch(content := _read(uuid)):
        _refuse(uuid, "its content", content, "it is a UUID", "remove the file")
    if database.exists():
        with database.open("rb") as file:
            content = file.read(len(SQLITE))
        if content != SQLITE:
            _refuse(database, "its beginning", content, "it is an SQLite database", "remove the file")


def _read_mapping(path: Path, load, types: dict[str, type]) -> dict:
    """The document of a file: a mapping of these keys to values of these types, all but the first of them optional."""
    try:
        document = load(_read(path).decode())
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise _Unexpected(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from error
    first = next(iter(types))
    if not isinstance(document, dict) or first not in document:
        raise _Unexpected(f"{path} lacks the key {first}")
    for key, value in document.items():
        if key not in types:
            _refuse(path, key, value, f"the only keys are {' and '.join(types)}")
        if not isinstance(value, types[key]):
            _refuse(path, key, value, f"it is {'a text' if types[key] is str else f'a {types[key].__name__}'}")
    return document


def _read_counts(path: Path) -> dict[str, int]:
    """Shard -> number of its samples, of all shards of the folder."""
    counts = _read_mapping(path, json.loads, {"shard_counts": dict, "energon_version": str})["shard_counts"]
    for shard, count in counts.items():
        folders = shard.split("/")
        if SPECIAL.search(shard) or not shard.endswith(".tar") or not {"", ".", ".."}.isdisjoint(folders):
            _refuse(path, "shard_counts", shard, "a shard is a .tar file below the folder, with a plain name")
        if type(count) is not int or not 0 <= count <= MAX_SHARD_SAMPLES:
            _refuse(path, f"shard_counts.{shard}", count, f"it is a number of samples up to {MAX_SHARD_SAMPLES:,}")
    return counts


def _read_parts(path: Path, counts: dict[str, int]) -> dict[str, dict[str, int]]:
    document = _read_mapping(path, yaml.safe_load, {"split_parts": dict, "exclude": list})
    parts = {
        part: _shards(path, f"split_parts.{_short(part)}", patterns, counts)
        for part, patterns in document["split_parts"].items()
    }
    excluded = set(_shards(path, "exclude", document.get("exclude", []), counts))
    return {
        part: {shard: counts[shard] for shard in parts.get(part, []) if shard not in excluded}
        for part in ("train", "val", "test")
    }


def _shards(path: Path, key: str, patterns, counts: dict[str, int]) -> list[str]:
    """The shards that a list names; a pattern may stand for a run of them."""
    if not isinstance(patterns, list):
        _refuse(path, key, patterns, "it is a list of shards")
    found = {}
    for pattern in patterns:
        shards = []
        if isinstance(pattern, str) and not SPECIAL.search(RUN.sub("", pattern)):
            number = prod(abs(int(last) - int(first)) + 1 for first, last in RUN.findall(pattern))
            # Not expanded before: a few characters can stand for any number of names.
            shards = list(braceexpand(pattern)) if number <= len(counts) else []
        if not shards or any(shard not in counts or shard in found for shard in shards):
            _refuse(path, key, pattern, "it lists shards of .info.json, each of them once")
        found |= dict.fromkeys(shards)
    return list(found)
