"""Which frames of a video are shown, so that those that its answers are about are among them.

An answer may name only the times that stand before frames, and count only what the frames show. Where a row has room
for all frames of the sampler (video.py), these are shown. Otherwise

- a video with `annotation_fps` is cut, as molmo2 cuts it, but around its points, or to the first of its tracks, if
  its beginning shows none;
- of another video with points a clip is cut out that holds them all, at 2 frames a second, as the clips of at most 63
  seconds in Molmo2-VideoPoint and Molmo2's academic points are (allenai/molmo2: olmo/data/molmo2_datasets.py,
  `sample_random_clip`);
- where no clip can hold them, or a text about the whole video is asked for beside them, the frames of the points take
  the places of others.

tasks.py leaves out of answers what even so is not shown.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from molmo2_nemo.data.points import POINT_FPS, SAME_TIME, Points, from_json, is_same_time, point_time
from molmo2_nemo.data.schema import Chat, Example, Message, Pointing, Tracking, Video
from molmo2_nemo.data.video import annotation_rate, frame_times, is_multiple

# Seconds: a subtitle is shown if a frame is seen while it lasts, or this long before or after.
SUBTITLE_REACH = 1.0


@dataclass(frozen=True)
class Shown:
    """The frames of a video that are shown. `start` and `end` are seconds on the clock of the annotations."""

    times: list[float]  # seconds since `start`, ascending: the stamps before the frames
    start: float
    end: float
    whole: bool = True  # False: a part of the video (or of its clip) is not shown

    def stamp(self, seconds: float) -> float | None:
        """The stamp of the frame that was annotated at `seconds`; None: it is not shown."""
        near = self.nearest(seconds)
        return near if is_same_time(near, seconds - self.start) else None

    def nearest(self, seconds: float) -> float:
        """The stamp that is nearest to the time."""
        seconds -= self.start
        after = bisect_left(self.times, seconds)
        return min(self.times[max(0, after - 1) : after + 1], key=lambda time: abs(time - seconds))

    def covers(self, seconds: float) -> bool:
        """Whether the time is in the part that is shown."""
        return self.whole or self.start - SAME_TIME <= seconds <= self.end + SAME_TIME


@dataclass(frozen=True)
class Annotated:
    """Where a video has points and tracks: ascending seconds."""

    points: list[float]
    tracks: list[float]
    # Nothing is said of the whole video, or of times in it, so that a clip can stand for it.
    can_be_cut: bool


def annotated(example: Example) -> Annotated:
    """Of the tasks and messages of an example with a video. ValueError: an entry is neither points nor tracks."""
    points, tracks, can_be_cut = set(), set(), True
    for branch in example.branches:
        can_be_cut &= isinstance(branch, Pointing | Tracking) and branch.question is None
        if isinstance(branch, Pointing):
            points.update(point_time(seconds) for seconds, group in branch.points if group)
        elif isinstance(branch, Tracking):
            tracks.update(seconds for seconds, group in branch.frames if group and is_multiple(seconds, branch.fps))
        for message in messages_of(branch):
            for entry in map(from_json, message.points):
                if not isinstance(entry, Points):
                    tracks.update(seconds for seconds, group in entry.frames if group)
                elif entry.kind == "video":
                    points.update(point_time(seconds) for seconds, group in entry.groups if group)
    length = example.video.seconds
    return Annotated(*(sorted(min(time, length) for time in times) for times in (points, tracks)), can_be_cut)


def messages_of(branch) -> list[Message]:
    """The messages of a branch that has some."""
    return branch.messages if isinstance(branch, Chat) else branch if isinstance(branch, list) else []


def choose(video: Video, marks: Annotated, frames: int, max_fps: float, place: float) -> Shown:
    """At most `frames` frames. place: from 0 to 1, which of the places that it can have a clip gets.

    ValueError: as of video.frame_times and video.annotation_rate.
    """
    if video.annotation_fps is not None:
        return _at_rate(video, video.annotation_fps, marks, frames, place)
    length, times = video.seconds, frame_times(video.seconds, frames, max_fps)
    shown = Shown(times, 0.0, length)
    if all(shown.stamp(time) is not None for time in [*marks.points, *marks.tracks]):
        return shown
    cut = (frames - 1) / POINT_FPS
    if marks.can_be_cut and not marks.tracks and 0 < cut < length and max_fps >= POINT_FPS:
        first = max(0.0, point_time(marks.points[-1] - cut + 1 / POINT_FPS - 1e-3))
        last = point_time(min(marks.points[0], length - cut))
        if first <= last:
            start = first + int(place * (POINT_FPS * (last - first) + 1)) / POINT_FPS
            return Shown(frame_times(cut, frames, POINT_FPS), start, start + cut, whole=False)
    return Shown(_holding(times, marks, frames), 0.0, length)


def _at_rate(video: Video, fps: float, marks: Annotated, frames: int, place: float) -> Shown:
    """Frames at the rate of the annotations: all, or those of a clip."""
    length = video.seconds
    rate = annotation_rate(length, frames, fps, video.fps, marks.points)
    times = np.arange(frames) / rate
    if frames / rate >= length:
        return Shown(times[times < length].tolist() or [0.0], 0.0, length)
    starts = np.arange(int((length - times[-1]) * fps) + 1) / fps
    starts = starts[starts + times[-1] < length]
    if marks.points:
        starts = np.array([start for start in starts.tolist() if is_multiple(start, POINT_FPS)])
    if not marks.can_be_cut or not len(starts):
        starts = np.zeros(1)
    wanted = np.array(marks.points or marks.tracks)
    inside = np.searchsorted(wanted, starts + times[-1] + SAME_TIME) - np.searchsorted(wanted, starts - SAME_TIME)
    if marks.points:
        best = starts[inside == inside.max()]
        start = float(best[int(place * len(best))])
    else:
        # Two frames, so that an object can be followed from one to the other.
        start = float(starts[np.minimum(inside, 2).argmax()])
    return Shown(times.tolist(), start, min(start + frames / rate, length), whole=False)


def _holding(times: list[float], marks: Annotated, frames: int) -> list[float]:
    """Frames at all points, as far as `frames` allow, and otherwise about where `times` have them.

    So that the frames of the points do not stand out, the others are at multiples of half a second, too.
    """
    last, gap = times[-1], (times[-1] / (len(times) - 1) if len(times) > 1 else 0.0)
    others = times
    if marks.tracks:
        tracks = Shown(marks.tracks, 0.0, last)
        near = [tracks.nearest(time) for time in times[:-1]]
        others = [found if abs(found - time) <= gap / 2 else time for found, time in zip(near, times)]
    elif gap >= 1 / POINT_FPS:
        others = [point_time(time) for time in times[:-1]]
    points = _thinned(marks.points, frames)
    if len(points) == frames:
        return points
    kept, fixed = sorted({*points, *others, last}), {*points, last}
    while len(kept) > frames:
        # Of the others the one without which the smallest gap is left; never the last frame of the video.
        free = [index for index, time in enumerate(kept) if time not in fixed]
        del kept[min(free, key=lambda index: kept[index + 1] - (kept[index - 1] if index else -np.inf))]
    return kept


def _thinned(values: Sequence[float], most: int) -> list[float]:
    """At most so many of the values, evenly among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(index)] for index in np.linspace(0, len(values) - 1, most).tolist()]


def subtitle_text(video: Video, shown: Shown, most_lines: int | None = None) -> str | None:
    """The word subtitle and a line for each subtitle near a frame; "" for a video without subtitles.

    Every line ends with a line break, and the first stands there even if no subtitle is near, as in Molmo2's training
    data (allenai/molmo2: olmo/preprocessing/video_preprocessor.py). None: there are more than `most_lines`.
    """
    if not video.subtitles:
        return ""
    lines, times = ["subtitle"], shown.times
    for start, end, text in video.subtitles:
        start, end = start - shown.start, end - shown.start
        first = bisect_left(times, start - SUBTITLE_REACH)
        if first < len(times) and times[first] <= end + SUBTITLE_REACH:
            # One that lasts as long as the video stands for all that is said, without times.
            lasts = start <= 0 and end >= video.seconds
            lines.append(text if lasts else f"{max(0.0, start):.1f} - {end:.1f} {text}")
            if most_lines is not None and len(lines) > most_lines:
                return None
    return "\n".join([*lines, ""])
