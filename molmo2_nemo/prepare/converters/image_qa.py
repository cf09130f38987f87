"""Questions about pictures.

Questions about one picture share a sample where the report has fewer examples than annotations (arXiv 2601.10611, Table
13); in the other sets (`tree` is None) each is a sample of its own.
"""

import re
from collections.abc import Iterator
from functools import partial

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.prepare.converters.common import (
    Converter,
    Draft,
    Drop,
    Rows,
    array_rows,
    chat,
    choice,
    columns,
    find,
    find_all,
    image_of,
    json_items,
    pick,
    question,
    read_json,
    shuffled_choice,
    table,
    together,
)

MAX_IMAGES = 5  # of several-image sets (molmo2: max_images)
TURN = re.compile(r"\[(USER|ASSISTANT)\]", re.IGNORECASE)
CLOCK = (
    "What time is it?",
    "What time does the clock show?",
    "Read the clock.",
    "Tell me the time that is shown.",
    "Which time does this watch show?",
)


def url_question(row: dict) -> Iterator[Draft | Drop]:
    """pixmo-ask-model-anything: questions by people, long answers."""
    yield Draft([question(row["question"], row["answer"], "user_qa")], [row["image_url"]])


def pixmo_cap_qa(row: dict) -> Iterator[Draft | Drop]:
    """`question` is a dialogue, "[USER] ... [ASSISTANT] ... [USER] ...", and `answer` its last turn."""
    if row.get("messages") and not row.get("question"):
        turns = [message["content"] for message in row["messages"]]
    else:
        head, *parts = TURN.split(row["question"])
        speakers, turns = [speaker.upper() for speaker in parts[::2]], parts[1::2]
        if not parts:
            speakers, turns = ["USER"], [head]
        elif head.strip():
            raise ValueError("text before the first [USER]")
        if len(turns) % 2 == 0 and not turns[-1].strip():  # the last tag marks where the answer begins
            speakers, turns = speakers[:-1], turns[:-1]
        if speakers != (["USER", "ASSISTANT"] * len(turns))[: len(turns)]:
            raise ValueError("[USER] and [ASSISTANT] do not alternate")
        turns = [*turns, row["answer"]]
    yield Draft([chat(turns, "user_qa")], [row["image_url"]])


def clocks(row: dict) -> Iterator[Draft]:
    """The set has no pictures. The user has rendered them, as example_id.png."""
    name = str(row["example_id"])
    task = question(pick(CLOCK, name), row["text"], "pixmo_clocks")
    yield Draft([task], [[f"{name}.png", f"{name}.jpg", f"images/{name}.png", f"images/{name}.jpg"]])


def answers_of(message: dict) -> list[str]:
    """The answers of a question: `answers` (texts, or with `answer` or `raw_answer`), or `answer`, or `direct_answers`.

    ValueError names the keys, if none of these is there.
    """
    for key in ("answers", "direct_answers", "answer"):
        values = message.get(key)
        if isinstance(values, str | int | float):
            return [str(values)]
        if values:
            return [v if isinstance(v, str) else str(v.get("answer", v.get("raw_answer"))) for v in values]
    raise ValueError(f"a question without answers among the keys {', '.join(sorted(message))}")


def message_list(row: dict, style: str, joined: bool = True) -> Iterator[Draft]:
    """Ai2's form: the questions of one picture, whose path is below the data folder, joined in one sample or not."""
    tasks = [question(message["question"], answers_of(message), style) for message in row["message_list"]]
    for part in [tasks] if joined else [[task] for task in tasks]:
        yield Draft(part, [row["image"]], tree="" if joined else None)


def okvqa(row: dict) -> Iterator[Draft]:
    tasks = [question(item["question"], [a["raw_answer"] for a in item["answers"]], "okvqa") for item in row["qas"]]
    yield Draft(tasks, [row["image"]])


def aokvqa(row: dict) -> Iterator[Draft]:
    """Two samples of one picture: the options, and short answers (those that people found easy to give)."""
    messages = row["message_list"]
    options = [choice(m["question"], m["choices"], m["answer_idx"], "a_okvqa_mc") for m in messages if m.get("choices")]
    direct = [
        question(m["question"], m["direct_answers"], "a_okvqa_da")
        for m in messages
        if m.get("direct_answers") and not m.get("difficult_direct_answer")
    ]
    for tree, tasks in (("mc", options), ("da", direct)):
        if tasks:
            yield Draft(tasks, [row["image"]], tree=tree)


def chartqa(row: dict) -> Iterator[Draft]:
    yield Draft([question(row["query"], row["label"], "chart_qa")], [image_of(row["image"])], tree=None)


