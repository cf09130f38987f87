"""Pictures of more than 8 bits a channel: scaled by what the format or the file says, or refused."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from molmo2_nemo.data.pictures import read_image

# Grey from black to white in 256 steps, and one wrong step would show.
STEPS = np.arange(256, dtype=np.uint8).reshape(16, 16)
GREY = np.repeat(STEPS[:, :, None], 3, axis=2)


def encoded(pixels, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def tiff(pixels, *extratags, **options):
    """extratags: (tag, kind, value), kind 3 a SHORT, 11 a FLOAT, 12 a DOUBLE."""
    file = io.BytesIO()
    tags = [(tag, kind, 1, value, True) for tag, kind, value in extratags]
    tifffile.imwrite(file, pixels, extratags=tags, **options)
    return file.getvalue()


def pgm(white, kind=">u2"):
    pixels = (STEPS / 255 * white).round().astype(kind)
    return b"P5 16 16 %d\n" % white + pixels.tobytes()


DEEP = STEPS.astype(np.uint16) * 257
TWELVE = (STEPS / 255 * 4095).round().astype(np.uint16)
PACKED = np.stack([TWELVE.ravel()[::2] >> 4, (TWELVE.ravel()[::2] & 15) << 4 | TWELVE.ravel()[1::2] >> 8,
                   TWELVE.ravel()[1::2] & 255], axis=1).astype(np.uint8)  # fmt: skip


def twelve_bits():
    """A TIFF with 12 bits a pixel, which tifffile writes only with a codec: of a picture of the same bytes, changed."""
    data = bytearray(tiff(PACKED.reshape(16, 24), photometric="minisblack"))
    for tag, kind, old, new in ((256, 4, 24, 16), (258, 3, 8, 12)):
        place = data.index(
            b"".join(value.to_bytes(size, "little") for value, size in ((tag, 2), (kind, 2), (1, 4), (old, 2)))
        )
        data[place + 8 : place + 10] = new.to_bytes(2, "little")
    return bytes(data)


SCALED = {
    "PNG of 16 bits": lambda: encoded(DEEP),
    "JPEG 2000 of 16 bits": lambda: encoded(DEEP, "JPEG2000", irreversible=False),
    "PGM up to 65535": lambda: pgm(65535),
    "PGM up to 4095": lambda: pgm(4095),
    "PGM up to 1000": lambda: pgm(1000),
    "PPM of 16 bits": lambda: b"P6 16 16 65535\n" + np.repeat(DEEP[:, :, None], 3, axis=2).astype(">u2").tobytes(),
    "TIFF of 16 bits": lambda: tiff(DEEP),
    "TIFF of 16 bits, big-endian": lambda: tiff(DEEP, byteorder=">"),
    "TIFF of 12 bits in 16": lambda: tiff(TWELVE, (281, 3, 4095)),
    "TIFF of 16 bits whose brightest pixel is named": lambda: tiff(DEEP, (281, 3, 60_000)),
    "TIFF of 12 bits": twelve_bits,
    "TIFF whose 0 is white": lambda: tiff(65535 - DEEP, photometric="miniswhite"),
    "TIFF with colours of 16 bits": lambda: tiff(np.repeat(DEEP[:, :, None], 3, axis=2), photometric="rgb"),
    "TIFF of 32 bits that names its white": lambda: tiff(STEPS.astype(np.int32) * 9 - 5, (340, 9, -5), (341, 9, 2290)),
    "float TIFF that names its white": lambda: tiff(STEPS.astype(np.float32) / 255, (340, 11, 0.0), (341, 11, 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_deep_pictures_keep_their_grey(kind):
    picture = read_image(SCALED[kind]()).astype(int)
    assert picture.shape == (16, 16, 3) and np.abs(picture - GREY).max() <= (1 if "1000" in kind else 0)


REFUSED = {
    "float TIFF": (lambda: tiff(STEPS.astype(np.float32) / 255), "32-bit floating-point numbers, of which none"),
    "TIFF of 32 bits": (lambda: tiff(DEEP.astype(np.uint32)), "32-bit integers, of which none"),
    "signed TIFF": (lambda: tiff(STEPS.astype(np.int16)), "16-bit signed integers, of which none"),
    "signed TIFF of 8 bits": (lambda: tiff(STEPS.astype(np.int8)), "8-bit signed integers, of which none"),
    "TIFF with not-a-number": (
        lambda: tiff(np.full((4, 4), np.nan, np.float32), (341, 11, 1.0)),
        "some of its pixels are no numbers",
    ),
    "TIFF of 64 bits": (
        lambda: tiff(STEPS.astype(np.float64)),
        "it is none of .*, or of a kind of them that is not read",
    ),
    "TIFF with colours of 12 bits": (
        lambda: tiff(np.repeat(TWELVE[:, :, None], 3, axis=2), (281, 3, 4095), photometric="rgb"),
        "its colours have 16 bits, of which 4095 is white",
    ),
    "portable float map": (lambda: b"Pf\n4 4\n-1.0\n" + np.ones(16, "<f4").tobytes(), "floating-point numbers"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_white_is_refused_in_a_sentence(kind):
    make, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=f"^The image cannot be decoded: .*{reason}[^.]*\\.$"):
        read_image(make())


def test_the_advice_for_refused_pictures_works():
    """ "save it with 8 or 16 bits a channel, black as 0"."""
    pixels = STEPS.astype(np.float32) / 255
    for saved in ((pixels * 255).round().astype(np.uint8), (pixels * 65535).round().astype(np.uint16)):
        assert np.array_equal(read_image(tiff(saved)), GREY)


def test_transparent_grey_of_16_bits_is_white():
    """PNG names one grey value that is transparent."""
    image = read_image(encoded(DEEP, transparency=0))
    assert (image[0, 0] == 255).all() and np.array_equal(image.reshape(-1, 3)[1:], GREY.reshape(-1, 3)[1:])
