"""From the raw data sets of a stage to shards: what tools/prepare.py --stage runs.

    $OUT/NAME/                 the finished data set: train-00000.tar, val-00000.tar, .nv-meta, provenance.json
    $OUT/.prepare/NAME/        what is not finished: shards/, records/ (one for each whole shard), spool-*/, rows.json

1. `spool`: all rows of a set become drafts, which go to files by the hash of what they are about (their picture or
   video), so that a shard needs only a few of these files, and what is to be joined lies in the same one.
2. `write_shard`: one shard from its files, written aside, synced, renamed, and only then recorded.
3. `finish`: when all shards are recorded, Energon's index is added, and the folder appears under its name in one step.

Nothing hangs on the number of processes, on who does which shard, or on how often it was stopped: the hashes decide.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path

from tqdm import tqdm

from molmo2_nemo.catalogue.raw import RawSource, size_on_disk
from molmo2_nemo.data.schema import check_branch
from molmo2_nemo.files import LockHeld, locked, publish, sha256_of, sha256_of_text, sync, write_json
from molmo2_nemo.prepare.converters import converter_of
from molmo2_nemo.prepare.converters.common import Clip, Draft, Drop
from molmo2_nemo.prepare.converters.samples import Dropped, general, join, pack
from molmo2_nemo.prepare.shards import add_sample, write_index

# Held out for validation: this share of the pictures and videos, by a hash, and so the same ones in every set; of a
# small set at least so many, if they are no more than a tenth.
VAL_SHARE, LEAST_VAL = 0.01, 3
VAL_PER_SHARD = 500
# A shard of a small set has so many samples, if the catalogue's number is right.
MIN_SAMPLES = 200
# Files among which drafts are divided at least: what is in one of them is held in memory.
MIN_BUCKETS = 64
SPOOL_MEMORY = 64 * 2**20  # bytes
# Rows after which a set of which none could be used is given up.
HOPELESS = 1000
MAX_REASONS = 50
MAX_NAME = 255  # bytes of a file's name
# What of fetched.json decides what the shards hold; the rest tells of the fetch.
DECISIVE = ("revision", "repo", "limit", "filter", "splits", "counts", "media")
VAL = "val"


@dataclass(frozen=True)
class Plan:
    """How one data set becomes shards."""

    entry: dict  # of the catalogue
    root: Path  # holds raw/
    out: Path
    num_train: int  # shards
    num_val: int
    fingerprint: str  # of all that decides what the shards hold

    @property
    def name(self) -> str:
        return self.entry["name"]

    @property
    def final(self) -> Path:
        return self.out / self.name

    @property
    def work(self) -> Path:
        return self.out / ".prepare" / self.name

    @property
    def shards(self) -> list[str]:
        return [f"train-{k:05d}" for k in range(self.num_train)] + [f"{VAL}-{k:05d}" for k in range(self.num_val)]

    def num_buckets(self) -> int:
        return self.num_train * math.ceil(MIN_BUCKETS / self.num_train)

    def buckets(self, shard: str) -> list[str]:
        """Of one shard. All of the validation shards read the same file and take what is theirs."""
        split, number = shard.rsplit("-", 1)
        if split == VAL:
            return [VAL]
        each = self.num_buckets() // self.num_train
        return [f"{k:05d}" for k in range(int(number) * each, (int(number) + 1) * each)]


def make_plan(entry: dict, root: Path, out: Path, num_shards: int, partial: bool = False) -> Plan:
    """ValueError, one sentence: the set has no converter, is not fetched, or not as a whole (unless `partial`).

    A sample (fetch --limit) counts as whole.
    """
    converter_of(entry)
    name, raw = entry["name"], RawSource(root, entry["name"])
    info = raw.info
    if info.get("stopped"):
        raise ValueError(f"{name} is not fetched to its end ({info['stopped']}): run tools/download.py fetch {name}.")
    if info.get("complete") is False and info.get("waiting") and not partial:
        raise ValueError(
            f"{name} is fetched in part ({'; '.join(info['waiting'])}): see tools/download.py doctor, or take what is "
            "there with --partial."
        )
    expected = expected_samples(entry, info)
    num_train = min(num_shards, math.ceil(expected / MIN_SAMPLES))
    num_val = min(num_train, math.ceil(expected * VAL_SHARE / VAL_PER_SHARD))
    what = {
        "code": code_hash(),
        "raw": {key: info.get(key) for key in DECISIVE},
        "shards": num_train,
        "by_hand": size_on_disk(raw.folder / "manual"),
        "val": [num_val, VAL_SHARE],
        "source": entry["source"],
        "convert": entry.get("convert"),
    }
    fingerprint = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
    return Plan(entry, root, out, num_train, num_val, fingerprint)


@cache
def code_hash() -> str:
    """Of what turns rows into samples, so that a changed converter's work is not mixed with that of the old one."""
    folder = Path(__file__).parent
    files = [
        *sorted((folder / "converters").glob("*.py")),
        folder / "media.py",
        folder.parent / "catalogue" / "raw.py",
        Path(__file__),
    ]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def expected_samples(entry: dict, info: dict) -> int:
    """How many samples a set is thought to give; for the number of shards alone, so it may be wrong."""
    counts = entry.get("counts") or {}
    known = [counts.get(key) for key in ("paper_examples", "released_rows", "paper_visual")] + [entry.get("examples")]
    expected = next((number for number in known if number), 1000)
    rows = (info.get("counts") or {}).get("rows")
    return min(number for number in (expected, rows, info.get("limit")) if number)


