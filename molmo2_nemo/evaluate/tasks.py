"""The questions of a stored sample, as a model is asked them when it is evaluated, and the scores of its answers.

A task is asked in the words of training, drawn once by the sample's key, so that every model is asked the same.
Multiple choice has the layout of evaluations, and explanations are not asked for.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from molmo2_nemo.config.schema import POINT_METRICS
from molmo2_nemo.data.encode import style_prefix
from molmo2_nemo.data.points import Tracks, parse, render_content
from molmo2_nemo.data.schema import Branch, Example, MultipleChoice, Pointing, Question, Tracking
from molmo2_nemo.data.tasks import COUNT_ONLY, Conversation, Talk, option_lines
from molmo2_nemo.evaluate import point_metrics, text_metrics
from molmo2_nemo.training import score

# Style of a question -> how its answers are scored (allenai/molmo2 at f3cb108: olmo/eval/eval_utils.py, get_evaluator);
# of other styles by exact match.
SHORT_ANSWERS = {
    **dict.fromkeys(("vqa2", "text_vqa", "okvqa", "a_okvqa_da"), "vqa"),
    **dict.fromkeys(("doc_qa", "info_qa", "st_qa"), "anls"),
    "chart_qa": "relaxed",
}
SCORES = {"vqa": text_metrics.vqa_score, "anls": text_metrics.anls, "relaxed": text_metrics.relaxed}


@dataclass
class Asked:
    """A question about a sample, and what is right."""

    id: str  # SOURCE/KEY/NUMBER, of the branch and of the turn in it
    style: str
    messages: list[dict]  # {"role", "content"}, the last one the question
    label: str  # an answer that is right
    branch: Branch


def questions(example: Example, name: str) -> Iterator[Asked]:
    """All questions about a sample. name: SOURCE/KEY. ValueError: a task makes no sense.

    A conversation of several turns has one for each, asked behind the right answers to those before.
    """
    for number, branch in enumerate(example.branches):
        digest = hashlib.sha256(f"{name}/{number}".encode()).digest()
        rng = np.random.default_rng(list(digest))
        if isinstance(branch, MultipleChoice | Question):
            branch = replace(branch, explanation=None)
        # The layout of evaluations is the one without templates.
        wording = "none" if isinstance(branch, MultipleChoice) else "templates"
        (conversation,) = Talk(replace(example, branches=[branch], multi_turn=0.0), rng, wording).conversations()
        turns = list(_turns(conversation, rng))
        for turn, (messages, label) in enumerate(turns):
            place = f"{number}.{turn}" if len(turns) > 1 else f"{number}"
            yield Asked(f"{name}/{place}", conversation.style, messages, label, branch)


def _turns(conversation: Conversation, rng: np.random.Generator) -> Iterator[tuple[list[dict], str]]:
    """(messages up to a question, the right answer) of each turn."""
    messages = [
        {"role": message.role, "content": render_content(message.content, message.points)}
        for message in conversation.messages
    ]
    first = next(message for message in messages if message["role"] == "user")
    prefix = style_prefix(conversation.style, len(messages[-1]["content"]), "demo", rng)
    first["content"] = " ".join(part for part in (prefix, first["content"]) if part)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            yield messages[:number], message["content"]


def score_of(asked: Asked, example: Example, answer: str) -> dict[str, float]:
    """Metric -> number from 0 to 1; empty for captions and long answers, of which no metric is known."""
    branch, seconds = asked.branch, example.video.seconds if example.video else None
    if isinstance(branch, MultipleChoice):
        options = option_lines(branch.options, asked.style)
        return {"choice": float(text_metrics.chosen(answer, options) == branch.answer)}
    if isinstance(branch, Question):
        return _question_score(asked.style, branch, answer)
    sizes = [(v.width, v.height) for v in ([example.video] if example.video else example.images)]
    found = score.score(asked.style, asked.label, answer, sizes, seconds)
    if isinstance(branch, Tracking):
        return _track_scores(asked, sizes[0], answer) | ({} if branch.regions else found)
    if isinstance(branch, Pointing) and branch.regions is not None and asked.style not in COUNT_ONLY:
        wanted = [(float(where), x, y) for where, group in branch.points for x, y in group]
        points = point_metrics.flat_points(parse(answer))
        found |= dict(zip(POINT_METRICS, point_metrics.masked_points(points, wanted, branch.regions, seconds)))
    return found


def names_no_option(asked: Asked, answer: str) -> bool:
    """Whether an answer about options is scored by the option that it is nearest to in its letters."""
    if not isinstance(asked.branch, MultipleChoice) or not text_metrics.shortened(answer):
        return False
    return text_metrics.named(answer, option_lines(asked.branch.options, asked.style)) is None


def _question_score(style: str, task: Question, answer: str) -> dict[str, float]:
    if style in score.COUNTING and task.answers[0].isdecimal():
        said, right = score.count_of(answer, style), int(task.answers[0])
        return {
            "count_exact": float(said == right),
            "count_close": float(said is not None and abs(said - right) <= 1 + right // 20),
        }
    if metric := SHORT_ANSWERS.get(style):
        return {metric: SCORES[metric](answer, task.answers)}
    # As of other texts: no exact match can be expected of a long one.
    short = [one for one in task.answers if len(one.split()) <= score.MAX_EXACT_WORDS]
    said = score.normalised(answer)
    return {"exact_match": float(said in map(score.normalised, short))} if short else {}


def _track_scores(asked: Asked, size: tuple[int, int], answer: str) -> dict[str, float]:
    """Scores by masks, or by distance where there are none."""
    answered, labelled = (
        [frame for entry in parse(text) if isinstance(entry, Tracks) for frame in entry.frames]
        for text in (answer, asked.label)
    )
    regions = asked.branch.regions
    if regions:  # the label's objects have numbers, in the masks they have names
        labelled = [(seconds, objects) for seconds, objects in asked.branch.frames if objects]
    hits = point_metrics.hits_in(regions) if regions else point_metrics.hits_near(size)
    frames = point_metrics.paired_frames(answered, labelled)
    scores = dict(zip(point_metrics.TRACKING_METRICS, point_metrics.hota(frames, hits)))
    if regions:
        scores |= dict(zip(point_metrics.FRAME_METRICS, point_metrics.frame_scores(frames, hits, size)))
    return scores
