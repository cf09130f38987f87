"""Predict what a run needs before it is queued: memory of a GPU by part, FLOPs, time, communication, and if it fits.

    python tools/plan.py --config-name stage3 model=molmo2_8b gpus=128 [any override of a recipe]
    python tools/plan.py --config-name stage2 model=molmo2_4b gpus=8 schedule=report --search
    python tools/plan.py --config-name stage2 hardware=h100_64 gpus=64 --json

Nothing is started and no GPU is needed. Exit status: 0 it fits, 1 it does not, 2 a setting cannot work, or a source of
data.blend that is on this machine cannot be trained on. Memory is computed by formulas, which docs/planner.md compares
with measurements; times rest on assumed efficiencies.
"""

import argparse
import difflib
import itertools
import json
import sys
from dataclasses import asdict, replace

from molmo2_nemo.auto import resolve
from molmo2_nemo.command_line import compose, take_gpus
from molmo2_nemo.config.checks import check, check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.flags import refuse_flags
from molmo2_nemo.config.schema import RECOMPUTE, Config
from molmo2_nemo.data.blend import check_present
from molmo2_nemo.environment import quiet_libraries
from molmo2_nemo.planner.flops import PEAK_TFLOPS
from molmo2_nemo.planner.memory import (
    GIB,
    H100_GIB,
    PHASES,
    RESERVE_GIB,
    Job,
    count_parameters,
    peak,
    verdict,
    worst_stage,
)
from molmo2_nemo.planner.step_time import Estimate, estimate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-name", required=True, metavar="STAGE", help="stage1, stage2 or stage3")
    parser.add_argument(
        "--gpu-memory", type=float, default=H100_GIB, metavar="GIB", help=f"memory of a GPU (default {H100_GIB})"
    )
    parser.add_argument(
        "--gpu", default="NVIDIA H100 80GB HBM3", help="exact name of the GPU in molmo2_nemo/planner/flops.py"
    )
    parser.add_argument("--search", action="store_true", help="rank other layouts that fit by their predicted time")
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
        if args.gpu_memory <= RESERVE_GIB:
            raise ConfigError(
                f"--gpu-memory {args.gpu_memory:g} must be above the {RESERVE_GIB:g} GiB held in reserve."
            )
        config = compose(args.config_name, overrides)
        check(config, gpus)
        config, chosen = resolve(config, gpus, args.gpu_memory)
        job = Job(config, gpus)
        if job.precision == "fp8" and PEAK_TFLOPS[args.gpu][1] is None:
            raise ConfigError(f"train.precision=fp8, but {args.gpu} has no FP8: use train.precision=bf16.")
        sources = check_present(config.data)
        refused = verdict(config, gpus, args.gpu_memory)
        found = search(config, gpus, args.gpu_memory, args.gpu) if args.search else []
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(job, args, refused, found, sources) | {"auto": chosen}))
    else:
        for line in chosen:
            print(line)
        show(job, args, refused, sources)
        if args.search:
            show_search(found, gpus, args.gpu_memory)
    return 1 if refused else 0


def search(config: Config, gpus: int, memory: float, device: str) -> list[tuple[Job, Estimate, float]]:
    """(layout, estimate, peak bytes) of all tensor x pipeline x context x recompute choices that fit, fastest first."""
    others = {k: v for k, v in config.transformer.items() if not k.startswith("recompute")}
    found = []
    for tp, pp, cp in itertools.product((1, 2, 4, 8), repeat=3):
        layout = replace(
            config.parallel,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            sequence_parallel=tp > 1,
            virtual_pipeline_model_parallel_size=None,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
        )
        for recompute in RECOMPUTE.values():
            candidate = replace(config, parallel=layout, transformer={**others, **recompute})
            try:
                check_settings(candidate, gpus)
            except ConfigError:
                break
            job = Job(candidate, gpus)
            needed = peak(worst_stage(job)[1])[0]
            if needed <= (memory - RESERVE_GIB) * GIB:
                found.append((job, estimate(job, device), needed))
                break  # more recomputation is slower
    return sorted(found, key=lambda item: item[1].seconds)


