"""Download the raw data sets of conf/datasets.yaml; docs/datasets.md describes how.

    python tools/download.py list --stage 1                       # what there is, its licence, its state on the disk
    python tools/download.py plan --stage 2 --budget 1TB          # what fits, in which order, how long
    python tools/download.py fetch pixmo-cap chartqa --jobs 32    # or --stage 1; --limit 1000 gets a sample
    python tools/download.py how docvqa                           # what you have to provide, and where it goes
    python tools/download.py doctor                               # what is broken or missing, and how to fix it
    python tools/download.py verify chartqa                       # 50 samples with pictures, and what does not fit

Files go to raw/NAME under --root (default: DATA_ROOT, else data). A command can be stopped at any time and run again.
Exit status of fetch: 0 complete, 1 something is missing, 3 the disk is full, 4 --max-bytes is used up, 130 interrupted.
"""

import argparse
import errno
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

from molmo2_nemo.catalogue.commands import default_root, download_command
from molmo2_nemo.catalogue.datasets import CATEGORIES, CONF_FILE, load_catalogue
from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.limits import MAX_DROPPED
from molmo2_nemo.option_types import local_path, positive, side, size


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        options.root = (options.root or default_root()).expanduser()
        catalogue = load_catalogue(options.catalogue)
        entries = chosen(catalogue, options)
        return {"list": show, "plan": show_plan, "fetch": fetch, "how": show_how, "doctor": diagnose, "verify": verify}[
            options.command
        ](catalogue, entries, options)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr)
        return 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--root", type=local_path, default=None, help="data root (default: DATA_ROOT, else data)")
    shared.add_argument(
        "--catalogue", type=local_path, default=CONF_FILE, help="another catalogue than conf/datasets.yaml"
    )
    shared.add_argument("--json", action="store_true", help="print JSON")
    both = [shared, choice_of_sets("default: all, or what the options select")]
    named = [shared, choice_of_sets("needed, unless --stage or --category selects them")]
    commands.add_parser("list", parents=both, help="data sets and their state")
    planning = commands.add_parser("plan", parents=both, help="what fits in a budget, in which order, how long")
    planning.add_argument("--budget", type=size, help="bytes, such as 500GB or 1TB (default: the free space)")
    planning.add_argument(
        "--tier",
        choices=("small", "medium", "full"),
        help="what fits in 500 GB, in 1 TB, or all of it, what you bring yourself included",
    )
    planning.add_argument(
        "--max-side", type=side, metavar="PIXELS", help="with pictures resized as by fetch --max-side (an estimate)"
    )
    planning.add_argument(
        "--speed", type=size, metavar="BYTES/S", help="such as 50MB (default: as measured by earlier fetches)"
    )
    fetching = commands.add_parser("fetch", parents=named, help="download data sets")
    add_fetch_options(fetching)
    commands.add_parser("how", parents=named, help="what you have to provide, and where it goes")
    trying = commands.add_parser(
        "verify", parents=named, help="make samples of what is on disk, and say what does not fit"
    )
    trying.add_argument("--samples", type=positive, default=50, help="of each set (default %(default)s)")
    trying.add_argument(
        "--html",
        type=local_path,
        metavar="DIR",
        help="where to write the pages (default: runs/verify/NAME); open index.html",
    )
    trying.add_argument(
        "--max-dropped",
        type=share,
        default=MAX_DROPPED,
        metavar="SHARE",
        help="of the annotations of the samples that may be lost, as of prepare.py (default %(default)g)",
    )
    trying.add_argument("--no-pages", action="store_true", help="print the lines alone")
    checking = commands.add_parser("doctor", parents=both, help="what is broken or missing, and how to fix it")
    checking.add_argument("--deep", action="store_true", help="read every byte")
    options = parser.parse_args(arguments)
    if options.command in ("fetch", "how", "verify") and not (options.names or options.stage or options.category):
        parser.error(f"{options.command} needs names, --stage or --category")
    return options


def choice_of_sets(without: str) -> argparse.ArgumentParser:
    """The options that select data sets. without: what the help says of no names."""
    choice = argparse.ArgumentParser(add_help=False)
    choice.add_argument("names", nargs="*", metavar="NAME", help=f"data sets ({without})")
    choice.add_argument("--stage", type=int, choices=(1, 2, 3), help="data sets of a stage")
    choice.add_argument("--category", choices=CATEGORIES, help="data sets of a category")
    choice.add_argument(
        "--only-license",
        nargs="+",
        metavar="LICENSE",
        help="data sets under one of these licences, such as odc-by cc-by",
    )
    return choice


