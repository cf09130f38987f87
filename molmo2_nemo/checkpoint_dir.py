"""A checkpoint as a directory: written under a temporary name, renamed when complete, and marked as complete.

    step_00001000/
        complete.json        marker, written last: step, stage, size and SHA-256 of every other file
        model.json           architecture
        config.yaml          resolved configuration (training checkpoints)
        .metadata *.distcp   Megatron's distributed checkpoint (PyTorch DCP files)
        loader_dp000.state   data loader state per data-parallel rank (training checkpoints)

Nothing here needs a process group.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, Required, TypedDict

from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, NonNegativeInt, TypeAdapter, ValidationError, with_config

from molmo2_nemo import compat
from molmo2_nemo.config.checks import check_sizes
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import ModelConfig, model_config_from_json, model_config_to_json
from molmo2_nemo.files import sha256_of, sha256_of_text, sync

MARKER = "complete.json"
MODEL = "model.json"
INDEX = ".metadata"
BEST = "best.json"  # beside the checkpoints of a run: the step of the best one, and its measurement
SEAL = "sha256 of this file"  # a key of the marker
DAMAGED = "damaged.txt"  # in a checkpoint of which a checksum was found wrong: what is wrong
# (module, names) of all that the pickled index of a checkpoint is made of, as torch 2.14.1 and megatron-core 0.19.2
# write it. Anything else is refused before it can run.
INDEX_CONTENT = {
    "pathlib": {"PosixPath"},
    "torch": {"Size", "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"}
    | {"float8_e4m3fn", "float8_e5m2"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem"}
    | {"WriteItemType"},
}


@with_config(ConfigDict(extra="allow", strict=True))
class Marker(TypedDict, total=False):
    """What is used of complete.json; those of imports and of older versions lack some of it."""

    step: Required[NonNegativeInt]
    files: Required[dict[str, NonNegativeInt]]  # bytes
    sha256: dict[str, str]
    tokens_seen: NonNegativeInt
    data: dict[str, dict[str, NonNegativeInt]]  # counts by source
    best: dict[str, Any]
    losses: list[float]


_MARKER = TypeAdapter(Marker)


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def is_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint's: step_ and digits."""
    return re.fullmatch(r"step_\d+", name) is not None


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def aside(final: Path) -> Path:
    """The temporary folder of a checkpoint that is being written; what an interrupted save left there is removed."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish(
    temporary: Path, final: Path, model: ModelConfig, info: dict, checksums: dict[str, str] | None = None
) -> None:
    """Write architecture and marker, flush everything to disk, and give the checkpoint its name.

    checksums: SHA-256 of files that are known already; the others are read for it. A checkpoint that has the name is
    removed once the new one has taken its place.
    """
    (temporary / MODEL).write_text(model_config_to_json(model))
    files = {str(path.relative_to(temporary)): path for path in sorted(temporary.rglob("*")) if path.is_file()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    sums = {name: (checksums or {}).get(name) or sha256_of(path) for name, path in files.items()}
    marker = sealed({**info, "files": sizes, "sha256": sums})
    (temporary / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def sealed(marker: dict) -> dict:
    """A marker with the SHA-256 of itself, so that damage to it is found, too."""
    marker = {key: value for key, value in marker.items() if key != SEAL}
    return marker | {SEAL: sha256_of_text(json.dumps(marker, sort_keys=True))}


def read_marker(path: Path) -> dict:
    """The marker of a complete checkpoint; of its files the sizes are checked. Raises ConfigError for anything missing,
    truncated or foreign."""
    if not path.is_dir():
        raise ConfigError(f"checkpoint {path} does not exist: give the path of a step_* directory.")
    if (path / DAMAGED).exists():
        raise ConfigError(
            f"checkpoint {path} was found damaged before ({path / DAMAGED} says how; remove that file once it is "
            "restored); use another step_* directory."
        )
    try:
        text = (path / MARKER).read_text()
    except (OSError, ValueError):
        text = ""
    marker = parse_marker(text, path)
    for name, size in marker["files"].items():
        found = _size(path / name)
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ConfigError(f"checkpoint {path} is damaged: {name} {state}; use another step_* directory.")
    _refuse_foreign_index(path / INDEX)
    return marker


def parse_marker(text: str, path: Path | str) -> dict:
    """The marker with this content of the checkpoint `path`, a folder or the address of one. Raises ConfigError."""
    try:
        marker = json.loads(text)
        _MARKER.validate_python(marker)
    except (ValueError, RecursionError) as error:
        problem = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        what = f" ({'.'.join(map(str, problem['loc']))}: {problem['msg']})" if problem else ""
        raise ConfigError(
            f"checkpoint {path} has no readable {MARKER}{what}: it is incomplete or not one of ours; use another "
            "step_* directory."
        ) from None
    # Markers of older versions have neither checksums nor a seal.
    if (SEAL in marker or "sha256" in marker) and marker != sealed(marker):
        raise ConfigError(f"checkpoint {path} is damaged: {MARKER} was changed; use another step_* directory.")
    step, name = marker["step"], os.path.basename(path)
    if is_name(name) and step != step_of(Path(name)):
        raise ConfigError(
            f"checkpoint {path} is damaged or was renamed: {MARKER} says step {step}; give it the name "
            f"{step_name(step)}, or use another step_* directory."
        )
    return marker


def _size(file: Path) -> int | None:
    """Bytes; None: there is no such file, or there cannot be one of this name."""
    try:
        return file.stat().st_size if file.is_file() else None
    except (OSError, ValueError):
        return None


def size_of(path: Path) -> int:
    """Bytes of a checkpoint's files by its marker; 0 for one that is not complete."""
    try:
        return sum(read_marker(path)["files"].values())
    except ConfigError:
        return 0


