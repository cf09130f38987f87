"""The recipes' and scripts' commands, without a run."""

from programs import python, run, succeeded


def test_the_resolved_configuration_is_printed():
    result = succeeded(python("recipes/stage1_pretrain.py", "--cfg", "job", "model=molmo2_8b", "train.max_steps=7"))
    assert "hidden_size: 4096" in result.stdout and "max_steps: 7" in result.stdout


def test_shell_scripts_parse():
    for script in ("tools/setup.sh", "tools/test.sh", "tools/quickstart.sh", ".ci/run", "slurm/stage1.sbatch"):
        succeeded(run(["bash", "-n", script]))
