"""The dataclasses behind conf/: every key, its type, its default and its meaning. Nothing here imports torch.

YAML in conf/ is for people, these dataclasses are for the program. Hydra merges the first into the second
(`command_line.register`), so that a misspelt key or a wrong type is refused by name.

The string after a field says what it means; a last sentence "Source: ..." says where its default comes from.
tools/dev/make_settings.py writes docs/settings.md from them. "allenai/molmo2" is the public training code of Ai2,
github.com/allenai/molmo2; arXiv 2601.10611 is the technical report of Molmo2.
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


# The recipe of train.precision=fp8 unless transformer.fp8_recipe is set. It keeps no state between steps, so a resumed
# run continues exactly and ranks need not agree on maxima, and it allows the first and last layers to stay in bf16.
FP8_RECIPE = "tensorwise"
# What rows and widths of FP8 matrix products must be multiples of. 16, and 32 for the blocks of mxfp8: Megatron-Core
# 0.19.2, get_fp8_align_size. 128 for the blocks of blockwise: Transformer Engine 2.20,
# docs/features/low_precision_training/fp8_blockwise_scaling; docs/gpu.md, "FP8", says what its source makes of it.
FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}


# What `train.vision_chunk_crops` and `transformer.recompute` say to have the plan choose (auto.py).
AUTO = "auto"
LAYERS = "layers"  # what `train.vision_recompute` may say beside true and false
# What `transformer.recompute` may say beside AUTO, as fields of Megatron's TransformerConfig; the least work first.
RECOMPUTE = {
    "none": {},
    "mlp": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


# The values of `stage`: a recipe and a file of conf/ for each.
STAGES = ("stage1", "stage2", "stage3", "finetune")


# Scores of answers to held-out questions (training/score.py), by any of which `train.save_best` may go.
POINT_METRICS = ("point_precision", "point_recall", "point_f1")
TRACK_METRICS = ("track_precision", "track_recall", "track_f1")
METRICS = (*POINT_METRICS, *TRACK_METRICS, "count_exact", "count_close", "exact_match")


@dataclass
class VisionConfig:
    """Geometry of crops and pooling windows, which the image processor and the model must agree on."""

    image_size: int = 378
    """Side of a square crop in pixels. Source: allenai/molmo2, `olmo/preprocessing/multicrop_preprocessor.py`."""
    patch_size: int = 14
    """Side of a patch in pixels. Source: SigLIP 2 so400m/14."""
    image_pooling: int = 2
    """Patches on each side of the window that becomes one image token. Source: arXiv 2601.10611, section 3."""
    video_pooling: int = 3
    """Patches on each side of the window that becomes one video token. Source: arXiv 2601.10611, section 3."""
    overlap_margin: int = 4
    """Patches by which neighbouring crops overlap; they are dropped on each inner side of a crop.
    Source: allenai/molmo2, `olmo/preprocessing/multicrop_preprocessor.py`."""

    @property
    def patches_per_crop(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * 3


@dataclass
class VitConfig:
    """Vision transformer. The defaults are SigLIP 2 so400m/14, which the released models use."""

    num_layers: int = 25
    """Layers that are built. SigLIP has 27; nothing reads the last two.
    Source: allenai/molmo2, `olmo/model_configs.py`."""
    hidden_size: int = 1152
    """Width of a patch's hidden state. Source: SigLIP 2 so400m/14."""
    num_attention_heads: int = 16
    """Attention heads. Source: SigLIP 2 so400m/14."""
    head_dim: int = 72
    """Width of an attention head. Source: SigLIP 2 so400m/14."""
    ffn_hidden_size: int = 4304
    """Width of the MLP's hidden layer. Source: SigLIP 2 so400m/14."""
    layernorm_epsilon: float = 1e-6
    """Epsilon of the layer norms. Source: SigLIP 2 so400m/14."""
    feature_layers: list[int] = field(default_factory=lambda: [24, 18])
    """Layers, counted from 0, whose outputs are concatenated in this order and go to the connector; negative numbers
    count from the last one. Source: allenai/molmo2, `olmo/model_configs.py` (-3 and -9 of 27)."""


