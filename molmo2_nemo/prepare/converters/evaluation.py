"""The evaluation sets of conf/evaluations.yaml. Columns and rules: allenai/molmo2 at f3cb108, olmo/data, and cards."""

import ast
import io
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from molmo2_nemo.catalogue.raw import RawSource, read_rows
from molmo2_nemo.data import prompts
from molmo2_nemo.limits import MAX_IMAGE_PIXELS
from molmo2_nemo.prepare.converters import image_qa
from molmo2_nemo.prepare.converters.common import (
    Converter,
    Draft,
    Drop,
    array_rows,
    clip,
    find,
    image_of,
    lettered_choice,
    more,
    options_of,
    pointing,
    question,
    read_json,
    said,
    together,
    whole_number,
    xy,
)
from molmo2_nemo.prepare.converters.pointing import video_point_names

# In the place of one that is drawn, so that every model is asked the same.
COUNT_BY_POINTING = prompts.POINT_COUNT[2]
VIDEO_POINT_FPS = 2  # of the frames that masks of Molmo2-VideoPointEval belong to
IMAGE_NUMBER = re.compile(r"<image\s*(\d+)>")
IMAGES_OF_MMMU = [f"image_{number}" for number in range(1, 8)]
TRACK_FPS = 1  # of the report's tracking evaluation


def region(masks: list, name: int | str | None = None) -> dict:
    """masks: (image from 1 or seconds, a run-length mask of COCO: {size, counts}, or bool [H, W]). ValueError: there is
    none, none has a pixel, or one is broken."""
    encoded = []
    for where, mask in masks:
        if isinstance(mask, dict):
            height, width = (int(side) for side in mask["size"])
            if not (height > 0 and width > 0 and height * width <= MAX_IMAGE_PIXELS):
                raise ValueError("a mask of a size that no picture has")
            if not isinstance(mask["counts"], str | bytes):
                mask = coco.frPyObjects(mask, height, width)
            rle = {"size": [height, width], "counts": mask["counts"]}
            mask = coco.decode(rle)  # ValueError: more pixels than it has
        else:
            rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        encoded.append((where, tuple(rle["size"]), rle["counts"], np.any(mask)))
    sizes = {size for _, size, *_ in encoded}
    if len(sizes) != 1:
        raise ValueError("no mask" if not sizes else "masks of different sizes")
    if not any(has_pixels for *_, has_pixels in encoded):
        raise ValueError("masks without a pixel")
    texts = [(float(where), rle.decode() if isinstance(rle, bytes) else rle) for where, _, rle, _ in encoded]
    return {"size": list(sizes.pop()), "masks": texts} | ({} if name is None else {"object": name})


def pixmo_points(row: dict) -> Iterator[Draft | Drop]:
    """Points in percent, with a mask of each. Masks of rows without points are not of a point."""
    points = xy(row["points"])
    regions = [region([(1, mask)]) for _, mask in together(points, row["masks"])] if points else []
    task = pointing(row["label"], [[1, points]], "pointing", regions=regions)
    yield Draft([task], [row["image_url"]], unit="percent", tree=None)


def pixmo_count(row: dict) -> Iterator[Draft]:
    asked = prompts.fill(COUNT_BY_POINTING, said(row["label"]).lower())
    yield Draft([question(asked, str(whole_number(row["count"])), "point_count")], [row["image_url"]], tree=None)


def countbench_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """Pictures and questions are in the same order in two files."""
    questions = read_json(find(raw, "countbench_paired_questions.json"))
    rows = read_rows(find(raw, "*.parquet"))
    for row, asked in together(rows, questions):
        yield more(row, asked=asked)


def countbench(row: dict) -> Iterator[Draft | Drop]:
    if row["image"] is None:
        yield Drop("no picture")
        return
    data = image_of(row["image"])
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in ("1", "L", "P", "I", "I;16", "F"):  # one number a pixel: the public code leaves these out
            yield Drop("a picture without colours")
            return
    yield Draft(
        [question(row["asked"]["question"], str(whole_number(row["number"])), "point_count")], [data], tree=None
    )


def video_point(row: dict) -> Iterator[Draft | Drop]:
    """Points in pixels, each at its time and with masks of its thing in some frames, numbered at 2 a second."""
    times, sides = row["two_fps_timestamps"], (row["width"], row["height"])
    points = [[x / sides[0], y / sides[1]] for x, y in xy(row["points"])]
    things = [
        region([(mask["frame_id"] / VIDEO_POINT_FPS, mask["rle"]) for mask in masks]) for masks in row["masks"] or []
    ]
    groups = [[float(time), [point]] for time, point, _ in together(times or [], points, things)]
    asked = f'How many "{said(row["label"])}" are there in the video?'
    task = pointing(row["label"], groups, "video_point_count", asked, regions=things)
    yield Draft([task], video=clip(video_point_names(row["video_id"])), tree=None)


def video_count(row: dict) -> Iterator[Draft]:
    task = question(row["question"], str(whole_number(row["count"])), "video_count")
    video = clip(video_point_names(row["video_id"]), row.get("clip_start"), row.get("clip_end"))
    yield Draft([task], video=video, tree=None)


