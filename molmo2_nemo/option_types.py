"""Types of the options of commands that deal in bytes and pixels. This module imports nothing that takes time."""

import argparse
import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def size(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?I?B?)(/S)?", text.strip().upper())
    unit = match[2].replace("I", "").rstrip("B") + "B" if match and match[2] else ""
    try:
        value = int(float(match[1]) * UNITS[unit])
    except (TypeError, ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text} is not a size like 500GB or 1TB") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def positive(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def side(text: str) -> int:
    from molmo2_nemo.catalogue.resized import LEAST_SIDE

    if positive(text) < LEAST_SIDE:
        raise argparse.ArgumentTypeError(f"{text} is below {LEAST_SIDE} pixels")
    return int(text)
