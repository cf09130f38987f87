"""The report of a run, or of several side by side: plots, figures by source, answers, configuration.

`write_report` reads the files that training writes into a run's folder, and writes one HTML file that needs neither
other files nor a network. Nothing here imports torch.

    metrics.jsonl          a line: {"kind": "train" | "validation" | ..., "step": n, figure: number | {part: number}}
    config.yaml, versions.json, ended.json, samples/step_*/    shown if they exist

Names from data and configuration are escaped and stand beside the drawings, never inside one.
"""

import base64
import itertools
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from molmo2_nemo.data.counters import BROKEN
from molmo2_nemo.files import write_atomically
from molmo2_nemo.templates import template
from molmo2_nemo.text import dotted, duration

COLOURS = ["#1f6fb4", "#d9641e", "#2a9d5c", "#8a56b8", "#c23b4b", "#7a5a3a", "#d05fa5", "#555555", "#a8a32a", "#20a5b5"]
# (heading, figures of training intervals with their title and the lowest value on their axis)
SECTIONS = (
    (
        "Optimization",
        {
            "lr": ("learning rate", 0),
            "grad_norm": ("gradient norm before clipping", None),
            "log_partition_rms": ("log-partition, root mean square", None),
            "skipped_steps": ("skipped steps", 0),
        },
    ),
    (
        "Speed",
        {
            "tokens_per_second": ("tokens per second", 0),
            "samples_per_second": ("samples per second", 0),
            "mfu": ("model FLOPs utilization", 0),
            "model_tflops_per_second": ("model TFLOP/s of a device", 0),
            "loss_tokens_per_second": ("tokens with loss per second", 0),
            "padded_tokens_per_second": ("tokens and padding per second", 0),
            "patches_per_second": ("vision patches per second", 0),
            "fill": ("share of the rows that is filled", 0),
            "imbalance": ("work of the busiest data-parallel rank over the mean", 1),
            "step_seconds": ("seconds of a step, by part, on rank 0", 0),
            "compute_seconds": ("seconds of a rank's own in a step: the median and the slowest rank", 0),
            "data_wait_share": ("share of the time spent waiting for data", 0),
            "memory_gib": ("peak memory of rank 0, GiB", 0),
        },
    ),
)
LOGARITHMIC = 5  # ratio of the largest to the smallest value from which on an axis is logarithmic
MAX_POINTS = 1500  # of a drawn line
MAX_PANELS = 200  # of a section: a drawing takes about 0.1 s
MAX_ANSWERS = 24  # shown of a step
MAX_STEPS = 5  # whose answers are shown
MAX_TEXT = 2000  # characters of a question or an answer
MAX_TEXT_FILE = 2**20  # bytes of a configuration or another small file
MAX_PICTURE = 2**21  # bytes of a file
MAX_PICTURES = 2**25  # bytes of all pictures on the page


@dataclass
class Run:
    """What is known of a run from its folder. Steps that a resumed run logged again count once."""

    folder: Path
    label: str = ""
    records: dict[str, list[dict]] = field(default_factory=dict)  # by kind, in order of steps
    resumes: list[int] = field(default_factory=list)  # the first step written after each resume
    unreadable: int = 0  # lines
    seconds: float = 0.0  # in training steps, the repeated ones included
    repeated_seconds: float = 0.0
    config_text: str = ""
    config: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    ended: dict = field(default_factory=dict)

    def of(self, kind: str) -> list[dict]:
        return self.records.get(kind, [])


@dataclass
class Line:
    x: np.ndarray
    y: np.ndarray
    colour: str
    name: str = ""  # for the legend; empty: not in it
    style: str = "line"  # line | faint | dots


@dataclass
class Panel:
    title: str
    lines: list[Line]
    resumes: list[tuple[int, str]]  # (step, colour)
    lowest: float | None = None  # end of the vertical axis; None: what fits, logarithmic for values far apart
    wide: bool = False


