"""Limits of downloads, and their defaults. This module imports nothing that takes time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Limits of a download."""

    jobs: int = 32  # files that are downloaded at once
    per_host: int = 4  # files that are downloaded at once from one host
    tries: int = 3  # attempts for one file in a run
    timeout: float = 20.0  # s to connect, to get an answer, and over which `min_rate` is measured
    min_rate: float = 1024.0  # bytes/s
    max_seconds: float = 900.0  # s for one file; a large one is resumed by the next run
    max_file_bytes: int = 64 * 2**20  # of a picture or video from a list of addresses
    max_redirects: int = 6
    max_wait: float = 60.0  # s that a Retry-After header may delay a host's files
    backoff: float = 1.0  # s before the second try, doubled for each further one
    allow_private: bool = False  # addresses of this machine and its network
