"""Whether the next step's micro-batches are made while a step computes.

    python tools/bench/overlap.py [--step 4.0] [--load 0.8] [--micro-batches 8 32] [--out FILE]

The real training loader with two workers on short texts, whose rows take a fixed time each (a decoder that sleeps), so
that all rows of a step take --load of the --step seconds for which the step then "computes" (sleeps, too). Prints the
seconds of a step over --step, after the first two steps: 1 is perfect overlap, 1 + --load none. Sleeping costs no CPU,
but what the loader does besides must fit beside it: on a busy machine take a longer --step. Exit status 1 above 1.05.
"""

import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from data import SAMPLES, TOKENIZER, chat
from tables import parser, print_json, print_table

from molmo2_nemo.config.schema import DataConfig, VisionConfig
from molmo2_nemo.data import loader
from molmo2_nemo.data.blend import Source
from molmo2_nemo.prepare.webdataset import write_shards

BOUND = 1.05
WORKERS = 2
STEPS = 4  # that are timed


def slow(function, seconds: float):
    """The function, which first sleeps."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return wrapped


def measure(folder: Path, micro_batches: int, step: float, load: float, ahead: bool) -> dict:
    """Seconds of a step over `step`; ahead: as a run has it, else with torch's two batches per worker."""
    rows = dict(seq_length=512, max_crops=12, max_frames=12)
    data = DataConfig(blend="text", root=str(folder), tokenizer=str(TOKENIZER), num_workers=WORKERS, **rows)
    source = Source("text", str(folder / "text"), weight=1.0, num_samples=SAMPLES)
    of_a_row = load * step * WORKERS / micro_batches
    with mock.patch.object(loader, "make_row", slow(loader.make_row, of_a_row)):
        batches = loader.train_loader(
            data, VisionConfig(), [source], 0, 1, None, 1, micro_batches=micro_batches if ahead else 1
        )
        next(batches)  # the workers are forked, with what is patched here
    ends = []
    for _ in range(STEPS + 2):
        for _ in range(micro_batches):
            next(batches)
        time.sleep(step)
        ends.append(time.monotonic())
    batches.close()
    return dict(micro_batches=micro_batches, ahead=ahead, over_ideal=(ends[-1] - ends[1]) / STEPS / step)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--step", type=float, default=4.0, help="seconds that a step computes")
    arguments.add_argument("--load", type=float, default=0.8, help="of these seconds its micro-batches take to make")
    arguments.add_argument("--micro-batches", type=int, nargs="+", default=[8, 32], help="of a step")
    args = arguments.parse_args()
    rng = np.random.default_rng(0)
    examples = ({"branches": [chat(rng, turns=2, words=40)]} for _ in range(SAMPLES))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text").mkdir()
        parts = ((f"{i:06d}", {"json": json.dumps(example).encode()}) for i, example in enumerate(examples))
        write_shards(folder / "text", {"train": parts})
        cases = [(number, ahead) for number in args.micro_batches for ahead in (False, True)]
        rows = [measure(folder, number, args.step, args.load, ahead) for number, ahead in cases]
    print_table(rows)
    print_json({"step": args.step, "load": args.load, "workers": WORKERS, "bound": BOUND, "rows": rows}, args.out)
    sys.exit(max(row["over_ideal"] for row in rows if row["ahead"]) > BOUND)


if __name__ == "__main__":
    main()
