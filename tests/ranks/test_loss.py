"""The head's losses on two tensor parallel ranks against PyTorch in float64."""

from programs import run_ranks, succeeded


def test_losses_of_two_tensor_parallel_ranks():
    succeeded(run_ranks(2, "tests/ranks/loss_check.py"))
