import copy
import io
import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from programs import REPOSITORY
from transformers import AutoTokenizer, Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import DataConfig, VisionConfig
from molmo2_nemo.data.blend import SourceOptions
from molmo2_nemo.data.counters import COUNTERS
from molmo2_nemo.data.encode import COMPOSED, DEMO_STYLES, ROOT_SEGMENT, Encoder, _count_runs, loss_weight, style_prefix
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.data.processor import build_processor
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.data.video import frame_times
from molmo2_nemo.model.mask import dense_mask

TOKENIZER_FOLDER = str(REPOSITORY / "molmo2_nemo" / "data" / "tokenizer")
TOKENIZER = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER)
TINY = VisionConfig(image_size=70, overlap_margin=1)
REAL = VisionConfig()
EOS, IM_START, IM_PATCH = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<im_patch>"])


def make_encoder(vision=TINY, **changes):
    settings = dict(
        blend="",
        root="",
        tokenizer=TOKENIZER_FOLDER,
        seq_length=1024,
        max_crops=48,
        max_frames=16,
        max_crops_per_image=4 if vision is TINY else 8,
    )
    return Encoder(DataConfig(**(settings | changes)), vision)


ENCODER = make_encoder()
REAL_ENCODER = make_encoder(REAL, seq_length=16384, max_crops=128, max_frames=128)


def make_oracle(vision):
    """transformers' processor, put together here from its own arguments; pixels normalised as it likes."""
    size = {"height": vision.image_size, "width": vision.image_size}
    return Molmo2Processor(
        Molmo2ImageProcessor(
            size=size, max_crops=4 if vision is TINY else 8, overlap_margins=[vision.overlap_margin] * 2, patch_size=14
        ),
        Molmo2VideoProcessor(size=size, patch_size=14, pooling_size=[3, 3], do_rescale=True, do_normalize=True),
        TOKENIZER,
        chat_template=TOKENIZER.chat_template,
        use_single_crop_col_tokens=False,
    )


ORACLES = {id(TINY): make_oracle(TINY), id(REAL): make_oracle(REAL)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in a loader worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sample_of(images=(), branches=None, style="user_qa", video=None):
    entries = [{"part": f"img{i}.png", "width": im.width, "height": im.height} for i, im in enumerate(images)]
    branches = branches or [[user("What is it?"), assistant("a cat")]]
    media = {entry["part"]: png(image) for entry, image in zip(entries, images)}
    return {"style": style, "images": entries, "video": video, "branches": branches}, media


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def rng(seed=0):
    return np.random.default_rng(seed)


def plan_of(encoder, sample, generator, *options):
    return encoder.plan(read_example(json.dumps(sample)), generator, *options)


def compare(vision, images, encoder=None):
    """Ours against transformers': the prompt's tokens, the pooling windows, every pixel."""
    encoder = encoder or (ENCODER if vision is TINY else REAL_ENCODER)
    oracle = ORACLES[id(vision)]
    sample, media = sample_of(images)
    plan = plan_of(encoder, sample, rng())
    crops, pooling = encoder.pixels(plan, media)
    parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}]
    text = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = oracle(text=text, images=list(images), return_tensors="pt")
    prompt = expected["input_ids"][0].numpy()
    assert np.array_equal(plan.input_ids[: len(prompt)], prompt)
    assert plan.input_ids[len(prompt) :].tolist() == TOKENIZER.encode("a cat")
    assert np.array_equal(pooling[:, :4], expected["image_token_pooling"].numpy())
    assert (pooling[:, 4:] == -1).all() and pooling.shape[1] == 9
    assert crops.dtype == np.uint8 and pooling.dtype == np.int64
    torch.testing.assert_close(torch.from_numpy(crops) / 127.5 - 1, expected["pixel_values"], rtol=0, atol=1e-6)
    assert len(crops) == plan.num_crops == expected["image_num_crops"].sum()
    assert [c for c, _ in plan.vision_units] == expected["image_num_crops"].tolist()
    assert sum(w for _, w in plan.vision_units) == len(pooling) == (plan.input_ids == IM_PATCH).sum()


# --- against transformers' processor --------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_any_size_of_the_tiny_geometry(width, height):
    compare(TINY, [noise(width, height)])


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 3), (112, 112), (113, 111), (378, 378), (1023, 767)])
def test_odd_sizes_of_the_released_geometry(size):
    compare(REAL, [noise(*size)])


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_real_pictures(name):
    image = Image.fromarray(getattr(skimage.data, name)())
    compare(TINY, [image])
    compare(REAL, [image])


def test_a_huge_picture():
    compare(TINY, [Image.linear_gradient("L").resize((2000, 3001)).convert("RGB")])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=2, max_size=5))
def test_several_images(sizes):
    compare(TINY, [noise(*size, seed=i) for i, size in enumerate(sizes)])


def test_text_alone():
    plan = plan_of(ENCODER, sample_of()[0], rng())
    expected = "<|im_end|><|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\na cat"
    assert plan.input_ids.tolist() == TOKENIZER.encode(expected)
    crops, pooling = ENCODER.pixels(plan, {})
    assert (crops.shape, crops.dtype, pooling.shape) == ((0, 25, 588), np.uint8, (0, 9))


