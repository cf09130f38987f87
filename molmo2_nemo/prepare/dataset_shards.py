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
import shutil
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.files import LockHeld, locked, publish, sha256_of, sync
from molmo2_nemo.prepare.converters import converter_of
from molmo2_nemo.prepare.converters.common import Converter, Draft
from molmo2_nemo.prepare.draft_to_sample import Dropped, join, pack
from molmo2_nemo.prepare.records import Provenance, RowCounts, ShardCounts, ShardRecord
from molmo2_nemo.prepare.shard_plan import VAL, ShardPlan, source_of
from molmo2_nemo.prepare.spool import read_spool, reason_of
from molmo2_nemo.prepare.webdataset import add_sample, write_index

PROVENANCE = "provenance.json"


def packed(
    drafts: Iterable[Draft], converter: Converter, raw: RawSource, dropped: Counter
) -> Iterator[tuple[Draft, dict[str, bytes], int, Counter]]:
    """(draft, the files of its sample, points moved, annotations that do not fit) of each sample made of the drafts of
    one picture or video. dropped: counts all that is left out, by reason."""
    for draft, left_out in join(drafts, converter):
        dropped.update(left_out)
        try:
            parts, moved, unfit = pack(draft, raw)
        except Dropped as error:
            dropped[reason_of(dropped, str(error))] += len(draft.branches)
            continue
        for reason, number in unfit.items():
            dropped[reason_of(dropped, reason)] += number
        yield draft, parts, moved, unfit


def write_shard(plan: ShardPlan, folder: Path, shard: str) -> ShardRecord:
    """Write one shard of the spooled drafts, and its record, which is returned. Without samples there is no file."""
    raw, converter = RawSource(plan.root, plan.name), converter_of(plan.entry)
    file, partial = plan.work / "shards" / f"{shard}.tar", plan.work / "shards" / f".{shard}.tar.partial"
    record, dropped = ShardRecord(shard=file.name, fingerprint=plan.fingerprint), Counter()
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for bucket in plan.buckets(shard):
            for about, drafts in read_spool(folder, bucket):
                if bucket == VAL and int(about[32:40], 16) % plan.num_val != int(shard.rsplit("-", 1)[1]):
                    continue
                numbers = count()
                for draft, parts, moved, unfit in packed(drafts, converter, raw, dropped):
                    add_sample(tar, f"{about[:20]}_{next(numbers)}", parts)
                    record.samples += 1
                    record.branches += len(draft.branches) - sum(unfit.values())
                    record.images += len(draft.images)
                    record.videos += draft.video is not None
                    record.moved_points += moved
    record.dropped = dict(sorted(dropped.items()))
    if record.samples:
        record.bytes, record.sha256 = partial.stat().st_size, sha256_of(partial)
        publish(partial, file)
    else:
        partial.unlink()
        file.unlink(missing_ok=True)
    sync(file.parent)
    record.write(_record_file(plan, shard))
    return record


def _record_file(plan: ShardPlan, shard: str) -> Path:
    return plan.work / "records" / f"{shard}.json"


def _is_whole(folder: Path, shard: ShardCounts, read_bytes: bool) -> bool:
    """Whether the file of a shard has the recorded size and, if asked, checksum. Without samples there is no file."""
    file = folder / shard.shard
    try:
        return not shard.samples or (
            file.stat().st_size == shard.bytes and (not read_bytes or sha256_of(file) == shard.sha256)
        )
    except OSError:
        return False


def missing_shards(plan: ShardPlan, shards: list[str]) -> list[str]:
    """Those of the shards that are not written, or not as their record says; all bytes are read to check it."""
    missing = []
    for shard in shards:
        record = ShardRecord.read(_record_file(plan, shard))
        if (
            record is None
            or record.fingerprint != plan.fingerprint
            or not _is_whole(plan.work / "shards", record, read_bytes=True)
        ):
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
        records = [ShardRecord.read(_record_file(plan, shard)) for shard in plan.shards]
        rows = RowCounts.read(plan.work / "rows.json")
        if rows is None or any(record is None or record.fingerprint != plan.fingerprint for record in records):
            return False
        made = summarise(plan, records, rows)
        if not made.train_samples:
            shutil.rmtree(plan.work)  # so that a later run looks at the media again
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in list(made.dropped.items())[:4])
            raise ValueError(f"{plan.name} has no training sample: {reasons or 'there are no rows'}.")
        folder = plan.work / "shards"
        written = [record.shard for record in records if record.samples]
        shutil.rmtree(folder / ".nv-meta", ignore_errors=True)
        for path in folder.iterdir():
            if path.name not in written:
                path.unlink()
        write_index(folder, written, [s for s in ("train", VAL) if any(name.startswith(s) for name in written)])
        # Energon draws its identity at random; this one is the same for the same shards.
        identity = uuid.uuid5(uuid.NAMESPACE_OID, "".join(record.sha256 or "" for record in records))
        (folder / ".nv-meta" / "index.uuid").write_text(str(identity))
        made.write(folder / PROVENANCE)
        old = plan.final.with_name(f".{plan.name}.old")
        if plan.final.exists():
            shutil.rmtree(old, ignore_errors=True)
            plan.final.rename(old)
        folder.rename(plan.final)
        shutil.rmtree(old, ignore_errors=True)
        sync(plan.out)
    shutil.rmtree(plan.work, ignore_errors=True)
    return True


def summarise(plan: ShardPlan, records: list[ShardRecord], rows: RowCounts) -> Provenance:
    """What is in a whole set, beside the numbers of the catalogue."""
    dropped = Counter(rows.dropped)
    for record in records:
        dropped.update(record.dropped)
    lost, counts = sum(dropped.values()), plan.entry.get("counts") or {}
    branches = sum(record.branches for record in records)
    return Provenance(
        fingerprint=plan.fingerprint,
        source=source_of(plan),
        rows=rows.rows,
        train_samples=sum(record.samples for record in records if record.shard.startswith("train")),
        val_samples=sum(record.samples for record in records if record.shard.startswith(VAL)),
        branches=branches,
        images=sum(record.images for record in records),
        videos=sum(record.videos for record in records),
        bytes=sum(record.bytes for record in records),
        moved_points=sum(record.moved_points for record in records),
        catalogue_samples=counts.get("paper_examples"),
        catalogue_annotations=counts.get("paper_annotations"),
        catalogue_rows=counts.get("released_rows"),
        dropped=dict(dropped.most_common()),
        dropped_share=round(lost / max(1, lost + branches), 6),
        shards=[ShardCounts(**record.model_dump(exclude={"fingerprint"})) for record in records],
    )


def finished(plan: ShardPlan, verify: bool = False) -> Provenance | None:
    """The provenance of a finished set whose shards have the sizes it says; None: it is not finished.

    verify: read all bytes and compare checksums, too.
    """
    made = read_provenance(plan.final)
    return made if made and all(_is_whole(plan.final, shard, verify) for shard in made.shards) else None


def read_provenance(folder: Path) -> Provenance | None:
    """The provenance of a prepared data set; None: the folder holds none."""
    return Provenance.read(folder / PROVENANCE)
