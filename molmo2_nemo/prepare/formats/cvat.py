"""CVAT's exports "CVAT for images 1.1" and "CVAT for video 1.1" (cvat-ai/cvat, site/content/en/docs/manual/advanced/
xml_format.md): points as they are, boxes, ellipses and outlines by the centre of their box, in pixels.

Every frame of a track is there, those between keyframes too. Its number is that of the video, start_frame + number *
frame_step; in the export of a project the tasks of a subset are counted on, one after another (class ProjectData of
cvat/apps/dataset_manager/bindings.py). The points of a skeleton have a label and `outside` each, and in a track the
frame of their <skeleton> (cvat/apps/dataset_manager/formats/cvat.py).
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from molmo2_nemo.prepare.formats.coco import STYLES
from molmo2_nemo.prepare.formats.line import Refused, Row

SHAPES = ("points", "box", "ellipse", "polygon", "polyline")
TAGS, ATTRIBUTES = "tags of a whole picture, not used", "attributes of shapes, not used"
ONE_TASK = "export each task by itself"


@dataclass
class _Task:
    """A task with a video: what its tracks are of."""

    meta: Element  # with <source> and the rest
    offset: int | None = 0  # what its frames are counted from; None: unknown
    name: str = ""


def rows(file: Path, number: int) -> Iterator[Row]:
    """A row for each picture and each video. ValueError: the file is not in the format."""
    try:
        root = ElementTree.fromstring(file.read_bytes())
    except ElementTree.ParseError as error:
        raise ValueError(f"{file} is not XML: {error}") from error
    if root.tag != "annotations":
        raise ValueError(f"{file} has <{root.tag}> on top, not <annotations> as an export of CVAT has")
    if (version := root.findtext("version")) not in (None, "1.1"):
        raise ValueError(f"{file} is of version {version} of CVAT's format, and 1.1 is read")
    for image in root.iter("image"):
        yield _image(image, number)
        number += 1
    tasks = _tasks(root)
    tracks: dict[str, list[Element]] = {key: [] for key in tasks}
    for track in root.findall("track"):
        tracks.setdefault("" if "" in tasks else track.get("task_id", ""), []).append(track)
    for key, found in tracks.items():
        if key not in tasks:
            problem = f"task_id={key or 'none'} is that of no <task> of the file: {ONE_TASK}"
            yield Row(f"track {found[0].get('id', '')}", number, Refused([problem], "cvat"))
            number += 1
        elif found:
            yield _video(tasks[key], found, number)
            number += 1


def _image(image: Element, number: int) -> Row:
    labels: dict[str, list] = defaultdict(list)
    problems: list[str] = []
    notes: list[str] = []
    for shape, _ in _shapes(image, problems, notes):
        labels[shape.get("label", "")] += _points(shape, problems)
    name = image.get("name", "")
    document = {"image": name, "unit": "pixels", "branches": [_pointing(*item) for item in labels.items()]}
    return _row(f'image "{name}"', number, document, problems, _sizes(name, image.attrib), notes)


def _row(place: str, number: int, document: dict, problems: list[str], sizes: dict, notes: list[str]) -> Row:
    if problems:
        return Row(place, number, Refused(problems, "cvat"))
    return Row(place, number, document, "cvat", sizes, notes)


def _pointing(label: str, points: list) -> dict:
    return {"task": "pointing", "label": label, "points": points, "style": STYLES}


def _sizes(name: str, size: dict) -> dict[str, tuple[int, int]]:
    width, height = (int(float(size.get(key, 0))) for key in ("width", "height"))
    return {name: (width, height)} if width and height else {}


# -- shapes -----------------------------------------------------------------------------------------------------------


def _shapes(parent: Element, problems: list[str], notes: list[str]) -> Iterator[tuple[Element, str | None]]:
    """(shape, its frame) of what can be seen in an image or a track, points of skeletons too. Adds what cannot be
    read to `problems`, and what is left out to `notes`."""
    for child in parent:
        inside = child if child.tag == "skeleton" else [child]
        for shape in inside:
            notes += [ATTRIBUTES] * (len(shape.findall("attribute")) + (shape.tag == "attribute"))
            if shape.tag == "attribute":
                continue
            if shape.tag == "tag":
                notes.append(TAGS)
            elif shape.tag not in SHAPES:
                problems.append(f"the shape <{shape.tag}> is not read: draw points or boxes")
            elif parent.tag == "image" and not shape.get("label"):
                problems.append(f"a <{shape.tag}> has no label")
            elif "1" not in (child.get("outside"), shape.get("outside")):
                yield shape, child.get("frame")


def _points(shape: Element, problems: list[str]) -> list[list[float]]:
    """What a shape points at. Adds to `problems` if its numbers are none."""
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
        problems.append(f"a <{shape.tag}> has coordinates that are no numbers ({error})")
        return []


# -- videos -----------------------------------------------------------------------------------------------------------


def _tasks(root: Element) -> dict[str, _Task]:
    """The tasks of a project by their id, or of another export the one, "", that all tracks are of."""
    tasks = root.findall("meta/project/tasks/task")
    if not tasks:
        meta = root.find("meta")
        return {"": _Task(Element("meta") if meta is None else meta)}
    found, offset, subset = {}, 0, None
    for task in tasks:
        if task.findtext("subset") != subset:
            offset, subset = 0, task.findtext("subset")
        key = task.findtext("id", "")
        found[key] = _Task(task, offset, f" of the task {key}")
        step = re.search(r"step\s*=\s*(\d+)", task.findtext("frame_filter") or "")
        size = _whole(task, "size")
        if offset is not None:
            offset = (
                None
                if size is None
                else offset + (_whole(task, "start_frame") or 0) + size * int(step[1] if step else 1)
            )
    return found


def _whole(meta: Element, key: str) -> int | None:
    """The whole number that stands under a key of <task> or <job>, if there is one."""
    text = (meta.findtext(f".//{key}") or "").strip()
    return int(text) if text.isdecimal() else None


def _video(task: _Task, tracks: list[Element], number: int) -> Row:
    name = task.meta.findtext(".//source") or ""
    problems: list[str] = []
    notes: list[str] = []
    if not name:
        problems.append(
            "the tracks have no <source> that names the video: add <source>FILE</source> to the <task> or <job> in "
            '<meta>, or if they are of pictures, export "CVAT for images 1.1"'
        )
    if task.offset is None:
        problems.append(
            f"frames{task.name} are counted from an unknown number, as a task before it has no <size>: {ONE_TASK}"
        )
    branches = _tracking(task, tracks, problems, notes)
    size = {key: task.meta.findtext(f".//original_size/{key}") or "0" for key in ("width", "height")}
    document = {"video": name, "unit": "pixels", "time_unit": "frames", "branches": branches}
    return _row(f'video "{name}"', number, document, problems, _sizes(name, size), notes)


def _tracking(task: _Task, tracks: list[Element], problems: list[str], notes: list[str]) -> list[dict]:
    """A branch for each label, that of a skeleton's point being the point's own."""
    labels: dict[str, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    first, last = _whole(task.meta, "start_frame") or 0, _whole(task.meta, "stop_frame")
    for track in tracks:
        name, strays = track.get("id", ""), []
        for shape, frame in _shapes(track, problems, notes):
            label = shape.get("label") or track.get("label")
            if frame is None or not frame.isdecimal():
                problems.append(f"a <{shape.tag}> of the track {name} has no frame, or one that is no number")
                continue
            if not label:
                problems.append(f"the track {name} has no label")
                continue
            counted = int(frame) - (task.offset or 0)
            if task.name and (counted < first or (last is not None and counted > last)):
                strays.append(frame)
            for k, point in enumerate(_points(shape, problems)):
                labels[label][counted].append([f"{name}.{k}" if k else name, *point])
        if strays and task.offset is not None:
            problems.append(f"the track {name} has the frame {strays[0]}, which is none{task.name}: {ONE_TASK}")
    return [
        {"task": "tracking", "label": label, "frames": [[frame, frames[frame]] for frame in sorted(frames)]}
        for label, frames in labels.items()
    ]
