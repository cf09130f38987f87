"""Look at the training data as the model gets them: pages for a person, or statistics.

    python tools/inspect_data.py --config-name stage2 data=sample --samples 200 --html runs/inspect
    python tools/inspect_data.py --config-name stage2 data=sample data.blend=my_data/blend.yaml --each --html runs/mine
    python tools/inspect_data.py --config-name stage1 data=sample --samples 20000 --stats
    python tools/inspect_data.py --config-name stage2 model=molmo2_4b data.blend=my_blend.yaml --samples 5000 --json
    python tools/inspect_data.py --batch RUN/errors/batch_step_00000012_dp000.pt

Takes the overrides of the recipes and reads through the training loader, as rank 0 of 1. --html writes DIR/index.html
and a page for each of --samples examples: pictures and videos with the points and tracks of answers, tokens, weights,
the mask. They need no network and no server. --stats and --json count --samples samples, dropped ones included.
Samples come as training draws them: at random, some of them several times and others not at all. With --each every
stored sample comes once, in the order of the shards, held-out ones too: all of them, or the first --samples.
--batch shows what a run has saved of a step whose loss was not finite, with the settings of that run; without --html,
the pages are written beside the file.
"""

import argparse
import itertools
import json
import shutil
import statistics as statistics_of
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from molmo2_nemo.command_line import compose, prepare, to_dataclass
from molmo2_nemo.config.checks import check_data, check_model
from molmo2_nemo.config.schema import Config
from molmo2_nemo.option_types import local_path
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.templates import template

TEMPLATES = Path(__file__).parent / "inspect_pages"
MAX_ERRORS = 20  # broken samples that --stats names
MAX_TEXT = 400  # characters of questions and answers in the list of samples
MAX_STORED = 200_000  # characters of a sample's JSON on its page
SAMPLES = 200  # that are drawn unless --samples says otherwise
# What the head of the list says of how its samples were chosen.
DRAWN = (
    "Drawn at random as training draws them, so that some may come several times and others not at all; with --each,"
    " every stored sample comes once."
)
EACH = "Each stored sample once, source by source in the order of the shards, those held out for validation last."
SAVED = "The samples of a batch that a run has saved."


def with_tiny_model(overrides: list[str]) -> list[str]:
    """The sample world's tokenizer comes with this repository, that of the default model does not."""
    if "data=sample" not in overrides or any(override.startswith("model=") for override in overrides):
        return overrides
    print("data=sample without model=: inspecting with model=tiny", file=sys.stderr)
    return [*overrides, "model=tiny"]


def opened(config: Config, html: Path | None, chosen: str):
    """(sources, encoder, statistics, pages or None) of a blend. ValueError: it or the tokenizer cannot be used."""
    # Imported here, since Megatron takes seconds: a mistake in the command line is answered before.
    from molmo2_nemo.data.blend import check_shards, load_blend
    from molmo2_nemo.data.encode import Encoder
    from molmo2_nemo.data.inspection import Statistics

    data = config.data
    sources = load_blend(data)
    check_shards(sources, data.max_error_rate)
    encoder = Encoder(data, config.model.vision)
    if note := encoder.frames_note():
        print(f"note: {note}", file=sys.stderr)
    pages = Pages(html, config, sources, sources, encoder, chosen) if html else None
    return sources, encoder, Statistics(sources, data.seq_length, data.max_crops), pages


def inspect(config: Config, wanted: int, html: Path | None):
    """Read the stream until `wanted` samples are counted, or have their page. Returns Statistics and seconds.

    ValueError: as of `opened`.
    """
    from molmo2_nemo.data.inspection import num_dropped, num_samples
    from molmo2_nemo.data.loader import train_loader

    sources, _, statistics, pages = opened(config, html, DRAWN)
    loader = train_loader(config.data, config.model.vision, sources, 0, 1, None, 1)
    started, seen = time.monotonic(), 0
    while seen < wanted:
        batch = next(loader)
        statistics.add(batch)
        if pages:
            pages.add(batch, statistics.rows, wanted)
        total = statistics.total
        # Dropped samples count for pages, too: a blend whose samples are all dropped would never end otherwise.
        seen = max(pages.number, num_dropped(total)) if pages else num_samples(total)
        show_progress(seen, wanted)
    seconds = time.monotonic() - started
    loader.close()
    if pages:
        pages.write_index(statistics)
    return statistics, seconds


