"""What a checkpoint of LoRA says of its adapters, and of the weights that they belong to, which it does not hold.

Its marker (checkpoint_dir.py) has a key `lora`: `settings`, those of LoraConfig, and `base`, the path of a checkpoint,
the same from the folder of the checkpoint itself, for runs that are moved, and the SHA-256 of its weights. Needs no
process group.
"""

import dataclasses
import json
import os
from pathlib import Path

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.config.errors import ConfigError, refuse
from molmo2_nemo.config.schema import LoraConfig
from molmo2_nemo.files import sha256_of, sha256_of_text

KEY = "lora"
# What changes the function of the adapters that were saved: it has to stay as it was. The dropout may change.
FIXED = ("rank", "alpha", "targets", "rslora")


def record(lora: LoraConfig, base: Path, checkpoint: Path) -> dict:
    """What the marker of `checkpoint` says under KEY of adapters beside the weights of `base`."""
    base = base.absolute()
    found = {
        "path": str(base),
        "from here": os.path.relpath(base, checkpoint.absolute()),
        "sha256": weights_sha256(base),
    }
    return {"settings": dataclasses.asdict(lora), "base": found}


def lora_of(marker: dict) -> LoraConfig | None:
    """The adapters of a checkpoint; None: it holds all weights."""
    if KEY not in marker:
        return None
    names = {field.name for field in dataclasses.fields(LoraConfig)}
    return LoraConfig(**{key: value for key, value in marker[KEY]["settings"].items() if key in names})


def weights_sha256(checkpoint: Path) -> str:
    """One SHA-256 for all files of tensors of a checkpoint, of the checksums that its marker has of them."""
    marker = checkpoint_dir.read_marker(checkpoint)
    names = sorted(name for name in marker["files"] if name.endswith(".distcp"))
    sums = marker.get("sha256", {})
    return sha256_of_text(json.dumps([[name, sums.get(name) or sha256_of(checkpoint / name)] for name in names]))


def find_base(checkpoint: Path, given: Path | None = None) -> Path:
    """The checkpoint of the weights that the adapters of `checkpoint` belong to.

    given: where it is now, if it was moved. Raises ConfigError where it is not there or has other weights.
    """
    base = checkpoint_dir.read_marker(checkpoint)[KEY]["base"]
    places = [given] if given is not None else [Path(base["path"]), checkpoint / base["from here"]]
    found = next((place for place in places if (place / checkpoint_dir.MARKER).is_file()), None)
    if found is None:
        raise ConfigError(
            f"checkpoint {checkpoint} holds adapters alone, and the weights that they belong to are not at "
            f"{places[0]}: put that checkpoint back, or name the place where it is with --base."
        )
    refuse_other_base(checkpoint, found)
    return found


def refuse_other_base(checkpoint: Path, base: Path) -> None:
    """Raise ConfigError unless the adapters of `checkpoint` were trained beside the weights of `base`."""
    expected = checkpoint_dir.read_marker(checkpoint)[KEY]["base"]
    if weights_sha256(base) != expected["sha256"]:
        raise ConfigError(
            f"checkpoint {checkpoint} holds adapters of other weights than those of {base} (they differ in their "
            f"SHA-256): give those that it was trained with, {expected['path']}."
        )


def refuse_other_adapters(checkpoint: Path, lora: LoraConfig) -> None:
    """Raise ConfigError unless a run with these settings can go on with the checkpoint's weights."""
    saved = lora_of(checkpoint_dir.read_marker(checkpoint))
    if saved is None:
        refuse(
            lora.rank > 0,
            f"checkpoint {checkpoint} holds all weights and no adapters, but lora.rank={lora.rank}: start a new run "
            f"with another run_dir and train.init_from={checkpoint}.",
        )
        return
    refuse(
        lora.rank == 0,
        f"checkpoint {checkpoint} holds adapters alone, but lora.rank=0: set lora.rank={saved.rank}, or export it with "
        "tools/export_hf.py and start from the folder that this makes.",
    )
    for key in FIXED:
        had, has = getattr(saved, key), getattr(lora, key)
        differ = set(had) != set(has) if key == "targets" else had != has
        if differ:
            value = f"[{','.join(had)}]" if key == "targets" else str(had).lower()
            raise ConfigError(
                f"checkpoint {checkpoint} has adapters with lora.{key}={value}, this run has {has}: set lora.{key}="
                f"{value}, or begin with other adapters in another run_dir."
            )
