"""A report that is written again while its runs go, and for the last time when they have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lamina.errors import StorageError
from lamina.folder import locked, read_info
from lamina.report.render import write
from lamina.runs import Run

_QUIET = 30.0  # seconds without a commit, after which it is asked whether anybody is at the run


def watch(
    folders: Sequence[Path],
    path: Path,
    every: float = 5.0,
    say: Callable[[str], None] = lambda text: None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Writes the report whenever a run has committed rounds; returns when none of the runs goes on.

    A run whose process was killed says "running" for ever: after half a minute of silence it counts as ended if nobody
    holds its lock.

    Args:
        every: seconds between two looks.
        say: is told what happens, a line each.
    """
    before: list[tuple[object, ...]] = []
    quiet_since = time.monotonic()
    while True:
        now = [_stand(folder) for folder in folders]
        going = [folder for folder, stand in zip(folders, now, strict=True) if stand[0] == "running"]
        if now != before:
            quiet_since = time.monotonic()
            write([Run.open(folder) for folder in folders], path, reload=every if going else None)
            said = ", ".join(f"{folder.name} {stand[1]}/{stand[2]}" for folder, stand in zip(folders, now, strict=True))
            say(f"{path}: {said}")
            before = now
        if not going:
            return path
        if time.monotonic() - quiet_since > _QUIET and not any(_held(folder) for folder in going):
            write([Run.open(folder) for folder in folders], path)
            say(f"nobody is at {', '.join(folder.name for folder in going)} any more: `lamina resume` goes on with it")
            return path
        sleep(every)


def _stand(folder: Path) -> tuple[object, ...]:
    info = read_info(folder)
    return info["status"], info["rounds_done"], info["rounds"]


def _held(folder: Path) -> bool:
    """Whether another process is at this run, as far as one may look."""
    try:
        with locked(folder):
            return False
    except StorageError:  # E406; or the lock is not ours to open, which says nothing
        return True
