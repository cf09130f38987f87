"""What a picture or video may be, from its download to the training step: pixels, formats and their file suffixes.

Downloader, preparation, loader and inspection read these by `limits.NAME`, so that none refuses what another accepts.
"""

# Pixels of a picture. A worker holds one as bytes while it resizes it, which at this limit is 300 MB, and 900 MB while
# Pillow decodes it.
# (Pillow itself warns of a decompression bomb from 89 million pixels and refuses from 179 million.)
MAX_IMAGE_PIXELS = 100_000_000
# Pixels of a frame of a video; 8K has 7,680 x 4,320 = 33,177,600.
MAX_FRAME_PIXELS = 2**25

# Bytes of one file of media: it is held in memory while it is prepared, and later in the pool of every loader worker.
MAX_MEDIA = 2 * 2**30

# Pillow's names of the formats that are read. It knows many more, some of which it reads by running other programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Those that a download from a list of addresses may give, with their suffix: every build of Pillow reads them, and a
# file of them that was cut off is recognised. MPO is several JPEG pictures in one file; Pillow opens it as JPEG.
DOWNLOADED_IMAGES = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tiff",
}
# FFmpeg's names of the containers that such a download may give, with their suffix.
DOWNLOADED_VIDEOS = {"mp4": ".mp4", "webm": ".webm", "matroska": ".mkv", "avi": ".avi", "mov": ".mov"}
# Suffixes of video files, in small letters; they are compared without case.
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")

# Share of a fetched set's annotations, in a sample of them, that may be lost: `download.py fetch` warns above it,
# `download.py verify` fails, and `prepare.py` refuses the set.
MAX_DROPPED = 0.05
# Share of the points, in such a sample, that may lie outside of their picture and are moved to its border: some are
# inexact. `download.py verify` fails above it and `prepare.py` refuses the set, unless --max-dropped allows more.
MAX_MOVED = 0.05

# Questions with their answers (branches) of a sample. Reading 10,000 takes a tenth of a second, and the longest row of
# the recipes, 36,864 tokens, holds fewer: a branch has at least five tokens.
MAX_BRANCHES = 10_000
