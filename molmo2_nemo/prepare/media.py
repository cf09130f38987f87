"""What pictures and videos are (sizes, lengths), and whether annotations fit them."""

import io
import math
from dataclasses import replace
from pathlib import Path

import av
import numpy as np

from molmo2_nemo.data.points import NO_TRACKS, SAME_TIME, Points, from_json, render_content
from molmo2_nemo.data.processor import read_image
from molmo2_nemo.data.schema import Chat, Example, Pointing, Tracking
from molmo2_nemo.data.tasks import converse
from molmo2_nemo.data.video import TOLERANCE, annotation_times, pick_frames

MAX_MEDIA = 2 * 2**30  # bytes of one file: it is held in memory, later in every loader's pool
UNITS = ("fraction", "percent", "pixels")
# Outside the picture by less than this share of its side, a point is moved to the border: rounding, not a mistake.
SLACK = 0.005
SEEK_BACK = 0.5  # seconds
# Of containers that are written: no random identity, no time of day.
BIT_EXACT = {"fflags": "+bitexact"}


def suffix(file: Path) -> str:
    """.jpg and the like; part names are for people, the content decides how it is decoded."""
    suffix = file.suffix.lower()
    return suffix if suffix[1:].isalnum() and suffix.isascii() and len(suffix) < 8 else ".bin"


def image_facts(data: bytes) -> dict:
    """Displayed size; decodes the whole picture."""
    height, width = read_image(data).shape[:2]
    return {"width": width, "height": height}


def video_facts(data: bytes) -> dict:
    """Displayed size, seconds to the end of the last frame, number of frames, and their rate if it is constant.

    The first and the last frame are decoded.
    """
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("the file holds no video")
            stamps = [p.dts if p.pts is None else p.pts for p in container.demux(stream) if p.size and not p.is_discard]
            stamps = np.sort([stamp * float(stream.time_base) for stamp in stamps if stamp is not None])
            rate = float(stream.average_rate or 0)
    except av.FFmpegError as error:
        raise ValueError(f"the video cannot be opened: {error}") from error
    if not len(stamps):
        raise ValueError("the video holds no frame")
    last, steps = float(stamps[-1] - stamps[0]), np.diff(stamps)
    typical = float(np.median(steps)) if len(steps) else 1 / rate if rate else 0.0
    frames = list(pick_frames(data, [0.0, last], len(stamps)))
    height, width = frames[0].shape[:2]
    facts = {"width": width, "height": height, "duration": round(last + typical, 6), "num_frames": len(stamps)}
    # Stamps may be rounded to milliseconds.
    is_constant = rate and (not len(steps) or np.ptp(steps) < 0.2 * typical)
    return facts | ({"fps": round(rate, 6)} if is_constant else {})


def use_fractions(example: Example, unit: str) -> None:
    """Change coordinates to fractions, in place. ValueError: one is outside its picture, or of no picture."""

    def size(frame: float) -> tuple[int, int]:
        """Width and height of what the coordinates of a frame are of."""
        video = example.video
        if video and frame > video.seconds + SAME_TIME:
            raise ValueError(f"points are at {frame:g} seconds, and the video has {video.seconds:g}")
        if not video and frame not in range(1, len(example.images) + 1):
            raise ValueError(f"points are of image {frame:g}, and there are {len(example.images)}")
        seen = video or example.images[int(frame) - 1]
        return seen.width, seen.height

    def fraction(value: float, side: int) -> float:
        value /= {"fraction": 1, "percent": 100, "pixels": side}[unit]
        if not -SLACK <= value <= 1 + SLACK:
            raise ValueError(
                f"a coordinate is {value:.3f} of the picture's side, outside of it: is unit={unit} right? "
                f"({', '.join(UNITS)})"
            )
        return min(max(value, 0.0), 1.0)

    def scaled(frame: float, points: list[tuple]) -> list[tuple]:
        width, height = size(frame)
        return [(*name, fraction(x, width), fraction(y, height)) for *name, x, y in points]

    for branch in example.branches:
        if isinstance(branch, Pointing):
            branch.points = [(frame, scaled(frame, points)) for frame, points in branch.points]
        elif isinstance(branch, Tracking):
            branch.frames = [(seconds, scaled(seconds, objects)) for seconds, objects in branch.frames]
        else:
            messages = branch if isinstance(branch, list) else branch.messages if isinstance(branch, Chat) else []
            for entry in (from_json(entry) for message in messages for entry in message.points):
                if unit != "fraction":
                    raise ValueError("points of messages are fractions: leave out unit")
                if (isinstance(entry, Points) and entry.kind == "image") == bool(example.video):
                    raise ValueError("points of a message are of an image, and the sample has a video, or the reverse")
                for frame, points in entry.groups if isinstance(entry, Points) else entry.frames:
                    scaled(frame, points)


def check_rates(example: Example) -> None:
    """Have frames where the tracks are. ValueError: the video has none there."""
    video, tracks = example.video, [branch for branch in example.branches if isinstance(branch, Tracking)]
    if tracks and video.annotation_fps is None:
        video.annotation_fps = min(task.fps for task in tracks)
    if video.annotation_fps is not None:
        annotation_times(video.seconds, 1, video.annotation_fps, video.fps)


def check_answers(example: Example) -> None:
    """ValueError: a branch cannot be asked in one of its styles, or an answer is empty."""
    for branch in example.branches:
        styles = getattr(branch, "style", None)
        if styles == []:
            raise ValueError("style is an empty list")
        for style in styles if isinstance(styles, list) else [styles]:
            styled = branch if isinstance(branch, list) else replace(branch, style=style)
            [talk] = converse(replace(example, branches=[styled]), np.random.default_rng(0), "templates")
            answers = [render_content(m.content, m.points) for m in talk.messages if m.role == "assistant"]
            if not all(answer.strip() for answer in answers):
                raise ValueError("an answer is empty")
            if isinstance(branch, Tracking) and NO_TRACKS in answers:
                raise ValueError(f"no track is at a multiple of 1 / fps = {1 / branch.fps:g} seconds")


def without_nothing(value):
    """Without the keys that say nothing: null, and multi_turn 0."""
    if isinstance(value, dict):
        return {k: without_nothing(v) for k, v in value.items() if v is not None and (k, v) != ("multi_turn", 0)}
    return [without_nothing(item) for item in value] if isinstance(value, list | tuple) else value


def excerpt(path: Path, start: float, end: float) -> tuple[bytes, str, float] | None:
    """The part of a video file that shows it from `start` to `end` (seconds after its first frame), not encoded anew.

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
