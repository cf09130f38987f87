"""Watches that are drawn for PixMo-Clocks show the time of their answer, and nothing else."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageColor

from molmo2_nemo.prepare.clock_faces import FINE, SIDE, ShownTime, draw_clock, draw_dial, shown_time, watch_of

RADIUS = SIDE * FINE * 0.4
# One with hands, and nothing else on its dial than marks.
PLAIN = replace(watch_of("plain"), has_digits=False, is_square=False, numerals=(), dial="#ffffff", ink="#000000")


def is_inked(image, degrees, distance, colour):
    """Whether the dial has this colour there: clockwise from twelve, in parts of the radius."""
    middle, length = SIDE * FINE / 2, distance * RADIUS
    x, y = middle + length * math.sin(math.radians(degrees)), middle - length * math.cos(math.radians(degrees))
    return tuple(np.asarray(image)[round(y), round(x)]) == ImageColor.getrgb(colour)


@pytest.mark.parametrize(
    "says, hour, minute, second",
    [
        ("The time shown is 3:00", 90.0, 0.0, None),
        ("The time shown is 12:45 AM", 22.5, 270.0, None),
        ("The time shown is 9:20:10 PM", 280.083, 121.0, 60.0),
    ],
)
def test_hands_point_where_the_answer_says(says, hour, minute, second):
    image, long = draw_dial(PLAIN, shown_time(says), 0.4), PLAIN.minute[0] - 0.05
    assert is_inked(image, hour, PLAIN.hour[0] - 0.05, PLAIN.ink) and is_inked(image, minute, long, PLAIN.ink)
    # The hand of the hours is the shorter one.
    assert not is_inked(image, hour, long, PLAIN.ink)
    seconds = [degrees for degrees in range(0, 360, 6) if is_inked(image, degrees, 0.855, PLAIN.accent)]
    assert seconds == ([] if second is None else [second])


def test_what_an_answer_says_is_read_and_a_wrong_one_refused():
    assert shown_time("The time shown is 3:02:07 PM") == ShownTime(3, 2, 7, "PM")
    assert shown_time("The time is not shown in the image.") is None
    without_hands = draw_dial(PLAIN, None, 0.4)
    assert not any(is_inked(without_hands, degrees, 0.3, PLAIN.ink) for degrees in range(360))
    for wrong in ("Ten past ten", "The time shown is 3:75", "The time shown is 31:05"):
        with pytest.raises(ValueError, match="names no time"):
            shown_time(wrong)


def test_the_same_watch_looks_the_same_and_others_do_not():
    looks = {watch_of(f"w{number}") for number in range(40)}
    assert watch_of("w1") == watch_of("w1") and len(looks) == 40
    assert {watch.has_digits for watch in looks} == {watch.is_square for watch in looks} == {True, False}
    data = draw_clock("The time shown is 3:02", "w1")
    assert data == draw_clock("The time shown is 3:02", "w1") != draw_clock("The time shown is 3:03", "w1")
    assert Image.open(io.BytesIO(data)).size == (SIDE, SIDE)
