"""Where the time of a training step goes: always on, by the clock on a CPU and by CUDA events on a GPU.

A step is cut into stretches, each of which belongs to the innermost part that is open, so that the parts of a step sum
to its time. The parts begin and end at the timers that Megatron's schedules and optimizers call
(megatron.core.timers.Timers, whose own timers would make the host wait for the GPU), at hooks of this model's modules,
and at hooks of torch's process groups.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

# In the order in which they are shown; before the last one come the groups in which ranks communicate, such as
# `communication tensor`.
PARTS = ("data", "vision", "connector", "decoder", "loss", "backward", "optimizer", "other")
COMMUNICATION = "communication"
# What a forward pass does around these: masks, embeddings, angles.
FORWARD = "forward"
# Megatron 0.19's timer -> part. Where a timer is left out, its time belongs to the one around it. Of a schedule all is
# counted to its pipeline that is neither a forward nor a backward pass nor a reduction: sending, receiving, waiting.
MEGATRON_TIMERS = {
    "forward-backward": f"{COMMUNICATION} pipeline",
    "forward-compute": FORWARD,
    "backward-compute": "backward",
    "all-grads-sync": f"{COMMUNICATION} data",
    "params-all-gather": f"{COMMUNICATION} data",
}
# For process groups, whose hooks have a number.
HOOK = 2020


class StepTimes:
    """Measures the steps between `begin` and `end`. One for each rank.

    Called with the name of a timer, it is what Megatron's configurations take as `timers`.
    ranges: also write each part, while it is open, as a range into the trace of a profiler (torch.profiler, NVTX).
    """

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        self.ranges = False
        self.steps: list[dict[str, float]] = []  # seconds by part, of each step since the last `take`
        self.open: list[tuple[str, object | None]] = []  # parts, the innermost last, and their ranges; []: no step runs
        self.marks: list[tuple[str, object]] = []  # the part that ends, and when: seconds, or an event
        self.events: list[torch.cuda.Event] = []  # that can be used again
        self.timers = {name: _Timer(self, part) for name, part in MEGATRON_TIMERS.items()}
        self.names = list(PARTS)
        self.watched: list[dist.ProcessGroup] = []
        self.unseen = None  # a sentence, where collectives cannot be seen

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        return self.timers.get(name, NO_TIMER)

    def watch(self, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        """Measure this rank's pieces of the model, its optimizer, and its process groups, from the next step on."""
        for chunk in unwrap_model(model):
            chunk.config.timers = self
            if chunk.pre_process:
                self._watch_module(chunk.vision, "vision")
                self._watch_module(chunk.vision.connector, "connector")
            self._watch_module(chunk.decoder, "decoder", then="loss" if chunk.post_process else None)
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        for part in parts:
            part.config.timers = self
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            self.timers["forward-backward"] = _Timer(self, "other")
        groups = _groups() + [("all ranks", part.get_grad_stats_parallel_group()) for part in parts]
        for name, group in groups:
            if group.size() > 1 and not any(group is other for other in self.watched):
                self._watch_group(group, f"{COMMUNICATION} {name}")
        pipeline = parallel_state.get_pipeline_model_parallel_world_size() > 1
        names = [name for name, group in groups if group.size() > 1] + ["pipeline"] * pipeline + ["data"]
        self.names = [*PARTS[:-1], *(f"{COMMUNICATION} {name}" for name in dict.fromkeys(names)), PARTS[-1]]

    def _watch_module(self, module: torch.nn.Module, part: str, then: str | None = None) -> None:
        """then: the part that begins where the module has ended, until the forward pass has."""

        def begin(*_):
            self.start(part)

        def end(*_):
            self.stop(part)
            if then is not None:
                self.start(then)

        module.register_forward_pre_hook(begin)
        # In any case: a checkpointed function may stop in the middle when it is computed again.
        module.register_forward_hook(end, always_call=True)

    def _watch_group(self, group: dist.ProcessGroup, part: str) -> None:
        if not hasattr(group, "register_pre_hook"):
            self.unseen = (
                f"torch {torch.__version__} has no hooks at process groups (2.14 has): in the step's times and for the "
                "slowest rank, collectives inside of a part are counted to it"
            )
            return

        def begin(call):
            if not call.async_op:
                self.start(part)

        def end(call):
            if not call.async_op:
                if not self.on_gpu and self.open and call.work is not None:
                    call.work.wait()  # as the caller does next
                self.stop(part)

        group.register_pre_hook(HOOK, begin)
        group.register_post_hook(HOOK, end)
        self.watched.append(group)

    def close(self) -> None:
        """Leave the process groups alone, before they are destroyed."""
        for group in self.watched:
            group.unregister_pre_hook(HOOK)
            group.unregister_post_hook(HOOK)
        self.watched = []

    def begin(self, step: int) -> None:
        """A step begins. One that has begun and not ended is forgotten."""
        if self.open:
            self._close_ranges()
            self.events += [at for _, at in self.marks] if self.on_gpu else []
            self.marks = []
        self._settle()
        self.open, self.marks = [("other", self._range(f"step {step}"))], []
        self._mark()

    def end(self) -> None:
        """The step has ended. On a GPU the caller has just waited for it, so that nothing here waits."""
        if self.open:
            self._mark()
            self._close_ranges()

    def start(self, part: str) -> None:
        """A part begins inside of the one that is open. Nothing happens outside of a step.

        The backward pass may make parts of the forward pass again: they belong to it.
        """
        if not self.open or (part in PARTS and self.open[-1][0] == "backward"):
            return
        self._mark()
        self.open.append((part, self._range(part)))

    def stop(self, part: str) -> None:
        """The part ends, with all that is open inside of it. Nothing happens if it is not open."""
        if not any(part == name for name, _ in self.open[1:]):
            return
        while True:
            self._mark()
            if self._pop() == part:
                return

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def last(self) -> dict[str, float]:
        """Seconds by part of the step that has just ended."""
        self._settle()
        return self.steps[-1]

    def take(self) -> list[dict[str, float]]:
        """Seconds by part of each step since the last call; all steps have the same parts."""
        self._settle()
        steps, self.steps = self.steps, []
        return steps

    def _mark(self) -> None:
        """The stretch that ends now belongs to the part that is open."""
        now = time.perf_counter()
        if self.on_gpu:
            now = self.events.pop() if self.events else torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((self.open[-1][0], now))

    def _settle(self) -> None:
        """Add up the step that has ended."""
        if self.open or not self.marks:
            return
        times = [at for _, at in self.marks]
        if self.on_gpu:
            for event in times:
                event.synchronize()  # it has passed: see `end`
            since = [times[0].elapsed_time(event) / 1000 for event in times]
            self.events += times
        else:
            since = [at - times[0] for at in times]
        seconds = dict.fromkeys(self.names, 0.0)
        for (part, _), begin, end in zip(self.marks[1:], since, since[1:]):
            seconds["other" if part == FORWARD else part] += end - begin
        self.steps.append(seconds)
        self.marks = []

    def _range(self, name: str):
        return torch.profiler.record_function(name).__enter__() if self.ranges else None

    def _pop(self) -> str:
        """Close the innermost part and its range; the part's name."""
        name, range_ = self.open.pop()
        if range_ is not None:
            range_.__exit__(None, None, None)
        return name

    def _close_ranges(self) -> None:
        while self.open:
            self._pop()


