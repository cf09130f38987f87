import hashlib
import json
import os
import pickle
import shutil
import signal
import threading
import time
import zlib
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from megatron.energon import WorkerConfig, savable_loader
from programs import python
from sources import VISION, chat, config, write_blend, write_source

from molmo2_nemo import compat
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import VisionConfig
from molmo2_nemo.data.blend import Source, SourceOptions, load_blend
from molmo2_nemo.data.encode import Encoder
from molmo2_nemo.data.loader import (
    Molmo2TaskEncoder,
    RawSample,
    WorkerDied,
    save_state,
    train_loader,
    validation_loader,
)
from molmo2_nemo.data.progress import beginning
from molmo2_nemo.data.resources import batches_per_worker
from molmo2_nemo.data.shard_reader import ShardReader


@pytest.fixture
def world(sample):
    return sample


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in a loader worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(data, make_loader=train_loader, rank=0, world_size=1, rows=2, **more):
    group = (None,) if make_loader is train_loader else ()
    return make_loader(data, VISION, load_blend(data), rank, world_size, *group, rows, **more)


def digest(batch) -> str:
    """Of all that a batch holds, byte for byte."""
    hashed = hashlib.sha256(json.dumps([batch.__key__, batch.counters, batch.errors]).encode())
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            hashed.update(f"{field.name} {value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.numpy().tobytes())
    return hashed.hexdigest()


# --- exact continuation ---------------------------------------------------------------------------------------------

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from molmo2_nemo.config.schema import DataConfig
from molmo2_nemo.data import loader

sys.path[:0] = ["tests", "tests/unit"]
from test_loader import digest, make, state_files

mode, folder, data = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
ranks, before, loader.SNAPSHOT_SECONDS = map(int, sys.argv[4:])

def ranks_loaders(state=None):
    # How many batches are made ahead is no part of the state.
    more = dict(saved=state_files(folder, state, ranks) if state else (), micro_batches=9 if mode == "write" else 4)
    return [make(DataConfig(**data), rank=rank, world_size=ranks, **more) for rank in range(ranks)]

def show(state, loaders):
    for one in loaders:
        print(state, *(digest(next(one)) for _ in range(4)), flush=True)

def save(state, loaders):
    for file, one in zip(state_files(folder, state, ranks), loaders):
        file.write_bytes(loader.save_state(one))

loaders = ranks_loaders()
for state, batches in (("early", before), ("late", 2)):
    if mode == "write":
        for one in loaders:
            for _ in range(batches):
                next(one)
        save(state, loaders)
        show(state, loaders)
        continue
    loaders = ranks_loaders(state)
    assert all(one.can_restore_sample() and not one.position.note for one in loaders)
    if state == "early":
        # Saved again before anything was read, it is still the same place.
        save("again", loaders)
        loaders = ranks_loaders("again")
    show(state, loaders)
    for one in loaders if state == "early" else ():  # the end of the process stops the others
        one.close()
if mode == "write":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def state_files(folder, state, ranks):
    return [folder / f"{state}{rank}" for rank in range(ranks)]


def in_a_process(mode, folder, data, *numbers):
    """What a fresh process sees: nothing but the shards and the state files."""
    result = python("-c", SCRIPT, mode, folder, json.dumps(asdict(data)), *numbers)
    assert result.returncode == (-signal.SIGKILL if mode == "write" else 0), result.stderr
    # And stdout holds nothing but the script's own lines.
    return result.stdout.splitlines()


@pytest.mark.slow
# Batches before the state is saved; seconds between the snapshots from which a worker replays.
@pytest.mark.parametrize(
    "workers, ranks, before, seconds", [(0, 1, 3, 15), (1, 1, 15, 0), (2, 1, 4, 15), (4, 1, 23, 0), (2, 2, 13, 0)]
)
def test_a_killed_run_continues_exactly(world, tmp_path, workers, ranks, before, seconds):
    """Byte for byte: with a pool partly used up, in the middle of videos, at any worker's turn."""
    data = config(world, num_workers=workers)
    written = in_a_process("write", tmp_path, data, ranks, before, seconds)
    batches = [digest for line in written for digest in line.split()[1:]]
    assert len(set(batches)) == len(batches) == 8 * ranks
    assert in_a_process("read", tmp_path, data, ranks, before, seconds) == written


def test_a_stream_of_other_settings_goes_on_and_says_so(world, tmp_path):
    """What is carried over is tested in test_progress.py."""
    loader = make(config(world))
    next(loader)
    state = tmp_path / "state"
    state.write_bytes(save_state(loader))
    # What does not touch the stream may change without a word.
    assert not make(config(world, max_error_rate=0.5, skip_missing=True), saved=[state]).position.note
    changed = make(config(world, seed=6, blend="sample_stage1"), rows=1, saved=[state])
    for words in ("data.seed was 5 and is 6", "train.micro_batch_size was 2 and is 1", "source image_qa was left out"):
        assert words in changed.position.note
    next(changed)
    with pytest.raises(ConfigError, match="holds the data state of 2 of 1 data-parallel ranks"):
        make(config(world), saved=[state, state])


@pytest.mark.slow
def test_a_state_is_data_and_no_program(world, tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    header, rest = save_state(make(config(world))).split(b"\n", 1)
    header = json.loads(header)
    first, second = header["sizes"]
    arrays, pickled = rest[: first + second], rest[first + second :]
    bomb = zlib.compress(bytes(10**8))

    def state_file(body, **changes):
        return json.dumps(header | changes).encode() + b"\n" + body

    wrong = [state_file(arrays + pickle.dumps(thing)) for thing in (Program(), 3, {"__class__": "x"})]
    wrong += [state_file(body) for body in (arrays, arrays + pickled[:-9], b"", arrays[9:] + pickled)]
    wrong += [state_file(rest, sizes=sizes) for sizes in ([], [-1, 5], [0, 0], "x", None)]
    wrong += [state_file(bomb + rest[first:], sizes=[len(bomb), second]), b"", b"no state", b"3\n"]
    for content in wrong:
        state = tmp_path / "state"
        state.write_bytes(content)
        with pytest.raises(ConfigError, match="is damaged .*: move .* away to go on from the checkpoint before it"):
            make(config(world), saved=[state])
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match="is damaged .*: move .* away to go on from the checkpoint before it"):
        make(config(world), saved=[tmp_path / "missing"])


# --- other numbers of ranks and workers -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Sources `one` and `two` of 400 and 120 short texts."""
    folder = tmp_path_factory.mktemp("texts")
    for name, size in (("one", 400), ("two", 120)):
        samples = [{"json": chat(f"{name} {number}", "word " * (number % 17 + 1))} for number in range(size)]
        write_source(folder / name, samples, shard_size=50)
    write_blend(folder / "blend.yaml", "one", "two")
    write_blend(folder / "alone.yaml", "one")
    return folder


def text_config(texts, blend="blend", **changes):
    return config(texts, blend=str(texts / f"{blend}.yaml"), seq_length=256, **changes)


class Run:
    """All data-parallel ranks of a run in turn, batch by batch; what they hand out is counted."""

    def __init__(self, data, folder, ranks, saved=()):
        self.folder, self.sizes = folder, [source.num_samples for source in load_blend(data)]
        self.loaders = [make(data, rank=rank, world_size=ranks, rows=1, saved=saved) for rank in range(ranks)]

    def read(self, counts, batches) -> list[str]:
        digests = []
        for loader in self.loaders * batches:
            batch = next(loader)
            digests.append(digest(batch))
            for source, index in batch.examples.tolist():
                counts[source, index] += 1
        return digests

    def save(self):
        files = [self.folder / f"state{rank}" for rank in range(len(self.loaders))]
        for file, loader in zip(files, self.loaders):
            file.write_bytes(save_state(loader))
        return files

    def close(self):
        for loader in self.loaders:
            loader.close()


@pytest.mark.slow
def test_other_numbers_of_ranks_and_workers_lose_and_repeat_nothing(texts, tmp_path):
    """One pass over a source by five runs of different sizes: every sample once before any comes twice."""
    data = text_config(texts, "alone", packing_buffer_size=4, shuffle_buffer_size=1)
    counts, saved = Counter(), ()
    for ranks, workers, batches in ((2, 2, 8), (1, 1, 16), (4, 0, 3), (1, 2, 6)):
        run = Run(replace(data, num_workers=workers), tmp_path, ranks, saved)
        assert all(bool(loader.position.note) == bool(saved) for loader in run.loaders)
        before = len(counts)
        run.read(counts, batches)
        assert len(counts) > before + 20 and set(counts.values()) == {1}
        saved = run.save()
        run.close()
    run = Run(data, tmp_path, 1, saved)
    while len(counts) < 400:
        run.read(counts, 1)
    # What waits in the pool may let a few of the next pass go ahead.
    assert sum(counts.values()) - len(counts) < 10


@pytest.mark.slow
def test_a_run_dealt_out_anew_continues_exactly(texts, tmp_path):
    run, counts = Run(text_config(texts), tmp_path, 2), Counter()
    run.read(counts, 30)
    assert max(counts.values()) > 1  # the smaller source has begun anew
    saved = run.save()
    data = text_config(texts, num_workers=2)
    first = Run(data, tmp_path, 1, saved)
    first.read(counts, 7)
    files = first.save()
    expected = first.read(counts, 6)
    first.close()
    again = Run(data, tmp_path, 1, files)
    assert not again.loaders[0].position.note and again.read(Counter(), 6) == expected
    again.close()


@pytest.mark.slow
def test_a_state_saved_before_each_worker_had_its_turn(texts, tmp_path):
    data = text_config(texts, num_workers=3)
    run = Run(data, tmp_path, 1)
    run.read(Counter(), 13)
    saved = run.save()
    run.close()
    for batches in range(3):
        run = Run(data, tmp_path, 1, saved)
        run.read(Counter(), batches)
        saved = run.save()
        expected = run.read(Counter(), 6)
        run.close()
        run = Run(data, tmp_path, 1, saved)
        assert run.read(Counter(), 6) == expected, batches
        run.close()


@pytest.mark.slow
@pytest.mark.parametrize("batches", [0, 13])
def test_a_state_saved_before_each_worker_has_begun(texts, tmp_path, monkeypatch, batches):
    """Workers that need a while to begin are asked before they have."""

    class Lock:
        """Of the worker and of its thread that is asked."""

        def __init__(self):
            self.lock = threading.RLock()
            self.acquire, self.release = self.lock.acquire, self.lock.release

        def __enter__(self):
            if threading.current_thread() is threading.main_thread() and torch.utils.data.get_worker_info().id:
                time.sleep(1)
            return self.lock.__enter__()

        def __exit__(self, *error):
            self.lock.release()

    data, saved = text_config(texts, num_workers=2), ()
    if batches:
        run = Run(data, tmp_path, 1)
        run.read(Counter(), batches)
        saved = run.save()
        run.close()
    with monkeypatch.context() as slow:
        slow.setattr(savable_loader, "threading", SimpleNamespace(RLock=Lock, Thread=threading.Thread))
        run = Run(data, tmp_path, 1, saved)
        run.read(Counter(), 1)
        saved = run.save()
        expected = run.read(Counter(), 5)
        run.close()
    run = Run(data, tmp_path, 1, saved)
    assert run.read(Counter(), 5) == expected
    run.close()


@pytest.mark.slow
def test_what_is_ahead_waits_until_the_rest_has_caught_up(texts, tmp_path):
    """Rank 0 has run through its half of a source several times while rank 1 has hardly begun."""
    data = text_config(texts, shuffle_buffer_size=1)
    run, before = Run(data, tmp_path, 2), Counter()
    quick, slow = run.loaders
    for run.loaders, batches in (([quick], 150), ([slow], 4), ([quick, slow], 0)):
        run.read(before, batches)
    small = [before[1, index] for index in range(120)]
    assert min(small[:60]) >= 4 and 0 in small[60:]
    run, counts = Run(data, tmp_path, 1, run.save()), Counter()
    while min(small[index] + counts[1, index] for index in range(60, 120)) < 3:
        run.read(counts, 1)
    total = [small[index] + counts[1, index] for index in range(120)]
    assert not any(counts[1, index] for index in range(60)) and max(total[60:]) <= 4
    # Meanwhile the source kept its share of the blend.
    drawn = Counter(source for source, _ in counts.elements())
    assert abs(drawn[1] / drawn.total() - 0.5) < 4 * (0.25 / drawn.total()) ** 0.5
    while max(total[:60]) == max(small[:60]):
        run.read(counts, 1)
        total = [small[index] + counts[1, index] for index in range(120)]
    assert max(total) - min(total) <= 2


# --- small sources --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A source of 1,100 short texts, one of a single text, and ten of three each."""
    folder = tmp_path_factory.mktemp("small")
    for name, size in (("large", 1100), ("single", 1), ("three0", 3)):
        samples = [{"json": chat(f"{name} {number}", "word " * (number % 17 + 1))} for number in range(size)]
        write_source(folder / name, samples)
    for number in range(1, 10):
        shutil.copytree(folder / "three0", folder / f"three{number}")
    weights = {"large": 40, "single": 25, "three0": 35}
    sources = {name: {"path": name, "weight": weight} for name, weight in weights.items()}
    (folder / "blend.yaml").write_text(yaml.safe_dump({"weighting": "fixed", "sources": sources}))
    write_blend(folder / "many.yaml", "large", *(f"three{number}" for number in range(10)))
    write_blend(folder / "alone.yaml", "single")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("blend, world_size", [("blend", 512), ("many", 512), ("alone", 512), ("blend", 3)])
def test_a_source_of_any_size_has_its_share_on_any_number_of_ranks(small, blend, world_size):
    """512: as 64 data-parallel ranks of 8 workers, of which three are looked at."""
    data = text_config(small, blend, packing_buffer_size=4, shuffle_buffer_size=1)
    sources, orders, counts = load_blend(data), [], Counter()
    for rank in (0, 1, world_size - 1):
        loader, seen = make(data, rank=rank, world_size=world_size, rows=8), []
        while len(seen) < 400:
            seen += map(tuple, next(loader).examples.tolist())
        own = Counter(seen)
        for source in sources:
            index = sources.index(source)
            if source.num_samples < 2 * world_size:
                # In passes over the whole source, of which the pool mixes two at most.
                times = [own[index, sample] for sample in range(source.num_samples)]
                assert min(times) > 0 and max(times) - min(times) <= 3, source.name
        orders.append([pair for pair in seen if pair[0] == len(sources) - 1][:12])
        counts += own
    assert blend == "alone" or orders[0] != orders[1] != orders[2]
    draws = counts.total()
    for index, source in enumerate(sources):
        drawn = sum(count for (number, _), count in counts.items() if number == index)
        error = (source.weight * (1 - source.weight) / draws) ** 0.5
        assert abs(drawn / draws - source.weight) <= 4 * error, source.name
    # What is dealt out is still dealt out.
    large = [count for (number, _), count in counts.items() if number == 0]
    assert blend == "alone" or world_size == 3 or len(large) <= 3 * 3


@pytest.mark.slow
def test_small_sources_continue_exactly_and_are_dealt_anew(small, tmp_path):
    data, counts, saved = text_config(small), Counter(), ()
    for ranks, workers, batches in ((4, 0, 6), (1, 2, 12)):
        sizes = replace(data, num_workers=workers)
        run = Run(sizes, tmp_path, ranks, saved)
        assert all(bool(loader.position.note) == bool(saved) for loader in run.loaders)
        run.read(counts, batches)
        saved = run.save()
        expected = run.read(Counter(), 3)
        run.close()
        again = Run(sizes, tmp_path, ranks, saved)
        assert again.read(Counter(), 3) == expected
        again.close()
    # Every pass over a small source is whole, but for those that the workers were in when they were stopped.
    times = [counts[2, sample] for sample in range(3)]
    assert min(times) > 20 and max(times) - min(times) <= 8


class Anything(dict):
    """A reader that has every sample."""

    itar_files_cache = {}

    def __missing__(self, index):
        return {}


def test_workers_that_read_the_same_samples_share_what_is_ahead(monkeypatch):
    ahead = np.array([0, 1, 5, 6, 130], dtype=np.uint16)
    for ranks, workers in ((1, 0), (6, 0), (5, 1)):
        skipped = Counter()
        for rank in range(ranks):
            stream = SimpleNamespace(worker_config=WorkerConfig(rank=rank, world_size=ranks, num_workers=workers))
            for passes in range(140):
                monkeypatch.setattr(compat, "passes_made", lambda stream, made=passes: made)
                for index in range(len(ahead)):
                    skipped[index] += ShardReader(Anything(), stream, ahead, ranks)[index] is None
        assert [skipped[index] for index in range(len(ahead))] == ahead.tolist()


@pytest.mark.parametrize(
    "workers, crops, micro_batches, expected",
    [
        (2, 128, 1, 2),  # as torch has it
        (2, 128, 8, 5),
        (2, 128, 32, 17),
        (3, 128, 32, 12),
        (0, 128, 8, 9),  # without workers torch ignores it
        # 8 GiB are 52 batches of 384 crops of 428,652 bytes.
        (2, 384, 128, 26),
        (2, 384 * 40, 128, 2),
    ],
)
def test_the_next_steps_batches_are_made_ahead_within_bounds(workers, crops, micro_batches, expected):
    data = SimpleNamespace(num_workers=workers, max_crops=crops)
    assert batches_per_worker(data, VisionConfig(), 1, micro_batches) == expected


# --- the stream -----------------------------------------------------------------------------------------------------


def test_batches_of_the_sample_world(world):
    data = config(world)
    loader = make(data)
    seen, tokens = set(), 0
    names = [source.name for source in load_blend(data)]
    for _ in range(12):
        batch = next(loader)
        counted = sum(map(Counter, batch.counters.values()), Counter())
        assert batch.input_ids.shape == (2, 768) and not batch.errors
        assert len(batch.crops) == batch.vision_units[:, 0].sum() == counted["crops"]
        assert len(batch.pooling) == batch.vision_units[:, 1].sum() == (batch.input_ids == 602).sum()
        assert batch.pooling.max() < batch.crops.shape[0] * batch.crops.shape[1]
        for row, segments, sources in zip(batch.input_ids, batch.segment_ids, batch.source_ids):
            used = int((segments >= 0).sum())
            assert (segments[:used] >= 0).all() and (row[used:] == 597).all() and (sources[used:] == -1).all()
            examples = segments[:used] // 100_000
            assert examples.tolist() == sorted(examples.tolist())
            assert (batch.crops.shape[1:]) == (25, 588)
        assert (batch.segment_ids >= 0).sum() == counted["tokens"]
        assert (batch.loss_weights > 0).sum() == counted["loss_tokens"]
        assert {names[i] for i in batch.source_ids[batch.source_ids >= 0].tolist()} == set(batch.counters)
        assert len(batch.examples) == counted["examples"] == sum(len(key.split(",")) for key in batch.__key__)
        seen |= set(batch.source_ids[batch.source_ids >= 0].tolist())
        tokens += counted["tokens"]
        assert not any(name.startswith("dropped") for name in counted)
    # Sources of 1 and 2 % may be missing from so few rows.
    assert seen >= {number for number, source in enumerate(load_blend(data)) if source.weight > 0.03}
    assert tokens / (12 * 2 * 768) > 0.9


def test_ranks_read_different_samples_and_the_seed_decides(world):
    def keys(rank=0, world_size=1, **changes):
        loader = make(config(world, blend="sample_stage1", **changes), rank=rank, world_size=world_size)
        return [key for _ in range(4) for row in next(loader).__key__ for key in row.split(",")]

    first, second = keys(0, 2), keys(1, 2)
    assert set(first).isdisjoint(second)
    assert keys() == keys() != keys(seed=6)


@pytest.mark.slow
def test_sources_appear_by_their_weights(world):
    loader = make(config(world, blend="sample_stage1"), rows=4)
    keys = [key for _ in range(20) for row in next(loader).__key__ for key in row.split(",")]
    sources = load_blend(config(world, blend="sample_stage1"))
    for source in sources:
        share = sum(key.startswith(f"{source.name}-") for key in keys) / len(keys)
        expected = source.weight / sum(other.weight for other in sources)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / len(keys)) ** 0.5, source.name


