"""The table of docs/rehearsal.md: a rank of every shipped model on every hardware preset in every stage.

    python tools/dev/rehearsal_table.py runs/rehearsals --run               # rehearse what the folder lacks
    python tools/dev/rehearsal_table.py runs/rehearsals                     # the table of what is there
    python tools/dev/rehearsal_table.py runs/rehearsals --run --layers 2    # two layers each, of all widths: minutes

The rank is the one of the first replica that encodes most crops, which the planner plans for. The folder has a file for
each combination, and --run goes on where it was stopped.
"""

import argparse
import json
import sys
from pathlib import Path

from molmo2_nemo.auto import resolve
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.model.vision import split_units
from molmo2_nemo.paths import ROOT
from molmo2_nemo.planner.memory import Job
from molmo2_nemo.rehearsal.plan import plan

sys.path.insert(0, str(ROOT / "tools"))
import rehearse

GIB = 2**30
STAGES = ("stage2", "stage1", "stage3")
MODELS = ("molmo2_8b", "molmo2_4b", "molmo2_o_7b")
GPUS = (8, 128, 1, 64, 1024, 512, 256)  # of the presets h100_N
COLUMNS = (
    *("stage", "model", "GPUs", "rank", "peak of the step, GiB", "planned", "peak of building, GiB", "planned"),
    *("sent, GB", "planned", "PFLOP", "planned", "other operations, GB", "waits", "at least, s a step"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--run", action="store_true", help="rehearse what is missing")
    parser.add_argument("--layers", type=int, metavar="N", help="of decoder and vision transformer (default: all)")
    args = parser.parse_args()
    combinations = [(stage, model, gpus) for gpus in GPUS for stage in STAGES for model in MODELS]
    if args.run:
        args.folder.mkdir(parents=True, exist_ok=True)
        for combination in combinations:
            file = file_of(args.folder, combination, args.layers)
            if not file.exists():
                record = rehearsed(combination, args.layers)
                file.write_text(json.dumps(record, default=float))
                print(file.name, record.get("refused") or record["faults"] or "done", flush=True)
        return
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for combination in sorted(combinations, key=lambda each: (each[0], each[1], each[2])):
        print(line(file_of(args.folder, combination, args.layers), combination))


def file_of(folder: Path, combination: tuple, layers: int | None) -> Path:
    return folder / f"{'-'.join(map(str, combination))}{f'-{layers}-layers' if layers else ''}.json"


def rehearsed(combination: tuple, layers: int | None) -> dict:
    """What `tools/rehearse.py --json` writes for one rank, or why the recipe refuses the combination."""
    stage, model, gpus = combination
    words = [f"model={model}", f"hardware=h100_{gpus}"]
    if layers:
        words += [f"model.num_layers={layers}", f"model.vit.num_layers={layers}", "model.vit.feature_layers=[-1,-2]"]
    try:
        config = compose(stage, words)
        check_settings(config, gpus)
        config = resolve(config, gpus)[0]
        made = plan(config, gpus, None, [0])
        made = plan(config, gpus, None, [busiest_rank(Job(made.config, gpus))])
    except ConfigError as error:
        return {"refused": str(error)}
    found, failed = rehearse.rehearse_all(made, 1)
    return rehearse.as_json(made.config, made, found, list(failed.values()))


def busiest_rank(job: Job) -> int:
    """The first replica's rank that encodes most crops of full rows. Ranks of tensor and context parallelism share."""
    crops = [sum(size for size, _ in share) for share in split_units([(size, 0) for size in job.units], job.t * job.c)]
    return crops.index(max(crops))


def line(file: Path, combination: tuple) -> str:
    """A row of the table: figures of the rank, why there are none, or that it was not rehearsed."""
    stage, model, gpus = combination
    cells = [stage, model, gpus]
    record = json.loads(file.read_text()) if file.exists() else {"refused": "not rehearsed"}
    if "refused" in record or not record["ranks"]:
        cells += [record.get("refused") or record["faults"][0], *[""] * (len(COLUMNS) - len(cells) - 1)]
        return f"| {' | '.join(map(str, cells))} |"
    (rank,) = record["ranks"]
    cells.append(rank["rank"])
    of = {row["figure"]: row for row in rank["beside"]}
    sent = [row for name, row in of.items() if name.endswith("traffic")]
    for name in ("peak of the step", "peak of building"):
        cells += [f"{of[name]['counted'] / GIB:.2f}", f"{of[name]['off_percent']:+.1f} %"]
    counted, planned = (sum(row[key] for row in sent) for key in ("counted", "planned"))
    cells += [f"{counted / 1e9:.2f}", f"{100 * (planned / counted - 1):+.2f} %" if counted else "n/a"]
    cells += [f"{of['FLOP']['counted'] / 1e15:.3f}", f"{of['FLOP']['off_percent']:+.2f} %"]
    cells += [f"{sum(rank['moved'].values()) / 1e9:,.0f}", sum(rank["syncs"].values())]
    cells += [f"{sum(rank['roofline'].values()):.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
