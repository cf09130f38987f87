"""What a person wants to see of training batches: their examples one by one, pictures of them, and statistics.

Everything is read back from `Batch`, that is from what the model gets, and never from the samples on disk: a mistake
on the way from one to the other shows.
"""

import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from molmo2_nemo.data.blend import Source
from molmo2_nemo.data.counters import BROKEN, CHOSEN, DROPPED, SHORTENED
from molmo2_nemo.data.encode import ROOT_SEGMENT, Encoder
from molmo2_nemo.data.marks import Answer, Visual, read_answer
from molmo2_nemo.data.packing import Batch
from molmo2_nemo.data.processor import VisualInputs
from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE, dense_mask

# Tokens and pixels on a side of the picture of a mask; of more tokens every n-th is taken.
MASK_SIDE = 400
HIDDEN, SEEN, SEEN_LATER = (244, 244, 244), (49, 99, 168), (232, 138, 38)


@dataclass
class Segment:
    """The root of an example or one branch: what its tokens are, and the texts in it, (who, Answer or str)."""

    name: str
    tokens: slice
    turns: list[tuple[str, "Answer | str"]]
    is_cut: bool  # its end did not fit


@dataclass
class UsedSample:
    """A sample that a row has used up: it is one of its examples, or was dropped."""

    source: str
    index: int  # in the source's training split, or in the held-out one if the batch is of that
    key: str
    counts: dict[str, int]  # of counters.COUNTERS
    video_start: float  # seconds of its video at which what is shown begins
    error: str = ""  # what is wrong with a broken one

    @property
    def is_example(self) -> bool:
        return "examples" in self.counts

    @property
    def changes(self) -> list[str]:
        """What was left out of it or changed, or why it was dropped."""
        shortened = [f"{words}: {self.counts[name]:,}" for name, words in SHORTENED.items() if self.counts.get(name)]
        return shortened + [name.replace("_", ": ", 1).replace("_", " ") for name in DROPPED if self.counts.get(name)]


@dataclass
class ShownExample:
    """An example of a row. Arrays have an entry for each of its n tokens; see packing.Batch."""

    sample: UsedSample
    start: int  # its first token in the row
    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray  # from 0, as if it were the first of its row
    vision_mask: np.ndarray
    visuals: list[Visual]
    segments: list[Segment]

    @property
    def is_target(self) -> np.ndarray:
        return _is_target(self.labels, self.loss_weights)

    @property
    def num_crops(self) -> int:
        return sum(len(visual.crops) for visual in self.visuals)


def examples_of(batch: Batch, sources: list[Source], encoder: Encoder) -> Iterator[ShownExample]:
    """The examples of a batch of one row, in order."""
    (ids,) = batch.input_ids.numpy()
    numbers = batch.segment_ids[0].numpy() // SEGMENTS_PER_EXAMPLE  # padding: -1
    count = int(numbers.max(initial=-1)) + 1
    starts = np.searchsorted(np.where(numbers < 0, count, numbers), np.arange(count + 1))
    samples = [sample for sample in samples_of(batch, sources) if sample.is_example]
    assert len(samples) == count, f"{len(samples)} samples are {count} examples"
    units, first_crop = iter(batch.vision_units.tolist()), 0
    for number, sample in enumerate(samples):
        part = slice(starts[number], starts[number + 1])
        visuals, windows = [], 0
        while windows < (ids[part] == encoder.visual.patch_id).sum():
            num_crops, num_windows = next(units)
            crops = batch.crops[first_crop : first_crop + num_crops].numpy()
            visuals.append(Visual([pixels_of(crop, encoder.visual.patch_size) for crop in crops]))
            first_crop, windows = first_crop + num_crops, windows + num_windows
        for visual, seconds in zip(visuals, _frame_times(ids[part], encoder)):
            visual.seconds = seconds
        example = ShownExample(
            sample,
            int(part.start),
            ids[part],
            **{
                array: getattr(batch, array)[0, part].numpy()
                for array in ("labels", "loss_weights", "position_ids", "vision_mask")
            },
            segment_ids=batch.segment_ids[0, part].numpy() - SEGMENTS_PER_EXAMPLE * number,
            visuals=visuals,
            segments=[],
        )
        example.segments = list(_segments(example, encoder))
        yield example


