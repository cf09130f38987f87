"""The blend of data of one's own (`data.own`) and of a share of general data beside it (`data.keep`).

Made as a document in the form of a blend's file (blend.py), so that both are read by the same code.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

from molmo2_nemo.config.errors import ConfigError, refuse
from molmo2_nemo.config.schema import DataConfig
from molmo2_nemo.data.node_metadata import are_there
from molmo2_nemo.storage import is_remote, join

OWN = "own"  # the group of one's own data
ALL = "all"  # for data.keep: every source of the blend


def document(cfg: DataConfig, general: Callable[[], dict]) -> dict:
    """The blend: a group of one's own data, and one for each group of general data of which something is kept.

    general: reads the document of data.blend; it is called only where data.keep is set. ConfigError, one sentence: a
    folder is not there, weights are of other names, a share is none, or nothing of what is to be kept is on disk.
    """
    weights = cfg.own_weights
    refuse(
        bool(weights) and weights.keys() != cfg.own.keys(),
        f"data.own_weights is of {', '.join(weights)}, and your data are {', '.join(cfg.own)}: give each a weight, or"
        " none.",
    )
    sources = {}
    paths = [f if is_remote(f) else os.path.abspath(os.path.expanduser(f)) for f in cfg.own.values()]
    for (name, folder), path, there in zip(cfg.own.items(), paths, are_there(cfg, paths)):
        refuse(
            not there and is_remote(folder),
            f"data.{name}={folder} is not there: upload the folder that tools/prepare.py has made of your labels, with"
            " its .nv-meta, or correct the address.",
        )
        is_local = not is_remote(folder)
        refuse(
            is_local and os.path.isfile(path),
            f"data.{name}={folder} is a file: make shards of your labels with python tools/prepare.py {folder} --out"
            f" shards/{name} --split 90/5/5, and set data.{name}=shards/{name}.",
        )
        refuse(
            is_local and there and not (os.path.isdir(f"{path}/.nv-meta") or any(Path(path).glob("*.tar"))),
            f"data.{name}={folder} holds neither .tar files nor .nv-meta: name the folder that python tools/prepare.py"
            f" LABELS --out shards/{name} --split 90/5/5 makes, data.{name}=shards/{name}.",
        )
        refuse(
            not there,
            f"data.{name}={folder} is no folder: make it with python tools/prepare.py LABELS --out {folder} --split"
            " 90/5/5.",
        )
        sources[name] = {"path": path} | ({"weight": weights[name]} if weights else {})
    shares = keep_shares(cfg.keep)
    own = {"rate": 1 - sum(shares.values()), "weighting": "fixed" if weights else "size", "sources": sources}
    groups, known = {OWN: own}, general() if shares else {}
    for name, share in shares.items():
        kept, missing = chosen(cfg, known, name)
        refuse(
            not kept,
            f"data.keep={name}:{share:g}: none of {_some(missing)} is prepared under data.root={cfg.root}: fetch with"
            f" python tools/download.py fetch {_some(missing, 1)}, then python tools/prepare.py --stage 2"
            f" {_some(missing, 1)} --out {cfg.root}, or set data.root.",
        )
        total = sum(group["rate"] for group in kept.values())
        for label, group in kept.items():
            if twice := next((s for s in group["sources"] for g in groups.values() if s in g["sources"]), None):
                raise ConfigError(f"data.keep={cfg.keep} names {twice} twice, or as your own data: name it once.")
            groups[f"{name} {label}".strip()] = group | {"rate": share * group["rate"] / total}
    return {"groups": groups}


def left_out(cfg: DataConfig, general: Callable[[], dict]) -> list[str]:
    """Names of the sources that data.keep means and that are not on disk."""
    shares = keep_shares(cfg.keep)
    known = general() if shares else {}
    return sorted({source for name in shares for source in chosen(cfg, known, name)[1]})


def keep_shares(keep) -> dict[str, float]:
    """Name -> share of the samples. ConfigError, one sentence."""
    if keep is None:
        return {}
    shares = {}
    for entry in keep if isinstance(keep, list) else [keep]:
        name, _, number = str(entry).rpartition(":")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        refuse(not (name and 0 < share < 1), f"data.keep={keep}: {entry} is not NAME:SHARE, such as pixmo:0.3.")
        shares[name] = shares.get(name, 0.0) + share
    total = sum(shares.values())
    refuse(total >= 1, f"data.keep={keep} leaves nothing of {total:g} for your own data: make the sum less than 1.")
    return shares


def chosen(cfg: DataConfig, general: dict, name: str) -> tuple[dict[str, dict], list[str]]:
    """Group -> its document with those of its sources that `name` means and that are on disk; and those that are not.

    ConfigError: `name` means none.
    """
    groups = general.get("groups") or {"": {"rate": 1.0, **general}}
    wanted = {
        label: {source: of for source, of in group["sources"].items() if _means(name, str(source))}
        for label, group in groups.items()
    }
    names = [str(source) for sources in wanted.values() for source in sources]
    refuse(
        not names,
        f"data.keep={cfg.keep}: no source of data.blend={cfg.blend} is or begins with {name}: choose one of"
        f" {_some([str(source) for group in groups.values() for source in group['sources']], 8)}, or {ALL}.",
    )
    kept, missing = {}, []
    for label, sources in wanted.items():
        paths = [join(os.path.expanduser(cfg.root), of["path"]) for of in sources.values()]
        present = {s: of for (s, of), there in zip(sources.items(), are_there(cfg, paths)) if there}
        missing += [str(source) for source in sources if source not in present]
        if present:
            kept[str(label)] = groups[label] | {"sources": present}
    return kept, missing


def _means(name: str, source: str) -> bool:
    return name in (ALL, source) or source.startswith((f"{name}-", f"{name}_"))


def _some(names: list[str], number: int = 4) -> str:
    return ", ".join(names[:number]) + (" and others" if len(names) > number > 1 else "")
