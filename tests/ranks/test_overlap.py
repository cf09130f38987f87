"""Overlapped reductions and gathers change no bit, also where a rank has no image and weights are used late."""

import pytest
from programs import run_ranks, succeeded


@pytest.mark.slow
def test_overlap_changes_nothing():
    assert succeeded(run_ranks(2, "tests/ranks/overlap_check.py")).stdout.count("same") == 2