def is_complete(path: Path) -> bool:
    """Whether `read_marker` has nothing against it."""
    try:
        read_marker(path)
    except ConfigError:
        return False
    return True


def verify(path: Path, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a complete checkpoint with their checksums; with `parts` above 1, every so manieth file.

    Reads each file once. Checkpoints of older versions have no checksums: of those, sizes alone are checked. Raises
    ConfigError.
    """
    marker = read_marker(path)
    sums = marker.get("sha256", {})
    # The largest first and dealt in turn, so that the parts take about as long.
    names = sorted(sums, key=lambda name: (-marker["files"].get(name, 0), name))
    for name in names[part::parts]:
        try:
            found = sha256_of(path / name)
        except OSError as error:
            raise ConfigError(f"checkpoint {path} cannot be read: {error}; use another step_* directory.") from error
        if found != sums[name]:
            raise ConfigError(
                f"checkpoint {path} is damaged: {name} does not have the SHA-256 that it was saved with; use another "
                "step_* directory."
            )


def read_model(path: Path) -> ModelConfig:
    """The architecture a complete checkpoint was written with. Raises ConfigError."""
    read_marker(path)
    try:
        model = model_config_from_json((path / MODEL).read_text())
    except (OSError, ValueError, OmegaConfBaseException) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"checkpoint {path}: {MODEL} is not an architecture ({reason}); use another step_* directory."
        ) from error
    try:
        check_sizes(model)
    except ConfigError as error:
        raise ConfigError(f"checkpoint {path}: in {MODEL}, {error}") from None
    return model


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in INDEX_CONTENT.get(module, ()):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no part of one")
        return super().find_class(module, name)


@contextlib.contextmanager
def nothing_executed(checkpoint: Path) -> Iterator[None]:
    """While torch and Megatron load a checkpoint, its pickles are data: ConfigError for anything else in them.

    The index is read by `_IndexUnpickler`, and objects inside of .distcp files by torch.load(weights_only=True), for
    which torch has an environment variable.
    """
    from torch.distributed.checkpoint import CheckpointException

    name, other = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {key: os.environ.pop(key) for key in (name, other) if key in os.environ}
    os.environ[name] = "1"
    try:
        with compat.checkpoint_index_reader(lambda file: _IndexUnpickler(file).load()):
            yield
    except (pickle.UnpicklingError, CheckpointException) as error:  # the latter is a BaseException
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        foreign = [line for line in lines if "Unsupported" in line or "no part of one" in line]
        if foreign:
            raise ConfigError(
                f"checkpoint {checkpoint} holds something that is not data, and was not loaded ({foreign[0]}): it is "
                "not as it was saved; take another one."
            ) from error
        raise ConfigError(
            f"checkpoint {checkpoint} cannot be loaded ({lines[-1]}): it is damaged or of another model; "
            "use another one."
        ) from error
    finally:
        del os.environ[name]
        os.environ.update(before)


def _refuse_foreign_index(path: Path) -> None:
    """DCP stores its index as a pickle: read it once with nothing but DCP's own classes allowed."""
    try:
        with open(path, "rb") as file:
            _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise ConfigError(f"checkpoint {path.parent} has no {path.name}: use another step_* directory.") from None
    except Exception as error:  # a damaged pickle raises errors of any type
        raise ConfigError(
            f"checkpoint {path.parent}: {path.name} is not a checkpoint index ({error}); it was not loaded."
        ) from None


def find_checkpoints(folder: Path) -> list[Path]:
    """step_* directories of a run, oldest first, complete or not."""
    if not folder.is_dir():
        return []
    named = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in folder.iterdir()]
    return [p for match, p in sorted(((m, p) for m, p in named if m), key=lambda mp: int(mp[0].group(1)))]


