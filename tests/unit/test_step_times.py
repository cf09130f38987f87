"""Where a step's time goes, by a clock that the tests move on, and what a profile writes."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from molmo2_nemo import compat
from molmo2_nemo.config.schema import TrainConfig
from molmo2_nemo.training import profile, step_times
from molmo2_nemo.training.step_times import StepTimes, mean_step


class Clock:
    """Seconds that pass when a test says so; it also stands for CUDA's events, which are recorded at its time."""

    def __init__(self):
        self.now, self.made, self.waited = 100.0, 0, 0

    def perf_counter(self):
        return self.now

    def event(self, enable_timing):
        assert enable_timing
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, clock):
        self.clock, self.at = clock, None

    def record(self):
        self.at = self.clock.now

    def synchronize(self):
        self.clock.waited += 1

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(step_times, "time", clock)
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    return clock


@pytest.fixture
def one_rank():
    if not dist.is_initialized():  # another test of this process may have left its group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def step_of(times: StepTimes, clock: Clock, step: int = 1) -> None:
    """A step as Megatron's schedules and the model's hooks make one; each `clock.now` tells what it is counted to."""
    times.names = list(EXPECTED)
    times.begin(step)
    clock.now += 1  # other
    with times.part("data"):
        clock.now += 2
    schedule, forward, backward = (
        times(f"{name}") for name in ("forward-backward", "forward-compute", "backward-compute")
    )
    schedule.start(barrier=True)
    for _ in range(2):
        forward.start()
        clock.now += 4  # other: the forward pass around its parts
        times.start("vision")
        clock.now += 8
        times.start("connector")
        clock.now += 16
        times.stop("connector")
        times.stop("vision")
        times.start("decoder")
        clock.now += 32
        times.start("communication tensor")
        clock.now += 64
        times.stop("communication tensor")
        times.stop("decoder")
        times.start("loss")
        clock.now += 128
        forward.stop()  # ends the loss, too
        clock.now += 256  # pipeline
        backward.start()
        times.start("vision")  # made again: the backward pass's
        clock.now += 512
        times.stop("vision")
        times.start("communication tensor")
        clock.now += 1024
        times.stop("communication tensor")
        backward.stop()
    times("all-grads-sync").start(barrier=True)
    clock.now += 2048
    times("all-grads-sync").stop()
    times("a timer of another name").start()
    times("a timer of another name").stop()
    schedule.stop()
    with times.part("optimizer"):
        clock.now += 4096
        times.stop("backward")  # not open: nothing happens
    times.end()


