"""How long a step may take and what is sent over which link: arithmetic on assumed efficiencies, unmeasured on a
GPU."""

import math
from dataclasses import dataclass

from molmo2_nemo.planner.flops import forward_flops, frozen_parts, peak_flops, training_flops_by_part
from molmo2_nemo.planner.memory import Job, count_parameters

# Share of the device's dense peak that each part is taken to reach. Assumed, unmeasured: dense decoders are
# published at 33 to 46 % of an H100's peak in all (torchtitan's and fms-fsdp's own figures), everything else included.
EFFICIENCY = {
    "vit": 0.45,
    "vit attention": 0.30,
    "pooling": 0.30,
    "pooling attention": 0.05,
    "projector": 0.40,
    "decoder": 0.50,
    "decoder attention": 0.30,
    "head": 0.35,
}
FP8_DECODER = 0.35  # of the FP8 peak
TENSOR_PARALLEL_LOSS = 0.05  # of the decoder's speed for each doubling of tensor parallelism: smaller products; assumed
# Bytes per second and direction of a GPU: H100 data sheet (NVLink 900 GB/s both ways), one 400 Gb/s port per GPU; of
# both 70 % is assumed to be reached. PCIe 5.0 x16 and a host's Adam: assumed.
NVLINK, NETWORK = 0.7 * 450e9, 0.7 * 50e9
HBM, PCIE, HOST_ADAM = 0.8 * 3.35e12, 25e9, 1e9  # bytes/s, bytes/s, parameters/s
GPUS_PER_NODE = 8
VISION = ("vit", "vit attention", "pooling", "pooling attention", "projector")


@dataclass
class Traffic:
    """What a GPU sends in a step. hidden: it overlaps with computation."""

    kind: str
    bytes: float
    link: str
    what: str
    hidden: bool = False

    @property
    def seconds(self) -> float:
        return self.bytes / (NVLINK if self.link == "NVLink" else NETWORK)


@dataclass
class Estimate:
    flops: dict[str, float]  # of a step of the whole job by part, without recomputation
    seconds: float
    compute: float
    bubble: float  # share of the compute time that the pipeline is empty
    optimizer: float
    traffic: list[Traffic]
    mfu: float


def _again(job: Job) -> dict[str, float]:
    """How many times more than once a part's forward pass is run."""
    again = dict.fromkeys(EFFICIENCY, 0.0)
    transformer, m = job.config.transformer, job.config.model
    again["head"] = 1.0  # logits are made again in the backward pass
    if transformer.get("recompute_granularity") == "full":
        count = transformer["recompute_num_layers"] if transformer["recompute_method"] == "block" else max(job.layers)
        again["decoder"] = again["decoder attention"] = min(1.0, count / max(job.layers))
    elif transformer.get("recompute_granularity") == "selective":
        modules = transformer.get("recompute_modules") or ["core_attn"]
        again["decoder attention"] = float("core_attn" in modules)
        mlp, H, D = 3 * m.hidden_size * m.ffn_hidden_size, m.hidden_size, m.head_dim
        rest = 2 * H * D * (m.num_attention_heads + m.num_query_groups)
        again["decoder"] = mlp / (mlp + rest) if "mlp" in modules else 0.0
    optim = job.config.optim
    if job.config.train.vision_recompute and not (optim.vit.freeze and optim.connector.freeze):
        again |= dict.fromkeys(VISION, 1.0)  # a chunk's crops go through both again
    return again


def stage_flops(job: Job, stage: int) -> dict[str, float]:
    """FLOPs of a GPU of a pipeline stage in a step by part, with those of recomputation."""
    m, work = job.config.model, vars(job.work)
    one = forward_flops(m, **work)
    trained = training_flops_by_part(m, frozen_parts(job.config.optim, m.tie_embeddings), **work)
    again = _again(job)
    share = dict.fromkeys(one, job.layers[stage] / m.num_layers)
    share |= dict.fromkeys(VISION, uneven(job) * (stage == 0)) | {"head": float(stage == job.p - 1)}
    rows = job.micro_batches * job.rows / (job.t * job.c)
    return {part: share[part] * rows * (trained[part] + again[part] * one[part]) for part in one}


def uneven(job: Job) -> float:
    """Crops of the busiest of the ranks that share a micro-batch's crops, over their mean: crops are dealt whole."""
    crops, ranks = job.work.crops * job.rows, job.t * job.c
    return math.ceil(crops / ranks) * ranks / crops if crops else 1.0


