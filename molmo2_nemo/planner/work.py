"""What a packed row is assumed to hold before any data is read. Imports no torch."""

from dataclasses import dataclass

from molmo2_nemo.config.schema import Config

# arXiv 2601.10611, section 3: about 3.8 examples are packed into a row of 16,384 tokens.
TOKENS_PER_EXAMPLE = 16384 / 3.8
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


def row_work(config: Config) -> Work:
    """A full row: as many frames as its crop budget and its length allow, the rest text, no padding.

    A frame has the fewest tokens of all crops, so no row holds more crops. The row's examples are taken to be equally
    long, each as in the report or the whole row, and of one branch; visual tokens of an example see each other.
    """
    data, vision = config.data, config.model.vision
    side = vision.image_size // vision.patch_size
    windows = -(-side // vision.video_pooling)
    tokens = windows**2
    crops = min(data.max_crops, data.seq_length // (tokens + 2))
    visual = crops * tokens
    examples = max(1.0, data.seq_length / TOKENS_PER_EXAMPLE)
    if data.max_frames * (tokens + 2) > TOKENS_PER_EXAMPLE:
        # Long videos make long examples.
        examples = max(1.0, data.seq_length / min(data.seq_length, data.max_frames * (tokens + 2)))
    return Work(
        crops=crops,
        visual_tokens=visual,
        pooled_patches=crops * side**2,
        tokens=data.seq_length,
        attended=(data.seq_length**2 + visual**2) / (2 * examples),
        loss_tokens=LOSS_SHARE * (data.seq_length - visual),
    )