# -- rows to drafts, on disk ------------------------------------------------------------------------------------------


class Spool:
    """Drafts in files by bucket: JSON lines, and the pictures that rows held in a second file."""

    def __init__(self, folder: Path, wanted: set[str]):
        self.folder, self.wanted = folder, wanted
        self.lines: dict[str, list[bytes]] = {}
        self.blobs: dict[str, list[bytes]] = {}
        self.sizes: Counter = Counter()  # of the second files
        self.buffered = 0

    def add(self, bucket: str, about: str, order: tuple[int, int], draft: Draft) -> None:
        if bucket not in self.wanted:
            return
        images = []
        for image in draft.images:
            if isinstance(image, bytes):
                self.blobs.setdefault(bucket, []).append(image)
                images.append({"offset": self.sizes[bucket], "bytes": len(image)})
                self.sizes[bucket] += len(image)
                self.buffered += len(image)
            else:
                images.append(image)
        record = {"about": about, "order": order, "draft": {**vars(draft), "images": images}}
        if draft.video:
            record["draft"]["video"] = vars(draft.video)
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        self.lines.setdefault(bucket, []).append(line)
        self.buffered += len(line)
        if self.buffered > SPOOL_MEMORY:
            self.flush()

    def flush(self) -> None:
        for suffix, buffers in ((".jsonl", self.lines), (".bin", self.blobs)):
            for bucket, chunks in buffers.items():
                with (self.folder / f"{bucket}{suffix}").open("ab") as file:
                    file.writelines(chunks)
            buffers.clear()
        self.buffered = 0


def read_spool(folder: Path, bucket: str) -> Iterator[tuple[str, list[Draft]]]:
    """(hash of what they are about, its drafts in the order of the rows), by hash."""
    if not (folder / f"{bucket}.jsonl").exists():
        return
    records: dict[str, list[dict]] = {}
    with (folder / f"{bucket}.jsonl").open("rb") as lines:
        for line in lines:
            record = json.loads(line)
            records.setdefault(record["about"], []).append(record)
    blobs = (folder / f"{bucket}.bin").open("rb") if (folder / f"{bucket}.bin").exists() else None
    with blobs or contextlib.nullcontext():
        for about in sorted(records):
            drafts = []
            for record in sorted(records[about], key=lambda record: record["order"]):
                draft = Draft(**record["draft"])
                for index, image in enumerate(draft.images):
                    if isinstance(image, dict) and "offset" in image:
                        blobs.seek(image["offset"])
                        draft.images[index] = blobs.read(image["bytes"])
                draft.video = draft.video and Clip(**draft.video)
                drafts.append(draft)
            yield about, drafts


