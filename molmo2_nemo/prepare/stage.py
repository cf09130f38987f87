"""All data sets of a stage, from raw to shards, with the stage's blend, its licences and a report beside them."""

import argparse
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml
from tqdm import tqdm

from molmo2_nemo.catalogue.datasets import CONF_FILE, Catalogue, DataSet, load_catalogue
from molmo2_nemo.catalogue.mixture import blends
from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.fetch.inventory import with_license
from molmo2_nemo.files import LockHeld, locked, write_atomically, write_json
from molmo2_nemo.prepare.dataset import (
    Plan,
    finish,
    finished,
    make_plan,
    missing_shards,
    spool,
    write_shard,
)

# Stage -> blends of mixture.py. Stage 3 trains on the data of stage 2.
BLENDS = {1: ["stage1"], 2: ["stage2", "stage2_report"], 3: ["stage2", "stage2_report"]}
SHOWN_REASONS = 5
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class State:
    """Of one data set in this run."""

    entry: dict
    optional: bool = False  # a program alone cannot get it
    plan: Plan | None = None
    made: dict | None = None  # provenance.json
    problem: str | None = None
    fetched: bool = True
    note: str | None = None
    todo: list[str] = field(default_factory=list)  # shards that this run has to write
    left: int = 0
    spool: Path | None = None
    locks: ExitStack = field(default_factory=ExitStack)

    @property
    def name(self) -> str:
        return self.entry["name"]


def chosen(catalogue: Catalogue, root: Path, stage: int, names: list[str], licenses: list[str] | None) -> list[DataSet]:
    """Entries of the stage, of these names. ValueError: a name is none of the stage's."""
    entries = catalogue.find(names) if names else catalogue.of_stage(stage)
    if strange := [entry.name for entry in entries if stage not in entry.stages]:
        raise ValueError(f"{', '.join(strange)} is no data set of stage {stage}")
    if licenses:
        entries = with_license(entries, licenses, root)
        if not entries:
            raise ValueError(f"--only-license {' '.join(licenses)} leaves no data set of stage {stage}")
    return entries


def prepare_stage(options: argparse.Namespace) -> int:
    """Run it all; the exit status. ValueError or OSError: nothing can be done at all."""
    out, root = options.out.expanduser().absolute(), (options.root or options.out).expanduser().absolute()
    if out.resolve().is_relative_to((root / "raw").resolve()):
        raise ValueError(f"--out {out} is inside of {root / 'raw'}, which holds raw data alone: choose another folder")
    catalogue = load_catalogue(options.catalogue)
    entries = chosen(catalogue, root, options.stage, options.names, options.only_license)
    states = [State(entry.model_dump(), entry.by_hand or entry.unsure is not None) for entry in entries]
    for state in states:
        look(state, root, out, options)
    work = [state for state in states if state.plan and not state.made]
    if work:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(options.jobs, fork, follow, (os.getpid(),)) as pool:
            try:
                run(work, pool, options)
            except BaseException:
                # What they have begun is begun again by the next run.
                for process in multiprocessing.active_children():
                    process.kill()
                raise
    files = []
    if any(state.made for state in states):
        files = write_companions(options, catalogue, states, out)
    results = [result_of(state) for state in states]
    if files:
        write_json(out / f"stage{options.stage}.report.json", results)
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        print_report(options, states, out, files)
    failed = [s for s in states if s.problem and (s.plan or options.names or not s.optional)]
    return 1 if failed or not any(s.made or s.note for s in states) else 0


