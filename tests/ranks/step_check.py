"""Run by test_step.py under torchrun: what each of four ranks (TP 2, SP, CP 2) holds, sends and waits for in a step.

Rank 0 prints one JSON line with the figures of every rank.
"""

import json
import traceback

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from molmo2_nemo import compat, parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.schema import ParallelConfig
from molmo2_nemo.data.packing import Batch
from molmo2_nemo.random_batches import pack, random_documents
from molmo2_nemo.training import step
from molmo2_nemo.training.batches import FIELDS, HOST_FIELD, BatchSource, own_part, whole_crops

LAYOUT = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True)
MODEL = compose("stage1", ["model=tiny", "data=sample", "schedule=quickstart"]).model
# Operations whose result's size, or value, the host has to know.
ASKING = ("nonzero", "masked_select", "_local_scalar_dense", "item", "is_nonzero", "equal", "unique", "_unique2")


class Waits(compat.dispatch_mode()):
    """Notes the operations for which the host would wait for a GPU, boolean masks as indices among them."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        self.seen += 1
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        # One value for all masked places is a masked_fill to torch: no one counts.
        masked = masked and not (name.startswith("index_put") and args[2].numel() == 1)
        if name in ASKING or masked:
            through = ("/torch/", "molmo2_nemo/cpu.py")  # every call goes through these
            frames = [f for f in traceback.extract_stack()[:-1] if not any(part in f.filename for part in through)]
            # Megatron compares the state of the host's random numbers there, which no GPU has.
            if not frames[-1].filename.endswith("tensor_parallel/random.py"):
                self.found.append(f"{name} {tuple(args[0].shape)} {frames[-1].filename}:{frames[-1].lineno}")
        return function(*args, **(kwargs or {}))


def stored(rows: dict) -> Batch:
    """A micro-batch as a loader gives it."""
    fields = {name: rows[name] for name in (*FIELDS, HOST_FIELD)}
    nothing = dict(examples=torch.zeros(0, 2, dtype=torch.int64), counters={}, errors=[], outcomes=[])
    return Batch(__key__=(), __restore_key__=(), **fields, **nothing)


def build(distributed: bool):
    parallel.seed_everything(3)
    ddp = dict(use_distributed_optimizer=distributed)
    return step.build_model(MODEL, LAYOUT, "cpu", "fp32", ddp=ddp, vision_chunk_crops=2)


def shares(rows: list[dict], source: BatchSource) -> tuple[list[dict], dict]:
    """The step's micro-batches on this rank, and what it holds of their crops."""
    got = [source.next() for _ in rows]
    cut = [own_part(row, MODEL) for row in rows]
    differing = [n for own, part in zip(got, cut) for n in part if not torch.equal(own[n], part[n])]
    whole = [whole_crops(batch) for batch in got]
    return got, {
        "bytes": sum(batch["crops"].untyped_storage().nbytes() for batch in got),
        "of": sum(row["crops"].nbytes for row in rows),
        "largest_image": sum(int(row[HOST_FIELD][:, 0].max()) * row["crops"][0].nbytes for row in rows),
        "differing": differing,
        "whole_again": all(torch.equal(crops, row["crops"]) for crops, row in zip(whole, rows)),
    }


def main() -> None:
    parallel.initialize(LAYOUT, "cpu", timeout_minutes=2, seed=0)
    documents = random_documents(MODEL, seed=0)
    rows = pack(documents, 2, MODEL, 0, 8)[0]
    for row in rows:
        row["source_ids"] = torch.zeros_like(row["input_ids"], dtype=torch.int32)
    replica = parallel.model_replica_group(2)
    loader = iter([stored(row) for row in rows]) if dist.get_rank() == 0 else None
    source = BatchSource(loader, replica, "cpu", MODEL)
    got, figures = shares(rows, source)
    figures["ended"] = source.next() is None

    plain, sharded, waits, reduced = build(False), build(True), Waits(), []
    total = step.global_weight(got)
    step.forward_backward(plain, got, total)
    all_reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        if kwargs.get("group") is parallel_state.get_tensor_model_parallel_group():
            reduced.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    with waits:
        step.forward_backward(sharded, got, total)
    dist.all_reduce = all_reduce

    owned = step.vision_gradients(sharded)
    names = {id(p): n for n, p in step.global_names(sharded[0].module)}
    expected = dict(step.global_names(plain[0].module))
    differing = []
    for group in sharded[0].bucket_groups:
        for bucket in group.buckets:
            size = bucket.grad_data.numel() // group.intra_distributed_optimizer_instance_size
            first = size * group.intra_distributed_optimizer_instance_rank
            for parameter in bucket.params_list:
                begins, ends = bucket.param_to_index[parameter]
                mine = slice(max(begins, first), min(ends, first + size))
                if mine.start >= mine.stop:
                    continue
                name = names[id(parameter)]
                same = expected[name].main_grad.flatten()[mine.start - begins : mine.stop - begins]
                if not torch.equal(bucket.grad_data[mine], same):
                    differing.append(name)
    figures |= {
        "waits": waits.found,
        "operations": waits.seen,
        "owned": sum(g.numel() for g in owned),
        "reduced": max(reduced),
        "vision": sum(p.numel() for n, p in expected.items() if n.startswith("vision.")),
        "gradients_differing": differing,
    }
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, figures)
    if dist.get_rank() == 0:
        print(json.dumps({"ranks": ranks}), flush=True)


main()
