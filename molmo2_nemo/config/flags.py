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
# Names in other trainers that are not the last word of a key here, or of several: Megatron-LM (megatron/training/
# arguments.py), transformers' TrainingArguments, torchtitan, LLaMA-Factory, ms-swift, launch_scripts/ of
# allenai/molmo2, and the first design of this project.
KEYS = {
    "vit_lr": "optim.vit.lr",
    "vision_lr": "optim.vit.lr",
    "connector_lr": "optim.connector.lr",
    "aligner_lr": "optim.connector.lr",
    "llm_lr": "optim.llm.lr",
    "lora_rank": "lora.rank",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_rslora": "lora.rslora",
    "freeze_llm": "optim.llm.freeze",
    "freeze_vit": "optim.vit.freeze",
    "freeze_vision": "optim.vit.freeze",
    "freeze_vision_tower": "optim.vit.freeze",
    "freeze_aligner": "optim.connector.freeze",
    "freeze_connector": "optim.connector.freeze",
    "beta1": "optim.adam_beta1",
    "beta2": "optim.adam_beta2",
    "freeze_lm": "optim.llm.freeze",
    "freeze_language_model": "optim.llm.freeze",
    "freeze_multi_modal_projector": "optim.connector.freeze",
    "freeze_projector": "optim.connector.freeze",
    "hidden_size": "model.hidden_size",
    "num_layers": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_attention_heads",
    "num_key_value_heads": "model.num_query_groups",
    "head_dim": "model.head_dim",
    "kv_channels": "model.head_dim",
    "ffn_hidden_size": "model.ffn_hidden_size",
    "intermediate_size": "model.ffn_hidden_size",
    "layernorm_epsilon": "model.layernorm_epsilon",
    "norm_epsilon": "model.layernorm_epsilon",
    "rms_norm_eps": "model.layernorm_epsilon",
    "rotary_base": "model.rope_theta",
    "init_method_std": "model.init_std",
    "img_h": "model.vision.image_size",
    "img_w": "model.vision.image_size",
    "patch_dim": "model.vision.patch_size",
    "adam_epsilon": "optim.adam_eps",
    "wd": "optim.weight_decay",
    "cutoff_len": "data.seq_length",
    "lr_scheduler_type": "optim.decay",
    "lr_decay_style": "optim.decay",
    "recompute_granularity": "transformer.recompute_granularity",
    "recompute_method": "transformer.recompute_method",
    "recompute_num_layers": "transformer.recompute_num_layers",
    "tp_comm_overlap": "transformer.tp_comm_overlap",
    "use_distributed_optimizer": "ddp.use_distributed_optimizer",
    "overlap_grad_reduce": "ddp.overlap_grad_reduce",
    "overlap_param_gather": "ddp.overlap_param_gather",
    "ddp_bucket_size": "ddp.bucket_size",
    "save_total_limit": "train.keep_last",
    "save_num_checkpoints_to_keep": "train.keep_last",
    "save_retain_interval": "train.keep_every",
    "async_save": "train.async_checkpoint",
    "save_overwrite": "train.start_over",
    "overwrite_output_dir": "train.start_over",
    "dtype": "train.precision",
    "torch_dtype": "train.precision",
    "mixed_precision": "train.precision",
    "mixed_precision_param": "train.precision",
    "local_batch_size": "train.micro_batch_size",
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
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "train_iters": "train.max_steps",
    "max_train_steps": "train.max_steps",
    "total_steps": "train.max_steps",
    "train_steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "max_duration": "train.max_steps",
    "warmup_ratio": "optim.warmup_share",
    "lr_warmup_fraction": "optim.warmup_share",
    "warmup": "optim.llm.warmup_steps",
    "warmup_steps": "optim.llm.warmup_steps",
    "lr_warmup_iters": "optim.llm.warmup_steps",
    "lr_warmup_steps": "optim.llm.warmup_steps",
    "num_warmup_steps": "optim.llm.warmup_steps",
    "video_fps": "data.max_fps",
    "video_maxlen": "data.max_frames",
    "fps_max_frames": "data.max_frames",
    "nframes": "data.max_frames",
    "buffer_size": "data.shuffle_buffer_size",
    "data_seed": "data.seed",
    "tokenizer_model": "data.tokenizer",
    "tokenizer_name": "data.tokenizer",
    "tokenizer_name_or_path": "data.tokenizer",
    "tp": "parallel.tensor_model_parallel_size",
    "tp_size": "parallel.tensor_model_parallel_size",
    "tensor_parallel_size": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "pp_size": "parallel.pipeline_model_parallel_size",
    "pipeline_parallel_size": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
    "cp_size": "parallel.context_parallel_size",
    "cp_degree": "parallel.context_parallel_size",
    "context_parallel_degree": "parallel.context_parallel_size",
    "tensor_parallel": "parallel.tensor_model_parallel_size",
    "tensor_parallel_degree": "parallel.tensor_model_parallel_size",
    "pipeline_parallel": "parallel.pipeline_model_parallel_size",
    "pipeline_parallel_degree": "parallel.pipeline_model_parallel_size",
    "vpp": "parallel.virtual_pipeline_model_parallel_size",
    "vpp_size": "parallel.virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers": "parallel.num_layers_in_first_pipeline_stage",
    "decoder_last_pipeline_num_layers": "parallel.num_layers_in_last_pipeline_stage",
    "data_dir": "data.root",
    "data_path": "data.root",
    "data_root": "data.root",
    "dataset_dir": "data.root",
    "dataset": "data.blend",
    "mixture": "data.blend",
    "output_dir": "run_dir",
    "out_dir": "run_dir",
    "save": "run_dir",
    "save_dir": "run_dir",
    "save_folder": "run_dir",
    "checkpoint_dir": "run_dir",
    "checkpoint.interval": "train.save_every",
    "checkpoint.folder": "run_dir",
    "activation_checkpoint.mode": "transformer.recompute_granularity",
    "log_freq": "train.log_every",
    "save_interval": "train.save_every",
    "save_steps": "train.save_every",
    "log_interval": "train.log_every",
    "logging_steps": "train.log_every",
    "eval_interval": "train.validate_every",
    "eval_steps": "train.validate_every",
    "checkpoint": "train.init_from",
    "pretrained": "train.init_from",
    "pretrained_checkpoint": "train.init_from",
    "initial_checkpoint": "train.init_from",
    "load_path": "train.init_from",
    "model_name_or_path": "train.init_from",
    "eval_iters": "train.validation_batches",
    "eval_every": "train.validate_every",
    "max_inf_eval_examples": "train.generate_examples",
    "metric_for_best_model": "train.save_best",
    "early_stopping_patience": "train.stop_when_no_better",
    "exit_duration_in_mins": "train.stop_after_minutes",
    "distributed_timeout_minutes": "train.timeout_minutes",
    "run_name": "name",
    "wandb_exp_name": "name",
    "experiment_name": "name",
    "wandb_project_name": "train.wandb_project",
    "dataloader_num_workers": "data.num_workers",
    "num_workers": "data.num_workers",
    "workers": "data.num_workers",
    "grad_clip": "optim.clip_grad",
    "max_grad_norm": "optim.clip_grad",
    "seed": "train.seed",
    "model": "model",
    "hardware": "hardware",
    "schedule": "schedule",
}
RESUME = (
    "run the same command with the same run_dir: it goes on by itself; to take its weights alone: "
    "train.init_from=FOLDER"
)
ACCUMULATION = "use train.global_batch_size and train.micro_batch_size, from which it follows"
LORA = "use lora.rank=16, with lora.targets for what is adapted; docs/training.md has a section on it"
TRACKERS = "TensorBoard's files are always written, and train.wandb_project=NAME writes to Weights & Biases"
OF_BLEND = "the weights of the sources are in a blend: data.blend=FILE, docs/own_data.md has its form"
LOADER = "the loaders keep packed rows ready: data.num_workers says how many there are of a rank"
VALIDATION = "train.validation_batches says how many batches of rows are used"
NO_FSDP = "ddp.use_distributed_optimizer=true divides the optimizer's state, and parallel.* the model"
DATA_PARALLEL = "data parallelism takes the ranks that parallel.* leave over"
KERNELS = "the attention kernel is chosen by the device"
OF_CROPS = "use data.max_crops_per_image, of 378 x 378 pixels each"
# Names for which there are several settings, or none, or a run does it by itself.
WORDS = {
    "fp16": "use train.precision=bf16, since fp16 is not trained in",
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_accumulation"), ACCUMULATION),
    **dict.fromkeys(("resume", "load", "resume_from_checkpoint"), RESUME),
    **dict.fromkeys(("num_gpus", "gpus"), "start it as torchrun --nproc-per-node N recipes/..."),
    "nproc_per_node": "it goes before the recipe, torchrun --nproc-per-node N recipes/...",
    **dict.fromkeys(("nodes", "nnodes", "num_nodes"), "use torchrun --nnodes N, or sbatch --nodes=N slurm/..."),
    "deepspeed": "DeepSpeed is not used: hardware=h100_8 or parallel.* divide the model",
    **dict.fromkeys(("train_type", "finetuning_type", "lora", "use_lora", "use_peft", "tuner_type"), LORA),
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules"), LORA),
    "lora_path": "tools/import_hf.py --adapter FOLDER --base CKPT makes a checkpoint of it for train.init_from",
    **dict.fromkeys(("report_to", "wandb", "tensorboard_dir", "logging_dir", "enable_wandb"), TRACKERS),
    "freeze": "use optim.vit.freeze=true, optim.connector.freeze=true or optim.llm.freeze=true",
    "stage": "each stage has a recipe of its own, recipes/stage1_pretrain.py and so on",
    "config": "use --config-name NAME for another file of conf/, and KEY=VALUE for what shall differ from it",
    **dict.fromkeys(("vision_backbone", "vision_model_type", "vision_tower"), "the vision tower is that of model=NAME"),
    "vit_layers": "use model.vit.feature_layers=[24,18], counted from 0",
    "warmup_factor": "use optim.vit.warmup_steps, optim.connector.warmup_steps and optim.llm.warmup_steps",
    **dict.fromkeys(("nlp", "pointing", "interleave_probs", "mix_strategy", "data_weights"), OF_BLEND),
    **dict.fromkeys(("train_data_path", "valid_data_path", "test_data_path", "train_dataset", "val_dataset"), OF_BLEND),
    **dict.fromkeys(("split", "val_size", "split_dataset_ratio"), "what is held out is decided by tools/prepare.py"),
    "debug": "use model=tiny, which runs on a CPU",
    **dict.fromkeys(("prefetch_factor", "dataloader_prefetch_factor", "dataloader_pin_memory", "pin_memory"), LOADER),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_type", "preprocessing_num_workers"), LOADER),
    **dict.fromkeys(("device_eval_batch_size", "per_device_eval_batch_size", "eval_batch_size"), VALIDATION),
    **dict.fromkeys(("n_eval_examples", "max_loss_examples", "max_eval_samples"), VALIDATION),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "do_eval"),
        "use train.validate_every=STEPS, or 'train.validate_every=1 epoch'",
    ),
    "save_strategy": "use train.save_every=STEPS, or 'train.save_every=1 epoch'",
    "logging_strategy": "use train.log_every=STEPS",
    "load_best_model_at_end": "use train.save_best=loss, which keeps the best checkpoint in a folder of its own",
    "push_to_hub": "tools/export_hf.py writes a folder that can be pushed",
    **dict.fromkeys(("optim", "optimizer", "optimizer_name"), "the optimizer is AdamW, and optim.* are its settings"),
    **dict.fromkeys(("lr_decay_iters", "lr_decay_steps"), "the rates decay until train.max_steps"),
    "train_samples": "use train.max_steps, each of train.global_batch_size rows",
    **dict.fromkeys(("max_samples", "num_samples"), "tools/download.py fetch --limit N gets a sample of a set"),
    "ddp_timeout": "use train.timeout_minutes, in minutes",
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "dropout"), "use schedule.stage1.hidden_dropout"),
    **dict.fromkeys(
        ("local_rank", "rank", "world_size", "master_addr", "master_port"), "torchrun says it to each rank"
    ),
    **dict.fromkeys(("distributed_backend", "ddp_backend", "backend"), "it is NCCL on GPUs and gloo on CPUs"),
    **dict.fromkeys(("fsdp", "fsdp_config", "use_fsdp", "zero_stage", "zero", "use_torch_fsdp2"), NO_FSDP),
    **dict.fromkeys(("data_parallel_size", "dp_size", "dp", "data_parallel_shard_degree"), DATA_PARALLEL),
    **dict.fromkeys(("num_experts", "expert_model_parallel_size", "expert_parallel_degree", "ep"), "models are dense"),
    "num_layers_per_virtual_pipeline_stage": "use parallel.virtual_pipeline_model_parallel_size, the parts of a stage",
    **dict.fromkeys(("use_flash_attn", "use_flash_attention_2", "transformer_impl"), KERNELS),
    **dict.fromkeys(("torch_compile", "compile", "use_liger_kernel", "enable_liger_kernel"), "kernels need no switch"),
    **dict.fromkeys(("max_pixels", "image_max_pixels", "min_pixels", "image_min_pixels"), OF_CROPS),
    **dict.fromkeys(("video_max_pixels", "video_min_pixels"), "frames have one crop: data.max_frames says how many"),
    **dict.fromkeys(("template", "system", "chat_template"), "the chat template is that of Molmo2"),
    **dict.fromkeys(("do_train", "do_predict"), "recipes/evaluate.py answers, and the other recipes train"),
    **dict.fromkeys(("no_load_optim", "no_load_rng", "finetune"), "use train.init_from=FOLDER for weights alone"),
    **dict.fromkeys(("tokenizer_type", "vocab_file", "merge_file"), "use data.tokenizer=FOLDER"),
    **dict.fromkeys(
        ("neftune_noise_alpha", "label_smoothing_factor", "label_smoothing"), "there is no such thing here"
    ),
    "min_lr": "use optim.min_lr_ratio, the part of each rate that is left at the end",
    "packing": "rows are always packed: data.packing_buffer_size says how many samples wait",
    **dict.fromkeys(("attn_impl", "attn_implementation", "flash_attn"), KERNELS),
}
# Names that stand for several keys, and what a flag means that is there, or is false.
SEVERAL = dict.fromkeys(("lr", "learning_rate"), ("optim.vit.lr", "optim.connector.lr", "optim.llm.lr"))
# Key -> values that it may have, and those of other trainers that mean one of them.
CHOICES = {
    "train.precision": {
        **{name: name for name in ("auto", "fp32", "bf16", "fp8")},
        **dict.fromkeys(("bfloat16", "bf16_mixed", "amp_bf16"), "bf16"),
        **dict.fromkeys(("float32", "float", "32", "no"), "fp32"),
    },
    "optim.decay": {
        **{name: name for name in ("cosine", "linear", "constant")},
        **dict.fromkeys(("cosine_with_min_lr", "cosine_with_warmup", "cosine_annealing"), "cosine"),
        "linear_with_warmup": "linear",
        "constant_with_warmup": "constant",
    },
    "train.save_best": {"loss": "loss", "eval_loss": "loss"},
}
OTHER_SWITCHES = (
    "ddp.use_distributed_optimizer",
    "ddp.overlap_grad_reduce",
    "ddp.overlap_param_gather",
    "transformer.tp_comm_overlap",
    "train.async_checkpoint",
)
GROUPS = ("model", "hardware", "schedule")  # folders of conf/ of which a file is chosen
SWITCHES = {
    "bf16": ("train.precision=bf16", "train.precision=fp32"),
    "fp8": ("train.precision=fp8", "train.precision=bf16"),
    "fp8_format": ("train.precision=fp8", "train.precision=bf16"),
    "ft_llm": ("optim.llm.freeze=false", "optim.llm.freeze=true"),
    "ft_vit": ("optim.vit.freeze=false", "optim.vit.freeze=true"),
    "ft_connector": ("optim.connector.freeze=false", "optim.connector.freeze=true"),
    "no_bf16": ("train.precision=fp32", "train.precision=bf16"),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing", "recompute_activations"),
        ("transformer.recompute_granularity=selective", "transformer.recompute_granularity=null"),
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
    if "." in name and name not in KEYS and key_named(name) is None:  # as torchtitan's --training.seq_len
        first, _, last = name.rpartition(".")
        name = first.partition(".")[0] if last in ("name", "type") else last
    if name in SWITCHES:
        return SWITCHES[name][value.lower() in ("false", "0", "no", "off")]
    if name in WORDS:
        return WORDS[name]
    if name in SEVERAL:
        return " ".join(f"{key}={value or 'VALUE'}" for key in SEVERAL[name])
    key = KEYS.get(name) or key_named(name)
    known = names_of(key) if key in GROUPS else list(dict.fromkeys(CHOICES.get(key, {}).values()))
    if value and known and shown(key, value) not in known:
        return f"use {key}=NAME, which is one of {', '.join(known)}"
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
    if key in GROUPS:
        known = {name.replace("_", ""): name for name in names_of(key)}
        value = known.get(value.rpartition("/")[2].lower().replace("-", "").replace("_", ""), value)
    value = CHOICES.get(key, {}).get(value.lower().replace("-", "_"), value)
    is_switch = key in OTHER_SWITCHES or types_of_keys().get(key) is bool
    return value or ("true" if is_switch else "VALUE")


def names_of(group: str) -> list[str]:
    """Files of a folder of conf/."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


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
