"""Pictures or videos from a list of addresses on other people's servers.

    media/ab/abcd....jpg   one file for each address (raw.media_name)
    media/index.jsonl      address, file, bytes, sha256, width, height of each that is there
    media/lost.jsonl       address, reason, status, date before which it is not asked again, of each that is not
    media/.part/           what has come of the others

A file gets its name only after its bytes were decoded, so that a name is a promise.
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

from molmo2_nemo.catalogue.raw import MEDIA_SUFFIXES, media_name
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.fetch.media_check import BadContent, check_image, check_video, dhash
from molmo2_nemo.fetch.web import Lost, OutOfBytes, Rules, Unreachable, download, publish, session
from molmo2_nemo.files import locked, sha256_of

# Days before an address is asked again, by why it was lost. `later` grows with the rounds that asked in vain.
DAYS = {"gone": 180, "forbidden": 30, "content": 90, "held out": 36500, "duplicate": 36500}
LATER_DAYS = (0, 0, 0, 1, 1, 7)
# So many failures without one answer from anybody: the fault is here.
DARK = 64
# So many answers in a row that ask to wait longer than a run does, and the host is left alone until the next.
FAR = 4
ACCEPT = {"image": "image/jpeg,image/png,image/webp,image/*;q=0.8", "video": "video/mp4,video/*;q=0.8"}


@dataclass(frozen=True)
class Wanted:
    """An address of the list."""

    url: str
    sha256: str | None = None  # of the bytes, where the set has it


class NoNetwork(Exception):
    """Nobody answers; nothing was written down as lost."""


@dataclass
class DownloadProgress:
    """What a fetch reports while it runs. Bytes are counted as they come."""

    add_bytes: Callable[[int], None] = lambda count: None
    add_files: Callable[[int], None] = lambda count: None
    start: Callable[[int, int], None] = lambda total, done: None  # files of a list, and those there before
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
) -> dict[str, int]:
    """Get all that can be had into `media`; counts: urls, fetched, lost, held_out, "lost: KIND", and
    fresh, of those lost for now, which were asked in one call alone.

    held_out: addresses, and hashes of bytes. NoNetwork, OutOfBytes, OSError of the disk: the next call goes on.
    """
    today = today or datetime.now(UTC).date()
    unique = {item.url: item for item in wanted}
    with locked(media / ".lock"):
        job = _ListDownload(unique, media, rules, kind, progress or DownloadProgress(), held_out, retry_lost, today)
        try:
            job.take_stock()
            if job.open:
                asyncio.run(job.run())
                # Once more, later and in short, what may have passed.
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
    fresh = (job.lost.records[url] for url in unique if url in job.lost.records)
    counts["fresh"] = sum(record["kind"] == "later" and record["runs"] < 3 for record in fresh)
    return counts | {f"lost: {reason}": number for reason, number in sorted(reasons.items())}


class _ListDownload:
    def __init__(self, wanted, media, rules, kind, progress, held_out, retry_lost, today):
        self.wanted, self.media, self.rules, self.kind, self.progress = wanted, media, rules, kind, progress
        self.held_out, self.retry_lost, self.today = held_out, retry_lost, today
        self.index = Journal(media / "index.jsonl", "url")
        self.lost = Journal(media / "lost.jsonl", "url")
        self.open: list[Wanted] = []
        self.dark: list[tuple[Wanted, Lost]] = []  # failures since the last answer
        self.answered = False
        self.rounds = 1
        self.paused: dict[str, float] = {}  # host -> loop time until which it is left alone
        self.far: Counter[str] = Counter()  # host -> answers in a row that ask to wait longer than a run does
        self.deferred: dict[str, str] = {}  # hosts that are left alone for this run, with what they said
        self.stopped: BaseException | None = None

    def take_stock(self) -> None:
        """Which addresses are open; files that are not what the index says are open again."""
        for url, item in self.wanted.items():
            record, lost = self.index.records.get(url), self.lost.records.get(url)
            if record is not None and record["sha256"] in self.held_out[1] or url in self.held_out[0]:
                if record is not None:  # from when the list was not known
                    self.index.remove(url)
                    (self.media / record["file"]).unlink(missing_ok=True)
                if lost is None or lost["kind"] != "held out":
                    self._lose(item, Lost("held out", "held out for evaluation"))
                continue
            if record is not None:
                if self._is_there(record) and record["sha256"] == (item.sha256 or record["sha256"]).lower():
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
        """A second round for those that may pass."""
        asked = {item.url for item in self.open}
        self.open = [
            self.wanted[url] for url, record in self.lost.records.items() if record["kind"] == "later" and url in asked
        ]
        self.rules = replace(self.rules, tries=1)
        self.rounds = 2

    async def run(self) -> None:
        """Deal the addresses to workers. A host has as many tokens as files may come from it at once."""
        hosts: dict[str, deque[Wanted]] = {}
        for item in self.open:
            try:
                host = (urlsplit(item.url).netloc or "").rpartition("@")[2].lower()
            except ValueError:
                host = ""
            hosts.setdefault(host, deque()).append(item)
        tokens: asyncio.Queue[str] = asyncio.Queue()
        # A round of first tokens before any host's second: many hosts are busy from the start.
        for turn in range(self.rules.per_host):
            for host, items in hosts.items():
                if len(items) > turn:
                    tokens.put_nowait(host)
        left = len(self.open)
        threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        names = ThreadPoolExecutor(self.rules.jobs)  # resolving blocks a thread each
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
        if self.dark:
            # The last ones; somebody answered before, or the list is short.
            if not self.answered and len(self.dark) == len(self.open) and len(self.open) > 1:
                raise NoNetwork(
                    f"none of {len(self.dark)} addresses answered, the last said: {self.dark[-1][1].reason}"
                )
            self._settle()

    async def _one(self, client, item: Wanted, host: str, threads) -> None:
        stem = media_name(item.url)
        part = self.media / ".part" / stem.split("/")[1]
        loop = asyncio.get_running_loop()

        async def wait(seconds: float, busy: bool) -> None:
            if busy:  # The whole host is left alone.
                self.paused[host] = max(self.paused.get(host, 0), loop.time() + seconds)
            await asyncio.sleep(seconds)

        try:
            if host in self.deferred:
                raise Lost("later", self.deferred[host], 429)
            while (seconds := self.paused.get(host, 0) - loop.time()) > 0:
                await asyncio.sleep(seconds)
            there = next((p for s in MEDIA_SUFFIXES if (p := self.media / f"{stem}{s}").is_file()), None)
            if there is not None:
                # Published, but the kill came before its line in the index.
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
            suffix = record.pop("suffix")
            publish(part, self.media / f"{stem}{suffix}")
            self._light()
            self.index.append({"url": item.url, "file": f"{stem}{suffix}", **record})
            self.lost.remove(item.url)
            self.far.pop(host, None)
        except Unreachable as error:
            self.dark.append((item, error))
            if len(self.dark) >= DARK and not self.answered:
                raise NoNetwork(
                    f"none of {len(self.dark)} addresses answered, the last said: {error.reason}"
                ) from error
            if self.answered and len(self.dark) >= DARK:
                self._settle()
        except Lost as error:
            self._light()
            if error.wait_too_long:
                self.far[host] += 1
                if self.far[host] >= FAR:
                    self.deferred[host] = error.reason
            if error.kind in ("gone", "forbidden", "content", "held out"):
                part.unlink(missing_ok=True)
            self._lose(item, error)

    def _light(self) -> None:
        """Somebody answered."""
        self.answered = True
        if self.dark:
            self._settle()

    def _settle(self) -> None:
        for item, error in self.dark:
            self._lose(item, error)
        self.dark.clear()

    def _checked(self, item: Wanted, part: Path) -> dict:
        digest = sha256_of(part)
        if digest in self.held_out[1]:
            raise Lost("held out", "held out for evaluation")
        if item.sha256 and digest != item.sha256.lower():
            what = (check_image if self.kind == "image" else check_video)(part)  # says "a web page", if it is one
            raise BadContent(f"another {self.kind} than the set's ({what['width']} x {what['height']}, other sha256)")
        found = check_image(part, published=bool(item.sha256)) if self.kind == "image" else check_video(part)
        return {**found, "bytes": part.stat().st_size, "sha256": digest}

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
        """All addresses have an answer."""
        shutil.rmtree(self.media / ".part", ignore_errors=True)
        self.index.tidy()
        self.lost.tidy()


def remove_duplicates(media: Path, max_bits: int = 2, today: date | None = None) -> int:
    """Remove pictures that look like one with a smaller address; their number.

    Hashes that differ in up to 3 of 64 bits share one of four quarters, so that few are compared.
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
