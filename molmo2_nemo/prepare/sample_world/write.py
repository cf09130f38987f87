"""The data sets of the sample world, written as shards, and a quiz about held-out pictures and videos."""

import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from molmo2_nemo.data.points import render_content
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.data.tasks import converse
from molmo2_nemo.files import locked, published
from molmo2_nemo.prepare.sample_world.conversations import (
    image_questions,
    make_captions,
    make_count,
    make_image_qa,
    make_multi_image,
    make_points,
    make_points_dense,
    make_text,
    make_video_caption,
    make_video_points,
    make_video_qa,
    make_video_tracks,
    video_questions,
)
from molmo2_nemo.prepare.sample_world.drawing import encode_mp4, encode_png
from molmo2_nemo.prepare.sample_world.sample import WorldSample
from molmo2_nemo.prepare.sample_world.scenes import allowed_combination, different_names, pick, still_scene, video_scene
from molmo2_nemo.prepare.sample_world.tasks import make_task_image, make_task_points, make_task_tracks, make_task_video
from molmo2_nemo.prepare.webdataset import write_shards

# Of the sample data: a change of what is drawn needs another number, so that older folders are refused.
VERSION = 6
SPLITS = ("train", "val")


@dataclass
class SampleSet:
    """A data set: how a sample is made from (rng, split), and how many training samples there are at scale 1."""

    make: Callable[[np.random.Generator, str], WorldSample]
    size: int

    def count(self, split: str, scale: float) -> int:
        train = max(16, round(self.size * scale))
        return train if split == "train" else max(24, round(0.05 * train))


SETS = {
    "captions": SampleSet(make_captions, 3000),
    "points": SampleSet(make_points, 600),
    "count": SampleSet(make_count, 500),
    "points_dense": SampleSet(make_points_dense, 200),
    "text": SampleSet(make_text, 400),
    "image_qa": SampleSet(make_image_qa, 3000),
    "multi_image": SampleSet(make_multi_image, 300),
    "video_caption": SampleSet(make_video_caption, 500),
    "video_qa": SampleSet(make_video_qa, 1000),
    "video_points": SampleSet(make_video_points, 200),
    "video_tracks": SampleSet(make_video_tracks, 200),
    # Few, so that they take little of the short training of a small model.
    "task_image": SampleSet(make_task_image, 160),
    "task_points": SampleSet(make_task_points, 160),
    "task_video": SampleSet(make_task_video, 120),
    "task_tracks": SampleSet(make_task_tracks, 120),
}
TRAIN_SETS = {
    "stage1": ["captions", "points", "count", "points_dense", "text"],
    "stage2": list(SETS),
    "stage3": list(SETS),
}


def make_sample(name: str, split: str, index: int, seed: int = 0) -> WorldSample:
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
            with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as processes:
                written = [processes.submit(write_set, folder / name, name, seed, counts[name]) for name in SETS]
                for name, done in zip(SETS, written):
                    done.result()
                    progress(f"{name}: {counts[name]['train']} samples, {counts[name]['val']} held out")
            _write_quiz(folder / "quiz", seed)
            (folder / "sample.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def write_set(folder: Path, name: str, seed: int, counts: dict[str, int]) -> None:
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
            names = allowed_combination("val", lambda: different_names(rng, size))
            scene = still_scene(rng, names)
            kinds = image_questions(rng, scene)
            kinds["count"] = kinds["count"][:1]
        (folder / f"image{number}.png").write_bytes(encode_png(scene))
        for kind in ("colour", "shape", "count"):
            question, answer = pick(rng, kinds[kind])
            quiz.append({"image": f"image{number}.png", "question": question, "answer": answer})
    for number in range(2):
        rng = np.random.default_rng([seed, zlib.crc32(b"quiz video"), number])
        scene = video_scene(rng, "val")
        (folder / f"video{number}.mp4").write_bytes(encode_mp4(scene))
        for question, answer in video_questions(rng, scene)[:2]:
            quiz.append({"video": f"video{number}.mp4", "question": question, "answer": answer})
    (folder / "quiz.json").write_text(json.dumps(quiz, indent=1) + "\n")
