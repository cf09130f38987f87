"""Unpacking archives from strangers: nothing leaves its folder, nothing explodes, and what was stopped goes on.

extracted/.part-NAME-SHA/         members so far, each written aside and renamed
extracted/.part-NAME-SHA.inside/  the same of archives inside, each of which becomes a folder of its name
extracted/NAME/                   all of them: renamed in one step
"""

import bz2
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pydantic import BaseModel

from molmo2_nemo import compat
from molmo2_nemo.files import is_disk_error, sha256_of, write_json

CHUNK = 2**20
# Archives in an archive are unpacked, and those in them; deeper ones stay as they are.
MAX_DEPTH = 2
SUFFIXES = (".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".tbz2", ".txz", ".tar", ".zip")
BROKEN = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    MemoryError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)


@dataclass(frozen=True)
class Bounds:
    """What an archive may grow to, with all that is in archives inside."""

    max_files: int = 5_000_000
    max_bytes: int = 4 * 10**12
    max_ratio: float = 200.0  # of the archive's size; pictures and videos hardly shrink, texts by 3 to 20
    free_ratio_bytes: int = 256 * 2**20  # up to which the ratio does not count
    keep_free: int = 2**30  # bytes of the disk, at most a hundredth of it


@dataclass
class Extracted:
    """What came out of an archive."""

    files: int = 0
    bytes: int = 0
    content: str = ""  # of names and bytes, see `content_of`
    links: int = 0  # left out
    repeated: int = 0  # of a name that was there already, left out
    inside: int = 0  # archives inside, unpacked
    packed: int = 0  # archives inside that stay as they are: broken, locked, too deep, of a kind that is not unpacked


COUNTS = ("files", "bytes", "links", "repeated", "inside", "packed")


class InnerArchive(BaseModel):
    """What is noted of an archive inside of another that was unpacked, so that another run need not do it again."""

    found: Extracted  # in it, by COUNTS
    files: int  # by which the work grew
    bytes: int


@dataclass
class _Work:
    """One archive while it is unpacked, with those inside."""

    bounds: Bounds
    size: int
    inside: Path
    add_bytes: Callable[[int], None]
    found: Extracted
    files: int = 0
    bytes: int = 0

    def grow(self, length: int) -> None:
        """BadArchive: with one more file of this length it is too much."""
        self.files, self.bytes = self.files + 1, self.bytes + length
        if self.files > self.bounds.max_files:
            raise BadArchive(f"more than {self.bounds.max_files:,} files")
        if self.bytes > self.allowed:
            raise BadArchive(f"more than {self.allowed:,} bytes from {self.size:,}: it explodes")

    @property
    def allowed(self) -> int:
        return min(self.bounds.max_bytes, max(self.bounds.free_ratio_bytes, int(self.size * self.bounds.max_ratio)))


class BadArchive(Exception):
    """It cannot be unpacked, or must not be; the message says why."""


class Unreadable(BadArchive):
    """Broken or locked, in contrast to hostile."""


def folder_name(archive: str) -> str:
    """train2014.zip -> train2014, videos_1.tar.gz -> videos_1."""
    name = PurePosixPath(archive).name
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s) and len(name) > len(s)), "")
    return name.removesuffix(name[len(name) - len(suffix) :]) if suffix else name


def archive_kind(path: Path) -> str | None:
    """zip, tar, rar or 7z by content; None: no archive."""
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"Rar!"):
        return "rar"
    if head.startswith(b"7z\xbc\xaf"):
        return "7z"
    try:
        with _open_tar(path, CHUNK):
            return "tar"
    except BadArchive:  # which `extract` says
        return "tar"
    except BROKEN as error:
        if is_disk_error(error):
            raise
        return None


def extract(
    archive: Path,
    folder: Path,
    digest: str,
    bounds: Bounds | None = None,
    add_bytes: Callable[[int], None] = lambda count: None,
) -> Extracted:
    """Unpack `archive`, whose sha256 is `digest`, as `folder`. BadArchive: it is broken or hostile; nothing is left."""
    kind = archive_kind(archive)
    if kind not in ("zip", "tar"):
        raise Unreadable(f"{kind} archives cannot be unpacked here, unpack it by hand" if kind else "no archive")
    partial = folder.with_name(f".part-{folder.name}-{digest[:12]}")
    work = _Work(
        bounds or Bounds(), archive.stat().st_size, partial.with_name(f"{partial.name}.inside"), add_bytes, Extracted()
    )
    partial.mkdir(parents=True, exist_ok=True)
    try:
        _unpack(archive, kind, partial, work, 0)
    except BadArchive:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(work.inside, ignore_errors=True)
        raise
    found = work.found
    found.files, found.bytes, found.content = content_of(partial)
    if not found.files:
        shutil.rmtree(partial)
        raise Unreadable("empty")
    if folder.exists():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    # This one's, and what runs left that were stopped with another archive of this name.
    stale = re.compile(rf"\.part-{re.escape(folder.name)}-[0-9a-f]{{12}}(\.inside)?|\.old-{re.escape(folder.name)}")
    for path in folder.parent.iterdir():
        if stale.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    return found


