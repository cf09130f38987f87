"""A training run of one stage: check the settings, build, resume or start, train (loop.py), and end."""

import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
import yaml
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from molmo2_nemo import auto, checkpoint_dir, gpu, lora_base, parallel, remote_checkpoints, storage
from molmo2_nemo.command_line import to_dataclass
from molmo2_nemo.config.checks import check, check_profile
from molmo2_nemo.config.components import COMPONENTS, is_frozen
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config, LoraConfig
from molmo2_nemo.data import blend, epochs, vocabulary
from molmo2_nemo.data.blend import Source
from molmo2_nemo.data.loader import (
    DataLost,
    Loader,
    TrainLoader,
    ValidationLoader,
    WorkerDied,
    train_loader,
    validation_loader,
)
from molmo2_nemo.environment import rank_from_environment, world_size_from_environment
from molmo2_nemo.storage import StorageError, Unreachable
from molmo2_nemo.training import agreement, answers, checkpoint, loop, owner, shutdown, slow_rank, step_times
from molmo2_nemo.training.batches import BatchSource
from molmo2_nemo.training.loop import Best, Interval, Position, Run
from molmo2_nemo.training.metrics import DataReport, LossBySource, RunLog
from molmo2_nemo.training.optimizer import build_optimizer, check_frozen
from molmo2_nemo.training.profile import Profile
from molmo2_nemo.training.speed import Speed
from molmo2_nemo.training.start import Start, agree, converted, find_start
from molmo2_nemo.training.step import build_model, global_names, load_weights
from molmo2_nemo.training.trained import what_is_trained
from molmo2_nemo.training.trouble import SpikeAlarm
from molmo2_nemo.training.uploads import Uploads

# A launcher ends the other ranks this soon after rank 0 has ended.
SECONDS_FOR_RANK_0 = 5


def run_stage(cfg: DictConfig) -> None:
    """Entry point of the recipes: one sentence and exit status 2 for a setting that cannot work, else train."""
    rank, release, before, position = rank_from_environment(), lambda: None, {}, Position()
    try:
        config = to_dataclass(cfg)
        check(config, world_size_from_environment())
        device = parallel.resolve_device(config.train)
        config, chosen = auto.resolve(config, world_size_from_environment(), gpu.memory_gib(device), device)
        gpu.check_device(config, device)
        sources = blend.load_blend(config.data)
        blend.check_shards(sources, config.data.max_error_rate)
        blend.check_held_out(config, sources)
        config, epoch, said = length_of_run(config, sources, device)
        chosen += said
        record_length(cfg, config)
        refuse_checkpoint_as_run(config.run_dir)
        if rank == 0:
            # Before the checkpoints are looked at: it may wait for another run, which saves meanwhile.
            release = owner.Owner(Path(config.run_dir)).release
        with shutdown.told_in_one_line(Path(config.run_dir), lambda: position.step, release):
            if rank == 0:
                before = shutdown.read_ended(Path(config.run_dir))
                (Path(config.run_dir) / shutdown.ENDED).unlink(missing_ok=True)
            # Rank 0's choice is everybody's (start.agree); another rank may not even see the folder.
            start = find_start(config) if rank == 0 else Start()
            config_yaml = OmegaConf.to_yaml(cfg, resolve=True)
            run = set_up(config, config_yaml, device, sources, start, position, chosen, epoch)
            try:
                with loader_errors(run.loader, run.validation):
                    reason, why = loop.train(run)
            except BaseException:
                run.log.close()  # recipes end the process without Python's own clean-up
                raise
            finish(run, reason, why)
    except ConfigError as error:
        refuse(cfg, rank, before, error)
        sys.exit(2)
    finally:
        if rank == 0 and is_still_finished(cfg, before):
            shutdown.keep_finished(Path(cfg.run_dir), before)
        release()


def refuse(cfg: DictConfig, rank: int, before: dict, error: ConfigError) -> None:
    """Say why the run cannot start, and leave ended.json, where the folder is this run's."""
    message = str(error)
    if rank and not dist.is_initialized():
        # All ranks may have found the same. Then rank 0 says so, and the launcher ends the others meanwhile.
        time.sleep(SECONDS_FOR_RANK_0)
        message = f"rank {rank} on {socket.gethostname()}: {message}"
    # Where the configuration does not even say which folder is the run's, there is none to write to.
    with contextlib.suppress(OSError, OmegaConfBaseException):
        run_dir = Path(cfg.run_dir)
        before |= {} if before else shutdown.read_ended(run_dir)
        # Once the ranks are joined, the folder is this run's.
        is_ours = dist.is_initialized() or not (storage.is_remote(cfg.run_dir) or owner.in_use(run_dir))
        if is_ours and not checkpoint_dir.is_complete(run_dir):
            later = isinstance(error, Unreachable)
            shutdown.write_ended(
                run_dir, "error" if later else "config error", 0, message, "transient" if later else None
            )
    print(f"error: {message}", file=sys.stderr, flush=True)


