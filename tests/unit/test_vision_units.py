"""Images and frames are dealt to ranks whole, in order, and as evenly as that allows; and to chunks likewise."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from molmo2_nemo.model.vision import chunks_of, split_units
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
