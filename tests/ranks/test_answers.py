"""Answers while training: the tokens are transformers' at every layout, the scores are what they are defined as."""

import itertools
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from answers_check import LAYOUTS, MAX_TOKENS, configuration
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from programs import figures, python, run_ranks, succeeded
from sources import chat, write_blend

from molmo2_nemo import report
from molmo2_nemo.config.checks import check
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.data import blend
from molmo2_nemo.data.encode import Encoder
from molmo2_nemo.data.points import Points, format_points, parse
from molmo2_nemo.data.processor import build_processor
from molmo2_nemo.hf.architecture import hf_config
from molmo2_nemo.prepare.sample_world.write import write_set
from molmo2_nemo.prepare.webdataset import write_shards
from molmo2_nemo.training import answers, score

SOURCES = ("text", "image_qa", "multi_image", "video_points", "count", "captions")


# --- scores ---------------------------------------------------------------------------------------------------------


def points(*triples, label="x", kind="image") -> str:
    """(frame, x, y) of each point, as an answer."""
    return format_points(Points(label, [(frame, [(x, y)]) for frame, x, y in triples], kind))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_points_are_matched_as_the_best_of_all_pairings(seed):
    rng = np.random.default_rng(seed)
    found, wanted = rng.random((rng.integers(1, 6), 3)), rng.random((rng.integers(1, 6), 3))
    for video in (False, True):
        for array in (found, wanted):
            array[:, 0] = rng.integers(0, 3, len(array)) / 2 if video else 1
        size, seconds = ((200, 100), 4.0 if video else None)
        apart = np.hypot(*((found[:, None, 1:] - wanted[None, :, 1:]) * (2, 1)).transpose(2, 0, 1))
        later = abs(found[:, None, 0] - wanted[None, :, 0])
        cost = np.hypot(apart, later / 4) if video else apart
        near = (apart <= score.HIT_DISTANCE) & (later == 0)
        # All pairings of the fewer with as many of the more, by cost.
        few, many = sorted((len(found), len(wanted)))
        turned = len(found) > len(wanted)
        best = min(
            itertools.permutations(range(many), few),
            key=lambda order: sum((cost.T if turned else cost)[i, j] for i, j in enumerate(order)),
        )
        hits = sum((near.T if turned else near)[i, j] for i, j in enumerate(best))

        def entry(array):
            return [Points("x", [(w, [(x, y)]) for w, x, y in array], "video" if video else "image")]

        precision, recall, f1 = score.point_scores(entry(found), entry(wanted), [size], seconds)
        assert (precision, recall) == (hits / len(found), hits / len(wanted))
        assert f1 == pytest.approx(2 * hits / (len(found) + len(wanted)))


