"""One sample -> tokens, labels, weights, positions, segment ids (`Encoder.plan`), then pixels (`Encoder.pixels`).

The two halves are apart so that samples can wait for their packed row undecoded.

    root      BOS, then ["Image k"] image tokens for each image, or time stamp and frame tokens for each frame and the
              subtitles, or nothing
    branch    <|im_start|>user\n question <|im_end|>\n<|im_start|>assistant\n answer EOS, repeated; a later turn starts
              with <|im_end|>\n after the EOS, as in Molmo2's training data

The token budget decides what is seen. A video gets as many frames as fit beside its text (frames.py chooses them), and
its text is written for these; of texts that would take more than half of the row, branches are dropped first. Images
keep their resolution if the first branch fits beside them, otherwise all of them get the most crops that do; then
branches that do not fit are dropped, and the last one kept may lose its end. A text that is far too long is cut before
it is tokenized, because that takes minutes.

Source of the rules: public `olmo/preprocessing` and `olmo/data` of allenai/molmo2, and arXiv 2601.10611.
"""

import functools
import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import DataConfig, VisionConfig
from molmo2_nemo.data.blend import SourceOptions
from molmo2_nemo.data.frames import Shown, annotated, choose, subtitle_text
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.data.points import render_content
from molmo2_nemo.data.processor import VisualInputs, build_processor
from molmo2_nemo.data.schema import Example, Image, Message, Video
from molmo2_nemo.data.tasks import Conversation, Talk
from molmo2_nemo.data.video import pick_frames
from molmo2_nemo.model.mask import ROOT_SEGMENT

# Tokens of a turn at least: half of the truth, so that a long conversation is cut and not left out.
LEAST_TURN = 4
# Characters that become one at most, where a tokenizer composes them (NFC).
COMPOSED = 4
# No more branches are tokenized when those that did not fit had this many rows of tokens.
ROWS_IN_VAIN = 8

PLAIN = SourceOptions()

# Styles without a prefix in stages 2 and 3: what a demo's user asks for, and multiple choice, which explains itself
# (allenai/molmo2: olmo/preprocessing/data_formatter.py, DEMO_STYLES, IMAGE_MC_STYLES and VIDEO_MC_STYLES; the variants
# of video_multiple_choice are recognised by their beginning). data/tokenizer/chat_template.jinja has the released list.
DEMO_STYLES = frozenset(
    """pointing point_count cosyn_point user_qa correction_qa text_sft long_caption short_caption video_long_caption
    video_short_caption video_transcript video_clip_caption_start_end video_clip_caption_start_end_in_seconds
    video_clip_transcript_start_end video_clip_transcript_start_end_in_seconds video_frame_caption_timestamp
    video_frame_caption_timestamp_in_seconds video_point video_point_count video_count video_count_point
    video_point_track_per_frame video_point_track_start_end video_single_point_track_start_end multi_image_pointing
    multi_image_counting multi_image_point_then_count multi_image_count_then_point a_okvqa_mc ai2_diagram
    ai2_diagram_no_letter science_qa eval_multiple_choice multi_image_mc multi_image_mc_exp mantis_instruct_mc
    eval_multi_image_mc video_multiple_choice""".split()
)
# Questions that count and are answered in words: their styles are written as those without the ending.
WITHOUT_POINTING = "_count_without_pointing"
# In stage 1, how often the prefix tells the length of the answer; the noise on it, a standard deviation, and its unit,
# both in characters.
LENGTH_SHARE, LENGTH_NOISE, LENGTH_UNIT = 0.9, 25, 15
POINTING_WORDS = frozenset("point pointing count counting track tracking".split())
# Captions of videos as Molmo2-Cap has them; those of other sets weigh as any answer.
VIDEO_CAPTIONS = frozenset(
    """video_long_caption video_short_caption video_merged_caption video_clip_caption_start_end
    video_frame_caption_timestamp""".split()
)


