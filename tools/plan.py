"""Predict what a run needs before it is queued: memory of a GPU by part, FLOPs, time, communication, and if it fits.

    python tools/plan.py --config-name stage3 model=molmo2_8b gpus=128 [any override of a recipe]
    python tools/plan.py --config-name stage2 model=molmo2_4b gpus=8 schedule=report --search
    python tools/plan.py --config-name stage2 hardware=h100_64 gpus=64 --scale
    python tools/plan.py --config-name finetune model=molmo2_8b data.mine=shards/mine hardware=auto gpus=8
    python tools/plan.py --config-name stage2 hardware=h100_64 gpus=64 --json --measured bench.jsonl

Nothing is started, no GPU is needed and torch is not imported. Exit status: 0 it fits, 1 it does not, 2 a setting
cannot work, or a source of data.blend that is on this machine cannot be trained on. Memory is computed by formulas,
which docs/planner.md compares with measurements. Times are ranges between two columns of assumptions, in
molmo2_nemo/planner/efficiency.py; --measured replaces what `tools/bench/gpu.py --out FILE` measured.
"""

import argparse
import difflib
import json
import math
import sys
from dataclasses import asdict

from molmo2_nemo.auto import resolve
from molmo2_nemo.command_line import HARDWARE_AUTO, compose, finetune_words, take_gpus
from molmo2_nemo.config.checks import check
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.flags import refuse_flags
from molmo2_nemo.config.schema import STAGES
from molmo2_nemo.data import epochs
from molmo2_nemo.data.blend import check_held_out, check_present, load_blend
from molmo2_nemo.data.node_metadata import is_cached
from molmo2_nemo.environment import quiet_libraries
from molmo2_nemo.finetune import Machine, choose
from molmo2_nemo.option_types import local_path
from molmo2_nemo.planner.efficiency import FAST, GPUS_PER_NODE, SLOW
from molmo2_nemo.planner.flops import PEAK_TFLOPS
from molmo2_nemo.planner.measured import with_measured
from molmo2_nemo.planner.memory import (
    GIB,
    H100_GIB,
    PHASES,
    RESERVE_GIB,
    Job,
    count_parameters,
    peak,
    worst_stage,
)
from molmo2_nemo.planner.run_costs import run_costs
from molmo2_nemo.planner.search import recompute_of, scale, search
from molmo2_nemo.planner.step_time import Estimate, estimate
from molmo2_nemo.planner.traffic import FIRST_FORWARD, LAST_BACKWARD, PRODUCTS
from molmo2_nemo.planner.verdict import verdict
from molmo2_nemo.planner.work import holds_images
from molmo2_nemo.storage import is_remote