def write_report(runs: list[Path], out: Path) -> None:
    """Write the report of these run folders to `out`.

    Raises ValueError if one of them is not a run, OSError if the file cannot be written.
    """
    found = [read_run(folder) for folder in dict.fromkeys(Path(run).resolve() for run in runs)]
    name_runs(found)
    pictures = Pictures()
    page = template(Path(__file__).parent / "report.html").render(
        title=", ".join(run.label for run in found) if len(found) < 4 else f"{len(found)} runs",
        colours=colours(found),
        facts=facts(found),
        differences=config_differences(found),
        sections=[(heading, [(panel, draw(panel)) for panel in panels]) for heading, panels in sections(found)],
        runs=[(run, sources_table(run), answers(run, pictures)) for run in found],
        left_out=pictures.left_out,
    )
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the file to write the report to.")
    write_atomically(out, page.encode(errors="replace"))


# Reading


def read_run(folder: Path) -> Run:
    """Read a run's folder. Raises ValueError if it is not a run, or has no logged step yet."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no metrics.jsonl: give the folder of a run, such as runs/NAME.")
    run = Run(folder)
    with open(path, encoding="utf-8", errors="replace") as file:
        read_metrics(file, run)
    if not run.of("train"):
        raise ValueError(f"{path} has no training step yet: wait for the first one (train.log_every).")
    configs = [folder / "config.yaml", *sorted(folder.glob("checkpoints/step_*/config.yaml"), reverse=True)]
    run.config_text = next(filter(None, map(read_text, configs)), "")
    run.config = parse_config(run.config_text)
    run.versions, run.ended = (parse_object(read_text(folder / name)) for name in ("versions.json", "ended.json"))
    return run


def read_metrics(lines, run: Run) -> None:
    """Fill in `run` from the lines of metrics.jsonl. A repeated step replaces the records from that step on."""
    records: list[dict] = []
    for line in lines:
        record = parse_object(line)
        if not record and line.strip():
            if not line.endswith("\n"):
                break  # the line is being written
            run.unreadable += 1
            # After a half-written line of a killed run, the next run continues on the same line.
            record = parse_object(line[max(line.rfind('{"kind"'), 0) :])
        kind, step = record.get("kind"), record.get("step")
        if not isinstance(kind, str) or type(step) is not int or not 0 <= step < 2**53:
            run.unreadable += bool(record)
            continue
        first = len(records)
        while first and records[first - 1]["step"] >= step:
            first -= 1
        # At the same step, training, validation and a checkpoint follow one another without a resume.
        while first < len(records) and records[first]["step"] == step and records[first]["kind"] != kind:
            first += 1
        if first < len(records) or kind == "resume":
            run.resumes.append(step + (kind == "resume"))
            run.repeated_seconds += sum(seconds(old) for old in records[first:])
            del records[first:]
        if kind == "train":
            # Only the last record needs the counters since the start; those of all records may not fit into memory.
            for old in reversed(records):
                if old["kind"] == kind:
                    old.pop("data", None)
                    break
        run.seconds += seconds(record)
        records.append(record)
    for record in records:
        run.records.setdefault(record["kind"], []).append(record)


def seconds(record: dict) -> float:
    """Seconds that this record spent in training steps."""
    return number(record.get("seconds")) or 0.0 if record["kind"] == "train" else 0.0


def read_text(path: Path) -> str:
    """The text of a file; empty if it does not exist or is too large."""
    try:
        readable = path.is_file() and path.stat().st_size <= MAX_TEXT_FILE
        return path.read_text(errors="replace") if readable else ""
    except OSError:
        return ""


def parse_object(text: str) -> dict:
    """A JSON object; empty for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def parse_config(text: str) -> dict:
    """A YAML mapping; empty for anything else. Aliases are refused: they can expand without bounds."""
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            return {}
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def name_runs(runs: list[Run]) -> None:
    """Set the labels: name and stage of a single run; for several, the parts of their paths that differ."""
    if len(runs) == 1:
        name, stage = (setting(runs[0], key) for key in ("name", "stage"))
        runs[0].label = f"{name}, {stage}" if name and stage else runs[0].folder.name
        return
    common = os.path.commonpath([run.folder.parent for run in runs])
    for run in runs:
        run.label = str(run.folder.relative_to(common))


