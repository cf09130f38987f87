"""When to look at a video, and the frames on screen at those times."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter
from PIL import Image

from molmo2_nemo import limits

# Seconds: a frame counts as on screen this long before its time stamp (stamps are rounded to the stream's time base).
TOLERANCE = 1e-6
# Frames a second of videos with tracks (molmo2: the cap of the sampler's candidates).
MAX_TRACKING_FPS = 10
# What is left of a file that was cut off is used if it is this share of what the file's index promises.
WHOLE = 0.9
# Containers that say at their beginning how long they are, by FFmpeg's names.
INDEXED = {"mp4", "mov", "avi", "matroska", "webm", "flv", "asf"}
# Frames a second of a stream that names no rate (what FFmpeg takes, too).
UNTIMED_FPS = 25
# A bare stream that names more has the ticks of its clock for a rate, 1,000 or 90,000 a second.
MOST_UNTIMED_FPS = 300


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


def annotation_times(
    duration: float,
    max_frames: int,
    annotation_fps: float,
    video_fps: float | None = None,
    marks: Sequence[float] = (),
) -> list[float]:
    """Seconds from the start of a video at which to look so that annotations at `annotation_fps` stay aligned.

    Multiples of 1 / `annotation_rate` below `duration`, at most `max_frames`: a longer video is cut, never sampled
    more thinly (Molmo2's sampler mode `fps`). ValueError: as of `annotation_rate`.
    """
    times = np.arange(max_frames) / annotation_rate(duration, max_frames, annotation_fps, video_fps, marks)
    return times[times < duration].tolist() or [0.0]


def annotation_rate(
    duration: float, max_frames: int, annotation_fps: float, video_fps: float | None, marks: Sequence[float] = ()
) -> float:
    """Frames a second: the highest of the candidates at which max_frames still reach `duration`, or else the lowest.

    Candidates: multiples of annotation_fps, up to 10, that divide the video's (Molmo2's sampler mode `fps`); only those
    that have a frame at each of the `marks`, if there are such. ValueError: annotation_fps does not divide video_fps.
    """
    if not 0 <= duration < float("inf"):
        raise ValueError(f"The duration of a video must be seconds, not {duration}.")
    if max_frames < 1 or not annotation_fps > 0:
        raise ValueError(
            f"A video needs max_frames >= 1 and annotation_fps > 0, not {max_frames} and {annotation_fps}."
        )
    if video_fps is None:
        return annotation_fps
    if not _divides(annotation_fps, video_fps):
        raise ValueError(f"annotation_fps={annotation_fps} does not divide the video's {video_fps} frames a second.")
    multiples = [annotation_fps * k for k in range(1, int(MAX_TRACKING_FPS / annotation_fps) + 1)]
    candidates = [fps for fps in multiples if _divides(fps, video_fps)]
    candidates = [fps for fps in candidates if all(is_multiple(mark, fps) for mark in marks)] or candidates
    reaching = (fps for fps in candidates if max_frames / fps >= duration)
    return max(reaching, default=min(candidates, default=annotation_fps))


def is_multiple(seconds: float, fps: float) -> bool:
    """Whether there is a frame at this time, at so many frames a second."""
    return abs(seconds * fps - round(seconds * fps)) < 0.01 * max(1.0, fps)


def _divides(fps: float, video_fps: float) -> bool:
    """Whether video_fps is a multiple of fps, 29.97 counting as 30."""
    return round(video_fps / fps) >= 1 and abs(video_fps / fps / round(video_fps / fps) - 1) < 0.002


class IsPicture(ValueError):
    """The file is a picture, which FFmpeg would take for a video of one frame."""


@dataclass
class Listing:
    """What a video file says of its frames, without any of them decoded."""

    packets: list["_Packet"]  # in the order of decoding
    stamps: np.ndarray  # int64 [frames], ascending: when each frame is shown, in units of `unit` seconds
    unit: float
    is_stamped: bool  # False: frames come without stamps, and are those of `stamps` in their order
    fps: float | None  # that the file names

    @property
    def seconds(self) -> np.ndarray:
        """When each frame is shown, after the first: float64 [frames]."""
        return (self.stamps - self.stamps[0]) * self.unit


def list_frames(video: bytes | Path, num_frames: int | None = None) -> Listing:
    """The frames of a video file. Reads all of it.

    num_frames: what other metadata promise of the whole file. ValueError: the file is no video that FFmpeg reads, has
    frames of an unreasonable size or none, or was cut off: more than a tenth is missing of what its index, or
    num_frames, promises.
    """
    with _open(video) as container:
        stream = container.streams.best("video")
        packets, reached = [], 0.0  # seconds, of any stream
        for packet in _packets(container, [stream, *container.streams.audio]):
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is not None and not packet.is_corrupt:
                reached = max(reached, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.stream is stream:
                packets.append(packet)
        fps = stream.average_rate or stream.guessed_rate
        # Half a packet at the end of a file that was cut off.
        while packets and packets[-1].is_corrupt:
            packets.pop()
        is_untimed = all(packet.pts is None and packet.dts is None for packet in packets)
        listed = [_Packet.of(packet) for packet in packets]
        if is_untimed:  # a bare stream, such as raw H.264, of which FFmpeg's reader says 25 whatever its headers say
            named = stream.codec_context.framerate
            fps = named if named and named <= MOST_UNTIMED_FPS else fps or UNTIMED_FPS
            unit = float(1 / Fraction(fps))
            listed = [_Packet(number, False, packet.is_key, True) for number, packet in enumerate(listed)]
        else:
            unit = float(stream.time_base)
        stamps = np.array(sorted(packet.stamp for packet in listed if packet.shown), dtype=np.int64)
        if not len(stamps):
            raise ValueError("The video holds no frame with a time stamp.")
        if num_frames is not None and len(stamps) < WHOLE * num_frames:
            raise ValueError(f"The video ends after {len(stamps)} of {num_frames} frames.")
        if not is_untimed:
            _check_length(container, stream, len(packets), float(stamps[0]) * unit, reached)
    # Frames of AVI and of files without presentation times are stamped in the order in which they come out.
    is_stamped = container.format.name != "avi" and all(packet.stamped for packet in listed)
    return Listing(listed, stamps, unit, is_stamped, float(fps) if fps else None)


def _check_length(
    container: av.container.InputContainer, stream: av.VideoStream, count: int, first: float, reached: float
) -> None:
    """ValueError: the file was cut off, by its own index. first, reached: seconds of its first frame and its very end.

    Frames alone do not tell: the index of a video that was trimmed by an edit list has all those of the original.
    """
    if not INDEXED & set(container.format.name.split(",")):
        return
    if stream.duration is not None:
        end = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    else:  # Matroska and FLV count it from 0, wherever the first frame is
        end = (container.duration or 0) / av.time_base
    if reached - first < WHOLE * (end - first) and (not stream.frames or count < WHOLE * stream.frames):
        ratio = f"{reached - first:.1f} of {end - first:.1f} seconds"
        raise ValueError(f"The video ends after {f'{count} of {stream.frames} frames' if stream.frames else ratio}.")


def pick_frames(
    video: bytes, times: Sequence[float], num_frames: int | None = None, start: float = 0.0
) -> Iterator[np.ndarray]:
    """The frames on screen at ascending `times` (seconds after `start`): uint8 [H, W, 3], one for each time.

    `start`: seconds after the first frame, where a clip begins. Works on presentation time stamps, so variable frame
    rates and late starts are right; a time past the end gives the last frame. Frames are turned and mirrored as they
    are displayed. What no wanted frame needs is not decoded. Instead of a frame that cannot be decoded comes the one
    before it. ValueError: as of `list_frames`, or more than a tenth of the wanted frames cannot be decoded.
    """
    listing = list_frames(video, num_frames)
    indices = np.searchsorted(listing.seconds, np.asarray(times) + start + TOLERANCE, side="right") - 1
    wanted = listing.stamps[np.maximum(indices, 0)].tolist()
    if listing.is_stamped:
        needed, picked = _needed(listing.packets, set(wanted))
        frames = ((frame.pts, frame) for frame in _decode(video, needed, picked) if frame.pts is not None)
    else:
        every = np.ones(len(listing.packets), dtype=bool)
        frames = zip(listing.stamps.tolist(), _decode(video, every, every))
    yield from _match(frames, wanted)


class _Packet(NamedTuple):
    stamp: int | None  # of presentation, in the stream's time base
    stamped: bool  # False: `stamp` is the time of decoding, or a number
    is_key: bool
    shown: bool

    @classmethod
    def of(cls, packet: av.Packet) -> "_Packet":
        stamp = packet.dts if packet.pts is None else packet.pts
        return cls(stamp, packet.pts is not None, packet.is_keyframe, stamp is not None and not packet.is_discard)


def _packets(container: av.container.InputContainer, streams: Sequence[av.stream.Stream]) -> Iterator[av.Packet]:
    """In the order of the file."""
    try:
        yield from (packet for packet in container.demux(streams) if packet.size)
    except av.FFmpegError as error:
        raise ValueError(f"The video cannot be read: {error}.") from error


def _needed(packets: Sequence[_Packet], wanted: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """By packet (bool): must it be decoded, and is it a wanted frame. Those from a wanted one's key frame on must."""
    needed, picked = np.zeros((2, len(packets)), dtype=bool)
    keys = []
    for index, packet in enumerate(packets):
        if packet.is_key:
            keys.append(index)
        if packet.stamp in wanted:
            # A frame shown before the last key frame but stored after it may refer to what came before both.
            begin = next((key for key in reversed(keys) if packets[key].stamp <= packet.stamp), 0)
            needed[begin : index + 1] = picked[index] = True
    return needed[: picked.nonzero()[0].max(initial=-1) + 1], picked


