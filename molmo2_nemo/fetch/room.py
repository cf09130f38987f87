"""A bound of the disk space that a program takes below a folder."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from molmo2_nemo.fetch.web import OutOfBytes
from molmo2_nemo.files import readable_size

# Bytes of a block of most file systems. All files are looked at again once so much of the room was written since.
BLOCK, LOOKS = 4096, 16  # a sixteenth
# Share of the room that is kept for what is not counted at once: folders, and blocks that are not full.
RESERVE = 0.03


def as_option(size: int) -> str:
    """At least so many bytes, as a user types them: 270GB, 12MB."""
    power = next((power for power in (12, 9, 6, 3) if size >= 10 ** (power + 1)), 0)
    return f"{-(-size // 10**power)}{ {12: 'TB', 9: 'GB', 6: 'MB', 3: 'KB', 0: 'B'}[power] }"


class NoScratch(Exception):
    """The work does not fit into the room. The message is one sentence."""


@dataclass
class Room:
    """At most `most` bytes below `folder`, as the disk counts them: a hole in a file takes none."""

    folder: Path
    most: int
    put_away: Callable[[], None] = lambda: None  # puts away, or removes, what can be
    beat: Callable[[], None] = lambda: None  # called now and then
    peak: int = 0  # the most that was ever taken
    _used: int = 0
    _since: int = 0  # bytes that were counted since the files were looked at
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def used(self) -> int:
        """Bytes that are taken now, by looking at every file."""
        self.beat()
        self._used, self._since = blocks_below(self.folder), 0
        self.peak = max(self.peak, self._used)
        return self._used

    @property
    def bound(self) -> int:
        """What is used of `most`."""
        return int(self.most * (1 - RESERVE))

    def left(self) -> int:
        return self.bound - self.used()

    def need(self, size: int, what: str) -> None:
        """See that `size` bytes can be written. NoScratch: they cannot, even after all is put away that can be."""
        if self.left() >= size:
            return
        self.put_away()
        if (left := self.left()) < size:
            enough = as_option(int((self.bound - left + size) / (1 - RESERVE)) + 1)
            raise NoScratch(
                f"{what} needs {readable_size(size)} of scratch, and of --max-scratch {as_option(self.most)} only "
                f"{readable_size(max(0, left))} are left: give --max-scratch {enough}"
            )

    def takes(self, count: int) -> bool:
        """Whether bytes that are about to be written fit; then they count as taken, until the files are looked at."""
        self.beat()
        with self._lock:
            if self._since > self.most // LOOKS:
                self.used()
            self._since += count
            self._used += count
            self.peak = max(self.peak, self._used)
            return self._used <= self.bound

    def for_archive(self, archive: Path) -> Callable[[int], None]:
        """See that an archive can be unpacked, and return the function that counts what comes out. NoScratch."""
        self.need(archive.stat().st_size, f"what comes out of {archive.name}")
        return self.add

    def add(self, count: int) -> None:
        """Count bytes that come out of an archive, which may be more than it has. OutOfBytes: they do not fit now."""
        if not self.takes(-(-count // BLOCK) * BLOCK):
            raise OutOfBytes("the scratch is full")


def blocks_below(folder: Path) -> int:
    """Bytes of the disk's blocks below a folder, that of folders included. Links are not followed."""
    total, seen = 0, set()
    for directory, _, names in os.walk(folder):
        for path in (directory, *(os.path.join(directory, name) for name in names)):
            try:
                stat = os.lstat(path)
            except OSError:  # removed in the meantime
                continue
            if stat.st_nlink > 1 and path != directory:
                if (stat.st_dev, stat.st_ino) in seen:
                    continue
                seen.add((stat.st_dev, stat.st_ino))
            total += 512 * stat.st_blocks
    return total


def in_turn(sizes: dict[str, int], room: Room, what: str) -> Iterator[list[str]]:
    """Names of files in groups, each of which there is room for once it is asked for, also while archives are unpacked.

    sizes: bytes of each file that are still to come. NoScratch: see Room.need.
    """
    some, total, largest = [], 0, 0
    for name in [*sizes, None]:
        size = sizes.get(name, 0)
        if some and (name is None or total + size > room.most // 8):
            room.need(total + largest, f"{what}, {some[0]}")
            yield some
            some, total, largest = [], 0, 0
        some.append(name)
        total, largest = total + size, max(largest, size)
