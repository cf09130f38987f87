"""Objects followed through videos: rows with `frame_trajectories` in pixels."""

import math
from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.catalogue.raw import RawSource, read_rows
from molmo2_nemo.prepare.converters.common import (
    Clip,
    Converter,
    Draft,
    Drop,
    Rows,
    find,
    find_all,
    read_json,
    video_names,
)

# The configuration of a repository, that is the folder of its files, decides what is asked.
STYLES = {
    "track": "video_point_track_per_frame",
    "ground": "video_point_ground_start_end",
    "single_point_track": "video_single_point_track_per_frame",
}
# Frames a second in the release of a source of Molmo2-VideoTrack, where the rows have fewer (allenai/molmo2 at f3cb108:
# olmo/data/molmo2_video_track_datasets.py, SAVSource).
SOURCE_FPS = {"sav": 24.0}
# How many frames a second the files of a video have, by its name: a file beside the rows of burst and vicas.
NATIVE_FPS = "video_original_fps.json"
UNLISTED = "an object that its row does not list in mask_id"
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


def at_native_rate(named: Rows, files: bool = False) -> Rows:
    """The same rows with `native_fps`, of their video's name in NATIVE_FPS. ValueError: that file is not there.

    files: also with `files`, the videos on the disk whose names begin with that of the row and an underscore.
    """

    def read(raw: RawSource, split: str | None) -> Iterator[dict]:
        rates, found = read_json(find(raw, NATIVE_FPS)), {}
        for path in find_all(raw, "*.mp4") if files else []:
            found.setdefault(path.stem.split("_")[0], []).append(f"./{path.relative_to(raw.folder)}")
        for row in named(raw, split):
            yield row | {"native_fps": rates.get(row["video"]), "files": found.get(row["video"])}

    return read


def _words(path: Path) -> set[str]:
    """Folders of a path and parts of its name: single_point_track/train-0.parquet, data/track_train.jsonl."""
    stem = path.stem
    return {*path.parts[:-1], stem, stem.split("-")[0], *(name for name in STYLES if stem.startswith(f"{name}_"))}


def tracks(row: dict) -> Iterator[Draft | Drop]:
    """One query. Occluded points are left out, and so are points between the frames at the rate of the annotations.

    So are objects that the row does not list in `mask_id` (allenai/molmo2: olmo/data/academic_video_track_datasets.py,
    _create_message_list): each is counted once.
    """
    width, height = float(row["width"]), float(row["height"])
    if not (width > 0 and height > 0):
        raise ValueError("a width or height that is not above 0")
    fps, frames, unlisted = float(row["sampling_fps"]), [], set()
    listed = {str(name) for name in row["mask_id"]}
    for frame in row["frame_trajectories"]:
        unlisted |= {str(point["id"]) for point in frame["points"]} - listed
        objects = [
            [str(point["id"]), float(point["point"][0]) / width, float(point["point"][1]) / height]
            for point in frame["points"]
            if str(point["id"]) in listed and not point.get("occluded") and point.get("point")
        ]
        if not all(math.isfinite(value) for _, *pair in objects for value in pair):
            raise ValueError("a coordinate is no number")
        if objects:
            frames.append([float(frame["time"]), objects])
    yield from (Drop(UNLISTED) for _ in unlisted)
    if "native_fps" in row and not row["native_fps"]:
        yield Drop(f"its video has no rate in {NATIVE_FPS}")
        return
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
    """Times count from the start of the clip, if there is one; a clip of the video's name is all of it.

    Frames of the row are those of its own rate, `fps`, of which the files may have more (`native_fps`).
    """
    source, own_fps = row.get("video_dataset"), float(row["fps"])
    native = SOURCE_FPS.get(source) or row.get("native_fps")
    frames = [row["video"]]
    if source:
        frames = [f"{source}/{row['video']}", f"{source}/**/{row['video']}", row["video"]]
    if source == "APTv2":  # its folders are DIFFICULTY/CATEGORY/NUMBER
        frames = ["/".join(row["video"].split("_", 2)), *frames]
    video = Clip(
        row.get("files") or [candidate for name in frames for candidate in video_names(name)],
        frames=frames,
        fps=own_fps,
        native_fps=native,
        annotation_fps=fps,
    )
    if row.get("clip") and row["clip"] != row["video"]:
        clips = [f"{source}/{row['clip']}", f"{source}/**/{row['clip']}", row["clip"]] if source else [row["clip"]]
        video.cut = [candidate for name in clips for candidate in video_names(name)]
        if row.get("end_frame") is not None:
            video.start = float(row["start_frame"] or 0) / own_fps
            video.end = float(row["end_frame"] + 1) / own_fps
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
SEVERAL_TASKS = ("Molmo2-VideoTrack", "mevis", "revos", "lv-vis", "moca")
TRACK_ALONE = ("refvos", "ref-davis17", "youtube-vis")
CONVERTERS = {
    **{name: Converter(tracks, rows(), MAX_BRANCHES) for name in SEVERAL_TASKS},
    "burst": Converter(tracks, at_native_rate(rows()), MAX_BRANCHES),
    "vicas": Converter(tracks, at_native_rate(rows(), files=True), MAX_BRANCHES),
    **{name: Converter(tracks, rows("track"), MAX_BRANCHES) for name in TRACK_ALONE},
    **{
        name: Converter(tracks, rows("single_point_track", config), MAX_BRANCHES)
        for name, config in SINGLE_OBJECT.items()
    },
}
