"""Fetch one data set: its annotations, then the media that they name, and last fetched.json, which says what is there.

Beside the folders that `molmo2_nemo.catalogue.raw` describes, raw/NAME holds files.jsonl (size, checksum and address of
each file) and archives/ (archives from plain addresses). An address that several sets share is fetched once, into
raw/.shared.
"""

import asyncio
import contextlib
import math
import os
import re
import shutil
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.datasets import Catalogue, DataSet
from molmo2_nemo.catalogue.raw import (
    ROW_SUFFIXES,
    RawSource,
    column_values,
    columns_of,
    matches,
    num_rows,
    read_note,
    size_on_disk,
)
from molmo2_nemo.fetch import hub
from molmo2_nemo.fetch.archives import SUFFIXES, BadArchive, Bounds, archive_kind, extract
from molmo2_nemo.fetch.file_names import direct, file_name, other_name
from molmo2_nemo.fetch.held_out import held_out_lists
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.fetch.media_check import BadContent, begins_as_json, check_file, check_rows
from molmo2_nemo.fetch.on_disk import (
    NEWER,
    broken_files,
    fault,
    glance,
    is_unpacked,
    lacking,
    lacks_by_hand,
    manual_annotations,
    missing_layout,
    remove_broken,
    shared_homes,
    unpacked_as,
)
from molmo2_nemo.fetch.room import NoScratch, Room, in_turn
from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.fetch.url_list import DownloadProgress, NoNetwork, Wanted, fetch_list, remove_duplicates
from molmo2_nemo.fetch.web import Lost, OutOfBytes, download, length_of, publish, session
from molmo2_nemo.fetch.youtube import fetch_videos
from molmo2_nemo.files import LockHeld, is_disk_error, locked, sha256_of, sha256_of_text, write_json

# Share of a list's addresses that may fail temporarily in a first fetch; with more, the set counts as incomplete.
MAX_LATER = 0.25
MAX_ARCHIVE = 4 * 10**12  # bytes


@dataclass(frozen=True)
class FetchOptions:
    """Options of a fetch, as `tools/download.py fetch --help` describes them."""

    root: Path
    rules: Rules = field(default_factory=Rules)
    limit: int | None = None  # rows
    verify: bool = False  # check what is there by reading it
    retry_lost: bool = False
    deduplicate: bool = False
    remove_archives: bool = False
    max_side: int | None = None  # pixels of the longer side of pictures; larger ones are resized on arrival
    bounds: Bounds = field(default_factory=Bounds)
    room: Room | None = None  # that it may take on the disk


@dataclass
class Meter:
    """Counts the bytes that all data sets of a run download. OutOfBytes: they exceed `max_bytes`."""

    max_bytes: int | None = None
    bytes: int = 0
    report: Callable[[int], None] = lambda count: None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, count: int) -> None:
        with self._lock:
            if self.max_bytes is not None and self.bytes + count > self.max_bytes:
                raise OutOfBytes(f"--max-bytes {self.max_bytes:,} is used up")
            self.bytes += count
        self.report(count)


@dataclass
class FetchResult:
    """How the fetch of a data set ended. state: complete | sample | useless | by hand | part | refused | failed."""

    name: str
    state: str
    reason: str = ""
    bytes: int = 0  # downloaded by this run
    seconds: float = 0.0
    counts: dict = field(default_factory=dict)


