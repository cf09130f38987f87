"""COCO's annotations: boxes and keypoints as points, captions as captions.

The format: https://cocodataset.org/#format-data, and cocodataset/cocoapi. Label Studio, CVAT, Roboflow and others
export it. Coordinates are in pixels of `width` and `height`; `bbox` is [left, top, width, height]; `keypoints` are x, y
and v by turns, v = 0 not annotated, 1 hidden, 2 visible, named by the category's `keypoints`.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

from molmo2_nemo.catalogue.raw import json_items
from molmo2_nemo.prepare.formats.line import Refused, Row

# A box's answer says where, where and how many, or how many.
STYLES = ["pointing", "point_count", "counting"]
CROWD = "boxes around a crowd (iscrowd), so things of this kind are left out of that picture"
NOTHING_READ = "annotations without a box, keypoints or a caption (segmentation is not read), left out"
UNNAMED = "keypoints of a picture in which some objects have none annotated, left out"


class Annotation(NamedTuple):
    """Those keys of an annotation that are read."""

    category_id: int | str | None
    bbox: list | None
    keypoints: list | None
    iscrowd: int | None
    caption: str | None


def is_coco(document) -> bool:
    return isinstance(document, dict) and isinstance(document.get("images"), list) and "annotations" in document


def rows(file: Path, number: int) -> Iterator[Row]:
    """A row for each image, then one for each mistake outside of them. number: of the first.

    Ids may be numbers or texts. ValueError: the file is not in the format.
    """
    try:
        categories = {str(c["id"]): (str(c["name"]), c.get("keypoints") or []) for c in _items(file, "categories")}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no file of COCO: a category lacks {error}") from error
    found: dict[str, list[Annotation]] = defaultdict(list)
    numbers, strays, seen = count(number), [], set()
    for k, annotation in enumerate(json_items(file, "annotations"), 1):
        if isinstance(annotation, dict) and "image_id" in annotation:
            found[str(annotation["image_id"])].append(Annotation(*map(annotation.get, Annotation.__annotations__)))
        else:
            strays.append((f"annotation {k}", "it has no image_id"))
    for k, image in enumerate(json_items(file, "images"), 1):
        if not isinstance(image, dict) or not {"id", "file_name"} <= image.keys():
            yield Row(f"image {k}", next(numbers), Refused(["it is no object with id and file_name"], "coco"))
            continue
        name, key, notes = str(image["file_name"]), str(image["id"]), []
        try:
            if key in seen:
                raise ValueError(f"its id {key} is that of another image, too: give each its own")
            seen.add(key)
            branches = _branches(found.pop(key, []), categories, notes)
        except ValueError as error:
            yield Row(f'image "{name}"', next(numbers), Refused([str(error)], "coco"))
            continue
        document = {"image": name, "unit": "pixels", "branches": branches}
        size = (image.get("width"), image.get("height"))
        sizes = {name: size} if all(isinstance(side, int | float) for side in size) else {}
        yield Row(f'image "{name}"', next(numbers), document, "coco", sizes, notes)
    for key, annotations in found.items():
        problem = f"image_id={key} is none of the images, and {len(annotations):,} annotations have it"
        strays.append((f"annotation of image_id={key}", problem))
    for place, problem in strays:
        yield Row(place, next(numbers), Refused([problem], "coco"))


def _items(file: Path, key: str) -> list[dict]:
    """The items under a key; captions have no categories."""
    try:
        return list(json_items(file, key))
    except ValueError:
        return []


def _branches(annotations: list[Annotation], categories: dict, notes: list[str]) -> list[dict]:
    """The tasks of an image. Adds what is left out to `notes`. ValueError: an annotation cannot be read."""
    centres, keypoints, crowds, unnamed = defaultdict(list), defaultdict(list), set(), set()
    for annotation in annotations:
        category, box, points = annotation.category_id, annotation.bbox, annotation.keypoints
        if category is None:
            notes += [NOTHING_READ] * (not annotation.caption)
            continue
        if str(category) not in categories:
            raise ValueError(f"an annotation has category_id={category!r}, which is none of the categories")
        label, names = categories[str(category)]
        if not label.strip():
            raise ValueError(f"the category {category!r} has an empty name")
        if annotation.iscrowd:
            crowds.add(label)
        if box:
            left, top, width, height = _numbers("bbox", box, 4)
            centres[label].append([left + width / 2, top + height / 2])
        if names and points and any(_numbers("keypoints", points, 3 * len(names))[2::3]):
            for name, x, y, seen in zip(names, points[::3], points[1::3], points[2::3]):
                if seen == 2:
                    keypoints[label, name].append([x, y])
        elif names:
            unnamed.add(label)
        elif not box:
            notes.append(NOTHING_READ)
    boxes = [(label, points) for label, points in centres.items() if label not in crowds]
    parts = [(name, points) for (label, name), points in keypoints.items() if label not in crowds | unnamed]
    branches = [
        {"task": "pointing", "label": label.replace("_", " "), "points": points, "style": STYLES}
        for label, points in boxes + parts
    ]
    if captions := [str(annotation.caption).strip() for annotation in annotations if annotation.caption]:
        branches.append({"task": "caption", "text": captions, "style": "short_caption"})
    notes += [CROWD] * bool(crowds) + [UNNAMED] * bool(unnamed - crowds and keypoints)
    return branches


def _numbers(key: str, values, wanted: int) -> list:
    if not isinstance(values, list) or len(values) != wanted or any(type(v) not in (int, float) for v in values):
        raise ValueError(f"an annotation has {key} = {json.dumps(values, default=repr)[:60]}, not {wanted} numbers")
    return values
