"""Molmo2 training on Megatron-Core: data, model, training and Hugging Face conversion."""

__version__ = "0.1.0"
