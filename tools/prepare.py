"""Turn your own annotations into shards to train on. The formats that are read: docs/own_data.md

    python tools/prepare.py my_annotations.jsonl --images DIR --out SHARDS --split 90/5/5
    python recipes/finetune.py model=hf model.hf_path=/models/Molmo2-8B data.mine=SHARDS hardware=auto

Or the public data sets of a stage, once tools/download.py has fetched them (options: --stage 1 --help):

    python tools/prepare.py --stage 1 --shards 512 --out $DATA_ROOT

Every line is read, every picture decoded and every video opened before anything is written. Mistakes are listed by
kind with their lines, and nothing is written unless --skip-bad says to go on without these lines.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import yaml

from molmo2_nemo import storage
from molmo2_nemo.catalogue.commands import download_command
from molmo2_nemo.catalogue.datasets import CONF_FILE
from molmo2_nemo.config.schema import DataConfig
from molmo2_nemo.data.schema import UNITS
from molmo2_nemo.files import LockHeld, disk_errors_told, missing_room, published
from molmo2_nemo.limits import MAX_DROPPED
from molmo2_nemo.option_types import local_path, positive, side, size
from molmo2_nemo.prepare import splits
from molmo2_nemo.prepare.formats.line import FORMATS
from molmo2_nemo.prepare.formats.table import KEYS
from molmo2_nemo.prepare.in_parts import Scratch, prepare_in_parts
from molmo2_nemo.prepare.mistakes import kind_of
from molmo2_nemo.prepare.own_data import Outcome, OwnSample, Reading, read_files, samples
from molmo2_nemo.prepare.stage_datasets import PreparedStage, StageOptions, prepare_stage, result_of
from molmo2_nemo.prepare.webdataset import SHARD_SAMPLES, write_shards

# Kinds of mistakes that are listed, sentences of each, and lines of which only the number is named.
SHOWN_KINDS, SHOWN_LINES, SHOWN_PLACES = 20, 3, 10
SHOWN_REASONS = 5
# With what recipes/finetune.py trains on shards of which nothing is held out.
WITHOUT_HELD_OUT = ("train.save_best=null", "train.validation_batches=0")
# What rows are, by the first word of their place.
ROWS = {
    "line": "lines",
    "item": "items of a JSON array",
    "row": "rows",
    "sample": "samples of a shard",
    "image": "images",
    "video": "video",
    "the": "JSON object",
    "object": "JSON objects",
    "annotation": "annotations",
    "track": "tracks",
}


def main(arguments: list[str] | None = None) -> None:
    """Two tools in one: with --stage the public data sets of a stage, without it a file of own annotations."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.split("=")[0] == "--stage" for argument in arguments):
        main_stage(arguments)
    else:
        main_own_annotations(arguments)


# -- own annotations --------------------------------------------------------------------------------------------------


