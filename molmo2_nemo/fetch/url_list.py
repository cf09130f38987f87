"""Download pictures or videos from a list of addresses on many servers.

    media/ab/abcd....jpg   one file for each address (raw.media_name)
    media/index.jsonl      address, file, bytes, sha256, width, height of each that is there; of a resized picture also
                           those four of the published file, as `published`
    media/lost.jsonl       address, reason, status, date of the next attempt, of each that is not
    media/.part/           unfinished downloads

A file gets its final name only after it was decoded without error.
"""

import asyncio
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from molmo2_nemo.catalogue import resized
from molmo2_nemo.catalogue.raw import MEDIA_SUFFIXES, media_name
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.fetch.media_check import BadContent, check_image, check_video, dhash
from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.fetch.web import Lost, OutOfBytes, Unreachable, download, publish, session
from molmo2_nemo.files import locked, sha256_of

# Days until an address is tried again, by the kind of failure. For `later` they grow with the number of failed runs.
DAYS = {"gone": 180, "forbidden": 30, "content": 90, "held out": 36500, "duplicate": 36500}
LATER_DAYS = (0, 0, 0, 1, 1, 7)
# After so many failures without a single answer, this machine has no network.
MAX_UNANSWERED = 64
# After so many answers in a row that ask to wait longer than `max_wait`, a host is not asked again in this run.
MAX_LONG_WAITS = 4
ACCEPT = {"image": "image/jpeg,image/png,image/webp,image/*;q=0.8", "video": "video/mp4,video/*;q=0.8"}


@dataclass(frozen=True)
class Wanted:
    """An address of the list."""

    url: str
    sha256: str | None = None  # of the file, if the data set lists it


class NoNetwork(Exception):
    """No server answers, so nothing was recorded as lost."""


@dataclass
class DownloadProgress:
    """Functions that a download calls to report its progress."""

    add_bytes: Callable[[int], None] = lambda count: None
    add_files: Callable[[int], None] = lambda count: None
    start: Callable[[int, int], None] = lambda total, done: None  # files of a list, and how many were there before
    expect: Callable[[int], None] = lambda count: None  # bytes of files that come next


def fetch_list(
    wanted: Iterable[Wanted],
    media: Path,
    rules: Rules,
    kind: str = "image",
    progress: DownloadProgress | None = None,
    held_out: tuple[set[str], set[str]] = (set(), set()),
    retry_lost: bool = False,
    today: date | None = None,
    max_side: int | None = None,
) -> dict[str, int]:
    """Download everything that is available to `media` and return counts: urls, fetched, lost, held_out, "lost: KIND",
    and fresh: those lost for now that were tried in this call only.

    held_out: addresses and checksums that must not be downloaded. max_side: pixels of the longer side of pictures;
    larger ones that arrive are resized (catalogue/resized.py) and counted as resized, and those that are there already
    stay as they are. NoNetwork, OutOfBytes and OSError of the disk pass through; the next call continues.
    """
    today = today or datetime.now(UTC).date()
    unique = {item.url: item for item in wanted}
    with locked(media / ".lock"):
        progress = progress or DownloadProgress()
        job = _ListDownload(unique, media, rules, kind, progress, held_out, retry_lost, today, max_side)
        try:
            job.take_stock()
            if job.open:
                asyncio.run(job.run())
                # Try temporary failures once more, with a single attempt each.
                job.again()
                if job.open:
                    asyncio.run(job.run())
            job.finish()
        finally:
            job.index.close()
            job.lost.close()
    reasons = Counter(job.lost.records[url]["kind"] for url in unique if url in job.lost.records)
    counts = {
        "urls": len(unique),
        "fetched": sum(url in job.index.records for url in unique),
        "held_out": reasons.pop("held out", 0),
        "lost": sum(reasons.values()),
    }
    if smaller := sum("published" in job.index.records.get(url, {}) for url in unique):
        counts["resized"] = smaller
    fresh = (job.lost.records[url] for url in unique if url in job.lost.records)
    counts["fresh"] = sum(record["kind"] == "later" and record["runs"] < 3 for record in fresh)
    return counts | {f"lost: {reason}": number for reason, number in sorted(reasons.items())}


