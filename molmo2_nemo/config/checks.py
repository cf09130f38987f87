"""Checks of the configuration that need no GPU, no data and no process group. All of them raise ConfigError."""

import importlib.util
import itertools
import re
import signal
from dataclasses import replace

from molmo2_nemo import storage
from molmo2_nemo.config.components import COMPONENTS
from molmo2_nemo.config.errors import ConfigError, check_choice, refuse
from molmo2_nemo.config.lora import check_lora
from molmo2_nemo.config.megatron_fields import check_megatron_fields
from molmo2_nemo.config.places import check_addresses, check_run_dir
from molmo2_nemo.config.schema import (
    AUTO,
    EXTRA_TOKENS,
    FP8_MULTIPLES,
    FP8_RECIPE,
    LAYERS,
    METRICS,
    RECOMPUTE,
    STAGES,
    VOCAB_MULTIPLE,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    VisionConfig,
)
from molmo2_nemo.files import bytes_of


def check(cfg: Config, world_size: int) -> None:
    """All checks that need no data on disk. Raises ConfigError with one sentence."""
    check_settings(cfg, world_size)
    check_profile(cfg.train, world_size)
    check_megatron_fields(cfg)


def check_settings(cfg: Config, world_size: int) -> None:
    """The checks of `check` that do not import Megatron, and that other numbers of ranks have to pass in a search."""
    check_choice("stage", cfg.stage, STAGES)
    check_addresses(cfg)
    check_run_dir(cfg)
    check_model(cfg.model)
    check_layout(cfg, world_size)
    train = cfg.train
    check_choice("train.device", train.device, ("auto", "cpu", "cuda"))
    check_choice("train.precision", train.precision, ("auto", "fp32", "bf16", "fp8"))
    given = train.init_from
    refuse(
        not (given is None or isinstance(given, str))
        and not (isinstance(given, list) and len(given) == 2 and all(isinstance(folder, str) for folder in given)),
        f"train.init_from={given} must be one folder, or two: 'train.init_from=[LLM_DIR,SIGLIP2_DIR]'.",
    )
    check_choice("train.async_checkpoint", train.async_checkpoint, ("auto", "true", "false"))
    check_choice("train.on_loss_jump", train.on_loss_jump, ("warn", "go_back", "ignore"))
    check_best(train)
    check_choice("optim.decay", cfg.optim.decay, ("cosine", "linear", "constant"))
    check_length(cfg)
    for key in (
        "micro_batch_size",
        "global_batch_size",
        "keep_last",
        "log_every",
        "max_skipped_steps",
    ):
        refuse(getattr(train, key) < 1, f"train.{key}={getattr(train, key)} must be at least 1.")
    for key in ("keep_every", "generate_examples"):
        refuse(getattr(train, key) < 0, f"train.{key}={getattr(train, key)} must not be negative.")
    chunk = train.vision_chunk_crops
    refuse(
        chunk != AUTO and (not isinstance(chunk, int) or isinstance(chunk, bool)),
        f"train.vision_chunk_crops={chunk} must be a number of crops, 0 for all at once, or auto.",
    )
    refuse(chunk != AUTO and chunk < 0, f"train.vision_chunk_crops={chunk} must not be negative.")
    refuse(
        train.vision_recompute not in (True, False, LAYERS, AUTO),
        f"train.vision_recompute={train.vision_recompute} must be true, {LAYERS}, false or {AUTO}.",
    )
    refuse(
        train.vision_recompute == LAYERS and train.vit_fp8,
        f"train.vision_recompute={LAYERS} does not work with train.vit_fp8=true, whose scales would be updated twice:"
        " use train.vision_recompute=true.",
    )
    if "recompute" in cfg.transformer:
        check_choice("transformer.recompute", cfg.transformer["recompute"], (*RECOMPUTE, AUTO))
    refuse(
        train.generate_every != 0
        and not (train.generate_examples > 0 and 0 < train.generate_max_tokens <= cfg.data.seq_length // 2),
        f"train.generate_every={train.generate_every} needs train.generate_examples={train.generate_examples} of at"
        f" least 1, and train.generate_max_tokens={train.generate_max_tokens} between 1 and half of"
        f" data.seq_length={cfg.data.seq_length}.",
    )
    refuse(
        train.stop_after_minutes is not None and not train.stop_after_minutes > 0,
        f"train.stop_after_minutes={train.stop_after_minutes} must be above 0, or null for no limit.",
    )
    for name in train.stop_signals:
        refuse(
            name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"),
            f"train.stop_signals: {name} is no signal that a program can catch; use names such as SIGTERM, SIGUSR1.",
        )
    for key in ("clip_grad", "z_loss"):
        refuse(not getattr(cfg.optim, key) >= 0, f"optim.{key}={getattr(cfg.optim, key)} must not be negative.")
    for pattern in cfg.optim.freeze_patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"optim.freeze_patterns: {pattern} is no regular expression ({error}).") from None
    refuse(
        train.wandb_project is not None and importlib.util.find_spec("wandb") is None,
        f"train.wandb_project={train.wandb_project}, but wandb is not installed: pip install wandb, or leave the key "
        "out.",
    )
    check_lora(cfg.lora, cfg.model, cfg.optim)
    check_batch(cfg, world_size)
    refuse(
        all(getattr(cfg.optim, c).freeze for c in COMPONENTS),
        "optim.vit.freeze, optim.connector.freeze and optim.llm.freeze are all true: nothing would be trained.",
    )
    check_engine(cfg)


