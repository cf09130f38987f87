"""The hash over the code that decides what shards hold: what changes it, and that no module is forgotten."""

import ast

import pytest

from molmo2_nemo.paths import PACKAGE
from molmo2_nemo.prepare.code_hash import CONTENT_MODULES, OTHER_MODULES, code_hash, hash_of_code

SCHEMA = (PACKAGE / "data" / "schema.py").read_text()


def test_every_module_that_is_imported_is_listed():
    """What decides the shards imports these modules, also indirectly: a new one has to be put into one of the lists."""
    found, waiting = set(), [PACKAGE / "prepare" / "dataset_shards.py"]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                package, *parts = name.split(".")
                if package == "molmo2_nemo":
                    path = PACKAGE.joinpath(*parts)
                    waiting += [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()]
    names = {str(file.relative_to(PACKAGE)) for file in found}
    assert {name for name in names if not name.startswith("prepare/converters/")} <= {*CONTENT_MODULES, *OTHER_MODULES}
    assert set(CONTENT_MODULES) <= names and "data/schema.py" in CONTENT_MODULES and "data/tasks.py" in CONTENT_MODULES


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("    part: str\n", "    part: str  # its name\n", True),
        ('"""A picture: ', '"""An image: ', True),
        ('"""What one training sample is', '"""What a sample is', True),
        ("\n\n\n", "\n\n\n\n", True),
        ("max_length=80", "max_length=81", False),
        ('"""Length of what is used."""\n', '"""Length of what is used."""\n        assert self.duration\n', False),
    ],
)
def test_statements_count_and_comments_do_not(tmp_path, old, new, same):
    assert old in SCHEMA
    before, after = tmp_path / "before.py", tmp_path / "after.py"
    before.write_text(SCHEMA)
    after.write_text(SCHEMA.replace(old, new, 1))
    assert (hash_of_code([before]) == hash_of_code([after])) is same


@pytest.mark.slow
def test_the_hash_is_of_this_code():
    converters = sorted((PACKAGE / "prepare" / "converters").glob("*.py"))
    assert code_hash() == hash_of_code([*converters, *(PACKAGE / name for name in CONTENT_MODULES)])
    assert code_hash() != hash_of_code(converters)
