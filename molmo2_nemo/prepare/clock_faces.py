"""Pictures of watches for PixMo-Clocks, whose own (of facer.io) are not published.

A watch's name decides its looks: colours, shape, numerals and hands, or digits. It shows the time that the answer says,
and nothing else does: seconds, AM and PM are drawn where the answer has them. The forms of the answers are those of
allenai/OLMo-core, src/olmo_core/data/multimodal/pixmo_clocks.py: "The time shown is 3:02:07 PM", "The time shown is
15:02", "The time is not shown in the image.".
"""

import io
import math
import random
import re
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from molmo2_nemo.prepare.converters.common import fixed_random

SIDE = 336  # pixels of a picture
FINE = 2  # a picture is drawn this many times as large, and then made smaller, so that its edges are smooth
TIME = re.compile(r"\b(\d{1,2}):(\d{2})(?::(\d{2}))?(?: ?([AP]M))?\b")
NOT_SHOWN = "is not shown"
# Behind the watch, its dial, what is on the dial, the hand of the seconds.
COLOURS = (
    ("#ffffff", "#f4f1e8", "#1c1c1c", "#c0392b"),
    ("#ffffff", "#101418", "#f2f2f2", "#ff7043"),
    ("#e8e8e8", "#ffffff", "#14325c", "#d35400"),
    ("#202020", "#0b2545", "#eef4ed", "#f7b801"),
    ("#ffffff", "#2e4a3f", "#f6f2df", "#e9c46a"),
    ("#dfe7ef", "#3a2e39", "#f4d8cd", "#f15152"),
    ("#ffffff", "#d9e4ec", "#22303c", "#1f7a8c"),
    ("#000000", "#000000", "#39ff88", "#ff3864"),
)
ROMAN = ("XII", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI")
ARABIC = ("12", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11")
DIGITS_SHARE, SQUARE_SHARE, TURNED_SHARE = 0.2, 0.25, 0.5
MOST_TURNED = 25.0  # degrees; Ai2's loader turns the pictures, too, and moves and colours them


@dataclass(frozen=True)
class Watch:
    """How one watch looks. Lengths and widths are parts of the dial's radius."""

    behind: str
    dial: str
    ink: str
    accent: str
    has_digits: bool
    is_square: bool
    numerals: tuple[str, ...]  # at the hours; none: there are marks alone
    hour: tuple[float, float]  # length and width of the hand
    minute: tuple[float, float]


@dataclass(frozen=True)
class ShownTime:
    """What an answer says that a watch shows."""

    hour: int
    minute: int
    second: int | None
    half: str | None  # AM or PM

    def text(self) -> str:
        seconds = "" if self.second is None else f":{self.second:02d}"
        return f"{self.hour}:{self.minute:02d}{seconds}{f' {self.half}' if self.half else ''}"

    def angles(self) -> tuple[float, float, float | None]:
        """Of the hands of hours, minutes and seconds, in degrees clockwise from twelve."""
        minutes = self.minute + (self.second or 0) / 60
        return 30 * (self.hour % 12 + minutes / 60), 6 * minutes, None if self.second is None else 6.0 * self.second


def shown_time(says: str) -> ShownTime | None:
    """The time that an answer names; None: it says that none is shown. ValueError: neither."""
    found = TIME.search(says)
    if found is None:
        if NOT_SHOWN in says:
            return None
        raise ValueError("its answer names no time")
    hour, minute, second = int(found[1]), int(found[2]), None if found[3] is None else int(found[3])
    if hour > 23 or minute > 59 or (second or 0) > 59:
        raise ValueError("its answer names no time of the day")
    return ShownTime(hour, minute, second, found[4])


def watch_of(name: str) -> Watch:
    """The looks of a watch, always the same for the same name."""
    draw = fixed_random("watch", name)
    return Watch(
        *draw.choice(COLOURS),
        has_digits=draw.random() < DIGITS_SHARE,
        is_square=draw.random() < SQUARE_SHARE,
        numerals=draw.choice((ARABIC, ARABIC, ROMAN, ())),
        hour=(draw.uniform(0.45, 0.55), draw.uniform(0.06, 0.09)),
        minute=(draw.uniform(0.75, 0.85), draw.uniform(0.03, 0.05)),
    )


def draw_clock(says: str, name: str) -> bytes:
    """A PNG of the watch that shows what the answer says. ValueError: the answer names no time."""
    watch, draw = watch_of(name), fixed_random(name, says)
    image = draw_dial(watch, shown_time(says), draw.uniform(0.28, 0.4))
    image = _turned(image, watch, draw).resize((SIDE, SIDE), Image.Resampling.BOX)
    file = io.BytesIO()
    image.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "PNG")
    return file.getvalue()


def draw_dial(watch: Watch, time: ShownTime | None, part: float) -> Image.Image:
    """The upright watch, FINE times as large as it will be; its radius is this part of the picture's side."""
    side = SIDE * FINE
    image = Image.new("RGB", (side, side), watch.behind)
    draw, middle, radius = ImageDraw.Draw(image), side / 2, side * part
    outline = [middle - radius, middle - radius, middle + radius, middle + radius]
    if watch.is_square:
        draw.rounded_rectangle(outline, radius / 4, watch.dial, watch.ink, int(radius / 30))
    else:
        draw.ellipse(outline, watch.dial, watch.ink, int(radius / 30))
    if watch.has_digits:
        words = [(time.text() if time else "--:--", 0.0, 0.34)]
    else:
        _marks(draw, watch, middle, radius)
        words = [(time.half, 0.32, 0.16)] if time and time.half else []
    for text, below, size in words:
        font = ImageFont.load_default(size=radius * size)
        draw.text((middle, middle + below * radius), text, watch.ink, font, "mm")
    if time and not watch.has_digits:
        _hands(draw, watch, time, middle, radius)
    return image


def _at(middle: float, distance: float, degrees: float) -> tuple[float, float]:
    return middle + distance * math.sin(math.radians(degrees)), middle - distance * math.cos(math.radians(degrees))


def _marks(draw: ImageDraw.ImageDraw, watch: Watch, middle: float, radius: float) -> None:
    for minute in range(60):
        inner, width = (0.86, 0.025) if minute % 5 == 0 else (0.91, 0.008)
        ends = [_at(middle, radius * inner, 6 * minute), _at(middle, radius * 0.95, 6 * minute)]
        draw.line(ends, watch.ink, max(1, round(radius * width)))
    font = ImageFont.load_default(size=radius * 0.15)
    for hour, numeral in enumerate(watch.numerals):
        draw.text(_at(middle, radius * 0.74, 30 * hour), numeral, watch.ink, font, "mm")


def _hands(draw: ImageDraw.ImageDraw, watch: Watch, time: ShownTime, middle: float, radius: float) -> None:
    hour, minute, second = time.angles()
    hands = [(hour, *watch.hour, watch.ink), (minute, *watch.minute, watch.ink)]
    hands += [] if second is None else [(second, 0.88, 0.015, watch.accent)]
    for degrees, length, width, colour in hands:
        ends = [_at(middle, -0.12 * radius, degrees), _at(middle, length * radius, degrees)]
        draw.line(ends, colour, max(2, round(width * radius)))
    hub = 0.05 * radius
    draw.ellipse([middle - hub, middle - hub, middle + hub, middle + hub], watch.accent)


def _turned(image: Image.Image, watch: Watch, draw: random.Random) -> Image.Image:
    """Upright, unless numerals or digits say where its top is."""
    if not (watch.numerals or watch.has_digits) or draw.random() >= TURNED_SHARE:
        return image
    degrees = draw.uniform(-MOST_TURNED, MOST_TURNED)
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=watch.behind)
