"""The loss on held-out data."""

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from molmo2_nemo.config.schema import Config
from molmo2_nemo.data.loader import ValidationLoader
from molmo2_nemo.training.batches import BatchSource
from molmo2_nemo.training.metrics import DataReport, LossBySource
from molmo2_nemo.training.step import forward_backward


def validate(
    config: Config,
    model: list[DistributedDataParallel],
    loader: ValidationLoader | None,
    group: dist.ProcessGroup,
    device: str,
    sources: list[str],
) -> tuple[dict, DataReport, list[str]]:
    """Loss on the first train.validation_batches held-out micro-batches of each replica. Collective.

    loader: on the first rank of `group`, the ranks of this replica; None elsewhere. sources: their names. Returns
    figures for the log, what became of the samples, and a line for each of the first broken ones.
    """
    batches_from = BatchSource(iter(loader) if loader is not None else None, group, device, config.model)
    losses, data, broken = LossBySource(sources, device), DataReport(sources, device), []
    # The interleaved schedule takes as many micro-batches as there are pipeline stages; repeated ones are not counted.
    at_once = config.parallel.pipeline_model_parallel_size if len(model) > 1 else 1
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        for _ in range(config.train.validation_batches):
            batch = batches_from.next()
            # Replicas may hold different numbers of held-out rows: stop together.
            ended = torch.tensor(batch is None, dtype=torch.int32, device=device)
            dist.all_reduce(ended, op=dist.ReduceOp.MAX)
            if ended:
                break
            broken += data.add([batch])
            one = torch.ones((), device=device)
            losses.add([batch], forward_backward(model, [batch] * at_once, one, forward_only=True)[:1])
    for chunk in model:
        chunk.train()
    return losses.reduce() | {"data": data.by_source()}, data, broken


def validation_line(step: int, figures: dict) -> str:
    """The console line of a validation."""
    by_source = " ".join(f"{source} {loss:.3f}" for source, loss in figures["loss_by_source"].items())
    loss = "none: no held-out token carries loss" if figures["loss"] is None else f"{figures['loss']:.4f} ({by_source})"
    return f"step {step} validation | loss {loss} | {figures['rows']} rows"
