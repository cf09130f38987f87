"""How fast one CPU core makes training rows out of shards, against transformers' processor called in the plainest way.

    python tools/bench/data.py [--seconds 10] [--tokens-per-second 2300 9200]

Media are made here first: 1024 x 768 JPEGs, videos of 60 s (360p) and 30 s (720p) at 30 frames a second, chats. Ours is
the real training loader without workers, at 16,384 tokens and 128 frames; a row of the table is one kind of sample.
Seconds are CPU time of this process, so that other work on the machine hardly matters: waiting for a disk is not in
them.

    read        Energon's, from the page cache, with shuffling and the bookkeeping of states; the sample's JSON
    decode      to RGB pictures and frames
    resize      crops, patches, pooling windows; of transformers' also the normalisation, which we leave to the device
    tokenise    everything else about a sample: text, image tokens, labels, weights, positions
    pack        choosing the samples of a row and laying it out
    collate     rows to tensors

"added" is all but decode, relative to decode. transformers reads a file, and packs and collates nothing.
"""

import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import av
import numpy as np
import PIL.Image
import torch
from tables import parser, print_json
from transformers.utils import logging
from transformers.video_utils import load_video

from molmo2_nemo.config.schema import DataConfig, VisionConfig
from molmo2_nemo.data import encode, loader, packing
from molmo2_nemo.data.blend import Source
from molmo2_nemo.data.processor import VisualInputs, build_processor
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.prepare.webdataset import write_shards

PARTS = ("read", "decode", "resize", "tokenise", "pack", "collate")
TOKENIZER = CONF_DIR.parent / "molmo2_nemo" / "data" / "tokenizer"
SAMPLES = 64  # of a kind; the videos' are one file under many keys
# Shares of samples, roughly the groups of conf/blend/stage2_report.yaml.
MIX = {"image": 0.40, "multi-image": 0.05, "video": 0.45, "text": 0.10}
FRAME_RATE = 30


