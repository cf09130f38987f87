"""Whether all ranks of a run were started alike: settings, sources of the data, code, versions of packages."""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import time
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
# After which a file that rank 0 has made before the ranks were joined is taken for missing.
SECONDS_TO_SEE_A_FILE = 30


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
    blind = _others(path.exists())
    return blind and (
        f"{path} is there for rank 0, but not for {blind}: run_dir must be on a file system that all nodes share."
    )


def _others(is_so: bool) -> str | None:
    """The ranks for which it is not so, in words; None: it is so for all. Collective."""
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, None if is_so else socket.gethostname())
    found = [f"rank {rank} on {host}" for rank, host in enumerate(everybodys) if host is not None]
    return f"{', '.join(found[:4])}{' and others' if found[4:] else ''}" if found else None


def shared(run_dir: Path) -> str | None:
    """One sentence about the ranks for which the run's folder is another one than for rank 0. Collective.

    Known by the owner file, which rank 0 has made. A network file system may take a while to show it.
    """
    token = [(owner.read(run_dir / owner.OWNER) or {}).get("token") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(token)
    until = time.monotonic() + SECONDS_TO_SEE_A_FILE
    while not (same := (owner.read(run_dir / owner.OWNER) or {}).get("token") == token[0]) and time.monotonic() < until:
        time.sleep(1)
        with contextlib.suppress(OSError):
            os.listdir(run_dir)  # the client asks its server again when a folder is opened
    others = _others(same)
    return others and (
        f"run_dir={run_dir} is another folder for {others} than for rank 0: name one on a file system that all nodes"
        " share."
    )
