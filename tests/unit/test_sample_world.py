import io
import json
import multiprocessing
import re
import subprocess
import sys
import tarfile

import av
import numpy as np
import pytest
from megatron.energon import (
    Cooker,
    Sample,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from PIL import Image
from programs import REPOSITORY

from molmo2_nemo.data.points import Points, Tracks, parse, render_content
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.data.tasks import converse
from molmo2_nemo.files import published
from molmo2_nemo.prepare.sample_world import write
from molmo2_nemo.prepare.sample_world.drawing import render
from molmo2_nemo.prepare.sample_world.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, FPS, SHAPES
from molmo2_nemo.prepare.sample_world.write import SETS, SPLITS, TRAIN_SETS, generate, make_sample, text_corpus

TOOL = REPOSITORY / "tools" / "make_sample_data.py"
SCALE = 0.01


@pytest.fixture
def data(sample):
    """What the tool has made with the seed 0."""
    return sample


def read_shards(folder, split):
    """{key: {part: bytes}} of a split."""
    samples = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, part = member.name.split(".", 1)
                samples.setdefault(key, {})[part] = tar.extractfile(member).read()
    return samples


def decode(data):
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return container.streams.video[0].average_rate, frames


def colour_at(picture, x, y):
    """The name of the colour at fractions of width and height, or None on the background."""
    height, width, _ = picture.shape
    pixel = picture[int(y * height), int(x * width)].astype(int)
    if np.ptp(pixel) < 40:
        return None
    return min(COLOURS, key=lambda name: np.abs(pixel - COLOURS[name]).sum())


def turns(sample):
    """(question, answer with points written out) of every turn."""
    messages = [m for branch in sample.branches for m in branch if m["role"] != "system"]
    texts = [render_content(m["content"], m.get("points", [])) for m in messages]
    return list(zip(texts[::2], texts[1::2]))


def test_set_names():
    assert set().union(*TRAIN_SETS.values()) == set(SETS)
    assert len(TRAIN_SETS["stage1"]) == 5


@pytest.mark.parametrize("name", SETS)
def test_schema(data, name):
    manifest = json.loads((data / "sample.json").read_text())
    for split in ("train", "val"):
        samples = read_shards(data / name, split)
        assert len(samples) == manifest["counts"][name][split] == SETS[name].count(split, SCALE)
        for parts in samples.values():
            record = json.loads(parts.pop("json"))
            read_example(json.dumps(record))
            assert set(record) - {"multi_turn"} == {"style", "images", "video", "branches"}
            media = [*record["images"], *([record["video"]] if record["video"] else [])]
            assert parts.keys() == {entry["part"] for entry in media}
            for entry in record["images"]:
                picture = Image.open(io.BytesIO(parts[entry["part"]]))
                assert (picture.mode, *picture.size) == ("RGB", entry["width"], entry["height"])
            assert record["branches"]
            for branch in (branch for branch in record["branches"] if isinstance(branch, list)):
                roles = [message["role"] for message in branch if message["role"] != "system"]
                assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
                for message in branch:
                    text = render_content(message["content"], message.get("points", []))
                    assert text and not re.search(r"<points \d", text)
                    assert len(parse(text)) == len(message.get("points", []))


def test_video_entries_are_true(data):
    for parts in list(read_shards(data / "video_qa", "train").values())[:6]:
        video = json.loads(parts["json"])["video"]
        rate, frames = decode(parts["video.mp4"])
        assert (rate, len(frames)) == (video["fps"], video["num_frames"])
        assert frames[0].shape == (video["height"], video["width"], 3)
        assert video["duration"] == len(frames) / rate and 1 <= video["duration"] <= 2


@pytest.mark.parametrize("name", ["points", "count", "points_dense", "multi_image"])
def test_points_lie_on_what_their_label_says(name):
    seen = 0
    for index in range(60):
        sample = make_sample(name, "train", index)
        pictures = [render(scene) for scene in sample.images]
        for _, answer in turns(sample):
            for points in parse(answer):
                *colour, shape = points.label.split()
                total = re.search(r"total of (\d+)", answer)
                assert total is None or int(total[1]) == sum(len(group) for _, group in points.groups)
                for image, group in points.groups:
                    things = sample.images[image - 1].things
                    assert len(group) == sum(
                        shape in ("shape", t.shape) and (not colour or colour == [t.colour]) for t in things
                    )
                    for x, y in group:
                        assert colour_at(pictures[image - 1], x, y) in (colour or COLOURS)
                        seen += 1
    assert seen > 50


@pytest.mark.parametrize("name", ["video_points", "video_tracks"])
def test_points_in_videos_lie_on_what_their_label_says(name):
    for index in range(8):
        sample = make_sample(name, "train", index)
        _, frames = decode(sample.parts()["video.mp4"])
        for _, answer in turns(sample):
            (found,) = parse(answer)
            assert isinstance(found, Tracks if name == "video_tracks" else Points)
            *colour, _ = found.label.split()
            groups = found.frames if name == "video_tracks" else found.groups
            if name == "video_tracks":
                assert [time for time, _ in groups] == [i / 2 for i in range(2 * len(frames) // FPS)]
            for time, group in groups:
                assert time * 2 == int(time * 2)
                for *_, x, y in group:
                    assert colour_at(frames[int(time * FPS)], x, y) in (colour or COLOURS)


def test_captions_are_in_order_and_complete():
    for index in range(60):
        sample = make_sample("captions", "train", index)
        (scene,) = sample.images
        (_, caption), _ = turns(sample)
        named = re.findall(f"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", caption)
        assert named == [(t.colour, t.shape) for t in sorted(scene.things, key=lambda t: t.x)]
        middle = np.median(render(scene), axis=(0, 1)).mean()
        assert caption.endswith("dark background" if middle < 128 else "light background")


def test_answers_about_images():
    kinds = set()
    for index in range(150):
        sample = make_sample("image_qa", "train", index)
        things = sample.images[0].things
        assert 3 <= len(sample.branches) <= 10
        for question, answer in turns(sample):
            colour = re.search("|".join(COLOURS), question)
            shape = re.search("|".join(SHAPES), question)
            matching = [
                t for t in things if (not colour or t.colour == colour[0]) and (not shape or t.shape == shape[0])
            ]
            kind = question.split()[:2]
            kinds.add(kind[1])
            if kind == ["What", "colour"] or kind == ["What", "color"]:
                assert [t.colour for t in matching] == [answer]
            elif "shape" in kind:
                assert [t.shape for t in matching] == [answer]
            elif kind == ["How", "many"]:
                assert len(matching) == int(answer)
            elif question.startswith("Is the background"):
                assert sample.images[0].grey in BACKGROUNDS[answer]
            elif question.startswith("What is"):
                (other,) = [t for t in things if t not in matching]
                assert answer.split()[1:] == [other.colour, other.shape]
                assert ("left" in question) == (other.x < matching[0].x)
            else:
                assert answer == ("yes" if matching else "no")
    assert {"colour", "color", "shape", "many", "the", "is", "there", "you"} == kinds


def test_answers_about_several_images():
    for index in range(60):
        sample = make_sample("multi_image", "train", index)
        if sample.style != "user_qa":
            continue
        names = [[f"{t.colour} {t.shape}" for t in scene.things] for scene in sample.images]
        for question, answer in turns(sample):
            if "mage is the" in question or "mage has" in question:
                (image,) = [i for i, here in enumerate(names, start=1) if any(name in question for name in here)]
                assert answer == str(image)
            elif "colour" in question:
                (thing,) = names[int(re.search(r"image (\d)", question)[1]) - 1]
                assert thing.startswith(answer)
            else:
                assert answer == str(sum(map(len, names)))


def test_direction_is_what_the_pixels_do():
    directions = set()
    for index in range(24):
        sample = make_sample("video_qa", "train", index)
        _, frames = decode(sample.parts()["video.mp4"])
        answers = [answer for _, answer in turns(sample)]
        change = np.abs(frames[-1].astype(int) - frames[0]).sum(2)
        start = np.abs(frames[0].astype(int) - COLOURS[answers[1]]).sum(2) < 90
        end = np.abs(frames[-1].astype(int) - COLOURS[answers[1]]).sum(2) < 90
        before, after = (np.argwhere(mask & (change > 90)).mean(0) for mask in (start, end))
        dy, dx = after - before
        # Along the axis of the motion the change is large, across it there is next to none.
        assert max(abs(dx), abs(dy)) > 10 > 3 > min(abs(dx), abs(dy))
        sign = (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))
        assert DIRECTIONS[answers[0]] == sign
        directions.add(answers[0])
    assert directions == set(DIRECTIONS)


def test_places_in_a_video_are_what_the_pixels_show():
    found = set()
    for index in range(80):
        sample = make_sample("video_qa", "train", index)
        colours = [thing.colour for thing in sample.video.things]
        frame = render(sample.video, sample.video.num_frames - 1)
        for question, answer in turns(sample):
            asked = re.fullmatch(r"Where is the (.*) in the end\?", question)
            things = [thing for thing in sample.video.things if asked and thing.name.endswith(asked[1])]
            if not asked or len(set(colours)) < len(colours):
                continue
            (thing,) = things
            pixels = np.abs(frame.astype(int) - COLOURS[thing.colour]).sum(2) < 60
            y, x = (3 * np.argwhere(pixels).mean(0) / len(pixels)).astype(int)
            words = [["up", "", "down"][y], ["left", "", "right"][x]]
            assert answer == " ".join(word for word in words if word)
            found.add(answer)
    assert len(found) == 8  # nothing ends in the middle


@pytest.mark.parametrize("name", [name for name in SETS if name != "text"])
def test_held_out_combinations_are_not_trained_on(name):
    def combinations(split, count):
        found = set()
        for index in range(count):
            sample = make_sample(name, split, index)
            things = [t for scene in [*sample.images, sample.video] if scene for t in scene.things]
            if len({t.name for t in things}) > 1:
                found.add(tuple(sorted((t.colour, t.shape, t.direction or "") for t in things)))
        return found

    train, val = combinations("train", 400), combinations("val", 40)
    assert len(val) >= 5 and not train & val


def test_shapes_do_not_overlap_and_are_inside():
    for name in ("captions", "count", "multi_image", "video_tracks"):
        for index in range(60):
            sample = make_sample(name, "train", index)
            for scene in [*sample.images, *([sample.video] if sample.video else [])]:
                for frame in {0, max(scene.num_frames - 1, 0)}:
                    centres = [np.array(scene.position(thing, frame)) for thing in scene.things]
                    for i, thing in enumerate(scene.things):
                        assert (centres[i] >= thing.size / 2).all()
                        assert (centres[i] <= np.array([scene.width, scene.height]) - thing.size / 2).all()
                        for j in range(i):
                            apart = np.abs(centres[i] - centres[j]).max()
                            assert apart > (thing.size + scene.things[j].size) / 2


@pytest.mark.slow
def test_same_arguments_give_the_same_bytes(data, tmp_path):
    counts = json.loads((data / "sample.json").read_text())["counts"]
    for name in ("captions", "video_qa", "text"):
        write.write_set(tmp_path / name, name, 0, counts[name])
        for shard in sorted((tmp_path / name).glob("*.tar")):
            assert shard.read_bytes() == (data / name / shard.name).read_bytes()
    assert make_sample("captions", "train", 0, 3).parts() != make_sample("captions", "train", 0, 4).parts()


def test_the_splits_are_drawn_from_different_seeds():
    seeds = {split: {make_sample("captions", split, i).images[0].noise_seed for i in range(100)} for split in SPLITS}
    assert len(seeds["train"]) == len(seeds["val"]) == 100 and not seeds["train"] & seeds["val"]


@edataclass
class Raw(Sample):
    record: dict
    parts: set


@stateless
def cook(sample):
    parts = {part for part in sample if not part.startswith("__")}
    return Raw(**basic_sample_keys(sample), record=json.loads(sample["json"]), parts=parts)


class RawEncoder(TaskEncoder):
    decoder = None
    cookers = [Cooker(cook)]

    @stateless
    def batch(self, samples):
        return samples


@pytest.mark.slow
@pytest.mark.parametrize("name", ["captions", "multi_image", "video_tracks", "text"])
def test_energon_reads_each_split(data, name):
    worker_config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    common = {"batch_size": 1, "worker_config": worker_config, "task_encoder": RawEncoder()}
    val = get_loader(get_val_dataset(data / name, split_part="val", **common))
    held_out = [sample for batch in val for sample in batch]
    train = get_loader(
        get_train_dataset(data / name, shuffle_buffer_size=None, max_samples_per_sequence=None, repeat=False, **common)
    )
    trained = [sample for batch in train for sample in batch]
    for samples, split in ((held_out, "val"), (trained, "train")):
        assert sorted(s.__key__.split("/")[-1] for s in samples) == sorted(read_shards(data / name, split))
        for sample in samples:
            media = len(sample.record["images"]) + bool(sample.record["video"])
            assert len(sample.parts) == 1 + media


def test_complete_data_are_left_alone(data):
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    lines = []
    generate(data, scale=SCALE, progress=lines.append)
    assert len(lines) == 1 and "complete already" in lines[0]
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before
    with pytest.raises(ValueError, match="holds something else"):
        generate(data, seed=4, scale=SCALE)


def test_nothing_is_left_of_a_run_that_failed(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(write, "SETS", {"text": SETS["text"]})
    monkeypatch.setattr(write, "_write_quiz", fail)
    with pytest.raises(OSError, match="disk full"):
        generate(tmp_path / "sample", scale=SCALE, progress=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == [".sample.lock"]


def test_who_comes_second_waits_and_finds_them(tmp_path, monkeypatch):
    """Two processes. The first makes its set only when the second has begun, which must then wait."""
    monkeypatch.setattr(write, "SETS", {"text": SETS["text"]})
    fork = multiprocessing.get_context("fork")
    both, lines = fork.Barrier(2), [fork.SimpleQueue(), fork.SimpleQueue()]

    def make(said):
        both.wait(60)
        generate(tmp_path / "sample", scale=SCALE, progress=said.put)

    pair = [fork.Process(target=make, args=(said,)) for said in lines]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    [first, second] = sorted(said.get() for said in lines)
    assert "complete already" in first and second == "text: 16 samples, 24 held out"
    assert all(said.empty() for said in lines)


def test_a_folder_that_another_process_made_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="made by another process"), published(tmp_path / "set") as folder:
        (folder / "mine").touch()
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "theirs"]


def test_command_line_errors_are_one_line(data, tmp_path):
    run = subprocess.run([sys.executable, TOOL, "--out", data, "--seed", "9"], capture_output=True, text=True)
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1 and "remove it" in run.stderr
    address = subprocess.run(
        [sys.executable, TOOL, "--out", "s3://bucket/sample?key=secret"], capture_output=True, text=True, cwd=tmp_path
    )
    assert address.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "--out: s3://bucket/sample is an address: name a path on this machine" in address.stderr
    assert "secret" not in address.stderr


def test_quiz(data):
    quiz = json.loads((data / "quiz" / "quiz.json").read_text())
    images = [entry for entry in quiz if "image" in entry]
    videos = [entry for entry in quiz if "video" in entry]
    assert (len(images), len(videos)) == (12, 4)
    for entry in images:
        picture = np.asarray(Image.open(data / "quiz" / entry["image"]))
        height, width, _ = picture.shape
        grid = {colour_at(picture, (x + 0.5) / width, (y + 0.5) / height) for x in range(width) for y in range(height)}
        if "colo" in entry["question"]:
            assert entry["answer"] in grid
        elif entry["question"].startswith("How many"):
            assert entry["answer"] in "1234"
        else:
            assert entry["answer"] in SHAPES
    for entry in videos:
        _, frames = decode((data / "quiz" / entry["video"]).read_bytes())
        assert len(frames) >= FPS
        assert entry["answer"] in [*DIRECTIONS, *COLOURS]


def test_text_corpus_has_all_words_and_both_separators():
    corpus = "\n".join(text_corpus(per_set=40))
    assert all(word in corpus for word in [*COLOURS, *SHAPES, *DIRECTIONS, "<tracks", "</points>", "\t"])
    assert "fps" in corpus and "caption" in corpus  # what tasks ask
    assert re.search(r"\d;\d", corpus)


# --- tasks ----------------------------------------------------------------------------------------------------------


def task_samples(name, count=60):
    return [make_sample(name, "train", index) for index in range(count)]


def tasks(sample, kind):
    return [branch for branch in sample.branches if isinstance(branch, dict) and branch["task"] == kind]


def test_every_kind_of_task_is_there():
    found, styles = set(), set()
    for name in (name for name in SETS if name.startswith("task_")):
        for sample in task_samples(name):
            found |= {branch["task"] if isinstance(branch, dict) else "messages" for branch in sample.branches}
            found |= {*sample.video_keys, f"{len(sample.images)} images", f"multi_turn {sample.multi_turn}"}
            found |= {key for branch in sample.branches if isinstance(branch, dict) for key in branch}
            example = read_example(json.dumps(sample.record()))
            for seed in range(4):
                styles |= {talk.style for talk in converse(example, np.random.default_rng(seed), "templates")}
    assert found >= {
        "messages",
        "caption",
        "question",
        "multiple_choice",
        "pointing",
        "tracking",
        "explanation",
        "unanswerable",
        "images",
        "2 images",
        "5 images",
        "clip",
        "subtitles",
        "annotation_fps",
        "multi_turn 0.2",
    }
    assert styles >= {
        "long_caption",
        "transcript",
        "video_long_caption",
        "video_short_caption",
        "vqa2",
        "user_qa",
        "a_okvqa_mc",
        "video_multiple_choice",
        "cosyn_diagram_exp",
        "pointing",
        "point_count",
        "count_point",
        "counting",
        "cosyn_point",
        "multi_image_pointing",
        "multi_image_point_then_count",
        "multi_image_count_then_point",
        "multi_image_counting",
        "video_point",
        "video_point_count",
        "video_count_point",
        "video_count",
        "video_point_track_per_frame",
        "video_point_ground_start_end",
        "video_single_point_track_per_frame",
    }


def test_points_of_tasks_lie_on_all_that_they_name():
    checked = 0
    for sample in task_samples("task_points"):
        pictures = [render(scene) for scene in sample.images]
        for task in tasks(sample, "pointing"):
            words = [word for word in task["label"].split() if word != "shape"]
            for number, group in task["points"]:
                names = [thing.name.split() for thing in sample.images[number - 1].things]
                assert len(group) == sum(all(word in name for word in words) for name in names)
                for x, y in group:
                    seen = colour_at(pictures[number - 1], x, y)
                    assert seen and (len(words) < 2 or seen == words[0])
                    checked += 1
    assert checked > 100


def test_points_of_video_tasks_lie_on_what_they_name():
    checked = several = 0
    for sample in task_samples("task_video"):
        start = sample.video_keys.get("clip", [0.0])[0]
        for task in tasks(sample, "pointing"):
            seen = {}
            for seconds, [[x, y]] in task["points"]:
                picture = render(sample.video, round((seconds + start) * FPS))
                seen[colour_at(picture, x, y), x, y] = seconds
            colours = [colour for colour, _, _ in seen]
            if task["label"] == "shape":
                assert sorted(colours) == sorted(thing.colour for thing in sample.video.things)
                several += len(set(seen.values())) > 1
            else:
                assert colours == [task["label"].split()[0]]
            checked += 1
    assert checked > 50 and several > 5


def test_tracks_of_tasks_end_where_a_thing_leaves_the_picture():
    checked = left = 0
    for sample in task_samples("task_tracks"):
        for task in tasks(sample, "tracking"):
            shown = {}
            for seconds, objects in task["frames"]:
                picture = render(sample.video, round(seconds * FPS))
                for name, x, y in objects:
                    assert colour_at(picture, x, y) == name.split()[0]
                    checked += 1
                colours = [thing.colour for thing in sample.video.things]
                for thing in sample.video.things:
                    if task["label"] in ("shape", thing.name) and colours.count(thing.colour) == 1:
                        pixels = (np.abs(picture.astype(int) - COLOURS[thing.colour]).max(-1) < 12).sum()
                        shown.setdefault(thing.name, []).append((pixels, thing.name in [name for name, *_ in objects]))
            for frames in shown.values():
                # A triangle that goes up shows three quarters when its centre goes.
                whole = max(pixels for pixels, _ in frames)
                assert frames[0][1] and all(pixels < 0.8 * whole for pixels, is_there in frames if not is_there)
                left += not frames[-1][1]
    assert checked > 300 and left > 10


def test_right_options_are_right():
    checked = 0
    for sample in [*task_samples("task_image"), *task_samples("task_video")]:
        for task in tasks(sample, "multiple_choice"):
            right = task["options"][task["answer"]]
            assert len(set(task["options"])) == len(task["options"]) > 1
            if "moving" in task["question"]:
                (x, y), (later_x, later_y) = (sample.video.position(sample.video.things[0], f) for f in (0, 5))
                assert np.allclose(np.sign([later_x - x, later_y - y]), DIRECTIONS[right])
            elif "background" in task["question"]:
                corner = render(sample.images[0])[0, 0].mean()
                assert (right == "light") == (corner > 128)
            else:
                names = {thing.name for thing in sample.images[0].things}
                assert [option for option in task["options"] if option in names] == [right]
            checked += 1
    assert checked > 60


def test_answers_about_pictures_and_subtitles_are_right():
    checked = 0
    for sample in task_samples("task_image"):
        [scene] = sample.images
        for task in tasks(sample, "question"):
            if "background" in task["question"]:
                right = "light" if render(scene)[0, 0].mean() > 128 else "dark"
                assert task["answers"].count(right) == 2 and len(task["answers"]) == 3
            else:
                shape = task["question"].split()[2].removesuffix("s")
                assert task["answers"] == [str(sum(thing.shape == shape for thing in scene.things))]
                assert all(thing.name in task["explanation"] for thing in scene.things)
            checked += 1
    for sample in task_samples("task_video"):
        for task in tasks(sample, "question"):
            start, end, text = sample.video_keys["subtitles"][-1]
            assert task["answers"] == [text] and sample.video.things[0].direction in text
            assert start < end <= sample.video.num_frames / FPS
            checked += 1
    assert checked > 50
