"""Images and frames are dealt to ranks whole, in order, and as evenly as that allows; and to chunks likewise.

And what the first weights of the vision transformer are.
"""

import itertools

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given
from hypothesis import strategies as st

from molmo2_nemo.config.schema import VisionConfig
from molmo2_nemo.model.vision import chunks_of, cosine_waves, first_embeddings, sines_of_places, split_units
from molmo2_nemo.planner.work import most_crops

units = st.lists(st.tuples(st.integers(1, 25), st.integers(1, 300)).map(list), max_size=40)


def load(share):
    return sum(crops for crops, _ in share)


@given(units, st.integers(1, 8))
def test_every_unit_goes_to_one_rank_in_order(units, ranks):
    shares = split_units(units, ranks)
    assert len(shares) == ranks
    assert list(itertools.chain(*shares)) == units


@given(units, st.integers(1, 64))
def test_no_rank_has_more_than_its_share_and_one_unit(units, ranks):
    largest = max((crops for crops, _ in units), default=0)
    assert max(map(load, split_units(units, ranks))) <= load(units) / ranks + largest


@given(st.lists(st.tuples(st.integers(1, 25), st.just(1)).map(list), max_size=9), st.integers(1, 4))
def test_no_deal_in_order_is_more_even(units, ranks):
    best = min(
        max(load(units[start:end]) for start, end in itertools.pairwise((0, *cuts, len(units))))
        for cuts in itertools.combinations_with_replacement(range(len(units) + 1), ranks - 1)
    )
    assert max(map(load, split_units(units, ranks))) == best


@given(units, st.integers(1, 8))
def test_the_planner_has_the_most_loaded_rank(units, ranks):
    assert most_crops([crops for crops, _ in units], ranks) == max(map(load, split_units(units, ranks)))


@given(units, st.integers(0, 30))
def test_chunks_are_whole_units_and_no_larger_than_asked(units, size):
    chunks, left = chunks_of(units, size), list(units)
    for number, (crops, windows) in enumerate(chunks):
        taken = [left.pop(0)]
        while load(taken) < crops:
            taken.append(left.pop(0))
        assert (load(taken), sum(w for _, w in taken)) == (crops, windows)
        assert crops <= size or size == 0 or len(taken) == 1
        # The next unit would not have fitted.
        assert number == len(chunks) - 1 or crops + left[0][0] > size > 0
    assert not left


def test_the_first_patch_embedding_is_the_cosine_transform_of_each_colour():
    side = 14
    patch = np.random.default_rng(0).uniform(-1, 1, (side, side, 3))
    numbers = cosine_waves(side) @ torch.tensor(patch.reshape(-1)).float()
    expected = 0.7 * np.stack([scipy.fft.dctn(patch[..., colour], norm="ortho") for colour in range(3)], -1)
    expected[0, 0] /= 6
    rows = [(u, v) for u in range(side) for v in range(side)]
    rows.sort(key=lambda row: row[0] ** 2 + row[1] ** 2)  # a stable sort: u decides among equals
    assert numbers.view(-1, 3).numpy() == pytest.approx(np.stack([expected[row] for row in rows]), abs=1e-5)


def test_the_first_position_embeddings_tell_every_place_apart():
    places = sines_of_places(6, 66)
    assert places.shape == (36, 66) and places.abs().max() <= 1 and not places[:, 64:].any()
    angle = 1.5 / 6 ** (3 / 16)  # the fourth wavelength
    assert places[2 * 6 + 5, [3, 19, 35, 51]].numpy() == pytest.approx(
        [np.sin(2 * angle), np.cos(2 * angle), np.sin(5 * angle), np.cos(5 * angle)], abs=1e-6
    )
    assert torch.cdist(places, places).fill_diagonal_(9).min() > 1


@pytest.mark.parametrize("width", [64, 1152])
def test_what_is_seen_and_where_it_is_have_dimensions_of_their_own(width):
    vision = VisionConfig(image_size=84, patch_size=14)
    weight, positions = torch.randn(width, vision.patch_dim), torch.randn(36, width)
    first_embeddings(weight, positions, vision, 0.1)
    seen, places = weight.any(1), positions.any(0)
    assert torch.equal(seen, ~places) and places.sum() == width * 3 // 16
    assert len(positions[:, places].unique(dim=0)) == 36  # no two places are alike
