"""Types of the options of commands that deal in bytes and pixels. This module imports nothing that takes time."""

import argparse
import re

from molmo2_nemo.files import bytes_of


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
