"""One training step of one rank, rehearsed in a process of its own."""

import types
from collections import Counter
from dataclasses import dataclass, field

from megatron.core import parallel_state

from molmo2_nemo import compat, parallel
from molmo2_nemo.config.schema import Config
from molmo2_nemo.rehearsal import device, engine
from molmo2_nemo.rehearsal.plan import row_lengths
from molmo2_nemo.rehearsal.recorder import Recorder
from molmo2_nemo.rehearsal.rows import micro_batch, on_device
from molmo2_nemo.training import loop
from molmo2_nemo.training import run as training_run
from molmo2_nemo.training.batches import WORK, own_part
from molmo2_nemo.training.metrics import LossBySource
from molmo2_nemo.training.step_times import StepTimes
from molmo2_nemo.training.trouble import SpikeAlarm


@dataclass
class Rehearsal:
    """What was counted of a rank. Bytes, FLOPs and calls of one step of `micro_batches` micro-batches."""

    rank: int
    stage: int  # of the pipeline
    coordinates: dict[str, int]
    rows: str  # kind of its rows
    micro_batches: int
    parameters: int
    peak: int  # of the step
    peak_by_part: dict[str, int]
    peak_by_line: dict[str, int]
    peaks: dict[str, int]  # of "build" and "step"
    held: dict[str, int]  # before the step, by part
    collectives: list = field(default_factory=list)
    syncs: dict[str, int] = field(default_factory=dict)
    uploads: int = 0  # bytes from the host to the device
    downloads: int = 0
    on_host: int = 0  # bytes of tensors on the host after the step: an optimizer there
    flops: dict[str, float] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    moved_by_line: dict[str, int] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)  # counts of its rows, as flops.forward_flops takes them
    faults: list[str] = field(default_factory=list)


def rehearse(config: Config, gpus: int, rank: int, micro_batches: int, of: int, rows: str) -> Rehearsal:
    """Build, forward, backward and update of one rank. Patches this process: to be called once in it.

    of: micro-batches of a step; the inputs of those that are not rehearsed are there, too, as in the run.
    rows: kind of its rows, see rows.micro_batch.
    """
    p = config.parallel
    recorder = Recorder(row_lengths(config, config.data.seq_length))
    device.install(recorder, rank, gpus)
    if p.layer_spec == "transformer_engine":
        engine.install(recorder)
    training_run.build_model = device.made_there(training_run.build_model)
    training_run.check_frozen = lambda *_: None  # of names that other pipeline stages have, too
    precision = parallel.resolve_precision(config.train, "cuda")
    with compat.fake_tensor_mode():
        parallel.make_groups(p, config.train.timeout_minutes, config.train.seed)
    replica = parallel_state.get_data_parallel_rank()
    values = [micro_batch(config, rows, replica * 1000 + number) for number in range(micro_batches)]
    values = [own_part(batch, config.model) for batch in values]
    with compat.fake_tensor_mode(), recorder, device.Readout(recorder):
        model, optimizer = training_run.build(config, "cuda", precision)
        for chunk in model:
            chunk.train()
        name_parts(recorder, model)
        parameters = sum(q.numel() for chunk in model for q in chunk.parameters())
        is_first = parallel_state.is_pipeline_first_stage()
        waiting = iter(values)
        source = types.SimpleNamespace(next=lambda: on_device(next(waiting), config, recorder, is_first))
        run = stand_in_for_run(config, model, optimizer, source, micro_batches)
        recorder.begin("step")
        held = dict(recorder.now["part"])
        others = [on_device(values[0], config, recorder, is_first) for _ in range(of - micro_batches)]
        loop.train_step(run)
        del others
        recorder.finish()
    return Rehearsal(
        rank=rank,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        coordinates={
            "TP": parallel_state.get_tensor_model_parallel_rank(),
            "CP": parallel_state.get_context_parallel_rank(),
            "PP": parallel_state.get_pipeline_model_parallel_rank(),
            "DP": replica,
        },
        rows=rows,
        micro_batches=micro_batches,
        parameters=parameters,
        peak=recorder.peak,
        peak_by_part=dict(recorder.at_peak["part"]),
        peak_by_line=dict(recorder.at_peak["line"]),
        peaks=recorder.peaks,
        held=held,
        collectives=[c for c in recorder.collectives if c.phase != "build"],
        syncs=of_step(recorder.syncs),
        uploads=recorder.uploads["step"],
        downloads=recorder.downloads["step"],
        on_host=sum(recorder.on_host.values()),
        flops=of_step(recorder.flops),
        moved=of_step(recorder.moved),
        moved_by_line=of_step(recorder.moved_by_line),
        work=dict(zip(WORK, sum(batch["work"] for batch in values).tolist())),
        faults=list(recorder.faults),
    )


def name_parts(recorder: Recorder, model) -> None:
    """What a rank holds between steps: weights and gradients by what they are, all else is the optimizer's."""
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    recorder.alive = {address: (size, "optimizer", line) for address, (size, _, line) in recorder.alive.items()}
    recorder.now["part"] = Counter(optimizer=recorder.current)
    recorder.rename(parameters, "weights")
    recorder.rename([p.main_grad for p in parameters if p.requires_grad], "gradients")


def stand_in_for_run(config: Config, model, optimizer, batches, micro_batches: int) -> types.SimpleNamespace:
    """What `loop.train_step` takes of a Run: the model and the losses are real, the log says nothing."""

    def nothing(*args, **kwargs):
        return None

    names = ["rehearsal"]
    speed = types.SimpleNamespace(steps=[])
    speed.add = speed.steps.extend
    return types.SimpleNamespace(
        config=config,
        device="cuda",
        sources=[types.SimpleNamespace(name=name) for name in names],
        position=types.SimpleNamespace(step=1),
        model=model,
        optimizer=optimizer,
        batches=batches,
        micro_batches=micro_batches,
        interval=loop.Interval(LossBySource(names, "cuda"), speed),
        data=types.SimpleNamespace(add=lambda batches: [], too_broken=nothing),
        log=types.SimpleNamespace(say=nothing, write=nothing),
        stacks=types.SimpleNamespace(at=nothing),
        times=StepTimes("cpu"),
        alarm=SpikeAlarm(),
        skipped_steps=0,
        skipped_in_a_row=0,
    )


def of_step(counter: Counter) -> dict:
    """What was counted in the step, without the building of the model, most first."""
    return {key: count for (phase, key), count in counter.most_common() if phase == "step"}
