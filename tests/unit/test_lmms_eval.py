"""The model for lmms-eval, whose interface is a stand-in here: it wants an older PyAV and is not installed.

docs/evaluate.md says with which version the real one was run.
"""

import importlib
import sys
import tomllib
import types

import numpy as np
import pytest
from media_files import film, scene
from programs import REPOSITORY

from molmo2_nemo.ask.model import Seen

ADAPTER = "molmo2_nemo.evaluate.lmms_eval_adapter"


@pytest.fixture
def adapter(monkeypatch):
    def module(name, **content):
        made = types.ModuleType(name)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    module("lmms_eval")
    module("lmms_eval.api")
    module("lmms_eval.api.model", lmms=object)
    module("lmms_eval.models")
    module("lmms_eval.models.registry_v2", ModelManifest=lambda name, simple_class_path: (name, simple_class_path))
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    yield importlib.import_module(ADAPTER)
    sys.modules.pop(ADAPTER, None)


def test_questions_are_answered_in_their_order_as_without_it(adapter, export, tmp_path, capsys):
    (tmp_path / "clip.mp4").write_bytes(film())
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    shown = [[scene(60, 40)], [str(tmp_path / "clip.mp4")], [], [str(tmp_path / "bad.mp4")], [scene(90, 40)] * 2]
    model = adapter.Molmo2(str(export), "cpu", batch_size="3", max_frames=4)
    assert model.asker.max_frames == 4
    model.task_dict = {"t": {"test": shown}}
    settings = {"max_new_tokens": 6, "do_sample": False, "temperature": 0, "until": ["zzz"]}
    looked_at = []

    def visuals(doc):
        looked_at.append(doc)
        return doc

    requests = [types.SimpleNamespace(args=(f"What is {n}?", settings, visuals, n, "t", "test")) for n in range(5)]
    found = model.generate_until(requests)
    assert looked_at == shown  # once each, since lmms-eval may decode a picture at each look
    for number, visuals in enumerate(shown):
        if number == 3:
            assert found[number] == ""
            continue
        if number == 1:
            seen = model.asker.see([], tmp_path / "clip.mp4")
        else:
            seen = Seen([np.asarray(one) for one in visuals])
        message = {"role": "user", "content": f"What is {number}?"}
        assert found[number] == model.asker.answer([message], seen, 6).text != "", number
    said = capsys.readouterr().out
    assert "1 of 5 questions have no answer" in said and "bad.mp4" in said
    assert adapter._until("a\nb\nc", ["c", "\n"]) == "a" and adapter._until("a", None) == "a"


def test_what_it_cannot_do_is_refused(adapter, export, monkeypatch):
    model = adapter.Molmo2(str(export), "cpu")
    model.task_dict = {"t": {"test": [[]]}}
    sampling = {"do_sample": True, "temperature": 0.7}
    request = types.SimpleNamespace(args=("?", sampling, lambda doc: doc, 0, "t", "test"))
    with pytest.raises(ValueError, match="samples with temperature 0.7"):
        model.generate_until([request])
    with pytest.raises(ValueError, match="--batch_size auto"):
        adapter.Molmo2(str(export), "cpu", batch_size="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        adapter.Molmo2(str(export), "cpu")


def test_lmms_eval_finds_it_by_its_entry_point(adapter):
    points = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, _, function = points[adapter.NAME].partition(":")
    name, path = getattr(importlib.import_module(module), function)()
    assert (name, path) == (adapter.NAME, f"{ADAPTER}.Molmo2") and hasattr(adapter, path.rpartition(".")[2])
