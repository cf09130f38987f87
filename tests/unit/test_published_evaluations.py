"""Evaluation sets as they are published: tests/published_evaluations/NAME.yaml through fetch, shards and scores.

The files are those of tests/published (published_sets.py) but for `expected`: of each sample its pictures or the
seconds of its video, and its questions, with the scores of some answers.
"""

import published_sets as published
import pytest
from programs import REPOSITORY
from test_published import servers  # noqa: F401

from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.evaluate import public_sets, tasks
from molmo2_nemo.evaluate.samples import Samples

FOLDER = REPOSITORY / "tests" / "published_evaluations"
CATALOGUE = load_catalogue(public_sets.CATALOGUE)


def described(samples: Samples) -> list[tuple[dict, list[tasks.Asked], object]]:
    found = []
    for index in range(len(samples)):
        read = samples.read(index)
        assert not read.error, read.error
        example = read.example
        if example.video:
            seen = {"seconds": round(example.video.seconds, 1)}
        else:
            seen = {"pictures": [published._seen(read_image(read.parts[image.part])) for image in example.images]}
        found.append((seen, list(tasks.questions(example, read.name)), example))
    return found


@pytest.mark.parametrize("name", published.names(FOLDER))
def test_what_is_published_is_asked_and_scored(name, servers, tmp_path):  # noqa: F811
    fixture, [entry] = published.load(name, FOLDER), CATALOGUE.find([name])
    published.serve(fixture, *servers, tmp_path, name)
    expected, reports = fixture["expected"], []
    result = published.fetched(entry, CATALOGUE, tmp_path)
    assert result.state == "complete", result.reason
    samples = described(Samples([public_sets.prepared_set(name, tmp_path, reports.append)]))
    dropped = [
        f"{name}: {count:,} annotations are left out: {why}" for why, count in expected.get("dropped", {}).items()
    ]
    assert reports == dropped and len(samples) == len(expected["samples"])
    for wanted in expected["samples"]:
        at = next(
            (
                number
                for number, (seen, asked, _) in enumerate(samples)
                if seen.items() <= wanted.items() and all(map(_is_asked, asked, wanted["asked"]))
            ),
            None,
        )
        assert at is not None, [(seen, [(one.messages, one.label) for one in asked]) for seen, asked, _ in samples]
        _, asked, example = samples.pop(at)
        assert len(asked) == len(wanted["asked"])
        for one, question in zip(asked, wanted["asked"]):
            for answer, scores in question["said"].items():
                assert tasks.score_of(one, example, str(answer)) == pytest.approx(scores, abs=1e-4), answer


def _is_asked(asked: tasks.Asked, wanted: dict) -> bool:
    question = wanted.get("question", asked.messages[-1]["content"])
    return question == asked.messages[-1]["content"] and wanted.get("label", asked.label) == asked.label


def test_who_says_that_a_layout_is_known_has_a_fixture_with_the_same_evidence_and_the_other_way_round():
    claimed = {entry.name: entry.layout_evidence for entry in CATALOGUE.datasets if entry.layout_evidence}
    assert sorted(claimed) == published.names(FOLDER)
    for name, claim in claimed.items():
        first = {key: value for key, value in published.load(name, FOLDER)["evidence"][0].items() if key != "says"}
        assert claim.model_dump(exclude_none=True) == first, name
