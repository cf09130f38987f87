"""From a command line to the typed configuration. Imports neither torch nor Megatron."""

import contextlib
import dataclasses
import difflib
import functools
import re
import sys
import typing
from pathlib import Path

from omegaconf import MISSING, DictConfig, OmegaConf

from molmo2_nemo import storage
from molmo2_nemo.config.errors import ConfigError, refuse
from molmo2_nemo.config.flags import HYDRA, refuse_flags
from molmo2_nemo.config.schema import STAGES, Config, DataConfig
from molmo2_nemo.environment import quiet_libraries, set_cpu_environment, set_gpu_environment
from molmo2_nemo.paths import CONF_DIR, PACKAGE

HARDWARE_AUTO = "hardware=auto"


def prepare(arguments: list[str]) -> list[str]:
    """Set up the environment and register the schema; returns the words for Hydra. A mistyped override ends the program
    with one sentence."""
    quiet_libraries()
    set_gpu_environment()
    set_cpu_environment()
    try:
        refuse_flags(arguments)
        arguments = quoted(arguments)
        refuse_unknown_overrides(arguments)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    register()
    return arguments


def compose(config_name: str, overrides: list[str]) -> Config:
    """The configuration that a recipe would get from these overrides. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    overrides = quoted(overrides)
    overrides = finetune_words(overrides) if config_name == "finetune" else overrides
    refuse_unknown_overrides(overrides)
    if not (CONF_DIR / f"{config_name}.yaml").is_file():
        raise ConfigError(
            f"--config-name {config_name}: conf/ has no {config_name}.yaml; use {', '.join(STAGES[:-1])} or"
            f" {STAGES[-1]}."
        )
    register()
    GlobalHydra.instance().clear()
    try:
        with _without_plugins(), initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return to_dataclass(hydra_compose(config_name, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        key, reason = getattr(cause, "full_key", None), str(cause).strip().splitlines()[0]
        raise ConfigError(f"{key + ': ' if key else 'the configuration cannot be read: '}{reason}") from error


@contextlib.contextmanager
def _without_plugins():
    """Hydra imports whatever it finds in the package hydra_plugins, such as a client of storage services.

    Composing needs none of it.
    """
    hidden = "hydra_plugins" not in sys.modules
    if hidden:
        sys.modules["hydra_plugins"] = None  # so that importing it fails, which Hydra takes for no plugins
    try:
        yield
    finally:
        if hidden:
            del sys.modules["hydra_plugins"]


@functools.cache
def register() -> None:
    """Store `Config` as the schema that the defaults list of conf/base.yaml begins with; once in a process."""
    from hydra.core.config_store import ConfigStore

    schema = OmegaConf.structured(Config)
    for group in (schema.transformer, schema.optimizer, schema.ddp, schema.data.own, schema.data.own_weights):
        # Keys of the first three are fields of Megatron's classes; `check_megatron_fields` refuses unknown ones. Those
        # of the others are names that the user gives.
        OmegaConf.set_struct(group, False)
    ConfigStore.instance().store(name="molmo2_nemo_schema", node=schema)


def quoted(words: list[str]) -> list[str]:
    """The words, with quotes around values that Hydra's grammar does not read without them: paths with other letters
    than those of English, with brackets, or with commas."""
    return [_quoted(word) for word in words]


def _quoted(word: str) -> str:
    key, equal, value = word.partition("=")
    if not equal or word.startswith("-") or re.fullmatch(r"[\w./:+\- ]*", value, re.ASCII) or value[0] in "'\"[{$":
        return word
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    with contextlib.suppress(HydraException):
        is_sweep = OverridesParser.create().parse_override(word).is_sweep_override()
        if not is_sweep or "/" not in value:  # of a path with a comma
            return word
    inside = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{inside}'"


def finetune_words(words: list[str]) -> list[str]:
    """data.NAME=FOLDER of recipes/finetune.py as data.own.NAME=FOLDER; the first NAME is that of the run unless one is
    given. lora.rank=N is of tune=lora, for the rates that go with it, and lora.rank=0 of tune=full.

    A NAME that is nearly a key of `data` is left as it is, to be refused, unless its value is a folder. ConfigError:
    tune and lora.rank contradict each other.
    """
    found, names = [], []
    keys = [field.name for field in dataclasses.fields(DataConfig)]
    for word in words:
        match = re.fullmatch(r"data\.(own\.)?([A-Za-z_][\w-]*)=(.*)", word, re.DOTALL | re.ASCII)
        if match and not match[1]:
            is_key = match[2] in keys
            is_folder = Path(match[3].strip("'\"")).expanduser().is_dir()
            if is_key or not is_folder and difflib.get_close_matches(match[2], keys, n=1, cutoff=0.8):
                match = None
        names += [match[2]] if match else []
        found.append(f"data.own.{match[2]}={match[3]}" if match else word)
    given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    # At the beginning: Hydra takes no settings behind an option such as --cfg job.
    found = [f"name={names[0]}", *found] if names and "name" not in given else found
    rank, tune = given.get("lora.rank"), given.get("tune")
    if rank is None:
        return found
    if tune is None:
        return ["tune=full" if rank == "0" else "tune=lora", *found]
    refuse(
        (tune == "lora") == (rank == "0"),
        f"tune={tune} lora.rank={rank}: {'LoRA has a rank' if rank == '0' else 'only tune=lora has adapters'};"
        " leave one of the two out.",
    )
    return found


def take_gpus(words: list[str]) -> tuple[int, list[str]]:
    """(N of gpus=N, the other words). Raises ConfigError."""
    given = [word for word in words if word.startswith("gpus=")]
    if not given:
        raise ConfigError("gpus has no value: say how many GPUs the run gets, gpus=8.")
    number = given[-1].removeprefix("gpus=")
    if not re.fullmatch(r"[1-9]\d{0,5}", number):
        raise ConfigError(f"gpus={number} is not a number of GPUs: use gpus=8.")
    return int(number), [word for word in words if not word.startswith("gpus=")]


def refuse_unknown_overrides(arguments: list[str]) -> None:
    """Raise ConfigError for the first `key=value` whose key is not in the schema or whose option has no file.

    Also for a sweep of several settings, of which only the first would be trained, and for hardware=auto, which
    finetune.py has replaced where it is possible.
    """
    refuse(
        HARDWARE_AUTO in arguments,
        f"{HARDWARE_AUTO} is for recipes/finetune.py, and for tools/plan.py and tools/rehearse.py --config-name"
        " finetune: name a preset, such as hardware=h100_8, or see tools/plan.py --search.",
    )
    sweep = not {"-m", "--multirun"}.isdisjoint(arguments)
    refuse(sweep, "--multirun: a process trains once; start one recipe for each setting.")
    takes_value = False
    for argument in arguments:
        if takes_value or argument.startswith("-"):
            takes_value = not takes_value and HYDRA.get(argument, False)
            continue
        refuse(argument.startswith("="), f"{argument} has no key: settings are written KEY=VALUE.")
        refuse(
            "=" not in argument and not argument.startswith("~"),
            f"{argument} has no value: settings are written KEY=VALUE, without blanks around the =.",
        )
        taken_away = argument.removeprefix("~")
        refuse(
            argument.startswith("~") and (CONF_DIR / taken_away).is_dir(),
            f"{argument} takes away a part that every run needs: choose another with {taken_away}=NAME.",
        )
        match = re.fullmatch(r"(\+{0,2}|~)([A-Za-z_][\w./]*)(?:@[\w.]+)?(?:=(.*))?", argument, re.DOTALL)
        if match is None or match[3] is None:
            continue
        key, value = match[2], match[3]
        if (CONF_DIR / key).is_dir():
            options = sorted(path.stem for path in (CONF_DIR / key).glob("*.yaml"))
            elsewhere = [group.parent.name for group in sorted(CONF_DIR.glob(f"*/{value}.yaml"))]
            advice = f"use {elsewhere[0]}={value}" if elsewhere else f"choose one of {', '.join(options)}"
            refuse(
                value not in options and "," not in value, f"{key}={value}: conf/{key} has no {value}.yaml; {advice}."
            )
            continue
        if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
            continue
        cls, path = Config, key.split(".")
        for depth, name in enumerate(path):
            if not dataclasses.is_dataclass(cls):
                break  # a dictionary with any keys: Megatron's fields, or rope_scaling
            types = {f.name: f.type for f in dataclasses.fields(cls)}
            if name not in types:
                where = ".".join(path[:depth])
                close = difflib.get_close_matches(name, types, n=1, cutoff=0.5)
                known = (
                    f"did you mean {'.'.join([*path[:depth], close[0]])}" if close else f"known are {', '.join(types)}"
                )
                raise ConfigError(
                    f"{key}={storage.shown(value)}: {where or 'the configuration'} has no key {name}; {known}."
                )
            cls = next((kind for kind in typing.get_args(types[name]) if dataclasses.is_dataclass(kind)), types[name])
        else:
            if not match[1] and not dataclasses.is_dataclass(cls):
                refuse_value(cls, argument)


def refuse_value(kind: type, argument: str) -> None:
    """Raise ConfigError where the override `argument` gives a field of this type a value of another one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if "${" in argument:  # a reference, of which Hydra finds the value
        return
    field = dataclasses.make_dataclass("Field", [("value", kind, dataclasses.field(default=MISSING))])
    try:
        OmegaConf.structured(field).value = OverridesParser.create().parse_override(argument).value()
    except (HydraException, OmegaConfBaseException) as error:
        key, _, value = argument.partition("=")
        value, may_be_shown = value.strip("'\""), storage.shown(value.strip("'\""))  # not a password or a signature
        reason = str(error).strip().splitlines()[0].replace("field 'value' is not Optional", "it cannot be null")
        reason = re.sub("Invalid value assigned: .* is not a ListConfig.*", "it is no list, such as [1,2]", reason)
        said = f"{key}={may_be_shown}: {reason.replace(value, may_be_shown)}"
        raise ConfigError(f"{said}; docs/settings.md has its type.") from error