def write_video(frames, fps):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps, options={"threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("vision", [TINY, REAL], ids=["tiny", "real"])
@pytest.mark.parametrize("num_frames", [1, 5, 40])
def test_videos(vision, num_frames):
    fps, encoder, oracle = 10, ENCODER if vision is TINY else REAL_ENCODER, ORACLES[id(vision)]
    data = write_video([np.array(noise(66, 34, seed=i)) for i in range(num_frames)], fps)
    video = {"part": "video.mp4", "width": 66, "height": 34, "fps": fps, "num_frames": num_frames}
    video["duration"] = (num_frames - 1) / fps
    plan = plan_of(encoder, sample_of(video=video)[0], rng())
    crops, pooling = encoder.pixels(plan, {"video.mp4": data})
    # The frames that are on screen at those times, by index, given to transformers with their own time stamps.
    indices = [min(math.floor(time * fps + 1e-4), num_frames - 1) for time in plan.times]
    assert indices[-1] == num_frames - 1
    with av.open(io.BytesIO(data)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}]
    expected = oracle(
        text=oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        videos=[np.stack([decoded[i] for i in indices])],
        video_metadata=[{"fps": fps, "total_num_frames": num_frames, "frames_indices": indices}],
        do_sample_frames=False,
        return_tensors="pt",
    )
    prompt = expected["input_ids"][0].numpy()
    assert np.array_equal(plan.input_ids[: len(prompt)], prompt)
    assert np.array_equal(pooling, expected["video_token_pooling"].numpy())
    torch.testing.assert_close(torch.from_numpy(crops) / 127.5 - 1, expected["pixel_values_videos"], rtol=0, atol=1e-6)
    patches = (vision.image_size // 14 + 2) // 3
    assert plan.vision_units == [(1, patches**2)] * len(plan.times)


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.5, 1.0, 9.5, 10.0, 99.96, 100.04, 12345.6]])
def test_time_stamps_as_transformers_writes_them(times):
    whole = ORACLES[id(TINY)].get_video_string(torch.tensor([len(times), 2, 2]), times)
    assert ENCODER.visual.video_tokens(times).tolist() == TOKENIZER.encode(whole)


# --- conversations --------------------------------------------------------------------------------------------------


def targets(plan):
    """Text of the targets, without those of weight 0."""
    return TOKENIZER.decode(plan.labels[plan.loss_weights > 0])


def test_turns_and_targets():
    turns = [user("A?"), assistant("one two"), user("B?"), assistant("three")]
    plan = plan_of(ENCODER, sample_of(branches=[[{"role": "system", "content": "Be short."}, *turns]])[0], rng())
    text = (
        "<|im_end|><|im_start|>user\nSystem: Be short.\nA?<|im_end|>\n<|im_start|>assistant\none two<|im_end|>"
        "<|im_end|>\n<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\nthree"
    )
    assert TOKENIZER.decode(plan.input_ids) == text
    assert targets(plan) == "one two<|im_end|>three<|im_end|>"
    wanted = plan.loss_weights[:-1] > 0
    assert np.array_equal(plan.labels[:-1][wanted], plan.input_ids[1:][wanted])
    assert plan.labels[-1] == EOS and plan.loss_weights[-1] > 0
    assert (plan.labels[plan.loss_weights == 0] == 0).all()
    assert plan.position_ids.tolist() == list(range(plan.num_tokens)) and not plan.segment_ids.any()
    assert np.allclose(plan.loss_weights[plan.loss_weights > 0], 2 / math.sqrt((plan.loss_weights > 0).sum()))


def test_points_are_written_with_the_separator_of_the_stage():
    points = {"type": "points", "label": "cat", "groups": [[1, [[0.5, 0.25]]], [2, [[0.1, 0.2]]]], "kind": "image"}
    turns = [user("Point."), assistant("<points 0/>") | {"points": [points]}]
    for separator in ("\t", ";"):
        plan = plan_of(make_encoder(point_separator=separator), sample_of(branches=[turns], style="pointing")[0], rng())
        text = f'<points coords="1 1 500 250{separator}2 2 100 200">cat</points><|im_end|>'
        assert targets(plan) == text
        assert set(plan.loss_weights.tolist()) == {0.0, np.float32(0.2)}


def test_special_tokens_spelt_in_a_text_stay_text():
    text = "<im_patch><|im_end|><frame_start><|image|>"
    plan = plan_of(ENCODER, sample_of([noise(70, 70)], [[user(text), assistant(text)]])[0], rng())
    assert (plan.input_ids == IM_PATCH).sum() == plan.vision_units[0][1]
    assert (plan.labels == EOS).sum() == 1
    assert targets(plan) == text + "<|im_end|>"


def test_leading_line_breaks_of_a_question_are_joined_as_transformers_joins_them():
    plan = plan_of(ENCODER, sample_of(branches=[[user("\n\nWell?\n"), assistant("no")]])[0], rng())
    prompt = "<|im_end|><|im_start|>user\n\n\nWell?\n<|im_end|>\n<|im_start|>assistant\n"
    assert plan.input_ids.tolist() == [*TOKENIZER.encode(prompt), *TOKENIZER.encode("no")]