def add_fetch_options(fetching: argparse.ArgumentParser) -> None:
    fetching.add_argument(
        "--jobs", type=positive, default=Rules.jobs, help="files to download at once (default %(default)s)"
    )
    fetching.add_argument(
        "--per-host", type=positive, default=Rules.per_host, help="of these from one host (default %(default)s)"
    )
    fetching.add_argument("--limit", type=positive, metavar="N", help="download a sample: media of the first N rows")
    fetching.add_argument(
        "--max-bytes", type=size, metavar="BYTES", help="stop after downloading this much, such as 50GB"
    )
    fetching.add_argument(
        "--max-file-bytes",
        type=size,
        default=Rules.max_file_bytes,
        help="largest picture or video of a list (default 64 MiB)",
    )
    fetching.add_argument(
        "--tries", type=positive, default=Rules.tries, help="attempts for each file in a run (default %(default)s)"
    )
    fetching.add_argument(
        "--timeout",
        type=seconds,
        default=Rules.timeout,
        help="seconds to connect, to get an answer, and over which --min-rate is measured (default %(default)s)",
    )
    fetching.add_argument(
        "--min-rate",
        type=size,
        default=Rules.min_rate,
        metavar="BYTES/S",
        help="drop slower connections (default %(default)s)",
    )
    fetching.add_argument("--retry-lost", action="store_true", help="try lost addresses again before their date")
    fetching.add_argument(
        "--verify", action="store_true", help="read all files that are there, and download changed ones again"
    )
    fetching.add_argument(
        "--deduplicate", action="store_true", help="remove pictures that look like another of their set"
    )
    fetching.add_argument(
        "--max-side",
        type=side,
        metavar="PIXELS",
        help="resize pictures of lists of addresses whose longer side is above this, such as 768 (default: keep them)",
    )
    fetching.add_argument("--remove-archives", action="store_true", help="remove archives once they are unpacked")
    fetching.add_argument(
        "--allow-private", action="store_true", help="allow addresses of this machine and its network"
    )
    fetching.add_argument("--quiet", action="store_true", help="print no progress, only one line for each set")


def share(text: str) -> float:
    if not re.fullmatch(r"[01](\.\d*)?|\.\d+", text) or float(text) > 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return float(text)


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,9}(\.\d*)?|\.\d+", text) or float(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return float(text)


def chosen(catalogue, options) -> list:
    """The data sets that the options select, in the catalogue's order or in that of the names."""
    entries = catalogue.find(options.names) if options.names else catalogue.sets
    if options.stage:
        entries = [entry for entry in entries if options.stage in entry.stages]
    if options.category:
        entries = [entry for entry in entries if options.category in (entry.category, entry.stage2_category)]
    if options.only_license:
        from molmo2_nemo.fetch.inventory import with_license

        entries = with_license(entries, options.only_license, options.root)
    if not entries:
        raise ValueError("no data set is selected: loosen --stage, --category or --only-license.")
    return entries


def show(catalogue, entries, options) -> int:
    from molmo2_nemo.fetch.inventory import as_json, listed

    rows = listed(entries, options.root)
    command = partial(download_command, root=options.root, catalogue=catalogue.file)
    if options.json:
        print(as_json(rows))
        return 0
    table = [("name", "kind", "examples", "GB", "licence", "source", "layout", "state")]
    for row in rows:
        examples = f"{row.examples:,}" if row.examples else "?"
        examples = f"{row.released_rows:,} / {examples}" if row.count_differs else examples
        gigabytes = f"{row.size_gb:g}" if row.size_gb else "?"
        license = (row.license or "?") + (" *" if row.terms else "")
        table.append((row.name, row.kind, examples, gigabytes, license, row.source, row.layout, row.state))
    print_table(table)
    states = [row.state for row in rows]
    summary = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != "-")
    on_disk = sum(row.bytes_on_disk for row in rows)
    print(f"\n{len(rows)} data sets: {summary or 'none on disk'}; {on_disk / 1e9:,.1f} GB under {options.root / 'raw'}")
    if any(row.count_differs for row in rows):
        print("a / b: rows of the release / examples by the first list of stages")
    if any(row.bytes_on_disk for row in rows):
        print(f"complete: by number and size of the files; {command('doctor', '--deep')} reads every byte")
    if any(row.state in ("damaged", "changed") for row in rows):
        print(f"damaged: files are missing or have another size, and {command('doctor')} says which")
        print(f"changed: files are newer than the fetch; {command('doctor', '--deep')} reads all, and so does a fetch")
    if any(row.source in ("gated", "form", "moved", "dead") for row in rows):
        print(f"gated, form, moved, dead: {command('how', 'NAME')} has the page, and who found so on which day")
    if any(row.layout == "unverified" for row in rows):
        print("unverified: nobody has compared these entries of the catalogue with what is published")
    if any(row.terms for row in rows):
        print(f"* has terms of its own: {command('how', 'NAME')}")
    return 0


