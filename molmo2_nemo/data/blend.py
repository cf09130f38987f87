"""Which data sets a stage trains on, how much of each, and how their samples are treated.

A blend is a YAML file, conf/blend/NAME.yaml or any other:

    weighting: sqrt                        # in proportion to the square roots of the sizes
    sources:
      chats: {path: my_chats}              # folder of Energon shards, relative to data.root
      charts: {path: my_charts, size: 10000, factor: 1.5}
                                           # size: in the place of the number of training samples; factor: of the root
or
    weighting: fixed                       # in proportion to the weights
    sources:
      captions: {path: captions, weight: 60}
      points: {path: points, weight: 40, token_weight: 0.2, high_res_probability: 0.3}
or
    weighting: size                        # in proportion to the sizes: every sample comes as often as any other
    sources:
      mine: {path: mine}
or, to give groups of sources a rate each,
    groups:
      video: {rate: 0.2, weighting: sqrt, sources: {clips: {path: clips}, films: {path: films, size: 60000}}}
      text: {rate: 0.1, weighting: fixed, sources: {chats: {path: my_chats, weight: 1}}}

Any source may have the options of `SourceOptions`. Weights and rates are of samples, not of tokens, and need not sum to
anything: weights are normalised within their group, multiplied by its rate, and normalised over all (the fine-tuning
mixture of allenai/molmo2, `launch_scripts/sft.py`, and arXiv 2601.10611).

A source is an Energon WebDataset with the split parts "train" and "val". Everything here reads a few small files and
starts nothing.
"""

import io
import math
import os
from collections import defaultdict
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config, DataConfig
from molmo2_nemo.data import own_blend
from molmo2_nemo.data.node_cache import CachedSource
from molmo2_nemo.data.node_metadata import Place, files_of, located
from molmo2_nemo.data.shard_index import read_index
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.storage import check as check_address
from molmo2_nemo.storage import is_remote, join
from molmo2_nemo.storage import read as read_address

# Times that each sample of a source may come round in a run before the start warns of it: by then a model has learned
# small sources by heart. Stage 1 has one such, pixmo-count with 36,916 pictures.
MANY_ROUNDS = 20
LOSS_WEIGHTINGS = ("flat", "root", "root_report")


@dataclass(frozen=True)
class SourceOptions:
    """How the samples of a source are treated."""

    loss_weighting: str | None = None  # flat | root | root_report; None: data.loss_weighting
    token_weight: float | None = None  # the weight of every target token instead
    high_res_probability: float = 0.0  # that a single image gets up to data.high_res_crops crops
    without_style: str | None = None  # branches of this style are left out, where a sample has others
    # Questions and chats that count get half a sentence that wants no points, as in the data of Molmo2 that people
    # answered in words (allenai/molmo2: olmo/data/pixmo_datasets.py, prefix_how_many).
    counts_without_points: bool = False


@dataclass(frozen=True)
class Source:
    """One data set of a blend; its index in the list is what Batch.source_ids hold."""

    name: str
    path: str  # absolute; the folder that has .nv-meta: the source's own, or a copy on this node
    weight: float  # share of the samples; those of a blend sum to 1
    num_samples: int  # of the split part "train"
    num_validation_samples: int = 0  # of the split part "val"
    group: str | None = None
    options: SourceOptions = SourceOptions()
    cached: CachedSource | None = field(default=None, compare=False)  # the shards, where the node's cache has them
    shards: str | None = field(default=None, compare=False)  # where they are, a folder or an address; None: in `path`
    # Split part -> shard -> number of samples; None: not read yet.
    index: dict[str, dict[str, int]] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class _Entry:
    """A source of the blend's file, whether or not it is there."""

    name: str
    path: str  # absolute, or an address
    group: str | None
    rate: float  # of the group
    weighting: str
    weight: float | None  # of weighting fixed
    size: float | None  # of weighting sqrt, as is factor
    factor: float | None
    options: SourceOptions

    def weight_in_group(self, num_samples: int) -> float:
        if self.weighting == "size":
            return num_samples
        return self.weight or (self.factor or 1.0) * math.sqrt(self.size or num_samples)


# -- the file, typed: a field's description says how to correct a value that is refused -------------------------------

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_NUMBER = "make it a number above 0, or remove it"


class _SourceDocument(BaseModel):
    """A source of any weighting. A key that is left out is None; null may be given only where the type says so."""

    model_config = _STRICT

    path: str = Field(min_length=1, description="name a folder")
    loss_weighting: Literal["flat", "root", "root_report"] | None = Field(
        None, description=f"choose {', '.join(LOSS_WEIGHTINGS)}"
    )
    high_res_probability: float = Field(0.0, ge=0, le=1, description="make it a number from 0 to 1")
    without_style: str | None = Field(None, description="name one style, such as transcript")
    counts_without_points: bool = Field(False, description="choose true or false")
    token_weight: float = Field(None, gt=0, description=_NUMBER)


