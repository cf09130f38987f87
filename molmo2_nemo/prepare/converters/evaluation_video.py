"""Multiple choice about videos, of conf/evaluations.yaml. Columns and rules: allenai/molmo2 at f3cb108,
olmo/data/academic_video_datasets.py.

The style is that of training: the public code's video_eval_multiple_choice is changed to it before a question is
written (olmo/preprocessing/data_formatter.py, get_system_prompt).
"""

from collections.abc import Iterator
from functools import partial
from itertools import repeat
from pathlib import PurePosixPath

from molmo2_nemo.catalogue.raw import RawSource, read_rows
from molmo2_nemo.prepare.converters.common import (
    OPTION,
    Converter,
    Draft,
    Drop,
    choice,
    clip,
    find,
    lettered_choice,
    read_json,
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


def tomato_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    for name in TOMATO:
        yield from read_json(find(raw, f"{name}.json")).values()


def tomato(row: dict) -> Iterator[Draft]:
    task = choice(row["question"], row["options"], row["answer"], MC)
    yield Draft([task], video=clip(f"{row['demonstration_type']}/{row['key']}"), tree=None)


def motionbench(row: dict) -> Iterator[Draft | Drop]:
    """Videos with questions that hold their options; those of the test split have no answer."""
    video = clip([f"{folder}/{row['video_path']}" for folder in ("self-collected", "public-dataset")])
    answered = [asked for asked in row["qa"] if asked["answer"] != "NA"]
    yield from repeat(Drop("a question without an answer"), len(row["qa"]) - len(answered))
    for asked in answered:
        yield Draft([_with_options(asked["question"], asked["answer"])], video=video, tree=None)


def _with_options(text: str, letter: str) -> dict:
    """The task of a question whose last lines are its options, each with its letter."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    first = next((number for number, line in enumerate(lines) if number and OPTION.fullmatch(line)), len(lines))
    return lettered_choice("\n".join(lines[:first]), lines[first:], letter, MC)


def perception_test(row: dict) -> Iterator[Draft]:
    task = choice(row["question"], row["options"], row["answer_id"], MC)
    yield Draft([task], video=clip(str(row["video_name"])), tree=None)


def egoschema(row: dict) -> Iterator[Draft | Drop]:
    if row["answer"] is None:
        yield Drop("a question without an answer")
        return
    options = lettered_choice(row["question"], row["option"], "A", MC)["options"]
    yield Draft([choice(row["question"], options, row["answer"], MC)], video=clip(str(row["video_idx"])), tree=None)


def video_mme_rows(raw: RawSource, split: str | None, subtitled: bool) -> Iterator[dict]:
    spoken = read_json(find(raw, "subtitles.json")) if subtitled else {}
    for row in read_rows(find(raw, "test-*.parquet")):
        lines = spoken.get(row["videoID"], {}).values()
        yield row | {"subtitles": [(line["start"], line["end"], line["text"]) for line in lines]}


def video_mme(row: dict) -> Iterator[Draft]:
    task = lettered_choice(row["question"], row["options"], row["answer"], _style(row["subtitles"]))
    video = clip(
        str(row["videoID"]), subtitles=[(float(start), float(end), text) for start, end, text in row["subtitles"]]
    )
    yield Draft([task], video=video, tree=None)


def _style(subtitles: list) -> str:
    return f"{MC}_w_subtitle" if subtitles else MC


def long_video_bench_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    path = find(raw, "lvb_val.json")
    for row in read_json(path):
        yield row | {"lines": read_json(path.parent / "subtitles" / PurePosixPath(row["subtitle_path"]).name)}


def long_video_bench(row: dict) -> Iterator[Draft]:
    """The videos are cut from longer ones, whose time the subtitles have."""
    start = float(row["starting_timestamp_for_subtitles"])
    subtitles = []
    for line in row["lines"]:
        if "timestamp" in line:
            begin, end, text = *line["timestamp"], line["text"]
        else:
            begin, end, text = _seconds(line["start"]), _seconds(line["end"]), line["line"]
        # Some last lines have no end.
        end = float(row["duration"]) if end is None else float(end) - start
        subtitles.append((float(begin) - start, end, text))
    subtitles = [(begin, end, text) for begin, end, text in subtitles if end >= 0 and begin <= row["duration"]]
    task = choice(row["question"], row["candidates"], row["correct_choice"], _style(subtitles))
    yield Draft([task], video=clip(row["video_path"], subtitles=subtitles), tree=None)


def _seconds(text: str) -> float:
    """Of hours:minutes:seconds."""
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def lvbench(row: dict) -> Iterator[Draft]:
    for asked in row["qa"]:
        yield Draft([_with_options(asked["question"], asked["answer"])], video=clip(row["key"]), tree=None)


def mlvu_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    for name in MLVU:
        for row in read_json(find(raw, f"json/{name}.json")):
            yield row | {"folder": name}


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
