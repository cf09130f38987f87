"""Answers while training: the tokens are transformers' at every layout, and training goes on as without them."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from answers_check import LAYOUTS, MAX_TOKENS, configuration
from PIL import Image
from programs import figures, python, run_ranks, succeeded
from sources import chat, write_blend

from molmo2_nemo import report
from molmo2_nemo.config.checks import check
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.data import blend, marks
from molmo2_nemo.data.encode import Encoder
from molmo2_nemo.data.points import Points, format_points, parse
from molmo2_nemo.data.processor import build_processor
from molmo2_nemo.hf.architecture import hf_config
from molmo2_nemo.prepare.sample_world.write import write_set
from molmo2_nemo.prepare.webdataset import write_shards
from molmo2_nemo.training import answers, score

SOURCES = ("text", "image_qa", "multi_image", "video_points", "count", "captions")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few samples of some sources: (root, blend's file)."""
    root = tmp_path_factory.mktemp("answers") / "data"
    root.mkdir()
    for name in SOURCES:
        write_set(root / name, name, 0, {"train": 24, "val": 6})
    return root, write_blend(root / "blend.yaml", *SOURCES)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    """The tiny model with random weights, saved by transformers."""
    from transformers import Molmo2ForConditionalGeneration

    torch.manual_seed(4)
    config = configuration("x", "sample_stage2", "x", [])
    model = Molmo2ForConditionalGeneration(hf_config(config.model)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that tokens do not depend on the one before alone, and that pictures matter.
            if parameter.dim() > 1:
                parameter.mul_(10 if "vision" in name or "adapter" in name else 2)
            else:
                torch.nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    model.save_pretrained(folder)
    build_processor(config.data.tokenizer, config.model.vision).save_pretrained(folder)  # the geometry of crops
    return folder, model


def generated(model, question: answers.Question, token_ids: np.ndarray, eos_id: int | None) -> list[int]:
    """transformers' greedy answer: its own generate, with its cache of keys and values."""
    ids = torch.from_numpy(question.plan.input_ids).long()[None]
    inputs = {}
    crops, pooling = (torch.from_numpy(part) for part in question.pixels)
    if len(crops):
        inputs = dict(
            pixel_values=crops.float() / 127.5 - 1.0,
            image_token_pooling=pooling,
            image_grids=torch.tensor([[len(pooling), 1, 0, 0]]),
        )
    types = torch.from_numpy(np.isin(ids.numpy(), token_ids)).long()
    model.generation_config.eos_token_id = eos_id
    model.generation_config.pad_token_id = 0
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types,
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        **inputs,
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.slow
def test_tokens_are_those_of_transformers_at_every_layout(data, hf_dir, tmp_path):
    folder, model = hf_dir
    config = configuration(data[0], data[1], tmp_path, [])
    encoder = Encoder(config.data, config.model.vision)
    sources = blend.load_blend(config.data)
    questions = answers.choose(config.data, encoder, sources, 8)
    assert len(questions) == 8 and {question.source for question in questions} == set(SOURCES)
    assert any(len(question.plan.images) > 1 for question in questions) and any(q.seconds for q in questions)
    token_ids = encoder.visual.token_ids
    endless = [generated(model, question, token_ids, None) for question in questions]
    # A token that ends some of the answers somewhere in the middle, and not all.
    ends = {t: sum(t in tokens[3:] for tokens in endless) for tokens in endless for t in tokens[3:-1]}
    eos_id = next(t for t, count in ends.items() if 0 < count < len(questions) and not any(t == e[0] for e in endless))
    expected = [generated(model, question, token_ids, eos_id) for question in questions]
    assert len({tuple(tokens) for tokens in expected}) > 5, "the model says much the same whatever it is asked"
    # Random weights make the same of some questions whatever they see; of most they do not.
    visual = [i for i, question in enumerate(questions) if question.plan.images]
    blind = {i: replace(questions[i], pixels=(questions[i].pixels[0] * 0, questions[i].pixels[1])) for i in visual}
    sees = [generated(model, blind[i], token_ids, None) != endless[i] for i in visual]
    needs_mask = [generated(model, questions[i], token_ids[:0], None) != endless[i] for i in visual]
    assert sum(sees) > len(visual) / 2 and sum(needs_mask) > len(visual) / 2, (sees, needs_mask)
    assert len(set(map(len, expected))) > 1 and max(map(len, expected)) == MAX_TOKENS
    expected = [tokens + [answers.NO_TOKEN] * (MAX_TOKENS - len(tokens)) for tokens in expected]
    found = {}
    for ranks, start in ((1, python), (2, partial(run_ranks, 2))):
        scratch = tmp_path / f"{ranks}_ranks"
        scratch.mkdir()
        by_layout = figures(start("tests/ranks/answers_check.py", *data, folder, scratch, eos_id))
        assert list(by_layout) == list(LAYOUTS[ranks]) and all(len(own) == ranks for own in by_layout.values())
        found |= by_layout
    for layout, one in ((layout, one) for layout, ranks in found.items() for one in ranks):
        assert one["tokens"] == expected, layout
        assert one["answers_when_stopped"] is None, layout
        assert not one["random_state_changed"] and one["chunks_left_in_eval"] == 0, layout


@pytest.mark.slow
def test_answering_does_not_change_the_training_and_leaves_what_the_report_shows(data, tmp_path):
    def train(name, *overrides):
        run_dir = tmp_path / name
        succeeded(
            python(
                "recipes/stage2_sft.py",
                "model=tiny",
                "data=sample",
                "schedule=quickstart",
                "optim=from_scratch",
                f"data.root={data[0]}",
                f"data.blend={data[1]}",
                f"run_dir={run_dir}",
                "train.max_steps=4",
                "train.micro_batch_size=2",
                "train.global_batch_size=2",
                "train.log_every=1",
                "train.validation_batches=0",
                "schedule.stage2.hidden_dropout=0.1",
                "data.num_workers=0",
                *overrides,
            )
        )
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses = [(r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"]
        return losses, [r for r in records if r["kind"] == "answers"], run_dir

    flags = ["train.generate_every=2", "train.generate_examples=9", "train.generate_max_tokens=12"]
    losses, none, _ = train("without")
    same, records, run_dir = train("with", *flags)
    assert same == losses and len(losses) == 4 and not none
    assert [record["step"] for record in records] == [2, 4]
    by_step = [json.loads((run_dir / f"samples/step_0000000{s}/answers.json").read_text()) for s in (2, 4)]
    assert [e["question"] for e in by_step[0]] == [e["question"] for e in by_step[1]] and len(by_step[0]) == 9
    for entries, record in zip(by_step, records):
        means = score.means([entry["scores"] for entry in entries], [entry["source"] for entry in entries])
        assert means == {key: record[key] for key in means} and "exact_match" in means and "point_f1" in means
        said = record["tokens_per_second"] * record["seconds"]
        assert said == pytest.approx(round(said)) and 9 <= round(said) <= 9 * 12
    for entry in by_step[1]:
        if entry["source"] == "text":
            assert "picture" not in entry
        else:
            with Image.open(run_dir / "samples/step_00000004" / entry["picture"]) as picture:
                assert picture.format == "PNG" and max(picture.size) >= answers.PICTURE_SIDE
    page = (run_dir / "report.html").read_text()
    assert "Answers to held-out questions" in page and "exact_match" in page
    assert page.count("data:image/png;base64") >= 8
    shown = report.answers(report.read_run(run_dir), report.Pictures())
    assert [step for step, _ in shown] == [4, 2] and {a["verdict"] for a in shown[0][1]} <= {"", "right", "wrong"}


@pytest.mark.slow
def test_the_benchmark_counts_the_tokens_of_all_answers(data):
    done = python(
        *("tools/bench/answers.py", "--tokens", 5, "--questions", 3, "--seq-length", 256, "--times", 1),
        *("--set", f"data.root={data[0]}", f"data.blend={data[1]}"),
    )
    found = figures(done)
    assert found["tokens"] == 3 * 5 and found["tokens_per_second"] == pytest.approx(15 / found["seconds"])


def test_drawn_points_are_where_the_text_says(data, tmp_path):
    config = configuration(data[0], data[1], tmp_path, [])
    encoder = Encoder(config.data, config.model.vision)
    questions = answers.choose(config.data, encoder, blend.load_blend(config.data), 12)
    question = next(q for q in questions if q.source == "count" and parse(q.label))
    ((_, group),) = parse(question.label)[0].groups
    picture = np.asarray(answers.draw(question, format_points(Points("x", [(1, [(0.5, 0.5)])])), encoder)).astype(int)
    height, width = picture.shape[:2]

    def colour(x, y, radius):
        return tuple(picture[round(y * (height - 1)), round(x * (width - 1)) + radius])

    # What is said is drawn over what is right: a dot on a ring.
    assert colour(0.5, 0.5, 0) == marks.ANSWERED[0]
    for x, y in group:
        assert colour(x, y, -marks.LABELLED[1] + 1) == marks.LABELLED[0]
    again = answers.choose(config.data, encoder, blend.load_blend(config.data), 12)
    assert [q.key for q in again] == [q.key for q in questions]


def test_rows_hold_every_question_once_with_room_for_its_answer(data, tmp_path):
    config = configuration(data[0], data[1], tmp_path, [])
    encoder = Encoder(config.data, config.model.vision)
    questions = answers.choose(config.data, encoder, blend.load_blend(config.data), 12)
    rows = answers.deal(questions, MAX_TOKENS, config.data)
    assert sorted(index for row in rows for index in row) == list(range(12)) and len(rows) < 12
    for row in rows:
        assert sum(questions[i].plan.num_tokens + MAX_TOKENS for i in row) <= config.data.seq_length
        assert sum(questions[i].plan.num_crops for i in row) <= config.data.max_crops


def test_broken_samples_are_passed_over_and_what_is_not_held_out_is_not_asked(tmp_path):
    good, image = json.dumps(chat("Why?", "So.")).encode(), {"part": "img0.png", "width": 84, "height": 84}
    samples = {
        "not_json": {"json": b"{"},
        "no_picture": {"json": json.dumps(chat(images=[image])).encode()},
        "good": {"json": good},
        "broken_picture": {"json": json.dumps(chat(images=[image])).encode(), "img0.png": b"\x89PNG"},
        "too_long": {"json": json.dumps(chat("Why?", "So. " * 400)).encode()},
    }
    folder = tmp_path / "mine"
    folder.mkdir()
    write_shards(folder, {"train": [("seen", {"json": good})], "val": list(samples.items())})
    config = configuration(tmp_path, write_blend(tmp_path / "blend.yaml", "mine"), tmp_path, [])
    encoder, sources = Encoder(config.data, config.model.vision), blend.load_blend(config.data)
    assert [q.key for q in answers.choose(config.data, encoder, sources, 5)] == ["good"]
    unseen = [replace(source, num_validation_samples=0) for source in sources]
    assert answers.choose(config.data, encoder, unseen, 5) == []


def test_impossible_settings_are_refused(data, tmp_path):
    for key, value in (("generate_examples", 0), ("generate_max_tokens", 0), ("generate_max_tokens", 129)):
        config = configuration(data[0], data[1], tmp_path, [])
        check(config, 1)
        setattr(config.train, key, value)
        with pytest.raises(ConfigError, match=f"train.{key}={value}"):
            check(config, 1)
