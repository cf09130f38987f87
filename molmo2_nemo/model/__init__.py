"""The Molmo2 architecture on Megatron-Core modules.

Shapes in names and docstrings: B rows of a micro-batch, S tokens of a row, H hidden size, N heads, D head size,
C crops, P patches of a crop, T visual tokens, W patches of a pooling window, V base vocabulary; s is this context
parallel rank's part of S, and G the number of key/value heads.
"""
