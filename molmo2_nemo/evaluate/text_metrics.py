"""Scores of short answers and of options. Definitions: allenai/molmo2 at f3cb108, olmo/eval/vqa.py and evaluators.py.

All take texts and return a number from 0 to 1, or an index.
"""

import re
from collections import Counter
from collections.abc import Sequence

# Of an answer's words, in the normalisation of VQA v2's evaluation (github.com/GT-Vision-Lab/VQA, vqaEval.py). Spaces
# and digits around a mark decide whether it is left out or becomes a space.
ARTICLES = frozenset(["a", "an", "the"])
NUMBERS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_AND_COMMA = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
# Contractions that are written without their apostrophe: the beginnings that take each ending, and single words. The
# longer ones of that table, as couldntve, are left out: nobody answers with them.
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must should they we would what where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
}
CONTRACTIONS = {
    (beginning + ending).replace("'", ""): beginning + ending
    for ending, beginnings in ENDINGS.items()
    for beginning in beginnings.split()
} | {"oclock": "o'clock", "maam": "ma'am", "twas": "'twas", "yall": "y'all", "whyre": "why're"}

MAX_CHANGE = 0.05  # of a number in a chart, for a right answer
# An answer that is a letter alone, with what other models write around it.
LETTER = re.compile(
    r"(?:(?:the )?(?:correct |right |best )?(?:answer|option|choice) ?(?:is|:)? ?(?:option )?)?\W*([a-z])\W*"
)
ANLS_THRESHOLD = 0.5  # of the edit distance, as a share of the longer text


def shortened(answer: str) -> str:
    """What is scored of an answer: after "Answer:", if it is there, with single spaces."""
    return " ".join(answer.rpartition("Answer:")[2].split())


def exact_match(answer: str, right: Sequence[str]) -> float:
    """Without regard to case."""
    return float(shortened(answer).lower() in {" ".join(one.lower().split()) for one in right})


def vqa_normalised(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").lower().strip()
    has_thousands, cleaned = DIGITS_AND_COMMA.search(text) is not None, text
    for mark in MARKS:
        stands_alone = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if stands_alone or has_thousands else " ")
    words = [NUMBERS.get(word, word) for word in FULL_STOP.sub("", cleaned).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(answer: str, right: Sequence[str]) -> float:
    """A third for each person who gave this answer, 1 at most; of a single right answer, whether it is this one."""
    counts, said = Counter(map(vqa_normalised, right)), vqa_normalised(shortened(answer))
    return float(counts[said] > 0) if len(right) == 1 else min(1.0, counts[said] / 3)


def edit_distance(first: str, second: str) -> int:
    """How many characters have to be put in, taken out or replaced (Levenshtein)."""
    row = list(range(len(second) + 1))
    for above, one in enumerate(first, start=1):
        left, corner = above, above - 1
        for column, other in enumerate(second, start=1):
            left = min(left + 1, row[column] + 1, corner + (one != other))
            corner, row[column] = row[column], left
        row[0] = above
    return row[-1]


def anls(answer: str, right: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (arXiv 1907.00490, equation 1), of the best of the right answers."""
    said = shortened(answer).lower()
    return max(_similarity(said, " ".join(one.lower().split())) for one in right)


def _similarity(said: str, right: str) -> float:
    longest = max(len(said), len(right))
    if not longest:
        return 1.0
    if abs(len(said) - len(right)) / longest >= ANLS_THRESHOLD:  # so is the distance then
        return 0.0
    distance = edit_distance(said, right) / longest
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def relaxed(answer: str, right: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy (arXiv 2203.10244, section 5.1): numbers may be off by a twentieth."""
    return float(any(_is_close(shortened(answer), " ".join(one.split())) for one in right))


def _is_close(said: str, right: str) -> bool:
    number, wanted = _number(said), _number(right)
    if number is not None and wanted:  # a share of 0 is nothing: 0 has to be said as it is
        return abs(number - wanted) <= MAX_CHANGE * abs(wanted)
    return said.lower() == right.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


def named(answer: str, options: Sequence[str]) -> int | None:
    """The index of the option that an answer names; None: it names none, or several.

    options: as they were shown, with their letters. The first of these that only one option satisfies: they are equal;
    the answer is its letter, as "(B)", "**B**" or "The answer is B."; the answer begins with the option; the option
    begins with the answer, or holds it.
    """
    said = shortened(answer).lower()
    if not said:
        return None
    shown = _shown(options)
    if said in shown:
        return shown.index(said)
    if letter := LETTER.fullmatch(said):
        found = [index for index, option in enumerate(shown) if option.startswith(f"{letter[1]}.")]
        if len(found) == 1:
            return found[0]
    for is_meant in (said.startswith, lambda option: option.startswith(said), lambda option: said in option):
        found = [index for index, option in enumerate(shown) if is_meant(option)]
        if len(found) == 1:
            return found[0]
    return None


def chosen(answer: str, options: Sequence[str]) -> int | None:
    """The option that an answer names, else the nearest by edit distance, the first of several; None: it is empty."""
    said = shortened(answer).lower()
    if not said:
        return None
    index, shown = named(answer, options), _shown(options)
    return min(range(len(shown)), key=lambda k: edit_distance(shown[k], said)) if index is None else index


def _shown(options: Sequence[str]) -> list[str]:
    return [" ".join(option.lower().split()) for option in options]
