"""What a run starts from is looked at before it starts."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config, ModelConfig, TrainConfig
from molmo2_nemo.hf import convert
from molmo2_nemo.hf.architecture import model_config_from_hf
from molmo2_nemo.training import agreement, owner
from molmo2_nemo.training.start import find_start, last_saved_step, newest_verified


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
    assert "is no folder: name a run" in refused(tmp_path / "nothing")
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


def test_a_folder_that_nodes_do_not_share_is_refused(tmp_path, monkeypatch):
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert agreement.shared(tmp_path) is None  # nobody owns it, as in tests
    held = owner.Owner(tmp_path)
    assert agreement.shared(tmp_path) is None
    answers = iter([{"token": "of rank 0"}])
    monkeypatch.setattr(agreement, "SECONDS_TO_SEE_A_FILE", 0)
    monkeypatch.setattr(agreement.owner, "read", lambda path: next(answers, None))
    assert f"run_dir={tmp_path} is another folder for rank 0 on" in agreement.shared(tmp_path)
    monkeypatch.undo()
    held.release()


def save(path, step):
    make = {"weight": lambda: torch.arange(12.0).reshape(4, 3)}
    state = {"weight": torch.empty(4, 3, device="meta")}
    convert.write_checkpoint(path, ModelConfig(name="m"), state, make, {"step": step, "stage": "test"})


def test_the_newest_whole_checkpoint_is_found_by_its_checksums(tmp_path):
    """For a start, and for going back after a jump of the loss."""
    if not dist.is_initialized():  # another test of this process may have left its group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    paths = [tmp_path / checkpoint_dir.step_name(step) for step in (1, 2, 3)]
    for step, path in enumerate(paths, start=1):
        save(path, step)
    for path in paths[1:]:
        [file] = path.glob("*.distcp")
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert newest_verified(tmp_path, paths[2], verify=False) == (paths[2], [])
    found, ignored = newest_verified(tmp_path, paths[2], verify=True)
    assert found == paths[0] and len(ignored) == 2 and all("SHA-256" in line for line in ignored)
    assert [(path / checkpoint_dir.DAMAGED).exists() for path in paths] == [False, True, True]
    assert newest_verified(tmp_path, None, verify=True) == (None, [])


@pytest.mark.parametrize(
    "line, step",
    [
        (b'{"kind": "checkpoint", "step": 7, "saved_step": 6}', 6),
        (b'{"kind": "checkpoint", "step": 7}', 7),
        (b'{"kind": "checkpoint"}', 3),
        (b'\xff\xfe{"kind": "checkpoint"', 3),
        (b'["kind": "checkpoint"', 3),
        (b'["\\"kind\\": \\"checkpoint\\""]', 3),
        (b'"\\"kind\\": \\"checkpoint\\""', 3),
    ],
)
def test_the_log_tells_what_was_saved_whatever_stands_in_it(tmp_path, line, step):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "checkpoint", "step": 3}\n' + line + b"\n")
    assert last_saved_step(tmp_path) == step


def test_a_file_in_the_place_of_the_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").touch()
    for start_over in (False, True):
        with pytest.raises(ConfigError, match="checkpoints is a file, .*: remove it"):
            find_start(Config(run_dir=str(tmp_path), train=TrainConfig(start_over=start_over)))
    (tmp_path / "checkpoints").unlink()
    assert find_start(Config(run_dir=str(tmp_path), train=TrainConfig())).resume is None