def main_own_annotations(arguments: list[str]) -> None:
    formats = "\n".join(f"  {name:<14} {what}" for name, what in FORMATS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"formats:\n{formats}",
    )
    parser.add_argument(
        "annotations",
        type=local_path,
        nargs="+",
        help="files: JSON lines, JSON, CSV, parquet, WebDataset shards, XML of CVAT",
    )
    parser.add_argument(
        "--images",
        type=local_path,
        metavar="DIR",
        help="folder of the images and videos (default: that of the annotations)",
    )
    parser.add_argument("--out", type=local_path, required=True, metavar="SHARDS", help="folder to make")
    parser.add_argument("--name", help="of the source in the blend (default: the folder's)")
    parser.add_argument(
        "--format", choices=FORMATS, help="of the annotations, listed below (default: recognised line by line)"
    )
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="KEY=COLUMN", help="of a table, such as image=file label=class x=px"
    )
    parser.add_argument("--unit", choices=UNITS, default="fraction", help="of coordinates, if a line does not say")
    parser.add_argument("--follow-links", action="store_true", help="read links that lead out of --images")
    parser.add_argument(
        "--split",
        metavar="TRAIN/VAL/TEST",
        help=f"percent of the pictures, such as 90/5/5; TEST may be left out (default {splits.DEFAULT})",
    )
    parser.add_argument(
        "--test", type=local_path, nargs="+", default=[], metavar="FILE", help="annotations of the split part test"
    )
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="write training samples N times, if they are few"
    )
    parser.add_argument("--shard-size", type=int, default=SHARD_SAMPLES, help=f"samples (default {SHARD_SAMPLES})")
    parser.add_argument("--skip-bad", action="store_true", help="go on without the lines that have a mistake")
    parser.add_argument("--all-errors", action="store_true", help="list every line that has a mistake")
    parser.add_argument("--errors", type=local_path, metavar="FILE", help="write every mistake to FILE, as JSON lines")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that check media")
    arguments = parser.parse_args(arguments)
    try:
        prepare_own_annotations(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit("error: a process that checks media was killed: if memory was short, use fewer --workers")


def prepare_own_annotations(arguments: argparse.Namespace) -> None:
    check_options(arguments)
    images = (arguments.images or arguments.annotations[0].parent).resolve()
    with published(arguments.out) as folder:
        unpacked = folder.resolve() / "unpacked"
        reading = Reading(images, unpacked, arguments.unit, arguments.format, arguments.follow_links)
        read, columns = ReadAll(), dict(pair.split("=", 1) for pair in arguments.columns)
        given = [*arguments.annotations, *arguments.test]
        for file, outcome in read_files(given, reading, columns, arguments.workers):
            read.add(file, outcome, is_test=file in arguments.test)
        read.refuse_what_is_tested()
        lines = read.lines
        print_forms(read)
        if read.mistakes:
            print_mistakes(read.mistakes, arguments.all_errors)
            if arguments.errors:
                write_mistakes(read.mistakes, arguments.errors)
            if not arguments.skip_bad:
                raise ValueError(
                    f"{len(read.mistakes)} of {read.total} lines cannot be used (--skip-bad leaves them out)"
                )
        if not lines:
            names = ", ".join(map(str, arguments.annotations))
            raise ValueError(f"{names} has {read.total} lines and none to train on")
        parts = parts_of(arguments, read)
        repeats = {name: arguments.repeat if name == splits.TRAIN else 1 for name in parts}
        needed = sum(line.size() * repeats[name] for name, part in parts.items() for line in part)
        if (missing := missing_room(arguments.out, needed, "a copy of all samples")) is not None:
            raise ValueError(missing)
        with disk_errors_told(arguments.out, needed, "a copy of all samples"):
            written = {name: samples(part, repeats[name]) for name, part in parts.items()}
            counts = write_shards(folder, written, arguments.shard_size)
            name, path = arguments.name or arguments.out.resolve().name, str(arguments.out.resolve())
            blend = {"weighting": "sqrt", "sources": {name: {"path": path}}}
            (folder / "blend.yaml").write_text(yaml.safe_dump(blend, sort_keys=False))
        shutil.rmtree(unpacked, ignore_errors=True)
    print_own_report(arguments, parts, len(read.mistakes), counts)


def parts_of(arguments: argparse.Namespace, read: "ReadAll") -> dict[str, list[OwnSample]]:
    """Split part -> its samples, in the order of the lines; none is empty. ValueError, one sentence."""
    shares = splits.Shares.read(arguments.split or splits.DEFAULT, asked=arguments.split is not None)
    chosen = splits.deal(read.lines, shares)
    parts = {name: [line for line in read.lines if chosen[line.key] == name] for name in (splits.TRAIN, splits.VAL)}
    parts[splits.TEST] = read.test or [line for line in read.lines if chosen[line.key] == splits.TEST]
    return {name: part for name, part in parts.items() if part}


def check_options(arguments: argparse.Namespace) -> None:
    if arguments.images and not arguments.images.is_dir():
        raise ValueError(f"--images {arguments.images} is no folder")
    for file in (*arguments.annotations, *arguments.test):
        if not file.is_file():
            raise ValueError(f"{file} is no file: name the files of annotations")
    if twice := next((file for file in arguments.test if file in arguments.annotations), None):
        raise ValueError(f"--test {twice} is among the annotations to train on, too: name it once")
    shares = splits.Shares.read(arguments.split or splits.DEFAULT)
    if arguments.test and shares.test:
        raise ValueError(
            f"--split {arguments.split} has a part for the test, and so has --test {arguments.test[0]}: leave out the"
            " file, or the last number"
        )
    for name in ("repeat", "shard_size", "workers"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is below 1")
    for pair in arguments.columns:
        key, _, column = pair.partition("=")
        if key not in KEYS or not column:
            raise ValueError(f"--columns {pair} is not KEY=COLUMN with a KEY of {', '.join(KEYS)}")


@dataclass
class ReadAll:
    """What became of all rows."""

    lines: list[OwnSample] = field(default_factory=list)
    test: list[OwnSample] = field(default_factory=list)  # of the files --test
    places: dict[str, Outcome] = field(default_factory=dict)  # by the sample's key
    mistakes: list[Outcome] = field(default_factory=list)
    forms: dict[Path, Counter] = field(default_factory=dict)  # (kind of row, format)
    notes: Counter = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return len(self.lines) + len(self.test) + len(self.mistakes)

    def add(self, file: Path, outcome: Outcome, is_test: bool = False) -> None:
        self.notes.update(outcome.notes)
        if outcome.mistakes:
            self.mistakes.append(outcome)
        if outcome.form:
            kind = outcome.place.removeprefix(f"{file.name} ").split()[0]
            self.forms.setdefault(file, Counter())[ROWS.get(kind, kind), outcome.form] += 1
        if outcome.sample is not None:
            (self.test if is_test else self.lines).append(outcome.sample)
            self.places[outcome.sample.key] = outcome

    def refuse_what_is_tested(self) -> None:
        """A line to train on is a mistake if a picture of it is in a file of --test."""
        shared = splits.in_both(self.lines, self.test)
        for key, tested in shared.items():
            place = self.places[key].place
            sentence = f"a picture or video of it is that of the test's {self.places[tested].place}, too"
            self.mistakes.append(Outcome(place, mistakes=[sentence]))
        self.lines = [line for line in self.lines if line.key not in shared]


def print_forms(read: ReadAll) -> None:
    """Say as what each file was read; --format would force another."""
    for file, forms in read.forms.items():
        parts = [f"{number:,} {kind}: {FORMATS[form]}" for (kind, form), number in forms.most_common()]
        print(f"{file.name} is read as {'; '.join(parts)}")
    for note, number in read.notes.most_common():
        print(f"note, {number:,} x: {note}")


def print_mistakes(mistakes: list[Outcome], every_line: bool) -> None:
    """List mistakes by kind, the commonest first."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for outcome in mistakes:
        for sentence in outcome.mistakes:
            kinds.setdefault(kind_of(sentence), []).append((outcome.place, sentence))
    found = sorted(kinds.values(), key=len, reverse=True)
    for lines in found if every_line else found[:SHOWN_KINDS]:
        shown = lines if every_line else lines[:SHOWN_LINES]
        for place, sentence in shown:
            print(f"{place}: {sentence}", file=sys.stderr)
        if len(lines) > len(shown):
            others = [place for place, _ in lines[len(shown) :]]
            named = ", ".join([*others[:SHOWN_PLACES], *["..."][: len(others) > SHOWN_PLACES]])
            print(f"    and {len(others):,} more like it: {named}", file=sys.stderr)
    if not every_line and len(found) > SHOWN_KINDS:
        print(f"... and {len(found) - SHOWN_KINDS} other kinds of mistakes (--all-errors lists all)", file=sys.stderr)


def write_mistakes(mistakes: list[Outcome], file: Path) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for outcome in mistakes:
            for sentence in outcome.mistakes:
                entry = {"place": outcome.place, "kind": kind_of(sentence), "mistake": sentence}
                lines.write(json.dumps(entry, ensure_ascii=False) + "\n")
    print(f"all mistakes are in {file}", file=sys.stderr)


def print_own_report(
    arguments: argparse.Namespace, parts: dict[str, list[OwnSample]], left_out: int, counts: dict[str, int]
) -> None:
    """Print what was written, and what to do with it."""
    lines = [line for part in parts.values() for line in part]
    media = Counter("videos" if part.startswith("video") else "images" for line in lines for part, _ in line.files)
    tasks = Counter(task for line in lines for task in line.tasks)
    repeated = f" ({counts['train'] // arguments.repeat:,} x {arguments.repeat})" if arguments.repeat > 1 else ""
    rows = {
        "training samples": f"{counts['train']:,}{repeated}",
        "held-out samples": f"{counts.get('val', 0):,}",
        "test samples": f"{counts.get('test', 0):,}",
        "images, videos": f"{media['images']:,}, {media['videos']:,}",
        "split by content": ", ".join(f"{different(part):,} {name}" for name, part in parts.items()),
        "branches": ", ".join(f"{number:,} {task}" for task, number in tasks.most_common()),
        "bytes of shards": f"{sum(file.stat().st_size for file in arguments.out.glob('*.tar')):,}",
    }
    if left_out:
        rows["left out"] = f"{left_out:,} lines with a mistake"
    print(f"{arguments.out}")
    for name, value in rows.items():
        print(f"  {name:<18}{value}")
    limit = DataConfig.max_images
    many = [len(line.files) for line in lines if len(line.files) > limit]
    if many:
        print(f"of {len(many):,} samples only {limit} images are used, unless with data.max_images={max(many)}")
    blend = shlex.quote(f"data.blend={arguments.out / 'blend.yaml'}")
    print("\nLook at them, then train on them:")
    print(f"  python tools/inspect_data.py --config-name stage2 {blend} --each --samples 200 --html runs/inspect")
    name = re.sub(r"[^A-Za-z0-9_-]", "_", arguments.name or arguments.out.resolve().name)
    own = shlex.quote(f"data.{name if name[0].isalpha() else f'own_{name}'}={arguments.out}")
    unmeasured = "" if counts.get("val") else f" {' '.join(WITHOUT_HELD_OUT)}"
    print(f"  python recipes/finetune.py model=hf model.hf_path=MODEL {own} hardware=auto{unmeasured}")
    if unmeasured:
        print("No sample is held out, so that nothing is measured and no best checkpoint known: --split 90/5/5.")


def different(part: list[OwnSample]) -> int:
    """Pictures, videos and texts, each counted once."""
    return len({content for line in part for content in line.contents})


# -- the data sets of a stage -----------------------------------------------------------------------------------------


def main_stage(arguments: list[str]) -> None:
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
    parser.add_argument(
        "--out",
        required=True,
        help="where the data sets' folders appear: data.root, a folder or an address (--scratch)",
    )
    add_scratch_options(parser)
    parser.add_argument("--root", type=local_path, help="holds raw/ (default: --out)")
    parser.add_argument("--catalogue", type=local_path, default=CONF_FILE, help="another than conf/datasets.yaml")
    parser.add_argument("--partial", action="store_true", help="take what is there of sets that are fetched in part")
    parser.add_argument("--shards", type=int, default=512, help="of a data set, at most; fewer of a small one")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: cores)")
    parser.add_argument("--array-index", type=int, default=0, help="of a Slurm array: $SLURM_ARRAY_TASK_ID, from 0")
    parser.add_argument("--array-count", type=int, default=1, help="of a Slurm array: $SLURM_ARRAY_TASK_COUNT")
    parser.add_argument(
        "--only-license", nargs="+", default=(), metavar="LICENSE", help="those under one of these, e.g. odc-by cc-by"
    )
    parser.add_argument(
        "--max-dropped",
        type=float,
        default=MAX_DROPPED,
        metavar="SHARE",
        help="refuse a set whose sample loses more of its annotations (default %(default)g; 1 takes what is left)",
    )
    parser.add_argument("--redo", action="store_true", help="prepare again what is finished")
    parser.add_argument("--verify", action="store_true", help="read the bytes of finished data sets again, too")
    parser.add_argument(
        "--no-room-check",
        dest="check_room",
        action="store_false",
        help="start even if --out has less room than the raw data take",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, a short report")
    parser.add_argument("--json", action="store_true", help="the report as a list of objects")
    given = parser.parse_args(arguments)
    try:
        values = {field.name: getattr(given, field.name) for field in fields(StageOptions)}
        scratch = scratch_of(given)
        values |= {"quiet": given.quiet or given.json, "out": scratch.folder if scratch else Path(given.out)}
        if scratch:
            scratch.folder.mkdir(parents=True, exist_ok=True)
        options = StageOptions(**values)
        if scratch:
            prepared = prepare_in_parts(options, given.out, scratch)
        else:
            prepared = prepare_stage(options)
        if given.json:
            print(json.dumps([result_of(state) for state in prepared.states], indent=1))
        else:
            print_stage_report(options, prepared)
        sys.exit(0 if prepared.succeeded else 1)
    except (ValueError, LockHeld) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except OSError as error:
        sys.exit(f"error: {' '.join(str(error).split())}; fix that and run the same command again to go on")
    except BrokenProcessPool:
        sys.exit("error: a process was killed: if memory was short, use fewer --jobs; run again to go on")
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to go on")


def add_scratch_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fetch, prepare and upload one set after the other, in parts if it must be")
    group.add_argument("--scratch", type=local_path, metavar="DIR", help="a folder of a local disk for what is at work")
    group.add_argument(
        "--max-scratch", type=size, metavar="BYTES", help="at most so much of it, as 200GB (default: 90 %% of the room)"
    )
    group.add_argument(
        "--limit", type=positive, metavar="N", help="a sample, as of download.py fetch: the first N rows"
    )
    group.add_argument("--max-side", type=side, metavar="PIXELS", help="resize pictures, as of download.py fetch")
    group.add_argument(
        "--allow-private", action="store_true", help="fetch from addresses of this machine and its network, too"
    )


def scratch_of(given: argparse.Namespace) -> Scratch | None:
    """What --scratch and its options say; None: it is not given. ValueError, one sentence."""
    if storage.is_remote(given.out):
        storage.check(given.out, "--out")
    if given.scratch is None:
        if storage.is_remote(given.out):
            raise ValueError(f"--out {storage.shown(given.out)} needs --scratch DIR, a folder of a local disk")
        if given.max_scratch or given.limit or given.max_side or given.allow_private:
            raise ValueError("--max-scratch, --limit, --max-side and --allow-private go with --scratch DIR: add it")
        return None
    return Scratch(given.scratch, given.max_scratch, given.limit, given.max_side, given.allow_private)


def print_stage_report(options: StageOptions, prepared: PreparedStage) -> None:
    """Print the numbers of each set, why others are not prepared, and what to do next."""
    states, out, files = prepared.states, prepared.out, prepared.files
    finished = [state for state in states if state.made]
    if finished:
        print(f"{'':<36}{'train':>11}{'held out':>9}{'catalogue':>11}{'annotations':>13}{'GB':>9}{'dropped':>9}")
    for state in finished:
        made, dropped = state.made, state.made.dropped_share
        expected = f"{made.catalogue_samples:,}" if made.catalogue_samples else "-"
        print(
            f"{state.name:<36}{made.train_samples:>11,}{made.val_samples:>9,}{expected:>11}{made.branches:>13,}"
            f"{made.bytes / 1e9:>9.2f}{dropped:>9.1%}"
        )
        for reason, number in list(made.dropped.items())[:SHOWN_REASONS]:
            print(f"    {number:>11,} dropped: {reason}")
        if made.moved_points:
            print(f"    {made.moved_points:>11,} points lay outside of their picture and were moved to its border")
    absent = [state for state in states if state.problem]
    for state in (s for s in states if s.note):
        print(f"note: {state.note}")
    unknown = [] if options.names else [state.name for state in absent if not state.fetched]
    for state in absent:
        if state.name not in unknown:
            print(f"not prepared: {state.problem}", file=sys.stderr)
    if unknown:
        of_another = None if options.catalogue == CONF_FILE else str(options.catalogue)
        command = partial(download_command, root=options.root or options.out, catalogue=of_another)
        print(
            f"not fetched, {len(unknown)} of {len(states)}: {', '.join(unknown)}. "
            f"{command('fetch', '--stage', str(options.stage))} gets what a program can; {command('how', 'NAME')} "
            "says how to get others.",
            file=sys.stderr,
        )
    if files and not options.quiet:
        print(f"\n{len(finished)} of {len(states)} data sets are prepared in {out}:")
        for file in files:
            print(f"  {file}")
        print("Look at them, then train on them:")
        root = f"data.root={out} data.blend={files[0]}"
        print(
            f"  python tools/inspect_data.py --config-name stage{options.stage} {root} --samples 20 --html runs/inspect"
        )
        recipe = {1: "stage1_pretrain", 2: "stage2_sft", 3: "stage3_long_context"}[options.stage]
        print(f"  torchrun --nproc-per-node 8 recipes/{recipe}.py {root}")


if __name__ == "__main__":
    main()
