"""Configuration: the dataclasses behind conf/, and every check that needs no GPU and no process group.

YAML in conf/ is for people, these dataclasses are for the program. Hydra merges the first into the second
(`register()` below), so a misspelt key or a wrong type is refused by name. `check()` refuses combinations
that cannot work. Both run before torch.distributed starts. Nothing here imports torch.
"""

import dataclasses
import difflib
import importlib.util
import json
import os
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING, DictConfig, OmegaConf

REPOSITORY = Path(__file__).resolve().parents[1]
CONF_DIR = REPOSITORY / "conf"
COMPONENTS = ("vit", "connector", "llm")

# Rows of the extra vocabulary by offset from the base vocabulary (molmo2: olmo/tokenizer.py).
EXTRA_TOKENS = (
    "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>", "<im_low>",
    "<frame_start>", "<frame_end>", "<|video|>",
    "<|points|>", "<|token_index|>", "<|vit_index|>", "<|vit_loc|>",
)  # fmt: skip


# With precision=fp8, unless transformer.fp8_recipe says otherwise: it keeps no state, so a resumed run goes on exactly and
# ranks need not agree on maxima, and it has a bf16 form of the first and last layers.
FP8_RECIPE = "tensorwise"


class ConfigError(ValueError):
    """A setting that cannot work. The message is one sentence: the key, its value, what to do."""


