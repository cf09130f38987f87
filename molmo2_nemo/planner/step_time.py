"""How long a step may take: arithmetic on the table of planner/efficiency.py, unmeasured on a GPU. Imports no torch.

step      = max(loading, work x unevenness + bubble + collectives that nothing hides + optimizer)
work      = matrix products and attention + element-wise operations, which run one after the other, and what is
            sent and waited for in between, of the busiest pipeline stage
"""

import math
from dataclasses import dataclass

from molmo2_nemo.config.schema import LAYERS
from molmo2_nemo.planner.efficiency import DEVICES, FAST, SLOW, Assumptions
from molmo2_nemo.planner.elementwise import adam_bytes, elementwise_bytes
from molmo2_nemo.planner.flops import adapter_flops, forward_flops, frozen_parts, peak_flops, training_flops_by_part
from molmo2_nemo.planner.memory import HOST_GRADIENT, Job, count_parameters, offloaded_parameters
from molmo2_nemo.planner.traffic import FIRST_FORWARD, LAST_BACKWARD, PRODUCTS, Traffic, layers_again, traffic
from molmo2_nemo.planner.work import holds_images

H100 = "NVIDIA H100 80GB HBM3"
VISION = ("vit", "vit attention", "pooling", "pooling attention", "projector")
DECODER = ("decoder", "decoder attention")
PARTS = (*VISION, *DECODER, "head")


@dataclass
class StepTime:
    """Seconds of a step by what they are for, under one column of the table.

    Causes add up to `seconds`: compute (matrix products, attention), memory (element-wise operations), NVLink and
    network (what is waited for), bubble, unevenness, optimizer, loading (what it takes beyond all that).
    """

    causes: dict[str, float]
    busy: dict[str, float]  # seconds in which each link sends, hidden or not

    @property
    def seconds(self) -> float:
        return sum(self.causes.values())

    @property
    def bottleneck(self) -> str:
        """The largest cause; loading, where everything else waits for it."""
        return "loading" if self.causes["loading"] > 0 else max(self.causes, key=self.causes.get)


@dataclass
class Estimate:
    """A range: fast and slow are the two columns of the table."""

    flops: dict[str, float]  # of a step of the whole job by part, without recomputation
    traffic: list[Traffic]
    fast: StepTime
    slow: StepTime
    peak: float  # FLOP/s of all GPUs

    @property
    def seconds(self) -> float:
        """Geometric mean of the range: for ranking and for what needs one number."""
        return math.sqrt(self.fast.seconds * self.slow.seconds)

    @property
    def bottlenecks(self) -> list[str]:
        """Of the fast and of the slow column, once if it is the same."""
        return list(dict.fromkeys((self.fast.bottleneck, self.slow.bottleneck)))

    @property
    def mfu(self) -> float:
        return self.mfu_of(self.seconds)

    def mfu_of(self, seconds: float) -> float:
        return sum(self.flops.values()) / seconds / self.peak


def again(job: Job, stage: int) -> dict[str, float]:
    """How many times more than once a part's forward pass is run on a pipeline stage."""
    times = dict.fromkeys(PARTS, 0.0)
    transformer, m = job.config.transformer, job.config.model
    times["head"] = 1.0  # logits are made again in the backward pass
    if transformer.get("recompute_granularity") == "full":
        layers = job.layers[stage]
        times["decoder"] = times["decoder attention"] = layers_again(job, layers) / max(1, layers)
    elif modules := job.modules_again():
        times["decoder attention"] = float("core_attn" in modules)
        mlp, H, D = 3 * m.hidden_size * m.ffn_hidden_size, m.hidden_size, m.head_dim
        rest = 2 * H * D * (m.num_attention_heads + m.num_query_groups)
        times["decoder"] = mlp / (mlp + rest) if "mlp" in modules else 0.0
    if job.config.train.vision_recompute and job.trains("vit", "connector"):
        times |= dict.fromkeys(VISION, 1.0)  # a chunk's crops go through both again
        if job.config.train.vision_recompute == LAYERS and job.fused:
            heads, inner = m.vit.num_attention_heads * m.vit.head_dim, m.vit.ffn_hidden_size
            times["vit"] = (3 * heads + inner) / (4 * heads + 2 * inner)  # all but the last of attention and MLP
    return times


