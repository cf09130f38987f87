"""The files of an evaluation, and going on where it was stopped.

OUT/settings.json            what is evaluated, on which data: a second run must be of the same
OUT/answers-00000.jsonl      of rank 0: a line for each answer, flushed as soon as it is there
OUT/predictions.jsonl        all of them in the order of the samples, once the last one is there
OUT/scores.json, OUT/index.html and OUT/pictures
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from molmo2_nemo.files import LockHeld, locked, write_atomically, write_json

SETTINGS, PREDICTIONS, SCORES, LOCK = "settings.json", "predictions.jsonl", "scores.json", ".lock"
# Bytes that are written to see whether there is room: the answers of few questions.
ROOM = 2**16
EVALUATIONS = Path("runs/evaluate")  # where they are, unless --out says otherwise
# Bytes that are hashed of the beginning, the middle and the end of a file of weights.
LOOKED_AT = 2**20


def model_identity(folder: Path) -> str:
    """A hash of what decides a model's answers: its configuration, its tokenizer, and its weights as `sampled_hash`
    looks at them, since reading all of them would take minutes."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            digest.update(sampled_hash(file))
        elif file.suffix in (".json", ".jinja", ".txt") and file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def sampled_hash(file: Path) -> bytes:
    """Of name, size, and the bytes at the beginning, in the middle and at the end."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"{file.name} {size}".encode())
    with file.open("rb") as content:
        for place in (0, size // 2, max(0, size - LOOKED_AT)):
            content.seek(place)
            digest.update(content.read(LOOKED_AT))
    return digest.digest()


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """The folder of an evaluation, made if it is not there, and locked, so that two do not write to it at once.

    ValueError, one sentence: it is no folder for it, cannot be written to, or another evaluation holds it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if out.is_dir() and not (out / SETTINGS).is_file() and {path.name for path in out.iterdir()} - {LOCK}:
        raise ValueError(f"{out} holds other files than an evaluation's: name another --out")
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(locked(out / LOCK))
            with tempfile.TemporaryFile(dir=out) as file:
                file.write(bytes(ROOM))
        except LockHeld:
            raise ValueError(
                f"another tools/evaluate.py works in {out}: wait for its end, or name another --out"
            ) from None
        except OSError as error:
            raise ValueError(f"--out {out} cannot be written to ({error.strerror}): name another folder") from error
        yield


def check_settings(out: Path, settings: dict) -> None:
    """Compare them with those of the run that was stopped, if there is one. ValueError: they differ.

    What has a hash (model_hash of model) may have another name, as after it was moved.
    """
    file = out / SETTINGS
    if not file.is_file():
        return
    try:
        before = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): name another --out, or remove the folder") from error
    for key in sorted(settings):
        if f"{key}_hash" in settings or before.get(key) == settings[key]:
            continue
        shown = [str(value)[:60] for value in (before.get(key), settings[key])]
        if key in ("model_hash", "data_hash"):  # their names may be the same
            kind = key.removesuffix("_hash")
            shown = [f"{shown[0]} of {before.get(kind)}", f"{shown[1]} of {settings[kind]}"]
        raise ValueError(
            f"{out} holds an evaluation with {key}={shown[0]}, and this one has {key}={shown[1]}: name another "
            "--out, or remove the folder"
        )


def write_settings(out: Path, settings: dict) -> None:
    """Write them down, or compare them with those that are there. ValueError: they differ."""
    check_settings(out, settings)
    if not (out / SETTINGS).is_file():
        write_json(out / SETTINGS, settings)


def answers_file(out: Path, rank: int) -> Path:
    return out / f"answers-{rank:05d}.jsonl"


def cut_to_whole_lines(file: Path) -> None:
    """Take off the line in which a run was stopped."""
    content = file.read_bytes() if file.is_file() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)


def read_answers(out: Path) -> dict[str, dict]:
    """Id -> the answer's record, of all ranks that have ever written. A line that was cut is passed over."""
    found = {}
    for file in sorted(out.glob("answers-*.jsonl")):
        for line in read_lines(file):
            found[line["id"]] = line
    return found


def read_lines(file: Path) -> list[dict]:
    """The records of whole lines. ValueError, one sentence with the number of the line: one is none."""
    content, found = file.read_bytes(), []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n"), start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        scored = "error" in record or isinstance(record.get("scores"), dict) if isinstance(record, dict) else False
        if not scored or not {"id", "sample", "index", "questions", "source"} <= record.keys():
            raise ValueError(f"{file} is damaged in line {number}: remove the line, and run the evaluation again")
        found.append(record)
    return found


def write_predictions(out: Path, records: Iterable[dict]) -> None:
    write_atomically(out / PREDICTIONS, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_predictions(out: Path) -> list[dict]:
    """ValueError, one sentence: the folder holds no finished evaluation, or a damaged one."""
    file = out / PREDICTIONS
    if not file.is_file():
        raise ValueError(f"{out} holds no finished evaluation (no {PREDICTIONS}): run tools/evaluate.py --out {out}")
    if not file.read_bytes().endswith(b"\n"):  # they are written at once, so that it is not one that was stopped
        raise ValueError(f"{file} is damaged at its end: run the evaluation again, which writes it from its answers")
    return read_lines(file)
