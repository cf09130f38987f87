"""The mixtures of the three stages, from the catalogue.

stage1          the catalogue's fixed ratios
stage2          (and stage 3) every source, by the square root of its size
stage2_report   the groups, sizes and factors of the public fine-tuning mixture (allenai/molmo2, launch_scripts/sft.py)

The public code splits some sources into several data sets, which have sizes of their own that are not published. Here
they are one source, with the sum of their weights; they are taken to be equally large.
"""

import math
from collections import Counter

from molmo2_nemo.catalogue.datasets import Catalogue, DataSet


def blends(catalogue: Catalogue) -> dict[str, tuple[str, dict]]:
    """Name of each blend -> (its description, the blend)."""
    later = catalogue.of_stage(2)
    ratios = {e.name: {"path": e.name, "weight": rounded(100 * e.ratio)} for e in catalogue.of_stage(1)}
    return {
        "stage1": (
            "Stage 1, percent: " + ", ".join(f"{source['weight']} {name}" for name, source in ratios.items()) + ".",
            {"weighting": "fixed", "sources": ratios},
        ),
        "stage2": (
            f"Stages 2 and 3: {len(later)} sources by the square root of their size.",
            {"weighting": "sqrt", "sources": {e.name: {"path": e.name, **options(e)} for e in later}},
        ),
        "stage2_report": (
            "Stages 2 and 3 as in the report: a rate for each group, square roots of sizes inside.",
            {"groups": {name: report_group(name, group, later) for name, group in catalogue.groups.items()}},
        ),
    }


def blend_of(catalogue: Catalogue, stage: int) -> dict:
    """The blend that a stage trains on unless another is chosen."""
    return blends(catalogue)["stage1" if stage == 1 else "stage2"][1]


def rounds(blend: dict, samples: dict[str, int], rows: int) -> dict[str, tuple[float, float]]:
    """Of each source of a blend without groups: its share of the samples, and how often each of its own comes round.

    samples: of each source; one of which no number is known is left out. rows: of the whole schedule, of which each is
    taken to hold one sample; where packing puts several into a row, each comes round as many times more often.
    """
    sizes = {name: samples[name] for name in blend["sources"] if samples[name]}
    weights = {
        name: source.get("weight") or source.get("factor", 1) * math.sqrt(source.get("size") or sizes[name])
        for name, source in blend["sources"].items()
        if name in sizes
    }
    total = sum(weights.values())
    return {name: (value / total, rows * value / total / sizes[name]) for name, value in weights.items()}


def options(entry: DataSet) -> dict:
    """Options of an entry's samples in stages 2 and 3."""
    values = {}
    if entry.loss_weight not in (None, "default"):
        values["token_weight"] = float(entry.loss_weight.split("-")[1])
    for part in (entry.sft or {}).get("code_datasets", []):
        if "p_high_res" in part:
            values["high_res_probability"] = part["p_high_res"]
        if "without_style" in part:
            values["without_style"] = part["without_style"]
        if "counts_without_points" in part:
            values["counts_without_points"] = part["counts_without_points"]
    return values


def report_group(name: str, group: dict, entries: list[DataSet]) -> dict:
    """A group of the public mixture, in the form of a blend's."""
    members = [entry for entry in entries if (entry.sft or {}).get("group") == name]
    flat = any("flat_rate" in part for entry in members for part in entry.sft["code_datasets"])
    shares = flat_weights(members) if flat else roots(members)
    return {
        "rate": group["code_rate"],
        "weighting": "fixed" if flat else "sqrt",
        "sources": {e.name: {"path": e.name, **shares[e.name], **options(e)} for e in members},
    }


def flat_weights(members: list[DataSet]) -> dict[str, dict]:
    """Fixed weights. A data set of the code that holds several sources is divided in proportion to their sizes."""
    parts = [(entry, part) for entry in members for part in entry.sft["code_datasets"]]
    total_size, weights = Counter(), Counter()
    for entry, part in parts:
        total_size[part["name"]] += entry.size
    for entry, part in parts:
        weights[entry.name] += part["flat_rate"] * entry.size / total_size[part["name"]]
    return {name: {"weight": rounded(value)} for name, value in weights.items()}


def roots(members: list[DataSet]) -> dict[str, dict]:
    """Sizes that replace the true ones, and factors of the square roots, where the public code has them."""
    known = [entry for entry in members if entry.sft["code_datasets"]]
    values = {entry.name: root(entry) for entry in known}
    for entry in members:
        if entry not in known:
            # In the report, but not in the code: the size that gives it its published rate.
            rate, rates = entry.sft["rate_paper_pct"], entry.sft["group_rate_paper_pct"]
            others = sum(weight(values[other.name], other) for other in known)
            values[entry.name] = {"size": rounded((others * rate / (rates - rate)) ** 2, digits=2)}
    return values


def root(entry: DataSet) -> dict:
    """Of one source. Parts without a size have the source's size divided by their number, times their uses."""
    parts = entry.sft["code_datasets"]
    sizes = {part.get("root_size_factor") for part in parts}
    assert len(sizes) == 1, f"{entry.name}: parts with unlike sizes"
    factor = sum(part.get("sampling_rate", 1) * part.get("sub_rate", 1) for part in parts)
    if sizes != {None}:
        values = {"size": sizes.pop(), "factor": rounded(factor)}
    else:
        uses = {part.get("uses", 1) for part in parts}
        assert len(uses) == 1, f"{entry.name}: parts with unlike uses"
        values = {"factor": rounded(factor * math.sqrt(uses.pop() / len(parts)))}
    return {key: value for key, value in values.items() if (key, value) != ("factor", 1)}


def weight(values: dict, entry: DataSet) -> float:
    """In its group, as blend.py would have it if all of the source were on disk."""
    return values.get("factor", 1) * math.sqrt(values.get("size") or entry.size)


def rounded(value: float, digits: int = 4) -> float:
    """To significant digits; whole numbers as integers."""
    value = float(f"{value:.{digits}g}")
    return int(value) if value.is_integer() else value
