"""How full packed rows are, how long examples wait and what choosing costs, against other ways to pack, in one run.

    python tools/bench/packing.py                        # three made-up streams like those of stages 1, 2 and 3
    python tools/bench/packing.py --lengths mine.jsonl --seq-length 16384 --max-crops 128
    # mine.jsonl: {"tokens": n, "crops": m} a line

ours         molmo2_nemo.data.packing
reference    the knapsack of allenai/molmo2 as it is described: a buffer of 48, solved exactly in units of 1/512 of the
             row, an example is worth its tokens + 30 a crop (1 in stage 1), the newcomer is no candidate; oldest or not
first fit    the oldest example, then every next one that still fits
none         one example a row

"fill" is of the rows made while the stream went on, "all" of these and the rows that emptied the buffer after its end:
whoever puts off what is hard to place fills the first better. "delay" is how many rows were made while an example
waited. "blocks" is the share of attention's blocks of 128 x 128 pairs that hold one which the mask lets through: the
others are skipped. Vision tokens, which see each other both ways, are taken to be all but the last 240 of an example
with pictures; without a mask it is 100 %, with a causal one 50 %. "bound" is the fill that no packer can pass on that
stream: crops may run out before tokens do. The streams: shares of the modalities as the square roots of the
catalogue's sizes have them (about 32 % image QA, 9 % image pointing, 10 % captions, 4 % text, the rest video), a fifth
of the images several together, tokens of images from the released tiling, videos of exp(N(3.2, 1)) seconds at 2 frames
a second, texts of exp(N(5, 0.9)) tokens. These
lengths are assumptions; --lengths takes yours. A video gets the frames that fit into the row, as in training.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tables import parser, print_json

from molmo2_nemo.data.packing import MOST_ROWS, enough_wait, select

MASK_BLOCK = 128  # torch.nn.attention.flex_attention.create_block_mask
TEXT_TOKENS = 240  # of an example with pictures: the mean of those below
FRAME_TOKENS = 90  # 83 and a time stamp
# Tokens and crops of an image by its tiling (rows x columns), arithmetic of transformers' Molmo2 processor.
TILINGS = ((1, 1), (1, 2), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (1, 8), (8, 1))
STREAMS = {"stage 1": (4096, 64, 128), "stage 2": (16384, 128, 128), "stage 3": (36864, 384, 384)}


def image_size(rows: int, columns: int) -> tuple[int, int]:
    """(tokens, crops) of an image at the released geometry: 19 new patches a tile, 8 of margins, pooled 2 x 2."""
    high, wide = -(-(19 * rows + 8) // 2), -(-(19 * columns + 8) // 2)
    return 198 + high * (wide + 1) + 2, 1 + rows * columns


def stream(count: int, seq_length: int, max_crops: int, max_frames: int, seed: int = 0, video: bool = True):
    """`count` examples as (tokens, crops), each fitting into a row."""
    rng = np.random.default_rng(seed)
    sizes = []
    while len(sizes) < count:
        kind = rng.random()
        text = 20 + int(min(np.exp(rng.normal(5.0, 0.9)), seq_length // 2))
        if kind < 0.05:
            tokens, crops = 20 + int(np.exp(rng.normal(6.2, 0.9))), 0
        elif kind < 0.5 or not video:
            images = 1 if rng.random() < 0.8 else int(rng.integers(2, 6))
            chosen = [image_size(*TILINGS[rng.integers(len(TILINGS))]) for _ in range(images)]
            tokens, crops = text + sum(t for t, _ in chosen), sum(c for _, c in chosen)
        else:
            frames = int(min(1 + 2 * np.exp(rng.normal(3.2, 1.0)), max_frames, max_crops))
            frames = max(1, min(frames, (seq_length - 1 - text) // FRAME_TOKENS))
            tokens, crops = 1 + text + frames * FRAME_TOKENS, frames
        if tokens <= seq_length and crops <= max_crops:
            sizes.append((tokens, crops))
    return sizes


def ours(seq_length: int, max_crops: int, buffer_size: int) -> Callable:
    def choose(sizes, waited):
        return select(*zip(*sizes), seq_length, max_crops, waited[0] >= MOST_ROWS, buffer_size)

    return choose


def reference(seq_length: int, max_crops: int, crop_value: float) -> Callable:
    unit = max(1, seq_length // 512)
    room = -(-seq_length // unit)

    def choose(sizes, waited):
        lengths = [-(-tokens // unit) for tokens, _ in sizes]
        value = np.full((max_crops + 1, room + 1), -np.inf)
        value[0, 0] = 0
        taken = []
        for length, (tokens, crops) in zip(lengths, sizes):
            with_it = np.full_like(value, -np.inf)
            with_it[crops:, length:] = value[: max_crops + 1 - crops, : room + 1 - length] + tokens + crop_value * crops
            taken.append(with_it > value)
            value = np.maximum(value, with_it)
        used, size = np.unravel_index(value.argmax(), value.shape)
        chosen = []
        for index in range(len(sizes) - 1, -1, -1):
            if taken[index][used, size]:
                chosen.append(index)
                used, size = used - sizes[index][1], size - lengths[index]
        return sorted(chosen)

    return choose


def first_fit(seq_length: int, max_crops: int) -> Callable:
    def choose(sizes, waited):
        tokens, crops, chosen = seq_length, max_crops, []
        for index, (length, count) in enumerate(sizes):
            if length <= tokens and count <= crops:
                chosen.append(index)
                tokens, crops = tokens - length, crops - count
        return chosen

    return choose


def packers(
    seq_length: int, max_crops: int, buffer_size: int, crop_value: float
) -> dict[str, tuple[Callable, Callable]]:
    """By name: what chooses a row, of a pool's examples and how long they waited, and whether a pool is full.

    A pool is told by its count, tokens and crops.
    """

    def counted(count, tokens, crops):
        return count >= buffer_size

    def ours_waits(count, tokens, crops):
        return enough_wait(count, tokens, crops, seq_length, max_crops, buffer_size)

    return {
        "ours": (ours(seq_length, max_crops, buffer_size), ours_waits),
        "reference": (reference(seq_length, max_crops, crop_value), counted),
        "first fit": (first_fit(seq_length, max_crops), counted),
        "none": (lambda sizes, waited: [0], counted),
    }


def pack(
    sizes: Iterable[tuple[int, int]], choose: Callable, is_full: Callable, seq_length: int, max_crops: int
) -> dict:
    """Figures of packing a stream with a buffer. What is left in it at the end counts in `fill_all` and `delay_max`."""
    pool, fill, crops, delays, blocks = [], [], [], [], []
    seconds = 0.0
    for size in sizes:
        pool.append((len(fill), size))
        if not is_full(len(pool), *(sum(column) for column in zip(*(size for _, size in pool)))):
            continue
        started = time.perf_counter()
        chosen = choose([size for _, size in pool], [len(fill) - since for since, _ in pool])
        seconds += time.perf_counter() - started
        row = [pool[index] for index in chosen]
        # The reference's rounding lets a row be too long by less than a unit an example: it is cut there.
        fill.append(min(sum(tokens for _, (tokens, _) in row), seq_length))
        crops.append(sum(count for _, (_, count) in row))
        delays += [len(fill) - 1 - since for since, _ in row]
        blocks.append(visible_blocks([size for _, size in row], seq_length))
        pool = [item for index, item in enumerate(pool) if index not in set(chosen)]
    rows = len(fill)
    tokens_in = sum(fill) + sum(tokens for _, (tokens, _) in pool)
    while pool:
        rows += 1
        chosen = choose([size for _, size in pool], [rows - 1 - since for since, _ in pool])
        delays += [rows - 1 - pool[index][0] for index in chosen]
        pool = [item for index, item in enumerate(pool) if index not in set(chosen)]
    fill, crops = np.array(fill) / seq_length, np.array(crops) / max_crops
    return {
        "fill": fill.mean(),
        "fill_p5": float(np.quantile(fill, 0.05)),
        "crops": crops.mean(),
        "rows": len(fill),
        "delay": float(np.mean(delays)),
        "delay_p95": float(np.quantile(delays, 0.95)),
        "delay_max": max(delays),
        "ms_per_row": 1000 * seconds / len(fill),
        "blocks": float(np.mean(blocks)),
        "fill_all": tokens_in / rows / seq_length,
    }


def visible_blocks(row: list[tuple[int, int]], seq_length: int) -> float:
    """Share of a row's blocks of pairs that attention does not skip (model/mask.py). row: (tokens, crops) of each."""
    count = -(-seq_length // MASK_BLOCK)
    visible, start = np.eye(count, dtype=bool), 0
    for tokens, crops in row:
        end = min(start + tokens, seq_length)
        of_example = np.arange(start // MASK_BLOCK, (end - 1) // MASK_BLOCK + 1)
        visible[np.ix_(of_example, of_example)] |= of_example[:, None] >= of_example
        visual = end - TEXT_TOKENS - start if crops else 0
        if visual > 0:
            both_ways = slice(start // MASK_BLOCK, (start + visual - 1) // MASK_BLOCK + 1)
            visible[both_ways, both_ways] = True
        start = end
    return float(visible.mean())


def bound(sizes: list[tuple[int, int]], seq_length: int, max_crops: int) -> float:
    """No packer fills rows more: the rows that the crops need may be more than those that the tokens need."""
    tokens, crops = (sum(column) for column in zip(*sizes))
    return (tokens / seq_length) / max(tokens / seq_length, crops / max_crops)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", type=Path, help='JSON lines {"tokens": n, "crops": m}')
    options.add_argument("--seq-length", type=int, default=16384, help="with --lengths")
    options.add_argument("--max-crops", type=int, default=128, help="with --lengths")
    options.add_argument("--examples", type=int, default=5000)
    options.add_argument("--buffer", type=int, default=48)
    arguments = options.parse_args()
    if arguments.lengths:
        try:
            sizes = [(int(s["tokens"]), int(s["crops"])) for s in map(json.loads, arguments.lengths.open())]
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f'error: --lengths {arguments.lengths} is not lines of {{"tokens": n, "crops": m}}: {error}')
        streams = {arguments.lengths.name: (arguments.seq_length, arguments.max_crops, sizes, 30.0)}
    else:
        streams = {
            name: (length, crops, stream(arguments.examples, length, crops, frames, video=name != "stage 1"), value)
            for (name, (length, crops, frames)), value in zip(STREAMS.items(), (1.0, 30.0, 30.0))
        }
        length, crops, frames = 4096, 128, 128
        streams["stage 2 at 4,096"] = (length, crops, stream(arguments.examples, length, crops, frames), 30.0)
        texts = np.random.default_rng(0).normal(4.7, 0.6, 10 * arguments.examples)
        streams["short texts"] = (16384, 128, [(20 + int(np.exp(value)), 0) for value in texts], 30.0)
    results = []
    for name, (length, crops, sizes, value) in streams.items():
        fitting = [size for size in sizes if size[0] <= length and size[1] <= crops]
        dropped = len(sizes) - len(fitting)
        print(
            f"{name}: {len(fitting)} examples ({dropped} too long), rows of {length:,} tokens and {crops} crops,",
            end=" ",
        )
        print(f"buffer {arguments.buffer}, bound {bound(fitting, length, crops):.1%}")
        print(
            f"  {'':12}{'fill':>8}{'5 %':>8}{'crops':>8}{'all':>8}{'rows':>7}"
            f"{'delay':>8}{'95 %':>7}{'max':>7}{'ms/row':>9}{'blocks':>8}"
        )
        for packer, (choose, is_full) in packers(length, crops, arguments.buffer, value).items():
            f = pack(fitting, choose, is_full, length, crops)
            results.append({"stream": name, "packer": packer, "bound": bound(fitting, length, crops), **f})
            print(
                f"  {packer:12}{f['fill']:8.1%}{f['fill_p5']:8.1%}{f['crops']:8.1%}{f['fill_all']:8.1%}{f['rows']:7}"
                f"{f['delay']:8.1f}{f['delay_p95']:7.0f}{f['delay_max']:7}{f['ms_per_row']:9.2f}{f['blocks']:8.1%}"
            )
    print_json({"bench": "packing", "buffer": arguments.buffer, "results": results}, arguments.out)


if __name__ == "__main__":
    main()
