"""Data sets as they are published: tests/published/NAME.yaml through fetch, prepare and the encoder, to the pixel."""

import re

import published_sets as published
import pytest
import yaml
from programs import REPOSITORY

from molmo2_nemo.catalogue.datasets import load_catalogue

CATALOGUE = load_catalogue()


@pytest.fixture(scope="module")
def servers():
    """A Hub and a web. Every address of the web leads to the second."""
    with pytest.MonkeyPatch.context() as patch, published.servers(patch, {}) as both:
        yield both


@pytest.mark.parametrize("name", published.names())
def test_what_is_published_becomes_the_samples_that_it_says(name, servers, tmp_path):
    fixture, [entry] = published.load(name), CATALOGUE.find([name])
    published.serve(fixture, *servers, tmp_path, name)
    expected = fixture["expected"]
    result = published.fetched(entry, CATALOGUE, tmp_path)
    assert result.state == expected.get("fetch", "complete"), result.reason
    parts, dropped = published.prepared(entry, tmp_path)
    samples = [published.shown(sample) for sample in parts]
    said = yaml.safe_dump([sample.described() for sample in samples], sort_keys=False, width=110)
    assert (len(samples), dict(dropped)) == (len(expected["samples"]), expected.get("dropped") or {}), said
    for wanted in expected["samples"]:
        found = [published.differences(sample, wanted) for sample in samples]
        nearest = min(range(len(samples)), key=lambda index: len(found[index]))
        assert not found[nearest], f"nearest to {wanted['turns']}: {found[nearest]}\n{said}"
        del samples[nearest]


def test_who_says_that_a_layout_is_known_has_a_fixture_with_the_same_evidence_and_the_other_way_round():
    claimed = {entry.name: entry.layout_evidence for entry in CATALOGUE.datasets if entry.layout_evidence}
    assert sorted(claimed) == published.names()
    for name, claim in claimed.items():
        first = {key: value for key, value in published.load(name)["evidence"][0].items() if key != "says"}
        assert claim.model_dump(exclude_none=True) == first, name


def test_complete_means_that_samples_can_be_made(servers, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    from download import main

    fixture, root = published.load("latot"), ["--root", str(tmp_path)]
    published.serve(fixture, *servers, tmp_path, "latot")
    assert main(["fetch", "latot", "--quiet", *root]) == 0
    assert "unverified" not in "".join(capsys.readouterr())
    # The same release with its frames elsewhere.
    video = tmp_path / "raw/latot/manual/LaTOT/boat_1"
    (video / "img").rename(video / "somewhere")
    assert main(["fetch", "latot", "--quiet", *root]) == 1
    said = "none of the first 1 rows became a sample (its picture or video is not on disk)"
    assert said in capsys.readouterr().out
    main(["list", "latot", *root])
    main(["doctor", "latot", *root])
    shown = capsys.readouterr().out
    assert "verified  useless" in shown and "no sample can be made of it" in shown
    (video / "somewhere").rename(video / "img")
    assert main(["fetch", "latot", "--quiet", *root]) == 0 and main(["doctor", "latot", *root]) == 0


def test_a_layout_that_nobody_has_compared_is_named_before_the_first_byte(servers, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    from download import main

    servers[0].repos.clear()
    entries = [{"name": "theirs", "category": "video-auto"}, {"name": "mine"}]
    source = {"kind": "hf", "hf": {"repo": "me/none"}}
    more = {"source": source, "media": {"kind": "none"}, "modality": "text", "fields": {"question": "", "answer": ""}}
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"datasets": [entry | more for entry in entries]}))
    where = ["--root", str(tmp_path), "--catalogue", str(tmp_path / "sets.yaml")]
    assert main(["fetch", "theirs", "mine", "--quiet", *where]) == 1
    said = capsys.readouterr().err
    assert said.startswith("theirs: layout unverified") and "mine: layout" not in said
    main(["list", *where])
    assert re.search("theirs .* unverified .*\nmine .* own ", capsys.readouterr().out)
