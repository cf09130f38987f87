"""Options that take a folder or a file of this machine: an address is refused as it was typed, and nothing is made."""

import ast
from pathlib import Path

import download
import prepare
import pytest
from programs import REPOSITORY

from molmo2_nemo.catalogue.commands import download_command

TOOLS = sorted((REPOSITORY / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_no_option_makes_a_path_of_an_address(tool):
    """A Path of s3://b/x is the folder s3: and is printed as s3:/b/x; option_types.local_path refuses the address."""
    for node in ast.walk(ast.parse(tool.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            types = [keyword.value.id for keyword in node.keywords if isinstance(keyword.value, ast.Name)]
            assert "Path" not in types, f"{tool.name}:{node.lineno}"


@pytest.mark.parametrize(
    ("words", "option", "address"),
    [
        ("labels.jsonl --images photos --out s3://b/x", "--out", "s3://b/x"),
        ("labels.jsonl --images msc://p/photos --out x", "--images", "msc://p/photos"),
        ("s3://b/labels.jsonl --out x", "annotations", "s3://b/labels.jsonl"),
        ("--stage 2 --out s3://b/x --scratch s3://b/y", "--scratch", "s3://b/y"),
        ("--stage 2 --out s3://b/x --scratch y --root gs://b/raw", "--root", "gs://b/raw"),
    ],
)
def test_prepare_refuses_an_address_as_it_was_typed(words, option, address, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        prepare.main(words.split())
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert f"argument {option}: {address} is an address: name a path on this machine" in said


def test_a_data_root_of_training_is_none_of_downloads(tmp_path, monkeypatch, capsys):
    """DATA_ROOT may be an address for the recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", "s3://me:secret@b/shards")
    assert download.main(["list", "chartqa"]) == 1
    said = capsys.readouterr().err
    assert said == "error: DATA_ROOT=s3://b/shards is an address: name a folder of this machine with --root.\n"
    assert not list(tmp_path.iterdir())
    assert download.main(["list", "chartqa", "--root", str(tmp_path)]) == 0  # as it advises
    assert download_command("fetch", "x", root=Path("/data")) == "python tools/download.py fetch x --root /data"
    monkeypatch.setenv("DATA_ROOT", "/data")
    assert download_command("fetch", "x", root=Path("/data")) == "python tools/download.py fetch x"
