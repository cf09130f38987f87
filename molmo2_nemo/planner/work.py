"""What a packed row is assumed to hold before any data is read. Imports no torch."""

from dataclasses import dataclass

from molmo2_nemo.config.schema import Config, VisionConfig

# arXiv 2601.10611, section 3: about 3.8 examples are packed into a row of 16,384 tokens.
TOKENS_PER_EXAMPLE = 16384 / 3.8
# The same report's pre-training: rows of 2,560 tokens hold at most 16 crops, with the text about them.
TOKENS_PER_IMAGE_CROP = 2560 / 16
LOSS_SHARE = 0.5  # of the text; assumed


@dataclass
class Work:
    """Arguments of flops.forward_flops, for one row."""

    crops: float
    visual_tokens: float
    pooled_patches: float
    tokens: float
    attended: float
    loss_tokens: float


def holds_images(config: Config) -> bool:
    """Stage 1 has pictures and no video (arXiv 2601.10611, section 4)."""
    return config.stage == "stage1"


def row_work(config: Config) -> Work:
    """A full row, no padding: pictures with their text in stage 1, else as many frames as fit, and text.

    A frame has the fewest tokens of all crops, so no row holds more crops. The row's examples are taken to be equally
    long, each as in the report or the whole row, and of one branch; visual tokens of an example see each other.
    """
    data, vision = config.data, config.model.vision
    side = vision.image_size // vision.patch_size
    examples = max(1.0, data.seq_length / TOKENS_PER_EXAMPLE)
    if holds_images(config):
        crops, windows, patches = image_of(vision, data.max_crops_per_image)
        count = min(data.max_crops, round(data.seq_length / TOKENS_PER_IMAGE_CROP), data.seq_length * crops // windows)
        visual, pooled = count * windows / crops, count * patches / crops
        # An example is a picture and its text.
        examples = max(1.0, data.seq_length / (crops * TOKENS_PER_IMAGE_CROP))
    else:
        tokens = (-(-side // vision.video_pooling)) ** 2
        count = min(data.max_crops, data.seq_length // (tokens + 2))
        visual, pooled = count * tokens, count * side**2
        if data.max_frames * (tokens + 2) > TOKENS_PER_EXAMPLE:
            # Long videos make long examples.
            examples = max(1.0, data.seq_length / min(data.seq_length, data.max_frames * (tokens + 2)))
    return Work(
        crops=count,
        visual_tokens=visual,
        pooled_patches=pooled,
        tokens=data.seq_length,
        attended=(data.seq_length**2 + visual**2) / (2 * examples),
        loss_tokens=LOSS_SHARE * (data.seq_length - visual),
    )


def units_of(config: Config) -> list[tuple[int, int, int]]:
    """(crops, windows, patches in these) of each image or frame of a full row."""
    data, vision = config.data, config.model.vision
    side, crops = vision.image_size // vision.patch_size, int(row_work(config).crops)
    if not holds_images(config):
        return [(1, (-(-side // vision.video_pooling)) ** 2, side**2)] * crops
    whole = image_of(vision, data.max_crops_per_image)
    last = crops % whole[0]
    units = [whole] * (crops // whole[0]) + [tuple(last * size // whole[0] for size in whole)] * (last > 0)
    while sum(windows + 2 for _, windows, _ in units) > data.seq_length:
        units.pop()
    return units


def most_crops(sizes: list[int], ranks: int) -> int:
    """Crops of the rank that has most of them, where images and frames of these sizes are dealt whole and in order so
    that it has as few as possible (model/vision.py, split_units)."""
    limit = max(max(sizes, default=0), -(-sum(sizes) // ranks))
    while True:
        needed, load = 1, 0
        for size in sizes:
            needed, load = (needed, load + size) if load + size <= limit else (needed + 1, size)
        if needed <= ranks:
            return limit
        limit += 1


def image_of(vision: VisionConfig, max_crops: int) -> tuple[int, int, int]:
    """(crops, windows, patches in them) of an overview and max_crops tiles, twice as wide as high.

    Neighbouring tiles overlap by two margins, which are dropped; windows at the edge may be cut.
    """
    side, pooling = vision.image_size // vision.patch_size, vision.image_pooling
    rows = max(1, int((max_crops / 2) ** 0.5))
    columns = max(1, max_crops // rows)
    new = side - 2 * vision.overlap_margin
    high, wide = (new * n + 2 * vision.overlap_margin for n in (rows, columns))
    windows = -(-side // pooling) * -(-side // pooling) + -(-high // pooling) * -(-wide // pooling)
    return 1 + rows * columns, windows, side**2 + high * wide
