"""WebDataset shards: tar files in which the parts of a sample follow one another, KEY.jpg KEY.json or KEY.jpg KEY.txt
(webdataset/webdataset, README; rom1504/img2dataset writes .txt for captions beside a .json of metadata)."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from molmo2_nemo.catalogue.raw import MEDIA_SUFFIXES
from molmo2_nemo.prepare.formats.line import Refused, Row, Unpacked
from molmo2_nemo.prepare.media import MAX_MEDIA

TEXT_PARTS = ("txt", "caption", "text")
VIDEO_PARTS = ("mp4", "webm", "mkv", "avi", "mov")
IMAGE_PARTS = tuple(suffix[1:] for suffix in MEDIA_SUFFIXES if suffix[1:] not in VIDEO_PARTS) + ("jpeg", "tif", "ppm")
# One of these makes the json of a sample more than metadata of its picture.
TAUGHT = ("task", "messages", "conversations", "conversation", "branches", "instruction", "query")


def rows(file: Path, number: int, unpacked: Unpacked) -> Iterator[Row]:
    """ValueError: it is no tar file, or holds samples that are prepared already."""
    try:
        with tarfile.open(file) as tar:
            key, parts, too_large = None, {}, []
            for member in tar:
                if not member.isfile():
                    continue
                path = PurePosixPath(member.name)
                stem, _, part = path.name.partition(".")
                name = str(path.with_name(stem))
                if name != key and (parts or too_large):
                    yield _row(file, key, parts, number, unpacked, too_large)
                    number += 1
                    parts, too_large = {}, []
                key = name
                if member.size > MAX_MEDIA:
                    too_large.append(f"its .{part} has {member.size:,} bytes, more than {MAX_MEDIA:,}")
                else:
                    parts[part.lower()] = tar.extractfile(member).read()
            if parts or too_large:
                yield _row(file, key, parts, number, unpacked, too_large)
    except tarfile.TarError as error:
        raise ValueError(f"{file} is no whole tar file: {error}") from error


def _row(file: Path, key: str, parts: dict[str, bytes], number: int, unpacked: Unpacked, too_large: list[str]) -> Row:
    place, record = f'sample "{key}"', {}
    if too_large:
        return Row(place, number, Refused(too_large))
    if "json" in parts:
        try:
            record = json.loads(parts["json"])
        except (ValueError, RecursionError):
            return Row(place, number, parts["json"])  # as text, so that whoever reads it says what is wrong
        record = {"messages": record} if isinstance(record, list) else record
        if not isinstance(record, dict):
            return Row(place, number, record)
    images, video = record.get("images"), record.get("video")
    if any(isinstance(medium, dict) and "part" in medium for medium in [*(images or []), video]):
        raise ValueError(f"{file} is a shard of prepared samples: name its folder in a blend, there is nothing to do")
    media = {
        kind: {part: data for part, data in parts.items() if part.rpartition(".")[2] in suffixes}
        for kind, suffixes in (("image", IMAGE_PARTS), ("video", VIDEO_PARTS))
    }
    stem = PurePosixPath(key).name
    kept = {part: unpacked.keep(data, f"{stem}.{part}") for found in media.values() for part, data in found.items()}
    text = next((parts[part].decode("utf-8", "replace") for part in TEXT_PARTS if part in parts), None)
    if text is not None and not any(name in record for name in TAUGHT):
        record = {"task": "caption", "text": text.strip()}
    replaced = ("image", "images", "video", "videos", "origin")
    record = {name: value for name, value in record.items() if name not in replaced}
    if media["video"]:
        record["video"] = kept[next(iter(media["video"]))]
    elif media["image"]:
        record["images"] = [kept[part] for part in sorted(media["image"])]
    return Row(place, number, record)
