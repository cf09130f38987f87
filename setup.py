"""Packages of the wheel. All else about it is in pyproject.toml, which cannot say "the found packages and these".

The folders that a checkout has beside molmo2_nemo/ become part of the package: molmo2_nemo/conf, molmo2_nemo/recipes,
molmo2_nemo/tools and molmo2_nemo/slurm. molmo2_nemo/paths.py finds them in either place. tools/bench, tools/check and
tools/dev are for work on the code and need a checkout.
"""

from setuptools import find_packages, setup

FOLDERS = ("conf", "recipes", "tools", "slurm")

setup(
    packages=find_packages(include=["molmo2_nemo*"]) + [f"molmo2_nemo.{folder}" for folder in FOLDERS],
    package_dir={f"molmo2_nemo.{folder}": folder for folder in FOLDERS},
    package_data={
        "molmo2_nemo": ["report.html"],
        "molmo2_nemo.ask": ["page.html"],
        "molmo2_nemo.evaluate": ["page.html"],
        "molmo2_nemo.data": ["tokenizer/*"],
        "molmo2_nemo.conf": ["*.yaml", "*/*.yaml"],
        "molmo2_nemo.tools": ["inspect_pages/*"],
        "molmo2_nemo.slurm": ["*.sh", "*.sbatch", "site.example.env", "Dockerfile"],
    },
)
