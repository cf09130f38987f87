"""A stage's data sets one after the other: fetched, prepared, uploaded and removed, within a bound of disk space.

    SCRATCH/prepare-HASH/       HASH: of where the shards go
      raw/NAME/                 as tools/download.py fetches it; what there is no room for is put away (parking.py)
      shards/.prepare/NAME/     as tools/prepare.py has it on a disk; uploaded/ has a note of each shard that is there
      shards/NAME/              provenance.json of a finished set, from which the blends are written

Every shard holds what it would hold on a large disk: rows are divided by the same hashes, and files that were put away
are found under their names. A run that was killed goes on with the first shard that was not uploaded.
"""

import multiprocessing
import os
import shutil
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from molmo2_nemo import storage
from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.datasets import DataSet, load_catalogue
from molmo2_nemo.catalogue.parked import HELD, Parked
from molmo2_nemo.catalogue.raw import RawSource, read_note, size_on_disk
from molmo2_nemo.fetch.data_set import FetchOptions, FetchResult, Meter, fetch_set
from molmo2_nemo.fetch.on_disk import missing_layout, shared_homes
from molmo2_nemo.fetch.room import BLOCK, NoScratch, Room, as_option, blocks_below
from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.fetch.url_list import DownloadProgress
from molmo2_nemo.fetch.web import OutOfBytes
from molmo2_nemo.files import free_bytes, readable_size, sha256_of, sha256_of_text, write_json
from molmo2_nemo.prepare.converters import converter_of
from molmo2_nemo.prepare.dataset_shards import PROVENANCE, finish, read_provenance, write_shard
from molmo2_nemo.prepare.needs import needs_of
from molmo2_nemo.prepare.parking import from_heads, keep_heads, park
from molmo2_nemo.prepare.place import MARKER, META, Place
from molmo2_nemo.prepare.records import Provenance, RowCounts, ShardRecord
from molmo2_nemo.prepare.shard_plan import VAL, ShardPlan, make_plan
from molmo2_nemo.prepare.spool import write_spool
from molmo2_nemo.prepare.stage_blend import write_blends
from molmo2_nemo.prepare.stage_datasets import (
    DatasetState,
    PreparedStage,
    StageOptions,
    choose_entries,
    end_with_parent,
    progress_bar,
    refused,
    result_of,
)

# Part of the room that is left which the drafts of a group of shards may take (a fourth), and by how much they are
# larger than their rows.
SPOOL_SHARE, SPOOL_GROWTH = 4, 1.3
# By how much shards differ in size.
SHARD_SPREAD = 1.2


@dataclass(frozen=True)
class Scratch:
    """Where and how much. ValueError on creation, one sentence."""

    folder: Path
    most: int | None = None  # bytes; None: nine tenths of what is free
    limit: int | None = None  # rows, as of `download.py fetch`
    max_side: int | None = None  # pixels, as of `download.py fetch`
    allow_private: bool = False  # as of `download.py fetch`

    def home(self, out: str) -> Path:
        """The folder of a run that puts its shards to `out`; nothing else in `folder` is touched."""
        return self.folder.expanduser().absolute() / f"prepare-{sha256_of_text(out.rstrip('/'))[:8]}"

    def bound(self, home: Path, check_room: bool) -> int:
        """Bytes that may be taken. ValueError: the disk has less."""
        there = free_bytes(home) + blocks_below(home)  # what was put away has left holes
        if self.most is None:
            return there * 9 // 10
        if check_room and self.most > there:
            raise ValueError(
                f"--max-scratch {as_option(self.most)} is more than the {readable_size(there)} that are free on the "
                f"disk of --scratch {self.folder}: give --max-scratch {as_option(there * 8 // 10)} or another --scratch"
            )
        return self.most


