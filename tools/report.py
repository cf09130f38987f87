"""Write the report of a run, or of several side by side: one HTML page with plots, figures by source and answers.

    python tools/report.py runs/quickstart/stage1
    python tools/report.py runs/quickstart/stage1 runs/quickstart/stage2 --out comparison.html

Works while a run is training. Without --out the file is report.html, in the folder of a single run, or in the
current directory for several.
"""

import argparse
import sys
from pathlib import Path

from molmo2_nemo.option_types import local_path
from molmo2_nemo.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=local_path, metavar="RUN", help="a run's folder, which has metrics.jsonl"
    )
    parser.add_argument("--out", type=local_path, metavar="FILE", help="the file to write")
    arguments = parser.parse_args()
    out = arguments.out or (arguments.runs[0] if len(arguments.runs) == 1 else Path()) / "report.html"
    try:
        write_report(arguments.runs, out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"open {out}")


if __name__ == "__main__":
    main()
