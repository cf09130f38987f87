"""What is wrong with a line of a user's own annotations, said in the names that the line has."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import fields

from pydantic import ValidationError

from molmo2_nemo.data.schema import (
    Caption,
    Chat,
    Message,
    MultipleChoice,
    Place,
    Pointing,
    Question,
    Tracking,
    ValueMistake,
)

TASKS = {kind.task: kind for kind in (Pointing, Tracking, Caption, Question, MultipleChoice, Chat)}
# Keys that people write for ours.
MEANT = {
    "answer": "answers",
    "bbox": "points",
    "caption": "text",
    "category": "label",
    "choices": "options",
    "class": "label",
    "coordinates": "points",
    "description": "text",
    "file": "image",
    "file_name": "image",
    "filename": "image",
    "image_path": "image",
    "img": "image",
    "keypoints": "points",
    "name": "label",
    "object": "label",
    "path": "image",
    "prompt": "question",
    "query": "question",
    "response": "answers",
    "type": "task",
    "video_path": "video",
    "videos": "video",
}
# What pydantic adds to a place for the member of a union that it tried.
_UNION_MEMBER = re.compile(r"int|str|float|constrained-str|.*\[.*")
_SHOWN = 60  # characters of a value
# What the innermost list is, in points and tracks.
_FORMS = {"points": ": write [x, y]", "frames": ": write [object, x, y]"}


class LineMistakes(ValueError):
    """All that is wrong with one line: `sentences`."""

    def __init__(self, sentences: Iterable[str]):
        self.sentences = [" ".join(sentence.split()).rstrip(".") for sentence in sentences]
        super().__init__(self.sentences)  # as they are, so that it comes back whole from another process

    def __str__(self) -> str:
        return "; ".join(self.sentences)


def kind_of(sentence: str) -> str:
    """The sentence without what differs from line to line: values in quotes and brackets, and numbers."""
    masked = re.sub(r'"[^"]*"|\'[^\']*\'', '"..."', sentence)
    masked = re.sub(r"= (\[.*?\](?= is| has| and|:)|-?[0-9.]+)", "= ...", masked)
    return re.sub(r"\d+(\.\d+)?", "#", masked)


def shown(value) -> str:
    """A value as JSON, cut short."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """The known key that was probably meant by one that is unknown."""
    known = list(known)
    if key.lower() in known:
        return key.lower()
    if MEANT.get(key.lower()) in known:
        return MEANT[key.lower()]
    close = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=0.75)
    return close[0] if close else None


def unknown_key(key: str, known: Iterable[str], owner: str) -> str:
    """owner: what has the key, as "a line with messages"."""
    known = list(known)
    meant = nearest_key(key, known)
    advice = f"write {meant}" if meant else f"{owner} has {', '.join(sorted(known))}"
    return f'has the key "{key}", which is unknown: {advice}'


def task_keys(task: str) -> list[str]:
    return [field.name for field in fields(TASKS[task])]


def task_meant(keys: set[str]) -> tuple[str, dict[str, str]] | None:
    """The task whose required keys are there, if it is one, and those of them that go by another name."""
    spelt = keys | {MEANT[key.lower()] for key in keys if key.lower() in MEANT}
    needed = {
        "pointing": {"label", "points"},
        "tracking": {"label", "frames"},
        "caption": {"text"},
        "question": {"question", "answers"},
        "multiple_choice": {"question", "options", "answer"},
    }
    found = [task for task, names in needed.items() if names <= spelt]
    if len(found) != 1:
        return None
    names = {key: MEANT[key.lower()] for key in sorted(keys) if MEANT.get(key.lower()) in needed[found[0]] - keys}
    return found[0], names


def mistakes_of_form(error: ValidationError, branches: list) -> list[ValueMistake]:
    """What pydantic found, a mistake for each place. branches: those that it read."""
    by_place: dict[Place, list[dict]] = {}
    for detail in error.errors(include_url=False):
        by_place.setdefault(_place(detail["loc"]), []).append(detail)
    renamed = {
        (*place[:-1], meant)
        for place, details in by_place.items()
        if details[0]["type"] == "unexpected_keyword_argument"
        and (meant := nearest_key(str(place[-1]), _known_keys(place, branches)))
    }
    mistakes = []
    for place, details in by_place.items():
        if details[0]["type"] == "missing" and place in renamed:
            continue
        # Under a list that is read as such, only what is wrong inside it.
        inner = any(other[: len(place)] == place and len(other) > len(place) for other in by_place)
        if inner and details[0]["type"] == "string_type":
            continue
        mistakes.append(_mistake(place, details, branches))
    return mistakes


def _place(loc: tuple) -> Place:
    parts = [part for part in loc if isinstance(part, int) or not _UNION_MEMBER.fullmatch(part)]
    if parts[:1] == ["branches"] and len(parts) > 2 and isinstance(parts[2], str):
        del parts[2]  # the tag of the kind of branch
    return tuple(parts)


def _branch_at(place: Place, branches: list):
    return branches[place[1]] if place[:1] == ("branches",) and len(place) > 1 and place[1] < len(branches) else None


def _known_keys(place: Place, branches: list) -> list[str]:
    """Keys that the object has in which the place's last part is one."""
    branch = _branch_at(place, branches)
    if isinstance(branch, list) or "messages" in place:
        return [field.name for field in fields(Message)]
    task = branch.get("task") if isinstance(branch, dict) else None
    return task_keys(task) if task in TASKS else []


