"""tools/evaluate.py on small shards and the tiny model: what is written, going on, mistakes, public sets, two runs."""

import errno
import io
import json
import shutil
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import evaluate
import pyarrow
import pyarrow.parquet
import pytest
import torch
from media_files import film, scene
from sources import chat

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.ask.model import Asker, Reply
from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.config.schema import ModelConfig
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.evaluate import generate, public_sets, records, tasks, vllm_backend
from molmo2_nemo.evaluate.samples import Samples, see
from molmo2_nemo.hf.convert import write_checkpoint
from molmo2_nemo.prepare.converters import (
    CONVERTERS,
    converter_of,
    evaluation,
    evaluation_tracking,
    evaluation_video,
)
from molmo2_nemo.prepare.media import image_facts, video_facts
from molmo2_nemo.prepare.spool import checked
from molmo2_nemo.prepare.webdataset import write_shards


def bytes_of(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def picture_sample(number: int, *branches) -> tuple[str, dict[str, bytes]]:
    data = bytes_of(scene(40 + 30 * number, 60))
    example = {"images": [{"part": "img.png", **image_facts(data)}], "branches": list(branches)}
    return f"p{number}", {"json": json.dumps(example).encode(), "img.png": data}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two pictures with three and one questions, a video, text of two turns, and three samples that are broken."""
    point = {"task": "pointing", "label": "star", "points": [[1, [[0.5, 0.5]]]], "style": "pointing"}
    pick = {"task": "multiple_choice", "question": "Which?", "options": ["red", "blue"], "answer": 1}
    asked = {"task": "question", "question": "Colour?", "answers": ["blue"] * 3 + ["red"], "style": "vqa2"}
    clip = film()
    video = {
        "video": {"part": "clip.mp4", **video_facts(clip)},
        "branches": [{"task": "question", "question": "What?", "answers": ["it"]}],
    }
    text = chat("One?", "1")
    text["branches"][0] += [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}]
    broken = picture_sample(2, asked)[1]
    samples = [
        picture_sample(0, point, pick, asked),
        picture_sample(1, {"task": "caption", "text": "A long text."}),
        ("v", {"json": json.dumps(video).encode(), "clip.mp4": clip}),
        ("t", {"json": json.dumps(text).encode()}),
        ("no-json", {"json": b"{"}),
        ("no-picture", {"json": broken["json"]}),
        ("bad-picture", broken | {"img.png": b"no picture"}),
    ]
    folder = tmp_path_factory.mktemp("shards") / "mine"
    folder.mkdir()
    write_shards(folder, {"train": [("other", samples[3][1])], "test": samples}, shard_samples=4)
    return folder


@pytest.fixture(scope="module")
def asker(export):
    asker = Asker(export, "cpu")
    asker.load()
    return asker


@pytest.fixture
def said(monkeypatch, asker):
    """One model for all tests, and by question what it says; of others random weights do not matter."""
    answers = {}

    def init(self, folder, device=None, report=None):
        self.__dict__.update(asker.__dict__)

    def answer(self, questions, max_new_tokens, streamer=None):
        self.batch_inputs(questions)
        if "OOM" in answers and len(questions) > 1:
            raise ValueError("the GPU has too little memory")
        return [Reply(answers.get(messages[-1]["content"], "no"), False, 2) for messages, _ in questions]

    monkeypatch.setattr(Asker, "__init__", init)
    monkeypatch.setattr(Asker, "answers", answer)
    return answers


def run(capsys, *arguments):
    """(status, standard output, standard error)."""
    status = 0
    try:
        evaluate.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=evaluate.sys.stderr)
    return status, *capsys.readouterr()


def test_an_evaluation_that_goes_on_where_it_was_stopped(shards, export, said, tmp_path, capsys):
    out = tmp_path / "out"
    choice = list(tasks.questions(Samples([shards], "test").read(0).example, "mine/p0"))[1]
    said |= {"vqa2: Colour?": "Blue.", choice.messages[-1]["content"]: "B. blue", "Two?": "", "OOM": ""}
    command = (export, "--data", shards, "--out", out, "--device", "cpu", "--batch-size", 3)
    status, shown, error = run(capsys, *command)
    assert status == 1 and "3 of 10 questions have no answer" in error
    found = {record["id"]: record for record in records.read_predictions(out)}
    assert list(found) == sorted(found, key=lambda name: (found[name]["index"], name)) and len(found) == 10
    assert found["mine/p0/2"]["scores"] == {"vqa": 1.0} and found["mine/p0/1"]["scores"] == {"choice": 1.0}
    assert found["mine/p0/0"]["scores"]["point_f1"] == 0.0 and found["mine/p1/0"]["scores"] == {}
    assert found["mine/t/0.0"]["scores"] == {"exact_match": 0.0} and found["mine/t/0.1"]["said"] == ""
    errors = {name.split("/")[1]: record["error"] for name, record in found.items() if "error" in record}
    assert errors.keys() == {"no-json", "no-picture", "bad-picture"} and "img.png" in errors["no-picture"]
    for words in ("10 questions about 7 samples, 6 with a score", "1 have no metric", "1 have an empty answer"):
        assert words in shown
    page = (out / "index.html").read_text()
    assert page.index("mine/no-json") < page.index("mine/p0/0") < page.index("mine/p0/2") < page.index("mine/p1/0")
    assert len(list((out / "pictures").iterdir())) == 5  # of the questions about a picture or video that can be read
    scores = json.loads((out / "scores.json").read_text())
    assert sum(scores["counts"]["errors"].values()) == 3
    assert {line["metric"]: line["mean"] for line in scores["scores"]}["vqa"] == 1.0

    # Stopped in the middle of a line of the second sample, by other ranks than now.
    whole = (out / "answers-00000.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "answers-00003.jsonl").write_bytes(b"".join(lines[:2]))
    (out / "answers-00000.jsonl").write_bytes(lines[2] + lines[3][:-9])
    asked = []
    answer = Asker.answers
    Asker.answers = lambda self, questions, *rest: asked.extend(questions) or answer(self, questions, *rest)
    before = (out / "predictions.jsonl").read_bytes()
    status, _, error = run(capsys, *command)
    Asker.answers = answer
    assert status == 1 and "has answers about 1 of 7 samples: going on" in error
    assert (out / "predictions.jsonl").read_bytes() == before
    # Nothing that was there is asked again: of seven questions that can be asked, those of the whole lines are not.
    kept = sum("said" in json.loads(line) for line in lines[:3])
    assert len({messages[-1]["content"] for messages, _ in asked}) == 7 - kept

    # Another model, other data or another limit is refused, with the key.
    other = tmp_path / "model"
    shutil.copytree(export, other)
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(config | {"max_length": 9}))
    for changed, key in (((other, *command[1:]), "model_hash="), ((*command, "--limit", 2), "samples=")):
        status, _, error = run(capsys, *changed)
        assert status == 1 and f"holds an evaluation with {key}" in error and "name another --out" in error
    status, shown, _ = run(capsys, "--compare", out, out)
    assert status == 0 and "vqa" in shown and "+0.000" in shown

    # Lines and settings that are damaged; what the message says is done.
    file, lines = out / "answers-00000.jsonl", (out / "answers-00000.jsonl").read_text().splitlines(keepends=True)
    for wrong in ("{}\n", "[1]\n", lines[1][:20] + "\n"):
        file.write_text("".join([lines[0], wrong, *lines[2:]]))
        status, _, error = run(capsys, *command)
        assert status == 1 and f"{file} is damaged in line 2: remove the line" in error and "Traceback" not in error
    file.write_text("".join([lines[0], *lines[2:]]))
    status, _, error = run(capsys, *command)
    assert status == 1 and "3 of 10 questions" in error and (out / "predictions.jsonl").read_bytes() == before
    (out / "predictions.jsonl").write_bytes(before[: before.rstrip().rfind(b"\n") + 20])
    status, _, error = run(capsys, "--compare", out, out)
    assert status == 1 and "predictions.jsonl is damaged at its end: run the evaluation again" in error
    run(capsys, *command)
    assert (out / "predictions.jsonl").read_bytes() == before
    (out / "predictions.jsonl").write_text("{}\n")
    status, _, error = run(capsys, "--compare", out, out)
    assert status == 1 and "predictions.jsonl is damaged in line 1" in error
    (out / "settings.json").write_text("{")
    status, _, error = run(capsys, *command)
    assert status == 1 and "settings.json is damaged" in error and "remove the folder" in error


def test_of_a_run_the_newest_or_the_best_checkpoint_is_evaluated(shards, export, said, tmp_path, capsys, monkeypatch):
    checkpoints = tmp_path / "cats" / "checkpoints"
    for step in (3, 7):
        make = {"weight": lambda: torch.zeros(2)}
        path = checkpoints / checkpoint_dir.step_name(step)
        write_checkpoint(path, ModelConfig(name="m"), {"weight": torch.empty(2, device="meta")}, make, {"step": step})
    (checkpoints / checkpoint_dir.BEST).write_text('{"step": 3, "value": 1.0}')
    exported = []

    @contextmanager
    def folder(model, *_):
        exported.append(model)
        yield export

    monkeypatch.setattr(evaluate, "hugging_face_folder", folder)
    monkeypatch.chdir(tmp_path)
    # Each has a folder of its own, so that a run may save while it is evaluated.
    for model, more, step in (("cats", (), 7), ("cats", ("--best",), 3), (checkpoints / "step_00000003", (), 3)):
        _, _, error = run(capsys, model, "--data", shards, "--limit", 1, "--device", "cpu", *more)
        name = checkpoint_dir.step_name(step)
        assert f"evaluating {exported[-1]}" in error and exported[-1].resolve() == checkpoints / name
        settings = json.loads((records.EVALUATIONS / f"cats-{name}-mine" / records.SETTINGS).read_text())
        assert Path(settings["model"]).resolve() == checkpoints / name
    assert len(list(records.EVALUATIONS.iterdir())) == 2


def test_what_can_be_refused_is_before_anything_is_exported(shards, export, said, tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "cats" / "checkpoints" / checkpoint_dir.step_name(3), tmp_path / "out"
    make = {"weight": lambda: torch.zeros(2)}
    write_checkpoint(path, ModelConfig(name="m"), {"weight": torch.empty(2, device="meta")}, make, {"step": 3})
    exported = []

    @contextmanager
    def folder(*_):
        exported.append("")
        yield export

    monkeypatch.setattr(evaluate, "hugging_face_folder", folder)
    command = (path, "--data", shards, "--limit", 1, "--out", out)
    run(capsys, *command)
    assert exported.pop() == "" and (out / "scores.json").is_file()
    (tmp_path / "file").touch()
    with records.held(tmp_path / "other"):
        for arguments, words in (
            ((*command, "--limit", 2), "holds an evaluation with samples=1"),
            ((*command, "--max-crops", 3), "holds an evaluation with max_crops="),
            ((*command, "--device", "cuda"), "torch finds no GPU here; leave --device out"),
            ((*command, "--backend", "vllm"), "vLLM is not installed"),
            ((*command[:-1], tmp_path / "file" / "out"), "cannot be written to (Not a directory): name another folder"),
            ((*command[:-1], "/proc/out"), "cannot be written to"),
            ((*command[:-1], tmp_path / "other"), f"another tools/evaluate.py works in {tmp_path / 'other'}"),
        ):
            status, _, error = run(capsys, *arguments)
            assert status == 1 and words in error and not exported, (arguments, error)
    # Now that the other one has ended.
    run(capsys, *command[:-1], tmp_path / "other")
    assert exported and (tmp_path / "other" / "scores.json").is_file()


def test_what_the_first_rank_does_ends_the_others_where_it_fails(monkeypatch):
    """Two ranks one after the other, in one process."""
    sent, dist = [], torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)

    def on_both(work):
        monkeypatch.setattr(dist, "get_rank", lambda: 0)
        monkeypatch.setattr(dist, "broadcast_object_list", lambda found: sent.append(list(found)))
        try:
            yield evaluate.by_first_rank(work)
        except ValueError as error:
            yield str(error)
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        monkeypatch.setattr(dist, "broadcast_object_list", lambda found: found.__setitem__(slice(None), sent.pop()))
        yield evaluate.by_first_rank(lambda: pytest.fail("it is of the first rank alone"))

    assert list(on_both(lambda: ("a", 3))) == [("a", 3)] * 2
    ranks = on_both(lambda: records.check_settings(Path("/nowhere"), {}) or json.loads("{"))
    assert "Expecting property name" in next(ranks)
    with pytest.raises(SystemExit, match="^1$"):
        next(ranks)


def test_a_disk_that_gets_full_ends_it_in_one_sentence_and_it_goes_on(
    shards, export, said, tmp_path, capsys, monkeypatch
):
    command = (export, "--data", shards, "--out", tmp_path / "out", "--device", "cpu", "--batch-size", 1)
    record_of, full = generate.record_of, iter([False] * 5 + [True])

    def record(*arguments):
        if next(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        return record_of(*arguments)

    monkeypatch.setattr(generate, "record_of", record)
    status, _, error = run(capsys, *command)
    assert status == 1 and f"{tmp_path / 'out'}: No space left on device; make room there, and the same" in error
    monkeypatch.setattr(generate, "record_of", record_of)
    _, shown, error = run(capsys, *command)
    assert "going on" in error and "10 questions about 7 samples" in shown


def test_mistakes_are_told_in_one_sentence(shards, export, said, tmp_path, capsys):
    unprepared, adapter, a_file = tmp_path / "bare", tmp_path / "adapter", tmp_path / "file"
    for file in (unprepared / "train-0.tar", adapter / "adapter_config.json", a_file):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    for arguments, words in (
        ((export, "--data", shards, "--split", "val"), "no samples of it (there are test, train)"),
        ((export, "--data", tmp_path), "holds neither .tar files nor .nv-meta: name the folder that python"),
        ((export, "--data", unprepared), "is not prepared"),
        ((export, "--data", shards, "--out", a_file), f"--out {a_file} is a file: name a folder"),
        ((export, "--data", shards, "--best"), "is an export: leave out --best"),
        (("--compare", shards, shards, "--best"), "leave out --compare"),
        ((adapter, "--data", shards), "holds adapters alone: evaluate their run"),
        ((export, "--data", tmp_path / "nowhere"), "is no folder: name one that tools/prepare.py has written"),
        ((tmp_path / "nothing", "--data", shards), "is no folder: name a run, a checkpoint or an export"),
        ((tmp_path, "--data", shards), "has no complete checkpoint: name a run that has saved one"),
        ((export, "--data", shards, "--backend", "vllm", "--out", tmp_path / "v"), "vLLM is not installed"),
        ((export, "--data", shards, "--out", shards), "holds other files"),
        ((export, "--set", "pixmo-points-evil"), "did you mean pixmo-points-eval"),
        ((export, "--set", "chartqa-test", "--root", tmp_path), "run python tools/download.py fetch chartqa-test"),
        (("--compare", shards, shards), "holds no finished evaluation"),
        ((export,), "give a model and --data SHARDS or --set NAME"),
    ):
        status, _, error = run(capsys, *arguments)
        assert status and words in error and "Traceback" not in error, error


@pytest.mark.slow
def test_answers_of_a_batch_are_those_of_single_questions(shards, asker):
    """Of different lengths and numbers of pictures: shorter prompts are padded on the left."""
    samples = Samples([shards], "test")
    asked = [(read, one) for read in map(samples.read, (0, 1, 3)) for one in tasks.questions(read.example, read.name)]
    questions = [(one.messages, see(read, asker)) for read, one in asked]
    video = samples.read(2)
    (about,) = tasks.questions(video.example, video.name)
    longer = [{"role": "user", "content": "Say it in some more words: " + about.messages[-1]["content"]}]
    for batch in (questions, [(messages, see(video, asker)) for messages in (about.messages, longer)]):
        single = [asker.answer(messages, seen, 6) for messages, seen in batch]
        assert asker.answers(batch, 6) == single and len({reply.text for reply in single}) > 1


def test_data_are_the_same_with_and_without_a_cache(shards, tmp_path):
    """So that an evaluation can go on without it."""
    cached, plain = Samples([shards], "test", str(tmp_path)), Samples([shards], "test")
    assert cached.identity == plain.identity
    assert [cached.read(number) for number in range(len(cached))] == [
        plain.read(number) for number in range(len(plain))
    ]


def test_batches_are_of_one_kind_and_keep_broken_samples_alone(shards, asker):
    made = list(generate.batches(generate.pending(Samples([shards], "test"), range(7), {}, asker), 3))
    names = [[one.asked.id.removeprefix("mine/") if one.asked else one.read.name for one in batch] for batch in made]
    assert names[0] == ["p0/0", "p0/1", "p0/2"] and ["v/0"] in names and ["p1/0", "t/0.0", "t/0.1"] in names
    assert all(len(batch) == 1 for batch in made if not batch[0].seen)


def test_what_failed_is_asked_again(tmp_path):
    lines = [{"id": f"s/{n}/0", "sample": f"s/{n}", "index": n, "questions": 1, "source": "s"} for n in range(2)]
    lines = [lines[0] | {"error": "the GPU has too little memory"}, lines[1] | {"scores": {}, "said": "x"}]
    (tmp_path / "answers-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert generate.unanswered(tmp_path, range(3)) == [0, 2]


# -- public sets ------------------------------------------------------------------------------------------------------


def test_no_evaluation_set_is_trained_on():
    trained, evaluated = load_catalogue(), load_catalogue(public_sets.CATALOGUE)
    modules = (evaluation, evaluation_tracking, evaluation_video)
    assert {entry.name for entry in evaluated.datasets} == {name for module in modules for name in module.CONVERTERS}
    for entry in evaluated.datasets:
        assert not entry.stages and entry.ratio is None and entry.sft is None
        assert entry.name not in {other.name for other in trained.datasets}
        converter_of(entry.model_dump())


MASK = [[False] * 4, [True] * 2 + [False] * 2]
RLE = evaluation.region([(1, MASK)])
UNCOMPRESSED = {"size": [2, 4], "counts": [1, 1, 1, 1, 4]}  # by columns: those of MASK
ROWS = {
    "pixmo-points-eval": {
        "image_url": "http://x/a.png",
        "label": "Cat",
        "points": [{"x": 25.0, "y": 75.0}],
        "masks": [MASK],
    },
    "pixmo-count-test": {"image_url": "http://x/a.png", "label": "Cats", "count": 3},
    "Molmo2-VideoPointEval": {
        "video_id": "abc",
        "label": "cat",
        "width": 200,
        "height": 100,
        "two_fps_timestamps": [1.5],
        "points": [{"x": 50.0, "y": 75.0}],
        "masks": [[{"frame_id": 3, "rle": UNCOMPRESSED}, {"frame_id": 4, "rle": UNCOMPRESSED}]],
    },
    "Molmo2-VideoCountEval": {
        "video_id": "abc",
        "question": "How many cats?",
        "count": 2,
        "clip_start": 1,
        "clip_end": 9,
    },
    "Molmo2-VideoTrackEval": {
        "clip": "c",
        "exp": "the cat",
        "fps": 2,
        "w": 200,
        "h": 100,
        "points": [{"object_id": "7", "points": [[50.0, 75.0], [1.0, 1.0], None]}],
        "masks": [{"object_id": "7", "masks": [UNCOMPRESSED, UNCOMPRESSED, None]}],
    },
    "nextqa-test": {"video": 5, "question": "Why?", **{f"a{i}": f"option {i}" for i in range(5)}, "answer": 2},
    "mvbench": {
        "part": "episodic_reasoning",
        "folder": "tvqa/frames_fps3_hq",
        "video": "e1",
        "question": "Who?",
        "candidates": ["he", "she"],
        "answer": "she",
        "start": 1.0,
        "end": 4.0,
    },
    "docvqa-val": {"data_split": "val", "question": "Total?", "answers": ["3", "three"], "image": "documents/a.png"},
}


def test_rows_as_loaders_and_cards_describe_them_become_tasks():
    found = {name: list(CONVERTERS[name].convert(row)) for name, row in ROWS.items()}
    drafts = {name: checked(draft) for name, (draft,) in found.items()}
    tasks_of = {name: draft.branches[0] for name, draft in drafts.items()}
    assert tasks_of["pixmo-points-eval"]["regions"] == [RLE] and drafts["pixmo-points-eval"].unit == "percent"
    assert tasks_of["pixmo-count-test"]["question"] == "How many cats are there? Point to each one."
    points = tasks_of["Molmo2-VideoPointEval"]
    assert points["points"] == [[1.5, [[0.25, 0.75]]]] and points["regions"][0]["masks"][1][0] == 2.0
    # Both forms of run lengths are the same mask.
    assert points["regions"][0]["masks"][0][1] == RLE["masks"][0][1] and points["regions"][0]["size"] == [2, 4]
    tracks = tasks_of["Molmo2-VideoTrackEval"]
    assert tracks["frames"] == [[0.0, [["7", 0.25, 0.75]]]]  # the second frame is not at 1 a second, the third is empty
    assert [where for where, _ in tracks["regions"][0]["masks"]] == [0.0]
    assert tasks_of["nextqa-test"]["answer"] == 2 and "NExTVideo/5.mp4" in drafts["nextqa-test"].video.names
    assert drafts["mvbench"].video.frames == ["tvqa/frames_fps3_hq/e1"] and tasks_of["mvbench"]["answer"] == 1
    assert tasks_of["docvqa-val"]["answers"] == ["3", "three"]
    (left_out,) = CONVERTERS["docvqa-val"].convert(ROWS["docvqa-val"] | {"data_split": "train"})
    assert left_out.reason == "not of the split val"


def test_a_public_set_is_prepared_once_and_evaluated(export, said, tmp_path, capsys):
    raw = tmp_path / "raw" / "chartqa-test"
    (raw / "hub").mkdir(parents=True)
    rows = [
        {"image": {"bytes": bytes_of(scene(40 + 9 * i, 60)), "path": None}, "query": f"Value {i}?", "label": ["100"]}
        for i in range(3)
    ] + [{"image": {"bytes": b"broken", "path": None}, "query": "?", "label": ["1"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), raw / "hub" / "test.parquet")
    info = {"name": "chartqa-test", "complete": True, "splits": {"test": ["hub/test.parquet"]}}
    (raw / "fetched.json").write_text(json.dumps(info | {"limit": 2}))
    command = (export, "--set", "chartqa-test", "--root", tmp_path, "--out", tmp_path / "out", "--device", "cpu")
    status, _, error = run(capsys, *command)
    assert status == 1 and "is fetched in part" in error and not (tmp_path / "evaluation" / "chartqa-test").exists()
    (raw / "fetched.json").write_text(json.dumps(info))
    said |= {"chart_qa: Value 0?": "104", "chart_qa: Value 1?": "106"}
    for _ in range(2):  # the second time from the shards
        status, shown, error = run(capsys, *command)
        assert status == 0 and "1 annotations are left out: a picture that cannot be read" in error, error
        assert "relaxed" in shown and "0.333" in shown and "3 questions about 3 samples" in shown


def test_regions_are_as_many_as_points():
    task = {"task": "pointing", "label": "x", "points": [[1, [[0.5, 0.5], [0.1, 0.1]]]], "regions": [RLE]}
    with pytest.raises(ValueError, match="regions are 1 of 2 points"):
        read_example(json.dumps({"images": [{"part": "a", "width": 4, "height": 2}], "branches": [task]}))


def test_vllm_is_asked_what_transformers_would_be(shards, export, asker, monkeypatch):
    """With a stand-in: nobody has run the real one."""
    asked = []

    class LLM:
        def __init__(self, folder, **settings):
            assert folder == str(export)

        def generate(self, prompts, settings, use_tqdm):
            asked.extend(prompts)
            said = types.SimpleNamespace(text=" yes ", finish_reason="length", token_ids=[1, 2])
            return [types.SimpleNamespace(outputs=[said]) for _ in prompts]

    module = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **settings: settings)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_backend.importlib.util, "find_spec", lambda name: module)
    samples = Samples([shards], "test")
    questions = []
    for number in (0, 2, 3):
        read = samples.read(number)
        questions.append((next(tasks.questions(read.example, read.name)).messages, see(read, asker)))
    replies = vllm_backend.answers_of_vllm(export, asker)(questions, 5)
    assert replies == [Reply("yes", True, 2)] * 3
    assert [list(prompt.get("multi_modal_data", {})) for prompt in asked] == [["image"], ["video"], []]
    assert asked[0]["prompt"] == asker.prompt(*questions[0]) and "multi_modal_data" not in asked[2]
