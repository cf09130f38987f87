"""Packed documents and sibling branches do not touch each other by one bit."""

import pytest
from programs import python, succeeded


@pytest.mark.parametrize("name", ["qwen3_gqa", "olmo3_yarn"])
def test_a_packed_document_cannot_see_its_neighbour(name, hf_models):
    assert "isolated" in succeeded(python("tests/ranks/isolation_check.py", hf_models[name])).stdout