def content_of(folder: Path, read: bool = True) -> tuple[int, int, str]:
    """Files below a folder, their bytes, and, if they are to be read, the sum of the hashes of all names and bytes.

    The sum does not depend on the order; links count as they are.
    """
    files = size = total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            files, size = files + 1, size + path.lstat().st_size
            if read:
                content = sha256_of(path) if path.is_file() else "none"
                line = os.fsencode(path.relative_to(folder)) + b"\0" + content.encode()
                total += int.from_bytes(hashlib.sha256(line).digest())
    return files, size, f"{total % 2**256:064x}" if read else ""


def _unpack(archive: Path, kind: str, into: Path, work: _Work, depth: int) -> None:
    """Members of one archive into a folder. BadArchive: it is broken or hostile."""
    try:
        _members(archive, kind, into, work, depth)
    except BROKEN as error:
        if is_disk_error(error):
            raise
        split = re.search(r"\.(\d{2,3}|z\d\d|part\d+|part\d*\.\w+|[a-z][a-z])$", archive.name)
        hint = ", or a part of a split one: join its parts and unpack them by hand" if split else ""
        raise Unreadable(f"broken ({' '.join(str(error).split())[:160] or type(error).__name__}){hint}") from error


def _members(archive: Path, kind: str, into: Path, work: _Work, depth: int) -> None:
    names: set[str] = set()
    folders: set[str] = set()
    aside = work.inside / f"aside-{depth}"
    usage = shutil.disk_usage(into)
    keep_free, left = min(work.bounds.keep_free, usage.total // 100), usage.free
    for name, length, chunk, open_member in (_zip_members if kind == "zip" else _tar_members)(archive, work):
        parts = _parts(name)
        place = "/".join(parts)
        if place in names:
            work.found.repeated += 1
            continue
        above = ["/".join(parts[:n]) for n in range(1, len(parts))]
        if place in folders or not names.isdisjoint(above):
            raise BadArchive(f"the name {name[:100]!r} is a file and a folder")
        names.add(place)
        folders.update(above)
        work.grow(length)
        path = into.joinpath(*parts)
        note = work.inside / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
        if path.is_dir() and _is_noted(note, work):
            continue
        if not (path.is_file() and path.stat().st_size == length):  # else renamed by an earlier run, so it was whole
            left -= length
            if left < keep_free and (left := shutil.disk_usage(into).free - length) < keep_free:
                raise OSError(28, f"no room for {length:,} bytes and {keep_free:,} to spare", str(path))
            if path.is_dir():
                shutil.rmtree(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.parent.mkdir(exist_ok=True)
            _copy(open_member, aside, name, length, chunk, work.add_bytes)
            aside.replace(path)
        if path.name.lower().endswith((*SUFFIXES, ".rar", ".7z")):
            _inside(path, note, work, depth + 1)


def _copy(open_member: Callable, target: Path, name: str, length: int, chunk: int, add_bytes: Callable) -> None:
    written = 0
    with open_member() as source, target.open("wb") as file:
        while part := source.read(chunk):
            written += len(part)
            if written > length:
                raise BadArchive(f"{name[:100]!r} is longer than it says")
            file.write(part)
            add_bytes(len(part))
    if written != length:
        raise Unreadable(f"{name[:100]!r} is shorter than it says")


def _inside(path: Path, note: Path, work: _Work, depth: int) -> None:
    """An archive that came out of another becomes a folder of its name, or stays a file."""
    kind = archive_kind(path)
    if kind is None:
        return
    if depth > MAX_DEPTH or kind not in ("zip", "tar"):
        work.found.packed += 1
        return
    folder, before = note.with_suffix(""), (asdict(work.found), work.files, work.bytes)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _unpack(path, kind, folder, work, depth)
    except Unreadable:
        shutil.rmtree(folder)
        work.found, work.files, work.bytes = Extracted(**before[0]), *before[1:]
        work.found.packed += 1
        return
    work.found.inside += 1
    gained = Extracted(**{key: getattr(work.found, key) - before[0][key] for key in COUNTS})
    inner = InnerArchive(found=gained, files=work.files - before[1], bytes=work.bytes - before[2])
    write_json(note, inner.model_dump())
    path.unlink()
    folder.rename(path)


def _is_noted(note: Path, work: _Work) -> bool:
    """An archive inside that an earlier run unpacked is counted as it was then."""
    try:
        gained = InnerArchive.model_validate_json(note.read_bytes())
    except (OSError, ValueError):
        return False
    for key in COUNTS:
        setattr(work.found, key, getattr(work.found, key) + getattr(gained.found, key))
    work.files, work.bytes = work.files + gained.files, work.bytes + gained.bytes
    return True


def _parts(name: str) -> tuple[str, ...]:
    """The parts of a member's path. BadArchive: it leads out of its folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name or re.match("[A-Za-z]:", parts[0]):
        raise BadArchive(f"the name {name[:100]!r} leads out of its folder: refused")
    if any(len(os.fsencode(part)) > 255 for part in parts) or len(name) > 3000:
        raise BadArchive(f"the name {name[:60]!r}... is too long")
    return parts


def _zip_members(archive: Path, work: _Work) -> Iterator[tuple[str, int, int, Callable[[], BinaryIO]]]:
    """(name, bytes, bytes to read at once, open) of each file."""
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            mode = info.external_attr >> 16
            if info.is_dir():
                if PurePosixPath(info.filename).parts:
                    _parts(info.filename)
                continue
            _parts(info.filename)
            if info.flag_bits & 1:
                raise Unreadable("it is encrypted, unpack it by hand")
            if stat.S_ISLNK(mode):
                with file.open(info) as link:
                    _check_link(info.filename, link.read(4096).decode("utf-8", "replace"))
                work.found.links += 1
                continue
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise BadArchive(f"{info.filename[:100]!r} is a device: refused")
            # Others than deflate give all that a chunk holds in one piece.
            chunk = CHUNK if info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) else 4096
            yield info.filename, info.file_size, chunk, lambda info=info: file.open(info)


def _tar_members(archive: Path, work: _Work) -> Iterator[tuple[str, int, int, Callable[[], BinaryIO]]]:
    # Heads, and members that are left out, take room in the stream, too.
    with _open_tar(archive, 4 * work.allowed) as file:
        members = 0
        for member in file:
            # Or it would keep every member's head in memory.
            file.members = []
            members += 1
            if members > 2 * work.bounds.max_files:
                raise BadArchive("too many members")
            if member.size < 0:
                raise BadArchive(f"{member.name[:100]!r} has a size below 0: refused")
            try:
                tarfile.data_filter(member, "/nowhere")
            except tarfile.FilterError as error:
                raise BadArchive(f"{' '.join(str(error).split())[:160]}: refused") from error
            if member.issym() or member.islnk():
                work.found.links += 1
            elif member.isreg():
                yield member.name, member.size, CHUNK, lambda member=member: file.extractfile(member)
        # tarfile takes a damaged head, and the end of the file, for the end of the archive.
        file.fileobj.seek(file.offset)
        if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise Unreadable(f"broken (no member and no end at byte {file.offset:,})")
        _read_to_end(file.fileobj)


def _read_to_end(stream: "_Bounded") -> None:
    """The checksum of what was packed comes last."""
    try:
        while stream.read(CHUNK):
            stream.seek(stream.tell())
    except gzip.BadGzipFile as error:
        if not compat.is_after_gzip(error):
            raise


class _Bounded:
    """A tar's bytes, unpacked. tarfile reads heads in one piece and skips what is left out, however long they claim
    to be."""

    def __init__(self, file: BinaryIO, most: int):
        self._file, self._most = file, most

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= CHUNK:
            raise BadArchive(f"a head of {count:,} bytes: refused")
        return self._file.read(count)

    def seek(self, position: int, whence: int = 0) -> int:
        if position > self._most:
            raise BadArchive(f"more than {self._most:,} bytes when unpacked: it explodes")
        return self._file.seek(position, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class _Tar(tarfile.TarFile):
    """Closes what it reads from."""

    def close(self) -> None:
        super().close()
        self.fileobj.close()


def _open_tar(path: Path, most: int) -> tarfile.TarFile:
    with path.open("rb") as file:
        head = file.read(6)
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    opener = next((opener for magic, opener in openers.items() if head.startswith(magic)), open)
    stream = _Bounded(opener(path, "rb"), most)
    try:
        return _Tar(fileobj=stream, mode="r")
    except BaseException:
        stream.close()
        raise


def _check_link(name: str, target: str) -> None:
    depth = len(PurePosixPath(name).parts) - 1
    for part in PurePosixPath(target).parts:
        depth += -1 if part == ".." else 1
        if depth < 0 or part == "/":
            raise BadArchive(f"the link {name[:100]!r} leads out of its folder: refused")
