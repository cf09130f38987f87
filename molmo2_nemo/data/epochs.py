"""How many steps an epoch has, and settings that are said in epochs or shares of a run as steps.

A row holds as many samples as fit, so that the steps of an epoch follow from the data: samples are planned (sizes alone
are read, nothing is decoded) and packed by the packer's own rule. An epoch is of one's own data (`data.own`), whatever
share of general data comes beside it, and of all sources of another blend. What this module finds depends on the data
and on settings alone, not on ranks or workers: a resumed run finds the same.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from molmo2_nemo.config.checks import epochs_of
from molmo2_nemo.config.components import COMPONENTS
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config, DataConfig
from molmo2_nemo.data.blend import MANY_ROUNDS, Source

# Samples of a source that are planned, evenly over it; all of a smaller one.
MOST_PLANNED = 400
# Rows that are packed of them.
ROWS = 64
EVERY = ("save_every", "validate_every", "generate_every")


@dataclass(frozen=True)
class Epoch:
    """sources: names of those whose samples are counted; samples: how many they have; per_row: samples of all sources
    in a packed row; steps: of an epoch, not rounded."""

    sources: frozenset[str]
    samples: int
    per_row: float
    steps: float


def is_asked(config: Config) -> bool:
    """Whether something is said in epochs, or the run is of one's own data, of which epochs are reported."""
    train = config.train
    return bool(config.data.own) or train.epochs is not None or any(epochs_of(getattr(train, key)) for key in EVERY)


def measured(config: Config, sources: list[Source]) -> Epoch:
    """Plan and pack samples. ConfigError, one sentence: none of them fits, or an epoch is less than a step."""
    per_row = samples_per_row(config, sources)
    counted = [source for source in sources if not config.data.own or source.name in config.data.own]
    number, rows = sum(source.num_samples for source in counted), config.train.global_batch_size
    in_a_step = rows * per_row * sum(source.weight for source in counted)
    if config.train.epochs is not None and number < in_a_step:
        fitting, micro = int(rows * number / in_a_step), config.train.micro_batch_size
        whole = f"train.global_batch_size={fitting - fitting % micro}"
        smaller = whole if fitting >= micro else f"train.micro_batch_size=1 train.global_batch_size={fitting}"
        raise ConfigError(
            f"{config.data.said} has {number:,} training samples, fewer than the {in_a_step:.0f} of one step"
            f" (train.global_batch_size={rows} rows of about {per_row:.1f} samples): "
            + (f"use {smaller} or less" if fitting else "use a smaller data.seq_length")
            + ", or train.epochs=null train.max_steps=STEPS."
        )
    return Epoch(frozenset(source.name for source in counted), number, per_row, number / in_a_step)


def in_steps(config: Config, epoch: Epoch) -> Config:
    """The configuration with train.max_steps and nothing in epochs; and with the warm-ups of optim.warmup_share."""
    train, optim = config.train, config.optim
    steps = train.max_steps or max(1, round(train.epochs * epoch.steps))
    every = {
        key: max(1, round(epochs * epoch.steps))
        for key in EVERY
        if (epochs := epochs_of(getattr(train, key))) is not None
    }
    return replace(config, train=replace(train, max_steps=steps, epochs=None, **every), optim=with_warmup(optim, steps))


def with_warmup(optim, steps: int):
    """`optim` with warm-ups in steps: a share of the run for components that name none."""
    if not optim.warmup_share:
        return optim
    of_share = round(optim.warmup_share * steps)
    parts = {name: getattr(optim, name) for name in COMPONENTS}
    return replace(optim, **{name: replace(p, warmup_steps=p.warmup_steps or of_share) for name, p in parts.items()})


