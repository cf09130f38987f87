"""Sets with labels, sentences or windows for parts of videos: questions are made of them."""

import csv
import re
from collections.abc import Iterator

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.prepare.converters.common import (
    Converter,
    Draft,
    Drop,
    clip,
    find,
    find_all,
    jsonl,
    pick,
    question,
    read_json,
    table,
)

ACTION = (
    "What activity is shown?",
    "Which action takes place in the video?",
    "What is being done here?",
    "Name the activity.",
    "What is the main action in this clip?",
)
HAPPENS = (
    "What happens in this clip?",
    "Describe the event in one sentence.",
    "What is the person doing?",
    "Sum up what takes place.",
    "Say briefly what is going on.",
)
STEP = ("Which step is this?", "What is being done in this step?", "Name the step that is shown.")
BETWEEN = (
    "Describe what happens from <time {start}/> to <time {end}/>.",
    "What takes place between <time {start}/> and <time {end}/>?",
    "Caption the part from <time {start}/> until <time {end}/>.",
)
WHEN = (
    'In which parts of the video is this seen: "{query}"?',
    'Find all segments that show "{query}".',
    'When does the following happen? "{query}"',
    'Give the segments for: "{query}"',
)
# Windows of one query (allenai/molmo2: QVHighlights).
MAX_WINDOWS = 5


def database(pattern: str, key: str, subset: str = "training"):
    """A row for each segment of {"database": {id: {subset, annotations: [{segment, ...}]}}}."""

    def read(raw: RawSource, split: str | None) -> Iterator[dict]:
        for name, value in read_json(find(raw, pattern))["database"].items():
            if value.get("subset", subset) == subset:
                for item in value.get(key) or []:
                    yield {"video": name, **item}

    return read


def activitynet_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """Questions with their answers, then the segments of the same data set's labels, if that file is there."""
    answers = {item["question_id"]: item["answer"] for item in read_json(find(raw, "train_a.json"))}
    for item in read_json(find(raw, "train_q.json")):
        yield item | {"answer": answers.get(item["question_id"])}
    if find_all(raw, "activity_net.v1-3.min.json"):
        yield from database("activity_net.v1-3.min.json", "annotations")(raw, split)


def activitynet(row: dict) -> Iterator[Draft | Drop]:
    if "segment" in row:
        task = question(pick(ACTION, row["video"], row["segment"]), row["label"], "activitynet_label")
        yield Draft([task], video=clip(youtube(row["video"]), *row["segment"]))
    elif row["answer"] is None:
        yield Drop("a question without an answer")
    else:
        text = row["question"].strip()
        task = question(text if text.endswith("?") else f"{text}?", str(row["answer"]), "video_short_answer")
        yield Draft([task], video=clip(youtube(row["video_name"])))


def youtube(name: str) -> list[str]:
    """ActivityNet's videos are called v_ID in some downloads, ID in others."""
    bare = name.removeprefix("v_")
    return [bare, f"v_{bare}"]


def coin(row: dict) -> Iterator[Draft]:
    start, end = row["segment"]
    task = question(pick(STEP, row["video"], start), row["label"], "coin_label")
    yield Draft([task], video=clip(row["video"], start, end, [f"{row['video']}_{start}_{end}.mp4"]))


def youcook(row: dict) -> Iterator[Draft]:
    """Each step is asked about twice: of its clip, and of the whole video by its times."""
    start, end = (float(value) for value in row["segment"])
    seed, sentence = (row["video"], start), row["sentence"].strip()
    sentence = sentence if sentence.endswith(".") else f"{sentence}."
    label = question(pick(STEP, *seed), sentence, "youcook2_label")
    yield Draft([label], video=clip(row["video"], start, end))
    asked = pick(BETWEEN, *seed).format(start=f"{start:.1f}", end=f"{end:.1f}")
    whole = question(asked, sentence, "video_clip_short_caption_start_end")
    yield Draft([whole], video=clip(row["video"]))


def charades_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """Rows of lines "id start end##sentence"."""
    for line in find(raw, "charades_sta_train.txt").read_text(encoding="utf-8").splitlines():
        if line.strip():
            span, _, sentence = line.partition("##")
            name, start, end = span.split()
            yield {"video": name, "start": start, "end": end, "sentence": sentence}


