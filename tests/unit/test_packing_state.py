"""How long samples have waited for their row is part of a loader's state."""

from sources import VISION, config

from molmo2_nemo.data import packing
from molmo2_nemo.data.blend import load_blend
from molmo2_nemo.data.loader import save_state, train_loader


def rows_of(loader, batches=3):
    return [next(loader).__key__ for _ in range(batches)]


def test_how_long_samples_have_waited_is_carried_over(sample, tmp_path, monkeypatch):
    """A state of an earlier version, which does not say it, goes on, too, and packs other rows."""
    monkeypatch.setattr(packing, "MOST_ROWS", 3)
    data, state = config(sample, blend="sample_stage3"), tmp_path / "state"

    def loader(**saved):
        return train_loader(data, VISION, load_blend(data), 0, 1, None, 2, **saved)

    first = loader()
    rows_of(first)
    state.write_bytes(save_state(first))
    expected = rows_of(first)
    assert rows_of(loader(saved=[state])) == expected
    restore = packing.PackedRows.restore_state

    def restore_an_early_state(self, state):
        assert max(state.pop("_waited")) > 2
        restore(self, state)

    monkeypatch.setattr(packing.PackedRows, "restore_state", restore_an_early_state)
    assert rows_of(loader(saved=[state])) != expected
