"""Which data sets a stage trains on, and how much of each.

A blend is a YAML file, conf/blend/NAME.yaml:

    weighting: fixed                             # fixed: the weights below | sqrt: square roots of the sizes
    sources:
      captions: {path: captions, weight: 60}     # path relative to data.root; weight only if fixed

Weights are shares of samples, not of tokens, and need not sum to anything. A source is an Energon WebDataset with the
split parts "train" and "val". Everything here reads a few small files and starts nothing.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from braceexpand import braceexpand

from molmo2_nemo.config import CONF_DIR, DataConfig


@dataclass(frozen=True)
class Source:
    """One data set of a blend; its index in the list is what Batch.source_ids hold."""

    name: str
    path: str  # absolute
    weight: float
    num_samples: int  # of the split part "train"
    num_validation_samples: int = 0  # of the split part "val"


def load_blend(cfg: DataConfig) -> list[Source]:
    """The sources of `cfg.blend` with their weights, in the file's order.

    ValueError, one sentence: a file or folder is missing, a key is unknown or missing, a weight is not positive, a
    source is empty or listed twice.
    """
    file = _blend_file(cfg.blend)
    where = f"data.blend={cfg.blend} ({file})"
    try:
        blend = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from error
    _check_keys(blend, {"weighting", "sources"}, {"weighting", "sources"}, where)
    weighting, entries = blend["weighting"], blend["sources"]
    if weighting not in ("fixed", "sqrt"):
        raise ValueError(f"{where} has weighting={weighting}: choose fixed or sqrt.")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{where} lists no sources: add at least one.")
    needed = {"path", "weight"} if weighting == "fixed" else {"path"}
    sources = []
    for name, entry in entries.items():
        _check_keys(entry, needed, needed, f"{where}, source {name} of weighting={weighting},")
        path = Path(os.path.abspath(Path(cfg.root).expanduser() / str(entry["path"])))
        train, val = (_count_samples(cfg.root, name, path, part) for part in ("train", "val"))
        if train == 0:
            raise ValueError(f"source {name} of {where} has no training samples in {path}: prepare it again.")
        weight = entry["weight"] if weighting == "fixed" else train**0.5
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ValueError(f"{where}, source {name}, has weight={weight}: make it a number above 0, or remove it.")
        # Energon would play the same folder twice in the identical order.
        twin = next((source.name for source in sources if source.path == str(path)), None)
        if twin is not None:
            raise ValueError(f"{where} lists {path} twice, as {twin} and {name}: keep one, with both weights' sum.")
        sources.append(Source(str(name), str(path), float(weight), train, val))
    return sources


def check_blend(sources: list[Source], world_size: int, num_workers: int) -> None:
    """Refuse sources too small for so many data-parallel ranks and loader workers per rank.

    Each worker owns a fixed range of each source. Workers without a sample never draw it, so that a source smaller
    than their number is seen less often than its weight says. ValueError, one sentence.
    """
    workers = world_size * max(1, num_workers)
    small = [source for source in sources if source.num_samples < 2 * workers]
    if small:
        raise ValueError(
            f"source {small[0].name} has {small[0].num_samples} training samples, fewer than two for each of "
            f"{world_size} data-parallel rank(s) x data.num_workers={num_workers}: lower data.num_workers, or write "
            "its samples to the shards several times under new keys."
        )


def write_metadataset(sources: list[Source], path: Path) -> None:
    """Write the blend as an Energon MetadatasetV2, splits train and val. Several ranks may write the same file."""

    def entries(chosen: list[Source]) -> dict:
        return {"blend": [{"weight": s.weight, "path": s.path, "subflavors": {"source": s.name}} for s in chosen]}

    held_out = [source for source in sources if source.num_validation_samples]
    splits = {"train": entries(sources)} | ({"val": entries(held_out)} if held_out else {})
    document = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    partial.write_text(yaml.safe_dump(document, sort_keys=False))
    partial.replace(path)


def _blend_file(blend: str) -> Path:
    named, path = CONF_DIR / "blend" / f"{blend}.yaml", Path(blend).expanduser()
    for file in (named, path):
        if file.is_file():
            return file
    known = ", ".join(sorted(file.stem for file in (CONF_DIR / "blend").glob("*.yaml"))) or "none yet"
    raise ValueError(f"data.blend={blend} names no blend: use one of conf/blend ({known}) or the path of a YAML file.")


def _check_keys(value, needed: set[str], allowed: set[str], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping with the keys {', '.join(sorted(needed))}, not {value!r}.")
    for key in sorted(needed - set(value)):
        raise ValueError(f"{where} lacks the key {key}: add it.")
    for key in sorted(set(map(str, value)) - allowed):
        raise ValueError(f"{where} has the unknown key {key}: remove it; known are {', '.join(sorted(allowed))}.")


def _count_samples(root: str, name: str, path: Path, part: str) -> int:
    """Samples of one split part, from Energon's index."""
    if not path.is_dir():
        raise ValueError(
            f"data.root={root} has no folder for the source {name} ({path} does not exist): "
            f"run python tools/make_sample_data.py --out {root}, or set data.root to the folder that holds the sources."
        )
    meta = path / ".nv-meta"
    try:
        counts = json.loads((meta / ".info.json").read_text())["shard_counts"]
        split = yaml.safe_load((meta / "split.yaml").read_text())
        # Energon abbreviates runs of shards: train-{00000..00002}.tar.
        shards = [shard for pattern in split["split_parts"].get(part) or [] for shard in braceexpand(pattern)]
        return sum(counts[shard] for shard in shards if shard not in (split.get("exclude") or []))
    except (OSError, KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"the source {name} in data.root={root} is not prepared ({meta}: {error}): run energon prepare {path}."
        ) from error
