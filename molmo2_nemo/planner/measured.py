"""Replace assumptions by what tools/bench/gpu.py measured: its lines of JSON, as they are. Imports no torch.

Taken are the sections `attention` (kernel flex), `vision` and `step`. What was measured is the same in both columns of
the table, so that the range narrows to what was not.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from molmo2_nemo.command_line import compose
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.planner.efficiency import Assumptions
from molmo2_nemo.planner.flops import peak_flops
from molmo2_nemo.planner.memory import Job
from molmo2_nemo.planner.step_time import VISION, part_seconds

FLEX = "flex"
# What the sections vision and step ran: one row of molmo2_4b on one GPU. Its pictures are of mixed sizes; frames stand
# in for them here.
MODEL = ["schedule=report", "model=molmo2_4b", "train.global_batch_size=1", "train.vision_chunk_crops=0"]
MODEL += ["train.vision_recompute=false", "parallel.context_parallel_size=1"]


@dataclass
class Measured:
    """columns: the table with what was measured; taken: sentences on what that is."""

    columns: tuple[Assumptions, Assumptions]
    taken: list[str]


def read(file: Path, device: str) -> dict[str, list[dict]]:
    """Rows with figures by section. Raises ConfigError for a file that is not of that tool, or of another device."""
    sections: dict[str, list[dict]] = {}
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--measured {file} cannot be read ({error.strerror}): name the file of --out.") from None
    except ValueError:
        raise ConfigError(
            f"--measured {file} is no file of JSON lines: write it with tools/bench/gpu.py --out."
        ) from None
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not {"section", "tiny", "device", "rows"} <= set(line):
            raise ConfigError(
                f"--measured {file}, line {number} is not of tools/bench/gpu.py: write it with its --out."
            )
        if line["tiny"]:
            raise ConfigError(f"--measured {file}, line {number} has toy sizes: run tools/bench/gpu.py without --tiny.")
        if line["device"] != device:
            raise ConfigError(
                f"--measured {file} is of {line['device']}, the plan of {device}: add --gpu '{line['device']}'."
            )
        rows = [row for row in line["rows"] if "not_measured" not in row]
        sections.setdefault(line["section"], []).extend(rows)
    return sections


def with_measured(file: Path, job: Job, device: str, columns: tuple[Assumptions, Assumptions]) -> Measured:
    """The table's columns for this job with what the file has for it. Raises ConfigError."""
    sections, taken = read(file, device), []
    for take in (_attention, _vision, _decoder):
        columns, sentence = take(sections, job, device, columns)
        taken.append(sentence)
    return Measured(columns, taken)


def _attention(sections, job: Job, device: str, columns):
    """Share of the peak of the visible pairs, at the length that is nearest to a row's."""
    rows = [row for row in sections.get("attention", []) if row["kernel"] == FLEX]
    if not rows:
        return columns, "attention: assumed, since the file has no row of flex"
    row = min(rows, key=lambda row: abs(row["tokens"] - job.seq_length))
    share = row["tflops"] * 1e12 / peak_flops(device, "bf16")
    columns = tuple(replace(column, decoder_attention=share) for column in columns)
    return columns, f"attention: {share:.0%} of the peak, measured at {row['tokens']:,} tokens"


def _like(row: dict, *overrides: str) -> Job:
    """The planner's job for a row of the file."""
    return Job(compose("stage2", [*MODEL, f"parallel.layer_spec={row['layer_spec']}", *overrides]), 1)


def _spec(rows: list[dict], job: Job) -> list[dict]:
    """Those with the job's layers, else those with the others."""
    return [row for row in rows if row["layer_spec"] == job.layer_spec] or rows


def _vision(sections, job: Job, device: str, columns):
    """Forward and backward pass of the section's crops, without recomputation, against the same by the table."""
    rows = _spec([row for row in sections.get("vision", []) if not row["recompute"]], job)
    if not rows:
        return columns, "vision: assumed, since the file has no row of it"
    row = rows[0]
    like = _like(row)
    more = row["crops"] / like.work.crops
    scaled = {name: more * getattr(like.work, name) for name in ("crops", "visual_tokens", "pooled_patches")}
    like.work = replace(like.work, **scaled)
    found = []
    for column in columns:
        seconds = part_seconds(like, replace(column, vision_factor=1.0), device)
        found.append(replace(column, vision_factor=row["ms"] / 1e3 / sum(seconds[part] for part in VISION)))
    return tuple(found), f"vision: {row['crops_per_second']:,.0f} crops/s, measured with {row['layer_spec']} layers"


def _decoder(sections, job: Job, device: str, columns):
    """A layer is the difference of two depths; its attention is the table's."""
    precision = job.precision if job.precision == "fp8" else "bf16"
    rows = [row for row in sections.get("step", []) if not row["extrapolated"] and not row["recompute"]]
    rows = _spec([row for row in rows if row["precision"] == precision], job)
    kept = [row for row in rows if (row["layer_spec"], row["recipe"]) == (rows[0]["layer_spec"], rows[0]["recipe"])]
    if len({row["layers"] for row in kept}) < 2:
        return columns, f"decoder: assumed, since the file has no steps of two depths in {precision}"
    low, high = sorted(kept, key=lambda row: row["layers"])[:2]
    layer = (high["ms"] - low["ms"]) / 1e3 / (high["layers"] - low["layers"])
    like = _like(low, f"train.precision={low['precision']}", f"data.seq_length={low['tokens']}")
    found = []
    for column in columns:
        seconds = part_seconds(like, replace(column, decoder_factor=1.0), device)
        whole = (seconds["decoder"] + seconds["decoder attention"]) / like.config.model.num_layers
        found.append(replace(column, decoder_factor=layer / whole))
    return tuple(found), f"decoder: {layer * 1e3:.1f} ms a layer and row, measured with {low['layer_spec']} layers"
