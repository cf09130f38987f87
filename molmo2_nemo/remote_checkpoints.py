"""Checkpoints in object storage: what is there, copies to there and from there, by the rules of checkpoint_dir.py.

    UPLOAD_TO/NAME/STAGE/checkpoints/     the folder of a run
        step_00001000/                    the same files as on disk; complete.json is written last and removed first
        best.json                         as on disk, of the best one that is there

A checkpoint without its marker is half an upload, and no function takes it. Each file is compared with the size and the
SHA-256 of the marker: an upload is read back, a download is read from the disk. storage.py does the transfers. Nothing
here needs a process group.
"""

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from molmo2_nemo import checkpoint_dir, storage
from molmo2_nemo.byte_progress import ByteProgress
from molmo2_nemo.checkpoint_dir import BEST, DAMAGED, MARKER, step_name
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config
from molmo2_nemo.files import disk_errors_told, missing_room, sha256_of, write_json
from molmo2_nemo.storage import StorageError, join, shown

# Files that are transferred at a time.
AT_ONCE = 8
# What a Hugging Face folder has, of a model or of adapters.
HUGGING_FACE = ("config.json", "adapter_config.json")
# In a folder that was fetched: sizes and versions of the objects that it is a copy of.
FETCHED = ".fetched.json"


class Damaged(ConfigError):
    """What came is not what was saved."""


class Half(ConfigError):
    """A checkpoint whose upload has not ended."""


@dataclass(frozen=True)
class Remote:
    """A whole checkpoint in object storage: its address without a slash at the end, and its marker."""

    address: str
    step: int
    marker: dict

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self.marker["files"].values())


def folder_of(config: Config) -> str | None:
    """The address of a run's checkpoints; None: they are on disk alone (train.upload_to)."""
    if config.train.upload_to is None:
        return None
    return join(config.train.upload_to, config.name, config.stage, "checkpoints")


# -- what is there ----------------------------------------------------------------------------------------------------


def listed(folder: str) -> dict[int, dict[str, storage.Object]]:
    """Files of each step_* folder below the address, whole or not, by step in ascending order. StorageError."""
    found = {}
    for path, entry in storage.list_files(folder).items():
        first, _, file = path.partition("/")
        if checkpoint_dir.is_name(first) and file:
            found.setdefault(int(first.removeprefix("step_")), {})[file] = entry
    return dict(sorted(found.items()))


def newest(folder: str, below: int | None = None) -> tuple[Remote | None, list[str], list[str]]:
    """The newest whole checkpoint at an address, and sentences on newer ones: damaged ones, and halves. StorageError.

    below: only those of earlier steps.
    """
    damaged, halves = [], []
    for step, files in reversed(listed(folder).items()):
        if below is not None and step >= below:
            continue
        try:
            return _whole(join(folder, step_name(step)), files), damaged, halves
        except StorageError:
            raise
        except Half as error:
            halves.append(str(error))
        except ConfigError as error:
            damaged.append(str(error))
    return None, damaged, halves


def resolve(address: str) -> Remote | None:
    """A checkpoint given by address: its folder, or a run or its folder of checkpoints (the newest one there).

    None: there is no checkpoint. StorageError; ConfigError where the one that was asked for is not whole.
    """
    address = address.rstrip("/")
    files = storage.list_files(address)
    if files and (MARKER in files or checkpoint_dir.is_name(storage.name(address))):
        return _whole(address, files)
    for folder in (join(address, "checkpoints"), address):
        found, damaged, halves = newest(folder)
        ignored = damaged + halves
        if ignored:
            whole = f" The newest that is whole is {shown(found.address)}: to take it, give its address."
            raise ConfigError(ignored[0] + (whole if found else ""))
        if found is not None:
            return found
    return None


def resolve_best(address: str) -> Remote:
    """The best checkpoint of a run, or of its folder of checkpoints, by address. StorageError, ConfigError."""
    for folder in (join(address, "checkpoints"), address):
        step = best(folder)
        if step is not None and (found := resolve(join(folder, step_name(step)))) is not None:
            return found
    raise ConfigError(f"--best: {shown(address)} has no best checkpoint: without --best the newest one is taken.")


