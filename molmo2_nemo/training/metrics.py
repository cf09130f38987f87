"""What a run says of itself: sums over a logging interval, the console line, TensorBoard, metrics.jsonl."""

import json
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from molmo2_nemo.model.collectives import context_slice


class LossBySource:
    """Weighted losses, weights and counts since the last `reduce`, by data source."""

    def __init__(self, sources: list[str], device: str):
        self.sources = sources
        # Rows: weighted loss sum, weight sum. Last column: tokens without a source (none, unless data is wrong).
        self.sums = torch.zeros(2, len(sources) + 1, dtype=torch.float64, device=device)
        self.counts = torch.zeros(4, dtype=torch.float64, device=device)  # tokens, loss tokens, examples, rows

    def add(self, batches: list[dict], weighted_losses: list[Tensor]) -> None:
        """weighted_losses: what `forward_backward` returned (empty except on the last pipeline stage)."""
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            return
        cp_group = parallel_state.get_context_parallel_group()
        first = cp_group.rank() == 0  # counts what all context parallel ranks share
        for batch, weighted in zip(batches, weighted_losses):
            local = context_slice(batch["input_ids"].shape[1], cp_group)
            source = batch["source_ids"][:, local].long()
            source = torch.where(source >= 0, source, len(self.sources)).flatten()
            weights = batch["loss_weights"][:, local]
            self.sums[0].index_add_(0, source, weighted.flatten().double())
            self.sums[1].index_add_(0, source, weights.flatten().double())
            tokens = (batch["segment_ids"][:, local] >= 0).sum()
            examples = batch["counters"].get("examples", 0) if first else 0
            rows = batch["input_ids"].shape[0] if first else 0
            self.counts += torch.tensor(
                [tokens, (weights > 0).sum(), examples, rows], dtype=torch.float64, device=self.counts.device
            )

    def reduce(self) -> dict:
        """Sums over all ranks as plain numbers, then start again. Collective."""
        dist.all_reduce(self.sums)
        dist.all_reduce(self.counts)
        loss, weight = self.sums.tolist()
        tokens, loss_tokens, examples, rows = self.counts.tolist()
        self.sums.zero_()
        self.counts.zero_()
        return {
            "loss": sum(loss) / max(sum(weight), 1e-12),
            "loss_by_source": {s: a / w for s, a, w in zip(self.sources, loss, weight) if w > 0},
            "tokens": int(tokens), "loss_tokens": int(loss_tokens), "examples": int(examples), "rows": int(rows),
        }  # fmt: skip


def merge_counters(batches: list[dict]) -> dict[str, int]:
    """Sum of the data pipeline's counters over micro-batches."""
    total: dict[str, int] = {}
    for batch in batches:
        for name, count in batch["counters"].items():
            total[name] = total.get(name, 0) + count
    return total


def memory_gib(device: str) -> float:
    """Peak memory of this rank in GiB: allocated on a GPU, resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class RunLog:
    """Rank 0's console, TensorBoard and metrics.jsonl; other ranks write nothing."""

    def __init__(self, run_dir: Path, first_step: int):
        self.main = dist.get_rank() == 0
        self.started = self.last = time.monotonic()
        if self.main:
            from torch.utils.tensorboard import SummaryWriter

            run_dir.mkdir(parents=True, exist_ok=True)
            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)
            self.file = open(run_dir / "metrics.jsonl", "a")

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)

    def write(self, kind: str, step: int, figures: dict) -> None:
        """kind: `train` or `validation`. Nested figures become TensorBoard groups."""
        if not self.main:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")
        self.file.flush()
        for name, value in figures.items():
            items = {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            for key, number in items.items():
                if isinstance(number, int | float):
                    self.board.add_scalar(f"{kind}/{key}", number, step)

    def interval(self) -> float:
        """Seconds since the last call."""
        now = time.monotonic()
        elapsed, self.last = now - self.last, now
        return elapsed

    def close(self) -> None:
        if self.main:
            self.board.close()
            self.file.close()


def train_line(step: int, max_steps: int, figures: dict) -> str:
    """The console line of a logging interval."""
    rates = figures["lr"]
    by_source = " ".join(f"{source} {loss:.3f}" for source, loss in figures["loss_by_source"].items())
    return (
        f"step {step}/{max_steps} | loss {figures['loss']:.4f} ({by_source}) | grad {figures['grad_norm']:.3f} | "
        f"lr vit {rates['vit']:.2e} conn {rates['connector']:.2e} llm {rates['llm']:.2e} | "
        f"{figures['tokens_per_second']:.0f} tok/s {figures['samples_per_second']:.1f} samples/s | "
        f"fill {figures['fill']:.0%} | data wait {figures['data_wait_share']:.0%} | mem {figures['memory_gib']:.2f} GiB"
    )
