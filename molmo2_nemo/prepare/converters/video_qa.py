"""Questions about whole videos, or about clips that the rows name."""

import ast
import re
from collections.abc import Iterator
from functools import partial

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.prepare.converters.common import (
    Clip,
    Converter,
    Draft,
    Drop,
    array_rows,
    choice,
    clip,
    columns,
    drafts_of,
    find,
    json_items,
    jsonl,
    of_youtube,
    pick,
    question,
    read_json,
    shuffled_choice,
    spoken,
    table,
    together,
    usable,
)

MC, SHORT = "video_multiple_choice", "video_short_answer"
OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.+?)\s*$")
# Branches of one clip of STAR (allenai/molmo2).
STAR_BRANCHES = 10
TVQA_FPS = 3
# Where the options of FunQA may begin, and at how many of these places it is tried.
OPTIONS_BEGIN = re.compile(r"(?:The Options are:|\n)\s*(?=\[)")
MAX_BEGINNINGS = 20
SUBTITLE = re.compile(r"<subtitle>", re.IGNORECASE)
TAG = re.compile(r"<[^<>]{1,40}>")
TIMED = re.compile(r"^\s*\[?\s*([0-9.]+)\s*[-–]\s*([0-9.]+)\s*\]?[\s:]+(.*)$", re.DOTALL)
ACTION = ("Which action does the video show?", "What is being done in the video?", "What happens in this video?")


def numbered(row: dict, prefix: str, first: int, count: int) -> list[str]:
    """The values of numbered columns such as a0..a4."""
    return [row[f"{prefix}{index}"] for index in range(first, first + count)]


def with_and_without(text: str, options: list, answer) -> list[dict | Drop]:
    """A question alone and with its options, as far as each can be asked. answer: index of the right option from 0."""
    index = int(answer)
    if not 0 <= index < len(options):
        raise ValueError("the right answer is none of the options")
    return [
        *usable(lambda right: question(text, [right], SHORT), [options[index]]),
        *usable(lambda all_options: choice(text, all_options, index, MC), [options]),
    ]


def human_qa(row: dict) -> Iterator[Draft | Drop]:
    if not (row["answer"] or "").strip():
        yield Drop("no answer")
    else:
        yield Draft([question(row["question"], row["answer"], "user_qa")], video=clip(of_youtube(row["video_id"])))


def caption_qa(row: dict) -> Iterator[Draft]:
    """The right option among wrong ones; with the video's subtitles, if it has a column of them."""
    task = shuffled_choice(row["Question"], row["Answer"], row["NegativeAnswers"], MC, row["video_id"])
    subtitles = spoken((s["start"], s["end"], s["text"]) for s in row.get("subtitle") or [])
    yield Draft([task], video=clip(of_youtube(row["video_id"]), subtitles=subtitles))


def camera_bench(row: dict) -> Iterator[Draft | Drop]:
    asked = columns(row["mc_qa_list"], "Question", "Answer", "NegativeAnswers")
    tasks = usable(lambda item: shuffled_choice(*item, MC, row["video_path"]), asked)
    yield from drafts_of(tasks, [], video=clip(row["video_path"]))


def nextqa_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    names = read_json(find(raw, "map_vid_vidorID.json"))
    for row in table(find(raw, "train.csv")):
        yield row | {"file": names.get(row["video"], row["video"])}


def nextqa(row: dict) -> Iterator[Draft]:
    """a0..a4 and the index of the right one, of a VidOR video in FOLDER/ID."""
    task = choice(row["question"], numbered(row, "a", 0, 5), row["answer"], MC)
    yield Draft([task], video=clip(list(dict.fromkeys([row["file"], row["file"].rsplit("/", 1)[-1]]))))


def intentqa(row: dict) -> Iterator[Draft | Drop]:
    """NExT-QA's columns; each question is asked with and without its options."""
    tasks = with_and_without(row["question"], numbered(row, "a", 0, 5), row["answer"])
    yield from drafts_of(tasks, [], video=clip(row["video_id"]))


