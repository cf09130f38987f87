"""The table of docs/rehearsal.md: rank 0 of every shipped model on every hardware preset in every stage.

    python tools/dev/rehearsal_table.py runs/rehearsals --run    # rehearse what the folder lacks, one after the other
    python tools/dev/rehearsal_table.py runs/rehearsals          # the table of what is there

The folder has a file for each combination, and --run goes on where it was stopped. Combinations that are equal in all
that decides about shapes are rehearsed once.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from molmo2_nemo.auto import resolve
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.paths import ROOT

GIB = 2**30
STAGES = ("stage2", "stage1", "stage3")
MODELS = ("molmo2_8b", "molmo2_4b", "molmo2_o_7b")
GPUS = (8, 128, 1, 64, 1024, 512, 256)  # of the presets h100_N
COLUMNS = (
    *("stage", "model", "GPUs", "peak of the step, GiB", "planned", "peak of building, GiB", "planned"),
    *("sent, GB", "planned", "PFLOP", "planned", "other operations, GB", "waits", "at least, s a step"),
)
# What has nothing to do with shapes: names, rates, numbers of steps.
NAMES = ("name", "run_dir", "optim", "schedule", "hardware")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--run", action="store_true", help="rehearse what is missing")
    args = parser.parse_args()
    combinations = [(stage, model, gpus) for gpus in GPUS for stage in STAGES for model in MODELS]
    if args.run:
        args.folder.mkdir(parents=True, exist_ok=True)
        done = {}
        for combination in combinations:
            rehearse(args.folder, combination, done)
        return
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for combination in sorted(combinations, key=lambda each: (each[0], each[1], each[2])):
        print(line(args.folder, combination))


def file_of(folder: Path, combination: tuple) -> Path:
    return folder / f"{'-'.join(map(str, combination))}.json"


def words_of(combination: tuple) -> list[str]:
    stage, model, gpus = combination
    return ["--config-name", stage, f"model={model}", f"hardware=h100_{gpus}", f"gpus={gpus}"]


def shapes_of(combination: tuple) -> str:
    """What two combinations must have in common to be equal for a rehearsal. Raises ConfigError."""
    stage, model, gpus = combination
    config = compose(stage, [f"model={model}", f"hardware=h100_{gpus}"])
    check_settings(config, gpus)
    fields = dataclasses.asdict(resolve(config, gpus)[0])
    fields["frozen"] = {key: part["freeze"] for key, part in fields["optim"].items() if isinstance(part, dict)}
    return json.dumps([gpus, {key: value for key, value in fields.items() if key not in NAMES}], default=str)


def rehearse(folder: Path, combination: tuple, done: dict[str, Path]) -> None:
    """Write the combination's file, if it is not there. done: shapes -> the file of those that are."""
    file = file_of(folder, combination)
    try:
        shapes = shapes_of(combination)
    except ConfigError as error:
        file.write_text(json.dumps({"refused": str(error)}))
        return
    if not file.exists() and shapes in done:
        file.write_text(json.dumps({"same_as": done[shapes].name}))
    if not file.exists():
        unfinished = file.with_suffix(".part")
        command = [sys.executable, "tools/rehearse.py", *words_of(combination), "--ranks", "0", "--json", unfinished]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if unfinished.exists():
            unfinished.rename(file)
        else:
            file.write_text(json.dumps({"refused": found.stderr.strip().splitlines()[-1]}))
        print(file.name, found.returncode, flush=True)
    done.setdefault(shapes, file)


def line(folder: Path, combination: tuple) -> str:
    """A row of the table: figures of rank 0, why there are none, or that it was not rehearsed."""
    stage, model, gpus = combination
    file = file_of(folder, combination)
    cells = [stage, model, gpus]
    record = json.loads(file.read_text()) if file.exists() else {"refused": "not rehearsed"}
    if "same_as" in record:
        record = json.loads((folder / record["same_as"]).read_text())
    if "refused" in record or not record["ranks"]:
        cells += [record.get("refused") or record["faults"][0], *[""] * (len(COLUMNS) - len(cells) - 1)]
        return f"| {' | '.join(map(str, cells))} |"
    (rank,) = record["ranks"]
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
