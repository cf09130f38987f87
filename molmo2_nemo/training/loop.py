"""The training loop of a stage: steps, log lines, validation, answers to held-out questions, checkpoints."""

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from molmo2_nemo import checkpoint_dir, lora_base, parallel
from molmo2_nemo.checkpoint_dir import step_name
from molmo2_nemo.config.schema import Config
from molmo2_nemo.data.blend import Source
from molmo2_nemo.data.epochs import Epoch
from molmo2_nemo.data.loader import TrainLoader, ValidationLoader, save_state
from molmo2_nemo.training import answers, checkpoint, shutdown, slow_rank
from molmo2_nemo.training.batches import BatchSource
from molmo2_nemo.training.metrics import DataReport, LossBySource, RunLog, memory_gib, train_line
from molmo2_nemo.training.optimizer import clip_and_step, set_learning_rates
from molmo2_nemo.training.profile import Profile
from molmo2_nemo.training.speed import Speed, impossible_mfu
from molmo2_nemo.training.start import newest_verified, verified
from molmo2_nemo.training.step import forward_backward, global_weight
from molmo2_nemo.training.step_times import StepTimes, mean_step
from molmo2_nemo.training.trouble import SpikeAlarm, all_finite, finite, first_not_finite, loss_of_step, save_batches
from molmo2_nemo.training.validate import validate, validation_line

# How often a run goes back to the same checkpoint.
MAX_TIMES_BACK = 3


@dataclass
class Position:
    """How far a run is. step: the last one begun, 0 before the first. tokens_seen: trained on, without padding."""

    step: int = 0
    tokens_seen: int = 0


@dataclass
class Best:
    """The best measurement of train.save_best so far. step: of its checkpoint; worse: measurements since that one."""

    metric: str | None = None
    value: float | None = None
    step: int = 0
    worse: int = 0


@dataclass
class Interval:
    """What is summed up between two lines of the log."""

    losses: LossBySource
    speed: Speed
    grad_norms: list[dict[str, float]] = field(default_factory=list)  # of each updated step, by component


@dataclass
class Run:
    """What a rank has of a stage that is being trained. run.py makes it."""

    config: Config
    config_yaml: str  # the same, resolved, as text
    device: str  # cpu or cuda
    run_dir: Path
    sources: list[Source]
    position: Position

    model: list[DistributedDataParallel]  # the pieces of this rank's pipeline stage
    optimizer: MegatronOptimizer

    replica: dist.ProcessGroup  # the ranks that work on the same rows; the first of them reads the data
    loader: TrainLoader | None  # None on the other ranks, as are the validation loader and the exam's questions
    validation: ValidationLoader | None
    batches: BatchSource
    micro_batches: int  # of a step, on each data-parallel replica
    exam: answers.Exam | None  # None: train.generate_every=0

    interval: Interval
    times: StepTimes
    slow_rank: slow_rank.SlowRank
    profile: Profile
    epoch: Epoch | None  # None: nothing depends on it
    data: DataReport
    log: RunLog
    stacks: shutdown.StackDump
    request: shutdown.StopRequest
    saver: checkpoint.Saver
    best: Best
    alarm: SpikeAlarm
    adapters: dict | None = None  # what the checkpoints say of those of LoRA (lora_base.record)
    skipped_steps: int = 0  # since this start
    skipped_in_a_row: int = 0
    went_back: int = 0  # to the newest checkpoint, since it was saved


def train(run: Run) -> tuple[str, str]:
    """Take steps until train.max_steps, until nothing gets better, or until someone asks to stop; save the last one.

    Collective. Returns the reason for the end, as in shutdown.write_ended, and a sentence on it or "". Where the reason
    is "finished", the last step was applied and its checkpoint was compared with its checksums.
    """
    settings, position = run.config.train, run.position
    reason, why = run.request.reason(run.device), no_better(run)  # it may have come while the model was built
    for chunk in run.model:
        chunk.train()
    if position.step > settings.max_steps:
        run.log.say(
            f"train.max_steps={settings.max_steps} lies before step {position.step} of the checkpoint: nothing to do"
        )
    run.profile.resumed(position.step)
    while position.step < settings.max_steps and reason is None and not why:
        position.step += 1
        run.profile.before(position.step)
        run.times.begin(position.step)
        rates = train_step(run)
        if rates is None:  # it went back to a checkpoint: nothing of that step is logged, measured or saved again
            continue
        report_save(run, run.saver.poll())
        report_uploads(run)
        reason = run.request.reason(run.device)
        run.times.end()
        step = position.step
        run.profile.after(step)
        is_last = step == settings.max_steps or reason is not None
        if is_last or step == 1 or step % settings.log_every == 0:
            log_interval(run, rates)
        is_best = False
        if reason is None:  # what Slurm leaves between its signal and the end of a job is for saving alone
            if settings.validation_batches > 0 and (is_last or step % settings.validate_every == 0):
                is_best |= is_better(run, {"loss": run_validation(run)})
            if run.exam is not None and (is_last or step % settings.generate_every == 0):
                is_best |= is_better(run, with_save_best(run, answer_questions(run)))
            why = no_better(run)
        if is_last or why or is_best or step % settings.save_every == 0:
            save(run, bool(is_last or why), is_best)
    run.profile.finish()
    if reason is None:
        check_finished(run)
    return reason or "finished", why