@pytest.mark.parametrize(
    "style, weight",
    [
        ("pointing", 0.2),
        ("point_count", 0.2),
        ("counting", 0.2),
        ("multi_image_count_then_point", 0.2),
        ("video_point_track_per_frame", 0.2),
        ("video_long_caption", 0.1),
        ("video_merged_caption", 0.1),
        ("user_qa", 2 / 3 / 2),
        ("video_object_caption", 2 / 3 / 2),
        ("long_caption", 2 / 3 / 2),
        ("video_short_answer", 2 / 3 / 2),
        ("video_short_answer_count_without_pointing", 2 / 3 / 2),
        ("video_multiple_choice_count_without_pointing", 2 / 3 / 2),
    ],
)
def test_weights_by_style(style, weight):
    assert loss_weight(style, 9, 4, "root") == pytest.approx(weight)
    assert loss_weight(style, 9, 4, "flat") == 1.0


def test_style_prefixes():
    assert {style_prefix(style, 9, "demo", rng()) for style in DEMO_STYLES} == {""}
    assert style_prefix("vqa2", 9, "demo", rng()) == "vqa2:"
    assert style_prefix("video_multiple_choice_w_subtitle", 9, "demo", rng()) == ""
    assert style_prefix("video_multiple_choice_count_without_pointing", 9, "demo", rng()) == ""
    assert style_prefix("video_short_answer_count_without_pointing", 9, "demo", rng()) == "video_short_answer:"
    assert {style_prefix("pointing", 9, "length", rng(i)) for i in range(50)} == {"pointing:"}
    drawn = [style_prefix("long_caption", 900, "length", rng(i)) for i in range(2000)]
    assert 0.07 < drawn.count("long_caption:") / 2000 < 0.13
    lengths = [int(prefix.split()[1][:-1]) for prefix in drawn if " " in prefix]
    assert abs(np.mean(lengths) - 59.5) < 0.2 and abs(np.std(lengths) - 25 / 15) < 0.2
    assert all(" -" not in style_prefix("long_caption", 1, "length", rng(i)) for i in range(200))


def test_prefixes_stand_before_the_question():
    branches = [[user("Why?"), assistant("so")]]
    plan = plan_of(ENCODER, sample_of(branches=branches, style="vqa2")[0], rng())
    assert "user\nvqa2: Why?<" in TOKENIZER.decode(plan.input_ids)
    branches = [[user(""), assistant("so")]]
    plan = plan_of(make_encoder(style_prefix="length"), sample_of(branches=branches, style="pointing")[0], rng())
    assert "user\npointing:<" in TOKENIZER.decode(plan.input_ids)


def test_the_prefix_tells_the_length_of_the_last_answer():
    turns = [user("A?"), assistant("x" * 900), user("B?"), assistant("y" * 90)]
    encoder = make_encoder(style_prefix="length")
    text = [
        TOKENIZER.decode(plan_of(encoder, sample_of(branches=[turns], style="x")[0], rng(k)).input_ids)
        for k in range(30)
    ]
    lengths = [int(found[1]) for found in (re.search(r"user\nx (\d+): A", one) for one in text) if found]
    assert len(lengths) > 20 and max(lengths) < 15


# --- message trees --------------------------------------------------------------------------------------------------

BRANCHES = [
    [user("A?"), assistant("one")],
    [user("B?"), assistant("two"), user("C?"), assistant("three")],
    [user("D"), assistant("x")],
]