def show_plan(catalogue, entries, options) -> int:
    from molmo2_nemo.data.blend import MANY_ROUNDS
    from molmo2_nemo.fetch.inventory import as_json, free_bytes
    from molmo2_nemo.fetch.plan import CHOSEN, TIERS, measured_speed, plan_downloads, shares_of

    if options.budget is not None and options.budget < 10**6:
        raise ValueError(f"--budget {options.budget} is so many bytes: write the unit, as in {options.budget}GB.")
    if options.tier and options.budget:
        raise ValueError("--tier and --budget are two budgets: give one of them.")
    free = free_bytes(options.root)
    budget = TIERS[options.tier] or math.inf if options.tier else options.budget or free
    speed = options.speed or measured_speed(options.root)
    shares = shares_of(catalogue, options.stage or 2, options.root)
    rows = plan_downloads(
        entries, catalogue, options.root, budget, speed, options.tier is not None, options.max_side, shares
    )
    if options.json:
        print(as_json(rows))
        return 0
    table = [("", "name", "action", "GB", "by hand", "time", "rounds", "")]
    for number, row in enumerate(rows, 1):
        gigabytes = f"{'~' if row.estimated else ''}{row.gigabytes:,.1f}" if row.action != "refused" else ""
        by_hand = f"{'~' if row.by_hand_estimated else ''}{row.by_hand_gb:,.1f}" if row.by_hand_gb else ""
        rounds = f"{row.rounds:,.1f}" if row.rounds and options.stage else ""
        why = row.why + (f" ({row.by_hand_source})" if row.by_hand_source else "")
        table.append(
            (str(number), row.name, row.action, gigabytes, by_hand, duration(row.seconds), rounds, why[:90].rstrip())
        )
    print_table(table)
    print()
    print_sums(rows, options, budget, speed)
    many = [row for row in rows if options.stage and (row.rounds or 0) > MANY_ROUNDS]
    if options.stage:
        print(
            f"rounds: how often each sample comes round in stage {options.stage} of the schedule seed, at least (one "
            "sample a row)"
        )
    for row in many:
        print(f"warning: {row.name} comes round {row.rounds:,.0f} times or more: give it less weight in the blend")
    for entry in entries:
        if entry.count_differs:
            print(f"{entry.name}: {entry.count_differs}")
    total = sum(row.gigabytes + row.by_hand_gb * bool(options.tier) for row in rows if row.action in CHOSEN)
    if total * 1e9 > free:
        print(f"note: only {free / 1e9:,.1f} GB are free under {options.root}")
    return 0


def print_sums(rows, options, budget: float, speed: float | None) -> None:
    """Print what a plan adds up to, what it leaves out, and what its marks mean."""
    from molmo2_nemo.fetch.plan import totals

    total = totals(rows)
    within = "" if budget == math.inf else f" within {budget / 1e9:,.1f} GB"
    get = [row for row in rows if row.action == "fetch"]
    seconds = f", {duration(sum(row.seconds for row in get))}" if speed else ""
    fetched = total.automatic_gb + total.by_hand_fetched_gb
    print(
        f"{total.automatic + total.by_hand} of {len(rows)} sets are taken{within}: {fetched:,.1f} GB fetched{seconds}, "
        f"{total.by_hand_gb:,.1f} GB by hand\n"
        f"  by a program as a whole: {total.automatic} sets, {total.automatic_gb:,.1f} GB\n"
        f"  with files that you bring: {total.by_hand} sets, {total.by_hand_fetched_gb:,.1f} GB fetched, "
        f"{total.by_hand_gb:,.1f} GB by hand"
    )
    out = [row for row in rows if row.action in ("no room", "refused")]
    if out:
        lost = sum(row.share or 0 for row in out)
        names = ", ".join(f"{row.name} ({row.share:.1%})" if row.share else row.name for row in out)
        print(f"left out, {lost:.1%} of the samples of stage {options.stage or 2}: {names}")
    if speed:
        print(f"at {speed / 1e6:,.2f} MB/s ({'as given' if options.speed else 'as measured in earlier fetches'})")
    else:
        print("no speed was measured yet: fetch something, or give --speed 50MB")
    if any(row.estimated or row.by_hand_estimated for row in rows):
        print("~ estimated from the numbers of pictures and videos; archives take up to twice as much")


