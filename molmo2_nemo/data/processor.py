"""transformers' Molmo2 processors for one model geometry: the tokens of images and frames, and their pixels as bytes.

Sizes alone decide the tokens and the number of crops, so both are known before anything is decoded.
"""

import io
from collections.abc import Iterable
from functools import lru_cache
from itertools import batched

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer, Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

from molmo2_nemo.config import VisionConfig

# Frames resized at a time; the resize works in float32, 12 bytes for each pixel of the original.
FRAMES_AT_ONCE = 8
# Bytes stay bytes: the model maps them to [-1, 1] on its device.
AS_BYTES = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}


def build_processor(tokenizer: str, vision: VisionConfig, max_crops_per_image: int = 8) -> Molmo2Processor:
    """transformers' processor for this geometry. `tokenizer`: a folder, or a name on the Hugging Face hub.

    ValueError: there is no tokenizer, or it lacks a special token of Molmo2.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"data.tokenizer={tokenizer} holds no tokenizer ({reason}): set it to a folder with one."
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
            raise ValueError(f"data.tokenizer={tokenizer} lacks the token {token}: use a Molmo2 model's tokenizer.")
    return processor


class VisualInputs:
    """Tokens, crops and pooling windows of images and frames, as transformers' processor makes them.

    W = window: the larger pooling window, to which the other's windows are padded with -1.
    """

    def __init__(self, processor: Molmo2Processor):
        image, video = processor.image_processor, processor.video_processor
        self.processor = processor
        self.window = max(image.pooling_size[0], video.pooling_size[0]) ** 2
        self.patches_per_crop = (image.size["height"] // image.patch_size) ** 2
        self.patch_dim = 3 * image.patch_size**2
        self.token_ids = np.array(processor.image_token_ids, dtype=np.int32)
        self.patch_id = processor.tokenizer.convert_tokens_to_ids("<im_patch>")
        # One crop, pooled as a frame: [1 frame, rows, columns] of windows.
        side = -(-image.size["height"] // image.patch_size // video.pooling_size[0])
        frame = processor.get_video_string(torch.tensor([1, side, side]), [0.0])
        self.frame = self._ids(frame[frame.index("<frame_start>") :])
        # Few different grids and times, very many images and frames.
        self._image_size = lru_cache(maxsize=4096)(image.get_image_grid_and_crops)
        self._image_ids = lru_cache(maxsize=1024)(self._grid_ids)
        self._text_ids = lru_cache(maxsize=16384)(self._ids)

    def _ids(self, text: str) -> np.ndarray:
        ids = self.processor.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return np.array(ids, dtype=np.int32)

    def _grid_ids(self, grid: tuple[int, ...]) -> np.ndarray:
        return self._ids(self.processor.replace_image_token({"image_grids": [list(grid)]}, 0))

    def image_tokens(self, width: int, height: int) -> tuple[np.ndarray, int]:
        """Tokens of an image of so many pixels (int32 [n]) and its number of crops, the overview included.

        Images narrower than a tile's two margins follow transformers' (the released) processor, which does not clamp.
        """
        grid, crops = self._image_size(height, width)
        return self._image_ids(tuple(grid)), crops

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

    def image_pixels(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """Crops uint8 [C, P, patch_dim], the overview first, and pooling int64 [T, W] into their patches (-1: none)."""
        pixels = torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
        inputs = self.processor.image_processor(pixels, input_data_format="channels_first", **AS_BYTES)
        return inputs["pixel_values"].numpy(), self._padded(inputs["image_token_pooling"].numpy())

    def video_pixels(self, frames: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The same for frames, uint8 [H, W, 3] each: crops [frames, P, patch_dim] and pooling [T, W]."""
        crops, pooling, offset = [], [], 0
        for some in batched(frames, FRAMES_AT_ONCE):
            pixels = torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2)
            inputs = self.processor.video_processor(
                videos=[pixels], do_sample_frames=False, input_data_format="channels_first", **AS_BYTES
            )
            windows = inputs["video_token_pooling"].numpy()
            crops.append(inputs["pixel_values_videos"].numpy())
            pooling.append(np.where(windows >= 0, windows + offset, -1))
            offset += len(some) * self.patches_per_crop
        return np.concatenate(crops), self._padded(np.concatenate(pooling))

    def _padded(self, pooling: np.ndarray) -> np.ndarray:
        missing = self.window - pooling.shape[1]
        return np.pad(pooling.astype(np.int64), ((0, 0), (0, missing)), constant_values=-1)


def decode_image(data: bytes) -> Image.Image:
    """An RGB picture, turned as its EXIF orientation says. ValueError: the bytes are no readable picture."""
    try:
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise whatever they like on broken files
        raise ValueError(f"The image cannot be decoded: {error}.") from error
