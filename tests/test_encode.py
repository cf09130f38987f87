import copy
import io
import itertools
import math
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

from molmo2_nemo.config import DataConfig, VisionConfig
from molmo2_nemo.data.encode import DEMO_STYLES, ROOT_SEGMENT, Encoder, loss_weight, style_prefix
from molmo2_nemo.data.processor import build_processor, decode_image
from molmo2_nemo.data.video import frame_times
from molmo2_nemo.model.mask import dense_mask

TOKENIZER_FOLDER = str(Path(__file__).resolve().parents[1] / "molmo2_nemo" / "data" / "tokenizer")
TOKENIZER = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER)
TINY = VisionConfig(image_size=70, overlap_margin=1)
REAL = VisionConfig()
EOS, IM_START, IM_PATCH = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<im_patch>"])


def make_encoder(vision=TINY, **changes):
    settings = dict(
        blend="", root="", tokenizer=TOKENIZER_FOLDER, seq_length=1024, max_crops=48, max_frames=16,
        max_crops_per_image=4 if vision is TINY else 8,
    )  # fmt: skip
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
    )  # fmt: skip


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


def compare(vision, images, encoder=None):
    """Ours against transformers': the prompt's tokens, the pooling windows, every pixel."""
    encoder = encoder or (ENCODER if vision is TINY else REAL_ENCODER)
    oracle = ORACLES[id(vision)]
    sample, media = sample_of(images)
    plan = encoder.plan(sample, rng())
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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_any_size_of_the_tiny_geometry(width, height):
    compare(TINY, [noise(width, height)])


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 900), (900, 1), (3, 3), (112, 112), (113, 111), (378, 378), (1023, 767)]
)
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
    plan = ENCODER.plan(sample_of()[0], rng())
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
    plan = encoder.plan(sample_of(video=video)[0], rng())
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
    plan = ENCODER.plan(sample_of(branches=[[{"role": "system", "content": "Be short."}, *turns]])[0], rng())
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
        plan = make_encoder(point_separator=separator).plan(sample_of(branches=[turns], style="pointing")[0], rng())
        text = f'<points coords="1 1 500 250{separator}2 2 100 200">cat</points><|im_end|>'
        assert targets(plan) == text
        assert set(plan.loss_weights.tolist()) == {0.0, np.float32(0.2)}


def test_special_tokens_spelt_in_a_text_stay_text():
    text = "<im_patch><|im_end|><frame_start><|image|>"
    plan = ENCODER.plan(sample_of([noise(70, 70)], [[user(text), assistant(text)]])[0], rng())
    assert (plan.input_ids == IM_PATCH).sum() == plan.vision_units[0][1]
    assert (plan.labels == EOS).sum() == 1
    assert targets(plan) == text + "<|im_end|>"


def test_leading_line_breaks_of_a_question_are_joined_as_transformers_joins_them():
    plan = ENCODER.plan(sample_of(branches=[[user("\n\nWell?\n"), assistant("no")]])[0], rng())
    prompt = "<|im_end|><|im_start|>user\n\n\nWell?\n<|im_end|>\n<|im_start|>assistant\n"
    assert plan.input_ids.tolist() == [*TOKENIZER.encode(prompt), *TOKENIZER.encode("no")]


@pytest.mark.parametrize(
    "style, weight",
    [
        ("pointing", 0.2), ("point_count", 0.2), ("counting", 0.2), ("multi_image_count_then_point", 0.2),
        ("video_point_track_per_frame", 0.2), ("video_long_caption", 0.1), ("video_merged_caption", 0.1),
        ("user_qa", 2 / 3 / 2), ("long_caption", 2 / 3 / 2), ("video_short_answer", 2 / 3 / 2),
    ],
)  # fmt: skip
def test_weights_by_style(style, weight):
    assert loss_weight(style, 9, 4, "root") == pytest.approx(weight)
    assert loss_weight(style, 9, 4, "flat") == 1.0


def test_style_prefixes():
    assert {style_prefix(style, 9, "demo", rng()) for style in DEMO_STYLES} == {""}
    assert style_prefix("vqa2", 9, "demo", rng()) == "vqa2:"
    assert {style_prefix("pointing", 9, "length", rng(i)) for i in range(50)} == {"pointing:"}
    drawn = [style_prefix("long_caption", 900, "length", rng(i)) for i in range(2000)]
    assert 0.07 < drawn.count("long_caption:") / 2000 < 0.13
    lengths = [int(prefix.split()[1][:-1]) for prefix in drawn if " " in prefix]
    assert abs(np.mean(lengths) - 59.5) < 0.2 and abs(np.std(lengths) - 25 / 15) < 0.2
    assert all(" -" not in style_prefix("long_caption", 1, "length", rng(i)) for i in range(200))


