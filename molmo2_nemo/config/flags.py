"""Options in the manner of argparse, such as --seq-length 36864, which other trainers have: what to write here instead.

The recipes are Hydra programs: their settings are KEY=VALUE. This module imports nothing that takes time.
"""

import dataclasses
import difflib
import functools

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config
from molmo2_nemo.paths import CONF_DIR

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
    "vit_lr": "optim.vit.lr",
    "vision_lr": "optim.vit.lr",
    "connector_lr": "optim.connector.lr",
    "aligner_lr": "optim.connector.lr",
    "llm_lr": "optim.llm.lr",
    "freeze_llm": "optim.llm.freeze",
    "freeze_vit": "optim.vit.freeze",
    "freeze_vision_tower": "optim.vit.freeze",
    "freeze_aligner": "optim.connector.freeze",
    "freeze_connector": "optim.connector.freeze",
    "beta1": "optim.adam_beta1",
    "beta2": "optim.adam_beta2",
    "hidden_size": "model.hidden_size",
    "num_layers": "model.num_layers",
    "cutoff_len": "data.seq_length",
    "lr_scheduler_type": "optim.decay",
    "lr_decay_style": "optim.decay",
    "recompute_granularity": "transformer.recompute_granularity",
    "use_distributed_optimizer": "ddp.use_distributed_optimizer",
    "save_total_limit": "train.keep_last",
    "dtype": "train.precision",
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
    "checkpoint": "train.init_from",
    "pretrained": "train.init_from",
    "model_name_or_path": "train.init_from",
    "num_workers": "data.num_workers",
    "workers": "data.num_workers",
    "grad_clip": "optim.clip_grad",
    "max_grad_norm": "optim.clip_grad",
    "seed": "train.seed",
    "model": "model",
    "hardware": "hardware",
}
RESUME = "for a run that goes on the same command with the same run_dir, for its weights alone train.init_from=FOLDER"
NO_LORA = "there is no LoRA here: freeze parts with optim.llm.freeze=true or optim.vit.freeze=true"
TRACKERS = "TensorBoard's files are always written, and train.wandb_project=NAME writes to Weights & Biases"
# Names for which there are several settings, or none, or a run does it by itself.
WORDS = {
    "fp16": "use train.precision=bf16, since fp16 is not trained in",
    "gradient_accumulation_steps": "use train.global_batch_size and train.micro_batch_size, from which it follows",
    **dict.fromkeys(("resume", "load", "resume_from_checkpoint"), RESUME),
    **dict.fromkeys(("num_train_epochs", "epochs"), "use train.max_steps, since a blend has no epochs"),
    **dict.fromkeys(("num_gpus", "gpus"), "start it as torchrun --nproc-per-node N recipes/..."),
    "nproc_per_node": "it goes before the recipe, torchrun --nproc-per-node N recipes/...",
    **dict.fromkeys(("nodes", "nnodes", "num_nodes"), "use torchrun --nnodes N, or sbatch --nodes=N slurm/..."),
    "deepspeed": "DeepSpeed is not used: hardware=h100_8 or parallel.* divide the model",
    **dict.fromkeys(("train_type", "finetuning_type", "lora_rank", "lora_alpha", "lora", "use_lora"), NO_LORA),
    **dict.fromkeys(("report_to", "wandb", "wandb_project_name"), TRACKERS),
    "min_lr": "use optim.min_lr_ratio, the part of each rate that is left at the end",
    **dict.fromkeys(("warmup_ratio", "lr_warmup_fraction"), "use optim.llm.warmup_steps and its siblings, in steps"),
    "packing": "rows are always packed: data.packing_buffer_size says how many samples wait",
    **dict.fromkeys(("attn_impl", "attn_implementation", "flash_attn"), "the attention kernel is chosen by the device"),
}
# Names that stand for several keys, and what a flag means that is there, or is false.
SEVERAL = dict.fromkeys(("lr", "learning_rate"), ("optim.vit.lr", "optim.connector.lr", "optim.llm.lr"))
SWITCHES = {
    "bf16": ("train.precision=bf16", "train.precision=fp32"),
    "fp8": ("train.precision=fp8", "train.precision=bf16"),
    "no_bf16": ("train.precision=fp32", "train.precision=bf16"),
    "gradient_checkpointing": (
        "transformer.recompute_granularity=selective",
        "transformer.recompute_granularity=null",
    ),
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
        are_settings = all("=" in word for one in wanted for word in one.split())
        text = f"use {' '.join(wanted)}" if are_settings else "; ".join(wanted)
        raise ConfigError(f"{' '.join(said)}: settings are written KEY=VALUE here, without dashes: {text}.")


def advice(flag: str, value: str) -> str:
    """What to write in the place of an option."""
    name = flag.lstrip("-").replace("-", "_").lower()
    if name in SWITCHES:
        return SWITCHES[name][value.lower() in ("false", "0", "no", "off")]
    if name in WORDS:
        return WORDS[name]
    if name in SEVERAL:
        return " ".join(f"{key}={value or 'VALUE'}" for key in SEVERAL[name])
    key = KEYS.get(name) or key_named(name)
    if key is not None:
        return f"{key}={shown(key, value)}"
    every = [*KEYS, *(path.rpartition(".")[2] for path in types_of_keys())]
    close = difflib.get_close_matches(name, every, n=1, cutoff=0.85)
    if close:
        key = KEYS.get(close[0]) or key_named(close[0])
        return f"perhaps use {key}={shown(key, value)}"
    return f"docs/settings.md has what is meant by {flag}, if anything"


def shown(key: str, value: str) -> str:
    """The value of a setting as it is written here; true for a switch that stands alone, VALUE for another key."""
    if key in ("model", "hardware"):
        known = {path.stem.replace("_", ""): path.stem for path in (CONF_DIR / key).glob("*.yaml")}
        value = known.get(value.lower().replace("-", "").replace("_", ""), value)
    is_switch = key == "ddp.use_distributed_optimizer" or types_of_keys().get(key) is bool
    return value or ("true" if is_switch else "VALUE")


def key_named(name: str) -> str | None:
    """The first key of the configuration that ends with this name; None: there is none."""
    return next((path for path in types_of_keys() if path == name or path.rpartition(".")[2] == name), None)


@functools.cache
def types_of_keys(cls: type = Config, before: str = "") -> dict[str, type]:
    """Dotted key -> type of all settings, those that a user changes before those of the model and of the schedule."""
    found = {}
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name in ("model", "schedule")):
        if dataclasses.is_dataclass(field.type):
            found |= types_of_keys(field.type, f"{before}{field.name}.")
        else:
            found[before + field.name] = field.type
    return found
