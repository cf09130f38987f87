"""Samples of the sample world that are tasks of every kind (data/schema.py), whose questions are drawn when used."""

import numpy as np

from molmo2_nemo.prepare.sample_world.conversations import OPPOSITES
from molmo2_nemo.prepare.sample_world.sample import WorldSample, listed, turn, with_article
from molmo2_nemo.prepare.sample_world.scenes import (
    DIRECTIONS,
    FPS,
    Scene,
    Thing,
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

IMAGE_MODES = ["pointing", "point_count", "count_point", "counting", "cosyn_point"]
IMAGES_MODES = ["multi_image_" + mode for mode in ("pointing", "point_then_count", "count_then_point", "counting")]
VIDEO_MODES = ["video_point", "video_point_count", "video_count_point", "video_count"]


def _choice(rng: np.random.Generator, question: str, right: str, words: list[str], **more) -> dict:
    """A multiple choice task with up to four of the words, the right one among them."""
    wrong = some(rng, [word for word in dict.fromkeys(words) if word != right], int(rng.integers(1, 4)))
    options = some(rng, [right, *wrong], 4)
    return {"task": "multiple_choice", "question": question, "options": options, "answer": options.index(right), **more}


def make_task_image(rng: np.random.Generator, split: str) -> WorldSample:
    scene = image_scene(rng, split)
    names = [with_article(thing.name) for thing in scene.things]
    thing = pick(rng, scene.things)
    alike = len(matching(scene, thing.shape))
    background = scene.background
    branches = [
        {"task": "caption", "text": f"{listed(names)} on a {background} background"},
        {"task": "caption", "text": f"I see {listed(names)}.", "style": "transcript"},
        # Three people were asked, and one of them did not look closely.
        {
            "task": "question",
            "question": "Is the background light or dark?",
            "style": "vqa2",
            "answers": some(rng, [background, background, OPPOSITES[background]], 3),
        },
        {
            "task": "question",
            "question": f"How many {thing.shape}s are there?",
            "answers": [str(alike)],
            "explanation": f"There {'is' if len(names) == 1 else 'are'} {listed(names)}.",
            "style": "cosyn_diagram_exp",
        },
        _choice(rng, "Which of these is in the image?", thing.name, _absent(rng, scene)),
        _choice(rng, "What is the background?", background, list(OPPOSITES), explanation=f"It is {background}."),
    ]
    return WorldSample(None, some(rng, branches, 3), [scene])


def _absent(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Names of things that are not in the scene."""
    names = [" ".join(name) for name in different_names(rng, len(scene.things) + 4)]
    return [name for name in names if not matching(scene, name)]


def make_task_points(rng: np.random.Generator, split: str) -> WorldSample:
    count = int(rng.integers(1, 6))
    names = allowed_combination(split, lambda: different_names(rng, count))
    scenes = (
        [still_scene(rng, [name]) for name in names]
        if rng.random() < 0.6
        else [still_scene(rng, names, *size_for(rng, count))]
    )
    several = len(scenes) > 1
    labels = [pick(rng, labels_of(pick(rng, scenes))), pick(rng, _absent(rng, scenes[0]))]
    branches = []
    for label in dict.fromkeys(labels):
        groups = [
            [number, [list(scene.fraction(thing)) for thing in matching(scene, label)]]
            for number, scene in enumerate(scenes, start=1)
        ]
        styles = some(rng, IMAGES_MODES if several else IMAGE_MODES, 2)
        task = {"task": "pointing", "label": label, "points": groups, "style": styles}
        if several and rng.random() < 0.5:
            task["images"] = sorted(some(rng, list(range(1, len(scenes) + 1)), int(rng.integers(1, len(scenes) + 1))))
        branches.append(task)
    if rng.random() < 0.3:
        no = "A name is nothing that can be seen, so there is nothing to point to."
        branches.append({"task": "pointing", "label": "name of the shape", "points": [], "unanswerable": no})
    return WorldSample(None, branches, scenes)


def make_task_video(rng: np.random.Generator, split: str) -> WorldSample:
    scene = video_scene(rng, split)
    mover, *still = scene.things
    start, end = pick(rng, [0.0, 0.5]), scene.num_frames / FPS
    keys = {"clip": [start, end]} if start else {}
    # Times count from the start of the clip.
    times = [seconds - start for seconds in half_seconds(scene) if seconds >= start]
    moves = f"{mover.name} moves {mover.direction}"

    def at(thing: Thing, seconds: float) -> list:
        return [seconds, [list(scene.fraction(thing, (seconds + start) * FPS))]]

    time, thing = pick(rng, times), pick(rng, scene.things)
    branches = [
        {
            "task": "caption",
            "text": listed([with_article(moves), *(f"{with_article(thing.name)} stays" for thing in still)]),
        },
        {"task": "caption", "text": with_article(moves), "style": "video_short_caption"},
        turn(f"What happens at <time {time}/>?", f"The {moves} at <time {time}/>."),
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
            "points": [at(thing, pick(rng, times)) for thing in scene.things],
            "style": some(rng, VIDEO_MODES, 2),
        },
    ]
    if rng.random() < 0.5:
        says = f"The {mover.name} goes {mover.direction}."
        half = (end - start) / 2
        keys["subtitles"] = [[0.0, half, "Look."], [half, end - start, says]]
        branches.append({"task": "question", "question": "What do the subtitles say last?", "answers": [says]})
    return WorldSample(None, some(rng, branches, 3), video=scene, video_keys=keys, multi_turn=0.2)


def make_task_tracks(rng: np.random.Generator, split: str) -> WorldSample:
    scene = video_scene(rng, split)
    scene.speed *= pick(rng, [1, 2])  # twice as fast, it leaves the picture
    rate = int(rng.integers(1, 3))
    branches = []
    for label in dict.fromkeys([pick(rng, scene.things).name, "shape"]):
        frames = []
        for seconds in half_seconds(scene):
            objects = [[thing.name, *scene.fraction(thing, seconds * FPS)] for thing in matching(scene, label)]
            frames.append([seconds, [[name, x, y] for name, x, y in objects if 0 < x < 1 and 0 < y < 1]])
        branches.append({"task": "tracking", "label": label, "frames": frames, "fps": rate})
    return WorldSample(None, branches, video=scene, video_keys={"annotation_fps": rate})
