"""Picture files -> pixels. Preparation, training, inspection, answers and `tools/ask.py` all read pictures here."""

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_transforms import convert_to_rgb

from molmo2_nemo import limits

try:
    import simplejpeg  # libjpeg-turbo without anything around it
except ImportError:  # there is none for this platform: Pillow gives the same bytes more slowly
    simplejpeg = None

# TIFF tags (TIFF 6.0 specification, "Baseline" and "Extension" fields), and what two of them mean.
BITS, PHOTOMETRIC, MOST, SAMPLE_FORMAT, LEAST_SAMPLE, MOST_SAMPLE = 258, 262, 281, 339, 340, 341
WHITE_IS_ZERO = 0
UNSIGNED, SIGNED = 1, 2
ADVICE = "save it with 8 or 16 bits a channel, black as 0"


def read_image(data: bytes) -> np.ndarray:
    """A picture as uint8 [H, W, 3], turned as its EXIF orientation says, transparency on white; the first of several.

    Grey of more than 8 bits is scaled so that white is what the format or the file says; where neither does, as with
    floating-point numbers, the picture is refused. ValueError: that, or the bytes are no readable picture, or it has
    more than limits.MAX_IMAGE_PIXELS.
    """
    most = limits.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():  # Pillow's own limit is another one
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=limits.IMAGE_FORMATS)
        if image.width * image.height > most:
            raise ValueError(f"{image.width} x {image.height} are more than {most:,} pixels: make it smaller")
        pixels = _plain_jpeg(data, image)
        if pixels is not None:
            return pixels
        black, white = _black_and_white(image)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            return _scaled(image, black, white)
        if image.mode == "RGB" and "transparency" not in image.info:
            return np.array(image)  # the same without a copy
        return convert_to_rgb(image, return_numpy=True)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:  # before its size can be asked for
        raise ValueError(f"The image cannot be decoded: it has more than {most:,} pixels: make it smaller.") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"The image cannot be decoded: it is none of {', '.join(limits.IMAGE_FORMATS)}, or of a kind of them that "
            "is not read."
        ) from error
    except Exception as error:  # PIL's decoders raise errors of any type on broken files
        raise ValueError(f"The image cannot be decoded: {str(error).rstrip('.')}.") from error


def _plain_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """A grey or RGB JPEG that is not to be turned, as uint8 [H, W, 3]: Pillow's bytes in a third of its time.

    Pillow decodes with the same library, but copies every pixel three times. None: another picture, or anything that
    libjpeg-turbo warns of, which is left to Pillow, to mend it or to say what is wrong.
    """
    if simplejpeg is None or image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return None
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
            return None
        height, width = simplejpeg.decode_jpeg_header(data)[:2]
        if (width, height) != image.size:  # only the one that Pillow sees was compared with the limit
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except Exception:
        return None


def _black_and_white(image: Image.Image) -> tuple[float, float]:
    """The values that are black and white, for a mode with one deep channel (I;16, I, F). ValueError: nothing says."""
    if image.format != "TIFF":
        if image.mode == "F":  # a portable float map
            raise ValueError(f"its pixels are floating-point numbers, of which none is said to be white: {ADVICE}")
        # PNG's grey has all 16 bits; Pillow scales that of PGM and JPEG 2000, whatever its maximum, to 16 bits.
        return 0, 65535
    tags = image.tag_v2
    bits, form, most = (_largest(tags.get(tag)) for tag in (BITS, SAMPLE_FORMAT, MOST))
    bits, form = bits or 1, form or UNSIGNED
    least_sample, most_sample = _largest(tags.get(LEAST_SAMPLE)), _largest(tags.get(MOST_SAMPLE))
    if form == UNSIGNED and bits <= 16:
        black, white = 0, 2**bits - 1
        # By the specification this maximum is no matter of display, and may be that of the pixels. Where it is that of
        # a whole number of bits, it is taken for the camera's, whose 10, 12 or 14 bits are stored in 16.
        if bits > 8 and most and most < white and not (int(most) + 1) & int(most):
            white = most
        if image.mode == "RGB" and white not in (255, 65535):  # Pillow keeps the upper 8 of 16 bits
            raise ValueError(f"its colours have {bits} bits, of which {white:g} is white: {ADVICE}")
    elif most_sample is not None and (least_sample or 0) < most_sample:
        black, white = least_sample or 0, most_sample
    else:
        kind = {UNSIGNED: "integers", SIGNED: "signed integers"}.get(form, "floating-point numbers")
        raise ValueError(f"its pixels are {bits}-bit {kind}, of which none is said to be white: {ADVICE}")
    return (white, black) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else (black, white)


def _largest(value) -> float | None:
    """Of a TIFF tag with a number, or with one for each channel."""
    return max(value, default=None) if isinstance(value, tuple) else value


def _scaled(image: Image.Image, black: float, white: float) -> np.ndarray:
    """Grey of any number type as uint8 [H, W, 3]."""
    grey = np.array(image)
    if not np.isfinite(grey).all():
        raise ValueError(f"some of its pixels are no numbers: {ADVICE}")
    grey = grey.astype(np.float32 if image.mode.startswith("I;16") else np.float64)
    scaled = ((grey - black) * (255 / (white - black))).round().clip(0, 255).astype(np.uint8)
    if isinstance(image.info.get("transparency"), int):  # PNG: this value is transparent
        scaled[grey == image.info["transparency"]] = 255
    return np.repeat(scaled[:, :, None], 3, axis=2)
