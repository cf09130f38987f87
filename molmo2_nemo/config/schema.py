"""The dataclasses behind conf/: every key, its type and its default. Nothing here imports torch.

YAML in conf/ is for people, these dataclasses are for the program. Hydra merges the first into the second
(`command_line.register`), so that a misspelt key or a wrong type is refused by name.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf

# Rows of the extra vocabulary by offset from the base vocabulary (molmo2: olmo/tokenizer.py).
EXTRA_TOKENS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
    "<|points|>",
    "<|token_index|>",
    "<|vit_index|>",
    "<|vit_loc|>",
)


# With precision=fp8, unless transformer.fp8_recipe says otherwise: it keeps no state, so a resumed run goes on
# exactly and ranks need not agree on maxima, and it has a bf16 form of the first and last layers.
FP8_RECIPE = "tensorwise"


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
    hf_path: str | None = None
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
    rope_scaling: dict[str, Any] | None = None  # transformers' rope_parameters without rope_theta
    rope_scaling_layers: list[int] | None = None  # None: all layers, when rope_scaling is set
    init_std: float = 0.02
    # Ids under their names in transformers' Molmo2Config; None: the base vocabulary's size plus EXTRA_TOKENS' offsets.
    vision_token_ids: dict[str, int] | None = None


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    cp_comm_type: str = "a2a"  # a2a (Ulysses) | all_gather (keys and values)
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    # Each pipeline rank holds so many separate pieces of the decoder (interleaved schedule); null: one.
    virtual_pipeline_model_parallel_size: int | None = None
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
    stop_after_minutes: float | None = None  # the same after so long, counted from the start of the process
    max_skipped_steps: int = 10  # in a row with a loss or gradient that is not finite; then the run ends
    log_every: int = 10
    validate_every: int = 1000
    validation_batches: int = 8  # micro-batches per data-parallel rank
    generate_every: int = 0  # steps between answers to held-out questions; 0: none
    generate_examples: int = 8  # questions answered each time
    generate_max_tokens: int = 64  # of an answer
    wandb_project: str | None = None  # log to Weights & Biases, too
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


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the stored tables: a multiple of 128, so that they do not depend on the layout."""
    return -(-vocab_size // 128) * 128


def vision_token_ids(model: ModelConfig) -> dict[str, int]:
    """Ids that the model's own configuration names, under their names in transformers' Molmo2Config."""
    if model.vision_token_ids is not None:
        return dict(model.vision_token_ids)
    tokens = {
        "image_start_token_id": "<im_start>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "image_end_token_id": "<im_end>",
        "image_patch_id": "<im_patch>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    return {name: model.vocab_size + EXTRA_TOKENS.index(token) for name, token in tokens.items()}


def model_config_to_json(model: ModelConfig) -> str:
    """What a checkpoint records of its architecture."""
    return json.dumps(dataclasses.asdict(model), indent=2, sort_keys=True) + "\n"


def model_config_from_json(text: str) -> ModelConfig:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), json.loads(text)))