def show_samples(name: str, samples: list[dict[str, bytes]], html: Path, stage: int) -> None:
    """Write pages of samples that are in no shards yet, as a stage shows them to the tiny model.

    name: of their source. samples: parts of each, as prepare/draft_to_sample.pack makes them.
    """
    from molmo2_nemo.prepare.webdataset import write_shards

    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / name
        folder.mkdir()
        write_shards(folder, {"train": ((f"{number:05d}", parts) for number, parts in enumerate(samples))})
        (Path(root) / "blend.yaml").write_text(
            f"weighting: fixed\nsources: {{'{name}': {{path: '{name}', weight: 1}}}}\n"
        )
        prepare([])
        # Few frames of a video: the pages are to be looked at.
        given = ["model=tiny", f"data.root={root}", f"data.blend={root}/blend.yaml", "data.max_frames=16"]
        inspect_each(compose(f"stage{stage}", given), None, html)


def inspect_each(config: Config, most: int | None, html: Path | None):
    """The same of every stored sample once, or of the first `most`."""
    from molmo2_nemo.data.stored import each_sample

    sources, encoder, statistics, pages = opened(config, html, EACH)
    wanted = sum(source.num_samples + source.num_validation_samples for source in sources)
    wanted = wanted if most is None else min(most, wanted)
    started = time.monotonic()
    found = itertools.islice(each_sample(config.data, encoder, sources), wanted)
    for number, (part, batch) in enumerate(found, start=1):
        statistics.add(batch)
        if pages:
            pages.add(batch, statistics.rows, sys.maxsize, part)
        show_progress(number, wanted)
    if pages:
        pages.write_index(statistics)
    return statistics, time.monotonic() - started


def show_progress(seen: int, wanted: int) -> None:
    """On a terminal alone, and always in the same line."""
    if sys.stderr.isatty():
        end = "\n" if seen >= wanted else ""
        print(f"\r{min(seen, wanted):,} of {wanted:,} samples", end=end, file=sys.stderr, flush=True)


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

    from molmo2_nemo.config.errors import ConfigError
    from molmo2_nemo.data.blend import load_blend
    from molmo2_nemo.data.encode import Encoder
    from molmo2_nemo.data.inspection import Statistics, saved_rows

    started, encoder = time.monotonic(), Encoder(config.data, config.model.vision)
    names, rows = saved_rows(path, encoder.visual)
    sources = [SimpleNamespace(name=name, weight=0.0) for name in names]
    statistics = Statistics(sources, config.data.seq_length, config.data.max_crops)
    try:
        on_disk = load_blend(config.data)
    except ConfigError as error:
        print(f"note: the pages show the batch alone, since its shards are not at hand: {error}", file=sys.stderr)
        on_disk = []
    pages = Pages(html, config, sources, on_disk, encoder, SAVED) if html else None
    for row in rows:
        statistics.add(row)
        if pages:
            pages.add(row, statistics.rows, sys.maxsize)
    if pages:
        pages.write_index(statistics)
    return statistics, time.monotonic() - started