def stage_flops(job: Job, stage: int) -> dict[str, float]:
    """FLOPs of a GPU of a pipeline stage in a step by part, with those of recomputation."""
    one, backward = _passes(job, stage)
    return {part: one[part] + backward[part] for part in one}


def _passes(job: Job, stage: int) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs of a GPU of a pipeline stage in a step by part: (forward, backward with what is computed again)."""
    m, work = job.config.model, vars(job.work)
    lora = job.config.lora
    adapters = adapter_flops(m, lora, **work)
    one = {part: flops + adapters.get(part, 0.0) for part, flops in forward_flops(m, **work).items()}
    trained = training_flops_by_part(m, frozen_parts(job.config.optim, m.tie_embeddings, lora), lora, **work)
    more = again(job, stage)
    share = dict.fromkeys(one, job.layers[stage] / m.num_layers)
    share |= dict.fromkeys(VISION, job.uneven * (stage == 0)) | {"head": float(stage == job.p - 1)}
    rows = job.micro_batches * job.rows / (job.t * job.c)
    scale = {part: share[part] * rows for part in one}
    backward = {part: scale[part] * (trained[part] + (more[part] - 1) * one[part]) for part in one}
    return {part: scale[part] * one[part] for part in one}, backward


def speeds(job: Job, assumed: Assumptions, device: str) -> dict[str, float]:
    """FLOP/s of each part on one GPU, with the loss of small products."""
    m, bf16 = job.config.model, peak_flops(device, "bf16")
    shares = {part: getattr(assumed, part.replace(" ", "_")) for part in PARTS}
    speed = {part: share * bf16 for part, share in shares.items()}
    if job.precision == "fp8":
        speed["decoder"] = assumed.fp8_decoder * peak_flops(device, "fp8")
    # A product's smallest side: tokens of the rank, or its part of a width.
    queries = (m.num_attention_heads + 2 * m.num_query_groups) * m.head_dim
    side = min(job.tokens, m.ffn_hidden_size // job.t, queries // job.t)
    crops = job.busiest_crops
    patches = min(job.config.train.vision_chunk_crops or crops, crops) * m.vision.patches_per_crop
    for part, smallest in (("decoder", side), ("vit", patches), ("pooling", patches)):
        speed[part] *= smallest / (smallest + assumed.half_speed_at) if smallest else 1.0
    return speed


def _seconds(job: Job, stage: int, assumed: Assumptions, device: str) -> list[dict[str, float]]:
    """Seconds of a stage's micro-batches by part: products forward, backward, element-wise forward, backward."""
    speed, bandwidth = speeds(job, assumed, device), assumed.memory * DEVICES[device][0]
    factor = dict.fromkeys(VISION, assumed.vision_factor) | dict.fromkeys(DECODER, assumed.decoder_factor)
    found = []
    for of, rates in (
        (_passes(job, stage), speed),
        (elementwise_bytes(job, stage, again(job, stage)), dict.fromkeys(PARTS, bandwidth)),
    ):
        found += [{part: factor.get(part, 1.0) * x / rates[part] for part, x in amounts.items()} for amounts in of]
    return found


def part_seconds(job: Job, assumed: Assumptions, device: str) -> dict[str, float]:
    """Seconds of the first stage's micro-batches in a step by part, products and element-wise operations together."""
    four = _seconds(job, 0, assumed, device)
    return {part: sum(seconds.get(part, 0.0) for seconds in four) for part in PARTS}


