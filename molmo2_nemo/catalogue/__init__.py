"""The catalogue of public data sets: what conf/datasets.yaml says, what lies on the disk of it, and its mixtures."""
