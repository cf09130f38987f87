"""docs/settings.md is what schema.py and conf/ say, and every setting has a meaning."""

import dataclasses

import pytest
from dev import make_settings

from molmo2_nemo.config import schema


def test_the_page_is_up_to_date():
    assert make_settings.PAGE.read_text() == make_settings.page(), "run python tools/dev/make_settings.py"


def test_every_field_has_a_meaning_of_its_own():
    rows = make_settings.rows(schema.Config)
    assert len(rows) > 150
    for key, _, _, meaning, _ in rows:
        assert len(meaning.split()) >= 2 and meaning.endswith("."), key


@dataclasses.dataclass
class Explained:
    first: int = 1
    """How many of the first. Source: a paper."""
    second: int | None = None


def test_a_field_without_a_meaning_is_refused():
    with pytest.raises(ValueError, match=r"Explained\.second in .* has no meaning"):
        make_settings.meanings(Explained)


def test_a_stale_page_is_named(monkeypatch):
    stale = make_settings.ROOT / "docs" / "layouts.md"  # any file with another content
    monkeypatch.setattr(make_settings, "PAGE", stale)
    monkeypatch.setattr("sys.argv", ["make_settings.py", "--check"])
    before = stale.read_text()
    with pytest.raises(SystemExit, match="docs/layouts.md is out of date"):
        make_settings.main()
    assert stale.read_text() == before
