"""Samples of the sample world that are conversations: captions, points, questions, tracks, text."""

import numpy as np

from molmo2_nemo.data.points import NO_POINTS, Points, Tracks
from molmo2_nemo.prepare.sample_world.sample import WorldSample, listed, turn, with_article
from molmo2_nemo.prepare.sample_world.scenes import (
    COLOURS,
    DIRECTIONS,
    FPS,
    SHAPES,
    Scene,
    allowed_combination,
    different_names,
    half_seconds,
    image_scene,
    labels_of,
    matching,
    pick,
    size_for,
    some,
    still_scene,
    video_scene,
)


def _image_points(scene: Scene, label: str, image: int = 1) -> Points:
    things = matching(scene, label)
    return Points(label, [(image, [scene.fraction(thing) for thing in things])] if things else [])


def _pointing(rng: np.random.Generator, scene: Scene, label: str, style: str) -> list[dict]:
    """A turn of style pointing, point_count or counting about a label that may be absent."""
    points = _image_points(scene, label)
    count = len(matching(scene, label))
    if style == "counting":
        return turn(pick(rng, [f"How many {label}s are there?", f"Count each {label}."]), str(count))
    if style == "point_count":
        question = pick(rng, [f"Point to each {label} and count.", f"Count each {label} with points."])
        answer = f"Counting the <points 0/> shows a total of {count}."
    else:
        question = pick(rng, [f"Point to the {label}.", f"Where is the {label}?"])
        answer = "<points 0/>"
    return turn(question, answer, points) if count else turn(question, NO_POINTS)


def make_captions(rng: np.random.Generator, split: str) -> WorldSample:
    scene = image_scene(rng, split)
    names = [with_article(thing.name) for thing in scene.things]
    long = turn("Describe the image.", f"{listed(names)} on a {scene.background} background")
    sides = [name + side for name, side in zip(names, _sides(len(names)))]
    transcript = turn("What do you see?", f"I see {listed(sides)}.")
    return WorldSample("long_caption", [long, transcript], [scene])


def _sides(count: int) -> list[str]:
    if count == 1:
        return [""]
    return [" on the left", *[" in the middle"] * (count - 2), " on the right"]


def make_points(rng: np.random.Generator, split: str) -> WorldSample:
    scene = image_scene(rng, split)
    style = pick(rng, ["pointing", "point_count"])
    labels = some(rng, labels_of(scene), 2)
    if rng.random() < 0.15:
        labels.append(" ".join(different_names(rng, 1)[0]))  # most likely absent
    return WorldSample(style, [_pointing(rng, scene, label, style) for label in dict.fromkeys(labels)], [scene])


def make_count(rng: np.random.Generator, split: str) -> WorldSample:
    repeats = int(rng.integers(1, 5))
    others = min(int(rng.integers(0, 3)), 4 - repeats)

    def draw() -> list:
        target, *rest = different_names(rng, 1 + others)
        return [target] * repeats + rest

    names = allowed_combination(split, draw)
    scene = still_scene(rng, names, *size_for(rng, len(names)))
    labels = [" ".join(names[0]), pick(rng, ["shape", names[-1][1], f"{names[-1][0]} shape"])]
    if rng.random() < 0.1:
        labels[1] = " ".join(different_names(rng, 1)[0])
    style = pick(rng, ["point_count", "counting"])
    return WorldSample(style, [_pointing(rng, scene, label, style) for label in dict.fromkeys(labels)], [scene])


def make_points_dense(rng: np.random.Generator, split: str) -> WorldSample:
    scene = image_scene(rng, split, (0.0, 0.2, 0.5, 0.3))
    return WorldSample("pointing", [_pointing(rng, scene, label, "pointing") for label in labels_of(scene)], [scene])


