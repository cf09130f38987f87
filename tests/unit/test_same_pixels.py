"""What the model is taught, what a person is shown, and what it is asked are the same bytes, of whatever file."""

import json

import exports
import numpy as np
import pytest
import torch
from media_files import PICTURES, VIDEOS, film, scene

from molmo2_nemo.ask.model import Asker
from molmo2_nemo.data.blend import Source
from molmo2_nemo.data.encode import Encoder
from molmo2_nemo.data.inspection import examples_of, pixels_of
from molmo2_nemo.data.loader import RawSample
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.prepare.media import image_facts, video_facts
from molmo2_nemo.training import answers

QUESTION, ANSWER = "What is it?", "A scene."


@pytest.fixture(scope="module")
def asker(export):
    return Asker(export, "cpu")


@pytest.fixture(scope="module")
def config():
    return exports.configuration()


@pytest.fixture(scope="module")
def encoder(config):
    return Encoder(config.data, config.model.vision)


# --- the four ways ----------------------------------------------------------------------------------------------------


def sample_of(parts, facts):
    """A sample as tools/prepare.py stores it."""
    media = {"video": facts[0]} if "duration" in facts[0] else {"images": facts}
    branch = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    return {"json": json.dumps({**media, "branches": [branch], "style": "user_qa"}).encode(), **parts}


def taught(encoder, parts):
    """Training: (plan, crops uint8 [C, P, patch_dim], pooling int64 [T, W])."""
    plan = encoder.plan(read_example(parts["json"]), np.random.default_rng(0))
    return plan, *encoder.pixels(plan, parts)


def asked_of(asker, inputs, encoder):
    """Asking: (ids, crops as bytes, pooling), as the model's inputs have them."""
    kind = "image" if "image_token_pooling" in inputs else "video"
    pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
    levels = (pixels.double() + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-3
    pooling = inputs[f"{kind}_token_pooling"].numpy()
    pooling = np.pad(pooling, ((0, 0), (0, encoder.visual.window - pooling.shape[1])), constant_values=-1)
    return inputs["input_ids"][0].numpy(), levels.round().to(torch.uint8).numpy(), pooling


def check_all(asker, encoder, config, parts, files, is_video):
    plan, crops, pooling = taught(encoder, parts)
    source = Source("own", "/own", 1.0, 1)
    # Answers to held-out questions while a model trains.
    stored = RawSample(__key__="0", __restore_key__=(), __subflavors__={}, parts=parts, error="")
    question = answers.read_question(stored, source, config.data, encoder)
    assert np.array_equal(question.pixels[0], crops) and np.array_equal(question.pixels[1], pooling)
    # Inspection, from the row that is trained on.
    (batch,), _ = answers.lay_out([question], [[0]], 1, 8, config.data, encoder)
    batch.source_ids[batch.segment_ids >= 0] = 0
    batch.examples, batch.outcomes = torch.zeros((1, 2), dtype=torch.int64), [({"examples": 1}, 0.0)]
    (example,) = examples_of(batch, [source], encoder)
    shown = [crop for visual in example.visuals for crop in visual.crops]
    patch = encoder.visual.patch_size
    assert np.array_equal(np.stack(shown), np.stack([pixels_of(crop, patch) for crop in crops]))
    # Asking.
    seen = asker.see([], files[0]) if is_video else asker.see(files, None)
    ids, asked_crops, asked_pooling = asked_of(
        asker, asker.inputs([{"role": "user", "content": QUESTION}], seen), encoder
    )
    assert np.array_equal(asked_crops, crops) and np.array_equal(asked_pooling, pooling)
    assert np.array_equal(ids, question.plan.input_ids), "the prompt is another"
    assert [visual.seconds for visual in example.visuals] == [
        None if visual.seconds is None else float(f"{visual.seconds:.1f}") for visual in seen.visuals
    ]
    return plan, crops


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_the_same_everywhere(kind, asker, encoder, config, tmp_path):
    data = PICTURES[kind]()
    (tmp_path / "picture").write_bytes(data)
    parts = sample_of({"img0.png": data}, [{"part": "img0.png", **image_facts(data)}])
    check_all(asker, encoder, config, parts, [tmp_path / "picture"], is_video=False)


def test_several_pictures_are_the_same_everywhere(asker, encoder, config, tmp_path):
    names = ["a phone's, on its side", "16-bit grey PGM", "black text, transparent"]
    files, parts, facts = [], {}, []
    for number, name in enumerate(names):
        data = PICTURES[name]()
        files.append(tmp_path / f"{number}.png")
        files[-1].write_bytes(data)
        parts[f"img{number}.png"] = data
        facts.append({"part": f"img{number}.png", **image_facts(data)})
    plan, crops = check_all(asker, encoder, config, sample_of(parts, facts), files, is_video=False)
    assert len(plan.vision_units) == 3 and len(crops) > 6


@pytest.mark.parametrize("kind", VIDEOS)
def test_a_video_is_the_same_everywhere(kind, asker, encoder, config, tmp_path):
    data = VIDEOS[kind]()
    (tmp_path / "video").write_bytes(data)
    parts = sample_of({"video.mp4": data}, [{"part": "video.mp4", **video_facts(data)}])
    plan, _ = check_all(asker, encoder, config, parts, [tmp_path / "video"], is_video=True)
    assert len(plan.times) <= config.data.max_frames


def test_what_is_mirrored_or_turned_shows_the_same_scene():
    """The files above differ in how they say it; a person sees the scene as it was."""
    from molmo2_nemo.data.pictures import read_image
    from molmo2_nemo.data.video import pick_frames

    upright = np.array(scene()).astype(int)
    for kind, expected in {
        "a phone's, on its side": np.rot90(upright, -1),
        "mirrored and turned": upright.transpose(1, 0, 2),
        "PNG on its side": np.rot90(upright, 1),
    }.items():
        assert np.abs(read_image(PICTURES[kind]()) - expected).mean() < 8, kind
    plain = next(iter(pick_frames(film(), [1.0])))
    for kind, expected in {
        "mirrored": plain[:, ::-1],
        "upside down and mirrored": plain[::-1],
        "turned by a phone": np.rot90(plain, -1),
        "turned and mirrored": np.rot90(plain[:, ::-1], -1),
    }.items():
        assert np.array_equal(next(iter(pick_frames(VIDEOS[kind](), [1.0]))), expected), kind
