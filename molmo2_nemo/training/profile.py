"""A profile of a few steps: a trace of each chosen rank, and a table of where their time went."""

import contextlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.utils import configure_nvtx_profiling, unwrap_model

from molmo2_nemo import compat
from molmo2_nemo.config.schema import TrainConfig
from molmo2_nemo.model.molmo2 import Molmo2
from molmo2_nemo.training.step import global_name
from molmo2_nemo.training.step_times import StepTimes, mean_step

FOLDER = "profile"
# Allocations and frees that a snapshot of a GPU's memory remembers; those of some steps of a large model.
MEMORY_ENTRIES = 200_000
# Words for the table. What is not here is called as in the log.
WORDS = {"data": "waiting for data", "other": "everything else"}


class Profile:
    """Profiles the steps of train.profile_steps on the ranks of train.profile_ranks, once. One on every rank.

    Until then and afterwards it does nothing; nothing is installed in the model meanwhile.
    """

    def __init__(self, settings: TrainConfig, run_dir: Path, times: StepTimes, model: list, device: str, say):
        """say: writes a line to the run's log, on rank 0."""
        self.folder, self.times, self.model, self.device, self.say = run_dir / FOLDER, times, model, device, say
        self.steps, self.ranks, self.tool = settings.profile_steps, settings.profile_ranks, settings.profile_with
        self.chosen = dist.get_rank() in self.ranks
        self.seconds: list[dict[str, float]] = []  # of the profiled steps, by part
        self.first = self.last = None  # the profiled steps so far
        self.running = contextlib.ExitStack()  # what has to be ended
        self.profiler = None

    def resumed(self, step: int) -> None:
        """Say what will not be profiled of a run that goes on behind `step`, and where it starts behind its first."""
        if self.steps is None or step < self.steps[0]:
            return
        if step >= self.steps[1]:
            self.say(f"train.profile_steps={self.steps} lie before step {step + 1}, where this start begins: none")
            self.steps = None
        else:
            self.say(f"train.profile_steps={self.steps}: profiled from step {step + 1} on, where this start begins")

    def before(self, step: int) -> None:
        """A step is about to begin."""
        if self.steps is None:
            return
        if self.last is not None and step != self.last + 1:  # the run went back to a checkpoint
            self.finish()
        elif self.last is None and self.steps[0] <= step <= self.steps[1]:
            self.first, self.last = step, step - 1
            if self.chosen:
                self._start()

    def after(self, step: int) -> None:
        """A step has ended. Collective at the last one to be profiled."""
        if self.first is None or self.steps is None:
            return
        self.last = step
        self.seconds.append(self.times.last())
        if step == self.steps[1]:
            self.finish()

    def finish(self) -> None:
        """Write what was profiled, and say where. Nothing if no step is being profiled. Collective."""
        if self.steps is None:
            return
        asked, self.steps = self.steps, None
        if not self.seconds:
            if self.profiler is not None:
                self.profiler.stop()
            self.running.close()
            self.say(f"train.profile_steps={asked} were not reached: no profile")
            return
        files, problem = [], None
        if self.chosen:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                files = self._stop()
            except OSError as error:
                problem = f"the profile of rank {dist.get_rank()} could not be written ({error})"
        everybodys = [None] * dist.get_world_size()
        own = mean_step(self.seconds) if self.chosen else None
        dist.all_gather_object(everybodys, (own, [str(path) for path in files], problem))
        parts = {rank: seconds for rank, (seconds, _, _) in enumerate(everybodys) if seconds is not None}
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):
                record = {"steps": [self.first, self.last], "seconds": {str(rank): parts[rank] for rank in parts}}
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "parts.json").write_text(json.dumps(record, indent=2) + "\n")
        cut = "" if [self.first, self.last] == list(asked) else f" of train.profile_steps={asked}"
        self.say(f"profile of steps {self.first} to {self.last}{cut}\n{table(parts)}")
        for _, paths, problem in everybodys:
            for line in [*map("profile: {}".format, paths), *([problem] if problem else [])]:
                self.say(line)

    def _start(self) -> None:
        self.times.ranges = True
        for chunk in unwrap_model(self.model):
            self.running.callback(_name_modules(chunk))
        self.running.callback(setattr, self.times, "ranges", False)
        if self.tool == "nsys":
            configure_nvtx_profiling(True)
            self.running.callback(configure_nvtx_profiling, False)
            self.running.enter_context(torch.autograd.profiler.emit_nvtx())
            torch.cuda.profiler.start()
            self.running.callback(torch.cuda.profiler.stop)
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            compat.record_cuda_memory(MEMORY_ENTRIES)
            self.running.callback(compat.record_cuda_memory, None)
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()

    def _stop(self) -> list[Path]:
        """End what `_start` has begun, and write its files. Raises OSError."""
        rank, files = dist.get_rank(), []
        with self.running:
            if self.profiler is not None:
                self.profiler.stop()
                files.append(self.folder / f"rank_{rank:04d}.json.gz")
                self.profiler.export_chrome_trace(str(files[-1]))
                if self.device == "cuda":
                    files.append(self.folder / f"memory_rank_{rank:04d}.pickle")
                    compat.save_cuda_memory(files[-1])
        self.profiler = None
        return files


def _name_modules(model: Molmo2):
    """Write each call of a module that has others in it as a range with its name, until the returned function is
    called. The vision tower, its connector and the decoder are parts of StepTimes, which writes them."""
    handles, open_ranges = [], []

    def begin(name):
        return lambda *_: open_ranges.append(torch.profiler.record_function(name).__enter__())

    def end(*_):
        open_ranges.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        if name not in ("", "vision", "vision.connector", "decoder") and any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(begin(global_name(name, model))))
            handles.append(module.register_forward_hook(end, always_call=True))
    return lambda: [handle.remove() for handle in handles]


def table(parts: dict[int, dict[str, float]]) -> str:
    """Lines with the seconds of a mean step by part, and their share of it: a column for each rank."""
    names = list(dict.fromkeys(part for seconds in parts.values() for part in seconds))
    totals = {rank: sum(seconds.values()) for rank, seconds in parts.items()}
    words = {name: WORDS.get(name, name) for name in names}
    width = max(map(len, words.values()))
    lines = [" " * width + "".join(f"{f'rank {rank}':>20}" for rank in parts)]
    for name in names:
        line = words[name].ljust(width)
        for rank, seconds in parts.items():
            line += f"{seconds.get(name, 0):10.4f} s {seconds.get(name, 0) / totals[rank]:7.1%}"
        lines.append(line)
    lines.append("a step".ljust(width) + "".join(f"{total:10.4f} s{'':>8}" for total in totals.values()))
    return "\n".join(map(str.rstrip, lines))
