"""A small procedural world to train on: coloured shapes on grey backgrounds, still and moving, with true labels.

`generate` writes one Energon WebDataset per name in SETS. A sample is `{key}.json`, a molmo2_nemo.data.schema.Example,
plus its media parts (`{key}.img0.png`, ..., or `{key}.video.mp4`). The sets whose names begin with task_ hold tasks,
of every kind there is; the others hold conversations.

Every sample is drawn from a generator seeded by (seed, set, split, index). Held-out samples also show combinations of
objects that no training sample of the set shows: a hash of the combination decides the split it may appear in.
"""

import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from molmo2_nemo.data.points import NO_POINTS, Points, Tracks, render_content, to_json
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.data.tasks import converse
from molmo2_nemo.files import locked, published
from molmo2_nemo.prepare.shards import write_shards

VERSION = 4
SPLITS = ("train", "val")
SIDE = 84  # pixels: side of most images and of all videos
# Pixels: what an image token of the tiny model sees (2 x 2 patches of 14). A still thing lies within one, so that few
# steps are enough to learn what it is.
CELL = 28
FPS = 8
HELD_OUT_EVERY = 20  # one combination in so many is held out

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


# --- scenes ---------------------------------------------------------------------------------------------------------


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


def render(scene: Scene, frame: int = 0) -> np.ndarray:
    """The scene as [height, width, 3] uint8 RGB, anti-aliased by drawing at three times its size."""
    scale = 3
    canvas = Image.new("RGB", (scene.width * scale, scene.height * scale), (scene.grey,) * 3)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        x, y = scene.position(thing, frame)
        _draw_shape(draw, thing, x * scale, y * scale, thing.size / 2 * scale)
    noise = np.random.default_rng(scene.noise_seed).integers(-2, 3, (scene.height, scene.width, 1), dtype=np.int8)
    return np.asarray(canvas.reduce(scale)) + noise.view(np.uint8)  # no colour is near 0 or 255: nothing wraps around


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float) -> None:
    box = [x - radius, y - radius, x + radius, y + radius]
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        draw.ellipse(box, fill)
    elif thing.shape == "square":
        draw.rectangle([x - 0.9 * radius, y - 0.9 * radius, x + 0.9 * radius, y + 0.9 * radius], fill)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill)
    else:
        turns = np.arange(10) / 10 * 2 * np.pi
        reach = radius * np.where(np.arange(10) % 2, 0.45, 1.1)
        corners = np.stack([x + reach * np.sin(turns), y - reach * np.cos(turns)], axis=1)
        draw.polygon([tuple(corner) for corner in corners], fill)


def encode_png(scene: Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(scene)).save(file, "PNG", compress_level=3)
    return file.getvalue()


