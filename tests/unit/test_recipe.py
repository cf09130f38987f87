"""What the recipes share: NeMo's runner without the rest of NeMo, and how a rank's process ends."""

import sys

import pytest
from programs import REPOSITORY, run, succeeded

RECIPES = sorted(path for path in (REPOSITORY / "recipes").glob("*.py") if path.name != "__init__.py")
# In a process of its own, since this one has imported torch.
LOADED = """
import runpy, sys
recipe = runpy.run_path(sys.argv.pop(1), run_name="recipe")
print(recipe["main"].__code__.co_filename)
heavy = {"nemo.core", "nemo.lightning", "lightning", "torch", "megatron", "transformers"}
print(" ".join(sorted(heavy & set(sys.modules))))
"""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_command_line_is_nemos_and_nothing_heavy_is_imported_for_it(recipe):
    file, heavy = succeeded(run([sys.executable, "-c", LOADED, recipe])).stdout.split("\n")[:2]
    assert file.endswith("nemo/core/config/hydra_runner.py") and heavy == ""


@pytest.mark.parametrize("body, status", [("pass", 0), ("sys.exit(2)", 2)])
def test_a_rank_ends_at_once_with_its_status(body, status):
    """Its output is complete, and nothing that is registered for the end of Python runs."""
    code = f"""
import atexit, sys
from molmo2_nemo.recipe import run_and_exit
atexit.register(print, "at exit")
def run_stage(cfg):
    print("trained", cfg)
    {body}
run_and_exit(run_stage, 7)
"""
    result = run([sys.executable, "-c", code])
    assert (result.returncode, result.stdout) == (status, "trained 7\n"), result.stderr


def test_an_unexpected_error_is_shown_as_such():
    code = "from molmo2_nemo.recipe import run_and_exit; run_and_exit(lambda cfg: 1 / 0, None)"
    result = run([sys.executable, "-c", code])
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr


def test_a_sweep_is_refused():
    result = run([sys.executable, RECIPES[0], "model=tiny", "--multirun"])
    assert result.returncode == 1 and result.stderr == (
        "error: --multirun: a process trains once; start one recipe for each setting.\n"
    )
