"""Crops encoded in chunks and again in the backward pass: the same gradients, in memory that does not grow with the
crops."""

import pytest
from programs import python, run_ranks, succeeded


def test_chunks_have_the_gradients_of_the_whole_and_bounded_memory():
    assert "checked" in succeeded(python("tests/ranks/vision_check.py", 1, 1)).stdout


@pytest.mark.slow
@pytest.mark.parametrize("tp, cp", [(1, 2), (2, 1)])
def test_ranks_with_other_numbers_of_chunks_do_not_wait_for_each_other(tp, cp):
    assert succeeded(run_ranks(tp * cp, "tests/ranks/vision_check.py", tp, cp)).stdout.count("checked") == tp * cp
