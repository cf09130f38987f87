"""From drafts to samples: the drafts of one picture or video are joined, their media found, measured and packed."""

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from molmo2_nemo.catalogue import resized
from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.data.video import list_frames, pick_frames
from molmo2_nemo.prepare.annotations import check_answers, check_rates, use_fractions, without_nothing
from molmo2_nemo.prepare.clock_faces import draw_clock
from molmo2_nemo.prepare.converters.common import Clip, Converter, Draft, digest
from molmo2_nemo.prepare.find_media import ABSENT, Dropped, find_frames, find_media
from molmo2_nemo.prepare.media import MAX_MEDIA, encode, excerpt, image_facts, image_suffix, suffix, video_facts

# Seconds by which a clip may lie outside of its video: annotations are rounded.
SAME_END = 1.0
# Seconds by which the length of a video may be rounded, and rates at which pictures of videos are published.
ROUNDED, USUAL_RATES = 0.5, (4, 5, 6, 24, 25, 30)
# A point that is outside of its picture by more than this many sides of it is a mistake, not an inexact one.
FAR = 1.0
# A clip is cut out of a file that has more bytes than this, if it is shorter than this share of it.
MIN_CUT, CUT_SHARE = 2 * 2**20, 0.6
NUMBER = re.compile(r"0x[0-9a-f]+|\d+(\.\d+)?")


def join(drafts: Iterable[Draft], converter: Converter) -> Iterator[tuple[Draft, dict[str, int]]]:
    """Join drafts that are about the same thing into samples, each with the number of branches left out by reason.

    Drafts with the same media and `tree` become one sample, or several where that has more branches or points than
    the converter allows: branches then are divided evenly, points in their order.
    """
    trees: dict[tuple, list[Draft]] = {}
    for number, draft in enumerate(drafts):
        video = draft.video and json.dumps(asdict(draft.video), sort_keys=True)
        media = tuple(image if isinstance(image, str | bytes) else json.dumps(image) for image in draft.images)
        alone = number if draft.tree is None else None
        trees.setdefault((draft.tree, alone, draft.unit, video, media), []).append(draft)
    for members in trees.values():
        first, left_out = members[0], {}
        unique = {json.dumps(branch, sort_keys=True): branch for draft in members for branch in draft.branches}
        if again := sum(len(draft.branches) for draft in members) - len(unique):
            left_out["the same annotation again"] = again
        if converter.most_branches and len(unique) > converter.most_branches:
            left_out[f"more than {converter.most_branches} about one picture"] = len(unique) - converter.most_branches
            chosen = set(sorted(unique, key=digest)[: converter.most_branches])
            unique = {text: branch for text, branch in unique.items() if text in chosen}
        for part in _parts(list(unique.values()), converter):
            yield replace(first, branches=part), left_out
            left_out = {}


