"""An exported model, and questions to it about pictures or a video, which are read, sampled and resized as in training.

The weights, the chat template and the tokens are transformers' own, from the exported folder; pixels come from
data/pictures.py, data/video.py and data/processor.py, as those of training do.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, TextStreamer
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from molmo2_nemo import limits
from molmo2_nemo.data.marks import Visual
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.data.processor import resize
from molmo2_nemo.data.video import frame_times, pick_frames
from molmo2_nemo.prepare.media import video_facts

ADVICE = "export a checkpoint with tools/export_hf.py, and give its folder"


@dataclass
class Seen:
    """What a question is about, as the model sees it: pictures, or frames of a video, or nothing."""

    pictures: list[np.ndarray] = field(default_factory=list)  # uint8 [H, W, 3], whole
    frames: torch.Tensor | None = None  # uint8 [frames, 3, size, size]
    times: list[float] = field(default_factory=list)  # seconds, of the frames
    duration: float | None = None  # seconds, of the video

    @property
    def visuals(self) -> list[Visual]:
        """For data/marks.read_answer."""
        pictures = [Visual([picture]) for picture in self.pictures]
        frames = [] if self.frames is None else self.frames.permute(0, 2, 3, 1).numpy()
        return pictures or [Visual([frame], time) for frame, time in zip(frames, self.times)]


@dataclass
class Reply:
    text: str
    is_cut: bool  # it was not at its end after the most tokens


class Asker:
    """A model and its processor. ValueError, one sentence: the folder does not hold such a model."""

    def __init__(self, folder: Path, device: str | None = None, report: Callable[[str], None] = lambda text: None):
        """device: cuda or cpu; None: a GPU if there is one. On a GPU the weights are bfloat16, on a CPU float32."""
        _check_folder(folder)
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: torch finds no GPU here; leave --device out")
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        report(f"loading {folder} onto {self.device} in {str(dtype).removeprefix('torch.')}")
        try:
            self.processor = AutoProcessor.from_pretrained(folder)
            self.model, found = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, output_loading_info=True
            )
        except MemoryError:
            raise
        except Exception as error:  # transformers, safetensors and tokenizers raise errors of any type on broken files
            raise ValueError(f"{folder} cannot be loaded ({_first_line(error)}): {ADVICE}") from error
        if found["missing_keys"] or found["mismatched_keys"]:
            wrong = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
            raise ValueError(f"{folder} lacks weights, {wrong[0]} for one, of {len(wrong)}: {ADVICE}")
        self.folder = folder
        self.model = self.model.to(self.device).eval()
        self.tokenizer = self.processor.tokenizer
        self.special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        video = self.processor.video_processor
        self.max_crops, self.max_frames, self.max_fps = (
            self.processor.image_processor.max_crops,
            video.num_frames,
            video.max_fps,
        )

    def see(self, images: Sequence[Path], video: Path | None) -> Seen:
        """Read the files. ValueError, one sentence that names the file: it cannot be read."""
        if images and video:
            raise ValueError("a question is about pictures or about a video, not about both: leave one of them out")
        if video:
            return self._frames(video)
        return Seen([_try(read_image, image, "picture", video_facts) for image in images])

    def _frames(self, video: Path) -> Seen:
        """Frames at `max_fps` with the last one included, as in training. Never more than the resized ones are held."""
        duration = _try(video_facts, video, "video", read_image)["duration"]
        times = frame_times(duration, self.max_frames, self.max_fps)
        size = self.processor.video_processor.size
        frames = torch.empty(len(times), 3, size["height"], size["width"], dtype=torch.uint8)
        try:
            for number, frame in enumerate(pick_frames(video.read_bytes(), times)):
                frames[number] = torch.from_numpy(resize(frame, size["height"], size["width"])).permute(2, 0, 1)
        except ValueError as error:
            raise ValueError(f"{video}: {_first_line(error)}") from error
        return Seen(frames=frames, times=times, duration=duration)

    def inputs(self, messages: Sequence[dict], seen: Seen) -> BatchFeature:
        """The model's inputs, on the CPU. messages: see `check_messages`. ValueError: a text spells a special token."""
        for message in messages:
            for token in self.special:
                if token in message["content"]:
                    raise ValueError(f"a text spells {token}, which stands for something else to the model: rewrite it")
        kinds = ["image"] * len(seen.pictures) + ["video"] * (seen.frames is not None)
        first = next(number for number, message in enumerate(messages) if message["role"] == "user")
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": messages[first]["content"]}]
        turns = [*messages[:first], {"role": "user", "content": content}, *messages[first + 1 :]]
        about = {}
        if seen.pictures:
            about = {"images": [Image.fromarray(picture) for picture in seen.pictures], "max_crops": self.max_crops}
        elif seen.frames is not None:
            # The prompt's time stamps are index / fps. The frames have their size: the processor does not change it.
            metadata = VideoMetadata(len(seen.times), fps=1, duration=seen.duration, frames_indices=seen.times)
            about = {"videos": [seen.frames], "video_metadata": [metadata], "do_sample_frames": False}
        text = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.processor(text=text, return_tensors="pt", **about)

    def answer(
        self, messages: Sequence[dict], seen: Seen, max_new_tokens: int, streamer: TextStreamer | None = None
    ) -> Reply:
        """The greedy answer. ValueError: the model has too few positions for the question."""
        inputs = self.inputs(messages, seen)
        length = inputs["input_ids"].shape[1]
        room = self.model.config.get_text_config().max_position_embeddings - length
        if room < 1:
            raise ValueError(
                f"the question takes {length:,} tokens, and the model has {length + room:,} positions: "
                "use fewer pictures, a smaller --max-crops or a smaller --max-frames"
            )
        most = min(max_new_tokens, room)
        try:
            with torch.inference_mode():
                tokens = self.model.generate(
                    **inputs.to(self.device), max_new_tokens=most, do_sample=False, streamer=streamer
                )[0, length:].tolist()
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise ValueError(
                "the GPU has too little memory: use fewer pictures, a smaller --max-crops or --max-frames, "
                "or --device cpu"
            ) from error
        text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        ends = self.model.generation_config.eos_token_id
        is_cut = len(tokens) == most and tokens[-1] not in (ends if isinstance(ends, list) else [ends])
        return Reply(text, is_cut)