def check_finished(run: Run) -> None:
    """End the run with an error unless its last step was applied and its last checkpoint is as it was saved.

    Collective.
    """
    settings, step = run.config.train, run.position.step
    if run.skipped_in_a_row:
        applied = step - run.skipped_in_a_row
        instead = f", or end there with train.max_steps={applied}" if applied else ""
        end(
            run,
            f"step {step}: loss or gradient was not finite in the last {run.skipped_in_a_row} step(s), so that the run "
            f"has not finished: it was last updated at step {applied}. Look at the data of these steps, or lower "
            f"optim.*.lr{instead}.",
        )
    path = run.run_dir / "checkpoints" / step_name(step)
    damage = verified(path) if settings.verify_checkpoints else None
    if damage is not None:
        end(run, f"step {step}: the last checkpoint was not written right: {damage}")


def with_save_best(run: Run, scores: dict[str, float]) -> dict[str, float | None]:
    """The scores of answers, with None for train.save_best where no question gives it, which is said."""
    metric = run.config.train.save_best
    if metric in (None, "loss") or metric in scores or not scores:
        return scores
    run.log.say(
        f"step {run.position.step}: train.save_best={metric} is not measured by the held-out questions, which give "
        f"{', '.join(sorted(scores))}: no best checkpoint is kept until it is one of these."
    )
    return {**scores, metric: None}


def is_better(run: Run, figures: dict[str, float | None]) -> bool:
    """Whether train.save_best is among these measurements and better than ever; remembers it. The same on all ranks."""
    metric, best = run.config.train.save_best, run.best
    if metric not in figures or run.skipped_in_a_row:  # nothing is saved while steps are skipped
        return False
    value = figures[metric]
    if finite(value) and (best.value is None or (value < best.value if metric == "loss" else value > best.value)):
        run.best = Best(metric, value, run.position.step)
        return True
    best.worse += 1
    return False


def no_better(run: Run) -> str:
    """One sentence if train.stop_when_no_better measurements in a row were no better than the best, else ""."""
    settings, best = run.config.train, run.best
    if not settings.stop_when_no_better or best.worse < settings.stop_when_no_better:
        return ""
    said = f"{settings.save_best} was no better in {best.worse} measurements (train.stop_when_no_better)"
    if best.value is None:
        return f"{said}, and has never been a number"
    kept = checkpoint_dir.best(run.run_dir / "checkpoints")
    return f"{said} than at step {best.step} with {best.value:.4f}" + (f", kept as {kept}" if kept else "")


def train_step(run: Run) -> dict[str, float] | None:
    """Train on one global batch; returns the learning rates by component, None if it went back. Collective.

    An update whose loss or gradient is not finite is skipped. Ends the run when train.max_skipped_steps were skipped
    in a row, when no token carries loss, or when too many samples are broken.
    """
    step, optim = run.position.step, run.config.optim
    run.stacks.at(step, "data")
    batches = read_batches(run)
    # Random numbers are a function of (seed, step): a resumed run draws what an uninterrupted one would. Seeded after
    # the data are read, since torch's loader takes a number when its workers start.
    parallel.seed_everything(run.config.train.seed + step)

    run.stacks.at(step, "forward, backward and update")
    rates = set_learning_rates(run.optimizer, run.config, step)
    for chunk in run.model:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    total_weight = global_weight(batches)
    if not total_weight > 0:
        end_for_lack_of_loss(run)
    weighted_losses = forward_backward(run.model, batches, total_weight, z_loss=optim.z_loss)
    is_finite = all_finite(weighted_losses)
    loss = loss_of_step(weighted_losses, total_weight)
    if math.isfinite(loss) and run.config.train.on_loss_jump != "ignore" and run.alarm.is_jump(loss):
        if report_jump(run, batches, loss):
            return None
    with run.times.part("optimizer"):
        updated, norms = clip_and_step(run.optimizer, optim.clip_grad, is_finite)
    if updated:
        run.skipped_in_a_row = 0
        run.interval.losses.add(batches, weighted_losses)
        run.interval.grad_norms.append(norms)
    else:
        report_skipped(run, batches, norms, is_finite, total_weight)
    return rates