@dataclass
class ConnectorConfig:
    """Attention pooling over a window of patches, then a SwiGLU projector into the language model's width."""

    hidden_size: int = 1152
    """Width of the pooling attention. Source: allenai/molmo2, `olmo/model_configs.py`."""
    num_attention_heads: int = 16
    """Heads of the pooling attention. Source: allenai/molmo2, `olmo/model_configs.py`."""
    head_dim: int = 72
    """Width of a head of the pooling attention. Source: allenai/molmo2, `olmo/model_configs.py`."""
    ffn_hidden_size: int = MISSING
    """Width of the projector's hidden layer; in the released models that of the language model's MLP.
    Source: allenai/molmo2, `olmo/model_configs.py`."""


@dataclass
class ModelConfig:
    """Architecture. With `hf_path`, all of it is read from that Hugging Face folder's config.json."""

    name: str = MISSING
    """What the log and the planner call the model."""
    hf_path: str | None = None
    """Folder of a Hugging Face Molmo2 whose config.json gives the architecture; goes with `model=hf`."""
    tokenizer: str = MISSING
    """Tokenizer: a folder, or a repository on the Hugging Face Hub."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Geometry of crops and pooling windows."""
    vit: VitConfig = field(default_factory=VitConfig)
    """The vision transformer."""
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)
    """Pooling and projector between vision transformer and language model."""
    num_layers: int = MISSING
    """Decoder layers."""
    hidden_size: int = MISSING
    """Width of the decoder's hidden states."""
    num_attention_heads: int = MISSING
    """Query heads of the decoder's attention."""
    num_query_groups: int = MISSING
    """Key and value heads of the decoder's attention."""
    head_dim: int = MISSING
    """Width of an attention head of the decoder."""
    ffn_hidden_size: int = MISSING
    """Width of the decoder MLP's hidden layer."""
    vocab_size: int = MISSING
    """Size of the base vocabulary, which is also the width of the logits."""
    additional_vocab_size: int = 128
    """Rows of the extra vocabulary (image, video and point tokens). Source: allenai/molmo2, `olmo/tokenizer.py`."""
    max_position_embeddings: int = 36864
    """Positions that an exported config.json declares. Source: row length of stage 3, arXiv 2601.10611."""
    layernorm_epsilon: float = 1e-6
    """Epsilon of the decoder's norms. Source: Qwen3 and OLMo 3."""
    qk_norm: str = "per_head"
    """Norm of queries and keys: `per_head` as in Qwen3, or `full_width` over all heads as in OLMo 3."""
    norm_after: bool = False
    """Normalise the output of each sublayer, as OLMo 3 does, instead of its input."""
    tie_embeddings: bool = False
    """The output head is the base embedding table."""
    rope_theta: float = 1e6
    """Base of the rotary position embedding. Source: Qwen3-8B; the other models set their own."""
    rope_scaling: dict[str, Any] | None = None
    """Scaling of the rotary position embedding, as transformers' `rope_parameters` without `rope_theta`."""
    rope_scaling_layers: list[int] | None = None
    """Decoder layers to which `rope_scaling` applies; null: all of them."""
    init_std: float = 0.02
    """Standard deviation of weights that are drawn. Source: allenai/molmo2, `olmo/model_configs.py`."""
    vision_token_ids: dict[str, int] | None = None
    """Ids of the vision tokens under their names in transformers' Molmo2Config; null: `vocab_size` plus the offsets of
    `EXTRA_TOKENS`."""


@dataclass
class ParallelConfig:
    """How the model and the rows are split over ranks. The data-parallel size is what is left of the ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each weight matrix (TP)."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages over which the decoder layers are split (PP); the vision tower is on the first."""
    context_parallel_size: int = 1
    """Ranks that share each row of tokens (CP)."""
    sequence_parallel: bool = False
    """Split activations outside of matrix products over the tensor parallel ranks, too. Needs TP above 1."""
    cp_comm_type: str = "a2a"
    """How attention works across context parallel ranks: `a2a` exchanges sequence for heads (Ulysses), `all_gather`
    gathers keys and values."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Decoder layers on the first pipeline stage, which also has the vision tower; null: an equal share."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Decoder layers on the last pipeline stage, which also has the output head; null: an equal share."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Separate pieces of the decoder that each pipeline rank holds (interleaved schedule); null: one."""
    layer_spec: str = "auto"
    """Whose layers are used: `transformer_engine`, `local` (Megatron-Core's own), or `auto`, which is Transformer
    Engine where it is installed and there is a GPU."""
    kernels: str = "auto"
    """What is done between matrix products: `fused` by one kernel each (GPU, liger-kernel installed), `plain` by
    torch's operations one after the other, or `auto`, which is `fused` where it can be."""
    attention_kernel: str = "triton"
    """The decoder's attention on a GPU: `triton`, FlexAttention's own kernels; `tma`, the same with loads by the tensor
    memory accelerator, which torch calls experimental; `flash`, its back end on FlashAttention 4 (the package
    `flash_attn.cute` must be installed). None has run on a GPU."""


