"""What is carried over to a training stream that was made of something else: by source, and said in one sentence."""

import numpy as np
import pytest

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.data import progress
from molmo2_nemo.data.blend import Source, SourceOptions
from molmo2_nemo.data.vocabulary import TOKENIZER


def source(name, samples, weight=0.5, **options):
    return Source(name, f"/data/{name}", weight, samples, options=SourceOptions(**options))


def manifest(sources, rank=0, ranks=1, **settings):
    return {
        "data.seed": 1,
        "data.seq_length": 256,
        **settings,
        **{f"source {one.name}": progress.source_entry(one) for one in sources},
        progress.ORDER: [one.name for one in sources],
        progress.VISION: {"image_size": 84},
        TOKENIZER: "abc",
        progress.RANKS: ranks,
        progress.RANK: rank,
        progress.RESTART: False,
    }


OLD = [source("a", 4), source("b", 3)]


@pytest.fixture
def saved(tmp_path):
    """Two ranks have read a's samples 2, 1, 0 and 1 times, b's 0, 0 and 1 times."""
    files = []
    for rank, counts in enumerate(([1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 1])):
        position = progress.beginning(OLD)
        position.consumed[:] = counts
        files.append(tmp_path / f"loader_dp{rank:03d}.state")
        files[-1].write_bytes(progress.write(position, manifest(OLD, rank, 2), None))
    return files


def ahead(position, number):
    return position.ahead_in(number).tolist()


def test_the_same_stream_goes_on_exactly(saved):
    for rank in range(2):
        position = progress.read(saved, manifest(OLD, rank, 2), OLD)
        assert position.note == "" and position.times_dealt == 0
        assert position.consumed.sum() == [2, 3][rank]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"data.seed": 2}, "data.seed was 1 and is 2"),
        ({"data.seq_length": 512}, "data.seq_length was 256 and is 512"),
        ({"data.new_key": 3}, "data.new_key was unset and is 3"),
        ({progress.RANKS: 1}, "data-parallel size was 2 and is 1"),
    ],
)
def test_another_setting_keeps_what_was_read(saved, settings, words):
    position = progress.read(saved, {**manifest(OLD, 0, 2), **settings}, OLD)
    assert f"dealt anew, in another order, since {words}: first comes" in position.note
    assert position.note.endswith("of 2 of 2 sources")
    assert ahead(position, 0) == [2, 1, 0, 1] and ahead(position, 1) == [0, 0, 1]
    assert position.times_dealt == 1 and position.energon is None and not position.consumed.any()


def test_sources_come_go_grow_and_change_places(saved):
    new = [source("c", 2, 0.2), source("b", 4, 0.3), source("a", 4, 0.5, token_weight=2.0)]
    position = progress.read(saved, manifest(new, 0, 2), new)
    assert [ahead(position, number) for number in range(3)] == [[0, 0], [0, 0, 0, 0], [2, 1, 0, 1]]
    for words in ("source c is new", "source b had 3 samples and has 4", "source a has other options"):
        assert words in position.note
    assert position.note.endswith("of 1 of 3 sources; read from the beginning: c, b") and "[" not in position.note
    # One that was left out, and shares alone.
    position = progress.read(saved, manifest(OLD[1:], 0, 2), OLD[1:])
    assert ahead(position, 0) == [0, 0, 1] and "source a was left out" in position.note
    shares = [source("a", 4, 0.9), source("b", 3, 0.1)]
    assert "have other shares or another order" in progress.read(saved, manifest(shares, 0, 2), shares).note


def test_data_begin_again_once(saved, tmp_path):
    wanted = manifest(OLD, 0, 2) | {progress.RESTART: True}
    position = progress.read(saved, wanted, OLD)
    assert "start again from the beginning" in position.note and not position.ahead.any() and position.times_dealt == 1
    for rank, path in enumerate(saved):
        path.write_bytes(progress.write(position, wanted | {progress.RANK: rank}, None))
    again = progress.read(saved, wanted, OLD)
    assert again.note == "" and again.times_dealt == 1
    # Leaving the override off again changes nothing.
    assert progress.read(saved, manifest(OLD, 0, 2), OLD).note == ""


def test_a_state_of_an_older_version_goes_on_exactly(tmp_path):
    """It does not know of train.restart_data."""
    position = progress.beginning(OLD)
    position.consumed[:] = np.arange(7)
    old = manifest(OLD)
    del old[progress.RESTART]
    path = tmp_path / "state"
    path.write_bytes(progress.write(position, old, None))
    found = progress.read([path], manifest(OLD), OLD)
    assert found.note == "" and found.consumed.tolist() == list(range(7))


@pytest.mark.parametrize("key, name", [(TOKENIZER, "data.tokenizer"), (progress.VISION, "model.vision")])
def test_what_the_model_has_learned_is_kept(saved, key, name):
    with pytest.raises(ConfigError, match=f"{name} is not what the checkpoint was trained with"):
        progress.read(saved, manifest(OLD, 0, 2) | {key: "other"}, OLD)