class _ListDownload:
    def __init__(self, wanted, media, rules, kind, progress, held_out, retry_lost, today, max_side):
        self.wanted, self.media, self.rules, self.kind, self.progress = wanted, media, rules, kind, progress
        self.held_out, self.retry_lost, self.today, self.max_side = held_out, retry_lost, today, max_side
        self.index = Journal(media / "index.jsonl", "url")
        self.lost = Journal(media / "lost.jsonl", "url")
        self.open: list[Wanted] = []
        self.unanswered: list[tuple[Wanted, Lost]] = []  # failures since the last answer of any server
        self.answered = False
        self.rounds = 1
        self.paused: dict[str, float] = {}  # host -> event loop time until which it is not asked
        self.long_waits: Counter[str] = Counter()  # host -> answers in a row that ask to wait longer than `max_wait`
        self.deferred: dict[str, str] = {}  # host that is not asked again in this run -> its answer
        self.stopped: BaseException | None = None

    def take_stock(self) -> None:
        """Find the addresses to download; those whose file differs from its record are downloaded again."""
        for url, item in self.wanted.items():
            record, lost = self.index.records.get(url), self.lost.records.get(url)
            digest = record and record.get("published", record)["sha256"]
            if record is not None and digest in self.held_out[1] or url in self.held_out[0]:
                if record is not None:  # from when the list was not known
                    self.index.remove(url)
                    (self.media / record["file"]).unlink(missing_ok=True)
                if lost is None or lost["kind"] != "held out":
                    self._lose(item, Lost("held out", "held out for evaluation"))
                continue
            if record is not None:
                if self._is_there(record) and digest == (item.sha256 or digest).lower():
                    continue
                self.index.remove(url)
            if lost is not None and (not self.retry_lost or lost["kind"] == "held out"):
                if lost["kind"] != "held out" and lost["not_before"] <= self.today.isoformat():
                    self.open.append(item)
                continue
            self.open.append(item)
        self.progress.start(len(self.wanted), len(self.wanted) - len(self.open))

    def _is_there(self, record: dict) -> bool:
        try:
            return os.stat(self.media / record["file"]).st_size == record["bytes"]
        except OSError:
            return False

    def again(self) -> None:
        """Prepare a second round for temporary failures."""
        asked = {item.url for item in self.open}
        self.open = [
            self.wanted[url] for url, record in self.lost.records.items() if record["kind"] == "later" and url in asked
        ]
        self.rules = replace(self.rules, tries=1)
        self.rounds = 2

    async def run(self) -> None:
        """Distribute the addresses to workers. A host has a token for each file that may come from it at once."""
        hosts: dict[str, deque[Wanted]] = {}
        for item in self.open:
            try:
                host = (urlsplit(item.url).netloc or "").rpartition("@")[2].lower()
            except ValueError:
                host = ""
            hosts.setdefault(host, deque()).append(item)
        tokens: asyncio.Queue[str] = asyncio.Queue()
        # First tokens of all hosts come before second ones, so that many hosts are busy from the start.
        for turn in range(self.rules.per_host):
            for host, items in hosts.items():
                if len(items) > turn:
                    tokens.put_nowait(host)
        left = len(self.open)
        threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        names = ThreadPoolExecutor(self.rules.jobs)  # resolving a name blocks a thread
        asyncio.get_running_loop().set_default_executor(names)

        async def work(client) -> None:
            nonlocal left
            while True:
                host = await tokens.get()
                if host is None:
                    return
                if not hosts[host]:
                    continue
                await self._one(client, hosts[host].popleft(), host, threads)
                left -= 1
                if self.rounds == 1:
                    self.progress.add_files(1)
                if hosts[host]:
                    tokens.put_nowait(host)
                if left == 0:
                    for _ in range(self.rules.jobs):
                        tokens.put_nowait(None)

        try:
            async with session(self.rules) as client:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.rules.jobs):
                        group.create_task(work(client))
        except* (OutOfBytes, OSError, NoNetwork) as errors:
            first = errors.exceptions[0]
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            self.stopped = first
        finally:
            threads.shutdown()
        if self.stopped is not None:
            raise self.stopped
        if self.unanswered:
            # The last failures: some server answered before, or the list is short.
            if not self.answered and len(self.unanswered) == len(self.open) and len(self.open) > 1:
                reason = self.unanswered[-1][1].reason
                raise NoNetwork(f"none of {len(self.unanswered)} addresses answered, the last error was: {reason}")
            self._lose_unanswered()

    async def _one(self, client, item: Wanted, host: str, threads) -> None:
        stem = media_name(item.url)
        part = self.media / ".part" / stem.split("/")[1]
        loop = asyncio.get_running_loop()

        async def wait(seconds: float, busy: bool) -> None:
            if busy:  # The whole host has to wait.
                self.paused[host] = max(self.paused.get(host, 0), loop.time() + seconds)
            await asyncio.sleep(seconds)

        try:
            if host in self.deferred:
                raise Lost("later", self.deferred[host], 429)
            while (seconds := self.paused.get(host, 0) - loop.time()) > 0:
                await asyncio.sleep(seconds)
            there = next((p for s in MEDIA_SUFFIXES if (p := self.media / f"{stem}{s}").is_file()), None)
            if there is not None and (record := self._kept(item, there)):
                self._record(item, str(there.relative_to(self.media)), record)
                return
            if there is not None:
                # An earlier run was killed between renaming the file and recording it.
                part.parent.mkdir(parents=True, exist_ok=True)
                os.replace(there, part)
            if there is None or not part.is_file():
                add_bytes = self.progress.add_bytes
                await download(client, item.url, part, self.rules, add_bytes, ACCEPT[self.kind], wait)
            try:
                record = await loop.run_in_executor(threads, self._checked, item, part)
            except BadContent as error:
                part.unlink(missing_ok=True)
                raise Lost("content", str(error)) from error
            name = f"{stem}{record['suffix']}"
            publish(_small(part) if "published" in record else part, self.media / name)
            part.unlink(missing_ok=True)
            self._note_answer()
            self._record(item, name, record)
            self.long_waits.pop(host, None)
        except Unreachable as error:
            self.unanswered.append((item, error))
            if len(self.unanswered) >= MAX_UNANSWERED and not self.answered:
                raise NoNetwork(
                    f"none of {len(self.unanswered)} addresses answered, the last error was: {error.reason}"
                ) from error
            if self.answered and len(self.unanswered) >= MAX_UNANSWERED:
                self._lose_unanswered()
        except Lost as error:
            self._note_answer()
            if error.wait_too_long:
                self.long_waits[host] += 1
                if self.long_waits[host] >= MAX_LONG_WAITS:
                    self.deferred[host] = error.reason
            if error.kind in ("gone", "forbidden", "content", "held out"):
                part.unlink(missing_ok=True)
            self._lose(item, error)

    def _record(self, item: Wanted, name: str, record: dict) -> None:
        self.index.append({"url": item.url, "file": name, **{k: v for k, v in record.items() if k != "suffix"}})
        self.lost.remove(item.url)

    def _note_answer(self) -> None:
        """Remember that a server answered, so the network works and earlier failures are real."""
        self.answered = True
        if self.unanswered:
            self._lose_unanswered()

    def _lose_unanswered(self) -> None:
        for item, error in self.unanswered:
            self._lose(item, error)
        self.unanswered.clear()

    def _checked(self, item: Wanted, part: Path) -> dict:
        digest = sha256_of(part)
        if digest in self.held_out[1]:
            raise Lost("held out", "held out for evaluation")
        if item.sha256 and digest != item.sha256.lower():
            what = (check_image if self.kind == "image" else check_video)(part)  # which says so if it is a web page
            raise BadContent(f"another {self.kind} than the set's ({what['width']} x {what['height']}, other sha256)")
        found = check_image(part, published=bool(item.sha256)) if self.kind == "image" else check_video(part)
        record = {**found, "bytes": part.stat().st_size, "sha256": digest}
        small = resized.smaller(part.read_bytes(), self.max_side) if self.max_side and self.kind == "image" else None
        if small is None:
            return record
        # Not into the same file: an interrupted download would go on at its end.
        _small(part).write_bytes(small)
        return _of_resized(_small(part))

    def _kept(self, item: Wanted, path: Path) -> dict | None:
        """The record of a file that an earlier run has resized; None: it is another file."""
        record = _of_resized(path) if self.kind == "image" else None
        if record and item.sha256 and record["published"]["sha256"] != item.sha256.lower():
            return None
        return record

    def _lose(self, item: Wanted, error: Lost) -> None:
        before = self.lost.records.get(item.url, {})
        runs = before.get("runs", 0) + 1
        days = DAYS.get(error.kind, LATER_DAYS[min(runs, len(LATER_DAYS) - 1)])
        not_before = (self.today + timedelta(days=days)).isoformat()
        self.lost.append(
            {
                "url": item.url,
                "kind": error.kind,
                "reason": error.reason,
                "code": error.code,
                "runs": runs,
                "not_before": not_before,
            }
        )

    def finish(self) -> None:
        """Remove partial files and sort the records, once every address has a result."""
        shutil.rmtree(self.media / ".part", ignore_errors=True)
        self.index.tidy()
        self.lost.tidy()


