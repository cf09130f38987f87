"""Run by test_optimizer.py in a process of its own: clipping by component, freezing, where dropout falls."""

import sys

import torch
from hydra import compose, initialize_config_dir
from megatron.core.utils import unwrap_model

from molmo2_nemo import parallel
from molmo2_nemo.command_line import register, to_dataclass
from molmo2_nemo.config.components import COMPONENTS
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import ParallelConfig
from molmo2_nemo.paths import CONF_DIR, REPOSITORY
from molmo2_nemo.training.optimizer import (
    build_optimizer,
    check_freeze_patterns,
    clip_and_step,
    component_of,
    is_frozen,
    set_learning_rates,
)
from molmo2_nemo.training.step import MODEL_INPUTS, build_model, forward_backward, global_names, global_weight

sys.path.insert(0, str(REPOSITORY / "tools" / "check"))
import parity

register()
with initialize_config_dir(str(CONF_DIR), version_base=None):
    config = to_dataclass(compose("stage1", ["model=tiny", "data=sample", "schedule=quickstart", *sys.argv[1:]]))
parallel.initialize(ParallelConfig(), "cpu", timeout_minutes=5, seed=0)
batches, _ = parity.pack(parity.random_documents(config.model, 0), 1, config.model, 0, 1)


def build(**dropout):
    return build_model(
        config.model,
        ParallelConfig(),
        "cpu",
        "fp32",
        freeze=lambda name: is_frozen(name, config.optim, config.model.tie_embeddings),
        **dropout,
    )


def gradients(model, optimizer):
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    forward_backward(model, batches, global_weight(batches), z_loss=1e-4)
    return {n: p.main_grad.clone() for n, p in unwrap_model(model)[0].named_parameters() if p.requires_grad}


# Each component is clipped by its own norm, as torch clips it.
model = build()
optimizer = build_optimizer(config, model, "fp32")
before = gradients(model, optimizer)
weights = {n: p.detach().clone() for n, p in unwrap_model(model)[0].named_parameters()}
set_learning_rates(optimizer, config, 1)
largest = 0.5 * min(
    torch.stack([g.norm() for n, g in before.items() if component_of(n) == c]).norm().item() for c in COMPONENTS
)
updated, norms = clip_and_step(optimizer, largest)
assert updated
for component in COMPONENTS:
    expected = {n: torch.nn.Parameter(g.clone()) for n, g in before.items() if component_of(n) == component}
    for parameter in expected.values():
        parameter.grad = parameter.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(list(expected.values()), largest)
    assert abs(norms[component] - norm.item()) < 1e-5 * norm.item(), (component, norms, norm)
    for name, parameter in unwrap_model(model)[0].named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.main_grad, expected[name].grad, rtol=1e-4, atol=1e-9)
assert len({round(norm, 6) for norm in norms.values()}) == 3

# What is frozen has neither gradient buffer nor optimizer state, and stays as it is; the rest moves.
trained = {name for name, p in unwrap_model(model)[0].named_parameters() if p.requires_grad}
names = dict(unwrap_model(model)[0].named_parameters())
state = {id(p) for part in optimizer.chained_optimizers for p in part.optimizer.state}
assert len(state) == len(trained) and sum(
    part.optimizer.state[p]["exp_avg"].numel() for part in optimizer.chained_optimizers for p in part.optimizer.state
) == sum(names[n].numel() for n in trained)
for name, parameter in names.items():
    assert name in trained or getattr(parameter, "main_grad", None) is None, name
    assert torch.equal(parameter, weights[name]) == (name not in trained) or not before[name].any(), name
patterns = list(config.optim.freeze_patterns)
frozen = {n for n, p in global_names(unwrap_model(model)[0]) if not p.requires_grad}
assert "embedding.word_embeddings.weight" in frozen
if patterns:
    assert any(n.startswith("decoder.layers.0.") for n in frozen) and not any("decoder.layers.1." in n for n in frozen)
    config.optim.freeze_patterns = ["decoder.layers.7"]
    try:
        check_freeze_patterns(list(names), config.optim)
    except ConfigError as error:
        assert "decoder.layers.7 is in no parameter's name" in str(error)
    else:
        raise AssertionError("a pattern that matches nothing was accepted")

# A gradient that is not finite: nothing moves, not even the optimizer's state.
gradients(model, optimizer)
broken = next(iter(trained))
names[broken].main_grad[...] = float("nan")
weights = {n: p.detach().clone() for n, p in names.items()}
updated, norms = clip_and_step(optimizer, 1.0)
assert not updated and norms[component_of(broken)] != norms[component_of(broken)]
assert all(torch.equal(p, weights[n]) for n, p in names.items())

# Dropout at positions that carry loss alone: what only sees other positions is as without dropout.
inputs = {name: batches[0][name] for name in MODEL_INPUTS}
loss_weights = torch.zeros_like(batches[0]["loss_weights"])
segments = batches[0]["segment_ids"][0]
second = int((segments >= 100_000).nonzero()[0])  # the second document of the row carries loss, the first does not
loss_weights[0, second + 3 : int((segments >= 0).sum())] = 1.0
for response_dropout in (True, False):
    model = build(dropout=0.5, response_dropout=response_dropout)[0]
    with torch.no_grad():
        plain = model.eval()(**inputs, loss_weights=loss_weights)[0]
        dropped = model.train()(**inputs, loss_weights=loss_weights)[0]
    same = (plain == dropped).all(dim=-1)
    assert bool(same[:second].all()) == response_dropout
    assert not same[second + 3 : int((segments >= 0).sum())].any()
print("all as it should be")
