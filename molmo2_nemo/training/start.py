"""Where a run's weights come from: its own newest checkpoint, another one, Hugging Face folders, or nowhere
(random)."""

import contextlib
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist

from molmo2_nemo import checkpoint_dir, lora_base, remote_checkpoints, storage
from molmo2_nemo.config.errors import ConfigError, refuse
from molmo2_nemo.config.schema import Config
from molmo2_nemo.files import readable_size
from molmo2_nemo.hf import base_models, convert
from molmo2_nemo.hf.architecture import model_config_from_hf
from molmo2_nemo.hf.folder import HuggingFaceWeights
from molmo2_nemo.remote_checkpoints import Remote
from molmo2_nemo.storage import StorageError, Unreachable, shown
from molmo2_nemo.training import agreement
from molmo2_nemo.training.step import refuse_other_architecture

# Bytes of a checkpoint from which on it is said that it is being read.
WORTH_SAYING = 2**30
# Longest that the ranks wait for the one that converts.
_CONVERSION_HOURS = 12


@dataclass
class Start:
    """What a run starts from. At most one of the first four is set; without any, weights are random.

    With LoRA, init_from or hugging_face is set in any case: the weights that the adapters belong to. Of a run that goes
    on they are those that its checkpoint names, and what is given only where these are gone. What is in object storage
    is fetched by `agree`.
    """

    resume: Path | None = None  # a checkpoint of this run, to be continued
    remote: Remote | None = None  # the same in object storage
    init_from: Path | None = None  # a checkpoint of which only the weights are used
    hugging_face: list[Path] = field(default_factory=list)  # folders whose weights are converted first
    adapters: Path | None = None  # a checkpoint of LoRA, whose adapters a new run begins with
    ignored: list[str] = field(default_factory=list)  # a sentence for each checkpoint of this run that is not usable
    halves: list[str] = field(default_factory=list)  # a sentence for each upload that was interrupted
    is_open: bool = False  # the weights are still to be found, by what is fetched


@dataclass
class Newest:
    """The newest whole checkpoint of a run, on disk or in object storage, or neither; and sentences on newer ones."""

    here: Path | None = None
    there: Remote | None = None
    ignored: list[str] = field(default_factory=list)  # damaged ones
    halves: list[str] = field(default_factory=list)  # uploads that were interrupted


def find_start(config: Config) -> Start:
    """Newest complete checkpoint of the run directory, else train.init_from. Raises ConfigError on what cannot start.

    A run that has checkpoints, but none that is usable, is not begun anew without train.start_over=true.
    """
    folder = Path(config.run_dir) / "checkpoints"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, and the run's checkpoints go into a folder of this name: remove it.")
    address = remote_checkpoints.folder_of(config)
    own = newest(folder, address)
    start = Start(resume=own.here, remote=own.there, ignored=own.ignored, halves=own.halves)
    is_own = own.here is not None or own.there is not None
    if not is_own and not config.train.start_over:
        if own.ignored:
            raise ConfigError(none_usable(folder, own.ignored, address))
        saved = last_saved_step(Path(config.run_dir))
        if saved is not None:
            raise ConfigError(
                f"run_dir={config.run_dir} has saved step {saved} (metrics.jsonl), but {folder} holds no checkpoint: "
                "restore the folder, or set train.start_over=true to begin again at step 1."
            )
    if own.here is not None:
        lora_base.refuse_other_adapters(own.here, config.lora)  # before weights are converted and a model is built
        base = own_base(own.here)
        if base is not None or config.lora.rank == 0:
            return replace(start, init_from=base)
    if own.there is not None:
        return replace(start, is_open=config.lora.rank > 0)
    given = given_weights(config)
    if given is None:
        refuse_lora_alone(config)
        return start
    if any(map(storage.is_remote, given if isinstance(given, list) else [given])):
        return replace(start, is_open=True)
    try:
        return _with_weights(start, _start_from_weights(config))
    except OSError as error:
        raise ConfigError(
            f"train.init_from={given} cannot be read ({error.strerror}: {error.filename}): look at its rights and its "
            "disk."
        ) from error


def refuse_lora_alone(config: Config) -> None:
    """Refuse adapters without weights that they belong to. Raises ConfigError."""
    refuse(
        config.lora.rank > 0,
        f"lora.rank={config.lora.rank} trains adapters of weights that are there: name them, as in "
        "train.init_from=/models/Molmo2-8B.",
    )


