"""J&F of masks, and the files between an evaluation and SAM 2."""

import json

import numpy as np
import pytest
from media_files import film
from pycocotools import mask as coco
from scipy.spatial.distance import cdist
from test_evaluate import asker, run, said  # noqa: F401

from molmo2_nemo.data.schema import Region
from molmo2_nemo.evaluate import segmentation
from molmo2_nemo.evaluate.point_metrics import encode_mask
from molmo2_nemo.prepare.media import video_facts
from molmo2_nemo.prepare.webdataset import write_shards

SIZE = (60, 80)  # diagonal 100: contours may be a pixel apart


def box(left, top, right, bottom) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def rle(mask) -> dict:
    return {"size": list(mask.shape), "counts": encode_mask(mask)}


def naive_contour_accuracy(found, wanted, reach):
    """As DAVIS describes it, pixel by pixel."""

    def line(mask):
        height, width = mask.shape
        return [
            (y, x)
            for y in range(height)
            for x in range(width)
            if any(
                mask[y, x] != mask[min(y + down, height - 1), min(x + right, width - 1)]
                for down, right in ((0, 1), (1, 0), (1, 1))
            )
        ]

    apart = cdist(line(found), line(wanted))
    precision, recall = (apart.min(1) <= reach).mean(), (apart.min(0) <= reach).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_region_and_contour_of_boxes_as_worked_out_by_hand():
    a, nothing = box(10, 10, 30, 30), box(0, 0, 0, 0)
    assert segmentation.region_similarity(a, a) == segmentation.contour_accuracy(a, a) == 1.0
    assert segmentation.region_similarity(nothing, nothing) == segmentation.contour_accuracy(nothing, nothing) == 1.0
    for pair in ((a, nothing), (nothing, a)):
        assert segmentation.region_similarity(*pair) == segmentation.contour_accuracy(*pair) == 0.0
    assert segmentation.region_similarity(a, box(20, 10, 40, 30)) == pytest.approx(200 / 600)
    # A pixel to the right: every contour pixel has one of the other at most a pixel away.
    assert segmentation.contour_accuracy(a, box(11, 10, 31, 30)) == 1.0
    # Ten pixels to the right: of a contour of 80 pixels 20 lie on the sides that do not meet the other one's.
    assert 0 < segmentation.contour_accuracy(a, box(20, 10, 40, 30)) < 0.7
    assert segmentation.contour_accuracy(a, box(50, 40, 60, 50)) == 0.0
    assert segmentation.contour_accuracy(a, box(0, 0, 80, 60)) == 0.0  # the edge of the picture is no contour


@pytest.mark.parametrize("scale", (1, 4))
def test_contours_are_compared_as_pixel_by_pixel(scale):
    rng = np.random.default_rng(0)
    for _ in range(3):
        small = rng.random((2, 6, 8)) < 0.5
        found, wanted = np.kron(small, np.ones((1, 5 * scale, 5 * scale))).astype(bool)
        reach = int(np.ceil(0.008 * np.hypot(*found.shape)))
        assert segmentation.contour_accuracy(found, wanted) == pytest.approx(
            naive_contour_accuracy(found, wanted, reach)
        )


def test_objects_of_an_expression_are_one_mask_and_frames_of_either_side_count():
    left, right = box(0, 0, 10, 10), box(40, 0, 50, 10)
    regions = [
        Region(SIZE, [(0.0, encode_mask(left)), (1.0, encode_mask(left))]),
        Region(SIZE, [(0.0, encode_mask(right))]),
    ]
    whole = [(0.0, rle(left | right)), (1.01, rle(left))]
    assert segmentation.j_and_f(whole, regions) == dict.fromkeys(segmentation.METRICS, 1.0)
    apart = [(0.0, rle(left)), (0.0, rle(right)), (1.0, rle(left))]
    assert segmentation.j_and_f(apart, regions) == segmentation.j_and_f(whole, regions)
    # One object of two, the second frame, and a third that should be empty; an empty mask there is none.
    found = segmentation.j_and_f([(0.0, rle(left)), (1.0, rle(left)), (2.0, rle(left))], regions)
    assert found["j"] == pytest.approx((0.5 + 1 + 0) / 3) and found["j_and_f"] == pytest.approx(
        (found["j"] + found["f"]) / 2
    )
    assert segmentation.j_and_f([*whole, (2.0, rle(left & right))], regions)["j"] == 1.0
    assert segmentation.j_and_f([], regions) == dict.fromkeys(segmentation.METRICS, 0.0)
    with pytest.raises(ValueError, match=r"masks of \[3, 3\] pixels"):
        segmentation.j_and_f([(0.0, rle(np.ones((3, 3), dtype=bool)))], regions)


def test_points_for_sam_2_and_the_masks_that_come_back(export, said, tmp_path, capsys):  # noqa: F811
    clip = film()
    facts = video_facts(clip)
    mask = np.zeros((facts["height"], facts["width"]), dtype=bool)
    mask[:20, :30] = True
    task = {
        "task": "tracking",
        "label": "cat",
        "question": "Where is the cat?",
        "fps": 1.0,
        "style": "video_point_track_per_frame",
        "frames": [[0.0, [["a", 0.1, 0.1]]]],
        "regions": [{"size": list(mask.shape), "masks": [[0.0, encode_mask(mask)]], "object": "a"}],
    }
    pick = {"task": "question", "question": "What?", "answers": ["it"]}
    example = {"video": {"part": "clip.mp4", **facts, "annotation_fps": 1.0}, "branches": [task, pick]}
    shards, out, masks = tmp_path / "tracks", tmp_path / "out", tmp_path / "masks.jsonl"
    shards.mkdir()
    write_shards(shards, {"test": [("v", {"json": json.dumps(example).encode(), "clip.mp4": clip})]})
    said["Where is the cat?"] = '<tracks coords="0.0 1 100 500">cat</tracks>'
    command = (export, "--data", shards, "--out", out, "--device", "cpu")
    status, shown, error = run(capsys, *command, "--sam2")
    assert status == 0 and "points of 1 answers about tracks with masks" in shown, error
    (line,) = map(json.loads, (out / "sam2/points.jsonl").read_text().splitlines())
    height, width = mask.shape
    assert line["points"] == [{"object": 1, "seconds": 0.0, "x": 0.1 * width, "y": 0.5 * height}]
    assert line["size"] == [height, width] and (out / "sam2" / line["video"]).read_bytes() == clip

    half = mask.copy()
    half[:, :15] = False
    made = {"id": line["id"], "object": 1, "seconds": 0.0, **rle(half)}
    masks.write_text(json.dumps(made) + "\n")
    status, shown, error = run(capsys, *command, "--masks", masks)
    assert status == 0 and "1 answers have J&F" in shown and "0 of them without a mask" in shown, error
    scores = {one["metric"]: one["mean"] for one in json.loads((out / "scores.json").read_text())["scores"]}
    assert scores["j"] == 0.5 and scores["j_and_f"] == pytest.approx((0.5 + scores["f"]) / 2) and "hota" in scores
    for wrong, words in (
        ({**made, "counts": None}, "line 1: no mask"),
        ({**made, "id": "tracks/other/0"}, "has masks of tracks/other/0"),
        ({**made, **rle(np.ones((2, 2)))}, "masks of [2, 2] pixels"),
    ):
        masks.write_text(json.dumps(wrong) + "\n")
        status, _, error = run(capsys, *command, "--masks", masks)
        assert status == 1 and words in error and "Traceback" not in error
    assert coco.area(coco.encode(np.asfortranarray(half.astype(np.uint8)))) == 20 * 15