# What a step waits for, by the names of step_time.StepTime.
LIMITS = {
    "compute": "matrix products and attention",
    "memory": "element-wise operations",
    "NVLink": "NVLink",
    "network": "network",
    "bubble": "the pipeline's bubble",
    "unevenness": "uneven rows",
    "optimizer": "the optimizer",
    "loading": "loading data",
}
BESIDE = {
    PRODUCTS: "products",
    LAST_BACKWARD: "the last micro-batch's backward pass",
    FIRST_FORWARD: "the next forward pass",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", required=True, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument(
        "--gpu-memory", type=float, default=H100_GIB, metavar="GIB", help=f"memory of a GPU (default {H100_GIB})"
    )
    parser.add_argument(
        "--gpu", default="NVIDIA H100 80GB HBM3", help="exact name of the GPU in molmo2_nemo/planner/flops.py"
    )
    parser.add_argument("--search", action="store_true", help="rank other layouts that fit by their predicted time")
    parser.add_argument(
        "--scale", action="store_true", help="the fastest layout that fits at 8 to 4,096 GPUs, and what limits it"
    )
    parser.add_argument(
        "--measured", type=local_path, metavar="FILE", help="figures of tools/bench/gpu.py instead of assumed ones"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line instead of tables")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="gpus=N and overrides of the recipe")
    args, unknown = parser.parse_known_args()
    quiet_libraries()
    try:
        own = [f"--{name.replace('_', '-')}" for name in vars(args)]
        unexpected = [word for word in unknown if word.startswith("-")]
        if not any(difflib.get_close_matches(word, own, cutoff=0.8) for word in unexpected):
            refuse_flags(unknown)  # an option of another trainer, not a mistyped one of this command
        if unexpected:
            raise ConfigError(f"{unexpected[0]} is no option of this command: see --help.")
        gpus, overrides = take_gpus([*args.overrides, *unknown])
        if args.gpu not in PEAK_TFLOPS:
            raise ConfigError(f"--gpu {args.gpu}: its peak is not known; known are {', '.join(PEAK_TFLOPS)}.")
        if not RESERVE_GIB < args.gpu_memory < math.inf:
            raise ConfigError(
                f"--gpu-memory {args.gpu_memory:g} must be a number above the {RESERVE_GIB:g} GiB held in reserve."
            )
        chosen = []
        if HARDWARE_AUTO in overrides and args.config_name == "finetune":
            machine = Machine(gpus, args.gpu_memory, args.gpu)
            overrides, gpus, chosen = choose(finetune_words(overrides), machine)
        config = compose(args.config_name, overrides)
        check(config, gpus)
        config, of_memory = resolve(config, gpus, args.gpu_memory)
        if epochs.is_asked(config):
            sources = load_blend(config.data)
            check_held_out(config, sources)
            epoch = epochs.measured(config, sources)
            config = epochs.in_steps(config, epoch)
            cost = estimate(Job(config, gpus), args.gpu)
            of_memory += epochs.described(config, epoch, (cost.fast.seconds, cost.slow.seconds))
        chosen += of_memory
        job = Job(config, gpus)
        if job.precision == "fp8" and PEAK_TFLOPS[args.gpu][1] is None:
            raise ConfigError(f"train.precision=fp8, but {args.gpu} has no FP8: use train.precision=bf16.")
        sources = check_present(config.data)
        refused = verdict(config, gpus, args.gpu_memory)
        columns, taken = (FAST, SLOW), []
        if args.measured:
            measured = with_measured(args.measured, job, args.gpu, columns)
            columns, taken = measured.columns, measured.taken
        found = search(config, gpus, args.gpu_memory, args.gpu, columns) if args.search else []
        curve = scale(config, args.gpu_memory, args.gpu, columns) if args.scale else []
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(job, args, columns, refused, sources) | lists(found, curve) | {"auto": chosen}))
    else:
        for line in chosen:
            print(line)
        show(job, args)
        show_step(job, estimate(job, args.gpu, columns), columns, args.gpu, taken)
        show_run(job, estimate(job, args.gpu, columns), columns)
        data, (present, number) = config.data, sources
        where = "there" if is_remote(data.root) else "on this machine"
        print(
            f"\ndata: {present} of the {number} sources of {data.said} are {where}, under"
            f" data.root={data.root}{'; each has training samples' if present else ', so that none is checked'}"
        )
        print(f"\n{'does not fit: ' + refused if refused else 'fits'}")
        if args.search:
            show_search(found, gpus, args.gpu_memory)
        if args.scale:
            show_scale(curve, args.gpu_memory)
    return 1 if refused else 0


def show(job: Job, args) -> None:
    config = job.config
    by_component, by_stage = count_parameters(job)
    stage, parts = worst_stage(job)
    needed, phase = peak(parts)
    total = sum(counts.total for counts in by_component.values())
    print(
        f"{config.stage} of {config.model.name} on {job.gpus} GPU(s): {job.layout}, {job.precision}, "
        f"{job.micro_batches} micro-batch(es) of {job.rows} row(s) x {job.seq_length:,} tokens"
    )
    print(f"\nparameters: {total / 1e6:,.0f} million")
    for name in ("vit", "connector", "llm"):
        counts = by_component[name]
        frozen = f", {counts.frozen / 1e6:,.1f} of them frozen" if counts.frozen else ""
        print(f"  {name:<10} {counts.total / 1e6:9,.1f} million{frozen}")
    print(
        "  of a GPU   "
        + ", ".join(
            f"{'stage ' + str(i) + ' ' if job.p > 1 else ''}{c.total / 1e6:,.1f} million"
            for i, c in enumerate(by_stage)
        )
    )
    where = f" of pipeline stage {stage}, which needs most" if job.p > 1 else ""
    print(f"\nmemory of a GPU{where}, GiB at its peak ({phase})")
    for part in sorted(parts, key=lambda part: -part.bytes):
        if phase in part.phases and part.bytes:
            print(f"  {part.name:<30} {part.bytes / GIB:8.2f}  {part.reason}")
    print(f"  {'reserve':<30} {RESERVE_GIB:8.2f}  context, NCCL, cuBLAS, holes of the allocator (assumed)")
    print(f"  {'sum':<30} {needed / GIB + RESERVE_GIB:8.2f}  of {args.gpu_memory:g}")
    for other in PHASES:
        own = [part for part in parts if other in part.phases and phase not in part.phases and part.bytes]
        gib = sum(part.bytes for part in parts if other in part.phases) / GIB + RESERVE_GIB
        listed = ", ".join(f"{part.name} {part.bytes / GIB:.2f}" for part in own)
        if other != phase:
            print(f"  {other + ' instead':<30} {gib:8.2f}  {'with ' + listed if listed else ''}")