def video_instruct(row: dict) -> Iterator[Draft]:
    """VideoInstruct-100K: questions about ActivityNet videos, which it calls v_ID."""
    name = row["video_id"]
    yield Draft([question(row["q"], row["a"], "user_qa")], video=clip([name.removeprefix("v_"), name]))


def perception_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    for name, value in read_json(find(raw, "all_train.json")).items():
        yield {"video": name, **value}


def perception_test(row: dict) -> Iterator[Draft | Drop]:
    asked = row.get("mc_question")
    if not asked:
        yield Drop("no question with options")
        return
    tasks = usable(lambda item: choice(item["question"], item["options"], item["answer_id"], MC), asked)
    yield from drafts_of(tasks, [], video=clip([f"train_videos/{row['video']}", row["video"]]))


def tgif_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """The columns are separated by tabs, although the files are called .csv."""
    for kind in ("action", "count", "transition", "frameqa"):
        for row in table(find(raw, f"Train_{kind}_question.csv"), "\t"):
            yield row | {"kind": kind}


def tgif(row: dict) -> Iterator[Draft | Drop]:
    """Actions and transitions are asked with and without their options."""
    if row["kind"] in ("action", "transition"):
        tasks = with_and_without(row["question"], numbered(row, "a", 1, 5), row["answer"])
    else:
        tasks = [question(row["question"], row["answer"], SHORT)]
    name = row["gif_name"].strip().removesuffix(".gif")
    yield from drafts_of(tasks, [], video=clip([name, f"gifs/{name}", f"videos/{name}"]))


def tvqa_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """Questions with the subtitles of their clip."""
    spoken = {row["vid_name"]: row["sub"] for row in jsonl(find(raw, "tvqa_preprocessed_subtitles.jsonl"))}
    for row in jsonl(find(raw, "tvqa_train.jsonl")):
        yield row | {"sub": spoken.get(row["vid_name"], [])}


def tvqa(row: dict) -> Iterator[Draft]:
    """`ts` are the seconds that the question is about. The clips are pictures, 3 a second, unless made into videos."""
    start, end = (float(value) for value in row["ts"].split("-"))
    task = choice(row["q"], numbered(row, "a", 0, 5), row["answer_idx"], MC)
    video = clip(row["vid_name"], start, end)
    show = {
        "The Big Bang Theory": "bbt",
        "Friends": "friends",
        "How I Met You Mother": "met",
        "Grey's Anatomy": "grey",
        "House M.D.": "house",
        "Castle": "castle",
    }.get(row.get("show_name"), row.get("show_name"))
    video.frames = [f"{folder}{row['vid_name']}" for folder in ("", f"{show}_frames/", f"frames_hq/{show}_frames/")]
    video.fps = TVQA_FPS
    video.subtitles = spoken((s["start"], s["end"], s["text"]) for s in row["sub"])
    yield Draft([task], video=video)


def paxion_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    yield from json_items(find(raw, "antonyms/train_with_rel_path.json", "train_with_rel_path.json"))
    yield from jsonl(find(raw, "egoclip_subset_action_antonyms_train_val_test_split/train.jsonl"))


def paxion(row: dict) -> Iterator[Draft]:
    """An action, its opposite, and "Not sure"; of Something-Something V2 or Ego4D."""
    if "rel_vid_path" in row:
        right, wrong = row["label"], row["label_action_antonym_clip_text"]
        video = clip([row["rel_vid_path"], row["rel_vid_path"].rsplit("/", 1)[-1]])
    else:
        right, wrong = row["clip_text"], row["action_antonym_clip_text"]
        right, wrong = (_without_narrator(text) for text in (right, wrong))
        start, end, uid = float(row["clip_start"]), float(row["clip_end"]), row["video_uid"]
        video = clip([f"full_scale/{uid}", uid], start, end, [f"{uid}_{start:.3f}_{end:.3f}.mp4"])
    seed = f"{video.names[0]} {video.start}"
    yield Draft([shuffled_choice(pick(ACTION, seed), right, [wrong, "Not sure"], MC, seed)], video=video)


