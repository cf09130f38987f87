import json
import math
import subprocess
import sys

import pytest
import yaml

from molmo2_nemo.config import CONF_DIR, DataConfig
from molmo2_nemo.data.blend import Source, check_blend, load_blend, write_metadataset


def make_source(root, name, train=(5, 4), val=(3,)):
    """A folder with nothing but what Energon's preparation writes about its shards."""
    meta = root / name / ".nv-meta"
    meta.mkdir(parents=True)
    counts = {f"{part}-{i}.tar": n for part, ns in (("train", train), ("val", val)) for i, n in enumerate(ns)}
    (meta / ".info.json").write_text(json.dumps({"energon_version": "7.4.1", "shard_counts": counts}))
    parts = {part: [shard for shard in counts if shard.startswith(part)] for part in ("train", "val", "test")}
    (meta / "split.yaml").write_text(yaml.safe_dump({"split_parts": parts, "exclude": []}))


@pytest.fixture
def root(tmp_path):
    make_source(tmp_path / "data", "a")
    make_source(tmp_path / "data", "b", train=(100,), val=())
    return tmp_path / "data"


def config(root, blend):
    file = root.parent / "blend.yaml"
    file.write_text(blend if isinstance(blend, str) else yaml.safe_dump(blend, sort_keys=False))
    return DataConfig(blend=str(file), root=str(root))


def fixed(**sources):
    return {"weighting": "fixed", "sources": {n: {"path": p, "weight": w} for n, (p, w) in sources.items()}}


def test_fixed_weights(root):
    first, second = load_blend(config(root, fixed(x=("b", 60), y=("a", 2.5))))
    assert first == Source("x", str(root / "b"), 60.0, 100, 0)
    assert second == Source("y", str(root / "a"), 2.5, 9, 3)


def test_square_roots_of_sizes(root):
    blend = {"weighting": "sqrt", "sources": {"a": {"path": "a"}, "b": {"path": str(root / "b")}}}
    assert [source.weight for source in load_blend(config(root, blend))] == [3.0, 10.0]


def test_the_shipped_blends_have_the_right_form(tmp_path):
    for file in (CONF_DIR / "blend").glob("*.yaml"):
        blend = yaml.safe_load(file.read_text())
        folder = tmp_path / file.stem
        for entry in blend["sources"].values():
            make_source(folder, entry["path"])
        sources = load_blend(DataConfig(blend=file.stem, root=str(folder)))
        assert len(sources) == len(blend["sources"])


@pytest.mark.parametrize(
    "blend, words",
    [
        ("a: [", "not valid YAML"),
        ("[1]", "must be a mapping"),
        ({"sources": {}}, "lacks the key weighting"),
        ({"weighting": "fixed", "sources": {}}, "lists no sources"),
        ({"weighting": "fixed", "sources": ["a"]}, "lists no sources"),
        ({"weighting": "cube", "sources": {"a": {"path": "a"}}}, "weighting=cube: choose fixed or sqrt"),
        ({"weighting": "fixed", "sources": {"a": {"path": "a"}}}, "source a of weighting=fixed, lacks the key weight"),
        ({"weighting": "sqrt", "sources": {"a": {"path": "a", "weight": 1}}}, "unknown key weight"),
        ({"weighting": "sqrt", "sources": {"a": {"path": "a"}}, "more": 1}, "unknown key more"),
        ({"weighting": "sqrt", "sources": {"a": {"path": "a", "pth": 1}}}, "unknown key pth"),
        ({"weighting": "sqrt", "sources": {"a": None}}, "must be a mapping"),
        (fixed(a=("a", 0)), "weight=0: make it a number above 0"),
        (fixed(a=("a", -1.0)), "weight=-1.0"),
        (fixed(a=("a", math.nan)), "weight=nan"),
        (fixed(a=("a", math.inf)), "weight=inf"),
        (fixed(a=("a", "much")), "weight=much"),
        (fixed(a=("a", True)), "weight=True"),
        (fixed(a=("a", 1), c=("b/../a", 2)), "twice, as a and c"),
    ],
)  # fmt: skip
def test_wrong_blends_are_refused_in_one_sentence(root, blend, words):
    with pytest.raises(ValueError) as error:
        load_blend(config(root, blend))
    assert words in str(error.value) and "data.blend=" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_blend_names_the_known_ones(root):
    with pytest.raises(ValueError, match="data.blend=nowhere names no blend: .*stage1"):
        load_blend(DataConfig(blend="nowhere", root=str(root)))


def test_a_missing_folder(root):
    with pytest.raises(ValueError) as error:
        load_blend(config(root, fixed(points=("gone", 1))))
    for word in (f"data.root={root}", "points", str(root / "gone"), "make_sample_data.py"):
        assert word in str(error.value)


def test_a_folder_that_is_not_prepared(root):
    (root / "raw").mkdir()
    with pytest.raises(ValueError, match="not prepared .*energon prepare"):
        load_blend(config(root, fixed(raw=("raw", 1))))
    make_source(root, "empty", train=())
    with pytest.raises(ValueError, match="no training samples"):
        load_blend(config(root, fixed(empty=("empty", 1))))


def test_sources_too_small_for_the_workers(root):
    sources = load_blend(config(root, fixed(a=("a", 1), b=("b", 1))))
    check_blend(sources, world_size=2, num_workers=2)
    check_blend(sources, world_size=4, num_workers=0)
    with pytest.raises(ValueError, match="source a has 9 training samples.*4 data-parallel.*data.num_workers=2"):
        check_blend(sources, world_size=4, num_workers=2)


def test_the_metadataset_is_what_energon_reads(root, tmp_path):
    from megatron.energon.metadataset import load_dataset

    sources = load_blend(config(root, fixed(x=("b", 60), y=("a", 2.5))))
    path = tmp_path / "run" / "blend.yaml"
    write_metadataset(sources, path)
    write_metadataset(sources, path)
    assert [file.name for file in path.parent.iterdir()] == ["blend.yaml"]
    load_dataset(str(path))
    splits = yaml.safe_load(path.read_text())["splits"]
    assert [entry["subflavors"] for entry in splits["train"]["blend"]] == [{"source": "x"}, {"source": "y"}]
    assert [entry["subflavors"] for entry in splits["val"]["blend"]] == [{"source": "y"}]


def test_reading_a_blend_imports_neither_torch_nor_energon():
    code = "import sys, molmo2_nemo.data.blend; print([m for m in ('torch', 'megatron.energon') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
