"""One data set from drafts to shards: what runs once the rows are spooled.

    $OUT/NAME/                 the finished data set: train-00000.tar, val-00000.tar, .nv-meta, provenance.json
    $OUT/.prepare/NAME/        what is not finished: shards/, records/ (one for each whole shard), spool-*/, rows.json

1. spool.py: all rows of a set become drafts, in files by a hash of their picture or video.
2. `write_shard`: one shard from its files. It is written under another name, flushed to the disk and renamed, and only
   then recorded.
3. `finish`: when all shards are recorded, Energon's index is added, and the folder gets its final name in one step.

The result does not depend on the number of processes, on which of them writes which shard, or on how often the work
was stopped and started again: the hashes decide.
"""

import contextlib
import json
import shutil
import tarfile
import uuid
from collections import Counter
from itertools import count
from pathlib import Path

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.files import LockHeld, locked, publish, sha256_of, sync, write_json
from molmo2_nemo.prepare.converters import converter_of
from molmo2_nemo.prepare.draft_to_sample import Dropped, join, pack
from molmo2_nemo.prepare.shard_plan import VAL, ShardPlan, source_of
from molmo2_nemo.prepare.spool import read_spool, reason_of
from molmo2_nemo.prepare.webdataset import add_sample, write_index

# Numbers of a shard, in its record.
TOTALS = ("samples", "branches", "images", "videos", "moved_points")


def write_shard(plan: ShardPlan, folder: Path, shard: str) -> dict:
    """Write one shard of the spooled drafts, and its record, which is returned. A shard without samples has no file."""
    raw, converter = RawSource(plan.root, plan.name), converter_of(plan.entry)
    file, partial = plan.work / "shards" / f"{shard}.tar", plan.work / "shards" / f".{shard}.tar.partial"
    totals, dropped = Counter(), Counter()
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for bucket in plan.buckets(shard):
            for about, drafts in read_spool(folder, bucket):
                if bucket == VAL and int(about[32:40], 16) % plan.num_val != int(shard.rsplit("-", 1)[1]):
                    continue
                numbers = count()
                for draft, left_out in join(drafts, converter):
                    dropped.update(left_out)
                    try:
                        parts, moved, unfit = pack(draft, raw)
                    except Dropped as error:
                        dropped[reason_of(dropped, str(error))] += len(draft.branches)
                        continue
                    for reason, number in unfit.items():
                        dropped[reason_of(dropped, reason)] += number
                    add_sample(tar, f"{about[:20]}_{next(numbers)}", parts)
                    totals["samples"] += 1
                    totals["branches"] += len(draft.branches) - sum(unfit.values())
                    totals["images"] += len(draft.images)
                    totals["videos"] += draft.video is not None
                    totals["moved_points"] += moved
    record = {
        "shard": file.name,
        "fingerprint": plan.fingerprint,
        **{key: totals[key] for key in TOTALS},
        "dropped": dict(sorted(dropped.items())),
        "bytes": 0,
        "sha256": None,
        "source": source_of(plan),
    }
    if totals["samples"]:
        record |= {"bytes": partial.stat().st_size, "sha256": sha256_of(partial)}
        publish(partial, file)
    else:
        partial.unlink()
        file.unlink(missing_ok=True)
    sync(file.parent)
    write_json(plan.work / "records" / f"{shard}.json", record)
    return record


def missing_shards(plan: ShardPlan, shards: list[str]) -> list[str]:
    """Those of the shards that are not written, or not as their record says; all bytes are read to check it."""
    missing = []
    for shard in shards:
        try:
            record = json.loads((plan.work / "records" / f"{shard}.json").read_text())
            whole = record["fingerprint"] == plan.fingerprint
            if whole and record["samples"]:
                file = plan.work / "shards" / record["shard"]
                whole = file.stat().st_size == record["bytes"] and sha256_of(file) == record["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            missing.append(shard)
    return missing


def finish(plan: ShardPlan) -> bool:
    """Add the index and give the folder its name, if all shards are recorded; returns whether they are.

    ValueError: there is no training sample.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(plan.work / "finish.lock"))
        except LockHeld:
            return False  # another array task is finishing it
        records = []
        for shard in plan.shards:
            try:
                record = json.loads((plan.work / "records" / f"{shard}.json").read_text())
            except (OSError, ValueError):
                return False
            if record["fingerprint"] != plan.fingerprint:
                return False
            records.append(record)
        rows = json.loads((plan.work / "rows.json").read_text())
        summary = summarise(plan, records, rows)
        if not summary["train_samples"]:
            shutil.rmtree(plan.work)  # so that a later run looks at the media again
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in list(summary["dropped"].items())[:4])
            raise ValueError(f"{plan.name} has no training sample: {reasons or 'there are no rows'}.")
        folder = plan.work / "shards"
        written = [record["shard"] for record in records if record["samples"]]
        shutil.rmtree(folder / ".nv-meta", ignore_errors=True)
        for path in folder.iterdir():
            if path.name not in written:
                path.unlink()
        write_index(folder, written, [s for s in ("train", VAL) if any(name.startswith(s) for name in written)])
        # Energon draws its identity at random; this one is the same for the same shards.
        identity = uuid.uuid5(uuid.NAMESPACE_OID, "".join(record["sha256"] or "" for record in records))
        (folder / ".nv-meta" / "index.uuid").write_text(str(identity))
        shards = [{k: v for k, v in record.items() if k not in ("fingerprint", "source")} for record in records]
        made = {"fingerprint": plan.fingerprint, "source": source_of(plan), **summary, "shards": shards}
        write_json(folder / "provenance.json", made)
        old = plan.final.with_name(f".{plan.name}.old")
        if plan.final.exists():
            shutil.rmtree(old, ignore_errors=True)
            plan.final.rename(old)
        folder.rename(plan.final)
        shutil.rmtree(old, ignore_errors=True)
        sync(plan.out)
    shutil.rmtree(plan.work, ignore_errors=True)
    return True


def summarise(plan: ShardPlan, records: list[dict], rows: dict) -> dict:
    """Counts of a whole set against the catalogue's."""
    dropped = Counter(rows["dropped"])
    for record in records:
        dropped.update(record["dropped"])
    totals = {key: sum(record[key] for record in records) for key in (*TOTALS, "bytes")}
    lost, counts = sum(dropped.values()), plan.entry.get("counts") or {}
    return {
        "rows": rows["rows"],
        "train_samples": sum(r["samples"] for r in records if r["shard"].startswith("train")),
        "val_samples": sum(r["samples"] for r in records if r["shard"].startswith(VAL)),
        **{key: totals[key] for key in ("branches", "images", "videos", "bytes", "moved_points")},
        "catalogue_samples": counts.get("paper_examples"),
        "catalogue_annotations": counts.get("paper_annotations"),
        "catalogue_rows": counts.get("released_rows"),
        "dropped": dict(dropped.most_common()),
        "dropped_share": round(lost / max(1, lost + totals["branches"]), 6),
    }


def finished(plan: ShardPlan, verify: bool = False) -> dict | None:
    """provenance.json of a finished set whose shards have the sizes it says; None: it is not finished."""
    try:
        made = json.loads((plan.final / "provenance.json").read_text())
        for record in made["shards"]:
            file = plan.final / record["shard"]
            if record["samples"] and (
                file.stat().st_size != record["bytes"] or (verify and sha256_of(file) != record["sha256"])
            ):
                return None
        return made
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_provenance(folder: Path) -> dict | None:
    """provenance.json of a folder; None: it has none."""
    try:
        return json.loads((folder / "provenance.json").read_text())
    except (OSError, ValueError):
        return None