def own_base(checkpoint: Path) -> Path | None:
    """The weights that a run's adapters were trained beside; None: it holds all weights, or those are not there."""
    if lora_base.lora_of(checkpoint_dir.read_marker(checkpoint)) is None:
        return None
    try:
        return lora_base.find_base(checkpoint)
    except ConfigError:
        return None


def _with_weights(start: Start, weights: Start) -> Start:
    """A start with the weights of another one; the adapters are those of the run's own checkpoint, if it has one."""
    is_own = start.resume is not None or start.remote is not None
    return replace(
        start,
        init_from=weights.init_from,
        hugging_face=weights.hugging_face,
        adapters=None if is_own else weights.adapters,
        is_open=False,
    )


def newest(folder: Path, address: str | None, here_below: int | None = None, there_below: int | None = None) -> Newest:
    """What a run can go on from: of the same step, the checkpoint on disk. below: only those of earlier steps.

    StorageError where the storage cannot be read and there is none on disk.
    """
    found = checkpoint_dir.find_checkpoints(folder)
    here, ignored = checkpoint_dir.newest_usable(
        [path for path in found if here_below is None or checkpoint_dir.step_of(path) < here_below]
    )
    if address is None:
        return Newest(here, None, ignored)
    try:
        with storage.named("train.upload_to"):
            there, damaged, halves = remote_checkpoints.newest(address, there_below)
    except StorageError as error:
        if here is None:
            raise
        return Newest(here, None, [*ignored, f"object storage, which may have a newer checkpoint: {error}"])
    if here is not None and (there is None or there.step <= checkpoint_dir.step_of(here)):
        return Newest(here, None, ignored)
    return Newest(None, there, ignored + damaged, halves)


def given_weights(config: Config) -> str | list[str] | None:
    """Where a new run's weights are: train.init_from; with LoRA also the folder that the architecture is read from."""
    if config.train.init_from is None and config.lora.rank > 0:
        return config.model.hf_path
    return config.train.init_from


def _start_from_weights(config: Config) -> Start:
    given = given_weights(config)
    if isinstance(given, list):
        llm, vision = (Path(folder) for folder in given)
        base_models.check_base_models(llm, vision, config.model)
        return Start(hugging_face=[llm, vision])
    path = Path(given)
    if path.is_file():
        raise ConfigError(f"train.init_from={given} is a file: name a checkpoint, a run, or a Hugging Face folder.")
    kind = None if (path / checkpoint_dir.MARKER).exists() else base_models.model_type(path)
    if kind in base_models.LANGUAGE_MODELS + base_models.VISION_MODELS:
        raise ConfigError(
            f"train.init_from={given} is a {kind}, half a model: give both, 'train.init_from=[LLM_DIR,SIGLIP2_DIR]'."
        )
    if kind is not None:
        found = model_config_from_hf(path)
        found.tie_embeddings = convert.head_is_tied(path, found.tie_embeddings)
        refuse_other_architecture(found, config.model, path)
        HuggingFaceWeights(path)
        return Start(hugging_face=[path])
    if path.is_dir() and not any(path.iterdir()):
        raise ConfigError(
            f"train.init_from={given} is an empty folder: name a checkpoint, a run, or a Hugging Face folder."
        )
    init_from = checkpoint_dir.resolve(given)
    if lora_base.lora_of(checkpoint_dir.read_marker(init_from)) is None:
        return Start(init_from=init_from)
    lora_base.refuse_other_adapters(init_from, config.lora)
    return Start(init_from=lora_base.find_base(init_from), adapters=init_from)


def last_saved_step(run_dir: Path) -> int | None:
    """The step of the newest checkpoint that the run's metrics.jsonl tells of; None: it tells of none."""
    saved = None
    try:
        with (run_dir / "metrics.jsonl").open(errors="replace") as lines:
            for line in lines:
                if '"kind": "checkpoint"' not in line:
                    continue
                # A line that a kill has cut, or that somebody has written.
                with contextlib.suppress(ValueError, RecursionError, AttributeError):
                    record = json.loads(line)
                    saved = saved if record.get("failed") else record.get("saved_step", record.get("step", saved))
    except OSError:
        pass
    return saved


