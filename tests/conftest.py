"""Fixtures shared by tests: small random models and sample data."""

from pathlib import Path

import pytest
from programs import python, succeeded


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory) -> dict[str, Path]:
    """Name -> folder of a random Molmo2 saved by transformers."""
    import hf_models

    folder = tmp_path_factory.mktemp("hf")
    return {name: hf_models.save(name, folder) for name in hf_models.configs()}


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """The sample world, a tenth of it. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    succeeded(python("tools/make_sample_data.py", "--out", folder, "--scale", 0.1))
    return folder
