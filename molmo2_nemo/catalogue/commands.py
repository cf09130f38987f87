"""The commands of tools/download.py that messages print, with the options that make them mean the same files."""

import os
import shlex
from pathlib import Path


def default_root() -> Path:
    """The data root of tools/download.py without --root."""
    return Path(os.environ.get("DATA_ROOT") or "data").expanduser()


def download_command(verb: str, *names: str, root: Path | None = None, catalogue: str | None = None) -> str:
    """A command to run as it is: verb and names (of data sets, or options), and --root and --catalogue where needed.

    root: the data root in use; None: the default one. catalogue: its file; None: conf/datasets.yaml.
    """
    words = ["python", "tools/download.py", verb, *names]
    if root is not None and Path(root).expanduser().absolute() != default_root().absolute():
        words += ["--root", str(root)]
    if catalogue is not None:
        words += ["--catalogue", catalogue]
    return shlex.join(words)
