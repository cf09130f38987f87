"""The commands of tools/download.py that messages print, with the options that make them mean the same files."""

import contextlib
import os
import shlex
from pathlib import Path

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.storage import is_remote, shown


def default_root() -> Path:
    """The data root of tools/download.py without --root. ConfigError: DATA_ROOT is an address, as training takes it."""
    given = os.environ.get("DATA_ROOT") or "data"
    if is_remote(given):
        raise ConfigError(f"DATA_ROOT={shown(given)} is an address: name a folder of this machine with --root.")
    return Path(given).expanduser()


def download_command(verb: str, *names: str, root: Path | None = None, catalogue: str | None = None) -> str:
    """A command to run as it is: verb and names (of data sets, or options), and --root and --catalogue where needed.

    root: the data root in use; None: the default one. catalogue: its file; None: conf/datasets.yaml.
    """
    words = ["python", "tools/download.py", verb, *names]
    if root is not None:
        with contextlib.suppress(ConfigError):
            root = None if Path(root).expanduser().absolute() == default_root().absolute() else root
        words += [] if root is None else ["--root", str(root)]
    if catalogue is not None:
        words += ["--catalogue", catalogue]
    return shlex.join(words)