@dataclass
class SamplePlan:
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
    images: list[Image] = field(default_factory=list)
    video: Video | None = None  # with the clip of it that is shown
    shown: Shown | None = None  # frames of the video
    max_crops: int = 0  # limit of tiles of each image

    @property
    def times(self) -> list[float]:
        """Seconds of the video's frames since the start of what is shown."""
        return self.shown.times if self.shown else []

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_crops(self) -> int:
        return sum(crops for crops, _ in self.vision_units)


def dropped(reason: str) -> SamplePlan:
    """A sample that is only counted, as `dropped_{reason}`."""
    none = np.zeros(0, dtype=np.int32)
    return SamplePlan(none, none, none.astype(np.float32), none, none, [], Counter({f"dropped_{reason}": 1}))


@dataclass
class _Branch:
    """Token ids of one conversation, final EOS included, and which of them are targets."""

    ids: np.ndarray  # int32 [n]
    is_target: np.ndarray  # bool [n]
    style: str

    @property
    def num_inputs(self) -> int:
        """The final EOS is a target only."""
        return len(self.ids) - 1

    @property
    def prompt_length(self) -> int:
        """Inputs it takes to have one target."""
        return int(self.is_target.argmax())


@dataclass
class _Fitted:
    """Visual tokens that go before the branches, and what they stand for."""

    ids: np.ndarray  # int32
    units: list[tuple[int, int]]
    branches: Iterable[_Branch]
    counts: dict[str, int]
    shown: Shown | None = None
    max_crops: int = 0


