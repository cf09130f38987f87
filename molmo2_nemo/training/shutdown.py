"""How a run ends: on request, at its time limit, or by a failure that is reported in one line."""

import contextlib
import errno
import faulthandler
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.data.loader import DataLost, WorkerDied
from molmo2_nemo.environment import rank_from_environment
from molmo2_nemo.files import is_disk_error, write_atomically

ENDED = "ended.json"
_TIME_LIMIT = 1000  # beyond any signal's number
# What collectives raise on the ranks that are left when another one is gone: NCCL's and the store's errors.
_LOST_CONTACT = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
# Gloo has no type of its own: it raises RuntimeError. Its text begins with the source file: "[.../gloo/transport/...]".
_LOST_CONTACT_GLOO = ("/gloo/transport/", "/gloo/rendezvous/")
# What CUDA and its libraries write into a RuntimeError when the GPU or its driver failed.
_GPU_ERRORS = ("CUDA error", "CUDA driver error", "cuDNN error", "CUBLAS_STATUS_")


class StopRequest:
    """Asks all ranks to stop after the step they are in: a signal to any of them, or the time limit.

    signals: names such as SIGTERM. limit_minutes: counted from here; None: no limit.
    """

    def __init__(self, signals: list[str], limit_minutes: float | None):
        self.deadline = None if limit_minutes is None else time.monotonic() + 60 * limit_minutes
        self.received = 0
        for name in signals:
            signal.signal(getattr(signal, name), self._receive)

    def _receive(self, number, frame) -> None:
        self.received = number

    def reason(self, device: str) -> str | None:
        """Why to stop, the same on all ranks; None: go on. Collective."""
        code = self.received
        if not code and self.deadline is not None and time.monotonic() > self.deadline:
            code = _TIME_LIMIT
        code = torch.tensor(code, dtype=torch.int32, device=device)
        dist.all_reduce(code, op=dist.ReduceOp.MAX)
        code = int(code)
        if not code:
            return None
        return "time limit" if code == _TIME_LIMIT else signal.Signals(code).name


