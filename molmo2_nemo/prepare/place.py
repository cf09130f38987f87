"""Where data sets are put that were prepared in parts: a folder in object storage, or a local one, by its address.

    OUT/NAME/                    as tools/prepare.py makes it on a disk; .nv-meta/.info.json comes last
    OUT/.prepare/lock.json       the run that is at work here
    OUT/.prepare/NAME/parked/    raw files that a run has put away, until the set is made

A data set without its .info.json is none for Energon, so that nobody trains on half of one.
"""

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from molmo2_nemo import storage
from molmo2_nemo.files import LockHeld, locked
from molmo2_nemo.prepare.dataset_shards import PROVENANCE
from molmo2_nemo.prepare.records import Document, Provenance, ShardCounts

META = ".nv-meta"
# The file by which Energon knows a data set (megatron.energon 7.4.1, flavors/webdataset/config.py).
MARKER = f"{META}/.info.json"
# Files of a data set that this program makes, and removes if they are not of the new one.
OURS = re.compile(rf"(train|val)-\d{{5}}\.tar(\.idx)?|{re.escape(META)}/.+|{re.escape(PROVENANCE)}")
# Seconds between two notes in the lock that the run is alive, and after which one without a note counts as ended.
BEAT, STALE = 60, 900


class Holder(Document):
    """lock.json."""

    token: str
    host: str
    pid: int
    home: str  # its scratch
    time: float  # of the last note, seconds since 1970


@dataclass
class Place:
    """The folder `out`, an address or a path; `home` is this run's scratch."""

    out: str
    home: Path
    _token: str = field(default_factory=lambda: uuid.uuid4().hex)
    _noted: float = 0.0
    _busy: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def of(self, *parts: str) -> str:
        return storage.join(self.out, *parts)

    # -- the lock

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only run at work here. LockHeld: another one is, here or in the same scratch."""
        with locked(self.home / ".lock"):
            lock = self.of(".prepare", "lock.json")
            self._refuse_another(lock)
            self._note(lock)
            self._refuse_another(lock)  # which had begun at the same moment
            try:
                yield
            finally:
                with suppress(storage.StorageError):
                    if self._held(lock) in (None, self._token):
                        storage.delete(lock)

    def _note(self, lock: str) -> None:
        holder = Holder(
            token=self._token, host=os.uname().nodename, pid=os.getpid(), home=str(self.home), time=time.time()
        )
        storage.write(lock, json.dumps(holder.model_dump()).encode())
        self._noted = time.monotonic()

    def _holder(self, lock: str) -> Holder | None:
        try:
            return Holder.model_validate_json(storage.read(lock))
        except ValueError as error:
            if storage.is_for_all(error):
                raise
            return None

    def _held(self, lock: str) -> str | None:
        holder = self._holder(lock)
        return holder and holder.token

    def _refuse_another(self, lock: str) -> None:
        holder = self._holder(lock)
        if holder is None or holder.token == self._token or time.time() - holder.time > STALE:
            return
        if holder.host == os.uname().nodename:
            # Whoever has the same scratch has ended, since this run holds its lock.
            if holder.home == str(self.home) or not Path(f"/proc/{holder.pid}").exists():
                return
        raise LockHeld(
            f"another tools/prepare.py (process {holder.pid} of {holder.host}) is at work on {storage.shown(self.out)}"
            f": wait for its end, or, if it was killed, {STALE // 60} minutes, or remove {storage.shown(lock)}"
        )

    def beat(self) -> None:
        """Note in the lock, once a minute, that this run is alive. LockHeld: another run has taken the lock."""
        if time.monotonic() - self._noted < BEAT or not self._busy.acquire(blocking=False):
            return
        try:
            lock = self.of(".prepare", "lock.json")
            self._refuse_another(lock)
            self._note(lock)
        finally:
            self._busy.release()

    # -- data sets

    def provenance(self, name: str) -> Provenance | None:
        """Of a data set that is there as a whole, as far as its marker says; None: there is none. StorageError."""
        if not storage.exists(self.of(name, MARKER)):
            return None
        try:
            return Provenance.model_validate_json(storage.read(self.of(name, PROVENANCE)))
        except ValueError as error:
            if storage.is_for_all(error):
                raise
            raise ValueError(
                f"{storage.shown(self.of(name))} is there and was not made by this tool: move it away"
            ) from None

    def damage(self, name: str, made: Provenance, read_bytes: bool) -> str | None:
        """The first shard or index that is not there as it was made, by its size and, if asked, its checksum."""
        there = storage.list_files(self.of(name))
        for shard in made.shards:
            if not shard.samples:
                continue
            if not self._is_whole(name, shard, there, read_bytes):
                return shard.shard
            if f"{shard.shard}.idx" not in there:
                return f"{shard.shard}.idx"
        return None if f"{META}/index.sqlite" in there else f"{META}/index.sqlite"

    def _is_whole(self, name: str, shard: ShardCounts, there: dict, read_bytes: bool) -> bool:
        found = there.get(shard.shard)
        if found is None or found.size != shard.bytes:
            return False
        return not read_bytes or storage.sha256_there(self.of(name, shard.shard), shard.bytes) == shard.sha256

    def hide(self, name: str) -> None:
        """Remove what makes a data set visible, before its shards are replaced."""
        storage.delete(self.of(name, MARKER))

    def publish(self, name: str, folder: Path, made: Provenance) -> str | None:
        """Add what is beside the shards, which are there already, the marker last; then see that all is there.

        Returns the name of a shard that is missing, in which case nothing was added.
        """
        there = storage.list_files(self.of(name))
        for shard in made.shards:
            if shard.samples and not self._is_whole(name, shard, there, read_bytes=False):
                return shard.shard
        files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        beside = [file for file in files if not file.endswith(".tar")]
        for file in sorted(set(there) - set(files)):
            if OURS.fullmatch(file):
                storage.delete(self.of(name, file))
        for file in sorted(beside, key=lambda file: (file == MARKER, file.startswith(META), file)):
            storage.send(folder / file, self.of(name, file))
        there = storage.list_files(self.of(name))
        for file in files:
            if file not in there or there[file].size != (folder / file).stat().st_size:
                raise storage.StorageError(
                    f"{storage.shown(self.of(name, file))} is not there after it was written: look at the storage."
                )
        return None

    # -- what was put away

    def parked(self, name: str) -> str:
        return self.of(".prepare", name, "parked")

    def forget_parked(self, keep: set[str]) -> None:
        """Remove what was put away of other sets than these: their scratch is gone."""
        found = {file.split("/")[0] for file in storage.list_files(self.of(".prepare")) if "/parked/" in file}
        for name in sorted(found - keep):
            storage.delete_folder(self.of(".prepare", name))
            if not storage.is_remote(self.out):
                shutil.rmtree(self.of(".prepare", name), ignore_errors=True)
