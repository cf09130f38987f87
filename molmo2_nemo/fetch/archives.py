"""Unpacking archives from strangers: nothing leaves its folder, nothing explodes, and what was stopped goes on.

extracted/.part-NAME-SHA/    members so far, each written aside and renamed
extracted/NAME/              all of them: renamed in one step
"""

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from molmo2_nemo.fetch.check import archive_kind
from molmo2_nemo.fetch.journal import is_disk_error

CHUNK = 2**20


@dataclass(frozen=True)
class Bounds:
    """What an archive may grow to."""

    max_files: int = 5_000_000
    max_bytes: int = 4 * 10**12
    max_ratio: float = 200.0  # of the archive's size; pictures and videos hardly shrink, texts by 3 to 20
    free_ratio_bytes: int = 256 * 2**20  # up to which the ratio does not count
    keep_free: int = 2**30  # bytes of the disk


@dataclass
class Extracted:
    """What came out of an archive."""

    files: int = 0
    bytes: int = 0
    links: int = 0  # left out
    repeated: int = 0  # of a name that was there already, left out


class BadArchive(Exception):
    """It cannot be unpacked, or must not be; the message says why."""


def folder_name(archive: str) -> str:
    """train2014.zip -> train2014, videos_1.tar.gz -> videos_1."""
    name = PurePosixPath(archive).name
    for suffix in (".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".tbz2", ".txz", ".tar", ".zip"):
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def extract(
    archive: Path, folder: Path, digest: str, bounds: Bounds | None = None,
    add_bytes: Callable[[int], None] = lambda count: None,
) -> Extracted:  # fmt: skip
    """Unpack `archive`, whose sha256 is `digest`, as `folder`. BadArchive: it is broken or hostile; nothing is left."""
    bounds = bounds or Bounds()
    kind = archive_kind(archive)
    if kind not in ("zip", "tar"):
        raise BadArchive(f"{kind} archives cannot be unpacked here, unpack it by hand" if kind else "no archive")
    partial = folder.with_name(f".part-{folder.name}-{digest[:12]}")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        found = _extract(archive, kind, partial, bounds, add_bytes)
    except BadArchive:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile,
            tarfile.TarError) as error:  # fmt: skip
        if is_disk_error(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        raise BadArchive(f"broken ({' '.join(str(error).split())[:160] or type(error).__name__})") from error
    if folder.exists():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(folder)
    return found


def _extract(archive: Path, kind: str, partial: Path, bounds: Bounds, add_bytes) -> Extracted:
    size, found, seen = archive.stat().st_size, Extracted(), set()
    allowed = min(bounds.max_bytes, max(bounds.free_ratio_bytes, int(size * bounds.max_ratio)))
    for name, length, open_member in (_zip_members if kind == "zip" else _tar_members)(archive, found):
        path = _place(partial, name)
        if name in seen:
            found.repeated += 1
            continue
        seen.add(name)
        found.files += 1
        if found.files > bounds.max_files:
            raise BadArchive(f"more than {bounds.max_files:,} files")
        if found.bytes + length > allowed:
            raise BadArchive(f"more than {allowed:,} bytes from {size:,}: it explodes")
        if path.is_file() and path.stat().st_size == length:
            # Renamed by an earlier run, so it was whole.
            found.bytes += length
            continue
        if shutil.disk_usage(partial).free - length < bounds.keep_free:
            raise OSError(28, f"no room for {length:,} bytes and {bounds.keep_free:,} to spare", str(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise BadArchive(f"the name {name[:100]!r} is a file and a folder") from error
        aside = partial / ".aside"
        with open_member() as source, aside.open("wb") as target:
            written = 0
            while chunk := source.read(CHUNK):
                written += len(chunk)
                if written > length:
                    raise BadArchive(f"{name[:100]!r} is longer than it says")
                target.write(chunk)
                add_bytes(len(chunk))
        if written != length:
            raise BadArchive(f"{name[:100]!r} is shorter than it says")
        aside.replace(path)
        found.bytes += length
    return found


def _place(folder: Path, name: str) -> Path:
    """The path of a member. BadArchive: it is not below `folder`."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name or ":" in parts[0]:
        raise BadArchive(f"the name {name[:100]!r} leads out of its folder: refused")
    if any(len(part.encode("utf-8", "surrogateescape")) > 255 for part in parts):
        raise BadArchive(f"the name {name[:60]!r}... is too long")
    return folder.joinpath(*parts)


def _zip_members(archive: Path, found: Extracted) -> Iterator[tuple[str, int, Callable[[], BinaryIO]]]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            _place(Path(), info.filename)
            mode = info.external_attr >> 16
            if info.is_dir():
                continue
            if stat.S_ISLNK(mode):
                _check_link(info.filename, file.read(info).decode("utf-8", "replace") if info.file_size < 4096 else "/")
                found.links += 1
                continue
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise BadArchive(f"{info.filename[:100]!r} is a device: refused")
            if info.flag_bits & 1:
                raise BadArchive("it is encrypted, unpack it by hand")
            yield info.filename, info.file_size, lambda info=info: file.open(info)


def _tar_members(archive: Path, found: Extracted) -> Iterator[tuple[str, int, Callable[[], BinaryIO]]]:
    with tarfile.open(archive, "r:*") as file:
        members = 0
        for member in file:
            # Or it would keep every member's head in memory.
            file.members = []
            members += 1
            if members > 2 * Bounds.max_files:
                raise BadArchive("too many members")
            try:
                tarfile.data_filter(member, "/nowhere")
            except tarfile.FilterError as error:
                raise BadArchive(f"{' '.join(str(error).split())[:160]}: refused") from error
            if member.issym() or member.islnk():
                found.links += 1
            elif member.isreg():
                yield member.name, member.size, lambda member=member: file.extractfile(member)


def _check_link(name: str, target: str) -> None:
    depth = len(PurePosixPath(name).parts) - 1
    for part in PurePosixPath(target).parts:
        depth += -1 if part == ".." else 1
        if depth < 0 or part == "/":
            raise BadArchive(f"the link {name[:100]!r} leads out of its folder: refused")
