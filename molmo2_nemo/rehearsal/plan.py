"""What to rehearse, and the planner's figures beside what was counted."""

from dataclasses import dataclass, replace

from molmo2_nemo.config.checks import check_settings, row_multiple
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import FP8_RECIPE, Config, ModelConfig, padded_vocab_size
from molmo2_nemo.planner.efficiency import GPUS_PER_NODE
from molmo2_nemo.planner.flops import peak_flops
from molmo2_nemo.planner.memory import BUILD, HOST_GRADIENT, PHASES, Job, offloaded_parameters, stage_memory
from molmo2_nemo.planner.run_costs import host_optimizer_bytes
from molmo2_nemo.planner.step_time import stage_flops
from molmo2_nemo.planner.traffic import VISION_GRADIENTS, traffic
from molmo2_nemo.planner.work import Work

H100 = "NVIDIA H100 80GB HBM3"
HBM_PEAK, NVLINK_PEAK, NETWORK_PEAK = 3.35e12, 450e9, 50e9  # bytes/s: H100 data sheet; one 400 Gb/s port for a GPU
PCIE_PEAK = 64e9  # bytes/s each way, of PCIe 5.0 x16, from the same
HELD = ("weights", "gradients", "optimizer")  # between steps
VISION = "vision gradients'"  # traffic whose share differs among replicas; the planner has the mean
ONCE = ("optimizer", "gradients")  # parts of a step's work that do not grow with its micro-batches
NEGLIGIBLE = 2**20  # bytes that may be where the planner has nothing


class NotRehearsed(ConfigError):
    """A run may have the setting, a rehearsal cannot."""


@dataclass
class Plan:
    """What is rehearsed. notes: sentences on what is otherwise than in the run."""

    config: Config
    gpus: int
    micro_batches: int
    of: int  # micro-batches of a step of the run
    ranks: list[int]
    notes: list[str]

    def rows(self, rank: int) -> str:
        """The kind of a rank's rows: the first replica has full ones, the second text alone, the last mixed pictures.

        All ranks of a replica have the same.
        """
        job = Job(self.config, self.gpus)
        replica = rank // (job.t * job.c) % job.d
        return "full" if replica == 0 else "text" if replica == 1 and job.d > 2 else "pictures"


def plan(config: Config, gpus: int, micro_batches: int | None = None, ranks: list[int] | None = None) -> Plan:
    """What to rehearse of a run. micro_batches, ranks: None for a choice.

    Raises ConfigError, and NotRehearsed, which is one.
    """
    notes = []
    p, train = config.parallel, config.train
    if train.vit_fp8:
        raise NotRehearsed("train.vit_fp8=true cannot be rehearsed: rehearse train.vit_fp8=false.")
    if train.precision == "fp8" or p.layer_spec == "transformer_engine":
        notes.append("stand-ins for Transformer Engine's layers are rehearsed: its kernels and workspaces are not seen")
        config = replace(config, parallel=replace(p, layer_spec="transformer_engine"))
    elif p.layer_spec != "local":
        notes.append(
            "Megatron's local layers are rehearsed; a run with Transformer Engine installed uses its layers "
            "(parallel.layer_spec=transformer_engine rehearses stand-ins)"
        )
        config = replace(config, parallel=replace(p, layer_spec="local"))
    job, recipe = Job(config, gpus), config.transformer.get("fp8_recipe", FP8_RECIPE)
    length, multiple = config.data.seq_length, row_multiple(p, train.precision, recipe)[0]
    while _looks_like_a_width(row_lengths(config, length), widths(config.model, job.t)):
        length += multiple
    if length != config.data.seq_length:
        notes.append(
            f"rows of {length:,} tokens are rehearsed: with {config.data.seq_length:,}, a tensor of all pairs of "
            "tokens could not be told from one of tokens by a width of the model"
        )
        config = replace(config, data=replace(config.data, seq_length=length))
    pieces = config.parallel.virtual_pipeline_model_parallel_size or 1
    usual = 1 if job.p == 1 else 2 * job.p if pieces > 1 else job.p
    usual = min(usual, job.micro_batches)
    count = min(micro_batches or usual, job.micro_batches)
    if count < usual:
        raise ConfigError(f"--micro-batches {count}: at least {usual} are in flight at a time, give as many or more.")
    if count < job.micro_batches:
        notes.append(
            f"{count} of the {job.micro_batches} micro-batches of a step are rehearsed; the others repeat them"
        )
    train = replace(config.train, global_batch_size=count * job.rows * job.d)
    config = replace(config, train=train)
    check_settings(config, gpus)
    chosen = choose_ranks(job) if ranks is None else ranks
    wrong = [rank for rank in chosen if not 0 <= rank < gpus]
    if wrong:
        raise ConfigError(f"--ranks {wrong[0]}: there are ranks 0 to {gpus - 1}.")
    return Plan(config, gpus, count, job.micro_batches, chosen, notes)


