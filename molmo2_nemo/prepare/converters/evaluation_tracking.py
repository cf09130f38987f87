"""Tracks with masks, one frame a second, of conf/evaluations.yaml. Columns and rules: allenai/molmo2 at f3cb108,
olmo/data/academic_video_track_datasets.py.

Points are read as those of training (tracking.py). There is a mask for each frame of a video, in their order, a picture
or a run-length mask of COCO; those of frames without points are left out.
"""

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.prepare.converters import tracking
from molmo2_nemo.prepare.converters.common import Converter, Draft, Drop, find, find_all, more, read_json, together
from molmo2_nemo.prepare.converters.evaluation import TRACK_FPS, region

# (row, frame number) -> the masks of the objects in the row's mask_id, in their order; None: no mask.
Masks = Callable[[dict, int], list]


def rows(raw: RawSource, split: str | None, masks: Callable[[RawSource], Masks]) -> Iterator[dict]:
    masks_of = masks(raw)
    for row in tracking.rows("track")(raw, split):
        yield more(row, masks_of=masks_of)


def tracks(row: dict) -> Iterator[Draft | Drop]:
    """A query at TRACK_FPS, with masks; there are rows of it at other rates, too."""
    if row["sampling_fps"] != TRACK_FPS:
        yield Drop(f"a query at {row['sampling_fps']:g} frames a second; at {TRACK_FPS} it is scored")
        return
    fps = row["fps"]
    step, masks = max(1, round(fps / TRACK_FPS)), {str(name): [] for name in row["mask_id"]}
    for number in sorted({int(frame["frame"]) for frame in row["frame_trajectories"]}):
        if number % step == 0:
            for kept, mask in together(masks.values(), row["masks_of"](row, number)):
                if mask is not None:
                    kept.append((number / fps, mask))
    for draft in tracking.tracks(row):
        if isinstance(draft, Draft):
            draft.branches[0]["regions"] = [region(found, name) for name, found in masks.items() if found]
            draft.tree = None
        yield draft


def mevis(raw: RawSource) -> Masks:
    """Run-length masks by annotation, of each object of a query one."""
    stored = read_json(find(raw, "valid_u/mask_dict.json"))

    def masks_of(row: dict, number: int) -> list:
        return [_at(stored[str(annotation)], number) for annotation in row["anno_id"]]

    return masks_of


def white(raw: RawSource, folder: Callable[[dict], str]) -> Masks:
    """Pictures in which the one object of a query is white."""
    pictures = _pictures(raw)

    def masks_of(row: dict, number: int) -> list:
        file = _at(_of_folder(pictures, folder(row)), number)
        return [None if file is None else _opened(file, "RGB").min(2) >= 255]

    return masks_of


def numbered(raw: RawSource) -> Masks:
    """Pictures whose pixels are the numbers of objects, of a whole video."""
    pictures = _pictures(raw)

    def masks_of(row: dict, number: int) -> list:
        file = _at(_of_folder(pictures, f"Annotations/480p/{row['video']}"), number)
        seen = None if file is None else _opened(file)
        return [None if seen is None else seen == int(name) for name in row["obj_id"]]

    return masks_of


def _pictures(raw: RawSource) -> dict[str, list[Path]]:
    """The PNG files below the raw folder by their folder, in the order of their names."""
    found: dict[str, list[Path]] = {}
    for path in find_all(raw, "*.png"):
        found.setdefault(path.parent.relative_to(raw.folder).as_posix(), []).append(path)
    return {folder: sorted(paths) for folder, paths in found.items()}


def _of_folder(pictures: dict[str, list[Path]], name: str) -> list[Path]:
    """ValueError: no folder ends with the name, or several do."""
    found = [paths for folder, paths in pictures.items() if f"/{folder}".endswith(f"/{name}")]
    if len(found) != 1:
        raise ValueError("several folders have its masks" if found else "its masks are not on disk")
    return found[0]


def _opened(file: Path, mode: str | None = None) -> np.ndarray:
    """Pixels of a mask, in a mode of Pillow, without regard to transparency; None: numbers of colours. ValueError."""
    data = file.read_bytes()
    read_image(data)  # for its limits and its sentences
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if mode is None and image.mode not in ("P", "L"):
            raise ValueError("a mask without numbers of objects")
        return np.array(image.convert(mode) if mode else image)


def _at(items: list, number: int):
    return items[number] if number < len(items) else None


CONVERTERS = {
    "mevis-valid-u": Converter(tracks, partial(rows, masks=mevis)),
    "ref-youtube-vos-valid": Converter(
        tracks,
        partial(rows, masks=partial(white, folder=lambda row: f"valid/Annotations/{row['video']}/{row['qid']}")),
    ),
    "ref-davis17-valid": Converter(tracks, partial(rows, masks=numbered)),
    "reasonvos": Converter(
        tracks, partial(rows, masks=partial(white, folder=lambda row: f"Annotations/{row['anno_id'][0]}"))
    ),
}
