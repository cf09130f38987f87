"""Shards and samples broken on purpose: each is counted and reported, and the stream goes on, exactly."""

import io
import os
import re
import shutil
import struct
import zlib
from collections import Counter

import av
import numpy as np
import pytest
import torch.distributed as dist
from megatron.energon.flavors.webdataset.itar import ITarFile
from PIL import Image
from sources import VISION, chat, config, write_blend, write_source

from molmo2_nemo.data.blend import load_blend
from molmo2_nemo.data.loader import MAX_JSON, MAX_REPORT, save_state, train_loader
from molmo2_nemo.data.packing import MAX_DROPPED_IN_A_ROW
from molmo2_nemo.training.metrics import MAX_REPORTS, MIN_BROKEN, DataReport

SIZE = 24  # samples of a source
SHARD = 8  # of them in a shard


def encoded(picture: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


def video(width=64, height=64, frames=16) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(frames):
            picture = np.full((height, width, 3), 10 * number % 255, dtype=np.uint8)
            picture[: height // 2] += np.random.default_rng(number).integers(0, 99, (height // 2, width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    return file.getvalue()


def video_of_one_frame(width: int, height: int) -> bytes:
    """Of one colour, and so a small file whatever its size in pixels."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        stream.codec_context.thread_count = 1
        frame = av.VideoFrame(width, height, "yuvj420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A black and white PNG of any size, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 2) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


NOISE = np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8)
JPEG, PNG, MP4 = encoded(NOISE, "JPEG"), encoded(NOISE, "PNG"), video()


def picture(data=JPEG, width=70, height=70) -> dict:
    entry = {"part": "img0.jpg", "width": width, "height": height}
    return {"json": chat("What is it?", "Noise.", images=[entry])} | ({"img0.jpg": data} if data else {})


def clip(data=MP4, **changes) -> dict:
    entry = {"part": "video.mp4", "width": 64, "height": 64, "duration": 2.0, "fps": 8.0, "num_frames": 16} | changes
    return {"json": chat("What is it?", "Noise.", video=entry), "video.mp4": data}


def pointing(points: str) -> dict:
    branch = '{"task": "pointing", "label": "cat", "points": %s}' % points
    text = '{"images": [{"part": "img0.jpg", "width": 70, "height": 70}], "branches": [%s]}' % branch
    return {"json": text.encode(), "img0.jpg": JPEG}


def text(content: bytes) -> dict:
    question = b'{"role": "user", "content": "Q"}'
    return {"json": b'{"branches": [[%s, {"role": "assistant", "content": %s}]]}' % (question, content)}


def many_branches(number: int) -> bytes:
    one = text(b'"A"')["json"]
    branch = one[one.index(b"[") + 1 : one.rindex(b"]")]
    return one.replace(branch, b",".join([branch] * number))


# Name -> (what makes it: some are large, kind, words of the report).
BROKEN_SAMPLES = {
    "truncated JPEG": (lambda: picture(JPEG[: len(JPEG) // 2]), "undecodable", "image"),
    "JPEG of zeros": (lambda: picture(bytes(2000)), "undecodable", "image"),
    "PNG with a wrong checksum": (lambda: picture(PNG[:-60] + bytes(20) + PNG[-40:]), "undecodable", "image"),
    "empty picture": (lambda: picture(b"\0"), "undecodable", "image"),
    "picture of another size": (lambda: picture(width=71), "undecodable", "70 x 70"),
    "missing media member": (lambda: picture(None), "undecodable", "img0.jpg is missing"),
    "truncated mp4": (lambda: clip(MP4[: len(MP4) // 2]), "undecodable", "video"),
    "mp4 without its end": (lambda: clip(MP4[:-200]), "undecodable", "video"),
    "mp4 of garbage": (lambda: clip(bytes(range(256)) * 9), "undecodable", "video"),
    "mp4 with half of its frames": (lambda: clip(num_frames=60), "undecodable", "16 of 60 frames"),
    "picture bomb": (lambda: picture(png_of(30000, 30000), 30000, 30000), "undecodable", "image|pixels"),
    "small picture that is a bomb": (lambda: picture(png_of(30000, 30000)), "undecodable", "image|pixels"),
    "video of huge frames": (
        lambda: clip(video_of_one_frame(16384, 8192), num_frames=1),
        "undecodable",
        "16384 x 8192",
    ),
    "empty conversation": (lambda: {"json": {"branches": [[]]}}, "malformed", "roles"),
    "no conversation": (lambda: {"json": {"branches": []}}, "malformed", "branches"),
    "no answer": (lambda: {"json": {"branches": [[{"role": "user", "content": "Q"}]]}}, "malformed", "roles"),
    "blank answer": (lambda: {"json": chat(answer=" ")}, "malformed", "empty"),
    "NaN coordinate": (lambda: pointing("[[1, [[NaN, 0.5]]]]"), "malformed", "finite"),
    "infinite coordinate": (lambda: pointing("[[1, [[0.5, 1e999]]]]"), "malformed", "finite"),
    "sample without json": (lambda: {"img0.jpg": JPEG}, "malformed", "no part json"),
    "empty json": (lambda: {"json": b""}, "malformed", "JSON"),
    "json of another kind": (lambda: {"json": b"[1, 2]"}, "malformed", ""),
    "json that is not UTF-8": (lambda: {"json": b"\xff\xfe{}"}, "malformed", "JSON"),
    "lone surrogate": (lambda: text(b'"\\ud800"'), "malformed", "JSON"),
    "huge json": (lambda: text(b'"' + b"a " * (MAX_JSON // 2) + b'"'), "malformed", "more than"),
    "too many branches": (lambda: {"json": many_branches(10_001)}, "malformed", "at most 10000 items"),
    "deep json": (lambda: {"json": b'{"branches":' * 400_000}, "malformed", "recursion"),
    "huge deep json": (lambda: {"json": b"[" * 200_000_000}, "malformed", "more than"),
    "video of no length": (lambda: clip(duration=-1.0), "malformed", "duration"),
    "infinitely long video": (lambda: {"json": clip(duration=float("inf"))["json"]}, "malformed", "duration"),
    "a part named like Energon's own": (
        lambda: {"json": chat(), "__restore_key__": b"x"},
        "unreadable",
        "__restore_key__",
    ),
    "a part named like ours": (lambda: {"json": chat(), "__error__": b"x"}, "unreadable", ""),
}


def good(number: int) -> dict:
    return (picture(), clip(), {"json": chat(f"Q {number}", "A" * (number + 1))})[number % 3]


def stream(folder, names=("bad", "fine"), saved=(), **changes):
    blend = write_blend(folder / "blend.yaml", *names)
    data = config(folder, blend=blend, seq_length=400, max_frames=4, **changes)
    return train_loader(data, VISION, load_blend(data), 0, 1, None, 1, saved)


def passes(loader, source: int, size: int, times: int = 1):
    """Read until every sample of the source was handed out so often: (counters of all sources, errors, examples)."""
    counters, errors, seen = {}, [], Counter()
    while any(seen[source, index] < times for index in range(size)):
        batch = next(loader)
        for name, counts in batch.counters.items():
            counters[name] = counters.get(name, Counter()) + Counter(counts)
        errors += batch.errors
        seen.update(map(tuple, batch.examples.tolist()))
        assert len(batch.errors) == sum(
            counts.get(f"dropped_{kind}", 0)
            for counts in batch.counters.values()
            for kind in ("malformed", "undecodable", "unreadable")
        )
    samples = sum(
        count
        for counts in counters.values()
        for name, count in counts.items()
        if name == "examples" or name.startswith("dropped_") and name != "dropped_branches"
    )
    assert samples == seen.total()
    return counters, errors, seen


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN_SAMPLES)
def test_a_broken_sample_is_counted_and_reported(fault, tmp_path):
    make, kind, words = BROKEN_SAMPLES[fault]
    samples = [good(number) for number in range(SIZE)]
    samples[5] = samples[13] = make()
    write_source(tmp_path / "bad", samples, SHARD)
    write_source(tmp_path / "fine", [good(number) for number in range(SIZE)])
    counters, errors, seen = passes(stream(tmp_path), 0, SIZE)
    # Of what cannot be read the key is not known, but its place is.
    assert all(re.match(r"bad: (00005|00013|train-[01]\.tar\[5\]): ", error) for error in errors)
    assert len(errors) == counters["bad"][f"dropped_{kind}"] == seen[0, 5] + seen[0, 13]
    assert all(re.search(words, error) and len(error) <= MAX_REPORT and error.isprintable() for error in errors)
    assert not any(name.startswith("dropped_") for name in counters["fine"])


def replace_by_garbage(path):
    path.write_bytes(np.random.default_rng(1).bytes(path.stat().st_size))


def shorten_index(path):
    index = path.with_suffix(".tar.idx")
    index.write_bytes(index.read_bytes()[: 8 * (SHARD // 2)])


def end_early(path):
    """The shard holds fewer samples than its index says."""
    index = np.frombuffer(path.with_suffix(".tar.idx").read_bytes(), dtype=np.uint64)
    path.write_bytes(path.read_bytes()[: int(index[SHARD // 2])] + bytes(1024))


def swap_for_a_folder(path):
    """What cannot be opened; a test that runs as root may open all files."""
    path.unlink()
    path.mkdir()


BROKEN_SHARDS = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), None),
    "empty": (lambda path: os.truncate(path, 0), SHARD),
    "garbage": (replace_by_garbage, SHARD),
    "removed": (lambda path: path.unlink(), SHARD),
    "not a file": (swap_for_a_folder, SHARD),
    "no index": (lambda path: path.with_suffix(".tar.idx").unlink(), SHARD),
    "index too short": (shorten_index, None),
    "fewer samples than its index says": (end_early, SHARD // 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN_SHARDS)
def test_a_broken_shard_costs_its_own_samples(fault, tmp_path):
    write_source(tmp_path / "bad", [good(number) for number in range(SIZE)], SHARD)
    break_shard, lost = BROKEN_SHARDS[fault]
    break_shard(tmp_path / "bad" / "train-1.tar")
    loader = stream(tmp_path, ["bad"])
    counters, errors, seen = passes(loader, 0, SIZE, times=2)
    keys = {error.split(": ")[1] for error in errors}
    assert keys <= {f"train-1.tar[{index}]" for index in range(SHARD)} and 0 < len(keys) == (lost or len(keys))
    assert len(errors) == counters["bad"]["dropped_unreadable"]
    assert set(counters["bad"]) & {"dropped_malformed", "dropped_undecodable"} == set()
    state = tmp_path / "state"
    state.write_bytes(save_state(loader))
    expected = [(batch.__key__, batch.errors, batch.counters) for batch in (next(loader) for _ in range(12))]
    again = stream(tmp_path, ["bad"], [state])
    assert [(batch.__key__, batch.errors, batch.counters) for batch in (next(again) for _ in range(12))] == expected
    assert any(errors for _, errors, _ in expected)


@pytest.mark.slow
def test_a_shard_may_vanish_and_return_while_the_stream_is_read(tmp_path):
    write_source(tmp_path / "bad", [good(number) for number in range(10 * SHARD)], SHARD)
    loader = stream(tmp_path, ["bad"])
    next(loader)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for shard in (tmp_path / "bad").glob("train-*.tar"):
        shard.rename(hidden / shard.name)
    lost, _, seen = passes(loader, 0, 10 * SHARD)
    assert lost["bad"]["dropped_unreadable"] > 2 * SHARD  # a few shards were open
    for shard in hidden.iterdir():
        shard.rename(tmp_path / "bad" / shard.name)
    first = max(seen.values()) + 1
    found, errors, _ = passes(loader, 0, 10 * SHARD, times=first)
    found, errors, _ = passes(loader, 0, 10 * SHARD)
    assert not errors and "dropped_unreadable" not in found["bad"]


def test_no_headers_of_shards_pile_up(tmp_path, monkeypatch):
    """tarfile remembers every member that it has read, as long as the file is open."""
    opened, open_tar = [], ITarFile.open

    def remember(*args, **kwargs):
        opened.append(open_tar(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(ITarFile, "open", remember)
    write_source(tmp_path / "bad", [good(number) for number in range(SIZE)], SHARD)
    passes(stream(tmp_path, ["bad"]), 0, SIZE, times=4)
    assert len(opened) == SIZE // SHARD and not any(tar.members for tar in opened)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_always_fails_does_not_stop_the_others(workers, tmp_path):
    write_source(tmp_path / "bad", [picture(None)] * SIZE)
    write_source(tmp_path / "fine", [{"json": chat(f"Q {number}", "A")} for number in range(SIZE)])
    loader = stream(tmp_path, num_workers=workers)
    counters, _, _ = passes(loader, 1, SIZE, times=2)
    loader.close()
    assert set(counters["bad"]) == {"dropped_undecodable"} and counters["bad"].total() >= SIZE
    assert counters["fine"]["examples"] >= 2 * SIZE


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_where_all_samples_fail_empty_rows_tell(workers, tmp_path):
    write_source(tmp_path / "bad", [{"json": b"{"}] * SIZE)
    loader = stream(tmp_path, ["bad"], num_workers=workers)
    for _ in range(3):
        batch = next(loader)
        assert batch.counters == {"bad": {"dropped_malformed": MAX_DROPPED_IN_A_ROW}}
        assert (batch.segment_ids == -1).all() and not batch.loss_weights.any() and len(batch.crops) == 0
    loader.close()
    data = config(tmp_path, blend=str(tmp_path / "blend.yaml"), seq_length=3)
    shutil.rmtree(tmp_path / "bad")
    write_source(tmp_path / "bad", [{"json": chat()}] * SIZE)
    batch = next(train_loader(data, VISION, load_blend(data), 0, 1, None, 1))
    assert batch.counters == {"bad": {"dropped_too_long": MAX_DROPPED_IN_A_ROW}} and not batch.errors


def test_reports_are_printable(tmp_path):
    write_source(tmp_path / "bad", [{"json": {"branches": [], "\x1b[31m\ud800 a key": 1}}] * SIZE)
    _, errors, _ = passes(stream(tmp_path, ["bad"]), 0, SIZE)
    for error in errors:
        error.encode()
        assert error.isprintable() and len(error) <= MAX_REPORT


@pytest.mark.slow
def test_restoring_is_exact_with_broken_samples_in_the_buffers(tmp_path):
    samples = [good(number) for number in range(SIZE)]
    samples[::3] = [make() for make, _, _ in list(BROKEN_SAMPLES.values())[: len(samples[::3])]]
    write_source(tmp_path / "bad", samples, SHARD)
    (tmp_path / "bad" / "train-2.tar").unlink()
    loader = stream(tmp_path, ["bad"])
    for number in range(6):
        state = tmp_path / f"state{number}"
        state.write_bytes(save_state(loader))
        again = stream(tmp_path, ["bad"], [state])
        for _ in range(4):
            batch, same = next(loader), next(again)
            assert (batch.__key__, batch.counters, batch.errors) == (same.__key__, same.counters, same.errors)
            assert (batch.input_ids == same.input_ids).all() and (batch.crops == same.crops).all()


# --- the limit ------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_report_counts_by_source_and_tells_the_first_errors(one_rank):
    report = DataReport(["a", "b"], "cpu", {"a": {"examples": 100, "truncated": 3}, "gone": {"examples": 1}})
    batches = [
        {"counters": {"a": {"examples": 5, "dropped_malformed": 2}}, "errors": ["a: k1: x", "a: k2: y"]},
        {"counters": {"a": {"examples": 1}, "b": {"examples": 4, "dropped_too_long": 3}}, "errors": []},
        {},  # of a rank without the loader
    ]
    assert report.add(batches) == ["a: k1: x", "a: k2: y"]
    assert report.by_source() == {
        "a": {"examples": 106, "truncated": 3, "dropped_malformed": 2},
        "b": {"examples": 4, "dropped_too_long": 3},
    }
    assert report.note() == " | dropped 5 of 115 (b 3, a 2), shortened 3"
    assert report.lines() == ["a: 3 truncated, 2 dropped_malformed (108 samples)", "b: 3 dropped_too_long (7 samples)"]
    more = [{"counters": {"a": {"dropped_unreadable": 9}}, "errors": [f"a: n{i}: z" for i in range(9)]}]
    assert report.add(more) == [f"a: n{i}: z" for i in range(MAX_REPORTS - 2)] and report.add(more) == []
    assert DataReport(["a"], "cpu").note() == "" and DataReport(["a"], "cpu").lines() == []


@pytest.mark.parametrize(
    "counts, rate, stops",
    [
        ({"examples": 1979, "dropped_malformed": 7, "dropped_undecodable": 7, "dropped_unreadable": 7}, 0.01, True),
        ({"examples": 2079, "dropped_malformed": 7, "dropped_undecodable": 7, "dropped_unreadable": 7}, 0.01, False),
        ({"dropped_malformed": MIN_BROKEN}, 0.01, True),
        ({"dropped_malformed": MIN_BROKEN - 1}, 0.01, False),  # too few to tell
        ({"examples": 10**6, "dropped_malformed": 1}, 0.0, True),
        ({"examples": 10**6}, 0.0, False),
        ({"dropped_malformed": 500}, 1.0, False),
        ({"dropped_too_long": 500, "dropped_branches": 500, "examples": 5}, 0.01, False),  # not broken
    ],
)
def test_the_limit_on_broken_samples(counts, rate, stops):
    report = DataReport(["fine", "bad"], "cpu", {"fine": {"examples": 10**7}, "bad": counts})
    report.last_report["bad"] = "bad: 00017: The image cannot be decoded."
    sentence = report.too_broken(rate, "data.blend=my_blend")
    assert (sentence is not None) == stops
    for words in ("source bad", f"data.max_error_rate={rate}", "00017: The image cannot be decoded", "my_blend"):
        assert not stops or words in sentence
