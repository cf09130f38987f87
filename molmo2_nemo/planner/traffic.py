"""What a GPU sends in a step, over which link, and what can go on meanwhile. Imports no torch."""

import math
from dataclasses import dataclass

from molmo2_nemo.planner.efficiency import DEVICES, GPUS_PER_NODE, NETWORK, Assumptions
from molmo2_nemo.planner.memory import Job, count_parameters

# Work beside which a collective may run. LAST_BACKWARD: the backward pass of a step's last micro-batch, before which no
# gradient is summed; FIRST_FORWARD: the forward pass of the next step's first, which waits for its layers' weights.
PRODUCTS, LAST_BACKWARD, FIRST_FORWARD = "products", "last backward", "first forward"
VISION_GRADIENTS = "a shard of the vision tower's gradients summed"


@dataclass
class Traffic:
    """What a GPU sends in a step for one purpose. span: how far apart the first and last rank of its group are.

    beside: ranks of the group on a node: a ring through several of a node's GPUs is laid as often as there are GPUs,
    each time through another one's port, so that they share what leaves the node.
    """

    kind: str
    bytes: float
    what: str
    ranks: int
    span: int
    calls: float
    beside: int = 1
    hides_behind: str | None = None
    tail: float = 0.0  # share that cannot hide: the last bucket

    @property
    def link(self) -> str:
        return "NVLink" if self.span <= GPUS_PER_NODE else "network"

    @property
    def network_bytes(self) -> float:
        """Of this GPU's port."""
        return 0.0 if self.link == "NVLink" else self.bytes / self.beside

    def seconds(self, assumed: Assumptions, device: str) -> float:
        """Bandwidth of the slower link, and a latency for each rank of each ring."""
        node = self.bytes / (assumed.node_link * DEVICES[device][1])
        nodes = 1 if self.link == "NVLink" else math.ceil(self.ranks / self.beside)
        hops = (self.ranks - nodes) * assumed.node_latency + (nodes - 1) * assumed.network_latency
        across = self.network_bytes / (assumed.network * NETWORK)
        return max(across, node if self.beside > 1 or nodes == 1 else 0.0) + self.calls * (assumed.launch + hops)


def traffic(job: Job, stage: int | None = None) -> list[Traffic]:
    """What a GPU of a pipeline stage sends in a step, by kind of parallelism; None: the busiest of each kind.

    Ring algorithms: (k - 1)/k of a tensor of k ranks. Ranks are numbered tensor, context, data, pipeline (Megatron's
    order).
    """
    found = [*_tensor_parallel(job, stage), *_context_parallel(job, stage)]
    m, t, c, p = job.config.model, job.t, job.c, job.p
    hidden = job.tokens * m.hidden_size * job.e
    if t * c > 1 and stage in (None, 0):
        # Ranks with fewer tokens fill up.
        visual = job.uneven * job.work.visual_tokens * job.rows * m.hidden_size * job.e
        size = job.micro_batches * 2 * visual * (t * c - 1) / (t * c)
        what = "visual tokens gathered, their gradients summed and dealt"
        calls = 2 * job.micro_batches
        found.append(Traffic("vision", size, what, t * c, t * c, calls, min(t * c, GPUS_PER_NODE)))
    if p > 1:
        pieces = job.config.parallel.virtual_pipeline_model_parallel_size or 1
        # A piece sends its output on and its input's gradient back: the first has none to send back, the last none on.
        ends = (stage == 0) + (stage == p - 1) if stage is not None else int(p == 2)
        calls = job.micro_batches * (2 * pieces - ends)
        what = "hidden states and gradients of a stage"
        found.append(Traffic("PP", calls * hidden / job.sequence, what, 2, t * c * job.d * 2, calls))
    return found + _data_parallel(job, stage)


def layers_again(job: Job, layers: int) -> int:
    """How many of a stage's layers the backward pass runs again whole, with their collectives."""
    if job.transformer("recompute_granularity") != "full":
        return 0
    if job.transformer("recompute_method") == "block":
        return min(layers, job.transformer("recompute_num_layers"))
    return layers


def _gradient_bytes(job: Job) -> int:
    return 4 if job.ddp("grad_reduce_in_fp32", True) or job.e == 4 else 2


