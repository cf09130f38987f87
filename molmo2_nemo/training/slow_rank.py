"""The slowest rank of a job: the one for which all others wait, step after step."""

import os
import shlex
import socket
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from molmo2_nemo.config.schema import Config
from molmo2_nemo.environment import local_rank
from molmo2_nemo.planner.flops import forward_flops
from molmo2_nemo.training.batches import WORK
from molmo2_nemo.training.step_times import COMMUNICATION

# A rank is slow if its compute takes this much more than the median, in so many logging intervals in a row.
ABOVE, INTERVALS = 0.10, 3


@dataclass(frozen=True)
class Place:
    """Where a rank runs. peers: the same for all ranks that do the same work. source: the rank that reads its rows."""

    host: str
    gpu: str | None  # None: on a CPU
    peers: tuple
    source: int

    def __str__(self) -> str:
        return f"{self.host} ({self.gpu or 'CPU'})"


@dataclass(frozen=True)
class Slow:
    """The slowest rank: seconds of its compute in a step, the median of its peers, and how far it lies above that."""

    rank: int
    seconds: float
    median: float
    above: float


class SlowRank:
    """Compares the ranks of each logging interval, and remembers how often in a row the same one was the slowest.

    Compute is all of a step but waiting for data and communicating. Ranks are compared that do the same work: those at
    the same place in each data-parallel replica; with one replica, those of a pipeline stage (see `compute`).
    """

    def __init__(self, places: list[Place], advice):
        """advice: a function of a Place, which says what to do about a slow rank there."""
        self.places, self.advice = places, advice
        self.intervals = 0
        self.rank, self.in_a_row = None, 0
        self.said = None  # the rank that the log has named

    def judge(self, seconds: list[float], flops: list[float]) -> tuple[Slow | None, str | None]:
        """The slow rank of this interval, if there is one, and a line for the log if that is news.

        seconds: compute of a step by rank; flops: of the rows that it was done on, by rank. A rank that has more work
        than its peers is not slow, nor is one that takes as long for less work. The first interval is left out: there,
        kernels are compiled and connections made.
        """
        self.intervals += 1
        if self.intervals == 1:
            return None, None
        slowest = self._slowest(seconds, flops)
        if slowest is None or slowest.above <= ABOVE:
            self.rank, self.in_a_row = None, 0
        else:
            self.in_a_row = self.in_a_row + 1 if slowest.rank == self.rank else 1
            self.rank = slowest.rank
        if self.in_a_row < INTERVALS:
            line = None
            if self.said is not None and self.rank != self.said:
                line = f"rank {self.said} on {self.places[self.said]} is not the slowest any more"
                self.said = None
            return None, line
        if self.said == slowest.rank:
            return slowest, None
        self.said = slowest.rank
        place = self.places[slowest.rank]
        return slowest, (
            f"rank {slowest.rank} on {place} is slow: its compute took {slowest.seconds:.3g} s a step, "
            f"{slowest.above:.0%} more than the median of the ranks that do the same work, and it was the slowest in "
            f"{self.in_a_row} intervals in a row; {self.advice(place)}"
        )

    def record(self, slow: Slow) -> dict:
        """What metrics.jsonl keeps of it, for tools/status.py and the report."""
        place = self.places[slow.rank]
        return {
            "rank": slow.rank,
            "place": str(place),
            "seconds": slow.seconds,
            "above_median": slow.above,
            "advice": self.advice(place),
        }

    def _slowest(self, seconds: list[float], flops: list[float]) -> Slow | None:
        """None: no rank has another one to be compared with."""
        peers: dict[tuple, list[int]] = {}
        for rank, place in enumerate(self.places):
            peers.setdefault(place.peers, []).append(rank)
        found = []
        for ranks in peers.values():
            if len(ranks) == 1:
                continue
            per_flop = {rank: seconds[rank] / flops[rank] for rank in ranks if flops[rank] > 0}
            median = statistics.median_low(seconds[rank] for rank in ranks)
            usual = statistics.median_low(per_flop.values()) if per_flop else 0.0
            for rank in ranks:
                ratios = [seconds[rank] / median if median > 0 else 1.0]
                ratios += [per_flop[rank] / usual] if rank in per_flop and usual > 0 else []
                found.append(Slow(rank, seconds[rank], median, min(ratios) - 1))
        return max(found, key=lambda slow: slow.above, default=None)


