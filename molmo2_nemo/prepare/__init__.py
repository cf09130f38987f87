"""What is done once before training: raw data sets and own annotations become shards, with blends beside them."""
