"""What one stage accepts, no later one refuses: downloader, preparation and loader read the same limits (limits.py)."""

import av
import numpy as np
import pytest
from PIL import Image

from molmo2_nemo import limits
from molmo2_nemo.catalogue.raw import MEDIA_SUFFIXES
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.data.video import pick_frames
from molmo2_nemo.fetch.media_check import BadContent, check_image, check_video
from molmo2_nemo.prepare.media import image_facts, video_facts

# Each reads the file at a path, or refuses it with a sentence.
IMAGE_READERS = {
    "downloader": check_image,
    "preparation": lambda path: image_facts(path.read_bytes()),
    "loader": lambda path: read_image(path.read_bytes()),
}
VIDEO_READERS = {
    "downloader": check_video,
    "preparation": lambda path: video_facts(path.read_bytes()),
    "loader": lambda path: list(pick_frames(path.read_bytes(), [0.0])),
}


@pytest.mark.parametrize("reader", IMAGE_READERS)
# The second is so large that Pillow refuses it by itself.
@pytest.mark.parametrize("size", [(12_000, 10_000), (20_000, 20_000)], ids=["120 megapixels", "400 megapixels"])
def test_a_picture_of_too_many_pixels_is_refused_by_all_with_the_same_figure(reader, size, tmp_path):
    Image.new("1", size).save(tmp_path / "picture.png")
    with pytest.raises((BadContent, ValueError), match="more than 100,000,000 pixels|more than 100,000,000$"):
        IMAGE_READERS[reader](tmp_path / "picture.png")


@pytest.mark.parametrize("reader", IMAGE_READERS)
def test_the_limit_of_pixels_stands_in_one_place(reader, tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "picture.png")
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 40 * 30)
    IMAGE_READERS[reader](tmp_path / "picture.png")
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 40 * 30 - 1)
    with pytest.raises((BadContent, ValueError), match="40 x 30 .*more than 1,199"):
        IMAGE_READERS[reader](tmp_path / "picture.png")


@pytest.mark.parametrize("reader", VIDEO_READERS)
def test_the_limit_of_a_frames_pixels_stands_in_one_place(reader, tmp_path, monkeypatch):
    with av.open(str(tmp_path / "video.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=2, width=64, height=48)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        container.mux(stream.encode())
    VIDEO_READERS[reader](tmp_path / "video.mp4")
    monkeypatch.setattr(limits, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises((BadContent, ValueError), match="64 x 48 .*more than 3,071"):
        VIDEO_READERS[reader](tmp_path / "video.mp4")


def test_what_is_downloaded_is_found_and_read_later():
    assert set(limits.DOWNLOADED_IMAGES) - {"MPO"} <= set(limits.IMAGE_FORMATS)
    suffixes = {*limits.DOWNLOADED_IMAGES.values(), *limits.DOWNLOADED_VIDEOS.values()}
    assert suffixes == set(MEDIA_SUFFIXES) and len(MEDIA_SUFFIXES) == len(suffixes)