class _FixedSource(_SourceDocument):
    weight: float = Field(gt=0, description="make it a number above 0")


class _SqrtSource(_SourceDocument):
    size: float = Field(None, ge=1, description="it is a number of samples, make it 1 or more")
    factor: float = Field(None, gt=0, description=_NUMBER)


class _SourcesDocument(BaseModel):
    """A blend without groups."""

    model_config = _STRICT

    sources: dict = Field(min_length=1, description="add at least one")
    weighting: Literal["fixed", "sqrt", "size"] = Field(description="choose fixed, sqrt or size")


class _GroupDocument(_SourcesDocument):
    rate: float = Field(gt=0, description="make it a number above 0")


class _GroupsDocument(BaseModel):
    """A blend with groups."""

    model_config = _STRICT

    groups: dict = Field(min_length=1, description="add at least one")


def load_blend(cfg: DataConfig) -> list[Source]:
    """The sources of `cfg.blend` with their shares, in the file's order.

    With `cfg.skip_missing`, sources without a folder (`missing_sources`) are left out: their share goes to the rest of
    their group, that of a group without any to the other groups.

    ConfigError, one sentence: a file or folder is missing, a key is unknown, missing or given twice, a value makes no
    sense, a source is empty or not prepared, or two of them are the same folder.
    """
    where, entries = _read(cfg)
    places = dict(zip(entries, located(cfg, [entry.path for entry in entries])))
    present = [entry for entry, place in places.items() if place.there]
    if len(present) < len(entries) and not (cfg.skip_missing and present):
        missing = [entry.name for entry in entries if entry not in present]
        lacking = "are not there under data.root=" if is_remote(cfg.root) else "are not on disk under data.root="
        raise ConfigError(
            f"{len(missing)} of the {len(entries)} sources of {where} {lacking}{cfg.root} "
            f"({', '.join(missing)}): {_remedy(cfg, missing, some_present=bool(present))}."
        )
    _refuse_twins(where, {entry: places[entry] for entry in present})
    indexes = [read_index(entry.name, places[entry].folder, entry.path) for entry in present]
    counts = [[sum(shards.values()) for shards in index.values()] for index in indexes]
    totals, rates = defaultdict(float), {}
    for entry, (train, *_) in zip(present, counts):
        if train == 0:
            raise ConfigError(
                f"source {entry.name} of {where} has no training samples in {entry.path}: prepare it again."
            )
        totals[entry.group] += entry.weight_in_group(train)
        rates[entry.group] = entry.rate
    return [
        Source(
            entry.name,
            str(places[entry].folder),
            entry.weight_in_group(train) / totals[entry.group] * entry.rate / sum(rates.values()),
            train,
            # What is kept of general data is not measured: the best checkpoint is the best for one's own.
            val if not cfg.own or entry.group == own_blend.OWN else 0,
            entry.group,
            entry.options,
            places[entry].cached,
            entry.path,
            index,
        )
        for entry, index, (train, val, _) in zip(present, indexes, counts)
    ]


def describe_rounds(sources: list[Source], rows: int, per_row: float | None = None) -> list[str]:
    """Lines that say how often the samples of each source come round in `rows` rows, and which come too often.

    per_row: samples of a row. None: each row is taken to hold one sample, so that these are the least; where packing
    puts several into a row, each comes round as many times more often.
    """
    rounds = {source.name: rows * (per_row or 1) * source.weight / source.num_samples for source in sources}
    listed = ", ".join(f"{name} {times:,.1f}" for name, times in rounds.items())
    many = [name for name, times in rounds.items() if times > MANY_ROUNDS]
    least = "about" if per_row else "at least"
    lines = [f"each sample comes round {least} so many times in {rows:,} rows: {listed}"]
    if many:
        lines.append(
            f"warning: {', '.join(many)} {'comes' if len(many) == 1 else 'come'} round more than {MANY_ROUNDS} times: "
            "give less weight or more data, or take fewer steps"
        )
    return lines


def missing_sources(cfg: DataConfig) -> list[str]:
    """Names of the sources of `cfg.blend` that have no folder, or of those that `cfg.keep` means. ConfigError: the file
    is wrong, as for `load_blend`."""
    if cfg.own:
        return own_blend.left_out(cfg, lambda: _read_file(cfg)[1])
    _, entries = _read(cfg)
    places = located(cfg, [entry.path for entry in entries])
    return [entry.name for entry, place in zip(entries, places) if not place.there]