def report_jump(run: Run, batches: list[dict], loss: float) -> bool:
    """Say that the loss has jumped, and go back to the newest checkpoint if train.on_loss_jump says so. Collective.

    Returns whether it went back: then the step is not applied, and its batch and those since the checkpoint are not
    trained on again.
    """
    step = run.position.step
    names = ", ".join(sources_in(batches, [source.name for source in run.sources]))
    run.log.say(f"step {step}: the loss jumped to {loss:.4f} from about {run.alarm.usual:.4f}; sources: {names}")
    run.log.write("jump", step, {"loss": loss, "usual": run.alarm.usual})
    if run.config.train.on_loss_jump != "go_back":
        return False
    report_save(run, run.saver.finish())
    newest = [None]
    if dist.get_rank() == 0:
        newest = [checkpoint_dir.latest_complete(run.run_dir / "checkpoints")[0]]
    dist.broadcast_object_list(newest)
    path, damaged = newest_verified(run.run_dir / "checkpoints", newest[0], run.config.train.verify_checkpoints)
    for line in damaged:
        run.log.say(f"ignored: {line}")
    if path is None:
        run.log.say(f"step {step}: there is no checkpoint yet to go back to; the run goes on")
        return False
    if run.went_back == MAX_TIMES_BACK:
        end(
            run,
            f"step {step}: the loss jumped again after the run went back to {path} {run.went_back} times; sources in "
            f"the last batch: {names}. Look at these sources, lower optim.*.lr, or set train.on_loss_jump=warn.",
        )
    run.went_back += 1
    marker, _ = checkpoint.load(path, run.model, run.optimizer)
    run.position.step, run.position.tokens_seen = marker["step"], marker.get("tokens_seen", 0)
    run.alarm = SpikeAlarm(marker.get("losses", ()))
    run.log.say(f"went back to {path}; training goes on with the data behind step {step}")
    run.log.go_back(run.position.step)
    return True


def read_batches(run: Run) -> list[dict]:
    """The micro-batches of a step. Ends the run if too many samples of a source are broken. Collective."""
    with run.times.part("data"):
        batches = [run.batches.next() for _ in range(run.micro_batches)]
    run.interval.speed.add(batches)
    for line in run.data.add(batches):
        run.log.say(f"broken sample: {line}")
    too_broken = run.data.too_broken(run.config.data.max_error_rate, run.config.data.said)
    if too_broken:
        end(run, too_broken)
    return batches


def end_for_lack_of_loss(run: Run) -> NoReturn:
    lost = "; ".join(run.data.lines()) or "nothing was dropped"
    end(
        run,
        f"step {run.position.step}: no token of the global batch carries loss ({lost}): check "
        f"{run.config.data.said} and data.seq_length={run.config.data.seq_length}.",
    )


def report_skipped(
    run: Run, batches: list[dict], norms: dict[str, float], is_finite: bool, total_weight: torch.Tensor
) -> None:
    """Count and report a step without an update; too many in a row end the run. Collective.

    Of the first one in a row it is said where the first value that is not finite comes from, and its batch is saved.
    """
    step = run.position.step
    run.skipped_steps += 1
    run.skipped_in_a_row += 1
    names = [source.name for source in run.sources]
    in_batch = ", ".join(sources_in(batches, names))
    not_finite = ", ".join(c for c, norm in norms.items() if not math.isfinite(norm)) or "none"
    run.log.say(
        f"step {step}: skipped, loss or gradient is not finite (gradients: {not_finite}); sources in the batch:"
        f" {in_batch}; skipped {run.skipped_in_a_row} in a row, {run.skipped_steps} in all"
    )
    if run.skipped_in_a_row == 1:
        parallel.seed_everything(run.config.train.seed + step)  # the same dropout again
        where = first_not_finite(run.model, batches, total_weight)
        files = save_batches(run.run_dir / "errors", step, batches, is_finite, run.replica, names)
        look = f"; look at its batch: python tools/inspect_data.py --batch {files[0]}" if files else ""
        run.log.say(f"step {step}: first not finite is {where}{look}")
    if run.skipped_in_a_row >= run.config.train.max_skipped_steps:
        end(
            run,
            f"step {step}: loss or gradient was not finite in {run.skipped_in_a_row} steps in a row "
            f"(train.max_skipped_steps); sources in the last batch: {in_batch}. The newest checkpoint is from "
            "before these steps: look at these sources, or lower optim.*.lr.",
        )


