"""Tables, CSV or parquet: a column for each key of a line, or named on the command line, `--columns label=class x=px`.

Rows with `x` and `y` are points: those of one picture become one sample, and a row without numbers says that there is
no such thing. Other rows are samples of their own: `text`, `question` and `answer`, the same with options in columns
A, B, C (as in the tables of MMBench) or option_1, option_2, or any record that is recognised.
"""

import csv
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator
from itertools import chain, count
from pathlib import Path

from molmo2_nemo.catalogue.raw import read_rows
from molmo2_nemo.prepare.formats.line import NAMELESS, Refused, Row, Unpacked
from molmo2_nemo.prepare.media import image_suffix
from molmo2_nemo.prepare.mistakes import MEANT

TEXT_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
POINT_KEYS = {"x", "y", "label"}
# What a value of a sample is called in a row.
NAMES = {"answers[0]": "answer"}
# Keys of a sample that a column may have.
MEDIA = ("image", "images", "video")
KEYS = (*MEDIA, "label", "x", "y", "unit", "text", "question", "answer", "answers", "options", "style", "id")
# A column with one of these makes rows records of their own.
RECORDS = ("task", "messages", "conversations", "conversation", "branches", "instruction", "query")
# Columns of other tools by the keys that they are; file_name: metadata.csv of Hugging Face (huggingface/datasets,
# docs/source/image_dataset.mdx).
ALSO = {"file_name": "image"}
OPTION = re.compile(r"(?:options?|choices?)?[ _-]?([a-z]|[0-9]{1,2})", re.IGNORECASE)
USED = {
    "points": {"image", "label", "x", "y", "unit", "style"},
    "question": {*MEDIA, "style", "question", "answer", "answers"},
    "multiple_choice": {*MEDIA, "style", "question", "answer", "options"},
    "caption": {*MEDIA, "style", "text"},
}


def rows(file: Path, number: int, columns: dict[str, str], unpacked: Unpacked) -> Iterator[Row]:
    """columns: key of ours -> the table's. ValueError: the table lacks one, or none says what is to be learnt."""
    header, cells = _text_table(file) if file.suffix.lower() in TEXT_SUFFIXES else _binary_table(file)
    if not header:
        return
    names = _names(file, header, columns)
    records = _records(names, cells, unpacked)
    if {"x", "y"} <= set(names):
        if missing := (POINT_KEYS | {"image"}) - set(names):
            raise ValueError(_advice(file, header, min(missing)))
        yield from _points(records, number, _unused(header, names, USED["points"]))
        return
    if set(names) & set(RECORDS):
        for k, (place, record) in enumerate(records):
            yield Row(place, number + k, record)
        return
    options = {} if "options" in names else _option_columns(names)
    if {"question", "answer"} <= set(names) and ("options" in names or options):
        task = "multiple_choice"
    elif "question" in names and {"answer", "answers"} & set(names):
        task = "question"
    elif "text" in names:
        task = "caption"
        if not set(MEDIA) & set(names):
            raise ValueError(_advice(file, header, "image or video"))
    else:
        raise ValueError(_advice(file, header, "text, question and answer, or x and y"))
    used = USED[task] | (set(options.values()) if task == "multiple_choice" else set())
    notes = _unused(header, names, used)
    for k, (place, record) in enumerate(records):
        sample = record if isinstance(record, Refused) else _sample(record, task, options)
        yield Row(place, number + k, sample, None if isinstance(sample, Refused) else "table", notes=notes)


# -- columns ----------------------------------------------------------------------------------------------------------


def _names(file: Path, header: list[str], columns: dict[str, str]) -> list[str]:
    """What each column is here: a key of KEYS or RECORDS, however its name is written, or another name."""
    twice = [name for k, name in enumerate(header) if name and name in header[:k]]
    if twice:
        raise ValueError(
            f'{file} has the column "{twice[0]}" twice: rename or remove one (the first line of a text names '
            "the columns)"
        )
    ours = {theirs.strip(): key for key, theirs in columns.items()}
    if missing := [theirs for theirs in ours if theirs not in header]:
        raise ValueError(f"{file} has no column {missing[0]} (--columns), but {', '.join(header)}")
    names = [ours.get(name) or ("" if name in columns else name) for name in header]
    for k, name in enumerate(header):
        key = name.lower() if name.lower() in (*KEYS, *RECORDS) else ALSO.get(name.lower())
        taken = set(MEDIA) if key == "image" else {key}
        if key and name not in ours and not taken & {*names, *columns}:
            names[k] = key
    return names


