"""Asking an exported model: what `tools/ask.py` is made of."""