def compute(step: dict[str, float]) -> float:
    """Seconds of a step (StepTimes) that are a rank's own.

    Under tensor parallelism without the backward pass: Megatron waits in it for other ranks where that cannot be seen.
    With one data-parallel replica without vision tower and losses, which its ranks have different shares of.
    """
    left_out = {"data"}
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        left_out.add("backward")
    if parallel_state.get_data_parallel_world_size() == 1:
        left_out |= {"backward", "vision", "connector", "loss"}
    return sum(seconds for part, seconds in step.items() if part not in left_out and not part.startswith(COMMUNICATION))


def by_rank(seconds: float, device: str) -> list[float]:
    """The number of each rank. Collective."""
    own = torch.tensor([seconds], dtype=torch.float64, device=device)
    everybodys = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, own)
    return torch.cat(everybodys).tolist()


def flops_by_rank(config: Config, places: list[Place], work: torch.Tensor) -> list[float]:
    """FLOPs of the forward pass of the rows of each rank's replica, in as far as they are its pipeline stage's.

    work: float64 [ranks, len(WORK)], as Speed.reduce has gathered it.
    """
    parts = forward_flops(config.model, **dict(zip(WORK, work.unbind(-1))))
    decoder = parts["decoder"] + parts["decoder attention"] + parts["head"]
    vision = sum(parts.values()) - decoder
    stages = config.parallel.pipeline_model_parallel_size
    return [float(decoder[p.source] / stages + (vision[p.source] if p.peers[0] == 0 else 0)) for p in places]


def make(config: Config, device: str, replica: dist.ProcessGroup) -> SlowRank:
    """Ask all ranks where they are. Collective. replica: this rank's."""
    state = parallel_state
    stage, tensor = state.get_pipeline_model_parallel_rank(), state.get_tensor_model_parallel_rank()
    context = state.get_context_parallel_rank()
    if state.get_data_parallel_world_size() > 1:
        peers = (stage, tensor, context)
    elif config.parallel.cp_comm_type == "all_gather":
        peers = (stage, context)  # a later part of a row attends to more
    else:
        peers = (stage,)
    gpu = f"GPU {local_rank()}, {torch.cuda.get_device_name()}" if device == "cuda" else None
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, Place(host, gpu, peers, dist.get_process_group_ranks(replica)[0]))
    run_dir, hosts = Path(config.run_dir).absolute(), {place.host for place in everybodys}
    return SlowRank(everybodys, lambda place: advice(place, run_dir, len(hosts), "SLURM_JOB_ID" in os.environ))


def advice(place: Place, run_dir: Path, hosts: int, in_slurm: bool) -> str:
    """What to do about a slow rank: a clause that ends with commands.

    run_dir: of the stage. hosts: how many the job has.
    """
    arguments = run_dir.parent / "slurm" / "arguments"
    if in_slurm and arguments.exists():
        left_out = [line.partition("=")[2] for line in arguments.read_text().splitlines() if _excludes(line)]
        nodes = shlex.quote(",".join([*left_out[-1:], place.host]))
        submit = f"slurm/submit.sh --name {shlex.quote(run_dir.parent.name)}"
        again = f"{submit} --resume --exclude={nodes}"
        return f"to go on without this node: {submit} --stop, and when the job has ended: {again}"
    if in_slurm:
        return (
            f"to go on without this node: scancel {os.environ['SLURM_JOB_ID']}, then the same sbatch command with "
            f"--exclude={place.host}"
        )
    if hosts > 1:
        return f"to go on without this machine: stop the run, and start it again with other hosts than {place.host}"
    return "see what else runs there: " + ("top" if place.gpu is None else "nvidia-smi, top")


def _excludes(argument: str) -> bool:
    return argument.startswith("--exclude=")
