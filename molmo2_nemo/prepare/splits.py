"""Which of a user's own samples are for training, for validation and for the test.

Samples about the same picture or video, by its content, go to the same split, also through a third one that shares a
picture with each of both. A group's split follows from the SHA-256 of its content alone, so that it stays where it is
when the file grows, when lines are moved, and when files are renamed. Of a few groups chance would take too many or
none: there a bound comes first (MOST), and a group may move when others are added.
"""

import hashlib
import math
import re
from collections import defaultdict
from dataclasses import dataclass

from molmo2_nemo.prepare.own_data import OwnSample

# Names of Energon's split parts.
TRAIN, VAL, TEST = "train", "val", "test"
# For training and for validation, in percent, unless --split says otherwise.
DEFAULT = "98/2"
SUM_TOLERANCE = 1e-6
# Samples of a split at most, over what its share says. Of 1,000 pictures and a share of 5 % chance goes beyond it in
# one of 5,000 files (3.6 standard deviations).
MOST = 1.5


@dataclass(frozen=True)
class Shares:
    """Parts of the pictures, which sum to 1. asked: given on the command line, so that none of them may be empty."""

    val: float
    test: float = 0.0
    asked: bool = True

    @classmethod
    def read(cls, text: str, asked: bool = True) -> "Shares":
        """Of `TRAIN/VAL` or `TRAIN/VAL/TEST` in percent. ValueError, one sentence."""
        if not re.fullmatch(r"\d+(\.\d+)?(/\d+(\.\d+)?){1,2}", text):
            raise ValueError(f"--split {text} is not TRAIN/VAL/TEST in percent: write 90/5/5, or 95/5 for no test")
        train, val, test = (*map(float, text.split("/")), 0.0)[:3]
        if abs(train + val + test - 100) > SUM_TOLERANCE:
            raise ValueError(f"--split {text} has a sum of {train + val + test:g}, not 100: write 90/5/5")
        if not train:
            raise ValueError(f"--split {text} leaves nothing to train on: write 90/5/5")
        return cls(val / 100, test / 100, asked)


def deal(lines: list[OwnSample], shares: Shares) -> dict[str, str]:
    """Key -> split of all samples. ValueError, one sentence: there are fewer groups than splits.

    A group is for validation if its place among all hashes is below the share, for the test if it is as near to the
    other end, as long as that split does not go beyond MOST. A split that would be empty gets the smallest group of
    those that train; without --split only if that has no more than the share of the samples.
    """
    groups = sorted(_groups(lines), key=lambda group: group.place)
    split = {id(group): TRAIN for group in groups}
    for name, share, from_its_end in ((VAL, shares.val, groups), (TEST, shares.test, groups[::-1])):
        left = MOST * share * len(lines)
        for group in from_its_end:
            if _split_at(group.place, shares) == name and len(group.keys) <= left:
                split[id(group)] = name
                left -= len(group.keys)
    wanted = {TRAIN: 1.0, VAL: shares.val, TEST: shares.test}
    wanted = [name for name, share in wanted.items() if share > 0]
    for name in wanted:
        if name in split.values():
            continue
        largest = max(set(split.values()), key=lambda other: sum(value == other for value in split.values()))
        candidates = [group for group in groups if split[id(group)] == largest]
        smallest = min(candidates, key=lambda group: len(group.keys))
        most = math.ceil((shares.val if name == VAL else shares.test) * len(lines))
        if len(candidates) > 1 and (shares.asked or name == TRAIN or len(smallest.keys) <= most):
            split[id(smallest)] = name
        elif name == TRAIN:
            split = dict.fromkeys(split, TRAIN)
            break
    if shares.asked and (empty := [name for name in wanted if name not in split.values()]):
        raise ValueError(
            f"--split leaves nothing for {' and '.join(empty)}, since the {len(lines)} samples are about {len(groups)} "
            "picture(s) or video(s), and none may be in two splits: give more of them, or "
            + ("a --split with fewer parts" if len(groups) > 1 else "leave --split out")
        )
    return {key: split[id(group)] for group in groups for key in group.keys}


def in_both(lines: list[OwnSample], test: list[OwnSample]) -> dict[str, str]:
    """Key of a sample of `lines` -> key of one of `test` that has a picture or video in common with it."""
    tested = {content: sample.key for sample in test for content in sample.contents}
    found = {}
    for line in lines:
        shared = next((content for content in line.contents if content in tested), None)
        if shared is not None:
            found[line.key] = tested[shared]
    return found


@dataclass
class _Group:
    keys: list[str]
    place: float  # from 0 to below 1


def _groups(lines: list[OwnSample]) -> list[_Group]:
    """Samples that are connected by what they are about."""
    parent: dict[str, str] = {}

    def root(content: str) -> str:
        while parent.setdefault(content, content) != content:
            parent[content] = content = parent[parent[content]]
        return content

    for line in lines:
        first, *others = (root(content) for content in line.contents)
        for other in others:
            # The least becomes the root, whatever the order of the lines.
            low, high = sorted((root(first), root(other)))
            parent[high] = low
    members = defaultdict(list)
    for line in lines:
        members[root(line.contents[0])].append(line.key)
    return [_Group(keys, _place(content)) for content, keys in members.items()]


def _place(content: str) -> float:
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6]) / 2**48


def _split_at(place: float, shares: Shares) -> str:
    return VAL if place < shares.val else TEST if place >= 1 - shares.test else TRAIN