def to_dataclass(cfg: DictConfig) -> Config:
    """The typed configuration. Raises ConfigError naming the first key without a value."""
    if not OmegaConf.is_missing(cfg, "stage") and cfg.stage == "finetune" and cfg.schedule.finetune is None:
        raise ConfigError("this schedule says nothing about fine-tuning: use schedule=finetune or schedule=quickstart.")
    if cfg.model.hf_path is not None:
        refuse(
            storage.is_remote(cfg.model.hf_path),
            f"model.hf_path={storage.shown(cfg.model.hf_path)} is an address, and the architecture is read from a"
            f" folder: name a local copy, or use model=NAME train.init_from={storage.shown(cfg.model.hf_path)}.",
        )
        fill_from_hf(cfg)
    elif not OmegaConf.is_missing(cfg.model, "name") and cfg.model.name == "hf":
        raise ConfigError("model.hf_path has no value: name a Hugging Face folder, model.hf_path=DIR.")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: set it on the command line, {missing[0]}=VALUE.")
    config = OmegaConf.to_object(cfg)
    config.model.tokenizer = tokenizer_location(config.model.tokenizer)
    config.data.tokenizer = tokenizer_location(config.data.tokenizer)
    config.train.async_checkpoint = config.train.async_checkpoint.lower()  # true is a boolean to Hydra
    return config


def tokenizer_location(name: str) -> str:
    """The path of a tokenizer. The one in molmo2_nemo/data/tokenizer is found from any working directory."""
    shipped = PACKAGE.parent / name
    return str(shipped) if not Path(name).exists() and shipped.is_dir() else name


def fill_from_hf(cfg: DictConfig) -> None:
    """Replace `cfg.model` by the architecture of `cfg.model.hf_path`, a Hugging Face folder."""
    from molmo2_nemo.hf.architecture import model_config_from_hf
    from molmo2_nemo.hf.convert import head_is_tied

    model = model_config_from_hf(Path(cfg.model.hf_path))
    tokenizer = None if OmegaConf.is_missing(cfg.model, "tokenizer") else cfg.model.tokenizer
    if tokenizer is not None:
        model.tokenizer = tokenizer
    model.hf_path = cfg.model.hf_path
    model.tie_embeddings = head_is_tied(Path(cfg.model.hf_path), model.tie_embeddings)
    OmegaConf.update(cfg, "model", OmegaConf.structured(model), merge=False)