def _without_narrator(text: str) -> str:
    """Ego4D's narrations begin with a tag of who acts: "#C C opens the door" is "C opens the door"."""
    text = re.sub(r"^#\S", "", text).lstrip()
    return text[:1].upper() + text[1:]


def llava_video(row: dict) -> Iterator[Draft | Drop]:
    """Conversations, the first question of which starts with "<image>". Lettered options become a choice."""
    turns = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
    asked = together(turns[::2], turns[1::2])
    tasks = usable(lambda item: lettered_choice(*item) or question(*item, SHORT), asked)
    kinds = {"mc" if task["task"] == "multiple_choice" else "oe" for task in tasks if isinstance(task, dict)}
    names = [row["video"], f"{row['data_source']}/{row['video']}"] if row.get("data_source") else [row["video"]]
    yield from drafts_of(tasks, [], video=clip(names), tree="-".join(sorted(kinds)))


def lettered_choice(text: str, answer: str) -> dict | None:
    """The task of a text "question / A. x / B. y / instruction" and an answer "B." or "B. y"; None: it is not that."""
    options, asked = [], []
    for line in text.splitlines():
        match = OPTION.match(line)
        if match and ord(match[1]) - ord("A") == len(options):
            options.append(match[2])
        elif not options:
            asked.append(line)
    letter = re.match(r"^\s*\(?([A-Z])(?=[.):\s]|$)", answer)
    index = ord(letter[1]) - ord("A") if letter else -1
    if len(options) < 2 or not 0 <= index < len(options):
        return None
    return choice("\n".join(asked), options, index, MC)


def how2qa_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    names = ["video_id", "span", "wrong1", "wrong2", "wrong3", "question", "answer"]
    return table(find(raw, "how2QA_train_release.csv"), names=names)


def how2qa(row: dict) -> Iterator[Draft]:
    """A CSV file without a header; the span is "[start:end]" in seconds."""
    match = re.fullmatch(r"\s*\[\s*([0-9.]+)\s*:\s*([0-9.]+)\s*\]\s*", row["span"])
    if not match:
        raise ValueError("a span that is not [start:end]")
    wrong = [row["wrong1"], row["wrong2"], row["wrong3"]]
    task = shuffled_choice(row["question"], row["answer"], wrong, MC, row["video_id"], row["span"])
    name = row["video_id"].strip()
    # Clips that a user cut are named by the seconds to hundredths: [180.0:200.31] is ID_180.0_200.31.
    start, end = (round(float(value), 2) for value in match.groups())
    yield Draft([task], video=clip(name, start, end, [f"{name}_{start}_{end}", f"{name}_{match[1]}_{match[2]}"]))


def trafficqa_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """Rows are lists, of which the first holds the names of the columns."""
    names = None
    for row in jsonl(find(raw, "R2_train.jsonl")):
        if names is None:
            names = row
        else:
            yield dict(together(names, row))


def trafficqa(row: dict) -> Iterator[Draft]:
    options = [str(option or "").strip() for option in numbered(row, "option", 0, 4)]
    right = options[int(row["answer"])]
    kept = [option for option in options if option]
    name = row["vid_filename"]
    task = choice(row["q_body"], kept, kept.index(right), MC)
    yield Draft([task], video=clip([f"compressed_videos/{name}", name]))


def social_iq(row: dict) -> Iterator[Draft]:
    task = choice(row["q"], numbered(row, "a", 0, 4), row["answer_idx"], MC)
    yield Draft([task], video=clip(row["vid_name"]))


def open_answer(row: dict, name: str) -> Iterator[Draft | Drop]:
    """A question and its answer, or answers, about the video that the column `name` names."""
    answer = row["answer"]
    if not answer or not str(answer).strip():
        yield Drop("no answer")
        return
    yield Draft([question(row["question"], answer, SHORT)], video=clip(row[name]))


