"""The micro-batches of a rehearsal: values on the host, tensors without memory on the device."""

import numpy as np
import torch
from torch import Tensor

from molmo2_nemo.config.schema import Config, vision_token_ids
from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE
from molmo2_nemo.planner.work import TOKENS_PER_EXAMPLE, TOKENS_PER_IMAGE_CROP, holds_images, units_of
from molmo2_nemo.random_batches import packed_row
from molmo2_nemo.rehearsal.recorder import Recorder
from molmo2_nemo.training.batches import FIELDS, HOST_FIELD, INDICES, VISION_FIELDS, work_of

KINDS = ("full", "pictures", "text")
OF_PICTURES = (*VISION_FIELDS, HOST_FIELD)  # not [B, S]


class HostPixels:
    """Pixels in host memory, of which a copy goes to the device for each forward pass."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __len__(self):
        return self.shape[0]

    def to(self, device, non_blocking: bool = False) -> Tensor:
        return torch.empty(self.shape, dtype=torch.uint8, device=device)


class Values(dict):
    """A micro-batch's tensors by name, also as attributes, as `work_of` takes them."""

    __getattr__ = dict.__getitem__


def micro_batch(config: Config, kind: str, seed: int) -> Values:
    """One micro-batch with values, of `train.micro_batch_size` rows.

    full: what the planner assumes, images in stage 1 and else as many frames as fit, and every token carries loss.
    pictures: frames and images of many sizes and text, the same for a seed. text: no picture.
    """
    model, data, rows = config.model, config.data, config.train.micro_batch_size
    made = []
    for row in range(rows):
        if kind == "pictures":
            made.append(packed_row(model, data.seq_length, data.max_crops, seed * rows + row))
        else:
            made.append(plain_row(config, units_of(config) if kind == "full" else []))
    joined = Values({name: torch.cat([row[name] for row in made]) for name in made[0] if name not in OF_PICTURES})
    patches, offset, pooling = model.vision.patches_per_crop, 0, []
    for row in made:
        pooling.append(torch.where(row["pooling"] >= 0, row["pooling"] + offset, -1))
        offset += int(row["vision_units"][:, 0].sum()) * patches
    joined["pooling"] = torch.cat(pooling)
    joined["vision_units"] = torch.cat([row["vision_units"] for row in made])
    joined["crops"] = range(offset // patches)  # their number alone is looked at
    joined["source_ids"] = torch.zeros_like(joined["input_ids"], dtype=torch.int32)
    joined["work"] = work_of(joined)
    return joined


def plain_row(config: Config, units: list[tuple[int, int, int]]) -> dict[str, Tensor]:
    """A row of these images or frames, then text, in examples of about the same length; all of it carries loss."""
    model, S = config.model, config.data.seq_length
    vision, ids, images = model.vision, vision_token_ids(model), holds_images(config)
    width = (vision.image_pooling if images else vision.video_pooling) ** 2
    windows = sum(windows for _, windows, _ in units)
    of_pictures = windows + 2 * len(units)  # a start and an end each
    per_example = TOKENS_PER_EXAMPLE
    if units:
        # As in planner/work.py: an image and its text, or a long video.
        video = max(TOKENS_PER_EXAMPLE, config.data.max_frames * (units[0][1] + 2))
        per_example = units[0][0] * TOKENS_PER_IMAGE_CROP if images else video
    per_example = min(S, int(per_example))
    number = np.arange(S) // per_example
    input_ids, visual = np.full(S, 9), np.zeros(S, bool)
    start, patch, end = (ids[name] for name in ("frame_start_token_id", "image_patch_id", "frame_end_token_id"))
    input_ids[:of_pictures] = [token for _, count, _ in units for token in (start, *[patch] * count, end)]
    visual[:of_pictures] = True
    patches = sum(crops for crops, _, _ in units) * vision.patches_per_crop
    pooling = np.arange(windows * width).reshape(-1, width) % max(1, patches)
    pooling[: windows * width - sum(filled for _, _, filled in units), -1] = -1  # windows at an edge have fewer
    row = {
        "input_ids": input_ids,
        "labels": np.full(S, 9),
        "position_ids": np.arange(S) % per_example,
        "segment_ids": SEGMENTS_PER_EXAMPLE * number,
        "pooling": pooling,
        "vision_units": np.array([unit[:2] for unit in units], np.int64).reshape(-1, 2),
    }
    tensors = {name: torch.from_numpy(values).long() for name, values in row.items()}
    tensors = {name: t if name in OF_PICTURES else t[None] for name, t in tensors.items()}
    return tensors | {"vision_mask": torch.from_numpy(visual)[None], "loss_weights": torch.ones(1, S)}


def on_device(values: dict, config: Config, recorder: Recorder, is_first_stage: bool) -> dict:
    """A micro-batch as training hands it to a rank: tensors on the device whose values the recorder knows.

    values: the rank's part of a micro-batch (training/batches.own_part).
    """
    vision, batch = config.model.vision, {}
    for name in (*FIELDS, *INDICES, HOST_FIELD):
        if name in VISION_FIELDS and not is_first_stage:
            continue
        if name == "crops":
            batch[name] = HostPixels((len(values["crops"]), vision.patches_per_crop, vision.patch_dim))
            continue
        device = "cpu" if name == HOST_FIELD else "cuda"
        batch[name] = torch.empty(values[name].shape, dtype=values[name].dtype, device=device)
        recorder.give_values(batch[name], values[name])
    return batch