def check_present(cfg: DataConfig) -> tuple[int, int]:
    """(how many sources of `cfg.blend` are on this disk, and of how many), for planning where the data need not be.

    ConfigError as for `load_blend` and `check_shards`, but not because a source is missing.
    """
    _, entries = _read(cfg)
    present = sum(place.there for place in located(cfg, [entry.path for entry in entries]))
    if present:
        check_shards(load_blend(replace(cfg, skip_missing=True)), cfg.max_error_rate)
    return present, len(entries)


def check_shards(sources: list[Source], max_error_rate: float) -> None:
    """Refuse sources of which more than `max_error_rate` of the samples are in shards that are not there.

    Training would count them as unreadable one by one. ConfigError, one sentence that names the first file.
    """
    for source in sources:
        folder, place = Path(source.path), source.shards or source.path
        parts = source.index or read_index(source.name, folder)
        found = files_of(folder, place, parts["train"] | parts["val"])
        for shards in (parts["train"], parts["val"]):
            lost = {shard: {shard, f"{shard}.idx"} - found for shard in shards}
            lost = {shard: min(files) for shard, files in lost.items() if files}
            share = sum(shards[shard] for shard in lost) / max(1, sum(shards.values()))
            if share > max_error_rate:
                raise ConfigError(
                    f"the source {source.name} lacks {len(lost)} of {len(shards)} shards with {share:.1%} of their "
                    f"samples, the first of them {join(place, min(lost.values()))},"
                    " which is more than "
                    f"data.max_error_rate={max_error_rate} allows: fetch or prepare it again."
                )


def check_held_out(config: Config, sources: list[Source]) -> None:
    """Refuse to measure one's own data where none of it is held out. ConfigError, one sentence."""
    train, data = config.train, config.data
    asked = [key for key in ("save_best", "generate_every", "validation_batches") if getattr(train, key)]
    if data.own and asked and not any(source.num_validation_samples for source in sources):
        off = {"save_best": "null", "generate_every": "0", "validation_batches": "0"}
        ways = " ".join(f"train.{key}={off[key]}" for key in asked)
        raise ConfigError(
            f"train.{asked[0]}={getattr(train, asked[0])} needs held-out samples, and {data.said} has none: prepare it"
            f" again with tools/prepare.py --split 90/5/5, or set {ways}."
        )


def metadataset(sources: list[Source]) -> dict:
    """The blend as an Energon MetadatasetV2, splits train and val.

    A document and no file: ranks of several nodes would write the same one, each with folders of its own node.
    """

    def entries(chosen: list[Source]) -> dict:
        return {"blend": [{"weight": s.weight, "path": s.path, "subflavors": {"source": s.name}} for s in chosen]}

    held_out = [source for source in sources if source.num_validation_samples]
    splits = {"train": entries(sources)} | ({"val": entries(held_out)} if held_out else {})
    return {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}


def _refuse_twins(where: str, places: dict[_Entry, Place]) -> None:
    """Energon would read the same folder twice in the identical order. ConfigError, one sentence."""
    folders = {}
    for entry, place in places.items():
        twin = folders.setdefault(place.real, entry.name)
        if twin != entry.name:
            raise ConfigError(
                f"{where} lists {entry.path} twice, as {twin} and {entry.name}: keep one, with the sum of their weights"
                " or factors."
            )


def _read(cfg: DataConfig) -> tuple[str, list[_Entry]]:
    """What to call the blend in messages, and its sources, checked as far as possible without looking at them."""
    if cfg.own:
        where, blend = cfg.said, own_blend.document(cfg, lambda: _read_file(cfg)[1])
    else:
        where, blend = _read_file(cfg)
    if isinstance(blend, dict) and "groups" in blend:
        entries = []
        for name, document in _typed(_GroupsDocument, blend, where).groups.items():
            within = f"{where}, group {name},"
            group = _typed(_GroupDocument, document, within)
            entries += _read_sources(cfg, group, within, str(name), group.rate)
    else:
        entries = _read_sources(cfg, _typed(_SourcesDocument, blend, where), where, None, 1.0)
    names = set()
    for entry in entries:
        if entry.name in names:
            raise ConfigError(f"{where} has the source {entry.name} in two groups: rename one.")
        names.add(entry.name)
    return where, entries


def _read_file(cfg: DataConfig) -> tuple[str, object]:
    """What to call the file of `cfg.blend` in messages, and what it holds."""
    if is_remote(cfg.blend):
        check_address(cfg.blend, "data.blend")
        where, file = f"data.blend={cfg.blend}", io.BytesIO(read_address(cfg.blend))
    else:
        file = _blend_file(cfg.blend)
        where = f"data.blend={cfg.blend} ({file})"
    try:
        # Unlike PyYAML, OmegaConf refuses a key that is given twice.
        return where, OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from error


