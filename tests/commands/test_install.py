"""The wheel, installed into a folder of its own and used from another: nothing of the checkout may be needed."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from programs import REPOSITORY, python, succeeded

from molmo2_nemo import parallel

# What a wheel is built from. It is copied: setuptools leaves build/ behind, and would reuse what an older build put
# there.
SOURCES = ("molmo2_nemo", "conf", "recipes", "tools", "slurm", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def build_and_install(folder: Path) -> Path:
    """Build the wheel of this checkout without a network; returns the folder that it is installed into."""
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for command in (
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source],
        [*pip, "install", "--no-deps", "--no-compile", "--target", site],
    ):
        command += list(folder.glob("*.whl")) if "install" in command else []
        succeeded(subprocess.run([str(part) for part in command], text=True, capture_output=True, timeout=600))
    return site


class Installed:
    """The installed package, run as `python -m molmo2_nemo...` in a folder that has nothing of the checkout."""

    def __init__(self, site: Path, folder: Path):
        self.site, self.folder = site, folder
        folder.mkdir()

    def python(self, *arguments) -> subprocess.CompletedProcess:
        """PYTHONPATH comes before site-packages, so before the editable install of the checkout, too."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            text=True,
            capture_output=True,
            timeout=900,
            env={**os.environ, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )

    def run(self, module: str, *arguments) -> subprocess.CompletedProcess:
        return self.python("-m", module, *arguments)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    return Installed(build_and_install(folder), folder / "elsewhere")


def test_every_file_of_the_packages_is_in_the_wheel(installed):
    """A new configuration file, page template or script is not forgotten."""
    package = installed.site / "molmo2_nemo"
    listed = succeeded(subprocess.run(["git", "ls-files"], cwd=REPOSITORY, text=True, capture_output=True))
    files = [Path(name) for name in listed.stdout.splitlines()]
    wanted = [name.relative_to("molmo2_nemo") for name in files if name.parts[0] == "molmo2_nemo"]
    wanted += [name for name in files if name.parts[0] in ("conf", "recipes", "slurm")]
    wanted += [name for name in files if name.parts[:2] == ("tools", "inspect_pages")]
    wanted += [name for name in files if name.match("tools/*.py") and len(name.parts) == 2]
    assert len(wanted) > 100
    # A file that is deleted and not committed yet is still listed.
    there = [name for name in wanted if (REPOSITORY / name).exists() or (REPOSITORY / "molmo2_nemo" / name).exists()]
    assert [str(name) for name in there if not (package / name).exists()] == []


def test_the_installed_package_is_the_one_that_runs(installed):
    code = "import molmo2_nemo.paths as p; print(p.PACKAGE, p.INSTALLED, p.CHECKOUT, p.CONF_DIR.is_dir())"
    result = succeeded(installed.python("-c", code))
    assert result.stdout.split() == [str(installed.site / "molmo2_nemo"), "True", "None", "True"]


def test_a_recipe_prints_its_configuration(installed):
    result = succeeded(installed.run("molmo2_nemo.recipes.stage2_sft", "model=tiny", "data=sample", "--cfg", "job"))
    config = yaml.safe_load(result.stdout)
    assert config["stage"] == "stage2" and config["model"]["name"] == "tiny"
    refused = installed.run("molmo2_nemo.recipes.stage2_sft", "model=tinny")
    assert refused.returncode == 1 and "conf/model has no tinny.yaml" in refused.stderr


def test_a_run_is_planned(installed):
    plan = installed.run(
        "molmo2_nemo.tools.plan", "--config-name", "stage2", "model=molmo2_8b", "hardware=h100_64", "gpus=64"
    )
    assert succeeded(plan).stdout.strip().splitlines()[-1] == "fits"


def test_the_catalogue_is_listed(installed):
    result = succeeded(installed.run("molmo2_nemo.tools.download", "list", "--stage", "1"))
    assert re.search(r"^\d+ data sets: none on disk", result.stdout, re.MULTILINE)


def test_training_data_are_inspected(installed):
    """With the blend of conf/blend, the tokenizer and the page templates of the package."""
    succeeded(python("tools/make_sample_data.py", "--out", installed.folder / "data" / "sample", "--scale", 0.02))
    arguments = ["--config-name", "stage2", "data=sample", "--samples", 3, "--html", "pages"]
    succeeded(installed.run("molmo2_nemo.tools.inspect_data", *arguments))
    assert (installed.folder / "pages" / "index.html").stat().st_size > 1000


def test_the_advice_names_what_the_extra_installs():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["gpu"] == [parallel.TRANSFORMER_ENGINE]
