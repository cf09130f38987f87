"""From raw rows to samples, a data set each: what conf/datasets.yaml names, by its name.

To add one, give it an entry in the catalogue and a line in a CONVERTERS table: a function from a row to drafts
(common.py). The rows of parquet, JSON lines, JSON and CSV files need nothing else; other files need a reader.
"""

from molmo2_nemo.data.converters import captions, image_qa, pointing, text, tracking, video_clips, video_qa
from molmo2_nemo.data.converters.common import Converter

CONVERTERS: dict[str, Converter] = {
    name: converter
    for module in (captions, image_qa, pointing, text, tracking, video_clips, video_qa)
    for name, converter in module.CONVERTERS.items()
}


def converter_of(entry: dict) -> Converter:
    """Of an entry of conf/datasets.yaml. ValueError, one sentence: why there is none."""
    name = entry["name"]
    if entry.get("group_of"):
        raise ValueError(f"{name} stands for {', '.join(entry['group_of'])}: prepare these.")
    if name in CONVERTERS:
        return CONVERTERS[name]
    if not entry.get("fields"):
        raise ValueError(
            f"{name} cannot be converted: nobody has checked the columns of its files ({entry.get('note', 'no note')})."
        )
    raise ValueError(f"{name} has no converter: add one to molmo2_nemo/data/converters (see its docstring).")