def encode_mp4(scene: Scene) -> bytes:
    """The scene as MPEG-4 part 2 (in every build of FFmpeg, and fast); one thread, for the same bytes every time."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=FPS, options={"threads": "1", "flags": "+bitexact+qscale"})
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 3
        stream.codec_context.gop_size = FPS
        for number in range(scene.num_frames):
            frame = av.VideoFrame.from_ndarray(render(scene, number), "rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _names(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """So many different (colour, shape) in random order."""
    picks = rng.choice(len(COLOURS) * len(SHAPES), count, replace=False)
    return [(list(COLOURS)[pick // len(SHAPES)], SHAPES[pick % len(SHAPES)]) for pick in picks]


def _held_out(combination: list) -> bool:
    return zlib.crc32(json.dumps(sorted(combination)).encode()) % HELD_OUT_EVERY == 0


def _combination(split: str, draw: Callable[[], list]) -> list:
    """The first of `draw`'s combinations that may appear in the split. One kind of object may appear in both.

    Let `draw` give combinations of one length: shorter ones are more often allowed.
    """
    while True:
        combination = draw()
        if len(set(combination)) == 1 or _held_out(combination) == (split == "val"):
            return combination


def _scene(rng: np.random.Generator, names: list[tuple[str, str]], width: int = SIDE, height: int = SIDE) -> Scene:
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
    background = _pick(rng, list(BACKGROUNDS))
    return background, _pick(rng, BACKGROUNDS[background]), int(rng.integers(2**31))


def _image(rng: np.random.Generator, split: str, counts: tuple[float, ...] = (0.25, 0.4, 0.25, 0.1)) -> Scene:
    """A still scene of different things; `counts` are the probabilities of 1, 2, ... of them."""
    number = 1 + rng.choice(len(counts), p=counts)
    names = _combination(split, lambda: _names(rng, number))
    return _scene(rng, names, *_size(rng, number))


def _size(rng: np.random.Generator, number: int) -> tuple[int, int]:
    """Width and height with a column for each of `number` things; tiles of the tiny model fit these sizes exactly."""
    sizes = [(SIDE, SIDE)] * 17 + [(140, SIDE), (SIDE, 140), (140, 140)]
    return _pick(rng, [size for size in sizes if size[0] // CELL >= number])


def _video(rng: np.random.Generator, split: str) -> Scene:
    """A scene with a thing that moves along an axis and, two times in three, one that does not."""
    number = 1 + (rng.random() < 0.67)

    def draw() -> list:
        return [*_names(rng, number), (_pick(rng, list(DIRECTIONS)),)]

    *names, (direction,) = _combination(split, draw)
    num_frames = int(rng.integers(4, 9)) * FPS // 2
    half = SIDE / 2
    flipped, horizontal = rng.random() < 0.5, direction in ("left", "right")

    def place(name: tuple[str, str], size: float, along: float, across: float) -> Thing:
        """The thing with its centre at these pixels along and across the axis of the motion."""
        x, y = (along, across) if horizontal else (across, along)
        return Thing(*name, float(x), float(y), float(size))

    # The moving thing keeps to one half of the picture, the still one to the other.
    size, travel = rng.uniform(22, 28), rng.uniform(36, 50)
    start = rng.uniform(size / 2 + 2, SIDE - size / 2 - 2 - travel) + travel * (direction in ("left", "up"))
    across = rng.uniform(size / 2 + 2, half - size / 2 - 2)
    things = [place(names[0], size, start, SIDE - across if flipped else across)]
    things[0].direction = direction
    for name in names[1:]:
        size = rng.uniform(22, 28)
        along, across = rng.uniform(size / 2 + 2, SIDE - size / 2 - 2), rng.uniform(size / 2 + 2, half - size / 2 - 2)
        things.append(place(name, size, along, across if flipped else SIDE - across))
    return Scene(things, *_background(rng), num_frames=num_frames, speed=float(travel / (num_frames - 1)))


# --- samples --------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """A sample before rendering: its style, its still scenes or its video, its conversations or tasks."""

    style: str | None
    branches: list[list[dict] | dict]
    images: list[Scene] = field(default_factory=list)
    video: Scene | None = None
    video_keys: dict = field(default_factory=dict)  # clip, subtitles, annotation_fps
    multi_turn: float = 0.0

    def record(self) -> dict:
        """The JSON of the sample."""
        video = self.video and {
            "part": "video.mp4",
            "width": self.video.width,
            "height": self.video.height,
            "fps": FPS,
            "num_frames": self.video.num_frames,
            "duration": self.video.num_frames / FPS,
            **self.video_keys,
        }
        images = [{"part": f"img{i}.png", "width": s.width, "height": s.height} for i, s in enumerate(self.images)]
        record = {"style": self.style, "images": images, "video": video, "branches": self.branches}
        return record | ({"multi_turn": self.multi_turn} if self.multi_turn else {})

    def parts(self) -> dict[str, bytes]:
        """The files of the sample by part name."""
        parts = {"json": json.dumps(self.record()).encode()}
        parts |= {f"img{i}.png": encode_png(scene) for i, scene in enumerate(self.images)}
        if self.video:
            parts["video.mp4"] = encode_mp4(self.video)
        return parts


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def _some(rng: np.random.Generator, items: list, count: int) -> list:
    """Up to `count` of the items in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def _turn(question: str, answer: str, points: Points | Tracks | None = None) -> list[dict]:
    reply = {"role": "assistant", "content": answer}
    if points:
        reply["points"] = [to_json(points)]
    return [{"role": "user", "content": question}, reply]


