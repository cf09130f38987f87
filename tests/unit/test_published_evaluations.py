"""Evaluation sets as they are published: tests/published_evaluations/NAME.yaml through fetch, shards and scores.

The files are those of tests/published (published_sets.py) but for `expected`: of each sample its pictures or the
seconds of its video, and its questions, with the scores of some answers.
"""

import json
import re
import shutil

import published_sets as published
import pytest
from programs import REPOSITORY
from test_published import servers  # noqa: F401

from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.catalogue.forms import STYLES
from molmo2_nemo.data.encode import style_prefix
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.evaluate import public_sets, tasks
from molmo2_nemo.evaluate.samples import Samples

FOLDER = REPOSITORY / "tests" / "published_evaluations"
CATALOGUE = load_catalogue(public_sets.CATALOGUE)
PREFIXES = {"", *(f"{style}:" for style in STYLES["question"])}


def described(samples: Samples) -> list[tuple[dict, list[tasks.Asked], object]]:
    found = []
    for index in range(len(samples)):
        read = samples.read(index)
        assert not read.error, read.error
        example = read.example
        if example.video:
            seen = {"seconds": round(example.video.seconds, 1)}
            if example.video.subtitles:
                seen["subtitles"] = list(map(list, example.video.subtitles))
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
            # What the question starts with was there in training, too.
            assert style_prefix(one.style, 1, "demo", None) in PREFIXES, one.style
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


def test_shards_are_made_anew_after_another_fetch_or_by_another_version_and_stay_otherwise(servers, tmp_path):  # noqa: F811
    name = "nextqa-test"
    fixture, [entry] = published.load(name, FOLDER), CATALOGUE.find([name])
    published.serve(fixture, *servers, tmp_path, name)
    video = tmp_path / "raw" / name / "manual" / "NExTVideo" / "4.mp4"
    hidden = video.rename(tmp_path / "4.mp4")
    # A second question, so that there is something without the first one's video.
    rows = fixture["manual"]["MC/test-00000-of-00001.parquet"]["rows"]
    table = tmp_path / "raw" / name / "manual" / "MC" / "test-00000-of-00001.parquet"
    table.write_bytes(published.rows_file([*rows, rows[0] | {"video": 5}], ".parquet"))
    (video.parent / "5.mp4").write_bytes(published.video_file({"video": 20, "fps": 10}, "5.mp4"))
    published.fetched(entry, CATALOGUE, tmp_path)

    def made() -> tuple[int, list[str]]:
        reports = []
        return len(Samples([public_sets.prepared_set(name, tmp_path, reports.append)])), reports

    samples, reports = made()
    assert samples == 1 and "1 annotations are left out: its picture or video is not on disk" in reports[0]
    hidden.rename(video)
    assert made() == (samples, reports)
    # The advice.
    [folder] = re.findall(r"remove (\S+), so that", reports[1])
    shutil.rmtree(folder)
    assert made() == (2, [])

    note = tmp_path / "raw" / name / "fetched.json"
    for change in (
        lambda: (tmp_path / "evaluation" / name / public_sets.MADE).write_text("{}"),
        lambda: note.write_text(json.dumps(json.loads(note.read_text()) | {"time": "2026-12-01T00:00:00"})),
    ):
        marker = tmp_path / "evaluation" / name / "of_the_old_one"
        marker.touch()
        assert made() == (2, []) and marker.exists()
        change()
        assert made() == (2, []) and not marker.exists()
    shutil.rmtree(tmp_path / "raw")
    assert made() == (2, [])