@dataclass
class DataConfig:
    """What is read, how samples become rows, and what is done about broken ones."""

    blend: str = MISSING
    """The mixture of sources: a name in conf/blend, or the path or address of a YAML file. With data of your own, where
    `keep` takes its sources from."""
    own: dict[str, str] = field(default_factory=dict)
    """Folders of shards of your own by name, in the place of the mixture, each sample as often as any other. For
    `recipes/finetune.py` `data.mine=FOLDER` is short for `data.own.mine=FOLDER`."""
    own_weights: dict[str, float] = field(default_factory=dict)
    """How often samples of your own data are drawn, by the same names, instead of their numbers; of all or none."""
    keep: Any = None
    """Share of general data among the samples beside your own, such as `pixmo:0.3`, or a list of several: a source of
    `blend`, the beginning of the names of several, or `all`. Those that are not on disk are left out, and named."""
    root: str = MISSING
    """Folder that holds the blend's sources, or its address in object storage, such as `s3://bucket/shards`; the
    environment variable DATA_ROOT, else data/shards."""
    tokenizer: str = MISSING
    """Tokenizer of the data; that of the model unless set."""
    seq_length: int = MISSING
    """Tokens of a packed row."""
    max_crops: int = MISSING
    """Image crops and video frames of a packed row, together."""
    max_crops_per_image: int = 8
    """Crops of one image beside its overview. Source: allenai/molmo2, `max_crops` in pre-training and SFT."""
    max_frames: int = MISSING
    """Frames of one video at most."""
    max_fps: float = 2.0
    """Frames taken per second of video, while `max_frames` allows. Source: arXiv 2601.10611, section 3."""
    packing_buffer_size: int = 48
    """Examples that wait to be packed into rows, per loader worker. Source: allenai/molmo2 and arXiv 2601.10611, where
    more than 48 gained nothing."""
    shuffle_buffer_size: int = 100
    """Samples among which Energon draws at random, per loader worker."""
    num_workers: int = 2
    """Loader processes per data-parallel rank; 0 loads in the training process. Source: allenai/molmo2, stage 1."""
    seed: int = 1
    """Seed of the order of samples and of what is drawn for each (prompts, crops, branch order)."""
    point_separator: str = ";"
    """What separates the frames or images in a list of points: a tab in stage 1, a semicolon in stages 2 and 3.
    Source: allenai/molmo2."""
    loss_weighting: str = "root"
    """Weight of answer tokens: `flat` is 1 everywhere, `root` is 2 / sqrt(answer tokens) with fixed weights for
    pointing, tracking and video captions, `root_report` has 4 in place of 2. Source: allenai/molmo2 (2) and
    arXiv 2601.10611 (4)."""
    style_prefix: str = "demo"
    """What precedes a question: `length` is "style n:" as in stage 1, `demo` is nothing for styles that people use and
    "style: " for the others. Source: allenai/molmo2."""
    prompts: str = "templates"
    """Wording of a task's question: `templates` draws it from a set of sentences, `none` gives the label alone or
    nothing. Source: allenai/molmo2 (none in stage 1)."""
    max_images: int = 5
    """Images of one sample; of more the first are used, and what is about the others is left out. Source:
    allenai/molmo2."""
    high_res_crops: int = 24
    """Crops of a single image of a source with `high_res_probability`, that often. Source: allenai/molmo2."""
    skip_missing: bool = False
    """Leave out sources of the blend that are not on disk, and give their share to the rest of their group."""
    max_error_rate: float = 0.01
    """Share of a source's samples that may be broken; above it the run stops and names the source."""
    cache_dir: str | None = None
    """Folder on each node's own disk where shards are cached. Unless set, data in object storage are cached in
    SLURM_TMPDIR or the system's temporary folder, and data on a file system are not; docs/storage.md."""
    cache_size: str | None = None
    """Bytes that the cache may take on a node, such as 500GB. Unless set, 80 % of what is free there."""

    @property
    def said(self) -> str:
        """The settings that name the data, for messages."""
        own = " ".join(f"data.{name}={folder}" for name, folder in self.own.items())
        return own + (f" data.keep={self.keep}" if self.keep else "") if own else f"data.blend={self.blend}"