def _whole(address: str, files: dict[str, storage.Object]) -> Remote:
    """The checkpoint there, of which these files were listed. ConfigError: it is not whole."""
    said = shown(address)
    if DAMAGED in files:
        raise ConfigError(f"checkpoint {said} was found damaged before ({DAMAGED} there says how).")
    if MARKER not in files:
        raise Half(f"checkpoint {said} has no {MARKER}: its upload has not ended.")
    marker = checkpoint_dir.parse_marker(storage.read(join(address, MARKER)).decode(errors="replace"), said)
    for name, size in marker["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ConfigError(f"checkpoint {said}: {MARKER} names the file {name}, which is outside of it.")
        if name not in files or files[name].size != size:
            state = f"has {files[name].size} bytes instead of {size}" if name in files else "is missing"
            raise ConfigError(f"checkpoint {said} is damaged: {name} {state}.")
    return Remote(address, marker["step"], marker)


def mark_damaged(address: str, damage: str) -> None:
    """Leave a note in a checkpoint that it is not to be used; without one where nothing can be written."""
    with contextlib.suppress(StorageError):
        storage.write(join(address, DAMAGED), f"{damage}\n".encode())


# -- to there ---------------------------------------------------------------------------------------------------------


def upload(path: Path, address: str, compare: bool = True, sent: Callable[[int], None] = lambda size: None) -> None:
    """Copy a whole checkpoint to an address; it is whole there when this returns.

    Files that an interrupted upload has left and that are right are kept. compare: read each file back for its SHA-256,
    else its size is compared alone. sent: gets the bytes of each file that has arrived. Raises StorageError;
    ConfigError and OSError where the checkpoint on disk is not whole, or not any more.
    """
    marker, text = checkpoint_dir.read_marker(path), (path / MARKER).read_bytes()
    sums, there = marker.get("sha256", {}), storage.list_files(address)
    sizes = {**marker["files"], MARKER: len(text)}
    if {name: entry.size for name, entry in there.items()} == sizes and storage.read(join(address, MARKER)) == text:
        return
    # The marker first: from here on it is half a checkpoint.
    for name in sorted(there, key=lambda name: name != MARKER):
        if name not in marker["files"]:
            storage.delete(join(address, name))

    def copy(name: str) -> None:
        size, target = marker["files"][name], join(address, name)
        sha256 = (sums.get(name) or sha256_of(path / name)) if compare else None
        if compare and name in there and there[name].size == size and storage.sha256_there(target, size) == sha256:
            return sent(size)
        storage.send(path / name, target, sha256, read_back=compare)
        sent(size)

    _at_once(copy, list(marker["files"]))
    target = join(address, MARKER)
    try:
        storage.send(text, target)
    except StorageError:
        with contextlib.suppress(StorageError), storage.patience(0.0):
            storage.delete(target)
        raise


def upload_folder(folder: Path, address: str, last: str, say: Callable[[str], None]) -> None:
    """Copy all files of a folder to an address, `last` at the end, and compare each there. StorageError, OSError."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    progress = ByteProgress(sum(sizes.values()), say, f"uploading to {shown(address)}")

    def copy(name: str) -> None:
        storage.send(files[name], join(address, name))
        progress.add(sizes[name])

    _at_once(copy, [name for name in files if name != last])
    if last in files:
        copy(last)


def prune(folder: str, newest_step: int, keep_last: int, keep_every: int, best_step: int | None) -> None:
    """Remove what need not be kept there now that the checkpoint of `newest_step` is whole there, as on disk.

    The best one by best.json there and the one of `best_step` stay; so does what is newer or damaged. Halves of earlier
    steps, of uploads that were interrupted, are removed. StorageError.
    """
    found = {step: files for step, files in listed(folder).items() if step <= newest_step}
    whole = [step for step, files in found.items() if MARKER in files and DAMAGED not in files]
    if newest_step not in whole:
        return
    halves = [step for step, files in found.items() if MARKER not in files]
    for step in halves + checkpoint_dir.surplus(whole, keep_last, keep_every, {best_step, best(folder)}):
        storage.delete_folder(join(folder, step_name(step)), first=(MARKER,))


def best(folder: str) -> int | None:
    """The step that best.json there names; None: there is none. StorageError."""
    try:
        return int(json.loads(storage.read(join(folder, BEST)))["step"])
    except (ValueError, KeyError, TypeError) as error:
        if storage.is_for_all(error):
            raise
        return None


def try_address(address: str) -> None:
    """List what is there, write a small object, read it back and remove it. Raises StorageError."""
    probe, content = join(address, f".probe_{uuid.uuid4().hex}"), b"of molmo2-nemo, to see whether it can be written"
    storage.list_files(address)  # as the start of a run does
    storage.write(probe, content)
    if storage.read(probe) != content:
        raise StorageError(f"{shown(probe)} does not come back as it was written.")
    storage.delete(probe)


# -- from there -------------------------------------------------------------------------------------------------------


def fetch(remote: Remote, target: Path, say: Callable[[str], None] = lambda line: None) -> None:
    """Copy a checkpoint to the folder `target`, which appears when all of it is there and compared.

    What an interrupted copy has left beside it is used, and so are files of a `target` that is not whole. Raises
    Damaged where a checksum is wrong, ConfigError for the disk, StorageError.
    """
    partial = target.with_name(f".{target.name}.fetched")
    for left in target.parent.glob(".step_*.fetched"):
        if left != partial:
            shutil.rmtree(left, ignore_errors=True)
    sums, said = remote.marker.get("sha256", {}), shown(remote.address)
    with disk_errors_told(target.parent, remote.size, "the copy of a checkpoint"):
        partial.mkdir(parents=True, exist_ok=True)
        there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        missing = missing_room(target.parent, remote.size - there, f"the copy of {said}")
        if missing is not None:
            raise ConfigError(missing)
        progress = ByteProgress(remote.size, say, f"fetching {said} to {target.parent}")

        def is_right(file: Path, name: str) -> bool:
            has_size = name in sums and file.is_file() and file.stat().st_size == remote.marker["files"][name]
            return has_size and sha256_of(file) == sums[name]

        def copy(name: str) -> None:
            file, size = partial / name, remote.marker["files"][name]
            file.parent.mkdir(parents=True, exist_ok=True)
            if is_right(file, name):
                return progress.add(size)
            if is_right(target / name, name):
                file.unlink(missing_ok=True)
                shutil.copy2(target / name, file)
                return progress.add(size)
            storage.download_file(join(remote.address, name), file)
            if name in sums and sha256_of(file) != sums[name]:
                file.unlink()
                raise Damaged(f"checkpoint {said} is damaged: {name} does not have the SHA-256 it was saved with.")
            progress.add(size)

        _at_once(copy, list(remote.marker["files"]))
        (partial / MARKER).write_text(json.dumps(remote.marker, indent=2) + "\n")
        checkpoint_dir.read_marker(partial)
        shutil.rmtree(target, ignore_errors=True)  # one that is not whole
        partial.rename(target)


def fetch_folder(
    address: str, target: Path, say: Callable[[str], None] = lambda line: None, without: tuple[str, ...] = ()
) -> None:
    """Copy the files right below an address, as of a Hugging Face model, to a folder. ConfigError, StorageError.

    A copy that is there is taken if no object has another size or version since. without: ends of names to leave out.
    """
    files = storage.list_files(address).items()
    files = {name: entry for name, entry in files if "/" not in name and not name.endswith(without)}
    if not files:
        raise ConfigError(f"there is nothing at {shown(address)}: name a checkpoint, a run, or a Hugging Face folder.")
    contents = {name: [entry.size, entry.version] for name, entry in sorted(files.items())}
    with contextlib.suppress(OSError, ValueError):
        if json.loads((target / FETCHED).read_text()) == contents:
            return
    size = sum(entry.size for entry in files.values())
    with disk_errors_told(target.parent, size, f"the copy of {shown(address)}"):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        missing = missing_room(target, size, f"the copy of {shown(address)}")
        if missing is not None:
            raise ConfigError(missing)
        progress = ByteProgress(size, say, f"fetching {shown(address)}")

        def copy(name: str) -> None:
            storage.download_file(join(address, name), target / name)
            progress.add(files[name].size)

        _at_once(copy, list(files))
        write_json(target / FETCHED, contents)


def local_copy(address: str, folder: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """A copy in `folder` of the checkpoint or the Hugging Face folder at an address; a local path is returned as it is.

    Of a run, its newest checkpoint. A copy that is there and still the same is taken. ConfigError, StorageError.
    """
    if not storage.is_remote(address):
        return Path(address)
    storage.check(address, "the address")
    remote = resolve(address)
    if remote is None:
        names = storage.list_files(address)
        if not any(name in names for name in HUGGING_FACE):  # else all of a folder of shards would be fetched
            raise ConfigError(
                f"there is no checkpoint at {shown(address)}, no run and no Hugging Face folder ({HUGGING_FACE[0]}):"
                " correct the address."
            )
        target = folder / hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16] / storage.name(address)
        fetch_folder(address, target, say)
        return target
    # Two runs may have checkpoints of the same step.
    target = folder / hashlib.sha256(remote.address.encode()).hexdigest()[:16] / step_name(remote.step)
    with contextlib.suppress(ConfigError):
        if checkpoint_dir.read_marker(target) == remote.marker:
            return target
    fetch(remote, target, say)
    return target


# -- transfers --------------------------------------------------------------------------------------------------------


def _at_once(do: Callable[[str], None], names: list[str]) -> None:
    """`do` each of these, AT_ONCE at a time; after an error those that have not begun are left out."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [pool.submit(do, name) for name in names]
        try:
            for one in waiting:
                one.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def written(target: str, scratch: Path, last: str, say: Callable[[str], None]) -> Iterator[Path]:
    """The folder to write to for a new folder at `target`, a local path or an address.

    For an address that is one in `scratch`, which is uploaded at the end, the file `last` as the last one. ConfigError:
    there is something at the address.
    """
    if not storage.is_remote(target):
        yield Path(target)
        return
    storage.check(target, "the address")
    if storage.list_files(target):
        raise ConfigError(f"{shown(target)} is there already: remove it or name another address.")
    folder = scratch / storage.name(target)
    yield folder
    upload_folder(folder, target, last, say)
