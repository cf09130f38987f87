"""An export to a Hub on this machine: private, whole, and its errors in one sentence."""

import shlex

import httpx2
import pytest
from fetch_servers import Uploads
from huggingface_hub import constants
from huggingface_hub.utils import get_session

from molmo2_nemo.catalogue.datasets import HubFiles
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.fetch import hub as downloads
from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.hf.push import push, refuse_push


@pytest.fixture
def hub(monkeypatch):
    with Uploads() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the protocol of its storage has no server here
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield server


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "export").mkdir()
    for name, content in {
        "README.md": b"---\nlicense: apache-2.0\n---\nA card.\n",
        "config.json": b"{}",
        "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
        "model-00002-of-00002.safetensors": bytes(range(256)) * 30,
    }.items():
        (tmp_path / "export" / name).write_bytes(content)
    return tmp_path / "export"


def told(do, *arguments):
    with pytest.raises(ConfigError) as raised:
        do(*arguments)
    assert "hf_right" not in str(raised.value) and "\n" not in str(raised.value)
    return str(raised.value)


def test_all_files_arrive_in_a_private_repository_unless_told_otherwise(hub, folder):
    refuse_push("org/model")
    assert push(folder, "org/model", public=False) == f"{hub.url}/org/model"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.repos["org/model"] == {"private": True, "files": {".gitattributes": b"x", **files}}
    push(folder, "org/open", public=True)
    assert not hub.repos["org/open"]["private"]
    assert "on the Hub already and holds README.md: name another" in told(refuse_push, "org/model")


def test_a_download_in_the_same_process_leaves_no_limits(hub, folder, tmp_path, monkeypatch):
    """Downloads refuse private addresses, such as this server's where HF_ENDPOINT does not name it."""
    with monkeypatch.context() as named, pytest.raises(ValueError, match="cannot be downloaded"):
        named.setenv("HF_ENDPOINT", hub.url)
        downloads.open_repository(HubFiles(repo="org/data"), tmp_path, Rules(tries=1))
    with pytest.raises(httpx2.UnsupportedProtocol, match="private"):
        get_session().get(hub.url)
    push(folder, "org/model", public=False)
    assert "config.json" in hub.repos["org/model"]["files"]


def test_what_cannot_be_pushed_is_told_in_one_sentence(hub, folder, monkeypatch):
    assert "names no owner" in told(refuse_push, "model")
    assert "is no name on the Hub" in told(refuse_push, "org/mo del")
    assert "may not write there (status 403)" in told(push, folder, "other/model", False)
    # Cut off in the middle: what is said tries again, and so does the same command.
    hub.faults["/commit/main"] = [500]
    said = told(push, folder, "org/model", False)
    assert said.startswith("--push org/model to http://127.0.0.1:") and "status 500" in said
    assert shlex.split(said.split("`")[1]) == ["hf", "upload", "org/model", str(folder), ".", "--private"]
    assert set(hub.repos["org/model"]["files"]) == {".gitattributes"}
    refuse_push("org/model")
    push(folder, "org/model", public=False)
    assert len(hub.repos["org/model"]["files"]) == 5
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "may not write there (status 401)" in told(push, folder, "org/third", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no_token"))
    assert "needs a token that may write: set HF_TOKEN" in told(refuse_push, "org/model")


def test_a_hub_that_is_not_there_is_told(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "was cut off, no connection" in told(push, folder, "org/model", False)


def test_the_command_that_is_said_pushes(hub, folder):
    """`hf upload` of huggingface_hub, with the words of the sentence."""
    from huggingface_hub.cli.hf import app

    hub.faults["/api/repos/create"] = [500, 500, 500, 500, 500, 500]
    said = told(push, folder, "org/model", False)
    hub.faults.clear()
    app.main(shlex.split(said.split("`")[1])[1:], standalone_mode=False)
    assert hub.repos["org/model"]["private"] and len(hub.repos["org/model"]["files"]) == 5