def fetch(catalogue, entries, options) -> int:
    from molmo2_nemo.fetch.data_set import FetchOptions, FetchResult, Meter, fetch_set
    from molmo2_nemo.fetch.inventory import layout_of, root_trouble
    from molmo2_nemo.fetch.web import OutOfBytes
    from molmo2_nemo.files import is_disk_error

    trouble = root_trouble(options.root)
    if trouble and options.root.exists() | options.root.is_symlink():
        raise ValueError(f"{trouble.what}: {trouble.fix}.")
    rules = Rules(
        jobs=options.jobs,
        per_host=options.per_host,
        tries=options.tries,
        timeout=options.timeout,
        min_rate=options.min_rate,
        max_file_bytes=options.max_file_bytes,
        allow_private=options.allow_private,
        backoff=min(1.0, options.timeout / 10),
    )
    settings = FetchOptions(
        options.root,
        rules,
        options.limit,
        options.verify,
        options.retry_lost,
        options.deduplicate,
        options.remove_archives,
        options.max_side,
    )
    results, status = [], 0
    command = partial(download_command, root=options.root, catalogue=catalogue.file)
    meter = Meter(options.max_bytes)
    for number, entry in enumerate(entries, 1):
        if layout_of(entry) == "unverified" and not entry.unsure:
            print(
                f"{entry.name}: layout unverified, its entry was not compared with what is published", file=sys.stderr
            )
        if not entry.unsure and (why := no_converter(entry)):
            print(f"{entry.name}: it can be fetched, and no sample can be made of it: {why}", file=sys.stderr)
        with Bar(entry.name, quiet=options.quiet) as bar:
            meter.report = bar.add_bytes
            try:
                result = fetch_set(entry, catalogue, settings, meter, bar.progress)
            except OutOfBytes as error:
                result, status = FetchResult(entry.name, "part", f"{error}; run it again for more"), 4
            except OSError as error:
                if isinstance(error, PermissionError):  # perhaps only of this set's folder
                    reason = (
                        f"no right to write {error.filename or options.root}: {command('doctor', entry.name)} says how "
                        "to get it"
                    )
                    result = FetchResult(entry.name, "failed", reason)
                elif is_disk_error(error):
                    room = (
                        "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "repair the disk"
                    )
                    reason = f"cannot write under {options.root} ({error.strerror}); {room} and run it again"
                    result, status = FetchResult(entry.name, "part", reason), 3
                else:
                    result = FetchResult(entry.name, "failed", " ".join(str(error).split()))
        if result.state in ("complete", "sample"):
            check_use(result, entry, options.root)
        results.append(result)
        if not options.json:
            rate = f", {result.bytes / 1e6:,.1f} MB in {duration(result.seconds)}" if result.bytes else ""
            text = f": {result.reason}" if result.reason else ""
            print(f"[{number}/{len(entries)}] {result.name} {result.state}{rate}{text}", flush=True)
        if status:
            break
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    # A set that the user must provide is no failure of a whole stage, but it is one if it was named.
    fine = {"complete", "sample"} | (set() if options.names else {"by hand", "refused"})
    open_sets = [result.name for result in results if result.state not in fine]
    if open_sets and not options.json and len(entries) > 1:
        print(f"not complete: {', '.join(open_sets)}", file=sys.stderr)
    return status or (1 if open_sets else 0)


def no_converter(entry) -> str | None:
    """Why the rows of a user's own set cannot be converted, whatever is in them; None: as far as is known, they can."""
    if entry.category != "own" or entry.form:
        return None
    from molmo2_nemo.prepare.converters import converter_of

    try:
        converter_of(entry.model_dump())
    except ValueError as error:
        return str(error)
    return None


def check_use(result, entry, root: Path) -> None:
    """Try to make a sample of what is there, and look for media; the result says where that fails."""
    from molmo2_nemo.fetch.data_set import note_trial
    from molmo2_nemo.fetch.inventory import media_lacking
    from molmo2_nemo.prepare.trial import try_rows

    tried = try_rows(entry.model_dump(), root)
    said = {"searched": tried.searched, "found": tried.found}
    note_trial(root, entry.name, works=tried.works, useless=tried.reason, **said)
    if tried.searched:
        share = f"{tried.found:,} of {tried.searched:,} annotations looked at have their media on disk"
        verify = download_command("verify", entry.name, root=root, catalogue=entry.catalogue)
        warning = f"; warning: see {verify}" if media_lacking(entry, said) else ""
        result.reason = "; ".join(filter(None, [result.reason, share])) + warning
        result.counts |= {"annotations_searched": tried.searched, "with_media": tried.found}
    if tried.doubt:
        result.reason = "; ".join(filter(None, [result.reason, f"warning: {tried.doubt}"]))
    if not tried.works:
        result.state = "useless"
        result.reason = (
            f"complete, but none of the first {tried.rows:,} rows became a sample ({tried.reason}): compare "
            f"{root / 'raw' / entry.name} with "
            f"{download_command('how', entry.name, root=root, catalogue=entry.catalogue)}"
        )


