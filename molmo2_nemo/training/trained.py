"""What a run trains and what it leaves as it is, as lines for its log."""

import re
from collections import Counter

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

from molmo2_nemo.config.components import COMPONENTS, component_of
from molmo2_nemo.training.step import global_names


def what_is_trained(model: list[DistributedDataParallel]) -> list[str]:
    """A line for each component: how many of its parameters are trained, and which. Collective.

    They are those of the whole model; layers are written as one name, with a star for their number.
    """
    trained, frozen = Counter(), Counter()
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, _own(model))
    for rank_trained, rank_frozen in everybodys:
        trained.update(rank_trained)
        frozen.update(rank_frozen)
    lines = [f"trained: {_share(trained, frozen)} of all parameters"]
    for component in COMPONENTS:
        own = [Counter({n: c for n, c in part.items() if component_of(n) == component}) for part in (trained, frozen)]
        lines.append(f"  {component}: {_share(*own)}{_names(*own)}")
    return lines


def _own(model: list[DistributedDataParallel]) -> tuple[Counter, Counter]:
    """Counts of (trained, frozen) parameters by name; those that other ranks hold as well count on the first alone."""
    found = Counter(), Counter()
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) > 0:
        return found
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    for chunk in unwrap_model(model):
        for name, parameter in global_names(chunk):
            is_copy = name.startswith("output_layer.") and chunk.share_embeddings_and_output_weights
            if is_copy or not (first or getattr(parameter, "tensor_model_parallel", False)):
                continue
            kind = re.sub(r"\.lora\.[ab]$", ".lora", re.sub(r"\.\d+\.", ".*.", name))
            found[0 if parameter.requires_grad else 1][kind] += parameter.numel()
    return found


def _share(trained: Counter, frozen: Counter) -> str:
    number, total = trained.total(), trained.total() + frozen.total()
    return f"{number:,} of {total:,} ({number / max(1, total):.2%})"


def _names(trained: Counter, frozen: Counter) -> str:
    if not frozen or not trained:
        return ""
    if frozen.total() < trained.total():
        return ", all but " + ", ".join(f"{name} {count:,}" for name, count in frozen.items())
    return ": " + ", ".join(f"{name} {count:,}" for name, count in trained.items())