def sports_qa(row: dict) -> Iterator[Draft | Drop]:
    """`video` is SPORT/NAME, but the archives have the gymnasts' clips (fg/NAME) in finegym_01 to finegym_05."""
    for result in open_answer(row, "video"):
        if isinstance(result, Draft) and row["video"].startswith("fg/"):
            name = row["video"].removeprefix("fg/")
            result.video = clip([row["video"], *(f"finegym_{part:02}/{name}" for part in range(1, 6))])
        yield result


def cinepile(row: dict) -> Iterator[Draft | Drop]:
    """Subtitles are one text with a tag before each; those without times are shown during the whole clip."""
    tasks = usable(lambda e: choice(e["question"], e["choices"], e["answer_key_position"], MC), row["examples"])
    pieces = [TAG.sub(" ", piece).strip() for piece in SUBTITLE.split(row.get("subtitles") or "")]
    timed = [(piece, TIMED.match(piece)) for piece in pieces if piece]
    if timed and all(match for _, match in timed):
        subtitles = [(float(m[1]), float(m[2]), m[3].strip()) for _, m in timed]
    else:
        text = "\n".join(piece for piece, _ in timed)
        subtitles = [(0.0, 1e6, text)] if text else []
    name = row["video_id"]
    yield from drafts_of(tasks, [], video=clip([f"{name}/{name}", name], subtitles=subtitles))


def clevrer(row: dict) -> Iterator[Draft | Drop]:
    """Descriptive questions have an answer; the others choices, of which exactly one must be right."""

    def with_choices(item: dict) -> dict | Drop:
        right = [i for i, c in enumerate(item["choices"]) if c["answer"] == "correct"]
        if len(right) != 1 or len(item["choices"]) < 2:
            return Drop("not exactly one right choice")
        return choice(item["question"], [c["choice"] for c in item["choices"]], right[0], MC)

    asked = row["questions"]
    options = usable(with_choices, (item for item in asked if "choices" in item))
    descriptive = (item for item in asked if "choices" not in item)
    spoken = usable(lambda item: question(item["question"], item["answer"], SHORT), descriptive)
    name = row["video_filename"]
    number = int((re.search(r"\d+", name) or ["0"])[0]) // 1000
    names = [name, f"video_{number * 1000:05d}-{(number + 1) * 1000:05d}/{name}"]
    for tree, tasks in (("mc", options), ("oe", spoken)):
        if tasks:
            yield from drafts_of(tasks, [], video=clip(names), tree=tree)


def funqa_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """The multiple choice file is of all splits: a row of it is `trained` if its video has an answer in the other."""
    trained = set()
    for row in json_items(find(raw, "FunQA_train.json")):
        trained.add(row.get("visual_input"))
        yield row
    for row in json_items(find(raw, "Funqa_mcqa_v1.json")):
        yield row | {"trained": row.get("visual_input") in trained}


def funqa(row: dict) -> Iterator[Draft | Drop]:
    """Tasks that ask for times are left out. Rows of the multiple choice file name no task."""
    if row.get("trained") is False:
        yield Drop("a question about a video of another split")
        return
    if row.get("task") in ("H1", "C1", "M1", "C4", "C5"):
        yield Drop("asks for times")
        return
    name = row["visual_input"]
    video = clip([*(f"train/train_{kind}/{name}" for kind in ("humor", "creative", "magic")), name])
    if row.get("gt") is None:
        yield Draft([question(row["instruction"], row["output"], SHORT)], video=video, tree="oe")
    else:
        asked, options = _asked_in_text(row["instruction"])
        yield Draft([choice(asked, options, int(row["gt"]) - 1, MC)], video=video, tree="mc")