def show_how(catalogue, entries, options) -> int:
    from molmo2_nemo.fetch.inventory import how

    pages = []
    for entry in entries:
        of_media = catalogue.find([entry.media_of])[0] if entry.media_of else None
        pages.append({"name": entry.name, "page": how(entry, options.root, of_media)})
    print(json.dumps(pages, indent=1) if options.json else "\n".join(page["page"] for page in pages).rstrip("\n"))
    return 0


def diagnose(catalogue, entries, options) -> int:
    from molmo2_nemo.fetch.inventory import as_json, doctor, state_of

    problems = list(doctor(entries, options.root, options.deep))
    if options.json:
        print(as_json(problems))
        return 1 if problems else 0
    for problem in problems:
        print(f"{problem.name}: {problem.what}\n    {problem.fix}")
    states = [state_of(entry, options.root) for entry in entries]
    there = len(states) - states.count("-") - states.count("refused")
    print(
        f"{len(problems)} problem(s); {states.count('complete')} complete, {there} started, of {len(entries)} data sets"
    )
    return 1 if problems else 0


def verify(catalogue, entries, options) -> int:
    """Print what does not fit, and write a page for each sample. Returns 1 if something of a set does not fit."""
    from molmo2_nemo.prepare.verify import report, take

    sys.path.insert(0, str(Path(__file__).parent))  # for python -m, too
    results = []
    for entry in entries:
        try:
            found = take(entry.model_dump(), options.root, options.samples)
            lines, fits = report(entry, options.root, found, options.max_dropped)
            samples = found.samples
        except ValueError as error:  # it is not there, or a file of it is broken
            lines, samples, fits = [str(error).rstrip(".")], [], False
        if samples and not options.no_pages:
            from inspect_data import show_samples

            folder = options.html or Path("runs", "verify")
            folder = folder / entry.name if len(entries) > 1 or not options.html else folder
            show_samples(entry.name, samples, folder, 1 if entry.stages == [1] else 2)
            lines.append(f"  pages:       {folder / 'index.html'}")
        results.append({"name": entry.name, "fits": fits, "samples": len(samples), "lines": lines})
        if not options.json:
            print("\n".join(lines), flush=True)
    if options.json:
        print(json.dumps(results, indent=1))
    return 0 if all(result["fits"] for result in results) else 1


class Bar:
    """Progress of a set on the standard error: files or bytes, rate, time left; a line a minute without a terminal."""

    def __init__(self, name: str, quiet: bool):
        from molmo2_nemo.fetch.url_list import DownloadProgress

        self._name, self._quiet, self._bar, self._files = name, quiet, None, False
        self._bytes, self._since, self._shown = 0, time.monotonic(), 0.0
        self.progress = DownloadProgress(self.add_bytes, self._add_files, self._start, self._expect)

    def add_bytes(self, count: int) -> None:
        self._bytes += count
        if self._bar is None:
            return
        if not self._files:
            self._bar.update(count)
        elif (now := time.monotonic()) - self._shown > 1:
            self._shown = now
            self._bar.set_postfix_str(f"{self._bytes / 1e6 / (now - self._since):,.2f} MB/s", refresh=False)

    def _add_files(self, count: int) -> None:
        self._bar.update(count)

    def _start(self, total: int, done: int) -> None:
        self._open(total, True, unit=" files", initial=done)

    def _expect(self, count: int) -> None:
        if count:
            self._open(count, False, unit="B", unit_scale=True)

    def _open(self, total: int, files: bool, **options) -> None:
        from tqdm import tqdm

        self.close()
        self._files, self._bytes, self._since = files, 0, time.monotonic()
        wait = 0.2 if sys.stderr.isatty() else 60
        self._bar = tqdm(
            total=total,
            desc=self._name,
            disable=self._quiet,
            mininterval=wait,
            maxinterval=max(10, wait),
            leave=False,
            dynamic_ncols=True,
            delay=0 if wait < 1 else wait,
            **options,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def print_table(rows: list[tuple]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
