import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from programs import REPOSITORY
from transformers import AutoTokenizer, Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

from molmo2_nemo.config.schema import EXTRA_TOKENS
from molmo2_nemo.data.encode import DEMO_STYLES, style_prefix

ROOT = REPOSITORY
FOLDER = ROOT / "molmo2_nemo" / "data" / "tokenizer"
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
SIZE = {"height": 70, "width": 70}
USER = "<|im_start|>user\n"


def content(*parts):
    return [{"role": "user", "content": [*parts]}]


def text(words):
    return {"type": "text", "text": words}


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def test_special_ids():
    assert TOKENIZER.convert_tokens_to_ids(list(EXTRA_TOKENS)) == list(range(600, 614))
    assert TOKENIZER.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [597, 598, 599]
    assert len(TOKENIZER) == 728
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(728))
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id) == (597, 599, None)
    assert (TOKENIZER.image_token, TOKENIZER.video_token) == ("<|image|>", "<|video|>")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_round_trip(value):
    assert TOKENIZER.decode(TOKENIZER(value).input_ids) == value


@given(st.text("0123456789 .;a", min_size=1))
def test_every_digit_is_a_token(value):
    tokens = TOKENIZER.tokenize(value)
    assert [token for token in tokens if any(c.isdigit() for c in token)] == [c for c in value if c.isdigit()]


def test_the_words_of_the_world_are_short():
    assert len(TOKENIZER.tokenize("a red circle, a blue square and a green star on a dark background")) == 15
    assert len(TOKENIZER.tokenize("<|im_start|>assistant\n")) == 3


def test_special_tokens_are_found_inside_text():
    ids = TOKENIZER("red<|im_end|>\n<im_patch>").input_ids
    assert (ids[-3], ids[-1]) == (599, 602)


def test_chat_template_order_and_turns():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [VIDEO, text("What"), IMAGE, text("is it?")]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Why?"},
    ]
    expected = (
        "<|image|><|video|><|im_start|>user\nSystem: Be short.\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    )
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == expected
    generating = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert generating == expected + "<|im_start|>assistant\n"


def test_chat_template_numbers_several_images():
    prompt = TOKENIZER.apply_chat_template(content(IMAGE, text("Same?"), IMAGE), tokenize=False)
    assert prompt == "Image 1<|image|>Image 2<|image|><|im_start|>user\nSame?<|im_end|>\n"


def test_chat_template_puts_subtitles_between_the_video_and_the_first_turn():
    subtitle = {"role": "subtitle", "content": "0.0 - 0.5 Look."}
    prompt = TOKENIZER.apply_chat_template([subtitle, *content(VIDEO, text("What?"))], tokenize=False)
    assert prompt == "<|video|>subtitle\n0.0 - 0.5 Look.<|im_start|>user\nWhat?<|im_end|>\n"
    headed = {"role": "subtitle", "content": "subtitle\n0.0 - 0.5 Look."}  # as the released template takes it
    assert TOKENIZER.apply_chat_template([headed, *content(VIDEO, text("What?"))], tokenize=False) == prompt


def test_chat_template_writes_a_style_as_training_does():
    def asked(style):
        part = text("What?") | {"style": style}
        prompt = TOKENIZER.apply_chat_template(content(IMAGE, part, text("Why?")), tokenize=False)
        return prompt.removeprefix("<|image|><|im_start|>user\n").removesuffix("What? Why?<|im_end|>\n")

    # The released template and the released training data differ in these.
    prefixed_by_template, plain_in_template = {"eval_multiple_choice", "eval_multi_image_mc"}, {"demo"}
    styles = ["vqa2", "video_short_answer", "video_multiple_choice_w_subtitle", *DEMO_STYLES - prefixed_by_template]
    for style in styles:
        prefix = style_prefix(style, 9, "demo", np.random.default_rng(0))
        assert asked(style) == (f"{prefix} " if prefix else ""), style
    assert asked("vqa2") == "vqa2: " and asked("pointing") == "" == asked(*plain_in_template)
    assert all(asked(style) == f"{style}: " for style in prefixed_by_template)


@pytest.mark.parametrize("roles", [["tool"], ["user", "subtitle"]])
def test_chat_template_refuses_an_unknown_role_and_late_subtitles(roles):
    with pytest.raises(Exception, match=f"system, user or assistant .*, not {roles[-1]}"):
        TOKENIZER.apply_chat_template([{"role": role, "content": "x"} for role in roles], tokenize=False)


@pytest.fixture(scope="module")
def processor():
    return Molmo2Processor(
        Molmo2ImageProcessor(size=SIZE, max_crops=4, overlap_margins=[1, 1]),
        Molmo2VideoProcessor(size=SIZE),
        TOKENIZER,
        chat_template=TOKENIZER.chat_template,
        use_single_crop_col_tokens=False,
    )


def split_prompt(processor, messages, **media):
    """(what stands between BOS and the first user turn, the rest), decoded."""
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=prompt, return_tensors="pt", **media)
    bos, rest = TOKENIZER.decode(inputs["input_ids"][0]).split("<|im_end|>", 1)
    assert bos == ""
    visual, turns = rest.split(USER, 1)
    assert "<im_patch>" not in turns
    return visual, turns


@pytest.mark.parametrize("count", [1, 2])
def test_processor_with_images(processor, count):
    image = Image.fromarray(np.zeros((70, 70, 3), np.uint8))
    messages = content(*[IMAGE] * count, text("What is it?"))
    visual, turns = split_prompt(processor, messages, images=[image] * count)
    # 5 x 5 patches pooled by two: 3 x 3 tokens, for the whole image and for its one crop.
    high = "<im_start>" + ("<im_patch>" * 3 + "<im_col>") * 3 + "<im_end>"
    one = "<low_res_im_start>" + "<im_patch>" * 9 + "<im_end>" + high
    assert visual == (one if count == 1 else f"Image 1{one}Image 2{one}")
    assert turns == "What is it?<|im_end|>\n<|im_start|>assistant\n"


def test_processor_with_a_video(processor):
    video = np.zeros((16, 70, 70, 3), np.uint8)
    metadata = {"fps": 8.0, "duration": 2.0, "total_num_frames": 16}
    messages = content(VIDEO, text("Describe."))
    visual, turns = split_prompt(processor, messages, videos=[video], video_metadata=[metadata])
    frame = "<frame_start>" + "<im_patch>" * 4 + "<frame_end>"  # 5 x 5 patches pooled by three
    assert visual == " ".join(f"{time} {frame}" for time in ("0.0", "0.5", "1.0", "1.5"))
    assert turns == "Describe.<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_training_it_again_gives_the_shipped_files(tmp_path):
    subprocess.run([sys.executable, ROOT / "tools" / "dev" / "train_tokenizer.py", "--out", tmp_path], check=True)
    shipped = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert again.keys() == shipped.keys()
    # The library may write its files in another way one day; the vocabulary and the merges must stay.
    assert json.loads(again["tokenizer.json"])["model"] == json.loads(shipped["tokenizer.json"])["model"]
