"""The laptop's pass over stage 1 in docs/datasets.md: fetched, prepared, looked at and trained on, as it stands
there."""

import hashlib
import io
import json
import os
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import warm
from fetch_servers import Hub, Media, Repo
from PIL import Image
from programs import REPOSITORY, run, succeeded

DOCUMENT = (REPOSITORY / "docs" / "datasets.md").read_text()
PHOTOGRAPHS = [
    Image.fromarray(picture()) for picture in (skimage.data.chelsea, skimage.data.coffee, skimage.data.rocket)
]
EACH = 12  # pictures of a set
GONE = 3  # its number


def photograph(number: int) -> bytes:
    """A part of a real picture, a different one for each number."""
    whole = PHOTOGRAPHS[number % 3]
    left, top = 7 * number % 150, 5 * number % 90
    file = io.BytesIO()
    whole.crop((left, top, left + 160 + number, top + 140)).save(file, ("JPEG", "PNG", "WEBP")[number % 3])
    return file.getvalue()


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def repositories(media: Media) -> dict[str, Repo]:
    """The five sets in their published columns, with one dead address, one wrong hash and one held-out picture."""

    def row(name: str, number: int) -> dict:
        path, data = f"/photographs/{name}/{number}", photograph(number)
        if (name, number) != ("cap", GONE):
            media.files[path] = data
        return {"image_url": media.url + path, "image_sha256": hashlib.sha256(data).hexdigest()}

    caption = {"caption": "A photograph, " + "seen from near, " * 9, "transcripts": ["well it is", "so there is a"]}
    caps = [{"image_url": row("cap", n)["image_url"], **caption} for n in range(EACH)]
    pointed = [
        row("points", n)
        | {
            "points": [{"x": 10.0 + n, "y": 20.0}] * n,
            "count": n,
            "label": label,
            "collection_method": "pointing",
        }
        for n in range(EACH)
        for label in ("eyes", "cups")
    ]
    counted = [
        row("count", n) | {"count": n, "points": {"x": [8.0] * n, "y": [9.0] * n}, "label": "ears"} for n in range(EACH)
    ]
    counted[5]["image_sha256"] = "0" * 64
    drawn = [
        {
            "id": str(n),
            "image": {"bytes": photograph(n), "path": None},
            "questions": ["Point to the bar", "And to the line"],
            "answer_points": [{"x": [5.0], "y": [6.0]}, {"x": [7.0, 8.0], "y": [9.0, 10.0]}],
            "names": ["bar", "line"],
        }
        for n in range(EACH)
    ]
    talks = [
        {
            "id": str(n),
            "dataset": "x",
            "messages": [
                {"role": "user", "content": f"What is {n} + 1?"},
                {"role": "assistant", "content": str(n + 1)},
            ],
        }
        for n in range(EACH)
    ]
    sets = {
        "pixmo-cap": caps,
        "pixmo-points": pointed,
        "pixmo-count": counted,
        "CoSyn-point": drawn,
        "tulu-v2-sft-mixture": talks,
    }
    repos = {
        f"allenai/{name}": Repo({"data/train-00000-of-00001.parquet": parquet(rows)}) for name, rows in sets.items()
    }
    return repos | {
        "allenai/pixmo-points-eval": Repo({"data/test-00000-of-00001.parquet": parquet([row("points", 7)])})
    }


@pytest.mark.slow
def test_stage_1_from_the_servers_to_a_trained_step(tmp_path):
    [block] = re.findall(r"<!-- tested -->\n```\n(.*?)```", DOCUMENT, re.DOTALL)
    assert block.count("\n") == 6
    script = block.replace("data/stage1_sample", f"{tmp_path}/data").replace("runs/stage1_sample", f"{tmp_path}/runs")
    # Warm, but for the download, which finds the server's address in its environment when it is imported.
    path = f"{warm.executable().parent}{os.pathsep}{os.environ['PATH']}"
    with Media() as media, Hub(repositories(media)) as hub:
        result = succeeded(
            run(
                ["bash", "-euc", script],
                PATH=path,
                PYTHON=sys.executable,
                HF_ENDPOINT=hub.url,
                HF_HOME=str(tmp_path / "hf"),
            )
        )
    assert "Traceback" not in result.stderr
    report = {made["name"]: made for made in json.loads((tmp_path / "data" / "stage1.report.json").read_text())}
    # Photograph 7 is held out for evaluation, in whichever list of addresses it is.
    there = {"pixmo-cap": EACH - 2, "pixmo-points": EACH - 1, "pixmo-count": EACH - 2, "cosyn-point": EACH}
    assert {name: report[name]["images"] for name in there} == there
    assert all(made["train_samples"] > made["val_samples"] for made in report.values()) and len(report) == 5
    # Of addresses the lowest hash may be one of those without a file; these two sets have none.
    assert [report[name]["val_samples"] for name in ("cosyn-point", "tulu-v2-sft-mixture")] == [1, 1]
    for name, path, kind in (("pixmo-cap", f"/cap/{GONE}", "gone"), ("pixmo-count", "/count/5", "content")):
        records = map(json.loads, (tmp_path / "data" / "raw" / name / "media" / "lost.jsonl").read_text().splitlines())
        assert [record["kind"] for record in records if record["url"].endswith(path)] == [kind]
    assert len(list((tmp_path / "runs" / "inspect" / "samples").glob("*.html"))) == 5
    assert "stage1 ended at step 20 (finished)" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert trained[-1]["loss"] < trained[0]["loss"] and set(trained[-1]["loss_by_source"]) <= set(report)
    assert any(line["kind"] == "validation" for line in lines)