def check_layout(cfg: Config, world_size: int) -> None:
    """Refuse a layout that the model, the number of ranks or the rows do not allow. Raises ConfigError."""
    check_parallel(cfg.parallel, cfg.model, world_size)
    multiple = row_multiple(cfg.parallel, cfg.train.precision, cfg.transformer.get("fp8_recipe", FP8_RECIPE))
    check_data(cfg.data, cfg.model.vision, cfg.parallel, multiple)


def check_batch(cfg: Config, world_size: int) -> None:
    """Refuse a global batch that the data-parallel ranks cannot share. Needs `check_parallel`. Raises ConfigError."""
    train, p = cfg.train, cfg.parallel
    replicas = world_size // _ranks_of_a_replica(p)
    rows = train.micro_batch_size * replicas
    if train.global_batch_size % rows != 0:
        ways = [f"train.global_batch_size={-(-train.global_batch_size // rows) * rows}"]
        fitting = [m for m in range(1, train.micro_batch_size) if train.global_batch_size % (m * replicas) == 0]
        ways += [f"train.micro_batch_size={max(fitting)}"] if fitting else _layouts_for_batch(cfg, world_size)
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {replicas} data-parallel ranks = {rows}: use {', or '.join(ways)}."
        )
    micro_batches = train.global_batch_size // rows
    refuse(
        p.virtual_pipeline_model_parallel_size is not None and micro_batches % p.pipeline_model_parallel_size != 0,
        f"parallel.virtual_pipeline_model_parallel_size={p.virtual_pipeline_model_parallel_size} needs micro-batches"
        f" per step ({micro_batches}) in multiples of"
        f" parallel.pipeline_model_parallel_size={p.pipeline_model_parallel_size}: change train.global_batch_size or"
        " train.micro_batch_size.",
    )


def _ranks_of_a_replica(p: ParallelConfig) -> int:
    return p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size


