"""The head's losses on two tensor parallel ranks against PyTorch in float64."""

from programs import figures, run_ranks


def test_losses_of_two_tensor_parallel_ranks():
    found = figures(run_ranks(2, "tests/ranks/loss_check.py"))
    assert list(found) == ["200", "120"]
    for vocab_size, ranks in found.items():
        assert len(ranks) == 2
        for rank in ranks:
            assert rank["losses"] <= 1e-5 and rank["squares"] <= 1e-5, (vocab_size, rank)
            assert rank["hidden_gradients"] <= 1e-4 and rank["weight_gradients"] <= 1e-4, (vocab_size, rank)
    # Half of a vocabulary, and a rank that holds padding alone.
    assert [rank["largest_weight_gradient"] > 0 for rank in found["120"]] == [True, False]
