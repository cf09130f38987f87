"""Data sets of a known form: an entry of the catalogue is all that they need.

    - name: my-invoices
      source: {kind: hf, hf: {repo: me/my-invoices, split: train}}
      media: {kind: in-parquet}
      fields: {image: image, question: text, answer: text}
      convert: {kind: question, style: invoices}            # optional: without it, the names of the columns decide

`convert` has the kind, and where wanted the style, the unit of points (fraction, percent, pixels) and `columns`, which
says what a column is called here, such as {question: query}: molmo2_nemo/catalogue/forms.py has the kinds.
"""

import json
from collections.abc import Iterator
from functools import partial

from molmo2_nemo.catalogue.forms import Form, form_of
from molmo2_nemo.prepare.converters.common import (
    Clip,
    Converter,
    Draft,
    caption,
    chat,
    choice,
    clip,
    image_of,
    pointing,
    question,
    xy,
)

ROLES = {"human": "user", "gpt": "assistant"}


def converter_by_form(entry: dict) -> Converter | None:
    """The converter of an entry that has `convert` or columns of a known form; None: it has neither.

    ValueError: `convert` makes no sense.
    """
    medium = (entry.get("media") or {}).get("kind", "none")
    form = form_of(entry["name"], entry.get("fields"), entry.get("convert"), medium)
    return Converter(partial(convert, form=form)) if form else None


def convert(row: dict, form: Form) -> Iterator[Draft]:
    def get(column: str):
        return row[form.columns[column]] if form.columns.get(column) else None

    images, video = _images(get), _video(row, get)
    kind, style = form.kind, form.style
    if kind == "question":
        branch = question(get("question"), get("answer"), style or "user_qa", get("explanation"))
    elif kind == "choice":
        options = list(_listed("options", get("options")))
        branch = choice(get("question"), options, _index(get("answer"), options), style or "")
    elif kind == "caption":
        branch = caption(get("caption"), style or ("video_long_caption" if video else "long_caption"))
    elif kind == "pointing":
        branch = pointing(
            get("label"), [[1, xy(_listed("points", get("points")))]], style or ["pointing", "point_count"]
        )
    else:
        branch = _chat(_listed("messages", get("messages")), style or ("user_qa" if images or video else "text_sft"))
    branch = {key: value for key, value in branch.items() if value != ""}
    yield Draft(
        [branch],
        images,
        video,
        form.unit,
        tree="" if images or video else None,
        about=None if images or video else str(branch),
    )


def _listed(column: str, value):
    """A list, which a cell of CSV has as JSON text. ValueError: it is other text.

    Points may be {x: [...], y: [...]}.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return []
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) and not (column == "points" and isinstance(found, dict)):
        raise ValueError(f"{column} is text, it must be a list")
    return found


def _images(get) -> list:
    if value := _listed("images", get("images")):
        return [image_of(image) for image in value]
    return [image_of(get("image"))] if get("image") else []


def _video(row: dict, get) -> Clip | None:
    """The video, or a clip of it. ValueError: the row has only one of the clip's start and end."""
    if not get("video"):
        return None
    start, end = row.get("start"), row.get("end")
    if (start is None) != (end is None):
        raise ValueError("a clip needs start and end, and the row has one of them")
    return clip(str(get("video")), start, end)


def _index(answer, options: list) -> int:
    """The index of the right option. ValueError: the answer is no index, no letter and none of the options."""
    if isinstance(answer, int):
        return answer
    if answer in options:
        return options.index(answer)
    text = str(answer).strip()
    if text.isdigit():
        return int(text)
    if len(text.strip("().")) == 1 and text.strip("().").isalpha():
        return ord(text.strip("().").upper()) - ord("A")
    raise ValueError("the right answer is none of the options")


def _chat(messages: list, style: str) -> dict:
    """Roles may be called human and gpt, and the keys from and value."""
    turns = [(m.get("role") or ROLES[m["from"]], m.get("content", m.get("value"))) for m in messages]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("the roles are not user and assistant in turn")
    return chat([str(text).replace("<image>", "").replace("<video>", "") for _, text in turns], style, system)
