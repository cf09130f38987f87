"""Descriptions of pictures and videos."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.prepare.converters.common import (
    Converter,
    Draft,
    Drop,
    caption,
    clip,
    find_all,
    of_youtube,
    pick,
    question,
    read_json,
    together,
)

# Rows of Molmo2-Cap below this are not used (molmo2: vixmo3_top_level_captions_min_3).
MIN_SCORE = 3
# Of OVIS' frames as Video Localized Narratives has them (molmo2: OVIS/train_mp4_5fps).
OVIS_FPS = 5
OF_OBJECT = (
    "Describe what happens to the {name}.",
    "What does the {name} do in the video?",
    "Tell what you see of the {name}.",
    "Follow the {name} and describe it.",
)


def pixmo_cap(row: dict) -> Iterator[Draft]:
    """The caption, and the spoken descriptions, one of which is drawn each time."""
    branches = [caption(row["caption"], "long_caption")]
    transcripts = [text for text in row.get("transcripts") or [] if text and text.strip()]
    if transcripts:
        branches.append(caption(transcripts, "transcript"))
    yield Draft(branches, [row["image_url"]])


def molmo2_cap_rows(raw: RawSource, split: str | None) -> Iterator[dict]:
    """Koala calls its videos otherwise: koala_meta.zip has NAME.json with the address of each."""
    names = {}
    for path in find_all(raw, "koala_meta/*.json"):
        names.setdefault(read_json(path).get("url", "").partition("v=")[2], path.stem)
    for row in raw.rows(split):
        yield row | {"koala": names.get(row["video_id"])}


def molmo2_cap(row: dict) -> Iterator[Draft | Drop]:
    """Up to three captions of different lengths of one clip."""
    score = row.get("annotation_score")
    if score is not None and score < MIN_SCORE:
        yield Drop(f"annotation_score below {MIN_SCORE}")
        return
    styles = {
        "video_caption": "video_short_caption",
        "merged_caption": "video_merged_caption",
        "video_frame_merged_caption": "video_long_caption",
    }
    branches = [caption(row[name], style) for name, style in styles.items() if (row.get(name) or "").strip()]
    if branches:
        # LLaVA-Video-178K's names of ActivityNet and of YouTube begin with v_ and ytb_.
        names = [*of_youtube(row["video_id"]), *(f"{prefix}{row['video_id']}" for prefix in ("v_", "ytb_"))]
        names.append(row.get("koala"))
        video = clip(list(filter(None, names)), row.get("video_start"), row.get("video_end"), may_be_cut=True)
        yield Draft(branches, video=video)
    else:
        yield Drop("no caption")


def localized_narratives(row: dict) -> Iterator[Draft | Drop]:
    """What each actor of a video does."""
    branches = []
    for name, text in together(row["actor_names"], row["captions"]):
        if (text or "").strip():
            asked = pick(OF_OBJECT, row["id"], name).format(name=name.strip().lower())
            branches.append(question(asked, text, "video_object_caption"))
        else:
            yield Drop("no caption")
    if not branches:
        return
    video = clip(row["video"])
    if row["video"].startswith("OVIS/"):
        video.frames, video.fps = [PurePosixPath(row["video"]).stem], OVIS_FPS
    yield Draft(branches, video=video)


def motion_caption(row: dict) -> Iterator[Draft]:
    names = [f"MotionBenchCaption-train/videos/{row['video_path']}", row["video_path"]]
    yield Draft([caption(row["motion_caption"], "video_motion_caption")], video=clip(names))


CONVERTERS = {
    "pixmo-cap": Converter(pixmo_cap),
    "Molmo2-Cap": Converter(molmo2_cap, molmo2_cap_rows),
    "video-localized-narratives-caption": Converter(localized_narratives),
    "motionbench": Converter(motion_caption),
}
