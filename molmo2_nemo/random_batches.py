"""Random packed batches, for checks and benchmarks: there is no data set and no tokenizer behind them.

`random_documents` and `pack` make small rows of every kind of document, for comparing results: each document is there
for itself, too. `packed_row` makes rows as full as those of training, in the geometry of a released model, for
measuring time and memory.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from molmo2_nemo.config.schema import ModelConfig, VisionConfig, vision_token_ids
from molmo2_nemo.model.mask import ROOT_SEGMENT, SEGMENTS_PER_EXAMPLE, dense_mask

# Rows x columns of the tiles of an image, as the released processor cuts them.
TILINGS = ((1, 1), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2))


@dataclass
class Document:
    """A root (visual tokens and text) and its branches."""

    root: list[int]  # token ids
    root_vision: list[int]  # 1 for a token that belongs to an image or a video, else 0
    branches: list[list[int]]  # token ids of each
    crops: list[Tensor]  # uint8 [C, P, patch_dim] of each image or video
    pooling: list[Tensor]  # int [T, W]: which patches of the document each visual token pools; -1: none
    units: list[tuple[int, int]]  # (crops, visual tokens) of each image or frame


def random_documents(model: ModelConfig, seed: int) -> list[Document]:
    """Text only; one image; three images of odd shapes; a video; a message tree over an image."""
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor, arange_for_pooling

    rng, vision, ids = np.random.default_rng(seed), model.vision, vision_token_ids(model)
    image_column = model.vocab_size + 3
    processor = Molmo2ImageProcessor(
        size={"height": vision.image_size, "width": vision.image_size},
        patch_size=vision.patch_size,
        pooling_size=[vision.image_pooling] * 2,
        overlap_margins=[vision.overlap_margin] * 2,
        max_crops=4,
        do_rescale=False,
        do_normalize=False,
    )

    def text(n):
        # Patch ids may lie in the base vocabulary of a foreign config: keep text away from all special ids.
        allowed = np.setdiff1d(np.arange(model.vocab_size), list(ids.values()))
        return rng.choice(allowed, n).tolist()

    def image(height, width):
        pixels = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        out = processor(pixels, return_tensors="pt")
        low_rows, low_columns, rows, columns = out["image_grids"][0].tolist()
        tokens = [ids["low_res_image_start_token_id"], *[ids["image_patch_id"]] * (low_rows * low_columns)]
        tokens += [ids["image_end_token_id"], ids["image_start_token_id"]]
        tokens += ([ids["image_patch_id"]] * columns + [image_column]) * rows + [ids["image_end_token_id"]]
        return tokens, out["pixel_values"], out["image_token_pooling"], [(out["pixel_values"].shape[0], -1)]

    def video(frames):
        side = vision.image_size // vision.patch_size
        grid = torch.arange(side * side, dtype=torch.int32).view(side, side)
        windows, rows, columns = arange_for_pooling(grid, vision.video_pooling, vision.video_pooling)
        tokens, types, pooling = [], [], []
        for frame in range(frames):
            stamp = text(3)
            tokens += [*stamp, ids["frame_start_token_id"], *[ids["image_patch_id"]] * (rows * columns)]
            tokens.append(ids["frame_end_token_id"])
            types += [0] * len(stamp) + [1] * (rows * columns + 2)
            pooling.append(torch.where(windows >= 0, windows + frame * side * side, -1))
        crops = torch.from_numpy(rng.integers(0, 256, (frames, side * side, vision.patch_dim), dtype=np.uint8))
        return tokens, types, crops, torch.cat(pooling), [(1, rows * columns)] * frames

    def document(images=(), frames=0, branches=((9,),)):
        root, types, crops, pooling, units, offset = text(1), [0], [], [], [], 0
        for height, width in images:
            tokens, pixels, windows, unit = image(height, width)
            label = text(2)
            root += label + tokens
            types += [0] * len(label) + [1] * len(tokens)
            crops.append(pixels)
            pooling.append(torch.where(windows >= 0, windows + offset, -1))
            units.append((unit[0][0], windows.shape[0]))
            offset += pixels.shape[0] * pixels.shape[1]
        if frames:
            tokens, video_types, pixels, windows, unit = video(frames)
            root, types = root + tokens, types + video_types
            crops, pooling, units = [pixels], [windows], unit
        parts = [text(sum(lengths)) for lengths in branches]
        return Document(root, types, parts, crops, pooling, units)

    side = vision.image_size
    return [
        document(branches=((17,),)),
        document([(side, side)], branches=((11,),)),
        document([(side * 2 + 3, side - 5), (side + 40, side * 2 + 60), (20, 31)], branches=((13,),)),
        document(frames=3, branches=((12,),)),
        document([(side, side * 2)], branches=((8,), (5,), (11,))),
    ]


def pack(
    documents: list[Document], rows: int, model: ModelConfig, seed: int, multiple: int
) -> tuple[list[dict], list[tuple[int, Document, list[slice]]]]:
    """Deal documents to `rows` rows, whose length is a multiple of `multiple`.

    Returns a micro-batch for each row, and where the tokens of each document are: (row, document, [positions of its
    root, of its first branch, ...]). Every token of a branch has a random loss weight and predicts a random token, so
    labels need no alignment.
    """
    rng = np.random.default_rng(seed + 1)
    dealt = [documents[i::rows] for i in range(rows)]
    longest = max(sum(len(d.root) + sum(map(len, d.branches)) for d in row) for row in dealt)
    S = -(-(longest + 3) // multiple) * multiple
    width = model.vision.video_pooling**2
    batches, places = [], []
    for r, row in enumerate(dealt):
        arrays = {k: np.zeros(S, np.int64) for k in ("input_ids", "position_ids", "labels", "vision_mask")}
        arrays["segment_ids"] = np.full(S, -1, np.int64)
        weights = np.zeros(S, np.float32)
        crops, pooling, units, at, patches = [], [], [], 0, 0
        for k, document in enumerate(row):
            tree = len(document.branches) > 1
            pieces = [(document.root, document.root_vision, 0, ROOT_SEGMENT if tree else 0)]
            pieces += [
                (tokens, [0] * len(tokens), len(document.root), m if tree else 0)
                for m, tokens in enumerate(document.branches)
            ]
            spans = []
            for tokens, types, start, segment in pieces:
                span = slice(at, at + len(tokens))
                arrays["input_ids"][span] = tokens
                arrays["vision_mask"][span] = types
                arrays["position_ids"][span] = np.arange(start, start + len(tokens))
                arrays["segment_ids"][span] = SEGMENTS_PER_EXAMPLE * k + segment
                if len(spans):
                    weights[span] = rng.choice([0.0, 0.1, 0.2, 1.0, 2.0], len(tokens))
                    weights[span.start] = 0.7
                spans.append(span)
                at = span.stop
            places.append((r, document, spans))
            crops += document.crops
            for windows in document.pooling:
                windows = torch.where(windows >= 0, windows + patches, -1).long()
                pooling.append(F.pad(windows, (0, width - windows.shape[1]), value=-1))
            units += document.units
            patches += sum(c.shape[0] * c.shape[1] for c in document.crops)
        arrays["labels"] = rng.integers(0, model.vocab_size, S)
        batch = {k: torch.from_numpy(v)[None] for k, v in arrays.items()}
        batch["vision_mask"] = batch["vision_mask"].bool()
        batch["loss_weights"] = torch.from_numpy(weights)[None]
        shape = (0, model.vision.patches_per_crop, model.vision.patch_dim)
        batch["crops"] = torch.cat(crops) if crops else torch.zeros(shape, dtype=torch.uint8)
        batch["pooling"] = torch.cat(pooling) if pooling else torch.zeros((0, width), dtype=torch.long)
        batch["vision_units"] = torch.tensor(units, dtype=torch.long).view(-1, 2)
        batches.append(batch)
    return batches, places


def row_contents(
    rng: np.random.Generator, vision: VisionConfig, seq_length: int, max_crops: int
) -> list[tuple[list[tuple[int, int]], list[int]]]:
    """What a row holds: (crops, visual tokens) of each document's images and frames, and the lengths of its answers.

    Half of the crops are frames, the rest tiles of images; several answers make a message tree. All crops are used, and
    text fills what is left of the row.
    """
    side = vision.image_size // vision.patch_size
    low = (-(-side // vision.image_pooling)) ** 2
    frame = (-(-side // vision.video_pooling)) ** 2
    inner = side - 2 * vision.overlap_margin  # patches that a tile adds
    found, crops, room = [], max_crops, seq_length
    frames_left = max_crops // 2

    def add(units, answers):
        nonlocal crops, room
        length = 1 + sum(tokens + 2 for _, tokens in units) + sum(answers)
        if sum(n for n, _ in units) > crops or length > room:
            return False
        crops, room = crops - sum(n for n, _ in units), room - length
        found.append((units, answers))
        return True

    while frames_left > 0:
        frames = min(int(rng.integers(8, max(9, max_crops // 2))), frames_left)
        if not add([(1, frame)] * frames, [int(rng.integers(10, 60))]):
            break
        frames_left -= frames
    misses = 0
    while crops and misses < 8:
        rows, columns = TILINGS[rng.integers(len(TILINGS))]
        high = [-(-(inner * n + 2 * vision.overlap_margin) // vision.image_pooling) for n in (rows, columns)]
        answers = [int(n) for n in rng.integers(10, 60, rng.choice([1, 1, 3, 6]))]
        misses += not add([(1, low), (rows * columns, high[0] * high[1])], answers)
    while crops and add([(1, frame)], [10]):
        pass
    while room >= 12:
        add([], [int(min(room - 1, rng.integers(60, 400)))])
    if room:
        units, answers = found[-1]
        found[-1] = (units, [*answers[:-1], answers[-1] + room])
    rng.shuffle(found)
    return found


def packed_row(model: ModelConfig, seq_length: int, max_crops: int, seed: int, device: str = "cpu") -> dict:
    """A micro-batch of one packed row without padding, with the tensors that training hands to the model.

    Text follows a rule (the next id is 5 x the last + 7 modulo 509, broken at one place in ten), so it can be learned.
    """
    rng, ids, vision = np.random.default_rng(seed), vision_token_ids(model), model.vision
    row = {name: np.zeros(seq_length, np.int64) for name in ("input_ids", "labels", "position_ids", "segment_ids")}
    row["vision_mask"], row["loss_weights"] = np.zeros(seq_length, bool), np.zeros(seq_length, np.float32)
    patches, window = vision.patches_per_crop, vision.video_pooling**2
    pooling, all_units, at, first_patch = [], [], 0, 0
    for number, (units, answers) in enumerate(row_contents(rng, vision, seq_length, max_crops)):
        tree = len(answers) > 1
        root = [1]
        for crops, tokens in units:
            root += [ids["image_start_token_id"], *[ids["image_patch_id"]] * tokens, ids["image_end_token_id"]]
            # Consecutive patches, not squares of them: the same work.
            taken = vision.video_pooling**2 if crops == 1 and tokens * 4 < patches else vision.image_pooling**2
            index = np.arange(tokens * taken).reshape(tokens, taken) % (crops * patches) + first_patch
            pooling.append(np.pad(index, ((0, 0), (0, window - taken)), constant_values=-1))
            all_units.append((crops, tokens))
            first_patch += crops * patches
        span = slice(at, at + len(root))
        row["input_ids"][span], row["vision_mask"][span] = root, [False] + [True] * (len(root) - 1)
        row["position_ids"][span] = np.arange(len(root))
        row["segment_ids"][span] = SEGMENTS_PER_EXAMPLE * number + (ROOT_SEGMENT if tree else 0)
        at = span.stop
        for branch, length in enumerate(answers):
            text = [int(rng.integers(509))]
            for broken in rng.random(length):
                text.append(int(rng.integers(509)) if broken < 0.1 else (5 * text[-1] + 7) % 509)
            span = slice(at, at + length)
            row["input_ids"][span], row["labels"][span] = text[:-1], text[1:]
            row["loss_weights"][span] = 2 / length**0.5
            row["position_ids"][span] = np.arange(length) + len(root)
            row["segment_ids"][span] = SEGMENTS_PER_EXAMPLE * number + (branch if tree else 0)
            at = span.stop
    batch = {name: torch.from_numpy(values)[None] for name, values in row.items()}
    batch["crops"] = torch.from_numpy(
        rng.integers(0, 256, (first_patch // patches, patches, vision.patch_dim), dtype=np.uint8)
    )
    batch["pooling"] = torch.from_numpy(np.concatenate(pooling) if pooling else np.zeros((0, window), np.int64))
    batch["vision_units"] = torch.tensor(all_units, dtype=torch.int64).view(-1, 2)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def visible_pairs(batch: dict) -> int:
    """Pairs of query and key that the mask lets through, counted a slice of queries at a time."""
    segments, vision = batch["segment_ids"], batch["vision_mask"]
    S = segments.shape[1]
    return sum(int(dense_mask(segments, vision, q, min(512, S - q)).sum()) for q in range(0, S, 512))