POINT = ("point_precision", "point_recall", "point_f1")
CASES = {
    "hit and miss": ("pointing", points((1, 0.2, 0.2), (1, 0.8, 0.8)), points((1, 0.21, 0.2)), (1.0, 0.5, 2 / 3)),
    "too far": ("pointing", points((1, 0.2, 0.2)), points((1, 0.3, 0.2)), (0.0, 0.0, 0.0)),
    "one too many": ("pointing", points((1, 0.2, 0.2)), points((1, 0.2, 0.2), (1, 0.21, 0.2)), (0.5, 1.0, 2 / 3)),
    "nothing there, nothing said": ("pointing", "There are none.", "there are none", (1.0, 1.0, 1.0)),
    "nothing there, a point said": ("pointing", "There are none.", points((1, 0.5, 0.5)), (0.0, 0.0, 0.0)),
    "something there, nothing said": ("pointing", points((1, 0.5, 0.5)), "There are none.", (0.0, 0.0, 0.0)),
    "another image": ("multi_image_pointing", points((2, 0.2, 0.2)), points((1, 0.2, 0.2)), (0.0, 0.0, 0.0)),
    "no such image": ("multi_image_pointing", points((2, 0.2, 0.2)), points((7, 0.2, 0.2)), (0.0, 0.0, 0.0)),
    "unanswerable": ("pointing", "Names cannot be seen.", "I see nothing.", (1.0, 1.0, 1.0)),
    "cut off": ("pointing", points((1, 0.2, 0.2), (1, 0.8, 0.8)), '<points coords="1 1 200 200 2 8', (1.0, 0.5, 2 / 3)),
    "points of a chat": ("user_qa", f"Here: {points((1, 0.2, 0.2))}", points((1, 0.2, 0.2)), (1.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_point_scores(case):
    style, label, answer, expected = CASES[case]
    sizes = [(100, 100), (300, 100)]
    assert score.score(style, label, answer, sizes) == pytest.approx(dict(zip(POINT, expected)))


def test_a_distance_is_measured_in_pixels_of_the_shorter_side():
    # 0.05 of 400 pixels is 0.2 of 100: too far to the side, near enough downwards.
    for x, y, hit in ((0.55, 0.5, 0.0), (0.5, 0.55, 1.0)):
        found = score.score("pointing", points((1, 0.5, 0.5)), points((1, x, y)), [(400, 100)])
        assert found["point_f1"] == hit


def test_points_of_a_video_need_the_exact_time_and_tracks_are_scored_in_each_frame():
    label = points((0.5, 0.2, 0.2), (1.0, 0.4, 0.2), kind="video")
    late = points((0.5, 0.2, 0.2), (1.5, 0.4, 0.2), kind="video")
    found = score.score("video_point", label, late, [(84, 84)], 2.0)
    assert found == dict.fromkeys(POINT, 0.5)
    label = '<tracks coords="0.0 1 200 200 2 800 800;0.5 1 210 200 2 800 790">x</tracks>'
    swapped = '<tracks coords="0.0 2 200 200 1 800 800;0.5 1 210 200">x</tracks>'
    found = score.score("video_point_track_per_frame", label, swapped, [(84, 84)], 2.0)
    assert found == pytest.approx({"track_precision": 1.0, "track_recall": 0.75, "track_f1": 6 / 7})
    nothing = score.score("video_point_track_per_frame", "No tracks available.", "No tracks available.", [], 2.0)
    assert nothing["track_f1"] == 1


def counted(style, label, answer):
    found = score.score(style, label, answer)
    return found["count_exact"], found["count_close"]


def test_counts_are_of_the_points_whatever_number_is_stated():
    def shows(n, total):
        return f"Counting the {points(*((1, i / 50, 0.5) for i in range(n)))} shows a total of {total}."

    assert counted("point_count", shows(3, 3), shows(3, 9)) == (1, 1)
    assert counted("point_count", shows(3, 3), shows(4, 3)) == (0, 1)
    assert counted("point_count", shows(3, 3), shows(5, 3)) == (0, 0)
    assert counted("point_count", "There are none.", "there are NONE.") == (1, 1)
    # Close: |p - g| <= 1 + floor(0.05 g).
    for label, answer, expected in ((19, 21, (0, 0)), (20, 22, (0, 1)), (40, 43, (0, 1)), (40, 44, (0, 0))):
        assert counted("counting", str(label), f"There are {answer}.") == expected
    assert counted("counting", "2", shows(2, 7)) == (1, 1) and counted("counting", "0", "There are none.") == (1, 1)
    assert counted("counting", "2", "many") == (0, 0)


def test_exact_match_and_what_has_no_score():
    for label, answer, right in (
        ("red", " Red.", 1),
        ("a red star", "a  red\nstar", 1),
        ("red", "red star", 0),
        ("B. blue", "b. blue", 1),
        ("Because. Answer: two", "I see. Answer: Two", 1),
        (f"{'Long ' * 20} Answer: two", "two", 1),
        ("-1", "1", 0),
    ):
        assert score.score("user_qa", label, answer) == {"exact_match": right}, (label, answer)
    assert score.score("long_caption", "red", "red") == score.score("video_transcript", "red", "red") == {}
    assert score.score("user_qa", "word " * 11, "word " * 11) == {}
    assert score.is_right({}) is None and score.is_right({"point_f1": 1.0, "count_exact": 0.0}) is False
    scores = [{"exact_match": 1.0}, {}, {"exact_match": 0.0}, {"point_f1": 0.5}]
    assert score.means(scores, ["a", "b", "b", "b"]) == {
        "point_f1": {"all": 0.5, "b": 0.5},
        "exact_match": {"all": 0.5, "a": 1.0, "b": 0.0},
    }


@given(st.text(alphabet='<points track="0123. ;>/ab', max_size=60))
def test_any_answer_has_a_score(text):
    for style, label in (("pointing", points((1, 0.5, 0.5))), ("counting", "3"), ("user_qa", "yes")):
        assert all(0 <= value <= 1 for value in score.score(style, label, text, [(84, 84)]).values())


# --- answers --------------------------------------------------------------------------------------------------------


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
@pytest.mark.ranks
def test_tokens_are_those_of_transformers_at_every_layout(data, hf_dir, tmp_path):
    folder, model = hf_dir
    config = configuration(data[0], data[1], tmp_path, [])
    encoder = Encoder(config.data, config.model.vision)
    sources = blend.load_blend(config.data)
    questions = answers.choose(config.data, encoder, sources, tmp_path, 8)
    assert len(questions) == 8 and {question.source for question in questions} == set(SOURCES)
    assert any(len(question.plan.images) > 1 for question in questions) and any(q.seconds for q in questions)
    token_ids = encoder.visual.token_ids
    endless = [generated(model, question, token_ids, None) for question in questions]
    # A token that ends some of the answers somewhere in the middle, and not all.
    ends = {t: sum(t in tokens[3:] for tokens in endless) for tokens in endless for t in tokens[3:-1]}
    eos_id = next(t for t, count in ends.items() if 0 < count < len(questions) and not any(t == e[0] for e in endless))
    expected = [generated(model, question, token_ids, eos_id) for question in questions]
    assert len({tuple(tokens) for tokens in expected}) > 5, "the model says much the same whatever it is asked"
    for number in (i for i, question in enumerate(questions) if question.seconds or len(question.plan.images) > 1):
        blind = replace(questions[number], pixels=(questions[number].pixels[0] * 0, questions[number].pixels[1]))
        assert generated(model, blind, token_ids, None) != endless[number], "the model does not see"
        assert generated(model, questions[number], token_ids[:0], None) != endless[number], "a causal mask would do"
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
@pytest.mark.ranks
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


def test_drawn_points_are_where_the_text_says(data, tmp_path):
    config = configuration(data[0], data[1], tmp_path, [])
    encoder = Encoder(config.data, config.model.vision)
    questions = answers.choose(config.data, encoder, blend.load_blend(config.data), tmp_path, 12)
    question = next(q for q in questions if q.source == "count" and parse(q.label))
    ((_, group),) = parse(question.label)[0].groups
    picture = np.asarray(answers.draw(question, points((1, 0.5, 0.5)), encoder)).astype(int)
    height, width = picture.shape[:2]

    def colour(x, y, radius):
        return tuple(picture[round(y * (height - 1)), round(x * (width - 1)) + radius])

    # What is said is drawn over what is right: a dot on a ring.
    assert colour(0.5, 0.5, 0) == answers.ANSWERED[0]
    for x, y in group:
        assert colour(x, y, -answers.LABELLED[1] + 1) == answers.LABELLED[0]
    again = answers.choose(config.data, encoder, blend.load_blend(config.data), tmp_path, 12)
    assert [q.key for q in again] == [q.key for q in questions]


def test_rows_hold_every_question_once_with_room_for_its_answer(data, tmp_path):
    config = configuration(data[0], data[1], tmp_path, [])
    encoder = Encoder(config.data, config.model.vision)
    questions = answers.choose(config.data, encoder, blend.load_blend(config.data), tmp_path, 12)
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
    assert [q.key for q in answers.choose(config.data, encoder, sources, tmp_path, 5)] == ["good"]
    unseen = [replace(source, num_validation_samples=0) for source in sources]
    assert answers.choose(config.data, encoder, unseen, tmp_path, 5) == []


def test_impossible_settings_are_refused(data, tmp_path):
    for key, value in (("generate_examples", 0), ("generate_max_tokens", 0), ("generate_max_tokens", 129)):
        config = configuration(data[0], data[1], tmp_path, [])
        check(config, 1)
        setattr(config.train, key, value)
        with pytest.raises(ConfigError, match=f"train.{key}={value}"):
            check(config, 1)
