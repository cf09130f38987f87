"""An exported model, and questions to it about pictures or a video, which are read, sampled and resized as in training.

The weights, the chat template and the tokens are transformers' own, from the exported folder; pixels come from
data/pictures.py, data/video.py and data/processor.py, as those of training do.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature, TextStreamer
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
    subtitles: str = ""  # what the model reads behind the frames

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
    num_tokens: int = 0


class Asker:
    """A model and its processor. ValueError, one sentence: the folder does not hold such a model.

    The weights are loaded by `load`, or else by the first answer: what is asked can be looked at before.
    """

    def __init__(self, folder: Path, device: str | None = None, report: Callable[[str], None] = lambda text: None):
        """device: cuda or cpu; None: a GPU if there is one. On a GPU the weights are bfloat16, on a CPU float32."""
        _check_folder(folder)
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.device = device_of(device)
        self.folder, self.report, self.model = folder, report, None
        with _explained(folder):
            self.processor = AutoProcessor.from_pretrained(folder)
            self.positions = AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings
        self.tokenizer = self.processor.tokenizer
        self.special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        video = self.processor.video_processor
        self.max_crops, self.max_frames, self.max_fps = (
            self.processor.image_processor.max_crops,
            video.num_frames,
            video.max_fps,
        )

    def load(self) -> None:
        """The weights, unless they are there. ValueError: as of the class."""
        if self.model is not None:
            return
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        self.report(f"loading {self.folder} onto {self.device} in {str(dtype).removeprefix('torch.')}")
        with _explained(self.folder):
            model, found = AutoModelForImageTextToText.from_pretrained(
                self.folder, dtype=dtype, output_loading_info=True
            )
        if found["missing_keys"] or found["mismatched_keys"]:
            wrong = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
            raise ValueError(f"{self.folder} lacks weights, {wrong[0]} for one, of {len(wrong)}: {ADVICE}")
        self.model = model.to(self.device).eval()

    def see(self, images: Sequence[Path], video: Path | None, keys: tuple[str, str] = ("--image", "--video")) -> Seen:
        """Read the files. keys: where pictures and videos are named, for messages.

        ValueError, one sentence that names the file: it cannot be read.
        """
        if images and video:
            raise ValueError("a question is about pictures or about a video, not about both: leave one of them out")
        if video:
            return self._frames(video, f"a picture: give it with {keys[0]}")
        instead = f"a video: give it with {keys[1]}"
        return Seen([_try(read_image, image, video_facts, instead) for image in images])

    def _frames(self, video: Path, instead: str) -> Seen:
        """Frames at `max_fps` with the last one included, as in training."""
        duration = _try(video_facts, video, read_image, instead)["duration"]
        times = frame_times(duration, self.max_frames, self.max_fps)
        try:
            return Seen(
                frames=self.resized(pick_frames(video.read_bytes(), times), len(times)), times=times, duration=duration
            )
        except ValueError as error:
            raise ValueError(f"{video}: {_first_line(error)}") from error

    def resized(self, frames: Iterable[np.ndarray], count: int) -> torch.Tensor:
        """`count` frames uint8 [H, W, 3] at the model's size, uint8 [count, 3, size, size]; one at a time is held."""
        size = self.processor.video_processor.size
        resized = torch.empty(count, 3, size["height"], size["width"], dtype=torch.uint8)
        for number, frame in enumerate(frames):
            (pixels,) = resize(frame, (size["height"], size["width"]))
            resized[number] = torch.from_numpy(pixels).permute(2, 0, 1)
        return resized

    def check_tokens(self, messages: Sequence[dict]) -> None:
        """ValueError: a text spells a special token."""
        for message in messages:
            for token in self.special:
                if token in message["content"]:
                    raise ValueError(f"a text spells {token}, which stands for something else to the model: rewrite it")

    def inputs(self, messages: Sequence[dict], seen: Seen) -> BatchFeature:
        """The model's inputs, on the CPU. messages: see `check_messages`.

        ValueError: a text spells a special token, or the model has too few positions for the question.
        """
        return self.batch_inputs([(messages, seen)])

    def batch_inputs(self, questions: Sequence[tuple[Sequence[dict], Seen]]) -> BatchFeature:
        """The same of several questions, the shorter ones padded on the left; with videos all of them have one."""
        texts, pictures, videos, metadata = [], [], [], []
        for messages, seen in questions:
            texts.append(self.prompt(messages, seen))
            pictures += [Image.fromarray(picture) for picture in seen.pictures]
            if seen.frames is not None:
                # The prompt's time stamps are index / fps. The frames have their size: the processor keeps it.
                videos.append(seen.frames)
                metadata.append(
                    VideoMetadata(len(seen.times), fps=1, duration=seen.duration, frames_indices=seen.times)
                )
        about = {}
        if pictures:
            about = {"images": pictures, "max_crops": self.max_crops}
        if videos:
            about |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        inputs = self.processor(text=texts, return_tensors="pt", padding=len(texts) > 1, padding_side="left", **about)
        length = inputs["input_ids"].shape[1]
        if length >= self.positions:
            raise ValueError(
                f"the question takes {length:,} tokens, and the model has {self.positions:,} positions: "
                "use fewer pictures, a smaller --max-crops or a smaller --max-frames"
            )
        return inputs

    def prompt(self, messages: Sequence[dict], seen: Seen) -> str:
        """The text that the processor reads, with a placeholder for each picture or the video.

        ValueError: a text spells a special token.
        """
        self.check_tokens(messages)
        kinds = ["image"] * len(seen.pictures) + ["video"] * (seen.frames is not None)
        first = next(number for number, message in enumerate(messages) if message["role"] == "user")
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": messages[first]["content"]}]
        turns = [*messages[:first], {"role": "user", "content": content}, *messages[first + 1 :]]
        text = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if not seen.subtitles:
            return text
        self.check_tokens([{"content": seen.subtitles}])
        video = self.processor.video_token
        return text.replace(video, video + seen.subtitles, 1)

    def answer(
        self, messages: Sequence[dict], seen: Seen, max_new_tokens: int, streamer: TextStreamer | None = None
    ) -> Reply:
        """The greedy answer. ValueError: as of `inputs`, or there is too little memory."""
        return self.answers([(messages, seen)], max_new_tokens, streamer)[0]

    def answers(
        self,
        questions: Sequence[tuple[Sequence[dict], Seen]],
        max_new_tokens: int,
        streamer: TextStreamer | None = None,
    ) -> list[Reply]:
        """The greedy answers to questions that are asked at once: about pictures or nothing, or all about videos.

        ValueError: as of `inputs`, or there is too little memory.
        """
        inputs = self.batch_inputs(questions)
        self.load()
        length = inputs["input_ids"].shape[1]
        most = min(max_new_tokens, self.positions - length)
        try:
            with torch.inference_mode():
                tokens = self.model.generate(
                    **inputs.to(self.device), max_new_tokens=most, do_sample=False, streamer=streamer
                )[:, length:].tolist()
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise ValueError(
                "the GPU has too little memory: use fewer pictures, a smaller --max-crops or --max-frames, "
                "or --device cpu"
            ) from error
        return [self._reply(row, most) for row in tokens]

    def _reply(self, tokens: list[int], most: int) -> Reply:
        """tokens: of one answer, with whatever stands behind its end."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        end = next((number for number, token in enumerate(tokens) if token in ends), None)
        own = tokens if end is None else tokens[: end + 1]
        text = self.tokenizer.decode(own, skip_special_tokens=True).strip()
        return Reply(text, end is None and len(tokens) == most, len(own))


def device_of(device: str | None) -> str:
    """The device that is meant; None: a GPU if there is one. ValueError, one sentence: there is none."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU here; leave --device out")
    return device


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
    check_texts(messages)
    return messages


def check_texts(messages: Sequence[dict]) -> None:
    """ValueError: a text of these messages is empty, or not valid UTF-8."""
    for message in messages:
        if not message["content"].strip():
            raise ValueError(f"a text of the role {message['role']} is empty")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text of the role {message['role']} is not valid UTF-8") from error


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


@contextmanager
def _explained(folder: Path):
    """ValueError, one sentence, in the place of whatever transformers, safetensors and tokenizers raise."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{folder} cannot be loaded ({_first_line(error)}): {ADVICE}") from error


def _try(read: Callable[[bytes], object], file: Path, other: Callable[[bytes], object], instead: str):
    """What `read` makes of a file's bytes. ValueError, with the file's name.

    other: reads the other kind of media; instead: what the file is if that works.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder: name a file of it, or take --web, which shows them all")
    try:
        if file.stat().st_size > limits.MAX_MEDIA:
            raise ValueError(f"{file} has more than {limits.MAX_MEDIA:,} bytes: cut it")
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
        raise ValueError(f"{file} is {instead}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
