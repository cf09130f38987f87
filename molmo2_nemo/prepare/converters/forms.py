"""Data sets of a known form: an entry of the catalogue is all that they need.

    - name: my-invoices
      source: {kind: hf, hf: {repo: me/my-invoices, split: train}}
      media: {kind: in-parquet}
      fields: {image: image, question: text, answer: text}
      convert: {kind: question, style: invoices}            # optional: without it, the names of the columns decide

`convert` has the kind, and where wanted the style, the unit of points (fraction, percent, pixels) and `columns`, which
says what a column is called here, such as {question: query}.

kind        columns
question    question, answer (a text, or a list of which the commonest is taught), explanation if there is one
choice      question, options (a list), answer (index from 0, letter, or the text of the option)
caption     caption
chat        messages, a list of {role, content}
pointing    label, points ([{x, y}, ...] or {x: [...], y: [...]})

and one of image (bytes of a parquet file, an address or a file's name), images (a list), video (with start and end in
seconds, if there are such columns), or none of them.
"""

from collections.abc import Iterator
from functools import partial

from molmo2_nemo.data.schema import UNITS
from molmo2_nemo.data.tasks import COUNT_ONLY, COUNT_THEN_POINTS, POINTS_ONLY, POINTS_THEN_COUNT
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

# Kind -> columns that it needs, the most specific kind first.
KINDS = {
    "chat": ("messages",),
    "pointing": ("label", "points"),
    "choice": ("question", "options", "answer"),
    "question": ("question", "answer"),
    "caption": ("caption",),
}
# Other names of columns that mean the same in every data set.
ALIASES = {
    "image": ("image", "image_url", "image_path", "file_name"),
    "images": ("images", "image_urls", "image_paths"),
    "video": ("video", "video_url", "video_path", "video_id"),
    "options": ("options", "choices"),
    "answer": ("answer", "answers", "label"),
    "caption": ("caption", "text"),
    "messages": ("messages", "conversations"),
}
ROLES = {"human": "user", "gpt": "assistant"}
MEDIA = ("image", "images", "video")
COLUMNS = {*ALIASES, *(column for needed in KINDS.values() for column in needed), "explanation"}
HOW_TO_POINT = POINTS_ONLY | POINTS_THEN_COUNT | COUNT_THEN_POINTS | COUNT_ONLY
KEYS = {"kind", "style", "unit", "columns"}


def converter_by_form(entry: dict) -> Converter | None:
    """The converter of an entry that has `convert` or columns of a known form; None: it has neither.

    ValueError: `convert` makes no sense.
    """
    form, fields, name = entry.get("convert") or {}, entry.get("fields") or {}, entry["name"]
    _check(name, form, fields)
    columns = {column: _named(column, fields) for column in COLUMNS}
    columns |= form.get("columns") or {}
    # `label` is an answer in some sets and what is pointed at in others: it is the latter if there are points.
    kinds = [form["kind"]] if "kind" in form else [k for k, needed in KINDS.items() if all(columns[c] for c in needed)]
    if not kinds:
        return None
    if absent := [column for column in KINDS[kinds[0]] if not columns[column]]:
        raise ValueError(
            f"{name} has convert.kind={kinds[0]}, which needs the column {absent[0]}: name it in convert.columns."
        )
    medium = (entry.get("media") or {}).get("kind", "none")
    if medium != "none" and not any(columns[column] for column in MEDIA):
        raise ValueError(
            f"{name} has media.kind={medium}, and none of its fields ({', '.join(fields)}) is known to hold pictures or"
            " videos: name it in convert.columns, as {image: COLUMN}, {images: COLUMN} or {video: COLUMN}."
        )
    return Converter(partial(convert, kind=kinds[0], columns=columns, form=form))


def _check(name: str, form, fields: dict) -> None:
    """Refuse a `convert` that makes no sense. ValueError, one sentence that names the key."""
    if not isinstance(form, dict) or not set(form) <= KEYS:
        raise ValueError(f"{name} has convert={form}: it may have the keys {', '.join(sorted(KEYS))}.")
    choices = {"kind": tuple(KINDS), "unit": UNITS}
    for key, known in choices.items():
        if key in form and form[key] not in known:
            raise ValueError(f"{name} has convert.{key}={form[key]!r}, which is none of {', '.join(known)}.")
    style = form.get("style", "")
    if not isinstance(style, str) and not (form.get("kind", "pointing") == "pointing" and _is_list_of_names(style)):
        raise ValueError(f"{name} has convert.style={style!r}: it is a word, or of pointing a list of words.")
    unknown = sorted({*([style] if isinstance(style, str) else style)} - HOW_TO_POINT)
    if form.get("kind") == "pointing" and style and unknown:
        known = ", ".join(sorted(HOW_TO_POINT))
        raise ValueError(f"{name} has convert.style={unknown[0]}, which says not how to point; these do: {known}.")
    columns = form.get("columns") or {}
    if not isinstance(columns, dict):
        raise ValueError(f"{name} has convert.columns={columns!r}: it is {{what: COLUMN}}, as {{question: query}}.")
    for column, called in columns.items():
        if column not in COLUMNS:
            raise ValueError(
                f"{name} has convert.columns.{column}, which nothing reads; it may have {', '.join(sorted(COLUMNS))}."
            )
        if called is not None and called not in fields:
            raise ValueError(
                f"{name} has convert.columns.{column}={called!r}, which is none of its fields: {', '.join(fields)}."
            )


def _is_list_of_names(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _named(column: str, fields: dict) -> str | None:
    return next((name for name in ALIASES.get(column, (column,)) if name in fields), None)


def convert(row: dict, kind: str, columns: dict, form: dict) -> Iterator[Draft]:
    def get(column: str):
        return row[columns[column]] if columns.get(column) else None

    images, video = _images(get), _video(row, get)
    style = form.get("style")
    if kind == "question":
        branch = question(get("question"), get("answer"), style or "user_qa", get("explanation"))
    elif kind == "choice":
        options = list(get("options"))
        branch = choice(get("question"), options, _index(get("answer"), options), style or "")
    elif kind == "caption":
        branch = caption(get("caption"), style or ("video_long_caption" if video else "long_caption"))
    elif kind == "pointing":
        branch = pointing(get("label"), [[1, xy(get("points"))]], style or ["pointing", "point_count"])
    else:
        branch = _chat(get("messages"), style or ("user_qa" if images or video else "text_sft"))
    branch = {key: value for key, value in branch.items() if value != ""}
    yield Draft(
        [branch],
        images,
        video,
        form.get("unit", "fraction"),
        tree="" if images or video else None,
        about=None if images or video else str(branch),
    )


def _images(get) -> list:
    if value := get("images"):
        return [image_of(image) for image in value]
    return [image_of(get("image"))] if get("image") else []


def _video(row: dict, get) -> Clip | None:
    return clip(str(get("video")), row.get("start"), row.get("end")) if get("video") else None


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
