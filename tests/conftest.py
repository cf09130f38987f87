"""Fixtures that tests share, in one process or in several, and the order of the tests. tests/README.md explains it."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import warm
from filelock import FileLock
from programs import python, succeeded

from molmo2_nemo.environment import set_cpu_environment

# Longest first: what takes minutes must not begin when one of two processes has nothing left to do.
FOLDERS = ("slurm", "commands", "ranks", "unit")

# As the recipes do before they import torch: the compiler's import would be a quarter of Megatron's. The server of warm
# programs inherits the variable.
set_cpu_environment()

hypothesis.settings.register_profile("tests", deadline=None)  # nothing is timed
hypothesis.settings.load_profile("tests")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # not in the processes of pytest-xdist, which inherit the environment
        folder = Path(tempfile.mkdtemp(prefix="molmo2-nemo-"))
        (folder / "owner").write_text(str(os.getpid()))
        os.environ[warm.FOLDER] = str(folder)
        config.add_cleanup(lambda: shutil.rmtree(folder))


def pytest_collection_modifyitems(items):
    """Folder after folder. The tests of a file stay together: pytest-xdist gives a process one file at a time."""
    items.sort(key=lambda item: FOLDERS.index(item.path.parent.name))


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """made_once(name, make): the folder of that name, which `make(folder)` fills once for all of pytest's processes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def hf_models(made_once) -> dict[str, Path]:
    """Name -> folder of a random Molmo2 saved by transformers. Not to be changed."""
    import hf_models

    def make(folder: Path) -> None:
        for name in hf_models.configs():
            hf_models.save(name, folder)

    folder = made_once("hf", make)
    return {name: folder / name for name in hf_models.configs()}


@pytest.fixture(scope="session")
def bases(made_once) -> dict[str, Path]:
    """Name -> folder of a random language model or vision tower saved by transformers. Not to be changed."""
    import hf_models

    def make(folder: Path) -> None:
        for name, model in hf_models.base_models().items():
            hf_models.move_norms(model).save_pretrained(folder / name)

    folder = made_once("bases", make)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def export(made_once) -> Path:
    """The tiny model with random weights as tools/export_hf.py leaves one. Not to be changed."""
    import exports

    return made_once("export", exports.save)


@pytest.fixture(scope="session")
def sample(made_once) -> Path:
    """The sample world, a hundredth of it: 16 training samples of a source or a few more. Not to be changed."""

    def make(folder: Path) -> None:
        succeeded(python("tools/make_sample_data.py", "--out", folder / "sample", "--scale", 0.01))

    return made_once("data", make) / "sample"


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """The folder behind msc://disk."""
    import object_store

    from molmo2_nemo import storage

    for name, value in object_store.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    storage.forget_clients()
    yield tmp_path / "disk"
    storage.forget_clients()
