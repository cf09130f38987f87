"""The evaluation sets of conf/evaluations.yaml. Columns and rules: allenai/molmo2 at f3cb108, olmo/data, and cards."""

import io
from collections.abc import Iterator
from functools import partial

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from molmo2_nemo.catalogue.raw import RawSource, read_rows
from molmo2_nemo.data import prompts
from molmo2_nemo.prepare.converters import image_qa
from molmo2_nemo.prepare.converters.common import (
    Converter,
    Draft,
    Drop,
    array_rows,
    choice,
    clip,
    find,
    image_of,
    pointing,
    question,
    read_json,
    together,
    xy,
)
from molmo2_nemo.prepare.converters.pointing import video_point_names

# In the place of one that is drawn, so that every model is asked the same.
COUNT_BY_POINTING = prompts.POINT_COUNT[2]
MC = "video_eval_multiple_choice"
VIDEO_POINT_FPS = 2  # of the frames that masks of Molmo2-VideoPointEval belong to
TRACK_FPS = 1  # of the report's tracking evaluation
# MVBench's files of questions, and where below video/ their clips are.
MVBENCH = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
FRAMES_OF = ("episodic_reasoning", 3)  # folders of pictures, so many a second


def region(masks: list, name: int | str | None = None) -> dict:
    """masks: (image from 1 or seconds, a run-length mask of COCO: {size, counts}, or bool [H, W]). ValueError: none."""
    encoded = []
    for where, mask in masks:
        if isinstance(mask, dict) and isinstance(mask["counts"], str | bytes):
            encoded.append((where, mask["size"], mask["counts"]))
            continue
        if isinstance(mask, dict):
            rle = coco.frPyObjects(mask, *mask["size"])
        else:
            rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        encoded.append((where, rle["size"], rle["counts"]))
    sizes = {tuple(map(int, size)) for _, size, _ in encoded}
    if len(sizes) != 1:
        raise ValueError("no mask" if not sizes else "masks of different sizes")
    texts = [(float(where), rle.decode() if isinstance(rle, bytes) else rle) for where, _, rle in encoded]
    return {"size": list(sizes.pop()), "masks": texts} | ({} if name is None else {"object": name})


def pixmo_points(row: dict) -> Iterator[Draft | Drop]:
    """Points in percent, with a mask of each. Masks of rows without points are not of a point."""
    points = xy(row["points"])
    regions = [region([(1, mask)]) for _, mask in together(points, row["masks"])] if points else []
    task = pointing(row["label"], [[1, points]], "pointing", regions=regions)
    yield Draft([task], [row["image_url"]], unit="percent", tree=None)


def pixmo_count(row: dict) -> Iterator[Draft]:
    asked = prompts.fill(COUNT_BY_POINTING, str(row["label"]).lower())
    yield Draft([question(asked, str(int(row["count"])), "point_count")], [row["image_url"]], tree=None)


def countbench_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """Pictures and questions are in the same order in two files."""
    questions = read_json(find(raw, "countbench_paired_questions.json"))
    rows = read_rows(find(raw, "*.parquet"))
    for row, asked in together(rows, questions):
        yield row | {"question": asked["question"]}


def countbench(row: dict) -> Iterator[Draft | Drop]:
    if row["image"] is None:
        yield Drop("no picture")
        return
    data = image_of(row["image"])
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in ("1", "L", "P", "I", "I;16", "F"):  # one number a pixel: the public code leaves these out
            yield Drop("a picture without colours")
            return
    yield Draft([question(row["question"], str(int(row["number"])), "point_count")], [data], tree=None)


def video_point(row: dict) -> Iterator[Draft | Drop]:
    """Points in pixels, each at its time and with masks of its thing in some frames, numbered at 2 a second."""
    times, sides = row["two_fps_timestamps"], (row["width"], row["height"])
    points = [[x / sides[0], y / sides[1]] for x, y in xy(row["points"])]
    things = [
        region([(mask["frame_id"] / VIDEO_POINT_FPS, mask["rle"]) for mask in masks]) for masks in row["masks"] or []
    ]
    groups = [[float(time), [point]] for time, point, _ in together(times or [], points, things)]
    asked = f'How many "{row["label"]}" are there in the video?'
    task = pointing(row["label"], groups, "video_point_count", asked, regions=things)
    yield Draft([task], video=clip(video_point_names(row["video_id"])), tree=None)


def video_count(row: dict) -> Iterator[Draft]:
    task = question(row["question"], str(int(row["count"])), "video_count")
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
        "label": str(row["exp"]).strip(),
        "frames": [[number / fps, objects] for number, objects in sorted(frames.items())],
        "fps": float(TRACK_FPS),
        "style": "video_point_track_per_frame",
        "regions": regions,
    }
    yield Draft([task], video=clip(row["clip"], annotation_fps=float(TRACK_FPS)), tree=None)


def nextqa(row: dict) -> Iterator[Draft]:
    options = [row[f"a{number}"] for number in range(5)]
    video = clip([f"NExTVideo/{row['video']}", str(row["video"])])
    yield Draft([choice(row["question"], options, row["answer"], MC)], video=video, tree=None)


def mvbench_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    for name, folder in MVBENCH.items():
        for row in read_json(find(raw, f"json/{name}.json")):
            yield row | {"part": name, "folder": folder}


def mvbench(row: dict) -> Iterator[Draft]:
    """Of some parts, `start` and `end` of a clip in seconds."""
    task = choice(row["question"], row["candidates"], row["candidates"].index(row["answer"]), MC)
    name = f"{row['folder']}/{row['video']}"
    span = (row.get("start"), row.get("end"))
    if row["part"] == FRAMES_OF[0]:
        video = clip([f"{name}/video"], *span, frames=[name], fps=FRAMES_OF[1])
    else:
        video = clip([name, f"data0613/{name}"], *span)
    yield Draft([task], video=video, tree=None)


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
    "ai2d-test": Converter(image_qa.ai2d, partial(image_qa.ai2d_rows, is_test=True)),
    "nextqa-test": Converter(nextqa),
    "mvbench": Converter(mvbench, mvbench_rows),
}
