"""JPEGs decoded without Pillow: the bytes, and what is said of broken files, are those of Pillow."""

import io
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from molmo2_nemo import limits
from molmo2_nemo.data import pictures
from molmo2_nemo.data.pictures import read_image

simplejpeg = pytest.importorskip("simplejpeg", reason="there is none for this platform, and Pillow decodes all")

SIZES = [(1, 1), (1, 17), (17, 1), (2, 3), (7, 7), (8, 8), (9, 16), (31, 33), (100, 75), (257, 129)]
REAL = sorted((Path(skimage.__file__).parent / "data").glob("*.jp*g"))


def scene(width, height, mode="RGB"):
    """Slopes, an edge and noise: what smooth and what sharp upsampling of colours would show."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([x * 255 // width, y * 255 // height, (x + y) * 7 % 256], axis=2)
    slopes[:, width // 2 :] = slopes[:, width // 2 :, ::-1]
    pixels = np.clip(slopes + rng.normal(0, 20, slopes.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def read_both(data, monkeypatch):
    """(pixels or the sentence of what is wrong; the same by Pillow alone; whether the first came without Pillow)."""

    def read():
        try:
            return read_image(data)
        except ValueError as error:
            return str(error)

    decoded = []

    def decode(*arguments):
        decoded.append(decode_jpeg(*arguments))
        return decoded[-1]

    decode_jpeg = simplejpeg.decode_jpeg
    with monkeypatch.context() as patch:
        patch.setattr(simplejpeg, "decode_jpeg", decode)
        first = read()
        patch.setattr(pictures, "simplejpeg", None)
        return first, read(), bool(decoded)


def check(data, monkeypatch, direct=True):
    first, second, without_pillow = read_both(data, monkeypatch)
    assert without_pillow == direct
    assert first.dtype == np.uint8 and first.flags.writeable and first.flags.c_contiguous
    assert np.array_equal(first, second)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_subsampling_quality_and_size_gives_pillows_bytes(size, monkeypatch):
    colours, grey = scene(*size), scene(*size, "L")
    for quality in (5, 50, 88, 100):
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            check(jpeg(colours, quality=quality, subsampling=subsampling), monkeypatch)
        for subsampling in ("440", "411"):  # which Pillow reads and cannot write
            data = simplejpeg.encode_jpeg(np.array(colours), quality=quality, colorsubsampling=subsampling)
            check(data, monkeypatch)
        check(jpeg(grey, quality=quality), monkeypatch)


PLAIN = {
    "progressive": lambda: jpeg(scene(101, 67), progressive=True),
    "progressive grey": lambda: jpeg(scene(101, 67, "L"), progressive=True),
    "restart markers at blocks": lambda: jpeg(scene(101, 67), restart_marker_blocks=3),
    "restart markers at rows": lambda: jpeg(scene(101, 67), restart_marker_rows=1),
    "colours stored as RGB": lambda: jpeg(scene(101, 67), keep_rgb=True),
    "own Huffman tables": lambda: jpeg(scene(101, 67), optimize=True),
    "comment, profile and resolution": lambda: jpeg(
        scene(101, 67), comment=b"c" * 9, icc_profile=b"p" * 300, dpi=(72, 72)
    ),
    "upright by EXIF": lambda: jpeg(scene(101, 67), exif=exif(1)),
    "an orientation that there is not": lambda: jpeg(scene(101, 67), exif=exif(9)),
    "bytes after its end": lambda: jpeg(scene(101, 67)) + b"more" * 50,
    "a second picture after its end": lambda: jpeg(scene(101, 67)) + jpeg(scene(31, 20)),
}


def several():
    file = io.BytesIO()
    scene(101, 67).save(file, "MPO", save_all=True, append_images=[scene(31, 20)])
    return file.getvalue()


def png():
    file = io.BytesIO()
    scene(101, 67).save(file, "PNG")
    return file.getvalue()


def turned(orientation):
    return lambda: jpeg(scene(101, 67), exif=exif(orientation))


LEFT_TO_PILLOW = {
    "inks": lambda: jpeg(scene(101, 67, "CMYK")),
    "several pictures": several,
    "a PNG": png,
    **{f"orientation {number}": turned(number) for number in range(2, 9)},
}


@pytest.mark.parametrize("kind", PLAIN | LEFT_TO_PILLOW)
def test_every_kind_gives_pillows_bytes(kind, monkeypatch):
    check((PLAIN | LEFT_TO_PILLOW)[kind](), monkeypatch, direct=kind in PLAIN)


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.name)
def test_real_photographs_give_pillows_bytes(file, monkeypatch):
    check(file.read_bytes(), monkeypatch)


def same(data, monkeypatch):
    first, second, without_pillow = read_both(data, monkeypatch)
    assert type(first) is type(second)
    assert first == second if isinstance(first, str) else np.array_equal(first, second)
    return isinstance(first, str)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_that_was_cut_off_is_refused_in_pillows_words(progressive, monkeypatch):
    data = jpeg(scene(60, 44), progressive=progressive)
    refused = [same(data[:length], monkeypatch) for length in range(1, len(data), 13)]
    assert sum(refused) > 0.9 * len(refused)


def test_a_damaged_file_gives_what_pillow_makes_of_it(monkeypatch):
    """Single wrong bytes: some are mended by Pillow, some only warned of, some refused, some not noticed."""
    rng = np.random.default_rng(0)
    files = [jpeg(scene(60, 44)), jpeg(scene(60, 44), progressive=True), jpeg(scene(60, 44), restart_marker_blocks=2)]
    refused = []
    for number in range(300):
        data = bytearray(files[number % 3])
        for place in rng.integers(2, len(data), 1 + number % 2):
            data[place] = rng.integers(256)
        refused.append(same(bytes(data), monkeypatch))
    assert any(refused) and not all(refused)


def test_the_limit_of_pixels_holds_and_says_the_same(monkeypatch):
    data = jpeg(scene(40, 30))
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 1199)
    first, second, without_pillow = read_both(data, monkeypatch)
    assert "40 x 30 are more than 1,199 pixels: make it smaller" in first and first == second and not without_pillow


def test_a_size_that_pillow_does_not_see_is_left_to_pillow(monkeypatch):
    """The limit is compared with the size that Pillow reads."""
    data = jpeg(scene(40, 30))
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda data: (30, 41, "RGB", "420"))
    check(data, monkeypatch, direct=False)


def test_a_file_of_twelve_bits_is_refused_in_pillows_words(monkeypatch):
    data = bytearray(jpeg(scene(40, 30)))
    start_of_frame = data.index(b"\xff\xc0")
    data[start_of_frame + 4] = 12
    assert same(bytes(data), monkeypatch)
