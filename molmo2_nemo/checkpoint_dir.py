"""A checkpoint as a directory: written under a temporary name, renamed when complete, and marked as complete.

    step_00001000/
        complete.json        marker, written last: step, stage, size of every other file
        model.json           architecture
        config.yaml          resolved configuration (training checkpoints)
        .metadata *.distcp   Megatron's distributed checkpoint (PyTorch DCP files)
        loader_dp000.state   data loader state per data-parallel rank (training checkpoints)

Nothing here needs a process group.
"""

import json
import pickle
import re
import shutil
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from molmo2_nemo.config.checks import check_sizes
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import ModelConfig, model_config_from_json, model_config_to_json
from molmo2_nemo.files import sync

MARKER = "complete.json"
MODEL = "model.json"
# What DCP's own metadata is made of. Anything else in that pickle is refused before it can run.
_METADATA_MODULES = ("torch.distributed.checkpoint", "torch", "collections", "megatron.core.dist_checkpointing")
_METADATA_BUILTINS = {"set", "frozenset", "slice", "dict", "list", "tuple", "getattr"}


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def aside(final: Path) -> Path:
    """The temporary folder of a checkpoint that is being written; what an interrupted save left there is removed."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish(temporary: Path, final: Path, model: ModelConfig, info: dict) -> None:
    """Write architecture and marker, flush everything to disk, and give the checkpoint its name."""
    (temporary / MODEL).write_text(model_config_to_json(model))
    sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
    (temporary / MARKER).write_text(json.dumps({**info, "files": sizes}, indent=2) + "\n")
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)


def read_marker(path: Path) -> dict:
    """The marker of a complete checkpoint. Raises ConfigError for anything missing, truncated or foreign."""
    if not path.is_dir():
        raise ConfigError(f"checkpoint {path} does not exist: give the path of a step_* directory.")
    try:
        marker = json.loads((path / MARKER).read_text())
        files = marker["files"].items()
    except (OSError, ValueError, KeyError, AttributeError):
        raise ConfigError(
            f"checkpoint {path} has no readable {MARKER}: it is incomplete or not one of ours; use another step_* "
            "directory."
        ) from None
    for name, size in files:
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ConfigError(f"checkpoint {path} is damaged: {name} {state}; use another step_* directory.")
    _refuse_foreign_pickle(path / ".metadata")
    return marker


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


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        allowed = any(module == m or module.startswith(m + ".") for m in _METADATA_MODULES)
        if not allowed and not (module == "builtins" and name in _METADATA_BUILTINS) and module != "pathlib":
            raise pickle.UnpicklingError(f"{module}.{name}")
        if module == "torch" and name not in {
            "Size",
            "dtype",
            "device",
            "float32",
            "bfloat16",
            "float16",
            "int64",
            "int32",
            "uint8",
            "bool",
            "float64",
            "strided",
            "contiguous_format",
            "preserve_format",
        }:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _refuse_foreign_pickle(path: Path) -> None:
    """DCP stores its index as a pickle: read it once with nothing but DCP's own classes allowed."""
    try:
        with open(path, "rb") as file:
            _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise ConfigError(f"checkpoint {path.parent} has no {path.name}: use another step_* directory.") from None
    except Exception as error:
        raise ConfigError(
            f"checkpoint {path.parent}: {path.name} is not a checkpoint index ({error}); it was not loaded."
        ) from None


def find_checkpoints(folder: Path) -> list[Path]:
    """step_* directories of a run, oldest first, complete or not."""
    if not folder.is_dir():
        return []
    named = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in folder.iterdir()]
    return [p for match, p in sorted(((m, p) for m, p in named if m), key=lambda mp: int(mp[0].group(1)))]


def latest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a sentence for each newer one that was passed over."""
    ignored = []
    for path in reversed(find_checkpoints(folder)):
        try:
            read_marker(path)
            return path, ignored
        except ConfigError as error:
            ignored.append(str(error))
    return None, ignored


def resolve(path: str) -> Path:
    """A checkpoint given by name: a step_* directory, a run directory or its checkpoints folder (newest complete)."""
    given = Path(path)
    if (given / MARKER).exists() or re.fullmatch(r"step_\d+", given.name):
        return given
    for folder in (given / "checkpoints", given):
        newest, _ = latest_complete(folder)
        if newest is not None:
            return newest
    read_marker(given)  # raises with the reason
    return given
