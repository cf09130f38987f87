"""Points in pictures and videos."""

import math
import random
import re
from collections.abc import Iterator

from molmo2_nemo.prepare.converters.common import (
    MAX_POINTS,
    YOUTUBE_FOLDERS,
    Converter,
    Draft,
    Drop,
    clip,
    drafts_of,
    fixed_random,
    image_of,
    of_youtube,
    pointing,
    together,
    usable,
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
ARTICLE = re.compile(r"\b(?:the|an?) (?=\S)")
# Plurals that are formed otherwise than with s (nouns of WordNet's list of exceptions, noun.exc, that can be pointed
# at; people as in rails/rails: activesupport/lib/active_support/inflections.rb).
IRREGULAR = {
    "people": "person",
    "mice": "mouse",
    "lice": "louse",
    "geese": "goose",
    "oxen": "ox",
    "dice": "die",
    "cacti": "cactus",
    "fungi": "fungus",
    "octopi": "octopus",
    "nuclei": "nucleus",
    "larvae": "larva",
    "antennae": "antenna",
}
IRREGULAR_ENDINGS = {"men": "man", "children": "child", "feet": "foot", "teeth": "tooth"}
# After these the plural has an e before its s: boxes, dishes, benches, buses, tomatoes.
ES_AFTER = ("xe", "she", "che", "se", "ze", "oe")
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
    """Each question with its points, in percent, and the name of what they show.

    An early release has no names. There the question is what is pointed at, as in the public code (allenai/molmo2:
    olmo/preprocessing/data_formatter.py, format_points).
    """

    def task(item: tuple) -> dict | Drop:
        text, points, name = item
        if len(points := xy(points)) > MAX_POINTS:
            return Drop(TOO_MANY)
        return pointing(name or text, [[1, points]], "cosyn_point", text)

    names = row.get("names") or [None] * len(row["questions"])
    tasks = usable(task, together(row["questions"], row["answer_points"], names))
    yield from drafts_of(tasks, [image_of(row["image"])], unit="percent", about=str(row["id"]))


def multi_image_point(row: dict) -> Iterator[Draft | Drop]:
    """Each label of a row is asked of all its images, or of some and then of the others; in percent.

    An image has one label and its points. Of an image that was annotated with another label it is asked, too: there
    are none, which is how the model learns to say so (allenai/molmo2: olmo/preprocessing/data_formatter.py,
    format_multi_points, which draws one label and some images anew each time). Labels are compared in normal form, and
    written as the first annotator did.
    """
    images = list(row["image_urls"])
    found: dict[str, dict[int, list]] = {}
    spelt: dict[str, str] = {}
    for index, (_, label, points) in enumerate(together(images, row["labels"], row["points"]), 1):
        spelt.setdefault(normal_label(label), label)
        found.setdefault(normal_label(label), {})[index] = xy(points)

    def task(item: tuple) -> dict | Drop:
        name, asked = item
        groups = [[index, found[name][index]] for index in asked if index in found[name]]
        if sum(len(points) for _, points in groups) > MAX_POINTS:
            return Drop(TOO_MANY)
        some = {} if len(asked) == len(images) else {"images": asked}
        return pointing(spelt[name], groups, MULTI_IMAGE_MODES, **some)

    draws = {name: fixed_random(*images, name) for name in sorted(found)}
    asked = [(name, part) for name, draw in draws.items() for part in _parts_asked(len(images), draw)]
    yield from drafts_of(usable(task, asked), images, unit="percent")


def normal_label(label: str) -> str:
    """A label without the differences of one annotator to another: case, spaces, articles, punctuation at its ends and
    whether a word is in the singular or the plural. How the labels of the public set were compared is not published."""
    words = ARTICLE.sub("", " ".join(label.lower().split()).strip(" .,:;!?\"'"))
    return " ".join(map(same_for_plural, words.split()))


def same_for_plural(word: str) -> str:
    """What a noun and its plural have in common: of "leaf" and "leaves" it is "leav", of "box" and "boxes" "box".

    It is only compared, and never shown.
    """
    word, before = IRREGULAR.get(word, word), None
    while word != before and len(word) > 3:
        before = word
        if word.endswith(ES_AFTER) or (word.endswith("s") and not word.endswith("ss")):
            word = word[:-1]
    for plural, singular in IRREGULAR_ENDINGS.items():
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    if word.endswith(("f", "fe", "ve")) and not word.endswith("ff"):
        return word.rstrip("e")[:-1] + "v"
    return word[:-2] + "y" if len(word) > 3 and word.endswith("ie") else word


def _parts_asked(number: int, draw: random.Random) -> list[list[int]]:
    """Numbers of the images of each question: of all in one, or of some and of the others."""
    everywhere = list(range(1, number + 1))
    if number == 1 or draw.random() < ALL_IMAGES_SHARE:
        return [everywhere]
    some = sorted(draw.sample(everywhere, draw.randint(1, number)))
    return [part for part in (some, [index for index in everywhere if index not in some]) if part]


def window(start: float | None, end: float | None, duration: float) -> tuple[float, float] | None | Drop:
    """The seconds of a clip of at most MAX_SECONDS; None: the whole video, which is not longer."""
    if start is None or end is None:
        bounds = f"a video of more than {MAX_SECONDS:g} seconds without the bounds of a clip"
        return Drop(bounds) if duration > MAX_SECONDS else None
    if end - start > MAX_SECONDS:
        return Drop(f"a clip of more than {MAX_SECONDS:g} seconds")
    return None if start <= 0 and end >= duration else (start, end)


def video_points(label: str, times: list, points: list, span: tuple[float, float] | None, **more) -> dict | Drop:
    """A task from points by time, in percent. Times become those since the start of `span`."""
    start, end = span or (0.0, math.inf)
    groups = [[float(time) - start, xy(of_time)] for time, of_time in together(times or [], points or [])]
    if sum(len(of_time) for _, of_time in groups) > MAX_POINTS:
        return Drop(TOO_MANY)
    if not all(0 <= time <= end - start for time, _ in groups):
        return Drop("points outside of their clip")
    return pointing(label, groups, VIDEO_MODES, **more)


def video_point_names(video: str) -> list[str]:
    """What a video of Molmo2-VideoPoint and of its evaluations may be called; see molmo2_video_point."""
    prefix, slash, name = video.rpartition("/")
    if slash:
        return [video, f"{prefix}-2fps/{name}_2fps"]
    return [*of_youtube(name), f"{name}_2fps", *(f"{folder}-2fps/{name}_2fps" for folder in YOUTUBE_FOLDERS)]


def molmo2_video_point(row: dict) -> Iterator[Draft | Drop]:
    """Times are those of the whole video at 2 frames a second. A long video comes as windows of MAX_SECONDS.

    `question` counts: it is asked where the answer has a number. Videos may be there as they were found, or at 2 frames
    a second as ID_2fps.mp4, and the generated PREFIX/NAME as PREFIX-2fps/NAME_2fps.mp4 (the data set's card;
    allenai/molmo2: _find_video_point_path_by_id). A NAME alone could be the video of another PREFIX.
    """
    if row.get("annotator_unsure"):
        yield Drop("the annotator was unsure")
        return
    duration = float(row["video_duration"])
    # Bounds count in longer videos alone.
    span = None if duration <= MAX_SECONDS else window(row.get("clip_start"), row.get("clip_end"), duration)
    counting = {"count_question": row["question"].strip()} if (row.get("question") or "").strip() else {}
    task = span
    if not isinstance(span, Drop):
        task = video_points(row["label"], row["two_fps_timestamps"], row["points"], span, **counting)
    if isinstance(task, Drop):
        yield task
        return
    video = clip(video_point_names(row["video_id"]), *(span or ()))
    multi_turn = 0.0 if span else MULTI_TURN
    yield Draft([task], video=video, unit="percent", multi_turn=multi_turn, tree=None if span else "")


def academic_video_point(subset: str, fps: float | None):
    """One query of one clip; rows of other subsets are other data sets.

    The videos are published as pictures, at `fps` or another rate, which the rows do not say: they last as long as the
    row's video, which was annotated at 2 frames a second.
    """

    def convert(row: dict) -> Iterator[Draft | Drop]:
        if row["subset"] != subset:
            return
        task = span = window(row["clip_start_time"], row["clip_end_time"], float(row["video_duration"]))
        if not isinstance(span, Drop):
            task = video_points(row["category"].lower(), row["timestamps"], row["points"], span)
        if isinstance(task, Drop):
            yield task
            return
        stem = row["video_name"].removesuffix(".mp4")
        names = [f"{row['dataset']}/{stem}", stem] if row.get("dataset") else [stem]
        video = clip(names, *(span or ()))
        video.frames, video.fps, video.seconds = names, fps, float(row["video_duration"])
        yield Draft([task], video=video, unit="percent", tree=None)

    return convert


# Data set -> its name in the rows, and the rate at which the public code takes its source's pictures (allenai/molmo2:
# VIDEO_FPS in academic_video_track_datasets.py, OVIS/train_mp4_5fps); BURST's differ from video to video.
SUBSETS = {
    "mevis": ("mevis", 6),
    "ref-youtube-vos": ("refyoutube", 6),
    "lv-vis": ("lvvis", 4),
    "ovis": ("ovis", 5),
    "burst": ("burst", None),
    "ref-davis17": ("refdavis17", 6),
}
CONVERTERS = {
    "pixmo-points": Converter(pixmo_points, max_points=MAX_POINTS),
    "pixmo-count": Converter(pixmo_count, max_points=MAX_POINTS),
    "cosyn-point": Converter(cosyn_point),
    "Molmo2-MultiImagePoint": Converter(multi_image_point),
    "Molmo2-VideoPoint": Converter(molmo2_video_point),
    **{
        f"academic-video-point-{name}": Converter(academic_video_point(*of_source))
        for name, of_source in SUBSETS.items()
    },
}