def _option_columns(names: list[str]) -> dict[str, str]:
    """Columns of options by their letter or number, in order: A, B, ..., or 1, 2, ... from 0 or 1; at least two."""
    found: dict[str, str] = {}
    for name in names:
        match = OPTION.fullmatch(name)
        if match and (match[1].isalpha() or match[0] != match[1]):
            found.setdefault(match[1].upper(), name)
    for first in ("A", "0", "1"):
        labels = (chr(ord("A") + k) if first == "A" else str(int(first) + k) for k in count())
        run = []
        while (label := next(labels)) in found:
            run.append(label)
        if len(run) > 1:
            return {label: found[label] for label in run}
    return {}


def _unused(header: list[str], names: list[str], used: set[str]) -> list[str]:
    others = [shown for shown, name in zip(header, names) if name not in used]
    return [f"the column {name} is not used" if name else "a column without a name is not used" for name in others]


def _advice(file: Path, header: list[str], missing: str) -> str:
    where = " (its first line)" if file.suffix.lower() in TEXT_SUFFIXES else ""
    spelt = {name.lower() for name in header}
    meant = {MEANT[name.lower()]: name for name in header if name.lower() in MEANT}
    pairs = [f"{key}={shlex.quote(name)}" for key, name in meant.items() if key in KEYS and key not in spelt]
    is_enough = "text" in meant or {"question", "answer"} <= spelt | meant.keys()
    example = " ".join(pairs) if is_enough else "image=file label=class x=px y=py"
    return (
        f"{file} has the columns {', '.join(header)}{where}, and none is called {missing}: say which they are, for "
        f"example --columns {example}"
    )


# -- rows -------------------------------------------------------------------------------------------------------------


def _text_table(file: Path) -> tuple[list[str], Iterator[tuple[str, list | Refused]]]:
    """The names of the columns, and (place, cells) of each row that is not blank. ValueError: it has none."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            header = lines.readline()
            # The commonest of the delimiters that the header has; Excel writes semicolons in many countries.
            delimiter = max("\t;,", key=header.count)
            lines.seek(0)
            reader = csv.reader(lines, delimiter=delimiter)
            numbered = ((reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells))
            _, names = next(numbered, (0, []))
            table = [(f"line {line}", _fitting(cells, len(names))) for line, cells in numbered]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{file} is no table of text: {error}") from error
    if not table:
        raise ValueError(f"{file} has no rows below its first line, which must name the columns, as image,label,x,y")
    return [name.strip() for name in names], iter(table)


def _fitting(cells: list[str], wanted: int) -> list[str] | Refused:
    """The cells of a row, if there are as many as columns. Blank ones at the end are left out."""
    while len(cells) > wanted and not cells[-1].strip():
        cells.pop()
    if len(cells) == wanted:
        return cells
    than = "fewer" if len(cells) < wanted else "more"
    advice = "an empty cell needs its delimiter" if than == "fewer" else "quote cells that hold the delimiter"
    return Refused([f"it has {len(cells)} cells, {than} than the first line has columns, {wanted}: {advice}"], "table")


def _binary_table(file: Path) -> tuple[list[str], Iterator[tuple[str, list]]]:
    numbered = ((f"row {k}", row) for k, row in enumerate(read_rows(file), 1))
    first = next(numbered, None)
    if first is None:
        return [], iter([])
    names = list(first[1])
    return [str(name).strip() for name in names], (
        (place, [row.get(name) for name in names]) for place, row in chain([first], numbered)
    )


def _records(names: list[str], table: Iterator[tuple], unpacked: Unpacked) -> Iterator[tuple[str, dict]]:
    """(place, record) of each row, without empty cells of parquet, and with files inside of cells unpacked."""
    for place, cells in table:
        if not isinstance(cells, Refused):
            found = {name: cell for name, cell in zip(names, cells) if name and not _is_missing(cell)}
            cells = {name: _unpack(cell, unpacked, name) for name, cell in found.items()}
        yield place, cells


def _is_missing(cell) -> bool:
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def _unpack(value, unpacked: Unpacked, column: str):
    """A cell with the files in it (Hugging Face `datasets`: {"bytes", "path"}) replaced by their paths."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"} and (value["bytes"] or value["path"]):
        if value["bytes"] is None:
            return value["path"]
        return unpacked.keep(value["bytes"], value["path"] or _words(column, value["bytes"]))
    if isinstance(value, bytes):
        return unpacked.keep(value, _words(column, value))
    if isinstance(value, list):
        return [_unpack(item, unpacked, column) for item in value]
    if isinstance(value, dict):
        return {key: _unpack(item, unpacked, column) for key, item in value.items() if item is not None}
    return value


def _words(column: str, data: bytes) -> str:
    """What a picture without a name is called, with the suffix of its kind."""
    suffix = image_suffix(data)
    return f"picture in the column {column}{suffix}" if suffix else f"{NAMELESS} in the column {column}"


# -- samples ----------------------------------------------------------------------------------------------------------


