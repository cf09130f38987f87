"""Where the files that come with the code lie: configuration, and the checkout itself."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONF_DIR = REPOSITORY / "conf"
