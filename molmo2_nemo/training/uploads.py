"""The copies of a run's checkpoints in object storage (train.upload_to), made while the run trains.

A thread of rank 0 looks after every save which checkpoints on disk are to be kept and are not there yet, and uploads
them, the newest first; then it removes there what is not to be kept (remote_checkpoints.py). There is no list of work
that a kill could lose: the next start finds what is missing by looking. No error ends the run.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from molmo2_nemo import checkpoint_dir, remote_checkpoints, storage
from molmo2_nemo.checkpoint_dir import BEST, MARKER, step_name
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import TrainConfig
from molmo2_nemo.files import readable_size
from molmo2_nemo.storage import StorageError, join, shown

# Times that the copies of one save are tried; storage.py tries each request for two minutes by itself. Then the next
# save tries again.
TIMES = 3
# Seconds before the second time, doubled for the third.
PAUSE = 15.0
# Seconds between two lines on the progress at the end of a run.
SECONDS_BETWEEN_LINES = 10


class Uploads:
    """Keeps the checkpoints at an address like those in a run's folder on disk.

    `wake` after each save. `failed` counts attempts that have failed, `problem` says how the last one did; it is empty
    once all is there.
    """

    def __init__(self, folder: Path, address: str, settings: TrainConfig):
        self.folder, self.address, self.settings = folder, address, settings
        self.best_step = None
        self.uploaded, self.failed, self.problem = 0, 0, ""
        self.busy, self.sent, self.total = None, 0, 0  # the checkpoint that is being uploaded, and its bytes
        self.there = {}  # step -> seal of the marker that is known to be there
        self.said, self.guard = [], threading.Lock()
        self.woken, self.is_ending, self.is_idle = threading.Event(), threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self.thread.start()

    def wake(self, best_step: int | None = None) -> None:
        """There may be something to do. best_step: of the best checkpoint as the run knows it."""
        self.best_step = best_step
        self.is_idle.clear()
        self.woken.set()

    def uses(self, checkpoint: Path) -> bool:
        """Whether it is being uploaded, so that it must not be removed now."""
        return self.busy == checkpoint

    def lines(self) -> list[str]:
        """What has happened since the last call, in sentences for the log."""
        with self.guard:
            lines, self.said = self.said, []
        return lines

    def note(self) -> str:
        """For the line of a step; empty where there is nothing to say."""
        busy, now = self.busy, []
        if busy is not None:
            now.append(f"uploading {busy.name} {self.sent / max(1, self.total):.0%}")
        if self.failed:
            now.append(f"{self.failed} failed upload(s){', the last one too' if self.problem else ''}")
        return f" | {', '.join(now)}" if now else ""

    def figures(self) -> dict[str, int]:
        """For metrics.jsonl."""
        return {
            "done": self.uploaded,
            "failed": self.failed,
            "behind": int(bool(self.problem) or self.busy is not None),
        }

    def finish(self, say: Callable[[str], None]) -> bool:
        """Upload what is missing, and wait for it. Returns whether all is there; says so if not."""
        self.is_ending.set()
        self.wake(self.best_step)
        begun = said = time.monotonic()
        while not self.is_idle.wait(0.1):
            now = time.monotonic()
            if now >= said + SECONDS_BETWEEN_LINES:
                said = now
                what = f"{self.busy.name}, {self._progress()}" if self.busy else "what is there is compared"
                say(f"waiting for the upload to {shown(self.address)} since {now - begun:.0f} s: {what}")
        self.thread.join()
        for line in self.lines():
            say(line)
        if self.problem:
            say(
                f"NOT UPLOADED: {shown(self.address)} lacks checkpoints of {self.folder} ({self.problem.rstrip('.')});"
                " start the run again once the storage can be reached, which uploads what is missing."
            )
        return not self.problem

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self.woken.wait()
            self.woken.clear()
            is_last = self.is_ending.is_set()
            self._bring_up_to_date()
            if not self.woken.is_set():
                self.is_idle.set()
                if is_last:
                    return

    def _bring_up_to_date(self) -> None:
        pause = PAUSE
        for attempt in range(TIMES):
            try:
                self._copy_and_prune()
                self.problem = ""
                return
            except Exception as error:  # whatever it is, training goes on
                # The words of others may quote a request with its credentials.
                self.problem = str(error) if isinstance(error, ConfigError | OSError) else f"{type(error).__name__}."
                self.failed += 1
                self._say(f"upload to {shown(self.address)} failed ({self.failed} so far): {self.problem}")
            finally:
                self.busy = None
            if self.is_ending.is_set() and attempt:  # nobody waits longer than needed
                return
            self.is_ending.wait(pause)
            pause *= 2

    def _copy_and_prune(self) -> None:
        there = {
            step
            for step, files in remote_checkpoints.listed(self.address).items()
            if MARKER in files and checkpoint_dir.DAMAGED not in files
        }
        settings, here = self.settings, self._whole_here()
        if not here:
            return
        newest = max(here)
        kept = {self.best_step, remote_checkpoints.best(self.address), self._best_here()}
        steps = sorted(step for step in there | here.keys() if step <= newest)
        surplus = checkpoint_dir.surplus(steps, settings.keep_last, settings.keep_every, kept)
        for step, path in reversed(here.items()):
            if step not in surplus:
                self._copy(step, path, step in there)
        best = self._best_here()
        if best in self.there:
            self._copy_best(best)
        remote_checkpoints.prune(self.address, newest, settings.keep_last, settings.keep_every, self.best_step)

    def _whole_here(self) -> dict[int, Path]:
        """Those on disk by their step, the oldest first."""
        found = checkpoint_dir.find_checkpoints(self.folder)
        return {checkpoint_dir.step_of(path): path for path in found if checkpoint_dir.is_complete(path)}

    def _copy(self, step: int, path: Path, is_there: bool) -> None:
        try:
            marker = checkpoint_dir.read_marker(path)
        except ConfigError:
            return  # pruned, or found damaged, since the look at the folder
        seal = marker.get(checkpoint_dir.SEAL, "")
        if is_there and self.there.get(step) == seal:
            return
        self.busy, self.sent, self.total = path, 0, sum(marker["files"].values())
        begun, target = time.monotonic(), join(self.address, step_name(step))
        try:
            remote_checkpoints.upload(path, target, self.settings.verify_checkpoints, self._add)
        except (ConfigError, OSError) as error:
            if isinstance(error, StorageError) or checkpoint_dir.is_complete(path):
                raise
            return  # pruned meanwhile
        if self.sent:  # else it was there, from an earlier start
            self.uploaded += 1
            self._say(f"uploaded {shown(target)}, {readable_size(self.total)} in {time.monotonic() - begun:.1f} s")
        self.there[step] = seal

    def _best_here(self) -> int | None:
        best = checkpoint_dir.best(self.folder)
        return best and checkpoint_dir.step_of(best)

    def _copy_best(self, step: int) -> None:
        text = None
        with contextlib.suppress(OSError, ValueError):  # it is another one by now, or being replaced
            text = (self.folder / BEST).read_bytes()
            text = text if json.loads(text)["step"] == step else None
        if text is not None and remote_checkpoints.best(self.address) != step:
            storage.write(join(self.address, BEST), text)

    def _add(self, size: int) -> None:
        with self.guard:
            self.sent += size

    def _progress(self) -> str:
        return f"{readable_size(self.sent)} of {readable_size(self.total)}"

    def _say(self, line: str) -> None:
        with self.guard:
            self.said.append(line)
