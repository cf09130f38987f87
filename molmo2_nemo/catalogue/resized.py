"""Pictures that are made smaller when they arrive (`tools/download.py fetch --max-side N`), to spare the disk.

A resized picture says in a comment of its own file how large the published one was. So points that are in pixels of the
published picture stay right wherever the file goes: they lie at the same part of the width and of the height.
"""

import hashlib
import io
import re

import numpy as np
from PIL import Image

# Of the JPEG files that are written: about the quality of cameras and of photo sites.
QUALITY = 85
LEAST_SIDE = 64  # pixels: a longer side below this is taken for a mistake
COMMENT = re.compile(rb"molmo2-nemo: resized from (\d+) x (\d+) pixels, (\d+) bytes, sha256 ([0-9a-f]{64})")
COMMENT_BYTES = 4096  # of the file's beginning, in which the comment is
# What was measured on nine photographs that come with scikit-image, scikit-learn and Matplotlib, as JPEG of quality 90,
# which stand for published ones (`python tools/check/resized_bytes.py` measures it again): bytes of a pixel, the share
# of the square over the longer side that they cover, and the share of their bytes that is left at these shares of their
# longer side.
PIXEL_BYTES, AREA = 0.252, 0.762
LEFT = {1.0: 1.0, 0.75: 0.469, 0.625: 0.345, 0.5: 0.237, 0.375: 0.146, 0.25: 0.079}


def smaller(data: bytes, max_side: int) -> bytes | None:
    """The picture as JPEG whose longer side is `max_side` pixels, turned as its EXIF orientation says.

    None: its sides are no longer than that, or it would have no fewer bytes. ValueError: it cannot be read.
    """
    from molmo2_nemo.data.pictures import read_image  # its libraries take seconds, and most fetches resize nothing

    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) <= max_side:
            return None
    image = Image.fromarray(read_image(data))
    scale = max_side / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    digest = hashlib.sha256(data).hexdigest()
    note = f"molmo2-nemo: resized from {image.width} x {image.height} pixels, {len(data)} bytes, sha256 {digest}"
    file = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=QUALITY, optimize=True, comment=note)
    return file.getvalue() if len(file.getvalue()) < len(data) else None


def published(data: bytes) -> dict | None:
    """Of a resized picture: width and height in pixels as displayed, bytes and sha256 of the published file.

    data: the picture's file, or its first COMMENT_BYTES. None: it was not resized here.
    """
    found = COMMENT.search(data[:COMMENT_BYTES]) if data.startswith(b"\xff\xd8") else None
    if found is None:
        return None
    width, height, size = map(int, found.groups()[:3])
    return {"width": width, "height": height, "bytes": size, "sha256": found[4].decode()}


def share_left(max_side: int, mean_bytes: float) -> float:
    """About which share of a list's bytes is left at this longer side; 1 where few of its pictures are larger.

    mean_bytes: of one of its pictures as published, from which follows how large they are.
    """
    scale = min(1.0, max_side / (mean_bytes / PIXEL_BYTES / AREA) ** 0.5)
    scales = sorted(LEFT)
    return float(np.interp(scale, [0.0, *scales], [0.0, *(LEFT[s] for s in scales)]))
