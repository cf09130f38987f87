"""Objects followed through videos: rows with `frame_trajectories` in pixels."""

import math
from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.catalogue.raw import RawSource, read_rows
from molmo2_nemo.prepare.converters.common import Clip, Converter, Draft, Drop, Rows, video_names

# The configuration of a repository, that is the folder of its files, decides what is asked.
STYLES = {
    "track": "video_point_track_per_frame",
    "ground": "video_point_ground_start_end",
    "single_point_track": "video_single_point_track_per_frame",
}
# Queries of one video at one rate share a sample, so that the video is stored once. They are few: answers are long.
MAX_BRANCHES = 8


def rows(fixed: str | None = None, config: str | None = None) -> Rows:
    """Rows with `task`, a key of STYLES: it is `fixed`, or found in the name of the folder or file.

    config: of a repository with a configuration for each data set, the only one to read.
    """

    def read(raw: RawSource, split: str | None) -> Iterator[dict]:
        left = raw.info.get("limit")
        for path in raw.files(split):
            words = _words(path.relative_to(raw.folder))
            task = fixed or next((name for name in reversed(STYLES) if name in words), None)
            if config and config not in words and any(other in words for other in SINGLE_OBJECT.values()):
                continue
            for row in read_rows(path):
                if left == 0:
                    return
                left = None if left is None else left - 1
                yield row | {"task": task}

    return read


def _words(path: Path) -> set[str]:
    """Folders of a path and parts of its name: single_point_track/train-0.parquet, data/track_train.jsonl."""
    stem = path.stem
    return {*path.parts[:-1], stem, stem.split("-")[0], *(name for name in STYLES if stem.startswith(f"{name}_"))}


def tracks(row: dict) -> Iterator[Draft | Drop]:
    """One query. Occluded points are left out, and so are points between the frames at the rate of the annotations."""
    width, height = float(row["width"]), float(row["height"])
    if not (width > 0 and height > 0):
        raise ValueError("a width or height that is not above 0")
    fps, frames = float(row["sampling_fps"]), []
    for frame in row["frame_trajectories"]:
        objects = [
            [str(point["id"]), float(point["point"][0]) / width, float(point["point"][1]) / height]
            for point in frame["points"]
            if not point.get("occluded") and point.get("point")
        ]
        if not all(math.isfinite(value) for _, *pair in objects for value in pair):
            raise ValueError("a coordinate is no number")
        if objects:
            frames.append([float(frame["time"]), objects])
    label = str(row["expression"] or "").strip()
    if not label:
        raise ValueError("no expression")
    if not frames:
        yield Drop("nothing is visible in any frame")
        return
    style = STYLES[row["task"]] if row.get("task") else list(STYLES.values())
    task = {"task": "tracking", "label": label, "frames": frames, "fps": fps, "style": style}
    yield Draft([task], video=_video(row, fps), tree=f"{fps:g}")


def _video(row: dict, fps: float) -> Clip:
    """Times count from the start of the clip, if there is one."""
    source = row.get("video_dataset")
    names = [f"{source}/{row['video']}", row["video"]] if source else [row["video"]]
    video = Clip(
        [candidate for name in names for candidate in video_names(name)],
        frames=names,
        fps=float(row["fps"]),
        annotation_fps=fps,
    )
    if row.get("clip"):
        clips = [f"{source}/{row['clip']}", row["clip"]] if source else [row["clip"]]
        video.cut = [candidate for name in clips for candidate in video_names(name)]
        if row.get("end_frame") is not None:
            video.start = float(row["start_frame"] or 0) / float(row["fps"])
            video.end = float(row["end_frame"]) / float(row["fps"])
    return video


# Data set -> configuration of allenai/molmo2-single-object-track.
SINGLE_OBJECT = {
    "trackingnet": "trackingnet",
    "vasttrack": "vasttrack",
    "got10k": "got10k",
    "webuav": "webuav",
    "lasot": "lasot",
    "tnl2k": "tnl2k",
    "webuot": "webuot",
    "lvos-v2": "lvosv2",
    "lvos-v1": "lvosv1",
    "latot": "latot",
    "uw-cot220": "uwcot",
    "tnllt": "tnnlt",
}
SEVERAL_TASKS = ("Molmo2-VideoTrack", "mevis", "vicas", "revos", "lv-vis", "burst", "moca")
TRACK_ALONE = ("refvos", "ref-davis17", "youtube-vis")
CONVERTERS = {
    **{name: Converter(tracks, rows(), MAX_BRANCHES) for name in SEVERAL_TASKS},
    **{name: Converter(tracks, rows("track"), MAX_BRANCHES) for name in TRACK_ALONE},
    **{
        name: Converter(tracks, rows("single_point_track", config), MAX_BRANCHES)
        for name, config in SINGLE_OBJECT.items()
    },
}
