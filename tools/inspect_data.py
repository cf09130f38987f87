"""Look at the training data as the model gets them: pages for a person, or statistics.

    python tools/inspect_data.py --config-name stage2 data=sample --samples 200 --html runs/inspect
    python tools/inspect_data.py --config-name stage1 data=sample --samples 20000 --stats
    python tools/inspect_data.py --config-name stage2 model=molmo2_4b data.blend=my_blend.yaml --samples 5000 --json
    python tools/inspect_data.py --batch RUN/errors/batch_step_00000012_dp000.pt

Takes the overrides of the recipes and reads through the training loader, as rank 0 of 1. --html writes DIR/index.html
and a page for each of --samples examples; --stats and --json count --samples samples, dropped ones included. --batch
shows what a run has saved of a step whose loss was not finite, with the settings of that run; without --html, the
pages are written beside the file.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from molmo2_nemo.command_line import compose, prepare, to_dataclass
from molmo2_nemo.config.checks import check_data, check_model
from molmo2_nemo.config.schema import Config
from molmo2_nemo.paths import CONF_DIR

TEMPLATES = Path(__file__).parent / "inspect_pages"
MAX_ERRORS = 20  # broken samples that --stats names


def with_tiny_model(overrides: list[str]) -> list[str]:
    """The sample world's tokenizer comes with this repository, that of the default model does not."""
    if "data=sample" not in overrides or any(override.startswith("model=") for override in overrides):
        return overrides
    print("data=sample without model=: inspecting with model=tiny", file=sys.stderr)
    return [*overrides, "model=tiny"]


def inspect(config: Config, wanted: int, html: Path | None):
    """Read the stream until `wanted` samples are counted, or have their page. Returns Statistics and seconds.

    ValueError: the blend or the tokenizer cannot be used.
    """
    # Imported here, since Megatron takes seconds: a mistake in the command line is answered before.
    from molmo2_nemo.data.blend import check_shards, load_blend
    from molmo2_nemo.data.encode import Encoder
    from molmo2_nemo.data.inspection import Statistics, examples_of, num_dropped, num_samples
    from molmo2_nemo.data.loader import train_loader

    data, vision = config.data, config.model.vision
    sources = load_blend(data)
    check_shards(sources, data.max_error_rate)
    encoder, statistics, pages = Encoder(data, vision), Statistics(sources, data.seq_length, data.max_crops), []
    with tempfile.TemporaryDirectory() as run_dir:
        loader = train_loader(data, vision, sources, 0, 1, None, 1, Path(run_dir))
        if loader.note:
            print(f"note: {loader.note}", file=sys.stderr)
        started, seen = time.monotonic(), 0
        while seen < wanted:
            batch = next(loader)
            statistics.add(batch)
            if html:
                for example in itertools.islice(examples_of(batch, sources, encoder), wanted - len(pages)):
                    counters = batch.counters[example.source]
                    pages.append(write_page(html, len(pages) + 1, example, statistics.rows, counters, encoder))
            total = statistics.total
            # Dropped samples count for pages, too: a blend whose samples are all dropped would never end otherwise.
            seen = max(len(pages), num_dropped(total)) if html else num_samples(total)
            if sys.stderr.isatty():
                print(f"\r{min(seen, wanted):,} of {wanted:,} samples", end="", file=sys.stderr)
        seconds = time.monotonic() - started
        loader.close()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if html:
        write_index(html, config, pages, statistics)
    return statistics, seconds


