"""Reading a Hugging Face folder that may be damaged, half downloaded or malicious: config.json and safetensors.

What is wrong ends in a ConfigError that names the file. Nothing is unpickled, no code of the folder is run, and no
file outside of it is opened, but for the targets of links (the Hub's cache consists of them).
"""

import codecs
import json
import math
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from molmo2_nemo.config.checks import MAX_LAYERS, MAX_SIZE
from molmo2_nemo.config.errors import ConfigError, refuse

CONFIG_FILE, MODEL_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Codes of quantised weights; integers of more bits are also found in buffers.
_QUANTISED_DTYPES = re.compile(r"[FIU][1-8](_.*)?")
# Tensors beside codes: FP8, compressed-tensors, GPTQ and AWQ, bitsandbytes. SigLIP's logit_scale is none.
_QUANTISED_NAMES = re.compile(
    r"(?<!logit)_scale(_inv|_\d)?$|_zero_point$|\.(scales?|q?zeros|qweight|g_idx|SCB|weight_packed|(nested_)?absmax|"
    r"(nested_)?quant_map|quant_state\..*)$"
)
_GIT_LFS = b"version https://git-lfs"
# Numbers of config.json that decide how much is built, wherever in it they are.
_SIZES = {
    "num_hidden_layers": MAX_LAYERS,
    "hidden_size": MAX_SIZE,
    "text_hidden_size": MAX_SIZE,
    "intermediate_size": MAX_SIZE,
    "num_attention_heads": MAX_SIZE,
    "num_key_value_heads": MAX_SIZE,
    "head_dim": MAX_SIZE,
    "vocab_size": MAX_SIZE,
    "patch_size": MAX_SIZE,
    "image_patch_size": MAX_SIZE,
    "image_size": MAX_SIZE,
    "image_default_input_size": MAX_SIZE,
    "num_channels": MAX_SIZE,
    "max_position_embeddings": MAX_SIZE,
}
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "rope_theta", "initializer_range")


def is_there(path: Path) -> bool:
    """Whether the folder has an entry of that name, of whatever kind. ConfigError: one may not look."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from None
    return True


def _unreadable(path: Path, error: OSError) -> ConfigError:
    allowed = not isinstance(error, PermissionError)
    advice = "look at its disk, or download it again" if allowed else "give this user the right to read it"
    return ConfigError(f"{path} cannot be read ({error.strerror}): {advice}.")


def refuse_unusable(path: Path) -> None:
    """Raise ConfigError unless the path is a file with something in it, that can be read and is no Git LFS pointer."""
    try:
        kind = path.stat().st_mode
        refuse(not stat.S_ISREG(kind), f"{path} is {_kind(kind)}, not a file: download the model again.")
        with path.open("rb") as file:
            start = file.read(len(_GIT_LFS))
    except FileNotFoundError:
        gone = f"is a link to {path.readlink()}, which does not exist" if path.is_symlink() else "does not exist"
        raise ConfigError(f"{path} {gone}: download the model again.") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    refuse(not start, f"{path} is empty: download it again.")
    refuse(
        start == _GIT_LFS,
        f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in {path.parent}, or download the model "
        "with hf download.",
    )


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ConfigError."""
    refuse_unusable(path)
    try:
        data = path.read_bytes()
        refuse(
            data.startswith(codecs.BOM_UTF8),
            f"{path} begins with a byte order mark, which transformers refuses, too: save it as UTF-8 without one.",
        )
        value = json.loads(data.decode())
    except ConfigError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}): save it as UTF-8 or download it again.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON ({error}): download it again.") from None
    refuse(not isinstance(value, dict), f"{path} holds a {type(value).__name__}, not a JSON object: download it again.")
    return value


def read_config(folder: Path) -> dict:
    """config.json of a model that is not quantised, with sizes that can be. Raises ConfigError."""
    path = folder / CONFIG_FILE
    if not is_there(path):
        raise ConfigError(f"{folder} {_instead_of_a_model(folder)}")
    config = read_json(path)
    _check_numbers(path, config, "")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            method = found.get("quant_method", "?") if isinstance(found, dict) else found
            raise ConfigError(
                f"{path} says that the weights are quantised ({method}): training needs F32, BF16 or F16; download the "
                "model's release that is not quantised."
            )
    return config


def _instead_of_a_model(folder: Path) -> str:
    """What a folder without config.json is, and what to do."""
    if is_there(folder / "adapter_config.json"):
        return "holds adapters alone: name the folder of a whole model."
    if is_there(folder / "checkpoints") or is_there(folder / "complete.json"):
        return f"is a run or a checkpoint: python tools/export_hf.py {folder} OUT makes the folder to name."
    if not is_there(folder):
        return "does not exist: name a Hugging Face model folder."
    return "has no config.json: name a Hugging Face model folder."


def _check_numbers(path: Path, part: dict, where: str) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and where.count(".") < 10:
            _check_numbers(path, value, f"{where}{key}.")
        elif key in _SIZES and value is not None:
            numbers = value if isinstance(value, list) else [value]
            good = numbers and all(type(number) is int and 1 <= number <= _SIZES[key] for number in numbers)
            most = _SIZES[key]
            refuse(not good, f"{path}: {where}{key}={value!r:.60} is no whole number from 1 to {most:,}: correct it.")
        elif key in _POSITIVE and value is not None:
            good = type(value) in (int, float) and 0 < value < math.inf
            refuse(not good, f"{path}: {where}{key}={value!r:.60} is no positive number: correct it.")