def follow(parent: int) -> None:
    """A worker ends when its parent does, even if that is killed, and leaves Ctrl-C to it.

    So do the processes that Energon's indexing forks, which would wait for ever for what a dead worker owes them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with(parent)
    os.register_at_fork(after_in_child=partial(_end_with, os.getpid()))


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def look(state: State, root: Path, out: Path, options: argparse.Namespace) -> None:
    """What there is to do for one set."""
    try:
        plan = make_plan(state.entry, root, out, options.shards, options.partial)
    except ValueError as error:
        state.problem = str(error).rstrip(".")
        state.fetched = (root / "raw" / state.name / "fetched.json").exists()
        state.made = made_before(out / state.name)
        if state.made and not options.names:
            state.problem = None
        return
    made, before = finished(plan, options.verify), made_before(plan.final)
    if before is None and plan.final.exists() and not (plan.final.is_dir() and not any(plan.final.iterdir())):
        state.problem = f"{plan.final} is there and was not made by this tool: move it away"
    elif made is None and before and not options.redo:
        state.note = f"{state.name}: shards were lost or damaged, and it was made anew"
    elif made and not options.redo:
        state.made = made
        if made["fingerprint"] == plan.fingerprint:
            shutil.rmtree(plan.work, ignore_errors=True)  # left by a run that was stopped as it ended
        else:
            state.note = f"{state.name}: its raw data, the code or --shards changed since; --redo makes it anew"
    if state.made is None and state.problem is None:
        state.plan = plan


def made_before(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "provenance.json").read_text())
    except (OSError, ValueError):
        return None


def run(states: list[State], pool: ProcessPoolExecutor, options: argparse.Namespace) -> None:
    """Each set: check what is there, spool its rows, write its shards, finish. Several sets at once."""
    waiting, futures, at_once = list(states), {}, max(2, options.jobs // 4)
    share = slice(options.array_index, None, options.array_count)
    total = sum(len(state.plan.shards[share]) for state in states)
    quiet = options.quiet or options.json
    bar = progress_bar("", total, "shard", quiet)

    def submit(state: State, step: str, *call) -> None:
        futures[pool.submit(*call)] = (state, step)

    def begin(state: State) -> None:
        plan = state.plan
        for name in ("shards", "records"):
            (plan.work / name).mkdir(parents=True, exist_ok=True)
        submit(state, "check", missing_shards, plan, plan.shards[share])

    def advance(state: State, step: str, future: Future) -> None:
        plan = state.plan
        if step == "check":
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
            submit(state, "spool", spool_in_sight, plan, state.spool, plan.shards[share], line, quiet)
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
            # Sets are begun when there is room, so that not all of their rows lie on the disk twice.
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


def spool_in_sight(plan: Plan, folder: Path, shards: list[str], line: int, quiet: bool) -> None:
    """`spool`, with a bar of rows on a line of its own below that of the shards."""
    info = RawSource(plan.root, plan.name).info
    numbers = [number for number in ((info.get("counts") or {}).get("rows"), info.get("limit")) if number]
    with progress_bar(plan.name, min(numbers, default=None), "row", quiet, line) as bar:
        spool(plan, folder, shards, bar)


def progress_bar(name: str, total: int | None, unit: str, quiet: bool, line: int = 0) -> tqdm:
    """With rate and time left; without a terminal a line a minute."""
    wait = 0.2 if sys.stderr.isatty() else 60
    return tqdm(
        desc=name or None,
        total=total,
        unit=unit,
        unit_scale=unit == "row",
        disable=quiet,
        position=line,
        leave=not line,
        mininterval=wait,
        maxinterval=max(10, wait),
        delay=0 if wait < 1 else wait,
    )


# -- what lies beside the shards --------------------------------------------------------------------------------------


def write_companions(options: argparse.Namespace, catalogue: Catalogue, states: list[State], out: Path) -> list[Path]:
    """The stage's blends of the catalogue, restricted to what is there, and what licences that has."""
    allowed = {state.name for state in states} if options.only_license else None
    whole = blends(catalogue)
    files, present = [], set()
    for name in BLENDS[options.stage]:
        what, blend = whole[name]
        kept = restrict(blend, out, allowed)
        if not kept:
            continue
        content, sources = kept
        text = f"# {len(sources)} sources below data.root={out}. {what}\n"
        files.append(replace(out / f"{name}.yaml", text + yaml.safe_dump(content, sort_keys=False)))
        present |= set(sources)
    if present:
        files.append(replace(out / f"stage{options.stage}.LICENSES.txt", licences(catalogue, sorted(present), out)))
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
    """One paragraph a data set. What is not known is said to be unknown."""
    entries = {entry.name: entry.model_dump() for entry in catalogue.sets}
    lines = ["Licences of the data sets in this blend, as their catalogue and the Hub state them. No legal advice.\n"]
    for name in names:
        entry, made = entries.get(name, {}), made_before(out / name) or {}
        source = made.get("source", {})
        lines.append(
            f"{name}\n"
            f"  licence:  {source.get('license') or entry.get('license') or 'unknown: read the terms at the source'}\n"
            f"  terms:    {entry.get('terms') or '-'}\n"
            f"  from:     {source.get('from') or '-'}\n"
            f"  revision: {source.get('revision') or '-'}\n"
            f"  samples:  {made.get('train_samples', 0):,} and {made.get('val_samples', 0):,} held out\n"
        )
    return "\n".join(lines)


def replace(path: Path, text: str) -> Path:
    write_atomically(path, text)
    return path