def image_questions(rng: np.random.Generator, scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """(question, answer) pairs about a still scene by kind."""
    colours, shapes = [t.colour for t in scene.things], [t.shape for t in scene.things]
    kinds = {"colour": [], "shape": [], "count": [], "exists": [], "side": [], "background": []}
    for thing in scene.things:
        if shapes.count(thing.shape) == 1:
            words = [f"What colour is the {thing.shape}?", f"What color is the {thing.shape}?"]
            kinds["colour"].append((pick(rng, words), thing.colour))
        if colours.count(thing.colour) == 1:
            words = [f"What shape is {thing.colour}?", f"Which shape is the {thing.colour} one?"]
            kinds["shape"].append((pick(rng, words), thing.shape))
        words = [f"Is there {with_article(thing.name)}?", f"Do you see {with_article(thing.name)}?"]
        kinds["exists"].append((pick(rng, words), "yes"))
    absent = [" ".join(name) for name in different_names(rng, len(scene.things) * 2)]
    absent = [name for name in absent if not matching(scene, name)][: len(scene.things)]
    kinds["exists"] += [
        (pick(rng, [f"Is there {with_article(name)}?", f"Do you see {with_article(name)}?"]), "no") for name in absent
    ]
    words = ["How many shapes are there?", "How many shapes are in the image?"]
    kinds["count"].append((pick(rng, words), str(len(scene.things))))
    shape = pick(rng, SHAPES)
    kinds["count"].append((f"How many {shape}s are there?", str(shapes.count(shape))))
    if len(scene.things) == 2:
        left, right = scene.things
        kinds["side"].append((f"What is left of the {right.name}?", with_article(left.name)))
        kinds["side"].append((f"What is right of the {left.name}?", with_article(right.name)))
    kinds["background"].append(("Is the background light or dark?", scene.background))
    return kinds


def make_image_qa(rng: np.random.Generator, split: str) -> WorldSample:
    scene = image_scene(rng, split)
    kinds = image_questions(rng, scene)
    chosen = [*kinds["colour"], *kinds["shape"], pick(rng, kinds["count"])]
    rest = [kind for kind in ("exists", "side", "background") if kinds[kind]]
    chosen += [pick(rng, kinds[kind]) for kind in some(rng, rest, 1)]
    answers = dict(chosen)
    while len(answers) < 3:
        answers |= [pick(rng, kinds["exists"])]
    return WorldSample("user_qa", [turn(question, answer) for question, answer in answers.items()], [scene])


def make_multi_image(rng: np.random.Generator, split: str) -> WorldSample:
    count = int(rng.integers(2, 4))
    sizes = [1 + (rng.random() < 0.3) for _ in range(count)]
    ends = np.cumsum(sizes)
    names = allowed_combination(split, lambda: different_names(rng, int(ends[-1])))
    scenes = [still_scene(rng, names[end - size : end]) for size, end in zip(sizes, ends)]
    named = [(number, thing) for number, scene in enumerate(scenes, start=1) for thing in scene.things]
    if rng.random() < 0.5:
        labels = [pick(rng, named)[1].name, pick(rng, ["shape", pick(rng, named)[1].shape])]
        branches = []
        for label in dict.fromkeys(labels):
            groups = [g for number, s in enumerate(scenes, start=1) for g in _image_points(s, label, number).groups]
            question = pick(rng, [f"Point to the {label} in all images.", f"Where is the {label} in the images?"])
            branches.append(turn(question, "<points 0/>", Points(label, groups)))
        return WorldSample("multi_image_pointing", branches, scenes)
    branches = []
    for number, thing in some(rng, named, 2):
        words = [f"In which image is the {thing.name}?", f"Which image has {with_article(thing.name)}?"]
        branches.append(turn(pick(rng, words), str(number)))
    alone = [(number, thing) for number, thing in named if len(scenes[number - 1].things) == 1]
    if alone:
        number, thing = pick(rng, alone)
        branches.append(turn(f"What colour is the shape in image {number}?", thing.colour))
    words = ["How many shapes are in all images?", "How many shapes are there in total?"]
    branches.append(turn(pick(rng, words), str(len(named))))
    return WorldSample("user_qa", branches, scenes)


def make_video_caption(rng: np.random.Generator, split: str) -> WorldSample:
    scene = video_scene(rng, split)
    mover, *still = scene.things
    parts = [
        f"{with_article(mover.name)} moves {mover.direction}",
        *(f"{with_article(thing.name)} stays still" for thing in still),
    ]
    question = pick(rng, ["Describe the video.", "What happens in the video?"])
    answer = f"{listed(parts)} on a {scene.background} background"
    return WorldSample("video_long_caption", [turn(question, answer)], video=scene)


def video_questions(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """(question, answer) pairs: direction, colour and shape of what moves, and what does not move if there is such."""
    mover = next(thing for thing in scene.things if thing.direction)
    direction = ["Which way does the moving shape go?"]
    if [thing.shape for thing in scene.things].count(mover.shape) == 1:
        direction.append(f"Which way does the {mover.shape} move?")
    still = [("What stays still?", with_article(thing.name)) for thing in scene.things if not thing.direction]
    return [
        (pick(rng, direction), mover.direction),
        ("What colour is the moving shape?", mover.colour),
        (pick(rng, ["Which shape moves?", "What shape is moving?"]), mover.shape),
        *still,
    ]


def make_video_qa(rng: np.random.Generator, split: str) -> WorldSample:
    scene = video_scene(rng, split)
    # Half without the style prefix of video_short_answer, so that a plain question works too.
    style = pick(rng, ["user_qa", "video_short_answer"])
    branches = [turn(*pair) for pair in [*video_questions(rng, scene), _place_question(rng, scene)]]
    return WorldSample(style, branches, video=scene)


def _place_question(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """(question, answer): in which third of the picture a thing is in the end, along both axes."""
    thing = pick(rng, scene.things)
    alike = [other.shape for other in scene.things].count(thing.shape)
    name = thing.name if alike > 1 else pick(rng, [thing.shape, thing.name])
    x, y = (int(3 * part) for part in scene.fraction(thing, scene.num_frames - 1))
    place = " ".join(word for word in (("up", "", "down")[y], ("left", "", "right")[x]) if word)
    return f"Where is the {name} in the end?", place


def make_video_points(rng: np.random.Generator, split: str) -> WorldSample:
    scene = video_scene(rng, split)
    style = pick(rng, ["video_point", "video_point_count"])
    branches = []
    for label in dict.fromkeys([pick(rng, scene.things).name, "shape"]):
        seconds = pick(rng, half_seconds(scene))
        things = matching(scene, label)
        points = Points(label, [(seconds, [scene.fraction(thing, seconds * FPS) for thing in things])], "video")
        when = f"at {seconds:.1f} seconds"
        if style == "video_point":
            branches.append(turn(f"Point to the {label} {when}.", "<points 0/>", points))
        else:
            answer = f"Counting the <points 0/> shows a total of {len(things)}."
            branches.append(turn(f"Point to each {label} {when} and count.", answer, points))
    return WorldSample(style, branches, video=scene)


def make_video_tracks(rng: np.random.Generator, split: str) -> WorldSample:
    scene = video_scene(rng, split)
    branches = []
    for label in dict.fromkeys([pick(rng, scene.things).name, "shape"]):
        frames = [
            (seconds, [(i, *scene.fraction(t, seconds * FPS)) for i, t in enumerate(matching(scene, label))])
            for seconds in half_seconds(scene)
        ]
        question = pick(rng, [f"Track the {label}.", f"Track the {label} at 2 fps."])
        branches.append(turn(question, "<points 0/>", Tracks(label, frames)))
    return WorldSample("video_point_track_per_frame", branches, video=scene)


SIDES = {"circle": "zero sides", "triangle": "three sides", "square": "four sides", "star": "ten sides"}
KINDS = {"red": "warm", "orange": "warm", "yellow": "warm", "green": "cool", "blue": "cool", "purple": "cool"}
OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up", "light": "dark", "dark": "light"}


def _facts() -> list[tuple[str, str, str]]:
    """(question, short answer, full sentence) for the facts of the world."""
    warm, cool = (listed([c for c in COLOURS if KINDS[c] == kind]) for kind in ("warm", "cool"))
    facts = [
        ("Which colours are warm?", warm, f"The warm colours are {warm}."),
        ("Which colours are cool?", cool, f"The cool colours are {cool}."),
        ("Which shapes do you know?", listed(list(SHAPES)), f"I know the {listed(list(SHAPES))}."),
        ("Which colours do you know?", listed(list(COLOURS)), f"I know {listed(list(COLOURS))}."),
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


def make_text(rng: np.random.Generator, split: str) -> WorldSample:
    count = int(rng.integers(1, 4))

    def draw() -> list:
        pairs = []
        for _ in range(count):
            colour, shape = different_names(rng, 1)[0]
            words = some(rng, [colour, shape, pick(rng, list(DIRECTIONS))], 3)
            kind = int(rng.integers(4))
            if kind == 0:
                question = f"Which of these is a colour: {', '.join(words)}?"
                pairs.append((question, colour, f"{colour.capitalize()} is a colour."))
            elif kind == 1:
                pairs.append((f"Which of these is a shape: {', '.join(words)}?", shape, f"The {shape} is a shape."))
            else:
                pairs.append(pick(rng, FACTS))
        return pairs

    system = pick(rng, [None, "Answer with few words.", "Answer in full sentences."])
    branch = [{"role": "system", "content": system}] if system else []
    for question, short, sentence in allowed_combination(split, draw):
        branch += turn(question, sentence if system == "Answer in full sentences." else short)
    return WorldSample("text_sft", [branch])
