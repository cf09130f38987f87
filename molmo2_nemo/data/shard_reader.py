"""Energon's reader of a source's shards, without its way of ending the stream at a sample that cannot be read."""

from bisect import bisect_right
from collections.abc import Callable

import numpy as np
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset

from molmo2_nemo import compat
from molmo2_nemo.storage import is_for_all


class ShardReader:
    """Samples of one source by index. It replaces Energon's reader, which ends the stream at an unreadable sample.

    What cannot be read becomes a sample without parts whose `error` says why, so that it keeps its place in the stream.
    Samples that are ahead (see progress.py) are skipped unread in the first passes of the stream. Where all of
    `workers` workers read the same samples, each of them skips its part of these appearances. Where shards come from a
    storage through the node's cache, `before` is called with the index of each sample, and StorageError is raised if
    the storage cannot be used; a shard that it does not have is unreadable as on a disk.
    """

    ERROR = "__error__"

    def __init__(
        self,
        reader: ShardInfosITarReader,
        stream: WebdatasetSampleLoaderDataset,
        ahead: np.ndarray,
        workers: int,
        before: Callable[[int], None] | None = None,
    ):
        self.reader, self.stream, self.ahead, self.workers, self.before = reader, stream, ahead, workers, before

    def __getitem__(self, index: int) -> dict | None:
        if self.before:
            self.before(index)
        config = self.stream.worker_config
        worker = config.rank * max(1, config.num_workers) + config.rank_worker_id()
        if compat.passes_made(self.stream) < (int(self.ahead[index]) + (worker + index) % self.workers) // self.workers:
            return None
        try:
            sample = self.reader[index]
        except MemoryError:
            raise
        except Exception as error:  # tarfile and the file system raise errors of many types
            if is_for_all(error):
                raise
            self.reader.close()  # or the file would stay unreadable after it is back
            self.reader.cached_offset_reader.forget()
            number = bisect_right(self.reader.shard_count_cumsum, index) - 1
            shard, first = self.reader.shard_infos[number].name, self.reader.shard_count_cumsum[number]
            sample = {
                "__key__": f"{shard}[{index - first}]",
                "__shard__": shard,
                "__restore_key__": ("Webdataset", index),
                "__sources__": (),
                self.ERROR: f"{type(error).__name__}: {error}",
            }
        for tar in self.reader.itar_files_cache.values():
            tar.members.clear()  # tarfile would keep the header of every file that it has read
        return sample