class Pages:
    """Writes a page for each example of batches, and the list of all samples.

    folder: where to; sources: what the batches' indices of sources mean; on_disk: those whose shards can be read.
    chosen: DRAWN, EACH or SAVED. What a page says of the model's input is from the batch; the shards have the pictures
    at their own proportions.
    """

    def __init__(self, folder: Path, config: Config, sources: list, on_disk: list, encoder, chosen: str):
        from molmo2_nemo.data.stored import StoredSamples

        self.folder, self.config, self.sources, self.encoder = folder, config, sources, encoder
        self.chosen = chosen
        self.stored = StoredSamples(on_disk)
        self.samples: list[dict] = []  # of the list: examples, and dropped ones
        self.number = 0  # of pages

    def add(self, batch, row: int, wanted: int, part: str = "train") -> None:
        """The examples of a batch of one row, as long as there are fewer than `wanted` pages, and what was dropped.

        part: the split part of all of them.
        """
        from molmo2_nemo.data.inspection import examples_of, samples_of

        for example in itertools.islice(examples_of(batch, self.sources, self.encoder), wanted - self.number):
            self.number += 1
            self.samples.append(self.write_page(example, row, part))
        num_dropped = sum(sample["state"] == "dropped" for sample in self.samples)
        dropped = (sample for sample in samples_of(batch, self.sources) if not sample.is_example)
        for sample in itertools.islice(dropped, wanted - num_dropped):
            stored = self.stored.read(sample.source, sample.index, sample.key, part)
            number = sys.maxsize
            if self.chosen == EACH:  # it keeps its place in the list
                number = self.number = self.number + 1
            self.samples.append(
                entry(sample, stored, row, part)
                | {"number": number, "state": "dropped", "question": sample.error, "tokens": 0, "crops": 0}
            )

    def write_page(self, example, row: int, part: str) -> dict:
        """The page of one example with its pictures; what the list says of it."""
        from molmo2_nemo.data.inspection import draw_mask
        from molmo2_nemo.data.page_media import Media

        sample = example.sample
        media = Media(self.folder / "samples" / f"{self.number:05d}")
        stored = self.stored.read(sample.source, sample.index, sample.key, part)
        visuals = [media.visual(visual, number) for number, visual in enumerate(example.visuals)]
        film = media.own_proportions(visuals, stored, sample.video_start)
        mask, mask_step = draw_mask(example)
        segments = [self.segment(example, number, visuals, film) for number in range(len(example.segments))]
        answers = [turn for segment in segments for turn in segment["turns"] if turn["kind"] == "answer"]
        origin = stored.example.origin if stored.example else None
        about = entry(sample, stored, row, part) | {
            "number": self.number,
            "page": f"samples/{self.number:05d}.html",
            "state": "shortened" if sample.changes else "whole",
            "tokens": len(example.input_ids),
            "crops": example.num_crops,
            "targets": int(example.is_target.sum()),
            "weight": float(example.loss_weights.sum()),
            "points": sum(len(answer["marks"]) for answer in answers),
            "question": question_of(segments)[:MAX_TEXT],
            "answer": next((answer["text"] for answer in answers), "")[:MAX_TEXT],
            "thumbnail": media.thumbnail(visuals),
        }
        page = template(TEMPLATES / "sample.html").render(
            about,
            root="../",
            start=example.start,
            segments=segments,
            counters=sample.counts,
            mask=media.save(mask, "mask.png"),
            mask_step=mask_step,
            visuals=visuals,
            film=film,
            film_problem=media.film_problem,
            any_marks=about["points"] > 0,
            origin=origin,
            unit=origin.unit if origin and origin.unit else "fraction",
            sizes_known=stored.example is not None,
            shard=f"{stored.shard}, sample {stored.number}, key {sample.key}" if stored.parts else "",
            stored=stored.json[:MAX_STORED],
        )
        (self.folder / about["page"]).write_text(page, encoding="utf-8", errors="replace")
        return about

    def segment(self, example, number: int, visuals: list[dict], film: dict | None) -> dict:
        """What a page says of the root or of a branch."""
        segment = example.segments[number]
        weights = example.loss_weights[segment.tokens]
        turns = [
            {"kind": kind, "text": turn}
            if kind == "prompt"
            else {"kind": kind, **answer(turn, f"{number}-{t}", visuals, film)}
            for t, (kind, turn) in enumerate(segment.turns)
        ]
        return {
            "name": segment.name,
            "is_cut": segment.is_cut,
            "turns": turns,
            "chips": chips(example, segment, self.encoder),
            "tokens": len(weights),
            "targets": int(example.is_target[segment.tokens].sum()),
            "weight": float(weights.sum()),
            "segment_id": int(example.segment_ids[segment.tokens.start]),
        }

    def write_index(self, statistics) -> None:
        """The list of all samples, and what the pages share."""
        heads, lines = statistics.table()
        self.folder.mkdir(parents=True, exist_ok=True)
        pages = sorted(self.samples, key=lambda sample: sample["number"])
        page = template(TEMPLATES / "index.html").render(
            root="",
            config=self.config,
            chosen=self.chosen,
            is_packed=self.chosen != EACH,
            pages=pages,
            heads=heads,
            lines=lines,
            statistics=statistics,
            errors=statistics.errors,
        )
        (self.folder / "index.html").write_text(page, encoding="utf-8", errors="replace")
        # A script, since pages that are opened as files may not read other files. All of it is ASCII.
        (self.folder / "samples.js").write_text(f"const SAMPLES = {json.dumps(pages, indent=0)};\n")
        for name in ("pages.css", "pages.js"):
            shutil.copyfile(TEMPLATES / name, self.folder / name)


def entry(sample, stored, row: int, part: str) -> dict:
    """What the list says of any sample."""
    origin = stored.example.origin if stored.example else None
    if origin:
        where = ", ".join([f"{origin.file}, {origin.place}", *origin.media[:1]])
    else:
        where = f"{stored.shard}, sample {stored.number}" if stored.shard else ""
    if part == "val":
        where += ", held out for validation"
    return {
        "page": None,
        "source": sample.source,
        "key": sample.key,
        "row": row,
        "where": where,
        "tasks": stored.tasks,
        "changes": sample.changes,
        "targets": 0,
        "weight": 0.0,
        "points": 0,
        "answer": "",
        "thumbnail": None,
    }


def question_of(segments: list[dict]) -> str:
    """The first question, without what the chat format puts around it."""
    prompts = [turn["text"] for segment in segments for turn in segment["turns"] if turn["kind"] == "prompt"]
    asked = (prompt.partition("<|im_start|>user\n")[2] for prompt in prompts)
    return next((question.partition("<|im_")[0].strip() for question in asked if question), "")


