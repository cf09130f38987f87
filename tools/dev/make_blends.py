"""Write the mixtures of the three stages, conf/blend/stage*.yaml and conf/data/stage*.yaml, from conf/datasets.yaml.

    python tools/dev/make_blends.py            # write them
    python tools/dev/make_blends.py --check    # write nothing; exit status 1 with the names of what would change

molmo2_nemo/catalogue/mixture.py says what they are.
"""

import argparse
import math
import sys
from pathlib import Path

import yaml

from molmo2_nemo.catalogue.datasets import Catalogue, load_catalogue
from molmo2_nemo.catalogue.mixture import blends
from molmo2_nemo.paths import CONF_DIR

NOTICE = "# Made by tools/dev/make_blends.py from conf/datasets.yaml: change these, not this file.\n"


def files(catalogue: Catalogue) -> dict[str, str]:
    """Path relative to conf/ -> content."""
    texts = {}
    for name, (what, blend) in blends(catalogue).items():
        texts[f"blend/{name}.yaml"] = f"{NOTICE}# {what}\n{to_yaml(blend)}"
        texts[f"data/{name}.yaml"] = (
            f"{NOTICE}# {what}\n"
            f"# conf/blend/{name}.yaml names the sources, each a folder of Energon shards, SOURCE/*.tar under `root`.\n"
            f"root: ${{oc.env:DATA_ROOT,data/shards}}\nblend: {name}\n"
        )
    return texts


def to_yaml(values: dict, indent: str = "") -> str:
    """Block style down to the sources, which take a line each."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict) and "path" not in value:
            lines.append(f"{indent}{key}:\n{to_yaml(value, indent + '  ')}")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
            lines.append(f"{indent}{key}: {text.removesuffix('...\n').strip()}\n")
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    parser.add_argument("--conf", type=Path, default=CONF_DIR, help="folder of datasets.yaml, blend/ and data/")
    arguments = parser.parse_args()
    catalogue = arguments.conf / "datasets.yaml"
    try:
        texts = files(load_catalogue(catalogue))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    changed = []
    for name, text in texts.items():
        path = arguments.conf / name
        if not path.is_file() or path.read_text() != text:
            changed.append(str(path))
            if not arguments.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    if arguments.check and changed:
        sys.exit(f"not what {catalogue} says: {', '.join(changed)}; run python tools/dev/make_blends.py.")
    print("\n".join(f"wrote {path}" for path in changed) or f"all is as {catalogue} says")


if __name__ == "__main__":
    main()
