"""Where the pictures, videos and folders of frames that a row names are below a raw folder."""

import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath

from molmo2_nemo.catalogue.raw import MAX_FOLDERS, RawSource
from molmo2_nemo.limits import VIDEO_SUFFIXES

ABSENT = "its picture or video is not on disk"
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
# Folders inside of a video's folder that hold its frames: LaSOT, WebUAV and LaTOT have img, TNL2K, TNLLT and VastTrack
# imgs, DanceTrack, MOT, SoccerNet and SportsMOT img1 (allenai/molmo2 at f3cb108:
# olmo/data/academic_video_track_datasets.py, olmo/data/molmo2_video_track_datasets.py).
INSIDE = ("", "img", "imgs", "img1")
# Masks are in a folder Annotations with the same names as the frames in this one (DAVIS, YouTube-VOS, LVOS, MOSE).
FRAMES_BESIDE_MASKS = "JPEGImages"


class Dropped(ValueError):
    """A sample, or a part of it, cannot be used. The text is the reason, and equal for all that have the same one."""


def find_media(names: str | list[str], raw: RawSource) -> Path:
    """The first of the names that is on disk. Dropped: none is, or several files could be meant."""
    for name in [names] if isinstance(names, str) else names:
        if name.startswith("./"):
            inside = PurePosixPath(name).parts
            path = raw.folder.joinpath(*inside) if ".." not in inside else None
            path = path if path and path.is_file() else None
        else:
            path = raw.media(name)
        if path is not None:
            return path
    several = []
    for name in [names] if isinstance(names, str) else names:
        if name.lower().endswith(VIDEO_SUFFIXES) and "://" not in name:
            found = _ending_with(name, raw)
            if len(found) == 1:
                return found[0]
            several = several or found
        elif name.lower().endswith(PICTURE_SUFFIXES) and "://" not in name:
            several = several or _pictures_ending_with(name, raw)
    raise Dropped(_several(several, raw) if len(several) > 1 else ABSENT)


def _pictures_ending_with(name: str, raw: RawSource) -> list[Path]:
    """The pictures whose path ends with the name; none where there are more than MAX_FOLDERS folders to look into."""
    parts = PurePosixPath(name).parts
    folders = _folders(str(raw.folder))
    if ".." in parts or parts[0] == "/" or len(folders) > MAX_FOLDERS:
        return []
    return [path for folder in folders if (path := Path(folder, *parts)).is_file()]


def _several(found: list[Path], raw: RawSource) -> str:
    """The reason; it names folders and no files, so that it is the same for all rows that have it."""
    folders = sorted({"/".join(path.relative_to(raw.folder).parts[:-1][:3]) for path in found})
    more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
    return (
        f"several files end with the name of its picture or video, below {', '.join(folders[:3])}{more}: rows must "
        "name the folder, too"
    )


def find_frames(names: list[str], raw: RawSource) -> list[Path]:
    """The pictures, in their order, of the folder that has the first of the names that is on disk.

    They are in it, or in one of its folders INSIDE. Dropped: there is none, or several folders could be meant.
    """
    for name in names:
        found = [(folder, frames) for folder in _ending_with(name, raw) if (frames := _frames_of(folder))]
        if len(found) > 1:
            found = [(folder, frames) for folder, frames in found if FRAMES_BESIDE_MASKS in folder.parts] or found
        if len(found) > 1:
            raise Dropped("several folders of frames have the name of its video")
        if found:
            return found[0][1]
    raise Dropped(ABSENT)


def _frames_of(folder: Path) -> list[Path]:
    for name in INSIDE:
        if (folder / name).is_dir():
            pictures = [path for path in (folder / name).iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
            if pictures:
                return sorted(pictures, key=lambda path: (len(path.name), path.name))
    return []


def _ending_with(name: str, raw: RawSource) -> list[Path]:
    """The videos and folders whose path below hub/, extracted/ or manual/ ends with the name.

    Of a name FOLDER/**/NAME, the path ends with NAME and has a folder FOLDER, in capital or small letters, before it.
    """
    above, _, name = name.rpartition("/**/")
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or parts[0] == "/":
        return []
    parts = (*parts[:-1], _key(parts[-1]))
    found = []
    for place in _places(str(raw.folder)).get(parts[-1], []):
        path = PurePosixPath(place)
        *before, last = path.parts
        if (*before, _key(last))[-len(parts) :] == parts and (
            not above or above.lower() in [part.lower() for part in before[: len(before) + 1 - len(parts)]]
        ):
            found.append(raw.folder / place)
    return found


def _key(name: str) -> str:
    """A file's name with its suffix in small letters: some cameras write .MP4."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.{suffix.lower()}" if dot and f".{suffix.lower()}" in VIDEO_SUFFIXES else name


@lru_cache(maxsize=2)
def _places(folder: str) -> dict[str, list[str]]:
    """Key of a name -> paths of the videos and folders of what was fetched, unpacked or put there by hand."""
    places: dict[str, list[str]] = {}
    for directory, folders, files in _walk(folder):
        for name in folders + [file for file in files if file.lower().endswith(VIDEO_SUFFIXES)]:
            path = os.path.relpath(os.path.join(directory, name), folder)
            places.setdefault(_key(name), []).append(path)
    return places


@lru_cache(maxsize=2)
def _folders(folder: str) -> list[str]:
    """The first MAX_FOLDERS + 1 folders of what was fetched, unpacked or put there by hand."""
    return sorted(islice((directory for directory, _, _ in _walk(folder)), MAX_FOLDERS + 1))


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk. Links are followed to the archives that several sets share, and not inside."""
    for top in ("hub", "extracted", "manual"):
        home = os.path.join(folder, top)
        shared = [os.path.join(home, name) for name in _names_in(home) if os.path.islink(os.path.join(home, name))]
        for start in (home, *sorted(shared)):
            yield from os.walk(start)


def _names_in(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []
