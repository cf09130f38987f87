"""Which files of a fetched data set are on the disk, whether they are unchanged, and what the user provided by hand."""

import collections
import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.catalogue.datasets import DataSet
from molmo2_nemo.catalogue.raw import ROW_SUFFIXES, json_values, num_rows
from molmo2_nemo.fetch.archives import content_of, folder_name
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.fetch.media_check import instead_of_file
from molmo2_nemo.files import sha256_of
from molmo2_nemo.limits import VIDEO_SUFFIXES

# Records of media, and files of an archive, above which `list` looks at the times of folders alone: it shall be quick.
GLANCE_BYTES, GLANCE_FILES = 16 * 2**20, 50_000
# Seconds by which a file may be newer than fetched.json, which is written last: some file systems round times.
LATER = 2.0
NEWER = "is newer than its fetch"


def missing_layout(entry: DataSet, folder: Path) -> list[str]:
    """Patterns of files that the user has to put into manual/ and that match no file with content."""
    manual = folder / "manual"
    return [pattern for pattern in entry.layout if not any(map(_has_content, _matching(manual, pattern)))]


def lacks_by_hand(entry: DataSet, folder: Path, info: dict) -> list[str]:
    """`missing_layout` of a set that was fetched; videos of YouTube that the fetch brought stand for those by hand."""
    if entry.media.kind == "youtube-ids" and (info.get("media") or {}).get("fetched"):
        return []
    return missing_layout(entry, folder)


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    """The files of a pattern, which may be written in other letters; the suffix of a video stands for all of them."""
    stem, dot, suffix = pattern.rpartition(".")
    if f".{suffix}".lower() not in VIDEO_SUFFIXES:
        yield from folder.glob(pattern, case_sensitive=False)
        return
    for path in folder.glob(f"{stem}.*", case_sensitive=False):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            yield path


def manual_annotations(entry: DataSet, folder: Path) -> list[Path]:
    """Annotation files among what the user put into manual/."""
    found = []
    for pattern in entry.source.layout or ["**/*"]:
        if pattern.lower().endswith(ROW_SUFFIXES) or pattern == "**/*":
            paths = sorted((folder / "manual").glob(pattern, case_sensitive=False))
            found += [path for path in paths if path.suffix.lower() in ROW_SUFFIXES]
    return list(dict.fromkeys(found))


def fault(path: Path, read: bool = True) -> str | None:
    """What is wrong with a file that the user provided, as far as its suffix tells; None: nothing.

    read: also read all rows of files whose suffix says that they have some.
    """
    if what := instead_of_file(path):
        return "empty" if what == "an empty file" else what
    try:
        if read and path.suffix.lower() == ".json":
            collections.deque(json_values(path), maxlen=0)
        elif read and path.suffix.lower() == ".jsonl":
            with path.open("rb") as lines:
                collections.deque((json.loads(line) for line in lines if line.strip()), maxlen=0)
        elif read and path.suffix.lower() == ".parquet":
            num_rows(path)
    except (ValueError, RecursionError) as error:
        return f"broken ({' '.join(str(error).split())[:120]})"
    return None


def glance(folder: Path, info: dict) -> tuple[str, str] | None:
    """(file, what is wrong) of the first file of a complete set at which `list` sees that it is missing or changed.

    Sizes are compared, and the times of files and folders with that of fetched.json. Of very many files only the times
    of their folders are: a file in their midst that has changed in place is not noticed. None: nothing is seen.
    """
    since = (folder / "fetched.json").stat().st_mtime + LATER
    index = folder / "media" / "index.jsonl"
    if not (index.exists() and index.stat().st_size > GLANCE_BYTES):
        found = [(name, what) for name, what in lacking(folder, info) if name != "fetched.json"]
        if found:
            return found[0]
    return next(broken_files(folder, since=since), None)


def bytes_broken(folder: Path) -> int:
    """Bytes of the files of a set that are missing or have another size, which a fetch would download again."""
    broken, total = {name for name, _ in broken_files(folder)}, 0
    for journal_file, key, base in (("files.jsonl", "file", ""), ("media/index.jsonl", "url", "media/")):
        for record in Journal(folder / journal_file, key).records.values():
            total += record["bytes"] if "sha256" in record and f"{base}{record['file']}" in broken else 0
    return total + sum(map(bytes_broken, shared_homes(folder)))


def _newer_folders(folder: Path, since: float) -> Iterator[tuple[str, str]]:
    """Folders to which something was added, or from which something was removed, since a time."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and path.stat().st_mtime > since:
            yield f"{folder.name}/{path.name}", NEWER


def broken_files(folder: Path, deep: bool = False, since: float | None = None) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of each recorded file that is missing or changed.

    Sizes are compared, of an archive's contents the number of files and their bytes; with `deep`, checksums too.
    since: a time after which no file was written; of very many files only the times of their folders are compared.
    """
    for journal_file, key, base in (("files.jsonl", "file", folder), ("media/index.jsonl", "url", folder / "media")):
        path = folder / journal_file
        if since is not None and path.exists() and path.stat().st_size > GLANCE_BYTES:
            yield from _newer_folders(base, since)
            continue
        journal = Journal(folder / journal_file, key)
        for record in journal.records.values():
            path = base / record["file"]
            if "link" in record:
                if not path.is_symlink() or os.readlink(path) != record["link"]:
                    yield str(path.relative_to(folder)), "is missing"
                continue
            if "sha256" not in record:  # a folder of an archive
                if not path.is_dir():
                    yield str(path.relative_to(folder)), "is missing"
                    continue
                if since is not None and record.get("files", 0) > GLANCE_FILES:
                    continue
                files, size, content = content_of(path, read=deep and "content" in record)
                if files != record.get("files"):
                    yield str(path.relative_to(folder)), f"has {files:,} files instead of {record.get('files', 0):,}"
                elif size != record["bytes"]:
                    yield str(path.relative_to(folder)), f"has {size:,} bytes instead of {record['bytes']:,}"
                elif content and content != record["content"]:
                    yield str(path.relative_to(folder)), "has changed"
                continue
            try:
                stat = path.stat()
            except OSError:
                if not is_unpacked(folder, journal, record):
                    yield str(path.relative_to(folder)), "is missing"
                continue
            if stat.st_size != record["bytes"]:
                yield str(path.relative_to(folder)), f"has {stat.st_size:,} bytes instead of {record['bytes']:,}"
            elif since is not None and stat.st_mtime > since:
                yield str(path.relative_to(folder)), NEWER
            elif deep and sha256_of(path) != record["sha256"]:
                yield str(path.relative_to(folder)), "has changed"
    for path in _links(folder):
        target = Path(os.path.normpath(path.parent / os.readlink(path)))
        home = target.parents[1]
        if not path.exists():
            yield str(path.relative_to(folder)), "is missing in raw/.shared"
        elif str(target.relative_to(home)) not in Journal(home / "files.jsonl", "file").records:
            yield str(path.relative_to(folder)), "is not in the files.jsonl of its folder in raw/.shared"
    for home in shared_homes(folder):
        for name, what in broken_files(home, deep, since and math.inf):  # written by the fetches of several sets
            yield f"../.shared/{home.name}/{name}", what


def remove_broken(folder: Path) -> int:
    """Read every recorded file, remove those that changed together with their records, and return their number."""
    broken = dict(broken_files(folder, deep=True))
    for journal_file, base in (("files.jsonl", ""), ("media/index.jsonl", "media/")):
        if broken and (folder / journal_file).exists():
            journal = Journal(folder / journal_file, "file" if not base else "url")
            for key, record in list(journal.records.items()):
                if f"{base}{record['file']}" in broken:
                    journal.remove(key)
                    with contextlib.suppress(OSError):
                        (folder / f"{base}{record['file']}").unlink()
            journal.close()
    return len(broken)


def lacking(folder: Path, info: dict) -> list[tuple[str, str]]:
    """(file, what is wrong) where the records of a fetched set list fewer files than its fetched.json."""
    files, found = Journal(folder / "files.jsonl", "file").records, []
    if any(info.get(key) is None for key in ("splits", "counts", "media")):
        found.append(("fetched.json", "was not written by a complete fetch"))
    expected = (info.get("counts") or {}).get("files")
    if isinstance(expected, int) and len(files) < expected:
        found.append(("files.jsonl", f"lists {len(files):,} files instead of {expected:,}"))
    for names in (info.get("splits") or {}).values():
        found += [(name, "is missing") for name in names if name not in files and not (folder / name).exists()]
    expected = (info.get("media") or {}).get("fetched")
    if (info.get("media") or {}).get("kind") == "url-list" and isinstance(expected, int):
        there = len(Journal(folder / "media" / "index.jsonl", "url").records)
        if there < expected:
            found.append(("media/index.jsonl", f"lists {there:,} pictures instead of {expected:,}"))
    return found


def shared_homes(folder: Path) -> list[Path]:
    """Folders in raw/.shared that links of a data set point to."""
    return sorted({Path(os.path.normpath(path.parent / os.readlink(path))).parents[1] for path in _links(folder)})


def _links(folder: Path) -> list[Path]:
    found = [path for name in ("extracted", "hub") for path in (folder / name).glob("*")]
    return [path for path in found if path.is_symlink() and "/.shared/" in os.readlink(path)]


def unpacked_as(record: dict) -> str:
    """Folder that an archive is unpacked to, relative to its home."""
    return record.get("folder") or f"extracted/{folder_name(record['file'])}"


def is_unpacked(home: Path, files: Journal, record: dict) -> bool:
    """Whether an archive's contents are there. The archive itself may have been removed."""
    unpacked = unpacked_as(record)
    done = files.records.get(unpacked)
    return bool(done) and done.get("archive") == record.get("sha256") and (home / unpacked).is_dir()


def _has_content(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.is_file() and path.stat().st_size > 0
    return False
