"""A small procedural world to train on: coloured shapes on grey backgrounds, still and moving, with true labels.

`write.generate` writes one Energon WebDataset per name in `write.SETS`. A sample is `{key}.json`, an Example of
molmo2_nemo.data.schema, and its media parts (`{key}.img0.png`, ..., or `{key}.video.mp4`). The sets whose names begin
with task_ hold tasks, of every kind there is; the others hold conversations.

Every sample is drawn from a generator seeded by (seed, set, split, index). Held-out samples also show combinations of
objects that no training sample of the set shows: a hash of the combination decides the split it may appear in.
"""