@dataclass
class VisionConfig:
    """Geometry of crops and pooling windows: what the processors and the model must agree on.

    Defaults are the released models' (public `olmo/preprocessing/multicrop_preprocessor.py`).
    """

    image_size: int = 378  # pixels, square crops
    patch_size: int = 14  # pixels
    image_pooling: int = 2  # patches on a side of an image token's window
    video_pooling: int = 3  # patches on a side of a video token's window
    overlap_margin: int = 4  # patches dropped on each inner side of a tile

    @property
    def patches_per_crop(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * 3


@dataclass
class VitConfig:
    """Vision transformer (SigLIP 2 so400m/14 in the released models)."""

    num_layers: int = 25  # of SigLIP's 27: deeper ones are never read
    hidden_size: int = 1152
    num_attention_heads: int = 16
    head_dim: int = 72
    ffn_hidden_size: int = 4304
    layernorm_epsilon: float = 1e-6
    feature_layers: list[int] = field(default_factory=lambda: [24, 18])  # concatenated in this order


@dataclass
class ConnectorConfig:
    """Attention pooling over a window of patches, then a SwiGLU projector."""

    hidden_size: int = 1152
    num_attention_heads: int = 16
    head_dim: int = 72
    ffn_hidden_size: int = MISSING


@dataclass
class ModelConfig:
    """Architecture. `hf_path` set: all of it is read from that Hugging Face folder's config.json."""

    name: str = MISSING
    hf_path: Optional[str] = None
    tokenizer: str = MISSING  # folder or hub name
    vision: VisionConfig = field(default_factory=VisionConfig)
    vit: VitConfig = field(default_factory=VitConfig)
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    num_layers: int = MISSING
    hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING  # key/value heads
    head_dim: int = MISSING
    ffn_hidden_size: int = MISSING
    vocab_size: int = MISSING  # base vocabulary, also the width of the logits
    additional_vocab_size: int = 128
    max_position_embeddings: int = 36864
    layernorm_epsilon: float = 1e-6
    qk_norm: str = "per_head"  # per_head (Qwen3) | full_width (OLMo 3)
    norm_after: bool = False  # OLMo 3: norm on each sublayer's output
    tie_embeddings: bool = False
    rope_theta: float = 1e6
    rope_scaling: Optional[dict[str, Any]] = None  # transformers' rope_parameters without rope_theta
    rope_scaling_layers: Optional[list[int]] = None  # None: all layers, when rope_scaling is set
    init_std: float = 0.02
    # Ids under their names in transformers' Molmo2Config; None: the base vocabulary's size plus EXTRA_TOKENS' offsets.
    vision_token_ids: Optional[dict[str, int]] = None


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    cp_comm_type: str = "a2a"  # a2a (Ulysses) | all_gather (keys and values)
    num_layers_in_first_pipeline_stage: Optional[int] = None
    num_layers_in_last_pipeline_stage: Optional[int] = None
    # Each pipeline rank holds so many separate pieces of the decoder (interleaved schedule); null: one.
    virtual_pipeline_model_parallel_size: Optional[int] = None
    layer_spec: str = "auto"  # auto | local | transformer_engine


@dataclass
class DataConfig:
    blend: str = MISSING  # conf/blend/NAME.yaml, or a path to a YAML file
    root: str = MISSING  # folder that holds the blend's sources
    tokenizer: str = MISSING
    seq_length: int = MISSING  # tokens of a packed row
    max_crops: int = MISSING  # crops of a packed row
    max_crops_per_image: int = 8
    max_frames: int = MISSING
    max_fps: float = 2.0
    packing_buffer_size: int = 48
    shuffle_buffer_size: int = 100
    num_workers: int = 2
    seed: int = 1
    point_separator: str = ";"
    # flat: 1 everywhere | root: 2/sqrt(tokens) and the flat overrides | root_report: 4/sqrt(tokens) instead
    loss_weighting: str = "root"
    style_prefix: str = "demo"  # length: "style n:" | demo: none for demo styles, "style: " for the rest
    prompts: str = "templates"  # templates: questions of tasks are drawn from sets | none: the label alone, or nothing
    max_images: int = 5  # of a sample
    high_res_crops: int = 24  # crops of a single image of sources with high_res_probability, that often
    skip_missing: bool = False  # leave out sources of the blend that are not on disk
    max_error_rate: float = 0.01  # of a source's samples that are broken; above it the run stops


@dataclass
class ComponentOptim:
    lr: float = MISSING  # peak
    warmup_steps: int = MISSING
    freeze: bool = False


@dataclass
class OptimConfig:
    vit: ComponentOptim = field(default_factory=ComponentOptim)
    connector: ComponentOptim = field(default_factory=ComponentOptim)  # and the extra vocabulary's rows
    llm: ComponentOptim = field(default_factory=ComponentOptim)
    freeze_embedding: bool = True  # the base table, and with it a tied head
    freeze_patterns: list[str] = field(default_factory=list)  # regular expressions searched for in parameter names
    min_lr_ratio: float = 0.1
    decay: str = "cosine"  # cosine | linear | constant
    clip_grad: float = 1.0  # largest norm of a component's gradient; 0 clips nothing
    z_loss: float = 1e-4  # factor of the squared log-partition (PaLM, arXiv 2204.02311, section 5)
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-6


@dataclass
class StageSchedule:
    """What a schedule (conf/schedule/*.yaml) says of one stage."""

    max_steps: int = MISSING
    global_batch_size: int = MISSING
    micro_batch_size: int = 1
    seq_length: int = MISSING
    max_frames: int = MISSING
    max_crops: int = MISSING
    context_parallel_size: int = 1
    lr_vit: float = MISSING
    lr_connector: float = MISSING
    lr_llm: float = MISSING
    warmup_vit: int = MISSING
    warmup_connector: int = MISSING
    warmup_llm: int = MISSING
    hidden_dropout: float = 0.0
    response_dropout: bool = False  # hidden_dropout at positions that carry loss alone


@dataclass
class ScheduleConfig:
    stage1: StageSchedule = field(default_factory=StageSchedule)
    stage2: StageSchedule = field(default_factory=StageSchedule)
    stage3: StageSchedule = field(default_factory=StageSchedule)


@dataclass
class TrainConfig:
    max_steps: int = MISSING
    micro_batch_size: int = MISSING  # packed rows per rank and micro-batch
    global_batch_size: int = MISSING  # packed rows per step over all data-parallel ranks
    seed: int = 6198
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto (fp32 on cpu, bf16 on cuda) | fp32 | bf16 | fp8
    # Whose weights start this stage: a checkpoint, a run, a Hugging Face Molmo2, or [Qwen3 or OLMo 3, SigLIP 2].
    init_from: Any = None
    save_every: int = 1000
    keep_last: int = 3
    keep_every: int = 0  # checkpoints of steps that are multiples of this stay; 0: none but the last
    async_checkpoint: str = "auto"  # written while training goes on: auto (on cuda) | true | false
    stop_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1"])  # save, then end
    stop_after_minutes: Optional[float] = None  # the same after so long, counted from the start of the process
    max_skipped_steps: int = 10  # in a row with a loss or gradient that is not finite; then the run ends
    log_every: int = 10
    validate_every: int = 1000
    validation_batches: int = 8  # micro-batches per data-parallel rank
    generate_every: int = 0  # steps between answers to held-out questions; 0: none
    generate_examples: int = 8  # questions answered each time
    generate_max_tokens: int = 64  # of an answer
    wandb_project: Optional[str] = None  # log to Weights & Biases, too
    timeout_minutes: float = 20.0  # of a collective
    vision_chunk_crops: int = 32  # crops encoded at a time; 0: all at once
    vision_recompute: bool = True  # encode again in the backward pass instead of keeping activations
    vit_fp8: bool = False  # with precision=fp8, the vision transformer's matrix products too


@dataclass
class Config:
    stage: str = MISSING
    name: str = MISSING
    run_dir: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    # Any field of Megatron's own dataclasses: transformer.recompute_granularity=full, ...
    transformer: dict[str, Any] = field(default_factory=dict)  # TransformerConfig
    optimizer: dict[str, Any] = field(default_factory=dict)  # OptimizerConfig
    ddp: dict[str, Any] = field(default_factory=dict)  # DistributedDataParallelConfig


def register() -> None:
    """Make `Config` the schema that conf/stage*.yaml are merged into (their defaults list names it)."""
    from hydra.core.config_store import ConfigStore

    schema = OmegaConf.structured(Config)
    for prefix in ("transformer", "optimizer", "ddp"):
        # Their keys are Megatron's own; `check_megatron_fields` refuses the unknown ones.
        OmegaConf.set_struct(schema[prefix], False)
    ConfigStore.instance().store(name="molmo2_nemo_schema", node=schema)


def refuse_unknown_overrides(arguments: list[str]) -> None:
    """Raise ConfigError for the first `key=value` whose key is not in the schema or whose option has no file."""
    for argument in arguments:
        match = re.fullmatch(r"(\+{0,2}|~)([A-Za-z_][\w./]*)(?:@[\w.]+)?(?:=(.*))?", argument, re.DOTALL)
        if argument.startswith("-") or match is None or match[3] is None:
            continue
        key, value = match[2], match[3]
        if (CONF_DIR / key).is_dir():
            options = sorted(path.stem for path in (CONF_DIR / key).glob("*.yaml"))
            _refuse(
                value not in options and "," not in value,
                f"{key}={value}: conf/{key} has no {value}.yaml; choose one of {', '.join(options)}.",
            )
            continue
        if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
            continue
        cls, path = Config, key.split(".")
        for depth, name in enumerate(path):
            if not dataclasses.is_dataclass(cls):
                break  # a free dictionary: Megatron's fields, or rope_scaling
            types = {f.name: f.type for f in dataclasses.fields(cls)}
            if name not in types:
                where = ".".join(path[:depth])
                close = difflib.get_close_matches(name, types, n=1, cutoff=0.5)
                known = f"did you mean {'.'.join([*path[:depth], close[0]])}" if close else f"known are {', '.join(types)}"
                raise ConfigError(f"{key}={value}: {where or 'the configuration'} has no key {name}; {known}.")
            cls = types[name]


def to_dataclass(cfg: DictConfig) -> Config:
    """The typed configuration. Raises ConfigError naming the first key without a value."""
    if cfg.model.hf_path is not None:
        fill_from_hf(cfg)
    elif not OmegaConf.is_missing(cfg.model, "name") and cfg.model.name == "hf":
        raise ConfigError("model.hf_path has no value: name a Hugging Face folder, model.hf_path=DIR.")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: set it on the command line, {missing[0]}=VALUE.")
    config = OmegaConf.to_object(cfg)
    config.model.tokenizer = tokenizer_location(config.model.tokenizer)
    config.data.tokenizer = tokenizer_location(config.data.tokenizer)
    config.train.async_checkpoint = config.train.async_checkpoint.lower()  # true is a boolean to Hydra
    return config


def tokenizer_location(name: str) -> str:
    """A tokenizer that ships with this package may be named from the repository's root wherever the user stands."""
    shipped = REPOSITORY / name
    return str(shipped) if not Path(name).exists() and shipped.is_dir() else name


def fill_from_hf(cfg: DictConfig) -> None:
    """Replace `cfg.model` by the architecture of `cfg.model.hf_path`, a Hugging Face folder."""
    from molmo2_nemo.hf.architecture import model_config_from_hf
    from molmo2_nemo.hf.convert import head_is_tied

    model = model_config_from_hf(Path(cfg.model.hf_path))
    tokenizer = None if OmegaConf.is_missing(cfg.model, "tokenizer") else cfg.model.tokenizer
    if tokenizer is not None:
        model.tokenizer = tokenizer
    model.hf_path = cfg.model.hf_path
    model.tie_embeddings = head_is_tied(Path(cfg.model.hf_path))
    OmegaConf.update(cfg, "model", OmegaConf.structured(model), merge=False)


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the stored tables: a multiple of 128, so that they do not depend on the layout."""
    return -(-vocab_size // 128) * 128


def vision_token_ids(model: ModelConfig) -> dict[str, int]:
    """Ids that the model's own configuration names, under their names in transformers' Molmo2Config."""
    if model.vision_token_ids is not None:
        return dict(model.vision_token_ids)
    tokens = {
        "image_start_token_id": "<im_start>", "low_res_image_start_token_id": "<low_res_im_start>",
        "image_end_token_id": "<im_end>", "image_patch_id": "<im_patch>",
        "frame_start_token_id": "<frame_start>", "frame_end_token_id": "<frame_end>",
    }  # fmt: skip
    return {name: model.vocab_size + EXTRA_TOKENS.index(token) for name, token in tokens.items()}


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ConfigError(message)


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    _refuse(value not in choices, f"{key}={value} is unknown: choose one of {', '.join(choices)}.")


def check_model(m: ModelConfig) -> None:
    """Refuse an architecture that cannot be built. Raises ConfigError."""
    v = m.vision
    _check_choice("model.qk_norm", m.qk_norm, ("per_head", "full_width"))
    _refuse(
        m.num_attention_heads % m.num_query_groups != 0,
        f"model.num_attention_heads={m.num_attention_heads} is not divisible by "
        f"model.num_query_groups={m.num_query_groups}: give each key/value head a whole number of query heads.",
    )
    _refuse(
        v.image_size % v.patch_size != 0,
        f"model.vision.image_size={v.image_size} is not a multiple of model.vision.patch_size={v.patch_size}: "
        f"use {v.image_size // v.patch_size * v.patch_size}.",
    )
    _refuse(
        v.image_size // v.patch_size <= 2 * v.overlap_margin,
        f"model.vision.overlap_margin={v.overlap_margin} leaves nothing of a crop of "
        f"{v.image_size // v.patch_size} patches: make it smaller.",
    )
    bad = [layer for layer in m.vit.feature_layers if not -m.vit.num_layers <= layer < m.vit.num_layers]
    _refuse(
        bool(bad),
        f"model.vit.feature_layers={m.vit.feature_layers} names layers outside the {m.vit.num_layers} of "
        "model.vit.num_layers: correct one of the two.",
    )
    _refuse(
        m.additional_vocab_size < len(EXTRA_TOKENS),
        f"model.additional_vocab_size={m.additional_vocab_size} cannot hold the {len(EXTRA_TOKENS)} special "
        "tokens: use 128.",
    )


def check_parallel(p: ParallelConfig, m: ModelConfig, world_size: int) -> None:
    """Refuse a layout the model or the number of ranks does not allow. Raises ConfigError."""
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        _refuse(getattr(p, key) < 1, f"parallel.{key}={getattr(p, key)} must be at least 1.")
    _check_choice("parallel.cp_comm_type", p.cp_comm_type, ("a2a", "all_gather"))
    _check_choice("parallel.layer_spec", p.layer_spec, ("auto", "local", "transformer_engine"))
    _refuse(
        world_size % (tp * pp * cp) != 0,
        f"{world_size} rank(s) cannot be divided into groups of parallel.tensor_model_parallel_size={tp} x "
        f"pipeline_model_parallel_size={pp} x context_parallel_size={cp} = {tp * pp * cp}: start a multiple of "
        f"{tp * pp * cp} ranks (torchrun --nproc-per-node) or lower one of the three.",
    )
    _refuse(128 % tp != 0, f"parallel.tensor_model_parallel_size={tp} must be a power of two up to 128.")
    for key, value in (("num_attention_heads", m.num_attention_heads), ("num_query_groups", m.num_query_groups)):
        _refuse(
            value % tp != 0,
            f"parallel.tensor_model_parallel_size={tp} does not divide model.{key}={value}: "
            f"choose a tensor parallel size that divides {value}.",
        )
    _refuse(
        m.ffn_hidden_size % tp != 0,
        f"parallel.tensor_model_parallel_size={tp} does not divide model.ffn_hidden_size={m.ffn_hidden_size}.",
    )
    _refuse(
        p.cp_comm_type == "a2a" and m.num_attention_heads % (tp * cp) != 0,
        f"parallel.context_parallel_size={cp} with cp_comm_type=a2a needs model.num_attention_heads="
        f"{m.num_attention_heads} divisible by tensor x context parallel size = {tp * cp}: lower one of them or "
        "set parallel.cp_comm_type=all_gather.",
    )
    _refuse(
        p.sequence_parallel and tp == 1,
        "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1: set one or the other.",
    )
    layers_per_stage(p, m)
    pieces = p.virtual_pipeline_model_parallel_size
    _refuse(
        pieces is not None and (pieces < 2 or pp == 1 or len(set(layers_per_stage(p, m))) > 1 or m.num_layers % (pp * pieces)),
        f"parallel.virtual_pipeline_model_parallel_size={pieces} must be 2 or more, with pipeline_model_parallel_size={pp} "
        f"above 1 and model.num_layers={m.num_layers} a multiple of their product, without uneven first or last stages; "
        "null is the plain schedule.",
    )


def layers_per_stage(p: ParallelConfig, m: ModelConfig) -> list[int]:
    """Decoder layers on each pipeline stage. Raises ConfigError when they cannot be dealt out."""
    pp = p.pipeline_model_parallel_size
    first, last = p.num_layers_in_first_pipeline_stage, p.num_layers_in_last_pipeline_stage
    if pp == 1:
        _refuse(
            first is not None or last is not None,
            "parallel.num_layers_in_first/last_pipeline_stage needs parallel.pipeline_model_parallel_size > 1.",
        )
        return [m.num_layers]
    fixed = [n for n in (first, last) if n is not None]
    rest, stages = m.num_layers - sum(fixed), pp - len(fixed)
    _refuse(
        min(fixed, default=1) < 1 or rest < stages or (rest % stages if stages else rest) != 0,
        f"model.num_layers={m.num_layers} cannot be dealt to parallel.pipeline_model_parallel_size={pp} stages with "
        f"num_layers_in_first_pipeline_stage={first} and num_layers_in_last_pipeline_stage={last}: the layers left "
        "over must be a positive multiple of the stages left over.",
    )
    middle = [rest // stages] * stages if stages else []
    return ([first] if first else []) + middle + ([last] if last else [])


def row_multiple(p: ParallelConfig, precision: str = "auto", fp8_recipe: str = FP8_RECIPE) -> tuple[int, str]:
    """What a row's tokens must be a multiple of, and why: every rank's part is whole, in FP8 a multiple of 16 or 32.

    16 is what FP8 matrix products need, 32 mxfp8 with its blocks (megatron.core.fp8_utils.get_fp8_align_size).
    """
    align = 1 if precision != "fp8" else 32 if fp8_recipe == "mxfp8" else 16
    shared = p.tensor_model_parallel_size if p.sequence_parallel else 1
    reason = f"context parallel {p.context_parallel_size}"
    reason += f" x tensor parallel {shared} with sequence_parallel" if p.sequence_parallel else ""
    return p.context_parallel_size * shared * align, reason + (f" x {align} for FP8" if align > 1 else "")


def check_data(d: DataConfig, v: VisionConfig, p: ParallelConfig, multiple: tuple[int, str] | None = None) -> None:
    """Refuse budgets that hold nothing. multiple: of a row's tokens, see row_multiple. Raises ConfigError."""
    _check_choice("data.loss_weighting", d.loss_weighting, ("flat", "root", "root_report"))
    _check_choice("data.style_prefix", d.style_prefix, ("length", "demo"))
    _check_choice("data.prompts", d.prompts, ("templates", "none"))
    _refuse(not 0 <= d.max_error_rate <= 1, f"data.max_error_rate={d.max_error_rate} is not between 0 and 1.")
    multiple, reason = multiple or row_multiple(p)
    _refuse(
        d.seq_length < 1 or d.seq_length % multiple != 0,
        f"data.seq_length={d.seq_length} is not a positive multiple of {multiple} ({reason}): use "
        f"{max(1, -(-d.seq_length // multiple)) * multiple}.",
    )
    _refuse(
        d.max_crops < d.max_crops_per_image + 1,
        f"data.max_crops={d.max_crops} cannot hold one image of data.max_crops_per_image={d.max_crops_per_image} "
        f"tiles and its overview: use at least {d.max_crops_per_image + 1}.",
    )
    _refuse(
        d.max_frames < 1 or d.max_frames > d.max_crops,
        f"data.max_frames={d.max_frames} does not fit data.max_crops={d.max_crops} (a frame is one crop): lower "
        "the one or raise the other.",
    )
    side = v.image_size // v.patch_size
    tokens = 2 * (-(-side // v.image_pooling)) ** 2
    _refuse(
        d.seq_length <= tokens,
        f"data.seq_length={d.seq_length} cannot hold the {tokens} patch tokens of the smallest image: raise it.",
    )
    for key in ("packing_buffer_size", "max_crops_per_image", "max_images", "high_res_crops"):
        _refuse(getattr(d, key) < 1, f"data.{key}={getattr(d, key)} must be at least 1.")
    _refuse(d.num_workers < 0, f"data.num_workers={d.num_workers} must not be negative.")


_OWN_ATTENTION = "attention is FlexAttention or SDPA under a mask of packed rows, which does not read it"
_OWN_NORMS = "the norms are not apex's, whose kernels it chooses"
_FP8_WEIGHTS = "weights are not made inside Transformer Engine's FP8 context and checkpoints hold none in FP8"
_OTHER_MODELS = "the models are dense decoders with the attention of Qwen3 or OLMo 3"
# Fields of Megatron's dataclasses that our modules would ignore or break on when they are set, and why.
CANNOT_WORK = {
    "transformer": {
        "apply_rope_fusion": "each token has a position of its own, and the fused kernel takes one table for all rows",
        **dict.fromkeys(
            ("masked_softmax_fusion", "attention_dropout", "softmax_scale", "apply_query_key_layer_scaling", "window_size",
             "fp8_dot_product_attention", "fp8_multi_head_attention", "qk_clip", "attention_output_gate"), _OWN_ATTENTION
        ),
        **dict.fromkeys(("persist_layer_norm", "memory_efficient_layer_norm", "layernorm_zero_centered_gamma"), _OWN_NORMS),
        **dict.fromkeys(("fp8_param", "fp4", "fp4_param"), _FP8_WEIGHTS),
        "fp8_output_proj": "the head computes the losses of a chunk of tokens at a time, in bf16",
        **dict.fromkeys(("num_moe_experts", "multi_latent_attention", "mtp_num_layers"), _OTHER_MODELS),
        **dict.fromkeys(
            ("enable_cuda_graph", "external_cuda_graph", "cuda_graph_scope"),
            "the number of crops and of loss tokens differs from one micro-batch to the next",
        ),
    },
    "optimizer": {},
    "ddp": {"fp8_param_gather": _FP8_WEIGHTS},
}  # fmt: skip


def check_engine(cfg: Config) -> None:
    """Refuse settings of FP8, overlap and offload that exclude each other. Raises ConfigError.

    What depends on the GPU and on installed libraries is in gpu.check_device.
    """
    t, p, m, train = cfg.transformer, cfg.parallel, cfg.model, cfg.train
    tp, fp8, local = p.tensor_model_parallel_size, train.precision == "fp8", p.layer_spec == "local"
    recipe = t.get("fp8_recipe", FP8_RECIPE)
    _check_choice("transformer.fp8_recipe", recipe, ("delayed", "tensorwise", "blockwise", "mxfp8"))
    _refuse(fp8 and local, "train.precision=fp8 needs Transformer Engine's layers: set parallel.layer_spec=transformer_engine.")
    for key in ("fp8_recipe", "first_last_layers_bf16"):
        _refuse(bool(t.get(key)) and not fp8, f"transformer.{key}={t.get(key)} needs train.precision=fp8: set it, too.")
    _refuse(train.vit_fp8 and not fp8, "train.vit_fp8=true needs train.precision=fp8: set it, too.")
    _refuse(
        train.vit_fp8 and recipe == "delayed",
        "train.vit_fp8=true does not work with transformer.fp8_recipe=delayed, whose maxima all ranks share after each pass "
        "of the vision transformer, since ranks encode different numbers of chunks: use tensorwise or blockwise.",
    )
    bf16_layers = t.get("first_last_layers_bf16", False)
    _refuse(
        bool(bf16_layers) and recipe == "delayed",
        "transformer.first_last_layers_bf16=true does not work with transformer.fp8_recipe=delayed, which is switched on for "
        "all layers at once: use tensorwise or blockwise.",
    )
    for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        _refuse(key in t and not bf16_layers, f"transformer.{key}={t.get(key)} needs transformer.first_last_layers_bf16=true.")
    widths = {
        "model.hidden_size": m.hidden_size, "model.ffn_hidden_size": m.ffn_hidden_size // tp,
        "model.num_attention_heads x head_dim": m.num_attention_heads * m.head_dim // tp,
        "model.num_query_groups x head_dim": m.num_query_groups * m.head_dim // tp,
    }  # fmt: skip
    if train.vit_fp8:
        widths.update({"model.vit.hidden_size": m.vit.hidden_size, "model.vit.ffn_hidden_size": m.vit.ffn_hidden_size})
    align = 32 if recipe == "mxfp8" else 16
    for key, width in widths.items():
        _refuse(
            fp8 and width % align != 0,
            f"train.precision=fp8 with {recipe} scaling needs widths in multiples of {align}, and a rank's part of {key} is "
            f"{width}: use train.precision=bf16" + (" or another transformer.fp8_recipe." if align > 16 else "."),
        )
    if t.get("cpu_offloading"):
        _refuse(local, "transformer.cpu_offloading=true needs Transformer Engine: set parallel.layer_spec=transformer_engine.")
        _refuse(
            p.pipeline_model_parallel_size > 1 or t.get("recompute_granularity") is not None,
            "transformer.cpu_offloading=true works with neither pipeline parallelism nor transformer.recompute_granularity: "
            "drop the one or the other.",
        )
        _refuse(
            not 0 < t.get("cpu_offloading_num_layers", 0) < m.num_layers,
            f"transformer.cpu_offloading_num_layers={t.get('cpu_offloading_num_layers', 0)} must be at least 1 and below "
            f"model.num_layers={m.num_layers}.",
        )
    _refuse(
        bool(t.get("tp_comm_overlap")) and (local or not p.sequence_parallel),
        "transformer.tp_comm_overlap=true needs parallel.sequence_parallel=true and Transformer Engine's layers "
        "(parallel.layer_spec=transformer_engine).",
    )
    for key in ("overlap_grad_reduce", "use_distributed_optimizer"):
        _refuse(
            bool(cfg.ddp.get("overlap_param_gather")) and cfg.ddp.get(key) is False,
            f"ddp.overlap_param_gather=true needs ddp.{key}, which is false: leave that out, it is then switched on.",
        )


def check_megatron_fields(cfg: Config) -> None:
    """Refuse names that Megatron's dataclasses lack, and those that another key already decides."""
    if not (cfg.transformer or cfg.optimizer or cfg.ddp):
        return  # without importing Megatron, which takes seconds
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    ours = {
        "transformer": {
            "num_layers": "model.num_layers", "hidden_size": "model.hidden_size",
            "num_attention_heads": "model.num_attention_heads", "num_query_groups": "model.num_query_groups",
            "kv_channels": "model.head_dim", "ffn_hidden_size": "model.ffn_hidden_size",
            "tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
            "pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
            "context_parallel_size": "parallel.context_parallel_size",
            "sequence_parallel": "parallel.sequence_parallel", "cp_comm_type": "parallel.cp_comm_type",
            "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline_model_parallel_size",
            "num_layers_in_first_pipeline_stage": "parallel.num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage": "parallel.num_layers_in_last_pipeline_stage",
            "transformer_impl": "parallel.layer_spec", "hidden_dropout": "schedule.STAGE.hidden_dropout",
            "init_method_std": "model.init_std", "layernorm_epsilon": "model.layernorm_epsilon",
            **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16", "fp8"), "train.precision"),
            "calculate_per_token_loss": "the loss, which is always normalised over the global batch",
        },
        "optimizer": {
            "lr": "optim.llm.lr", "min_lr": "optim.min_lr_ratio", "clip_grad": "optim.clip_grad",
            "use_distributed_optimizer": "ddp.use_distributed_optimizer",
            "overlap_param_gather": "ddp.overlap_param_gather",
        },
        "ddp": {},
    }  # fmt: skip
    classes = {"transformer": TransformerConfig, "optimizer": OptimizerConfig, "ddp": DistributedDataParallelConfig}
    for prefix, cls in classes.items():
        known = {f.name for f in dataclasses.fields(cls)}
        for key, value in getattr(cfg, prefix).items():
            _refuse(key not in known, f"{prefix}.{key}={value}: Megatron's {cls.__name__} has no field {key}.")
            decided = ours[prefix].get(key)
            _refuse(decided is not None, f"{prefix}.{key}={value} is decided by {decided}: set it there.")
            _refuse(
                bool(value) and key in CANNOT_WORK[prefix],
                f"{prefix}.{key}={value} does not work here, since {CANNOT_WORK[prefix].get(key)}: leave it out.",
            )


def check(cfg: Config, world_size: int) -> None:
    """All checks that need no data on disk. Raises ConfigError with one sentence."""
    check_settings(cfg, world_size)
    check_megatron_fields(cfg)


def check_settings(cfg: Config, world_size: int) -> None:
    """Those of `check` that do not import Megatron."""
    _check_choice("stage", cfg.stage, ("stage1", "stage2", "stage3"))
    check_model(cfg.model)
    check_parallel(cfg.parallel, cfg.model, world_size)
    t, p = cfg.train, cfg.parallel
    multiple = row_multiple(p, t.precision, cfg.transformer.get("fp8_recipe", FP8_RECIPE))
    check_data(cfg.data, cfg.model.vision, p, multiple)
    _check_choice("train.device", t.device, ("auto", "cpu", "cuda"))
    _check_choice("train.precision", t.precision, ("auto", "fp32", "bf16", "fp8"))
    given = t.init_from
    _refuse(
        not (given is None or isinstance(given, str))
        and not (isinstance(given, list) and len(given) == 2 and all(isinstance(folder, str) for folder in given)),
        f"train.init_from={given} must be one folder, or two: 'train.init_from=[LLM_DIR,SIGLIP2_DIR]'.",
    )
    _check_choice("train.async_checkpoint", t.async_checkpoint, ("auto", "true", "false"))
    _check_choice("optim.decay", cfg.optim.decay, ("cosine", "linear", "constant"))
    for key in (
        "max_steps", "micro_batch_size", "global_batch_size", "save_every", "keep_last", "log_every", "max_skipped_steps",
    ):  # fmt: skip
        _refuse(getattr(t, key) < 1, f"train.{key}={getattr(t, key)} must be at least 1.")
    for key in ("keep_every", "generate_every", "generate_examples", "vision_chunk_crops"):
        _refuse(getattr(t, key) < 0, f"train.{key}={getattr(t, key)} must not be negative.")
    _refuse(
        t.generate_every > 0 and not (t.generate_examples > 0 and 0 < t.generate_max_tokens <= cfg.data.seq_length // 2),
        f"train.generate_every={t.generate_every} needs train.generate_examples={t.generate_examples} of at least 1, and "
        f"train.generate_max_tokens={t.generate_max_tokens} between 1 and half of data.seq_length={cfg.data.seq_length}.",
    )
    _refuse(
        t.stop_after_minutes is not None and not t.stop_after_minutes > 0,
        f"train.stop_after_minutes={t.stop_after_minutes} must be above 0, or null for no limit.",
    )
    for name in t.stop_signals:
        _refuse(
            name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"),
            f"train.stop_signals: {name} is no signal that a program can catch; use names such as SIGTERM, SIGUSR1.",
        )
    for key in ("clip_grad", "z_loss"):
        _refuse(not getattr(cfg.optim, key) >= 0, f"optim.{key}={getattr(cfg.optim, key)} must not be negative.")
    for pattern in cfg.optim.freeze_patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"optim.freeze_patterns: {pattern} is no regular expression ({error}).") from None
    _refuse(
        t.wandb_project is not None and importlib.util.find_spec("wandb") is None,
        f"train.wandb_project={t.wandb_project}, but wandb is not installed: pip install wandb, or leave the key out.",
    )
    ranks = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
    rows = t.micro_batch_size * (world_size // ranks)
    _refuse(
        t.global_batch_size % rows != 0,
        f"train.global_batch_size={t.global_batch_size} is not a multiple of train.micro_batch_size="
        f"{t.micro_batch_size} x {world_size // ranks} data-parallel ranks = {rows}: use "
        f"{-(-t.global_batch_size // rows) * rows}.",
    )
    micro_batches = t.global_batch_size // rows
    _refuse(
        p.virtual_pipeline_model_parallel_size is not None and micro_batches % p.pipeline_model_parallel_size != 0,
        f"parallel.virtual_pipeline_model_parallel_size={p.virtual_pipeline_model_parallel_size} needs micro-batches per "
        f"step ({micro_batches}) in multiples of parallel.pipeline_model_parallel_size={p.pipeline_model_parallel_size}: "
        "change train.global_batch_size or train.micro_batch_size.",
    )
    _refuse(
        all(getattr(cfg.optim, c).freeze for c in COMPONENTS),
        "optim.vit.freeze, optim.connector.freeze and optim.llm.freeze are all true: nothing would be trained.",
    )
    check_engine(cfg)


def rank_from_environment() -> int:
    """This process among the ranks of the job: torchrun's RANK, else srun's SLURM_PROCID, else 0."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def world_size_from_environment() -> int:
    """Ranks of this job: torchrun's WORLD_SIZE, else srun's SLURM_NTASKS inside a step, else 1."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    return 1


def component_of(name: str) -> str:
    """`vit`, `connector` or `llm` for a parameter's name. The extra vocabulary's rows train with the connector."""
    name = name.removeprefix("module.")
    if name.startswith("vision.vit."):
        return "vit"
    if name.startswith("vision.connector.") or name == "embedding.extra_embedding":
        return "connector"
    return "llm"


def is_frozen(name: str, optim: OptimConfig, tied: bool) -> bool:
    """Whether a parameter is not trained: its component's switch, a pattern of `optim.freeze_patterns` in its name,
    and the base embedding with a head tied to it."""
    name = name.removeprefix("module.")
    if getattr(optim, component_of(name)).freeze or any(re.search(pattern, name) for pattern in optim.freeze_patterns):
        return True
    is_table = name == "embedding.word_embeddings.weight" or (tied and name == "output_layer.weight")
    return optim.freeze_embedding and is_table


def model_config_to_json(model: ModelConfig) -> str:
    """What a checkpoint records of its architecture."""
    return json.dumps(dataclasses.asdict(model), indent=2, sort_keys=True) + "\n"


def model_config_from_json(text: str) -> ModelConfig:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), json.loads(text)))