def sources_in(batches: list[dict], names: list[str]) -> list[str]:
    """Names of the sources of the global batch, on all ranks. Collective."""
    present = torch.zeros(len(names) + 1, dtype=torch.int32, device=batches[0]["source_ids"].device)
    for batch in batches:
        present[batch["source_ids"].long().clamp(min=-1)] = 1  # -1, padding, is the last entry
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    return [name for name, is_present in zip(names, present.tolist()) if is_present]


def log_interval(run: Run, rates: dict[str, float]) -> None:
    """Write the figures since the last such line, and start to count again. Collective."""
    interval, step = run.interval, run.position.step
    figures = interval.losses.reduce()
    steps = run.times.take()
    parts = mean_step(steps)
    of_a_step = sum(parts.values())
    seconds = of_a_step * len(steps)
    run.position.tokens_seen += figures["tokens"]
    figures.update(
        tokens_seen=run.position.tokens_seen,
        lr=rates,
        skipped_steps=run.skipped_steps,
        grad_norm={c: mean([norms[c] for norms in interval.grad_norms]) for c in rates},
        tokens_per_second=figures["tokens"] / seconds,
        samples_per_second=figures["examples"] / seconds,
        fill=figures["tokens"] / max(1, figures["rows"] * run.config.data.seq_length),
        seconds=seconds,
        elapsed=run.log.elapsed(),
        left=(run.config.train.max_steps - step) * of_a_step,
        step_seconds=parts,
        data_wait_share=parts["data"] / of_a_step,
        memory_gib=memory_gib(run.device),
        data=run.data.by_source(),
        **interval.speed.reduce(seconds, figures["rows"]),
    )
    if run.saver.uploads is not None:
        figures["uploads"] = run.saver.uploads.figures()
    if run.epoch is not None:
        figures["epoch"] = run.data.samples_of(run.epoch.sources) / run.epoch.samples
    impossible = impossible_mfu(figures)
    if impossible:
        run.log.say(impossible)
    slow = report_slow_rank(run, figures)
    interval.grad_norms = []
    run.log.write("train", step, figures)
    uploads = "" if run.saver.uploads is None else run.saver.uploads.note()
    run.log.say(train_line(step, run.config.train.max_steps, figures) + run.data.note() + uploads)
    if slow:
        run.log.say(f"step {step}: {slow}")


def report_slow_rank(run: Run, figures: dict) -> str | None:
    """Compare the ranks, and put what is found into the figures. Returns a line for the log if it is news.

    Collective.
    """
    seconds = slow_rank.by_rank(slow_rank.compute(figures["step_seconds"]), run.device)
    flops = slow_rank.flops_by_rank(run.config, run.slow_rank.places, run.interval.speed.work)
    figures["compute_seconds"] = {"median": statistics.median(seconds), "slowest": max(seconds)}
    found, line = run.slow_rank.judge(seconds, flops)
    if found is not None:
        figures["slow_rank"] = run.slow_rank.record(found)
    return line


def mean(values: list[float]) -> float:
    """0 for none."""
    return sum(values) / max(1, len(values))


def run_validation(run: Run) -> float | None:
    """Write the loss on held-out data to the log and return it; None: no held-out token carries loss. Collective."""
    run.stacks.at(run.position.step, "validation")
    names = [source.name for source in run.sources]
    figures, data, broken = validate(run.config, run.model, run.validation, run.replica, run.device, names)
    run.log.write("validation", run.position.step, figures)
    for line in broken:
        run.log.say(f"broken held-out sample: {line}")
    run.log.say(validation_line(run.position.step, figures) + data.note())
    too_broken = data.too_broken(run.config.data.max_error_rate, run.config.data.said)
    if too_broken:
        end(run, f"held-out data: {too_broken}")
    return figures["loss"]