def test_tree():
    sample, _ = sample_of([noise(70, 70)], BRANCHES)
    root = 1 + ENCODER.visual.image_tokens(70, 70)[0].size
    orders = set()
    for seed in range(30):
        plan = plan_of(ENCODER, sample, rng(seed))
        assert (plan.segment_ids[:root] == ROOT_SEGMENT).all()
        assert plan.position_ids[:root].tolist() == list(range(root))
        order = []
        for m in range(3):
            own = plan.segment_ids == m
            # Each branch is what the branch alone gives: its tokens, positions and targets, in another weight.
            for index, branch in enumerate(BRANCHES):
                alone = plan_of(ENCODER, sample_of([noise(70, 70)], [branch])[0], rng())
                if alone.input_ids[root:].tolist() == plan.input_ids[own].tolist():
                    order.append(index)
                    assert plan.labels[own].tolist() == alone.labels[root:].tolist()
                    assert plan.position_ids[own].tolist() == alone.position_ids[root:].tolist()
                    count = (alone.loss_weights > 0).sum() - 1
                    weights = np.where(alone.loss_weights[root:] > 0, 2 / math.sqrt(count) / math.sqrt(3), 0)
                    assert np.allclose(plan.loss_weights[own], weights)
        assert sorted(order) == [0, 1, 2]
        assert np.array_equal(plan.segment_ids[root:], np.sort(plan.segment_ids[root:]))
        orders.add(tuple(order))
    assert len(orders) == 6
    again = [plan_of(ENCODER, sample, rng(7)).input_ids.tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_a_tree_of_one_branch_is_a_plain_example():
    plan = plan_of(ENCODER, sample_of([noise(70, 70)], BRANCHES[:1])[0], rng())
    assert not plan.segment_ids.any() and plan.position_ids.tolist() == list(range(plan.num_tokens))


def test_mask_of_trees_by_brute_force():
    """The model's mask on our segment ids, against the meaning: who is in which example, and in which branch."""
    pieces = []  # (input_ids, segment_ids, list of (example, branch or None))
    for example, branches in enumerate([BRANCHES, BRANCHES[:1], BRANCHES[:2]]):
        images = [noise(20, 20)] * (2 if example == 0 else 1)
        plan = plan_of(ENCODER, sample_of(images, branches)[0], rng(example))
        root = 1 + len(ENCODER._image_tokens(plan.images, 4)[0])
        branch, tags = -1, [(example, None)] * root
        for position in plan.position_ids[root:]:
            branch += position == root
            tags.append((example, branch))
        assert plan.input_ids[root] == IM_START and branch == len(branches) - 1
        pieces.append((plan.input_ids, plan.segment_ids + 100_000 * example, tags))
    ids = np.concatenate([p[0] for p in pieces] + [[597] * 5])
    segments = np.concatenate([p[1] for p in pieces] + [[-1] * 5])
    tags = [tag for p in pieces for tag in p[2]] + [None] * 5
    vision = np.isin(ids, ENCODER.visual.token_ids)
    mask = dense_mask(torch.tensor(segments)[None], torch.tensor(vision)[None])[0, 0].numpy()
    for q, k in itertools.product(range(len(ids)), repeat=2):
        if q == k:
            expected = True
        elif tags[q] is None or tags[k] is None:
            continue  # padding sees and is seen as the model likes; its loss is 0
        else:
            (example, branch), (other, key_branch) = tags[q], tags[k]
            same_line = example == other and (key_branch is None or key_branch == branch)
            expected = same_line and (k < q or (vision[q] and vision[k]))
        assert mask[q, k] == expected, (q, k)


# --- samples that do not fit ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(20, 400), st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 2), st.integers(0, 99)
)
def test_whatever_does_not_fit_is_cut_or_dropped_and_counted(seq_length, words, num_images, seed):
    encoder = shared_encoder(seq_length)
    branches = [[user("Q" * (n % 7)), assistant(" a" * n)] for n in words]
    sample, _ = sample_of([noise(70, 70)] * num_images, branches)
    plan = plan_of(encoder, sample, rng(seed))
    counts = plan.counters
    whole = plan_of(shared_encoder(4096), sample, rng(seed))
    assert plan.num_tokens <= seq_length
    if whole.num_tokens <= seq_length:
        assert plan.input_ids.tolist() == whole.input_ids.tolist() and not counts["truncated"]
    if not plan.num_tokens:
        assert counts == {"dropped_too_long": 1}
        return
    assert counts["branches"] + counts["dropped_branches"] == len(words)
    segments = plan.segment_ids[plan.segment_ids != ROOT_SEGMENT] if counts["branches"] > 1 else plan.segment_ids
    for m in range(counts["branches"]):
        assert (plan.loss_weights[plan.segment_ids == m] > 0).any()
    assert set(segments.tolist()) == set(range(counts["branches"]))
    assert counts["truncated"] <= 1
    weighted = plan.loss_weights > 0
    assert not np.isin(plan.labels[weighted], encoder.visual.token_ids).any()
    if counts["truncated"] and counts["branches"] == 1:
        # The last input's target is the token that was cut off, not an invented end.
        assert plan.labels[-1] != EOS and weighted[-1]


def shared_encoder(seq_length):
    encoder = copy.copy(ENCODER)
    encoder.data = replace(ENCODER.data, seq_length=seq_length)
    return encoder


def test_too_many_crops():
    plan = plan_of(make_encoder(max_crops=5), sample_of([noise(300, 300)] * 3)[0], rng())
    assert plan.num_tokens == 0 and plan.counters == {"dropped_too_many_crops": 1}


def video_of(duration, **more):
    return {"part": "video.mp4", "width": 64, "height": 48, "fps": 8, "num_frames": 80, "duration": duration} | more


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 300), st.integers(1, 40), st.integers(1, 40), st.integers(60, 700), st.integers(1, 80))
def test_a_video_is_thinned_to_whole_frames(duration, max_frames, max_crops, seq_length, words):
    encoder = copy.copy(ENCODER)
    encoder.data = replace(ENCODER.data, max_frames=max_frames, max_crops=max_crops, seq_length=seq_length)
    sample, _ = sample_of(branches=[[user("Q"), assistant(" a" * words)]], video=video_of(duration))
    plan = plan_of(encoder, sample, rng())
    text = plan_of(ENCODER, sample_of(branches=[[user("Q"), assistant(" a" * words)]])[0], rng()).num_tokens
    if not plan.num_tokens:
        assert text + len(encoder.visual.video_tokens([0.0])) > seq_length - words
        return
    times, frame = plan.times, encoder.visual.frame
    assert 1 <= len(times) <= min(max_frames, max_crops) and plan.num_tokens <= seq_length
    assert len(times) == 1 or times[-1] == duration
    visual = encoder.visual.video_tokens(times).tolist()
    assert plan.input_ids[1 : 1 + len(visual)].tolist() == visual
    assert (plan.input_ids == IM_PATCH).sum() == len(times) * (frame == IM_PATCH).sum()
    unlimited = len(frame_times(duration, max_frames))
    assert plan.counters["frames_thinned"] == unlimited - len(times)
    if len(times) < min(unlimited, max_crops):  # one or two more would not have fitted beside the text
        more = frame_times(duration, len(times) + 2)
        assert text + len(encoder.visual.video_tokens(more)) > seq_length
    if text + len(encoder.visual.video_tokens([0.0])) <= seq_length:
        assert not plan.counters["truncated"]