def described(config: Config, epoch: Epoch, seconds: tuple[float, float] | None) -> list[str]:
    """Lines for the log before the start: epochs, samples, steps and time, and a warning of too many epochs.

    config: as `in_steps` gives it. seconds: of a step, fast and slow; None: not known.
    """
    steps, epochs = config.train.max_steps, config.train.max_steps / epoch.steps
    lines = [
        f"{epochs:,.1f} epochs of {epoch.samples:,} samples are {steps:,} steps: a row of {config.data.seq_length:,}"
        f" tokens holds about {epoch.per_row:.1f} samples, an epoch is {epoch.steps:,.1f} steps of"
        f" {config.train.global_batch_size} rows; expected time: {_duration(steps, seconds)}"
    ]
    if epochs > MANY_ROUNDS:
        lines.append(
            f"warning: each sample comes {epochs:,.0f} times, more than {MANY_ROUNDS}: the model learns them by heart;"
            " train.epochs=3 train.max_steps=null is usual"
        )
    return lines


def _duration(steps: int, seconds: tuple[float, float] | None) -> str:
    if seconds is None:
        return "not known here, the log says how much is left"
    texts = list(dict.fromkeys(_spelt(steps * value) for value in sorted(seconds)))
    return f"{' to '.join(texts)} by the plan, without saving and measuring"


def _spelt(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def samples_per_row(config: Config, sources: list[Source]) -> float:
    """Of the blend, at data.seq_length and data.max_crops. ConfigError: no sample that was planned can be used."""
    data = config.data
    sizes = {source.name: _sizes(config, source) for source in sources}
    sizes = {name: found for name, found in sizes.items() if found}
    if not sizes:
        raise ConfigError(
            f"none of the samples of {data.said} that were looked at can be used: look at them with"
            " tools/inspect_data.py."
        )
    weights = {source.name: source.weight for source in sources if source.name in sizes}
    total = sum(weights.values())
    mean = sum(weights[name] / total * np.mean([tokens for tokens, _ in found]) for name, found in sizes.items())
    # Of all that was planned, not of the few samples in these rows.
    return _tokens_of_a_row(_mixed(sizes, weights), data) / mean


def _sizes(config: Config, source: Source) -> list[tuple[int, int]]:
    """(tokens, crops) of samples evenly over a source; those that cannot be used are left out, as in training."""
    # Imported here: a plan without data on disk needs neither torch nor transformers.
    from molmo2_nemo.data.encode import Encoder
    from molmo2_nemo.data.stored import StoredSamples

    encoder, stored = Encoder(config.data, config.model.vision), StoredSamples([source])
    number, found = min(MOST_PLANNED, source.num_samples), []
    indices = [i * source.num_samples // number for i in range(number)]
    stored.fetch(source.name, indices)
    for index in indices:
        sample = stored.read(source.name, index, f"number {index}")
        if sample.example is None:
            continue
        try:
            plan = encoder.plan(sample.example, np.random.default_rng([config.data.seed, index]), source.options)
        except ValueError:
            continue
        if plan.num_tokens:
            found.append((plan.num_tokens, plan.num_crops))
    return found


def _mixed(sizes: dict[str, list], weights: dict[str, float]) -> Iterator[tuple[int, int]]:
    """Endless: of each source as its weight says, one after the other."""
    streams, drawn = {name: itertools.cycle(found) for name, found in sizes.items()}, dict.fromkeys(sizes, 0)
    while True:
        name = min(drawn, key=lambda name: (drawn[name] + 1) / weights[name])
        drawn[name] += 1
        yield next(streams[name])


def _tokens_of_a_row(stream: Iterator[tuple[int, int]], data: DataConfig) -> float:
    """The mean over ROWS rows, packed as PackedRows does. stream: (tokens, crops) of samples."""
    from molmo2_nemo.data.packing import enough_wait, select

    pool, taken = [], 0
    for _ in range(ROWS):
        while not enough_wait(
            len(pool), sum(tokens for tokens, _ in pool), sum(crops for _, crops in pool),
            data.seq_length, data.max_crops, data.packing_buffer_size,
        ):  # fmt: skip
            pool.append(next(stream))
        lengths, crops = zip(*pool)
        picked = select(lengths, crops, data.seq_length, data.max_crops, False, data.packing_buffer_size)
        taken += sum(lengths[number] for number in picked)
        pool = [size for number, size in enumerate(pool) if number not in picked]
    return taken / ROWS