def parsed(folder: Path, config_class: type, config: dict):
    """transformers' configuration object. Raises ConfigError for what its class refuses."""
    try:
        return config_class.from_dict(config)
    except Exception as error:  # transformers' own, those of its data classes, and Python's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ConfigError(
            f"{folder / CONFIG_FILE} is refused by transformers ({': '.join(lines[:2])}): correct it or download it "
            "again."
        ) from error


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is, and what its file's header says of it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class HuggingFaceWeights:
    """Tensors of a Hugging Face folder by name, read when asked for. Safetensors only: nothing is unpickled.

    Like transformers, it takes model.safetensors where there is one, and the index of shards only otherwise. Raises
    ConfigError for files that are missing, damaged or quantised: all headers are read at the beginning.
    """

    def __init__(self, folder: Path):
        self.folder, self.tensors = folder, {}
        if is_there(folder / MODEL_FILE):
            self.tensors = self._header(MODEL_FILE)
        elif is_there(folder / INDEX_FILE):
            weight_map = self._weight_map()
            for file in sorted(set(weight_map.values())):
                header = self._header(file)
                for name in (name for name, given in weight_map.items() if given == file):
                    refuse(
                        name not in header,
                        f"{folder / INDEX_FILE} says that {name} is in {file}, but it is not: download both again.",
                    )
                    self.tensors[name] = header[name]
        else:
            raise ConfigError(
                f"{folder} has neither {MODEL_FILE} nor {INDEX_FILE}: only safetensors are read, never pickles."
            )
        self._refuse_quantised()

    def _weight_map(self) -> dict[str, str]:
        index = self.folder / INDEX_FILE
        found = read_json(index).get("weight_map")
        refuse(
            not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()),
            f"{index} has no weight_map from tensors to files: download it again.",
        )
        for file in sorted(set(found.values())):
            refuse(
                Path(file).name != file or "\\" in file or "\0" in file or not file.endswith(".safetensors"),
                f"{index} names {file!r}, which is no safetensors file of its folder: it is not read.",
            )
            refuse(
                not is_there(self.folder / file),
                f"{index} names {file}, which is not there: download it, or the model again.",
            )
        return found

    def _header(self, name: str) -> dict[str, _Stored]:
        path = self.folder / name
        refuse_unusable(path)
        try:
            with safe_open(path, "pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}
                return {key: _Stored(name, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} is cut off or no safetensors file ({error}): download it again.") from error

    def _refuse_quantised(self) -> None:
        for name, stored in self.tensors.items():
            if _QUANTISED_DTYPES.fullmatch(stored.dtype) or _QUANTISED_NAMES.search(name):
                raise ConfigError(
                    f"{self.folder / stored.file} holds quantised weights ({name} is {stored.dtype}): training needs "
                    "F32, BF16 or F16; download the model's release that is not quantised."
                )

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows alone. Raises KeyError for a tensor that the folder does not have, ConfigError
        for one that cannot be read."""
        return self._read(name, lambda file: file.get_tensor(name) if rows is None else file.get_slice(name)[rows])

    @property
    def rows(self) -> dict[str, int]:
        """First dimension of each tensor; 0 of one without dimensions."""
        return {name: (*stored.shape, 0)[0] for name, stored in self.tensors.items()}

    def _read(self, name: str, read: Callable) -> Tensor:
        path = self.folder / self.tensors[name].file
        try:
            with safe_open(path, "pt") as file:
                return read(file)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: {name} cannot be read ({error}): download it again.") from error

    def shape_of(self, name: str, rows: slice | None = None) -> Tensor:
        """A meta tensor of the right shape and type: it takes no memory. Raises KeyError, and ConfigError for types
        that are no weights. rows: as in __call__."""
        stored = self.tensors[name]
        refuse(
            stored.dtype not in _DTYPES,
            f"{self.folder / stored.file}: {name} is {stored.dtype}, and only {', '.join(_DTYPES)} are read: "
            "convert the model or download another release.",
        )
        tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype], device="meta")
        return tensor if rows is None else tensor[rows]

    def refuse_more_layers(self, prefixes: tuple[str, ...], number: int) -> None:
        """Raise ConfigError if there are more than `number` layers: tensors whose names begin with a prefix and N."""
        pattern = re.compile(f"({'|'.join(map(re.escape, prefixes))})" + r"(\d{1,9})\.")
        found = 1 + max((int(match[2]) for name in self.tensors if (match := pattern.match(name))), default=-1)
        refuse(
            found > number,
            f"{self.folder / CONFIG_FILE} says num_hidden_layers={number}, but the weights have {found} layers: "
            "download both again.",
        )


def has_weights(folder: Path) -> bool:
    """Whether the folder has safetensors, readable or not, and not only a configuration."""
    return is_there(folder / MODEL_FILE) or is_there(folder / INDEX_FILE)


def first(path: Path, part: dict, key: str) -> Any:
    """The first of the whole numbers under a key; None without the key. Raises ConfigError."""
    value = part.get(key)
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [value]
    good = numbers and all(type(number) is int and 0 <= number <= MAX_SIZE for number in numbers)
    refuse(not good, f"{path}: {key}={value!r:.60} is no list of whole numbers: correct it or download it again.")
    return numbers[0]