def spool(plan: Plan, folder: Path, shards: list[str], progress: tqdm | None = None) -> None:
    """Convert all rows and keep the drafts of some shards in `folder`, and rows.json beside it.

    ValueError, one sentence: a file of the set cannot be read, or none of its first rows can be used.
    """
    marker = folder / "spool.json"
    wanted = {bucket for shard in shards for bucket in plan.buckets(shard)}
    mark = {"fingerprint": plan.fingerprint, "buckets": sorted(wanted)}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(marker.read_text()) == mark and (plan.work / "rows.json").exists():
            return
    bound = int(VAL_SHARE * 2**64)
    rows, lowest = _spool(plan, folder, wanted, bound, progress)
    least = min(LEAST_VAL, rows["drafts"] // 10, len(lowest) - 1)
    if least > 0 and lowest[least - 1] >= bound:
        # So small a set may have none below the bound. Its lowest are held out, in a second pass.
        rows, _ = _spool(plan, folder, wanted, lowest[least - 1] + 1, progress)
    for path in folder.iterdir():
        sync(path)
    write_json(plan.work / "rows.json", rows)
    write_json(marker, mark)


def _spool(plan: Plan, folder: Path, wanted: set[str], bound: int, progress: tqdm | None) -> tuple[dict, list[int]]:
    """Numbers of rows, drafts, and of drafts dropped by reason; and the lowest hashes, of which those below `bound` are
    held out."""
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()
    files, dropped, num_drafts, num_rows, lowest = Spool(folder, wanted), Counter(), 0, 0, []
    for number, results in enumerate(converted(plan)):
        num_rows += 1
        if progress is not None:
            progress.update()
        for index, result in enumerate(results):
            if isinstance(result, Drop):
                dropped[reason_of(dropped, result.reason)] += 1
                continue
            num_drafts += 1
            about = sha256_of_text(about_of(result))
            chance = int(about[16:32], 16)
            if chance not in lowest:
                lowest = sorted([*lowest, chance])[: LEAST_VAL + 1]
            files.add(VAL if chance < bound else bucket_of(plan, about), about, (number, index), result)
        if num_rows == HOPELESS and not num_drafts:
            raise ValueError(
                f"none of the first {HOPELESS} rows of {plan.name} can be used ({dropped.most_common(1)[0][0]}): "
                "are its files what conf/datasets.yaml describes?"
            )
    files.flush()
    return {"rows": num_rows, "drafts": num_drafts, "dropped": dropped}, lowest


def converted(plan: Plan) -> Iterator[list[Draft | Drop]]:
    """What becomes of each row. A row that is not as it should be is dropped, not the set."""
    raw, converter = RawSource(plan.root, plan.name), converter_of(plan.entry)
    split = training_split(raw, plan.entry)
    if converter.rows:
        rows = islice(converter.rows(raw, split), raw.info.get("limit"))
    else:
        rows = raw.rows(split)
    for row in rows:
        try:
            yield [checked(result) if isinstance(result, Draft) else result for result in converter.convert(row)]
        except KeyError as error:
            yield [Drop(f"no column {error}")]
        except UnicodeError:
            yield [Drop("a text with half a character (a lone surrogate)")]
        except ValueError as error:
            yield [Drop("columns of unlike length" if str(error).startswith("zip()") else general(str(error)))]
        except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError):
            yield [Drop("a value of another type than expected")]


