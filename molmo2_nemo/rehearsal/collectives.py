"""Collectives as they are recorded, and whether ranks agree on them."""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist

from molmo2_nemo import compat

# c10d's operation -> (our name, share of its bytes that a ring algorithm sends, as a function of the ranks).
# all_gather and reduce_scatter: (k - 1)/k of the larger side; all_reduce is one of each (NCCL's documentation of
# bandwidth, doc/PERFORMANCE.md of NVIDIA/nccl-tests).
OPERATIONS = {
    "allreduce": ("all_reduce", lambda k: 2 * (k - 1) / k),
    "allgather": ("all_gather", lambda k: (k - 1) / k),
    "reduce_scatter": ("reduce_scatter", lambda k: (k - 1) / k),
    "alltoall": ("all_to_all", lambda k: (k - 1) / k),
    "broadcast": ("broadcast", lambda k: (k - 1) / k),
    "send": ("send", lambda k: 1.0),
    "recv": ("recv", lambda k: 0.0),
    "barrier": ("barrier", lambda k: 0.0),
}
# What Megatron's groups are for: its description of a group -> a short name.
GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "TP",
    "CONTEXT_PARALLEL_GROUP": "CP",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "vision",
    "PIPELINE_MODEL_PARALLEL_GROUP": "PP",
    "DATA_PARALLEL_GROUP": "DP",
    "DATA_PARALLEL_GROUP_WITH_CP": "DP",
    "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "DP",
    "EMBEDDING_GROUP": "tied weights",
    "POSITION_EMBEDDING_GROUP": "tied weights",
    "MODEL_PARALLEL_GROUP": "norms",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "norms",
    "default_pg": "all ranks",
}


@dataclass(frozen=True)
class Collective:
    """One call. bytes: of the larger of what this rank gives and gets; sent: by this rank, with ring algorithms.

    peer: the other rank of a send or a receive. dtype: of the first tensor.
    """

    phase: str
    operation: str
    group: str
    ranks: tuple[int, ...]
    bytes: int
    sent: float
    line: str
    peer: int | None = None
    dtype: str = ""

    @property
    def call(self) -> tuple:
        """What all ranks of the group must have in common."""
        return self.ranks, self.operation, self.bytes, self.dtype


def tensors_in(tree) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts, in order; as torch's own, in a tenth of the time."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [tensor for branch in tree for tensor in tensors_in(branch)]


def collective_of(function, args, kwargs, line: str, phase: str) -> tuple[Collective, object]:
    """(what is recorded of a c10d operation, what the operation returns)."""
    schema = compat.schema_of(function)
    name = schema.name.removeprefix("c10d::").strip("_")
    operation, share = next(value for key, value in OPERATIONS.items() if name.startswith(key))
    named = {argument.name: value for argument, value in zip(schema.arguments, args)} | kwargs
    group, ranks = name_and_ranks(next(filter(None, map(compat.process_group, named.values())), None))
    sides = [sum(t.numel() * t.element_size() for t in tensors_in(value)) for value in named.values()]
    size = max(sides, default=0)
    peer = next((ranks[named[key]] for key in ("dst", "src") if key in named), None)
    if peer is not None:
        # Of two stages Megatron sends one way through the group of all ranks (pipeline_parallel/p2p_communication.py).
        group, ranks = "PP", tuple(sorted((dist.get_rank(), peer)))
    tensors = tensors_in(list(named.values()))
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    found = Collective(phase, operation, group, ranks, size, share(len(ranks)) * size, line, peer, dtype)
    work = compat.finished_work(dist.group.WORLD)
    returned = [work if "Work" in str(r.type) else args[0] for r in schema.returns]
    return found, returned[0] if len(returned) == 1 else tuple(returned)


def name_and_ranks(group) -> tuple[str, tuple[int, ...]]:
    """Our name of a process group, and its ranks; None is the group of all ranks."""
    group = group or dist.group.WORLD
    described = getattr(group, "group_desc", "")
    return GROUPS.get(described, described.lower()), tuple(dist.get_process_group_ranks(group))


def totals(collectives: list[Collective]) -> list[dict]:
    """Calls, bytes and bytes sent by group and operation, most bytes first."""
    calls, size, sent = Counter(), Counter(), Counter()
    for c in collectives:
        key = (c.group, c.operation, len(c.ranks))
        calls[key] += 1
        size[key] += c.bytes
        sent[key] += c.sent
    return [
        {"group": g, "operation": o, "ranks": n, "calls": calls[g, o, n], "bytes": size[g, o, n], "sent": sent[g, o, n]}
        for g, o, n in sorted(calls, key=lambda key: -sent[key])
    ]


def disagreements(by_rank: dict[int, list[Collective]]) -> list[str]:
    """A sentence for each pair of rehearsed ranks that share a group and do not issue the same calls on it.

    On all groups that two ranks share, both must issue the same calls in the same order; and each receives what the
    other sends. A rank is compared with the lowest one of each of its groups.
    """
    sentences = []
    groups = {c.ranks for calls in by_rank.values() for c in calls if c.peer is None and len(c.ranks) > 1}
    present = [[rank for rank in ranks if rank in by_rank] for ranks in groups]
    for one, other in sorted({(ranks[0], rank) for ranks in present for rank in ranks[1:]}):
        first, second = (
            [c for c in by_rank[rank] if c.peer is None and one in c.ranks and other in c.ranks]
            for rank in (one, other)
        )
        sentences += _difference(one, first, other, second)
    for one in sorted(by_rank):
        for other in sorted(set(by_rank) - {one}):
            sent = [c for c in by_rank[one] if c.operation == "send" and c.peer == other]
            got = [c for c in by_rank[other] if c.operation == "recv" and c.peer == one]
            sentences += _difference(one, sent, other, got, peers=True)
    return sentences or _ring(by_rank)


def _ring(by_rank: dict[int, list[Collective]]) -> list[str]:
    """A sentence if ranks, each pair of which agrees, wait for one another in a ring: A for B, B for C, C for A.

    Every rank takes its next call when all rehearsed ranks of that call's group have come to it. Sends and receives are
    left out.
    """
    left = {
        rank: [c for c in calls if c.peer is None and sum(other in by_rank for other in c.ranks) > 1]
        for rank, calls in by_rank.items()
    }
    next_of = dict.fromkeys(by_rank, 0)
    waiting = set(by_rank)
    while True:
        at = {rank: left[rank][next_of[rank]] for rank in waiting if next_of[rank] < len(left[rank])}
        done = set()
        for call in {c.ranks: c for c in at.values()}.values():
            members = {rank for rank in call.ranks if rank in by_rank}
            if all(rank in at and at[rank].ranks == call.ranks for rank in members):
                done |= members
        if not done:
            break
        for rank in done:
            next_of[rank] += 1
    if not at:
        return []
    return [f"ranks wait for one another: {'; '.join(f'rank {rank} in {_words(at[rank])}' for rank in sorted(at))}"]


def _difference(one: int, first: list, other: int, second: list, peers: bool = False) -> list[str]:
    for number in range(max(len(first), len(second))):
        a = first[number] if number < len(first) else None
        b = second[number] if number < len(second) else None
        if a is None or b is None or (a.bytes != b.bytes if peers else a.call != b.call):
            return [f"ranks {one} and {other} differ at call {number + 1} that they share: {_words(a)} and {_words(b)}"]
    return []


def _words(c: Collective | None) -> str:
    return (
        "nothing"
        if c is None
        else f"{c.operation} on {c.group} of {c.bytes:,} bytes{c.dtype and f' of {c.dtype}'} ({c.line})"
    )