def _parts(branches: list[dict], converter: Converter) -> Iterator[list[dict]]:
    if converter.max_points is not None:
        part, total = [], 0
        for branch in branches:
            points = sum(len(group) for _, group in branch["points"])
            if part and (total + points > converter.max_points or len(part) == converter.max_branches):
                yield part
                part, total = [], 0
            part, total = [*part, branch], total + points
        yield part
        return
    count = math.ceil(len(branches) / converter.max_branches)
    for number in range(count):
        start, end = (len(branches) * k // count for k in (number, number + 1))
        yield branches[start:end]


def pack(draft: Draft, raw: RawSource) -> tuple[dict[str, bytes], int, Counter]:
    """Parts of the sample, how many points had to be moved to a picture's border, and how many branches were left out
    and why. Dropped: nothing of it can be used."""
    sample: dict = {"branches": []}
    parts: dict[str, bytes] = {}
    published_sizes = []
    for index, image in enumerate(draft.images):
        data = _image(image, raw)
        part = f"img{index}{image_suffix(data) or '.bin'}"
        parts[part] = data
        facts = _try(image_facts, "picture", data)
        sample.setdefault("images", []).append({"part": part, **facts})
        published_sizes.append(resized.published(data) or facts)
    if draft.video:
        data, ending, facts = _video(draft.video, raw)
        parts[f"video{ending}"] = data
        sample["video"] = {"part": f"video{ending}", **facts}
    moved, left_out, reason = 0, Counter(), ""
    for branch in draft.branches:
        # A branch that is wrong is left out, and the others about the same picture are kept.
        try:
            of_branch = _inside(branch, published_sizes or [sample.get("video")], draft)
            example = read_example(json.dumps(sample | {"branches": [branch]}))
            use_fractions(example, "fraction")
            check_answers(example)
        except ValueError as error:
            reason = general(str(error))
            left_out[reason] += 1
        else:
            sample["branches"].append(branch)
            moved += of_branch
    if not sample["branches"]:
        raise Dropped(reason)
    if draft.multi_turn and len(sample["branches"]) > 1:
        sample["multi_turn"] = draft.multi_turn
    try:
        example = read_example(json.dumps(sample))
        if example.video:
            check_rates(example)
    except ValueError as error:
        raise Dropped(general(str(error))) from error
    return {"json": json.dumps(without_nothing(asdict(example))).encode(), **parts}, moved, left_out


def general(reason: str) -> str:
    """A reason without the numbers of the one sample, so that like reasons can be counted."""
    return NUMBER.sub("#", " ".join(reason.split()))[:120].rstrip(".")


def _try(look, what: str, *args):
    try:
        return look(*args)
    except Dropped:
        raise
    except ValueError as error:
        raise Dropped(f"a {what} that cannot be read ({general(str(error))})") from error


def _inside(branch: dict, sizes: list, draft: Draft) -> int:
    """Change points of images and videos to fractions from 0 to 1; returns how many lay outside.

    sizes: of the pictures as they were published, whose pixels are meant; resized ones have the same fractions.
    As in the public code they are moved to the border. ValueError: one is farther outside than the picture is large.
    """
    moved = 0
    groups = branch.get("points") or branch.get("frames") or []
    for frame, points in groups if branch["task"] in ("pointing", "tracking") else []:
        index = 0 if draft.video else int(frame) - 1
        if not 0 <= index < len(sizes) or sizes[index] is None:
            raise ValueError("points of a picture that is not there")
        size = sizes[index]
        scales = {"fraction": (1, 1), "percent": (100, 100), "pixels": (size["width"], size["height"])}
        for point in points:
            outside = False
            for place, side in zip((-2, -1), scales[draft.unit]):
                value = point[place] / side
                if not -FAR < value < 1 + FAR:
                    raise ValueError(f"a point is far outside of its picture, if its unit is {draft.unit}")
                inside = min(max(value, 0.0), 1.0)
                outside |= abs(value - inside) > 0.005
                point[place] = inside
            moved += outside
    return moved


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_MEDIA:
        raise Dropped(f"a file of more than {MAX_MEDIA:,} bytes")
    if not size:
        raise Dropped("an empty file")
    return path.read_bytes()


def _image(image, raw: RawSource) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, dict) and "clock" in image:
        return _clock(image, raw)
    if isinstance(image, dict):
        return _drawn(_read(_found(image["name"], raw)), image["boxes"], image["opacity"])
    return _read(_found(image, raw))


def _found(names: str | list[str], raw: RawSource) -> Path:
    """The file of one of the names, to be read at once. Dropped: there is none."""
    return raw.content(find_media(names, raw))


def _clock(image: dict, raw: RawSource) -> bytes:
    """The user's own picture of a watch, or else one that is drawn here."""
    try:
        return _read(_found(image["name"], raw))
    except Dropped:
        return _try(draw_clock, "clock", image["clock"]["says"], image["clock"]["watch"])


def _drawn(data: bytes, boxes: list, opacity: int) -> bytes:
    """The picture with boxes [left, top, right, bottom, letter] over its words, as PNG.

    Where the boxes are half transparent, the words stay readable: the letter is at the upper left corner, of the size
    and at the place that allenai/molmo2 gives it (olmo/data/dataset_builders/ai2d.py, draw_abc_labels).
    """
    image = Image.fromarray(_try(read_image, "picture", data))
    layer = Image.new("RGBA", image.size, (255, 255, 255, 0))
    draw = ImageDraw.Draw(layer)
    for *corners, text in boxes:
        left, right = sorted((corners[0], corners[2]))
        top, bottom = sorted((corners[1], corners[3]))
        draw.rectangle((left, top, right, bottom), fill=(255, 255, 255, opacity), outline=(0, 0, 0, 255))
        if opacity == 255:
            place, size, anchor = ((left + right) / 2, (top + bottom) / 2), min(bottom - top, right - left) * 0.9, "mm"
        else:
            place, size, anchor = (max(left - 12, 0), max(top - 10, 0)), min(max(16, min(image.size) / 50), 32), "la"
        font = ImageFont.load_default(size=max(8.0, size))
        if opacity < 255:
            draw.rectangle(draw.textbbox(place, text, font=font, anchor=anchor), fill="white")
        draw.text(place, text, fill="black", font=font, anchor=anchor)
    file = io.BytesIO()
    Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB").save(file, "PNG")
    return file.getvalue()