def limits(cost: Estimate) -> str:
    """What limits a step by the fast column and, where it is something else, by the slow one."""
    return ", or ".join(LIMITS[name] for name in cost.bottlenecks)


def span(low: float, high: float, digits: int = 2) -> str:
    """A range, as one number where both ends look alike."""
    texts = [f"{value:,.{digits}f}" for value in sorted((low, high))]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def show_step(job: Job, cost: Estimate, columns, device: str, taken: list[str]) -> None:
    train, work = job.config.train, job.work
    fast, slow = cost.fast, cost.slow
    pictures = "crops of images with their text" if holds_images(job.config) else "frames, the rest text"
    print("\na step")
    print(
        f"  {train.global_batch_size * job.seq_length:,} tokens, {train.global_batch_size * work.crops:,.0f} crops;"
        f" full rows of {work.crops:.0f} {pictures} (assumed)"
    )
    flops = sum(cost.flops.values())
    shares = ", ".join(f"{name} {value / flops:.0%}" for name, value in cost.flops.items() if value / flops >= 0.005)
    print(f"  {flops / 1e15:,.1f} PFLOP: {shares}")
    tokens = train.global_batch_size * job.seq_length / job.gpus
    print(
        f"  {span(fast.seconds, slow.seconds)} s by the fast and the slow column of assumptions, unmeasured on a GPU:"
        f" MFU {span(100 * cost.mfu_of(slow.seconds), 100 * cost.mfu_of(fast.seconds), 0)} %,"
        f" {span(tokens / slow.seconds, tokens / fast.seconds, 0)} tokens/s per GPU"
    )
    for sentence in taken:
        print(f"    {sentence}")
    print(f"  limited by {limits(cost)}; seconds:")
    for name, value in fast.causes.items():
        if slow.causes[name] >= 0.005:
            print(f"    {LIMITS[name]:<32} {span(value, slow.causes[name])}")
    for item in cost.traffic:
        beside = f", beside {BESIDE[item.hides_behind]}" if item.hides_behind else ", waited for"
        seconds = span(*(item.seconds(column, device) for column in columns))
        print(
            f"  {item.kind:<6} {item.bytes / GIB:8.2f} GiB sent by a GPU over {item.link} ({seconds} s{beside}):"
            f" {item.what}"
        )
    for link, value in fast.busy.items():
        if value:
            shares = [100 * value / fast.seconds, 100 * slow.busy[link] / slow.seconds]
            full = ": it is saturated" if max(shares) > 90 else ""
            print(f"  {link} is in use for {span(*shares, 0)} % of a step{full}")


def show_run(job: Job, cost: Estimate, columns) -> None:
    found, steps = run_costs(job, cost, columns), job.config.train.max_steps
    days = span(*(steps * column.seconds / 86400 for column in (cost.fast, cost.slow)), 1)
    print(f"\nthe run\n  {steps:,} steps: {days} days, {span(*found.gpu_hours, 0)} GPU-hours")
    print(
        f"  host memory of a node: {found.host_bytes / GIB:,.0f} GiB, and {found.host_bytes_saving / GIB:,.0f} more"
        " while a checkpoint is saved"
    )
    print(
        f"  a checkpoint: {found.checkpoint_bytes / 1e9:,.0f} GB, written in {span(*found.save_seconds, 0)} s, read in"
        f" {span(*found.restore_seconds, 0)} s"
    )
    print(
        f"  data: {span(*(value / 1e6 for value in found.read_bytes), 1)} MB/s read by a node,"
        f" {span(*found.loader_cores)} cores of loaders for each GPU; not to wait for them takes"
        f" data.num_workers={max(found.workers)} ({job.config.data.num_workers} set)"
    )
    if is_cached(job.config.data.root, job.config.data.cache_dir):
        show_storage(job, found)


def show_storage(job: Job, found) -> None:
    """What reading through the nodes' cache takes (docs/storage.md)."""
    data, nodes = job.config.data, math.ceil(job.gpus / GPUS_PER_NODE)
    rates = [nodes * value / 1e6 for value in found.read_bytes]
    print(
        f"  storage: {span(*rates, 1)} MB/s to {nodes} node(s), {span(*(2 * rate for rate in rates), 0)} requests/s"
        " if each brings 1 MB (assumed; two for 16 samples),"
        f" {span(*(value / 1e12 for value in found.moved_bytes))} TB over the run with no second use of what was"
        f" cached; the cache of a node: {data.cache_size or '80 % of what is free'} in"
        f" {data.cache_dir or 'SLURM_TMPDIR or the temporary folder'}"
    )