def is_still_finished(cfg: DictConfig, before: dict) -> bool:
    """Whether a run that had finished is so after this start, too: nothing more is asked for, and what it ended with is
    there. A start that was refused for another reason then leaves no trace.

    A run that ended before its last step (train.stop_when_no_better) says why in its message.
    """
    if before.get("reason") != "finished":
        return False
    with contextlib.suppress(OmegaConfBaseException, AttributeError, TypeError, ValueError):
        newest, _ = checkpoint_dir.latest_complete(Path(cfg.run_dir) / "checkpoints")
        if newest is not None and checkpoint_dir.step_of(newest) == before.get("step"):
            most = cfg.train.max_steps  # null where the refused start did not come as far as to count epochs
            return bool(before.get("message")) or most is None or before["step"] >= int(most)
    return False


def length_of_run(config: Config, sources: list[Source], device: str) -> tuple[Config, epochs.Epoch | None, list[str]]:
    """Settings in epochs and shares as steps, the epoch if something depends on it, and lines for the log.

    Raises ConfigError.
    """
    if not epochs.is_asked(config):
        return replace(config, optim=epochs.with_warmup(config.optim, config.train.max_steps)), None, []
    epoch = epochs.measured(config, sources)
    config = epochs.in_steps(config, epoch)
    check_profile(config.train, world_size_from_environment())
    seconds = gpu.seconds_of_a_step(config, world_size_from_environment()) if device == "cuda" else None
    return config, epoch, epochs.described(config, epoch, seconds)


def record_length(cfg: DictConfig, config: Config) -> None:
    """Write what `length_of_run` found into the configuration that the run's folder and its checkpoints record."""
    for key in ("max_steps", *epochs.EVERY):
        cfg.train[key] = getattr(config.train, key)
    for component in COMPONENTS:
        cfg.optim[component].warmup_steps = getattr(config.optim, component).warmup_steps


