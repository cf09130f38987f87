"""The training run of one stage: check, build, resume or start, loop, save."""

import contextlib
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from molmo2_nemo import gpu, parallel
from molmo2_nemo.command_line import to_dataclass
from molmo2_nemo.config.checks import check
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config
from molmo2_nemo.data import blend
from molmo2_nemo.data.loader import save_state, train_loader, validation_loader
from molmo2_nemo.environment import rank_from_environment, world_size_from_environment
from molmo2_nemo.training import answers, checkpoint, shutdown
from molmo2_nemo.training.batches import BatchSource
from molmo2_nemo.training.metrics import DataReport, LossBySource, RunLog, memory_gib, train_line
from molmo2_nemo.training.optimizer import (
    build_optimizer,
    check_freeze_patterns,
    clip_and_step,
    is_frozen,
    parameter_table,
    set_learning_rates,
)
from molmo2_nemo.training.speed import Speed, impossible_mfu
from molmo2_nemo.training.start import Start, converted, find_start
from molmo2_nemo.training.step import build_model, forward_backward, global_names, global_weight, load_weights


def run_stage(cfg: DictConfig) -> None:
    """Entry point of the recipes: one sentence and exit status 2 for a setting that cannot work, else train."""
    rank = rank_from_environment()
    config = None
    try:
        config = to_dataclass(cfg)
        check(config, world_size_from_environment())
        device = parallel.resolve_device(config.train)
        gpu.check_device(config, device)
        with user_errors():
            sources = blend.load_blend(config.data)
            blend.check_shards(sources, config.data.max_error_rate)
        start = find_start(config)
        if rank == 0:
            (Path(config.run_dir) / shutdown.ENDED).unlink(missing_ok=True)
        progress = {"step": 0}
        with shutdown.told_in_one_line(Path(config.run_dir), progress):
            train(config, device, sources, start, OmegaConf.to_yaml(cfg, resolve=True), progress)
    except ConfigError as error:
        # Before the ranks are joined all of them find the same error; later it may be one rank's own.
        if rank == 0 or dist.is_initialized():
            # Where the configuration does not even say which folder is the run's, there is none to write to.
            with contextlib.suppress(OSError, OmegaConfBaseException):
                shutdown.write_ended(Path(cfg.run_dir), "config error", 0, str(error))
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