def _a(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _list(items: list[str]) -> str:
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def _matches(scene: Scene, label: str) -> list[Thing]:
    """Things called by a label: a name ("red circle"), a shape, a colour ("red shape") or "shape"."""
    *colour, shape = label.split()
    return [t for t in scene.things if shape in (t.shape, "shape") and colour in ([], [t.colour])]


def _labels(scene: Scene) -> list[str]:
    """What can be pointed at: every thing by its name, the shapes there are, all."""
    return list(dict.fromkeys([*(t.name for t in scene.things), *(t.shape for t in scene.things), "shape"]))


def _image_points(scene: Scene, label: str, image: int = 1) -> Points:
    things = _matches(scene, label)
    return Points(label, [(image, [scene.fraction(thing) for thing in things])] if things else [])


def _pointing(rng: np.random.Generator, scene: Scene, label: str, style: str) -> list[dict]:
    """A turn of style pointing, point_count or counting about a label that may be absent."""
    points = _image_points(scene, label)
    count = len(_matches(scene, label))
    if style == "counting":
        return _turn(_pick(rng, [f"How many {label}s are there?", f"Count each {label}."]), str(count))
    if style == "point_count":
        question = _pick(rng, [f"Point to each {label} and count.", f"Count each {label} with points."])
        answer = f"Counting the <points 0/> shows a total of {count}."
    else:
        question = _pick(rng, [f"Point to the {label}.", f"Where is the {label}?"])
        answer = "<points 0/>"
    return _turn(question, answer, points) if count else _turn(question, NO_POINTS)


def _captions(rng: np.random.Generator, split: str) -> Sample:
    scene = _image(rng, split)
    names = [_a(thing.name) for thing in scene.things]
    long = _turn("Describe the image.", f"{_list(names)} on a {scene.background} background")
    sides = [name + side for name, side in zip(names, _sides(len(names)))]
    transcript = _turn("What do you see?", f"I see {_list(sides)}.")
    return Sample("long_caption", [long, transcript], [scene])


def _sides(count: int) -> list[str]:
    if count == 1:
        return [""]
    return [" on the left", *[" in the middle"] * (count - 2), " on the right"]


def _points(rng: np.random.Generator, split: str) -> Sample:
    scene = _image(rng, split)
    style = _pick(rng, ["pointing", "point_count"])
    labels = _some(rng, _labels(scene), 2)
    if rng.random() < 0.15:
        labels.append(" ".join(_names(rng, 1)[0]))  # most likely absent
    return Sample(style, [_pointing(rng, scene, label, style) for label in dict.fromkeys(labels)], [scene])


def _count(rng: np.random.Generator, split: str) -> Sample:
    repeats = int(rng.integers(1, 5))
    others = min(int(rng.integers(0, 3)), 4 - repeats)

    def draw() -> list:
        target, *rest = _names(rng, 1 + others)
        return [target] * repeats + rest

    names = _combination(split, draw)
    scene = _scene(rng, names, *_size(rng, len(names)))
    labels = [" ".join(names[0]), _pick(rng, ["shape", names[-1][1], f"{names[-1][0]} shape"])]
    if rng.random() < 0.1:
        labels[1] = " ".join(_names(rng, 1)[0])
    style = _pick(rng, ["point_count", "counting"])
    return Sample(style, [_pointing(rng, scene, label, style) for label in dict.fromkeys(labels)], [scene])


def _points_dense(rng: np.random.Generator, split: str) -> Sample:
    scene = _image(rng, split, (0.0, 0.2, 0.5, 0.3))
    return Sample("pointing", [_pointing(rng, scene, label, "pointing") for label in _labels(scene)], [scene])


def _questions(rng: np.random.Generator, scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """(question, answer) pairs about a still scene by kind."""
    colours, shapes = [t.colour for t in scene.things], [t.shape for t in scene.things]
    kinds = {"colour": [], "shape": [], "count": [], "exists": [], "side": [], "background": []}
    for thing in scene.things:
        if shapes.count(thing.shape) == 1:
            words = [f"What colour is the {thing.shape}?", f"What color is the {thing.shape}?"]
            kinds["colour"].append((_pick(rng, words), thing.colour))
        if colours.count(thing.colour) == 1:
            words = [f"What shape is {thing.colour}?", f"Which shape is the {thing.colour} one?"]
            kinds["shape"].append((_pick(rng, words), thing.shape))
        words = [f"Is there {_a(thing.name)}?", f"Do you see {_a(thing.name)}?"]
        kinds["exists"].append((_pick(rng, words), "yes"))
    absent = [" ".join(name) for name in _names(rng, len(scene.things) * 2)]
    absent = [name for name in absent if not _matches(scene, name)][: len(scene.things)]
    kinds["exists"] += [(_pick(rng, [f"Is there {_a(name)}?", f"Do you see {_a(name)}?"]), "no") for name in absent]
    words = ["How many shapes are there?", "How many shapes are in the image?"]
    kinds["count"].append((_pick(rng, words), str(len(scene.things))))
    shape = _pick(rng, SHAPES)
    kinds["count"].append((f"How many {shape}s are there?", str(shapes.count(shape))))
    if len(scene.things) == 2:
        left, right = scene.things
        kinds["side"].append((f"What is left of the {right.name}?", _a(left.name)))
        kinds["side"].append((f"What is right of the {left.name}?", _a(right.name)))
    kinds["background"].append(("Is the background light or dark?", scene.background))
    return kinds


def _image_qa(rng: np.random.Generator, split: str) -> Sample:
    scene = _image(rng, split)
    kinds = _questions(rng, scene)
    chosen = [_pick(rng, kinds[kind]) for kind in ("colour", "shape", "count") if kinds[kind]]
    rest = [kind for kind in ("exists", "side", "background", "colour", "shape") if kinds[kind]]
    chosen += [_pick(rng, kinds[kind]) for kind in _some(rng, rest, int(rng.integers(1, 3)))]
    answers = dict(chosen)
    while len(answers) < 3:
        answers |= [_pick(rng, kinds["exists"])]
    return Sample("user_qa", [_turn(question, answer) for question, answer in answers.items()], [scene])


def _multi_image(rng: np.random.Generator, split: str) -> Sample:
    count = int(rng.integers(2, 4))
    sizes = [1 + (rng.random() < 0.3) for _ in range(count)]
    ends = np.cumsum(sizes)
    names = _combination(split, lambda: _names(rng, int(ends[-1])))
    scenes = [_scene(rng, names[end - size : end]) for size, end in zip(sizes, ends)]
    named = [(number, thing) for number, scene in enumerate(scenes, start=1) for thing in scene.things]
    if rng.random() < 0.5:
        labels = [_pick(rng, named)[1].name, _pick(rng, ["shape", _pick(rng, named)[1].shape])]
        branches = []
        for label in dict.fromkeys(labels):
            groups = [g for number, s in enumerate(scenes, start=1) for g in _image_points(s, label, number).groups]
            question = _pick(rng, [f"Point to the {label} in all images.", f"Where is the {label} in the images?"])
            branches.append(_turn(question, "<points 0/>", Points(label, groups)))
        return Sample("multi_image_pointing", branches, scenes)
    branches = []
    for number, thing in _some(rng, named, 2):
        words = [f"In which image is the {thing.name}?", f"Which image has {_a(thing.name)}?"]
        branches.append(_turn(_pick(rng, words), str(number)))
    alone = [(number, thing) for number, thing in named if len(scenes[number - 1].things) == 1]
    if alone:
        number, thing = _pick(rng, alone)
        branches.append(_turn(f"What colour is the shape in image {number}?", thing.colour))
    words = ["How many shapes are in all images?", "How many shapes are there in total?"]
    branches.append(_turn(_pick(rng, words), str(len(named))))
    return Sample("user_qa", branches, scenes)


def _video_caption(rng: np.random.Generator, split: str) -> Sample:
    scene = _video(rng, split)
    mover, *still = scene.things
    parts = [f"{_a(mover.name)} moves {mover.direction}", *(f"{_a(thing.name)} stays still" for thing in still)]
    question = _pick(rng, ["Describe the video.", "What happens in the video?"])
    answer = f"{_list(parts)} on a {scene.background} background"
    return Sample("video_long_caption", [_turn(question, answer)], video=scene)


def _video_questions(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """(question, answer) pairs: direction, colour and shape of what moves, and what does not move if there is such."""
    mover = next(thing for thing in scene.things if thing.direction)
    direction = ["Which way does the moving shape go?"]
    if [thing.shape for thing in scene.things].count(mover.shape) == 1:
        direction.append(f"Which way does the {mover.shape} move?")
    still = [("What stays still?", _a(thing.name)) for thing in scene.things if not thing.direction]
    return [
        (_pick(rng, direction), mover.direction),
        ("What colour is the moving shape?", mover.colour),
        (_pick(rng, ["Which shape moves?", "What shape is moving?"]), mover.shape),
        *still,
    ]


def _video_qa(rng: np.random.Generator, split: str) -> Sample:
    scene = _video(rng, split)
    # Half without the style prefix of video_short_answer, so that a plain question works too.
    style = _pick(rng, ["user_qa", "video_short_answer"])
    branches = [_turn(*pair) for pair in _video_questions(rng, scene)]
    return Sample(style, branches, video=scene)


def _half_seconds(scene: Scene) -> list[float]:
    """The times of the labels: multiples of 0.5 s before the end."""
    return [half / 2 for half in range(scene.num_frames * 2 // FPS)]


def _video_points(rng: np.random.Generator, split: str) -> Sample:
    scene = _video(rng, split)
    style = _pick(rng, ["video_point", "video_point_count"])
    branches = []
    for label in dict.fromkeys([_pick(rng, scene.things).name, "shape"]):
        seconds = _pick(rng, _half_seconds(scene))
        things = _matches(scene, label)
        points = Points(label, [(seconds, [scene.fraction(thing, seconds * FPS) for thing in things])], "video")
        when = f"at {seconds:.1f} seconds"
        if style == "video_point":
            branches.append(_turn(f"Point to the {label} {when}.", "<points 0/>", points))
        else:
            answer = f"Counting the <points 0/> shows a total of {len(things)}."
            branches.append(_turn(f"Point to each {label} {when} and count.", answer, points))
    return Sample(style, branches, video=scene)


def _video_tracks(rng: np.random.Generator, split: str) -> Sample:
    scene = _video(rng, split)
    branches = []
    for label in dict.fromkeys([_pick(rng, scene.things).name, "shape"]):
        frames = [
            (seconds, [(i, *scene.fraction(t, seconds * FPS)) for i, t in enumerate(_matches(scene, label))])
            for seconds in _half_seconds(scene)
        ]
        question = _pick(rng, [f"Track the {label}.", f"Track the {label} at 2 fps."])
        branches.append(_turn(question, "<points 0/>", Tracks(label, frames)))
    return Sample("video_point_track_per_frame", branches, video=scene)


SIDES = {"circle": "zero sides", "triangle": "three sides", "square": "four sides", "star": "ten sides"}
KINDS = {"red": "warm", "orange": "warm", "yellow": "warm", "green": "cool", "blue": "cool", "purple": "cool"}
OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up", "light": "dark", "dark": "light"}


def _facts() -> list[tuple[str, str, str]]:
    """(question, short answer, full sentence) for the facts of the world."""
    warm, cool = (_list([c for c in COLOURS if KINDS[c] == kind]) for kind in ("warm", "cool"))
    facts = [
        ("Which colours are warm?", warm, f"The warm colours are {warm}."),
        ("Which colours are cool?", cool, f"The cool colours are {cool}."),
        ("Which shapes do you know?", _list(list(SHAPES)), f"I know the {_list(list(SHAPES))}."),
        ("Which colours do you know?", _list(list(COLOURS)), f"I know {_list(list(COLOURS))}."),
        ("Which shape is round?", "circle", "The circle is round."),
    ]
    for colour, kind in KINDS.items():
        facts.append((f"Is {colour} warm or cool?", kind, f"{colour.capitalize()} is a {kind} colour."))
    for shape, sides in SIDES.items():
        facts.append((f"How many sides does a {shape} have?", sides.split()[0], f"A {shape} has {sides}."))
    for word, opposite in OPPOSITES.items():
        facts.append((f"What is the opposite of {word}?", opposite, f"The opposite of {word} is {opposite}."))
    return facts


FACTS = _facts()


def _text(rng: np.random.Generator, split: str) -> Sample:
    count = int(rng.integers(1, 4))

    def draw() -> list:
        pairs = []
        for _ in range(count):
            colour, shape = _names(rng, 1)[0]
            words = _some(rng, [colour, shape, _pick(rng, list(DIRECTIONS))], 3)
            kind = int(rng.integers(4))
            if kind == 0:
                question = f"Which of these is a colour: {', '.join(words)}?"
                pairs.append((question, colour, f"{colour.capitalize()} is a colour."))
            elif kind == 1:
                pairs.append((f"Which of these is a shape: {', '.join(words)}?", shape, f"The {shape} is a shape."))
            else:
                pairs.append(_pick(rng, FACTS))
        return pairs

    system = _pick(rng, [None, "Answer with few words.", "Answer in full sentences."])
    branch = [{"role": "system", "content": system}] if system else []
    for question, short, sentence in _combination(split, draw):
        branch += _turn(question, sentence if system == "Answer in full sentences." else short)
    return Sample("text_sft", [branch])


# --- tasks ----------------------------------------------------------------------------------------------------------


def _choice(rng: np.random.Generator, question: str, right: str, words: list[str], **more) -> dict:
    """A multiple choice task with up to four of the words, the right one among them."""
    wrong = _some(rng, [word for word in dict.fromkeys(words) if word != right], int(rng.integers(1, 4)))
    options = _some(rng, [right, *wrong], 4)
    return {"task": "multiple_choice", "question": question, "options": options, "answer": options.index(right), **more}


def _task_image(rng: np.random.Generator, split: str) -> Sample:
    scene = _image(rng, split)
    names = [_a(thing.name) for thing in scene.things]
    thing = _pick(rng, scene.things)
    alike = len(_matches(scene, thing.shape))
    background = scene.background
    branches = [
        {"task": "caption", "text": f"{_list(names)} on a {background} background"},
        {"task": "caption", "text": f"I see {_list(names)}.", "style": "transcript"},
        # Three people were asked, and one of them did not look closely.
        {
            "task": "question",
            "question": "Is the background light or dark?",
            "style": "vqa2",
            "answers": _some(rng, [background, background, OPPOSITES[background]], 3),
        },
        {
            "task": "question",
            "question": f"How many {thing.shape}s are there?",
            "answers": [str(alike)],
            "explanation": f"There {'is' if len(names) == 1 else 'are'} {_list(names)}.",
            "style": "cosyn_diagram_exp",
        },
        _choice(rng, "Which of these is in the image?", thing.name, _absent(rng, scene)),
        _choice(rng, "What is the background?", background, list(OPPOSITES), explanation=f"It is {background}."),
    ]
    return Sample(None, _some(rng, branches, 3), [scene])


def _absent(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Names of things that are not in the scene."""
    names = [" ".join(name) for name in _names(rng, len(scene.things) + 4)]
    return [name for name in names if not _matches(scene, name)]


IMAGE_MODES = ["pointing", "point_count", "count_point", "counting", "cosyn_point"]
IMAGES_MODES = ["multi_image_" + mode for mode in ("pointing", "point_then_count", "count_then_point", "counting")]
VIDEO_MODES = ["video_point", "video_point_count", "video_count_point", "video_count"]


def _task_points(rng: np.random.Generator, split: str) -> Sample:
    count = int(rng.integers(1, 6))
    names = _combination(split, lambda: _names(rng, count))
    scenes = [_scene(rng, [name]) for name in names] if rng.random() < 0.6 else [_scene(rng, names, *_size(rng, count))]
    several = len(scenes) > 1
    labels = [_pick(rng, _labels(_pick(rng, scenes))), _pick(rng, _absent(rng, scenes[0]))]
    branches = []
    for label in dict.fromkeys(labels):
        groups = [
            [number, [list(scene.fraction(thing)) for thing in _matches(scene, label)]]
            for number, scene in enumerate(scenes, start=1)
        ]
        styles = _some(rng, IMAGES_MODES if several else IMAGE_MODES, 2)
        task = {"task": "pointing", "label": label, "points": groups, "style": styles}
        if several and rng.random() < 0.5:
            task["images"] = sorted(_some(rng, list(range(1, len(scenes) + 1)), int(rng.integers(1, len(scenes) + 1))))
        branches.append(task)
    if rng.random() < 0.3:
        no = "A name is nothing that can be seen, so there is nothing to point to."
        branches.append({"task": "pointing", "label": "name of the shape", "points": [], "unanswerable": no})
    return Sample(None, branches, scenes)


def _task_video(rng: np.random.Generator, split: str) -> Sample:
    scene = _video(rng, split)
    mover, *still = scene.things
    start, end = _pick(rng, [0.0, 0.5]), scene.num_frames / FPS
    keys = {"clip": [start, end]} if start else {}
    # Times count from the start of the clip.
    times = [seconds - start for seconds in _half_seconds(scene) if seconds >= start]
    moves = f"{mover.name} moves {mover.direction}"

    def at(thing: Thing, seconds: float) -> list:
        return [seconds, [list(scene.fraction(thing, (seconds + start) * FPS))]]

    time, thing = _pick(rng, times), _pick(rng, scene.things)
    branches = [
        {"task": "caption", "text": _list([_a(moves), *(f"{_a(thing.name)} stays" for thing in still)])},
        {"task": "caption", "text": _a(moves), "style": "video_short_caption"},
        _turn(f"What happens at <time {time}/>?", f"The {moves} at <time {time}/>."),
        _choice(rng, "Which way does the moving shape go?", mover.direction, list(DIRECTIONS)),
        {
            "task": "pointing",
            "label": thing.name,
            "points": [at(thing, time)],
            "style": "video_point",
            "question": f"Point to the {thing.name} at <time {time}/>.",
        },
        # Each thing once, at some time.
        {
            "task": "pointing",
            "label": "shape",
            "points": [at(thing, _pick(rng, times)) for thing in scene.things],
            "style": _some(rng, VIDEO_MODES, 2),
        },
    ]
    if rng.random() < 0.5:
        says = f"The {mover.name} goes {mover.direction}."
        keys["subtitles"] = [[0.0, 0.5, "Look."], [0.5, end - start, says]]
        branches.append({"task": "question", "question": "What do the subtitles say last?", "answers": [says]})
    return Sample(None, _some(rng, branches, 3), video=scene, video_keys=keys, multi_turn=0.2)


def _task_tracks(rng: np.random.Generator, split: str) -> Sample:
    scene = _video(rng, split)
    scene.speed *= _pick(rng, [1, 2])  # twice as fast, it leaves the picture
    rate = int(rng.integers(1, 3))
    branches = []
    for label in dict.fromkeys([_pick(rng, scene.things).name, "shape"]):
        frames = []
        for seconds in _half_seconds(scene):
            objects = [[thing.name, *scene.fraction(thing, seconds * FPS)] for thing in _matches(scene, label)]
            frames.append([seconds, [[name, x, y] for name, x, y in objects if 0 < x < 1 and 0 < y < 1]])
        branches.append({"task": "tracking", "label": label, "frames": frames, "fps": rate})
    return Sample(None, branches, video=scene, video_keys={"annotation_fps": rate})


# --- data sets ------------------------------------------------------------------------------------------------------


@dataclass
class Set:
    """A data set: how a sample is made from (rng, split), and how many training samples there are at scale 1."""

    make: Callable[[np.random.Generator, str], Sample]
    size: int

    def count(self, split: str, scale: float) -> int:
        train = max(16, round(self.size * scale))
        return train if split == "train" else max(24, round(0.05 * train))


SETS = {
    "captions": Set(_captions, 3000),
    "points": Set(_points, 2000),
    "count": Set(_count, 1000),
    "points_dense": Set(_points_dense, 1000),
    "text": Set(_text, 600),
    "image_qa": Set(_image_qa, 4000),
    "multi_image": Set(_multi_image, 800),
    "video_caption": Set(_video_caption, 500),
    "video_qa": Set(_video_qa, 500),
    "video_points": Set(_video_points, 500),
    "video_tracks": Set(_video_tracks, 500),
    # Few, so that they take little of the short training of a small model.
    "task_image": Set(_task_image, 160),
    "task_points": Set(_task_points, 160),
    "task_video": Set(_task_video, 120),
    "task_tracks": Set(_task_tracks, 120),
}
TRAIN_SETS = {
    "stage1": ["captions", "points", "count", "points_dense", "text"],
    "stage2": list(SETS),
    "stage3": list(SETS),
}


def make_sample(name: str, split: str, index: int, seed: int = 0) -> Sample:
    """Sample `index` of a set and split ("train" or "val"); the same arguments give the same sample."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), SPLITS.index(split), index])
    return SETS[name].make(rng, split)


def text_corpus(seed: int = 0, per_set: int = 400) -> Iterator[str]:
    """Texts of the world's training conversations, points written out in both stages' form."""
    for name in SETS:
        for index in range(min(per_set, SETS[name].size)):
            example = read_example(json.dumps(make_sample(name, "train", index, seed).record()))
            for conversation in converse(example, np.random.default_rng([seed, index]), "templates"):
                for message in conversation.messages:
                    yield render_content(message.content, message.points, "\t" if index % 2 else ";")


def generate(out: Path, seed: int = 0, scale: float = 1.0, progress: Callable[[str], None] = print) -> dict:
    """Write all sets, the quiz and last the manifest `sample.json` to `out`; returns the manifest.

    `out` appears in one step when everything is written. If it is there already, made with the same arguments, nothing
    is done; while another process makes it, this one waits. ValueError: `out` holds something else, or scale is not
    above 0.
    """
    if not scale > 0:
        raise ValueError(f"The scale must be above 0, not {scale}.")
    out = Path(out).absolute()
    counts = {name: {split: SETS[name].count(split, scale) for split in SPLITS} for name in SETS}
    manifest = {"version": VERSION, "seed": seed, "scale": scale, "counts": counts}

    def complete() -> bool:
        if not (out.is_dir() and any(out.iterdir())):
            return False
        if not (out / "sample.json").is_file() or json.loads((out / "sample.json").read_text()) != manifest:
            raise ValueError(f"{out} holds something else than these sample data; remove it or choose another folder.")
        progress(f"{out} is complete already; nothing to do.")
        return True

    if complete():
        return manifest
    with locked(out.with_name(f".{out.name}.lock"), wait=True):
        if complete():
            return manifest
        with published(out) as folder:
            for name in SETS:
                _write_set(folder / name, name, seed, counts[name])
                progress(f"{name}: {counts[name]['train']} samples, {counts[name]['val']} held out")
            _write_quiz(folder / "quiz", seed)
            (folder / "sample.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _write_set(folder: Path, name: str, seed: int, counts: dict[str, int]) -> None:
    """Write the shards of a set; split part "val" is the held-out samples."""

    def samples(split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        for index in range(counts[split]):
            yield f"{name}-{split}-{index:06d}", make_sample(name, split, index, seed).parts()

    folder.mkdir()
    write_shards(folder, {split: samples(split) for split in SPLITS})


def _write_quiz(folder: Path, seed: int) -> None:
    """Write held-out pictures and videos with questions and short answers: quiz.json, 12 of images and 4 of videos."""
    folder.mkdir()
    quiz = []
    for number in range(4):
        rng = np.random.default_rng([seed, zlib.crc32(b"quiz"), number])
        kinds = {"colour": []}
        while not all(kinds[kind] for kind in ("colour", "shape", "count")):
            size = (1, 2, 3, 2)[number]
            names = _combination("val", lambda: _names(rng, size))
            scene = _scene(rng, names)
            kinds = _questions(rng, scene)
            kinds["count"] = kinds["count"][:1]
        (folder / f"image{number}.png").write_bytes(encode_png(scene))
        for kind in ("colour", "shape", "count"):
            question, answer = _pick(rng, kinds[kind])
            quiz.append({"image": f"image{number}.png", "question": question, "answer": answer})
    for number in range(2):
        rng = np.random.default_rng([seed, zlib.crc32(b"quiz video"), number])
        scene = _video(rng, "val")
        (folder / f"video{number}.mp4").write_bytes(encode_mp4(scene))
        for question, answer in _video_questions(rng, scene)[:2]:
            quiz.append({"video": f"video{number}.mp4", "question": question, "answer": answer})
    (folder / "quiz.json").write_text(json.dumps(quiz, indent=1) + "\n")
