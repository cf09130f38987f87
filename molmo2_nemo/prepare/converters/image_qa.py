"""Questions about pictures.

Questions about one picture share a sample where the report has fewer examples than annotations (arXiv 2601.10611, Table
13); in the other sets (`tree` is None) each is a sample of its own.
"""

import re
from collections.abc import Iterator
from functools import partial

from molmo2_nemo.catalogue.raw import RawSource, read_rows
from molmo2_nemo.prepare.converters.common import (
    Converter,
    Draft,
    Drop,
    Rows,
    array_rows,
    chat,
    choice,
    columns,
    drafts_of,
    find,
    find_all,
    image_of,
    json_items,
    question,
    read_json,
    shuffled_choice,
    table,
    together,
    usable,
)

MAX_IMAGES = 5  # of Molmo2's sets of several images (allenai/molmo2: olmo/data/get_dataset.py, max_images)
TURN = re.compile(r"\[(USER|ASSISTANT)\]", re.IGNORECASE)
# allenai/OLMo-core: src/olmo_core/data/multimodal/pixmo_clocks.py.
CLOCK = "What time is being shown?"
# AI2D's options that are none (allenai/molmo2: olmo/data/dataset_builders/ai2d.py).
NO_OPTION = "{}"


def url_question(row: dict) -> Iterator[Draft | Drop]:
    """pixmo-ask-model-anything: questions by people, long answers."""
    yield Draft([question(row["question"], row["answer"], "user_qa")], [row["image_url"]])


def pixmo_cap_qa(row: dict) -> Iterator[Draft | Drop]:
    """`question` is a dialogue, "[USER] ... [ASSISTANT] ... [USER] ...", and `answer` its last turn."""
    if row.get("messages") and not row.get("question"):
        turns = [message if isinstance(message, str) else message["content"] for message in row["messages"]]
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
    """The set has no pictures: prepare/clock_faces.py draws one of the watch's kind, unless the user has rendered it
    as example_id.png in manual/."""
    image = {"name": f"{row['example_id']}.png", "clock": {"says": row["text"], "watch": str(row["watchface_id"])}}
    yield Draft([question(CLOCK, row["text"], "clocks")], [image])


def answers_of(message: dict) -> list[str]:
    """The answers of a question: `answers` (texts, or with `answer` or `raw_answer`), or `answer`, or `direct_answers`.

    ValueError names the keys, if none of these is there.
    """
    for key in ("answers", "direct_answers", "answer"):
        values = message.get(key)
        if isinstance(values, str | int | float):
            return [str(values)]
        if values:
            found = [v.get("answer", v.get("raw_answer")) if isinstance(v, dict) else v for v in values]
            return [str(value) for value in found if value is not None]
    raise ValueError(f"a question without answers among the keys {', '.join(sorted(message))}")


def message_list(row: dict, style: str, joined: bool = True) -> Iterator[Draft | Drop]:
    """Ai2's form: the questions of one picture, whose path is below the data folder, joined in one sample or not."""
    tasks = usable(lambda message: question(message["question"], answers_of(message), style), row["message_list"])
    for part in [tasks] if joined else [[task] for task in tasks]:
        yield from drafts_of(part, [row["image"]], tree="" if joined else None)


def okvqa(row: dict) -> Iterator[Draft | Drop]:
    def task(item: dict) -> dict:
        return question(item["question"], [answer["raw_answer"] for answer in item["answers"]], "okvqa")

    for one in usable(task, row["qas"]):
        yield from drafts_of([one], [row["image"]], tree=None)


def aokvqa(row: dict) -> Iterator[Draft | Drop]:
    """Two samples of one picture: the options, and short answers. Those that are not easy to give are left out of the
    evaluation alone (allenai/molmo2: olmo/data/academic_image_datasets.py, AOkVqa)."""

    def options(message: dict) -> dict:
        return choice(message["question"], message["choices"], message["answer_idx"], "a_okvqa_mc")

    def direct(message: dict) -> dict:
        return question(message["question"], message["direct_answers"], "a_okvqa_da")

    for tree, task in (("mc", options), ("da", direct)):
        yield from drafts_of(usable(task, row["message_list"]), [row["image"]], tree=tree)


