"""The model card of an export (README.md): what it was made of, as far as the checkpoint and its run say it.

Nothing is guessed: what is not known is said to be. Folders are named without their paths, which nobody else has. The
YAML at the head has the keys of the Hub's model cards (huggingface_hub.ModelCardData).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.catalogue.datasets import DataSet, load_catalogue
from molmo2_nemo.config.components import COMPONENTS
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.report import Run, read_metrics
from molmo2_nemo.text import dotted

# On the Hub (arXiv 2601.10611): a folder of one of these names is taken for it.
PUBLISHED = ("allenai/Molmo2-4B", "allenai/Molmo2-8B", "allenai/Molmo2-O-7B")
# A folder in the cache of huggingface_hub: models--OWNER--NAME/snapshots/REVISION.
_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
# Stages that follow one another; a chain that goes on longer goes in circles.
_MOST_STAGES = 20
# Dotted keys of a run's configuration that the card tells.
_SETTINGS = (
    "data.seq_length",
    "data.max_crops_per_image",
    "data.max_frames",
    "train.global_batch_size",
    "optim.vit.lr",
    "optim.connector.lr",
    "optim.llm.lr",
    "optim.decay",
    "optim.weight_decay",
    "train.seed",
    "lora.rank",
    "lora.targets",
    *(f"optim.{component}.freeze" for component in COMPONENTS),
)


def _told(settings: dict[str, object]) -> dict[str, object]:
    """Those of _SETTINGS that are known and mean something: no rate of what was frozen, no targets without adapters."""
    frozen = {component for component in COMPONENTS if settings.get(f"optim.{component}.freeze")}
    left_out = {f"optim.{component}.{'lr' if component in frozen else 'freeze'}" for component in COMPONENTS}
    left_out |= set() if settings.get("lora.rank") else {"lora.rank", "lora.targets"}
    return {key: settings[key] for key in _SETTINGS if key in settings and key not in left_out}


USAGE = "## How to use it"  # the last section


@dataclass
class Stage:
    """A training run that led to the model."""

    name: str
    step: int
    tokens: int | None
    data: dict[str, dict[str, int]]  # source -> counts
    settings: dict[str, object]  # of _SETTINGS, those that are known


@dataclass
class Origin:
    """Stages, the last first, and the weights that the first of them began with."""

    stages: list[Stage] = field(default_factory=list)
    start: list[str] | None = None  # folders; []: random weights; None: not known


def model_card(checkpoint: Path, title: str, layout: str, license: str | None = None) -> str:
    """The text of README.md for an export of a complete checkpoint.

    title: its heading; layout: of layouts.LAYOUTS; license: the Hub's name of one, None: not chosen. Raises ConfigError
    for a checkpoint without a readable marker.
    """
    origin, catalogue = trace(checkpoint), {entry.name: entry for entry in load_catalogue().sets}
    names = list(dict.fromkeys(name for stage in origin.stages for name in stage.data))
    bases = [found for folder in origin.start or [] if (found := hub_name(folder))]
    repositories = [repo for name in names if (repo := hub_repository(catalogue.get(name)))]
    head = ModelCardData(
        license=license,
        base_model=bases[0] if len(bases) == 1 else bases or None,
        datasets=list(dict.fromkeys(repositories)) or None,
        pipeline_tag="image-text-to-text",
        library_name="transformers",
        tags=["molmo2"],
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {plain(title)}",
        "A vision-language model of the Molmo2 architecture (images, several images, video, pointing and tracking), "
        "trained with molmo2-nemo. This card was written by the export: it says what the checkpoint and its run say.",
        "## Licence\n\n" + licence_text(license),
        "## Weights it began with\n\n" + start_text(origin),
        *(stage_text(stage) for stage in reversed(origin.stages)),
        "## Data\n\n" + data_text(origin, names, catalogue),
        "## Scores\n\n" + scores_text(checkpoint),
        f"{USAGE}\n\n" + usage_text(layout),
    ]
    return "\n\n".join(parts) + "\n"


def trace(checkpoint: Path) -> Origin:
    """The runs behind a checkpoint, as far as the folders that `train.init_from` names are still there."""
    origin = Origin()
    for _ in range(_MOST_STAGES):
        marker, settings = checkpoint_dir.read_marker(checkpoint), dotted(configuration(checkpoint))
        if marker.get("stage") == "imported":
            origin.start = str(marker.get("source") or "").split(" + ") if marker.get("source") else None
            return origin
        origin.stages.append(
            Stage(
                name=str(marker.get("stage") or "training"),
                step=marker["step"],
                tokens=marker.get("tokens_seen"),
                data={name: counts for name, counts in (marker.get("data") or {}).items() if counts.get("examples")},
                settings=_told(settings),
            )
        )
        if "train.init_from" not in settings:
            return origin
        given = settings["train.init_from"]
        if not isinstance(given, str):
            origin.start = [str(folder) for folder in given or []]
            return origin
        try:
            checkpoint = checkpoint_dir.resolve(given)
            checkpoint_dir.read_marker(checkpoint)
        except (ConfigError, OSError):  # a Hugging Face folder, or a run that is no longer there
            origin.start = [given]
            return origin
    return origin


def configuration(checkpoint: Path) -> dict:
    """What the checkpoint's run was told; empty where the checkpoint carries nothing of it."""
    try:
        found = yaml.safe_load((checkpoint / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def hub_name(folder: str) -> str | None:
    """The Hub's name of a folder, where its own name tells it."""
    if found := _IN_CACHE.search(f"{folder}/"):
        return f"{found[1]}/{found[2]}"
    return next((name for name in PUBLISHED if Path(folder).name == name.split("/")[1]), None)


def hub_repository(entry: DataSet | None) -> str | None:
    hub = entry.source.hf if entry is not None and entry.source.kind == "hf" else None
    return hub.repo if hub is not None else None


def plain(text: object) -> str:
    """Text that means nothing else in Markdown or in a table."""
    return re.sub(r"([|`*<>\[\]#\\])", r"\\\1", " ".join(str(text).split()))


def licence_text(license: str | None) -> str:
    chosen = f"{plain(license)}." if license else "Not chosen by who exported the model."
    return (
        f"{chosen} The weights that it began with and the data sets below have licences of their own, which may not "
        "allow every use, commercial use for one."
    )


def start_text(origin: Origin) -> str:
    if origin.start is None:
        return "Not known."
    if not origin.start:
        return "Random weights."
    lines = []
    for folder in origin.start:
        name = hub_name(folder)
        own = f"a folder named {plain(Path(folder).name)}, of which the checkpoint says no more"
        lines.append(f"- [{name}](https://huggingface.co/{name})" if name else f"- {own}")
    return "\n".join(lines)


def stage_text(stage: Stage) -> str:
    tokens = f", {stage.tokens:,} tokens" if stage.tokens is not None else ""
    rows = [f"| `{key}` | {plain(value)} |" for key, value in stage.settings.items()]
    table = "\n".join(["| setting | value |", "|---|---|", *rows]) if rows else "Its settings are not known."
    return f"## Training: {plain(stage.name)}\n\nStep {stage.step:,}{tokens}.\n\n{table}"


def data_text(origin: Origin, names: list[str], catalogue: dict[str, DataSet]) -> str:
    if not names:
        return "The checkpoint does not say which data it was trained on."
    rows = ["| data set | samples seen | licence |", "|---|---|---|"]
    for name in names:
        entry, seen = catalogue.get(name), sum(stage.data.get(name, {}).get("examples", 0) for stage in origin.stages)
        link = hub_repository(entry)
        shown = f"[{plain(name)}](https://huggingface.co/datasets/{link})" if link else plain(name)
        licence = entry.license or "not known" if entry is not None else "not known: it is no set of the catalogue"
        page = f", [where it would be]({entry.license_page})" if entry is not None and entry.license_page else ""
        rows.append(f"| {shown} | {seen:,} | {licence}{page} |")
    more = "" if origin.start == [] else "\n\nWhat the weights that it began with were trained on is not counted."
    return "\n".join(rows) + more


def scores_text(checkpoint: Path) -> str:
    """What the run measured on held-out samples at the checkpoint's step."""
    folder, step = checkpoint.resolve().parent.parent, checkpoint_dir.read_marker(checkpoint)["step"]
    try:
        with (folder / "metrics.jsonl").open(encoding="utf-8", errors="replace") as lines:
            run = Run(folder)
            read_metrics(lines, run)
    except OSError:
        return "None: the checkpoint lies in no run that tells of any."
    records = {kind: record for kind in ("validation", "answers") for record in run.of(kind) if record["step"] == step}
    rows = []
    if isinstance(loss := records.get("validation", {}).get("loss"), float):
        rows.append(f"| loss on held-out samples of the training data sets | {loss:.4f} |")
    for metric, value in records.get("answers", {}).items():
        if isinstance(value, dict) and isinstance(value.get("all"), int | float):
            rows.append(f"| {plain(metric)} of answers to held-out questions | {value['all']:.4f} |")
    if not rows:
        return f"None: the run measured nothing on held-out samples at step {step:,}."
    few = "They come from a few held-out samples and were measured while the model was trained: no benchmark's results."
    return "\n".join(["| measured | value |", "|---|---|", *rows, "", few])


_TRANSFORMERS = """With transformers 5.20 or newer:

```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER", dtype="auto").to(device)
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
messages = [
    {"role": "user", "content": [{"type": "image", "path": "photo.png"}, {"type": "text", "text": "What is it?"}]}
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(device)
tokens = model.generate(**inputs, max_new_tokens=200)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
# The second option: of vLLM's own test of Molmo2 (v0.33.0, tests/models/registry.py), whose image tokens see each other
# in both directions and so must be computed at once.
_VLLM = """With vLLM and transformers 5.20. The first option lets it run configuration_molmo2.py, which gives the
settings of config.json the names that vLLM asks for:

```
vllm serve THIS_FOLDER --trust-remote-code --max-num-batched-tokens 36864
```"""
_NOT_SERVED = "vLLM does not read this layout of config.json: export with `--layout released` for it."


def usage_text(layout: str) -> str:
    return f"{_TRANSFORMERS}\n{_VLLM if layout == 'released' else _NOT_SERVED}"
