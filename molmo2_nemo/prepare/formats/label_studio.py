"""Label Studio's exports JSON and JSON-MIN (HumanSignal/label-studio, docs/source/guide/export.md): keypoints as they
are, rectangles, ellipses and polygons by the centre of their box, in percent of the picture.

In a file of JSON each task has `data` and `annotations` with a `result`; of JSON-MIN, the regions of each tag directly.
"""

import math
import re
from collections import defaultdict
from urllib.parse import parse_qs, unquote, urlsplit

from molmo2_nemo.prepare.formats.coco import STYLES
from molmo2_nemo.prepare.formats.line import Line
from molmo2_nemo.prepare.mistakes import LineMistakes

# Types of regions that are no places in a picture.
NO_PLACES = frozenset(["choices", "textarea", "rating", "number", "taxonomy", "relation", "pairwise", "datetime"])
# Label Studio puts eight digits and a dash before the name of an uploaded file.
UPLOADED = re.compile(r"[0-9a-f]{8}-")
# Keys of a row of JSON-MIN that say nothing of the picture.
ABOUT = frozenset(["id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement"])
SEVERAL = "annotations of a task after its first (other annotators, or later ones), not used"


def is_task(record: dict) -> bool:
    """Whether it is a task of JSON, or a row of JSON-MIN."""
    if isinstance(record.get("data"), dict):
        return any(isinstance(record.get(key), list) for key in ("annotations", "completions"))
    return any(isinstance(value, list) and any(map(_is_region, value)) for value in record.values())


def read(record: dict) -> Line:
    """ValueError, LineMistakes: regions have a form that is not read or no label, or the picture cannot be told."""
    notes = []
    if isinstance(record.get("data"), dict):
        data = record["data"]
        done = [a for a in record.get("annotations", record.get("completions")) if not a.get("was_cancelled")]
        done.sort(key=lambda annotation: not annotation.get("ground_truth"))
        notes += [SEVERAL] * (len(done) - 1)
        results = done[0].get("result", []) if done else []
        regions = [_with_size(result) for result in results if result.get("type") not in NO_PLACES]
        unread = [result["type"] for result in results if result.get("type") in NO_PLACES]
        notes += [f'a result of the type "{kind}" is not used' for kind in unread]
        sources = [str(result.get("source", "")).removeprefix("$") for result in results]
    else:
        data, sources = record, []
        lists = [name for name, value in record.items() if isinstance(value, list) and any(map(_has_place, value))]
        regions = [(region, "") for name in lists for region in record[name] if isinstance(region, dict)]
    key = next((key for key in (*sources, "image", *data) if _is_file(data.get(key))), None)
    if key is None:
        raise ValueError("data names no picture")
    if data is record:
        unread = [name for name in record if name not in {key, *lists, *ABOUT} and record[name] not in (None, "", [])]
        notes += [f"the key {name} is not used" for name in unread]
    labels, sizes = _points_by_label(regions)
    names = _file_names(data[key])
    document = {"image": names[0], "unit": "percent"}
    document["branches"] = [
        {"task": "pointing", "label": label, "points": points, "style": STYLES} for label, points in labels.items()
    ]
    return Line(
        document,
        "label_studio",
        {"image": f"data.{key}" if data is not record else key},
        {names[0]: sizes.pop()} if len(sizes) == 1 else {},
        {names[0]: names[1:]},
        notes,
    )