def of(
    model: list[DistributedDataParallel], optimizer: MegatronOptimizer, device: str, say: Callable[[str], None]
) -> StepTimes:
    """The times of a run's steps. say: writes to the run's log, where something cannot be measured."""
    times = StepTimes(device)
    times.watch(model, optimizer)
    if times.unseen is not None:
        say(times.unseen)
    return times


class _Timer:
    """What Megatron calls of a timer. Its barriers are left out: they would make ranks wait for each other."""

    def __init__(self, times: StepTimes | None, part: str):
        self.times, self.part = times, part

    def start(self, barrier: bool = False) -> None:
        if self.times is not None:
            self.times.start(self.part)

    def stop(self, barrier: bool = False) -> None:
        if self.times is not None:
            self.times.stop(self.part)


NO_TIMER = _Timer(None, "")


def _groups() -> list[tuple[str, dist.ProcessGroup]]:
    """The groups in which ranks meet inside of a forward or backward pass, or around them."""
    state = parallel_state
    both = "tensor" if state.get_context_parallel_world_size() == 1 else "tensor and context"
    if state.get_tensor_model_parallel_world_size() == 1:
        both = "context"
    return [
        ("tensor", state.get_tensor_model_parallel_group()),
        ("context", state.get_context_parallel_group()),
        (both, state.get_tensor_and_context_parallel_group()),
        ("data", state.get_data_parallel_group()),
        ("all ranks", dist.group.WORLD),
    ]


def mean_step(steps: list[dict[str, float]]) -> dict[str, float]:
    """Seconds by part of the mean of several steps; {} for none."""
    return {part: sum(step[part] for step in steps) / len(steps) for part in steps[0]} if steps else {}