def set_up(
    config: Config,
    config_yaml: str,
    device: str,
    sources: list[Source],
    start: Start,
    position: Position,
    chosen: list[str],
    epoch: epochs.Epoch | None = None,
) -> Run:
    """Everything up to the first step. Collective: every rank of the job calls it.

    position: moved on to the checkpoint's where the run is resumed. chosen: lines on settings that said auto or epochs.
    Raises ConfigError.
    """
    settings, run_dir = config.train, Path(config.run_dir)
    request = shutdown.StopRequest(settings.stop_signals, settings.stop_after_minutes)
    if device == "cuda":
        shutdown.record_collectives(run_dir)
    parallel.join_ranks(device, settings.timeout_minutes)
    end_unless_agreed(run_dir, agreement.disagreement(agreement.what_this_rank_has(config, sources)))
    # From here on it is known that this run owns the folder: rank 0 was there first.
    stacks = shutdown.StackDump(run_dir, settings.timeout_minutes, settings.stop_signals)
    start, problem = agree(config, start)
    end_unless_agreed(run_dir, None if problem is None else str(problem), isinstance(problem, Unreachable))
    parallel.make_groups(config.parallel, settings.timeout_minutes, settings.seed)
    precision = parallel.resolve_precision(settings, device)

    log = RunLog(run_dir)
    for line in before_the_start(config, device, precision, sources, chosen, epoch):
        log.say(line)
    for line in start.ignored + start.halves:
        log.say(f"ignored: {line}")
    if start.resume is not None and settings.start_over:
        log.say(f"train.start_over=true is not used: {start.resume} can be continued")
    init_from = weights_to_start_from(config, start, log)

    model, optimizer = build(config, device, precision)
    for line in what_is_trained(model):
        log.say(line)
    loader_states, marker, adapters = [], {}, None
    base = init_from if config.lora.rank else None
    if base is not None:
        # The same for all of the run's checkpoints, since they lie in one folder.
        adapters = lora_base.record(config.lora, base, run_dir / "checkpoints" / checkpoint_dir.step_name(0))
        load_weights(model, base)
        log.say(f"weights beside the adapters, which stay as they are: {base}")
    if start.resume is not None:
        loader_states, marker = resume(start.resume, model, optimizer, position, log, config_yaml, config.lora, base)
    elif base is not None:
        if start.adapters is not None:
            load_weights(model, start.adapters)
        optimizer.reload_model_params()
        log.say(f"adapters: {start.adapters or 'new ones, which change nothing yet'}")
    elif init_from is not None:
        load_weights(model, init_from)
        optimizer.reload_model_params()
        log.say(f"weights from {init_from}")
    else:
        log.say("weights: random (train.init_from=CHECKPOINT starts from trained ones)")

    times = step_times.of(model, optimizer, device, log.say)
    replica = parallel.model_replica_group(settings.timeout_minutes)
    loader, validation = make_loaders(config, sources, replica, loader_states)
    for note in () if loader is None else (loader.note, loader.position.note, another_tokenizer(start, config, loader)):
        if note:
            log.say(note)
    exam = answers.prepare(config, sources, replica) if settings.generate_every else None
    log.begin(position.step + 1, config.name, config_yaml, settings.wandb_project)
    if start.resume is not None:
        log.write("resume", position.step, {})
    names = [source.name for source in sources]
    return Run(
        config=config,
        config_yaml=config_yaml,
        device=device,
        run_dir=run_dir,
        sources=sources,
        position=position,
        model=model,
        optimizer=optimizer,
        replica=replica,
        loader=loader,
        validation=validation,
        batches=BatchSource(iter(loader) if loader is not None else None, replica, device, config.model),
        micro_batches=steps_micro_batches(config),
        exam=exam,
        interval=Interval(LossBySource(names, device), Speed(config, device, precision)),
        times=times,
        slow_rank=slow_rank.make(config, device, replica),
        profile=Profile(settings, run_dir, times, model, device, log.say),
        epoch=epoch,
        data=DataReport(names, device, marker.get("data", {})),
        best=best_so_far(marker, settings.save_best),
        alarm=SpikeAlarm(marker.get("losses", ())),
        adapters=adapters,
        log=log,
        stacks=stacks,
        request=request,
        saver=make_saver(config, device, log),
    )


def make_saver(config: Config, device: str, log: RunLog) -> checkpoint.Saver:
    """What writes the run's checkpoints and, on rank 0, copies them to train.upload_to."""
    settings, folder, uploads = config.train, Path(config.run_dir) / "checkpoints", None
    address = remote_checkpoints.folder_of(config)
    if address is not None and log.main:
        log.say(f"checkpoints are copied to {storage.shown(address)}")
        uploads = Uploads(folder, address, settings)
        uploads.wake()  # an earlier start may have left something to do
    asynchronous = device == "cuda" if settings.async_checkpoint == "auto" else settings.async_checkpoint == "true"
    return checkpoint.Saver(folder, settings.keep_last, settings.keep_every, asynchronous, uploads)


def refuse_checkpoint_as_run(run_dir: str) -> None:
    """Refuse to train inside of a checkpoint. Raises ConfigError."""
    path = Path(run_dir)
    is_place = path.parent.name == "checkpoints" and checkpoint_dir.is_name(path.name)
    if (path / checkpoint_dir.MARKER).exists() or is_place:
        run = path.parent.parent if path.parent.name == "checkpoints" else "RUN"
        raise ConfigError(
            f"run_dir={run_dir} is a checkpoint: run_dir={run} continues from that run's newest one, and a new run_dir "
            f"with train.init_from={run_dir} starts from its weights."
        )


def end_unless_agreed(run_dir: Path, problem: str | None, may_pass: bool = False) -> None:
    """End the run, as for a wrong setting, for what all ranks have found alike. Collective.

    may_pass: it is no setting, and another start may find it otherwise.
    """
    if problem is not None and may_pass:
        shutdown.end_all_ranks(run_dir, problem, 0, cause="transient")
    if problem is not None:
        shutdown.end_all_ranks(run_dir, problem, 0, reason="config error")


def best_so_far(marker: dict, metric: str | None) -> Best:
    """What a checkpoint's marker says of the best one by this metric; another metric has no best one yet."""
    found = marker.get("best")
    if not isinstance(found, dict) or found.get("metric") != metric or metric is None:
        return Best(metric)
    return Best(metric, found.get("value"), int(found.get("step") or 0), int(found.get("worse") or 0))


