"""The table of docs/rehearsal.md, from files that `tools/rehearse.py --json` wrote.

python tools/dev/rehearsal_table.py FILE [FILE...]
"""

import argparse
import json
from pathlib import Path

GIB = 2**30
COLUMNS = (
    *("stage", "model", "GPUs", "rank", "peak of the step, GiB", "planned", "peak of building, GiB", "planned"),
    *("sent, GB", "planned", "PFLOP", "planned", "other operations, GB", "waits", "at least, s a step"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for file in parser.parse_args().files:
        record = json.loads(file.read_text())
        for rank in record["ranks"]:
            if rank["rows"] == "full":
                print(line(record, rank))


def line(record: dict, rank: dict) -> str:
    """A row of the table: figures of one rank."""
    of = {row["figure"]: row for row in rank["beside"]}
    sent = [row for name, row in of.items() if name.endswith("traffic")]
    cells = [record["stage"], record["model"], record["gpus"], rank["rank"]]
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
