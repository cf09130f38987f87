"""What a run starts from is looked at before it starts."""

import json
import shutil

import pytest

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config, TrainConfig
from molmo2_nemo.hf.architecture import model_config_from_hf
from molmo2_nemo.training.start import find_start


def test_what_cannot_start_a_run_is_refused_in_one_sentence(hf_models, tmp_path):
    def refused(init_from, **model):
        architecture = model_config_from_hf(hf_models["olmo3"])
        for key, value in model.items():
            setattr(architecture, key, value)
        given = TrainConfig(init_from=init_from if isinstance(init_from, list) else str(init_from))
        with pytest.raises(ConfigError) as error:
            find_start(Config(run_dir=str(tmp_path / "run"), model=architecture, train=given))
        return str(error.value)

    (tmp_path / "empty").mkdir()
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "is an empty folder" in refused(tmp_path / "empty")
    assert "is a file" in refused(hf_models["olmo3"] / "config.json")
    assert "has model.hidden_size=48, this run has 64" in refused(hf_models["olmo3"], hidden_size=64)
    for kind, sentence in (("llama", "only molmo2 can be read"), ("qwen3", r"half a model: give both")):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        assert sentence in refused(folder)
    assert "a vision tower is one of siglip" in refused([str(tmp_path / "qwen3"), str(tmp_path / "llama")])
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(hf_models["olmo3"] / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    assert "only safetensors are read, never pickles" in refused(pickled)
