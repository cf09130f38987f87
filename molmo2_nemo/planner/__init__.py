"""What a run needs and how long it takes, by arithmetic alone: parameters, memory, FLOPs, time, traffic."""
