"""What users of plain transformers do with an export: the Python of docs/ask.md, videos, left-padded batches."""

import re
import sys

import numpy as np
import pytest
import torch
from media_files import PICTURES, VIDEOS, saved, scene
from PIL import Image
from programs import REPOSITORY, python, run, succeeded
from transformers import AutoModelForImageTextToText, AutoProcessor

from molmo2_nemo.ask.model import Asker
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.ffmpeg_links import make_links

EXAMPLE = re.search(r"^```python\n(.*?)^```", (REPOSITORY / "docs" / "ask.md").read_text(), re.DOTALL | re.MULTILINE)[1]


def run_example(export, content, more="", **environment):
    """The document's Python about this file, in the place of its own, with short answers."""
    code = EXAMPLE.replace("hf_model", str(export)).replace("max_new_tokens=200", "max_new_tokens=3")
    old = '{"type": "image", "path": "photo.png"}'
    assert old in code
    code = code.replace(old, content) + more
    return succeeded(run([sys.executable, "-c", code], **environment) if environment else python("-c", code)).stdout


@pytest.mark.slow
def test_the_example_of_the_document_runs(export, tmp_path):
    scene().save(tmp_path / "photo.png")
    out = run_example(export, f'{{"type": "image", "path": "{tmp_path}/photo.png"}}')
    assert out.count("\n") >= 3


FRAMES = """
import numpy as np
from pathlib import Path
from torchcodec.decoders import VideoDecoder
from molmo2_nemo.data.video import list_frames, pick_frames
for path in sorted(Path(FOLDER).glob("*.mp4")):
    data = path.read_bytes()
    ours = np.stack(list(pick_frames(data, list_frames(data).seconds)))
    theirs = VideoDecoder(str(path), dimension_order="NHWC")[:].numpy()
    assert ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).max() <= 1, path
print("the same frames")
try:
    VideoDecoder(f"{FOLDER}/raw.h264")[0]
except RuntimeError:
    print("no bare streams")
"""


@pytest.mark.slow
def test_a_video_is_asked_about_by_its_path_and_has_the_frames_of_torchcodec(export, tmp_path):
    """With the FFmpeg of PyAV, as tools/setup.sh links it."""
    pytest.importorskip("torchcodec", reason="run tools/setup.sh: requirements.lock has torchcodec")
    for number, kind in enumerate(("plain", "turned by a phone", "changing rate", "10 bits", "10 bits of BT.709")):
        (tmp_path / f"{number}.mp4").write_bytes(VIDEOS[kind]())
    (tmp_path / "raw.h264").write_bytes(VIDEOS["raw H.264"]())
    links = make_links(tmp_path / "ffmpeg")
    content = f'{{"type": "video", "path": "{tmp_path}/0.mp4"}}'
    out = run_example(export, content, FRAMES.replace("FOLDER", repr(str(tmp_path))), LD_LIBRARY_PATH=str(links))
    assert out.count("\n") >= 4 and "the same frames" in out and "no bare streams" in out


@pytest.fixture(scope="module")
def plain(export):
    return AutoModelForImageTextToText.from_pretrained(export).eval(), AutoProcessor.from_pretrained(export)


def test_left_padding_changes_no_answer(plain):
    model, processor = plain
    picture = {"type": "image", "image": scene()}
    conversations = [
        [{"role": "user", "content": [picture, {"type": "text", "text": "What is it, and what is beside it?"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
        [{"role": "user", "content": [picture, picture, {"type": "text", "text": "Which?"}]}],
    ]
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    batch = processor.apply_chat_template(conversations, **options, padding=True, padding_side="left")
    assert (batch["attention_mask"][:, 0] == 0).any() and (batch["attention_mask"][:, -1] == 1).all()
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        alone = [model(**processor.apply_chat_template([one], **options)).logits[0, -1] for one in conversations]
    assert torch.allclose(together, torch.stack(alone), atol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-2  # they could have been told apart


def test_pictures_that_transformers_opens_are_ours(plain, tmp_path):
    """But for those of which docs/ask.md says that `read_image` has to read them."""
    _, processor = plain
    for kind in ("a phone's, on its side", "mirrored and turned", "PNG on its side", "inks", "WebP"):
        file = tmp_path / "picture"
        file.write_bytes(PICTURES[kind]())
        content = [{"type": "image", "path": str(file)}, {"type": "text", "text": "?"}]
        opened = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        given = processor.image_processor(Image.fromarray(read_image(file.read_bytes())), return_tensors="pt")
        assert np.array_equal(opened["pixel_values"], given["pixel_values"]), kind


@pytest.mark.parametrize("kind", ["BMP", "JPEG2000", "TIFF", "PPM", "GIF", "WEBP"])
def test_pictures_that_transformers_does_not_open_are_those_of_the_document(kind, plain, tmp_path):
    file, frames = tmp_path / "picture", [scene().rotate(90)] if kind in ("GIF", "WEBP") else []
    file.write_bytes(saved(scene(), kind, **({"save_all": True, "append_images": frames} if frames else {})))
    assert read_image(file.read_bytes()).shape == (100, 150, 3)
    content = [{"type": "image", "path": str(file)}, {"type": "text", "text": "?"}]
    with pytest.raises(ValueError):
        plain[1].apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)


def test_a_gpu_is_used_if_there_is_one(export):
    assert Asker(export).device == ("cuda" if torch.cuda.is_available() else "cpu")