def result_of(state: State) -> dict:
    status = "prepared" if state.made else "waiting" if state.note else "not prepared"
    made = {key: value for key, value in (state.made or {}).items() if key not in ("shards", "fingerprint")}
    shards = sum(record["samples"] > 0 for record in (state.made or {}).get("shards", []))
    return {
        "name": state.name,
        "status": status,
        "problem": state.problem,
        "note": state.note,
        "shards": shards,
        **made,
    }


def print_report(options: argparse.Namespace, states: list[State], out: Path, files: list[Path]) -> None:
    made = [state for state in states if state.made]
    if made:
        print(f"{'':<36}{'train':>11}{'held out':>9}{'catalogue':>11}{'annotations':>13}{'GB':>9}{'dropped':>9}")
    for state in made:
        m, dropped = state.made, state.made["dropped_share"]
        expected = f"{m['catalogue_samples']:,}" if m["catalogue_samples"] else "-"
        print(
            f"{state.name:<36}{m['train_samples']:>11,}{m['val_samples']:>9,}{expected:>11}{m['branches']:>13,}"
            f"{m['bytes'] / 1e9:>9.2f}{dropped:>9.1%}"
        )
        for reason, number in list(m["dropped"].items())[:SHOWN_REASONS]:
            print(f"    {number:>11,} dropped: {reason}")
        if m["moved_points"]:
            print(f"    {m['moved_points']:>11,} points lay outside of their picture and were moved to its border")
    absent = [state for state in states if state.problem]
    for state in (s for s in states if s.note):
        print(f"note: {state.note}")
    unknown = [] if options.names else [state.name for state in absent if not state.fetched]
    for state in absent:
        if state.name not in unknown:
            print(f"not prepared: {state.problem}", file=sys.stderr)
    if unknown:
        print(
            f"not fetched, {len(unknown)} of {len(states)}: {', '.join(unknown)}. tools/download_by_stage.sh "
            f"stage{options.stage} gets what a program can; python tools/download.py how NAME says how to get others.",
            file=sys.stderr,
        )
    if files and not options.quiet:
        print(f"\n{len(made)} of {len(states)} data sets are prepared in {out}:")
        for file in files:
            print(f"  {file}")
        print("Look at them, then train on them:")
        root = f"data.root={out} data.blend={files[0]}"
        print(
            f"  python tools/inspect_data.py --config-name stage{options.stage} {root} --samples 20 --html runs/inspect"
        )
        recipe = {1: "stage1_pretrain", 2: "stage2_sft", 3: "stage3_long_context"}[options.stage]
        print(f"  torchrun --nproc-per-node 8 recipes/{recipe}.py {root}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tools/prepare.py --stage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Turn the fetched data sets of a stage ($ROOT/raw/NAME, made by tools/download.py) into Energon "
            "shards, the stage's blend and its licences. Run it again after a stop: what is whole is kept."
        ),
    )
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets (default: all of the stage)")
    parser.add_argument("--out", type=Path, required=True, help="where the data sets' folders appear: data.root")
    parser.add_argument("--root", type=Path, help="holds raw/ (default: --out)")
    parser.add_argument("--catalogue", type=Path, default=CONF_FILE, help="another than conf/datasets.yaml")
    parser.add_argument("--partial", action="store_true", help="take what is there of sets that are fetched in part")
    parser.add_argument("--shards", type=int, default=512, help="of a data set, at most; fewer of a small one")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--array-index", type=int, default=0, help="of a Slurm array: $SLURM_ARRAY_TASK_ID, from 0")
    parser.add_argument("--array-count", type=int, default=1, help="of a Slurm array: $SLURM_ARRAY_TASK_COUNT")
    parser.add_argument(
        "--only-license", nargs="+", metavar="LICENSE", help="those under one of these, e.g. odc-by cc-by"
    )
    parser.add_argument("--redo", action="store_true", help="make anew what was prepared before")
    parser.add_argument("--verify", action="store_true", help="read the bytes of finished data sets again, too")
    parser.add_argument("--quiet", action="store_true", help="no progress, a short report")
    parser.add_argument("--json", action="store_true", help="the report as a list of objects")
    options = parser.parse_args(arguments)
    try:
        for name in ("shards", "jobs", "array_count"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is below 1")
        if not 0 <= options.array_index < options.array_count:
            raise ValueError(f"--array-index {options.array_index} is not from 0 to --array-count - 1")
        if not (options.root or options.out).is_dir():
            raise ValueError(f"{options.root or options.out} is no folder")
        sys.exit(prepare_stage(options))
    except ValueError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except OSError as error:
        sys.exit(f"error: {' '.join(str(error).split())}; once that is mended, the same command goes on")
    except BrokenProcessPool:
        sys.exit("error: a process was killed: if memory was short, use fewer --jobs; run again to go on")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")