EXPECTED = {
    "data": 2,
    "vision": 16,
    "connector": 32,
    "decoder": 64,
    "loss": 256,
    "backward": 1024,
    "optimizer": 4096,
    "communication tensor": 2 * (64 + 1024),
    "communication pipeline": 512,
    "communication data": 2048,
    "other": 1 + 8,
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_parts_of_a_step_are_what_passed_in_them_and_sum_to_it(clock, device):
    times = StepTimes(device)
    for step in range(1, 4):
        before = clock.now
        clock.now += 10_000  # between steps: validation, a checkpoint
        with times.part("data"):
            clock.now += 10_000
        step_of(times, clock, step)
        assert times.last() == EXPECTED and sum(EXPECTED.values()) == clock.now - before - 20_000
    times.begin(4)  # and went back to a checkpoint
    clock.now += 5
    step_of(times, clock, 4)
    steps = times.take()
    assert steps == [EXPECTED] * 4 and times.take() == [] and mean_step(steps) == EXPECTED and mean_step([]) == {}
    # On a GPU one step's events serve for the next one, and the host only waits for what has passed.
    marks = 2 + 2 * (4 + 2 * 8)  # the step's ends; those of four parts, and of eight in each micro-batch
    assert (clock.made, clock.waited) == ((0, 0) if device == "cpu" else (marks, 4 * marks))


def test_hooks_of_a_checkpointed_module_close_what_they_opened(clock):
    """A checkpointed function stops in the middle when it is computed again; hooks of modules still end."""
    times = StepTimes("cpu")

    class Part(torch.nn.Module):
        def forward(self, x):
            clock.now += 1
            y = self.inner(x).square().sin()
            clock.now += 1
            return y * 2  # not needed again: nothing behind it is saved

    part = Part()
    part.inner = torch.nn.Linear(3, 3)
    times._watch_module(part, "decoder", then="loss")
    times._watch_module(part.inner, "connector")
    x = torch.randn(2, 3, requires_grad=True)
    times.begin(1)
    times.start("forward")
    y = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
    assert [name for name, _ in times.open] == ["other", "forward", "loss"]
    clock.now += 3
    times.stop("forward")
    times.start("backward")
    y.sum().backward()
    times.stop("backward")
    assert [name for name, _ in times.open] == ["other"]
    times.end()
    [step] = times.take()
    assert (step["decoder"], step["loss"], step["other"]) == (2, 3, 0) and step["backward"] >= 1


def settings(steps, **more) -> TrainConfig:
    return TrainConfig(**{"profile_steps": steps, **more})


def profiled(tmp_path, times, clock, numbers, resumed=0, **more):
    """(lines of the log, the profile) of a run with these steps."""
    said = []
    found = profile.Profile(settings([3, 4], **more), tmp_path, times, [], "cpu", said.append)
    found.resumed(resumed)
    for number in numbers:
        found.before(number)
        step_of(times, clock, number)
        found.after(number)
    found.finish()
    return said, found


def test_a_profile_is_a_trace_a_table_and_no_change_before_and_after(one_rank, clock, tmp_path):
    times = StepTimes("cpu")
    said, found = profiled(tmp_path, times, clock, range(1, 7))
    assert [line.split("\n")[0] for line in said] == [
        "profile of steps 3 to 4",
        f"profile: {tmp_path}/profile/rank_0000.json.gz",
    ]
    rows = {line[:22].strip(): line[22:].split() for line in said[0].split("\n")[1:]}
    assert rows["waiting for data"] == ["2.0000", "s", "0.0%"] and rows["backward"] == ["1024.0000", "s", "10.0%"]
    assert rows["everything else"] == ["9.0000", "s", "0.1%"] and rows["communication data"][2] == "20.0%"
    assert float(rows["a step"][0]) == sum(EXPECTED.values())
    record = json.loads((tmp_path / "profile" / "parts.json").read_text())
    assert record == {"steps": [3, 4], "seconds": {"0": EXPECTED}}
    events = json.loads(gzip.open(tmp_path / "profile" / "rank_0000.json.gz").read())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    for name, count in {"step 3": 1, "step 4": 1, "decoder": 4, "connector": 4, "backward": 4, "loss": 4}.items():
        assert names.count(name) == count, (name, names)
    assert names.count("communication tensor") == 8 and "step 2" not in names and "step 5" not in names
    assert not times.ranges and found.profiler is None and [path.name for path in tmp_path.iterdir()] == ["profile"]


@pytest.mark.parametrize(
    "numbers, resumed, first, files",
    [
        ([5, 6], 4, "train.profile_steps=[3, 4] lie before step 5, where this start begins: none", False),
        ([4, 5], 3, "train.profile_steps=[3, 4]: profiled from step 4 on, where this start begins", True),
        ([1, 2, 3], 0, "profile of steps 3 to 3 of train.profile_steps=[3, 4]\n", True),
        ([1, 2], 0, "train.profile_steps=[3, 4] were not reached: no profile", False),
        ([1, 2, 3, 2, 3, 4], 0, "profile of steps 3 to 3 of train.profile_steps=[3, 4]\n", True),  # went back
        ([], 6, "train.profile_steps=[3, 4] lie before step 7, where this start begins: none", False),
    ],
)
def test_a_profile_that_is_not_what_was_asked_for_says_so(one_rank, clock, tmp_path, numbers, resumed, first, files):
    said, found = profiled(tmp_path, StepTimes("cpu"), clock, numbers, resumed)
    assert said[0].startswith(first), said
    assert (tmp_path / "profile" / "rank_0000.json.gz").exists() == files and not found.times.ranges
    assert sum("profile of steps" in line for line in said) == files


def test_a_profile_that_cannot_be_written_does_not_end_the_run(one_rank, clock, tmp_path):
    (tmp_path / "profile").write_text("")
    said, _ = profiled(tmp_path, StepTimes("cpu"), clock, range(1, 6))
    assert said[0].startswith("profile of steps 3 to 4\n") and "of rank 0 could not be written (" in said[1], said


def test_without_a_profile_nothing_is_installed(one_rank, clock, tmp_path):
    said = []
    times = StepTimes("cpu")
    found = profile.Profile(settings(None), tmp_path, times, None, "cpu", said.append)
    found.resumed(3)
    found.before(4)
    step_of(times, clock, 4)
    found.after(4)
    found.finish()
    assert said == [] and not times.ranges and list(tmp_path.iterdir()) == []


def test_a_gpus_memory_is_recorded_for_a_profile(one_rank, clock, tmp_path, monkeypatch):
    """The order of the calls; a GPU is not needed for it."""
    calls = []
    monkeypatch.setattr(compat, "record_cuda_memory", lambda entries: calls.append(("record", entries)))
    monkeypatch.setattr(compat, "save_cuda_memory", lambda path: calls.append(("save", path.name)))
    found = profile.Profile(settings([3, 3]), tmp_path, StepTimes("cpu"), [], "cuda", lambda line: calls.append(line))
    for number in (3, 4):
        found.before(number)
        step_of(found.times, clock, number)
        found.after(number)
    entries = profile.MEMORY_ENTRIES
    assert calls[:3] == [("record", entries), ("save", "memory_rank_0000.pickle"), ("record", None)], calls
    assert calls[-1] == f"profile: {tmp_path}/profile/memory_rank_0000.pickle"


def test_nsys_gets_the_steps(one_rank, clock, tmp_path, monkeypatch):
    calls = []
    cuda = SimpleNamespace(start=lambda: calls.append("start"), stop=lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda, "profiler", cuda)
    for name in ("range_push", "range_pop", "mark"):
        monkeypatch.setattr(torch.cuda.nvtx, name, lambda *args, **kwargs: 0)
    monkeypatch.setattr(profile, "configure_nvtx_profiling", calls.append)

    class Nvtx:
        def __enter__(self):
            calls.append("ranges")

        def __exit__(self, *_):
            calls.append("no ranges")

    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", Nvtx)
    said, found = profiled(tmp_path, StepTimes("cpu"), clock, range(1, 6), profile_with="nsys")
    assert calls == [True, "ranges", "start", "stop", "no ranges", False]
    assert len(said) == 1 and said[0].startswith("profile of steps 3 to 4\n") and found.profiler is None