def fetch_set(
    entry: DataSet, catalogue: Catalogue, options: FetchOptions, meter: Meter, progress: DownloadProgress
) -> FetchResult:
    """Fetch what can be downloaded of a set. OSError of the disk and OutOfBytes pass through: they end the run."""
    if entry.unsure:
        return FetchResult(entry.name, "refused", f"not fetched: {entry.unsure}")
    folder = options.root / "raw" / entry.name
    started, before = time.monotonic(), meter.bytes
    try:
        with locked(folder / ".lock"):
            fetch = _Fetch(entry, catalogue, options, meter, progress)
            try:
                result = fetch.run()
            except (OutOfBytes, KeyboardInterrupt, OSError) as error:
                with contextlib.suppress(OSError):
                    fetch.note(complete=False, stopped=str(error) or "interrupted")
                if isinstance(error, OSError) and not _ends_the_run(error):
                    result = FetchResult(entry.name, "failed", _sentence(error))
                else:
                    raise
            except (ValueError, Lost, NoNetwork, NoScratch, BadArchive, BadContent) as error:
                fetch.note(complete=False, stopped=str(error))
                result = FetchResult(entry.name, "failed", " ".join(str(error).split()))
            finally:
                fetch.files.close()
    except LockHeld:
        return FetchResult(entry.name, "failed", f"another fetch of {entry.name} is running")
    except OSError as error:
        if _ends_the_run(error):
            raise
        return FetchResult(entry.name, "failed", _sentence(error))
    result.bytes, result.seconds = meter.bytes - before, time.monotonic() - started
    return result


def _ends_the_run(error: OSError) -> bool:
    """Whether the disk is at fault, and not one file or folder."""
    return is_disk_error(error) and not isinstance(error, PermissionError)


def _sentence(error: OSError) -> str:
    return f"{error.strerror or error}: {error.filename}" if error.filename else f"{error.strerror or error}"


