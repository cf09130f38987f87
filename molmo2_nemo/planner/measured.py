"""Replace assumptions by what tools/bench/gpu.py measured: its lines of JSON, as they are. Imports no torch.

Taken are the sections `attention` (kernel flex), `vision` and `step`. What was measured is the same in both columns of
the table, so that the range narrows to what was not.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, StrictBool, ValidationError

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


Spec = Literal["local", "transformer_engine"]


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class AttentionRow(_Line):
    tokens: PositiveInt
    kernel: str
    tflops: PositiveFloat | None = None


class VisionRow(_Line):
    layer_spec: Spec
    recompute: StrictBool
    crops: PositiveInt
    ms: PositiveFloat
    crops_per_second: PositiveFloat


class StepRow(_Line):
    layer_spec: Spec
    precision: str
    recipe: str | None
    recompute: StrictBool
    extrapolated: StrictBool
    layers: PositiveInt
    tokens: PositiveInt
    ms: PositiveFloat


ROWS = {"attention": AttentionRow, "vision": VisionRow, "step": StepRow}  # those that are taken


class Section(_Line):
    """A line of the file. rows: dictionaries, those of ROWS are checked where they are measured."""

    section: str
    tiny: StrictBool
    device: str
    rows: list[dict]


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
    if not lines:
        raise ConfigError(f"--measured {file} is empty: write it with tools/bench/gpu.py --out.")
    for number, line in enumerate(lines, 1):
        try:
            line = Section.model_validate(line)
            rows = [row for row in line.rows if "not_measured" not in row]
            if line.section in ROWS:
                rows = [ROWS[line.section].model_validate(row).model_dump() for row in rows]
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"])) or "the line"
            raise ConfigError(
                f"--measured {file}, line {number} is not of tools/bench/gpu.py ({where}: {problem['msg']}): write it "
                "with its --out."
            ) from None
        if line.tiny:
            raise ConfigError(f"--measured {file}, line {number} has toy sizes: run tools/bench/gpu.py without --tiny.")
        if line.device != device:
            raise ConfigError(
                f"--measured {file} is of {line.device}, the plan of {device}: add --gpu '{line.device}'."
            )
        sections.setdefault(line.section, []).extend(rows)
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
    rows = [row for row in sections.get("attention", []) if row["kernel"] == FLEX and row["tflops"]]
    if not rows:
        return columns, "attention: assumed, since the file has no row of flex"
    row = min(rows, key=lambda row: abs(row["tokens"] - job.seq_length))
    share = row["tflops"] * 1e12 / peak_flops(device, "bf16")
    if share > 1:
        raise ConfigError(
            f"--measured has {row['tflops']:,} TFLOP/s of attention at {row['tokens']:,} tokens, more than the peak of "
            f"{device}: measure again, or leave the section attention out of the file."
        )
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
    if layer <= 0:
        raise ConfigError(
            f"--measured has {high['ms']} ms for a step of {high['layers']} layers and {low['ms']} for one of "
            f"{low['layers']}: measure again, or leave the section step out of the file."
        )
    like = _like(low, f"train.precision={low['precision']}", f"data.seq_length={low['tokens']}")
    found = []
    for column in columns:
        seconds = part_seconds(like, replace(column, decoder_factor=1.0), device)
        whole = (seconds["decoder"] + seconds["decoder attention"]) / like.config.model.num_layers
        found.append(replace(column, decoder_factor=layer / whole))
    return tuple(found), f"decoder: {layer * 1e3:.1f} ms a layer and row, measured with {low['layer_spec']} layers"
