"""The wheel, installed into a folder of its own and used from another: nothing of the checkout may be needed."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from programs import REPOSITORY, build_and_install, python, succeeded

from molmo2_nemo import parallel


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
    build_and_install(folder, folder / "site")
    return Installed(folder / "site", folder / "elsewhere")


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
    assert project["optional-dependencies"]["gpu"] == [parallel.LIGER_KERNEL, parallel.TRANSFORMER_ENGINE]


# Stands where .venv/bin/python does: notes what pip is asked for, and otherwise is Python, with Transformer Engine once
# pip was asked for it and {able} says so. Megatron could not be imported beside such an engine, so that the report is a
# word here; test_gpu_settings.py looks at the report itself.
PYTHON = """#!/bin/bash
if [[ "$1 $2" == "-m pip" ]]; then
  printf '%s\\n' "$@" > {folder}/asked
  cp "$(sed -n '/^--constraint$/{{n;p}}' {folder}/asked)" {folder}/pins
  {able} && touch {folder}/site/transformer_engine/pytorch.py
  exit 0
fi
[[ "$*" == "-W ignore -m molmo2_nemo.gpu" ]] && exec echo "reported"
PYTHONPATH={folder}/site exec {python} "$@"
"""


@pytest.fixture
def install_gpu(tmp_path):
    """Runs tools/install_gpu.sh with that Python; the folder gets `asked` and `pins`, the versions that must stay."""
    (tmp_path / "site" / "transformer_engine").mkdir(parents=True)
    (tmp_path / "site" / "transformer_engine" / "__init__.py").touch()

    def run(able: bool) -> subprocess.CompletedProcess:
        stand_in = tmp_path / "python"
        words = {"folder": tmp_path, "python": sys.executable}
        stand_in.write_text(PYTHON.format(able="true" if able else "false", **words))
        stand_in.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(stand_in)}
        script = REPOSITORY / "tools" / "install_gpu.sh"
        return subprocess.run([script], text=True, capture_output=True, env=environment, timeout=300)

    return run


def test_transformer_engine_is_built_for_the_installed_torch(install_gpu, tmp_path):
    result = succeeded(install_gpu(able=True))
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "--no-build-isolation" in asked
    cuda = torch.version.cuda.split(".")[0]
    assert asked[-1] == f"transformer-engine[pytorch,core_cu{cuda}]==2.20.2"
    pins = (tmp_path / "pins").read_text().splitlines()
    assert [pin for pin in pins if pin.startswith("torch==")] == [f"torch=={torch.__version__.split('+')[0]}"]
    assert f"numpy=={np.__version__}" in pins and len(pins) > 150
    assert result.stdout.splitlines()[-1] == "reported"
    # Again: nothing is asked of pip.
    (tmp_path / "asked").unlink()
    succeeded(install_gpu(able=False))
    assert not (tmp_path / "asked").exists()


def test_an_engine_that_cannot_be_imported_is_an_error(install_gpu):
    result = install_gpu(able=False)
    assert result.returncode == 1
    assert "cannot be imported with torch" in result.stderr and "reported" not in result.stdout
