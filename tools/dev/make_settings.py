"""Write docs/settings.md, the list of all settings, from the dataclasses in molmo2_nemo/config/schema.py and conf/.

    python tools/dev/make_settings.py            # write it
    python tools/dev/make_settings.py --check    # write nothing; exit status 1 if it would change

The meaning of a key is the string after its field in schema.py. Its last sentence may name the source of the default:
"Source: ...".
"""

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
import typing

import yaml

from molmo2_nemo.config import schema
from molmo2_nemo.paths import CONF_DIR, ROOT

PAGE = ROOT / "docs" / "settings.md"
INTRODUCTION = """\
# All settings

Made by `python tools/dev/make_settings.py` from `molmo2_nemo/config/schema.py` and `conf/`: change those, not this
page.

Every key can be set on the command line of a recipe, `python recipes/stage2_sft.py train.max_steps=500`, or in a file
of `conf/`. "required" means that the schema has no default: `conf/base.yaml`, the chosen model, data and schedule set
the key. `--cfg job` prints the values of a run. "allenai/molmo2" in the last column is Ai2's public training code,
arXiv 2601.10611 the technical report of Molmo2.
"""


def meanings(cls: type) -> dict[str, tuple[str, str]]:
    """Field -> (meaning, source) of a dataclass of the schema; the source is empty where none is named.

    Raises ValueError for a field without a meaning.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    texts = {
        item.target.id: after.value.value
        for item, after in zip(body, body[1:])
        if isinstance(item, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(getattr(after.value, "value", None), str)
    }
    result = {}
    for field in dataclasses.fields(cls):
        if field.name not in texts:
            raise ValueError(f"{cls.__name__}.{field.name} in {inspect.getsourcefile(cls)} has no meaning after it.")
        meaning, _, source = " ".join(texts[field.name].split()).partition(" Source: ")
        result[field.name] = meaning, source.rstrip(".")
    return result


def rows(cls: type, prefix: str = "") -> list[tuple[str, str, str, str, str]]:
    """(key, type, default, meaning, source) of all keys below `prefix`, those of nested dataclasses included."""
    result = []
    texts = meanings(cls)
    for field in dataclasses.fields(cls):
        key, (meaning, source) = prefix + field.name, texts[field.name]
        if dataclasses.is_dataclass(field.type):
            result += rows(field.type, f"{key}.")
        else:
            result.append((key, type_name(field.type), default(field), meaning, source))
    return result


def type_name(hint) -> str:
    if typing.get_args(hint):
        return str(hint).replace("typing.", "").replace(" | None", " or null").replace("NoneType", "null")
    return "any" if hint is typing.Any else hint.__name__


def default(field: dataclasses.Field) -> str:
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return "required" if value == "???" else shown(value)


def shown(value) -> str:
    """A value as it is written on the command line."""
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix('...\n').strip()}`"


def table(heading: list[str], lines: list) -> str:
    cells = [heading, ["---"] * len(heading), *lines]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |\n" for row in cells)


def conf_table(files: list[str], columns: dict[str, dict], heading: str) -> str:
    """A column for each mapping of `columns`, a row for each key that one of them sets."""
    flat = {name: flattened(values) for name, values in columns.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    lines = [[f"`{key}`", *(shown(v[key]) if key in v else "" for v in flat.values())] for key in keys]
    return f"From {', '.join(f'`conf/{name}`' for name in files)}.\n\n" + table([heading, *flat], lines)


def flattened(values: dict, prefix: str = "") -> dict:
    """Nested mappings as dotted keys."""
    result = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("rope_scaling", "defaults"):
            result |= flattened(value, f"{prefix}{key}.")
        elif key != "defaults":
            result[prefix + key] = value
    return result


def load(name: str) -> dict:
    return yaml.safe_load((CONF_DIR / name).read_text())


def page() -> str:
    """The text of docs/settings.md."""
    parts = [INTRODUCTION]
    heading = ["key", "type", "default", "meaning", "source"]
    top = []
    texts = meanings(schema.Config)
    for field in dataclasses.fields(schema.Config):
        if not dataclasses.is_dataclass(field.type):
            meaning, source = texts[field.name]
            top.append((f"`{field.name}`", type_name(field.type), default(field), meaning, source))
    parts.append("## The run, and Megatron-Core's own fields\n\n" + table(heading, top))
    for field in dataclasses.fields(schema.Config):
        if dataclasses.is_dataclass(field.type):
            # The three stages of a schedule have the same keys.
            cls, prefix = field.type, field.name
            if cls is schema.ScheduleConfig:
                cls, prefix = schema.StageSchedule, "schedule.STAGE"
            lines = [(f"`{key}`", *rest) for key, *rest in rows(cls, f"{prefix}.")]
            parts.append(f"## `{field.name}`\n\n{' '.join(cls.__doc__.split())}\n\n{table(heading, lines)}")
    stages = schema.STAGES
    parts.append(
        "## What the stages and fine-tuning set\n\n"
        + conf_table([f"{s}.yaml" for s in stages], {s: load(f"{s}.yaml") for s in stages}, "key")
    )
    for name in sorted(path.name for path in (CONF_DIR / "schedule").glob("*.yaml")):
        values = load(f"schedule/{name}")
        parts.append(
            f"## `schedule={name.removesuffix('.yaml')}`\n\n"
            + conf_table([f"schedule/{name}"], {s: values[s] for s in stages if s in values}, "key of `schedule.STAGE`")
        )
    models = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml") if path.stem != "hf")
    files = [f"model/{name}.yaml" for name in models]
    parts.append("## Models\n\n" + conf_table(files, {m: load(f"model/{m}.yaml") for m in models}, "key of `model`"))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page would change")
    arguments = parser.parse_args()
    try:
        text = page()
    except ValueError as error:
        sys.exit(f"error: {error}")
    if PAGE.is_file() and PAGE.read_text() == text:
        print(f"{PAGE.relative_to(ROOT)} is up to date")
    elif arguments.check:
        sys.exit(f"error: {PAGE.relative_to(ROOT)} is out of date: run python tools/dev/make_settings.py.")
    else:
        PAGE.write_text(text)
        print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
