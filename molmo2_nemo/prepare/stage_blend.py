"""The files beside the shards of a stage: its blends, restricted to the prepared sets, and the licences of these."""

from pathlib import Path

import yaml

from molmo2_nemo.catalogue.datasets import Catalogue
from molmo2_nemo.catalogue.mixture import blends
from molmo2_nemo.files import write_atomically
from molmo2_nemo.prepare.dataset_shards import read_provenance

# Stage -> names of blends in catalogue/mixture.py. Stage 3 trains on the data of stage 2.
BLENDS = {1: ["stage1"], 2: ["stage2", "stage2_report"], 3: ["stage2", "stage2_report"]}


def write_blends(
    stage: int, catalogue: Catalogue, out: Path, allowed: set[str] | None, root: str | None = None
) -> list[Path]:
    """Write the stage's blends, restricted to the prepared sets of `out`, and their licences; returns the files.

    allowed: names of the sets that may be in the blends; None: all. root: where the sets are, if not in `out`.
    """
    whole = blends(catalogue)
    files, present = [], set()
    for name in BLENDS[stage]:
        what, blend = whole[name]
        kept = restrict(blend, out, allowed)
        if not kept:
            continue
        content, sources = kept
        text = f"# {len(sources)} sources below data.root={root or out}. {what}\n"
        files.append(_write(out / f"{name}.yaml", text + yaml.safe_dump(content, sort_keys=False)))
        present |= set(sources)
    if present:
        files.append(_write(out / f"stage{stage}.LICENSES.txt", licences(catalogue, sorted(present), out)))
    return files


def restrict(blend: dict, out: Path, allowed: set[str] | None) -> tuple[dict, list[str]] | None:
    """The blend without the sources that are not prepared or not allowed, and the names of the others."""

    def there(name: str, source: dict) -> bool:
        return (allowed is None or name in allowed) and (out / source["path"] / ".nv-meta").is_dir()

    if "groups" in blend:
        groups = {name: restrict(group, out, allowed) for name, group in blend["groups"].items()}
        kept = {name: group for name, group in groups.items() if group}
        return (
            ({"groups": {n: g for n, (g, _) in kept.items()}}, [s for _, ss in kept.values() for s in ss])
            if kept
            else None
        )
    sources = {name: source for name, source in blend["sources"].items() if there(name, source)}
    return (blend | {"sources": sources}, list(sources)) if sources else None


def licences(catalogue: Catalogue, names: list[str], out: Path) -> str:
    """A paragraph for each data set."""
    entries = {entry.name: entry.model_dump() for entry in catalogue.sets}
    lines = ["Licences of the data sets in this blend, as their catalogue and the Hub state them. No legal advice.\n"]
    for name in names:
        entry, made = entries.get(name, {}), read_provenance(out / name)
        source = made.source if made else {}
        train, val = (made.train_samples, made.val_samples) if made else (0, 0)
        lines.append(
            f"{name}\n"
            f"  licence:  {source.get('license') or entry.get('license') or 'unknown: read the terms at the source'}\n"
            f"  terms:    {entry.get('terms') or '-'}\n"
            f"  from:     {source.get('from') or '-'}\n"
            f"  revision: {source.get('revision') or '-'}\n"
            f"  samples:  {train:,} and {val:,} held out\n"
        )
    return "\n".join(lines)


def _write(path: Path, text: str) -> Path:
    write_atomically(path, text)
    return path
