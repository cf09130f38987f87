"""Writing Energon WebDatasets: tar shards of samples, and the index beside them."""

import contextlib
import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import yaml

# A shard ends with the sample that reaches one of these.
SHARD_SAMPLES = 1000
SHARD_BYTES = 256 * 2**20
# Energon takes what follows the first dot for the part's name.
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


def write_shards(
    folder: Path,
    splits: dict[str, Iterable[tuple[str, dict[str, bytes]]]],
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, int]:
    """Write (key, parts by name) of each split ("train", "val") and the index; returns the splits' numbers of samples.
    Without a sample there is no index.

    The same samples give the same bytes. `folder` exists. ValueError: a key is not a KEY.
    """
    shards, counts = [], dict.fromkeys(splits, 0)
    for split, samples in splits.items():
        remaining, number = iter(samples), 0
        sample = next(remaining, None)
        while sample is not None:
            shards.append(f"{split}-{number:05d}.tar")
            number += 1
            count = size = 0
            with tarfile.open(folder / shards[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
                while sample is not None and count < shard_samples and size < shard_bytes:
                    size += add_sample(tar, *sample)
                    count += 1
                    sample = next(remaining, None)
            counts[split] += count
    if shards:
        write_index(folder, shards, list(splits))
    return counts


def write_index(folder: Path, shards: list[str], splits: list[str]) -> None:
    """Write .nv-meta and the .idx of each shard, named SPLIT-NUMBER.tar and not empty."""
    from megatron.energon.epathlib import EPath  # here because it takes seconds
    from megatron.energon.flavors import BaseWebdatasetFactory

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the path of every file it writes
        BaseWebdatasetFactory.prepare_dataset(
            EPath(folder),
            shards,
            split_parts_patterns=[(split, f"{split}-.*") for split in splits],
            shuffle_seed=None,
            workers=1,
        )
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(dataset))


def add_sample(tar: tarfile.TarFile, key: str, parts: dict[str, bytes]) -> int:
    """Append a sample; returns its bytes."""
    if not KEY.fullmatch(key):
        raise ValueError(f"The key {key!r} of a sample is not up to 80 letters, digits, - and _.")
    for part, data in parts.items():
        member = tarfile.TarInfo(f"{key}.{part}")  # times and owners are zero
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return sum(map(len, parts.values()))
