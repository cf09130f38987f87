"""Scenes of the sample world: what there is, where it is, how it moves; drawn at random, with true positions."""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SIDE = 84  # pixels: side of most images and of all videos
# Pixels: what a visual token of the tiny model sees (2 x 2 patches of 14). A still thing is inside one, so that few
# steps are enough to learn what it is.
CELL = 28
FPS = 4  # of videos
HELD_OUT_EVERY = 20  # one combination of objects in so many is held out

COLOURS = {
    "red": (215, 35, 40),
    "green": (35, 165, 65),
    "blue": (45, 85, 225),
    "yellow": (245, 220, 45),
    "purple": (150, 50, 185),
    "orange": (245, 135, 20),
}
SHAPES = ("circle", "square", "triangle", "star")
BACKGROUNDS = {"light": (195, 215, 235), "dark": (25, 45, 70)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass
class Thing:
    """A shape of the world; `x`, `y` (its centre) and `size` (width and height) are pixels."""

    colour: str
    shape: str
    x: float = 0.0
    y: float = 0.0
    size: float = 0.0
    direction: str | None = None  # None: it stays still

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass
class Scene:
    """One picture, or the first frame of a video if `num_frames` is above 0; sizes in pixels, things left to right."""

    things: list[Thing]
    background: str
    grey: int
    noise_seed: int
    width: int = SIDE
    height: int = SIDE
    num_frames: int = 0
    speed: float = 0.0  # pixels per frame of the thing that moves

    def position(self, thing: Thing, frame: float = 0) -> tuple[float, float]:
        """Centre of the thing in pixels at a frame."""
        dx, dy = DIRECTIONS.get(thing.direction, (0, 0))
        return thing.x + dx * self.speed * frame, thing.y + dy * self.speed * frame

    def fraction(self, thing: Thing, frame: float = 0) -> tuple[float, float]:
        """Centre of the thing as fractions of width and height."""
        x, y = self.position(thing, frame)
        return x / self.width, y / self.height


def pick(rng: np.random.Generator, items):
    """One of the items at random."""
    return items[int(rng.integers(len(items)))]


def some(rng: np.random.Generator, items: list, count: int) -> list:
    """Up to `count` of the items in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def different_names(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """`count` different (colour, shape) in random order."""
    picks = rng.choice(len(COLOURS) * len(SHAPES), count, replace=False)
    return [(list(COLOURS)[pick // len(SHAPES)], SHAPES[pick % len(SHAPES)]) for pick in picks]


def _held_out(combination: list) -> bool:
    return zlib.crc32(json.dumps(sorted(combination)).encode()) % HELD_OUT_EVERY == 0


def allowed_combination(split: str, draw: Callable[[], list]) -> list:
    """The first of `draw`'s combinations that may appear in the split. One kind of object may appear in both.

    Let `draw` give combinations of one length: shorter ones are more often allowed.
    """
    while True:
        combination = draw()
        if len(set(combination)) == 1 or _held_out(combination) == (split == "val"):
            return combination


def still_scene(rng: np.random.Generator, names: list[tuple[str, str]], width: int = SIDE, height: int = SIDE) -> Scene:
    """A still scene: every thing in a cell and a column of its own."""
    columns, rows = width // CELL, height // CELL
    things = []
    for (colour, shape), column in zip(names, rng.permutation(columns)):
        size = rng.uniform(22, CELL - 2)
        jitter = (CELL - size) / 2
        x = (column + 0.5) * CELL + rng.uniform(-jitter, jitter)
        y = (rng.integers(rows) + 0.5) * CELL + rng.uniform(-jitter, jitter)
        things.append(Thing(colour, shape, float(x), float(y), float(size)))
    return Scene(sorted(things, key=lambda thing: thing.x), *_background(rng), width, height)


def _background(rng: np.random.Generator) -> tuple[str, int, int]:
    """Name of a background, its grey value, and the seed of its noise."""
    background = pick(rng, list(BACKGROUNDS))
    return background, pick(rng, BACKGROUNDS[background]), int(rng.integers(2**31))


def image_scene(rng: np.random.Generator, split: str, counts: tuple[float, ...] = (0.25, 0.4, 0.25, 0.1)) -> Scene:
    """A still scene of different things; `counts` are the probabilities of 1, 2, ... of them."""
    number = 1 + rng.choice(len(counts), p=counts)
    names = allowed_combination(split, lambda: different_names(rng, number))
    return still_scene(rng, names, *size_for(rng, number))


def size_for(rng: np.random.Generator, number: int) -> tuple[int, int]:
    """Width and height with a column for each of `number` things; tiles of the tiny model fit these sizes exactly."""
    sizes = [(SIDE, SIDE)] * 17 + [(140, SIDE), (SIDE, 140), (140, 140)]
    return pick(rng, [size for size in sizes if size[0] // CELL >= number])


def video_scene(rng: np.random.Generator, split: str) -> Scene:
    """A scene with a thing that moves along an axis for one to two seconds and, every other time, one that does not."""
    number = 1 + (rng.random() < 0.5)

    def draw() -> list:
        return [*different_names(rng, number), (pick(rng, list(DIRECTIONS)),)]

    *names, (direction,) = allowed_combination(split, draw)
    num_frames = int(rng.integers(2, 5)) * FPS // 2
    horizontal = direction in ("left", "right")

    def within(cell: int, size: float) -> float:
        """Where along a side the centre of a thing is that is inside of the cell of this number; in pixels."""
        jitter = (CELL - size) / 2
        return float((cell + 0.5) * CELL + rng.uniform(-jitter, jitter))

    def place(name: tuple[str, str], along: int, across: int) -> Thing:
        """The thing in a cell, by its number along the axis of the motion and across it."""
        size = float(rng.uniform(22, CELL - 2))
        x, y = within(along, size), within(across, size)
        return Thing(*name, *((x, y) if horizontal else (y, x)), size)

    # The moving thing goes from the cell in the middle to the one at a side; the still one is in a corner. So wherever
    # a small model looks, what it sees of the moving thing is nearer to where it goes (docs/tried.md).
    last = SIDE // CELL - 1
    middle, end = last // 2, 0 if direction in ("left", "up") else last
    moving = place(names[0], middle, middle)
    moving.direction = direction
    travel = abs(within(end, moving.size) - (moving.x if horizontal else moving.y))
    things = [moving, *(place(name, *(last * int(n) for n in rng.integers(2, size=2))) for name in names[1:])]
    return Scene(things, *_background(rng), num_frames=num_frames, speed=float(travel / (num_frames - 1)))


def half_seconds(scene: Scene) -> list[float]:
    """The times of the labels: multiples of 0.5 s before the end."""
    return [half / 2 for half in range(scene.num_frames * 2 // FPS)]


def matching(scene: Scene, label: str) -> list[Thing]:
    """Things called by a label: a name ("red circle"), a shape, a colour ("red shape") or "shape"."""
    *colour, shape = label.split()
    return [t for t in scene.things if shape in (t.shape, "shape") and colour in ([], [t.colour])]


def labels_of(scene: Scene) -> list[str]:
    """What can be pointed at: every thing by its name, the shapes there are, all."""
    return list(dict.fromkeys([*(t.name for t in scene.things), *(t.shape for t in scene.things), "shape"]))