# --- what a source's options and the budget change ------------------------------------------------------------------


def test_weights_of_a_source():
    sample, _ = sample_of(branches=[[user("Q"), assistant("one two")], [user("R"), assistant("three")]])

    def weights(*options, **changes):
        return set(plan_of(make_encoder(**changes), sample, rng(), *options).loss_weights.tolist()) - {0.0}

    plain, report = weights(), weights(loss_weighting="root_report")
    assert {round(2 * weight, 5) for weight in plain} == {round(weight, 5) for weight in report}
    assert (
        weights(SourceOptions(token_weight=0.25))
        == {0.25}
        == weights(SourceOptions(token_weight=0.25), loss_weighting="flat")
    )
    assert weights(SourceOptions(loss_weighting="flat")) == {1.0}
    assert weights(SourceOptions(loss_weighting="root_report")) == report
    assert loss_weight("pointing", 9, 4, "root_report") == 0.2


def test_subtitles_near_the_frames_follow_them():
    lines = [
        [0.0, 0.4, "far away"],
        [1.0, 2.96, "just before"],
        [3.0, 4.0, "hello"],
        [5.02, 6, "after"],
        [9, 9, "late"],
    ]
    video = video_of(12.0, subtitles=lines, clip=[2.0, 6.0])
    times = [0.0, 4.0]
    encoder = make_encoder(max_frames=2)
    plan = plan_of(encoder, sample_of(video=video)[0], rng())
    assert plan.times == times
    near = [(s, e, t) for s, e, t in lines if any(s - 1 <= time <= e + 1 for time in times)]
    assert [t for _, _, t in near] == ["far away", "just before", "hello"]
    messages = [
        {"role": "subtitle", "content": "".join(f"{s:.1f} - {e:.1f} {t}\n" for s, e, t in near)},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]},
    ]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    visual = encoder.visual.video_tokens(times).tolist()
    before, after = text.split("<|video|>")
    expected = [EOS, *TOKENIZER.encode(before), *visual, *TOKENIZER.encode(after)]
    assert plan.input_ids[: len(expected)].tolist() == expected
    # Where none is near the block says so, and a video without subtitles has no block.
    far = plan_of(encoder, sample_of(video=video | {"subtitles": lines[-1:]})[0], rng())
    assert "subtitle\n<|im_start|>user" in TOKENIZER.decode(far.input_ids)
    without = plan_of(encoder, sample_of(video=video | {"subtitles": []})[0], rng())
    assert "subtitle" not in TOKENIZER.decode(without.input_ids)


def test_a_source_gets_its_share_of_high_resolution():
    sample, _ = sample_of([noise(1200, 800)])
    options = SourceOptions(high_res_probability=0.3)
    plans = [plan_of(REAL_ENCODER, sample, rng(seed), options) for seed in range(400)]
    high = sum(plan.max_crops == 24 for plan in plans)
    assert abs(high / 400 - 0.3) < 3 * math.sqrt(0.3 * 0.7 / 400)
    crops = {limit: REAL_ENCODER.visual.image_tokens(1200, 800, limit)[1] for limit in (8, 24)}
    assert {(plan.max_crops, plan.num_crops) for plan in plans} == set(crops.items()) and crops[24] > crops[8]
    two, _ = sample_of([noise(1200, 800)] * 2)
    always = SourceOptions(high_res_probability=1.0)
    assert plan_of(REAL_ENCODER, two, rng(), always).max_crops == 8
    # Where 24 do not fit into the row, the usual resolution is taken, and not counted as shrunk.
    for limit in ({"max_crops": 10, "max_frames": 10, "seq_length": 4096}, {"seq_length": 1500}):
        plan = plan_of(make_encoder(REAL, **limit), sample, rng(), always)
        assert plan.max_crops == 8 and plan.num_tokens and not plan.counters["images_shrunk"]


def test_a_source_may_leave_out_the_branches_of_one_style():
    branches = [
        {"task": "caption", "text": "A cat.", "style": "long_caption"},
        {"task": "caption", "text": ["So, a cat", "Well, a cat"], "style": "transcript"},
    ]
    sample, _ = sample_of([noise(100, 100)], branches=branches)
    texts = [TOKENIZER.decode(plan_of(ENCODER, sample, rng(seed)).input_ids) for seed in range(20)]
    # One of several texts is drawn each time.
    assert all("A cat." in text for text in texts) and 0 < sum("So, a cat" in text for text in texts) < 20
    assert all(("So, a cat" in text) != ("Well, a cat" in text) for text in texts)
    without = SourceOptions(without_style="transcript")
    text = TOKENIZER.decode(plan_of(ENCODER, sample, rng(), without).input_ids)
    assert "A cat." in text and "a cat" not in text
    alone, _ = sample_of([noise(100, 100)], branches=branches[1:])
    assert "a cat" in TOKENIZER.decode(plan_of(ENCODER, alone, rng(), without).input_ids)