def video_track(row: dict) -> Iterator[Draft | Drop]:
    """Tracks in pixels of every frame of a clip, of which those at TRACK_FPS count, and masks of the objects."""
    fps = int(row["fps"])
    if fps % TRACK_FPS:
        yield Drop(f"{fps} frames a second")
        return
    step, frames = fps // TRACK_FPS, {}
    for thing in row["points"]:
        for number, point in enumerate(thing["points"]):
            if number % step == 0 and point is not None and len(point):
                place = [point[0] / row["w"], point[1] / row["h"]]
                frames.setdefault(number, []).append([str(thing["object_id"]), *place])
    regions = []
    for thing in row["masks"]:
        masks = [(n / fps, mask) for n, mask in enumerate(thing["masks"]) if mask is not None and n % step == 0]
        if masks:
            regions.append(region(masks, str(thing["object_id"])))
    task = {
        "task": "tracking",
        "label": said(row["exp"]),
        "frames": [[number / fps, objects] for number, objects in sorted(frames.items())],
        "fps": float(TRACK_FPS),
        "style": "video_point_track_per_frame",
        "regions": regions,
    }
    yield Draft([task], video=clip(row["clip"], annotation_fps=float(TRACK_FPS)), tree=None)


def mmmu(row: dict) -> Iterator[Draft | Drop]:
    """A text may name its pictures, `<image 2>`. All are shown, as by the public code's mmmu_test_v2."""
    if row["question_type"] != "multiple-choice":
        yield Drop("an open question")
        return
    texts = [row["question"], *_listed(row["options"])]
    images = _in_order(row, IMAGES_OF_MMMU)
    if any(not 1 <= int(number) <= len(images) for text in texts for number in IMAGE_NUMBER.findall(text)):
        raise ValueError("a picture is missing")
    text, *options = (IMAGE_NUMBER.sub(r"Image \1", text) for text in texts)
    yield _about_images(images, lambda style: lettered_choice(text, options, row["answer"], style), "a_okvqa_mc")


def _listed(text: str) -> list[str]:
    """The texts of a list as Python writes it. ValueError: it is none."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("options that cannot be read") from error
    if not isinstance(found, list) or not all(isinstance(option, str) for option in found):
        raise ValueError("options that cannot be read")
    return found


def _in_order(row: dict, columns: Iterable[str]) -> list:
    """The pictures of these columns, of which the last ones may be empty. ValueError: another one is."""
    found = [row.get(name) for name in columns]
    images = [image_of(image) for image in found if image is not None]
    if any(image is None for image in found[: len(images)]):
        raise ValueError("a picture is missing")
    return images


def realworldqa(row: dict) -> Iterator[Draft]:
    """The text holds the options, a line each, and in the last line how to answer."""
    text, _, how = str(row["question"]).strip().rpartition("\n")
    if "only the letter of the correct option" in how:
        asked, options = options_of(text)
        task = lettered_choice(asked, options, row["answer"], "eval_multiple_choice")
    elif "single word or number" in how:
        task = question(text, row["answer"], "vqa2")
    else:
        raise ValueError("a question that does not say how to answer")
    yield Draft([task], [image_of(row["image"])], tree=None)


def muirbench(row: dict) -> Iterator[Draft]:
    """Question and options name the pictures in their order, each as <image>."""
    numbers = count(1)
    text, *options = (
        re.sub("<image>", lambda _: f"Image {next(numbers)}", text) for text in (row["question"], *row["options"])
    )
    images = [image_of(image) for image in row["image_list"]]
    if next(numbers) - 1 > len(images):
        raise ValueError("a picture is missing")
    yield _about_images(images, lambda style: lettered_choice(text, options, row["answer"], style))


def blink(row: dict) -> Iterator[Draft]:
    """The prompt is a longer form of the question, with the options as (A), (B), ... at its end."""
    text = said(row["prompt"]).partition("\n(A)")[0]
    images = _in_order(row, [f"image_{number}" for number in range(1, 5)])
    yield _about_images(images, lambda style: lettered_choice(text, row["choices"], row["answer"], style))


def _about_images(images: list, task: Callable[[str], dict], style_of_one: str = "eval_multiple_choice") -> Draft:
    if not images:
        raise ValueError("no image in the row")
    return Draft([task("mantis_instruct_mc" if len(images) > 1 else style_of_one)], images, tree=None)


def mmiu(row: dict) -> Iterator[Draft]:
    """Options are lines of one text. Of some rows the answer is none of them."""
    before, options = options_of(row["options"])
    if before:
        raise ValueError("options whose letters are not A, B, C, ...")
    images = [path.removeprefix("./") for path in row["input_image_path"]]
    # An archive may have the folder that it is named after, or not.
    names = [[path, path.partition("/")[2]] for path in images]
    yield _about_images(names, lambda style: lettered_choice(row["question"], options, row["output"], style))


CONVERTERS = {
    "pixmo-points-eval": Converter(pixmo_points),
    "pixmo-count-val": Converter(pixmo_count),
    "pixmo-count-test": Converter(pixmo_count),
    "countbenchqa": Converter(countbench, countbench_rows),
    "Molmo2-VideoPointEval": Converter(video_point),
    "Molmo2-VideoCountEval": Converter(video_count),
    "Molmo2-VideoTrackEval": Converter(video_track),
    "chartqa-test": Converter(image_qa.chartqa),
    "textvqa-val": Converter(partial(image_qa.message_list, style="text_vqa", joined=False)),
    "vqa-v2-val": Converter(partial(image_qa.message_list, style="vqa2")),
    "docvqa-val": Converter(
        partial(image_qa.document_question, style="doc_qa", column="image", split="val"),
        array_rows("val_v1.0*.json", "data"),
    ),
    "infographicvqa-val": Converter(
        partial(image_qa.document_question, style="info_qa", column="image_local_name", split="val"),
        array_rows("*info*_val_v1.0*.json", "data"),
    ),
    "mmmu-val": Converter(mmmu),
    "realworldqa": Converter(realworldqa),
    "muirbench": Converter(muirbench),
    "blink-val": Converter(blink),
    "mmiu": Converter(mmiu),
    "ai2d-test": Converter(image_qa.ai2d, partial(image_qa.ai2d_rows, is_test=True)),
}