def config_of_run(batch: Path) -> Config:
    """The settings of the run that has saved a batch in its folder errors/. ValueError: they are not there."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = batch.absolute().parent.parent / "config.yaml"
    try:
        return to_dataclass(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} has no settings of a run ({error}): give --config-name and its overrides.") from error


def inspect_batch(config: Config, path: Path, html: Path | None):
    """The same for a batch that a run has saved (training/trouble.py). ValueError: it is no such file."""
    from types import SimpleNamespace

    from molmo2_nemo.data.encode import Encoder
    from molmo2_nemo.data.inspection import Statistics, examples_of, saved_rows

    started, encoder, pages = time.monotonic(), Encoder(config.data, config.model.vision), []
    names, rows = saved_rows(path, encoder.visual)
    sources = [SimpleNamespace(name=name, weight=0.0) for name in names]
    statistics = Statistics(sources, config.data.seq_length, config.data.max_crops)
    for row in rows:
        statistics.add(row)
        for example in examples_of(row, sources, encoder) if html else ():
            counters = row.counters.get(example.source, {})
            pages.append(write_page(html, len(pages) + 1, example, statistics.rows, counters, encoder))
    if html:
        write_index(html, config, pages, statistics)
    return statistics, time.monotonic() - started


def write_page(folder: Path, number: int, example, row: int, counters: dict[str, int], encoder) -> dict:
    """The page of one example with its pictures; what the index says of it."""
    from PIL import Image

    from molmo2_nemo.data.inspection import draw_mask
    from molmo2_nemo.data.marks import colour_of, draw_marks

    name = f"{number:05d}"
    pictures = folder / "samples" / name
    pictures.mkdir(parents=True, exist_ok=True)

    def save(image: Image.Image, file: str) -> str:
        image.save(pictures / file, compress_level=1)
        return f"{name}/{file}"

    crops = [
        [save(Image.fromarray(crop), f"picture{v}-crop{c}.png") for c, crop in enumerate(visual.crops)]
        for v, visual in enumerate(example.visuals)
    ]
    mask, mask_step = draw_mask(example)
    segments = []
    for s, segment in enumerate(example.segments):
        weights = example.loss_weights[segment.tokens]
        turns = []
        for t, (kind, turn) in enumerate(segment.turns):
            if kind == "prompt":
                turns.append({"kind": kind, "text": turn})
                continue
            marked = {mark.visual for mark in turn.marks}
            turns.append(
                {
                    "kind": kind,
                    "text": turn.text,
                    "marks": turn.marks,
                    "outside": turn.num_outside,
                    "gap": turn.largest_gap,
                    "objects": [(number, label, colour_of(o)) for o, (number, label) in enumerate(turn.objects)],
                    "pictures": (
                        [
                            (
                                (
                                    visual.seconds,
                                    save(draw_marks(visual.crops[0], turn, v), f"segment{s}-turn{t}-picture{v}.png"),
                                )
                                if v in marked
                                else (visual.seconds, crops[v][0])
                            )
                            for v, visual in enumerate(example.visuals)
                        ]
                        if marked
                        else []
                    ),
                }
            )
        segments.append(
            {
                "name": segment.name,
                "is_cut": segment.is_cut,
                "turns": turns,
                "chips": chips(example, segment, encoder),
                "tokens": len(weights),
                "targets": int(example.is_target[segment.tokens].sum()),
                "weight": float(weights.sum()),
                "segment_id": int(example.segment_ids[segment.tokens.start]),
            }
        )
    summary = {
        "number": number,
        "page": f"samples/{name}.html",
        "source": example.source,
        "key": example.key,
        "row": row,
        "start": example.start,
        "tokens": len(example.input_ids),
        "crops": example.num_crops,
        "targets": int(example.is_target.sum()),
        "weight": float(example.loss_weights.sum()),
        "thumbnail": f"samples/{crops[0][0]}" if crops else None,
    }
    page = template("sample.html").render(
        summary,
        segments=segments,
        counters=counters,
        mask=save(mask, "mask.png"),
        mask_step=mask_step,
        visuals=[(visual.seconds, files) for visual, files in zip(example.visuals, crops)],
    )
    (folder / summary["page"]).write_text(page, encoding="utf-8", errors="replace")
    return summary


def chips(example, segment, encoder) -> list[dict]:
    """The tokens of a segment in order: input, target, weight, position; visual ones in a row are one chip."""

    def text(ids) -> str:
        return encoder.tokenizer.decode(ids).replace("\n", "\u21b5").replace("\t", "\u21e5")

    largest = max(float(example.loss_weights.max()), 1e-9)
    result = []
    where = range(segment.tokens.start, segment.tokens.stop)
    for is_visual, group in itertools.groupby(where, key=lambda t: int(example.input_ids[t]) in encoder.visual_ids):
        group = list(group)
        if is_visual:
            kinds = Counter(int(example.input_ids[t]) for t in group)
            result.append(
                {
                    "visual": " + ".join(f"{count} \u00d7 {text([token])}" for token, count in kinds.items()),
                    "position": f"{example.position_ids[group[0]]}\u2013{example.position_ids[group[-1]]}",
                }
            )
            continue
        for t in group:
            chip = {"text": text([example.input_ids[t]]), "position": int(example.position_ids[t])}
            chip["id"] = int(example.input_ids[t])
            if example.is_target[t]:
                weight = float(example.loss_weights[t])
                chip |= {
                    "target": text([example.labels[t]]),
                    "target_id": int(example.labels[t]),
                    "weight": weight,
                    "strength": 0.15 + 0.6 * weight / largest,
                }
            result.append(chip)
    return result


def write_index(folder: Path, config: Config, pages: list[dict], statistics) -> None:
    heads, lines = statistics.table()
    folder.mkdir(parents=True, exist_ok=True)
    page = template("index.html").render(
        config=config,
        pages=pages,
        heads=heads,
        lines=lines,
        statistics=statistics,
        errors=statistics.errors,
    )
    (folder / "index.html").write_text(page, encoding="utf-8", errors="replace")


def template(name: str):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # What is in a data set may look like HTML.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def print_table(statistics, seconds: float, waiting: int) -> None:
    """waiting: samples of the loader's pools, which were drawn and are in no row yet."""
    from molmo2_nemo.data.counters import CHOSEN
    from molmo2_nemo.data.inspection import num_samples

    heads, lines = statistics.table()
    widths = [max(map(len, column)) for column in zip(heads, *lines)]
    for line in [heads, *lines]:
        first, *middle, last = (cell.rjust(width) for cell, width in zip(line, widths))
        print("  ".join([first.strip().ljust(widths[0]), *middle, last.strip()]).rstrip())
    counts = statistics.total
    print(
        f"{statistics.rows:,} rows, {statistics.fill:.1%} of the tokens and {statistics.crop_fill:.1%} of the crops"
        f" filled; {num_samples(counts) / seconds:,.0f} samples/s; left out because they did not fit:"
        f" {counts['dropped_branches']:,} branches, {counts['frames_thinned']:,} frames of {counts['videos_thinned']:,}"
        f" videos; {counts['images_shrunk']:,} images got fewer crops"
    )
    chosen = ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in CHOSEN if counts[name])
    if chosen:
        print(f"changed for what is shown: {chosen}")
    if num_samples(counts) < 10 * waiting:
        print(
            f"note: {waiting} more samples wait for a row that they fit, so that the shares of so few rows are not yet"
            " those of the blend"
        )
    for error in statistics.errors[:MAX_ERRORS]:
        print(f"broken sample: {error}")
    if len(statistics.errors) > MAX_ERRORS:
        print(f"and {len(statistics.errors) - MAX_ERRORS:,} more broken samples")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of the recipes")
    stages = sorted(path.stem for path in CONF_DIR.glob("stage*.yaml"))
    parser.add_argument("--config-name", choices=stages, help="the recipe's configuration")
    parser.add_argument("--samples", type=int, default=200, help="how many to look at (default 200)")
    parser.add_argument("--batch", type=Path, metavar="FILE", help="show a batch that a run has saved")
    parser.add_argument("--html", type=Path, metavar="DIR", help="write pages to this folder")
    parser.add_argument("--stats", action="store_true", help="print a table")
    parser.add_argument("--json", action="store_true", help="print the statistics as JSON, and nothing else")
    arguments = parser.parse_intermixed_args()
    if arguments.batch and not (arguments.html or arguments.stats or arguments.json):
        arguments.html = arguments.batch.with_suffix("")
    if arguments.config_name is None and not arguments.batch:
        parser.error("the following arguments are required: --config-name")
    if not (arguments.html or arguments.stats or arguments.json):
        parser.error("say what to make: --html DIR, --stats or --json")
    if arguments.samples < 1:
        parser.error(f"--samples {arguments.samples}: it must be at least 1")
    prepare(arguments.overrides)
    try:
        if arguments.config_name:
            config = compose(arguments.config_name, with_tiny_model(arguments.overrides))
        else:
            config = config_of_run(arguments.batch)
        check_model(config.model)
        check_data(config.data, config.model.vision, config.parallel)
        if arguments.batch:
            statistics, seconds = inspect_batch(config, arguments.batch, arguments.html)
        else:
            statistics, seconds = inspect(config, arguments.samples, arguments.html)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps(statistics.to_json(), indent=2))
    elif arguments.stats:
        print_table(statistics, seconds, config.data.packing_buffer_size * max(1, config.data.num_workers))
    if arguments.html:
        print(f"open {arguments.html / 'index.html'}", file=sys.stderr)


if __name__ == "__main__":
    main()
