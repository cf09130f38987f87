"""What a rank holds of a step's pixels, what it sends of the vision tower's gradients, and what it waits for."""

from programs import figures, run_ranks


def test_a_step_holds_sends_and_waits_for_no_more_than_it_needs():
    ranks = figures(run_ranks(4, "tests/ranks/step_check.py"))["ranks"]
    assert len(ranks) == 4
    for found in ranks:
        # A rank's pixels are its share, not those of all; whole again where a batch is saved for inspection.
        assert found["bytes"] <= found["of"] / 4 + found["largest_image"] and not found["differing"] and found["ended"]
        # No masks, and no numbers of tensors, between the beginning of the forward and the end of the backward pass.
        assert found["operations"] > 1000 and found["waits"] == []
        # Tensor parallel ranks sum the shard that their optimizer reads, and this is all that it reads.
        assert found["reduced"] == found["owned"] or (not found["owned"] and found["reduced"] < found["vision"] / 4)
        assert found["gradients_differing"] == []
    assert ranks[0]["whole_again"] and not ranks[1]["whole_again"]
    assert sum(found["bytes"] for found in ranks) == ranks[0]["of"]
    assert ranks[0]["owned"] + ranks[2]["owned"] == ranks[0]["vision"] == ranks[1]["owned"] + ranks[3]["owned"]