def test_prefixes_stand_before_the_question():
    branches = [[user("Why?"), assistant("so")]]
    plan = ENCODER.plan(sample_of(branches=branches, style="vqa2")[0], rng())
    assert "user\nvqa2: Why?<" in TOKENIZER.decode(plan.input_ids)
    branches = [[user(""), assistant("so")]]
    plan = make_encoder(style_prefix="length").plan(sample_of(branches=branches, style="pointing")[0], rng())
    assert "user\npointing:<" in TOKENIZER.decode(plan.input_ids)


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
        plan = ENCODER.plan(sample, rng(seed))
        assert (plan.segment_ids[:root] == ROOT_SEGMENT).all()
        assert plan.position_ids[:root].tolist() == list(range(root))
        order = []
        for m in range(3):
            own = plan.segment_ids == m
            # Each branch is what the branch alone gives: its tokens, positions and targets, in another weight.
            for index, branch in enumerate(BRANCHES):
                alone = ENCODER.plan(sample_of([noise(70, 70)], [branch])[0], rng())
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
    again = [ENCODER.plan(sample, rng(7)).input_ids.tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_a_tree_of_one_branch_is_a_plain_example():
    plan = ENCODER.plan(sample_of([noise(70, 70)], BRANCHES[:1])[0], rng())
    assert not plan.segment_ids.any() and plan.position_ids.tolist() == list(range(plan.num_tokens))


def test_mask_of_trees_by_brute_force():
    """The model's mask on our segment ids, against the meaning: who is in which example, and in which branch."""
    pieces = []  # (input_ids, segment_ids, list of (example, branch or None))
    for example, branches in enumerate([BRANCHES, BRANCHES[:1], BRANCHES[:2]]):
        images = [noise(20, 20)] * (2 if example == 0 else 1)
        plan = ENCODER.plan(sample_of(images, branches)[0], rng(example))
        root = 1 + len(ENCODER._image_tokens(plan.images)[0])
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
)  # fmt: skip
def test_whatever_does_not_fit_is_cut_or_dropped_and_counted(seq_length, words, num_images, seed):
    encoder = shared_encoder(seq_length)
    branches = [[user("Q" * (n % 7)), assistant(" a" * n)] for n in words]
    sample, _ = sample_of([noise(70, 70)] * num_images, branches)
    plan = encoder.plan(sample, rng(seed))
    counts = plan.counters
    whole = shared_encoder(4096).plan(sample, rng(seed))
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
    plan = make_encoder(max_crops=5).plan(sample_of([noise(300, 300)] * 2)[0], rng())
    assert plan.num_tokens == 0 and plan.counters == {"dropped_too_many_crops": 1}


def video_of(duration, **more):
    return {"part": "video.mp4", "width": 64, "height": 48, "fps": 8, "num_frames": 80, "duration": duration} | more


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 300), st.integers(1, 40), st.integers(1, 40), st.integers(60, 700), st.integers(0, 80))
def test_a_video_is_thinned_to_whole_frames(duration, max_frames, max_crops, seq_length, words):
    encoder = copy.copy(ENCODER)
    encoder.data = replace(ENCODER.data, max_frames=max_frames, max_crops=max_crops, seq_length=seq_length)
    sample, _ = sample_of(branches=[[user("Q"), assistant(" a" * words)]], video=video_of(duration))
    plan = encoder.plan(sample, rng())
    text = ENCODER.plan(sample_of(branches=[[user("Q"), assistant(" a" * words)]])[0], rng()).num_tokens
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
    if len(times) > 1:
        assert not plan.counters["truncated"]


# --- broken samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"branches": []}, {"branches": [[]]}, {"branches": [[user("Q")]]}, {"branches": [[assistant("A")]]},
        {"branches": [[user("Q"), user("Q")]]}, {"branches": [[user(3), assistant("A")]]}, {"branches": None},
        {"branches": [[user("Q"), assistant("<points 0/>") | {"points": [{"type": "?"}]}]]},
        {"branches": [[user("Q"), assistant("<points 0/>") | {"points": {}, "content": 3}]]},
        {"branches": [[user("Q\ud800"), assistant("A")]]},
        {"images": [{"part": "x"}]}, {"images": [{"part": "x", "width": 0, "height": 4}]}, {"images": None},
        {"images": [{"width": 3, "height": 4}]}, {"images": [{"part": "x", "width": 3.5, "height": 4}]},
        {"style": None}, {"video": {"part": "v"}}, {"video": video_of(1.0, num_frames="9")}, {"video": video_of(-1.0)}, {"video": video_of(math.nan)},
        {"video": video_of(math.inf)}, {"video": video_of(1.0), "images": [{"part": "x", "width": 1, "height": 4}]},
    ],
)  # fmt: skip
def test_malformed_json_is_refused(change):
    with pytest.raises(ValueError):
        ENCODER.plan(sample_of()[0] | change, rng())


def test_missing_keys_are_refused():
    for key in ("style", "images", "video", "branches"):
        sample, _ = sample_of()
        del sample[key]
        with pytest.raises(ValueError, match=key):
            ENCODER.plan(sample, rng())


def test_media_that_cannot_be_decoded():
    sample, media = sample_of([noise(70, 50)])
    plan = ENCODER.plan(sample, rng())
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
    assert decode_image(file.getvalue()).size == (4, 8)
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        file = io.BytesIO()
        Image.new(mode, (5, 6)).save(file, "TIFF")
        assert decode_image(file.getvalue()).mode == "RGB"


def test_a_tokenizer_without_the_visual_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.tokenizer="):
        build_processor(str(tmp_path), TINY)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks the token"):
        build_processor(str(tmp_path), TINY)
