"""Packing examples into rows of fixed length under two budgets, tokens and crops.

`select` plans on counts alone, `make_row` and `collate` concatenate what was chosen, and `PackedRows` is the Energon
dataset between the two: it keeps a pool of undecoded samples and emits one row at a time. Energon's own packing
partitions a whole buffer at once and can give nothing back, which leaves rows emptier for the same pool.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field

import numpy as np
import torch
from megatron.energon import Batch as EnergonBatch
from megatron.energon import Sample, edataclass
from megatron.energon.flavors.base_dataset import set_sample_restore_key
from megatron.energon.state import FlexState
from megatron.energon.wrappers.base import BaseWrapperDataset, get_sample_restore_key
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from molmo2_nemo import compat
from molmo2_nemo.data.encode import SamplePlan
from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE

# Lengths are rounded up to 1/RESOLUTION of a row when it is planned. A finer unit costs time and fills rows no better.
RESOLUTION = 4096
# An example that was there when so many rows were made, and is the oldest, goes into the next one: none waits for more
# rows than these and one for each example before it.
MOST_ROWS = 150
# What a row may give away, as a share of it, so that an example leaves that is hard to place. tools/bench/packing.py
# says what this and MOST_ROWS do to the fill and the waiting.
GIVEN_AWAY = 0.006
# A row is made when packing_buffer_size examples wait and they would fill this many rows: more are needed if short.
ROWS_WAITING = 2
# After this many dropped samples in a row, a row is made of what waits, since rows carry the counts to the trainer.
MAX_DROPPED_IN_A_ROW = 200
SENT_BY_PIPE = 2**20  # bytes of a tensor, at most, that a loader worker sends with its batch


def select(
    lengths: Sequence[int],
    crops: Sequence[int],
    max_tokens: int,
    max_crops: int,
    take_oldest: bool = True,
    most_candidates: int | None = None,
) -> list[int]:
    """Indices, ascending, of the examples of the next row; examples are given oldest first.

    The knapsack of two budgets. The value of a choice is its sum of tokens + w crops, so that neither kind of example
    is left over: a crop is worth what it takes of its budget if the examples need more of the crops than of the tokens,
    0.15 of it if they need more than half as much, and nothing otherwise. Of all choices that fit, with the oldest if
    `take_oldest`, and are worth at most GIVEN_AWAY of a row less than the best, the one whose largest example is the
    largest, then its second: what is small fits everywhere and is kept for what is hard to place. Of equal examples the
    older. Lengths count in units of 1/RESOLUTION of the row, rounded up. Of more examples than `most_candidates` the
    oldest are taken without asking, as long as they fit: many short ones need no choice.
    ValueError: an example exceeds a budget on its own.
    """
    for index, (length, count) in enumerate(zip(lengths, crops)):
        if length > max_tokens or count > max_crops:
            raise ValueError(
                f"Example {index} has {length} tokens and {count} crops; a row holds {max_tokens} and {max_crops}."
            )
    unit = max(1, max_tokens // RESOLUTION)
    room, places = max_tokens // unit, max_crops
    sizes = [min(-(-length // unit), room) for length in lengths]
    needed = sum(crops) * max_tokens / max(1, sum(lengths) * max_crops)  # of the crops, for each of the tokens
    weight = (1.0 if needed > 1 else 0.15 if needed > 0.5 else 0.0) * room / max(max_crops, 1)
    given_away = GIVEN_AWAY * room
    chosen, left = [], max_tokens
    spare = len(sizes) - most_candidates if most_candidates else 0
    for i in range(max(spare, int(take_oldest and len(sizes) > 0))):
        if lengths[i] > left or crops[i] > places:
            break
        chosen.append(i)
        left, places = left - lengths[i], places - crops[i]
    room = min(room, left // unit)
    candidates = [i for i in range(len(chosen), len(sizes)) if sizes[i] <= room and crops[i] <= places]
    # From the smallest to the largest; of equal ones the older last.
    candidates = sorted(candidates[:most_candidates], key=lambda i: (sizes[i] + weight * crops[i], -i))
    # reachable[k][c]: a bit for every size that some of the first k candidates with c crops in all can have.
    within = (1 << room + 1) - 1
    reachable = [[1] + [0] * places]
    best = [(0.0, 0, 0)]  # (value, crops, size) of the best choice whose largest is candidate k - 1; none of k = 0
    for i in candidates:
        before = reachable[-1]
        longer = [(before[used - crops[i]] << sizes[i]) & within for used in range(crops[i], places + 1)]
        reachable.append(before[: crops[i]] + [old | new for old, new in zip(before[crops[i] :], longer)])
        ends = [(sums.bit_length() - 1, used) for used, sums in enumerate(longer, crops[i]) if sums]
        best.append(max((size + weight * used, used, size) for size, used in ends))
    least = max(best)[0] - given_away
    last = max(k for k, (value, _, _) in enumerate(best) if value >= least)
    _, used, size = best[last]
    for k in range(last - 1, -1, -1):
        i = candidates[k]
        if used >= crops[i] and size >= sizes[i] and reachable[k][used - crops[i]] >> (size - sizes[i]) & 1:
            chosen.append(i)
            used, size = used - crops[i], size - sizes[i]
    return sorted(chosen)


def enough_wait(count: int, tokens: int, crops: int, max_tokens: int, max_crops: int, buffer_size: int) -> bool:
    """Whether a row can be made of `count` examples with these tokens and crops, or more should be read first."""
    return count >= buffer_size and (tokens >= ROWS_WAITING * max_tokens or crops >= ROWS_WAITING * max_crops)


@edataclass
class WaitingSample(Sample):
    """A sample waiting for its row: the plan and the bytes of its media parts."""

    plan: SamplePlan
    media: dict[str, bytes]
    source: int  # index into the blend's sources
    index: int  # of the sample in its source's training (or held-out) split
    error: str  # what is wrong with a broken sample, else ""


@edataclass
class Row(Sample):
    """A packed row of S tokens, numpy; see Batch for the fields. C, T and U count this row's own."""

    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    source_ids: np.ndarray
    crops: np.ndarray
    pooling: np.ndarray
    vision_units: np.ndarray
    examples: np.ndarray
    counters: dict[str, Counter]
    errors: list[str]
    outcomes: list[tuple[dict[str, int], float]] = field(default_factory=list)


