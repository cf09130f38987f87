"""Large pictures are resized without being made floats as a whole, to the same bits."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from molmo2_nemo.data import processor
from molmo2_nemo.data.processor import resize

RNG = np.random.default_rng(0)


def picture(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def in_one_piece(image, height, width):
    """float32 [height, width, 3], by torch alone."""
    pixels = torch.from_numpy(image.astype(np.float32)[None]).permute(0, 3, 1, 2)
    return interpolate(pixels, (height, width), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)


def exact_here():
    if not processor._bands_are_exact():
        pytest.skip("this processor adds in another order, and torch resizes pictures in one piece")


def test_bands_are_torchs_floats_bit_for_bit():
    exact_here()
    sizes = RNG.integers(1, 200, (60, 4)).tolist()
    sizes += [(1, 1, 9, 9), (9, 9, 1, 1), (1, 200, 50, 50), (50, 60, 50, 60), (50, 60, 50, 61), (300, 400, 17, 16)]
    for height, width, *wanted in sizes:
        image = picture(height, width)
        bands = torch.cat(list(processor._bands(image, *wanted))).reshape(*wanted, 3)
        assert torch.equal(bands, in_one_piece(image, *wanted)), (height, width, wanted)


@pytest.mark.parametrize("shape", [(700, 900), (901, 640), (3000, 211)])
def test_a_large_picture_gives_torchs_bytes_and_never_becomes_floats(shape, monkeypatch):
    exact_here()
    image, sizes = picture(*shape), [(126, 126), (182, 224)]
    monkeypatch.setattr(processor, "MOST_FLOAT_PIXELS", 500_000)
    with monkeypatch.context() as patch:
        patch.setattr(processor, "_as_floats", lambda image: pytest.fail("the whole picture became floats"))
        resized = resize(image, *sizes)
        mirrored = resize(image[:, ::-1], *sizes)
    for one, two, size in zip(resized, mirrored, sizes):
        assert one.dtype == np.uint8 and one.shape == (*size, 3)
        assert np.array_equal(one, in_one_piece(image, *size).round().numpy())
        assert np.array_equal(two, in_one_piece(image[:, ::-1], *size).round().numpy())


def test_where_bands_are_not_exact_torch_resizes_in_one_piece(monkeypatch):
    monkeypatch.setattr(processor, "MOST_FLOAT_PIXELS", 100_000)
    monkeypatch.setattr(processor, "_bands_are_exact", lambda: False)
    monkeypatch.setattr(processor, "_bands", lambda *_: pytest.fail("bands that are not exact were used"))
    image = picture(400, 500)
    (resized,) = resize(image, (56, 84))
    assert np.array_equal(resized, in_one_piece(image, 56, 84).round().numpy())
