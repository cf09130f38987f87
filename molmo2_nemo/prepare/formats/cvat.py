"""CVAT's exports "CVAT for images 1.1" and "CVAT for video 1.1" (cvat-ai/cvat, site/content/en/docs/manual/advanced/
xml_format.md): points as they are, boxes, ellipses and outlines by the centre of their box, in pixels.

Frame numbers of tracks are those of the video, start_frame + number * frame_step, and every frame of a track is there,
those between keyframes too (cvat/apps/dataset_manager/bindings.py).
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from molmo2_nemo.prepare.formats.coco import STYLES
from molmo2_nemo.prepare.formats.line import Row

SHAPES = ("points", "box", "ellipse", "polygon", "polyline")
UNREAD = ("mask", "cuboid")


def rows(file: Path, number: int) -> Iterator[Row]:
    """A row for each picture, or one for the video. ValueError: the file is not in the format."""
    try:
        root = ElementTree.fromstring(file.read_bytes())
    except ElementTree.ParseError as error:
        raise ValueError(f"{file} is not XML: {error}") from error
    if root.tag != "annotations":
        raise ValueError(f"{file} has <{root.tag}> on top, not <annotations> as an export of CVAT has")
    if (version := root.findtext("version")) not in (None, "1.1"):
        raise ValueError(f"{file} is of version {version} of CVAT's format, and 1.1 is read")
    for image in root.iter("image"):
        labels: dict[str, list] = defaultdict(list)
        for shape in image.iter():
            for point in _points(shape):
                labels[shape.get("label", "")].append(point)
        name = image.get("name", "")
        document = {"image": name, "unit": "pixels", "branches": [_pointing(*item) for item in labels.items()]}
        yield Row(f'image "{name}"', number, document, "cvat", _sizes(name, image.attrib))
        number += 1
    if (tracks := root.findall("track")) and root.find("image") is None:
        name = root.findtext(".//meta//source") or ""
        if not name:
            raise ValueError(f"{file} has tracks and no <source> that names the video: add it to its <task>")
        size = {key: root.findtext(f".//original_size/{key}") or "0" for key in ("width", "height")}
        document = {"video": name, "unit": "pixels", "time_unit": "frames", "branches": _tracking(tracks)}
        yield Row(f'video "{name}"', number, document, "cvat", _sizes(name, size))


def _pointing(label: str, points: list) -> dict:
    return {"task": "pointing", "label": label, "points": points, "style": STYLES}


def _sizes(name: str, size: dict) -> dict[str, tuple[int, int]]:
    width, height = (int(float(size.get(key, 0))) for key in ("width", "height"))
    return {name: (width, height)} if width and height else {}


def _tracking(tracks: list) -> list[dict]:
    labels: dict[str, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    for track in tracks:
        for shape in track.iter():
            for k, point in enumerate(_points(shape)):
                if shape.get("outside") != "1":
                    frame, name = int(shape.get("frame", 0)), track.get("id", "") + (f".{k}" if k else "")
                    labels[track.get("label", "")][frame].append([name, *point])
    return [
        {"task": "tracking", "label": label, "frames": [[frame, frames[frame]] for frame in sorted(frames)]}
        for label, frames in labels.items()
    ]


def _points(shape) -> list[list[float]]:
    """What a shape points at. ValueError: the shape has no point, or its numbers are none."""
    if shape.tag in UNREAD:
        raise ValueError(f"the shape <{shape.tag}> is not read: draw points or boxes")
    if shape.tag not in SHAPES:
        return []
    try:
        if shape.tag == "box":
            left, top, right, bottom = (float(shape.get(key)) for key in ("xtl", "ytl", "xbr", "ybr"))
            return [[(left + right) / 2, (top + bottom) / 2]]
        if shape.tag == "ellipse":
            return [[float(shape.get("cx")), float(shape.get("cy"))]]
        points = [[float(value) for value in pair.split(",")] for pair in shape.get("points", "").split(";")]
        if shape.tag == "points":
            return [[x, y] for x, y in points]
        xs, ys = zip(*points)
        return [[(min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2]]
    except (TypeError, ValueError) as error:
        raise ValueError(f"a <{shape.tag}> has coordinates that are no numbers ({error})") from error
