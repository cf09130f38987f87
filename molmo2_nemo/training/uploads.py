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
from molmo2_nemo.byte_progress import SECONDS_BETWEEN_LINES
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


class Uploads:
    """Keeps the checkpoints at an address like those in a run's folder on disk.

    `wake` after each save. `failed` counts attempts that have failed, `problem` says how the last one did; it is empty
    once all is there. `not_removed` says why what is not kept any more could not be removed.
    """

    def __init__(self, folder: Path, address: str, settings: TrainConfig):
        self.folder, self.address, self.settings = folder, address, settings
        self.best_step = None
        self.uploaded, self.failed, self.problem, self.not_removed = 0, 0, "", ""
        self.busy, self.sent, self.total = None, 0, 0  # the checkpoint that is being uploaded, and its bytes
        self.there = {}  # step -> seal of the marker that is known to be there
        self.known = None  # the steps that were there when this run began
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

    def record(self) -> dict[str, str]:
        """What metrics.jsonl keeps of the end, for tools/status.py."""
        return {"missing": self.problem, "not_removed": self.not_removed}

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
                " start the run again when that is mended, which uploads what is missing."
            )
        elif self.not_removed:
            say(
                f"all is at {shown(self.address)}, but what is not kept any more could not be removed"
                f" ({self.not_removed.rstrip('.')}): remove it there, or mend that for the next start."
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
                newest = self._copy_what_is_missing()
                self.problem = ""
                self._prune(newest)
                return
            except Exception as error:  # whatever it is, training goes on
                self.problem = _told(error)
                self.failed += 1
                self._say(f"upload to {shown(self.address)} failed ({self.failed} so far): {self.problem}")
            finally:
                self.busy = None
            if self.is_ending.is_set() and attempt:  # nobody waits longer than needed
                return
            self.is_ending.wait(pause)
            pause *= 2

    def _prune(self, newest: int | None) -> None:
        """Remove what is not kept any more, now that the checkpoint of step `newest` is there."""
        settings, before = self.settings, self.not_removed
        try:
            if newest is not None:
                keep_last, keep_every = settings.keep_last, settings.keep_every
                remote_checkpoints.prune(self.address, newest, keep_last, keep_every, self.best_step)
            self.not_removed = ""
        except Exception as error:  # the next save tries again
            self.not_removed = _told(error)
            if self.not_removed != before:
                self._say(f"what is not kept any more at {shown(self.address)} is still there: {self.not_removed}")

    def _copy_what_is_missing(self) -> int | None:
        """Returns the step of the newest checkpoint on disk, which is there now; None: there is none."""
        listed = remote_checkpoints.listed(self.address)
        there = {step for step, files in listed.items() if MARKER in files and checkpoint_dir.DAMAGED not in files}
        self.known = set(listed) if self.known is None else self.known
        settings, here = self.settings, self._whole_here()
        self._refuse_another_run(there, there - self.known - here.keys() - self.there.keys())
        if not here:
            return None
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
        return newest

    def _refuse_another_run(self, there: set[int], strange: set[int]) -> None:
        """ConfigError, where another run writes to the same address: each would remove checkpoints of the other.

        there: steps of whole checkpoints; strange: those that this run has neither found nor put there.
        """
        newest = max(there & self.there.keys(), default=None)
        if newest is not None and not strange:
            marker = storage.read(join(self.address, step_name(newest), MARKER)).decode(errors="replace")
            if checkpoint_dir.parse_marker(marker, shown(self.address)).get(checkpoint_dir.SEAL) != self.there[newest]:
                strange = {newest}
        if strange:
            raise ConfigError(
                f"another run has put {step_name(max(strange))} there, too: end one of them, and start it again with"
                " a name (name=...) or train.upload_to of its own."
            )

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


def _told(error: Exception) -> str:
    """The words of others may quote a request with its credentials."""
    return str(error) if isinstance(error, ConfigError | OSError) else f"{type(error).__name__}."
