"""All data sets of a stage, from raw to shards, several at once in a pool of processes.

For each set the steps are those of dataset_shards.py: see which shards are missing, spool the rows, write the shards,
finish. A run that was stopped is continued by the next one.
"""

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.datasets import CONF_FILE, Catalogue, DataSet, load_catalogue
from molmo2_nemo.catalogue.raw import RawSource, size_on_disk
from molmo2_nemo.fetch.inventory import with_license
from molmo2_nemo.files import LockHeld, locked, missing_room, write_json
from molmo2_nemo.limits import MAX_DROPPED
from molmo2_nemo.prepare.dataset_shards import finish, finished, missing_shards, read_provenance, write_shard
from molmo2_nemo.prepare.records import Provenance
from molmo2_nemo.prepare.shard_plan import ShardPlan, make_plan
from molmo2_nemo.prepare.spool import write_spool
from molmo2_nemo.prepare.stage_blend import write_blends
from molmo2_nemo.prepare.verify import refusal, take

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class StageOptions:
    """What to prepare, and how. ValueError on creation, one sentence: a value makes no sense."""

    stage: int  # 1, 2 or 3
    out: Path  # where the data sets' folders appear
    root: Path | None = None  # holds raw/; None: out
    names: tuple[str, ...] = ()  # of data sets; none: all of the stage
    catalogue: Path = CONF_FILE
    partial: bool = False  # take what is there of sets that are fetched in part
    shards: int = 512  # of a data set, at most
    jobs: int = 1  # processes
    array_index: int = 0  # of a Slurm array whose tasks share the shards
    array_count: int = 1
    only_license: tuple[str, ...] = ()  # data sets under one of these licences; none: all
    redo: bool = False  # make again what is finished
    verify: bool = False  # read the bytes of finished sets again
    max_dropped: float = MAX_DROPPED  # share of a sample of a set that may be lost; a set that loses more is refused
    check_room: bool = True  # refuse to start without room for shards as large as the raw data
    quiet: bool = False  # no progress bars

    def __post_init__(self):
        for name in ("shards", "jobs", "array_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if not 0 <= self.array_index < self.array_count:
            raise ValueError(f"--array-index {self.array_index} is not from 0 to --array-count - 1")
        if not 0 <= self.max_dropped <= 1:
            raise ValueError(f"--max-dropped {self.max_dropped:g} is not from 0 to 1")
        if not (self.root or self.out).is_dir():
            raise ValueError(f"{self.root or self.out} is no folder")


@dataclass
class DatasetState:
    """How far one data set is in this run."""

    entry: dict  # of the catalogue
    optional: bool = False  # no program can fetch it, so that it may be missing
    plan: ShardPlan | None = None  # None: there is nothing to do
    made: Provenance | None = None  # of the finished set
    problem: str | None = None  # why it cannot be prepared
    fetched: bool = True
    note: str | None = None  # what the user should know besides
    todo: list[str] = field(default_factory=list)  # shards that this run has to write
    left: int = 0  # shards of these that are not written yet
    spool: Path | None = None  # folder of its drafts
    locks: ExitStack = field(default_factory=ExitStack)  # the lock of that folder

    @property
    def name(self) -> str:
        return self.entry["name"]


def choose_entries(
    catalogue: Catalogue, root: Path, stage: int, names: Sequence[str], licenses: Sequence[str]
) -> list[DataSet]:
    """Entries of the stage: those of the names, under one of the licences. ValueError: there are none."""
    entries = catalogue.find(list(names)) if names else catalogue.of_stage(stage)
    if strange := [entry.name for entry in entries if stage not in entry.stages]:
        raise ValueError(f"{', '.join(strange)} is no data set of stage {stage}")
    if licenses:
        entries = with_license(entries, list(licenses), root)
        if not entries:
            raise ValueError(f"--only-license {' '.join(licenses)} leaves no data set of stage {stage}")
    return entries


@dataclass
class PreparedStage:
    """What a run of `prepare_stage` has done."""

    out: Path | str  # absolute, or an address
    states: list[DatasetState]
    files: list[Path] | list[str]  # blends and licences that were written

    @property
    def succeeded(self) -> bool:
        """Whether something is prepared, and nothing that was asked for or can be fetched by a program has failed."""
        failed = [state for state in self.states if state.problem and (state.plan or not state.optional)]
        return not failed and any(state.made or state.note for state in self.states)


def prepare_stage(options: StageOptions) -> PreparedStage:
    """Prepare all data sets that are asked for, and write the stage's blends and a report beside them.

    What is wrong with one set is in its state. ValueError or OSError: nothing can be done at all.
    """
    out, root = options.out.expanduser().absolute(), (options.root or options.out).expanduser().absolute()
    if out.resolve().is_relative_to((root / "raw").resolve()):
        raise ValueError(f"--out {out} is inside of {root / 'raw'}, which holds raw data alone: choose another folder")
    catalogue = load_catalogue(options.catalogue)
    entries = choose_entries(catalogue, root, options.stage, options.names, options.only_license)
    # A set that is named must be prepared, whether or not a program can fetch it.
    states = [
        DatasetState(entry.model_dump(), not options.names and (entry.by_hand or entry.unsure is not None))
        for entry in entries
    ]
    for state in states:
        examine(state, root, out, options)
    work = [state for state in states if state.plan and not state.made]
    if options.check_room and (missing := missing_room(out, expected_bytes(work), _what(work))) is not None:
        raise ValueError(f"{missing} Rows that are dropped need none: --no-room-check starts all the same.")
    if work:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.jobs, fork, end_with_parent, (os.getpid(),)) as pool:
            try:
                run(work, pool, options)
            except BaseException:
                # The next run starts again what they have not finished.
                for process in multiprocessing.active_children():
                    process.kill()
                raise
    files = []
    if any(state.made for state in states):
        allowed = {state.name for state in states} if options.only_license else None
        files = write_blends(options.stage, catalogue, out, allowed)
    if files:
        write_json(out / f"stage{options.stage}.report.json", [result_of(state) for state in states])
    return PreparedStage(out, states, files)