def write_ended(run_dir: Path, reason: str, step: int, message: str = "", cause: str | None = None) -> None:
    """Leave ended.json in the run's folder: why it ended, for batch scripts, since launchers do not hand on exit codes.

    reason, and what a script should do:
        finished        all steps are taken: start the next stage
        time limit      train.stop_after_minutes is over; saved: start again
        SIGUSR1, ...    a signal of train.stop_signals came; saved: start again
        error           message says what, and `cause` whether a retry may help
        config error    nothing was trained; message says which key: do not start again
    step: the last one. cause: of an error, as in `cause_of`. The file is removed when a run starts. If there is none
    after a run, the run was killed, or could not write it. The Slurm job is in it, since a job that is refused because
    another one trains in the folder must not take that one's end for its own.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / ENDED
    ended = {"reason": reason, "step": step, "message": message, "time": time.time()}
    ended |= {"cause": cause, "job": os.environ.get("SLURM_JOB_ID")}
    write_atomically(path, json.dumps(ended) + "\n")


def read_ended(run_dir: Path) -> dict:
    """What ended.json says; empty where there is none that can be read."""
    try:
        found = json.loads((run_dir / ENDED).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep_finished(run_dir: Path, before: dict) -> None:
    """Put back the end of a run that was finished before a start that was refused."""
    if read_ended(run_dir).get("reason") == "config error":
        with contextlib.suppress(OSError):
            write_atomically(run_dir / ENDED, json.dumps(before) + "\n")


def end_all_ranks(run_dir: Path, message: str, step: int, reason: str = "error", cause: str = "user") -> NoReturn:
    """End the run, with exit status 2, for what all ranks have found alike. Collective; rank 0 says so.

    That is never one node's fault, and comes again if nobody changes a setting, the data or the disk (cause `user`).
    """
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError):  # the disk may be what has failed
            write_ended(run_dir, reason, step, message, cause)
        print(f"error: {message}", file=sys.stderr, flush=True)
    dist.barrier()
    sys.exit(2)


class StackDump:
    """Writes what a rank is doing to errors/stacks_rankNNNN.txt: its step and phase, and on request its Python stacks.

    The stacks of all threads are written on SIGUSR2, and when a phase takes 90 % of the time that a collective may take
    (`timeout_minutes`); both work while the process waits for other ranks. The file is removed when the run ends well
    and holds no stacks. signals: those of StopRequest, which SIGUSR2 may be one of.
    """

    HEADER = 200  # bytes

    def __init__(self, run_dir: Path, timeout_minutes: float, signals: list[str]):
        self.path = run_dir / "errors" / f"stacks_rank{rank_from_environment():04d}.txt"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.seconds = self.path.open("wb", buffering=0), 54 * timeout_minutes
        self.at(0, "start")
        self.file.seek(self.HEADER)
        if "SIGUSR2" not in signals:
            faulthandler.register(signal.SIGUSR2, self.file)

    def at(self, step: int, phase: str) -> None:
        line = f"rank {rank_from_environment()} on {socket.gethostname()}, process {os.getpid()}: step {step}, {phase} "
        line += time.strftime("since %Y-%m-%d %H:%M:%S")
        os.pwrite(self.file.fileno(), line[: self.HEADER - 1].ljust(self.HEADER - 1).encode() + b"\n", 0)
        faulthandler.dump_traceback_later(self.seconds, file=self.file)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        self.file.close()
        if self.path.stat().st_size == self.HEADER:
            self.path.unlink()


def record_collectives(run_dir: Path) -> None:
    """Have NCCL write each rank's last collectives to errors/collectives_rankN when one times out.

    Must be called before the process group exists. Environment variables that the user has set are kept.
    `torchfrtrace errors --prefix collectives_rank` reads the files. The second name of a pair is for older versions of
    torch.
    """
    prefix = str(run_dir / "errors" / "collectives_rank")
    for names, value in (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
        (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), prefix),
    ):
        if not set(names) & set(os.environ):
            os.environ.update(dict.fromkeys(names, value))


@contextlib.contextmanager
def told_in_one_line(run_dir: Path, step: Callable[[], int], last: Callable[[], None]) -> Iterator[None]:
    """End this process with one line on standard error for whatever goes wrong inside; the traceback goes to a file.

    Of the ranks that only lost contact to another rank, one says so, unless that other rank has said why it failed.
    step: gives the number of the running step. last: done at the very end of a process that fails.
    """
    try:
        yield
    except (ConfigError, SystemExit):
        raise
    except BaseException as error:
        ignore_ended_children()
        rank, host = rank_from_environment(), socket.gethostname()
        folder = run_dir / "errors"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank_{rank:04d}.txt").write_text(traceback.format_exc())
        place = f"rank {rank} on {host}, step {step()}"
        reason = describe(error)
        if lost_contact(error):
            time.sleep(2)  # so that the other rank can write its message first
            speaks = not (run_dir / ENDED).exists() and _first(
                folder / f"lost_contact_{os.environ.get('TORCHELASTIC_RUN_ID', 'alone')}"
            )
            if speaks:
                reason += missing_ranks(folder) or "; its own message says why"
        else:
            speaks = True
        if speaks:
            with contextlib.suppress(OSError):
                write_ended(run_dir, "error", step(), message=f"{place}: {reason}", cause=cause_of(error))
            print(f"error: {place}: {reason} (traceback in {folder})", file=sys.stderr, flush=True)
        sys.stdout.flush()
        for child in multiprocessing.active_children():
            child.kill()
        with contextlib.suppress(OSError):
            last()
        # Not sys.exit: a communicator that waits for a dead rank would keep the process from ending.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def missing_ranks(folder: Path) -> str:
    """A phrase on the ranks that others seem to wait for, by what StackDump has left; "" if none is known.

    In this order: those whose process is gone (on this machine, where that can be seen), those that wrote no stacks
    though others did when the time was nearly up, and those whose last sign is oldest, by step and then by time.
    """
    signs, here = [], socket.gethostname()
    for path in folder.glob("stacks_rank*.txt"):
        with contextlib.suppress(OSError):
            line, has_stacks = path.open(errors="replace").readline().strip(), path.stat().st_size > StackDump.HEADER
            found = re.fullmatch(r"(rank \d+) on (\S+), process (\d+): (step (\d+), .*) since (.{19})", line)
            if found is not None:
                rank, host, pid, place, step, since = found.groups()
                is_gone = host == here and not Path(f"/proc/{pid}").exists()
                signs.append((not is_gone, has_stacks, int(step), since, f"{rank} on {host} ({place} since {since})"))
    if not signs:
        return ""
    signs.sort()
    lives, has_stacks, step, since, _ = signs[0]
    if not lives:
        what, chosen = "ended already:", [sign for sign in signs if not sign[0]]
    elif not has_stacks and any(sign[1] for sign in signs):
        what, chosen = "no sign of life from", [sign for sign in signs if not sign[1]]
    else:
        what, chosen = "the oldest sign is from", [sign for sign in signs if sign[2:4] == (step, since)]
    if len(chosen) == len(signs):
        return "; all ranks gave their last sign at the same time"
    names = ", ".join(sign[4] for sign in chosen[:4])
    return f"; {what} {names}{' and others' if len(chosen) > 4 else ''}"


def ignore_ended_children() -> None:
    """Take away torch's handler of SIGCHLD, which raises RuntimeError in the main thread when a loader worker ends.

    Once an error is being handled, a second one from there would take its place.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone or does not answer."""
    if isinstance(error, _LOST_CONTACT):
        return True
    return isinstance(error, RuntimeError) and any(place in str(error) for place in _LOST_CONTACT_GLOO)


def cause_of(error: BaseException) -> str:
    """Who can fix an error of one rank; slurm/starts.py decides by it what becomes of the job.

    user        data in object storage are refused or were replaced, the disk is full or may not be written, or a folder
                lies where a file belongs: the same on any node
    memory      of the GPU or of the host: settings, unless the run got far with them
    node        the GPU, its driver or the node's disk failed
    lost contact    another rank is gone or silent: what Slurm says about that one decides
    transient   anything else, such as a defect of the program: a retry may help, and no node is known to be at fault
    """
    if lost_contact(error):
        return "lost contact"
    if isinstance(error, DataLost):
        return "transient" if error.may_return else "user"
    if isinstance(error, torch.OutOfMemoryError | MemoryError | WorkerDied):
        return "memory"
    if isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in _GPU_ERRORS):
        return "node"
    # Libraries report a full disk with errors of their own, for which Python keeps the first one.
    link: BaseException | None = error
    while link is not None:
        if is_disk_error(link):
            return "node" if link.errno == errno.EIO else "user"
        if isinstance(link, IsADirectoryError | NotADirectoryError | FileExistsError):
            return "user"  # something of another kind lies where a file of the run belongs
        link = link.__cause__ or link.__context__
    return "transient"


def describe(error: BaseException) -> str:
    """One sentence for an error."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, DataLost):
        return text.rstrip(".")
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of GPU memory ({text}): try transformer.recompute_granularity=full "
            "transformer.recompute_method=uniform transformer.recompute_num_layers=1, a smaller train.micro_batch_size "
            "or train.vision_chunk_crops, or more tensor or context parallel ranks"
        )
    if isinstance(error, WorkerDied):
        return (
            f"a loader worker died ({text}): if the system ran out of memory, lower data.num_workers or "
            "data.packing_buffer_size"
        )
    if lost_contact(error):
        return f"lost contact to another rank ({text.split(' GLHF!')[0]})"  # gloo wishes good luck
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first(path: Path) -> bool:
    """Whether this process is the first to create the file; True also where it cannot be created."""
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    except OSError:
        pass
    return True