class Clock:
    """CPU seconds by part; a part called from within another does not count as the other's."""

    def __init__(self):
        self.seconds, self.running, self.since = Counter(), ["read"], time.process_time()

    def _charge(self) -> None:
        now = time.process_time()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self.running.append(name)
        try:
            yield
        finally:
            self._charge()
            self.running.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            with self.part(name):
                result = function(*args, **kwargs)
            return self._timed_items(name, result) if isinstance(result, Iterator) else result

        return call

    def _timed_items(self, name: str, items: Iterator) -> Iterator:
        while True:
            with self.part(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def restart(self) -> None:
        self.seconds.clear()
        self.since = time.process_time()

    def total(self) -> float:
        self._charge()
        return sum(self.seconds.values())


def picture(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with a spectrum like that of photographs: uint8 [height, width, 3], 270 kB as a JPEG of 1024 x 768."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(rng.normal(size=(3, height, width)))
    layers = np.fft.irfft2(white / frequency**1.3, s=(height, width))
    layers /= layers.std()
    colours = layers[0] * 50 + np.stack([layers[1], -layers[1], layers[2]]) * 15
    return np.clip(colours.transpose(1, 2, 0) + 128, 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=88)
    return file.getvalue()


def film(width: int, height: int, seconds: int, rng: np.random.Generator) -> bytes:
    """The camera wanders over a picture, with grain: H.264 (MPEG-4 where FFmpeg has no encoder for it) in mp4."""
    scene = picture(width + 256, height + 256, rng).astype(np.int16)
    grains = rng.normal(size=(8, height, width, 1)) * 4
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=FRAME_RATE, options={"preset": "veryfast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * FRAME_RATE):
            left, top = (int(128 + 127 * np.sin(number / period)) for period in (50, 70))
            view = scene[top : top + height, left : left + width] + grains[number % 8]
            frame = av.VideoFrame.from_ndarray(np.clip(view, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode())
    return file.getvalue()


def chat(rng: np.random.Generator, turns: int, words: int) -> list[dict]:
    vocabulary = ["a", "the", "of", "cat", "house", "under", "blue", "many", "stands", "where", "picture", "because"]

    def say(count: int) -> str:
        return " ".join(rng.choice(vocabulary, count)).capitalize() + "."

    speakers = itertools.cycle([("user", words // 4), ("assistant", words)])
    return [{"role": role, "content": say(count)} for role, count in itertools.islice(speakers, 2 * turns)]


def make_samples() -> dict[str, list[dict[str, bytes]]]:
    """Kind -> samples, each its parts by name."""
    rng = np.random.default_rng(0)
    large = [jpeg(picture(1024, 768, rng)) for _ in range(12)]
    small = [jpeg(picture(640, 480, rng)) for _ in range(12)]
    films = {"video 360p": (640, 360, 60), "video 720p": (1280, 720, 30)}

    def sample(example: dict, media: dict[str, bytes], turns: int = 1, words: int = 60) -> dict[str, bytes]:
        return {"json": json.dumps(example | {"branches": [chat(rng, turns, words)]}).encode()} | media

    def of_images(pictures: list[bytes], width: int, height: int) -> dict[str, bytes]:
        media = {f"img{number}.jpg": data for number, data in enumerate(pictures)}
        return sample({"images": [{"part": part, "width": width, "height": height} for part in media]}, media)

    samples = {
        "image": [of_images([large[i % 12]], 1024, 768) for i in range(SAMPLES)],
        "multi-image": [of_images([small[(i + k) % 12] for k in range(3)], 640, 480) for i in range(SAMPLES)],
    }
    for name, (width, height, seconds) in films.items():
        entry = {"part": "video.mp4", "width": width, "height": height, "duration": seconds, "fps": FRAME_RATE}
        entry["num_frames"] = seconds * FRAME_RATE
        media = {"video.mp4": film(width, height, seconds, rng)}
        samples[name] = [sample({"video": entry}, media) for _ in range(SAMPLES)]
    samples["text"] = [sample({}, {}, turns=4, words=120) for _ in range(SAMPLES)]
    return samples


def bench_ours(kind: str, samples: list[dict[str, bytes]], seconds: float, folder: Path) -> dict:
    """One kind of sample through the training loader."""
    shards = folder / kind.replace(" ", "_")
    shards.mkdir()
    write_shards(shards, {"train": ((f"{i:06d}", parts) for i, parts in enumerate(samples))})
    data = DataConfig(
        blend=kind,
        root=str(folder),
        tokenizer=str(TOKENIZER),
        seq_length=16384,
        max_crops=128,
        max_frames=128,
        num_workers=0,
        shuffle_buffer_size=8,
    )
    source = Source(kind, str(shards), weight=1.0, num_samples=len(samples))
    clock, counts = Clock(), Counter()
    with contextlib.ExitStack() as stack:
        for owner, name, part in [
            (encode, "read_image", "decode"),
            (encode, "pick_frames", "decode"),
            (VisualInputs, "image_pixels", "resize"),
            (VisualInputs, "video_pixels", "resize"),
            (encode.Encoder, "plan", "tokenise"),
            (encode.Encoder, "pixels", "tokenise"),
            (packing, "select", "pack"),
            (loader, "make_row", "pack"),
            (loader, "collate", "collate"),
        ]:
            stack.enter_context(mock.patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        batches = loader.train_loader(data, VisionConfig(), [source], 0, 1, None, 1)
        next(batches)  # fills the buffers
        clock.restart()
        while clock.total() < seconds:
            for counters in next(batches).counters.values():
                counts.update(counters)
        batches.close()
    broken = {name: count for name, count in counts.items() if name.startswith("dropped")}
    if broken:
        sys.exit(f"The samples made for {kind} are not all used: {broken}.")
    return summary(clock, counts["examples"], counts["tokens"])


def bench_transformers(samples: list[dict[str, bytes]], seconds: float, folder: Path) -> dict:
    """The same samples, one after the other: PIL pictures, or a path to a video, and a text into the processor."""
    processor = build_processor(str(TOKENIZER), VisionConfig())
    clock, examples, tokens = Clock(), 0, 0
    for owner in (processor.image_processor, processor.video_processor):
        owner.preprocess = clock.timed("resize", owner.preprocess)
    film_path = folder / "film.mp4"
    if "video.mp4" in samples[0]:
        film_path.write_bytes(samples[0]["video.mp4"])

    def sample_frames(metadata, **_):
        return processor.video_processor.sample_frames(metadata, num_frames=128)

    def encode_one(parts: dict[str, bytes]) -> int:
        example = json.loads(parts["json"])
        images, media = [], {}
        for entry in example.get("images", []):
            with clock.part("decode"):
                images.append(PIL.Image.open(io.BytesIO(parts[entry["part"]])))
                images[-1].load()
            media = {"images": images}
        if "video" in example:
            with clock.part("decode"):  # as processor(videos=path) does, which would need torchcodec
                frames, metadata = load_video(str(film_path), backend="pyav", sample_indices_fn=sample_frames)
            media = {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False}
        with clock.part("tokenise"):
            messages = example["branches"][0]
            kinds = [{"type": "image"}] * len(images) + [{"type": "video"}] * ("video" in example)
            first = {"role": "user", "content": [*kinds, {"type": "text", "text": messages[0]["content"]}]}
            text = processor.apply_chat_template([first, *messages[1:]], tokenize=False)
            return processor(text=text, return_tensors="pt", **media)["input_ids"].numel()

    encode_one(samples[0])
    clock.restart()
    for parts in itertools.cycle(samples):
        examples, tokens = examples + 1, tokens + encode_one(parts)
        if clock.total() >= seconds:
            return summary(clock, examples, tokens)


def summary(clock: Clock, examples: int, tokens: int) -> dict:
    total, decode = clock.total(), clock.seconds["decode"]
    return {
        "samples_per_second": examples / total,
        "tokens_per_second": tokens / total,
        "tokens_per_sample": tokens / examples,
        "ms": {part: 1000 * clock.seconds[part] / examples for part in PARTS},
        "added": (total - decode) / decode if decode else None,
    }


def line(kind: str, who: str, row: dict) -> str:
    parts = "".join(f"{row['ms'][part]:10.2f}" for part in PARTS)
    added = "" if row["added"] is None else f"{row['added']:.0%}"
    rates = f"{row['samples_per_second']:11.1f}{row['tokens_per_second']:11,.0f}"
    return f"{kind:<12}{who:<14}{rates}{parts}{added:>8}"


def cores(rows: dict[str, dict], video: str, tokens_per_second: float) -> float:
    """CPU cores that make so many tokens a second of MIX, with `video` for its videos."""
    shares = {video if kind == "video" else kind: share for kind, share in MIX.items()}
    seconds = sum(share / rows[kind]["samples_per_second"] for kind, share in shares.items())
    tokens = sum(share * rows[kind]["tokens_per_sample"] for kind, share in shares.items())
    return tokens_per_second * seconds / tokens


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=10, help="CPU seconds for each row of the table (default 10)")
    options.add_argument(
        "--tokens-per-second",
        type=float,
        nargs="+",
        default=[2300, 9200],
        metavar="N",
        help="of one GPU (default: 2,300, what the Molmo2 report trained at on an H100, and four times that)",
    )
    arguments = options.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    av.logging.set_level(av.logging.PANIC)
    print("making pictures and videos ...", file=sys.stderr)
    samples = make_samples()
    heads = "".join(f"{part:>10}" for part in PARTS)
    print(f"{'':<26}{'samples/s':>11}{'tokens/s':>11}{heads}{'added':>8}")
    print(f"{'kind':<12}{'who':<14}{'per core':>11}{'per core':>11}{'ms per sample':>60}")
    ours, theirs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, some in samples.items():
            ours[kind] = bench_ours(kind, some, arguments.seconds, Path(folder))
            print(line(kind, "ours", ours[kind]), flush=True)
            theirs[kind] = bench_transformers(some, arguments.seconds, Path(folder))
            print(line(kind, "transformers", theirs[kind]), flush=True)
    needed = []
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in MIX.items())
    print(f"\nCPU cores to feed one GPU with samples of which {shares}:")
    for rate, video in itertools.product(arguments.tokens_per_second, ("video 360p", "video 720p")):
        entry = {"tokens_per_second": rate, "video": video}
        entry |= {"ours": cores(ours, video, rate), "transformers": cores(theirs, video, rate)}
        needed.append(entry)
        print(f"{rate:8,.0f} tokens/s, {video}: {entry['ours']:6.2f} (transformers {entry['transformers']:.2f})")
    print_json({"bench": "data", "ours": ours, "transformers": theirs, "cores": needed}, arguments.out)


if __name__ == "__main__":
    main()
