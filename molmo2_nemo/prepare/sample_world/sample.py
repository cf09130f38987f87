"""A sample of the sample world before it is rendered, and how its sentences are made."""

import json
from dataclasses import dataclass, field

from molmo2_nemo.data.points import Points, Tracks, to_json
from molmo2_nemo.prepare.sample_world.drawing import encode_mp4, encode_png
from molmo2_nemo.prepare.sample_world.scenes import FPS, Scene


@dataclass
class WorldSample:
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


def turn(question: str, answer: str, points: Points | Tracks | None = None) -> list[dict]:
    """Two messages; `<points 0/>` in the answer stands for the points."""
    reply = {"role": "assistant", "content": answer}
    if points:
        reply["points"] = [to_json(points)]
    return [{"role": "user", "content": question}, reply]


def with_article(name: str) -> str:
    """The name after "a" or "an"."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def listed(items: list[str]) -> str:
    """The items as in a sentence: a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
