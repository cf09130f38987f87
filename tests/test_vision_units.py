"""Images and frames are dealt to ranks whole, in order, and evenly."""

from hypothesis import given
from hypothesis import strategies as st

from molmo2_nemo.model.vision import split_units

units = st.lists(st.tuples(st.integers(1, 25), st.integers(1, 300)).map(list), max_size=40)


@given(units, st.integers(1, 8))
def test_every_unit_goes_to_one_rank_in_order(units, ranks):
    shares = split_units(units, ranks)
    assert len(shares) == ranks
    crop_bounds = [0]
    window_bounds = [0]
    for crops, windows in units:
        crop_bounds.append(crop_bounds[-1] + crops)
        window_bounds.append(window_bounds[-1] + windows)
    at_crop = at_window = 0
    for crop_start, crop_end, window_start, window_end in shares:
        assert (crop_start, window_start) == (at_crop, at_window)
        # A share ends where a unit ends, for crops and windows alike.
        assert crop_bounds.index(crop_end) == window_bounds.index(window_end)
        at_crop, at_window = crop_end, window_end
    assert (at_crop, at_window) == (crop_bounds[-1], window_bounds[-1])


@given(units, st.integers(1, 8))
def test_no_rank_has_more_than_its_share_and_one_unit(units, ranks):
    total = sum(crops for crops, _ in units)
    largest = max((crops for crops, _ in units), default=0)
    for crop_start, crop_end, *_ in split_units(units, ranks):
        assert crop_end - crop_start <= total / ranks + largest
