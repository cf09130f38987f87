"""Whether a downloaded file is what it should be. Pictures and videos are decoded: no header or suffix is trusted."""

import collections
import warnings
from pathlib import Path

from molmo2_nemo import limits
from molmo2_nemo.catalogue.raw import UnreadableFile, read_rows

# Pixels; pictures with a shorter side are tracking pixels and placeholders.
MIN_SIDE = 10


class BadContent(Exception):
    """The bytes are not what they should be; the message says what they are instead."""


def check_image(path: Path, published: bool = False) -> dict:
    """Decode all of a picture and return its suffix, and its width and height in pixels as stored.

    published: its checksum is the data set's, so that a missing end is how it was published, and no fault.
    BadContent: it is no picture, is cut off, or is too small or too large.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=[form for form in limits.DOWNLOADED_IMAGES if form != "MPO"]) as image:
                width, height = image.size
                if width * height > limits.MAX_IMAGE_PIXELS:
                    raise BadContent(f"a picture of {width} x {height} pixels, more than {limits.MAX_IMAGE_PIXELS:,}")
                if min(width, height) < MIN_SIDE:
                    raise BadContent(f"a picture of {width} x {height} pixels, a placeholder")
                image.load()
                if not published and _is_cut(path, image.format):
                    raise BadContent("a picture without its end")
                return {"suffix": limits.DOWNLOADED_IMAGES[image.format], "width": width, "height": height}
    except BadContent:
        raise
    except Image.DecompressionBombError as error:  # before its size can be asked for
        raise BadContent(f"a picture of more than {limits.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise BadContent(instead_of_file(path) or "no picture of a format that is read here") from error
    except Exception as error:  # Pillow raises a dozen types for broken files
        raise BadContent(instead_of_file(path) or f"a broken picture ({' '.join(str(error).split())[:120]})") from error


def _is_cut(path: Path, form: str) -> bool:
    """Whether the marker at a picture's end is missing. What follows the marker does not matter.

    Pillow decodes a JPEG without it, and a GIF whose first frame is complete; of other formats it needs the whole file.
    JPEG markers (ITU-T T.81, B.1.1.3) do not occur among coded pixels; those of a thumbnail come before the last scan.
    """
    content = path.read_bytes()
    match form:
        case "JPEG" | "MPO":
            return content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda")
        case "GIF":
            return not content.rstrip(b"\0\r\n ").endswith(b";")
        case "PNG":
            return b"IEND\xaeB`\x82" not in content
    return False


def check_video(path: Path) -> dict:
    """Decode the first frame and read all packets; return suffix, and width and height in pixels.

    BadContent: it is no video, is cut off, or has too many pixels.
    """
    import av

    from molmo2_nemo.data.video import list_frames

    try:
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            names = container.format.name.split(",")
            suffix = next((suffix for name, suffix in limits.DOWNLOADED_VIDEOS.items() if name in names), None)
            if suffix is None or not container.streams.video:
                raise BadContent(f"a file of the type {container.format.name}")
            stream = container.streams.video[0]
            if stream.width * stream.height > limits.MAX_FRAME_PIXELS:
                raise BadContent(
                    f"a video of {stream.width} x {stream.height} pixels, more than {limits.MAX_FRAME_PIXELS:,}"
                )
            frame = next(container.decode(stream))
            width, height = frame.width, frame.height
        list_frames(path)
        return {"suffix": suffix, "width": width, "height": height}
    except BadContent:
        raise
    except Exception as error:
        raise BadContent(instead_of_file(path) or f"a broken video ({' '.join(str(error).split())[:120]})") from error


def check_file(path: Path) -> dict:
    """Accept an annotation file or an archive. BadContent: it is empty, or an error page in its place."""
    web_page = instead_of_file(path)
    if web_page:
        raise BadContent(web_page)
    return {}


def dhash(path: Path) -> int:
    """Difference hash of a picture, 64 bits: is each of 8 x 8 grey pixels brighter than its right neighbour?"""
    from PIL import Image

    with Image.open(path) as image:
        grey = list(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR).tobytes())
    bits = [grey[9 * row + column] > grey[9 * row + column + 1] for row in range(8) for column in range(8)]
    return sum(bit << position for position, bit in enumerate(bits))


def instead_of_file(path: Path) -> str | None:
    """What a server sent in place of the file ("a web page", ...); None: nothing of the known kinds."""
    with path.open("rb") as file:
        head = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "an empty file"
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")):
        return "a web page"
    if head.startswith(b"<") and b"<html" in head:
        return "a web page"
    if head.startswith((b"<svg", b"<?xml")) and b"<svg" in head:
        return "an SVG drawing"
    if head[4:12] in (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypmif1"):
        return f"an {head[8:12].decode()} picture, a format that is not read here"
    return None


def check_rows(path: Path, suffix: str) -> None:
    """Read all rows of a file. BadContent: it is cut off, or something else."""
    try:
        collections.deque(read_rows(path, suffix), maxlen=0)
    except UnreadableFile as error:
        raise BadContent(f"a broken {suffix} file ({error.reason[:120]})") from error


def begins_as_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1] in (b"{", b"[")
