"""Write the sample data: small procedural images, videos and texts with true labels, as Energon WebDatasets.

python tools/make_sample_data.py --out data/sample [--seed 0] [--scale 1.0]
"""

import argparse
import sys

from molmo2_nemo.option_types import local_path
from molmo2_nemo.prepare.sample_world.write import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=local_path, required=True, help="folder to make, for example data/sample")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other samples (default 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="relative number of samples (default 1)")
    arguments = parser.parse_args()
    try:
        generate(arguments.out, arguments.seed, arguments.scale)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
