"""Forms of rows for which an entry of the catalogue is enough, and what its key `convert` may say.

kind        columns
question    question, answer (a text, or a list of which the commonest is taught), explanation if there is one
choice      question, options (a list), answer (index from 0, letter, or the text of the option)
caption     caption
chat        messages, a list of {role, content}
pointing    label, points ([{x, y}, ...] or {x: [...], y: [...]})

and one of image (bytes of a parquet file, an address or a file's name), images (a list), video (with start and end in
seconds, if there are such columns), or none of them. A list may be JSON text, as in a cell of CSV.
"""

import difflib
import re
from dataclasses import dataclass

from molmo2_nemo.data.schema import UNITS

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
MEDIA = ("image", "images", "video")
COLUMNS = {*ALIASES, *(column for needed in KINDS.values() for column in needed), "explanation"}
KEYS = ("columns", "kind", "style", "unit")
# Kind -> styles of the public mixture that fit it (allenai/molmo2 at f3cb108: olmo/data). All but pointing take any
# other name, too, which is then written before the question.
STYLES = {
    "pointing": (
        "pointing point_count count_point counting count cosyn_point video_point video_point_count video_count_point "
        "video_count multi_image_pointing multi_image_point_then_count multi_image_count_then_point "
        "multi_image_counting"
    ).split(),
    "caption": (
        "long_caption short_caption transcript video_long_caption video_short_caption video_transcript "
        "video_merged_caption video_motion_caption"
    ).split(),
    "choice": (
        "multi_image_mc mantis_instruct_mc video_multiple_choice eval_multiple_choice a_okvqa_mc ai2_diagram "
        "ai2_diagram_no_letter science_qa"
    ).split(),
    "question": (
        "user_qa correction_qa vqa2 okvqa a_okvqa_da gqa tally_qa text_vqa st_qa doc_qa info_qa chart_qa dv_qa "
        "figure_qa plot_qa tabwmp_da clocks cosyn_document mantis_instruct_da video_short_answer video_object_caption"
    ).split(),
    "chat": ["user_qa", "text_sft", "correction_qa"],
}
# Above this likeness to a known style a name is taken for a slip of the pen.
ALIKE = 0.8


@dataclass(frozen=True)
class Form:
    """How rows of a known form are read."""

    kind: str  # a key of KINDS
    columns: dict[str, str | None]  # of COLUMNS -> what the column is called here
    style: str | list[str] | None = None
    unit: str = "fraction"  # of points

    @property
    def needed(self) -> list[str]:
        """Columns that every row must have."""
        read = [*KINDS[self.kind], *MEDIA, *(["explanation"] if self.kind == "question" else [])]
        return [called for column in read if (called := self.columns[column])]


def form_of(name: str, fields: dict | None, convert, media_kind: str) -> Form | None:
    """The form of an entry that has `convert` or columns of a known form; None: it has neither.

    fields: the columns of a row; convert: the entry's key; media_kind: its media.kind. ValueError, one sentence that
    names the key, its value and what it may be: `convert` makes no sense, or a column that it needs is not there.
    """
    form = convert or {}
    if form and not fields:
        raise ValueError(f"{name} has the key convert and no fields: list the columns of a row in fields")
    fields = fields or {}
    _check_keys(name, form, fields)
    columns = {column: _named(column, fields) for column in COLUMNS} | (form.get("columns") or {})
    # `label` is an answer in some sets and what is pointed at in others: it is the latter if there are points.
    kinds = [form["kind"]] if "kind" in form else [k for k, needed in KINDS.items() if all(columns[c] for c in needed)]
    if not kinds and form:
        raise ValueError(
            f"{name} has convert={form}, and its fields ({', '.join(fields)}) are those of no known form: say its "
            f"kind, one of {', '.join(KINDS)}, and what they mean in convert.columns"
        )
    if not kinds:
        return None
    kind = kinds[0]
    _check_style(name, kind, form.get("style"))
    if absent := [column for column in KINDS[kind] if not columns[column]]:
        raise ValueError(
            f"{name} has convert.kind={kind}, which needs the column {absent[0]}: name it in convert.columns"
        )
    if media_kind != "none" and not any(columns[column] for column in MEDIA):
        raise ValueError(
            f"{name} has media.kind={media_kind}, and none of its fields ({', '.join(fields)}) is known to hold "
            "pictures or videos: name it in convert.columns, as {image: COLUMN}, {images: COLUMN} or {video: COLUMN}"
        )
    if columns["video"] and ("start" in fields) != ("end" in fields):
        there, absent = ("start", "end") if "start" in fields else ("end", "start")
        raise ValueError(
            f"{name} has the field {there} and no field {absent}: a clip of a video needs both, in seconds; add "
            f"{absent}, or remove {there} for whole videos"
        )
    found = Form(kind, columns, form.get("style"), form.get("unit", "fraction"))
    twice = [column for column in found.needed if found.needed.count(column) > 1]
    if twice:
        raise ValueError(f"{name} has convert.columns={form.get('columns')}, where {twice[0]} is read as two things")
    return found


def _check_keys(name: str, form, fields: dict) -> None:
    """ValueError: a key of `convert` is unknown, or its value is none of those that it may have."""
    if not isinstance(form, dict) or not set(form) <= {*KEYS}:
        raise ValueError(f"{name} has convert={form}: it may have the keys {', '.join(KEYS)}")
    for key, known in {"kind": tuple(KINDS), "unit": UNITS}.items():
        if key in form and form[key] not in known:
            raise ValueError(f"{name} has convert.{key}={form[key]!r}, which is none of {', '.join(known)}")
    columns = form.get("columns") or {}
    if not isinstance(columns, dict):
        raise ValueError(f"{name} has convert.columns={columns!r}: it is {{what: COLUMN}}, as {{question: query}}")
    for column, called in columns.items():
        if column not in COLUMNS:
            raise ValueError(
                f"{name} has convert.columns.{column}, which nothing reads; it may have {', '.join(sorted(COLUMNS))}"
            )
        if called is not None and (not isinstance(called, str) or called not in fields):
            raise ValueError(
                f"{name} has convert.columns.{column}={called!r}, which is none of its fields: {', '.join(fields)}"
            )


def _check_style(name: str, kind: str, given) -> None:
    """ValueError: the style is no word, does not fit the kind, or looks like a known one that is misspelt."""
    known = STYLES[kind]
    for style in given if isinstance(given, list) and given and kind == "pointing" else [given or ""]:
        if not isinstance(style, str) or (style and not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", style)):
            raise ValueError(f"{name} has convert.style={style!r}: it is a word, or of pointing a list of words")
        if not style or style in known:
            continue
        if kind == "pointing":
            raise ValueError(
                f"{name} has convert.style={style}, which says not how to point; these do: {', '.join(known)}"
            )
        of_others = [other for other, names in STYLES.items() if style in names]
        if of_others and of_others[0] in ("pointing", "caption"):
            raise ValueError(
                f"{name} has convert.style={style}, which is one of {of_others[0]} and not of {kind}; of it are "
                f"{', '.join(known)}"
            )
        every = sorted({one for names in STYLES.values() for one in names})
        if not of_others and (close := difflib.get_close_matches(style.lower(), every, n=1, cutoff=ALIKE)):
            raise ValueError(
                f"{name} has convert.style={style}: did you mean {close[0]}? The known ones of {kind} are "
                f"{', '.join(known)}; a style of your own needs a name that is less alike"
            )


def _named(column: str, fields: dict) -> str | None:
    return next((name for name in ALIASES.get(column, (column,)) if name in fields), None)