def _asked_in_text(text: str) -> tuple[str, list[str]]:
    """The question and the options of "... The Question is: ...? The Options are: ['Options 1: ...', ...]".

    ValueError: the text does not end with a Python list.
    """
    # The list is what follows one of these and reaches to the end. The question and the options may hold them, too.
    for start in list(OPTIONS_BEGIN.finditer(text))[:MAX_BEGINNINGS] if len(text) < 20_000 else []:
        try:
            options = ast.literal_eval(text[start.end() :].strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(options, list):
            line = text[: start.start()].strip().rpartition("\n")[2]
            asked = line.partition("The Question is:")[2] if "The Question is:" in line else line
            named = [str(option).removeprefix(f"Options {k}:").strip() for k, option in enumerate(options, 1)]
            return asked.strip(), named
    raise ValueError("no list of options in the text")


def star(row: dict) -> Iterator[Draft | Drop]:
    """Each question with and without its options, about seconds of a Charades video."""
    text, answer, options = row["question"], row["answer"], [c["choice"] for c in row["choices"]]
    if answer in options:
        tasks = with_and_without(text, options, options.index(answer))
    else:
        tasks = [question(text, answer, SHORT), Drop("the right answer is none of the options")]
    name = row["video_id"]
    yield from drafts_of(tasks, [], video=clip([f"Charades_v1/{name}", name], row["start"], row["end"]))


def narrative_qa(row: dict) -> Iterator[Draft | Drop]:
    tasks = usable(lambda pair: question(pair["raw_question"], pair["raw_answer"], SHORT), row["qa_pairs"])
    name = row["video_name"]
    yield from drafts_of(tasks, [], video=clip([name, f"oops_video/train/{name}", f"train/{name}"]))


def countix_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    questions = read_json(find(raw, "class_to_question.json"))
    for row in table(find(raw, "countix_train_mapped.csv")):
        yield row | {"questions": questions.get(row["class"])}


def countix(row: dict) -> Iterator[Draft | Drop]:
    """How often something is repeated. One of the questions of its class is chosen by a hash."""
    asked = row["questions"]
    if not asked:
        yield Drop("a class without a question")
        return
    text = asked if isinstance(asked, str) else pick(tuple(asked), row["video_path"])
    answer = str(int(float(row["count"])))
    yield Draft([question(text, answer, SHORT)], video=clip(row["video_path"]))


def ego4d(row: dict) -> Iterator[Draft | Drop]:
    """Conversations with their styles, about a clip that is cut already."""
    if row.get("corrupt"):
        yield Drop("marked as corrupt")
        return
    tasks = usable(lambda m: question(m["question"], m["answer"], m["style"]), row["message_list"])
    video = Clip([row["clip"], f"clips/{row['clip']}"])
    if row.get("start") is not None and row.get("end") is not None:
        whole = clip([f"full_scale/{row['uid']}", row["uid"]], row["start"], row["end"], video.names)
        video = whole
    yield from drafts_of(tasks, [], video=video)


CONVERTERS = {
    "Molmo2-AskModelAnything": Converter(human_qa),
    "Molmo2-VideoCapQA": Converter(caption_qa),
    "Molmo2-VideoSubtitleQA": Converter(caption_qa),
    "nextqa": Converter(nextqa, nextqa_rows),
    "intentqa": Converter(intentqa),
    "videochatgpt": Converter(video_instruct),
    "perception-test": Converter(perception_test, perception_rows),
    "tgif": Converter(tgif, tgif_rows),
    "tvqa": Converter(tvqa, tvqa_rows),
    "paxion": Converter(paxion, paxion_rows),
    "llava-video-academic": Converter(llava_video),
    "newsvideoqa": Converter(partial(open_answer, name="uni_clipped_id")),
    "how2qa": Converter(how2qa, how2qa_rows),
    "sutd-trafficqa": Converter(trafficqa, trafficqa_rows),
    "social-iq-2": Converter(social_iq),
    "sports-qa": Converter(sports_qa, array_rows("meta-data/train.json")),
    "cinepile": Converter(cinepile),
    "clevrer": Converter(clevrer, array_rows("train.json")),
    "funqa": Converter(funqa, funqa_rows),
    "star": Converter(star, array_rows("STAR_train.json"), max_branches=STAR_BRANCHES),
    "video-localized-narratives-qa": Converter(
        narrative_qa, array_rows("text_output/oops_train/qa_text_output.json", "annotations")
    ),
    "roadtextvqa": Converter(partial(open_answer, name="video"), array_rows("train.json", "data")),
    "countix": Converter(countix, countix_rows),
    "camerabench": Converter(camera_bench),
    "ego4d": Converter(ego4d),
}
