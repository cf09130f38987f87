"""COCO's annotations: boxes and keypoints as points, captions as captions.

The format: https://cocodataset.org/#format-data, and cocodataset/cocoapi. Label Studio, CVAT, Roboflow and others
export it. Coordinates are in pixels of `width` and `height`; `bbox` is [left, top, width, height]; `keypoints` are x, y
and v by turns, v = 0 not annotated, 1 hidden, 2 visible, named by the category's `keypoints`.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from molmo2_nemo.catalogue.raw import json_items
from molmo2_nemo.prepare.formats.line import Row

# A box's answer says where, where and how many, or how many.
STYLES = ["pointing", "point_count", "counting"]
CROWD = "boxes around a crowd (iscrowd), so things of this kind are left out of that picture"
UNNAMED = "keypoints of a picture in which some objects have none annotated, left out"


def is_coco(document) -> bool:
    return isinstance(document, dict) and isinstance(document.get("images"), list) and "annotations" in document


def rows(file: Path, number: int) -> Iterator[Row]:
    """A row for each image. number: of the first. ValueError: the file is not in the format."""
    try:
        categories = {c["id"]: (str(c["name"]), c.get("keypoints") or []) for c in _items(file, "categories")}
        found = defaultdict(list)
        for annotation in json_items(file, "annotations"):
            found[annotation["image_id"]].append(
                (
                    annotation.get("category_id"),
                    annotation.get("bbox"),
                    annotation.get("keypoints"),
                    bool(annotation.get("iscrowd")),
                    annotation.get("caption"),
                )
            )
        for image in json_items(file, "images"):
            name = image["file_name"]
            branches, notes = _branches(found.pop(image["id"], []), categories)
            document = {"image": name, "unit": "pixels", "branches": branches}
            sizes = {name: (image["width"], image["height"])} if {"width", "height"} <= image.keys() else {}
            yield Row(f'image "{name}"', number, document, "coco", sizes, notes)
            number += 1
    except KeyError as error:
        raise ValueError(f"{file} is no file of COCO: an entry lacks {error}") from error
    if found:
        raise ValueError(f"{file} has annotations of image_id={next(iter(found))!r}, which is none of its images")


def _items(file: Path, key: str) -> list[dict]:
    """The items under a key; captions have no categories."""
    try:
        return list(json_items(file, key))
    except ValueError:
        return []


def _branches(annotations: list[tuple], categories: dict) -> tuple[list[dict], list[str]]:
    centres, keypoints, crowds, unnamed = defaultdict(list), defaultdict(list), set(), set()
    for category, box, points, is_crowd, _ in annotations:
        if category is None:
            continue
        if category not in categories:
            raise ValueError(f"an annotation has category_id={category!r}, which is none of the categories")
        label, names = categories[category]
        if is_crowd:
            crowds.add(label)
        if box:
            left, top, width, height = box
            centres[label].append([left + width / 2, top + height / 2])
        if names and points and any(points[2::3]):
            for name, x, y, seen in zip(names, points[::3], points[1::3], points[2::3]):
                if seen == 2:
                    keypoints[label, name].append([x, y])
        elif names:
            unnamed.add(label)
    boxes = [(label, points) for label, points in centres.items() if label not in crowds]
    parts = [(name, points) for (label, name), points in keypoints.items() if label not in crowds | unnamed]
    branches = [
        {"task": "pointing", "label": label.replace("_", " "), "points": points, "style": STYLES}
        for label, points in boxes + parts
    ]
    if captions := [caption.strip() for *_, caption in annotations if caption]:
        branches.append({"task": "caption", "text": captions, "style": "short_caption"})
    notes = [CROWD] * bool(crowds) + [UNNAMED] * bool(unnamed - crowds and keypoints)
    return branches, notes