# --- held-out data --------------------------------------------------------------------------------------------------


def num_threads(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Threads:")]
    return int(line.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("workers, blend", [(0, "sample_stage1"), (1, "sample_stage2")])
def test_validation_is_the_same_every_time(world, workers, blend):
    data = config(world, num_workers=workers, blend=blend)
    loader = make(data, validation_loader)
    first = [digest(batch) for batch in loader]
    threads = [num_threads(worker.pid) for worker in loader.workers]
    for _ in range(4):
        for _, batch in zip(range(3), loader):
            batch = digest(batch)
        assert batch == first[2]
    assert [num_threads(worker.pid) for worker in loader.workers] == threads and len(threads) == workers
    assert [digest(batch) for batch in loader] == first
    loader.close()
    if workers == 0:
        another = make(replace(data, num_workers=1), validation_loader)
        assert digest(next(iter(another))) == first[0]
        another.close()


def test_high_resolution_is_for_training_alone():
    data = config("nowhere", max_crops_per_image=1, high_res_crops=4)
    sources = [Source("a", "/nowhere", 1.0, 10, options=SourceOptions(high_res_probability=1.0))]
    example = chat(images=[{"part": "img.png", "width": 200, "height": 200}])
    sample = RawSample(
        __key__="k",
        __restore_key__=("Webdataset", 0),
        __subflavors__={"source": "a"},
        parts={"json": json.dumps(example).encode()},
        error="",
    )
    encoder, plans = Encoder(data, VISION), []
    for progress in (beginning(sources), None):
        plans.append(Molmo2TaskEncoder(data, encoder, sources, progress).preencode_sample(sample).plan)
    assert [plan.max_crops for plan in plans] == [4, 1]


@pytest.mark.slow
def test_validation_does_not_depend_on_the_number_of_ranks(world):
    data = config(world, blend="sample_stage1")

    def rows(world_size, rank, size):
        loader = make(data, validation_loader, rank=rank, world_size=world_size, rows=size)
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


def test_without_held_out_data(world):
    sources = [replace(source, num_validation_samples=0) for source in load_blend(config(world))]
    with pytest.raises(ConfigError, match="split part val"):
        validation_loader(config(world), VISION, sources, 0, 1, 1)


# --- worker processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_survive_the_signals_of_a_cluster_and_end_with_the_loader(world):
    loader = make(config(world, num_workers=2))
    assert loader._loader.pin_memory == torch.cuda.is_available()
    next(loader)
    workers = loader.workers
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker.pid, number)
    for _ in range(8):
        next(loader)
    assert all(worker.is_alive() for worker in workers)
    loader.close()
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.slow
def test_a_save_does_not_wait_for_a_dead_worker(world):
    loader = make(config(world, num_workers=2))
    next(loader)
    # Torch's handler raises when a worker dies, but what it interrupts may swallow that.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        dead = loader.workers[1].pid
        loader.workers[1].kill()
        loader.workers[1].join()
        with pytest.raises(WorkerDied, match=f"process {dead}$"):
            save_state(loader)
    finally:
        signal.signal(signal.SIGCHLD, handler)
        loader.close()


@pytest.mark.slow
def test_memory_stays_flat(world):
    """Over thousands of samples with images and videos, in the worker and here."""

    def resident(pid):
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]) / 1024  # MiB

    loader, samples, found = make(config(world, num_workers=1)), 0, []
    for needed in (1000, 3000):
        while samples < needed:
            samples += len(next(loader).examples)
        found.append([resident(pid) for pid in (os.getpid(), loader.workers[0].pid)])
    loader.close()
    for before, after in zip(*found):
        assert after - before < 6, found


def test_sources_are_told_apart_by_their_place_in_the_list(world):
    sources = list(reversed(load_blend(config(world))))
    assert all(isinstance(source, Source) for source in sources)
    batch = next(train_loader(config(world), VISION, sources, 0, 1, None, 1))
    names = [sources[i].name for i in dict.fromkeys(batch.source_ids[batch.source_ids >= 0].tolist())]
    assert names == list(dict.fromkeys(key.split("-")[0] for key in batch.__key__[0].split(",")))