def setting(run: Run, key: str):
    """The value of a dotted key of the configuration; None if there is none."""
    value = run.config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def number(value) -> float | None:
    """A finite number as a float; None for anything else."""
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:
        return None


def part_of(record: dict, key: str, part: str | None):
    """A figure, or its entry for a part (a component, a source); None if there is none."""
    value = record.get(key)
    if isinstance(value, dict):
        return number(value.get(part)) if part is not None else None
    return number(value) if part is None else None


def series(records: list[dict], key: str, part: str | None = None, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """(steps, values), float64, of the records that have this figure."""
    points = [(number(record.get(x)), part_of(record, key, part)) for record in records]
    points = [(at, value) for at, value in points if at is not None and value is not None]
    return tuple(np.array(points, dtype=np.float64).reshape(-1, 2).T)


def last(records: list[dict], key: str, part: str | None = None) -> float | None:
    return next(filter(lambda value: value is not None, (part_of(r, key, part) for r in reversed(records))), None)


def parts(runs: list[Run], kind: str, key: str) -> list[str | None]:
    """The parts that a figure comes in, in order of appearance; None: it is one number."""
    found = {}
    for record in (record for run in runs for record in run.of(kind)):
        value = record.get(key)
        found |= dict.fromkeys(value if isinstance(value, dict) else [None] if number(value) is not None else [])
    return list(found)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Moving mean over a fortieth of all points on each side; over fewer at the start, where losses fall steeply."""
    at, total = np.arange(len(values)), np.concatenate(([0.0], np.cumsum(values)))
    before = np.minimum(at, max(1, len(values) // 40))
    after = np.minimum(before, at[::-1])
    return (total[at + after + 1] - total[at - before]) / (before + after + 1)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points that keep the lowest and the highest of each group of neighbours."""
    if len(x) <= MAX_POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), MAX_POINTS // 2)
    keep = sorted({group[pick(y[group])] for group in groups for pick in (np.argmin, np.argmax)})
    return x[keep], y[keep]


# Plots


def colours(runs: list[Run]) -> list[str]:
    if len(runs) <= len(COLOURS):
        return COLOURS[: len(runs)]
    shades = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(runs)))
    return [matplotlib.colors.to_hex(shade) for shade in shades]


def sections(runs: list[Run]) -> list[tuple[str, list[Panel]]]:
    """(heading, panels) in the order of the page; figures that no run logged are left out."""
    result = [("Loss", loss_panels(runs, "loss", "weighted loss of a token"))]
    if len(runs) > 1:
        result[0][1].extend(loss_panels(runs, "loss", "the same over tokens", x="tokens_seen"))
    for heading, figures in SECTIONS:
        result.append(
            (
                heading,
                [
                    panel
                    for key, (title, lowest) in figures.items()
                    for panel in figure_panels(runs, "train", key, title, lowest)
                ],
            )
        )
    result[-1][1].extend(figure_panels(runs, "checkpoint", "seconds", "seconds for a checkpoint", 0))
    # Kinds of records that are not known here, such as the scores of answers.
    known = ("train", "validation", "checkpoint", "resume")
    for kind in dict.fromkeys(kind for run in runs for kind in run.records if kind not in known):
        keys = dict.fromkeys(
            key for run in runs for record in run.of(kind) for key in record if key not in ("kind", "step")
        )
        result.append((kind.capitalize(), [p for key in keys for p in figure_panels(runs, kind, key, key, 0)]))
    result.append(("Loss by source", loss_panels(runs, "loss_by_source")))
    counts = [f" (the first {MAX_PANELS} of {len(panels)})" if len(panels) > MAX_PANELS else "" for _, panels in result]
    return [(heading + count, panels[:MAX_PANELS]) for (heading, panels), count in zip(result, counts) if panels]


