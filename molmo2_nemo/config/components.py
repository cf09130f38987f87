"""The three parts of the model that are trained with rates of their own: which parameter belongs to which."""

import re

from molmo2_nemo.config.schema import OptimConfig

COMPONENTS = ("vit", "connector", "llm")


def component_of(name: str) -> str:
    """`vit`, `connector` or `llm` for a parameter's name. The extra vocabulary's rows train with the connector."""
    name = name.removeprefix("module.")
    if name.startswith("vision.vit."):
        return "vit"
    if name.startswith("vision.connector.") or name == "embedding.extra_embedding":
        return "connector"
    return "llm"


def is_frozen(name: str, optim: OptimConfig, tied: bool) -> bool:
    """Whether a parameter is not trained: its component's switch, a pattern of `optim.freeze_patterns` in its name,
    and the base embedding with a head tied to it."""
    name = name.removeprefix("module.")
    if getattr(optim, component_of(name)).freeze or any(re.search(pattern, name) for pattern in optim.freeze_patterns):
        return True
    is_table = name == "embedding.word_embeddings.weight" or (tied and name == "output_layer.weight")
    return optim.freeze_embedding and is_table