@pytest.mark.parametrize("seq_length", [1900, 2600, 4096, 7500])
def test_images_get_the_most_crops_that_fit(seq_length):
    encoder = make_encoder(REAL, seq_length=seq_length)
    images = [noise(1000, 150), noise(300, 900), noise(640, 480)]
    sample, media = sample_of(images)
    plan = plan_of(encoder, sample, rng())
    text = plan_of(ENCODER, sample_of()[0], rng()).num_tokens
    sizes = {
        limit: (
            text
            + sum(
                len(TOKENIZER.encode(f"Image {k}")) + len(encoder.visual.image_tokens(im.width, im.height, limit)[0])
                for k, im in enumerate(images, start=1)
            )
        )
        for limit in range(1, 9)
    }
    best = max(limit for limit, size in sizes.items() if size <= seq_length)
    assert plan.num_tokens == sizes[best] and plan.max_crops == best
    assert plan.counters["images_shrunk"] == (3 if best < 8 else 0) and not plan.counters["truncated"]
    crops, pooling = encoder.pixels(plan, media)
    assert len(crops) == plan.num_crops and len(pooling) == (plan.input_ids == IM_PATCH).sum()


def test_of_more_images_than_allowed_the_first_are_kept():
    images = [noise(20 + 9 * k, 30) for k in range(6)]
    sample, media = sample_of(images)
    plan, five = plan_of(ENCODER, sample, rng()), plan_of(ENCODER, sample_of(images[:5])[0], rng())
    assert plan.counters == five.counters | {"images_left_out": 1} and plan.counters["images"] == 5
    assert plan.input_ids.tolist() == five.input_ids.tolist()
    assert np.array_equal(ENCODER.pixels(plan, media)[0], ENCODER.pixels(five, media)[0])
    # A sample about the others alone is left out, and counted.
    task = {"task": "pointing", "label": "cat", "points": [[6, [[0.1, 0.2]]]]}
    assert plan_of(ENCODER, sample_of(images, [task])[0], rng()).counters == {"dropped_not_shown": 1}


def test_tracks_hold_only_what_the_frames_show():
    frames = [[half / 2, [["a", 0.1, half / 100], ["b", 0.9, 0.5]]] for half in range(40)]
    task = {"task": "tracking", "label": "ball", "frames": frames, "fps": 2, "style": "video_point_track_per_frame"}
    for seq_length in (300, 700, 4096):
        encoder = make_encoder(seq_length=seq_length, max_frames=30, max_crops=48)
        video = video_of(20.0, annotation_fps=2)
        plan = plan_of(encoder, sample_of(branches=[task], video=video)[0], rng())
        assert plan.num_tokens <= seq_length and not plan.counters["truncated"]
        # The end of the video is cut off, the rest is kept at the rate of the annotations.
        assert plan.times == [half / 2 for half in range(len(plan.times))] and len(plan.times) <= 30
        answer = targets(plan)
        told = [float(part.split()[0]) for part in answer.split('coords="')[1].split('"')[0].split(";")]
        assert told == plan.times
        assert plan.counters["frames"] + plan.counters["frames_thinned"] == 30
    assert len(plan.times) == 30


def test_many_texts_leave_half_of_the_row_to_the_video():
    branches = [[user(f"Q{n}"), assistant(" a" * 60)] for n in range(12)]
    encoder = make_encoder(seq_length=600, max_frames=40)
    plan = plan_of(encoder, sample_of(branches=branches, video=video_of(30.0))[0], rng())
    text = (plan.segment_ids != ROOT_SEGMENT).sum()
    assert text <= 300 and plan.counters["branches"] + plan.counters["dropped_branches"] == 12
    assert plan.counters["branches"] >= 3 and plan.num_tokens > 600 - 2 * len(encoder.visual.video_tokens([100.0]))
    # Where everything fits, nothing is dropped.
    plan = plan_of(
        make_encoder(seq_length=2048, max_frames=20), sample_of(branches=branches, video=video_of(30.0))[0], rng()
    )
    assert plan.counters["branches"] == 12 and len(plan.times) == 20


def test_every_count_has_a_name():
    for sample in (sample_of([noise(70, 70)] * 2)[0], sample_of(video=video_of(30.0))[0], sample_of()[0]):
        assert set(plan_of(ENCODER, sample, rng()).counters) <= set(COUNTERS)


# --- samples that no row can hold -------------------------------------------------------------------------------------


@pytest.fixture
def tokenized(monkeypatch):
    """The texts that ENCODER's tokenizer got."""
    texts, encode = [], ENCODER.tokenizer.encode
    monkeypatch.setattr(ENCODER.tokenizer, "encode", lambda text, **more: texts.append(text) or encode(text, **more))
    return texts


