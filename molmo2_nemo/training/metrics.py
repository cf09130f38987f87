"""The log of a run: sums over a logging interval, the console line, TensorBoard, metrics.jsonl."""

import contextlib
import hashlib
import html
import importlib.metadata
import json
import math
import platform
import resource
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from megatron.core import parallel_state
from PIL import Image
from torch import Tensor

from molmo2_nemo import __version__
from molmo2_nemo.data.counters import BROKEN, COUNTERS, DROPPED
from molmo2_nemo.files import is_disk_error
from molmo2_nemo.model.collectives import context_slice
from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE
from molmo2_nemo.paths import CHECKOUT
from molmo2_nemo.text import duration
from molmo2_nemo.training.speed import speed_note

# What a source's samples kept in part.
SHORTENED = (
    *("truncated", "dropped_branches", "videos_thinned", "videos_cut", "images_shrunk", "images_left_out"),
    *("unseen_branches", "recounted_answers"),
)
# With fewer broken samples than this, a source's error rate is not judged.
MIN_BROKEN = 20
_SHORT = {"connector": "conn"}  # of components, in a line of the log
# Broken samples of a source that are reported one by one; further ones are only counted.
MAX_REPORTS = 5


class LossBySource:
    """Weighted losses, weights and counts since the last `reduce`, by data source."""

    def __init__(self, sources: list[str], device: str):
        self.sources = sources
        # Rows: weighted cross entropy, weighted squared log-partition, weights. Last column: tokens without a source
        # (none, unless data is wrong).
        self.sums = torch.zeros(3, len(sources) + 1, dtype=torch.float64, device=device)
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
            figures = torch.cat((weighted, weights[None])).flatten(1).double()
            self.sums.index_add_(1, source, figures)
            tokens = (batch["segment_ids"][:, local] >= 0).sum()
            packed = (batch["segment_ids"].amax(dim=1) // SEGMENTS_PER_EXAMPLE + 1).sum()
            self.counts[:2] += torch.stack((tokens, (weights > 0).sum()))
            if first:
                self.counts[2] += packed
                self.counts[3] += batch["input_ids"].shape[0]

    def reduce(self) -> dict:
        """Sums over all ranks as plain numbers, then start again. Collective."""
        dist.all_reduce(self.sums)
        dist.all_reduce(self.counts)
        loss, square, weight = self.sums.tolist()
        tokens, loss_tokens, examples, rows = self.counts.tolist()
        self.sums.zero_()
        self.counts.zero_()
        return {
            "loss": sum(loss) / sum(weight) if sum(weight) > 0 else None,
            "loss_by_source": {s: a / w for s, a, w in zip(self.sources, loss, weight) if w > 0},
            "weight_by_source": {s: w / sum(weight) for s, w in zip(self.sources, weight) if w > 0},
            "log_partition_rms": math.sqrt(sum(square) / max(sum(weight), 1e-12)),
            "tokens": int(tokens),
            "loss_tokens": int(loss_tokens),
            "examples": int(examples),
            "rows": int(rows),
        }


class DataReport:
    """Samples of each source that were used, dropped and shortened, over all ranks. `saved`: an earlier `by_source`."""

    def __init__(self, sources: list[str], device: str, saved: dict[str, dict[str, int]] | None = None):
        self.sources, self.device = sources, device
        self.totals = self._table(saved or {})
        self.reported = Counter()
        self.last_report: dict[str, str] = {}

    def _table(self, counters: dict[str, dict[str, int]]) -> np.ndarray:
        """int64 [sources, COUNTERS]."""
        return np.array([[counters.get(s, {}).get(name, 0) for name in COUNTERS] for s in self.sources], dtype=np.int64)

    def add(self, batches: list[dict]) -> list[str]:
        """Count micro-batches; returns a line for each of the first broken samples of a source. Collective."""
        table = sum((self._table(batch["counters"]) for batch in batches if "counters" in batch), self._table({}))
        table = torch.from_numpy(table).to(self.device)
        dist.all_reduce(table)
        self.totals += table.cpu().numpy()
        if not table[:, [COUNTERS.index(name) for name in BROKEN]].any():
            return []
        # The same on all ranks: either all of them come here or none.
        own: dict[str, list[str]] = {}
        for line in (line for batch in batches for line in batch.get("errors", ())):
            own.setdefault(line.split(": ")[0], []).append(line)
        everybodys = [None] * dist.get_world_size()
        dist.all_gather_object(everybodys, {source: lines[:MAX_REPORTS] for source, lines in own.items()})
        news = []
        for source, lines in (item for one in everybodys for item in one.items()):
            self.last_report[source] = lines[-1]
            lines = lines[: MAX_REPORTS - self.reported[source]]
            self.reported[source] += len(lines)
            news += lines
        return news

    def by_source(self) -> dict[str, dict[str, int]]:
        """Source -> counts that are not 0."""
        rows = (dict(zip(COUNTERS, row)) for row in self.totals.tolist())
        return {source: {n: count for n, count in row.items() if count} for source, row in zip(self.sources, rows)}

    def samples_of(self, sources: set[str]) -> int:
        """Samples of these sources that were read, broken ones included."""
        return sum(_total(row, ("examples", *DROPPED)) for name, row in self.by_source().items() if name in sources)

    def too_broken(self, max_error_rate: float, said: str) -> str | None:
        """A sentence when more than this share of a source's samples is broken; the same on all ranks.

        said: the settings that name the data.
        """
        for source, counts in self.by_source().items():
            broken, seen = _total(counts, BROKEN), _total(counts, ("examples", *DROPPED))
            if broken > max_error_rate * seen and (broken >= MIN_BROKEN or max_error_rate == 0):
                last = self.last_report.get(source, "").removeprefix(f"{source}: ")
                last = f" (the last one: {last})" if last else ""
                return (
                    f"source {source}: {broken:,} of {seen:,} samples are broken, more than data.max_error_rate="
                    f"{max_error_rate} allows{last}; fix the source, take it out of {said}, or raise "
                    "data.max_error_rate."
                )
        return None

    def note(self) -> str:
        """For the end of a console line: how much was dropped and shortened so far, and the worst three sources."""
        sources = self.by_source()
        dropped = Counter({source: _total(counts, DROPPED) for source, counts in sources.items()})
        shortened = sum(_total(counts, SHORTENED) for counts in sources.values())
        if not dropped.total() + shortened:
            return ""
        worst = ", ".join(f"{source} {count:,}" for source, count in dropped.most_common(3) if count)
        seen = sum(counts.get("examples", 0) for counts in sources.values()) + dropped.total()
        return f" | dropped {dropped.total():,} of {seen:,}{f' ({worst})' if worst else ''}, shortened {shortened:,}"

    def lines(self) -> list[str]:
        """A line for each source of which something was dropped or shortened."""
        found = []
        for source, counts in self.by_source().items():
            kept = ("examples", "branches", "tokens", "loss_tokens", "images", "frames", "crops")
            notable = ", ".join(f"{count:,} {name}" for name, count in counts.items() if name not in kept)
            if notable:
                found.append(f"{source}: {notable} ({_total(counts, ('examples', *DROPPED)):,} samples)")
        return found


def _total(counts: dict[str, int], names: tuple[str, ...]) -> int:
    return sum(counts.get(name, 0) for name in names)


def memory_gib(device: str) -> float:
    """Peak memory of this rank in GiB: allocated on a GPU, resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def package_versions() -> dict[str, str | None]:
    """Versions of Python, of this project and of the packages that decide what is computed; None: not installed."""
    names = ("torch", "megatron-core", "megatron-energon", "transformers", "nemo_toolkit", "transformer-engine", "apex")
    own = {"molmo2-nemo": __version__, "python": platform.python_version()}
    return own | {name: _version(name) for name in (*names, "numpy")}


def versions() -> dict[str, str | None]:
    """`package_versions`, the device's name, and the commit of this repository."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return package_versions() | {"commit": _commit(), "device": device}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that this code is part of, with `+changes` if files differ; None if installed or without git."""
    if CHECKOUT is None:
        return None
    git = ["git", "-C", str(CHECKOUT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


class RunLog:
    """Rank 0's console, TensorBoard, metrics.jsonl, Weights & Biases if asked for; other ranks write nothing.

    Files are written from `begin` on. Writing must not end a run: where the disk is full, what cannot be written is
    counted, and reported once.
    """

    def __init__(self, run_dir: Path):
        self.main = dist.get_rank() == 0
        self.started = time.monotonic()
        self.run_dir, self.lost, self.board, self.file, self.wandb = run_dir, 0, None, None, None

    def begin(self, first_step: int, name: str, config_yaml: str, wandb_project: str | None = None) -> None:
        """Leave config.yaml and versions.json in the run directory, and open the other files, once nothing can be
        refused any more.

        first_step: the first that this start of the run trains, one more than that of the checkpoint it resumes. What
        an earlier start has logged from there on is no longer shown by TensorBoard.
        """
        if not self.main:
            return
        run_dir = self.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(config_yaml)
        (run_dir / "versions.json").write_text(
            json.dumps(versions() | {"ranks": dist.get_world_size()}, indent=2) + "\n"
        )
        threading.excepthook = _without_disk_errors
        self.open_board(first_step)
        self.file = open(run_dir / "metrics.jsonl", "a")
        if wandb_project is not None:
            import wandb

            self.wandb = wandb.init(
                project=wandb_project,
                name=name,
                dir=str(run_dir),
                config=yaml.safe_load(config_yaml),
                resume="allow",
                id=hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16],
            )

    def open_board(self, first_step: int) -> None:
        """Write to TensorBoard from here on, which no longer shows what was logged from `first_step` on."""
        from torch.utils.tensorboard import SummaryWriter

        if self.board is not None:
            self.board.close()
        self.board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=first_step)

    def go_back(self, step: int) -> None:
        """The run continues after `step`, which lies before the last one logged."""
        if self.main:
            self.open_board(step + 1)
            self.write("resume", step, {})

    def say(self, line: str) -> None:
        if self.main:
            print(line, flush=True)

    def write(self, kind: str, step: int, figures: dict) -> None:
        """kind: `train`, `validation`, `answers` or `checkpoint`. Nested figures become TensorBoard groups."""
        if not self.main:
            return
        numbers = {}
        for name, value in figures.items():
            items = {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            numbers |= {f"{kind}/{key}": n for key, n in items.items() if isinstance(n, int | float)}
        try:
            self.file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")
            self.file.flush()
            for key, number in numbers.items():
                self.board.add_scalar(key, number, step)
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                self.say(f"step {step}: the log could not be written ({error}); the run goes on")
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def show_answers(self, step: int, folder: Path) -> None:
        """Questions, answers and pictures of answers.write to TensorBoard and Weights & Biases."""
        try:
            entries = json.loads((folder / "answers.json").read_text())
            rows = ["| source | question | label | answer |", "|---|---|---|---|"]
            for number, entry in enumerate(entries):
                cells = [html.escape(entry[key]) for key in ("source", "question", "label", "answer")]
                rows.append(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |")
                if "picture" in entry:
                    picture = np.asarray(Image.open(folder / entry["picture"]).convert("RGB"))
                    self.board.add_image(f"answers/{number:02d}", picture, step, dataformats="HWC")
            self.board.add_text("answers", "\n".join(rows), step)
        except OSError as error:
            self.say(f"step {step}: the answers could not be written to TensorBoard ({error}); the run goes on")
            return
        if self.wandb is not None:
            import wandb

            columns = ["source", "question", "label", "answer"]
            table = wandb.Table(columns=columns, data=[[entry[key] for key in columns] for entry in entries])
            # Not in the table: its pictures would be kept outside of the run's folder until they are synced.
            pictures = {
                f"answers/{number:02d}": wandb.Image(
                    str(folder / entry["picture"]), caption=f"{entry['question']} {entry['answer']}"
                )
                for number, entry in enumerate(entries)
                if "picture" in entry
            }
            self.wandb.log({"answers": table, **pictures}, step=step)

    def elapsed(self) -> float:
        """Seconds since this start of the run."""
        return time.monotonic() - self.started

    def add(self, kind: str, step: int, figures: dict) -> None:
        """A record of what happens after `close`, in metrics.jsonl alone."""
        if self.main:
            with contextlib.suppress(OSError), open(self.run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")

    def close(self) -> None:
        if self.file is None:
            return
        if self.lost:
            self.say(f"{self.lost} records of the log could not be written")
        with contextlib.suppress(OSError):
            self.board.close()
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


def _without_disk_errors(failed: threading.ExceptHookArgs) -> None:
    """Instead of threading.excepthook: TensorBoard's thread hands an error of the disk on to `RunLog.write`."""
    if not is_disk_error(failed.exc_value):
        threading.__excepthook__(failed)


def train_line(step: int, max_steps: int, figures: dict) -> str:
    """The console line of a logging interval. Gradients and rates are those of components that are trained."""
    norms = " ".join(f"{_SHORT.get(name, name)} {norm:.3f}" for name, norm in figures["grad_norm"].items())
    rates = " ".join(f"{_SHORT.get(name, name)} {rate:.2e}" for name, rate in figures["lr"].items())
    loss = "none" if figures["loss"] is None else f"{figures['loss']:.4f}"  # every step was skipped
    by_source = " ".join(f"{source} {loss:.3f}" for source, loss in figures["loss_by_source"].items())
    epoch = f" | epoch {figures['epoch']:.2f}" if "epoch" in figures else ""
    return (
        f"step {step}/{max_steps}{epoch} | loss {loss} ({by_source}) | grad {norms} | lr {rates}"
        f" | {figures['tokens_per_second']:.0f} tok/s {figures['samples_per_second']:.1f}"
        f" samples/s {speed_note(figures)} | fill {figures['fill']:.0%} | data wait {figures['data_wait_share']:.0%} |"
        f" mem {figures['memory_gib']:.2f} GiB | {time.strftime('%H:%M:%S')}, {duration(figures['elapsed'])} since the"
        f" start, {duration(figures['left'])} left"
    )