@dataclass
class ComponentOptim:
    """Learning rate of one of the three components."""

    lr: float = MISSING
    """Peak learning rate."""
    warmup_steps: int = MISSING
    """Steps over which the rate rises linearly from 0 to its peak."""
    freeze: bool = False
    """Do not train this component: no gradient, no optimizer state."""


@dataclass
class OptimConfig:
    """AdamW with a rate, a warm-up and gradient clipping for each component."""

    vit: ComponentOptim = field(default_factory=ComponentOptim)
    """The vision transformer."""
    connector: ComponentOptim = field(default_factory=ComponentOptim)
    """The connector, and the rows of the extra vocabulary. Source: allenai/molmo2."""
    llm: ComponentOptim = field(default_factory=ComponentOptim)
    """The language model."""
    freeze_embedding: bool = True
    """Do not train the base embedding table, nor a head tied to it. Source: allenai/molmo2."""
    freeze_patterns: list[str] = field(default_factory=list)
    """Regular expressions; a parameter whose name one of them matches somewhere is not trained."""
    warmup_share: float | None = None
    """Share of the run's steps over which the rates rise, for each component whose `warmup_steps` is 0; null: none."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step, as a share of the peak. Source: allenai/molmo2."""
    decay: str = "cosine"
    """How the rate falls after the warm-up: `cosine`, `linear` or `constant`. Source: allenai/molmo2 (cosine)."""
    clip_grad: float = 1.0
    """Largest norm of each component's gradient, which is scaled down to it; 0 clips nothing.
    Source: allenai/molmo2."""
    z_loss: float = 1e-4
    """Factor of the squared log-partition function in the loss. Source: PaLM, arXiv 2204.02311, section 5; the value is
    allenai/molmo2's."""
    weight_decay: float = 0.0
    """Decoupled weight decay. Source: allenai/molmo2."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment. Source: allenai/molmo2."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment. Source: allenai/molmo2."""
    adam_eps: float = 1e-6
    """Adam's epsilon. Source: allenai/molmo2."""


# What `lora.targets` may name.
LORA_TARGETS = ("attention", "mlp", "connector", "vit")


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) beside frozen weights. They alone are trained and saved."""

    rank: int = 0
    """Width of the adapters; 0: no LoRA, all weights that are not frozen are trained."""
    alpha: float = 32.0
    """The adapters' product is multiplied by alpha / rank. Source: twice rank 16, as is usual."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are dropped while it is trained."""
    targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])
    """Matrices that have adapters: `attention` and `mlp` of the language model's layers, `connector`, `vit`.
    Source: all linear layers of the language model, as in QLoRA, arXiv 2305.14314."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, which keeps large ranks from being slowed down. Source: arXiv
    2312.03732."""


