"""Packed documents and sibling branches do not touch each other by one bit."""

import pytest
from programs import figures, python


@pytest.mark.parametrize("name", ["qwen3_gqa", "olmo3_yarn"])
def test_a_packed_document_cannot_see_its_neighbour(name, hf_models):
    documents = figures(python("tests/ranks/isolation_check.py", hf_models[name]))["documents"]
    assert len(documents) == 5
    for number, found in enumerate(documents):
        assert found["rest_moved_by_a_token"] == found["rest_of_the_branch"] > 0, (number, found)
        assert found["others_moved_by_a_token"] == 0, (number, found)
    visual = [found for found in documents if "neighbours_moved_by_a_crop" in found]
    assert len(visual) == 4
    for found in visual:
        assert found["last_token_moved_by_a_crop"] and found["neighbours_moved_by_a_crop"] == 0, found
        assert found["first_visual_token_moved_by_the_last_crop"], found