def _points_by_label(regions: list[tuple[dict, str]]) -> tuple[dict[str, list], set[tuple[int, int]]]:
    """What is pointed at by label, a region with several labels under each; and the sizes that the picture had.

    regions: with their ids. LineMistakes: all that is wrong with them.
    """
    labels: dict[str, list] = defaultdict(list)
    sizes, problems = set(), []
    # <KeyPoint> beside <Labels> gives the same region twice, and only one has the label.
    labelled = {_identity(region, id_of) for region, id_of in regions if _labels(region)}
    for region, id_of in regions:
        names = _labels(region)
        if not names and _identity(region, id_of) in labelled:
            continue
        if region.get("image_rotation"):
            problems.append("image_rotation is not 0: turn the picture's file and label it again")
        if {"original_width", "original_height"} <= region.keys():
            sizes.add((region["original_width"], region["original_height"]))
        try:
            point = _point(region)
        except ValueError as error:
            problems.append(str(error))
            continue
        if not names:
            problems.append(f'a region of the type "{region.get("type")}" has no label: give it one, or delete it')
        for name in names:
            labels[name].append(point)
    if problems:
        raise LineMistakes(dict.fromkeys(problems))
    return labels, sizes


def _identity(region: dict, id_of: str) -> str:
    """What two results of the same region have in common: its id, or in JSON-MIN, which has none, its place."""
    return id_of or repr([region.get(key) for key in ("x", "y", "width", "height", "radiusX", "radiusY", "points")])


def _with_size(result: dict) -> tuple[dict, str]:
    """A region's value with the size and rotation that stand beside it, and its id."""
    beside = {key: result[key] for key in ("original_width", "original_height", "image_rotation") if key in result}
    value = result.get("value")
    if not isinstance(value, dict):
        raise ValueError(f'a result of the type "{result.get("type")}" has no value')
    return value | beside | {"type": result.get("type")}, str(result.get("id") or "")


def _has_place(value) -> bool:
    return isinstance(value, dict) and bool({"x", "points"} & value.keys())


def _is_region(value) -> bool:
    return _has_place(value) and bool(_labels(value))


def _labels(region: dict) -> list[str]:
    """Those of `keypointlabels`, `rectanglelabels`, `labels` and the like."""
    lists = [value for key, value in region.items() if key.endswith("labels") and isinstance(value, list)]
    return list(dict.fromkeys(str(label) for labels in lists for label in labels if str(label).strip()))


def _is_file(value) -> bool:
    return isinstance(value, str) and bool(
        re.search(r"\.[A-Za-z0-9]{2,5}$", urlsplit(value).path or value) or "?d=" in value
    )


def _file_names(address: str) -> list[str]:
    """Paths that the file may have below --images: as it is named, ever shorter, and without what an upload adds."""
    parts = urlsplit(address)
    path = parse_qs(parts.query)["d"][0] if "d=" in parts.query else unquote(parts.path)
    folders = [part for part in path.split("/") if part not in ("", "..", ".")]
    names = ["/".join(folders[k:]) for k in range(len(folders))]
    base = folders[-1] if folders else address
    return [*names, UPLOADED.sub("", base, count=1)] if UPLOADED.match(base) else names or [address]


def _point(region: dict) -> list[float]:
    """What a region points at, in percent."""
    if isinstance(region.get("points"), list) and region["points"]:
        xs, ys = zip(*region["points"])
        return [(min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2]
    if not {"x", "y"} <= region.keys():
        raise ValueError(f'a region of the type "{region.get("type")}" is not read: draw keypoints, boxes or outlines')
    x, y = region["x"], region["y"]
    if "height" not in region or "radiusX" in region:  # a keypoint's width is its size on screen; x, y of an ellipse
        return [x, y]
    # A rectangle turns around its upper left corner; the angle is one of pixels, not of percent.
    if region.get("rotation") and not region.get("original_height"):
        raise ValueError("a rectangle has a rotation, and no original_width and original_height with which to turn it")
    ratio = (region.get("original_width") or 1) / (region.get("original_height") or 1)
    angle = math.radians(region.get("rotation") or 0)
    half_width, half_height = region["width"] / 2 * ratio, region["height"] / 2
    return [
        x + (half_width * math.cos(angle) - half_height * math.sin(angle)) / ratio,
        y + half_width * math.sin(angle) + half_height * math.cos(angle),
    ]