def none_usable(folder: Path, ignored: list[str], address: str | None = None) -> str:
    """The message where every checkpoint of a run is damaged."""
    where = folder if address is None else f"{folder} and {shown(address)}"
    return (
        f"none of the {len(ignored)} checkpoint(s) in {where} can be used; the newest: {ignored[0]} Restore one, or "
        "set train.start_over=true to begin again at step 1 (they are kept in another folder)."
    )


def agree(config: Config, start: Start) -> tuple[Start, str | ConfigError | None]:
    """What all ranks start from: rank 0's choice, with its checksums compared, each rank a part of the files.

    A checkpoint that is damaged gets a file that says so (checkpoint_dir.DAMAGED), and the one before is taken. Returns
    the start, or beside it one sentence on why there is none, which Unreachable may be. Collective.
    """
    folder, address = Path(config.run_dir) / "checkpoints", remote_checkpoints.folder_of(config)
    agreed = [start]
    dist.broadcast_object_list(agreed)
    [start] = agreed
    if (apart := agreement.shared(Path(config.run_dir))) is not None:
        return start, apart
    if start.resume is not None and (unseen := agreement.visible(start.resume)) is not None:
        return start, unseen
    verify = config.train.verify_checkpoints
    try:
        start.resume, ignored = newest_verified(folder, start.resume, verify, address, start.remote)
        start.remote, start.ignored = None, start.ignored + ignored
        if start.resume is None and start.ignored:
            start = _anew(config, start, folder, address)
        if start.is_open:
            start = _with_fetched_weights(config, start)
    except ConfigError as error:  # on all ranks
        return start, error
    # With LoRA, the weights beside the adapters are read, too.
    read = [path for path in (start.init_from, start.adapters) if path is not None and verify]
    return start, next((damage for damage in map(verified, read) if damage is not None), None)


def _anew(config: Config, start: Start, folder: Path, address: str | None) -> Start:
    """The start of a run whose checkpoints are all damaged, if train.start_over says so. Collective.

    Raises ConfigError on all ranks.
    """
    if not config.train.start_over:
        raise ConfigError(none_usable(folder, start.ignored, address))
    found = [None, None]
    if dist.get_rank() == 0:
        try:
            if folder.exists():
                set_aside(folder)
            found[0] = replace(find_start(config), ignored=start.ignored)
        except ConfigError as error:
            found[1] = str(error)
        except OSError as error:
            found[1] = f"{folder} cannot be given another name ({error}): move what is in it elsewhere."
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise ConfigError(found[1])
    return found[0]


def newest_verified(
    folder: Path,
    path: Path | None,
    verify: bool,
    address: str | None = None,
    remote: Remote | None = None,
) -> tuple[Path | None, list[str]]:
    """The checkpoint `path` or `remote`, or else the newest whole one before it, and a sentence for each that is not.

    One whose checksums are wrong is marked (checkpoint_dir.DAMAGED). verify: compare them. address: of the run's
    checkpoints in object storage, from which one is fetched that is newer than those on disk. Collective; arguments are
    the same on all ranks. Raises ConfigError on all ranks where one cannot be fetched.
    """
    ignored, here_below, there_below = [], None, None
    while path is not None or remote is not None:
        if remote is not None:
            path, there_below = folder / checkpoint_dir.step_name(remote.step), remote.step
            damage = _fetched(lambda: remote_checkpoints.fetch(remote, path, _say))
            where = remote.address
        else:
            damage, here_below = verified(path) if verify else None, checkpoint_dir.step_of(path)
        if damage is None:
            return path, ignored
        found = [None]
        if dist.get_rank() == 0:
            if remote is not None:
                remote_checkpoints.mark_damaged(where, damage)
            else:
                checkpoint_dir.mark_damaged(path, damage)
            try:
                found[0] = newest(folder, address, here_below, there_below)
            except StorageError as error:
                found[0] = Newest(ignored=[str(error)])
        dist.broadcast_object_list(found)
        path, remote = found[0].here, found[0].there
        ignored += [damage, *found[0].ignored]
    return None, ignored


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def _fetched(fetch: Callable[[], None]) -> str | None:
    """Let rank 0 `fetch`, while the others wait. Collective.

    Returns a sentence where what came was damaged, and raises ConfigError, on all ranks, where it could not be fetched.
    """
    failure = [None]
    if dist.get_rank() == 0:
        try:
            fetch()
        except remote_checkpoints.Damaged as error:
            failure = [(str(error), None)]
        except (ConfigError, OSError) as error:
            failure = [(str(error), Unreachable if isinstance(error, Unreachable) else ConfigError)]
    patient = _patient_group()
    dist.broadcast_object_list(failure, group=patient)
    dist.destroy_process_group(patient)
    if failure[0] is None:
        return None
    message, kind = failure[0]
    if kind is not None:
        raise kind(message)
    return message