def _points(records: Iterable[tuple[str, dict]], number: int, notes: list[str]) -> Iterator[Row]:
    """A row for each picture, at the place of its first; or one for each mistake in its rows."""
    pictures: dict[str, list[tuple[str, dict]]] = {}
    for place, record in records:
        if isinstance(record, Refused):
            pictures[f"\0{place}"] = [(place, record)]  # of which picture it is, nobody knows
        else:
            pictures.setdefault(str(record.get("image") or ""), []).append((place, record))
    numbers = count(number)
    for image, found in pictures.items():
        document, wrong = {"image": image, "unit": "", "style": ""}, []
        branches: dict[str, list] = {}
        for place, record in found:
            if problems := record.sentences if isinstance(record, Refused) else _add_point(record, document, branches):
                wrong.append((place, problems))
        others = len(found) - len(wrong)
        for place, problems in wrong:
            rest = f'; the other rows of "{image}" ({others}) are left out with it' if others else ""
            yield Row(place, next(numbers), Refused([f"{problem}{rest}" for problem in problems], "table"))
        if not wrong:
            document = {key: value for key, value in document.items() if value or key == "image"}
            tasks = [{"task": "pointing", "label": label, "points": points} for label, points in branches.items()]
            yield Row(found[0][0], next(numbers), document | {"branches": tasks}, "table", notes=notes)


def _add_point(record: dict, document: dict, branches: dict[str, list]) -> list[str]:
    """Add the point of a row to the picture's; returns what is wrong with it."""
    problems = []
    for key in ("unit", "style"):
        if given := record.get(key):
            document[key] = document[key] or given
            if given != document[key]:
                problems.append(f'{key}="{given}" differs from "{document[key]}" of an earlier row of the same picture')
    label = str(record.get("label") or "").strip()
    if not label:
        problems.append("label is empty")
    points = branches.setdefault(label, [])
    values = {key: value for key in ("x", "y") if (value := _number(record.get(key))) is not None}
    problems += [
        f"{key} = {json.dumps(text)} is not a number, with a point before its decimals"
        for key, text in values.items()
        if isinstance(text, str)
    ]
    if len(values) == 1:
        [given], [lacking] = values, {"x", "y"} - values.keys()
        problems.append(f"it has {given} and no {lacking}: write both, or none if there is nothing to point at")
    if len(values) == 2 and not problems:
        points.append([values["x"], values["y"]])
    return problems


def _number(cell) -> float | str | None:
    """None: the cell is empty, or NaN. A text: it is no number."""
    text = "" if cell is None else str(cell).strip()
    try:
        value = float(text) if text else math.nan
    except ValueError:
        return text
    return None if math.isnan(value) else value


def _sample(record: dict, task: str, options: dict[str, str]) -> dict:
    """A row of texts as a line with a task."""
    document = {key: record[key] for key in (*MEDIA, "style") if record.get(key)} | {"task": task}
    if task == "caption":
        return document | {"text": record.get("text", "")}
    document["question"] = record.get("question", "")
    if task == "question":
        answers = record.get("answers", record.get("answer", ""))
        return document | {"answers": answers if isinstance(answers, list) else [str(answers)]}
    if options:
        texts = {label: str(record.get(column, "")).strip() for label, column in options.items()}
        while texts and not list(texts.values())[-1]:  # a question with fewer options than others
            texts.popitem()
        if empty := [options[label] for label, text in texts.items() if not text]:
            return Refused([f"the option in the column {empty[0]} is empty"], "table")
    else:
        given = record.get("options")
        if not isinstance(given, list):
            return Refused(["options is not a list: write each option into a column of its own, A, B, C"], "table")
        texts = {chr(ord("A") + k): str(text) for k, text in enumerate(given)}
    try:
        answer = _index(record.get("answer", ""), texts, is_list=not options)
    except ValueError as error:
        return Refused([str(error)], "table")
    return document | {"options": list(texts.values()), "answer": answer}


def _index(answer, texts: dict[str, str], is_list: bool) -> int:
    """Which option is the answer: an index from 0 into a list, a letter or number of a column, or the option itself.

    texts: by letter or number. ValueError: it is none of these, or could be two of them.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if is_list and type(answer) is int and answer in range(len(texts)):
        return answer
    said = str(answer).strip()
    labels, options = list(texts), list(texts.values())
    found = {labels.index(label) for label in (said.upper(), said.strip("().: ").upper()) if label in labels}
    found |= {k for k, text in enumerate(options) if text.strip() == said and said}
    if len(found) == 1:
        return found.pop()
    if not found:
        names = f"the options {labels[0]} to {labels[-1]}" if labels else "its options, as it has none"
        raise ValueError(f"answer = {json.dumps(said)} is none of {names}: write its letter or number, or its text")
    advice = f"write its letter or number in brackets, as ({labels[min(found)]})"
    raise ValueError(f"answer = {json.dumps(said)} is one option by its letter or number and one by its text: {advice}")
