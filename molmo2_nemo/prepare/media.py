"""What is known of a picture or video file: its size, length and frame rate; and cutting a clip out of a video file."""

import io
import math
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.data.video import TOLERANCE, list_frames, pick_frames
from molmo2_nemo.limits import MAX_MEDIA

# Suffix of a picture by the first bytes of the file, since addresses need not have one.
MAGIC = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"RIFF", ".webp"), (b"BM", ".bmp"))
SEEK_BACK = 0.5  # seconds before a clip's start at which to look for a key frame
# Option of the containers that are written: no random identity and no time of day in them.
BIT_EXACT = {"fflags": "+bitexact"}


class IsVideo(ValueError):
    """The file is a video, in the place of a picture."""


def suffix(file: Path) -> str:
    """.jpg and the like; part names are for people, the content decides how it is decoded."""
    suffix = file.suffix.lower()
    return suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) < 8 else ".bin"


def image_suffix(data: bytes) -> str:
    """.jpg and the like, by the content; "" for another kind."""
    return next((ending for magic, ending in MAGIC if data.startswith(magic)), "")


def image_facts(data: bytes) -> dict:
    """Displayed width and height in pixels. The whole picture is decoded. ValueError: it cannot be."""
    try:
        height, width = read_image(data).shape[:2]
    except ValueError as error:
        if _is_video(data):
            raise IsVideo("The file is a video, not a picture.") from error
        raise
    return {"width": width, "height": height}


def video_facts(data: bytes) -> dict:
    """Displayed size, seconds to the end of the last frame, number of frames, and their rate if it is constant.

    The first and the last frame are decoded. ValueError: see data/video.pick_frames.
    """
    listing = list_frames(data)
    stamps, rate = listing.seconds, listing.fps
    last, steps = float(stamps[-1]), np.diff(stamps)
    typical = float(np.median(steps)) if len(steps) else 1 / rate if rate else 0.0
    frames = list(pick_frames(data, [0.0, last], len(stamps)))
    height, width = frames[0].shape[:2]
    # Rounded down: after 31 frames at 6 a second, 5.166667 s would be later than 31 / 6, as if a frame were missing.
    duration = math.floor((last + typical) * 1e6 + 1e-3) / 1e6
    facts = {"width": width, "height": height, "duration": duration, "num_frames": len(stamps)}
    if len(steps):
        # Stamps may be rounded to milliseconds, and the rate that a file names may be another than its frames'.
        mean = last / len(steps)
        is_constant, rate = np.ptp(steps) < 0.2 * typical, rate if rate and abs(rate * mean - 1) < 0.02 else 1 / mean
    else:
        is_constant = bool(rate)
    return facts | ({"fps": round(rate, 6)} if is_constant else {})


def _is_video(data: bytes) -> bool:
    try:
        list_frames(data)
    except ValueError:
        return False
    return True


def excerpt(path: Path, start: float, end: float) -> tuple[bytes, str, float] | None:
    """The part of a video file that shows it from `start` to `end` (seconds after its first frame), not re-encoded.

    Its bytes, suffix, and the seconds at which it starts, on a key frame. None: it cannot be cut without a change of
    what is seen at `start` and at `end`.
    """
    file = io.BytesIO()
    try:
        with av.open(str(path)) as source:
            stream = source.streams.best("video")
            if stream is None or stream.start_time is None:
                return None
            suffix = ".mp4" if stream.codec_context.name in ("h264", "hevc", "mpeg4", "av1") else ".mkv"
            scale, first = float(stream.time_base), stream.start_time
            # Some containers seek by times of decoding, which are a few frames before those on screen.
            source.seek(first + math.floor(max(0.0, start - SEEK_BACK) / scale), stream=stream, backward=True)
            key = None
            with av.open(file, "w", format={".mp4": "mp4", ".mkv": "matroska"}[suffix], options=BIT_EXACT) as target:
                copied = target.add_stream_from_template(stream)
                for packet in source.demux(stream):
                    if packet.dts is None or packet.pts is None or not packet.size:
                        continue
                    key = packet.pts if key is None and packet.is_keyframe else key
                    if key is None or packet.pts < key:  # frames that lead over from what is left out
                        continue
                    if packet.dts > first + math.ceil(end / scale):
                        break
                    packet.pts, packet.dts, packet.stream = packet.pts - key, packet.dts - key, copied
                    target.mux(packet)
        if key is None or (key - first) * scale > start + TOLERANCE:
            return None
        data, begin = file.getvalue(), (key - first) * scale
        if path.stat().st_size <= MAX_MEDIA and not _alike(path.read_bytes(), data, [start, end], begin):
            return None
        return data, suffix, begin
    except (av.FFmpegError, ValueError, KeyError):
        return None


def _alike(whole: bytes, part: bytes, times: list[float], begin: float) -> bool:
    """Whether both show the same frames at these seconds of the whole."""
    pairs = zip(pick_frames(whole, times), pick_frames(part, times, start=-begin), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def encode(pictures: Iterable[np.ndarray], fps: float) -> bytes:
    """The pictures (uint8 [H, W, 3]) as H.264 in an mp4 file, on one thread: the same pictures give the same bytes.

    Nothing for no picture. Odd sides lose a row or a column of pixels. ValueError: the sizes differ.
    """
    file, size = io.BytesIO(), None
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.codec_context.thread_count = 1
        stream.options = {"crf": "18", "preset": "veryfast", "threads": "1"}
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            if size is None:
                size = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2
                stream.height, stream.width = size
            if picture.shape[0] < size[0] or picture.shape[1] < size[1]:
                raise ValueError("frames of different sizes")
            picture = np.ascontiguousarray(picture[: size[0], : size[1]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        if size is None:
            return b""
        container.mux(stream.encode())
    return file.getvalue()