def _mistake(place: Place, details: list[dict], branches: list) -> ValueMistake:
    kinds, value = {detail["type"] for detail in details}, details[0]["input"]
    detail = details[0]
    kind, limits = detail["type"], detail.get("ctx", {})
    branch = _branch_at(place, branches)
    task = branch.get("task") if isinstance(branch, dict) else None
    if kind == "missing" and isinstance(place[-1], str):
        return ValueMistake(place[:-1], f"has no {place[-1]}" + (f", which {task} needs" if task else ""))
    if kind == "missing":
        wanted = next(
            (form for name, form in _FORMS.items() if name in place and len(place) - place.index(name) > 4), ""
        )
        return ValueMistake(place[:-1], f"= {shown(value)} has too few values{wanted}")
    if kind == "unexpected_keyword_argument":
        owner = "a message" if isinstance(branch, list) or "messages" in place else f"the task {task}"
        return ValueMistake(place[:-1], unknown_key(str(place[-1]), _known_keys(place, branches), owner))
    if kind == "branch":
        return ValueMistake(place, f"is no task: {detail['msg']}")
    if kind == "int_type" and place[-1:] == ("answer",):
        return ValueMistake(place, _index_advice(value, branch))
    wanted = {
        frozenset({"string_type", "list_type"}): _text_or_list(value),
        frozenset({"int_type", "string_type"}): "is neither a whole number nor a text",
    }.get(frozenset(kinds))
    problem = wanted or {
        "string_type": f"is not a text{f': write {shown(str(value))}' if isinstance(value, int | float) else ''}",
        "list_type": f"is not a list{_list_advice(place, value)}",
        "tuple_type": "is not a list",
        "float_type": "is not a number",
        "int_type": "is not a whole number",
        "finite_number": "is not a finite number",
        "dataclass_type": "is not an object",
        "dict_type": "is not an object",
        "literal_error": f"is not {limits.get('expected')}",
        "greater_than": f"is not above {limits.get('gt')}",
        "greater_than_equal": f"is below {limits.get('ge')}",
        "less_than_equal": f"is above {limits.get('le')}",
        "too_long": f"has {limits.get('actual_length')} values, more than {limits.get('max_length')}",
        "too_short": f"has fewer than {limits.get('min_length')} values",
        "string_pattern_mismatch": "is not made of letters, digits, - and _",
    }.get(kind, f"is not accepted ({detail['msg']})")
    return ValueMistake(place, f"= {shown(value)} {problem}")


def _list_advice(place: Place, value) -> str:
    if place[-1:] in (("points",), ("frames",)):
        return ": write [[x, y], ...]" if place[-1] == "points" else ": write [[seconds, [[object, x, y], ...]], ...]"
    if place[-1:] == ("subtitles",):
        return ': write [[start, end, "text"], ...]'
    return f": write [{shown(value)}]" if isinstance(value, str) else ""


def _text_or_list(value) -> str:
    if isinstance(value, list):
        return "is not a list of texts"
    return "is not made of letters, digits, - and _" if isinstance(value, str) else "is neither a text nor a list"


def _index_advice(value, branch: dict) -> str:
    """What to write for the answer of a choice that is given as a letter or as the option itself."""
    options = branch.get("options") if isinstance(branch.get("options"), list) else []
    meant = None
    if isinstance(value, str) and value in options:
        meant = options.index(value)
    elif isinstance(value, str) and len(value.strip(" .()")) == 1 and value.strip(" .()").isalpha():
        index = ord(value.strip(" .()").upper()) - ord("A")
        meant = index if index < len(options) else None
    advice = f": write {meant}" if meant is not None else ""
    return f"= {shown(value)} is not the index of an option, from 0{advice}"