def recompute_of(job: Job) -> str:
    own = {k: v for k, v in job.config.transformer.items() if k.startswith("recompute")}
    return next((name for name, values in RECOMPUTE.items() if values == own), "as set")


def layout_of(job: Job) -> str:
    sp = " + SP" if job.sequence > 1 else ""
    return f"TP {job.t}{sp}, PP {job.p}, CP {job.c}, DP {job.d}"


def show(job: Job, args, refused: str | None, sources: tuple[int, int]) -> None:
    config, train = job.config, job.config.train
    by_component, by_stage = count_parameters(job)
    stage, parts = worst_stage(job)
    needed, phase = peak(parts)
    cost = estimate(job, args.gpu)
    total = sum(counts.total for counts in by_component.values())
    print(
        f"{config.stage} of {config.model.name} on {job.gpus} GPU(s): {layout_of(job)}, {job.precision}, "
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
    work = job.work
    print("\na step")
    print(
        f"  {train.global_batch_size * job.seq_length:,} tokens, {train.global_batch_size * work.crops:,.0f} crops;"
        f" full rows of {work.crops:.0f} frames, the rest text (assumed)"
    )
    flops = sum(cost.flops.values())
    shares = ", ".join(f"{name} {value / flops:.0%}" for name, value in cost.flops.items() if value / flops >= 0.005)
    print(f"  {flops / 1e15:,.1f} PFLOP: {shares}")
    print(
        f"  {cost.seconds:,.2f} s predicted with assumed efficiencies, unmeasured on a GPU: compute {cost.compute:.2f},"
        f" optimizer {cost.optimizer:.2f}, communication {sum(x.seconds for x in cost.traffic if not x.hidden):.2f};"
        f" MFU {cost.mfu:.0%}, {train.global_batch_size * job.seq_length / cost.seconds / job.gpus:,.0f} tokens/s"
        " per GPU"
    )
    print(f"  {train.max_steps:,} steps: {cost.seconds * train.max_steps / 86400:,.1f} days")
    if job.p > 1:
        print(f"  pipeline bubble {cost.bubble:.1%}")
    for item in cost.traffic:
        overlap = ", overlapped" if item.hidden else ""
        print(
            f"  {item.kind:<6} {item.bytes / GIB:8.2f} GiB sent by a GPU over {item.link} "
            f"({item.seconds:.2f} s{overlap}): {item.what}"
        )
    data, (present, number) = config.data, sources
    print(
        f"\ndata: {present} of the {number} sources of data.blend={data.blend} are on this machine, under"
        f" data.root={data.root}{'; each has training samples' if present else ', so that none is checked'}"
    )
    print(f"\n{'does not fit: ' + refused if refused else 'fits'}")


def show_search(found: list, gpus: int, memory: float) -> None:
    if not found:
        print(f"\nno layout of TP, PP, CP up to 8 fits {gpus} GPU(s) of {memory:g} GiB: use more GPUs")
        return
    print("\nlayouts that fit, fastest first (assumed efficiencies); recompute is the least that fits")
    print("  TP PP CP   DP  recompute  s/step   days  MFU  GiB")
    for job, cost, needed in found[:15]:
        days = cost.seconds * job.config.train.max_steps / 86400
        print(
            f"  {job.t:>2} {job.p:>2} {job.c:>2} {job.d:>4}  {recompute_of(job):>9} {cost.seconds:>7.2f} {days:>6.1f} "
            f"{cost.mfu:>4.0%} {needed / GIB + RESERVE_GIB:>4.0f}"
        )


def as_json(job: Job, args, refused: str | None, found: list, sources: tuple[int, int]) -> dict:
    stage, parts = worst_stage(job)
    by_component, by_stage = count_parameters(job)
    needed, phase = peak(parts)
    cost = estimate(job, args.gpu)
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
        "days": cost.seconds * job.config.train.max_steps / 86400,
        "mfu": cost.mfu,
        "bubble": cost.bubble,
        "traffic": [asdict(item) for item in cost.traffic],
        "search": [
            {"layout": [j.t, j.p, j.c, j.d], "recompute": recompute_of(j), "seconds": c.seconds, "peak_bytes": n}
            for j, c, n in found
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
