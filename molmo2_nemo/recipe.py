"""What the recipes share: NeMo's Hydra runner as their command line, and a quick end of each rank. Imports no torch."""

import functools
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

RUNNER = "nemo.core.config.hydra_runner"
# Hydra's options for which nothing is run.
SHOWING = {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version"}


def nemo_hydra_runner() -> Callable:
    """NeMo's decorator `hydra_runner`, from its own file alone.

    `from nemo.core.config import hydra_runner` first imports all of nemo.core, with Lightning, torchmetrics and pandas:
    more than two thirds of the time from start to first step, for a decorator that needs Hydra only. The module is
    registered under its own name, so that a later import of nemo.core gets this one and does not run it again.
    """
    if RUNNER not in sys.modules:
        [nemo] = importlib.util.find_spec("nemo").submodule_search_locations
        spec = importlib.util.spec_from_file_location(RUNNER, Path(nemo) / "core" / "config" / "hydra_runner.py")
        sys.modules[RUNNER] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[RUNNER].hydra_runner


def hydra_runner_for(arguments: list[str]) -> Callable:
    """NeMo's runner for a command line, or Hydra's own where an option such as --cfg only shows something: NeMo's
    imports Lightning at its end, many seconds that `run_and_exit` spares a run."""
    if any(argument.split("=")[0] in SHOWING for argument in arguments):
        import hydra

        return functools.partial(hydra.main, version_base="1.3")
    return nemo_hydra_runner()


def run_and_exit(run_stage: Callable[[DictConfig], None], cfg: DictConfig) -> NoReturn:
    """Train, then end this process at once, with the status that `run_stage` ended with.

    By os._exit, once everything is saved and all output is written. A return would take each rank through the end of
    NeMo's runner, which imports Lightning to tell callbacks that we do not have, and the destructors of CUDA and NCCL.
    """
    status = 0
    try:
        run_stage(cfg)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():  # loader workers; Python would end them on its way out
        child.kill()
    os._exit(status)
