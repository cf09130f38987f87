import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molmo2_nemo.data.points import (
    NO_POINTS,
    NO_TRACKS,
    Points,
    Tracks,
    format_points,
    format_tracks,
    from_json,
    parse,
    render_content,
    to_json,
)

fractions = st.floats(-0.2, 1.2)
pairs = st.lists(st.tuples(fractions, fractions), max_size=5)
labels = st.text(st.characters(exclude_characters="<"), max_size=12)
seconds = st.floats(0, 1000)
separators = st.sampled_from(["\t", ";"])
image_points = st.builds(Points, labels, st.lists(st.tuples(st.integers(1, 9), pairs), max_size=5), st.just("image"))
video_points = st.builds(Points, labels, st.lists(st.tuples(seconds, pairs), max_size=5), st.just("video"))
track_frames = st.tuples(seconds, st.lists(st.tuples(st.integers(0, 6), fractions, fractions), max_size=5))
tracks = st.builds(Tracks, labels, st.lists(track_frames, max_size=5))


def thousandths(fraction):
    return round(1000 * min(max(fraction, 0), 1))


def test_image_points_text():
    points = Points("Red Circle", [(2, [(0.5, 0.25)]), (1, [(0.9, 0.1), (0.0126, 1.0), (0.0126, 0.0004)])])
    expected = "1 1 013 000 2 013 1000 3 900 100{}2 4 500 250"
    for separator in "\t;":
        text = format_points(points, separator)
        assert text == f'<points coords="{expected.format(separator)}">red circle</points>'


def test_video_points_have_one_decimal():
    points = Points("Red Circle", [(3, [(0.5, 0.5)]), (0.52, [(1.3, -1.0)])], "video")
    assert format_points(points) == '<points coords="0.5 1 1000 000;3.0 2 500 500">Red Circle</points>'


def test_tracks_text():
    # Object 7 is first because it is left of 3 where they first appear; 5 appears later although it is further left.
    frames = [(1.0, [(3, 0.1, 0.5), (7, 0.8, 0.5), (5, 0.0, 0.0)]), (0.0, [(3, 0.6, 0.5), (7, 0.2, 0.9)]), (0.5, [])]
    expected = '<tracks coords="0.0 1 200 900 2 600 500;1.0 1 800 500 2 100 500 3 000 000">shape</tracks>'
    assert format_tracks(Tracks("shape", frames)) == expected


def test_nothing_to_point_at():
    assert format_points(Points("x", [(1, [])])) == NO_POINTS
    assert format_tracks(Tracks("x", [])) == NO_TRACKS
    assert parse(NO_POINTS) == parse(NO_TRACKS) == []


@given(st.one_of(image_points, video_points), separators)
def test_parse_inverts_format_points(points, separator):
    frames = {}
    for frame, coordinates in points.groups:
        frame = frame if points.kind == "image" else round(frame, 1)
        frames.setdefault(frame, []).extend((thousandths(x), thousandths(y)) for x, y in coordinates)
    groups = [(frame, [(x / 1000, y / 1000) for x, y in sorted(frames[frame])]) for frame in sorted(frames)]
    groups = [group for group in groups if group[1]]
    label = points.label.lower() if points.kind == "image" else points.label
    expected = [Points(label, groups, points.kind)] if groups else []
    text = format_points(points, separator)
    assert parse(text) == expected
    assert parse(f"Counting the {text} shows a total of 3.") == expected
    assert [format_points(p, separator) for p in expected] == ([text] if groups else [])


@given(tracks, separators)
def test_parse_inverts_format_tracks(tracks, separator):
    frames, numbers = {}, {}
    for time, objects in tracks.frames:
        for name, x, y in objects:
            frames.setdefault(round(time, 1), {}).setdefault(name, (thousandths(x), thousandths(y)))
    expected = []
    for time, objects in sorted(frames.items()):
        for name, _ in sorted(objects.items(), key=lambda item: item[1]):
            numbers.setdefault(name, len(numbers) + 1)
        expected.append((time, sorted((numbers[name], x / 1000, y / 1000) for name, (x, y) in objects.items())))
    text = format_tracks(tracks, separator)
    assert parse(text) == ([Tracks(tracks.label, expected)] if expected else [])


@pytest.mark.slow
@given(st.text())
def test_parse_never_raises(text):
    parse(text)


pieces = ["<points ", "<tracks ", 'coords="', '"', ">", "</points>", "1", "0.5", "100", "9" * 5000, "1000", ";", "\t"]


@given(st.lists(st.sampled_from([*pieces, " ", " ", "1 100 100", "\u0663", "x", 'alt="a > b" '])).map("".join))
def test_parse_never_raises_on_broken_tags(text):
    for found in parse(text):
        frames = found.groups if isinstance(found, Points) else found.frames
        assert frames
        assert all(0 <= value <= 1 for _, group in frames for point in group for value in point[-2:])