def _read_sources(cfg: DataConfig, group: _SourcesDocument, where: str, name: str | None, rate: float) -> list[_Entry]:
    """The sources of one group, or of a blend without groups."""
    entries = []
    for source, document in group.sources.items():
        kind = {"fixed": _FixedSource, "sqrt": _SqrtSource, "size": _SourceDocument}[group.weighting]
        within = f"{where}, source {source},"
        typed = _typed(kind, document, within, f"{where}, source {source} of weighting={group.weighting},")
        options = SourceOptions(**{field.name: getattr(typed, field.name) for field in fields(SourceOptions)})
        numbers = (getattr(typed, key, None) for key in ("weight", "size", "factor"))
        path = join(os.path.expanduser(cfg.root), typed.path)
        path = path.rstrip("/") if is_remote(path) else os.path.abspath(path)
        entries.append(_Entry(str(source), path, name, rate, group.weighting, *numbers, options))
    return entries


def _blend_file(blend: str) -> Path:
    named, path = CONF_DIR / "blend" / f"{blend}.yaml", Path(blend).expanduser()
    for file in (named, path):
        if file.is_file():
            return file
    known = ", ".join(sorted(file.stem for file in (CONF_DIR / "blend").glob("*.yaml"))) or "none yet"
    raise ConfigError(
        f"data.blend={blend} names no blend: use one of conf/blend ({known}) or the path or address of a YAML file."
    )


def _typed(kind: type[BaseModel], document, where: str, where_keys: str | None = None) -> BaseModel:
    """The document as a `kind`. ConfigError, one sentence that begins with `where` (`where_keys`, about a key)."""
    known, required = sorted(kind.model_fields), [k for k, field in kind.model_fields.items() if field.is_required()]
    if not isinstance(document, dict):
        keys = ", ".join(sorted(required))
        raise ConfigError(f"{where_keys or where} must be a mapping with the keys {keys}, not {document!r}.")
    try:
        return kind.model_validate({str(key): value for key, value in document.items()})
    except ValidationError as error:
        problems = {problem["type"]: problem for problem in reversed(error.errors(include_url=False))}
        problem = problems.get("missing") or problems.get("extra_forbidden") or error.errors(include_url=False)[0]
        key, value = problem["loc"][0], problem["input"]
        if problem["type"] == "missing":
            message = f"{where_keys or where} lacks the key {key}: add it."
        elif problem["type"] == "extra_forbidden":
            message = f"{where_keys or where} has the unknown key {key}: remove it; known are {', '.join(known)}."
        elif key in ("groups", "sources"):
            message = f"{where} lists no {key}: {kind.model_fields[key].description}."
        else:
            message = f"{where} has {key}={value}: {kind.model_fields[key].description}."
        raise ConfigError(message) from None


def _remedy(cfg: DataConfig, missing: list[str], some_present: bool) -> str:
    """How to get sources that are not on disk, or to do without."""
    remote = is_remote(cfg.root)
    if cfg.blend.startswith("sample_"):
        if remote:
            return (
                "run python tools/make_sample_data.py --out data/sample and upload that folder there"
                " (docs/storage.md), or set data.root to the address that holds them"
            )
        return f"run python tools/make_sample_data.py --out {cfg.root}"
    known = _catalogue_stages()
    ways = []
    if fetched := [name for name in missing if name in known]:
        stage = max(known[name] for name in fetched)
        names = fetched[0] if len(fetched) == 1 else "NAME for each"
        ways.append(
            f"make and upload with python tools/prepare.py --stage {stage} {' '.join(fetched[:3])}"
            f"{' ...' if len(fetched) > 3 else ''} --out {cfg.root} --scratch FOLDER"
            if remote
            else f"fetch with python tools/download.py fetch {names} and then python tools/prepare.py --stage {stage}"
        )
    if len(fetched) < len(missing):
        there = ", and upload them there" if remote else ""
        ways.append(f"prepare your own as shards with python tools/prepare.py (docs/data.md){there}")
    if some_present:
        ways.append("set data.skip_missing=true to train without them")
    else:
        ways.append(f"set data.root to the {'address' if remote else 'folder'} that holds them")
    return ", or ".join(ways)


def _catalogue_stages() -> dict[str, int]:
    """Source of the published mixtures -> the stage from which on it is trained on."""
    catalogue = yaml.safe_load((CONF_DIR / "datasets.yaml").read_text())
    return {entry["name"]: min(entry["stages"]) for entry in catalogue["datasets"] if entry["stages"]}