class Encoder:
    """Encodes samples for one data configuration and model geometry. ConfigError: no usable tokenizer."""

    def __init__(self, data: DataConfig, vision: VisionConfig):
        self.data = data
        self.processor = build_processor(data.tokenizer, vision, data.max_crops_per_image)
        self.tokenizer = self.processor.tokenizer
        self.visual = VisualInputs(self.processor)
        eos, bos, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("eos", "bos", "pad"))
        if eos is None:
            raise ConfigError(f"data.tokenizer={data.tokenizer} has no end-of-sequence token: set its eos_token.")
        self.eos_id, self.bos_id, self.pad_id = eos, eos if bos is None else bos, eos if pad is None else pad
        self.visual_ids = frozenset(self.visual.token_ids.tolist())
        self.im_start, im_end = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        self.turn_end = [im_end, *self._text("\n")]
        self.assistant = [self.im_start, *self._text("assistant\n")]
        self.frame_patches = self._count_patches(self.visual.frame)
        self.least_prompt = 2 + len(self.turn_end) + len(self.assistant)
        self.longest_token = 1  # in runs of equal characters
        for token in sorted(self.tokenizer.get_vocab(), key=len, reverse=True):
            if len(token) <= self.longest_token:
                break
            self.longest_token = max(self.longest_token, _count_runs(token))

    def plan(self, example: Example, rng: np.random.Generator, options: SourceOptions = PLAIN) -> SamplePlan:
        """Everything but pixels. A sample that does not fit comes back as `dropped`.

        rng: decides what tasks ask, the order of branches, the lengths in style prefixes, and the resolution.
        options: of the sample's source. ValueError: the sample makes no sense.
        """
        if len(example.branches) > self.data.seq_length:  # each has several tokens
            return dropped("too_many_branches")
        return self.plan_talk(self.talk(example, rng, options), rng, options)

    def talk(
        self, example: Example, rng: np.random.Generator, options: SourceOptions = PLAIN, turns: int | None = None
    ) -> Talk:
        """What is asked about the example, with up to `turns` turns of each conversation."""
        if options.without_style:
            asked = [branch for branch in example.branches if getattr(branch, "style", None) != options.without_style]
            example = replace(example, branches=asked or example.branches)
        return Talk(
            example,
            rng,
            self.data.prompts,
            counts_without_points=options.counts_without_points,
            turns=turns,
            max_images=self.data.max_images,
        )

    def plan_talk(self, talk: Talk, rng: np.random.Generator, options: SourceOptions = PLAIN) -> SamplePlan:
        """The same of what was drawn already."""
        example, order = talk.example, rng.permutation(talk.number).tolist()
        high_res = len(example.images) == 1 and rng.random() < options.high_res_probability
        if not order:
            return dropped("not_shown")
        if example.video:
            fitted = self._fit_video(talk, order, rng)
        else:
            conversations = talk.conversations()
            branches = (self._branch(conversations[number], rng) for number in order)
            fitted = self._fit_images(example.images, branches, high_res)
        if sum(crops for crops, _ in fitted.units) > self.data.max_crops:
            return dropped("too_many_crops")
        root = np.concatenate([np.array([self.bos_id], dtype=np.int32), fitted.ids])
        counters = Counter(fitted.counts)
        seen = len(order) - counters["unseen_branches"]
        kept = self._keep(fitted.branches, self.data.seq_length - len(root), counters)
        if not kept:
            return dropped("too_long" if seen else "not_shown")
        counters["dropped_branches"] = seen - len(kept)
        counters["images_left_out"] = talk.num_images_left_out
        plan = self._assemble(root, kept, options, counters)
        plan.vision_units, plan.images, plan.video = fitted.units, example.images, example.video
        plan.shown, plan.max_crops = fitted.shown, fitted.max_crops
        if plan.shown and plan.shown.start:
            start = plan.video.start
            plan.video = replace(plan.video, clip=(start + plan.shown.start, start + plan.shown.end))
        counters.update(
            examples=1,
            branches=len(kept),
            tokens=plan.num_tokens,
            crops=plan.num_crops,
            loss_tokens=int((plan.loss_weights > 0).sum()),
        )
        return plan

    def pixels(self, plan: SamplePlan, media: Mapping[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Crops uint8 [C, P, patch_dim] and pooling int64 [T, W] of a plan; `media`: the sample's parts by name.

        ValueError: a part is missing, cannot be decoded, or has another size than the JSON says.
        """
        if plan.video:
            data, video = _part(media, plan.video.part), plan.video
            return self.visual.video_pixels(pick_frames(data, plan.times, video.num_frames, start=video.start))
        crops = [np.zeros((0, self.visual.patches_per_crop, self.visual.patch_dim), dtype=np.uint8)]
        pooling, offset = [np.zeros((0, self.visual.window), dtype=np.int64)], 0
        for entry in plan.images:
            image = read_image(_part(media, entry.part))
            height, width = image.shape[:2]
            if (width, height) != (entry.width, entry.height):
                raise ValueError(
                    f"{entry.part} is {width} x {height} pixels, its JSON says {entry.width} x {entry.height}."
                )
            image_crops, windows = self.visual.image_pixels(image, plan.max_crops)
            crops.append(image_crops)
            pooling.append(np.where(windows >= 0, windows + offset, -1))
            offset += len(image_crops) * self.visual.patches_per_crop
        return np.concatenate(crops), np.concatenate(pooling)

    def frames_that_fit(self) -> int:
        """The most frames, at data.max_fps, that a row can hold beside no text at all."""

        def fits(frames: int) -> bool:
            times = [index / self.data.max_fps for index in range(frames)]
            return 1 + len(self.visual.video_tokens(times)) <= self.data.seq_length

        return _largest(fits, 0, min(self.data.max_frames, self.data.max_crops))

    def frames_note(self) -> str | None:
        """One sentence if a row is too short for data.max_frames frames, even without any text; None otherwise."""
        data, most = self.data, self.frames_that_fit()
        if most >= data.max_frames:
            return None
        return (
            f"a video gets at most {most} of data.max_frames={data.max_frames} frames, fewer beside long texts: more do"
            f" not fit into data.seq_length={data.seq_length} and data.max_crops={data.max_crops}"
        )

    def _text(self, text: str) -> list[int]:
        """Ids of plain text: special tokens spelt out in it stay text."""
        text.encode()  # a lone surrogate, which tokenizers take for a wrong type, is a ValueError here
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        if self.visual_ids.isdisjoint(ids):
            return ids
        raise ValueError("A text spells a visual token that the tokenizer does not treat as special.")

    def _branch(self, conversation: Conversation, rng: np.random.Generator) -> _Branch:
        return self._tokens(conversation, self._prefix(conversation, rng))

    def _prefix(self, conversation: Conversation, rng: np.random.Generator) -> str:
        length = len(self._render(conversation.messages[-1]))  # of the last answer (molmo2: data_formatter.py)
        return style_prefix(conversation.style, length, self.data.style_prefix, rng)

    def _render(self, message: Message) -> str:
        return render_content(message.content, message.points, self.data.point_separator)

    def _tokens(self, conversation: Conversation, prefix: str) -> _Branch:
        """Tokens of one conversation: [system] (user assistant)+."""
        messages = conversation.messages
        texts = [self._render(message) for message in messages]
        system = None
        if messages[0].role == "system":
            system, texts = texts[0], texts[1:]
        questions, answers = texts[::2], texts[1::2]
        if not all(answer.strip() for answer in answers):
            raise ValueError("An answer is empty.")
        questions[0] = " ".join(part for part in (prefix, questions[0]) if part)
        if system is not None:
            questions[0] = f"System: {system}\n{questions[0]}"
        row = self.data.seq_length
        is_endless = len(answers) > row // LEAST_TURN or self._least_tokens("".join([*questions, *answers])) > row
        if is_endless and self._least_tokens(questions[0]) > row:
            # In its place a prompt that no row can hold.
            return _Branch(np.full(row + 2, self.eos_id, np.int32), np.arange(row + 2) > row, conversation.style)
        ids, is_target = [], []
        for turn, (question, answer) in enumerate(zip(questions, answers)):
            if is_endless:
                if len(ids) > row:
                    break
                question, answer = self._start(question), self._start(answer)
            before = [*self.turn_end, self.im_start] if turn else [self.im_start]
            prompt = [*before, *self._text(f"user\n{question}"), *self.turn_end, *self.assistant]
            reply = [*self._text(answer), self.eos_id]
            ids += prompt + reply
            is_target += [False] * len(prompt) + [True] * len(reply)
        return _Branch(np.array(ids, dtype=np.int32), np.array(is_target), conversation.style)

    def _start(self, text: str) -> str:
        """As much of a text as is certain to have more tokens than a row, or all of it."""
        values = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        changes = np.flatnonzero(values[1:] != values[:-1])
        most = COMPOSED * (self.data.seq_length + 1) * self.longest_token
        return text if len(changes) <= most else text[: changes[most] + 1]

    def _least_tokens(self, text: str) -> int:
        """A number of tokens that the text has at least, found without the tokenizer; 0 where it may fit into a row.

        Vocabularies have tokens of a hundred blanks or dashes. So what is counted, in the text and in the longest
        token, is characters that differ from the one before. Tokenizers may compose characters first (NFC).
        """
        if len(text) <= self.data.seq_length * self.longest_token:
            return 0
        return min(map(_count_runs, {text, unicodedata.normalize("NFC", text)})) // self.longest_token

    def _fit_images(self, images: list[Image], branches: Iterator[_Branch], high_res: bool) -> _Fitted:
        """The images with the most crops with which the first branch still fits; all of them at one limit."""
        most, row = self.data.max_crops_per_image, self.data.seq_length
        limits = ([self.data.high_res_crops] if high_res else []) + list(range(most, 0, -1))
        encoded = functools.cache(lambda limit: self._image_tokens(images, limit))

        def fits(limit: int, text: int) -> bool:
            ids, units = encoded(limit)
            return sum(crops for crops, _ in units) <= self.data.max_crops and 1 + len(ids) + text <= row

        # A text too long even for the smallest images is cut anyway: then they get half of the row.
        first = next(branches)
        text = first.num_inputs
        limit = next((limit for need in (text, row // 2) for limit in limits if fits(limit, need)), 1)
        ids, units = encoded(limit)
        shrunk = len(images) if limit < most else 0
        counts = {"images": len(images), "images_shrunk": shrunk}
        return _Fitted(ids, units, itertools.chain([first], branches), counts, max_crops=limit)

    def _image_tokens(self, images: list[Image], max_crops: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
        parts, units = [np.zeros(0, dtype=np.int32)], []
        for number, image in enumerate(images, start=1):
            if len(images) > 1:
                parts.append(self.visual.label_tokens(number))
            ids, crops = self.visual.image_tokens(image.width, image.height, max_crops)
            parts.append(ids)
            units.append((crops, self._count_patches(ids)))
        return np.concatenate(parts), units

    def _count_patches(self, ids: np.ndarray) -> int:
        return int((ids == self.visual.patch_id).sum())

    def _fit_video(self, talk: Talk, order: list[int], rng: np.random.Generator) -> _Fitted:
        """The most frames, at least one, that fit beside the text about them and into the crops of a row."""
        video, marks, place = talk.example.video, annotated(talk.example), rng.random()
        seeds = rng.integers(2**63, size=len(order)).tolist()
        known: dict[int, tuple[Conversation, _Branch]] = {}

        @functools.cache
        def written(frames: int) -> tuple[Shown, list[Conversation | None], np.ndarray]:
            shown = choose(video, marks, frames, self.data.max_fps, place)
            ids = np.concatenate([self.visual.video_tokens(shown.times), self._subtitles(video, shown)])
            return shown, talk.conversations(shown), ids

        def branch(number: int, conversation: Conversation) -> _Branch:
            """Tokenized again only where other frames have changed the text."""
            if number not in known or known[number][0] != conversation:
                known[number] = conversation, self._branch(conversation, np.random.default_rng(seeds[number]))
            return known[number][1]

        def text(frames: int) -> list[_Branch]:
            """Every branch if there is room beside all frames, otherwise the first ones, up to half of the row."""
            branches, length, conversations = [], 0, written(frames)[1]
            for number in order:
                if conversations[number]:
                    branches.append(branch(number, conversations[number]))
                    length += branches[-1].num_inputs
                    if len(branches) > 1 and length > text_room:
                        return branches[:-1]
            return branches

        def fits(frames: int, most_text: int = self.data.seq_length) -> bool:
            length = sum(branch.num_inputs for branch in text(frames))
            return 1 + len(written(frames)[2]) + min(length, most_text) <= self.data.seq_length

        wanted = len(choose(video, marks, self.data.max_frames, self.data.max_fps, place).times)
        frames = min(wanted, self.data.max_crops)
        text_room = max(self.data.seq_length // 2, self.data.seq_length - 1 - len(written(frames)[2]))
        if not fits(frames):
            # A text too long even beside one frame is cut anyway: then the frames get half of the row.
            most_text = self.data.seq_length if fits(1) else self.data.seq_length // 2
            frames = _largest(lambda count: fits(count, most_text), 1, frames)
        shown, conversations, ids = written(frames)
        thinned = wanted - len(shown.times)
        counts = sum((asked.counts for asked in conversations if asked), Counter())
        counts.update(
            frames=len(shown.times),
            frames_thinned=thinned,
            videos_thinned=int(thinned > 0),
            videos_cut=int(not shown.whole),
            unseen_branches=conversations.count(None),
        )
        return _Fitted(ids, [(1, self.frame_patches)] * len(shown.times), text(frames), counts, shown)

    def _subtitles(self, video: Video, shown: Shown) -> np.ndarray:
        """Tokens of `frames.subtitle_text`."""
        if not video.subtitles:
            return np.zeros(0, dtype=np.int32)
        text, row = subtitle_text(video, shown, self.data.seq_length), self.data.seq_length
        if text is None or self._least_tokens(text) > row:
            return np.full(row + 1, self.eos_id, dtype=np.int32)  # fits no row either
        return np.array(self._text(text), dtype=np.int32)

    def _keep(self, branches: Iterable[_Branch], room: int, counters: Counter) -> list[_Branch]:
        """The branches that fit into `room` inputs; the last may lose its end, if it keeps a target."""
        kept, in_vain = [], 0
        for branch in branches:
            if branch.prompt_length > room:
                in_vain += branch.num_inputs
            else:
                counters["truncated"] += branch.num_inputs > room
                kept.append(branch)
                room -= min(room, branch.num_inputs)
            if room < self.least_prompt or in_vain > ROWS_IN_VAIN * self.data.seq_length:
                break  # what is left cannot fit, and is not tokenized
        return kept

    def _assemble(
        self, root: np.ndarray, branches: list[_Branch], options: SourceOptions, counters: Counter
    ) -> SamplePlan:
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
            weighting = options.loss_weighting or self.data.loss_weighting
            weight = loss_weight(branch.style, num_targets, len(branches), weighting)
            weight = weight if options.token_weight is None else options.token_weight
            ids.append(branch.ids[:length])
            labels.append(np.where(targets, branch.ids[1 : length + 1], 0))
            weights.append(np.where(targets, np.float32(weight), np.float32(0)))
            positions.append(np.arange(len(root), len(root) + length, dtype=np.int32))
            segments.append(np.full(length, number if tree else 0, dtype=np.int32))
        arrays = [np.concatenate(parts) for parts in (ids, labels, weights, positions, segments)]
        return SamplePlan(*arrays, vision_units=[], counters=counters)


def loss_weight(style: str, num_targets: int, num_branches: int, weighting: str) -> float:
    """Weight of each target of a branch (molmo2: `root_subsegments_root_tokens` and the mixture's overrides).

    weighting "flat": 1. "root": 0.2 for pointing and tracking (not for what counts without pointing), 0.1 for
    VIDEO_CAPTIONS, otherwise 2 / sqrt(num_targets) / sqrt(num_branches). num_targets counts all targets of the branch,
    cut off or not.
    "root_report": 4 in the place of 2, as the report has it.
    """
    if weighting == "flat":
        return 1.0
    if POINTING_WORDS & set(style.split("_")) and not style.endswith(WITHOUT_POINTING):
        return 0.2
    if style in VIDEO_CAPTIONS:
        return 0.1
    scale = 4.0 if weighting == "root_report" else 2.0
    return scale / max(num_targets, 1) ** 0.5 / num_branches**0.5


def style_prefix(style: str, answer_length: int, rule: str, rng: np.random.Generator) -> str:
    """What the first question of a branch starts with, "" if nothing.

    rule "length" (stage 1): "style n:", n the answer's characters, with noise, in units of 15; "style:" one time in
    ten, and always for pointing. rule "demo" (stages 2 and 3): "style:" except for DEMO_STYLES.
    """
    if rule == "demo":
        style = style.removesuffix(WITHOUT_POINTING)
        return "" if style in DEMO_STYLES or style.startswith("video_multiple_choice") else f"{style}:"
    if style in ("pointing", "point_count", "cosyn_point") or rng.random() >= LENGTH_SHARE:
        return f"{style}:"
    return f"{style} {max(0, (answer_length + int(rng.normal(0, LENGTH_NOISE))) // LENGTH_UNIT)}:"


def _count_runs(text: str) -> int:
    """Number of characters that differ from the one before, the first included."""
    values = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    return int(np.count_nonzero(values[1:] != values[:-1])) + (len(values) > 0)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest integer from low to high that fits, by bisection; low if none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _part(media: Mapping[str, bytes], name: str) -> bytes:
    if name not in media:
        raise ValueError(f"The part {name} is missing.")
    return media[name]
