"""Types of the options of commands that deal in bytes and pixels. This module imports nothing that takes time."""

import argparse
import re
from pathlib import Path

from molmo2_nemo.files import bytes_of
from molmo2_nemo.storage import is_remote, shown


def local_path(text: str) -> Path:
    """A file or folder of this machine; an address would become a folder that is called s3:."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is an address: name a path on this machine")
    return Path(text)


def size(text: str) -> int:
    try:
        return bytes_of(re.sub("/s$", "", text.strip(), flags=re.IGNORECASE))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def side(text: str) -> int:
    from molmo2_nemo.catalogue.resized import LEAST_SIDE

    if positive(text) < LEAST_SIDE:
        raise argparse.ArgumentTypeError(f"{text} is below {LEAST_SIDE} pixels")
    return int(text)