@contextlib.contextmanager
def user_errors():
    """The data modules raise ValueError with a sentence for what a user did."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from error


def stop(message: str, run_dir: Path, step: int, reason: str = "error") -> NoReturn:
    """End the run for what all ranks have found alike. Collective; one of them says so."""
    if dist.get_rank() == 0:
        shutdown.write_ended(run_dir, reason, step, message)
        print(f"error: {message}", file=sys.stderr, flush=True)
    dist.barrier()
    sys.exit(2)


def train(config: Config, device: str, sources: list, start: Start, config_yaml: str, progress: dict) -> None:
    """Run the stage to train.max_steps. Every rank of the job calls this. progress["step"]: kept at the running
    step."""
    request = shutdown.StopRequest(config.train.stop_signals, config.train.stop_after_minutes)
    t, run_dir = config.train, Path(config.run_dir)
    stacks = shutdown.StackDump(run_dir, t.timeout_minutes, t.stop_signals)
    if device == "cuda":
        shutdown.record_collectives(run_dir)
    parallel.initialize(config.parallel, device, t.timeout_minutes, t.seed)
    precision = parallel.resolve_precision(t, device)
    log = RunLog(run_dir, 1, config.name, config_yaml, t.wandb_project)
    log.say(banner(config, device, precision, sources))
    log.say(gpu.description(config, precision, device))
    for line in start.ignored:
        log.say(f"ignored: {line}")
    init_from = start.init_from
    if start.hugging_face:
        init_from, failure = converted(start.hugging_face, config, log.say)
        if failure is not None:
            stop(f"train.init_from={t.init_from}: {failure}", run_dir, 0, "config error")
    optim, tied = config.optim, config.model.tie_embeddings
    if config.transformer.get("tp_comm_overlap"):
        gpu.initialize_user_buffers(config, precision)
    ddp = gpu.ddp_settings(config, device)
    schedule = getattr(config.schedule, config.stage)
    model = build_model(
        config.model,
        config.parallel,
        device,
        precision,
        config.transformer,
        ddp,
        freeze=lambda name: is_frozen(name, optim, tied),
        dropout=schedule.hidden_dropout,
        response_dropout=schedule.response_dropout,
        vision_chunk_crops=t.vision_chunk_crops,
        vision_recompute=t.vision_recompute,
        vit_fp8=t.vit_fp8,
    )
    check_freeze_patterns([name for chunk in unwrap_model(model) for name, _ in global_names(chunk)], optim)
    optimizer = build_optimizer(config, model, precision)
    counts = parameter_table(model)
    log.say("rank 0 trains (freezes): " + ", ".join(f"{c} {n:,} ({f:,})" for c, (n, f) in counts.items()))

    asynchronous = device == "cuda" if t.async_checkpoint == "auto" else t.async_checkpoint == "true"
    saver = checkpoint.Saver(run_dir / "checkpoints", t.keep_last, t.keep_every, asynchronous)
    step, tokens_seen, counted, saved = 0, 0, {}, []

    def tell(outcome: checkpoint.Saved | None) -> None:
        """Say what became of a save, if it has ended."""
        if outcome is None:
            return
        failed = outcome.failure is not None
        log.write(
            "checkpoint", step, {"seconds": outcome.held_up, "written_in": outcome.seconds, "failed": int(failed)}
        )
        behind = f", training waited {outcome.held_up:.1f} s" if asynchronous else ""
        log.say(
            f"step {outcome.step} was not saved: {outcome.failure}"
            if failed
            else f"saved {outcome.path} in {outcome.seconds:.1f} s{behind}"
        )

    def end(message: str) -> NoReturn:
        tell(saver.finish())
        stop(message, run_dir, step)

    if start.resume is not None:
        marker = checkpoint.load(start.resume, model, optimizer)
        step, tokens_seen, counted = marker["step"], marker.get("tokens_seen", 0), marker.get("data", {})
        saved = checkpoint.loader_states(start.resume)
        if not saved:
            raise ConfigError(
                f"checkpoint {start.resume} has no state of the training data: use train.init_from to start from its "
                "weights alone."
            )
        log.say(f"resumed step {step} from {start.resume}")
        log.write("resume", step, {})
    elif init_from is not None:
        load_weights(model, init_from)
        optimizer.reload_model_params()
        log.say(f"weights from {init_from}")
    else:
        log.say("weights: random (train.init_from=CHECKPOINT starts from trained ones)")

    group = parallel.model_replica_group()
    loader, validation = make_loaders(config, sources, group, run_dir, saved)
    if loader is not None and loader.note:
        log.say(loader.note)
    if loader is not None and loader.dealt_anew:
        log.say("training data dealt out anew: what was not trained on yet comes first, in another order")
    exam = answers.prepare(config, sources, group, run_dir) if t.generate_every else None
    batches_from = BatchSource(iter(loader) if loader is not None else None, group, device)
    replicas = parallel_state.get_data_parallel_world_size()
    micro_batches = t.global_batch_size // (t.micro_batch_size * replicas)
    names = [source.name for source in sources]
    losses, data = LossBySource(names, device), DataReport(names, device, counted)
    speed = Speed(config, device, precision)
    data_wait, grad_norms, skipped, skipped_in_a_row = 0.0, [], 0, 0
    info = {"stage": config.stage, "layout": dataclasses.asdict(config.parallel)}
    for chunk in model:
        chunk.train()
    log.interval()
    while step < t.max_steps:
        step += 1
        progress["step"] = step
        stacks.at(step, "data")
        # Random numbers are a function of (seed, step): a resumed run draws what an uninterrupted one would.
        parallel.seed_everything(t.seed + step)
        started = time.monotonic()
        batches = [batches_from.next() for _ in range(micro_batches)]
        data_wait += time.monotonic() - started
        speed.add(batches)
        for line in data.add(batches):
            log.say(f"broken sample: {line}")
        too_broken = data.too_broken(config.data.max_error_rate, config.data.blend)
        if too_broken:
            end(too_broken)
        stacks.at(step, "forward, backward and update")
        rates = set_learning_rates(optimizer, config, step)
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        total_weight = global_weight(batches)
        if not total_weight > 0:
            lost = "; ".join(data.lines()) or "nothing was dropped"
            end(
                f"step {step}: no token of the global batch carries loss ({lost}): check "
                f"data.blend={config.data.blend} and data.seq_length={config.data.seq_length}."
            )
        weighted = forward_backward(model, batches, total_weight, z_loss=optim.z_loss)
        updated, norms = clip_and_step(optimizer, optim.clip_grad, all(bool(x.isfinite().all()) for x in weighted))
        if updated:
            losses.add(batches, weighted)
            grad_norms.append(norms)
            skipped_in_a_row = 0
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            in_batch = ", ".join(sources_in(batches, names))
            not_finite = ", ".join(c for c, norm in norms.items() if not math.isfinite(norm)) or "none"
            log.say(
                f"step {step}: skipped, loss or gradient is not finite (gradients: {not_finite}); sources in the batch:"
                f" {in_batch}; skipped {skipped_in_a_row} in a row, {skipped} in all"
            )
            if skipped_in_a_row >= t.max_skipped_steps:
                end(
                    f"step {step}: loss or gradient was not finite in {skipped_in_a_row} steps in a row "
                    f"(train.max_skipped_steps); sources in the last batch: {in_batch}. The newest checkpoint is from "
                    "before these steps: look at these sources, or lower optim.*.lr."
                )
        tell(saver.poll())
        reason = request.reason(device)
        last = step == t.max_steps or reason is not None
        if step % t.log_every == 0 or last or step == 1:
            figures = losses.reduce()
            seconds = log.interval()
            tokens_seen += figures["tokens"]
            figures.update(
                tokens_seen=tokens_seen,
                lr=rates,
                skipped_steps=skipped,
                grad_norm={c: sum(norms[c] for norms in grad_norms) / max(1, len(grad_norms)) for c in rates},
                tokens_per_second=figures["tokens"] / seconds,
                samples_per_second=figures["examples"] / seconds,
                fill=figures["tokens"] / max(1, figures["rows"] * config.data.seq_length),
                seconds=seconds,
                data_wait_share=data_wait / seconds,
                memory_gib=memory_gib(device),
                data=data.by_source(),
                **speed.reduce(seconds, figures["rows"]),
            )
            impossible = impossible_mfu(figures)
            if impossible:
                log.say(impossible)
            data_wait, grad_norms = 0.0, []
            log.write("train", step, figures)
            log.say(train_line(step, t.max_steps, figures) + data.note())
        if t.validation_batches > 0 and reason is None and (step % t.validate_every == 0 or last):
            stacks.at(step, "validation")
            figures = validate(config, model, validation, group, device, sources)
            note = figures.pop("note")
            log.write("validation", step, figures)
            by_source = " ".join(f"{s} {x:.3f}" for s, x in figures["loss_by_source"].items())
            loss = figures["loss"] or math.nan
            log.say(f"step {step} validation | loss {loss:.4f} ({by_source}) | {figures['rows']} rows{note}")
            log.interval()
        if exam is not None and reason is None and (step % t.generate_every == 0 or last):
            # A signal in the meantime ends it: what Slurm leaves for saving is short.
            tokens = answers.answer(
                model, exam, group, device, t.generate_max_tokens, lambda: request.reason(device) is not None
            )
            seconds = log.interval()
            if tokens is not None and log.main:
                write_answers(exam, tokens, run_dir / "samples" / f"step_{step:08d}", step, seconds, log)
            log.interval()
        if step % t.save_every == 0 or last:
            stacks.at(step, "checkpoint")
            state = save_state(loader) if loader is not None else None
            tell(saver.finish())  # one at a time
            saver.begin(
                step,
                model,
                optimizer,
                state,
                {**info, "tokens_seen": tokens_seen, "data": data.by_source()},
                config_yaml,
            )
            if last or not asynchronous:
                outcome = saver.finish()
                if last and outcome.failure is not None:
                    stop(
                        f"step {step} could not be saved: {outcome.failure}. The checkpoints before it are whole.",
                        run_dir,
                        step,
                    )
                tell(outcome)
            log.interval()
        if reason is not None:
            break
    else:
        reason = "finished"
    log.say(f"{config.stage} ended at step {step} ({reason}): {tokens_seen:,} tokens")
    if dist.get_rank() == 0:
        shutdown.write_ended(run_dir, reason, step)
    for line in data.lines():
        log.say(f"data of {line}")
    log.close()
    stacks.close()
    dist.barrier()
    dist.destroy_process_group()
    if log.main:
        from molmo2_nemo.report import write_report  # matplotlib is needed here alone

        try:
            write_report([run_dir], run_dir / "report.html")
        except Exception as error:
            log.say(f"no report: {error}")


def sources_in(batches: list[dict], names: list[str]) -> list[str]:
    """Names of the sources of the global batch, on all ranks. Collective."""
    present = torch.zeros(len(names) + 1, dtype=torch.int32, device=batches[0]["source_ids"].device)
    for batch in batches:
        present[batch["source_ids"].long().clamp(min=-1)] = 1  # -1, padding, is the last entry
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    return [name for name, there in zip(names, present.tolist()) if there]


def make_loaders(config: Config, sources: list, group, run_dir: Path, saved: list[Path]):
    """(training, validation) loaders on the first rank of a replica, (None, None) elsewhere.

    saved: the loader states of the checkpoint to continue.
    """
    if dist.get_rank() != dist.get_process_group_ranks(group)[0]:
        return None, None
    rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    common = dict(
        data=config.data,
        vision=config.model.vision,
        sources=sources,
        rank=rank,
        world_size=replicas,
        data_parallel_group=parallel_state.get_data_parallel_group(),
        micro_batch_size=config.train.micro_batch_size,
        run_dir=run_dir,
    )
    with user_errors():
        validation = validation_loader(**common) if config.train.validation_batches else None
        return train_loader(**common, saved=saved), validation


def validate(config: Config, model, loader, group, device: str, sources: list) -> dict:
    """Loss on the first train.validation_batches held-out micro-batches of each replica."""
    batches_from = BatchSource(iter(loader) if loader is not None else None, group, device)
    names = [source.name for source in sources]
    losses, data = LossBySource(names, device), DataReport(names, device)
    # The interleaved schedule takes as many micro-batches as there are pipeline stages; repeated ones are not counted.
    at_once = config.parallel.pipeline_model_parallel_size if len(model) > 1 else 1
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        for _ in range(config.train.validation_batches):
            batch = batches_from.next()
            # Replicas may hold different numbers of held-out rows: stop together.
            ended = torch.tensor(batch is None, dtype=torch.int32, device=device)
            dist.all_reduce(ended, op=dist.ReduceOp.MAX)
            if ended:
                break
            data.add([batch])
            one = torch.ones((), device=device)
            losses.add([batch], forward_backward(model, [batch] * at_once, one, forward_only=True)[:1])
    for chunk in model:
        chunk.train()
    return losses.reduce() | {"data": data.by_source(), "note": data.note()}


def write_answers(
    exam: answers.Exam, tokens: torch.Tensor, folder: Path, step: int, seconds: float, log: RunLog
) -> None:
    """Log the scores, leave answers and pictures in the folder. seconds: it took to answer."""
    try:
        figures, line = answers.write(exam, tokens, folder)
    except Exception as error:
        log.say(f"step {step}: the answers could not be written ({type(error).__name__}: {error}); the run goes on")
        return
    log.write("answers", step, {**figures, "seconds": seconds})
    log.say(f"step {step} answers | {line}, {seconds:.1f} s")


def banner(config: Config, device: str, precision: str, sources: list) -> str:
    """What is about to run, in three lines."""
    p, t, d = config.parallel, config.train, config.data
    total = sum(source.weight for source in sources)
    shares = ", ".join(f"{source.name} {source.weight / total:.1%}" for source in sources)
    missing = blend.missing_sources(d) if d.skip_missing else []
    left_out = f"\nleft out, not on disk (data.skip_missing=true): {', '.join(missing)}" if missing else ""
    return (
        f"{config.stage} '{config.name}': model {config.model.name}, {dist.get_world_size()} {device} rank(s), "
        f"{precision}, TP {p.tensor_model_parallel_size}{' + SP' if p.sequence_parallel else ''}, "
        f"PP {p.pipeline_model_parallel_size}, CP {p.context_parallel_size}, "
        f"DP {parallel_state.get_data_parallel_world_size()}\n"
        f"{t.max_steps:,} steps of {t.global_batch_size} rows x {d.seq_length:,} tokens, {d.max_crops} crops a row, "
        f"at most {d.max_frames} frames a video\nblend {d.blend}: {shares}{left_out}"
    )
