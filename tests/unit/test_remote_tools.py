"""tools/import_hf.py, tools/export_hf.py and the pre-flight's look at addresses."""

import socket
import sys

import pytest
import torch
from object_store import environment
from programs import load
from safetensors.torch import load_file

from molmo2_nemo import checkpoint_dir, storage
from molmo2_nemo.config.schema import Config, DataConfig, TrainConfig


def run(monkeypatch, tool, *arguments):
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    load(f"tools/{tool}.py").main()


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.slow
def test_a_model_goes_through_addresses_unchanged(export, disk, tmp_path, monkeypatch, capsys):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for path in export.iterdir():
        storage.upload_file(path, f"msc://disk/hf/{path.name}")
    run(monkeypatch, "import_hf", "msc://disk/hf", "msc://disk/start", "--scratch", scratch)
    assert "start from it: model=NAME (of the same sizes) train.init_from=msc://disk/start" in capsys.readouterr().out
    checkpoint_dir.verify(disk / "start")
    out = ("export_hf", "msc://disk/start", "msc://disk/out/back", "--scratch", scratch, "--layout", "native")
    run(monkeypatch, *out)
    assert "msc://disk/out/back holds msc://disk/start" in capsys.readouterr().out
    run(monkeypatch, "import_hf", export, tmp_path / "start")
    run(monkeypatch, "export_hf", tmp_path / "start", tmp_path / "back", "--layout", "native")
    before, after = (tensors(folder) for folder in (tmp_path / "back", disk / "out" / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (disk / "out/back/tokenizer.json").is_file() and (disk / "out/back/README.md").is_file()
    assert not list(scratch.iterdir())
    # What is there is not overwritten, and what is not there is told.
    for words, sentence in (
        (out, "msc://disk/out/back is there already"),
        (("export_hf", "msc://disk/none", tmp_path / "x"), "there is no checkpoint at msc://disk/none"),
        (("export_hf", "msc://disk/start", tmp_path / "x", "--best"), "msc://disk/start has no best checkpoint"),
        (("import_hf", "msc://disk/none", tmp_path / "x"), "there is no checkpoint at msc://disk/none, no run and no"),
        (
            ("export_hf", "msc://disk/start", tmp_path / "x", "--scratch", "/none"),
            "--scratch /none is no folder: make it",
        ),
        (("import_hf", "msc://disk/hf", tmp_path / "x", "--scratch", "/none"), "--scratch /none is no folder: make it"),
        (("export_hf", "ftp://x/y", tmp_path / "x"), "CKPT=ftp://x/y has an unknown scheme"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            run(monkeypatch, *words)


def no_right(folder):
    raise storage.StorageError("cannot list it: no right to.")


def test_the_preflight_tries_the_address(disk, tmp_path, monkeypatch):
    preflight = load("tools/preflight.py")
    monkeypatch.setattr(preflight, "STORAGE_SECONDS", 0.0)

    def fault(address):
        train = TrainConfig(upload_to=address)
        return preflight.upload_fault(Config(name="n", stage="stage2", run_dir=str(tmp_path), train=train))

    assert fault(None) is None and fault("msc://disk/runs") is None
    assert not [path for path in disk.rglob("*") if path.is_file()]
    assert "train.upload_to=msc://nope/runs: cannot list" in fault("msc://nope/runs")
    with monkeypatch.context() as changed:
        changed.setattr(storage, "list_files", no_right)
        assert fault("msc://disk/runs") == "train.upload_to=msc://disk/runs: cannot list it: no right to"
    disk.rename(tmp_path / "gone")
    disk.write_text("a file where the folder was")
    with pytest.raises(storage.Unreachable, match=r"train.upload_to=msc://disk/runs: cannot write msc://disk/runs/n"):
        fault("msc://disk/runs")


def test_a_job_whose_storage_does_not_answer_at_first_is_queued_again(tmp_path, monkeypatch):
    preflight, starts = load("tools/preflight.py"), load("slurm/starts.py")
    monkeypatch.setattr(preflight, "STORAGE_SECONDS", 0.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        for key, value in environment(tmp_path, f"http://127.0.0.1:{closed.getsockname()[1]}").items():
            monkeypatch.setenv(key, value)
        storage.forget_clients()
        for train, root in (
            (TrainConfig(upload_to="s3://bucket/runs", device="cpu"), str(tmp_path)),
            (TrainConfig(device="cpu"), "s3://bucket/shards"),
        ):
            data = DataConfig(root=root, blend="sample_stage1", cache_dir=str(tmp_path / "cache"))
            facts = preflight.look(Config(name="n", stage="stage2", run_dir=str(tmp_path), train=train, data=data))
            assert facts["unreachable"] and ("s3://" in facts["unreachable"])
            facts["faults"] = []  # there are no shards in the folder
            with pytest.raises(preflight.Fault, match=facts["unreachable"][:40]) as raised:
                preflight.judge([facts])
            assert (raised.value.kind, raised.value.nodes) == ("error", [])
    storage.forget_clients()
    verdict = {"kind": raised.value.kind, "message": str(raised.value), "nodes": []}
    ended = starts.classify(2, "preflight", {}, verdict, "", False, False, None, None, False)
    assert ended[0] == "error" and starts.CLASSES[ended[0]] == "transient"
