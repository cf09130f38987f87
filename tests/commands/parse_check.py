"""Does the parser of each program take the command? Reads commands (JSON lists of words) and prints a reason or null.

    python tests/commands/parse_check.py COMMANDS.json

A program is run up to the point where its arguments are parsed: argparse's own methods are called, and then an
exception ends the program. Overrides (key=value) are composed and checked as the recipes do it.
"""

import argparse
import contextlib
import functools
import inspect
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path

from molmo2_nemo.command_line import HARDWARE_AUTO, compose
from molmo2_nemo.config.checks import check
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config
from molmo2_nemo.finetune import auto_settings
from molmo2_nemo.paths import ROOT

OVERRIDE = re.compile(r"[~+]{0,2}[A-Za-z_][\w.]*=.*", re.DOTALL)
STAGES = ("stage1", "stage2", "stage3", "finetune")
WITH_OVERRIDES = ("tools/plan.py", "tools/inspect_data.py", "tools/preflight.py")


class Parsed(BaseException):
    """The arguments were taken. No Exception, so that a program does not catch it."""


def stop_after_parsing(name: str) -> None:
    """Make ArgumentParser.NAME raise Parsed when its outermost call is through."""
    original, depth = getattr(argparse.ArgumentParser, name), []

    def parse(self, *args, **kwargs):
        depth.append(name)
        try:
            result = original(self, *args, **kwargs)
        finally:
            depth.pop()
        if not depth and not inspect.currentframe().f_back.f_code.co_filename.endswith("argparse.py"):
            raise Parsed
        return result

    setattr(argparse.ArgumentParser, name, parse)


def refused_by_program(script: str, arguments: list[str]) -> str | None:
    """What the program's parser says against these arguments."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str((ROOT / script).parent))
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except Parsed:
        return None
    except SystemExit as end:
        return None if end.code in (0, None) else f"{end.code}: {errors.getvalue().strip()[-500:]}"
    finally:
        sys.path.pop(0)
    return f"{script} ended without parsing its arguments"


@functools.cache
def settings(stage: str, overrides: tuple[str, ...]) -> Config:
    words = list(overrides)
    if stage == "finetune" and HARDWARE_AUTO in words:  # the layout is chosen for GPUs that are not here
        words.remove(HARDWARE_AUTO)
        words += auto_settings(words)
    return compose(stage, words)


def refused_settings(stage: str, overrides: list[str], ranks: int | None) -> str | None:
    """What a recipe would say against these overrides. ranks: None for as many as the layout needs."""
    try:
        config = settings(stage, tuple(overrides))
        p = config.parallel
        groups = p.tensor_model_parallel_size * p.pipeline_model_parallel_size * p.context_parallel_size
        check(config, groups if ranks is None else ranks)
    except ConfigError as error:
        return f"{stage}: {error}"
    return None


def refused(words: list[str], ranks: int | None) -> str | None:
    """A reason, or None. words: the program's path and its arguments. ranks: see refused_settings."""
    script, *arguments = words
    if not (ROOT / script).is_file():
        return f"{script} does not exist"
    overrides = [word for word in arguments if OVERRIDE.fullmatch(word) and not word.startswith("gpus=")]
    if script == "tools/plan.py":
        ranks = int(next((word for word in arguments if word.startswith("gpus=")), "gpus=8").removeprefix("gpus="))
    if script.startswith("recipes/"):
        strange = [word for word in arguments if word not in overrides and word not in ("--cfg", "job")]
        if strange:
            return f"{strange[0]} is no override"
    elif script.endswith(".py"):
        reason = refused_by_program(script, arguments)
        if reason or script not in WITH_OVERRIDES:
            return reason
    for stage in [stage for stage in STAGES if stage in Path(script).name or stage in arguments] or STAGES[:3]:
        # `stage3:key=value` is of one stage of a chain.
        own = [word.removeprefix(f"{stage}:") for word in arguments if word.startswith(f"{stage}:")]
        of_stage = overrides + [word for word in own if OVERRIDE.fullmatch(word)]
        if of_stage or script.startswith("recipes/"):
            reason = refused_settings(stage, of_stage, ranks)
            if reason:
                return reason
    return None


def main() -> None:
    os.chdir(ROOT)
    commands = json.loads(Path(sys.argv[1]).read_text())
    out = sys.stdout
    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        stop_after_parsing(name)
    for words, ranks in commands:
        print(json.dumps(refused(words, ranks)), file=out, flush=True)


if __name__ == "__main__":
    main()
