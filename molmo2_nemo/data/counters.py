"""Names of what is counted of a source's samples: by the encoder, in the training log, in reports."""

# Every sample ends up in `examples` or in one of DROPPED.
COUNTERS = (
    "examples",
    "branches",
    "tokens",
    "loss_tokens",
    "images",
    "frames",
    "crops",
    "truncated",  # branches whose end was cut off
    "dropped_branches",  # branches without room for a single loss token
    "frames_thinned",  # frames left out because they did not fit beside the text, or into a row
    "videos_thinned",  # videos with such frames
    "images_shrunk",  # images that got fewer crops than data.max_crops_per_image for the same reason
    "images_left_out",  # images beyond data.max_images
    "videos_cut",  # videos of which only a part is shown, at the rate of its annotations
    "unseen_points",  # points of answers, and of tracks, that were left out because no frame shows them
    "moved_times",  # times in answers that became the time of a frame that is shown
    "recounted_answers",  # answers with a smaller number because of points left out
    "unseen_branches",  # branches left out because no frame shows what they are about
    "dropped_malformed",
    "dropped_undecodable",
    "dropped_unreadable",
    "dropped_too_long",
    "dropped_too_many_crops",
    "dropped_not_shown",  # nothing is left of it, because no frame, or kept image, shows what it is about
    "dropped_too_many_branches",
)
# What was changed because of the images and frames that are shown.
CHOSEN = COUNTERS[COUNTERS.index("images_left_out") : COUNTERS.index("unseen_branches") + 1]
# What was left out or changed of samples that are used, in words for a list of samples.
SHORTENED = {
    "truncated": "branches without their end",
    "dropped_branches": "branches left out",
    "frames_thinned": "frames left out",
    "images_shrunk": "images with fewer crops",
    "images_left_out": "images left out",
    "videos_cut": "a part of the video",
    "unseen_points": "points that no frame shows",
    "moved_times": "times moved to a frame",
    "recounted_answers": "answers counted again",
    "unseen_branches": "branches about nothing shown",
}
# Samples that were left out, by reason.
DROPPED = tuple(name for name in COUNTERS if name.startswith("dropped_") and name != "dropped_branches")
# Those of them that are broken: the JSON, the pixels, or the file itself.
BROKEN = ("dropped_malformed", "dropped_undecodable", "dropped_unreadable")