@edataclass
class Batch(EnergonBatch):
    """A micro-batch of B packed rows of S tokens. Unused positions: padding token, label 0, weight 0, position 0.

    C crops, T = number of <im_patch> tokens in row-major order, U images or frames of all rows, in row order.
    """

    input_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S], the target at each position (already shifted)
    loss_weights: torch.Tensor  # float32 [B, S], 0 where there is no target
    position_ids: torch.Tensor  # int64 [B, S], from 0 in every example; every branch of a tree from the root's end
    segment_ids: torch.Tensor  # int64 [B, S], example k of a row adds 100,000 k; -1 padding
    vision_mask: torch.Tensor  # bool [B, S], tokens that attend to each other in both directions
    source_ids: torch.Tensor  # int32 [B, S], index into the blend's sources; -1 padding
    crops: torch.Tensor  # uint8 [C, P, patch_dim]
    pooling: torch.Tensor  # int64 [T, W], indices into the flattened (C, P); -1 invalid
    vision_units: torch.Tensor  # int64 [U, 2], (crops, pooling windows) of each image or frame
    examples: torch.Tensor  # int64 [N, 2], (source, index in its split) of every sample used up, dropped ones included
    counters: dict[str, dict[str, int]]  # source name -> counts of counters.COUNTERS that are not 0
    errors: list[str]  # "source: key: reason" of each broken sample
    # For inspection: of each of `examples` its own part of the counters, and the second at which what is shown of its
    # video begins, 0 without a video.
    outcomes: list[tuple[dict[str, int], float]] = field(default_factory=list)

    # A loader worker hands a tensor over as shared memory, by a connection of its own that takes about a millisecond:
    # small ones go with the batch.
    def __getstate__(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        small = {n: v for n, v in values.items() if isinstance(v, torch.Tensor) and v.nbytes <= SENT_BY_PIPE}
        return values | {name: value.numpy() for name, value in small.items()}

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)