def saved_rows(path: Path, visual: VisualInputs) -> tuple[list[str], Iterator[Batch]]:
    """The names of the sources, and the rows, each as a batch of its own, of a file of training/trouble.save_batches.

    ValueError, one sentence: it is no such file.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        names, batches = [str(name) for name in saved["sources"]], list(saved["micro_batches"])
        for batch in batches:
            batch["outcomes"]  # which files of earlier versions lack
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{path} is no batch that a run has saved ({type(error).__name__}: {reason}).") from error
    return names, (row for batch in batches for row in _rows(batch, visual))


def _rows(batch: dict, visual: VisualInputs) -> Iterator[Batch]:
    """The rows of a micro-batch as training/batches.py hands it on."""
    per_row = ("input_ids", "labels", "loss_weights", "position_ids", "segment_ids", "vision_mask", "source_ids")
    unit, crop, window, example = 0, 0, 0, 0
    for number in range(len(batch["input_ids"])):
        wanted = int((batch["input_ids"][number] == visual.patch_id).sum())
        units, crops, windows = unit, 0, 0
        while windows < wanted:
            crops += int(batch["vision_units"][units, 0])
            windows += int(batch["vision_units"][units, 1])
            units += 1
        pooling = batch["pooling"][window : window + windows]
        samples = len(batch["keys"][number].split(","))
        yield Batch(
            __key__=(batch["keys"][number],),
            __restore_key__=(),
            **{name: batch[name][number : number + 1] for name in per_row},
            crops=batch["crops"][crop : crop + crops],
            pooling=torch.where(pooling >= 0, pooling - crop * visual.patches_per_crop, pooling),
            vision_units=batch["vision_units"][unit:units],
            examples=batch["examples"][example : example + samples],
            counters=batch["counters"] if number == 0 else {},
            errors=batch["errors"] if number == 0 else [],
            outcomes=batch["outcomes"][example : example + samples],
        )
        unit, crop, window, example = units, crop + crops, window + windows, example + samples


def samples_of(batch: Batch, sources: list[Source]) -> list[UsedSample]:
    """The samples that a batch of one row has used up, in order; those that are examples are in the order of these."""
    keys = batch.__key__[0].split(",")
    if len(keys) != len(batch.examples):  # a key holds a comma
        keys = [f"number {index}" for index in batch.examples[:, 1].tolist()]
    samples, errors = [], list(batch.errors)
    for key, (source, index), (counts, start) in zip(keys, batch.examples.tolist(), batch.outcomes):
        sample = UsedSample(sources[source].name, index, key, counts, start)
        if any(counts.get(name) for name in BROKEN) and errors:  # errors are in the order of the samples
            sample.error = errors.pop(0).removeprefix(f"{sample.source}: {key}: ")
        samples.append(sample)
    return samples


def pixels_of(crop: np.ndarray, patch_size: int) -> np.ndarray:
    """A crop of patches, uint8 [P, patch_dim], as a picture, uint8 [H, W, 3]."""
    side = round(len(crop) ** 0.5)
    patches = crop.reshape(side, side, patch_size, patch_size, 3)
    return patches.transpose(0, 2, 1, 3, 4).reshape(side * patch_size, side * patch_size, 3)


def _frame_times(ids: np.ndarray, encoder: Encoder) -> list[float]:
    """Seconds of a video's frames, from the text before each of them; none if the example has no video."""
    frame_start, frame_end = encoder.tokenizer.convert_tokens_to_ids(["<frame_start>", "<frame_end>"])
    before = [0, *np.flatnonzero(ids == frame_end)]  # the first frame stands after the BOS
    starts = np.flatnonzero(ids == frame_start)
    return [float(encoder.tokenizer.decode(ids[end + 1 : start])) for end, start in zip(before, starts)]


def _is_target(labels: np.ndarray, loss_weights: np.ndarray) -> np.ndarray:
    return (loss_weights > 0) | (labels != 0)


def _segments(example: ShownExample, encoder: Encoder) -> Iterator[Segment]:
    """The root and the branches of a tree; an example without a tree is one segment."""
    edges = np.flatnonzero(np.diff(example.segment_ids)) + 1
    for start, end in zip([0, *edges], [*edges, len(example.segment_ids)]):
        number = int(example.segment_ids[start])
        is_tree = len(edges) > 0
        name = "root" if number == ROOT_SEGMENT else f"branch {number}" if is_tree else "conversation"
        tokens = slice(int(start), int(end))
        turns = list(_turns(example, tokens, encoder))
        is_cut = number != ROOT_SEGMENT and example.labels[end - 1] != encoder.eos_id
        yield Segment(name, tokens, turns, bool(is_cut))


def _turns(example: ShownExample, tokens: slice, encoder: Encoder) -> Iterator[tuple[str, Answer | str]]:
    """Prompts and answers. A prompt is the inputs up to the one whose label begins an answer."""
    ids, labels, is_target = example.input_ids[tokens], example.labels[tokens], example.is_target[tokens]
    edges = [0, *(np.flatnonzero(np.diff(is_target)) + 1), len(ids)]
    for start, end in zip(edges, edges[1:]):
        if is_target[start]:
            text = encoder.tokenizer.decode(labels[start:end][labels[start:end] != encoder.eos_id])
            yield "answer", read_answer(text, example.visuals)
        else:
            # The first target's input ends the prompt; an answer's EOS, if it is an input, begins the next one.
            prompt = ids[start : min(end + 1, len(ids))]
            prompt = prompt[~np.isin(prompt, [*encoder.visual_ids, encoder.eos_id])]
            text = encoder.tokenizer.decode(prompt)
            if text.strip():
                yield "prompt", text