def traffic(job: Job, stage: int | None = None) -> list[Traffic]:
    """What a GPU of a pipeline stage sends in a step, by kind of parallelism; None: the busiest of each kind.

    Ring algorithms: (k - 1)/k of a tensor of k ranks.
    """
    m, t, c, p, d, e, n = job.config.model, job.t, job.c, job.p, job.d, job.e, job.tokens
    layers, micro = max(job.layers) if stage is None else job.layers[stage], job.micro_batches
    full = job.transformer("recompute_granularity") == "full"
    hidden = n * m.hidden_size * e
    found = []

    def link(span: int) -> str:
        # Ranks are numbered tensor, context, data, pipeline (Megatron's order).
        return "NVLink" if span <= GPUS_PER_NODE else "network"

    if t > 1:
        # Gather or reduce-scatter: 4 forward, 6 backward with sequence parallelism; 2 all-reduces each way without.
        passes = (10 if job.sequence > 1 else 8) + 4 * full
        found.append(
            Traffic("TP", micro * layers * passes * hidden * (t - 1) / t, link(t), "hidden states of each layer")
        )
        # All-reduces are two passes. Sequence parallel ranks gather the embedding's gradient, the head's input, and
        # scatter that one's gradient; others sum the gradient of the head's input.
        is_first, is_last = stage in (None, 0), stage in (None, p - 1)
        loss_share = min(1.0, job.work.loss_tokens / job.seq_length)
        at_ends = (3 if job.sequence > 1 else 2) * is_first
        at_ends += (2 if job.sequence > 1 else 2 * loss_share) * is_last
        found.append(Traffic("TP", micro * at_ends * hidden * (t - 1) / t, link(t), "hidden states at both ends"))
        if is_first:
            vision = 4 * count_parameters(job)[1][0].trained_vision
            found.append(Traffic("TP", vision * 2 * (t - 1) / t, link(t), "gradients of the vision tower summed"))
    if c > 1:
        width = (m.num_attention_heads + m.num_query_groups) * 2 * m.head_dim / t
        if job.config.parallel.cp_comm_type == "a2a":
            sent, what = n * width * e * (c - 1) / c * (2 + full), "queries, keys, values and outputs change places"
        else:
            gathered = n * 2 * m.num_query_groups * m.head_dim / t * e * (c - 1)
            sent, what = gathered * (3 + full), "keys and values gathered, their gradients summed"
        found.append(Traffic("CP", micro * layers * sent, link(t * c), what))
    if t * c > 1 and stage in (None, 0):
        # Ranks with fewer tokens fill up.
        visual = uneven(job) * job.work.visual_tokens * job.rows * m.hidden_size * e
        found.append(
            Traffic(
                "vision",
                micro * 3 * visual * (t * c - 1) / (t * c),
                link(t * c),
                "visual tokens gathered, their gradients summed",
            )
        )
    if p > 1:
        pieces = job.config.parallel.virtual_pipeline_model_parallel_size or 1
        # A piece sends its output on and its input's gradient back: the first has none to send back, the last none on.
        ends = (stage == 0) + (stage == p - 1) if stage is not None else int(p == 2)
        found.append(
            Traffic(
                "PP",
                micro * (2 * pieces - ends) * hidden / job.sequence,
                link(t * c * d * 2),
                "hidden states and gradients of a stage",
            )
        )
    if d * c > 1:
        ranks = d * c
        by_stage = count_parameters(job)[1]
        counts = by_stage[stage] if stage is not None else max(by_stage, key=lambda counts: counts.trained)
        gradient = 4 if job.ddp("grad_reduce_in_fp32", True) or e == 4 else 2
        share, at = counts.trained * (ranks - 1) / ranks, link(t * ranks)
        passes = 1 if job.distributed else 2
        found.append(
            Traffic("DP", share * gradient * passes, at, "gradients summed", job.overlaps("overlap_grad_reduce"))
        )
        if job.distributed:
            found.append(Traffic("DP", share * e, at, "new weights gathered", job.overlaps("overlap_param_gather")))
    return found


def estimate(job: Job, device: str = "NVIDIA H100 80GB HBM3") -> Estimate:
    """Time of a step on GPUs of that name, with their parts' assumed efficiencies and no waiting for data."""
    m, work = job.config.model, vars(job.work)
    rows = job.config.train.global_batch_size
    trained = training_flops_by_part(m, frozen_parts(job.config.optim, m.tie_embeddings), **work)
    bf16 = peak_flops(device, "bf16")

    def speed(part: str) -> float:
        of_part = EFFICIENCY[part] * bf16
        if part == "decoder" and job.precision == "fp8":
            of_part = FP8_DECODER * peak_flops(device, "fp8")
        return of_part * (1 - TENSOR_PARALLEL_LOSS * math.log2(job.t) if part == "decoder" else 1)

    def seconds(stage: int) -> float:
        return sum(flops / speed(part) for part, flops in stage_flops(job, stage).items())

    pieces = job.config.parallel.virtual_pipeline_model_parallel_size or 1
    compute = max(map(seconds, range(job.p)))
    bubble = (job.p - 1) / (pieces * job.micro_batches + job.p - 1)
    trained_here = max(counts.trained for counts in count_parameters(job)[1])
    shard = trained_here / (job.d * job.c if job.distributed else 1)
    optimizer = shard * 34 / HBM  # gradient, moments and master read and written, weights written
    if job.optimizer("optimizer_cpu_offload", False):
        offloaded = job.optimizer("optimizer_offload_fraction", 0.0) * shard
        optimizer += offloaded * (4 + job.e) / PCIE + offloaded / HOST_ADAM
    sent = traffic(job)
    shown = sum(item.seconds for item in sent if not item.hidden)
    total = compute / (1 - bubble) + shown + optimizer
    flops = {part: value * rows for part, value in trained.items()}
    peak = peak_flops(device, "fp8" if job.precision == "fp8" else "bf16")
    return Estimate(flops, total, compute, bubble, optimizer, sent, sum(flops.values()) / total / job.gpus / peak)
