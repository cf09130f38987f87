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


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name, is one of LoRA's (model/lora.py)."""
    return ".lora." in name


def is_frozen(name: str, optim: OptimConfig, tied: bool, lora: bool = False) -> bool:
    """Whether a parameter is not trained: its component's switch, a pattern of `optim.freeze_patterns` in its name,
    and the base embedding with a head tied to it. lora: all that is no adapter, too."""
    name = name.removeprefix("module.")
    if lora and not is_adapter(name):
        return True
    if getattr(optim, component_of(name)).freeze or any(re.search(pattern, name) for pattern in optim.freeze_patterns):
        return True
    is_table = name == "embedding.word_embeddings.weight" or (tied and name == "output_layer.weight")
    return optim.freeze_embedding and is_table
