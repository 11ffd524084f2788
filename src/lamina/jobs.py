"""Several processes at once, each with its share of the cores, that stop together and leave nothing behind.

A job is a Python module that reads what to do from its standard input. It has a session of its own, so that Ctrl-C
comes to it from here, once; `follow` stops it when this process ends, however that happens, as its input ends then.
What it prints on its error output is what it failed of.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

_TICK = 0.05  # seconds between two looks


class Job(NamedTuple):
    """What a process is to do."""

    number: int
    folder: Path
    description: str  # a line for its standard input


class _Going(NamedTuple):
    job: Job
    process: subprocess.Popen[bytes]
    said: IO[bytes]


def going(
    module: str, waiting: Iterator[Job], jobs: int, asked: Callable[[], bool]
) -> Iterator[tuple[Job, str | None]]:
    """Jobs as they end, each with what it failed of.

    Args:
        module: that is run.
        jobs: at once.
        asked: whether to stop: those that run are asked to, once, and no more are begun.
    """
    slots: dict[int, _Going] = {}
    told: set[int] = set()
    more = True
    try:
        while more or slots:
            while more and not asked() and len(slots) < jobs:
                job = next(waiting, None)
                more = job is not None
                if job is not None:
                    slot = min(set(range(jobs)) - slots.keys())
                    slots[slot] = _begun(module, job, _cores(slot, jobs))
            if asked():
                more = False
                for running in slots.values():
                    if running.job.number not in told:
                        told.add(running.job.number)
                        running.process.send_signal(signal.SIGINT)
            for slot, running in list(slots.items()):
                if running.process.poll() is not None:
                    del slots[slot]
                    yield running.job, _failure(running)
            time.sleep(_TICK)
    finally:  # a second Ctrl-C, or nobody asks for more
        for running in slots.values():
            _kill(running.process)
            _failure(running)


def _cores(slot: int, jobs: int) -> list[int]:
    """The share of one slot: cores are dealt out like cards, and shared where there are fewer than slots."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(max(1, (os.cpu_count() or 1) // jobs)))
    mine = sorted(os.sched_getaffinity(0))
    return mine[slot::jobs] or [mine[slot % len(mine)]]


def _begun(module: str, job: Job, share: list[int]) -> _Going:
    said = tempfile.TemporaryFile()  # noqa: SIM115  # `_failure` reads and closes it
    with _only(share):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
            env={"OMP_NUM_THREADS": str(len(share)), **os.environ},
        )
    assert process.stdin is not None  # it was asked for
    with contextlib.suppress(BrokenPipeError):  # it ended at once: its error output says why
        process.stdin.write(job.description.encode() + b"\n")
        process.stdin.flush()
    return _Going(job, process, said)


@contextlib.contextmanager
def _only(share: list[int]) -> Iterator[None]:
    """A process that begins inside may use these cores alone, where the system can say so."""
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _failure(ended: _Going) -> str | None:
    """The error that it ended with: one of ours, else the last line, else how it ended."""
    code = ended.process.returncode
    with ended.said as file:
        file.seek(0)
        text = file.read().decode(errors="replace").strip()
    if ended.process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            ended.process.stdin.close()
    if code == 0:
        return None
    if code < 0:
        return f"E303  its process ended with signal {-code}"
    own = re.findall(r"(?ms)^E\d{3}  .*", text)
    return own[0] if own else f"E300  {text.splitlines()[-1] if text else f'its process ended with status {code}'}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With its workers."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


# ---- in the process of a job


def follow() -> None:
    """Asks this process to stop, as Ctrl-C does, when the one that began it is there no more."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()
