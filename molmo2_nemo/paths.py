"""Where the files that come with the code are: in a checkout and in an installed package.

A checkout has conf/, recipes/, tools/ and slurm/ beside molmo2_nemo/. The wheel has the same folders inside
molmo2_nemo/ (setup.py puts them there), so that `python -m molmo2_nemo.recipes.stage1_pretrain` works from any folder.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "conf").is_dir()
ROOT = PACKAGE if INSTALLED else PACKAGE.parent  # the folder that holds conf/, recipes/, tools/ and slurm/
CONF_DIR = ROOT / "conf"
# The git checkout that this code is part of; None for an installed package.
CHECKOUT = None if INSTALLED else ROOT
