"""Whether all ranks of a run were started alike: settings, sources of the data, code, versions of packages."""

import dataclasses
import hashlib
import json
import os
import socket
from pathlib import Path

import torch.distributed as dist

from molmo2_nemo.config.schema import Config
from molmo2_nemo.data.blend import Source
from molmo2_nemo.paths import PACKAGE
from molmo2_nemo.text import dotted
from molmo2_nemo.training import owner
from molmo2_nemo.training.metrics import package_versions

# Settings that may differ: each node may have its own copy of the data.
FREE = ("data.root", "data.cache_dir", "data.cache_size")


def what_this_rank_has(config: Config, sources: list[Source]) -> dict[str, str]:
    """All that has to be the same on every rank, by a name that a person can look for."""
    settings = {key: value for key, value in dotted(dataclasses.asdict(config)).items() if key not in FREE}
    blend = {f"source {source.name}": (source.weight, source.num_samples, source.options) for source in sources}
    packages = {f"version of {name}": version for name, version in package_versions().items()}
    everything = {**settings, **blend, **packages, "molmo2_nemo's code": code_digest()}
    return {key: str(value) for key, value in everything.items()}


def disagreement(own: dict[str, str]) -> str | None:
    """One sentence about the first rank that has something else than rank 0, the same on all ranks. Collective."""
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, (digest, socket.gethostname()))
    others = [rank for rank, (found, _) in enumerate(everybodys) if found != everybodys[0][0]]
    if not others:
        return None
    two = [None] * dist.get_world_size()
    dist.all_gather_object(two, own if dist.get_rank() in (0, others[0]) else None)
    first, other = two[0], two[others[0]]
    keys = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
    key = keys[0]
    more = f" ({len(keys) - 1} more differ)" if len(keys) > 1 else ""
    return (
        f"rank {others[0]} on {everybodys[others[0]][1]} has {key}={other.get(key, 'nothing')}, rank 0 on "
        f"{everybodys[0][1]} has {first.get(key, 'nothing')}{more}: start all ranks with the same command, code and "
        "environment."
    )


def code_digest() -> str:
    """SHA-256 of this package's Python files."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def changed_settings(before: dict, now: dict) -> list[str]:
    """`key before -> now` for each setting that differs between two resolved configurations."""
    before, now = dotted(before), dotted(now)
    return [
        f"{key} {before.get(key, 'unset')} -> {now.get(key, 'unset')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and {} not in (before.get(key), now.get(key))  # an empty group is no setting
    ]


def visible(path: Path) -> str | None:
    """One sentence about the ranks that do not see a file or folder that rank 0 has chosen. Collective."""
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, None if path.exists() else socket.gethostname())
    blind = [f"rank {rank} on {host}" for rank, host in enumerate(everybodys) if host is not None]
    if not blind:
        return None
    return (
        f"{path} is there for rank 0, but not for {', '.join(blind[:4])}{' and others' if len(blind) > 4 else ''}: "
        "run_dir must be on a file system that all nodes share."
    )


def first_ranks(run_dir: Path) -> list[int]:
    """The lowest rank of each group of ranks that see the same folder of the run: [0] on a shared file system.

    The folder is made where it is not there. Collective.
    """
    token = [(owner.read(run_dir / owner.OWNER) or {}).get("token") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(token)
    run_dir.mkdir(parents=True, exist_ok=True)
    os.listdir(run_dir)  # so that a network file system asks its server
    if (owner.read(run_dir / owner.OWNER) or {}).get("token") == token[0]:
        mine = "that of rank 0"
    else:
        found = run_dir.stat()
        mine = f"{socket.gethostname()} {found.st_dev} {found.st_ino}"
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, mine)
    return [rank for rank, place in enumerate(everybodys) if everybodys.index(place) == rank]