def draw_mask(example: ShownExample) -> tuple[Image.Image, int]:
    """Which token (rows) sees which (columns), and n, if only every n-th token is shown."""
    step = -(-len(example.input_ids) // MASK_SIDE)
    # The rule knows tokens by their order and segments alone: what is left out changes nothing for the rest.
    segments = torch.from_numpy(example.segment_ids[None, ::step].copy())
    vision = torch.from_numpy(example.vision_mask[None, ::step].copy())
    sees = dense_mask(segments, vision)[0, 0].numpy()
    pixels = np.full((*sees.shape, 3), HIDDEN, dtype=np.uint8)
    pixels[sees] = SEEN
    pixels[np.triu(sees, 1)] = SEEN_LATER
    return Image.fromarray(pixels), step


class Statistics:
    """What batches of one row say of their samples, by source."""

    def __init__(self, sources: list[Source], seq_length: int, max_crops: int):
        self.sources, self.seq_length, self.max_crops = sources, seq_length, max_crops
        self.counters = {source.name: Counter() for source in sources}
        self.errors, self.rows = [], 0

    def add(self, batch: Batch) -> None:
        for source, counts in batch.counters.items():
            self.counters[source] += Counter(counts)
        self.errors += batch.errors
        self.rows += len(batch.input_ids)

    @property
    def total(self) -> Counter:
        return sum(self.counters.values(), Counter())

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold tokens."""
        return self.total["tokens"] / max(1, self.rows * self.seq_length)

    @property
    def crop_fill(self) -> float:
        """Share of the rows' crop budget that is used: near 1, the crops keep rows from being filled with tokens."""
        return self.total["crops"] / max(1, self.rows * self.max_crops)

    def to_json(self) -> dict:
        """`dropped`, `truncated` and `errors` count samples, branches and broken samples; a broken one is dropped."""
        total = self.total
        samples = num_samples(total)
        return {
            "sources": {
                source.name: {
                    "asked": source.weight,
                    "got": num_samples(self.counters[source.name]) / max(1, samples),
                    "samples": num_samples(self.counters[source.name]),
                }
                for source in self.sources
            },
            "fill": self.fill,
            "crop_fill": self.crop_fill,
            "dropped": num_dropped(total),
            "truncated": total["truncated"],
            "errors": num_broken(total),
            "samples": samples,
            "rows": self.rows,
            "dropped_branches": total["dropped_branches"],
            "frames_thinned": total["frames_thinned"],
            "videos_thinned": total["videos_thinned"],
            "images_shrunk": total["images_shrunk"],
            **{name: total[name] for name in CHOSEN},
        }

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heads of the columns and a line for each source, the last one for all of them; means are per example."""
        heads = [
            "source",
            "asked",
            "got",
            "samples",
            "tokens",
            "loss tokens",
            "crops",
            "images",
            "frames",
            "thinned",
            "truncated",
            "dropped",
            "errors",
            "dropped because",
        ]
        total = self.total
        asked = {source.name: source.weight for source in self.sources}
        lines = []
        for name, counts in [*self.counters.items(), ("all", total)]:
            examples = max(1, counts["examples"])
            lines.append(
                [
                    name,
                    f"{asked.get(name, 1):.2%}",
                    f"{num_samples(counts) / max(1, num_samples(total)):.2%}",
                    f"{num_samples(counts):,}",
                    *(f"{counts[key] / examples:.1f}" for key in ("tokens", "loss_tokens", "crops")),
                    *(f"{counts[key]:,}" for key in ("images", "frames", "frames_thinned", "truncated")),
                    f"{num_dropped(counts):,}",
                    f"{num_broken(counts):,}",
                    _reasons(counts),
                ]
            )
        return heads, lines


def num_samples(counts: Counter) -> int:
    """Every sample ends up as an example or is dropped."""
    return counts["examples"] + num_dropped(counts)


def num_dropped(counts: Counter) -> int:
    return sum(counts[name] for name in DROPPED)


def num_broken(counts: Counter) -> int:
    return sum(counts[name] for name in BROKEN)


def _reasons(counts: Counter) -> str:
    """Why samples were dropped, with their numbers, in alphabetical order."""
    found = {name.removeprefix("dropped_").replace("_", " "): counts[name] for name in DROPPED if counts[name]}
    return ", ".join(f"{reason} {number:,}" for reason, number in sorted(found.items()))