def charades(row: dict) -> Iterator[Draft]:
    task = question(pick(HAPPENS, row["video"], row["start"], row["sentence"]), row["sentence"], "charades_sta")
    yield Draft([task], video=clip([f"Charades_v1/{row['video']}", row["video"]], row["start"], row["end"]))


def qvhighlights_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    return jsonl(find(raw, "highlight_train_release.jsonl"))


def qvhighlights(row: dict) -> Iterator[Draft | Drop]:
    windows = row["relevant_windows"]
    if not 1 <= len(windows) <= MAX_WINDOWS:
        yield Drop(f"not 1 to {MAX_WINDOWS} windows")
        return
    # Whole seconds, as they are annotated: videos of 150 seconds are shown with all of their length.
    answer = f"Segments: {', '.join(f'[{start}-{end}]' for start, end in windows)}"
    asked = pick(WHEN, row["qid"]).format(query=row["query"].strip().rstrip("."))
    task = question(asked, answer, "video_short_answer")
    yield Draft([task], video=clip([row["vid"], f"videos/{row['vid']}"]))


def moments_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """train.csv with the columns video_path and label, or trainingSet.csv with LABEL/FILE, label and votes and without
    a header line."""
    with find(raw, "train.csv", "trainingSet.csv").open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file)
        for index, line in enumerate(lines):
            if index == 0 and "label" in line:
                yield from csv.DictReader(file, line)
                return
            if line:
                yield {"video_path": line[0], "label": line[1]}


def moments(row: dict) -> Iterator[Draft | Drop]:
    label = row["label"].replace("+", " ").strip()
    if label.startswith(("adult ", "child ")):
        yield Drop("a label that starts with adult or child")
        return
    task = question(pick(ACTION, row["video_path"]), label, "moments_in_time_label")
    names = [f"{folder}/{row['video_path']}" for folder in ("train-videos", "training")]
    yield Draft([task], video=clip([*names, row["video_path"]]))


def kinetics_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """Paths of Kinetics-600 and 700, each with the number of one of the 710 names."""
    names = find(raw, "k710_label_map.txt").read_text(encoding="utf-8").splitlines()
    for part in ("600", "700"):
        for line in find(raw, f"k{part}_train_list_videos.txt").read_text(encoding="utf-8").splitlines():
            if line.strip():
                path, number = line.rsplit(maxsplit=1)
                yield {"video": path, "part": part, "label": names[int(number)].strip()}


def kinetics(row: dict) -> Iterator[Draft]:
    """The lists' folders are those of one laboratory; the public ones are named by the labels."""
    label, name = row["label"], row["video"].rsplit("/", 1)[-1]
    task = question(pick(ACTION, row["video"]), label, "kinetics_label")
    folders = [f"kinetics{row['part']}/train/{text}" for text in (label, label.replace(" ", "_"))]
    yield Draft([task], video=clip([*(f"{folder}/{name}" for folder in folders), row["video"], name]))


def epic_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    return table(find(raw, "EPIC_100_train.csv"))


def epic(row: dict) -> Iterator[Draft]:
    start, end = (seconds(row[name]) for name in ("start_timestamp", "stop_timestamp"))
    name = row["video_id"]
    task = question(pick(HAPPENS, name, start), row["narration"], "epic_kitchens_label")
    cut = [f"{name}_{start:.3f}_{end:.3f}.mp4"]
    places = [f"{row['participant_id']}/videos/{name}", name]
    yield Draft([task], video=clip(places, start, end, cut))


def seconds(clock: str) -> float:
    """Seconds of a time written as HH:MM:SS.sss. ValueError: it is written otherwise."""
    match = re.fullmatch(r"(\d+):(\d{1,2}):(\d{1,2}(?:\.\d+)?)", clock.strip())
    if not match:
        raise ValueError("a time that is not HH:MM:SS.sss")
    return 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])


CONVERTERS = {
    "activitynet-qa": Converter(activitynet, activitynet_rows),
    "coin": Converter(coin, database("COIN.json", "annotation")),
    "youcook2": Converter(youcook, database("youcookii_annotations_trainval.json", "annotations")),
    "charades-sta": Converter(charades, charades_rows),
    "qvhighlights": Converter(qvhighlights, qvhighlights_rows),
    "moments-in-time": Converter(moments, moments_rows),
    "kinetics": Converter(kinetics, kinetics_rows),
    "epic-kitchens": Converter(epic, epic_rows),
}
