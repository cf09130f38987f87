"""Run by test_profile.py: a recipe, of which one rank is slow, or all are as fast as each other.

slow_check.py slow RECIPE ...       each of the decoder's layers takes 0.3 s more on rank 1
slow_check.py healthy RECIPE ...    each stretch that StepTimes measures takes one second, whatever passes
"""

import itertools
import runpy
import sys
import time
from types import SimpleNamespace

from molmo2_nemo.environment import rank_from_environment, set_cpu_environment

set_cpu_environment()

from molmo2_nemo.model.layers import DecoderLayer  # noqa: E402
from molmo2_nemo.training import step_times  # noqa: E402


def slow_down() -> None:
    forward = DecoderLayer.forward

    def slow(*args, **kwargs):
        time.sleep(0.3)
        return forward(*args, **kwargs)

    DecoderLayer.forward = slow


kind, sys.argv = sys.argv[1], sys.argv[2:]
if kind == "healthy":
    step_times.time = SimpleNamespace(perf_counter=map(float, itertools.count()).__next__)
elif rank_from_environment() == 1:
    slow_down()
runpy.run_path(sys.argv[0], run_name="__main__")