@dataclass
class StageSchedule:
    """What a schedule (conf/schedule/*.yaml) says about one stage. Other keys take their values from here."""

    max_steps: int | None = MISSING
    """Value of `train.max_steps`."""
    epochs: float | None = None
    """Value of `train.epochs`."""
    global_batch_size: int = MISSING
    """Value of `train.global_batch_size`."""
    micro_batch_size: int = 1
    """Value of `train.micro_batch_size`."""
    seq_length: int = MISSING
    """Value of `data.seq_length`."""
    max_frames: int = MISSING
    """Value of `data.max_frames`."""
    max_crops: int = MISSING
    """Value of `data.max_crops`."""
    context_parallel_size: int = 1
    """Value of `parallel.context_parallel_size`."""
    lr_vit: float = MISSING
    """Value of `optim.vit.lr`."""
    lr_connector: float = MISSING
    """Value of `optim.connector.lr`."""
    lr_llm: float = MISSING
    """Value of `optim.llm.lr`."""
    warmup_vit: int = MISSING
    """Value of `optim.vit.warmup_steps`."""
    warmup_connector: int = MISSING
    """Value of `optim.connector.warmup_steps`."""
    warmup_llm: int = MISSING
    """Value of `optim.llm.warmup_steps`."""
    hidden_dropout: float = 0.0
    """Dropout on the output of each decoder sublayer, before it is added to the residual stream."""
    response_dropout: bool = False
    """Apply `hidden_dropout` only at positions that carry loss."""


@dataclass
class ScheduleConfig:
    """Lengths, batch sizes and rates of the three stages, and of fine-tuning."""

    stage1: StageSchedule = field(default_factory=StageSchedule)
    """Pre-training."""
    stage2: StageSchedule = field(default_factory=StageSchedule)
    """Supervised fine-tuning."""
    stage3: StageSchedule = field(default_factory=StageSchedule)
    """Long-context fine-tuning."""
    finetune: StageSchedule | None = None
    """Fine-tuning on data of your own."""


@dataclass
class TrainConfig:
    """The training loop: steps, checkpoints, logging, how a run ends."""

    max_steps: int | None = MISSING
    """Optimizer steps of the stage; the learning rates reach their end there. null: as many as `epochs` take."""
    epochs: float | None = None
    """Times that each training sample comes, in the place of `max_steps`: of your own data, or of all of a blend. How
    many steps that are is found out before the start, from how many samples fill a row."""
    micro_batch_size: int = MISSING
    """Packed rows that a rank works on at a time."""
    global_batch_size: int = MISSING
    """Packed rows of a step, over all data-parallel ranks and micro-batches."""
    seed: int = 6198
    """Seed of drawn weights and of dropout; the random numbers of a step depend on it and on the step alone.
    Source: allenai/molmo2."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`, which takes a GPU where there is one."""
    precision: str = "auto"
    """`fp32`, `bf16`, `fp8`, or `auto`, which is fp32 on a CPU and bf16 on a GPU."""
    init_from: Any = None
    """Weights that the stage starts from: a checkpoint, a run (its newest checkpoint), a Hugging Face Molmo2, or two
    folders, `'train.init_from=[LLM_DIR,SIGLIP2_DIR]'`; null: random weights. Optimizer and step start fresh."""
    start_over: bool = False
    """Begin at step 1 again where none of the run's checkpoints is usable; they are kept in another folder. With a
    usable one the run is continued all the same."""
    restart_data: bool = False
    """On resuming, begin with the training data again, in another order, while model, optimizer and step go on. Once: a
    run that has been told so goes on from there."""
    save_every: Any = 1000
    """Steps between checkpoints, or epochs: `1 epoch`, `0.5 epochs`; one is always written at the end."""
    keep_last: int = 3
    """Checkpoints that are kept; older ones are removed."""
    upload_to: str | None = None
    """Address in object storage, `s3://BUCKET/PATH`, `gs://BUCKET/PATH` or `msc://PROFILE/PATH`, below which NAME/STAGE
    gets a copy of each checkpoint, in the background, kept and removed as those on disk; a run whose disk is empty goes
    on from there. null: none."""
    keep_every: int = 5000
    """Keep checkpoints of steps that are multiples of this, however old; 0: none of them."""
    report: bool = True
    """Draw report.html in the run's folder when the run ends; tools/report.py does so at any time."""
    verify_checkpoints: bool = True
    """Compare a checkpoint's files with their checksums before anything is loaded from it, and the last one of a run
    after it is saved. Each rank reads a part of the files."""
    save_best: str | None = None
    """Keep the checkpoint of the best measurement, which is then saved at once: `loss` is the lowest loss on held-out
    samples, a score such as `point_f1` the highest of the answers to held-out questions; null: none."""
    stop_when_no_better: int = 0
    """Measurements of `save_best` in a row that are no better than the best, after which the run is finished; 0: all
    steps are taken."""
    on_loss_jump: str = "warn"
    """What to do when the loss of a step lies far above those before: `warn` names the sources of its batch, `go_back`
    also returns to the newest checkpoint and goes on with the data behind it, `ignore` does nothing."""
    async_checkpoint: str = "auto"
    """Write checkpoints while training goes on: `true`, `false`, or `auto`, which does on a GPU."""
    stop_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1"])
    """Signals on which the run finishes its step, saves a checkpoint and ends."""
    stop_after_minutes: float | None = None
    """Minutes after the start of the process at which the run saves and ends; null: no limit."""
    max_skipped_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite, after which the run ends."""
    log_every: int = 10
    """Steps between lines of the log; losses are means over the steps in between."""
    validate_every: Any = 1000
    """Steps between measurements of the loss on held-out samples, or epochs as for `save_every`; also at the last
    step."""
    validation_batches: int = 8
    """Held-out micro-batches per data-parallel rank in each measurement; 0: no validation."""
    generate_every: Any = 0
    """Steps between the model's answers to held-out questions, or epochs as for `save_every`; 0: none."""
    generate_examples: int = 8
    """Held-out questions that are answered each time, the same ones."""
    generate_max_tokens: int = 64
    """Tokens of an answer at most."""
    wandb_project: str | None = None
    """Project of Weights & Biases to log to as well; null: none."""
    profile_steps: list[int] | None = None
    """First and last step of a profile, `[20,22]`: a trace of each of `profile_ranks` in the run's folder profile/, and
    a table in the log; null: none."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""
    profile_with: str = "torch"
    """`torch` writes traces by torch.profiler; `nsys` leaves the steps to NVIDIA's Nsight Systems, under which the run
    was started."""
    timeout_minutes: float = 20.0
    """Minutes that a collective operation may take before the job ends; before that, ranks write their stacks."""
    vision_chunk_crops: Any = 32
    """Crops that a rank encodes at a time, which bounds the vision tower's memory; 0: all at once; `auto`: the most, up
    to 32, that fit by the plan."""
    vision_recompute: Any = True
    """What of the vision tower is computed again in the backward pass instead of being kept: `true` all of a chunk,
    `layers` what lies inside of each layer (faster, and up to 85 MB more for each crop of a micro-batch), `false`
    nothing; `auto`: the faster of the first two that fits by the plan."""
    vit_fp8: bool = False
    """With `precision=fp8`, run the vision transformer's matrix products in FP8, too."""