def scienceqa(row: dict) -> Iterator[Draft | Drop]:
    if not row["image"]:
        yield Drop("no image")
        return
    text = "\n".join(part.strip() for part in (row.get("hint") or "", row["question"]) if part.strip())
    yield Draft([choice(text, row["choices"], row["answer"], "science_qa")], [image_of(row["image"])])


def document_question(row: dict, style: str, column: str) -> Iterator[Draft | Drop]:
    """The Robust Reading Competition's form: a file name, a question, its answers."""
    if row.get("data_split", "train") != "train" or row.get("set_name", "train") != "train":
        yield Drop("not of the training split")
    else:
        yield Draft([question(row["question"], row["answers"], style)], [row[column]], tree=None)


def mantis(row: dict) -> Iterator[Draft | Drop]:
    """Several pictures; questions with options, others with a short answer. All lists are as long as the questions."""
    images = list(row["images"])
    if not 2 <= len(images) <= MAX_IMAGES:
        yield Drop("one image" if len(images) < 2 else f"more than {MAX_IMAGES} images")
        return
    tasks, listed = [], [row.get(name) or [] for name in ("mc_question", "choices", "correct_choice_idx")]
    for text, options, answer in together(*listed):
        if text and options and len(options) > 1 and answer is not None and 0 <= answer < len(options):
            wrong = [option for index, option in enumerate(options) if index != answer]
            tasks.append(shuffled_choice(text, options[answer], wrong, "multi_image_mc", row.get("example_id")))
        else:
            tasks.append(None)
    asked, direct = row.get("oe_question") or [], row.get("direct_answer") or []
    tasks += [None] * (len(asked) - len(tasks))
    for index, (text, answer) in enumerate(together(asked, direct)):
        if tasks[index] is None and text and answer:
            tasks[index] = question(text, answer, "mantis_instruct_da")
    if any(tasks):
        yield Draft([task for task in tasks if task], images)
    else:
        yield Drop("no question with an answer")


def cosyn(row: dict, style: str, explain: bool = True) -> Iterator[Draft]:
    """Drawn charts, documents and so on, with the reasons for each answer."""
    tasks = [
        question(text, answer, style, why if explain else None)
        for text, why, answer in columns(row["qa_pairs"], "question", "explanation", "answer")
    ]
    yield Draft(tasks, [image_of(row["image"])], about=str(row["id"]))


def cosyn_images(row: dict, style: str) -> Iterator[Draft | Drop]:
    images = row["images"] or []
    if not 1 <= len(images) <= MAX_IMAGES:
        yield Drop(f"not 1 to {MAX_IMAGES} images")
        return
    pairs = columns(row["qa_pairs"], "question", "explanation", "answer")
    tasks = [question(text, answer, style, why) for text, why, answer in pairs]
    yield Draft(tasks, [image_of(image) for image in images], about=str(row["id"]))


def multi_image_qa(row: dict) -> Iterator[Draft | Drop]:
    urls = list(row["image_urls"])
    if not 2 <= len(urls) <= MAX_IMAGES:
        yield Drop(f"not 2 to {MAX_IMAGES} images")
        return
    pairs = columns(row["qa_pairs"], "question", "answer")
    yield Draft([question(text, answer, "user_qa") for text, answer in pairs], urls)


def ai2d_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """A row for each diagram: {image, questions, text}, without those of the test set."""
    tested = {row["id"].strip() for path in find_all(raw, "ai2d_test_ids.csv") for row in table(path, names=["id"])}
    for path in find(raw, "questions/0.png.json", "questions/*.json").parent.glob("*.json"):
        name = path.name.removesuffix(".json")
        if name.removesuffix(".png") not in tested:
            boxes = path.parent.parent / "annotations" / path.name
            image = f"./{(path.parent.parent / 'images' / name).relative_to(raw.folder)}"
            yield {
                "image": image,
                "questions": read_json(path)["questions"],
                "text": read_json(boxes).get("text", {}) if boxes.is_file() else {},
            }


def ai2d(row: dict) -> Iterator[Draft | Drop]:
    """Two samples: one with the words in the picture, one with letters drawn over them, for questions about letters."""
    plain, letters = [], []
    for text, item in sorted(row["questions"].items(), key=lambda pair: pair[1]["questionId"]):
        options, answer = [str(option) for option in item["answerTexts"]], int(item["correctAnswer"])
        if item.get("abcLabel"):
            task = choice(text, options, answer, "ai2_diagram_no_letter")
            asked = f"{task['question']} {', '.join(task['options'])}"
            letters.append(question(asked, task["options"][answer], "ai2_diagram_no_letter"))
        else:
            plain.append(choice(text, options, answer, "ai2_diagram"))
    for task in plain:
        yield Draft([task], [row["image"]], about=row["image"], tree=None)
    if letters:
        boxes = [
            [*item["rectangle"][0], *item["rectangle"][1], str(item["replacementText"])]
            for _, item in sorted(row["text"].items())
            if item.get("replacementText")
        ]
        if not boxes:
            yield Drop("a question about letters, and none are to be drawn")
            return
        for opacity in (255, 128):
            drawn = {"name": row["image"], "boxes": boxes, "opacity": opacity}
            for task in letters:
                yield Draft([task], [drawn], about=row["image"], tree=None)


