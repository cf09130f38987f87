"""Get the raw data sets of stage 2: tools/download.py fetch --stage 2, and its options.

python tools/download_stage2_sft.py [--limit 1000] [--jobs 32] [--max-bytes 500GB] ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for python -m, too

from download import main

if __name__ == "__main__":
    sys.exit(main(["fetch", "--stage", "2", *sys.argv[1:]]))
