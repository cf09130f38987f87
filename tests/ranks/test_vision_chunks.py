"""Crops encoded in chunks and again in the backward pass: the same gradients, in memory that does not grow with the
crops."""

import pytest
from programs import figures, python, run_ranks


def assert_gradients_are_those_of_the_whole(ranks: list[dict]) -> None:
    for found in ranks:
        # Chunks of one and two crops are smaller than an image.
        assert max(found["unit_crops"]) > 2 and len(found["unit_crops"]) > 4
        # Every parameter of the tower has a gradient; in a row of text alone none has.
        assert found["without_gradient"] == {"all": 0, "text": found["vision_parameters"]}
        assert len(found["chunked"]) == 7
        for one in found["chunked"]:
            for kind, differences in one["kinds"].items():
                assert differences["loss"] <= 1e-6, (one["chunk"], kind, differences)
                # Sums of float32 in another order: up to 1.4e-6 on one kind of CPU, below 1e-6 on another.
                assert differences["gradients"] <= 1e-5, (one["chunk"], kind, differences)
            assert one["kinds"]["text"]["without_gradient"] == found["vision_parameters"]
            # A backward of the tower alone reaches every parameter, images or not.
            assert one["alone"] == {"not_reached": 0, "not_zero": 0}


def test_chunks_have_the_gradients_of_the_whole_and_bounded_memory():
    found = figures(python("tests/ranks/vision_check.py", 1, 1))
    assert len(found["ranks"]) == 1
    assert_gradients_are_those_of_the_whole(found["ranks"])
    memory = found["memory"]
    # All at once, memory grows with the crops; so many bytes of activations has each.
    assert memory["crop"] > 20 * memory["hidden_states"], memory
    # In chunks it grows with the chunk, not with the crops: 48 more leave next to nothing behind.
    assert memory["more_crops"] < 0.02 * 48 * memory["crop"], memory
    assert 0.5 < memory["larger_chunks"] / (12 * memory["crop"]) < 2, memory
    # An eighth of it or less here.
    assert memory["more_large_images"] < 48 * memory["crop"] / 8, memory


@pytest.mark.slow
@pytest.mark.parametrize("tp, cp", [(1, 2), (2, 1)])
def test_ranks_with_other_numbers_of_chunks_do_not_wait_for_each_other(tp, cp):
    found = figures(run_ranks(tp * cp, "tests/ranks/vision_check.py", tp, cp))
    assert len(found["ranks"]) == tp * cp
    assert_gradients_are_those_of_the_whole(found["ranks"])
