"""Rehearse a training step at full size without a GPU: memory, collectives, waits of the host, FLOPs and bytes moved.

    python tools/rehearse.py --config-name stage2 model=molmo2_8b hardware=h100_128 gpus=128 [any override of a recipe]
    python tools/rehearse.py --config-name stage2 model=molmo2_8b hardware=h100_8 gpus=8 --ranks 0,3,7 --json out.json
    python tools/rehearse.py --config-name finetune model=molmo2_8b data.mine=shards/mine hardware=auto gpus=8

Each rank builds its part of the model and takes one step of the recipe's own code, in a process of its own, with
tensors that have no memory. Beside the figures stand the planner's (tools/plan.py). Exit status: 0 nothing is wrong;
1 ranks issue different collectives, a tensor has a number for every pair of tokens, or the host waits for the device
in every layer; 2 a setting cannot work; 3 it may work, but cannot be rehearsed. docs/rehearsal.md says what is
counted, and how.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
import traceback

from molmo2_nemo.auto import resolve
from molmo2_nemo.command_line import HARDWARE_AUTO, compose, finetune_words, take_gpus
from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import STAGES, Config
from molmo2_nemo.data import epochs
from molmo2_nemo.environment import quiet_libraries
from molmo2_nemo.finetune import Machine, choose
from molmo2_nemo.option_types import local_path
from molmo2_nemo.planner.memory import H100_GIB, Job
from molmo2_nemo.rehearsal.plan import NotRehearsed, Plan, beside, plan, roofline

GIB = 2**30
SHOWN = 12  # lines of code in a table
STEPS_OF_AN_EPOCH = 100.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", required=True, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--ranks", metavar="N,N", help="the ranks to rehearse, or all (default: one of each kind)")
    parser.add_argument("--micro-batches", type=int, metavar="N", help="of a step (default: as many as are in flight)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="ranks at a time")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="write all figures here")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="gpus=N and overrides of the recipe")
    args, unknown = parser.parse_known_args()
    quiet_libraries()
    started = time.monotonic()
    try:
        unexpected = [word for word in unknown if word.startswith("-")]
        if unexpected:
            raise ConfigError(f"{unexpected[0]} is no option of this command: see --help.")
        config, gpus, chosen = settings_of(args.config_name, [*args.overrides, *unknown])
        made = plan(config, gpus, args.micro_batches, ranks_of(args.ranks, gpus))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, NotRehearsed) else 2
    made.notes[:0] = chosen
    found, failed = rehearse_all(made, args.jobs)
    from molmo2_nemo.rehearsal.collectives import disagreements

    faults = [f"rank {rank} cannot be rehearsed: {reason}" for rank, reason in failed.items()]
    faults += list(dict.fromkeys(fault for counted in found for fault in counted.faults))
    faults += disagreements({counted.rank: counted.collectives for counted in found})
    show(config, made, found, time.monotonic() - started)
    if args.json:
        args.json.write_text(json.dumps(as_json(config, made, found, faults), default=float))
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        print(f"\nnothing is wrong: {len(found)} ranks issue the same collectives on the groups that they share")
    return 1 if faults else 0


def settings_of(config_name: str, words: list[str]) -> tuple[Config, int, list[str]]:
    """(the configuration without `auto`, GPUs, lines on what was chosen). Raises ConfigError."""
    gpus, overrides = take_gpus(words)
    lines = []
    if HARDWARE_AUTO in overrides and config_name == "finetune":
        overrides, gpus, lines = choose(finetune_words(overrides), Machine(gpus, H100_GIB))
    config = compose(config_name, overrides)
    check_settings(config, gpus)
    if epochs.is_asked(config):  # no data are looked at, and one step is like another
        config = epochs.in_steps(config, epochs.Epoch(frozenset(), 1, 1.0, STEPS_OF_AN_EPOCH))
    config, of_memory = resolve(config, gpus)
    return config, gpus, lines + of_memory


def ranks_of(text: str | None, gpus: int) -> list[int] | None:
    """The numbers in --ranks; None: it was not given. Raises ConfigError."""
    if text is None or text == "all":
        return text and list(range(gpus))
    if not all(word.isdigit() for word in text.split(",")):
        raise ConfigError(f"--ranks {text}: give numbers of ranks, --ranks 0,1, or --ranks all.")
    return sorted({int(word) for word in text.split(",")})


def rehearse_all(made: Plan, jobs: int) -> tuple[list, dict[int, str]]:
    """(what was counted of each rank, why others could not be rehearsed). A process for each rank."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    import molmo2_nemo.rehearsal.rank  # noqa: F401  once, before the processes are forked

    with multiprocessing.get_context("fork").Pool(max(1, jobs), maxtasksperchild=1) as pool:
        results = pool.starmap(rehearse_one, [(made, rank) for rank in made.ranks], chunksize=1)
    failed = {rank: result for rank, result in zip(made.ranks, results) if isinstance(result, str)}
    return [result for result in results if not isinstance(result, str)], failed


