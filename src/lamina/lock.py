"""One process at a time at a folder, be it a run's or a store's: a lock that the system lets go of however the process
ends, with the process's number in the file for whoever is refused.

Where a file system has no locks, the file decides: whoever it names has it for as long as a process of that
number lives on this machine since its last start. So kill -9 and a reboot never stand in the way of `resume`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lamina.errors import StorageError

_ours: set[tuple[int, str]] = set()  # (process, file): the system's locks do not tell threads of one process apart


@contextlib.contextmanager
def locked(path: Path, where: str) -> Iterator[None]:
    """Holds the lock file at `path`. Worker processes do not inherit it.

    Raises:
        StorageError: E406, somebody has it.
        OSError: the file cannot be made.
    """
    key = os.getpid(), os.path.realpath(path)
    if key in _ours:
        raise _taken(_here(), where)
    handle = take(path)
    if isinstance(handle, dict):
        raise _taken(handle, where)
    _ours.add(key)
    try:
        yield
    finally:
        _ours.discard(key)
        give_back(handle)


def take(path: Path) -> int | dict[str, Any]:
    """The lock file at `path`, for as long as this process has it open: its handle. Else who has it, as far as that is
    known. A process may take what is its own already. Raises OSError where the file cannot be made."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if _obtained(handle):
            _say(handle, _here())
            return handle
        who = _said(handle)
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return who


def give_back(handle: int) -> None:
    """What `take` gave. In a process that has only inherited it, nobody is told that it is free."""
    with contextlib.suppress(OSError):
        if _said(handle).get("pid") == os.getpid():
            _say(handle, {})
    os.close(handle)


def _taken(who: dict[str, Any], where: str) -> StorageError:
    named = f"process {who['pid']}" if "pid" in who else "another process"
    if "pid" in who and who.get("host") != platform.node():
        named += f" on {who.get('host')}"
    return StorageError(
        f"{named} is at this run", code="E406", where=where, remedy="wait until it has ended, or end it"
    )


def _here() -> dict[str, Any]:
    return {"pid": os.getpid(), **_machine()}


def _machine() -> dict[str, str]:
    """Its name, and what is another at every start of it ("" where the system does not say)."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return {"boot": boot, "host": platform.node()}


def _said(handle: int) -> dict[str, Any]:
    """Who is named in the file; {} for nobody."""
    with contextlib.suppress(OSError, ValueError):
        os.lseek(handle, 0, os.SEEK_SET)
        found = json.loads(os.read(handle, 4096) or b"{}")
        if isinstance(found, dict) and (not found or isinstance(found.get("pid"), int)):
            return found
    return {}


def _say(handle: int, who: dict[str, Any]) -> None:
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    if who:
        os.write(handle, json.dumps(who).encode() + b"\n")


def _lives(who: dict[str, Any]) -> bool:
    """Whether that process is still there, on this machine since its last start."""
    here = _machine()
    if "pid" not in who or who["pid"] == os.getpid() or {k: who.get(k) for k in here} != here:
        return False
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it is another user's
    return True


if sys.platform == "win32":

    def _obtained(handle: int) -> bool:
        return True

else:
    import fcntl

    def _obtained(handle: int) -> bool:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            return not _lives(_said(handle))
        return True