def prepare_in_parts(options: StageOptions, out: str, scratch: Scratch) -> PreparedStage:
    """Prepare all data sets that are asked for at `out`, an address or a path, and the stage's blends.

    options.out is not used, options.root may have raw data that were fetched before, which stay. What is wrong with one
    set is in its state. ValueError or OSError: nothing can be done at all.
    """
    if options.array_count > 1:
        raise ValueError("--scratch takes no --array-count: give each task data sets of its own by their names")
    out = out if storage.is_remote(out) else str(Path(out).expanduser().absolute())
    home = scratch.home(out)
    (home / "shards").mkdir(parents=True, exist_ok=True)
    place = Place(out, home)
    with place.locked():
        most = scratch.bound(home, options.check_room)
        return _Run(replace(options, out=home / "shards"), scratch, place, most).run()


class _Run:
    """One call of `prepare_in_parts`."""

    def __init__(self, options: StageOptions, scratch: Scratch, place: Place, most: int):
        self.options, self.scratch, self.place, self.home = options, scratch, place, place.home
        self.shards = self.home / "shards"
        self.room = Room(self.home, most, beat=place.beat)
        self.rules = Rules(allow_private=scratch.allow_private)
        self.catalogue = load_catalogue(options.catalogue)
        self.bar = progress_bar("", None, "B", options.quiet)

    def run(self) -> PreparedStage:
        options, root = self.options, self.options.root or self.home
        (self.home / "raw").mkdir(exist_ok=True)
        self._take_revisions()
        entries = choose_entries(self.catalogue, root, options.stage, options.names, options.only_license)
        states = [
            DatasetState(entry.model_dump(), not options.names and (entry.by_hand or entry.unsure is not None))
            for entry in entries
        ]
        self.place.forget_parked({path.name for path in (self.home / "raw").iterdir()})
        todo = self._look(list(zip(entries, states)))
        with self.bar:
            for number, (entry, state) in enumerate(todo, 1):
                self.bar.set_description(f"[{number}/{len(todo)}] {entry.name}", refresh=False)
                try:
                    self._make(entry, state)
                except storage.StorageError:
                    raise
                except (NoScratch, ValueError, RecursionError) as error:
                    state.problem = str(error).rstrip(".")
                    self._leave(entry)
                self._drop_shared([other for other, _ in todo[number:]])
                self._say(state)
        files = self._write_blends(states)
        if not options.quiet:
            print(f"scratch: {readable_size(self.room.peak)} at most, of {readable_size(self.room.most)}", flush=True)
        return PreparedStage(self.place.out, states, files)

    def _say(self, state: DatasetState) -> None:
        if not self.options.quiet:
            made = f"{readable_size(state.made.bytes)} in {state.made.train_samples:,} samples" if state.made else ""
            self.bar.write(f"{state.name}: {made or state.problem}")

    def _take_revisions(self) -> None:
        """Pin the commits of repositories that are pinned in the user's data root."""
        given, ours = (folder / "raw" / "revisions.json" for folder in (self.options.root or self.home, self.home))
        if given.exists() and not ours.exists():
            shutil.copyfile(given, ours)

    # -- before the first byte

    def _look(self, sets: list[tuple[DataSet, DatasetState]]) -> list[tuple[DataSet, DatasetState]]:
        """The sets to make, after what cannot be made within the bound was said."""
        todo, total = [], 0
        for entry, state in sets:
            try:
                converter_of(state.entry)
                self._there(state)
                if state.made is None:
                    total += self._bytes_of(entry, state)
            except (ValueError, NoScratch) as error:
                if isinstance(error, storage.StorageError):
                    raise
                state.problem = str(error).rstrip(".")
            if state.made:
                self._remove(entry)
            elif not state.problem:
                todo.append((entry, state))
            else:
                state.fetched = False if entry.by_hand and not self.options.names else state.fetched
        said = [state for _, state in sets if state.problem and "--max-scratch" in state.problem]
        for state in said:
            print(f"cannot be prepared: {state.problem}", file=sys.stderr, flush=True)
        self.bar.total = total
        if not self.options.quiet:
            there = sum(state.made is not None for _, state in sets)
            print(
                f"{len(todo)} data sets to prepare, about {readable_size(total)} to move through {self.home} "
                f"({readable_size(self.room.most)} at most); {there} are there",
                flush=True,
            )
        return todo

    def _there(self, state: DatasetState) -> None:
        """Sets `made` of a set that is there already and whole."""
        name, options = state.name, self.options
        made = self.place.provenance(name)
        if made is None:
            return
        if options.redo:
            self.place.hide(name)
        elif damaged := self.place.damage(name, made, options.verify):
            state.note = f"{name}: {damaged} was lost or damaged, and it was prepared again"
            self.place.hide(name)
        else:
            self._mirror(name, made)
            state.made = made

    def _bytes_of(self, entry: DataSet, state: DatasetState) -> int:
        """About how many bytes are to be moved: fetched and uploaded. ValueError: why it cannot be made."""
        given = self._given(entry)
        if given is not None:
            return int(read_note(given, entry.name).get("bytes") or 0)
        if entry.unsure:
            raise ValueError(f"{entry.name} is not fetched: {entry.unsure}")
        user = self.options.root or self.home
        if entry.by_hand and (missing := missing_layout(entry, user / "raw" / entry.name)):
            state.fetched = False
            how = download_command("how", entry.name, root=user, catalogue=entry.catalogue)
            raise ValueError(
                f"{entry.name} needs {', '.join(missing)} in {user / 'raw' / entry.name / 'manual'} by hand: {how}"
                + ("" if self.options.root else "; --root is the folder that holds raw/")
            )
        need = needs_of(entry, self.home, self.rules, self.options.shards, self.scratch.max_side)
        if need.least > self.room.bound:
            raise ValueError(
                f"{entry.name} cannot be done in parts of --max-scratch {as_option(self.room.most)}, it needs about "
                f"{readable_size(need.least)} ({need.why}): give --max-scratch {as_option(need.least * 5 // 4)}"
            )
        return 2 * need.total

    def _given(self, entry: DataSet) -> Path | None:
        """The user's data root, if the set was fetched there before."""
        root = self.options.root
        if root is None or read_note(root, entry.name) is None:
            return None
        make_plan(entry.model_dump(), root, self.shards, self.options.shards, self.options.partial)
        return root

    # -- one set

    def _make(self, entry: DataSet, state: DatasetState) -> None:
        self.room.put_away = lambda: None
        root = self._given(entry) or self._fetched(entry)
        plan = make_plan(state.entry, root, self.shards, self.options.shards, self.options.partial)
        self._put_away_from(entry, root)
        # A run that was killed while it uploaded the index has left it.
        made = read_provenance(plan.final) if (plan.final / MARKER).exists() else None
        if made is None or made.fingerprint != plan.fingerprint:
            shutil.rmtree(plan.final, ignore_errors=True)
            for name in ("shards", "records", "uploaded"):
                (plan.work / name).mkdir(parents=True, exist_ok=True)
            if self.options.max_dropped < 1 and not any((plan.work / "records").iterdir()):
                if why := refused(plan, self.options):
                    raise ValueError(why)
            self._write_shards(plan)
            self._restore_shards(plan)
            if not finish(plan):
                raise ValueError(f"another tools/prepare.py is at work on {plan.name} in {plan.work}")
            made = read_provenance(plan.final)
        if missing := self.place.publish(entry.name, plan.final, made):
            shutil.rmtree(plan.final)
            raise ValueError(
                f"{storage.shown(self.place.of(entry.name, missing))} was uploaded and is gone: run the same command "
                "again, which makes this set again"
            )
        self._mirror(entry.name, made)
        self._remove(entry)
        state.made = made

    def _fetched(self, entry: DataSet) -> Path:
        """Fetch a set into the scratch; the files that the user has brought are read where they are. ValueError."""
        folder, note = self.home / "raw" / entry.name, read_note(self.home, entry.name) or {}
        is_whole = note.get("complete") or note.get("limit") is not None
        if is_whole and note["limit"] == self.scratch.limit and not (note.get("stopped") or note.get("waiting")):
            return self.home
        by_hand = self.options.root and self.options.root / "raw" / entry.name / "manual"
        if by_hand and by_hand.is_dir() and not (folder / "manual").is_symlink():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manual").symlink_to(by_hand.absolute())
        self._put_away_from(entry, self.home)
        meter, stuck = Meter(report=self._came), 0
        while True:
            self.room.used()
            settings = FetchOptions(
                self.home,
                self.rules,
                self.scratch.limit,
                remove_archives=True,
                max_side=self.scratch.max_side,
                room=self.room,
            )
            before = self._recorded(folder)
            try:
                result = fetch_set(entry, self.catalogue, settings, meter, DownloadProgress())
                break
            except OutOfBytes:
                self.room.put_away()
                stuck = 0 if self._recorded(folder) > before else stuck + 1
                if stuck == 2:  # all room was free, and no file has become whole
                    raise NoScratch(
                        f"{entry.name} does not fit: of --max-scratch {as_option(self.room.most)} only "
                        f"{readable_size(max(0, self.room.left()))} are left after all was put away that can be: give "
                        f"--max-scratch {as_option(2 * self.room.most)}"
                    ) from None
        self._check(entry, result)
        return self.home

    def _check(self, entry: DataSet, result: FetchResult) -> None:
        if result.state in ("complete", "sample") or (result.state == "part" and self.options.partial):
            return
        if result.state in ("by hand", "refused"):
            self._remove(entry)
        raise ValueError(f"{entry.name} is not fetched ({result.state}): {result.reason}")

    def _put_away_from(self, entry: DataSet, root: Path) -> None:
        """From now on, room is made by putting files of this set away; those of the user's data root stay."""
        folder, address = self.home / "raw" / entry.name, self.place.parked(entry.name)
        parquet = entry.media.kind == "in-parquet" and converter_of(entry.model_dump()).rows is None

        def put_away() -> None:
            if not folder.is_dir():
                return
            shutil.rmtree(folder / HELD, ignore_errors=True)
            park(folder, address, self.room.most, parquet, lambda count: self.place.beat())

        if root == self.home:
            folder.mkdir(parents=True, exist_ok=True)
        self.room.put_away = put_away if root == self.home else lambda: None

    def _came(self, count: int) -> None:
        """Bytes have come from the network. OutOfBytes: there is no room for them."""
        self.bar.update(count)
        if not self.room.takes(count):
            raise OutOfBytes("the scratch is full")

    def _recorded(self, folder: Path) -> int:
        """Bytes of the records of whole files."""
        files = (folder / "files.jsonl", folder / "media" / "index.jsonl")
        return sum(file.stat().st_size for file in files if file.exists())

    def _write_shards(self, plan: ShardPlan) -> None:
        """Write, upload and hollow all shards that are not uploaded yet, in groups whose drafts there is room for."""
        sizes = [path.stat().st_size for path in RawSource(plan.root, plan.name).files() if path.exists()]
        rows, largest = sum(sizes), max(sizes, default=0)
        groups = self._groups(plan, SPOOL_GROWTH * rows)
        train = [shard for shard in plan.shards if not shard.startswith(VAL)]
        others = [shard for shard in plan.shards if shard.startswith(VAL)]
        for number in range(groups):
            group = train[number * len(train) // groups : (number + 1) * len(train) // groups]
            group += others if number == groups - 1 else []
            folder = plan.work / f"spool-{number}-of-{groups}"
            for old in plan.work.glob("spool-*"):
                if old != folder:
                    shutil.rmtree(old)
            todo = [shard for shard in group if not _uploaded(plan, shard)]
            if not todo:
                continue
            folder.mkdir(exist_ok=True)
            if not (folder / "spool.json").exists():
                self.room.need(int(SPOOL_GROWTH * rows / groups) + largest, f"{plan.name}, its rows")
            write_spool(plan, folder, group, _Beat(self.place))
            self._write_group(plan, folder, todo)
            shutil.rmtree(folder)

    def _groups(self, plan: ShardPlan, drafts: float) -> int:
        """Among how many groups the shards are divided; the rows are read once for each."""
        before = [int(folder.parent.name.rsplit("-", 1)[1]) for folder in plan.work.glob("spool-*/spool.json")]
        if before:
            return before[0]
        if SPOOL_SHARE * drafts > self.room.left():
            self.room.put_away()
        return min(plan.num_train, max(1, ceil(SPOOL_SHARE * drafts / max(1, self.room.left()))))

    def _held(self, plan: ShardPlan) -> int:
        """Bytes that a process may bring back of what was put away."""
        parked = Parked.of(RawSource(plan.root, plan.name).folder)
        return parked.held_at_once() if parked else 0

    def _write_group(self, plan: ShardPlan, folder: Path, todo: list[str]) -> None:
        """In several processes, as many as there is room for."""
        held = self._held(plan)
        sizes = {shard: size + held for shard, size in _expected_sizes(plan, folder, todo).items()}
        waiting, futures = list(todo), {}
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(self.options.jobs, fork, end_with_parent, (os.getpid(),)) as pool:
            try:
                while waiting or futures:
                    while waiting and len(futures) < self.options.jobs:
                        size = sizes[waiting[0]]
                        if not futures:
                            self.room.need(size, f"{plan.name}, a shard")
                        elif self.room.left() < size + sum(sizes[shard] for shard in futures.values()):
                            break
                        shard = waiting.pop(0)
                        futures[pool.submit(write_and_upload, plan, folder, shard, self.place.of(plan.name))] = shard
                    for future in wait(futures, timeout=30, return_when=FIRST_COMPLETED).done:
                        del futures[future]
                        self.bar.update(future.result().bytes)
                        self.room.used()
                    self.place.beat()
            except BaseException:
                # The next run writes again what they have not uploaded.
                for process in multiprocessing.active_children():
                    process.kill()
                raise

    def _restore_shards(self, plan: ShardPlan) -> None:
        """Put hollow shards in place, of which the index is made."""
        records = [_uploaded(plan, shard) for shard in plan.shards]
        members = sum(record.samples + record.images + record.videos for record in records)
        self.room.need(2 * BLOCK * members, f"{plan.name}, its index")
        for shard, record in zip(plan.shards, records):
            if record.samples:
                from_heads(plan.work / "uploaded" / f"{shard}.heads", plan.work / "shards" / record.shard)

    # -- afterwards

    def _mirror(self, name: str, made: Provenance) -> None:
        """Keep of a finished set what the blends are made from."""
        folder = self.shards / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / META).mkdir(parents=True)
        made.write(folder / PROVENANCE)

    def _leave(self, entry: DataSet) -> None:
        """Make room after a set that could not be made: what was fetched and uploaded of it stays for another run."""
        for folder in (self.shards / ".prepare" / entry.name).glob("spool-*"):
            shutil.rmtree(folder)
        self.room.put_away()

    def _remove(self, entry: DataSet) -> None:
        """Remove a set's raw files and drafts, and what of it was put away."""
        folder = self.home / "raw" / entry.name
        shutil.rmtree(self.shards / ".prepare" / entry.name, ignore_errors=True)
        if folder.is_dir():
            self.place.forget_parked({path.name for path in (self.home / "raw").iterdir()} - {entry.name})
            shutil.rmtree(folder)

    def _drop_shared(self, coming: list[DataSet]) -> None:
        """Remove archives that several sets name, once none of those to come needs them, or they take much room."""
        used = {home for path in (self.home / "raw").iterdir() for home in shared_homes(path) if path.is_dir()}
        wanted = {
            self.home / "raw" / ".shared" / sha256_of_text(url)[:16]
            for entry in coming
            for url in (*entry.source.urls, *entry.media.urls)
        }
        for folder in sorted((self.home / "raw" / ".shared").glob("*")):
            if folder not in used and (folder not in wanted or size_on_disk(folder) > self.room.most // 4):
                shutil.rmtree(folder)

    def _write_blends(self, states: list[DatasetState]) -> list[str]:
        """The stage's blends, licences and report, of the sets that are there; returns their addresses."""
        names = {state.name for state in states}
        for entry in self.catalogue.of_stage(self.options.stage):
            folder = self.shards / entry.name
            if entry.name in names:
                if not any(state.made for state in states if state.name == entry.name):
                    shutil.rmtree(folder / META, ignore_errors=True)
                continue
            try:
                made = self.place.provenance(entry.name)
            except ValueError as error:
                if isinstance(error, storage.StorageError):
                    raise
                made = None
            if made:
                self._mirror(entry.name, made)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        if not any(state.made for state in states):
            return []
        options = self.options
        allowed = names if options.only_license else None
        files = write_blends(options.stage, self.catalogue, self.shards, allowed, self.place.out)
        report = self.shards / f"stage{options.stage}.report.json"
        write_json(report, [result_of(state) for state in states])
        for file in (*files, report):
            storage.send(file, self.place.of(file.name))
        return [self.place.of(file.name) for file in files]


class _Beat:
    """What `write_spool` takes for a progress bar: keeps the lock."""

    def __init__(self, place: Place):
        self._place = place

    def update(self) -> None:
        self._place.beat()


def _expected_sizes(plan: ShardPlan, folder: Path, shards: list[str]) -> dict[str, int]:
    """About the bytes of each shard: its share of the raw data by its drafts, or more if pictures in the drafts are."""
    raw = RawSource(plan.root, plan.name)
    total = raw.info.get("bytes") or size_on_disk(raw.folder)
    of_all = max(1, RowCounts.read(plan.work / "rows.json").drafts)
    sizes = {}
    for shard in shards:
        drafts = inside = 0
        for bucket in plan.buckets(shard):
            for file in folder.glob(f"{bucket}.*"):
                inside += file.stat().st_size
                if file.suffix == ".jsonl":
                    with file.open("rb") as lines:
                        drafts += sum(1 for _ in lines)
        share = plan.num_val if shard.startswith(VAL) else 1
        sizes[shard] = int(SHARD_SPREAD * max(total * drafts / of_all, inside) / share)
    return sizes


def write_and_upload(plan: ShardPlan, folder: Path, shard: str, target: str) -> ShardRecord:
    """Write one shard, upload it below `target`, read it back, and keep the heads of its members alone.

    Runs in a process of its own.
    """
    record = ShardRecord.read(plan.work / "records" / f"{shard}.json")
    file = plan.work / "shards" / f"{shard}.tar"
    if not (
        record
        and record.fingerprint == plan.fingerprint
        and (not record.samples or (file.exists() and sha256_of(file) == record.sha256))
    ):
        record = write_shard(plan, folder, shard)
    if record.samples:
        storage.send(file, storage.join(target, record.shard), record.sha256)
        keep_heads(file, plan.work / "uploaded" / f"{shard}.heads")
    record.write(plan.work / "uploaded" / f"{shard}.json")
    file.unlink(missing_ok=True)
    return record


def _uploaded(plan: ShardPlan, shard: str) -> ShardRecord | None:
    """The record of a shard that was uploaded; None: it was not."""
    record = ShardRecord.read(plan.work / "uploaded" / f"{shard}.json")
    if record is None or record.fingerprint != plan.fingerprint:
        return None
    (plan.work / "shards" / record.shard).unlink(missing_ok=True)  # a kill came before it was removed, or a hole
    return record
