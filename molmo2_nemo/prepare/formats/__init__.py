"""Annotations in the formats that people have, read as lines of docs/own_data.md.

    files.py          what is in a file: JSON lines, a JSON array, a table, shards, an export
    conversations.py  conversations of LLaVA and ShareGPT, messages of LLaMA-Factory, ms-swift and transformers
    coco.py, cvat.py, label_studio.py, table.py, shards.py

Each reader is a function from a record, or a file, to `Row` and `Line` (line.py). None opens a picture.
"""