def show_search(found: list, gpus: int, memory: float) -> None:
    if not found:
        print(f"\nno layout of TP, PP, CP up to 8 fits {gpus} GPU(s) of {memory:g} GiB: use more GPUs")
        return
    print(
        "\nlayouts that fit, fastest first by the mean of the range; recompute is the least that fits; NVLink, network:"
        " seconds of a step in which a GPU sends"
    )
    print("  TP PP CP   DP  recompute           s/step  NVLink  network  MFU  GiB  limited by")
    for job, cost, needed in found[:15]:
        busy = [(cost.fast.busy[link] * cost.slow.busy[link]) ** 0.5 for link in ("NVLink", "network")]
        print(
            f"  {job.t:>2} {job.p:>2} {job.c:>2} {job.d:>4}  {recompute_of(job):>9} "
            f"{span(cost.fast.seconds, cost.slow.seconds):>16} {busy[0]:>7.2f} {busy[1]:>8.2f} "
            f"{cost.mfu:>4.0%} {needed / GIB + RESERVE_GIB:>4.0f}  {limits(cost)}"
        )
    show_workers(found[:15])


def show_scale(curve: list, memory: float) -> None:
    print(
        "\nthe fastest layout that fits at each number of GPUs, with the same rows in a step; GPU-hours of the run, and"
        " speed: tokens/s of a GPU beside the first line's, by the mean of the range"
    )
    print("   GPUs  TP PP CP   DP  recompute           s/step  GPU-hours  speed  limited by")
    first = None
    for gpus, found in curve:
        if found is None:
            print(f"  {gpus:>5}  no layout of TP, PP, CP up to 8 fits {memory:g} GiB and shares the rows")
            continue
        job, cost, _ = found
        work = cost.seconds * gpus
        first = first or work
        print(
            f"  {gpus:>5}  {job.t:>2} {job.p:>2} {job.c:>2} {job.d:>4}  {recompute_of(job):>9} "
            f"{span(cost.fast.seconds, cost.slow.seconds):>16} {work * job.config.train.max_steps / 3600:>10,.0f} "
            f"{first / work:>6.0%}  {limits(cost)}"
        )
    show_workers([found for _, found in curve if found])


def show_workers(found: list) -> None:
    if any("loading" in cost.bottlenecks for _, cost, _ in found):
        workers = found[0][0].config.data.num_workers
        print(f"  (loading data by data.num_workers={workers} of each replica, as set: with more it takes less)")


def as_json(job: Job, args, columns, refused: str | None, sources: tuple[int, int]) -> dict:
    stage, parts = worst_stage(job)
    by_component, by_stage = count_parameters(job)
    needed, phase = peak(parts)
    cost = estimate(job, args.gpu, columns)
    return {
        "stage": job.config.stage,
        "model": job.config.model.name,
        "gpus": job.gpus,
        "fits": refused is None,
        "reason": refused,
        "sources_on_disk": sources[0],
        "sources": sources[1],
        "parameters": {name: asdict(counts) for name, counts in by_component.items()},
        "parameters_of_a_gpu": [counts.total for counts in by_stage],
        "pipeline_stage": stage,
        "phase": phase,
        "peak_bytes": needed,
        "reserve_bytes": RESERVE_GIB * GIB,
        "parts": [asdict(part) for part in parts],
        "work_of_a_row": asdict(job.work),
        "flops_of_a_step": cost.flops,
        "seconds_of_a_step": cost.seconds,
        "seconds_fast": cost.fast.seconds,
        "seconds_slow": cost.slow.seconds,
        "causes_fast": cost.fast.causes,
        "causes_slow": cost.slow.causes,
        "limited_by": cost.bottlenecks,
        "days": cost.seconds * job.config.train.max_steps / 86400,
        "mfu": cost.mfu,
        "traffic": [asdict(item) | {"link": item.link} for item in cost.traffic],
        "run": asdict(run_costs(job, cost, columns)),
        "assumptions": {"fast": asdict(columns[0]), "slow": asdict(columns[1])},
    }


def lists(found: list, curve: list) -> dict:
    """The layouts of --search and --scale for --json."""

    def layout(job: Job, cost: Estimate, needed: float) -> dict:
        return {
            "gpus": job.gpus,
            "layout": [job.t, job.p, job.c, job.d],
            "recompute": recompute_of(job),
            "seconds": cost.seconds,
            "seconds_fast": cost.fast.seconds,
            "seconds_slow": cost.slow.seconds,
            "limited_by": cost.bottlenecks,
            "peak_bytes": needed,
        }

    return {
        "search": [layout(*item) for item in found],
        "scale": [layout(*item) if item else {"gpus": gpus, "layout": None} for gpus, item in curve],
    }


if __name__ == "__main__":
    sys.exit(main())
