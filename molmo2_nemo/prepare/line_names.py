"""The short forms of a line, and the names that its values have in it."""

import re

from molmo2_nemo.data.schema import Place, ValueMistake, said_of, spelt
from molmo2_nemo.prepare.formats.line import Line

# Formats of labelling tools and tables, in which a point has no name of its own.
UNIT_ADVICE = re.compile(r'write "unit": "(\w+)"')
WITHOUT_NAMES = frozenset(["coco", "cvat", "label_studio", "table"])
POINT_AGAIN = re.compile(r"is point (\d+) again")


def with_groups(branch: dict, pictures: int) -> tuple[dict, bool]:
    """The branch with its points in groups, and whether it had a plain list of [x, y], which means the only image.

    Points may be {"x": ..., "y": ...}, too. ValueError: a plain list, and there are several images or none.
    """
    points = [[p["x"], p["y"]] if isinstance(p, dict) and p.keys() == {"x", "y"} else p for p in branch["points"]]
    if len(points) == 2 and all(isinstance(value, int | float) for value in points):
        raise ValueError(f"points = {points} is not a list of points: write [{points}]")
    plain = [point for point in points if isinstance(point, list) and not any(isinstance(v, list) for v in point)]
    if not points or len(plain) < len(points):
        return branch | {"points": points}, False
    if pictures != 1:
        raise ValueError(
            "points that are [[x, y], ...] are for one image: write [[image or seconds, [[x, y], ...]], ...]"
        )
    return branch | {"points": [[1, points]]}, True


class LineNames:
    """How the writer of a line calls the values of the sample that it became."""

    def __init__(self, line: Line, document: dict, grouped: set[int]):
        self.line, self.document, self.grouped = line, document, grouped

    def of(self, mistake: ValueMistake) -> str:
        """The mistake as a sentence about the line."""
        name, problem = self._name(mistake.place), mistake.problem
        if self.line.form in WITHOUT_NAMES:  # which have no such key
            problem = UNIT_ADVICE.sub(self._unit_advice, problem)
            # People count from 1, as the point that is named before.
            problem = POINT_AGAIN.sub(lambda point: f"is point {int(point[1]) + 1} again", problem)
        return said_of(name or "it", problem) if not problem[:1].isupper() else said_of(name, problem)

    def _unit_advice(self, unit: re.Match) -> str:
        if self.line.form != "table":
            return f"that of the format is {self.document['unit']}, so correct the coordinates"
        return f"write {unit[1]} into the column unit" if "unit" in self.document else f"give --unit {unit[1]}"

    def _name(self, place: Place) -> str:
        if place[:1] == ("video",):
            return spelt(place[1:])
        if place[:1] != ("branches",) or len(place) < 2:
            return spelt(place)
        number, inside = place[1], place[2:]
        if number in self.grouped and inside[:1] == ("points",):
            inside = ("points", *inside[3:])
        if self.line.form in WITHOUT_NAMES and "branches" in self.document:
            label = self.document["branches"][number].get("label", "")
            point = f"point {inside[-1] + 1} of " if inside and isinstance(inside[-1], int) else ""
            return f'{point}"{label}"'
        if "task" in self.document:
            parts = inside
        else:
            parts = ("messages", *inside) if "messages" in self.document else ("branches", number, *inside)
        names = self.line.names
        whole = spelt(parts)
        return names.get(whole) or spelt(
            tuple(names.get(part, part) if isinstance(part, str) else part for part in parts)
        )
