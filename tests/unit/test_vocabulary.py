"""A model and another tokenizer than it was trained with are told apart, also where both have the same size."""

from programs import REPOSITORY, other_tokenizer
from transformers import AutoTokenizer

from molmo2_nemo.data import progress, vocabulary
from molmo2_nemo.data.blend import Source

SHIPPED = REPOSITORY / "molmo2_nemo" / "data" / "tokenizer"


def state(folder, **manifest):
    sources = [Source("a", "/data/a", 1.0, 3)]
    manifest = {progress.RANK: 0, progress.RANKS: 1, **manifest}
    folder.mkdir()
    (folder / "loader_dp000.state").write_bytes(progress.write(progress.beginning(sources), manifest, None))
    return folder


def test_a_checkpoint_and_a_hugging_face_folder_say_what_they_were_trained_with(tmp_path):
    digest = vocabulary.digest(AutoTokenizer.from_pretrained(SHIPPED))
    assert vocabulary.trained_with(SHIPPED) == digest != vocabulary.trained_with(other_tokenizer(tmp_path / "other"))
    assert vocabulary.trained_with(state(tmp_path / "checkpoint", **{vocabulary.TOKENIZER: digest})) == digest


def test_what_does_not_say_so_is_no_error(tmp_path):
    assert vocabulary.trained_with(tmp_path) is None
    assert vocabulary.trained_with(state(tmp_path / "old")) is None
    damaged = state(tmp_path / "damaged") / "loader_dp000.state"
    damaged.write_bytes(b"\x80\x04")
    assert vocabulary.trained_with(damaged.parent) is None
    (tmp_path / "tokenizer.json").write_text("{")
    assert vocabulary.trained_with(tmp_path) is None