def figure_panels(runs: list[Run], kind: str, key: str, title: str, lowest: float | None) -> list[Panel]:
    """One panel of a run's figure with a line for each part; of several runs, a panel for each part."""
    style = "dots" if kind == "checkpoint" else "line"
    found = parts(runs, kind, key)

    def line(run: Run, part: str | None, colour: str, name: str = "") -> Line:
        return Line(*series(run.of(kind), key, part), colour, name, style)

    if len(runs) == 1:
        lines = [line(runs[0], part, colour, part or "") for part, colour in zip(found, itertools.cycle(COLOURS))]
        groups = [(title, lines)]
    else:
        groups = [
            (
                f"{title}: {part}" if part else title,
                [line(run, part, colour) for run, colour in zip(runs, colours(runs))],
            )
            for part in found
        ]
    panels = [Panel(title, [line for line in lines if len(line.x)], marks(runs), lowest) for title, lines in groups]
    return [panel for panel in panels if panel.lines]


def loss_panels(runs: list[Run], key: str, title: str = "", x: str = "step") -> list[Panel]:
    """A panel for each part of a loss: as logged, smoothed, and on held-out data."""
    panels = []
    for part in sorted(parts(runs, "train", key), key=str):
        lines = []
        for run, colour in zip(runs, colours(runs)):
            at, loss = series(run.of("train"), key, part, x)
            lines += [Line(at, loss, colour, "", "faint"), Line(at, smoothed(loss), colour)]
            if x == "step":
                held_out = series(run.of("validation"), key, part)
                lines.append(Line(*held_out, COLOURS[1] if len(runs) == 1 else colour, "", "dots"))
        lines = [line for line in lines if len(line.x)]
        resumes = marks(runs) if x == "step" else []
        panels += [Panel(title or part or key, lines, resumes, wide=bool(title))] if lines else []
    return panels


def marks(runs: list[Run]) -> list[tuple[int, str]]:
    found = colours(runs) if len(runs) > 1 else ["#888888"]
    return [(step, colour) for run, colour in zip(runs, found) for step in run.resumes]


def draw(panel: Panel) -> Markup:
    """The panel as an SVG element without any text but numbers. Its lines have the ids line0, line1, ..."""
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "xtick.color": "#666666",
        "ytick.color": "#666666",
    }
    with matplotlib.rc_context(settings):
        width, height = (11.4, 3.4) if panel.wide else (3.8, 2.2)
        figure = Figure(figsize=(width, height))
        # In inches, room for the longest number: what each panel needs would take longer to find out than to draw.
        figure.subplots_adjust(0.85 / width, 0.25 / height, 1 - 0.1 / width, 1 - 0.1 / height)
        axis = figure.add_subplot()
        for number, line in enumerate(panel.lines):
            x, y = thinned(line.x, line.y)
            style = {"line": {"lw": 1.4}, "faint": {"lw": 1, "alpha": 0.35}, "dots": {"ls": "", "marker": "o", "ms": 4}}
            options = style[line.style]
            if line.style == "line" and len(x) <= 12:
                options = options | {"marker": "o", "ms": 3}
            axis.plot(x, y, color=line.colour, gid=f"line{number}", **options)
        for step, colour in panel.resumes:
            axis.axvline(step, color=colour, lw=0.8, ls=(0, (3, 3)), gid="resume")
        x, y = (np.concatenate([getattr(line, name) for line in panel.lines]) for name in "xy")
        axis.set_xlim(0, 1.02 * x.max() or 1)
        axis.xaxis.set_major_locator(MaxNLocator(12 if panel.wide else 5, integer=True, steps=(1, 2, 5, 10)))
        if panel.lowest is None and y.min() > 0 and y.max() > LOGARITHMIC * y.min():
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if y.max() < 1e3 * y.min() else (1,)))
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            axis.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
            if panel.lowest is not None:
                lowest = min(panel.lowest, y.min())
                axis.set_ylim(lowest, y.max() + 0.08 * (y.max() - lowest) if y.max() > lowest else lowest + 1)
        for ticks, values in ((axis.xaxis, x), (axis.yaxis, y)):
            large = np.abs(values).max() >= 1e4
            ticks.set_major_formatter(EngFormatter(sep="") if large else FuncFormatter(lambda value, _: f"{value:.4g}"))
        axis.grid(alpha=0.25)
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = file.getvalue()
    return Markup(svg[svg.index("<svg") :])