def gqa_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """A row for each picture, {id, image, asked}, from the two configurations; the questions are held in memory."""
    asked: dict[str, list[dict]] = {}
    for row in raw.rows(split):
        asked.setdefault(row["imageId"], []).append({"question": row["question"], "answer": row["answer"]})
    for path in find_all(raw, "train_balanced_images/*.parquet"):
        for row in read_rows(path):
            if row["id"] in asked:
                yield {"id": row["id"], "image": row["image"], "asked": asked.pop(row["id"])}
    for name, questions in asked.items():
        yield {"id": name, "image": None, "asked": questions}


def gqa(row: dict) -> Iterator[Draft | Drop]:
    if row["image"] is None:
        yield from [Drop("its picture is none of the set's")] * len(row["asked"])
        return
    tasks = usable(lambda item: question(item["question"], item["answer"], "gqa"), row["asked"])
    yield from drafts_of(tasks, [image_of(row["image"])], about=row["id"])


def chartqa(row: dict) -> Iterator[Draft]:
    yield Draft([question(row["query"], row["label"], "chart_qa")], [image_of(row["image"])], tree=None)


def scienceqa(row: dict) -> Iterator[Draft | Drop]:
    if not row["image"]:
        yield Drop("no image")
        return
    text = "\n".join(part.strip() for part in (row.get("hint") or "", row["question"]) if part.strip())
    yield Draft([choice(text, row["choices"], row["answer"], "science_qa")], [image_of(row["image"])])


def document_question(row: dict, style: str, column: str, split: str = "train") -> Iterator[Draft | Drop]:
    """The Robust Reading Competition's form: a file name, a question, its answers.

    The archives of pictures have other folders than the rows name: spdocvqa_images for documents.
    """
    if row.get("data_split", split) != split or row.get("set_name", split) != split:
        yield Drop("not of the training split" if split == "train" else f"not of the split {split}")
    else:
        names = list(dict.fromkeys([row[column], row[column].rpartition("/")[2]]))
        yield Draft([question(row["question"], row["answers"], style)], [names], tree=None)


def mantis(row: dict) -> Iterator[Draft | Drop]:
    """Several pictures; questions with options, others with a short answer. All lists are as long as the questions.

    Of more than data.max_images pictures, training shows the first ones, as the public code does.
    """
    images = list(row["images"])
    if len(images) < 2:
        yield Drop("one image")
        return
    names = ("mc_question", "choices", "correct_choice_idx", "oe_question", "direct_answer")
    lists = [row.get(name) or [] for name in names]
    longest = max(map(len, lists))
    lists = [values or [None] * longest for values in lists]

    def task(item: tuple) -> dict:
        text, options, right, asked, answer = item
        if text and options and len(options) > 1 and right is not None and 0 <= right < len(options):
            wrong = [option for index, option in enumerate(options) if index != right]
            return shuffled_choice(text, options[right], wrong, "mantis_instruct_mc", row.get("example_id"))
        return question(asked, answer or [], "mantis_instruct_da")

    yield from drafts_of(usable(task, together(*lists)), images)


def cosyn(row: dict, style: str, explain: bool = True) -> Iterator[Draft | Drop]:
    """Drawn charts, documents and so on, with the reasons for each answer."""
    tasks = _explained(row["qa_pairs"], style, explain)
    yield from drafts_of(tasks, [image_of(row["image"])], about=str(row["id"]))


def cosyn_images(row: dict, style: str) -> Iterator[Draft | Drop]:
    images = row["images"] or []
    if not 1 <= len(images) <= MAX_IMAGES:
        yield Drop(f"not 1 to {MAX_IMAGES} images")
        return
    tasks = _explained(row["qa_pairs"], style)
    yield from drafts_of(tasks, [image_of(image) for image in images], about=str(row["id"]))


def _explained(pairs: dict, style: str, explain: bool = True) -> list[dict | Drop]:
    def task(item: tuple) -> dict:
        text, why, answer = item
        return question(text, answer, style, why if explain else None)

    return usable(task, columns(pairs, "question", "explanation", "answer"))


def multi_image_qa(row: dict) -> Iterator[Draft | Drop]:
    urls = list(row["image_urls"])
    if not 2 <= len(urls) <= MAX_IMAGES:
        yield Drop(f"not 2 to {MAX_IMAGES} images")
        return
    tasks = usable(lambda pair: question(*pair, "correction_qa"), columns(row["qa_pairs"], "question", "answer"))
    yield from drafts_of(tasks, urls)


