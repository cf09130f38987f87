"""How many pictures one CPU core decodes and resizes a second, and the memory that it takes: before and after.

    python tools/bench/pictures.py [--seconds 3] [--out figures.jsonl]

before    JPEGs decoded by Pillow, the whole picture made floats and resized by torch
after     JPEGs decoded by libjpeg-turbo (simplejpeg), large pictures resized band by band without a float picture

Both give the same bytes, which is checked. Pictures are made here, as JPEGs of quality 88; they are resized to the
overview and at most eight crops of the released geometry. Seconds are CPU time of this process. Memory is the highest
that the process held beyond what it held before (Linux; elsewhere it is left out).
"""

import ctypes
import re
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from data import TOKENIZER, jpeg, picture
from numpy import array_equal
from numpy.random import default_rng
from tables import parser, print_json, print_table
from transformers.utils import logging

from molmo2_nemo.config.schema import VisionConfig
from molmo2_nemo.data import pictures, processor

SIZES = [(640, 480), (1024, 768), (1920, 1080), (4000, 3000)]


def memory_of(function: Callable) -> float | None:
    """Most MiB that a call holds beyond what was held before."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, so that it counts when it is used again
    reset.write_text("5")  # proc(5): the peak starts anew
    before = held(status, "VmRSS")
    function()
    return held(status, "VmHWM") - before


def held(status: Path, key: str) -> float:
    return int(re.search(rf"{key}:\s+(\d+) kB", status.read_text())[1]) / 1024


def rate(function: Callable, seconds: float) -> float:
    """Calls a CPU second."""
    function()
    started, calls = time.process_time(), 0
    while time.process_time() - started < seconds:
        function()
        calls += 1
    return calls / (time.process_time() - started)


def figures(data: bytes, visual: processor.VisualInputs, seconds: float) -> tuple[dict, tuple]:
    """Rates and memory of a JPEG's way to crops, and the crops."""
    image = pictures.read_image(data)

    def both():
        return visual.image_pixels(pictures.read_image(data))

    row = {
        "decoded/s": rate(lambda: pictures.read_image(data), seconds),
        "decode MiB": memory_of(lambda: pictures.read_image(data)),
        "resized/s": rate(lambda: visual.image_pixels(image), seconds),
        "resize MiB": memory_of(lambda: visual.image_pixels(image)),
        "both/s": rate(both, seconds),
        "both MiB": memory_of(both),
    }
    return row, both()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=3, help="CPU seconds for each figure (default 3)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    visual = processor.VisualInputs(processor.build_processor(str(TOKENIZER), VisionConfig()))
    rng, rows = default_rng(0), []
    for width, height in SIZES:
        data = jpeg(picture(width, height, rng))
        with mock.patch.object(pictures, "simplejpeg", None):
            with mock.patch.object(processor, "_bands_are_exact", lambda: False):
                before, expected = figures(data, visual, arguments.seconds)
        after, crops = figures(data, visual, arguments.seconds)
        assert all(map(array_equal, crops, expected)), f"other bytes at {width} x {height}"
        for name, row in (("before", before), ("after", after)):
            rows.append({"picture": f"{width} x {height}", "way": name, **row})
    print_table(rows)
    print_json({"bench": "pictures", "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
