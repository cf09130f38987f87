"""Raw rows of a data set become drafts of samples, kept on disk until their shard is written.

Drafts go to files (buckets) by a hash of the picture or video that they are about. So a shard needs only a few of the
files, and drafts that are to be joined into one sample are in the same file.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.data.schema import check_branch
from molmo2_nemo.files import sha256_of_text, sync
from molmo2_nemo.prepare.converters import converter_of
from molmo2_nemo.prepare.converters.common import Clip, Draft, Drop
from molmo2_nemo.prepare.draft_to_sample import general
from molmo2_nemo.prepare.records import RowCounts, SpoolMark
from molmo2_nemo.prepare.shard_plan import VAL, ShardPlan, bucket_of

# Of a small set, at least this many pictures or videos are held out, if that is no more than a tenth of them.
LEAST_VAL = 3
SPOOL_MEMORY = 64 * 2**20  # bytes that are collected before they are written
# Rows after which a set is given up if none of them could be used.
MAX_USELESS_ROWS = 1000
MAX_REASONS = 50  # that are counted one by one
SHOWN_COLUMNS = 12  # where a row lacks one
MAX_NAME = 255  # bytes of a file's name, on Linux


class Spool:
    """Writes drafts to BUCKET.jsonl, and the pictures that were in the rows to BUCKET.bin."""

    def __init__(self, folder: Path, wanted: set[str]):
        self.folder, self.wanted = folder, wanted
        self.lines: dict[str, list[bytes]] = {}
        self.blobs: dict[str, list[bytes]] = {}
        self.sizes: Counter = Counter()  # bytes of each BUCKET.bin
        self.buffered = 0

    def add(self, bucket: str, about: str, order: tuple[int, int], draft: Draft) -> None:
        """about: the hash of what the draft is about. order: (number of the row, number of the draft in it)."""
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
    """(hash of a picture or video, its drafts in the order of the rows), sorted by hash."""
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


def write_spool(plan: ShardPlan, folder: Path, shards: list[str], progress: tqdm | None = None) -> None:
    """Convert all rows, and write the drafts of some shards to `folder` and rows.json beside it.

    ValueError, one sentence: a file of the set cannot be read, or none of its first rows can be used.
    """
    marker = folder / "spool.json"
    wanted = {bucket for shard in shards for bucket in plan.buckets(shard)}
    mark = SpoolMark(fingerprint=plan.fingerprint, buckets=sorted(wanted))
    if SpoolMark.read(marker) == mark and RowCounts.read(plan.work / "rows.json"):
        return
    bound = int(plan.val_share * 2**64)
    rows, lowest = _write_drafts(plan, folder, wanted, bound, progress)
    least = min(LEAST_VAL, rows.drafts // 10, len(lowest) - 1)
    if least > 0 and lowest[least - 1] >= bound:
        # A small set may have too few below the bound: in a second pass those with the lowest hashes are held out.
        rows, _ = _write_drafts(plan, folder, wanted, lowest[least - 1] + 1, progress)
    for path in folder.iterdir():
        sync(path)
    rows.write(plan.work / "rows.json")
    mark.write(marker)


def _write_drafts(
    plan: ShardPlan, folder: Path, wanted: set[str], bound: int, progress: tqdm | None
) -> tuple[RowCounts, list[int]]:
    """One pass over all rows. What has a hash below `bound` is held out.

    Returns the numbers of rows, of drafts, and of dropped annotations by reason, and the lowest hashes.
    """
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()
    files, dropped, num_drafts, num_rows, lowest = Spool(folder, wanted), Counter(), 0, 0, []
    for number, results in enumerate(converted(plan.entry, RawSource(plan.root, plan.name))):
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
        if num_rows == MAX_USELESS_ROWS and not num_drafts:
            reason = dropped.most_common(1)[0][0]
            raise ValueError(
                f"none of the first {MAX_USELESS_ROWS} rows of {plan.name} can be used ({reason}): "
                "are its files what conf/datasets.yaml describes?"
            )
    files.flush()
    return RowCounts(rows=num_rows, drafts=num_drafts, dropped=dict(dropped)), lowest


def converted(entry: dict, raw: RawSource) -> Iterator[list[Draft | Drop]]:
    """The drafts of each row. A row that is not as expected becomes a Drop with the reason, and the others go on."""
    converter, split = converter_of(entry), training_split(raw, entry)
    if converter.rows:
        rows = islice(converter.rows(raw, split), raw.info.get("limit"))
    else:
        rows = raw.rows(split)
    for row in rows:
        try:
            yield [checked(result) if isinstance(result, Draft) else result for result in converter.convert(row)]
        except KeyError as error:
            there = ", ".join(map(str, list(row)[:SHOWN_COLUMNS]))
            yield [Drop(f"no column {error}: the row has {there}", unfit=True)]
        except UnicodeError:
            yield [Drop("a text with half a character (a lone surrogate)", unfit=True)]
        except ValueError as error:
            yield [Drop(general(str(error)), unfit=True)]
        except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError):
            yield [Drop("a value of another type than expected", unfit=True)]


def checked(draft: Draft) -> Draft:
    """The same draft. ValueError or TypeError: it cannot be stored, or a branch is not one of the schema's."""
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
    """Whether it is an address, a path whose parts are short enough for a file system, or the bytes of a file."""
    if isinstance(name, str) and "://" not in name:
        return all(len(os.fsencode(part)) <= MAX_NAME for part in name.split("/"))
    return isinstance(name, str | bytes)


def training_split(raw: RawSource, entry: dict) -> str | None:
    """The split that the catalogue names, or "train"; None if the raw files have no splits."""
    known = raw.info.get("splits")
    named = (entry["source"].get("hf") or {}).get("split")
    return next((split for split in (named, "train") if known and split in known), None)


def about_of(draft: Draft) -> str:
    """What a draft is about. Equal texts are held out together or not at all, in every data set."""
    if draft.about is not None:
        return draft.about
    if not draft.video and not draft.images:
        return json.dumps(draft.branches)
    if draft.video:
        return (draft.video.names or draft.video.cut or draft.video.frames)[0]
    names = [image["name"] if isinstance(image, dict) else image for image in draft.images]
    names = [name[0] if isinstance(name, list) else name for name in names]
    return "\n".join(hashlib.sha256(name).hexdigest() if isinstance(name, bytes) else name for name in names)


def reason_of(dropped: Counter, reason: str) -> str:
    """The reason, or "other reasons" if too many different ones are counted already."""
    return reason if reason in dropped or len(dropped) < MAX_REASONS else "other reasons"
