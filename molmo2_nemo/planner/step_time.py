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
    if job.config.train.vision_recompute and not job.config.optim.vit.freeze:
        again["vit"] = again["vit attention"] = 1.0
    return again


def traffic(job: Job) -> list[Traffic]:
    """What the busiest GPU sends in a step, by kind of parallelism. Ring algorithms: (k - 1)/k of a tensor of k
    ranks."""
    m, t, c, p, d, e, n = job.config.model, job.t, job.c, job.p, job.d, job.e, job.tokens
    layers, micro = max(job.layers), job.micro_batches
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
    if c > 1:
        width = (m.num_attention_heads + m.num_query_groups) * 2 * m.head_dim / t
        if job.config.parallel.cp_comm_type == "a2a":
            sent, what = n * width * e * (c - 1) / c * (2 + full), "queries, keys, values and outputs change places"
        else:
            gathered = n * 2 * m.num_query_groups * m.head_dim / t * e * (c - 1)
            sent, what = gathered * (3 + full), "keys and values gathered, their gradients summed"
        found.append(Traffic("CP", micro * layers * sent, link(t * c), what))
    if t * c > 1:
        visual = job.work.visual_tokens * job.rows * m.hidden_size * e
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
        found.append(
            Traffic(
                "PP",
                micro * pieces * 2 * hidden / job.sequence,
                link(t * c * d * 2),
                "hidden states and gradients of a stage",
            )
        )
    if d * c > 1:
        ranks = d * c
        counts = max(count_parameters(job)[1], key=lambda counts: counts.trained)
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
    m, work, ranks = job.config.model, vars(job.work), job.t * job.c
    rows = job.config.train.global_batch_size
    frozen = frozen_parts(job.config.optim, m.tie_embeddings)
    bf16 = peak_flops(device, "bf16")
    one = forward_flops(m, **work)
    trained = training_flops_by_part(m, frozen, **work)
    again = _again(job)

    def seconds(part: str) -> float:
        speed = EFFICIENCY[part] * bf16
        if part == "decoder" and job.precision == "fp8":
            speed = FP8_DECODER * peak_flops(device, "fp8")
        if part == "decoder":
            speed *= 1 - TENSOR_PARALLEL_LOSS * math.log2(job.t)
        return (trained[part] + again[part] * one[part]) * job.rows / ranks / speed

    # Of a micro-batch, by stage.
    stages = []
    for stage, layers in enumerate(job.layers):
        share = layers / m.num_layers
        stages.append(share * (seconds("decoder") + seconds("decoder attention")))
        stages[-1] += sum(map(seconds, VISION)) if stage == 0 else 0
        stages[-1] += seconds("head") if stage == job.p - 1 else 0
    pieces = job.config.parallel.virtual_pipeline_model_parallel_size or 1
    compute = job.micro_batches * max(stages)
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