POINTS = [[1, [[i / 4000, i / 4000] for i in range(4000)]]]
TRACKS = [[half / 2, [[name, half / 100, 0.5] for name in range(3000)]] for half in range(4)]
LONG = "word " * 8000
IMAGE, VIDEO = {"images": [noise(90, 90)]}, {"video": {"part": "v.mp4", "width": 9, "height": 9, "duration": 20.0}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "branch, medium",
    [
        ([user("Q"), assistant("word " * 3_000_000)], {}),  # 15 MB
        ([user("Q"), assistant("word " * 3_000_000)], VIDEO),
        ([user(LONG), assistant("A")], IMAGE),
        ([{"role": "system", "content": LONG}, user("Q"), assistant("A")], {}),
        ([user("Q"), assistant("e\u0301\u4e2d" * 20000)], {}),
        ([user("Q"), assistant("A")] * 300, {}),  # turns
        ({"task": "caption", "text": LONG}, IMAGE),
        ({"task": "question", "question": "Q", "answers": ["A"], "explanation": LONG}, VIDEO),
        ({"task": "question", "question": "Q", "answers": [f"{i} {LONG}" for i in range(50)]}, {}),
        ({"task": "pointing", "label": "cat", "points": POINTS, "style": "pointing"}, IMAGE),
        (
            {"task": "tracking", "label": "cat", "frames": TRACKS, "fps": 2, "style": "video_point_track_per_frame"},
            VIDEO,
        ),
    ],
)
def test_a_text_that_is_far_too_long_is_cut_before_it_is_tokenized(branch, medium, tokenized):
    """An answer keeps its beginning; without an end, none is taught. A question without room for an answer is none."""
    most = COMPOSED * (ENCODER.data.seq_length + 1) * ENCODER.longest_token + 100
    plan = plan_of(ENCODER, sample_of(branches=[branch], **medium)[0], rng())
    if isinstance(branch, list) and LONG in branch[0]["content"]:
        assert plan.counters == {"dropped_too_long": 1} and not any(LONG in text for text in tokenized)
    else:
        assert plan.counters["truncated"] == 1 and plan.num_tokens == ENCODER.data.seq_length
        assert plan.labels[-1] != ENCODER.eos_id or len(branch) == 600
    assert max(map(changes, tokenized), default=0) <= most
    # Beside other branches it takes at most its place.
    tokenized.clear()
    sample, _ = sample_of(branches=[branch, [user("Who?"), assistant("A cat.")]], **medium)
    plans = [plan_of(ENCODER, sample, rng(seed)) for seed in range(6)]
    assert any("A cat." in targets(plan) for plan in plans if plan.num_tokens)
    assert max(map(changes, tokenized)) <= most


def changes(text):
    """Characters that differ from the one before."""
    return sum(a != b for a, b in itertools.pairwise(text))


@pytest.mark.parametrize("number, text", [(3000, "line"), (20, LONG)])
def test_many_subtitles_are_not_tokenized(number, text, tokenized):
    lines = [[0.0, 20.0, text]] * number
    plan = plan_of(ENCODER, sample_of(video=video_of(20.0, subtitles=lines))[0], rng())
    assert plan.counters == {"dropped_too_long": 1}
    assert max(map(len, tokenized)) < 1000


def test_branches_beyond_what_a_row_can_hold(tokenized):
    branches = [[user(f"Q{number}"), assistant("A")] for number in range(1024)]
    plan = plan_of(ENCODER, sample_of(branches=branches)[0], rng())
    kept = plan.counters["branches"]
    # A question and an answer for each that is kept, and perhaps one for which there was no room.
    assert plan.counters["dropped_branches"] == 1024 - kept and 2 * kept <= len(tokenized) <= 2 * kept + 2
    tokenized.clear()
    plan = plan_of(ENCODER, sample_of(branches=branches * 2)[0], rng())
    assert plan.counters == {"dropped_too_many_branches": 1} and not tokenized
    # Questions that do not fit beside the image, and of which one cannot be sure, are not tried for ever either.
    sample, _ = sample_of([noise(90, 90)], [[user("word " * 1500), assistant("A")]] * 40)
    assert plan_of(ENCODER, sample, rng()).counters == {"dropped_too_long": 1} and len(tokenized) < 20


def test_nothing_else_changes_for_a_sample_that_fits_in_part():
    """Every branch tokenized, whether or not there is room, gives the same plans."""
    patient = make_encoder()
    patient.least_prompt, patient.longest_token = -(10**9), 10**9
    generator, kept = rng(), Counter()
    for number in range(60):
        branches = [
            [user("word " * generator.integers(120)), assistant("cat " * generator.integers(1, 300))]
            for _ in range(generator.integers(1, 10))
        ]
        medium = ({}, {"images": [noise(90, 90)]}, {"video": video_of(20.0)})[number % 3]
        sample = sample_of(branches=branches, style="long_caption", **medium)[0] | {"multi_turn": 0.2}
        first, second = (plan_of(encoder, sample, rng(number)) for encoder in (ENCODER, patient))
        assert first.counters == second.counters
        kept += first.counters
        for name in ("input_ids", "labels", "loss_weights", "position_ids", "segment_ids"):
            assert (getattr(first, name) == getattr(second, name)).all()
    assert kept["truncated"] > 9 and kept["dropped_branches"] > 20 and kept["dropped_too_long"] == 0


