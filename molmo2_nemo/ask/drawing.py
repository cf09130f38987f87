"""The points and tracks of an answer, drawn onto its pictures (PNG) or onto its video (PNG of frames, or MP4)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from molmo2_nemo.ask.model import Seen
from molmo2_nemo.data.marks import LEAST_HOLD, MARKED_SIDE, ROUNDED, Answer, draw_marks, marks_at, paths_of, read_answer
from molmo2_nemo.data.video import list_frames, pick_frames, write_video

SUFFIXES = (".png", ".mp4")
GAP = 12  # pixels between pictures
# Of the shorter side of a picture: how large a mark is.
MARK_SHARE = 1 / 70
# A sheet has this many frames at most, each of this width in pixels.
SHEET_FRAMES, SHEET_WIDTH = 16, 480
MIN_FPS, MAX_FPS = 1 / LEAST_HOLD, 30  # of a video that is written


def check_target(out: Path, has_video: bool) -> None:
    """ValueError, one sentence: nothing can be drawn into a file of this name."""
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--draw {out}: give it the ending {' or '.join(SUFFIXES)}")
    if out.suffix.lower() == ".mp4" and not has_video:
        raise ValueError(f"--draw {out}: an MP4 is drawn of a video; give it the ending .png")
    if not out.parent.is_dir():
        raise ValueError(f"--draw {out}: there is no folder {out.parent}")


def draw(text: str, seen: Seen, video: Path | None, out: Path) -> tuple[int, list[str]]:
    """Draw the points of the answer `text`; what has none is drawn without any.

    video: the file that `seen` is of. Returns the number of points that are drawn, and a phrase for each kind of those
    that are not. OSError: `out` cannot be written.
    """
    answer = read_answer(text, seen.visuals, float("inf") if video is None else seen.duration)
    drawn, left_out = len(answer.marks), []
    if answer.num_outside:
        reason = (
            f"of pictures that were not given, which are {len(seen.pictures)}"
            if video is None
            else f"after the video's end at {seen.duration:.1f} s"
        )
        left_out.append(f"{answer.num_outside} left out, {reason}")
    if out.suffix.lower() == ".mp4":
        fps = _fps(list_frames(video).seconds)
        write_video(_video_with_marks(text, seen, video.read_bytes(), fps), fps, out)
    elif video is None:
        _side_by_side([_picture(picture, answer, number) for number, picture in enumerate(seen.pictures)]).save(out)
    else:
        shown = _frames_of_sheet(answer, seen)
        _sheet(answer, seen, shown, video.read_bytes()).save(out)
        drawn = sum(mark.visual in shown for mark in answer.marks)
        if drawn < len(answer.marks):
            reason = f"on frames beyond the {SHEET_FRAMES} of a sheet: an .mp4 has all"
            left_out.append(f"{len(answer.marks) - drawn} left out, {reason}")
    return drawn, left_out


def _picture(picture: np.ndarray, answer: Answer, visual: int) -> Image.Image:
    """With marks that can be seen at its size."""
    scale = max(1, round(MARKED_SIDE / max(picture.shape)))  # of draw_marks
    radius = max(5, round(min(picture.shape[:2]) * scale * MARK_SHARE))
    return draw_marks(picture, answer, visual, mark_radius=radius, font_size=3 * radius)


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """At the height of the lowest, from left to right."""
    height = min(picture.height for picture in pictures)
    scaled = [
        p.resize((max(1, round(p.width * height / p.height)), height)) if len(pictures) > 1 else p for p in pictures
    ]
    sheet = Image.new("RGB", (sum(p.width for p in scaled) + GAP * (len(scaled) - 1), height), "white")
    left = 0
    for picture in scaled:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP
    return sheet


def _frames_of_sheet(answer: Answer, seen: Seen) -> list[int]:
    """Frames with marks, or any where there are none, as many as there is room for."""
    marked = sorted({mark.visual for mark in answer.marks}) or list(range(len(seen.times)))
    if len(marked) > SHEET_FRAMES:
        marked = [marked[i] for i in np.linspace(0, len(marked) - 1, SHEET_FRAMES).round().astype(int)]
    return marked


def _sheet(answer: Answer, seen: Seen, shown: list[int], video: bytes) -> Image.Image:
    """These frames in rows of four, each with its marks and its time."""
    tiles = []
    for visual, frame in zip(shown, pick_frames(video, [seen.times[visual] for visual in shown])):
        tile = _picture(frame, answer, visual)
        tile = tile.resize((SHEET_WIDTH, max(1, round(tile.height * SHEET_WIDTH / tile.width))))
        ImageDraw.Draw(tile).text(
            (8, 6), f"{seen.times[visual]:.1f} s", "white", font_size=20, stroke_width=2, stroke_fill="black"
        )
        tiles.append(tile)
    columns, width, height = min(4, len(tiles)), SHEET_WIDTH + GAP, tiles[0].height + GAP
    sheet = Image.new("RGB", (columns * width - GAP, -(-len(tiles) // columns) * height - GAP), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    return sheet


def _fps(stamps: np.ndarray) -> float:
    """A constant rate for a video with frames at these seconds, at which every point is on a frame."""
    return min(MAX_FPS, max(MIN_FPS, (len(stamps) - 1) / stamps[-1])) if len(stamps) > 1 else MIN_FPS


def _video_with_marks(text: str, seen: Seen, video: bytes, fps: float) -> Iterator[Image.Image]:
    """Frames at a constant rate, the marks of each moment on them."""
    step = float(np.median(np.diff(seen.times))) if len(seen.times) > 1 else LEAST_HOLD
    times = np.arange(max(1, round(seen.duration * fps))) / fps
    paths = paths_of(text)
    for path in paths:  # a point at the video's end is on its last frame
        path.places = [(min(t, times[-1]), x, y) for t, x, y in path.places if t <= seen.duration + ROUNDED]
    paths = [path for path in paths if path.places]
    objects = [(path.number, path.label) for path in paths]
    for time, frame in zip(times, pick_frames(video, times)):
        yield _picture(frame, Answer(text, objects, marks_at(paths, float(time), step)), 0)
