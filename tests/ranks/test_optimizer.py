"""Clipping, freezing and dropout of the public recipe, on the real model in a process of its own."""

import pytest
from programs import REPOSITORY, python, succeeded


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [[], ["optim.freeze_patterns=[decoder\\.layers\\.0\\.]", "optim.vit.freeze=false"]]
)
def test_clipping_freezing_and_dropout(overrides):
    result = succeeded(python(REPOSITORY / "tests" / "ranks" / "optimizer_check.py", *overrides))
    assert result.stdout.strip().endswith("all as it should be")
