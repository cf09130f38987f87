"""Run by test_optimizer.py in a process of its own: clipping by component, freezing, where dropout falls.

    python optimizer_check.py [OVERRIDE...]

Prints one JSON line of figures; the test says what they must be.
"""

import json
import sys

import torch
from megatron.core.utils import unwrap_model

from molmo2_nemo import parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.components import COMPONENTS, component_of, is_frozen
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import ParallelConfig
from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE
from molmo2_nemo.random_batches import pack, random_documents
from molmo2_nemo.training.batches import own_part
from molmo2_nemo.training.optimizer import build_optimizer, check_frozen, clip_and_step, set_learning_rates
from molmo2_nemo.training.step import MODEL_INPUTS, build_model, forward_backward, global_names, global_weight

config = compose("stage1", ["model=tiny", "data=sample", "schedule=quickstart", *sys.argv[1:]])
parallel.initialize(ParallelConfig(), "cpu", timeout_minutes=5, seed=0)
batches, _ = pack(random_documents(config.model, 0), 1, config.model, 0, 1)


def build(**dropout):
    return build_model(
        config.model,
        ParallelConfig(),
        "cpu",
        "fp32",
        freeze=lambda name: is_frozen(name, config.optim, config.model.tie_embeddings),
        **dropout,
    )


def gradients(model, optimizer) -> dict[str, torch.Tensor]:
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    forward_backward(model, batches, global_weight(batches), z_loss=1e-4)
    return {n: p.main_grad.clone() for n, p in unwrap_model(model)[0].named_parameters() if p.requires_grad}


def copies(parameters: dict) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def moved(parameters: dict, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}


def clipping(parameters: dict, before: dict[str, torch.Tensor], norms: dict[str, float], max_norm: float) -> dict:
    """Each component against torch's own clipping: relative difference of the norm and, the worst, of the gradient."""
    found = {}
    for component in COMPONENTS:
        expected = {n: torch.nn.Parameter(g.clone()) for n, g in before.items() if component_of(n) == component}
        for parameter in expected.values():
            parameter.grad = parameter.detach().clone()
        norm = torch.nn.utils.clip_grad_norm_(list(expected.values()), max_norm).item()
        differences = [
            ((parameters[n].main_grad - p.grad).abs() / (p.grad.abs() + 1e-5)).max().item() for n, p in expected.items()
        ]
        found[component] = {
            "norm": norms[component],
            "norm_differs_by": abs(norms[component] - norm) / norm,
            "clipped_to": max_norm / norm,
            "gradients_differ_by": max(differences),
        }
    return found


def refusal(names: list[str], pattern: str, trained: int) -> str | None:
    """What is said of a freeze pattern."""
    config.optim.freeze_patterns = [pattern]
    try:
        check_frozen(names, trained, config.optim)
    except ConfigError as error:
        return str(error)
    return None


def step_with_nan(model, optimizer, parameters: dict, name: str) -> dict:
    gradients(model, optimizer)
    parameters[name].main_grad[...] = float("nan")
    before = copies(parameters)
    updated, norms = clip_and_step(optimizer, 1.0)
    norm = norms[component_of(name)]
    return {"updated": updated, "norm_is_nan": norm != norm, "moved": sorted(moved(parameters, before))}


def dropout(response_dropout: bool) -> dict:
    """Shares of the positions whose losses dropout leaves as they are: before those with loss, and among them."""
    batch = own_part(batches[0], config.model)
    inputs = {name: batch[name] for name in MODEL_INPUTS}
    loss_weights = torch.zeros_like(batches[0]["loss_weights"])
    segments = batches[0]["segment_ids"][0]
    # The second document of the row carries loss, the first does not.
    second = int((segments >= SEGMENTS_PER_EXAMPLE).nonzero()[0])
    first_loss, end = second + 3, int((segments >= 0).sum())
    loss_weights[0, first_loss:end] = 1.0
    model = build(dropout=0.5, response_dropout=response_dropout)[0]
    with torch.no_grad():
        plain = model.eval()(**inputs, loss_weights=loss_weights)[0]
        dropped = model.train()(**inputs, loss_weights=loss_weights)[0]
    same = (plain == dropped).all(dim=-1)
    return {
        "same_before": same[:second].double().mean().item(),
        "same_with_loss": same[first_loss:end].double().mean().item(),
    }


def main() -> None:
    patterns = list(config.optim.freeze_patterns)
    model = build()
    optimizer = build_optimizer(config, model, "fp32")
    parameters = dict(unwrap_model(model)[0].named_parameters())
    before, weights = gradients(model, optimizer), copies(parameters)
    set_learning_rates(optimizer, config, 1)
    smallest = min(
        torch.stack([g.norm() for n, g in before.items() if component_of(n) == c]).norm().item() for c in COMPONENTS
    )
    max_norm = 0.5 * smallest
    updated, norms = clip_and_step(optimizer, max_norm)
    states = [(p, part.optimizer.state[p]) for part in optimizer.chained_optimizers for p in part.optimizer.state]
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    figures = {
        "updated": updated,
        "clipping": clipping(parameters, before, norms, max_norm),
        "trained": trained,
        "frozen": [n for n, p in global_names(unwrap_model(model)[0]) if not p.requires_grad],
        "with_gradient_buffer": [n for n, p in parameters.items() if getattr(p, "main_grad", None) is not None],
        "moved": sorted(moved(parameters, weights)),
        "without_gradient": [name for name, gradient in before.items() if not gradient.any()],
        "trained_numbers": sum(parameters[name].numel() for name in trained),
        "states": len(states),
        "state_numbers": sum(state["exp_avg"].numel() for _, state in states),
        "nan": step_with_nan(model, optimizer, parameters, trained[0]),
        "patterns": patterns,
        "refusal": refusal(list(parameters), "decoder.layers.7", 1),
        "all_frozen": refusal(list(parameters), ".*", 0),
        "dropout": dropout(response_dropout=False),
        "response_dropout": dropout(response_dropout=True),
    }
    print(json.dumps(figures))


main()