def check_messages(messages) -> list[dict]:
    """A conversation that ends with a question, {"role", "content"} each. ValueError, one sentence: it is none."""
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and m.keys() == {"role", "content"} and isinstance(m["content"], str) for m in messages
    )
    roles = [message["role"] for message in messages] if good else []
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)] or len(turns) % 2 == 0:
        raise ValueError(
            'messages are [{"role": "user", "content": "..."}, {"role": "assistant", ...}, ...], '
            "the last one a question, with one of the role system before them if you like"
        )
    for message in messages:
        if not message["content"].strip():
            raise ValueError(f"a text of the role {message['role']} is empty")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text of the role {message['role']} is not valid UTF-8") from error
    return messages


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: {ADVICE}")
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no model of transformers (no config.json that says which): {ADVICE}"
        ) from error
    if kind != "molmo2":
        raise ValueError(f"{folder} holds a model of the type {kind}, not molmo2: {ADVICE}")


def _try(read: Callable[[bytes], object], file: Path, kind: str, other: Callable[[bytes], object]):
    """What `read` makes of a file's bytes. ValueError, with the file's name; `other` reads the other kind of media."""
    try:
        if file.stat().st_size > limits.MAX_MEDIA:
            raise ValueError(f"it has more than {limits.MAX_MEDIA:,} bytes")
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    try:
        return read(data)
    except ValueError as error:
        try:
            other(data)
        except ValueError:
            raise ValueError(f"{file}: {_first_line(error)}") from error
        right = {"picture": "video: give it with --video", "video": "picture: give it with --image"}[kind]
        raise ValueError(f"{file} is a {right}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
