"""Ways to run the project's commands as a user would."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import warm

REPOSITORY = Path(__file__).resolve().parents[1]
# What a wheel is built from. It is copied: setuptools leaves build/ behind, and would reuse what an older build put
# there.
SOURCES = ("molmo2_nemo", "conf", "recipes", "tools", "slurm", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# Of runs that the tests start: the tiny model on the sample data, a line for each step, no report.html.
TINY_SETTINGS = [
    "model=tiny",
    "data=sample",
    "schedule=quickstart",
    "optim=from_scratch",
    "train.log_every=1",
    "train.report=false",
]


def with_defaults(environment: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}


def load(path: str) -> ModuleType:
    """A file of the repository as a module, with its own folder to import from, as when Python runs it."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str((REPOSITORY / path).parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def run(command: list, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Run a command in the repository and return its output; never raises on a failing one."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=timeout,
        env=with_defaults(environment),
    )


def python(*arguments, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """As `python script.py ...` or `python -c code ...`, but warm."""
    return warm.start(arguments, [with_defaults(environment)], REPOSITORY, timeout)


def run_ranks(number: int, *arguments, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """As torchrun would start them, but warm."""
    return warm.start(arguments, warm.environments(number, with_defaults(environment)), REPOSITORY, timeout)


def start_ranks(number: int, arguments: list, log: Path, **environment) -> list[warm.Program]:
    """The same in the background: the ranks' processes. What they print goes to the file `log`."""
    warm.ensure_server()
    with log.open("w") as out, open(os.devnull) as nothing:
        streams = [nothing.fileno(), out.fileno(), out.fileno()]
        return [
            warm.Program([str(part) for part in arguments], each, REPOSITORY, streams)
            for each in warm.environments(number, with_defaults(environment))
        ]


def succeeded(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, f"{result.args}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


def figures(result: subprocess.CompletedProcess) -> dict:
    """The last JSON line that a program printed; it must have ended well."""
    return json.loads([line for line in succeeded(result).stdout.splitlines() if line.startswith("{")][-1])


def build_and_install(folder: Path, site: Path) -> None:
    """Build the wheel of this checkout in `folder`, without a network, and install it alone into `site`."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    succeeded(run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]))
    [wheel] = folder.glob("*.whl")
    succeeded(run([*pip, "install", "--no-deps", "--no-compile", "--target", site, wheel]))


def other_tokenizer(folder: Path) -> Path:
    """A new folder with the shipped tokenizer, in which two words have each other's ids."""
    shutil.copytree(REPOSITORY / "molmo2_nemo" / "data" / "tokenizer", folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    words = stored["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder
