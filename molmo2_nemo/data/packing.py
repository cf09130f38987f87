"""Packing examples into rows of fixed length under two budgets, tokens and crops.

`select` plans on counts alone, `make_row` and `collate` concatenate what was chosen, and `PackedRows` is the Energon
dataset between the two: it keeps a pool of undecoded samples and emits one row at a time. Energon's own packing
partitions a whole buffer at once and can give nothing back, which leaves rows emptier for the same pool.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from megatron.energon import Batch as EnergonBatch
from megatron.energon import Sample, edataclass
from megatron.energon.flavors.base_dataset import set_sample_restore_key
from megatron.energon.wrappers.base import BaseWrapperDataset, get_sample_restore_key
from megatron.energon.wrappers.buffer import SavableSampleBuffer

from molmo2_nemo.data.encode import COUNTERS, Plan
from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE

# So many samples in a row that give nothing mean broken data, not a broken sample.
MAX_DROPPED_IN_A_ROW = 1000


def select(lengths: Sequence[int], crops: Sequence[int], max_tokens: int, max_crops: int) -> list[int]:
    """Indices, ascending, of the examples of the next row; examples are given oldest first.

    The oldest is taken, so that nothing starves, then the largest that still fit, size being the larger share of the
    two budgets. ValueError: an example exceeds a budget on its own.
    """
    for index, (length, count) in enumerate(zip(lengths, crops)):
        if length > max_tokens or count > max_crops:
            raise ValueError(
                f"Example {index} has {length} tokens and {count} crops; a row holds {max_tokens} and {max_crops}."
            )
    shares = [max(length / max_tokens, count / max(max_crops, 1)) for length, count in zip(lengths, crops)]
    by_size = sorted(range(1, len(shares)), key=lambda index: -shares[index])  # stable: the older of equals first
    chosen = []
    for index in [0, *by_size][: len(shares)]:
        if lengths[index] <= max_tokens and crops[index] <= max_crops:
            chosen.append(index)
            max_tokens -= lengths[index]
            max_crops -= crops[index]
    return sorted(chosen)


@edataclass
class Planned(Sample):
    """A sample waiting for its row: the plan and the bytes of its media parts."""

    plan: Plan
    media: dict[str, bytes]
    source: int  # index into the blend's sources


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
    counters: Counter


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
    counters: dict[str, int]  # see encode.COUNTERS


def make_row(
    plans: Sequence[Plan], sources: Sequence[int], pixels: Sequence[tuple[np.ndarray, np.ndarray]],
    seq_length: int, pad_id: int, empty_pixels: tuple[np.ndarray, np.ndarray], counters: Counter,
) -> dict[str, np.ndarray | Counter]:  # fmt: skip
    """Fields of a Row out of examples, their sources and their (crops, pooling); `empty_pixels` give the shapes.

    counters: of samples that are not among the examples.
    """
    counters = sum((plan.counters for plan in plans), Counter(counters))
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
    return fields | {"crops": crops, "pooling": pooling, "vision_units": units, "counters": counters}


def collate(rows: Sequence[Row], vision_token_ids: np.ndarray) -> Batch:
    """A micro-batch of packed rows of one length."""

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows]))

    input_ids, segment_ids = stack("input_ids"), stack("segment_ids")
    vision_mask = np.isin(input_ids.numpy(), vision_token_ids) & (segment_ids.numpy() >= 0)
    crops, pooling = _joined([(row.crops, row.pooling) for row in rows])
    counters = sum((row.counters for row in rows), Counter())
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
        counters={name: int(counters[name]) for name in COUNTERS},
    )


def _joined(pixels: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate (crops [C, P, D], pooling [T, W]); pooling indices move with their crops."""
    pooling, offset = [], 0
    for crops, windows in pixels:
        pooling.append(np.where(windows >= 0, windows + offset, -1))
        offset += crops.shape[0] * crops.shape[1]
    return np.concatenate([crops for crops, _ in pixels]), np.concatenate(pooling)


class PackedRows(BaseWrapperDataset[Planned, Row]):
    """Energon dataset of packed rows out of a dataset of planned samples.

    The pool is saved as its samples' restore keys and rebuilt from them; nothing random happens here, so a restored
    stream continues exactly. Dropped samples (plans without tokens) leave with the next row, for its counters.

    finite: for held-out data. Every iteration starts anew, and only the rows `shard[0]`, `shard[0] + shard[1]`, ... are
    decoded and emitted, so that the rows do not depend on the number of ranks; empty rows at the end give every rank
    the same number, a multiple of `multiple`.
    """

    _savable_fields = ("_pool",)

    def __init__(
        self, dataset, buffer_size: int, max_tokens: int, max_crops: int, make: Callable[[list[Planned]], Row], *,
        worker_config, finite: bool = False, shard: tuple[int, int] = (0, 1), multiple: int = 1,
    ):  # fmt: skip
        super().__init__(dataset, worker_config=worker_config)
        self.buffer_size, self.max_tokens, self.max_crops, self.make = buffer_size, max_tokens, max_crops, make
        self.finite, self.shard, self.multiple = finite, shard, multiple
        self.reset_state_own()

    def reset_state_own(self) -> None:
        self._pool = SavableSampleBuffer(self.dataset, worker_config=self.worker_config)

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

    def _packs(self) -> Iterator[list[Planned]]:
        pool = self._pool
        pool.worker_start()
        source = iter(self.dataset)
        while True:
            self._fill(source)
            if not pool.buffer:
                return
            plans = [sample.plan for sample in pool.buffer]
            lengths, crops = [plan.num_tokens for plan in plans], [plan.num_crops for plan in plans]
            chosen = select(lengths, crops, self.max_tokens, self.max_crops)
            samples = [pool.buffer[index] for index in chosen]
            for index in reversed(chosen):
                pool.pop(index)
            yield samples

    def _fill(self, source: Iterator[Planned]) -> None:
        usable = sum(sample.plan.num_tokens > 0 for sample in self._pool.buffer)
        useless = 0
        while usable < self.buffer_size:
            sample = next(source, None)
            if sample is None:
                return
            self._pool.append(sample)
            usable += sample.plan.num_tokens > 0
            useless = 0 if sample.plan.num_tokens else useless + 1
            if useless >= MAX_DROPPED_IN_A_ROW:
                raise RuntimeError(
                    f"{useless} samples in a row were dropped, the last one {sample.__key__} for "
                    f"{dict(sample.plan.counters)}: check data.seq_length, data.max_crops and the data themselves."
                )

    def _row(self, samples: list[Planned]) -> Row:
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
            "make": self._function_config(self.make),
            "dataset": self.dataset.config(),
        }