@pytest.fixture(scope="module")
def composing():
    """A byte-level tokenizer with NFC and tokens of many blanks and dashes, as Qwen's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = [" " * 64 + "-" * 64 + "-=" * 9 + " internationalisation \u1f82\uac01"] * 50
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    return tokenizer


PIECES = [*" -=aZ09\n", " " * 9, "-" * 33, "-=", " internationalisation"]
# Three and four characters that become one, and one that becomes two.
PIECES += ["\u1100\u1161\u11a8", "\u03b1\u0313\u0300\u0345", "\u0958", "\u4e2d", "\U0001f600", "e\u0301"]


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
def test_no_text_has_fewer_tokens_than_it_is_said_to_have(composing, text):
    longest = max(map(_count_runs, composing.get_vocab()))
    assert 10 < longest < 33  # and not 64, as the blanks
    forms = {text, unicodedata.normalize("NFC", text)}
    assert min(map(_count_runs, forms)) / longest <= len(composing.encode(text).ids)
    if text:
        assert _count_runs(text) == sum(1 for _ in itertools.groupby(text))


def test_the_longest_token_of_the_tokenizer_is_found():
    assert ENCODER.longest_token == max(map(_count_runs, TOKENIZER.get_vocab()))


def test_a_marker_that_is_repeated_is_bounded():
    entry = {"type": "points", "label": "x", "kind": "image", "groups": POINTS}
    branch = [user("Q"), assistant("<points 0/>" * 1000) | {"points": [entry]}]
    with pytest.raises(ValueError, match="with its points has more than 33,554,432 characters"):
        plan_of(ENCODER, sample_of([noise(90, 90)], [branch])[0], rng())


# --- broken samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"branches": []},
        {"branches": [[]]},
        {"branches": [[user("Q")]]},
        {"branches": [[assistant("A")]]},
        {"branches": [[user("Q"), user("Q")]]},
        {"branches": [[user(3), assistant("A")]]},
        {"branches": None},
        {"branches": [[user("Q"), assistant("<points 0/>") | {"points": [{"type": "?"}]}]]},
        {"branches": [[user("Q"), assistant("<points 0/>") | {"points": {}, "content": 3}]]},
        {"branches": [[user("Q\ud800"), assistant("A")]]},
        {"branches": [[user("Q"), assistant(" ")]]},
        {"surprise": 1},
        {"images": [{"part": "x"}]},
        {"images": [{"part": "x", "width": 0, "height": 4}]},
        {"images": None},
        {"images": [{"width": 3, "height": 4}]},
        {"images": [{"part": "x", "width": 3.5, "height": 4}]},
        {"style": 3},
        {"video": {"part": "v"}},
        {"video": video_of(1.0, num_frames="9")},
        {"video": video_of(-1.0)},
        {"video": video_of(math.nan)},
        {"video": video_of(math.inf)},
        {"video": video_of(1.0), "images": [{"part": "x", "width": 1, "height": 4}]},
    ],
)
def test_malformed_json_is_refused(change):
    with pytest.raises(ValueError):
        plan_of(ENCODER, sample_of()[0] | change, rng())


def test_media_that_cannot_be_decoded():
    sample, media = sample_of([noise(70, 50)])
    plan = plan_of(ENCODER, sample, rng())
    data = media["img0.png"]
    for broken in ({}, {"img0.png": b""}, {"img0.png": data[: len(data) // 2]}, {"img0.png": png(noise(70, 51))}):
        with pytest.raises(ValueError):
            ENCODER.pixels(plan, broken)


def test_pictures_are_turned_and_made_rgb():
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert read_image(file.getvalue()).shape == (8, 4, 3)
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        file = io.BytesIO()
        Image.new(mode, (5, 6)).save(file, "TIFF")
        assert read_image(file.getvalue()).shape[2] == 3


def test_a_tokenizer_without_the_visual_tokens_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="data.tokenizer="):
        build_processor(str(tmp_path), TINY)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lacks the token"):
        build_processor(str(tmp_path), TINY)


@pytest.mark.parametrize("seq_length, max_crops, most", [(512, 128, None), (4096, 20, 20), (4096, 200, 128)])
def test_a_frame_limit_out_of_reach_is_said(seq_length, max_crops, most):
    encoder = make_encoder(seq_length=seq_length, max_crops=max_crops, max_frames=128)
    note = encoder.frames_note()
    if most == 128:
        assert note is None
        return
    found = int(re.search(r"at most (\d+) of data.max_frames=128", note).group(1))
    sample, _ = sample_of(branches=[[user("Q"), assistant("A")]], video=video_of(400.0))
    plan = plan_of(encoder, sample, rng())
    text = int((plan.segment_ids != ROOT_SEGMENT).sum()) if len(set(plan.segment_ids)) > 1 else 64
    frame = len(encoder.visual.video_tokens([399.5]))
    assert found == most or 0 <= found - plan.counters["frames"] <= 1 + text // frame  # the place of the text
