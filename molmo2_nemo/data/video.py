"""When to look at a video, and the frames on screen at those times."""

import io
from collections.abc import Iterator, Sequence

import av
import numpy as np

# Seconds: a frame counts as on screen this long before its time stamp (stamps are rounded to the stream's time base).
TOLERANCE = 1e-6


def frame_times(duration: float, max_frames: int, max_fps: float = 2.0) -> list[float]:
    """Seconds from the start of a video, ascending, the last one always `duration` if there are several.

    All multiples of 1 / max_fps below `duration` and `duration` itself while `max_frames` allows, otherwise
    `max_frames` points evenly from 0 to `duration` inclusive (Molmo2's sampler `uniform_last_frame`).
    ValueError: duration is negative or not finite, or max_frames or max_fps is not positive.
    """
    if not 0 <= duration < float("inf"):
        raise ValueError(f"The duration of a video must be seconds, not {duration}.")
    if max_frames < 1 or not max_fps > 0:
        raise ValueError(f"A video needs max_frames >= 1 and max_fps > 0, not {max_frames} and {max_fps}.")
    if (max_frames - 1) / max_fps < duration:
        return np.linspace(0.0, duration, max_frames).tolist()
    return [*(np.arange(np.ceil(duration * max_fps)) / max_fps).tolist(), float(duration)]


def pick_frames(video: bytes, times: Sequence[float], num_frames: int | None = None) -> Iterator[np.ndarray]:
    """The frames on screen at ascending `times` (seconds after the first frame): uint8 [H, W, 3], one for each time.

    Works on presentation time stamps, so variable frame rates and late starts are right; a time past the end gives the
    last frame. One forward pass. `num_frames`: what the metadata promise; ValueError if a tenth of them is missing
    (a truncated file), as well as for a file without a readable video stream.
    """
    try:
        container = av.open(io.BytesIO(video))
    except Exception as error:
        raise ValueError(f"The video cannot be opened: {error}.") from error
    with container:
        if not container.streams.video:
            raise ValueError("The file holds no video stream.")
        stream = container.streams.video[0]
        # Workers are many and forked: a threaded decoder or scaler would oversubscribe, or hang after a fork.
        stream.thread_type = "NONE"
        wanted = list(times)
        start = shown = pixels = None
        decoded = 0
        for frame in _decode(container, stream):
            decoded += 1
            start = frame.time if start is None else start
            while wanted and shown is not None and wanted[0] + TOLERANCE < frame.time - start:
                pixels = _rgb(shown) if pixels is None else pixels
                yield pixels
                wanted.pop(0)
            shown, pixels = frame, None
        if shown is None:
            raise ValueError("The video holds no frame.")
        if num_frames is not None and decoded < 0.9 * num_frames:
            raise ValueError(f"The video ends after {decoded} of {num_frames} frames.")
        pixels = _rgb(shown)
        for _ in wanted:
            yield pixels


def _decode(container, stream) -> Iterator[av.VideoFrame]:
    """Frames in the order of their presentation, those without a time stamp left out."""
    try:
        for frame in container.decode(stream):
            if frame.pts is not None:
                yield frame
    except av.FFmpegError as error:
        raise ValueError(f"The video cannot be decoded: {error}.") from error


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    return frame.reformat(format="rgb24", threads=1).to_ndarray()
