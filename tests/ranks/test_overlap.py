"""Overlapped reductions and gathers change no bit, also where a rank has no image and weights are used late."""

import pytest
from programs import figures, run_ranks


@pytest.mark.slow
@pytest.mark.ranks
def test_overlap_changes_nothing():
    ranks = figures(run_ranks(2, "tests/ranks/overlap_check.py"))["ranks"]
    assert len(ranks) == 2 and all(len(overlaps) == 2 for overlaps in ranks)
    for found in (one for overlaps in ranks for one in overlaps):
        assert found["buckets"] > 5 and found["steps"] == 3 and found["weights"] > 40, found
        assert found["steps_differing"] == found["weights_missing"] == 0 and found["weights_differing"] == [], found
