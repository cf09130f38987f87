"""Run by test_overlap.py under torchrun on two ranks: overlapped collectives against none.

Many buckets; one rank has text alone, the other images and a video. Rank 0 prints one JSON line: of each rank and each
overlap, how many losses and weights differ by a bit from those without; weights after some steps, those in between as
a checkpoint would hold them.
"""

import json

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from molmo2_nemo import gpu, parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.checks import check
from molmo2_nemo.config.components import is_frozen
from molmo2_nemo.config.schema import ParallelConfig
from molmo2_nemo.random_batches import pack, random_documents
from molmo2_nemo.training import checkpoint
from molmo2_nemo.training.optimizer import build_optimizer, clip_and_step, set_learning_rates
from molmo2_nemo.training.step import build_model, forward_backward, global_weight

STEPS = 3


def run(*overrides: str) -> tuple[list, dict, int]:
    """(losses, weights after each step as a checkpoint takes them, number of buckets)"""
    settings = ["model=tiny", "data=sample", "schedule=quickstart", "optim=from_scratch", "train.global_batch_size=8"]
    config = compose("stage2", [*settings, *overrides])
    check(config, 2)
    parallel.seed_everything(1)
    model = build_model(
        config.model,
        ParallelConfig(),
        "cpu",
        "fp32",
        ddp=gpu.ddp_settings(config, "cpu"),
        freeze=lambda name: is_frozen(name, config.optim, config.model.tie_embeddings),
        vision_chunk_crops=2,
    )
    optimizer = build_optimizer(config, model, "fp32")
    losses, weights = [], {}
    for step in range(1, STEPS + 1):
        documents = random_documents(config.model, step)
        own = documents[:1] if dist.get_rank() == step % 2 else documents[1:]
        batches, _ = pack(own, 1, config.model, step, 8)
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append([x.double().sum() for x in forward_backward(model, batches, global_weight(batches))])
        set_learning_rates(optimizer, config, 50)
        assert clip_and_step(optimizer, 0.0)[0]  # clipped, they would differ by the rounding of the norm
        if step > 1:  # without a save in between the weights must be there in time, too
            state = checkpoint._state(model, optimizer, {}, is_loading=False)["model0"]
            weights.update(
                {
                    (step, n): e.data.clone()
                    for n, e in state.items()
                    if isinstance(getattr(e, "data", None), torch.Tensor)
                }
            )
    assert unwrap_model(model)[0].output_layer.weight.requires_grad
    return losses, weights, len(model[0].bucket_groups)


def main() -> None:
    parallel.initialize(ParallelConfig(), "cpu", timeout_minutes=2, seed=0)
    expected, plain, _ = run("ddp.use_distributed_optimizer=true")
    own = []
    for overlap in ("ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true"):
        losses, weights, buckets = run("ddp.bucket_size=5000", overlap)
        own.append(
            {
                "overlap": overlap,
                "buckets": buckets,
                "steps": len(losses),
                "steps_differing": sum(a != b for a, b in zip(losses, expected)),
                "weights": len(weights),
                "weights_missing": len(plain.keys() ^ weights.keys()),
                "weights_differing": [str(name) for name in plain if not torch.equal(weights[name], plain[name])],
            }
        )
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    if dist.get_rank() == 0:
        print(json.dumps({"ranks": ranks}), flush=True)


main()