class _Fetch:
    """A data set while it is fetched."""

    def __init__(
        self, entry: DataSet, catalogue: Catalogue, options: FetchOptions, meter: Meter, progress: DownloadProgress
    ):
        self.entry, self.catalogue, self.options, self.meter, self.progress = entry, catalogue, options, meter, progress
        self.rules = options.rules
        self.folder = options.root / "raw" / entry.name
        self.files = Journal(self.folder / "files.jsonl", "file")
        self.splits: dict[str, list[str]] = {}
        self.waiting: list[str] = []  # sentences about what is missing
        self.counts: dict[str, int] = {}
        self.revisions: dict[str, str] = {}  # of its repositories
        # A fetch that goes on does as the one before it.
        self.max_side = options.max_side or (read_note(options.root, entry.name) or {}).get("max_side")
        self.facts: dict = {
            "max_side": self.max_side,
            "revision": None,
            "repo": None,
            "license": entry.license,
            "held_out": None,
        }
        self.started, self.bytes_before = time.monotonic(), meter.bytes

    def run(self) -> FetchResult:
        entry = self.entry
        if not self.options.verify:
            if self._looks_changed():
                self._remove_broken()
            if self._is_whole():
                return FetchResult(entry.name, "complete", "is already complete")
        # Before any file is removed, so that an interrupted run is recognised.
        if (self.folder / "fetched.json").exists():
            self.note(complete=False, stopped="being fetched")
        if self.options.verify:
            self._remove_broken()
        {"hf": self._hub_annotations, "url": self._url_annotations, "manual": lambda: None}[entry.source.kind]()
        self._media()
        self._by_hand()
        sample = self.options.limit is not None
        complete = not self.waiting and not sample
        if not self.waiting:
            self._tidy()
        self.note(complete=complete, stopped=None)
        if self.waiting:
            return FetchResult(
                entry.name, "by hand" if entry.by_hand else "part", "; ".join(self.waiting), counts=self.counts
            )
        return FetchResult(entry.name, "sample" if sample else "complete", self._remark(), counts=self.counts)

    def _remove_broken(self) -> None:
        for home in (self.folder, *shared_homes(self.folder)):
            remove_broken(home)
        self.files.close()
        self.files = Journal(self.folder / "files.jsonl", "file")

    def _looks_changed(self) -> bool:
        """Whether a file is newer than the fetch that completed the set; then all are read."""
        info = read_note(self.options.root, self.entry.name) or {}
        found = glance(self.folder, info) if info.get("complete") else None
        return found is not None and found[1] == NEWER

    def _is_whole(self) -> bool:
        info = read_note(self.options.root, self.entry.name) or {}
        source, root = self.entry.source.hf, self.options.root
        # A user who removes its line from revisions.json wants the newest commit.
        moved = source and (source.revision or hub.pinned(root, source.repo)) != info.get("revision")
        again = (info.get("media") or {}).get("later", 0) or self.options.retry_lost or self.options.deduplicate
        if not info.get("complete") or again or moved or lacks_by_hand(self.entry, self.folder, info):
            return False
        return not lacking(self.folder, info) and not any(broken_files(self.folder))

    def _remark(self) -> str:
        media = self.counts
        if not media.get("urls"):
            return ""
        text = f"{media['fetched']:,} of {media['urls']:,} addresses"
        if media.get("held_out"):
            text += f", {media['held_out']:,} held out"
        if media.get("resized"):
            text += f", {media['resized']:,} resized to {self.max_side} pixels"
        if media.get("later"):
            text += f", {media['later']:,} failed temporarily: run it again"
        return text

    # Annotations

    def _hub_annotations(self) -> None:
        wanted = self.entry.source.hf
        repository = hub.open_repository(wanted, self.options.root, self.rules)
        self.revisions[repository.repo] = repository.revision
        self.facts |= {"revision": repository.revision, "repo": repository.repo}
        self.facts["license"] = self.entry.license or repository.license
        chosen = hub.choose_files(repository, wanted)
        for split, names in chosen.items():
            rows = [name for name in names if Path(name).suffix.lower() in ROW_SUFFIXES][:1]
            if rows and self.entry.row_columns:
                self._from_hub(repository, rows)
                self._check_columns(f"hub/{rows[0]}")
            if self.options.limit is not None:
                names = self._enough(repository, names, wanted.filter)
            for some in self._in_turn(repository, names):
                self._from_hub(repository, some)
            self.splits[split] = [f"hub/{name}" for name in names]
        absent = [name for name in wanted.also if name not in repository.files]
        if absent:
            raise ValueError(
                f"{wanted.repo} has no file {', '.join(absent)}: correct the key also of the entry {self.entry.name}."
            )
        self._from_hub(repository, wanted.also)

    def _enough(self, repository: hub.Repository, names: list[str], condition: str | None) -> list[str]:
        """Fetch the first files that have enough rows for a sample, and return their names."""
        rows, chosen = 0, []
        for name in names:
            chosen.append(name)
            self._from_hub(repository, [name])
            path = self.folder / "hub" / name
            if path.suffix.lower() in ROW_SUFFIXES and not condition:
                rows += num_rows(path)
            if rows >= self.options.limit:
                break
        return chosen

    def _from_hub(self, repository: hub.Repository, names: list[str]) -> None:
        source = f"hf://datasets/{repository.repo}@{repository.revision}"
        of_hub = [record for record in self.files.records.values() if record["file"].startswith("hub/")]
        known = {record["file"][4:]: record for record in of_hub if record.get("from", "").startswith(source)}
        names = [name for name in names if name not in known or not is_unpacked(self.folder, self.files, known[name])]

        def done(name: str, record: dict) -> None:
            self.files.append({"file": f"hub/{name}", "from": f"{source}/{name}", **record})

        into, expect = self.folder / "hub", self.progress.expect
        hub.fetch_files(repository, names, into, known, self.rules, self.meter.add, done, expect)

    def _in_turn(self, repository: hub.Repository, names: list[str]) -> Iterator[list[str]]:
        """The files in groups for each of which there is room."""
        if self.options.room is None:
            return iter([names])
        there = {n for n in names if (record := self.files.records.get(f"hub/{n}")) and self._has(record)}
        sizes = {n: 0 if n in there else hub.bytes_left(repository, n, self.folder / "hub") for n in names}
        return in_turn(sizes, self.options.room, self.entry.name)

    def _has(self, record: dict) -> bool:
        return _is_there(self.folder, record) or is_unpacked(self.folder, self.files, record)

    def _url_annotations(self) -> None:
        files = []
        for url in self.entry.source.urls:
            found = self._from_url(url, "hub", archive=None)
            found = [name for name in found if Path(name).suffix.lower() in ROW_SUFFIXES]
            if found and not files:
                self._check_columns(found[0])
            files += found
        self.splits["train"] = files

    def _check_columns(self, name: str) -> None:
        """ValueError: the first file of rows lacks a column that the entry reads. More need not be downloaded then."""
        wanted = self.entry.row_columns
        known = columns_of(self.folder / name) if wanted else []
        if known and (missing := [column for column in wanted if column not in known]):
            raise ValueError(
                f"{self.entry.name} has no column {', '.join(missing)}: it has {', '.join(known)} ({name}); correct "
                "its entry in the catalogue."
            )

    # Media

    def _media(self) -> None:
        media = self.entry.media
        if media.hf:
            repository = hub.open_repository(media.hf, self.options.root, self.rules)
            self.revisions[repository.repo] = repository.revision
            names = [name for names in hub.choose_files(repository, media.hf).values() for name in names]
            for some in self._in_turn(repository, names):
                self._from_hub(repository, some)
                for name in some:
                    self._unpack(self.folder, self.files, f"hub/{name}", only_if_archive=True)
        for url in media.urls:
            self._from_url(url, "media", archive=True if media.kind == "archive" else None)
        if media.kind == "archive" and not media.hf and not media.urls and self.entry.source.kind == "hf":
            for name in list(self.files.records):
                if name.startswith("hub/"):
                    self._unpack(self.folder, self.files, name, only_if_archive=True)
        if media.kind == "url-list":
            self._url_list()
        elif media.kind == "youtube-ids" and media.columns and shutil.which("yt-dlp"):
            self._youtube()

    def _url_list(self) -> None:
        held_out, checked = held_out_lists(tuple(self.catalogue.held_out), self.options.root, self.rules)
        self.facts["held_out"] = "checked" if checked else "not checked"
        kind = "video" if self.entry.modality == "video" else "image"
        folder = self.folder / "media"
        counts = fetch_list(
            self._wanted(),
            folder,
            self.rules,
            kind,
            replace(self.progress, add_bytes=self.meter.add),
            held_out,
            self.options.retry_lost,
            max_side=self.max_side,
        )
        if self.options.deduplicate and kind == "image":
            counts["duplicates"] = remove_duplicates(folder)
            counts["fetched"] -= counts["duplicates"]
        counts["later"] = counts.get("lost: later", 0)
        self.counts |= counts
        fresh = counts.pop("fresh")
        if fresh > MAX_LATER * counts["urls"]:
            self.waiting.append(f"{fresh:,} of {counts['urls']:,} addresses failed temporarily: run it again")

    def _wanted(self) -> Iterator[Wanted]:
        media = self.entry.media
        columns = [*media.columns, *([media.sha256] if media.sha256 else [])]
        row = found = None
        for row in self._columns(columns):
            for column in media.columns:
                value = row.get(column)
                for url in value if isinstance(value, list) else [value]:
                    if isinstance(url, str) and url:
                        found = True
                        digest = row.get(media.sha256) if media.sha256 else None
                        yield Wanted(url, digest if isinstance(digest, str) and len(digest) == 64 else None)
        if row and not found:
            value = next((str(row.get(column))[:60] for column in media.columns), "")
            raise ValueError(
                f"{self.entry.name} has no address in the column {', '.join(media.columns)} (it has {value}): correct "
                "its entry in the catalogue."
            )

    def _columns(self, columns: list[str]) -> Iterator[dict]:
        """These columns of the rows that filter and limit select. ValueError: a column is not there."""
        wanted = self.entry.source.hf.filter if self.entry.source.hf else None
        left, seen = self.options.limit, set()
        names = [name for names in self.splits.values() for name in names]
        extra = [wanted.partition("==")[0].strip()] if wanted else []
        for name in names:
            if Path(name).suffix.lower() not in ROW_SUFFIXES:
                continue
            for row in column_values(self.folder / name, columns + extra):
                if not matches(row, wanted):
                    continue
                if left is not None:
                    if left == 0:
                        return
                    left -= 1
                seen.update(row)
                yield row
        missing = [column for column in columns if column not in seen]
        if missing and names:
            raise ValueError(
                f"{self.entry.name} has no column {', '.join(missing)}: it has {', '.join(sorted(seen)) or 'no rows'}; "
                "correct its entry in the catalogue."
            )

    def _youtube(self) -> None:
        columns, wanted = self.entry.media.columns, set()
        for row in self._columns(columns):
            # ActivityNet calls its videos v_ID.
            wanted.update(re.sub(r"^v_(?=.{11}$)", "", str(row.get(column))) for column in columns)
        media = self.folder / "media"
        self.counts |= fetch_videos(wanted, media, self.meter.add, self.progress, self.options.retry_lost)

    # By hand

    def _by_hand(self) -> None:
        entry = self.entry
        missing = missing_layout(entry, self.folder)
        youtube = entry.media.kind == "youtube-ids" and self.counts.get("fetched")
        if missing and not youtube:
            what = entry.source.instructions or entry.media.detail or "its media"
            how = download_command("how", entry.name, root=self.options.root, catalogue=entry.catalogue)
            self.waiting.append(
                f"{', '.join(missing)} must be put into {self.folder / 'manual'} by hand ({what}): {how}"
            )
        if entry.source.kind == "manual":
            rows = manual_annotations(entry, self.folder)
            self.splits["train"] = [str(path.relative_to(self.folder)) for path in rows]
            faults = [f"{path.relative_to(self.folder)} is {what}" for path in rows if (what := fault(path))]
            self.waiting += faults
            if rows and not faults:
                self._check_columns(self.splits["train"][0])

    # Files of plain addresses

    def _from_url(self, url: str, into: str, archive: bool | None) -> list[str]:
        """Download a file, or an archive, which is unpacked; return names of plain files, relative to the set's folder.

        archive: it must be one (True), or may be one (None).
        """
        shared = self.catalogue.is_shared(url)
        home = self.options.root / "raw" / ".shared" / sha256_of_text(url)[:16] if shared else self.folder
        with contextlib.ExitStack() as stack:
            files = self.files
            if shared:
                stack.enter_context(locked(home / ".lock", wait=True))
                files = stack.enter_context(contextlib.closing(Journal(home / "files.jsonl", "file")))
            record = next((r for r in files.records.values() if r.get("from") == url), None)
            if record is None or not (_is_there(home, record) or is_unpacked(home, files, record)):
                record = self._download(url, home, files, into, archive)
            name = record["file"]
            unpacked = self._unpack(home, files, name) if record.get("archive") else None
            if shared:
                files.tidy()
        if unpacked is None:
            return [name] if not shared else [self._link(home / name, name)]
        if shared:
            self._link(home / unpacked, unpacked)
        return []

    def _link(self, target: Path, name: str) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aim = os.path.relpath(target, path.parent)
        if path.exists() and not (
            path.is_symlink() and os.readlink(path) == aim
        ):  # the name belongs to another address
            name = other_name(name, aim)
            path = self.folder / name
        if not path.is_symlink() or os.readlink(path) != aim:
            path.unlink(missing_ok=True)
            path.symlink_to(aim)
        self.files.append({"file": name, "link": aim, "bytes": 0})
        return name

    def _download(self, url: str, home: Path, files: Journal, into: str, archive: bool | None) -> dict:
        part = home / ".part" / sha256_of_text(url)[:16]
        rules = replace(self.rules, max_file_bytes=MAX_ARCHIVE, max_seconds=math.inf)
        if self.options.room and (length := asyncio.run(length_of(direct(url), rules))):
            length = length * (1 if archive is False else 2) - (part.stat().st_size if part.exists() else 0)
            self.options.room.need(max(0, length), f"{self.entry.name}, {url}")

        async def get() -> dict:
            async with session(rules) as client:
                return await download(client, direct(url), part, rules, self.meter.add)

        try:
            reply = asyncio.run(get())
            kind = archive_kind(part)
            check_file(part)
            if archive and kind is None:
                raise BadContent("no archive")
            suffix = Path(urllib.parse.urlsplit(url).path.lower().replace(".tar.gz", ".tgz")).suffix
            if not kind and suffix in (".zip", ".tar", ".tgz"):
                raise BadContent("no archive")
            if not kind and suffix in ROW_SUFFIXES:
                check_rows(part, suffix)
        except Lost as error:
            raise ValueError(f"{url} cannot be downloaded: {error.reason}.") from error
        except BadContent as error:
            part.unlink(missing_ok=True)
            raise ValueError(
                f"{url} gave {error} instead of the file: try again later or look at its web page."
            ) from error
        what = kind or ("json" if begins_as_json(part) else None)
        name = f"{'archives' if kind else into}/{file_name(url, reply['file_name'], what)}"
        if files.records.get(name, {}).get("from", url) != url:  # two addresses end with the same name
            name = other_name(name, url)
        record = {"file": name, "from": url, "bytes": part.stat().st_size, "sha256": sha256_of(part)}
        publish(part, home / name)
        files.append(record | ({"archive": kind} if kind else {}))
        return files.records[name]

    def _unpack(self, home: Path, files: Journal, name: str, only_if_archive: bool = False) -> str:
        """Unpack an archive of `home`, if that is not done yet; return the folder, relative to `home`."""
        record, path = files.records[name], home / name
        unpacked = unpacked_as(record)
        if is_unpacked(home, files, record):
            return unpacked
        if only_if_archive and archive_kind(path) is None:
            if name.lower().endswith(SUFFIXES):
                raise ValueError(f"{path} is not an archive, although its name says so.")
            return unpacked
        other = files.records.get(unpacked, {}).get("of", name)
        if other != name or (home / unpacked).is_symlink():
            # Two archives have the same name, such as train/images.zip and val/images.zip.
            unpacked = other_name(unpacked, name)
            files.append(record | {"folder": unpacked})
        try:
            count = self.options.room.for_archive(path) if self.options.room else lambda count: None
            found = extract(path, home / unpacked, record["sha256"], self.options.bounds, count)
        except BadArchive as error:
            raise ValueError(f"the archive {path} is not unpacked: it is {error}.") from error
        files.append({"file": unpacked, "of": name, "archive": record["sha256"], **asdict(found)})
        if self.options.remove_archives:
            path.unlink()
        return unpacked

    # Notes

    def _tidy(self) -> None:
        """Remove partial and outdated files of a set that has everything."""
        for part in [self.folder / ".part", *(self.folder / "hub").rglob(".part")]:
            shutil.rmtree(part, ignore_errors=True)
        # Files that the repository had only at an earlier commit.
        for name, record in list(self.files.records.items()):
            repo, _, rest = str(record.get("from", "")).removeprefix("hf://datasets/").partition("@")
            if name.startswith("hub/") and not rest.startswith(self.revisions.get(repo, "")):
                (self.folder / name).unlink(missing_ok=True)
                self.files.remove(name)
        self.files.tidy()

    def note(self, complete: bool, stopped: str | None) -> None:
        """Write fetched.json."""
        rows = None
        if stopped is None:
            paths = [self.folder / name for names in self.splits.values() for name in names]
            rows = sum(num_rows(path) for path in paths if path.suffix.lower() == ".parquet") or None
        write_json(
            self.folder / "fetched.json",
            {
                "name": self.entry.name,
                "complete": complete,
                "stopped": stopped,
                "waiting": self.waiting,
                "limit": self.options.limit,
                "filter": self.entry.source.hf.filter if self.entry.source.hf else None,
                "splits": self.splits,
                "terms": self.entry.terms,
                **self.facts,
                "counts": {"files": len(self.files.records), "rows": rows},
                "media": {"kind": self.entry.media.kind, **self.counts},
                "bytes": size_on_disk(self.folder) if stopped is None else None,
                "fetched_bytes": self.meter.bytes - self.bytes_before,
                "seconds": round(time.monotonic() - self.started, 3),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            sort_keys=True,
        )


def note_trial(root: Path, name: str, **found) -> None:
    """Write into fetched.json what FetchNote says of samples and media: works, useless, searched, found."""
    write_json(root / "raw" / name / "fetched.json", {**RawSource(root, name).info, **found}, sort_keys=True)


def _is_there(home: Path, record: dict) -> bool:
    with contextlib.suppress(OSError):
        return (home / record["file"]).stat().st_size == record["bytes"]
    return False