def _small(part: Path) -> Path:
    return part.with_name(f"{part.name}.small")


def _of_resized(path: Path) -> dict | None:
    """What the index says of a picture that was resized on arrival; None: it was not."""
    with path.open("rb") as file:
        published = resized.published(file.read(resized.COMMENT_BYTES))
    if published is None:
        return None
    try:
        found = check_image(path)
    except BadContent:
        return None
    return {**found, "bytes": path.stat().st_size, "sha256": sha256_of(path), "published": published}


def remove_duplicates(media: Path, max_bits: int = 2, today: date | None = None) -> int:
    """Remove pictures that look like one whose address sorts before theirs, and return their number.

    max_bits: by which the 64-bit difference hashes of two alike pictures may differ, at most 3. Such hashes have at
    least one of their four 16-bit quarters in common, so only those are compared.
    """
    today = today or datetime.now(UTC).date()
    index, lost = Journal(media / "index.jsonl", "url"), Journal(media / "lost.jsonl", "url")
    quarters: list[dict[int, list[tuple[int, str]]]] = [{} for _ in range(4)]
    removed = 0
    for url in sorted(index.records):
        record = index.records[url]
        look = dhash(media / record["file"])
        keys = [(look >> (16 * n)) & 0xFFFF for n in range(4)]
        near = (
            other
            for n, key in enumerate(keys)
            for seen, other in quarters[n].get(key, ())
            if (seen ^ look).bit_count() <= max_bits
        )
        twin = min(near, default=None)
        if twin is None:
            for n, key in enumerate(keys):
                quarters[n].setdefault(key, []).append((look, url))
            continue
        (media / record["file"]).unlink(missing_ok=True)
        lost.append(
            {
                "url": url,
                "kind": "duplicate",
                "reason": f"looks like {twin}",
                "code": None,
                "runs": 1,
                "not_before": (today + timedelta(days=DAYS["duplicate"])).isoformat(),
            }
        )
        index.remove(url)
        removed += 1
    index.tidy()
    lost.tidy()
    return removed