def row_lengths(config: Config, length: int) -> set[int]:
    """Tokens of a row, of a context parallel and of a sequence parallel rank's part of it, and of a micro-batch's rows.

    A tensor with two such dimensions holds a number for every pair of tokens.
    """
    p, rows = config.parallel, config.train.micro_batch_size
    c, t = p.context_parallel_size, p.tensor_model_parallel_size if p.sequence_parallel else 1
    parts = {length, length // c, length // (c * t)}
    return parts | {rows * part for part in parts}


def pairs_of(lengths: set[int]) -> set[int]:
    """How many pairs of tokens rows of these lengths have with each other."""
    return {a * b for a in lengths for b in lengths}


def _looks_like_a_width(lengths: set[int], widths: set[int]) -> bool:
    """Whether a length is a width, or the product of two that of one and a width: 8,192 ^ 2 is 16,384 x 4,096."""
    pairs = pairs_of(lengths)
    return not lengths.isdisjoint(widths) or not pairs.isdisjoint({a * b for a in lengths for b in widths})


def widths(m: ModelConfig, t: int) -> set[int]:
    """Sizes of weights and activations that have nothing to do with a row's length."""
    vit, inner = m.vit, m.connector.num_attention_heads * m.connector.head_dim
    split = {
        m.num_attention_heads * m.head_dim,
        (m.num_attention_heads + 2 * m.num_query_groups) * m.head_dim,
        m.num_query_groups * m.head_dim,
        m.ffn_hidden_size,
        2 * m.ffn_hidden_size,
        padded_vocab_size(m.vocab_size),
    }
    whole = {m.hidden_size, m.head_dim, inner, m.connector.hidden_size, m.connector.ffn_hidden_size}
    whole |= {2 * m.connector.ffn_hidden_size, vit.hidden_size * len(vit.feature_layers)}
    whole |= {vit.hidden_size, vit.ffn_hidden_size, 3 * vit.num_attention_heads * vit.head_dim}
    whole |= {vit.num_attention_heads * vit.head_dim, m.vision.patches_per_crop, m.vision.patch_dim}
    return whole | split | {size // t for size in split}


def choose_ranks(job: Job) -> list[int]:
    """Rank 0, one that differs from it in each kind of parallelism, one of each stage, and one without pictures.

    Each but those of later stages shares a group with rank 0, so that their collectives can be compared; a stage is
    compared with its neighbours. Megatron numbers ranks by tensor, context, data, pipeline.
    """
    t, c, d, p = job.t, job.c, job.d, job.p
    found = {0}
    found |= {1} if t > 1 else set()
    found |= {t} if c > 1 else set()
    found |= {t * c * (d - 1)} if d > 1 else set()
    found |= {t * c} if d > 2 else set()
    found |= {t * c * d * stage for stage in range(p)}
    return sorted(found)


def job_of(plan: Plan, counted, micro_batches: int) -> Job:
    """The planner's job of so many micro-batches, with the rows that a rank was rehearsed with."""
    job = Job(plan.config, plan.gpus)
    rows, job.micro_batches = plan.micro_batches * job.rows, micro_batches
    job.work = Work(**{name: value / rows for name, value in counted.work.items()})
    return job


def beside(plan: Plan, counted) -> list[dict]:
    """Rows of a table: figure, counted, planned, off by so many percent. counted: a Rehearsal."""
    parts = stage_memory(job_of(plan, counted, plan.of), counted.stage)
    job = job_of(plan, counted, plan.micro_batches)
    of = {part.name: part.bytes for part in parts}
    at_most = {phase: sum(part.bytes for part in parts if phase in part.phases) for phase in PHASES}
    building = at_most.pop(BUILD)
    rows = [
        _row("peak of the step", counted.peaks["step"], max(at_most.values())),
        _row("peak of building", counted.peaks["build"], max(building, sum(of[name] for name in HELD))),
    ]
    rows += [_row(name, counted.held.get(name, 0), of[name]) for name in HELD]
    sent = {}
    for c in counted.collectives:
        kind = VISION if c.group == "TP" and c.line.startswith("molmo2_nemo/training/step.py") else c.group
        sent[kind] = sent.get(kind, 0) + c.sent
    planned = {}
    for item in traffic(job, counted.stage):
        kind = VISION if item.what == VISION_GRADIENTS else item.kind
        planned[kind] = planned.get(kind, 0) + item.bytes
    rows += [_row(f"{kind} traffic", sent.get(kind, 0), size) for kind, size in planned.items()]
    if offloaded := offloaded_parameters(job):
        rows.append(_row("optimizer on the host", counted.on_host, host_optimizer_bytes(job)))
        copied = offloaded * (HOST_GRADIENT + job.e)
        rows.append(_row("copied to and from the host", counted.uploads + counted.downloads, copied))
    flops = stage_flops(job, counted.stage)
    rows.append(_row("FLOP", sum(counted.flops.values()), sum(flops.values())))
    return rows


def _row(figure: str, counted: float, planned: float) -> dict:
    expected_none = not planned and counted < NEGLIGIBLE
    off = None if expected_none or not counted else 100 * (planned / counted - 1)
    return {"figure": figure, "counted": counted, "planned": planned, "off_percent": off}


def roofline(plan: Plan, counted) -> dict[str, float]:
    """Seconds of a whole step of this rank at the device's peaks, and at the share of them that the planner assumes.

    Products, other operations' bytes and collectives one after the other, but for those of data parallelism, which
    overlap with the backward pass; a pipeline's bubble as in the planner. Loading data takes no time, nor does Adam on
    the host.
    """
    again = plan.of / plan.micro_batches
    seconds = dict.fromkeys(("products", "other operations", "collectives"), 0.0)
    for part, flops in counted.flops.items():
        peak = peak_flops(H100, "fp8" if part.endswith(" FP8") else "bf16")
        seconds["products"] += flops / peak * again
    for part, size in counted.moved.items():
        seconds["other operations"] += size / HBM_PEAK * (1 if part in ONCE else again)
    for c in counted.collectives:
        if c.group != "DP":
            inside = min(c.ranks) // GPUS_PER_NODE == max(c.ranks) // GPUS_PER_NODE
            seconds["collectives"] += c.sent / (NVLINK_PEAK if inside else NETWORK_PEAK) * again
    if offloaded_parameters(Job(plan.config, plan.gpus)):
        seconds["copies to and from the host"] = (counted.uploads + counted.downloads) / PCIE_PEAK
    pieces = plan.config.parallel.virtual_pipeline_model_parallel_size or 1
    p = plan.config.parallel.pipeline_model_parallel_size
    bubble = (p - 1) / (pieces * plan.of + p - 1)
    seconds["pipeline's bubble"] = sum(seconds.values()) * bubble / (1 - bubble)
    return seconds