def checked(draft: Draft) -> Draft:
    """The same draft. ValueError or TypeError: it cannot be stored, or the schema knows no such branch."""
    if not draft.branches:
        raise ValueError("nothing is asked")
    for branch in draft.branches:
        check_branch(json.dumps(branch, ensure_ascii=False).encode())
    video = draft.video
    names = [*video.names, *video.cut, *video.frames] if video else [""]
    for image in draft.images:
        name = image.get("name") if isinstance(image, dict) else image
        names += [None] if not name else name if isinstance(name, list) else [name]
    if not names or not all(map(is_name, names)):
        raise ValueError("no name of a picture or video")
    return draft


def is_name(name) -> bool:
    """Of a file as file systems allow it, an address, or the file itself."""
    if isinstance(name, str) and "://" not in name:
        return all(len(os.fsencode(part)) <= MAX_NAME for part in name.split("/"))
    return isinstance(name, str | bytes)


def training_split(raw: RawSource, entry: dict) -> str | None:
    """The split that the catalogue names, or train; None if the files are not divided."""
    known = raw.info.get("splits")
    named = (entry["source"].get("hf") or {}).get("split")
    return next((split for split in (named, "train") if known and split in known), None)


def about_of(draft: Draft) -> str:
    """What is held out together, whatever the data set: the same address is always on the same side."""
    if draft.about is not None:
        return draft.about
    if not draft.video and not draft.images:
        return json.dumps(draft.branches)
    if draft.video:
        return (draft.video.names or draft.video.cut or draft.video.frames)[0]
    names = [image["name"] if isinstance(image, dict) else image for image in draft.images]
    names = [name[0] if isinstance(name, list) else name for name in names]
    return "\n".join(hashlib.sha256(name).hexdigest() if isinstance(name, bytes) else name for name in names)


def bucket_of(plan: Plan, about: str) -> str:
    """The hash's first 8 bytes choose the file; the next 8 decide what is held out."""
    return f"{int(about[:16], 16) * plan.num_buckets() >> 64:05d}"


def reason_of(dropped: Counter, reason: str) -> str:
    return reason if reason in dropped or len(dropped) < MAX_REASONS else "other reasons"


# -- drafts to shards -------------------------------------------------------------------------------------------------


def write_shard(plan: Plan, folder: Path, shard: str) -> dict:
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


TOTALS = ("samples", "branches", "images", "videos", "moved_points")


def source_of(plan: Plan) -> dict:
    """Where a shard's data come from."""
    info, source = RawSource(plan.root, plan.name).info, plan.entry["source"]
    hub, urls = source.get("hf") or {}, source.get("urls") or [None]
    return {
        "name": plan.name,
        "from": info.get("repo") or hub.get("repo") or source.get("page") or urls[0],
        "config": hub.get("config"),
        "revision": info.get("revision"),
        "license": plan.entry.get("license") or info.get("license"),
        "terms": plan.entry.get("terms"),
    }


def missing_shards(plan: Plan, shards: list[str]) -> list[str]:
    """Those that are not written, or not as their record says, whose bytes are read again."""
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


def finish(plan: Plan) -> bool:
    """Add the index and give the folder its name, if all shards are recorded. ValueError: there is not one sample."""
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
            shutil.rmtree(plan.work)  # or what is put there later would not be looked at
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in list(summary["dropped"].items())[:4])
            raise ValueError(f"{plan.name} has no training sample: {reasons or 'there are no rows'}.")
        folder = plan.work / "shards"
        written = [record["shard"] for record in records if record["samples"]]
        shutil.rmtree(folder / ".nv-meta", ignore_errors=True)
        for path in folder.iterdir():
            if path.name not in written:
                path.unlink()
        write_index(folder, written, [s for s in ("train", VAL) if any(name.startswith(s) for name in written)])
        # Energon draws it at random.
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


def summarise(plan: Plan, records: list[dict], rows: dict) -> dict:
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


def finished(plan: Plan, verify: bool = False) -> dict | None:
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