def ai2d_rows(raw: RawSource, split: str | None, is_test: bool = False) -> Iterator[dict]:
    """A row for each diagram: {image, file, boxes}, without those of the test set, or of these alone."""
    tested = {row["id"].strip() for path in find_all(raw, "ai2d_test_ids.csv") for row in table(path, names=["id"])}
    for path in find(raw, "questions/0.png.json", "questions/*.json").parent.glob("*.json"):
        name = path.name.removesuffix(".json")
        if (name.removesuffix(".png") in tested) == is_test:
            boxes = path.parent.parent / "annotations" / path.name
            image = f"./{(path.parent.parent / 'images' / name).relative_to(raw.folder)}"
            yield {"image": image, "file": path, "boxes": boxes}


def ai2d(row: dict) -> Iterator[Draft | Drop]:
    """Questions about the words of a diagram, and about letters, which are drawn over the words in two ways.

    As in the public code (allenai/molmo2: olmo/data/dataset_builders/ai2d.py and academic_image_datasets.py), options
    that are none or are there twice go, and options that are letters in the picture get no letters of their own.
    """
    words = read_json(row["boxes"]).get("text", {}) if row["boxes"].is_file() else {}
    boxes = [
        [*item["rectangle"][0], *item["rectangle"][1], str(item["replacementText"])]
        for _, item in sorted(words.items())
        if item.get("replacementText") and item["rectangle"][0][1] != item["rectangle"][1][1]
    ]
    letters = {box[-1] for box in boxes}
    for text, item in sorted(read_json(row["file"])["questions"].items(), key=_id_of):
        [task] = usable(lambda item, text=text: _ai2d_task(text, item, letters), [item])
        images = [row["image"]]
        if isinstance(task, dict) and item.get("abcLabel"):
            images = [{"name": row["image"], "boxes": boxes, "opacity": opacity} for opacity in (255, 128)]
        for image in images if isinstance(task, dict) else images[:1]:
            yield from drafts_of([task], [image], about=row["image"], tree=None)


def _id_of(asked: tuple[str, dict]) -> str:
    """The order of a diagram's questions, also of those that are not as expected."""
    return str(asked[1].get("questionId", "")) if isinstance(asked[1], dict) else ""


def _ai2d_task(text: str, item: dict, letters: set[str]) -> dict | Drop:
    """A Drop: the question is about letters and none are drawn, or it has no right answer."""
    options = [str(option) for option in item["answerTexts"]]
    right, options = options[item["correctAnswer"]], list(dict.fromkeys(o for o in options if o != NO_OPTION))
    if right == NO_OPTION:
        return Drop("the right answer is none of the options")
    if item.get("abcLabel") and not letters:
        return Drop("a question about letters, and none are to be drawn")
    answer, are_letters = options.index(right), [option.upper() in letters for option in options]
    if item.get("abcLabel") and sum(are_letters) >= len(options) - 1:
        options = [option.upper() if known else option for option, known in zip(options, are_letters)]
        return choice(text, options, answer, "ai2_diagram_no_letter")
    return choice(text, options, answer, "ai2_diagram")


def dvqa(row: dict) -> Iterator[Draft]:
    name = row["image"]
    yield Draft([question(row["question"], str(row["answer"]), "dv_qa")], [[f"images/{name}", name]])


def plot_rows(*patterns: str) -> Rows:
    """Rows of qa_pairs with `folder`, where the file lies, relative to the raw folder."""

    def read(raw: RawSource, split: str | None) -> Iterator[dict]:
        path = find(raw, *patterns)
        folder = f"./{path.parent.relative_to(raw.folder)}"
        # PlotQA's page describes a list, Ai2's loader reads a list under this key.
        with path.open("rb") as file:
            key = None if file.read(64).lstrip().startswith(b"[") else "qa_pairs"
        for row in json_items(path, key):
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
    "gqa": Converter(gqa, gqa_rows),
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
        plot_rows("train/qa_pairs_V2.json", "*train*/**/qa_pairs*.json", "*qa_pairs*.json", "*.json"),
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