def _tensor_parallel(job: Job, stage: int | None) -> list[Traffic]:
    """Megatron's tensor_parallel/layers.py: of a column-parallel product's backward pass, gathering the input goes on
    beside the input's gradient, and handing on that gradient beside the weights'. All else is waited for."""
    t = job.t
    if t == 1:
        return []
    layers, micro = max(job.layers) if stage is None else job.layers[stage], job.micro_batches
    passed = job.tokens * job.config.model.hidden_size * job.e * (t - 1) / t
    # Passes of a tensor: with sequence parallelism 4 gathers and scatters forward, 6 backward; without, all-reduces of
    # two passes each, 2 forward and 2 backward.
    waited, hidden = (6, 4) if job.sequence > 1 else (4, 4)
    # Attention and MLP have half of the forward passes each.
    again = 4 * layers_again(job, layers) + 2 * layers * ("mlp" in job.modules_again())
    # What is gathered is one byte an element in FP8 (Transformer Engine, pytorch/module/linear.py; without the scales
    # of blocks): of the passes that are waited for 4, of those of the backward pass 2, of forward passes half.
    saved = 1 - 1 / job.e if job.sequence > 1 and job.precision == "fp8" else 0.0
    per_call = 1 if job.sequence > 1 else 2
    overlap = PRODUCTS if job.transformer("tp_comm_overlap") else None

    def item(passes: float, count: int, what: str, behind: str | None, gathered: float = 0) -> Traffic:
        size = count * (passes - saved * gathered) * passed
        return Traffic("TP", size, what, t, t, count * passes / per_call, t, behind)

    found = [
        item(waited * layers + again, micro, "hidden states of each layer", overlap, 4 * layers + again / 2),
        item(hidden * layers, micro, "hidden states beside products of the backward pass", PRODUCTS, 2 * layers),
    ]
    # Sequence parallel ranks gather the embedding's gradient, the head's input, and scatter that one's gradient; others
    # sum the gradient of the head's input.
    is_first, is_last = stage in (None, 0), stage in (None, job.p - 1)
    loss_share = min(1.0, job.work.loss_tokens / job.seq_length)
    at_ends = (3 if job.sequence > 1 else 2) * is_first + (2 if job.sequence > 1 else 2 * loss_share) * is_last
    found.append(item(at_ends, micro, "hidden states at both ends", None))
    if is_first:
        # Of the part alone that a rank's optimizer reads (training/step.py, vision_gradients).
        shards = job.d * job.c if job.distributed else 1
        counts = count_parameters(job)[1][0]
        vision = _gradient_bytes(job) * counts.trained_vision / shards * 2 * (t - 1) / t
        found.append(Traffic("TP", vision, VISION_GRADIENTS, t, t, 1, t))
    return found


def _context_parallel(job: Job, stage: int | None) -> list[Traffic]:
    m, n, t, c, e = job.config.model, job.tokens, job.t, job.c, job.e
    if c == 1:
        return []
    if job.config.parallel.cp_comm_type == "a2a":
        width = (m.num_attention_heads + m.num_query_groups) * 2 * m.head_dim / t
        sent, calls = n * width * e * (c - 1) / c, 4
        what = "queries, keys, values and outputs change places"
    else:
        sent, calls = n * 2 * m.num_query_groups * m.head_dim / t * e * (c - 1), 2
        what = "keys and values gathered, their gradients summed and dealt"
    layers = max(job.layers) if stage is None else job.layers[stage]
    again = layers if "core_attn" in job.modules_again() else layers_again(job, layers)
    times = job.micro_batches * (2 * layers + again)  # forward, backward, and forward again
    beside = min(c, max(1, GPUS_PER_NODE // t))
    return [Traffic("CP", times * sent, what, c, t * c, times * calls, beside)]


def _data_parallel(job: Job, stage: int | None) -> list[Traffic]:
    """Gradients by buckets of Megatron's size (distributed/distributed_data_parallel.py)."""
    ranks, t = job.d * job.c, job.t
    if ranks == 1:
        return []
    by_stage = count_parameters(job)[1]
    counts = by_stage[stage] if stage is not None else max(by_stage, key=lambda counts: counts.trained)
    share = counts.trained * (ranks - 1) / ranks
    buckets = 1
    if job.overlaps("overlap_grad_reduce") and not stage:  # later pipeline stages have one
        buckets = max(1, math.ceil(counts.trained / (job.ddp("bucket_size") or max(40e6, 1e6 * ranks))))
    beside = min(ranks, max(1, GPUS_PER_NODE // t))

    def item(size: float, what: str, key: str, behind: str) -> Traffic:
        hides = behind if job.overlaps(key) else None
        return Traffic("DP", size, what, ranks, t * ranks, buckets, beside, hides, 1 / buckets)

    passes = 1 if job.distributed else 2
    found = [item(share * _gradient_bytes(job) * passes, "gradients summed", "overlap_grad_reduce", LAST_BACKWARD)]
    if job.distributed:
        found.append(item(share * job.e, "new weights gathered", "overlap_param_gather", FIRST_FORWARD))
    return found