def rehearse_one(made: Plan, rank: int):
    """What was counted of a rank, or a sentence on why it could not be rehearsed, after a traceback."""
    from molmo2_nemo.rehearsal.rank import rehearse

    try:
        return rehearse(made.config, made.gpus, rank, made.micro_batches, made.of, made.rows(rank))
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def show(config, made: Plan, found: list, seconds: float) -> None:
    print(
        f"{config.stage} of {config.model.name} on {made.gpus} GPU(s): {Job(made.config, made.gpus).layout};"
        f" {len(found)} rank(s) rehearsed in {seconds:.0f} s"
    )
    for note in made.notes:
        print(f"  {note}")
    for counted in found:
        at = ", ".join(f"{name} {number}" for name, number in counted.coordinates.items())
        print(f"\nrank {counted.rank} ({at}; rows: {counted.rows}), {counted.parameters:,} parameters")
        show_beside(made, counted)
        peak = sum(counted.peak_by_part.values())
        parts = sorted(counted.peak_by_part.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts if size > 0.005 * GIB or size > peak / 50)
        print(f"  at the peak, GiB: {listed}")
    if found:
        show_lines(found[0])
        show_calls(found[0])
        show_time(made, found[0])


def show_beside(made: Plan, counted) -> None:
    if counted.rows != "full":
        print(f"  {'peak of the step':<27} {counted.peak / GIB:10.3f} GiB (the planner is about full rows)")
        return
    print(f"  {'':<27} {'counted':>10} {'planned':>10}   off")
    for row in beside(made, counted):
        unit, size = ("PFLOP", 1e15) if row["figure"] == "FLOP" else ("GiB", GIB)
        off = "n/a" if row["off_percent"] is None else f"{row['off_percent']:+.1f} %"
        print(f"  {row['figure']:<27} {row['counted'] / size:10.3f} {row['planned'] / size:10.3f}   {off} {unit}")


def show_lines(counted) -> None:
    print(f"\nmemory at the peak by line of code, rank {counted.rank}")
    for line, size in sorted(counted.peak_by_line.items(), key=lambda item: -item[1])[:SHOWN]:
        print(f"  {size / GIB:8.3f} GiB  {line}")
    waits = sum(counted.syncs.values())
    print(f"\nthe host waits for the device {waits} times in a step")
    for line, calls in list(counted.syncs.items())[:SHOWN]:
        print(f"  {calls:6}  {line}")
    moved = sum(counted.moved.values())
    print(f"\n{moved / 1e9:,.1f} GB read and written by what is no matrix product")
    for line, size in list(counted.moved_by_line.items())[:SHOWN]:
        print(f"  {size / 1e9:8.2f} GB  {line}")


def show_calls(counted) -> None:
    from molmo2_nemo.rehearsal.collectives import totals

    print(f"\ncollectives of rank {counted.rank}; sent by ring algorithms")
    print(f"  {'group':<14} {'ranks':>5}  {'operation':<16} {'calls':>6} {'GB':>9} {'GB sent':>9}")
    for row in totals(counted.collectives):
        print(
            f"  {row['group']:<14} {row['ranks']:>5}  {row['operation']:<16} {row['calls']:>6} "
            f"{row['bytes'] / 1e9:9.3f} {row['sent'] / 1e9:9.3f}"
        )


def show_time(made: Plan, counted) -> None:
    parts = roofline(made, counted)
    listed = ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value >= 0.005)
    print(
        f"\nat least {sum(parts.values()):.2f} s for a step of {made.of} micro-batch(es), at an H100's peaks (989 "
        f"TFLOP/s, in FP8 1,979, 3.35 TB/s, NVLink 450 GB/s, network 50 GB/s, PCIe 64 GB/s), one after the "
        f"other, gradients overlapped: {listed}"
    )


def as_json(config, made: Plan, found: list, faults: list[str]) -> dict:
    from molmo2_nemo.rehearsal.collectives import totals

    ranks = []
    for counted in found:
        figures = {**dataclasses.asdict(counted), "collectives": totals(counted.collectives)}
        ranks.append(figures | {"beside": beside(made, counted), "roofline": roofline(made, counted)})
    return {
        "stage": config.stage,
        "model": config.model.name,
        "gpus": made.gpus,
        "micro_batches": made.micro_batches,
        "micro_batches_of_a_step": made.of,
        "notes": made.notes,
        "faults": faults,
        "ranks": ranks,
    }


if __name__ == "__main__":
    sys.exit(main())