@dataclass
class Config:
    """All settings of a run."""

    stage: str = MISSING
    """`stage1`, `stage2`, `stage3` or `finetune`; set by the recipe."""
    name: str = MISSING
    """Name of the run, a folder below runs/ unless `run_dir` is set."""
    run_dir: str = MISSING
    """Folder of the run: checkpoints, metrics, report. A run that is there is continued."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters instead of all weights."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Lengths, batch sizes and rates by stage."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training loop."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Any field of Megatron-Core's TransformerConfig, such as `transformer.recompute_granularity=full`; and
    `recompute`, which sets those of recomputation: `none`, `mlp`, `full`, or `auto`, the fastest that fits by the
    plan."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """Any field of Megatron-Core's OptimizerConfig, such as `optimizer.optimizer_cpu_offload=true`."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """Any field of Megatron-Core's DistributedDataParallelConfig, such as `ddp.grad_reduce_in_fp32=false`."""


# The rows of embedding and head are padded to a multiple of this, which every tensor parallel size must divide.
VOCAB_MULTIPLE = 128
# Logits that the losses hold at a time (model/loss.py): in bf16 and then in float32, 6 bytes each.
LOGITS_PER_CHUNK = 2**26


def positions_per_chunk(width: int, fused: bool) -> int:
    """Positions whose logits, `width` on a rank, are held at a time. From 128 on a multiple of it, as wide as a matrix
    product's tiles. fused: by kernels that leave them in bf16, so that three times as many take the same memory."""
    size = max(1, LOGITS_PER_CHUNK * (3 if fused else 1) // width)
    return size - size % 128 if size > 128 else size


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the stored tables, so that they do not depend on the layout."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


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