# Tables and answers


def shown(value) -> str:
    value = number(value)
    return (
        "\u2013" if value is None else f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"
    )


def facts(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(name, a value for each run) for every fact that is known about at least one run."""
    rows = {}
    for at, run in enumerate(runs):
        for name, value in run_facts(run).items():
            if value is not None:
                rows.setdefault(name, ["\u2013"] * len(runs))[at] = str(value)
    return list(rows.items())


def run_facts(run: Run) -> dict[str, str | None]:
    train, validation = run.of("train"), run.of("validation")
    step, most = train[-1]["step"], setting(run, "train.max_steps")
    device = run.versions.get("device") or setting(run, "train.device")
    software = {name: run.versions.get(name) for name in ("molmo2-nemo", "commit", "torch", "megatron-core")}
    repeated = f", {duration(run.repeated_seconds)} of it repeated after a resume" if run.repeated_seconds else ""
    ended = "all steps are done" if step == most else "not yet, or it was killed"
    if run.ended:
        message = run.ended.get("message")
        ended = f"{run.ended.get('reason')} at step {run.ended.get('step')}{f': {message}' if message else ''}"
    rates = series(train, "tokens_per_second")[1]
    return {
        "stage": setting(run, "stage"),
        "model": setting(run, "model.name"),
        "layout": layout(run),
        "device": None if device == "auto" else device,
        "software": ", ".join(f"{name} {version}" for name, version in software.items() if version) or None,
        "steps": f"{step:,} of {most:,}" if type(most) is int else f"{step:,}",
        "loss": shown(last(train, "loss")),
        "held-out loss": shown(last(validation, "loss")) if validation else None,
        "tokens": shown(last(train, "tokens_seen")),
        "tokens per second, median": shown(round(float(np.median(rates)))) if len(rates) else None,
        "time in training steps (h:m:s)": duration(run.seconds) + repeated,
        "slow ranks": slow_ranks(train),
        "resumed": ", ".join(f"before step {step:,}" for step in run.resumes) or None,
        "skipped steps": shown(last(train, "skipped_steps")) if last(train, "skipped_steps") else None,
        "ended": ended[:MAX_TEXT],
        "unreadable lines of metrics.jsonl": run.unreadable or None,
    }


def slow_ranks(train: list[dict]) -> str | None:
    """Which ranks held up the others (training/slow_rank.py), and in how many of the logged intervals."""
    slow = [record["slow_rank"] for record in train if isinstance(record.get("slow_rank"), dict)]
    found = Counter(f"rank {one.get('rank')} on {one.get('place')}" for one in slow)
    return "; ".join(f"{name}, in {n} of {len(train)} intervals" for name, n in found.items())[:MAX_TEXT] or None


def layout(run: Run) -> str | None:
    """Sizes of the parallel groups; data parallelism where the number of ranks is known."""
    sizes = [setting(run, f"parallel.{name}_parallel_size") for name in ("tensor_model", "pipeline_model", "context")]
    if not all(type(size) is int and size > 0 for size in sizes):
        return None
    tp, pp, cp = sizes
    text = f"TP {tp}{' + SP' if setting(run, 'parallel.sequence_parallel') else ''}, PP {pp}, CP {cp}"
    ranks = run.versions.get("ranks")
    return f"{text}, DP {ranks // (tp * pp * cp)}" if type(ranks) is int else text


def config_differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(dotted key, a value for each run) for settings that differ between the runs."""
    settings = [
        {key: json.dumps(value, default=str, ensure_ascii=False) for key, value in dotted(run.config).items()}
        for run in runs
    ]
    keys = sorted({key for one in settings for key in one})
    rows = [(key, [one.get(key, "\u2013") for one in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def sources_table(run: Run) -> list[list[str]]:
    """Rows of source, samples, tokens, share of the loss weight, last loss, held-out loss, dropped, broken."""
    train, validation = run.of("train"), run.of("validation")
    data = train[-1].get("data")
    data = data if isinstance(data, dict) else {}
    shares = weight_shares(train)
    rows = []
    for source in sorted({*data, *parts([run], "train", "loss_by_source")} - {None}):
        counts = data.get(source)
        counts = counts if isinstance(counts, dict) else {}
        lost = {n: number(c) or 0 for n, c in counts.items() if n.startswith("dropped_") and n != "dropped_branches"}
        share = shares.get(source)
        rows.append(
            [
                source,
                shown(counts.get("examples")),
                shown(counts.get("tokens")),
                "\u2013" if share is None else f"{share:.1%}",
                shown(last(train, "loss_by_source", source)),
                shown(last(validation, "loss_by_source", source)),
                shown(sum(lost.values())),
                shown(sum(lost.get(name, 0) for name in BROKEN)),
            ]
        )
    return rows


def weight_shares(train: list[dict]) -> dict[str, float]:
    """Source -> its mean share of the loss weight. All steps count alike: a loss is divided by its step's weight."""
    totals, steps, before = {}, 0, 0
    for record in train:
        shares = record.get("weight_by_source")
        if isinstance(shares, dict):
            steps += record["step"] - before
            for source, share in shares.items():
                totals[source] = totals.get(source, 0.0) + (number(share) or 0) * (record["step"] - before)
        before = record["step"]
    return {source: total / steps for source, total in totals.items()} if steps else {}


class Pictures:
    """Reads pictures for the page until MAX_PICTURES bytes are used up."""

    def __init__(self):
        self.room, self.left_out = MAX_PICTURES, 0

    def read(self, path: Path, folder: Path) -> str | None:
        """A data URI; None for a file that is too large, not a PNG, or not below `folder`."""
        path = path.resolve()
        if path.is_relative_to(folder) and path.is_file() and path.stat().st_size <= min(MAX_PICTURE, self.room):
            content = path.read_bytes()
            if content.startswith(b"\x89PNG\r\n\x1a\n"):
                self.room -= len(content)
                return "data:image/png;base64," + base64.b64encode(content).decode()
        self.left_out += 1
        return None


def answers(run: Run, pictures: Pictures) -> list[tuple[int, list[dict]]]:
    """(step, answers) of the newest steps with samples/step_*/answers.json, newest first."""
    found = {}
    for path in run.folder.glob("samples/step_*/answers.json"):
        step = path.parent.name.removeprefix("step_")
        if step.isdecimal() and path.resolve().is_relative_to(run.folder):
            try:
                entries = json.loads(read_text(path))
            except (ValueError, RecursionError):  # such as a file that is being written
                continue
            entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
            found |= {int(step): (path.parent, entries[:MAX_ANSWERS])} if entries else {}
    newest = sorted(found.items(), reverse=True)[:MAX_STEPS]
    return [(step, [answer(entry, folder, run, pictures) for entry in entries]) for step, (folder, entries) in newest]


def answer(entry: dict, folder: Path, run: Run, pictures: Pictures) -> dict[str, str | None]:
    name, correct = entry.get("picture"), entry.get("correct")
    return {
        "picture": pictures.read(folder / name, run.folder) if isinstance(name, str) and name else None,
        "verdict": ("wrong", "right")[correct] if isinstance(correct, bool) else "",
        **{key: str(entry.get(key) or "")[:MAX_TEXT] for key in ("question", "answer", "label")},
    }
