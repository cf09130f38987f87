"""How the raw rows of each data set of conf/datasets.yaml become drafts of samples, by its name or by its form.

To add one of a known form (forms.py), give it an entry in the catalogue. One of another form needs a line in a
CONVERTERS table, too: a function from a row to drafts (common.py). Rows of parquet, JSON lines, JSON and CSV files need
nothing else; other files need a reader.
"""

from molmo2_nemo.prepare.converters import (
    captions,
    evaluation,
    evaluation_tracking,
    evaluation_video,
    image_qa,
    pointing,
    text,
    tracking,
    video_clips,
    video_qa,
)
from molmo2_nemo.prepare.converters.common import Converter
from molmo2_nemo.prepare.converters.forms import converter_by_form

CONVERTERS: dict[str, Converter] = {
    name: converter
    for module in (
        captions,
        evaluation,
        evaluation_tracking,
        evaluation_video,
        image_qa,
        pointing,
        text,
        tracking,
        video_clips,
        video_qa,
    )
    for name, converter in module.CONVERTERS.items()
}


def converter_of(entry: dict) -> Converter:
    """The converter of an entry of conf/datasets.yaml. ValueError, one sentence: why there is none."""
    name = entry["name"]
    if name in CONVERTERS and not entry.get("convert"):
        return CONVERTERS[name]
    if not entry.get("fields"):
        note = f" ({entry['note'].rstrip('.')})" if entry.get("note") else ""
        raise ValueError(f"{name} cannot be converted: its columns are not known{note}.")
    converter = converter_by_form(entry)
    if converter is None:
        raise ValueError(
            f"{name} has the columns {', '.join(entry['fields'])}, which are those of no known form: describe it "
            "with convert in its entry, or add a converter (molmo2_nemo/prepare/converters)."
        )
    return converter
