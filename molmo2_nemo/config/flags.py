"""Options in the manner of argparse, such as --seq-length 36864, which other trainers have: what to write here instead.

The recipes are Hydra programs: their settings are KEY=VALUE. This module imports nothing that takes time.
"""

import dataclasses
import difflib
from collections.abc import Iterator

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config

# Options of Hydra, and whether a value follows (https://hydra.cc/docs/advanced/hydra-command-line-flags/).
HYDRA = {
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"), False),
    **dict.fromkeys(("--multirun", "-m", "--shell-completion", "-sc"), False),
    **dict.fromkeys(("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"), True),
    **dict.fromkeys(("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"), True),
}
# Names in other trainers (Megatron-LM, transformers, torchtitan, allenai/molmo2, and the first design of this project)
# that are not the last word of a key here.
KEYS = {
    "lr": "optim.llm.lr",
    "learning_rate": "optim.llm.lr",
    "batch_size": "train.global_batch_size",
    "global_train_batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "device_batch_size": "train.micro_batch_size",
    "device_train_microbatch_size": "train.micro_batch_size",
    "micro_batch": "train.micro_batch_size",
    "seq_len": "data.seq_length",
    "max_seq_length": "data.seq_length",
    "max_seq_len": "data.seq_length",
    "max_length": "data.seq_length",
    "sequence_length": "data.seq_length",
    "frames": "data.max_frames",
    "num_frames": "data.max_frames",
    "fps": "data.max_fps",
    "steps": "train.max_steps",
    "train_iters": "train.max_steps",
    "train_steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "max_duration": "train.max_steps",
    "warmup": "optim.llm.warmup_steps",
    "warmup_steps": "optim.llm.warmup_steps",
    "lr_warmup_iters": "optim.llm.warmup_steps",
    "tp": "parallel.tensor_model_parallel_size",
    "tp_size": "parallel.tensor_model_parallel_size",
    "tensor_parallel_size": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "pp_size": "parallel.pipeline_model_parallel_size",
    "pipeline_parallel_size": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "cp_size": "parallel.context_parallel_size",
    "cp_degree": "parallel.context_parallel_size",
    "data_dir": "data.root",
    "data_path": "data.root",
    "data_root": "data.root",
    "dataset": "data.blend",
    "mixture": "data.blend",
    "output_dir": "run_dir",
    "out_dir": "run_dir",
    "save": "run_dir",
    "save_dir": "run_dir",
    "save_folder": "run_dir",
    "checkpoint_dir": "run_dir",
    "save_interval": "train.save_every",
    "save_steps": "train.save_every",
    "log_interval": "train.log_every",
    "logging_steps": "train.log_every",
    "eval_interval": "train.validate_every",
    "eval_steps": "train.validate_every",
    "load": "train.init_from",
    "checkpoint": "train.init_from",
    "pretrained": "train.init_from",
    "model_name_or_path": "train.init_from",
    "resume_from_checkpoint": "train.init_from",
    "num_workers": "data.num_workers",
    "workers": "data.num_workers",
    "grad_clip": "optim.clip_grad",
    "max_grad_norm": "optim.clip_grad",
    "seed": "train.seed",
    "model": "model",
    "hardware": "hardware",
}
# Names whose advice is in words: a run does these by itself, or in another way.
WORDS = {
    "bf16": "train.precision=bf16",
    "fp8": "train.precision=fp8",
    "fp16": "train.precision=bf16, since fp16 is not trained in",
    "gradient_checkpointing": "transformer.recompute_granularity=selective",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size, from which it follows",
    "resume": "the same command with the same run_dir: a run goes on by itself",
    "num_train_epochs": "train.max_steps, since a blend has no epochs",
    "epochs": "train.max_steps, since a blend has no epochs",
    "num_gpus": "torchrun --nproc-per-node N before the recipe",
    "gpus": "torchrun --nproc-per-node N before the recipe",
    "nproc_per_node": "it before the recipe, torchrun --nproc-per-node N recipes/...",
    "deepspeed": "hardware=h100_8 or parallel.*, since DeepSpeed is not used",
}


def refuse_flags(arguments: list[str]) -> None:
    """Raise ConfigError, one sentence with the settings to write instead, if there are options that Hydra has not."""
    takes_value, said, wanted = False, [], []
    for position, argument in enumerate(arguments):
        if takes_value:
            takes_value = False
            continue
        flag, _, value = argument.partition("=")
        if not flag.startswith("-") or flag.lstrip("-") == "" or flag[1:2].isdigit():
            continue
        if flag in HYDRA:
            takes_value = HYDRA[flag] and "=" not in argument
            continue
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        if "=" not in argument and following and not following.startswith("-") and "=" not in following:
            value = following
        said.append(argument if "=" in argument or not value else f"{flag} {value}")
        wanted.append(advice(flag, value))
    if said:
        text = f"use {' '.join(wanted)}" if all("=" in one and " " not in one for one in wanted) else "; ".join(wanted)
        raise ConfigError(f"{' '.join(said)}: settings are written KEY=VALUE here, without dashes: {text}.")


def advice(flag: str, value: str) -> str:
    """What to write in the place of an option."""
    name = flag.lstrip("-").replace("-", "_").lower()
    if name in WORDS:
        return WORDS[name] if "=" in WORDS[name] and " " not in WORDS[name] else f"use {WORDS[name]}"
    key = KEYS.get(name) or key_named(name)
    if key is not None:
        return f"{key}={shown(value)}"
    every = [*KEYS, *(path.rpartition(".")[2] for path in all_keys())]
    close = difflib.get_close_matches(name, every, n=1, cutoff=0.75)
    if close:
        return f"perhaps use {KEYS.get(close[0]) or key_named(close[0])}={shown(value)}"
    return f"docs/settings.md has what is meant by {flag}, if anything"


def shown(value: str) -> str:
    """The value of a setting; VALUE where the option has none."""
    return value if value else "VALUE"


def key_named(name: str) -> str | None:
    """The first key of the configuration that ends with this name; None: there is none."""
    return next((path for path in all_keys() if path == name or path.rpartition(".")[2] == name), None)


def all_keys(cls: type = Config, before: str = "") -> Iterator[str]:
    """Dotted keys of all settings, those that a user changes before those of the model and of the schedule."""
    fields = sorted(dataclasses.fields(cls), key=lambda field: field.name in ("model", "schedule"))
    for field in fields:
        if dataclasses.is_dataclass(field.type):
            yield from all_keys(field.type, f"{before}{field.name}.")
        else:
            yield before + field.name