def step_time(job: Job, assumed: Assumptions, device: str = H100) -> StepTime:
    """Time of a step under one column of the table."""
    stages = [[sum(x.values()) for x in _seconds(job, stage, assumed, device)] for stage in range(job.p)]
    products_1, products_2, moved_1, moved_2 = max(stages, key=sum)
    compute, memory = products_1 + products_2, moved_1 + moved_2
    waited, busy, beside = {"NVLink": 0.0, "network": 0.0}, {"NVLink": 0.0, "network": 0.0}, {}
    room = {
        PRODUCTS: products_2,
        LAST_BACKWARD: (products_2 + moved_2) / job.micro_batches,
        FIRST_FORWARD: (products_1 + moved_1) / job.micro_batches,
    }
    at_the_end = {"NVLink": 0.0, "network": 0.0}
    for item in traffic(job):
        seconds = item.seconds(assumed, device)
        busy[item.link] += seconds
        exposed = seconds
        if item.hides_behind is not None:
            left = max(0.0, room[item.hides_behind] - beside.get(item.hides_behind, 0.0))
            exposed = max(seconds - left, seconds * item.tail)
            beside[item.hides_behind] = beside.get(item.hides_behind, 0.0) + seconds
        (at_the_end if item.kind == "DP" else waited)[item.link] += exposed
    # What a pipeline waits for repeats in its bubble; replicas wait for the one with most work.
    work = compute + memory + sum(waited.values())
    pieces = job.config.parallel.virtual_pipeline_model_parallel_size or 1
    bubble = work * (job.p - 1) / (pieces * job.micro_batches)
    longest = assumed.unevenness * math.sqrt(2 * math.log(job.d) / (job.micro_batches * job.rows))
    causes = {
        "compute": compute,
        "memory": memory,
        "NVLink": waited["NVLink"] + at_the_end["NVLink"],
        "network": waited["network"] + at_the_end["network"],
        "bubble": bubble,
        "unevenness": (work + bubble) * longest,
        "optimizer": optimizer_seconds(job, assumed, device),
    }
    return StepTime(causes | {"loading": max(0.0, loading_seconds(job, assumed) - sum(causes.values()))}, busy)


def optimizer_seconds(job: Job, assumed: Assumptions, device: str) -> float:
    trained = max(counts.trained for counts in count_parameters(job)[1])
    shard = trained / (job.d * job.c if job.distributed else 1)
    seconds = shard * adam_bytes(job) / (assumed.memory * DEVICES[device][0])
    offloaded = offloaded_parameters(job)
    return seconds + offloaded * (HOST_GRADIENT + job.e) / assumed.pcie + offloaded / assumed.host_adam


def row_core_seconds(job: Job, assumed: Assumptions) -> float:
    """Seconds of a core to decode and resize the pictures of a row."""
    return job.work.crops * (assumed.crop_seconds if holds_images(job.config) else assumed.frame_seconds)


def loading_seconds(job: Job, assumed: Assumptions) -> float:
    """Of a step's rows of a replica, by its data.num_workers processes; they work while the GPU does."""
    rows = job.micro_batches * job.rows
    return rows * row_core_seconds(job, assumed) / max(1, job.config.data.num_workers)


def estimate(job: Job, device: str = H100, columns: tuple[Assumptions, Assumptions] = (FAST, SLOW)) -> Estimate:
    """Time of a step on GPUs of that name. columns: the fast and the slow one of the table."""
    m, work = job.config.model, vars(job.work)
    rows = job.config.train.global_batch_size
    lora = job.config.lora
    trained = training_flops_by_part(m, frozen_parts(job.config.optim, m.tie_embeddings, lora), lora, **work)
    peak = peak_flops(device, "fp8" if job.precision == "fp8" else "bf16") * job.gpus
    fast, slow = (step_time(job, column, device) for column in columns)
    return Estimate({part: value * rows for part, value in trained.items()}, traffic(job), fast, slow, peak)
