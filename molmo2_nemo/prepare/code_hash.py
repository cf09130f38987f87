"""A hash of the code that decides what a data set's shards hold, so that old and new code are not mixed in one set.

It is a part of each set's fingerprint: after a change of the code, an unfinished set is started again, and a finished
one is named as out of date. Only statements count. Comments, docstrings and line breaks do not change the hash.
"""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from molmo2_nemo.paths import PACKAGE

# Modules whose code decides which rows become samples, and the bytes of these; all of converters/ is added.
CONTENT_MODULES = (
    "catalogue/forms.py",  # columns of rows
    "catalogue/raw.py",  # reading rows, finding media
    "catalogue/resized.py",  # sizes of resized pictures, of which points in pixels are
    "data/counting.py",  # checking answers
    "data/frames.py",  # checking answers
    "data/pictures.py",  # reading pictures
    "data/points.py",  # checking answers
    "data/schema.py",
    "data/tasks.py",  # checking answers
    "data/video.py",  # reading frames
    "limits.py",
    "prepare/annotations.py",
    "prepare/clock_faces.py",
    "prepare/dataset_shards.py",
    "prepare/draft_to_sample.py",
    "prepare/find_media.py",
    "prepare/media.py",
    "prepare/shard_plan.py",
    "prepare/spool.py",
    "prepare/webdataset.py",
)
# What these modules import, but which changes nothing in a sample.
OTHER_MODULES = (
    "__init__.py",
    "catalogue/__init__.py",
    "catalogue/commands.py",  # what messages say
    "catalogue/parked.py",  # where bytes are
    "config/__init__.py",
    "config/components.py",
    "config/errors.py",
    "config/schema.py",  # defaults of training
    "data/__init__.py",
    "data/prompts.py",  # questions, which are drawn while training
    "files.py",
    "paths.py",
    "prepare/__init__.py",
    "prepare/code_hash.py",
    "prepare/records.py",
    "storage.py",
)


@cache
def code_hash() -> str:
    """The hash of this installation's code."""
    converters = sorted((PACKAGE / "prepare" / "converters").glob("*.py"))
    return hash_of_code([*converters, *(PACKAGE / name for name in CONTENT_MODULES)])


def hash_of_code(files: Iterable[Path]) -> str:
    """SHA-256 of the syntax trees of Python files, in their order, without docstrings. Depends on Python's version."""
    dumps = [ast.dump(_without_docstrings(ast.parse(file.read_text(encoding="utf-8")))) for file in files]
    return hashlib.sha256("\0".join(dumps).encode()).hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                del node.body[0]
    return tree
