import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from molmo2_nemo.config import DataConfig, VisionConfig
from molmo2_nemo.data.blend import Source, load_blend
from molmo2_nemo.data.loader import restore_state, save_state, train_loader, validation_loader
from molmo2_nemo.data.sample_world import generate

ROOT = Path(__file__).resolve().parents[1]
VISION = VisionConfig(image_size=70, overlap_margin=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "sample"
    generate(folder, scale=0.01, progress=lambda line: None)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in a loader worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(world, **changes):
    settings = dict(
        blend="sample_stage2", root=str(world), tokenizer=str(ROOT / "molmo2_nemo" / "data" / "tokenizer"),
        seq_length=768, max_crops=32, max_crops_per_image=4, max_frames=12, packing_buffer_size=12,
        shuffle_buffer_size=8, num_workers=0, seed=5,
    )  # fmt: skip
    return DataConfig(**(settings | changes))


def make(data, run_dir, make_loader=train_loader, rank=0, world_size=1, rows=2):
    return make_loader(data, VISION, load_blend(data), rank, world_size, None, rows, run_dir)


def digest(batch) -> str:
    """Of all that a batch holds, byte for byte."""
    hashed = hashlib.sha256(json.dumps([batch.__key__, batch.counters]).encode())
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            hashed.update(f"{field.name} {value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.numpy().tobytes())
    return hashed.hexdigest()


# --- exact continuation ---------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
from molmo2_nemo.config import DataConfig
from test_loader import WORKERS, read_on

folder, data = Path(sys.argv[1]), json.loads(sys.argv[2])
for workers in WORKERS:
    for state in ("early", "late"):
        loader, found = read_on(DataConfig(**data | {"num_workers": workers}), folder, state)
        print(workers, state, *found)
        if workers != 1:  # the end of the process stops the other one's
            loader.close()
"""
# None last: what decodes video in the process itself must not come before the forks.
WORKERS = (2, 1, 0)


def read_on(data, folder, state):
    """The loader, and digests of the next batches after a saved state."""
    loader = make(data, folder / "run")
    assert loader.can_restore_sample()
    saved = (folder / f"{state}{data.num_workers}").read_bytes()
    restore_state(loader, saved)
    if state == "early" and data.num_workers == 2:
        # Saved again before anything was read, it is still the same place.
        saved, loader = save_state(loader), make(data, folder / "run")
        restore_state(loader, saved)
    return loader, [digest(next(loader)) for _ in range(3)]


def test_a_new_process_continues_exactly(world, tmp_path):
    data, expected = config(world), []
    for workers in WORKERS:
        loader = make(replace(data, num_workers=workers), tmp_path / "run")
        for state, batches in (("early", 3), ("late", 2)):
            for _ in range(batches):
                next(loader)
            (tmp_path / f"{state}{workers}").write_bytes(save_state(loader))
            found = [digest(next(loader)) for _ in range(3)]
            assert len(set(found)) == 3
            expected.append(" ".join([str(workers), state, *found]))
        loader.close()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, tmp_path, json.dumps(asdict(data))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    # And stdout holds nothing but the script's own lines.
    assert result.stdout.splitlines() == expected


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 6}, "data.seed=5, this run has data.seed=6"),
        ({"packing_buffer_size": 13}, "data.packing_buffer_size=12, this run has data.packing_buffer_size=13"),
        ({"seq_length": 1024}, "data.seq_length=768"),
        ({"num_workers": 1}, "data.num_workers=0, this run has data.num_workers=1"),
        ({"blend": "sample_stage1"}, r"source captions .*=\[5.4.*, this run has source captions .*=\[60.0, 30\]"),
    ],
)  # fmt: skip
def test_a_state_of_other_settings_is_refused(world, tmp_path, change, words):
    loader = make(config(world), tmp_path)
    next(loader)
    state = save_state(loader)
    with pytest.raises(ValueError, match=words):
        restore_state(make(config(world, **change), tmp_path), state)
    with pytest.raises(ValueError, match="data-parallel size=1, this run has data-parallel size=2"):
        restore_state(make(config(world), tmp_path, world_size=2), state)
    with pytest.raises(ValueError, match="micro_batch_size=2, this run has train.micro_batch_size=1"):
        restore_state(make(config(world), tmp_path, rows=1), state)
    restore_state(make(config(world, root=str(world)), tmp_path), state)


def test_a_state_is_data_and_no_program(world, tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    loader = make(config(world), tmp_path)
    header = save_state(loader).partition(b"\n")[0]
    for wrong in (header + b"\n" + pickle.dumps(Program()), header + b"\n", header, b"", b"no state", b"3\n"):
        with pytest.raises(ValueError, match="state is damaged"):
            restore_state(loader, wrong)
    assert not (tmp_path / "ran").exists()


# --- the stream -----------------------------------------------------------------------------------------------------


def test_batches_of_the_sample_world(world, tmp_path):
    data = config(world)
    loader = make(data, tmp_path)
    seen, tokens = set(), 0
    for _ in range(12):
        batch = next(loader)
        assert batch.input_ids.shape == (2, 768)
        assert len(batch.crops) == batch.vision_units[:, 0].sum() == batch.counters["crops"]
        assert len(batch.pooling) == batch.vision_units[:, 1].sum() == (batch.input_ids == 602).sum()
        assert batch.pooling.max() < batch.crops.shape[0] * batch.crops.shape[1]
        for row, segments, sources in zip(batch.input_ids, batch.segment_ids, batch.source_ids):
            used = int((segments >= 0).sum())
            assert (segments[:used] >= 0).all() and (row[used:] == 597).all() and (sources[used:] == -1).all()
            examples = segments[:used] // 100_000
            assert examples.tolist() == sorted(examples.tolist())
            assert (batch.crops.shape[1:]) == (25, 588)
        assert ((batch.segment_ids >= 0).sum()) == batch.counters["tokens"]
        assert (batch.loss_weights > 0).sum() == batch.counters["loss_tokens"]
        seen |= set(batch.source_ids[batch.source_ids >= 0].tolist())
        tokens += batch.counters["tokens"]
        assert not any(count for name, count in batch.counters.items() if name.startswith("dropped"))
    assert seen == set(range(len(load_blend(data))))
    assert tokens / (12 * 2 * 768) > 0.9


def test_ranks_read_different_samples_and_the_seed_decides(world, tmp_path):
    def keys(rank=0, world_size=1, **changes):
        loader = make(config(world, blend="sample_stage1", **changes), tmp_path, rank=rank, world_size=world_size)
        return [key for _ in range(4) for row in next(loader).__key__ for key in row.split(",")]

    first, second = keys(0, 2), keys(1, 2)
    assert set(first).isdisjoint(second)
    assert keys() == keys() != keys(seed=6)


def test_sources_appear_by_their_weights(world, tmp_path):
    loader = make(config(world, blend="sample_stage1"), tmp_path, rows=4)
    keys = [key for _ in range(20) for row in next(loader).__key__ for key in row.split(",")]
    sources = load_blend(config(world, blend="sample_stage1"))
    for source in sources:
        share = sum(key.startswith(f"{source.name}-") for key in keys) / len(keys)
        expected = source.weight / sum(other.weight for other in sources)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / len(keys)) ** 0.5, source.name


def test_a_source_too_small_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="training samples, fewer than two for each"):
        make(config(world), tmp_path, world_size=64)


# --- held-out data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers, blend", [(0, "sample_stage1"), (1, "sample_stage2")])
def test_validation_is_the_same_every_time(world, tmp_path, workers, blend):
    data = config(world, num_workers=workers, blend=blend)
    loader = make(data, tmp_path, validation_loader)
    first = [digest(batch) for batch in loader]
    for _, batch in zip(range(3), loader):
        batch = digest(batch)
    assert batch == first[2]
    assert [digest(batch) for batch in loader] == first
    loader.close()
    if workers == 0:
        another = make(replace(data, num_workers=1), tmp_path, validation_loader)
        assert digest(next(iter(another))) == first[0]
        another.close()


def test_validation_does_not_depend_on_the_number_of_ranks(world, tmp_path):
    data = config(world, blend="sample_stage1")

    def rows(world_size, rank, size):
        loader = make(data, tmp_path, validation_loader, rank=rank, world_size=world_size, rows=size)
        batches = list(loader)
        keys = [key for batch in batches for key in batch.__key__]
        return len(batches), keys

    count, whole = rows(1, 0, 1)
    assert count == len(whole)
    sources = load_blend(data)
    samples = [key for row in whole for key in row.split(",")]
    assert len(samples) == len(set(samples)) == sum(source.num_validation_samples for source in sources)
    assert all("-val-" in key for key in samples)
    # The first rows hold something of every source.
    assert {key.split("-")[0] for row in whole[:4] for key in row.split(",")} == {source.name for source in sources}
    dealt = [rows(3, rank, 2) for rank in range(3)]
    assert len({count for count, _ in dealt}) == 1
    for rank, (_, keys) in enumerate(dealt):
        expected = whole[rank::3]
        assert keys == expected + [""] * (len(keys) - len(expected))
        assert len(keys) - len(expected) < 3


def test_without_held_out_data(world, tmp_path):
    sources = [replace(source, num_validation_samples=0) for source in load_blend(config(world))]
    with pytest.raises(ValueError, match="split part val"):
        validation_loader(config(world), VISION, sources, 0, 1, None, 1, tmp_path)


# --- broken samples -------------------------------------------------------------------------------------------------


def write_broken_source(folder):
    """32 samples, of which every eighth is fine and the others are broken in one way each."""
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors import BaseWebdatasetFactory

    file = io.BytesIO()
    Image.fromarray(np.full((70, 70, 3), 99, dtype=np.uint8)).save(file, "PNG")
    png = file.getvalue()
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    entry = {"part": "img0.png", "width": 70, "height": 70}
    good = {"style": "user_qa", "images": [entry], "video": None, "branches": [turns]}
    video = {"part": "video.mp4", "width": 9, "height": 9, "fps": 8, "num_frames": 9, "duration": 1.0}
    kinds = [
        (json.dumps(good), png),
        (json.dumps(good), png[: len(png) // 2]),
        ("{", png),
        (json.dumps(good | {"branches": []}), png),
        (json.dumps(good | {"images": [entry | {"width": 71}]}), png),
        (json.dumps(good | {"branches": [[{"role": "user", "content": "x " * 4000}, turns[1]]]}), png),
        (json.dumps(good | {"images": [entry] * 20}), png),
        (json.dumps(good | {"images": [], "video": video}), png),
    ]
    folder.mkdir(parents=True)
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for index in range(32):
            text, image = kinds[index % 8]
            for part, data in (("json", text.encode()), ("img0.png", image)):
                member = tarfile.TarInfo(f"{index:04d}.{part}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    BaseWebdatasetFactory.prepare_dataset(
        EPath(folder), ["train-0.tar"], split_parts_patterns=[("train", ".*")], shuffle_seed=None, workers=1
    )
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(dataset))


def test_broken_samples_are_counted_and_the_stream_goes_on(tmp_path):
    write_broken_source(tmp_path / "data" / "broken")
    blend = {"weighting": "sqrt", "sources": {"broken": {"path": "broken"}}}
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend))
    data = config(tmp_path / "data", blend=str(tmp_path / "blend.yaml"), seq_length=256)
    totals, digests = {}, []
    loader = make(data, tmp_path, rows=1)
    for number in range(60):
        if number == 20:
            state = save_state(loader)
        batch = next(loader)
        digests.append(digest(batch))
        totals = {name: totals.get(name, 0) + count for name, count in batch.counters.items()}
    dropped = {name: count for name, count in totals.items() if name.startswith("dropped_") and count}
    assert set(dropped) == {"dropped_malformed", "dropped_undecodable", "dropped_too_long", "dropped_too_many_crops"}
    # Of 8 samples 1 is good, 2 are malformed, 3 cannot be decoded.
    samples = totals["examples"] + sum(dropped.values())
    assert totals["examples"] / samples == pytest.approx(1 / 8, abs=0.05)
    assert dropped["dropped_undecodable"] / samples == pytest.approx(3 / 8, abs=0.08)
    assert dropped["dropped_malformed"] / samples == pytest.approx(2 / 8, abs=0.08)
    again = make(data, tmp_path, rows=1)
    restore_state(again, state)
    assert [digest(next(again)) for _ in range(10)] == digests[20:30]


def test_a_source_without_one_good_sample_ends_in_a_sentence(world, tmp_path):
    data = config(world, blend="sample_stage1", seq_length=8)
    with pytest.raises(RuntimeError, match="samples in a row were dropped.*check data.seq_length"):
        next(make(data, tmp_path))


# --- worker processes -----------------------------------------------------------------------------------------------


def test_workers_survive_the_signals_of_a_cluster_and_end_with_the_loader(world, tmp_path):
    loader = make(config(world, num_workers=2), tmp_path)
    assert loader._loader.pin_memory == torch.cuda.is_available()
    next(loader)
    workers = loader._loader._iterator._workers
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker.pid, number)
    for _ in range(8):
        next(loader)
    assert all(worker.is_alive() for worker in workers)
    loader.close()
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_sources_are_told_apart_by_their_place_in_the_list(world, tmp_path):
    sources = list(reversed(load_blend(config(world))))
    assert all(isinstance(source, Source) for source in sources)
    batch = next(train_loader(config(world), VISION, sources, 0, 1, None, 1, tmp_path))
    names = [sources[i].name for i in dict.fromkeys(batch.source_ids[batch.source_ids >= 0].tolist())]
    assert names == list(dict.fromkeys(key.split("-")[0] for key in batch.__key__[0].split(",")))
