"""How much memory a run needs on each GPU, by part.

Pure arithmetic on the configuration: imports neither torch nor Megatron. Formulas follow what the model's code
keeps for its backward pass (model/layers.py, model/vision.py, model/loss.py) and what Megatron-Core allocates;
docs/planner.md lists them with the accuracy that was measured. Letters: n tokens that a rank holds of a
micro-batch, H hidden size, N and G query and key/value heads, D head size, F width of the MLP, t, c, p, d sizes of
tensor, context, pipeline and data parallelism, e bytes of an activation.
"""

import math
from dataclasses import dataclass, replace

from molmo2_nemo.config.checks import layers_per_stage
from molmo2_nemo.config.components import component_of, is_adapter, is_frozen
from molmo2_nemo.config.lora import trained_components
from molmo2_nemo.config.schema import LAYERS, Config, padded_vocab_size, positions_per_chunk
from molmo2_nemo.planner.parameters import adapter_parameters, parameters
from molmo2_nemo.planner.work import holds_images, most_crops, row_work, units_of

GIB = 2**30
H100_GIB = 79.6  # of an H100 80GB HBM3, as nvidia-smi shows it
RESERVE_GIB = 4.0  # assumed, not measured: CUDA context, NCCL and cuBLAS buffers, holes of the allocator
HOST_GRADIENT = 4  # bytes of a parameter whose state is on the host: Megatron copies gradients there in float32
DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}


# Moments at which memory may be at its peak: of a step, and while the model is built.
HEAD, DECODER, VISION, OPTIMIZER = STEP = ("head backward", "decoder backward", "vision backward", "optimizer step")
BUILD = "building"
PHASES = (*STEP, BUILD)


@dataclass
class Part:
    """A share of a rank's memory. phases: those of PHASES in which it is there."""

    name: str
    bytes: float
    reason: str
    phases: tuple[str, ...] = STEP


@dataclass
class Job:
    """A configuration on so many GPUs. precision: fp32 | bf16 | fp8; layer_spec: local | transformer_engine."""

    config: Config
    gpus: int
    device: str = "cuda"

    def __post_init__(self):
        p, t = self.config.parallel, self.config.train
        self.t, self.p, self.c = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
        self.d = self.gpus // (self.t * self.p * self.c)
        self.precision = t.precision if t.precision != "auto" else {"cuda": "bf16", "cpu": "fp32"}[self.device]
        self.e = 4 if self.precision == "fp32" else 2
        # `auto` may end in either on a GPU: the local layers keep more.
        self.layer_spec = "local" if p.layer_spec == "auto" and self.precision != "fp8" else p.layer_spec
        self.layer_spec = "transformer_engine" if self.layer_spec == "auto" else self.layer_spec
        self.fused = self.device == "cuda" and p.kernels != "plain"
        self.micro_batches = t.global_batch_size // (t.micro_batch_size * self.d)
        self.rows, self.seq_length = t.micro_batch_size, self.config.data.seq_length
        self.tokens = self.rows * self.seq_length // self.c  # n
        self.sequence = self.t if p.sequence_parallel else 1  # ranks that split norms and residuals
        self.layers = layers_per_stage(p, self.config.model)
        self.distributed = self.ddp("use_distributed_optimizer", self.device == "cuda")
        self.work = row_work(self.config)
        vision = self.config.model.vision
        self.places = (vision.image_pooling if holds_images(self.config) else vision.video_pooling) ** 2  # of a window
        # Crops of the images or frames of a micro-batch: those stay whole.
        self.units = [crops for crops, _, _ in units_of(self.config)] * self.rows
        self.dropout = getattr(self.config.schedule, self.config.stage).hidden_dropout > 0
        self.counts: tuple | None = None  # of count_parameters, once they are counted

    @property
    def layout(self) -> str:
        """For people to read."""
        return f"TP {self.t}{' + SP' if self.sequence > 1 else ''}, PP {self.p}, CP {self.c}, DP {self.d}"

    @property
    def busiest_crops(self) -> int:
        """Of a micro-batch's crops, those of the rank that encodes most."""
        return most_crops(self.units, self.t * self.c)

    @property
    def uneven(self) -> float:
        """Crops of that rank over the mean of the ranks that share them."""
        crops = self.work.crops * self.rows
        return self.busiest_crops * self.t * self.c / crops if crops else 1.0

    def trains(self, *components: str) -> bool:
        """Whether anything of these components is trained; optim.freeze_patterns is not looked at."""
        return not set(components).isdisjoint(trained_components(self.config.optim, self.config.lora))

    def transformer(self, key: str, default=None):
        return self.config.transformer.get(key, default)

    def ddp(self, key: str, default=None):
        return self.config.ddp.get(key, default)

    def modules_again(self) -> list[str]:
        """Which modules of each layer the backward pass runs again (Megatron's selective recomputation)."""
        if self.transformer("recompute_granularity") != "selective":
            return []
        return self.transformer("recompute_modules") or ["core_attn"]

    def overlaps(self, key: str) -> bool:
        """Whether a collective of data parallelism overlaps with computation: on a GPU unless it is switched off."""
        return self.ddp(key, self.device == "cuda" and self.distributed)

    def optimizer(self, key: str, default=None):
        return self.config.optimizer.get(key, default)


