"""Asking a model the questions of samples, several at once, and writing down each answer with its scores."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from molmo2_nemo.ask.model import Asker, Reply, Seen
from molmo2_nemo.evaluate.records import answers_file, cut_to_whole_lines, read_answers
from molmo2_nemo.evaluate.samples import Read, Samples, see
from molmo2_nemo.evaluate.tasks import Asked, names_no_option, questions, score_of

# Tokens of an answer at most, by the beginning of its style (allenai/molmo2 at f3cb108: olmo/eval/eval_utils.py,
# get_default_max_tokens). Of other styles MAX_NEW_TOKENS.
MOST_TOKENS = {"video_point_track": 4096, "video_single_point": 4096, "video_point": 2048, "video_count": 2048}
MAX_NEW_TOKENS = 384

# (messages, what is seen) of several questions, and the most tokens of an answer -> the answers.
Answer = Callable[[Sequence[tuple[list[dict], Seen]], int], list[Reply]]


@dataclass
class Pending:
    """A question that waits for its answer."""

    order: int  # of its sample
    read: Read
    asked: Asked | None  # None: the sample is broken
    number: int  # of the questions about the sample
    seen: Seen | None = None
    error: str = ""

    @property
    def kind(self) -> tuple:
        """Questions of one kind can be asked at once."""
        return (self.seen.frames is not None, most_tokens(self.asked.style)) if self.seen else ()


def most_tokens(style: str) -> int:
    return next((most for begin, most in MOST_TOKENS.items() if style.startswith(begin)), MAX_NEW_TOKENS)


def given_answers(out: Path) -> dict[str, dict]:
    """Id -> record. What failed is none, and is asked again: memory may have been short, or a file not there."""
    return {name: record for name, record in read_answers(out).items() if "error" not in record}


def unanswered(out: Path, indices: Sequence[int]) -> list[int]:
    """The samples of which a question has no answer yet."""
    records = given_answers(out).values()
    answers = Counter(record["index"] for record in records)
    wanted = {record["index"]: record["questions"] for record in records}
    return [index for index in indices if index not in wanted or answers[index] < wanted[index]]


def pending(samples: Samples, indices: Sequence[int], done: dict[str, dict], asker: Asker) -> Iterator[Pending]:
    """The questions of these samples that have no answer yet, with their media decoded."""
    for index in indices:
        read = samples.read(index)
        error, asked, seen = read.error, [None], None
        try:
            if not error:
                asked = list(questions(read.example, read.name))
                seen = see(read, asker)
        except ValueError as problem:
            error = " ".join(str(problem).split())
        for one in asked:
            if (one.id if one else read.name) not in done:
                yield Pending(index, read, one, len(asked), seen, error)


def batches(waiting: Iterator[Pending], size: int) -> Iterator[list[Pending]]:
    """Of one kind each, in their order otherwise; the broken ones alone."""
    groups: dict[tuple, list[Pending]] = {}
    for one in waiting:
        group = groups.setdefault(one.kind, [])
        group.append(one)
        if len(group) == size or not one.seen:
            yield groups.pop(one.kind)
    yield from groups.values()


def answer_all(
    samples: Samples,
    indices: Sequence[int],
    asker: Asker,
    answer: Answer,
    out: Path,
    rank: int,
    batch_size: int,
    max_new_tokens: int | None = None,
    progress: Callable[[int, int], None] = lambda samples, tokens: None,
) -> None:
    """Write the answers that are missing to the file of this rank. progress: is told of samples begun and of tokens.

    What is wrong with one question is written in the place of its answer.
    """
    cut_to_whole_lines(answers_file(out, rank))
    made, begun = batches(pending(samples, indices, given_answers(out), asker), batch_size), set()
    with answers_file(out, rank).open("a", encoding="utf-8") as file, ThreadPoolExecutor(1) as ahead:
        batch = ahead.submit(next, made, None)  # media are decoded while the model answers
        while (now := batch.result()) is not None:
            batch = ahead.submit(next, made, None)
            replies = answered(now, answer, max_new_tokens)
            for one, reply in zip(now, replies):
                file.write(json.dumps(record_of(one, reply), ensure_ascii=False) + "\n")
            file.flush()
            orders = {one.order for one in now}
            progress(len(orders - begun), sum(reply.num_tokens for reply in replies if isinstance(reply, Reply)))
            begun |= orders


def answered(batch: list[Pending], answer: Answer, max_new_tokens: int | None) -> list[Reply | str]:
    """Of each question the reply, or why there is none. A batch that fails is asked one by one."""
    if not batch[0].seen:
        return [one.error for one in batch]
    most = max_new_tokens or most_tokens(batch[0].asked.style)
    try:
        return answer([(one.asked.messages, one.seen) for one in batch], most)
    except ValueError as error:
        if len(batch) == 1:
            return [" ".join(str(error).split())]
    return list(chain.from_iterable(answered([one], answer, max_new_tokens) for one in batch))


def record_of(one: Pending, reply: Reply | str) -> dict:
    """A line of the predictions."""
    source = one.read.name.partition("/")[0]
    record = {
        "id": one.asked.id if one.asked else one.read.name,
        "sample": one.read.name,
        "index": one.order,
        "questions": one.number,
    }
    record["source"] = source
    if one.asked:
        record |= {"style": one.asked.style, "question": one.asked.messages[-1]["content"], "label": one.asked.label}
    if isinstance(reply, str):
        return record | {"error": reply}
    record |= {"said": reply.text, "tokens": reply.num_tokens} | ({"cut": True} if reply.is_cut else {})
    record |= {"names_no_option": True} if names_no_option(one.asked, reply.text) else {}
    return record | {"scores": score_of(one.asked, one.read.example, reply.text)}