def surplus(steps: list[int], keep_last: int, keep_every: int, best: Container[int | None]) -> list[int]:
    """Which of a run's whole checkpoints need not be kept; steps: of all of them, the oldest first."""
    return [step for step in steps[:-keep_last] if step not in best and (not keep_every or step % keep_every)]


def best(folder: Path) -> Path | None:
    """The best checkpoint of a run's folder of checkpoints, by train.save_best; None: there is none."""
    try:
        path = folder / step_name(int(json.loads((folder / BEST).read_text())["step"]))
        return path if path.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def resolve_best(path: str) -> Path:
    """The best checkpoint of a run directory or of its checkpoints folder. ConfigError: there is none."""
    given = Path(path)
    if (given / MARKER).exists() or is_name(given.name):
        raise ConfigError(f"--best chooses a checkpoint of a run, and {given} is one: leave out --best.")
    if not given.is_dir():
        raise ConfigError(f"--best: {given} is no folder: name a run, such as runs/mine.")
    found = best(given / "checkpoints") or best(given)
    if found is None:
        raise ConfigError(
            f"--best: {given} has no best checkpoint: train.save_best was null, or what it names was never measured;"
            " without --best the newest is taken, and a checkpoint by its path."
        )
    return found


def mark_damaged(path: Path, damage: str) -> None:
    """Leave a note in a checkpoint that it is not to be used; without one where nothing can be written."""
    with contextlib.suppress(OSError):
        (path / DAMAGED).write_text(damage + "\n")


def latest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a sentence for each newer one that was passed over."""
    return newest_usable(find_checkpoints(folder))


def newest_usable(checkpoints: list[Path]) -> tuple[Path | None, list[str]]:
    """The same among checkpoints in the order of their steps."""
    ignored = []
    for path in reversed(checkpoints):
        try:
            read_marker(path)
            return path, ignored
        except ConfigError as error:
            ignored.append(str(error))
    return None, ignored


def resolve(path: str) -> Path:
    """A checkpoint given by name: a step_* directory, a run directory or its checkpoints folder (the newest one).

    ConfigError where there is none, and where the newest is damaged: an older one has to be named, since it is not what
    was asked for.
    """
    given = Path(path)
    if (given / MARKER).exists() or is_name(given.name):
        return given
    for folder in (given / "checkpoints", given):
        newest, ignored = latest_complete(folder)
        if newest is not None and ignored:
            raise ConfigError(f"{ignored[0]} The newest that is whole is {newest}: to take it, give its path.")
        if newest is not None:
            return newest
        if ignored:
            raise ConfigError(ignored[0])
    if not given.is_dir():
        raise ConfigError(f"{given} is no folder: name a run, such as runs/mine, or a step_* directory of one.")
    raise ConfigError(f"{given} has no complete checkpoint: name a run that has saved one, or a step_* directory.")
