"""Warm-up and decay of a learning rate."""

from types import SimpleNamespace

import pytest

from molmo2_nemo.command_line import compose
from molmo2_nemo.config.schema import OptimConfig
from molmo2_nemo.training.optimizer import learning_rate, set_learning_rates

PEAK = 2.0


def rates(warmup, steps, **changes):
    optim = OptimConfig(**({"decay": "cosine", "min_lr_ratio": 0.1} | changes))
    return [learning_rate(PEAK, warmup, step, steps, optim) for step in range(1, steps + 1)]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("warmup, steps", [(0, 10), (4, 10), (9, 10), (10, 10), (30, 10), (500, 10), (0, 1), (5, 1)])
def test_every_run_ends_at_its_minimum(decay, warmup, steps):
    found = rates(warmup, steps, decay=decay)
    assert found[-1] == pytest.approx(0.1 * PEAK) and max(found) <= PEAK
    if 0 < warmup < steps:
        assert found[warmup - 1] == PEAK and found[0] == pytest.approx(PEAK / warmup)
    for step, rate in enumerate(found[:-1], 1):
        assert rate <= PEAK * min(1.0, step / max(1, warmup))


def test_a_constant_rate_only_warms_up():
    assert rates(4, 6, decay="constant") == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(8, 4, decay="constant") == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    "words, trained",
    [
        ([], ["vit", "connector", "llm"]),
        (["tune=connector"], ["connector"]),
        (["tune=lora"], ["llm"]),
        (["tune=lora", "lora.targets=[mlp,vit]"], ["vit", "llm"]),
    ],
)
def test_rates_of_what_is_frozen_are_not_shown(words, trained):
    config = compose("finetune", ["model=tiny", "data.mine=x", "train.max_steps=9", "train.epochs=null", *words])
    groups = [{"component": name, "lr": None} for name in ("llm", "vit", "connector")]
    found = set_learning_rates(SimpleNamespace(param_groups=groups), config, 9)
    assert list(found) == trained and all(group["lr"] > 0 for group in groups)