def make_row(
    plans: Sequence[SamplePlan],
    sources: Sequence[int],
    pixels: Sequence[tuple[np.ndarray, np.ndarray]],
    seq_length: int,
    pad_id: int,
    empty_pixels: tuple[np.ndarray, np.ndarray],
) -> dict[str, np.ndarray]:
    """What the model sees of a Row: examples, their sources and (crops, pooling). `empty_pixels` give the shapes."""
    fields = {
        "input_ids": np.full(seq_length, pad_id, dtype=np.int64),
        "labels": np.zeros(seq_length, dtype=np.int64),
        "loss_weights": np.zeros(seq_length, dtype=np.float32),
        "position_ids": np.zeros(seq_length, dtype=np.int64),
        "segment_ids": np.full(seq_length, -1, dtype=np.int64),
        "source_ids": np.full(seq_length, -1, dtype=np.int32),
    }
    start = 0
    for number, (plan, source) in enumerate(zip(plans, sources)):
        end = start + plan.num_tokens
        for name in ("input_ids", "labels", "loss_weights", "position_ids"):
            fields[name][start:end] = getattr(plan, name)
        fields["segment_ids"][start:end] = plan.segment_ids + np.int64(SEGMENTS_PER_EXAMPLE * number)
        fields["source_ids"][start:end] = source
        start = end
    crops, pooling = _joined([empty_pixels, *pixels])
    units = [unit for plan in plans for unit in plan.vision_units]
    units = np.array(units, dtype=np.int64).reshape(-1, 2)
    return fields | {"crops": crops, "pooling": pooling, "vision_units": units}


def collate(rows: Sequence[Row], vision_token_ids: np.ndarray) -> Batch:
    """A micro-batch of packed rows of one length."""

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows]))

    input_ids, segment_ids = stack("input_ids"), stack("segment_ids")
    vision_mask = np.isin(input_ids.numpy(), vision_token_ids) & (segment_ids.numpy() >= 0)
    crops, pooling = _joined([(row.crops, row.pooling) for row in rows])
    counters = defaultdict(Counter)
    for row in rows:
        for source, counts in row.counters.items():
            counters[source] += counts
    return Batch(
        __key__=[row.__key__ for row in rows],
        __restore_key__=(),
        input_ids=input_ids,
        labels=stack("labels"),
        loss_weights=stack("loss_weights"),
        position_ids=stack("position_ids"),
        segment_ids=segment_ids,
        vision_mask=torch.from_numpy(vision_mask),
        source_ids=stack("source_ids"),
        crops=torch.from_numpy(crops),
        pooling=torch.from_numpy(pooling),
        vision_units=torch.from_numpy(np.concatenate([row.vision_units for row in rows])),
        examples=torch.from_numpy(np.concatenate([row.examples for row in rows])),
        counters={s: {name: int(n) for name, n in counts.items()} for s, counts in counters.items() if counts},
        errors=[error for row in rows for error in row.errors],
        outcomes=[outcome for row in rows for outcome in row.outcomes],
    )


