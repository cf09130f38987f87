"""Pictures and videos as people have them, and siblings of these: turned, mirrored, deep, transparent, cut, untimed."""

import io
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw


def scene(width=150, height=100):
    """A picture without any symmetry."""
    image = Image.new("RGB", (width, height), (200, 30, 60))
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, width // 2, height // 2], fill=(10, 250, 90))
    draw.ellipse([width // 2, 0, width - 20, height // 2], fill=(0, 60, 255))
    return image


def saved(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def turned(orientation, format="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(scene(), format, exif=exif)


def transparent(mode):
    image = scene().convert("RGB")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return saved(image.convert(mode))


def letters():
    """Black, and only its transparency tells it from its ground."""
    black = Image.new("L", (150, 100))
    return Image.merge("RGBA", [black, black, black, scene().convert("L")])


GREY = np.array(scene().convert("L"))
PICTURES = {
    "a phone's, on its side": lambda: turned(6),
    "mirrored and turned": lambda: turned(5),
    "PNG on its side": lambda: turned(8, "PNG"),
    "black text, transparent": lambda: saved(letters()),
    "transparent grey": lambda: transparent("LA"),
    "transparent palette": lambda: saved(scene().convert("P", palette=Image.Palette.ADAPTIVE), transparency=0),
    "16-bit grey PNG": lambda: saved(Image.fromarray(GREY.astype(np.uint16) * 257)),
    "16-bit grey PGM": lambda: b"P5 150 100 65535\n" + (GREY.astype(">u2") * 257).tobytes(),
    "12-bit grey PGM": lambda: b"P5 150 100 4095\n" + (GREY.astype(">u2") * 16).tobytes(),
    "16-bit grey TIFF": lambda: saved(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
    "inks": lambda: saved(scene().convert("CMYK"), "JPEG"),
    "black and white": lambda: saved(scene().convert("1"), "TIFF"),
    "animation": lambda: saved(scene(), "GIF", save_all=True, append_images=[Image.new("RGB", (150, 100))]),
    "WebP": lambda: saved(scene(), "WEBP", lossless=True),
    "a line of pixels": lambda: saved(scene(600, 3)),
}  # fmt: skip


def film(
    format="mp4", codec="libx264", times=None, matrix=None, size=(96, 64), pix_fmt="yuv420p", skip=0.0, bt709=False
):
    """matrix: of the display, (a, b, c, d), by hand. skip: seconds before the first frame."""
    file, times = io.BytesIO(), [i / 10 for i in range(31)] if times is None else times
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=10, options={"threads": "1", "g": "7"})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        if bt709:
            stream.codec_context.colorspace = Colorspace.ITU709
            stream.codec_context.color_range = ColorRange.JPEG
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            picture = scene(*size)
            ImageDraw.Draw(picture).rectangle([2 * number, 40, 2 * number + 9, 50], fill=(255, 255, 0))
            frame = av.VideoFrame.from_image(picture).reformat(format=pix_fmt, threads=1)
            frame.pts, frame.time_base = round((skip + time) * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = bytearray(file.getvalue())
    if matrix:
        header = data.index(b"tkhd") + 44
        for place, value in zip((0, 4, 12, 16), matrix):
            data[header + place : header + place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    return bytes(data)


def cut(video):
    """Without the last tenth of a matroska file."""
    with av.open(io.BytesIO(video)) as container:
        last = [packet.pos for packet in container.demux(video=0) if packet.size][-1]
    return video[: last + 20]


VIDEOS = {
    "plain": film,
    "mirrored": lambda: film(matrix=(-1, 0, 0, 1)),
    "upside down and mirrored": lambda: film(matrix=(1, 0, 0, -1)),
    "turned by a phone": lambda: film(matrix=(0, 1, -1, 0)),
    "turned and mirrored": lambda: film(matrix=(0, -1, -1, 0)),
    "without its last frame": lambda: cut(film("matroska")),
    "raw H.264": lambda: film("h264"),
    "AVI": lambda: film("avi", "mpeg4"),
    "MPEG transport stream": lambda: film("mpegts"),
    "changing rate": lambda: film(times=[0, 0.04, 0.5, 0.52, 1.3, 2.9, 3.0]),
    "late start": lambda: film("matroska", skip=7.3),
    "10 bits": lambda: film(codec="libx265", pix_fmt="yuv420p10le"),
    "10 bits of BT.709": lambda: film(codec="libx265", pix_fmt="yuv420p10le", bt709=True, size=(90, 62)),
    "one frame": lambda: film(times=[0.0]),
    "longer than its frames": lambda: film(times=range(40)),
}