def answer_questions(run: Run) -> dict[str, float]:
    """Answer the held-out questions: scores to the log, answers and pictures to samples/step_XXXXXXXX. Collective.

    A signal in the meantime ends it without a result. If the files cannot be written, the run goes on. Returns the mean
    scores by metric, the same on all ranks.
    """
    step, started = run.position.step, time.monotonic()
    max_tokens = run.config.train.generate_max_tokens
    tokens = answers.answer(
        run.model, run.exam, run.replica, run.device, max_tokens, lambda: run.request.reason(run.device) is not None
    )
    seconds = time.monotonic() - started
    scores = [{}]
    if tokens is not None and run.log.main:
        folder = run.run_dir / "samples" / step_name(step)
        try:
            figures, line = answers.write(run.exam, tokens, folder)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            run.log.say(f"step {step}: the answers could not be written ({reason}); the run goes on")
        else:
            rate = int((tokens != answers.NO_TOKEN).sum()) / max(seconds, 1e-9)
            run.log.write("answers", step, {**figures, "seconds": seconds, "tokens_per_second": rate})
            run.log.show_answers(step, folder)
            run.log.say(f"step {step} answers | {line}, {seconds:.1f} s, {rate:.1f} tokens/s")
            scores = [{metric: values["all"] for metric, values in figures.items()}]
    dist.broadcast_object_list(scores)
    return scores[0]


def save(run: Run, is_last: bool, is_best: bool = False) -> None:
    """Begin to save a checkpoint; wait for it if it is the last, or train.async_checkpoint is off. Collective.

    Nothing is saved while steps are skipped: the weights may be what is wrong, and the checkpoint before is from before
    that. is_best: this one is kept until there is a better one.
    """
    step = run.position.step
    if run.skipped_in_a_row:
        run.log.say(f"step {step}: not saved, since the last {run.skipped_in_a_row} step(s) were skipped")
        return
    run.stacks.at(step, "checkpoint")
    loader_state = save_state(run.loader) if run.loader is not None else None
    report_save(run, run.saver.finish())  # one at a time
    marker = {
        "stage": run.config.stage,
        "layout": dataclasses.asdict(run.config.parallel),
        "tokens_seen": run.position.tokens_seen,
        "data": run.data.by_source(),
        "best": dataclasses.asdict(run.best),
        "losses": list(run.alarm.losses),
    }
    if run.adapters is not None:
        marker[lora_base.KEY] = run.adapters
    run.saver.begin(step, run.model, run.optimizer, loader_state, marker, run.config_yaml, is_best)
    if is_last or not run.saver.asynchronous:
        saved = run.saver.finish()
        if is_last and saved.failure is not None:
            left = what_is_left(run.run_dir / "checkpoints")
            message = f"step {step} could not be saved: {saved.failure.rstrip('.')}. {left}"
            shutdown.end_all_ranks(run.run_dir, message, step)
        report_save(run, saved)


def what_is_left(folder: Path) -> str:
    """One sentence on the checkpoints that a run has."""
    newest, _ = checkpoint_dir.latest_complete(folder)
    return f"The newest checkpoint is {newest}." if newest is not None else "There is no checkpoint yet."


def report_save(run: Run, saved: checkpoint.Saved | None) -> None:
    """Write to the log what became of a save; None: it has not ended yet."""
    if saved is None:
        return
    figures = {"seconds": saved.held_up, "written_in": saved.seconds, "failed": int(saved.failure is not None)}
    run.log.write("checkpoint", run.position.step, figures | {"saved_step": saved.step})
    if saved.failure is not None:
        run.log.say(f"step {saved.step} was not saved: {saved.failure}")
    else:
        run.went_back = 0
        waited = f", training waited {saved.held_up:.1f} s" if run.saver.asynchronous else ""
        run.log.say(f"saved {saved.path} in {saved.seconds:.1f} s{waited}")
        if run.saver.uploads is not None:
            run.saver.uploads.wake(run.best.step or None)


def report_uploads(run: Run) -> None:
    """Write to the log what was uploaded since the last time, and what could not be."""
    for line in run.saver.uploads.lines() if run.saver.uploads is not None else []:
        run.log.say(line)


def end(run: Run, message: str) -> NoReturn:
    """End the run for a reason that all ranks have found alike; a save that was begun is finished. Collective."""
    report_save(run, run.saver.finish())
    run.profile.finish()
    shutdown.end_all_ranks(run.run_dir, message, run.position.step)
