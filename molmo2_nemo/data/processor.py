"""transformers' Molmo2 processors for one model geometry: the tokens of images and frames, and their pixels as bytes.

Sizes alone decide the tokens and the number of crops, so both are known before anything is decoded. Grids, tokens and
pooling windows are transformers' own. What is done to every pixel is implemented here again: it takes a quarter of the
time and gives the same bytes.
"""

from collections.abc import Iterable, Iterator
from functools import cache, lru_cache

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import AutoTokenizer, Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor
from transformers.models.molmo2.image_processing_molmo2 import select_tiling

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import VisionConfig

# Bytes stay bytes: the model maps them to [-1, 1] on its device.
AS_BYTES = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
# A picture of more pixels is not made floats as a whole, which takes most of the time and the memory for a camera's:
# what is above 32 MB, glibc asks the system for each time. Below, torch is as fast (tools/bench/pictures.py).
MOST_FLOAT_PIXELS = 3_000_000
BAND = 16  # rows that are resized at a time, so that they stay in the processor's cache


def build_processor(
    tokenizer: str, vision: VisionConfig, max_crops_per_image: int = 8, setting: str = "data.tokenizer"
) -> Molmo2Processor:
    """transformers' processor for this geometry. `tokenizer`: a folder, or a name on the Hugging Face hub.

    setting: what the user sets it with, for messages. ConfigError: there is no tokenizer, or it lacks a special token
    of Molmo2.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{setting}={tokenizer} holds no tokenizer ({reason}): set it to a folder with one; "
            "model=tiny brings its own."
        ) from error
    size = {"height": vision.image_size, "width": vision.image_size}
    processor = Molmo2Processor(
        Molmo2ImageProcessor(
            size=size,
            max_crops=max_crops_per_image,
            overlap_margins=[vision.overlap_margin] * 2,
            patch_size=vision.patch_size,
            pooling_size=[vision.image_pooling] * 2,
        ),
        Molmo2VideoProcessor(
            size=size,
            patch_size=vision.patch_size,
            pooling_size=[vision.video_pooling] * 2,
            # Unlike the image processor's, these are off unless asked for.
            do_rescale=True,
            do_normalize=True,
        ),
        loaded,
        chat_template=loaded.chat_template,
        # The released models end the rows of the tiles, but not those of the overview (molmo2: olmo/preprocessing).
        image_use_col_tokens=True,
        use_single_crop_col_tokens=False,
        use_single_crop_start_token=True,
        video_use_col_tokens=False,
        use_frame_special_tokens=True,
    )
    vocabulary = loaded.get_vocab()
    needed = ["<|im_start|>", "<|im_end|>", "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>"]
    for token in [*needed, "<frame_start>", "<frame_end>", "<im_low>"]:
        if token not in vocabulary:
            raise ConfigError(f"{setting}={tokenizer} lacks the token {token}: use a Molmo2 model's tokenizer.")
    return processor


class VisualInputs:
    """Tokens, crops and pooling windows of images and frames, as transformers' processor makes them.

    W = window: the larger pooling window, to which the other's windows are padded with -1.
    """

    def __init__(self, processor: Molmo2Processor):
        image, video = processor.image_processor, processor.video_processor
        self.processor = processor
        self.max_crops = image.max_crops
        self.window = max(image.pooling_size[0], video.pooling_size[0]) ** 2
        self.size, self.patch_size = image.size["height"], image.patch_size  # pixels
        self.side = self.size // self.patch_size  # patches
        self.margins = sum(image.overlap_margins)  # patches on which neighbouring tiles overlap
        self.patches_per_crop = self.side**2
        self.patch_dim = 3 * self.patch_size**2
        self.token_ids = np.array(processor.image_token_ids, dtype=np.int32)
        self.patch_id = processor.tokenizer.convert_tokens_to_ids("<im_patch>")
        blank = video(videos=[torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8)], do_sample_frames=False)
        frame = processor.get_video_string(torch.as_tensor(blank["video_grids"][0]), [0.0])
        self.frame = self._ids(frame[frame.index("<frame_start>") :])
        self.frame_windows = self._padded(torch.as_tensor(blank["video_token_pooling"]))
        # Few different tilings and times, very many images and frames.
        self._tiling = lru_cache(maxsize=2**14)(self._choose_tiling)
        self._image_ids = lru_cache(maxsize=1024)(self._tiling_ids)
        self._image_windows = lru_cache(maxsize=256)(self._tiling_windows)
        self._text_ids = lru_cache(maxsize=2**14)(self._ids)

    def _ids(self, text: str) -> np.ndarray:
        ids = self.processor.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return np.array(ids, dtype=np.int32)

    def _choose_tiling(self, height: int, width: int, max_crops: int) -> tuple[int, int]:
        margins, step = self.margins * self.patch_size, (self.side - self.margins) * self.patch_size
        return select_tiling(height - margins, width - margins, step, max_crops)

    def _canvas(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width in pixels of the picture that these rows and columns of overlapping tiles cover."""
        step = self.side - self.margins
        return (rows * step + self.margins) * self.patch_size, (columns * step + self.margins) * self.patch_size

    def _tiling_ids(self, rows: int, columns: int) -> np.ndarray:
        image = self.processor.image_processor
        grid, _ = image.get_image_grid_and_crops(*self._canvas(rows, columns), {"max_crops": rows * columns})
        return self._ids(self.processor.replace_image_token({"image_grids": [grid]}, 0))

    def _tiling_windows(self, rows: int, columns: int) -> np.ndarray:
        blank = torch.zeros(3, *self._canvas(rows, columns), dtype=torch.uint8)
        inputs = self.processor.image_processor(blank, max_crops=rows * columns, **AS_BYTES)
        return self._padded(inputs["image_token_pooling"])

    def _padded(self, windows: torch.Tensor) -> np.ndarray:
        missing = self.window - windows.shape[1]
        padded = np.pad(windows.numpy().astype(np.int64), ((0, 0), (0, missing)), constant_values=-1)
        padded.setflags(write=False)  # shared by all images of a tiling
        return padded

    def image_tokens(self, width: int, height: int, max_crops: int | None = None) -> tuple[np.ndarray, int]:
        """Tokens of an image of this size in pixels (int32 [n]) and its number of crops, the overview included.

        max_crops: limit of the crops beside the overview; None: the processor's.
        Images narrower than a tile's two margins follow transformers' (the released) processor, which does not clamp.
        """
        rows, columns = self._tiling(height, width, max_crops or self.max_crops)
        return self._image_ids(rows, columns), 1 + rows * columns

    def label_tokens(self, number: int) -> np.ndarray:
        """Tokens of the text before one of several images, int32; `number` counts from 1."""
        return self._text_ids(f"Image {number}")

    def timestamp_tokens(self, index: int, seconds: float) -> np.ndarray:
        """Tokens of the text before frame `index` of a video, int32."""
        return self._text_ids(f"{' ' if index else ''}{seconds:.1f} ")

    def video_tokens(self, times: list[float]) -> np.ndarray:
        """Tokens of all frames with their time stamps, int32; one crop each."""
        parts = [part for i, time in enumerate(times) for part in (self.timestamp_tokens(i, time), self.frame)]
        return np.concatenate(parts) if parts else self._ids("")

    def image_pixels(self, image: np.ndarray, max_crops: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Crops of a picture, uint8 [H, W, 3], and their pooling windows.

        Crops: uint8 [C, P, patch_dim], the overview first. Pooling: int64 [T, W] into their patches (-1: none), to be
        copied before it is changed. max_crops: as in `image_tokens`.
        """
        rows, columns = self._tiling(*image.shape[:2], max_crops or self.max_crops)
        crops = np.empty((1 + rows * columns, self.side, self.side, self.patch_dim), dtype=np.uint8)
        crops[0], patches = self._patches(image, (self.size, self.size), self._canvas(rows, columns))
        step = self.side - self.margins
        for number in range(rows * columns):
            top, left = number // columns * step, number % columns * step
            crops[1 + number] = patches[top : top + self.side, left : left + self.side]
        return crops.reshape(len(crops), self.patches_per_crop, self.patch_dim), self._image_windows(rows, columns)

    def video_pixels(self, frames: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The same for frames, at least one, uint8 [H, W, 3] each: crops [frames, P, patch_dim] and pooling [T, W]."""
        crops = np.stack([self._patches(frame, (self.size, self.size))[0] for frame in frames])
        offsets = np.arange(len(crops))[:, None, None] * self.patches_per_crop
        pooling = np.where(self.frame_windows >= 0, self.frame_windows + offsets, -1)
        return crops.reshape(len(crops), self.patches_per_crop, self.patch_dim), pooling.reshape(-1, self.window)

    def _patches(self, image: np.ndarray, *sizes: tuple[int, int]) -> list[np.ndarray]:
        """A picture, uint8 [H, W, 3], resized to each (height, width): uint8 [rows, columns, patch_dim]."""
        p, patches = self.patch_size, []
        for resized, (height, width) in zip(resize(image, *sizes), sizes):
            cut = resized.reshape(height // p, p, width // p, 3 * p).transpose(0, 2, 1, 3)
            patches.append(cut.reshape(height // p, width // p, self.patch_dim))
        return patches


def resize(image: np.ndarray, *sizes: tuple[int, int]) -> list[np.ndarray]:
    """A picture, uint8 [H, W, 3], as uint8 [height, width, 3] of each size, as it is resized for the model."""
    if image.shape[0] * image.shape[1] > MOST_FLOAT_PIXELS and _bands_are_exact():
        return [_to_bytes(torch.cat(list(_bands(image, *size)))).reshape(*size, 3) for size in sizes]
    pixels = _as_floats(image)
    return [_to_bytes(_interpolated(pixels, *size)) for size in sizes]


def _to_bytes(pixels: torch.Tensor) -> np.ndarray:
    return pixels.round_().numpy().astype(np.uint8)


def _as_floats(image: np.ndarray) -> torch.Tensor:
    """float32 [1, 3, H, W]. Left in the order of [H, W, 3], which torch resizes twice as fast, to the same floats."""
    pixels = torch.from_numpy(np.array(image[None], dtype=np.float32, order="C"))
    return pixels.permute(0, 3, 1, 2)


def _interpolated(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """float32 [height, width, 3] of [1, 3, H, W]."""
    return interpolate(pixels, (height, width), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def _bands(image: np.ndarray, height: int, width: int) -> Iterator[torch.Tensor]:
    """The same of a picture, uint8 [H, W, 3], a few rows after the other: float32 [rows, 3 width].

    Every pixel comes from four, and only these become floats. They are added in the order, and with the rounding, of
    torch 2.14 (aten/src/ATen/native/cpu/UpSampleKernel.cpp, as it is compiled with fused multiplication and addition).
    """
    lines = image.reshape(len(image), -1)
    above, below, upper, lower = _neighbours(image.shape[0], height)
    left, right, near, far = _neighbours(image.shape[1], width)
    left, right = ((3 * columns[:, None] + np.arange(3)).ravel() for columns in (left, right))
    near, far = (torch.from_numpy(weights.repeat(3)) for weights in (near, far))

    def pixels(rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rows.take(columns, axis=1)).float()

    for start in range(0, height, BAND):
        band = slice(start, start + BAND)
        a, b = (torch.from_numpy(weights[band, None]) for weights in (upper, lower))
        rows = lines[above[band]]
        total = pixels(rows, right).mul_(a * far).addcmul_(pixels(rows, left), a * near)
        rows = lines[below[band]]
        yield total.addcmul_(pixels(rows, left), b * near).addcmul_(pixels(rows, right), b * far)


def _neighbours(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of `wanted` points spread evenly over `size` pixels: the pixel before and after each, and the weights of both."""
    # In double precision, then rounded: as one fused operation does it.
    scale = np.float64(np.float32(size) / np.float32(wanted))
    places = (scale * (np.arange(wanted) + 0.5) - 0.5).astype(np.float32).clip(0)
    first = places.astype(np.int64).clip(max=size - 1)
    after = (places - first.astype(np.float32)).clip(0, 1)
    return first, (first + 1).clip(max=size - 1), 1 - after, after


@cache
def _bands_are_exact() -> bool:
    """Whether this processor and this build of torch give the same bits both ways: they are compared once."""
    image = np.random.default_rng(0).integers(0, 256, (211, 233, 3), dtype=np.uint8)
    whole = _as_floats(image)
    return all(
        torch.equal(torch.cat(list(_bands(image, *size))).reshape(*size, 3), _interpolated(whole, *size))
        for size in ((97, 89), (24, 30))
    )