def _video(video: Clip, raw: RawSource) -> tuple[bytes, str, dict]:
    """Bytes, suffix, and the schema's video: a file that is cut already, a stretch of a file, or a folder of frames."""
    path, whole = None, False
    for names, is_cut in ((video.cut, True), (video.names, False)):
        try:
            path, whole = _found(names, raw), is_cut
            break
        except Dropped:
            continue
    if path is None or (video.native_fps and not whole and not _has_rate(path, video.fps)):
        data = _encoded(video, raw, path)
        facts, ending, whole = _try(video_facts, "video", data), ".mp4", True
    elif path.stat().st_size > MAX_MEDIA and video.start is not None and not whole:
        data, ending, facts = _cut(path, video.start, video.end, math.inf, None)
    else:
        data, ending = _read(path), suffix(path)
        stat = path.stat()
        facts = dict(_facts_of(str(path), stat.st_size, stat.st_mtime_ns))
        if "error" in facts:
            raise Dropped(facts["error"])
        if video.may_be_cut and video.start is not None and video.end > facts["duration"] + SAME_END:
            whole |= abs(video.end - video.start - facts["duration"]) <= SAME_END
        if video.start is not None and not whole:
            data, ending, facts = _cut(path, video.start, video.end, facts["duration"], (data, ending, facts))
    start = video.start or 0.0
    length = facts["clip"][1] - facts["clip"][0] if "clip" in facts else facts["duration"]
    if video.subtitles:
        shifted = [(s - start, min(e - start, length), text.strip()) for s, e, text in video.subtitles]
        facts["subtitles"] = [(max(0.0, s), e, text) for s, e, text in shifted if text and e > 0 and s < length]
    if video.annotation_fps:
        facts["annotation_fps"] = video.annotation_fps
    return data, ending, facts


def _cut(path: Path, start: float, end: float, duration: float, whole: tuple | None) -> tuple[bytes, str, dict]:
    """Bytes, suffix and facts of a file with a clip: the whole file, or a part of it if that is much smaller."""
    if end > duration + SAME_END or not start < min(end, duration):
        raise Dropped("a clip outside of its video")
    begin, end, part = 0.0, min(end, duration), None
    if whole is None or (len(whole[0]) > MIN_CUT and end - start < CUT_SHARE * duration):
        part = excerpt(path, start, end)
    if part:
        data, ending, begin = part
        facts = _try(video_facts, "video", data)
        if end > begin + facts["duration"] + SAME_END:
            raise Dropped("a clip outside of its video")
    elif whole:
        data, ending, facts = whole
    else:
        raise Dropped(f"a file of more than {MAX_MEDIA:,} bytes of which no clip can be cut")
    clip = [start - begin, min(end - begin, facts["duration"])]
    return data, ending, facts if clip == [0.0, facts["duration"]] else facts | {"clip": clip}


@lru_cache(maxsize=256)
def _facts_of(path: str, size: int, time: int) -> tuple:
    """video_facts of a file, which several samples may share; as items, because a cache holds what does not change."""
    try:
        return tuple(_try(video_facts, "video", Path(path).read_bytes()).items())
    except Dropped as error:
        return (("error", str(error)),)


def _has_rate(path: Path, fps: float) -> bool:
    """Whether a video has so many frames a second already, as those have that somebody has encoded for these rows."""
    stat = path.stat()
    found = dict(_facts_of(str(path), stat.st_size, stat.st_mtime_ns)).get("fps")
    return found is not None and abs(found / fps - 1) < 0.02


def _encoded(video: Clip, raw: RawSource, path: Path | None) -> bytes:
    """An mp4 file of the pictures of a folder, or of the frames of a video file, or of those of a clip of them."""
    if not (video.fps or video.seconds) or not (path or video.frames):
        raise Dropped(ABSENT)
    frames = [] if path else find_frames(video.frames, raw)
    fps = _rate(len(frames), video)
    step = max(1, round(video.native_fps / video.fps)) if video.native_fps else 1
    chosen = slice(None)
    if video.start is not None:
        chosen = slice(round(video.start * fps), round(video.end * fps))
    if path:
        data = _read(path)
        stamps = _try(list_frames, "video", data).seconds[::step][chosen]
        pictures = _try(pick_frames, "video", data, stamps)
    else:
        pictures = (_try(read_image, "picture", _read(raw.content(frame))) for frame in frames[::step][chosen])
    data = _try(encode, "video", pictures, fps)
    if not data:
        raise Dropped("a clip outside of its video")
    return data


def _rate(number: int, video: Clip) -> float:
    """How many of the pictures of a folder belong to a second.

    Where the length of the whole video is known, which may be rounded to half seconds: the rate `fps` if the pictures
    last as long at it, or the usual rate at which their length comes nearest, or else the one that follows.
    """
    if video.seconds is None:
        return video.fps
    away = {rate: abs(number / rate - video.seconds) for rate in (video.fps, *USUAL_RATES) if rate}
    if video.fps and away[video.fps] <= ROUNDED:
        return video.fps
    nearest = min(away, key=away.get)
    return nearest if away[nearest] <= ROUNDED else number / video.seconds