def dvqa(row: dict) -> Iterator[Draft]:
    name = row["image"]
    yield Draft([question(row["question"], str(row["answer"]), "dv_qa")], [[f"images/{name}", name]])


def plot_rows(*patterns: str) -> Rows:
    """Rows of qa_pairs with `folder`, where the file lies, relative to the raw folder."""

    def read(raw: RawSource, split: str | None) -> Iterator[dict]:
        path = find(raw, *patterns)
        folder = f"./{path.parent.relative_to(raw.folder)}"
        for row in json_items(path, "qa_pairs"):
            yield row | {"folder": folder}

    return read


def figureqa(row: dict) -> Iterator[Draft]:
    """Answers are the digits 0 and 1, as in the public code."""
    image = f"{row['folder']}/png/{row['image_index']}.png"
    yield Draft([question(row["question_string"], str(int(row["answer"])), "figure_qa")], [image])


def plotqa(row: dict) -> Iterator[Draft]:
    name, answer = f"{row['image_index']}.png", row["answer"]
    places = [f"{row['folder']}/png/{name}", f"train/png/{name}", f"png/{name}"]
    yield Draft([question(row["question_string"], str(answer), "plot_qa")], [places])


def tabwmp_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    path = find(raw, "problems_train.json")
    for name, row in read_json(path).items():
        tables = (path.parent / "tables").relative_to(raw.folder)
        yield row | {"id": name, "image": f"./{tables}/{name}.png"}


def tabwmp(row: dict) -> Iterator[Draft]:
    yield Draft([question(row["question"], str(row["answer"]), "tabwmp_da")], [row["image"]])


KINDS = ("chart", "chemical", "diagram", "math", "music", "table")
SEVERAL = ("chart", "chemical", "diagram", "doc", "music", "table")
# The set has 20 million questions about 160,000 plots, too many to use: a hash chooses.
PLOT_BRANCHES = 64
CONVERTERS = {
    "pixmo-ask-model-anything": Converter(url_question),
    "pixmo-cap-qa": Converter(pixmo_cap_qa),
    "pixmo-clocks": Converter(clocks),
    "vqa-v2": Converter(partial(message_list, style="vqa2")),
    "textvqa": Converter(partial(message_list, style="text_vqa", joined=False)),
    "tallyqa": Converter(partial(message_list, style="tally_qa")),
    "okvqa": Converter(okvqa),
    "aokvqa": Converter(aokvqa),
    "chartqa": Converter(chartqa),
    "scienceqa": Converter(scienceqa),
    "docvqa": Converter(
        partial(document_question, style="doc_qa", column="image"), array_rows("train_v1.0*.json", "data")
    ),
    "infographicvqa": Converter(
        partial(document_question, style="info_qa", column="image_local_name"), array_rows("*info*train*.json", "data")
    ),
    "stvqa": Converter(
        partial(document_question, style="st_qa", column="file_path"), array_rows("train_task_3.json", "data")
    ),
    "ai2d": Converter(ai2d, ai2d_rows),
    "nlvr2": Converter(mantis),
    "llava-665k-multi": Converter(mantis),
    "spot-the-difference": Converter(mantis),
    "dvqa": Converter(dvqa, array_rows("train_qa.json"), most_branches=PLOT_BRANCHES),
    "figureqa": Converter(
        figureqa, plot_rows("*train1*/**/qa_pairs.json", "train1*/qa_pairs.json"), most_branches=PLOT_BRANCHES
    ),
    "plotqa": Converter(
        plotqa,
        plot_rows("train/qa_pairs_V2.json", "*train*/**/qa_pairs*.json", "qa_pairs*.json"),
        most_branches=PLOT_BRANCHES,
    ),
    "tabwmp": Converter(tabwmp, tabwmp_rows),
    **{f"cosyn-{kind}": Converter(partial(cosyn, style=f"cosyn_{kind}_exp")) for kind in KINDS},
    "cosyn-doc": Converter(partial(cosyn, style="cosyn_document", explain=False)),
    **{
        f"Molmo2-SynMultiImageQA-{kind}": Converter(partial(cosyn_images, style=f"cosyn_{kind}_exp"))
        for kind in SEVERAL
    },
    "Molmo2-MultiImageQA": Converter(multi_image_qa),
}