def before_the_start(
    config: Config, device: str, precision: str, sources: list[Source], chosen: list[str], epoch: epochs.Epoch | None
) -> list[str]:
    """Lines for the log on what is about to run: layout, data, how often they come round, device and libraries."""
    rows, per_row = config.train.max_steps * config.train.global_batch_size, None if epoch is None else epoch.per_row
    is_said = epoch is not None and len(epoch.sources) == len(sources)  # by the number of epochs
    return [
        banner(config, device, precision, sources),
        *([] if is_said else blend.describe_rounds(sources, rows, per_row)),
        gpu.description(config, precision, device),
        *chosen,
        *gpu.missing_libraries(config, device, world_size_from_environment()),
    ]


def banner(config: Config, device: str, precision: str, sources: list[Source]) -> str:
    """What is about to run, in three lines."""
    layout, settings, data = config.parallel, config.train, config.data
    total = sum(source.weight for source in sources)
    shares = ", ".join(f"{source.name} {source.weight / total:.1%}" for source in sources)
    missing = blend.missing_sources(data) if data.skip_missing or data.own else []
    which = "data.keep" if data.own else "data.skip_missing=true"
    left_out = f"\nleft out, not on disk ({which}): {', '.join(missing)}" if missing else ""
    return (
        f"{config.stage} '{config.name}': model {config.model.name}, {dist.get_world_size()} {device} rank(s), "
        f"{precision}, TP {layout.tensor_model_parallel_size}{' + SP' if layout.sequence_parallel else ''}, "
        f"PP {layout.pipeline_model_parallel_size}, CP {layout.context_parallel_size}, "
        f"DP {parallel_state.get_data_parallel_world_size()}\n"
        f"{settings.max_steps:,} steps of {settings.global_batch_size} rows x {data.seq_length:,} tokens, "
        f"{data.max_crops} crops a row, at most {data.max_frames} frames a video\n"
        f"{data.said}: {shares}{left_out}"
    )


def weights_to_start_from(config: Config, start: Start, log: RunLog) -> Path | None:
    """The checkpoint of a new run's weights, made from Hugging Face folders if need be; None: random. Collective."""
    if not start.hugging_face:
        return start.init_from
    converted_to, failure = converted(start.hugging_face, config, log.say)
    if failure is not None:
        message = f"the weights of {' and '.join(map(str, start.hugging_face))} cannot be used: {failure}"
        shutdown.end_all_ranks(Path(config.run_dir), message, 0, reason="config error")
    return converted_to


def another_tokenizer(start: Start, config: Config, loader: TrainLoader) -> str:
    """On rank 0, a warning where a new run's weights were trained with another tokenizer than data.tokenizer."""
    weights = start.adapters or start.init_from or (start.hugging_face[0] if len(start.hugging_face) == 1 else None)
    if dist.get_rank() or start.resume is not None or weights is None:
        return ""
    if vocabulary.trained_with(weights) in (None, loader.manifest[vocabulary.TOKENIZER]):
        return ""
    return (
        f"warning: {weights} was trained with another tokenizer than {config.data.tokenizer}, so that each word means "
        "another one to it: set model.tokenizer to the old one."
    )


def build(config: Config, device: str, precision: str) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """This rank's part of the model with random weights, and its optimizer. Collective. Raises ConfigError."""
    settings, optim, schedule = config.train, config.optim, getattr(config.schedule, config.stage)
    if config.transformer.get("tp_comm_overlap"):
        gpu.initialize_user_buffers(config, precision)
    model = build_model(
        config.model,
        config.parallel,
        device,
        precision,
        config.transformer,
        gpu.ddp_settings(config, device),
        freeze=lambda name: is_frozen(name, optim, config.model.tie_embeddings, config.lora.rank > 0),
        dropout=schedule.hidden_dropout,
        response_dropout=schedule.response_dropout,
        vision_chunk_crops=settings.vision_chunk_crops,
        vision_recompute=settings.vision_recompute,
        vit_fp8=settings.vit_fp8,
        lora=config.lora,
        seed=settings.seed,
    )
    parameters = [named for chunk in unwrap_model(model) for named in global_names(chunk)]
    check_frozen([name for name, _ in parameters], sum(p.requires_grad for _, p in parameters), optim)
    return model, build_optimizer(config, model, precision)


