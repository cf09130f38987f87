"""Multiple choice about videos, of conf/evaluations.yaml. Columns and rules: allenai/molmo2 at f3cb108,
olmo/data/academic_video_datasets.py.

The style is that of training: the public code's video_eval_multiple_choice is changed to it before a question is
written (olmo/preprocessing/data_formatter.py, get_system_prompt).
"""

from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath

from molmo2_nemo.catalogue.raw import RawSource, read_rows
from molmo2_nemo.prepare.converters.common import (
    LETTERS,
    Clip,
    Converter,
    Draft,
    Drop,
    choice,
    clip,
    find,
    lettered_choice,
    more,
    options_of,
    read_json,
    said,
    spoken,
    usable,
    whole_number,
)

MC = "video_multiple_choice"
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
# Files of questions of TOMATO; the & in two of them is another sign after a download.
TOMATO = ("count", "direction", "rotation", "shape?trend", "velocity?frequency", "visual_cues")
# Of MLVU, the files of questions with options, and the folders of their videos.
MLVU = ("1_plotQA", "2_needle", "3_ego", "4_count", "5_order", "6_anomaly_reco", "7_topic_reasoning")
FRAMES_OF = ("episodic_reasoning", 3)  # folders of pictures, so many a second


def nextqa(row: dict) -> Iterator[Draft]:
    options = [row[f"a{number}"] for number in range(5)]
    video = clip([f"NExTVideo/{row['video']}", str(row["video"])])
    yield Draft([choice(row["question"], options, row["answer"], MC)], video=video, tree=None)


def mvbench_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    for name, folder in MVBENCH.items():
        for row in read_json(find(raw, f"json/{name}.json")):
            yield more(row, part=name, folder=folder)


def mvbench(row: dict) -> Iterator[Draft]:
    """Of some parts, `start` and `end` of a clip in seconds."""
    task = choice(row["question"], row["candidates"], row["candidates"].index(row["answer"]), MC)
    name = f"{row['folder']}/{row['video']}"
    span = (row.get("start"), row.get("end"))
    if span.count(None) == 1:
        raise ValueError("a clip without its start or its end")
    if row["part"] == FRAMES_OF[0]:
        video = clip([f"{name}/video"], *span, frames=[name], fps=FRAMES_OF[1])
    else:
        video = clip([name, f"data0613/{name}"], *span)
    yield Draft([task], video=video, tree=None)


def tomato_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    for name in TOMATO:
        yield from read_json(find(raw, f"{name}.json")).values()


def tomato(row: dict) -> Iterator[Draft]:
    task = choice(row["question"], row["options"], row["answer"], MC)
    yield Draft([task], video=clip(f"{row['demonstration_type']}/{row['key']}"), tree=None)


def motionbench(row: dict) -> Iterator[Draft | Drop]:
    """Videos with questions that hold their options; those of the test split have no answer."""
    video = clip([f"{folder}/{row['video_path']}" for folder in ("self-collected", "public-dataset")])
    yield from _about(video, row["qa"])


def _about(video: Clip, items: list) -> Iterator[Draft | Drop]:
    """A sample of each question, whose last lines are its options with their letters."""

    def task(item: dict) -> dict | Drop:
        if item["answer"] == "NA":
            return Drop("a question without an answer")
        text, options = options_of(item["question"])
        return lettered_choice(text, options, item["answer"], MC)

    for one in usable(task, items):
        yield one if isinstance(one, Drop) else Draft([one], video=video, tree=None)


def perception_test(row: dict) -> Iterator[Draft]:
    task = choice(row["question"], row["options"], row["answer_id"], MC)
    yield Draft([task], video=clip(said(row["video_name"])), tree=None)


def egoschema(row: dict) -> Iterator[Draft | Drop]:
    if row["answer"] is None:
        yield Drop("a question without an answer")
        return
    task = lettered_choice(row["question"], row["option"], LETTERS[whole_number(row["answer"])], MC)
    yield Draft([task], video=clip(said(row["video_idx"])), tree=None)


def video_mme_rows(raw: RawSource, split: str | None, subtitled: bool) -> Iterator[dict]:
    spoken_in = read_json(find(raw, "subtitles.json")) if subtitled else {}
    for row in read_rows(find(raw, "test-*.parquet")):
        yield more(row, spoken_in=spoken_in)


def video_mme(row: dict) -> Iterator[Draft]:
    lines = row["spoken_in"].get(row["videoID"], {}).values()
    subtitles = spoken((line["start"], line["end"], line["text"]) for line in lines)
    task = lettered_choice(row["question"], row["options"], row["answer"], _style(subtitles))
    yield Draft([task], video=clip(said(row["videoID"]), subtitles=subtitles), tree=None)


def _style(subtitles: list) -> str:
    return f"{MC}_w_subtitle" if subtitles else MC


def long_video_bench_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    path = find(raw, "lvb_val.json")
    for row in read_json(path):
        yield more(row, folder=path.parent / "subtitles")


def long_video_bench(row: dict) -> Iterator[Draft]:
    """The videos are cut from longer ones, whose time the subtitles have."""
    file = row["folder"] / PurePosixPath(row["subtitle_path"]).name
    if not file.is_file():
        raise ValueError("its subtitles are not on disk")
    begin, length, lines = float(row["starting_timestamp_for_subtitles"]), float(row["duration"]), []
    for line in read_json(file):
        if "timestamp" in line:
            start, end, text = *line["timestamp"], line["text"]
        else:
            start, end, text = _seconds(line["start"]), _seconds(line["end"]), line["line"]
        # Some last lines have no end.
        lines.append((start - begin, length if end is None else end - begin, text))
    subtitles = [line for line in spoken(lines) if line[1] >= 0 and line[0] <= length]
    task = choice(row["question"], row["candidates"], row["correct_choice"], _style(subtitles))
    yield Draft([task], video=clip(said(row["video_path"]), subtitles=subtitles), tree=None)


def _seconds(text: str) -> float:
    """Of hours:minutes:seconds."""
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def lvbench(row: dict) -> Iterator[Draft | Drop]:
    yield from _about(clip(said(row["key"])), row["qa"])


def mlvu_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    for name in MLVU:
        for row in read_json(find(raw, f"json/{name}.json")):
            yield more(row, folder=name)


def mlvu(row: dict) -> Iterator[Draft]:
    task = choice(row["question"], row["candidates"], row["candidates"].index(row["answer"]), MC)
    yield Draft([task], video=clip(f"{row['folder']}/{row['video']}"), tree=None)


def video_eval_pro(row: dict) -> Iterator[Draft]:
    task = lettered_choice(row["question"], row["options"], row["answer"], MC)
    yield Draft([task], video=clip(f"videos_filtered/{row['video']}"), tree=None)


CONVERTERS = {
    "nextqa-test": Converter(nextqa),
    "mvbench": Converter(mvbench, mvbench_rows),
    "tomato": Converter(tomato, tomato_rows),
    "motionbench-val": Converter(motionbench),
    "perception-test-val": Converter(perception_test),
    "egoschema-val": Converter(egoschema),
    "video-mme": Converter(video_mme, partial(video_mme_rows, subtitled=False)),
    "video-mme-subtitled": Converter(video_mme, partial(video_mme_rows, subtitled=True)),
    "longvideobench-val": Converter(long_video_bench, long_video_bench_rows),
    "lvbench": Converter(lvbench),
    "mlvu-dev": Converter(mlvu, mlvu_rows),
    "videoeval-pro": Converter(video_eval_pro),
}
