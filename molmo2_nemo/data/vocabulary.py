"""Which tokenizer a model was trained with: another one, even of the same size, gives its embedding other meanings."""

import hashlib
import json
from pathlib import Path

# Where the manifest of a checkpoint's data state (progress.py) has the digest.
TOKENIZER = "tokenizer"
# Bytes; a manifest has a few hundred for each source.
MAX_HEADER = 2**24


def digest(tokenizer) -> str:
    """Of a transformers tokenizer's tokens and their ids."""
    return hashlib.sha256(repr((sorted(tokenizer.get_vocab().items()),)).encode()).hexdigest()[:16]


def trained_with(folder: Path) -> str | None:
    """The digest of the tokenizer that a checkpoint or a Hugging Face folder comes with; None: it does not say.

    Of a data state only the header is read, which is JSON.
    """
    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        try:
            return digest(AutoTokenizer.from_pretrained(folder))
        except Exception:  # whatever a tokenizer that nobody here uses raises
            return None
    for state in sorted(folder.glob("loader_dp*.state"))[:1]:
        try:
            with open(state, "rb") as file:
                return str(json.loads(file.readline(MAX_HEADER))["manifest"][TOKENIZER])
        except (OSError, ValueError, KeyError, TypeError):  # progress.read says so where the state is needed
            return None
    return None
