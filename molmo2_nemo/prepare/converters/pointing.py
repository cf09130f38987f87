"""Points in pictures and videos."""

from collections.abc import Iterator

from molmo2_nemo.prepare.converters.common import (
    MAX_POINTS,
    Converter,
    Draft,
    Drop,
    clip,
    fixed_random,
    image_of,
    pointing,
    together,
    xy,
)

# One of these is drawn each time, so that the data set is needed only once.
MODES = ["pointing", "point_count"]
MULTI_IMAGE_MODES = ["multi_image_pointing", "multi_image_point_then_count"]
VIDEO_MODES = ["video_point", "video_point_count"]
# Seconds that 128 frames at 2 a second cover. Queries of a video that is not longer share one sample.
MAX_SECONDS = 63.0
# How often these become turns of one conversation (molmo2: Molmo2-VideoPoint).
MULTI_TURN = 0.2
# How often all images are asked of (molmo2: launch_scripts/sft.py, p_multi_point_all_image).
ALL_IMAGES_SHARE = 0.5
TOO_MANY = f"more than {MAX_POINTS} points"


def pixmo_points(row: dict) -> Iterator[Draft | Drop]:
    """One label of a picture, in percent. Labels of one picture are joined, up to MAX_POINTS points in all; those
    collected by counting ("high frequency") apart from the others, as the public code has them."""
    points = xy(row["points"])
    if len(points) > MAX_POINTS:
        yield Drop(TOO_MANY)
    elif not points and row.get("count"):
        yield Drop("a count without points")
    else:
        task = pointing(row["label"], [[1, points]], MODES)
        yield Draft([task], [row["image_url"]], unit="percent", tree=str(row.get("collection_method")))


def pixmo_count(row: dict) -> Iterator[Draft | Drop]:
    """Pixels of the picture. Rows of the validation splits have no points."""
    points = xy(row.get("points"))
    if not points and row.get("count"):
        yield Drop("a count without points")
    elif len(points) > MAX_POINTS:
        yield Drop(TOO_MANY)
    else:
        yield Draft([pointing(row["label"], [[1, points]], MODES)], [row["image_url"]], unit="pixels")


def cosyn_point(row: dict) -> Iterator[Draft | Drop]:
    """Each question with its points, in percent, and the name of what they show."""
    if not row.get("names"):
        yield Drop("no column names, and a point needs a label")
        return
    branches = []
    for text, points, name in together(row["questions"], row["answer_points"], row["names"]):
        points = xy(points)
        if len(points) > MAX_POINTS:
            yield Drop(TOO_MANY)
        else:
            branches.append(pointing(name, [[1, points]], "cosyn_point", text))
    if branches:
        yield Draft(branches, [image_of(row["image"])], unit="percent", about=str(row["id"]))


def multi_image_point(row: dict) -> Iterator[Draft | Drop]:
    """One label, asked of all images (in half of the samples) or of some of them; in percent.

    Each image has a label or a list of labels, and points for each. Of several labels one is drawn. Of an image that
    was annotated with another label it is asked, too: there are none, which is how the model learns to say so
    (allenai/molmo2: olmo/preprocessing/data_formatter.py, format_multi_points). Labels are compared in normal form, and
    written as the annotator did.
    """
    images = list(row.get("image_urls") or row["images"])
    said = row.get("labels") or row["normalized_labels"]
    found: dict[str, dict[int, list]] = {}
    spelt: dict[str, str] = {}
    for index, (plain, label, points) in enumerate(
        together(row.get("normalized_labels") or said, said, row["points"]), 1
    ):
        several = isinstance(plain, list)
        label = label if isinstance(label, list) == several else plain
        for name, text, of_name in together(plain, label, points) if several else [(plain, label, points)]:
            key = name.strip().lower()
            spelt.setdefault(key, text.strip())
            found.setdefault(key, {}).setdefault(index, []).extend(xy(of_name))
    draw = fixed_random(*map(str, images), *sorted(found))
    label, asked = draw.choice(sorted(found)), range(1, len(images) + 1)
    some = {}
    if len(images) > 1 and draw.random() >= ALL_IMAGES_SHARE:
        asked = sorted(draw.sample(asked, draw.randint(1, len(images))))
        some = {"images": asked}
    groups = [[index, found[label][index]] for index in asked if index in found[label]]
    if sum(len(points) for _, points in groups) > MAX_POINTS:
        yield Drop(TOO_MANY)
        return
    yield Draft([pointing(spelt[label], groups, MULTI_IMAGE_MODES, **some)], images, unit="percent")


def video_points(label: str, times: list, points: list, start: float) -> dict | Drop:
    """A task from points by time, in percent. Times become those since `start`."""
    groups = [[max(0.0, float(t) - start), xy(of_time)] for t, of_time in together(times or [], points or [])]
    if sum(len(of_time) for _, of_time in groups) > MAX_POINTS:
        return Drop(TOO_MANY)
    return pointing(label, groups, VIDEO_MODES)


def molmo2_video_point(row: dict) -> Iterator[Draft | Drop]:
    """Times are those of the whole video at 2 frames a second. A long video comes as windows of MAX_SECONDS."""
    start, end = row.get("clip_start"), row.get("clip_end")
    task = video_points(row["label"], row["two_fps_timestamps"], row["points"], float(start or 0.0))
    if isinstance(task, Drop):
        yield task
        return
    short = float(row["video_duration"]) <= MAX_SECONDS
    video = clip(row["video_id"]) if short and not start else clip(row["video_id"], start, end)
    tree = "" if short else None
    yield Draft([task], video=video, unit="percent", multi_turn=MULTI_TURN if short else 0.0, tree=tree)


def academic_video_point(subset: str):
    """One query of one clip; rows of other subsets are other data sets."""

    def convert(row: dict) -> Iterator[Draft | Drop]:
        if row["subset"] != subset:
            return
        start, end = row.get("clip_start_time"), row.get("clip_end_time")
        task = video_points(row["category"], row["timestamps"], row["points"], float(start or 0.0))
        if isinstance(task, Drop):
            yield task
            return
        name = f"{row['dataset']}/{row['video_name']}" if row.get("dataset") else row["video_name"]
        names = dict.fromkeys([name, row["video_name"]])
        whole = start is None or (not start and end is not None and end >= row.get("video_duration", end))
        video = clip(list(names)) if whole else clip(list(names), start, end)
        yield Draft([task], video=video, unit="percent", tree=None)

    return convert


SUBSETS = {
    "mevis": "mevis",
    "ref-youtube-vos": "refyoutube",
    "lv-vis": "lvvis",
    "ovis": "ovis",
    "burst": "burst",
    "ref-davis17": "refdavis17",
}
CONVERTERS = {
    "pixmo-points": Converter(pixmo_points, max_points=MAX_POINTS),
    "pixmo-count": Converter(pixmo_count, max_points=MAX_POINTS),
    "cosyn-point": Converter(cosyn_point),
    "Molmo2-MultiImagePoint": Converter(multi_image_point),
    "Molmo2-VideoPoint": Converter(molmo2_video_point),
    **{f"academic-video-point-{name}": Converter(academic_video_point(key)) for name, key in SUBSETS.items()},
}
