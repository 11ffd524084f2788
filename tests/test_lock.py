"""One process at a time at a run, and none that has ended in the way of the next."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lamina import StorageError, lock
from lamina.lock import locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no file locks")

HOLD = "import sys; from lamina.lock import locked\nwith locked(sys.argv[1], 'x'): print(flush=True); input()"


def refused(path: Path) -> StorageError:
    with pytest.raises(StorageError) as caught, locked(path, "here"):
        pass
    assert caught.value.code == "E406"
    return caught.value


def test_the_file_names_the_process_while_it_is_at_it_and_nobody_afterwards(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, "here"):
        said = json.loads(path.read_text())
        assert said.keys() == {"pid", "boot", "host"}
        assert (said["pid"], said["host"]) == (os.getpid(), platform.node())
    assert path.read_bytes() == b""


def test_a_second_process_is_refused_by_the_number_of_the_first_and_kill_9_frees_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert f"process {other.pid} is at this run" in str(refused(path))
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert json.loads(path.read_text())["pid"] == other.pid  # it could not say that it goes
    with locked(path, "here"):
        pass


def test_two_in_one_process_are_refused_too(tmp_path: Path) -> None:
    """The system lets the same process lock twice, and would then let go of both."""
    with locked(tmp_path / ".lock", "here"):
        assert f"process {os.getpid()} is at this run" in str(refused(tmp_path / ".lock"))
        assert f"process {os.getpid()}" in str(refused(tmp_path / ".." / tmp_path.name / ".lock"))
    with locked(tmp_path / ".lock", "here"):
        pass


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)


def test_where_there_are_no_locks_the_process_that_is_named_must_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 1 always does. A number of before the last start of the machine is another process's, as is another's."""
    without_locks(monkeypatch)
    path, here = tmp_path / ".lock", lock._machine()
    path.write_text(json.dumps({"pid": 1, **here}))
    assert "process 1 is at this run" in str(refused(path))
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    others = ({"pid": gone.pid, **here}, {"pid": 1, **here, "boot": "before"}, {"pid": 1, **here, "host": "elsewhere"})
    for text in ("", "{", "[1]", '{"pid": "1"}', *map(json.dumps, others)):
        path.write_text(text)
        with locked(path, "here"):
            pass