# ---- parameters ----


def stage_of(name: str, job: Job) -> int:
    """The pipeline stage that holds a parameter."""
    if name.startswith(("vision.", "embedding.")):
        return 0
    if not name.startswith("decoder.layers."):
        return job.p - 1
    layer = int(name.split(".")[2])
    pieces = job.config.parallel.virtual_pipeline_model_parallel_size
    if pieces:
        return layer // (job.config.model.num_layers // (job.p * pieces)) % job.p
    stage = 0
    while layer >= job.layers[stage]:
        layer, stage = layer - job.layers[stage], stage + 1
    return stage


@dataclass
class Counts:
    """Parameters of a rank or of the model."""

    trained: int = 0
    frozen: int = 0
    trained_vision: int = 0
    trained_head: int = 0
    decoder_linear: int = 0  # weights of the decoder layers' matrix products

    @property
    def total(self) -> int:
        return self.trained + self.frozen


def count_parameters(job: Job) -> tuple[dict[str, Counts], list[Counts]]:
    """(the whole model's by component, one rank's by pipeline stage)."""
    if job.counts is None:
        job.counts = _count(job)
    return job.counts


def _count(job: Job) -> tuple[dict[str, Counts], list[Counts]]:
    optim, m = job.config.optim, job.config.model
    by_component: dict[str, Counts] = {}
    by_stage = [Counts() for _ in range(job.p)]
    tied_copy = [("output_layer.weight", padded_vocab_size(m.vocab_size) * m.hidden_size, True)]
    lora = job.config.lora
    named = [*parameters(m), *adapter_parameters(m, lora), *(tied_copy if m.tie_embeddings and job.p > 1 else [])]
    for name, elements, split in named:
        frozen = is_frozen(name, optim, m.tie_embeddings, lora.rank > 0)
        is_copy = m.tie_embeddings and name.startswith("output_layer.")
        rank = by_stage[stage_of(name, job)]
        for counts, number in (
            (by_component.setdefault(component_of(name), Counts()), 0 if is_copy else elements),
            (rank, elements // job.t if split else elements),
        ):
            counts.trained += 0 if frozen else number
            counts.frozen += number if frozen else 0
            counts.trained_vision += number if name.startswith("vision.") and not frozen else 0
            counts.trained_head += number if name.startswith("output_layer.") and not frozen else 0
            in_fp8 = ".linear_" in name and name.startswith("decoder.") and not is_adapter(name)
            counts.decoder_linear += number if in_fp8 else 0
    if m.tie_embeddings and job.p == 1 and not is_frozen("output_layer.weight", optim, True, lora.rank > 0):
        by_stage[0].trained_head = padded_vocab_size(m.vocab_size) * m.hidden_size // job.t
    return by_component, by_stage


def offloaded_parameters(job: Job) -> float:
    """How many parameters a rank's optimizer updates on the host, on the busiest pipeline stage."""
    if not job.optimizer("optimizer_cpu_offload", False):
        return 0.0
    trained = max(counts.trained for counts in count_parameters(job)[1])
    return job.optimizer("optimizer_offload_fraction", 0.0) * trained / (job.d * job.c if job.distributed else 1)


# ---- memory of one rank ----


def state_parts(job: Job, counts: Counts) -> list[Part]:
    """Weights, gradients and optimizer state.

    Megatron-Core: distributed/param_and_grad_buffer.py (one gradient buffer), optimizer/distrib_optimizer.py
    (ZeRO-1 over data and context parallel ranks), optimizer/optimizer.py (without: float32 copies of bf16 weights).
    """
    trained, shards = counts.trained, job.d * job.c if job.distributed else 1
    in_fp32 = job.ddp("grad_reduce_in_fp32", True) or job.precision == "fp32"
    reason = f"{job.e} bytes x {counts.total:,} parameters of this rank"
    parts = [Part("weights", job.e * counts.total, reason, PHASES)]
    if job.distributed:
        # They are copied into one buffer, beside which the gradients' is there already.
        parts.append(Part("weights before", job.e * trained, "trained weights move into one buffer", (BUILD,)))
    if job.precision == "fp8":
        reason = "1 byte each way round, kept over a step's micro-batches"
        parts.append(Part("FP8 copies of weights", 2 * counts.decoder_linear, reason))
    parts.append(
        Part(
            "gradients",
            (4 if in_fp32 else 2) * trained,
            f"{'float32' if in_fp32 else 'bf16'} buffer of {trained:,} trained parameters (ddp.grad_reduce_in_fp32)",
            PHASES,
        )
    )
    precise = job.optimizer("use_precision_aware_optimizer", False)
    moments = sum(
        DTYPE_BYTES[job.optimizer(key, "fp32")] if precise else 4 for key in ("exp_avg_dtype", "exp_avg_sq_dtype")
    )
    master = (
        0 if job.precision == "fp32" else (DTYPE_BYTES[job.optimizer("main_params_dtype", "fp32")] if precise else 4)
    )
    on_gpu = 1.0
    if job.optimizer("optimizer_cpu_offload", False):
        on_gpu = 1 - job.optimizer("optimizer_offload_fraction", 0.0)
    kept = (moments * on_gpu + master * (on_gpu if precise else 1)) * trained / shards
    where = ""
    if shards > 1:
        whole = (moments + master) * trained / GIB
        where = f" over {shards} data x context parallel ranks; {whole:.1f} GiB without ddp.use_distributed_optimizer"
    parts.append(
        Part(
            "optimizer",
            kept,
            f"Adam's moments{' and float32 weights' if master else ''}, {moments + master} bytes each"
            + where
            + ("" if on_gpu == 1 else f"; {1 - on_gpu:.0%} on the host"),
        )
    )
    # torch's Adam makes a list of temporaries for all parameters at once; the fused ones make none.
    temporary = 4 * trained / shards * on_gpu + (4 * counts.trained_vision / shards if job.t > 1 else 0)
    parts.append(
        Part(
            "optimizer's temporaries",
            temporary,
            "torch's Adam; the vision tower's gradients as one tensor",
            (OPTIMIZER,),
        )
    )
    return parts


def layer_bytes(job: Job) -> dict[str, float]:
    """Bytes that one decoder layer keeps of a micro-batch for its backward pass, by what recomputation may drop.

    Each entry is what model/layers.py and Megatron's layers save: the inputs of matrix products, what norms, RoPE, the
    activation function and attention need.
    """
    m, n, e, t = job.config.model, job.tokens, job.e, job.t
    H, F, D = m.hidden_size, m.ffn_hidden_size / t, m.head_dim
    q, k = m.num_attention_heads * D / t, m.num_query_groups * D / t
    te = job.layer_spec == "transformer_engine"
    product = 1 if job.precision == "fp8" else e  # an input of a matrix product
    # A norm of width 1: its input in float32 and the normalised input, or its input alone (fused, TE).
    norm = e if te or job.fused else (4 + e)
    own = n / job.sequence
    heads = m.num_attention_heads / t + m.num_query_groups / t
    # The projection itself stays, since the values are a view of it, and in float32 the norms' inputs are as well,
    # unless heads are grouped: then queries are a copy.
    qk_inputs = (q if job.config.model.num_query_groups != m.num_attention_heads else 0) if e == 4 and not te else q + k
    qk_norms = (4 * qk_inputs + e * (q + k)) if not te else e * qk_inputs
    # Context parallel ranks exchange copies of queries, keys and values.
    projection = 0 if job.c > 1 and e < 4 and not te else e * (q + 2 * k)
    qk = projection + qk_norms + e * (q + k) + 4 * D * e + (0 if te else 4 * heads)
    if job.fused:
        # One kernel makes three parts out of the projection; norms over all heads copy their inputs.
        qk = 2 * e * (q + 2 * k) + (e * q if m.qk_norm != "per_head" else 0)
        if m.qk_norm != "per_head" and t > 1:
            qk += 4 * (q + k)  # their mean is one over ranks, so that no kernel makes it: inputs in float32
        if job.c > 1:
            # What is kept of the values is exchanged or gathered, below; no view of the projection is, either.
            qk -= e * k if m.qk_norm == "per_head" else e * (q + 2 * k)
    exchanged = 0.0
    if job.c > 1 and job.config.parallel.cp_comm_type == "a2a":
        repeats = 1 if (m.num_query_groups // t) % job.c == 0 else m.num_attention_heads // m.num_query_groups
        exchanged = e * n * (k * (2 * repeats - 1) + q)  # values (and repeated keys), and the output in both orders
    elif job.c > 1:
        exchanged = e * n * k * (2 * job.c - 1)  # gathered keys and values
    kept_mask = 1 if job.device == "cuda" else e
    mask = kept_mask if job.dropout else 0
    lora, adapters = job.config.lora, 0.0
    if lora.rank:
        # Between A and B, 7 times the rank; with dropout copies of the inputs, and which of their numbers were kept.
        # The inputs themselves go then, since frozen weights need none; attention keeps its output.
        dropped = (e + kept_mask) * (2 * own * H + n * (q + F)) - product * (2 * own * H + n * F) if lora.dropout else 0
        adapters = 7 * lora.rank * n * e + dropped
    if job.device == "cpu":
        # SDPA there keeps the mask as a float tensor of its own.
        exchanged += (
            job.rows
            * job.seq_length
            * (job.seq_length / (job.c if job.config.parallel.cp_comm_type == "all_gather" else 1))
            * e
        )
    return {
        "norms": own * H * norm * 2 + own * 8,
        "norm outputs": own * H * product * 2,
        "qk": n * qk,
        "attention": n * (e * q + 4 * m.num_attention_heads / t) + exchanged,
        "dropout": 0 if job.fused else 2 * own * H * mask,
        "adapters": adapters,
        # silu's and the product's inputs and the product: 5 of width F; the fused function keeps 3.
        "mlp": n * F * (e * (2 if job.fused or job.transformer("bias_activation_fusion") else 4) + product),
    }


def kept_bytes(job: Job, layers: int) -> tuple[float, float, str]:
    """(bytes kept of `layers` decoder layers, bytes made again at a time in the backward pass, reason)."""
    by_kind = layer_bytes(job)
    whole = sum(by_kind.values())
    granularity = job.transformer("recompute_granularity")
    m = job.config.model
    if granularity == "full":
        spread = job.t if job.transformer("distribute_saved_activations") else job.sequence
        checkpoint = job.tokens / spread * m.hidden_size * job.e
        count = job.transformer("recompute_num_layers")
        if job.transformer("recompute_method") == "uniform":
            return (
                math.ceil(layers / count) * checkpoint,
                min(count, layers) * whole,
                "inputs of layers, the rest is made again",
            )
        again = min(count, layers)
        return (
            again * checkpoint + (layers - again) * whole,
            whole,
            f"inputs of {again} layers, {layers - again} whole layers",
        )
    if granularity == "selective":
        modules = job.modules_again()
        kept, names = whole, []
        if "mlp" in modules:
            kept -= by_kind["mlp"]
            names.append("MLPs")
        if "layernorm" in modules and not m.norm_after:
            kept -= by_kind["norms"] + by_kind["norm outputs"] - 2 * job.tokens / job.sequence * m.hidden_size * job.e
            names.append("norms")
        made_again = by_kind["mlp"] if "mlp" in modules else by_kind["norm outputs"]
        return (
            layers * kept,
            made_again,
            f"all but {' and '.join(names)}" if names else "nothing is saved by core_attn here",
        )
    return layers * whole, 0.0, "no recomputation"


def in_flight(job: Job, stage: int) -> float:
    """Micro-batches whose activations of a whole stage are held at once (1F1B: Megatron's schedules.py)."""
    pieces = job.config.parallel.virtual_pipeline_model_parallel_size
    if pieces is None:
        return min(job.p - stage, job.micro_batches)
    warm_up = (job.p - stage - 1) * 2 + (pieces - 1) * job.p
    return min(warm_up + 1, job.micro_batches * pieces) / pieces


def vit_crop_bytes(job: Job) -> float:
    """What the ViT keeps of a crop: pixels, norms' inputs and outputs, q, k, v, attention's output, two of the
    MLP's width."""
    m, e = job.config.model, job.e
    v, heads = m.vit.hidden_size, m.vit.num_attention_heads * m.vit.head_dim
    layer = e * (4 * v + 4 * heads + 2 * m.vit.ffn_hidden_size) + 4 * m.vit.num_attention_heads + 16
    return m.vision.patches_per_crop * (m.vit.num_layers * layer + e * m.vision.patch_dim)


def vision_parts(job: Job, counts: Counts) -> list[Part]:
    """The vision tower on the first stage: its crops and windows are split over tensor x context parallel ranks."""
    m, train, e = job.config.model, job.config.train, job.e
    crops = job.busiest_crops
    windows = math.ceil(job.uneven * job.work.visual_tokens * job.rows / (job.t * job.c))
    features = m.vit.hidden_size * len(m.vit.feature_layers)
    inner = m.connector.num_attention_heads * m.connector.head_dim
    width = job.places
    chunk = min(train.vision_chunk_crops or crops, crops)
    per_crop = vit_crop_bytes(job)
    features_of_crop = m.vision.patches_per_crop * features * e
    window = width * (features * e + 2 * inner * e + 8 + 1)  # patches, keys and values, indices
    window += e * (
        features + 3 * inner + m.connector.hidden_size + (3 if job.fused else 5) * m.connector.ffn_hidden_size
    )
    if not job.trains("vit"):
        per_crop /= max(1, m.vit.num_layers)  # a layer at a time, nothing is kept
    everybodys = job.work.visual_tokens * job.rows * m.hidden_size * e
    tokens = Part(
        "visual tokens", everybodys + windows * m.hidden_size * e, "own ones and, gathered, those of all ranks"
    )
    # Autograd hands on a weight's gradient once the last chunk has added to it.
    held = e * counts.trained_vision if chunk < crops else 0
    summed = Part("gradients of chunks", held, "the vision tower's, until all chunks are done", (VISION,))
    if train.vision_recompute == LAYERS:
        return [tokens, summed, *_parts_of_layers(job, crops, chunk, windows * window)]
    if train.vision_recompute:
        share = chunk / max(1, crops)
        workspace = chunk * (per_crop + 2 * features_of_crop) + share * windows * window
        return [
            tokens,
            summed,
            Part("vision workspace", workspace, f"{chunk} of {crops} crops encoded again at a time", (VISION,)),
        ]
    kept_crops, kept_windows = crops * job.trains("vit"), windows * job.trains("vit", "connector")
    return [
        tokens,
        summed,
        Part("ViT activations", kept_crops * per_crop, f"{crops} crops of this rank, all layers"),
        Part("connector activations", kept_windows * window, f"{windows:,} windows of {width} patches, SwiGLU"),
        Part("vision workspace", chunk * features_of_crop, "gradient of the features", (VISION,)),
    ]


def _parts_of_layers(job: Job, crops: int, chunk: int, connector: float) -> list[Part]:
    """Of the vision tower whose layers are made again one by one, for so many crops of a rank. connector: bytes of its
    activations for all of them."""
    m, e = job.config.model, job.e
    v, f, heads = m.vit.hidden_size, m.vit.ffn_hidden_size, m.vit.num_attention_heads * m.vit.head_dim
    patch = 0 if job.config.optim.vit.freeze else m.vit.num_layers * ((2 * e * v + 16) if job.fused else e * v)
    features = e * v * len(m.vit.feature_layers)
    kept = crops * m.vision.patches_per_crop * (patch + e * m.vision.patch_dim + features)
    # A layer's MLP or its attention; or the connector, with the gradient of the features.
    layer = e * max(2 * f + 5 * v, 13 * heads + 2 * v) if job.fused else vit_crop_bytes(job) / m.vit.num_layers
    patches = chunk * m.vision.patches_per_crop
    workspace = max(patches * layer, patches * features + chunk / max(1, crops) * connector)
    return [
        Part("ViT's layers", kept, f"{crops} crops of this rank: inputs, middles with fused kernels; features"),
        Part("vision workspace", workspace, f"a layer or the connector of {chunk} crops", (VISION,)),
    ]


def head_parts(job: Job, counts: Counts) -> list[Part]:
    """The head on the last stage: model/loss.py. All tokens of the rows are taken to carry loss."""
    m = job.config.model
    width, tokens = padded_vocab_size(m.vocab_size) / job.t, job.tokens
    chunk = min(tokens, positions_per_chunk(int(width), job.fused)) * width
    head, e = counts.trained_head, job.e
    # Beside the float32 sum of the weights' gradient: logits as they become float32, or, at the end, that sum in bf16.
    logits, converted = (e if e == 4 or job.fused else 6) * chunk, e * head * (e != 4)
    logits, gradient = (0, (4 + e) * head) if converted > logits else (logits, 4 * head)
    kept = tokens * m.hidden_size * job.e + (4 + job.e) * tokens / job.sequence * m.hidden_size
    return [
        Part("head's inputs", kept, "final norm, hidden states of tokens with loss", (HEAD, DECODER)),
        Part("logits chunk", logits, "model/loss.py, positions_per_chunk", (HEAD,)),
        Part("gradient of the head", gradient, "a float32 sum before it reaches the buffer", (HEAD,)),
    ]


def input_parts(job: Job, stage: int) -> list[Part]:
    """A step's micro-batches lie on the device from its beginning; pixels, as bytes and on the first stage only, from
    their micro-batch's forward to its backward pass."""
    m, w, p = job.config.model, job.work, job.config.parallel
    row, pixels, what = job.seq_length * (4 * 8 + 1 + 4 + 2), 0, ""
    if stage == 0:
        row += w.visual_tokens * job.places * 8
        # Of an interleaved pipeline's first piece: two rounds of forward passes precede its first backward pass.
        in_flight = min(job.micro_batches, job.p * (2 if p.virtual_pipeline_model_parallel_size else 1))
        # A rank has the pixels that it encodes, whole crops.
        own = job.busiest_crops / job.rows
        pixels = in_flight * own * m.vision.patches_per_crop * m.vision.patch_dim
        what = f", own pixels of {in_flight} as bytes"
    parts = [
        Part(
            "inputs",
            job.rows * (job.micro_batches * row + pixels),
            f"{job.micro_batches} micro-batches of a step{what}",
        )
    ]
    tables = 2 if m.rope_scaling else 1
    angles = tables * job.tokens * m.head_dim * 4
    mask = (
        job.rows * job.seq_length**2 / job.c if job.device == "cpu" else 3 * 4 * job.rows * (job.seq_length / 128) ** 2
    )
    parts.append(
        Part(
            "mask and angles",
            mask + angles,
            "dense mask" if job.device == "cpu" else "block mask of 128 x 128, RoPE angles",
        )
    )
    if job.sequence > 1:
        parts.append(Part("gather buffer", job.tokens * m.hidden_size * job.e, "sequence parallel inputs, gathered"))
    return parts


def stage_memory(job: Job, stage: int, counts: Counts | None = None) -> list[Part]:
    """Memory of a rank of a pipeline stage by part; see `peak`."""
    counts = counts or count_parameters(job)[1][stage]
    m, n, e = job.config.model, job.tokens, job.e
    times = in_flight(job, stage)
    kept, again, reason = kept_bytes(job, job.layers[stage])
    whole = f" x {times:g} micro-batches in flight" if times > 1 else ""
    parts = [*state_parts(job, counts), *input_parts(job, stage)]
    # Beside what it holds, a layer's backward pass makes the gradients of the MLP's two halves and of the residual.
    gradients = n * e * (2 * m.ffn_hidden_size / job.t + m.hidden_size)
    parts.append(Part("layer's workspace", again + gradients, "a layer made again and its gradients", (DECODER,)))
    parts.append(Part("decoder activations", kept * times, reason + whole, (HEAD, DECODER)))
    if stage == job.p - 1:
        parts += head_parts(job, counts)
    if stage == 0:
        if times > 1:
            # In the vision tower's backward pass those of its own micro-batch, or of its piece of it, are gone.
            others = times - 1 / (job.config.parallel.virtual_pipeline_model_parallel_size or 1)
            parts.append(
                Part("decoder activations, others'", kept * others, "the other micro-batches in flight", (VISION,))
            )
        for part in vision_parts(job, counts):
            if part.phases == STEP:
                part = replace(
                    part, bytes=part.bytes * times, reason=part.reason + whole, phases=(HEAD, DECODER, VISION)
                )
            parts.append(part)
    return parts


def peak(parts: list[Part]) -> tuple[float, str]:
    """(bytes, phase) of the moment at which most memory is needed."""
    return max((sum(part.bytes for part in parts if phase in part.phases), phase) for phase in PHASES)


def worst_stage(job: Job) -> tuple[int, list[Part]]:
    """The pipeline stage whose ranks need most, and its parts."""
    by_stage = count_parameters(job)[1]
    stages = [(stage, stage_memory(job, stage, counts)) for stage, counts in enumerate(by_stage)]
    return max(stages, key=lambda item: peak(item[1])[0])
