"""Adapters of LoRA from and to PEFT's folders.

PEFT keeps an A [rank, in] and a B [out, rank] for each linear layer of transformers' native Molmo2, in
adapter_model.safetensors, and what they mean in adapter_config.json (github.com/huggingface/peft, checked with 0.21.2).
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from molmo2_nemo import checkpoint_dir, lora_base
from molmo2_nemo.config.errors import ConfigError, refuse
from molmo2_nemo.config.lora import check_lora
from molmo2_nemo.config.schema import LORA_TARGETS, LoraConfig, OptimConfig, TrainConfig
from molmo2_nemo.hf.adapters import Adapted, adapted, of_layers
from molmo2_nemo.hf.convert import new_folder, read_adapters, write_checkpoint
from molmo2_nemo.hf.folder import is_there
from molmo2_nemo.model.new_adapters import random_a

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of all names in PEFT's file
# Fields of adapter_config.json with which an adapter is more than W + scale B A, unless they are false, empty or none.
_MORE = (
    "bias",
    "fan_in_fan_out",
    "use_dora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)


def export_adapter(checkpoint: Path, folder: Path, dtype: torch.dtype | None = None, base: Path | None = None) -> int:
    """Write the adapters of a checkpoint as a folder that PEFT loads. Returns how many linear layers have one.

    dtype: None keeps the checkpoint's. base: the weights that they belong to, if those were moved; PEFT's configuration
    names the folder that they were imported from. Raises ConfigError for a checkpoint without adapters, when `folder`
    exists, and when the disk lacks room or fails; then nothing is left of it.
    """
    marker, model = checkpoint_dir.read_marker(checkpoint), checkpoint_dir.read_model(checkpoint)
    lora = lora_base.lora_of(marker)
    if lora is None:
        raise ConfigError(f"checkpoint {checkpoint} holds all weights and no adapters: export it without --adapter.")
    if is_there(folder):
        raise ConfigError(f"{folder} exists: remove it or export to another folder.")
    name = base_name(checkpoint, base)
    matrices, tensors = adapted(model, lora), {}
    found = read_adapters(checkpoint, matrices, lora.rank)
    for one in matrices:
        for layer, both in of_layers(one, *(found[key] for key in one.keys())).items():
            for which, tensor in zip(("lora_A", "lora_B"), both):
                tensors[f"{PREFIX}{layer}.{which}.weight"] = tensor.to(dtype or tensor.dtype).contiguous().clone()
    with new_folder(folder, sum(tensor.nbytes for tensor in tensors.values()), "an adapter") as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        config = peft_config(lora, [layer for one in matrices for layer in one.layers], name)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        temporary.rename(folder)
    return len(tensors) // 2


def base_name(checkpoint: Path, base: Path | None = None) -> str | None:
    """The folder that the weights beside the adapters were imported from; None: they are not there to say so.

    Raises ConfigError where `base` is not what they are.
    """
    try:
        return checkpoint_dir.read_marker(lora_base.find_base(checkpoint, base)).get("source")
    except ConfigError:
        if base is not None:
            raise
        return None


def peft_config(lora: LoraConfig, layers: list[str], base: str | None) -> dict:
    """adapter_config.json. layers: native names of the linear layers; PEFT matches them whole by one expression, since
    their last names alone are those of the vision tower's, too."""
    kinds = sorted({re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(layer)) for layer in layers})
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": "|".join(kinds),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def read_peft(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(settings without targets, tensors by their names without PEFT's prefix) of a PEFT folder. Raises ConfigError."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{folder} is no adapter that PEFT has saved, with {CONFIG} and {WEIGHTS} ({str(error).splitlines()[0]}): "
            "give such a folder."
        ) from None
    kind = config.get("peft_type")
    refuse(kind != "LORA", f"{folder}/{CONFIG} has peft_type={kind}, not LORA: other adapters cannot be imported.")
    for field in _MORE:
        value = config.get(field)
        refuse(
            bool(value) and value != "none",
            f"{folder}/{CONFIG} has {field}={value}, which is more than an A and a B of one rank for each layer: merge "
            "the adapter with PEFT (merge_and_unload) and import the model.",
        )
    lora = LoraConfig(
        rank=config.get("r", 0),
        alpha=float(config.get("lora_alpha", 0)),
        dropout=float(config.get("lora_dropout", 0.0)),
        rslora=bool(config.get("use_rslora", False)),
        targets=[],
    )
    return lora, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def import_adapter(
    folder: Path, base: Path, checkpoint: Path, say: Callable[[str], None] = print, seed: int = TrainConfig.seed
) -> LoraConfig:
    """Write a checkpoint of the adapters in a PEFT folder, which belong to the weights of the checkpoint `base`.

    Linear layers of a target that PEFT has not adapted get an adapter that begins at zero, with an A drawn as that of a
    new run with this seed, and are counted. Raises ConfigError for what is no plain LoRA, and for adapters of another
    model.
    """
    model = checkpoint_dir.read_model(base)
    refuse(
        lora_base.lora_of(checkpoint_dir.read_marker(base)) is not None,
        f"{base} holds adapters alone: give the checkpoint of the weights that the adapters of {folder} belong to.",
    )
    lora, tensors = read_peft(folder)
    names = {name.rsplit(".lora_", 1)[0] for name in tensors}
    for target in LORA_TARGETS:
        one_target = LoraConfig(rank=max(1, lora.rank), targets=[target])
        if any(not names.isdisjoint(one.layers) for one in adapted(model, one_target)):
            lora.targets.append(target)
    matrices = adapted(model, lora)
    unknown = sorted(names - {layer for one in matrices for layer in one.layers})
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{folder} adapts {unknown[0]}{more}, which is none of"
            f" {', '.join(LORA_TARGETS)} of {base}: merge the adapter with PEFT and import the model."
        )
    check_lora(lora, model, OptimConfig())
    state, missing = {}, Counter()
    for one in matrices:
        a, b = _from_peft(one, lora.rank, tensors, folder, missing, seed)
        state.update(zip(one.keys(), (a, b)))
    if missing:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in missing.items())
        say(f"{missing.total()} linear layers had no adapter and begin with one that changes nothing: {kinds}")
    info = {"step": 0, "stage": "imported", "source": str(folder)}
    write_checkpoint(checkpoint, model, state, {}, info | {lora_base.KEY: lora_base.record(lora, base, checkpoint)})
    return lora


def _from_peft(one: Adapted, rank: int, tensors: dict[str, Tensor], folder: Path, missing: Counter, seed: int):
    """(A, B) of a matrix as our checkpoints have them. Raises ConfigError for one of another size."""
    parts, rows = [None] * len(one.matrix.parts), {}
    new = random_a(one.matrix, rank, seed).chunk(len(parts))
    for layer, part in one.layers.items():
        found = [tensors.get(f"{layer}.lora_{which}.weight") for which in "AB"]
        if None in (x if x is None else 0 for x in found):
            missing[re.sub(r"\.\d+\.", ".*.", layer)] += 1
            found = [new[part], torch.zeros(one.rows(layer), rank)]
        wanted = [(rank, one.matrix.columns), (one.rows(layer), rank)]
        for which, tensor, shape in zip("AB", found, wanted):
            refuse(
                tuple(tensor.shape) != shape,
                f"{folder}: {layer}.lora_{which} has the shape {tuple(tensor.shape)}, not {shape}: it is of another "
                "model or rank.",
            )
        parts[part], rows[layer] = found
    return torch.cat(parts), one.join(rows)