def _patient_group() -> dist.ProcessGroup:
    """All ranks, which may wait in it longer than in other collectives. Collective."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=_CONVERSION_HOURS))


def _with_fetched_weights(config: Config, start: Start) -> Start:
    """The start with weights from addresses (train.init_from), of which a copy is made. Collective.

    Those that a fetched checkpoint of LoRA names are taken where they are still there. Raises ConfigError on all ranks.
    """
    given, base = given_weights(config), [None]
    if dist.get_rank() == 0 and start.resume is not None:
        base = [own_base(start.resume)]
    dist.broadcast_object_list(base)
    if base[0] is not None:
        return replace(start, init_from=base[0], is_open=False)
    if given is None:
        refuse_lora_alone(config)
    folder, several = Path(config.run_dir) / "start", isinstance(given, list)
    found, result = [], [None, None]

    def fetch():
        with storage.named(f"train.init_from={given}"):
            copies = [remote_checkpoints.local_copy(one, folder, _say) for one in (given if several else [given])]
        found.extend(map(str, copies))

    damage = _fetched(fetch)
    if damage is not None:
        raise ConfigError(damage)
    if dist.get_rank() == 0:
        init_from = found if several else found[0]
        try:
            weights = _start_from_weights(replace(config, train=replace(config.train, init_from=init_from)))
            result[0] = _with_weights(start, weights)
        except (ConfigError, OSError) as error:
            result[1] = f"train.init_from={given}: {error}"
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise ConfigError(result[1])
    return result[0]


def verified(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its checksums, the same on all ranks; None: nothing. Collective."""
    damage = None
    if dist.get_rank() == 0 and (size := checkpoint_dir.size_of(checkpoint)) > WORTH_SAYING:
        print(f"comparing {checkpoint} ({readable_size(size)}) with its checksums", flush=True)
    try:
        checkpoint_dir.verify(checkpoint, dist.get_rank(), dist.get_world_size())
    except ConfigError as error:
        damage = str(error)
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, damage)
    return next((damage for damage in everybodys if damage is not None), None)


def set_aside(folder: Path) -> Path:
    """Give a folder of checkpoints a name that no run looks at: checkpoints.1, checkpoints.2, ..."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)


def converted(folders: list[Path], config: Config, say: Callable[[str], None]) -> tuple[Path, str | None]:
    """The checkpoint of Hugging Face weights in the run's folder, and why it could not be made (None: it is there).

    Collective. Rank 0 makes it, unless an earlier start has; the others wait for up to _CONVERSION_HOURS, longer than
    other collectives may take.
    """
    checkpoint, failure = Path(config.run_dir) / "start" / checkpoint_dir.step_name(0), [None]
    patient = _patient_group()
    if dist.get_rank() == 0:
        try:
            _convert(folders, checkpoint, config, say)
        except (ConfigError, OSError) as error:
            failure[0] = str(error)
    dist.broadcast_object_list(failure, group=patient)
    dist.destroy_process_group(patient)
    return checkpoint, failure[0]


def _convert(folders: list[Path], checkpoint: Path, config: Config, say: Callable[[str], None]) -> None:
    info = {"made_of": _contents(folders), "seed": config.train.seed}
    try:
        marker = checkpoint_dir.read_marker(checkpoint)
        refuse_other_architecture(checkpoint_dir.read_model(checkpoint), config.model, checkpoint)
        if all(marker.get(key) == value for key, value in info.items()):
            return
    except ConfigError:
        pass
    say(f"making {checkpoint} of {' and '.join(map(str, folders))}; the other ranks wait")
    if len(folders) == 2:
        base_models.import_base_models(*folders, checkpoint, config.model, config.train.seed, say, info)
        return
    model = convert.import_hf(*folders, checkpoint, say, info)
    refuse_other_architecture(model, config.model, folders[0])


def _contents(folders: list[Path]) -> dict[str, int]:
    """Sizes of the files that a conversion reads, by which another model in the same folder is noticed."""
    files = [
        path
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".safetensors") and path.is_file()
    ]
    return {str(path.absolute()): path.stat().st_size for path in files}
