"""Clipping, freezing and dropout of the public recipe, on the real model in a process of its own."""

import pytest
from programs import figures, python

FREEZING = ["optim.freeze_patterns=[decoder\\.layers\\.0\\.]", "optim.vit.freeze=false"]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], FREEZING])
def test_clipping_freezing_and_dropout(overrides):
    found = figures(python("tests/ranks/optimizer_check.py", *overrides))
    # Each component is clipped by its own norm, as torch clips it.
    assert found["updated"] and len({round(one["norm"], 6) for one in found["clipping"].values()}) == 3
    for component, one in found["clipping"].items():
        assert one["norm_differs_by"] < 1e-5 and one["gradients_differ_by"] <= 1e-4, (component, one)
        assert one["clipped_to"] <= 0.501, (component, one)
    # What is frozen has neither gradient buffer nor optimizer state, and stays as it is; the rest moves.
    trained = set(found["trained"])
    assert set(found["with_gradient_buffer"]) == trained and found["states"] == len(trained)
    assert found["state_numbers"] == found["trained_numbers"]
    assert set(found["moved"]) <= trained and trained - set(found["moved"]) <= set(found["without_gradient"])
    frozen = found["frozen"]
    assert "embedding.word_embeddings.weight" in frozen
    assert any(name.startswith("decoder.layers.0.") for name in frozen) == bool(overrides)
    assert not any("decoder.layers.1." in name for name in frozen)
    assert bool(found["patterns"]) == bool(overrides)
    assert "decoder.layers.7 is in no parameter's name" in found["refusal"]
    assert "optim.freeze_patterns=['.*'] leave no parameter that is trained" in found["all_frozen"]
    # A gradient that is not finite: nothing moves.
    assert found["nan"] == {"updated": False, "norm_is_nan": True, "moved": []}
    # Dropout at positions that carry loss alone: what only sees other positions is as without dropout.
    assert found["response_dropout"] == {"same_before": 1.0, "same_with_loss": 0.0}
    assert found["dropout"]["same_before"] < 1.0 and found["dropout"]["same_with_loss"] == 0.0
