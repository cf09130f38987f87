"""Scenes of the sample world as pictures and videos."""

import functools
import io

import av
import numpy as np
from PIL import Image, ImageDraw

from molmo2_nemo.prepare.sample_world.scenes import COLOURS, FPS, Scene, Thing


def render(scene: Scene, frame: int = 0) -> np.ndarray:
    """The scene as [height, width, 3] uint8 RGB, anti-aliased by drawing at three times its size."""
    scale = 3
    canvas = Image.new("RGB", (scene.width * scale, scene.height * scale), (scene.grey,) * 3)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        x, y = scene.position(thing, frame)
        _draw_shape(draw, thing, x * scale, y * scale, thing.size / 2 * scale)
    # No colour is near 0 or 255: nothing wraps around.
    return np.asarray(canvas.reduce(scale)) + _noise(scene.noise_seed, scene.height, scene.width)


@functools.lru_cache(maxsize=1)
def _noise(seed: int, height: int, width: int) -> np.ndarray:
    """From -2 to 2, as [height, width, 1] uint8 that wraps around; the same in all frames of a video."""
    return np.random.default_rng(seed).integers(-2, 3, (height, width, 1), dtype=np.int8).view(np.uint8)


def _draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float) -> None:
    box = [x - radius, y - radius, x + radius, y + radius]
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        draw.ellipse(box, fill)
    elif thing.shape == "square":
        draw.rectangle([x - 0.9 * radius, y - 0.9 * radius, x + 0.9 * radius, y + 0.9 * radius], fill)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill)
    else:
        turns = np.arange(10) / 10 * 2 * np.pi
        reach = radius * np.where(np.arange(10) % 2, 0.45, 1.1)
        corners = np.stack([x + reach * np.sin(turns), y - reach * np.cos(turns)], axis=1)
        draw.polygon([tuple(corner) for corner in corners], fill)


def encode_png(scene: Scene) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(scene)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def encode_mp4(scene: Scene) -> bytes:
    """The scene as MPEG-4 part 2 (in every build of FFmpeg, and fast); one thread, for the same bytes every time."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=FPS, options={"threads": "1", "flags": "+bitexact+qscale"})
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 3
        stream.codec_context.gop_size = FPS
        for number in range(scene.num_frames):
            frame = av.VideoFrame.from_ndarray(render(scene, number), "rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
