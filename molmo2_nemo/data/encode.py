"""One sample -> tokens, labels, weights, positions, segment ids (`Encoder.plan`), then pixels (`Encoder.pixels`).

The two halves are apart so that samples can wait for their packed row undecoded. A sample is the JSON that
sample_world.py describes: a style, images or a video, and branches, conversations about the same visual input.

    root      BOS, then ["Image k"] image tokens for each image, or time stamp and frame tokens for each frame
    branch    <|im_start|>user\n question <|im_end|>\n<|im_start|>assistant\n answer EOS, repeated; a later turn starts
              with <|im_end|>\n after the EOS, as in Molmo2's training data

Source of the rules: public `olmo/preprocessing` and `olmo/data` of allenai/molmo2, and arXiv 2601.10611.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from molmo2_nemo.config import DataConfig, VisionConfig
from molmo2_nemo.data.points import render_content
from molmo2_nemo.data.processor import VisualInputs, build_processor, decode_image
from molmo2_nemo.data.video import frame_times, pick_frames

# Segment id of what all branches of a tree see; branch m has segment m, a plain example segment 0.
ROOT_SEGMENT = 10_000

# What is counted of the samples of a batch. Every sample ends up in `examples` or in one of `dropped_*`.
COUNTERS = (
    "examples", "branches", "tokens", "loss_tokens", "images", "frames", "crops",
    "truncated",  # branches whose end was cut off
    "dropped_branches",  # branches without room for a single loss token
    "frames_thinned",  # frames left out because they did not fit beside the text, or into a row
    "dropped_malformed", "dropped_too_long", "dropped_too_many_crops", "dropped_undecodable",
)  # fmt: skip

# Styles without a prefix in stages 2 and 3: what a demo's user asks for, and multiple choice, which explains itself.
DEMO_STYLES = frozenset(
    """pointing point_count cosyn_point user_qa correction_qa text_sft long_caption short_caption video_long_caption
    video_short_caption video_transcript clip_caption clip_transcript frame_caption frame_transcript video_point
    video_point_count video_count video_count_point video_point_track_per_frame video_point_track_start_end
    video_single_point_track_start_end multi_image_pointing multi_image_counting multi_image_point_then_count
    multi_image_count_then_point a_okvqa_mc ai2_diagram ai2_diagram_no_letter science_qa eval_multiple_choice
    multi_image_mc multi_image_mc_exp mantis_instruct_mc eval_multi_image_mc video_multiple_choice""".split()
)
POINTING_WORDS = frozenset("point pointing count counting track tracking".split())


@dataclass
class Plan:
    """An example without its pixels. Arrays have one entry for each of its n tokens.

    labels are shifted: labels[t] is the target at position t, 0 where loss_weights[t] is 0. A plan without tokens is a
    dropped sample; its counters say why.
    """

    input_ids: np.ndarray  # int32
    labels: np.ndarray  # int32
    loss_weights: np.ndarray  # float32
    position_ids: np.ndarray  # int32
    segment_ids: np.ndarray  # int32
    vision_units: list[tuple[int, int]]  # (crops, pooling windows) of each image or frame
    counters: Counter
    images: list[dict] = field(default_factory=list)
    video: dict | None = None
    times: list[float] = field(default_factory=list)  # seconds, of the video's frames

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_crops(self) -> int:
        return sum(crops for crops, _ in self.vision_units)


def dropped(reason: str) -> Plan:
    """A sample that is only counted, as `dropped_{reason}`."""
    none = np.zeros(0, dtype=np.int32)
    return Plan(none, none, none.astype(np.float32), none, none, [], Counter({f"dropped_{reason}": 1}))


@dataclass
class _Branch:
    """Token ids of one conversation, final EOS included, and which of them are targets."""

    ids: np.ndarray  # int32 [n]
    is_target: np.ndarray  # bool [n]

    @property
    def num_inputs(self) -> int:
        """The final EOS is a target only."""
        return len(self.ids) - 1

    @property
    def prompt_length(self) -> int:
        """Inputs it takes to have one target."""
        return int(self.is_target.argmax())


class Encoder:
    """Encodes samples for one data configuration and model geometry. ValueError: no usable tokenizer."""

    def __init__(self, data: DataConfig, vision: VisionConfig):
        self.data = data
        self.processor = build_processor(data.tokenizer, vision, data.max_crops_per_image)
        self.tokenizer = self.processor.tokenizer
        self.visual = VisualInputs(self.processor)
        eos, bos, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("eos", "bos", "pad"))
        if eos is None:
            raise ValueError(f"data.tokenizer={data.tokenizer} has no end-of-sequence token: set its eos_token.")
        self.eos_id, self.bos_id, self.pad_id = eos, eos if bos is None else bos, eos if pad is None else pad
        self.visual_ids = frozenset(self.visual.token_ids.tolist())
        self.im_start, im_end = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        self.turn_end = [im_end, *self._text("\n")]
        self.assistant = [self.im_start, *self._text("assistant\n")]

    def plan(self, sample: Mapping, rng: np.random.Generator) -> Plan:
        """Everything but pixels, from the sample's JSON. A sample that does not fit comes back as `dropped`.

        rng: decides the order of branches and the lengths in style prefixes. ValueError: the JSON is malformed.
        """
        style, images, video, conversations = _checked(sample)
        branches = [self._branch(conversation, style, rng) for conversation in conversations]
        branches = [branches[i] for i in rng.permutation(len(branches))] if len(branches) > 1 else branches
        counters = Counter()
        if video:
            text_length = sum(branch.num_inputs for branch in branches)
            wanted = frame_times(float(video["duration"]), self.data.max_frames, self.data.max_fps)
            times = self._times_that_fit(float(video["duration"]), len(wanted), self.data.seq_length - 1 - text_length)
            visual_ids = self.visual.video_tokens(times)
            units = [(1, self._count_patches(self.visual.frame))] * len(times)
            counters.update(frames=len(times), frames_thinned=len(wanted) - len(times))
        else:
            times = []
            visual_ids, units = self._image_tokens(images)
            counters.update(images=len(images))
        if sum(crops for crops, _ in units) > self.data.max_crops:
            return dropped("too_many_crops")
        root = np.concatenate([np.array([self.bos_id], dtype=np.int32), visual_ids])
        kept = self._fit(branches, self.data.seq_length - len(root), counters)
        if not kept:
            return dropped("too_long")
        plan = self._assemble(root, kept, style, counters)
        plan.vision_units, plan.images, plan.video, plan.times = units, images, video, times
        counters.update(
            examples=1, branches=len(kept), tokens=plan.num_tokens, crops=plan.num_crops,
            loss_tokens=int((plan.loss_weights > 0).sum()),
        )  # fmt: skip
        return plan

    def pixels(self, plan: Plan, media: Mapping[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Crops uint8 [C, P, patch_dim] and pooling int64 [T, W] of a plan; `media`: the sample's parts by name.

        ValueError: a part is missing, cannot be decoded, or has another size than the JSON says.
        """
        if plan.video:
            frames = pick_frames(_part(media, plan.video), plan.times, plan.video.get("num_frames"))
            return self.visual.video_pixels(frames)
        crops = [np.zeros((0, self.visual.patches_per_crop, self.visual.patch_dim), dtype=np.uint8)]
        pooling, offset = [np.zeros((0, self.visual.window), dtype=np.int64)], 0
        for entry in plan.images:
            image = decode_image(_part(media, entry))
            if image.size != (entry["width"], entry["height"]):
                size = f"{entry['width']} x {entry['height']}"
                raise ValueError(f"{entry['part']} is {image.size[0]} x {image.size[1]} pixels, its JSON says {size}.")
            image_crops, windows = self.visual.image_pixels(image)
            crops.append(image_crops)
            pooling.append(np.where(windows >= 0, windows + offset, -1))
            offset += len(image_crops) * self.visual.patches_per_crop
        return np.concatenate(crops), np.concatenate(pooling)

    def _text(self, text: str) -> list[int]:
        """Ids of plain text: special tokens spelt out in it stay text."""
        text.encode()  # a lone surrogate, which tokenizers take for a wrong type, is a ValueError here
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        if self.visual_ids.isdisjoint(ids):
            return ids
        raise ValueError("A text spells a visual token that the tokenizer does not treat as special.")

    def _branch(self, conversation: list[dict], style: str, rng: np.random.Generator) -> _Branch:
        """Tokens of one conversation: [system] (user assistant)+."""
        texts = [render_content(message, self.data.point_separator) for message in conversation]
        system = None
        if conversation[0]["role"] == "system":
            system, texts = texts[0], texts[1:]
        questions, answers = texts[::2], texts[1::2]
        prefix = style_prefix(style, len(answers[0]), self.data.style_prefix, rng)
        questions[0] = " ".join(part for part in (prefix, questions[0]) if part)
        if system is not None:
            questions[0] = f"System: {system}\n{questions[0]}"
        ids, is_target = [], []
        for turn, (question, answer) in enumerate(zip(questions, answers)):
            before = [*self.turn_end, self.im_start] if turn else [self.im_start]
            prompt = [*before, *self._text(f"user\n{question}"), *self.turn_end, *self.assistant]
            reply = [*self._text(answer), self.eos_id]
            ids += prompt + reply
            is_target += [False] * len(prompt) + [True] * len(reply)
        return _Branch(np.array(ids, dtype=np.int32), np.array(is_target))

    def _image_tokens(self, images: list[dict]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        parts, units = [np.zeros(0, dtype=np.int32)], []
        for number, entry in enumerate(images, start=1):
            if len(images) > 1:
                parts.append(self.visual.label_tokens(number))
            ids, crops = self.visual.image_tokens(entry["width"], entry["height"])
            parts.append(ids)
            units.append((crops, self._count_patches(ids)))
        return np.concatenate(parts), units

    def _count_patches(self, ids: np.ndarray) -> int:
        return int((ids == self.visual.patch_id).sum())

    def _times_that_fit(self, duration: float, wanted: int, room: int) -> list[float]:
        """Times of the most frames, at least one, that stay within `room` tokens and the crops of a row."""
        frames = min(wanted, self.data.max_crops, max(1, room // len(self.visual.frame)))
        while True:
            times = frame_times(duration, frames, self.data.max_fps)
            excess = len(self.visual.video_tokens(times)) - room
            if frames == 1 or excess <= 0:
                return times
            # Frames after the first cost alike but for a digit or two of their time stamps.
            frames -= max(1, excess // (len(self.visual.frame) + 16))

    def _fit(self, branches: list[_Branch], room: int, counters: Counter) -> list[_Branch]:
        """The branches that fit into `room` inputs; the last may lose its end, if it keeps a target."""
        kept = []
        for branch in branches:
            if branch.prompt_length > room:
                counters["dropped_branches"] += 1
                continue
            counters["truncated"] += branch.num_inputs > room
            kept.append(branch)
            room -= min(room, branch.num_inputs)
        return kept

    def _assemble(self, root: np.ndarray, branches: list[_Branch], style: str, counters: Counter) -> Plan:
        """Concatenate root and branches; only the last branch may be longer than what is left of the row."""
        tree = len(branches) > 1
        room = self.data.seq_length - len(root)
        ids, labels, weights = [root], [np.zeros_like(root)], [np.zeros(len(root), dtype=np.float32)]
        positions = [np.arange(len(root), dtype=np.int32)]
        segments = [np.full(len(root), ROOT_SEGMENT if tree else 0, dtype=np.int32)]
        for number, branch in enumerate(branches):
            length = min(branch.num_inputs, room)
            room -= length
            targets = branch.is_target[1 : length + 1]
            # The EOS that ends a branch of a tree carries the weight but is not counted in it.
            num_targets = int(branch.is_target.sum()) - tree
            weight = loss_weight(style, num_targets, len(branches), self.data.loss_weighting)
            ids.append(branch.ids[:length])
            labels.append(np.where(targets, branch.ids[1 : length + 1], 0))
            weights.append(np.where(targets, np.float32(weight), np.float32(0)))
            positions.append(np.arange(len(root), len(root) + length, dtype=np.int32))
            segments.append(np.full(length, number if tree else 0, dtype=np.int32))
        arrays = [np.concatenate(parts) for parts in (ids, labels, weights, positions, segments)]
        return Plan(*arrays, vision_units=[], counters=counters)


def loss_weight(style: str, num_targets: int, num_branches: int, weighting: str) -> float:
    """Weight of each target of a branch (molmo2: `root_subsegments_root_tokens` and the mixture's overrides).

    weighting "flat": 1. "root": 0.2 for pointing and tracking, 0.1 for captions of videos, otherwise
    2 / sqrt(num_targets) / sqrt(num_branches). num_targets counts all targets of the branch, cut off or not.
    """
    if weighting == "flat":
        return 1.0
    if POINTING_WORDS & set(style.split("_")):
        return 0.2
    if re.match("video_|clip_|frame_", style) and style.endswith("_caption"):
        return 0.1
    return 2.0 / max(num_targets, 1) ** 0.5 / num_branches**0.5


def style_prefix(style: str, answer_length: int, rule: str, rng: np.random.Generator) -> str:
    """What the first question of a branch starts with, "" if nothing.

    rule "length" (stage 1): "style n:", n the answer's characters, with noise, in units of 15; "style:" one time in
    ten, and always for pointing. rule "demo" (stages 2 and 3): "style:" except for DEMO_STYLES.
    """
    if rule == "demo":
        return "" if style in DEMO_STYLES else f"{style}:"
    if style in ("pointing", "point_count", "cosyn_point") or rng.random() >= 0.9:
        return f"{style}:"
    return f"{style} {max(0, (answer_length + int(rng.normal(0, 25))) // 15)}:"


def _checked(sample: Mapping) -> tuple[str, list[dict], dict | None, list[list[dict]]]:
    """Style, images, video and conversations of a sample's JSON. ValueError: it has another form."""
    try:
        style, images, video = sample["style"], sample["images"], sample["video"]
        for conversation in sample["branches"]:
            roles = [message["role"] for message in conversation]
            roles = roles[1:] if roles[0] == "system" else roles
            if len(roles) < 2 or roles != ["user", "assistant"] * (len(roles) // 2):
                raise ValueError(f"A conversation has the roles {roles}, not user and assistant in turn.")
            if not all(isinstance(message["content"], str) for message in conversation):
                raise ValueError("The content of a message is not a text.")
            if not all(isinstance(message.get("points") or [], list) for message in conversation):
                raise ValueError("The points of a message are not a list.")
        if not sample["branches"]:
            raise ValueError("A sample has no branches.")
        sides = [side for entry in images for side in (entry["width"], entry["height"])]
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError("An image's width and height must be positive integers.")
        if not all(isinstance(entry["part"], str) for entry in [*images, *([video] if video else [])]):
            raise ValueError("An image or a video does not name its part.")
        if video and not isinstance(video.get("num_frames"), int | None):
            raise ValueError("The num_frames of a video is not an integer.")
        if not isinstance(style, str) or (images and video) or (video and not float(video["duration"]) >= 0):
            raise ValueError("A sample has a style, images or a video (not both), and a duration of the video.")
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"A sample's JSON lacks or misuses {error}.") from error
    return style, images, video, sample["branches"]


def _part(media: Mapping[str, bytes], entry: dict) -> bytes:
    if entry["part"] not in media:
        raise ValueError(f"The part {entry['part']} is missing.")
    return media[entry["part"]]