def answer(turn, name: str, visuals: list[dict], film: dict | None) -> dict:
    """What a page says of an answer. name: of its points, on the page."""
    from molmo2_nemo.data.marks import colour_of, marks_at, paths_of

    objects = [
        {"number": number, "label": label, "colour": "#%02x%02x%02x" % colour_of(index)}
        for index, (number, label) in enumerate(turn.objects)
    ]
    marks = []
    for index, mark in enumerate(turn.marks):
        visual = visuals[mark.visual]
        where = visual["name"] if visual["seconds"] is None else f"{visual['seconds']:.1f} s"
        shown = {"id": f"{name}-{index}", "x": round(mark.x, 4), "y": round(mark.y, 4), "object": mark.object}
        about = {"where": where, "visual": mark.visual}
        marks.append(shown | about | {key: visual[key] for key in ("seconds", "width", "height")})
    groups = [(visual, [mark for mark in marks if mark["visual"] == number]) for number, visual in enumerate(visuals)]
    film_marks = None
    if film and marks:
        times = [visual["seconds"] for visual in visuals]
        step = statistics_of.median(b - a for a, b in itertools.pairwise(times)) if len(times) > 1 else 0.0
        paths = paths_of(turn.text)
        frames = [
            [(mark.object, round(mark.x, 4), round(mark.y, 4)) for mark in marks_at(paths, time, step)]
            for time in film["times"]
        ]
        film_marks = {"objects": objects, "frames": frames}
    return {
        "text": turn.text,
        "marks": marks,
        "outside": turn.num_outside,
        "gap": turn.largest_gap,
        "objects": objects,
        "film": film_marks,
        # All pictures of an example, so that it is seen which have none; of a video's frames those with points.
        "pictures": [(visual, found) for visual, found in groups if found or visual["seconds"] is None],
    }


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


def print_table(statistics, seconds: float, waiting: int | None) -> None:
    """waiting: samples of the loader's pools, which were drawn and are in no row yet; None: each has its own row."""
    from molmo2_nemo.data.counters import CHOSEN
    from molmo2_nemo.data.inspection import num_samples

    heads, lines = statistics.table()
    widths = [max(map(len, column)) for column in zip(heads, *lines)]
    for line in [heads, *lines]:
        first, *middle, last = (cell.rjust(width) for cell, width in zip(line, widths))
        print("  ".join([first.strip().ljust(widths[0]), *middle, last.strip()]).rstrip())
    counts = statistics.total
    rows = f"{statistics.rows:,} rows, {statistics.fill:.1%} of the tokens and {statistics.crop_fill:.1%} of the crops"
    print(
        f"{'each stored sample once' if waiting is None else rows + ' filled'};"
        f" {num_samples(counts) / seconds:,.0f} samples/s; left out because they did not fit:"
        f" {counts['dropped_branches']:,} branches, {counts['frames_thinned']:,} frames of {counts['videos_thinned']:,}"
        f" videos; {counts['images_shrunk']:,} images got fewer crops"
    )
    chosen = ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in CHOSEN if counts[name])
    if chosen:
        print(f"changed for what is shown: {chosen}")
    if waiting is not None and num_samples(counts) < 10 * waiting:
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
    parser.add_argument("--samples", type=int, help=f"how many to look at (default: {SAMPLES}; with --each, all)")
    parser.add_argument("--each", action="store_true", help="every stored sample once, in the order of the shards")
    parser.add_argument("--batch", type=local_path, metavar="FILE", help="show a batch that a run has saved")
    parser.add_argument("--html", type=local_path, metavar="DIR", help="write pages to this folder")
    parser.add_argument("--stats", action="store_true", help="print a table")
    parser.add_argument("--json", action="store_true", help="print the statistics as JSON, and nothing else")
    arguments = parser.parse_intermixed_args()
    if arguments.batch and not (arguments.html or arguments.stats or arguments.json):
        arguments.html = arguments.batch.with_suffix("")
    if arguments.config_name is None and not arguments.batch:
        parser.error("the following arguments are required: --config-name")
    if not (arguments.html or arguments.stats or arguments.json):
        parser.error("say what to make: --html DIR, --stats or --json")
    if arguments.each and arguments.batch:
        parser.error("--each is for the shards of a blend: leave it out with --batch")
    if arguments.samples is not None and arguments.samples < 1:
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
        elif arguments.each:
            statistics, seconds = inspect_each(config, arguments.samples, arguments.html)
        else:
            statistics, seconds = inspect(config, arguments.samples or SAMPLES, arguments.html)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps(statistics.to_json(), indent=2))
    elif arguments.stats:
        waiting = config.data.packing_buffer_size * max(1, config.data.num_workers)
        print_table(statistics, seconds, None if arguments.each else waiting)
    if arguments.html:
        print(f"open {arguments.html / 'index.html'}", file=sys.stderr)


if __name__ == "__main__":
    main()