def expected_bytes(states: list[DatasetState]) -> int:
    """Of the shards that are still to be written: those of a set are about as large as its raw data.

    They hold the same pictures and videos as they are, each once.
    """
    total = 0
    for state in states:
        raw = RawSource(state.plan.root, state.name)
        size = raw.info.get("bytes")
        written = size_on_disk(state.plan.work / "shards")
        total += max(0, (size_on_disk(raw.folder) if size is None else size) - written)
    return total


def _what(states: list[DatasetState]) -> str:
    return f"writing the shards of {len(states)} data set{'s' if len(states) > 1 else ''}, as large as the raw data,"


def result_of(state: DatasetState) -> dict:
    """What the report says of a set, as JSON."""
    status = "prepared" if state.made else "waiting" if state.note else "not prepared"
    made = state.made.model_dump(exclude={"shards", "fingerprint"}) if state.made else {}
    shards = sum(shard.samples > 0 for shard in state.made.shards) if state.made else 0
    return {
        "name": state.name,
        "status": status,
        "problem": state.problem,
        "note": state.note,
        "shards": shards,
        **made,
    }


def end_with_parent(parent: int) -> None:
    """Called first in each worker process: it ends when its parent ends, even if that is killed, and ignores Ctrl-C.

    The same holds for the processes that Energon forks to write an index. They would wait for a dead worker for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with(parent)
    os.register_at_fork(after_in_child=partial(_end_with, os.getpid()))


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def examine(state: DatasetState, root: Path, out: Path, options: StageOptions) -> None:
    """Find out what there is to do for one set: sets its plan, its problem, or what is made already."""
    try:
        plan = make_plan(state.entry, root, out, options.shards, options.partial)
    except ValueError as error:
        state.problem = str(error).rstrip(".")
        state.fetched = (root / "raw" / state.name / "fetched.json").exists()
        state.made = read_provenance(out / state.name)
        if state.made and not options.names:
            state.problem = None
        return
    made, before = finished(plan, options.verify), read_provenance(plan.final)
    if before is None and plan.final.exists() and not (plan.final.is_dir() and not any(plan.final.iterdir())):
        state.problem = f"{plan.final} is there and was not made by this tool: move it away"
    elif made is None and before and not options.redo:
        state.note = f"{state.name}: shards were lost or damaged, and it was prepared again"
    elif made and not options.redo:
        state.made = made
        if made.fingerprint == plan.fingerprint:
            shutil.rmtree(plan.work, ignore_errors=True)  # left by a run that was stopped just before its end
        else:
            state.note = f"{state.name}: its raw data, the code or --shards changed since; --redo prepares it again"
    if state.made is None and state.problem is None:
        state.plan = plan


def run(states: list[DatasetState], pool: ProcessPoolExecutor, options: StageOptions) -> None:
    """For each set: try a sample, check what is there, spool its rows, write its shards, finish. Several at once."""
    waiting, futures, at_once = list(states), {}, max(2, options.jobs // 4)
    share = slice(options.array_index, None, options.array_count)
    total = sum(len(state.plan.shards[share]) for state in states)
    bar = progress_bar("", total, "shard", options.quiet)

    def submit(state: DatasetState, step: str, *call) -> None:
        futures[pool.submit(*call)] = (state, step)

    def begin(state: DatasetState) -> None:
        plan = state.plan
        for name in ("shards", "records"):
            (plan.work / name).mkdir(parents=True, exist_ok=True)
        if options.max_dropped < 1 and not any((plan.work / "records").iterdir()):
            submit(state, "try", refused, plan, options)
        else:
            submit(state, "check", missing_shards, plan, plan.shards[share])

    def advance(state: DatasetState, step: str, future: Future) -> None:
        plan = state.plan
        if step == "try":
            state.problem = future.result()
            if state.problem is None:
                submit(state, "check", missing_shards, plan, plan.shards[share])
        elif step == "check":
            state.todo = future.result()
            bar.update(len(plan.shards[share]) - len(state.todo))
            if not state.todo:
                return submit(state, "finish", finish, plan)
            state.spool = plan.work / f"spool-{options.array_index}-of-{options.array_count}"
            state.spool.mkdir(exist_ok=True)
            try:
                state.locks.enter_context(locked(state.spool / "lock"))
            except LockHeld:
                state.problem = f"another tools/prepare.py is at work on {state.name} in {plan.work}"
                return state.locks.close()
            line = 1 + states.index(state) % at_once
            submit(state, "spool", spool_with_bar, plan, state.spool, plan.shards[share], line, options.quiet)
        elif step == "spool":
            future.result()
            state.left = len(state.todo)
            for shard in state.todo:
                submit(state, "shard", write_shard, plan, state.spool, shard)
        elif step == "shard":
            future.result()
            state.left -= 1
            bar.update()
            if not state.left:
                submit(state, "finish", finish, plan)
        elif step == "finish":
            if future.result():
                state.made = finished(plan)
            else:
                state.note = f"{state.name}: waits for the shards of other array tasks"
            state.locks.close()
        return None

    with bar:
        while waiting or futures:
            # A set is started when another one is finished, so that not all of their rows are on the disk twice.
            active = {id(state) for state, _ in futures.values()}
            while waiting and len(active) < at_once:
                state = waiting.pop(0)
                begin(state)
                active.add(id(state))
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                state, step = futures.pop(future)
                if state.problem:
                    continue
                bar.set_description(state.name, refresh=False)
                try:
                    advance(state, step, future)
                except (ValueError, RecursionError) as error:
                    state.problem = str(error).rstrip(".")
                    state.locks.close()


def refused(plan: ShardPlan, options: StageOptions) -> str | None:
    """Why a set is not prepared, by a sample of it: a sentence, or None."""
    found = take(plan.entry, plan.root, partial=options.partial)
    verify = download_command("verify", plan.name, root=plan.root, catalogue=plan.entry.get("catalogue"))
    return refusal(found, plan.name, options.max_dropped, verify)


def spool_with_bar(plan: ShardPlan, folder: Path, shards: list[str], line: int, quiet: bool) -> None:
    """`write_spool`, with a progress bar of rows on a line of its own below that of the shards."""
    info = RawSource(plan.root, plan.name).info
    numbers = [number for number in ((info.get("counts") or {}).get("rows"), info.get("limit")) if number]
    with progress_bar(plan.name, min(numbers, default=None), "row", quiet, line) as bar:
        write_spool(plan, folder, shards, bar)


def progress_bar(name: str, total: int | None, unit: str, quiet: bool, line: int = 0) -> tqdm:
    """A progress bar with rate and time left; where there is no terminal, a line a minute."""
    wait = 0.2 if sys.stderr.isatty() else 60
    return tqdm(
        desc=name or None,
        total=total,
        unit=unit,
        unit_scale=unit in ("row", "B"),
        disable=quiet,
        position=line,
        leave=not line,
        mininterval=wait,
        maxinterval=max(10, wait),
        delay=0 if wait < 1 else wait,
    )
