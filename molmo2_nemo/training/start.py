"""Where a run's weights come from: its own newest checkpoint, another one, Hugging Face folders, or nowhere
(random)."""

import contextlib
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch.distributed as dist

from molmo2_nemo import checkpoint_dir, lora_base
from molmo2_nemo.config.errors import ConfigError, refuse
from molmo2_nemo.config.schema import Config
from molmo2_nemo.files import readable_size
from molmo2_nemo.hf import base_models, convert
from molmo2_nemo.hf.architecture import model_config_from_hf
from molmo2_nemo.hf.folder import HuggingFaceWeights
from molmo2_nemo.training import agreement
from molmo2_nemo.training.step import refuse_other_architecture

# Bytes of a checkpoint from which on it is said that it is being read.
WORTH_SAYING = 2**30
# Longest that the ranks wait for the one that converts.
_CONVERSION_HOURS = 12


@dataclass
class Start:
    """What a run starts from. At most one of the first three is set; without any, weights are random.

    With LoRA, init_from or hugging_face is set in any case: the weights that the adapters belong to. Of a run that goes
    on they are those that its checkpoint names, and what is given only where these are gone.
    """

    resume: Path | None = None  # a checkpoint of this run, to be continued
    init_from: Path | None = None  # a checkpoint of which only the weights are used
    hugging_face: list[Path] = field(default_factory=list)  # folders whose weights are converted first
    adapters: Path | None = None  # a checkpoint of LoRA, whose adapters a new run begins with
    ignored: list[str] = field(default_factory=list)  # a sentence for each checkpoint of this run that is not usable


def find_start(config: Config) -> Start:
    """Newest complete checkpoint of the run directory, else train.init_from. Raises ConfigError on what cannot start.

    A run that has checkpoints, but none that is usable, is not begun anew without train.start_over=true.
    """
    folder = Path(config.run_dir) / "checkpoints"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, and the run's checkpoints go into a folder of this name: remove it.")
    resume, ignored = checkpoint_dir.latest_complete(folder)
    if resume is None and not config.train.start_over:
        if ignored:
            raise ConfigError(none_usable(folder, ignored))
        saved = last_saved_step(Path(config.run_dir))
        if saved is not None:
            raise ConfigError(
                f"run_dir={config.run_dir} has saved step {saved} (metrics.jsonl), but {folder} holds no checkpoint: "
                "restore the folder, or set train.start_over=true to begin again at step 1."
            )
    if resume is not None:
        lora_base.refuse_other_adapters(resume, config.lora)  # before weights are converted and a model is built
        base = own_base(resume)
        if base is not None or config.lora.rank == 0:
            return Start(resume=resume, init_from=base, ignored=ignored)
    given = given_weights(config)
    if given is None:
        refuse(
            config.lora.rank > 0,
            f"lora.rank={config.lora.rank} trains adapters of weights that are there: name them, as in "
            "train.init_from=/models/Molmo2-8B.",
        )
        return Start(ignored=ignored)
    try:
        start = _start_from_weights(config, ignored)
        return start if resume is None else replace(start, resume=resume, adapters=None)
    except OSError as error:
        raise ConfigError(
            f"train.init_from={given} cannot be read ({error.strerror}: {error.filename}): look at its rights and its "
            "disk."
        ) from error


def own_base(checkpoint: Path) -> Path | None:
    """The weights that a run's adapters were trained beside; None: it holds all weights, or those are not there."""
    if lora_base.lora_of(checkpoint_dir.read_marker(checkpoint)) is None:
        return None
    try:
        return lora_base.find_base(checkpoint)
    except ConfigError:
        return None


def given_weights(config: Config) -> str | list[str] | None:
    """Where a new run's weights are: train.init_from; with LoRA also the folder that the architecture is read from."""
    if config.train.init_from is None and config.lora.rank > 0:
        return config.model.hf_path
    return config.train.init_from


def _start_from_weights(config: Config, ignored: list[str]) -> Start:
    given = given_weights(config)
    if isinstance(given, list):
        llm, vision = (Path(folder) for folder in given)
        base_models.check_base_models(llm, vision, config.model)
        return Start(hugging_face=[llm, vision], ignored=ignored)
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
        return Start(hugging_face=[path], ignored=ignored)
    if path.is_dir() and not any(path.iterdir()):
        raise ConfigError(
            f"train.init_from={given} is an empty folder: name a checkpoint, a run, or a Hugging Face folder."
        )
    init_from = checkpoint_dir.resolve(given)
    if lora_base.lora_of(checkpoint_dir.read_marker(init_from)) is None:
        return Start(init_from=init_from, ignored=ignored)
    lora_base.refuse_other_adapters(init_from, config.lora)
    return Start(init_from=lora_base.find_base(init_from), adapters=init_from, ignored=ignored)


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


def none_usable(folder: Path, ignored: list[str]) -> str:
    """The message where every checkpoint of a run is damaged."""
    return (
        f"none of the {len(ignored)} checkpoint(s) in {folder} can be used; the newest: {ignored[0]} Restore one, or "
        "set train.start_over=true to begin again at step 1 (they are kept in another folder)."
    )


def agree(config: Config, start: Start) -> tuple[Start, str | None]:
    """What all ranks start from: rank 0's choice, with its checksums compared, each rank a part of the files.

    A checkpoint that is damaged gets a file that says so (checkpoint_dir.DAMAGED), and the one before is taken. Returns
    the start, or beside it one sentence on why there is none. Collective.
    """
    folder = Path(config.run_dir) / "checkpoints"
    agreed = [start]
    dist.broadcast_object_list(agreed)
    [start] = agreed
    if start.resume is not None and (unseen := agreement.visible(start.resume)) is not None:
        return start, unseen
    start.resume, ignored = newest_verified(folder, start.resume, config.train.verify_checkpoints)
    start.ignored += ignored
    if start.resume is None and start.ignored:
        if not config.train.start_over:
            return start, none_usable(folder, start.ignored)
        failure = [None]
        if dist.get_rank() == 0:
            try:
                set_aside(folder)
            except OSError as error:
                failure = [f"{folder} cannot be given another name ({error}): move what is in it elsewhere."]
        dist.broadcast_object_list(failure)
        if failure[0] is not None:
            return start, failure[0]
        start = replace(find_start(config), ignored=start.ignored)
    read = [path for path in (start.init_from, start.adapters) if path is not None and config.train.verify_checkpoints]
    return start, next((damage for damage in map(verified, read) if damage is not None), None)


def newest_verified(folder: Path, path: Path | None, verify: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint `path`, or else the newest before it that is whole, and a sentence for each that is not.

    One whose checksums are wrong is marked (checkpoint_dir.DAMAGED). verify: compare them. Collective; path: the same
    on all ranks.
    """
    ignored = []
    while path is not None and verify and (damage := verified(path)) is not None:
        found = [None, None]
        if dist.get_rank() == 0:
            checkpoint_dir.mark_damaged(path, damage)
            older = [other for other in checkpoint_dir.find_checkpoints(folder) if other < path]
            found = list(checkpoint_dir.newest_usable(older))
        dist.broadcast_object_list(found)
        path, others = found
        ignored += [damage, *others]
    return path, ignored


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
    patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=_CONVERSION_HOURS))
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
