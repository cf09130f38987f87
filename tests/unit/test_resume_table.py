"""docs/resume.md has an answer for every key, and the answers about the data are those of the loader's manifest."""

import dataclasses
import re
from dataclasses import fields, is_dataclass

from programs import REPOSITORY

from molmo2_nemo.config.schema import Config, DataConfig, StageSchedule, VisionConfig
from molmo2_nemo.data import loader, progress

ROW = re.compile(r"\| `([\w.*]+)` \| (.+) \|")
ANSWERS = dict(
    ROW.fullmatch(line).groups()
    for line in (REPOSITORY / "docs/resume.md").read_text().splitlines()
    if ROW.fullmatch(line)
)


def keys(cls, prefix: str) -> set[str]:
    found = set()
    for field in fields(cls):
        if is_dataclass(field.type):
            found |= keys(field.type, f"{prefix}{field.name}.")
        else:
            found.add(f"{prefix}{field.name}")
    return found


def test_every_key_has_an_answer():
    groups = {field.name: field.type for field in fields(Config) if is_dataclass(field.type)}
    wanted = set().union(*(keys(groups[name], f"{name}.") for name in ("train", "data", "optim", "lora", "parallel")))
    wanted |= keys(StageSchedule, "schedule.STAGE.") | {"transformer.*", "optimizer.*", "ddp.*", "model.*"}
    assert wanted == set(ANSWERS)


def test_keys_that_deal_the_data_anew_are_those_of_the_manifest():
    class Tokenizer:
        def get_vocab(self):
            return {}

    class Encoder:
        tokenizer = Tokenizer()

    data = DataConfig(**{field.name: 1 for field in fields(DataConfig) if field.default is dataclasses.MISSING})
    manifest = loader._manifest(data, VisionConfig(), [], 0, 1, 1, Encoder())
    manifest[progress.RESTART] = False
    listed = {key for key, answer in ANSWERS.items() if answer == "takes effect; the data are dealt anew"}
    assert listed == {key for key in manifest if key.startswith(("data.", "train."))} - {progress.RESTART}