def _layouts_for_batch(cfg: Config, world_size: int) -> list[str]:
    """Overrides that split a replica over more ranks, so that the replicas can share the global batch; the least three.

    All checks of the layout accept each. Whether it fits into memory is the planner's question.
    """
    keys = ("pipeline_model_parallel_size", "tensor_model_parallel_size", "context_parallel_size")
    found = []
    for factors in itertools.product((1, 2, 4, 8), repeat=3):
        changes = {key: getattr(cfg.parallel, key) * factor for key, factor in zip(keys, factors) if factor > 1}
        candidate = replace(cfg, parallel=replace(cfg.parallel, **changes))
        ranks = _ranks_of_a_replica(candidate.parallel)
        if world_size % ranks or cfg.train.global_batch_size % (cfg.train.micro_batch_size * world_size // ranks):
            continue
        try:
            check_layout(candidate, world_size)
            check_batch(candidate, world_size)
            check_engine(candidate)
        except ConfigError:
            continue
        found.append((ranks, len(changes), " ".join(f"parallel.{key}={value}" for key, value in changes.items())))
    return [words for _, _, words in sorted(found, key=lambda layout: layout[:2])[:3]]


def check_best(train: TrainConfig) -> None:
    """Refuse to keep the best by a measurement that is not made. Raises ConfigError."""
    refuse(
        train.stop_when_no_better < 0 or (train.stop_when_no_better > 0 and train.save_best is None),
        f"train.stop_when_no_better={train.stop_when_no_better} needs train.save_best: set train.save_best=loss, or 0.",
    )
    if train.save_best is None:
        return
    check_choice("train.save_best", train.save_best, ("loss", *METRICS))
    needed = "validation_batches" if train.save_best == "loss" else "generate_every"
    refuse(
        getattr(train, needed) == 0,
        f"train.save_best={train.save_best} is measured by train.{needed}, which is 0: make it 1 or more.",
    )


def check_profile(train: TrainConfig, world_size: int) -> None:
    """Refuse steps that are never taken, and ranks that are not there. Raises ConfigError.

    Where train.max_steps is not known yet (train.epochs), it is called again when it is.
    """
    check_choice("train.profile_with", train.profile_with, ("torch", "nsys"))
    ranks, most = train.profile_ranks, world_size - 1
    refuse(
        not ranks or len(set(ranks)) != len(ranks) or not all(0 <= rank <= most for rank in ranks),
        f"train.profile_ranks={ranks} must name ranks of this run, from 0 to {most}, each once: [0] is the first one.",
    )
    if train.profile_steps is None:
        return
    said = f"train.profile_steps={train.profile_steps}"
    refuse(len(train.profile_steps) != 2, f"{said} must be the first and the last step of the profile, as in [20,22].")
    first, last = train.profile_steps
    refuse(
        train.max_steps is not None and max(first, last) > train.max_steps,
        f"{said} ends after train.max_steps={train.max_steps}: name earlier steps, or raise train.max_steps.",
    )
    refuse(first < 1, f"{said} begins before step 1, the first one: use [1,{max(1, last)}].")
    refuse(last < first, f"{said} ends before it begins: use [{first},{first}] for one step.")
    refuse(
        train.profile_with == "nsys" and train.device == "cpu",
        "train.profile_with=nsys needs a GPU, and train.device=cpu: use train.profile_with=torch.",
    )


def check_length(cfg: Config) -> None:
    """Refuse what does not say how long a run is, how often something is done, or on what. Raises ConfigError."""
    train, share = cfg.train, cfg.optim.warmup_share
    refuse(
        (train.max_steps is None) == (train.epochs is None),
        f"train.max_steps={_or_null(train.max_steps)} and train.epochs={_or_null(train.epochs)}: give one of them a"
        " number, and set the other one to null.",
    )
    for key in ("max_steps", "epochs"):
        value = getattr(train, key)
        refuse(
            value is not None and not value > 0,
            f"train.{key}={value} must be {'above 0' if key == 'epochs' else 'at least 1'}.",
        )
    for key in ("save_every", "validate_every", "generate_every"):
        value = getattr(train, key)
        is_steps = isinstance(value, int) and not isinstance(value, bool)
        refuse(
            not is_steps and epochs_of(value) is None,
            f"train.{key}={value} is neither a number of steps nor of epochs: write 500, or 'train.{key}=0.5 epochs'.",
        )
        least = 0 if key == "generate_every" else 1
        refuse(is_steps and value < least, f"train.{key}={value} must be at least {least}.")
    refuse(
        share is not None and not 0 <= share < 1,
        f"optim.warmup_share={share} is not from 0 to below 1: 0.05 is one step in twenty.",
    )
    refuse(
        cfg.stage == "finetune" and not cfg.data.own,
        "data.NAME=FOLDER has no value: name the shards that tools/prepare.py has made of your labels, such as"
        " data.mine=shards/mine.",
    )
    refuse(
        cfg.data.keep is not None and not cfg.data.own,
        f"data.keep={cfg.data.keep} needs data of your own beside it: data.mine=FOLDER with recipes/finetune.py.",
    )


def _or_null(value) -> str:
    return "null" if value is None else str(value)


def epochs_of(value) -> float | None:
    """The number of epochs that a setting such as `0.5 epochs` says; None: it says none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+) ?epochs?", value.strip()) if isinstance(value, str) else None
    return float(match[1]) if match and float(match[1]) > 0 else None


# Far above any model: a number beyond is a mistake, which would take hours or all memory before it shows.
MAX_LAYERS, MAX_SIZE = 1000, 2**24


def check_sizes(m: ModelConfig) -> None:
    """Refuse numbers that no model has. Raises ConfigError."""
    parts = {"model": m, "model.vit": m.vit, "model.connector": m.connector, "model.vision": m.vision}
    names = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size")
    for where, part in parts.items():
        for name in (*names, "vocab_size", "image_size", "patch_size"):
            value, most = getattr(part, name, 1), MAX_LAYERS if name == "num_layers" else MAX_SIZE
            refuse(not 1 <= value <= most, f"{where}.{name}={value} is not from 1 to {most:,}: correct it.")
    value = m.additional_vocab_size
    refuse(
        not 0 <= value <= MAX_SIZE, f"model.additional_vocab_size={value} is not from 0 to {MAX_SIZE:,}: correct it."
    )


def check_model(m: ModelConfig) -> None:
    """Refuse an architecture that cannot be built. Raises ConfigError."""
    v = m.vision
    check_sizes(m)
    check_choice("model.qk_norm", m.qk_norm, ("per_head", "full_width"))
    refuse(
        m.num_attention_heads % m.num_query_groups != 0,
        f"model.num_attention_heads={m.num_attention_heads} is not divisible by "
        f"model.num_query_groups={m.num_query_groups}: give each key/value head a whole number of query heads.",
    )
    refuse(
        v.image_size % v.patch_size != 0,
        f"model.vision.image_size={v.image_size} is not a multiple of model.vision.patch_size={v.patch_size}: "
        f"use {v.image_size // v.patch_size * v.patch_size}.",
    )
    refuse(
        v.image_size // v.patch_size <= 2 * v.overlap_margin,
        f"model.vision.overlap_margin={v.overlap_margin} leaves nothing of a crop of "
        f"{v.image_size // v.patch_size} patches: make it smaller.",
    )
    bad = [layer for layer in m.vit.feature_layers if not -m.vit.num_layers <= layer < m.vit.num_layers]
    refuse(
        not m.vit.feature_layers,
        "model.vit.feature_layers=[] gives the connector nothing: name layers of the vision transformer, as [-3,-9].",
    )
    refuse(
        bool(bad),
        f"model.vit.feature_layers={m.vit.feature_layers} names layers outside the {m.vit.num_layers} of "
        "model.vit.num_layers: correct one of the two.",
    )
    refuse(
        m.additional_vocab_size < len(EXTRA_TOKENS),
        f"model.additional_vocab_size={m.additional_vocab_size} cannot hold the {len(EXTRA_TOKENS)} special "
        "tokens: use 128.",
    )


def check_parallel(p: ParallelConfig, m: ModelConfig, world_size: int) -> None:
    """Refuse a layout the model or the number of ranks does not allow. Raises ConfigError."""
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        refuse(getattr(p, key) < 1, f"parallel.{key}={getattr(p, key)} must be at least 1.")
    check_choice("parallel.cp_comm_type", p.cp_comm_type, ("a2a", "all_gather"))
    check_choice("parallel.layer_spec", p.layer_spec, ("auto", "local", "transformer_engine"))
    check_choice("parallel.kernels", p.kernels, ("auto", "fused", "plain"))
    check_choice("parallel.attention_kernel", p.attention_kernel, ("triton", "tma", "flash"))
    refuse(
        world_size % (tp * pp * cp) != 0,
        f"{world_size} rank(s) cannot be divided into groups of parallel.tensor_model_parallel_size={tp} x "
        f"pipeline_model_parallel_size={pp} x context_parallel_size={cp} = {tp * pp * cp}: start a multiple of "
        f"{tp * pp * cp} ranks (torchrun --nproc-per-node) or lower one of the three.",
    )
    refuse(
        VOCAB_MULTIPLE % tp != 0,
        f"parallel.tensor_model_parallel_size={tp} must be a power of two up to {VOCAB_MULTIPLE}.",
    )
    for key, value in (("num_attention_heads", m.num_attention_heads), ("num_query_groups", m.num_query_groups)):
        refuse(
            value % tp != 0,
            f"parallel.tensor_model_parallel_size={tp} does not divide model.{key}={value}: "
            f"choose a tensor parallel size that divides {value}.",
        )
    refuse(
        m.ffn_hidden_size % tp != 0,
        f"parallel.tensor_model_parallel_size={tp} does not divide model.ffn_hidden_size={m.ffn_hidden_size}.",
    )
    refuse(
        p.cp_comm_type == "a2a" and m.num_attention_heads % (tp * cp) != 0,
        f"parallel.context_parallel_size={cp} with cp_comm_type=a2a needs model.num_attention_heads="
        f"{m.num_attention_heads} divisible by tensor x context parallel size = {tp * cp}: lower one of them or "
        "set parallel.cp_comm_type=all_gather.",
    )
    refuse(
        p.sequence_parallel and tp == 1,
        "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1: set one or the other.",
    )
    layers_per_stage(p, m)
    pieces = p.virtual_pipeline_model_parallel_size
    refuse(
        pieces is not None
        and (pieces < 2 or pp == 1 or len(set(layers_per_stage(p, m))) > 1 or m.num_layers % (pp * pieces)),
        f"parallel.virtual_pipeline_model_parallel_size={pieces} must be 2 or more, with"
        f" pipeline_model_parallel_size={pp} above 1 and model.num_layers={m.num_layers} a multiple of their product,"
        " without uneven first or last stages; null is the plain schedule.",
    )


def layers_per_stage(p: ParallelConfig, m: ModelConfig) -> list[int]:
    """Decoder layers on each pipeline stage. Raises ConfigError when they cannot be distributed."""
    pp = p.pipeline_model_parallel_size
    first, last = p.num_layers_in_first_pipeline_stage, p.num_layers_in_last_pipeline_stage
    if pp == 1:
        refuse(
            first is not None or last is not None,
            "parallel.num_layers_in_first/last_pipeline_stage needs parallel.pipeline_model_parallel_size > 1.",
        )
        return [m.num_layers]
    fixed = [n for n in (first, last) if n is not None]
    rest, stages = m.num_layers - sum(fixed), pp - len(fixed)
    refuse(
        min(fixed, default=1) < 1 or rest < stages or (rest % stages if stages else rest) != 0,
        f"model.num_layers={m.num_layers} cannot be dealt to parallel.pipeline_model_parallel_size={pp} stages with "
        f"num_layers_in_first_pipeline_stage={first} and num_layers_in_last_pipeline_stage={last}: the layers left "
        "over must be a positive multiple of the stages left over.",
    )
    middle = [rest // stages] * stages if stages else []
    return ([first] if first else []) + middle + ([last] if last else [])


def row_multiple(p: ParallelConfig, precision: str = "auto", fp8_recipe: str = FP8_RECIPE) -> tuple[int, str]:
    """What a row's tokens must be a multiple of, and why: every rank's part is whole, in FP8 as FP8_MULTIPLES says."""
    align = FP8_MULTIPLES.get(fp8_recipe, 1) if precision == "fp8" else 1
    shared = p.tensor_model_parallel_size if p.sequence_parallel else 1
    reason = f"context parallel {p.context_parallel_size}"
    reason += f" x tensor parallel {shared} with sequence_parallel" if p.sequence_parallel else ""
    return p.context_parallel_size * shared * align, reason + (f" x {align} for FP8" if align > 1 else "")


def check_data(d: DataConfig, v: VisionConfig, p: ParallelConfig, multiple: tuple[int, str] | None = None) -> None:
    """Refuse rows that are too short to hold any sample. multiple: see row_multiple. Raises ConfigError."""
    check_choice("data.loss_weighting", d.loss_weighting, ("flat", "root", "root_report"))
    check_choice("data.style_prefix", d.style_prefix, ("length", "demo"))
    check_choice("data.prompts", d.prompts, ("templates", "none"))
    refuse(not 0 <= d.max_error_rate <= 1, f"data.max_error_rate={d.max_error_rate} is not between 0 and 1.")
    for key, path in {"root": d.root, **d.own}.items():
        if storage.is_remote(path):
            storage.check(path, f"data.{key}")
    refuse(
        d.cache_dir is not None and storage.is_remote(d.cache_dir),
        f"data.cache_dir={storage.shown(d.cache_dir or '')} is an address, and the cache is on the node's own disk:"
        " name a folder there.",
    )
    if d.cache_size is not None:
        try:
            bytes_of(d.cache_size)
        except ValueError as error:
            raise ConfigError(f"data.cache_size={d.cache_size}: {error}; write it like 500GB.") from None
    multiple, reason = multiple or row_multiple(p)
    refuse(
        d.seq_length < 1 or d.seq_length % multiple != 0,
        f"data.seq_length={d.seq_length} is not a positive multiple of {multiple} ({reason}): use "
        f"{max(1, -(-d.seq_length // multiple)) * multiple}.",
    )
    refuse(
        d.max_crops < d.max_crops_per_image + 1,
        f"data.max_crops={d.max_crops} cannot hold one image of data.max_crops_per_image={d.max_crops_per_image} "
        f"tiles and its overview: use at least {d.max_crops_per_image + 1}.",
    )
    refuse(
        d.max_frames < 1 or d.max_frames > d.max_crops,
        f"data.max_frames={d.max_frames} does not fit data.max_crops={d.max_crops} (a frame is one crop): lower "
        "the one or raise the other.",
    )
    side = v.image_size // v.patch_size
    tokens = 2 * (-(-side // v.image_pooling)) ** 2
    refuse(
        d.seq_length <= tokens,
        f"data.seq_length={d.seq_length} cannot hold the {tokens} patch tokens of the smallest image: raise it.",
    )
    for key in ("packing_buffer_size", "max_crops_per_image", "max_images", "high_res_crops"):
        refuse(getattr(d, key) < 1, f"data.{key}={getattr(d, key)} must be at least 1.")
    refuse(d.num_workers < 0, f"data.num_workers={d.num_workers} must not be negative.")


BF16_LAYERS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


def check_engine(cfg: Config) -> None:
    """Refuse settings of FP8, overlap and offload that exclude each other. Raises ConfigError.

    What depends on the GPU and on installed libraries is in gpu.check_device.
    """
    transformer, p, m, train = cfg.transformer, cfg.parallel, cfg.model, cfg.train
    fp8, local = train.precision == "fp8", p.layer_spec == "local"
    recipe = transformer.get("fp8_recipe", FP8_RECIPE)
    check_choice("transformer.fp8_recipe", recipe, tuple(FP8_MULTIPLES))
    refuse(
        fp8 and local,
        "train.precision=fp8 needs Transformer Engine's layers: set parallel.layer_spec=transformer_engine.",
    )
    for key in ("fp8_recipe", "first_last_layers_bf16"):
        refuse(
            bool(transformer.get(key)) and not fp8,
            f"transformer.{key}={transformer.get(key)} needs train.precision=fp8: set it, too.",
        )
    refuse(train.vit_fp8 and not fp8, "train.vit_fp8=true needs train.precision=fp8: set it, too.")
    refuse(
        train.vit_fp8 and recipe == "delayed",
        "train.vit_fp8=true does not work with transformer.fp8_recipe=delayed, whose maxima all ranks share after each"
        " pass of the vision transformer, since ranks encode different numbers of chunks: use tensorwise.",
    )
    bf16_layers = transformer.get("first_last_layers_bf16", False)
    refuse(
        bool(bf16_layers) and recipe == "delayed",
        "transformer.first_last_layers_bf16=true does not work with transformer.fp8_recipe=delayed, which is switched"
        " on for all layers at once: use tensorwise or blockwise.",
    )
    for key in BF16_LAYERS:
        refuse(
            key in transformer and not bf16_layers,
            f"transformer.{key}={transformer.get(key)} needs transformer.first_last_layers_bf16=true.",
        )
    if fp8:
        check_fp8_widths(cfg, recipe)
    if transformer.get("cpu_offloading"):
        refuse(
            local,
            "transformer.cpu_offloading=true needs Transformer Engine: set parallel.layer_spec=transformer_engine.",
        )
        refuse(
            p.pipeline_model_parallel_size > 1 or transformer.get("recompute_granularity") is not None,
            "transformer.cpu_offloading=true works with neither pipeline parallelism nor"
            " transformer.recompute_granularity: drop the one or the other.",
        )
        refuse(
            not 0 < transformer.get("cpu_offloading_num_layers", 0) < m.num_layers,
            f"transformer.cpu_offloading_num_layers={transformer.get('cpu_offloading_num_layers', 0)} must be at least "
            f"1 and below model.num_layers={m.num_layers}.",
        )
    refuse(
        bool(transformer.get("tp_comm_overlap")) and (local or not p.sequence_parallel),
        "transformer.tp_comm_overlap=true needs parallel.sequence_parallel=true and Transformer Engine's layers "
        "(parallel.layer_spec=transformer_engine).",
    )
    for key in ("overlap_grad_reduce", "use_distributed_optimizer"):
        refuse(
            bool(cfg.ddp.get("overlap_param_gather")) and cfg.ddp.get(key) is False,
            f"ddp.overlap_param_gather=true needs ddp.{key}, which is false: leave that out, it is then switched on.",
        )
    check_recompute(transformer)


def check_recompute(transformer: dict) -> None:
    """Refuse what Megatron would refuse later. Raises ConfigError."""
    granularity, method = transformer.get("recompute_granularity"), transformer.get("recompute_method")
    count = transformer.get("recompute_num_layers")
    if granularity not in (None, "full", "selective"):
        raise ConfigError(f"transformer.recompute_granularity={granularity} is unknown: choose full or selective.")
    if granularity == "full" and (method not in ("uniform", "block") or not isinstance(count, int) or count < 1):
        raise ConfigError(
            f"transformer.recompute_granularity=full with recompute_method={method} and recompute_num_layers={count}:"
            " set transformer.recompute_method to uniform or block and transformer.recompute_num_layers to 1 or more."
        )
    if granularity == "selective" and (method is not None or count is not None):
        raise ConfigError(
            "transformer.recompute_granularity=selective takes transformer.recompute_modules, not recompute_method or "
            "recompute_num_layers."
        )


def check_fp8_widths(cfg: Config, recipe: str) -> None:
    """Refuse FP8 for a width whose part on a rank is no multiple of what the recipe needs. Raises ConfigError."""
    m, train, tp = cfg.model, cfg.train, cfg.parallel.tensor_model_parallel_size
    decoder = {
        "model.hidden_size": m.hidden_size,
        "model.ffn_hidden_size": m.ffn_hidden_size // tp,
        "model.num_attention_heads x head_dim": m.num_attention_heads * m.head_dim // tp,
        "model.num_query_groups x head_dim": m.num_query_groups * m.head_dim // tp,
    }
    vit = {
        "model.vit.hidden_size": m.vit.hidden_size,
        "model.vit.num_attention_heads x head_dim": m.vit.num_attention_heads * m.vit.head_dim,
        "model.vit.ffn_hidden_size": m.vit.ffn_hidden_size,
    }
    widths, multiple = {**decoder, **(vit if train.vit_fp8 else {})}, FP8_MULTIPLES[recipe]
    wrong = next(((key, width) for key, width in widths.items() if width % multiple), None)
    if wrong is None:
        return
    ways = []
    if all(width % FP8_MULTIPLES[FP8_RECIPE] == 0 for width in widths.values()):
        ways.append(f"transformer.fp8_recipe={FP8_RECIPE}")
    if all(width % multiple == 0 for width in decoder.values()):
        ways.append("train.vit_fp8=false")
    if not ways:
        needs_fp8 = ("fp8_recipe", "first_last_layers_bf16", *BF16_LAYERS)
        keys = [f"transformer.{key}" for key in needs_fp8 if key in cfg.transformer]
        keys += ["train.vit_fp8"] if train.vit_fp8 else []
        ways.append("train.precision=bf16" + (f" without {', '.join(keys)}" if keys else ""))
    raise ConfigError(
        f"train.precision=fp8 with {recipe} scaling needs widths in multiples of {multiple}, and a rank's part of"
        f" {wrong[0]} is {wrong[1]}: use {' or '.join(ways)}."
    )