def resume(
    path: Path,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    position: Position,
    log: RunLog,
    config_yaml: str,
    lora: LoraConfig,
    base: Path | None,
) -> tuple[list[Path], dict]:
    """Continue from a checkpoint of this run. Collective.

    base: with LoRA, the weights beside the adapters, which have to be those that the checkpoint was trained with.
    Returns the loader states of all data-parallel replicas, and the checkpoint's marker (loop.save writes it). Raises
    ConfigError.
    """
    lora_base.refuse_other_adapters(path, lora)
    if base is not None:
        lora_base.refuse_other_base(path, base)
    marker, fresh = checkpoint.load(path, model, optimizer)
    position.step, position.tokens_seen = marker["step"], marker.get("tokens_seen", 0)
    loader_states = checkpoint.loader_states(path)
    if not loader_states:
        raise ConfigError(
            f"checkpoint {path} has no state of the training data: use train.init_from to start from its weights alone."
        )
    log.say(f"resumed step {position.step} from {path}")
    changed = agreement.changed_settings(saved_settings(path), yaml.safe_load(config_yaml))
    changed = [change for change in changed if not change.startswith(("run_dir ", "name "))]
    if changed:
        log.say(f"settings that are not those of the checkpoint: {'; '.join(changed)}")
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, fresh)
    names = sorted({name for names in everybodys for name in names})
    if names:
        log.say(
            f"{len(names)} parameters were frozen before; their optimizer state starts fresh: {', '.join(names[:4])}"
            + (" and others" if len(names) > 4 else "")
        )
    return loader_states, marker


def saved_settings(path: Path) -> dict:
    """The configuration that a checkpoint was saved with; empty if it cannot be read."""
    try:
        found = yaml.safe_load((path / "config.yaml").read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def make_loaders(
    config: Config, sources: list[Source], replica: dist.ProcessGroup, saved: list[Path]
) -> tuple[TrainLoader | None, ValidationLoader | None]:
    """(training, validation) loaders on the first rank of a replica, (None, None) elsewhere.

    saved: the loader states of the checkpoint to continue. Raises ConfigError.
    """
    if dist.get_rank() != dist.get_process_group_ranks(replica)[0]:
        return None, None
    common = dict(
        data=config.data,
        vision=config.model.vision,
        sources=sources,
        rank=parallel_state.get_data_parallel_rank(),
        world_size=parallel_state.get_data_parallel_world_size(),
        micro_batch_size=config.train.micro_batch_size,
    )
    validation = validation_loader(**common) if config.train.validation_batches else None
    group, restart = parallel_state.get_data_parallel_group(), config.train.restart_data
    micro_batches = steps_micro_batches(config)
    train = train_loader(**common, data_parallel_group=group, saved=saved, restart=restart, micro_batches=micro_batches)
    return train, validation


def steps_micro_batches(config: Config) -> int:
    """Micro-batches of a step on each data-parallel replica."""
    at_once = config.train.micro_batch_size * parallel_state.get_data_parallel_world_size()
    return config.train.global_batch_size // at_once


@contextlib.contextmanager
def loader_errors(*loaders: Loader | None) -> Iterator[None]:
    """Raise WorkerDied for an error of a step during which a worker process of one of the loaders has died.

    Torch raises a plain RuntimeError for it wherever the main thread happens to be (SIGCHLD). And raise DataLost where
    the storage of the data has an error, which is no wrong setting once a run trains.
    """
    try:
        yield
    except StorageError as error:
        raise DataLost(error) from error
    except RuntimeError as error:
        shutdown.ignore_ended_children()
        for loader in loaders:
            if loader is not None and (pid := loader.dead_worker()) is not None:
                raise WorkerDied(pid) from error
        raise


def finish(run: Run, reason: str, why: str) -> None:
    """Say how the run ended, close everything, and draw report.html if asked. Collective. why: a sentence, or ""."""
    step = run.position.step
    details = f", {why}" if why else ""
    run.log.say(f"{run.config.stage} ended at step {step} ({reason}{details}): {run.position.tokens_seen:,} tokens")
    if run.log.main:
        shutdown.write_ended(run.run_dir, reason, step, why)
    for line in run.data.lines():
        run.log.say(f"data of {line}")
    run.log.close()
    run.stacks.close()
    run.times.close()
    dist.barrier()
    dist.destroy_process_group()
    if run.saver.uploads is not None:  # the other ranks need not wait
        run.saver.uploads.finish(run.log.say)
        run.log.add("uploads", step, run.saver.uploads.record())
    if run.log.main and run.config.train.report:
        from molmo2_nemo.report import write_report  # matplotlib is needed here alone

        try:
            write_report([run.run_dir], run.run_dir / "report.html")
        except Exception as error:
            run.log.say(f"no report: {error}")