def _decode(video: bytes, needed: np.ndarray, picked: np.ndarray) -> Iterator[av.VideoFrame]:
    """The readable frames of the needed packets, in the order of presentation. Not all those not picked come out."""
    with _open(video) as container:
        stream = container.streams.best("video")
        # Workers are many and forked: a threaded decoder or scaler would oversubscribe, or hang after a fork.
        stream.thread_type = "NONE"
        codec = stream.codec_context
        codec.options = {"max_pixels": str(limits.MAX_FRAME_PIXELS)}
        try:
            codec.open()  # libdav1d heeds what skip_frame says at this moment, and ever after
        except av.FFmpegError as error:
            raise ValueError(f"The video cannot be decoded: {error}.") from error
        skipped = False
        for is_needed, is_picked, packet in zip(needed.tolist(), picked.tolist(), _packets(container, [stream])):
            if not is_needed:
                skipped = True
                continue
            if skipped:
                yield from _frames(codec, None)
                codec.flush_buffers()
                skipped = False
            # Frames that no other frame refers to are left out.
            codec.skip_frame = "DEFAULT" if is_picked else "NONREF"
            yield from _frames(codec, packet)
        yield from _frames(codec, None)


def _frames(codec: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
    try:
        return [frame for frame in codec.decode(packet) if not frame.is_corrupt]
    except av.FFmpegError:  # a broken packet: its frame will be missed if it is wanted
        return []


def _match(frames: Iterator[tuple[int, av.VideoFrame]], wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """For each of the ascending stamps its frame, or the one before it if it is missing."""
    # One of our own: VideoFrame.reformat shares one for each thread of the process, and a forked worker would wait for
    # ever for the threads that this got if anybody converted a frame before the fork.
    reformatter = VideoReformatter()
    missing, before, after, pixels = 0, None, next(frames, None), None
    for stamp in wanted:
        while after is not None and after[0] <= stamp:
            before, after, pixels = after, next(frames, None), None
        missing += before is None or before[0] != stamp
        if missing > 0.1 * len(wanted) or not (before or after):
            raise ValueError("More than a tenth of the wanted frames of the video cannot be decoded.")
        if pixels is None:
            pixels = _rgb((before or after)[1], reformatter)
        yield pixels


def _open(video: bytes | Path) -> av.container.InputContainer:
    try:
        # No file may have others opened, as lists of files do.
        container = av.open(
            str(video) if isinstance(video, Path) else io.BytesIO(video), options={"protocol_whitelist": "file"}
        )
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"The video cannot be opened: {reason}.") from error
    stream, problem = container.streams.best("video"), None
    if container.format.name == "ico" or container.format.name.endswith("_pipe"):  # FFmpeg's readers of pictures
        container.close()
        raise IsPicture("The file is a picture, not a video.")
    if stream is None:
        problem = "The file holds no video stream."
    elif container.format.name == "mjpeg" and not _begins_with_jpeg(video):  # found inside of a PDF, for instance
        problem = "The file is no video, although there is a JPEG picture in it."
    elif stream.codec_context is None:
        problem = "The video's codec is unknown."
    elif stream.width * stream.height > limits.MAX_FRAME_PIXELS:
        size = f"{stream.width} x {stream.height}"
        problem = f"The video's frames are {size} pixels, more than {limits.MAX_FRAME_PIXELS:,}."
    if problem:
        container.close()
        raise ValueError(problem)
    return container


def _begins_with_jpeg(video: bytes | Path) -> bool:
    with video.open("rb") if isinstance(video, Path) else io.BytesIO(video) as file:
        return file.read(2) == b"\xff\xd8"


def _rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """The frame as it is displayed: its display matrix may turn it by quarters and mirror it."""
    if max(component.bits for component in frame.format.components) > 8:
        pixels = _rgb_of_deep(frame)
    else:
        pixels = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    # Rows (a, b, u), (c, d, v), (x, y, w) send a pixel (p, q) to (ap + cq + x, bp + dq + y) (libavutil/display.h).
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _rgb_of_deep(frame: av.VideoFrame) -> np.ndarray:
    """A frame of more than 8 bits a channel, by the filter that FFmpeg's command line and torchcodec use.

    A reformatter interpolates colours of 4:2:0 in another way, which is up to 76 grey levels away at their borders.
    """
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base or Fraction(1, 1000)
    )
    graph.link_nodes(source, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull().to_ndarray()


def write_video(pictures: Iterator[Image.Image], fps: float, out: Path, max_side: int = 1920) -> None:
    """An MP4 of H.264 as browsers play it, of pictures of one size, made smaller if a side has more than max_side."""
    with av.open(str(out), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.pix_fmt = "yuv420p"
        size = None
        for picture in pictures:
            if size is None:
                scale = min(1.0, max_side / max(picture.size))
                size = tuple(max(2, round(side * scale) // 2 * 2) for side in picture.size)  # 4:2:0 wants even sides
                stream.width, stream.height = size
            picture = picture if picture.size == size else picture.resize(size)
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