def _joined(pixels: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate (crops [C, P, D], pooling [T, W]); pooling indices move with their crops."""
    pooling, offset = [], 0
    for crops, windows in pixels:
        pooling.append(np.where(windows >= 0, windows + offset, -1))
        offset += crops.shape[0] * crops.shape[1]
    return np.concatenate([crops for crops, _ in pixels]), np.concatenate(pooling)


class PackedRows(BaseWrapperDataset[WaitingSample, Row]):
    """Energon dataset of packed rows out of a dataset of planned samples.

    The pool is saved as its samples' restore keys and rebuilt from them; nothing random happens here, so a restored
    stream continues exactly. Dropped samples (plans without tokens) leave with the next row, to be counted; where all
    are dropped, that row is empty.

    finite: for held-out data. Every iteration starts from the beginning, and only the rows `shard[0]`,
    `shard[0] + shard[1]`, ... are decoded and emitted, so that the rows do not depend on the number of ranks. Empty
    rows at the end give every rank the same number of rows, a multiple of `multiple`.
    """

    _savable_fields = ("_pool", "_waited")

    def __init__(
        self,
        dataset,
        buffer_size: int,
        max_tokens: int,
        max_crops: int,
        make: Callable[[list[WaitingSample]], Row],
        *,
        worker_config,
        finite: bool = False,
        shard: tuple[int, int] = (0, 1),
        multiple: int = 1,
    ):
        super().__init__(dataset, worker_config=worker_config)
        self.buffer_size, self.max_tokens, self.max_crops, self.make = buffer_size, max_tokens, max_crops, make
        self.finite, self.shard, self.multiple = finite, shard, multiple
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._pool = SavableSampleBuffer(self.dataset, worker_config=self.worker_config)
        self._waited = []  # rows that were made while each sample of the pool waited

    def restore_state(self, state: FlexState) -> None:
        """A state of an earlier version does not say how long the samples have waited, which counts from then on."""
        state.setdefault("_waited", [])
        super().restore_state(state)

    def len_worker(self, worker_idx: int | None = None) -> int:
        """Number of samples: how many rows they fill is not known."""
        return self.dataset.len_worker(worker_idx)

    def __iter__(self) -> Iterator[Row]:
        if self.finite:
            self.reset_state_deep()
        index, count = self.shard
        number = -1
        for number, samples in enumerate(self._packs()):
            if number % count == index:
                yield self._row(samples)
        if self.finite:
            rows = number + 1
            per_shard = -(-rows // (count * self.multiple)) * self.multiple
            for _ in range(per_shard - len(range(index, rows, count))):
                yield self._row([])

    def _packs(self) -> Iterator[list[WaitingSample]]:
        pool = self._pool
        pool.worker_start()
        source = iter(self.dataset)
        while True:
            self._fill(source)
            self._waited += [0] * (len(pool.buffer) - len(self._waited))
            if not pool.buffer:
                return
            usable = [index for index, sample in enumerate(pool.buffer) if sample.plan.num_tokens]
            chosen = set(range(len(pool.buffer))) - set(usable)
            if usable:
                plans = [pool.buffer[index].plan for index in usable]
                lengths, crops = [plan.num_tokens for plan in plans], [plan.num_crops for plan in plans]
                take_oldest = self._waited[usable[0]] >= MOST_ROWS
                picked = select(lengths, crops, self.max_tokens, self.max_crops, take_oldest, self.buffer_size)
                chosen |= {usable[index] for index in picked}
            chosen = sorted(chosen)
            samples = [pool.buffer[index] for index in chosen]
            for index in reversed(chosen):
                pool.pop(index)
                del self._waited[index]
            self._waited = [rows + 1 for rows in self._waited]
            yield samples

    def _fill(self, source: Iterator[WaitingSample]) -> None:
        waiting = [sample.plan for sample in self._pool.buffer if sample.plan.num_tokens]
        count, tokens = len(waiting), sum(plan.num_tokens for plan in waiting)
        crops, useless = sum(plan.num_crops for plan in waiting), 0
        limits = (self.max_tokens, self.max_crops, self.buffer_size)
        while useless < MAX_DROPPED_IN_A_ROW and not enough_wait(count, tokens, crops, *limits):
            sample = next(source, None)
            if sample is None:
                return
            self._pool.append(sample)
            count += sample.plan.num_tokens > 0
            tokens, crops = tokens + sample.plan.num_tokens, crops + sample.plan.num_crops
            useless = 0 if sample.plan.num_tokens else useless + 1

    def _row(self, samples: list[WaitingSample]) -> Row:
        keys = [get_sample_restore_key(sample) for sample in samples]
        return set_sample_restore_key(self.make(samples), *keys, src=self)

    def restore_sample(self, restore_key: tuple) -> Row:
        name, *keys = restore_key
        assert name == type(self).__name__
        return self._row([self.dataset.restore_sample(key) for key in keys])

    def config(self) -> dict:
        return {
            "type": type(self).__qualname__,
            "buffer_size": self.buffer_size,
            "max_tokens": self.max_tokens,
            "max_crops": self.max_crops,
            "make": compat.function_config(self.make),
            "dataset": self.dataset.config(),
        }
