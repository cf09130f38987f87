"""The command line of recipes/finetune.py: names of one's own data, and hardware=auto.

hardware=auto becomes the settings that are chosen: how the model is divided, and whether all weights are trained or
adapters (conf/tune/). On one machine the recipe then starts itself once for each GPU. Under torchrun or srun it takes
their ranks. Imports torch only to count GPUs.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from molmo2_nemo.auto import least, quickest, resolve
from molmo2_nemo.command_line import HARDWARE_AUTO, compose, finetune_words
from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.config.errors import ConfigError, refuse
from molmo2_nemo.config.flags import refuse_flags
from molmo2_nemo.config.schema import Config
from molmo2_nemo.environment import (
    is_launched,
    quiet_libraries,
    rank_from_environment,
    set_gpu_environment,
    world_size_from_environment,
)
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.planner.flops import PEAK_TFLOPS
from molmo2_nemo.planner.memory import GIB, RESERVE_GIB, Job, count_parameters, peak, worst_stage
from molmo2_nemo.planner.search import Found, layouts
from molmo2_nemo.planner.step_time import H100, estimate
from molmo2_nemo.recipe import SHOWING
from molmo2_nemo.text import dotted

# What is trained, in the order of preference: files of conf/tune/.
TUNES = {"full": "full fine-tuning", "lora": "LoRA"}
# Numbers of GPUs that are tried to say what would be enough.
ENOUGH = (1, 2, 4, 8, 16, 32, 64)
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


@dataclass(frozen=True)
class Machine:
    """gpus: 0 for a CPU alone; gib: memory of the smallest; name: of the first, as torch has it."""

    gpus: int
    gib: float = 0.0
    name: str = H100


def ready(argv: list[str]) -> list[str]:
    """The words that Hydra gets for the recipe `argv[0]`; ends the program with one sentence for what cannot work.

    With hardware=auto and several GPUs it does not return: torchrun takes the place of this process.
    """
    quiet_libraries()
    set_gpu_environment()
    try:
        words = finetune_words(argv[1:])
        if planned := next((word for word in words if word.startswith("gpus=")), None):
            others = " ".join(word for word in argv[1:] if word != planned)
            raise ConfigError(
                f"{planned}: the recipe takes the GPUs that are there; to plan for others: python tools/plan.py"
                f" --config-name finetune {others} {planned}"
            )
        if HARDWARE_AUTO not in words:
            return words
        refuse_flags(words)
        options = [word for word in words if word.startswith("-") or "=" not in word]
        machine = this_machine()
        ranks = world_size_from_environment() if is_launched() else None
        settings = [word for word in words if word not in options]
        words, used, lines = choose(settings, replace(machine, gpus=ranks if ranks and machine.gpus else machine.gpus))
        if ranks is not None and machine.gpus:
            refuse(
                used != ranks,
                f"{HARDWARE_AUTO} can use {used} of {ranks} ranks (train.global_batch_size): start {used}.",
            )
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    if rank_from_environment() == 0:
        print("\n".join(lines), flush=True)
    words = [*options, *words]
    if ranks is None and used > 1 and not SHOWING & {option.split("=")[0] for option in options}:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(used)]
        os.execv(sys.executable, [sys.executable, *torchrun, argv[0], *words])
    return words


def this_machine() -> Machine:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return Machine(0)
    found = [torch.cuda.get_device_properties(number) for number in range(count)]
    return Machine(count, min(one.total_memory for one in found) / GIB, found[0].name)


def choose(words: list[str], machine: Machine) -> tuple[list[str], int, list[str]]:
    """The words with settings in the place of hardware=auto, the number of ranks, and lines that say what and why.

    The fastest layout for all weights if one fits, else for LoRA; of a run that goes on, what it was begun with. What
    the words say of recomputation, chunks and rows of a micro-batch stays. Fewer GPUs than there are where not all of
    them can share the rows of a step. ConfigError: nothing fits; the sentence says what would.
    """
    given = next((word for word in words if word.startswith(("parallel.", "parallel="))), None)
    refuse(given is not None, f"{given}: {HARDWARE_AUTO} chooses the layout itself; leave one of the two out.")
    others = [word for word in words if word != HARDWARE_AUTO]
    tunes = tunes_of(others)
    others = [word for word in others if not word.startswith("tune=")]
    if not machine.gpus:
        # The ranks that there are, one unless a launcher started more; their memory is not planned.
        tune, ranks = tunes[0], world_size_from_environment()
        line = f"{HARDWARE_AUTO}: no GPU is here; {ranks} rank(s) on the CPU, {TUNES.get(tune, tune)}"
        return [*others, f"tune={tune}"], ranks, [line]
    rows_are_given = "train.micro_batch_size" in keys_of(others)
    others += auto_settings(others)
    why, configs = [], {}
    for tune in tunes:
        config = configs[tune] = compose("finetune", [*others, f"tune={tune}"])
        check_settings(config, 1)  # what is wrong at any layout
        for gpus in range(machine.gpus, 0, -1):
            found = fastest(config, replace(machine, gpus=gpus), rows_are_given)
            if found is not None:
                words = [*others, f"tune={tune}", *_layout(found, rows_are_given)]
                return words, gpus, [*why, *_lines(tune, found, machine)]
        why.append(f"{HARDWARE_AUTO}: {TUNES.get(tune, tune)} does not fit {_spelt(machine)}")
    raise ConfigError(
        f"{HARDWARE_AUTO}: {' or '.join(TUNES.get(tune, tune) for tune in tunes)} does not fit {_spelt(machine)} with"
        f" data.seq_length={config.data.seq_length}{_own_of_memory(others)};"
        f" {least_that_fits(configs, machine, rows_are_given)}."
    )


def keys_of(words: list[str]) -> set[str]:
    return {word.lstrip("+").partition("=")[0] for word in words}


def auto_settings(words: list[str]) -> list[str]:
    """Those of conf/hardware/auto.yaml, but for what the words say themselves."""
    given = keys_of(words)
    if any(key.startswith("transformer.recompute") for key in given):
        given.add("transformer.recompute")
    settings = dotted(yaml.safe_load((CONF_DIR / "hardware" / "auto.yaml").read_text()))
    return [f"{key}={value}" for key, value in settings.items() if key not in given]


def tunes_of(words: list[str]) -> list[str]:
    """What may be trained: as given, else as the run was begun that is there, else all that there is."""
    given = next((word.removeprefix("tune=") for word in words if word.startswith("tune=")), None)
    if given is not None:
        return [given]
    try:
        begun = yaml.safe_load((Path(compose("finetune", words).run_dir) / "config.yaml").read_text())
        if begun.get("lora", {}).get("rank", 0):
            return ["lora"]
        optim = begun.get("optim", {})
        return ["connector" if all(optim.get(name, {}).get("freeze") for name in ("vit", "llm")) else "full"]
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return list(TUNES)


def fastest(config: Config, machine: Machine, rows_are_given: bool = False) -> Found | None:
    """(job, estimate, peak bytes) of the fastest layout that fits; None: none does.

    What says `auto` is what the run itself will make of it (auto.resolve). rows_are_given: micro-batches have
    train.micro_batch_size rows and no other number.
    """
    device = machine.name if machine.name in PEAK_TFLOPS else H100  # for the order alone
    limit, possible, counts = (machine.gib - RESERVE_GIB) * GIB, [], {}

    def job_of(config: Config) -> Job:
        job = Job(config, machine.gpus)
        job.counts = counts[job.t, job.p] = counts.get((job.t, job.p)) or count_parameters(job)
        return job

    for layout in layouts(config, machine.gpus, rows_are_given):
        if peak(worst_stage(job_of(least(layout, machine.gpus)))[1])[0] <= limit:
            at_best = [estimate(job_of(one), device).seconds for one in quickest(layout, machine.gpus)]
            possible.append((min(at_best), layout))
    found = None
    for at_best, layout in sorted(possible, key=lambda item: item[0]):
        if found is not None and found[1].seconds <= at_best:
            break  # none of the others can be faster
        job = job_of(resolve(layout, machine.gpus, machine.gib)[0])
        needed, cost = peak(worst_stage(job)[1])[0], estimate(job, device)
        if needed <= limit and (found is None or cost.seconds < found[1].seconds):
            found = job, cost, needed
    return found


def least_that_fits(configs: dict[str, Config], machine: Machine, rows_are_given: bool) -> str:
    """Half a sentence: the smallest number of GPUs of this memory on which something fits; more than there are."""
    for gpus in (number for number in ENOUGH if number > machine.gpus):
        for tune, config in configs.items():
            if fastest(config, replace(machine, gpus=gpus), rows_are_given) is not None:
                return f"the smallest that fits is {TUNES.get(tune, tune)} on {_spelt(replace(machine, gpus=gpus))}"
    return f"nothing fits up to {ENOUGH[-1]} GPUs of this memory: use a smaller model or data.seq_length"


def _own_of_memory(words: list[str]) -> str:
    """Half a sentence on what the words themselves say of memory, in the place of what would be chosen."""
    chosen = ("train.micro_batch_size", "train.vision_chunk_crops", "train.vision_recompute", "transformer.recompute")
    own = [word for word in words if word.lstrip("+").startswith(chosen) and not word.endswith("=auto")]
    return f" and {' '.join(own)}, which would be chosen if left out" if own else ""


def _layout(found: Found, rows_are_given: bool) -> list[str]:
    p, rows = found[0].config.parallel, found[0].config.train.micro_batch_size
    words = [f"parallel.{key}={getattr(p, key)}" for key in SIZES]
    words.append(f"parallel.sequence_parallel={str(p.sequence_parallel).lower()}")
    return words if rows_are_given else [*words, f"train.micro_batch_size={rows}"]


def _lines(tune: str, found: Found, machine: Machine) -> list[str]:
    job, cost, needed = found
    idle = f", {machine.gpus - job.gpus} of {machine.gpus} GPUs idle" if job.gpus < machine.gpus else ""
    time = (
        f"{cost.fast.seconds:.1f} to {cost.slow.seconds:.1f} s a step"
        if machine.name in PEAK_TFLOPS
        else f"time not known for {machine.name}"
    )
    return [
        f"{HARDWARE_AUTO}: {TUNES.get(tune, tune)} on {_spelt(replace(machine, gpus=job.gpus))}{idle}: {job.layout},"
        f" the fastest that fits by the plan ({needed / GIB + RESERVE_GIB:.0f} GiB, {RESERVE_GIB:g} of them in reserve;"
        f" {time})"
    ]


def _spelt(machine: Machine) -> str:
    return f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''} of {machine.gib:.1f} GiB"
