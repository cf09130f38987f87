"""Files that are either whole or not there: atomic writing, locks between processes, checksums.

Content is written to a partial file beside the final name, which is then renamed, so that no reader meets half of it,
whatever was killed on the way. What has to survive a power failure is flushed to the disk (fsync) before it is renamed.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import filelock

from molmo2_nemo.config.errors import ConfigError

# Errors of the disk, in contrast to those of the network or of one file's content: they end a whole run.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
# What a file system answers that has no locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


# What creating a folder answers where its path leads through a file, or nowhere.
PATH_ERRORS = {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}


class LockHeld(Exception):
    """Another process holds the lock."""


def is_disk_error(error: BaseException) -> bool:
    """Whether the disk is full, read-only, broken or not permitted."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def readable_size(size: int) -> str:
    """Bytes in the largest binary unit of which there is one: "12.3 GiB"."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    power = max(0, min(len(units) - 1, (int(size).bit_length() - 1) // 10))
    return f"{size / 2 ** (10 * power):,.1f} {units[power]}" if power else f"{size} bytes"


def bytes_of(text: str) -> int:
    """The number of bytes that a text such as 500GB, 1.5 TB or 64MiB says. ValueError: it says none, or not above 0.

    As users mean it, KiB and KB are both 1,000 bytes.
    """
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)I?B?", str(text).strip().upper())
    try:
        value = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{text} is not a size like 500GB or 1TB") from None
    if value <= 0:
        raise ValueError(f"{text} is not above 0")
    return value


def free_bytes(folder: Path) -> int:
    """Free on the disk that holds the folder, or will hold it once it is made. Raises OSError."""
    folder = Path(folder).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def missing_room(folder: Path, needed: int, what: str) -> str | None:
    """A sentence if the folder's disk has less than `needed` bytes free for `what`, else None. Raises OSError."""
    free = free_bytes(folder)
    return None if free >= needed else _missing(folder, needed, what, free)


def _missing(folder: Path, needed: int, what: str, free: int) -> str:
    return (
        f"{what} needs {readable_size(needed)}, {folder} has {readable_size(free)} free, "
        f"{readable_size(needed - free)} are missing: make room or choose another folder."
    )


def disk_error_behind(error: BaseException | None) -> OSError | None:
    """The error of the disk that another one comes from; None: there is none.

    Libraries wrap it (torch) or only quote its number, as Rust prints it (safetensors).
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS | PATH_ERRORS:
            return error
        if (quoted := re.search(r"\(os error (\d+)\)", str(error))) and int(quoted[1]) in DISK_ERRORS:
            return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def disk_errors_told(folder: Path, needed: int, what: str) -> Iterator[None]:
    """While `what`, of `needed` bytes, is written into `folder`: ConfigError in one sentence for an error of the disk.

    The body removes what it has written before it passes the error on, so that what is missing can be said.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        cause = disk_error_behind(error)
        if cause is None:
            raise
        code, advice = cause.errno, "name another folder."
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = free_bytes(folder)
            advice = _missing(folder, needed, what, free)
            if free >= needed:
                advice = (
                    f"{what} needs {readable_size(needed)}, and {readable_size(free)} are free: look at your quota, "
                    "the inodes (df -i) and ulimit -f."
                )
        elif code in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = "name a folder that you may write to."
        elif code == errno.EIO:
            advice = "repair the disk or name a folder on another one."
        raise ConfigError(f"{folder} cannot be written ({cause.strerror}); {advice}") from error


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk. Folders are left alone where the file system cannot flush them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a small file so that it holds either its old or all of its new content, and is on the disk afterwards.

    Text is written as UTF-8. Folders that are missing are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value, sort_keys: bool = False) -> None:
    """`write_atomically` of a value as indented JSON."""
    write_atomically(path, json.dumps(value, indent=1, sort_keys=sort_keys) + "\n")


def publish(partial: Path, path: Path, durable: bool = True) -> None:
    """Give a file that is whole its final name, and replace what has that name.

    durable: flush it to the disk first. Without, a power failure may leave an empty file under the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if durable:
        sync(partial)
    partial.replace(path)


@contextlib.contextmanager
def published(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A new folder to write to, which gets the name `folder` when all went well and is removed otherwise.

    replace: a folder of this name is removed then. ValueError: without it, `folder` holds something already, or another
    process was faster; or nothing can be written there.
    """
    folder = Path(folder).absolute()
    if not replace and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: remove it or choose another folder.")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}): choose another folder.") from error
    try:
        yield partial
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise ValueError(f"{folder} was made by another process in the meantime; its content stays.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file. LockHeld: another process holds it, and `wait` is off.

    The kernel releases the lock when its holder ends, even if it is killed; processes that the holder forks do not keep
    it. The file stays. On a file system without locks nothing is locked: there, users must not start two runs at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not filelock's own substitute for missing locks, which outlives a holder that is killed.
    lock = filelock.FileLock(path, blocking=wait, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise LockHeld(f"{path} is locked by another process: wait for its end, or stop it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, in hexadecimal digits; half of a surrogate pair is encoded as it is."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