@given(st.one_of(image_points, video_points), st.integers(0, 200))
def test_a_cut_off_tag_gives_a_prefix(points, length):
    text = format_points(points)[:length]
    whole = [(frame, p) for found in parse(format_points(points)) for frame, group in found.groups for p in group]
    part = [(frame, p) for found in parse(text) for frame, group in found.groups for p in group]
    # "1000" cut after "100" is the one number that cannot be told from a whole one.
    assert part[:-1] == whole[: len(part)][:-1]


@pytest.mark.parametrize(
    "text, expected",
    [
        ('<points coords="1 1 100 200 2 300 40', [Points("", [(1, [(0.1, 0.2)])])]),
        ('<points coords="1 1 100 2000 2 300 400">a</points>', [Points("a", [(1, [(0.3, 0.4)])])]),
        ('<points coords="1 1 1001 200">a</points>', []),
        ('<points coords="0 1 100 200">a</points>', []),
        (f'<points coords="1 {"9" * 5000} 100 200">a</points>', []),
        ('<points alt="x > y" coords="1 1 100 200">a', [Points("a", [(1, [(0.1, 0.2)])])]),
        ('<points coords="1 1 100 200,2 2 300 400">a</points>', [Points("a", [(1, [(0.1, 0.2)]), (2, [(0.3, 0.4)])])]),
        ('<tracks coords="0.5 1 100 200 1 300 400">a</tracks>', [Tracks("a", [(0.5, [(1, 0.1, 0.2)])])]),
        (
            '<points coords="1 1 100 200"><points coords="1 1 300 400">b</points>',
            [Points("", [(1, [(0.1, 0.2)])]), Points("b", [(1, [(0.3, 0.4)])])],
        ),
    ],
)
def test_parse_survives(text, expected):
    assert parse(text) == expected


@given(st.one_of(image_points, video_points, tracks))
def test_json_round_trip(value):
    back = from_json(json.loads(json.dumps(to_json(value))))
    format_it = format_tracks if isinstance(value, Tracks) else format_points
    assert format_it(back) == format_it(value)


def test_render_content():
    points = [to_json(Points("a", [(1, [(0.1, 0.2)]), (2, [(0.3, 0.4)])])), to_json(Tracks("b", [(0.5, [(9, 0, 1)])]))]
    content = "<points 1/> and <points 0/>."
    a, b = '<points coords="1 1 100 200\t2 2 300 400">a</points>', '<tracks coords="0.5 1 000 1000">b</tracks>'
    assert render_content(content, points, "\t") == f"{b} and {a}."
    assert render_content(content, points, ";") == f"{b} and {a}.".replace("\t", ";")
    assert render_content("<points 0/>", []) == "<points 0/>"


@given(tracks)
def test_ends_are_the_first_and_last_point_of_each_object(value):
    value.ends = True
    whole, ends = parse(format_tracks(Tracks(value.label, value.frames))), parse(format_tracks(value))
    seen = lambda found: [(t, i, x, y) for track in found for t, frame in track.frames for i, x, y in frame]  # noqa: E731
    expected = []
    for number in {i for _, i, _, _ in seen(whole)}:
        own = sorted(point for point in seen(whole) if point[1] == number)
        expected += {own[0], own[-1]}
    assert sorted(seen(ends)) == sorted(expected)
    assert from_json(json.loads(json.dumps(to_json(value)))).ends


def test_an_alternative_text_stands_before_the_coordinates():
    points = Points("cat", [(1, [(0.1, 0.2)])], alt='a "black" <cat>')
    text = '<points alt="a \'black\' cat" coords="1 1 100 200">cat</points>'
    assert format_points(points) == text
    [read] = parse(text)
    assert read == Points("cat", [(1, [(0.1, 0.2)])], alt="a 'black' cat") and format_points(read) == text
    assert from_json(to_json(points)) == points


@pytest.mark.parametrize(
    "call",
    [
        lambda: format_points(Points("a</points>", [(1, [(0, 0)])])),
        lambda: format_points(Points("a", [(0, [(0, 0)])])),
        lambda: format_points(Points("a", [(1.5, [(0, 0)])])),
        lambda: format_points(Points("a", [(1, [(float("nan"), 0)])])),
        lambda: format_points(Points("a", [(1, [(0, 0)])]), ","),
        lambda: format_points(Points("a", [(1, [(0, 0)])], "sound")),
        lambda: format_tracks(Tracks("a", [(-1.0, [(1, 0, 0)])])),
        lambda: render_content("<points 1/>", [to_json(Points("a", [(1, [(0, 0)])]))]),
        lambda: from_json({"type": "points", "label": "a"}),
        lambda: from_json({"type": "lines"}),
    ],
)
def test_refused(call):
    with pytest.raises(ValueError):
        call()
