"""What the benchmarks have in common: their arguments, their table and their JSON line."""

import argparse
import json
from pathlib import Path


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with --out; description: the docstring of the program, shown as it is."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, metavar="FILE", help="write the JSON lines here, too")
    return made


def print_json(record: dict, out: Path | None, append: bool = False) -> None:
    """Print the figures as one line, and write it to the file `out`; append: to what the file holds already."""
    line = json.dumps(record, default=float)
    print(line, flush=True)
    if out is not None:
        with out.open("a" if append else "w") as file:
            file.write(line + "\n")


def print_table(rows: list[dict]) -> None:
    """Figures of rows in columns; a row without figures is its sentence."""
    columns = []
    for row in rows:
        columns += [key for key in row if key not in columns and key != "not_measured"]
    table = [columns] + [[cell(row.get(key)) for key in columns] if "not_measured" not in row else None for row in rows]
    widths = [max(len(line[i]) for line in table if line) for i in range(len(columns))]
    if any("not_measured" not in row for row in rows):
        print("  " + "  ".join(name.rjust(width) for name, width in zip(columns, widths)))
    for row, line in zip(rows, table[1:]):
        if line is None:
            labels = [
                key if value is True else str(value) for key, value in row.items() if value and key != "not_measured"
            ]
            label = " ".join(labels)
            print(f"  {label + ': ' if label else ''}{row['not_measured']}")
        else:
            print("  " + "  ".join(text.rjust(width) for text, width in zip(line, widths)))


def cell(value) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
