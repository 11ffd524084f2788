"""Flower's programs on this machine, each in a group of processes of its own, so that all of them can be ended."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lamina.errors import ConfigError, RunError

_PATIENCE_S = 15.0  # that a group has to end by itself
_TAIL = 12  # lines of a log in an error
_SETTINGS = {  # nothing is told to anybody, nothing is installed
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "PYTHONUNBUFFERED": "1",
}


class Group(NamedTuple):
    """A program and all that it starts."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        lines = _plain(self.log.read_text(encoding="utf-8", errors="replace")).splitlines()
        return "\n".join(lines[-_TAIL:])


class Groups:
    """Programs in one folder, ended together.

    Args:
        folder: for logs and Flower's own files; it is not removed.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._running: list[Group] = []

    def __enter__(self) -> Groups:
        return self

    def __exit__(self, *exception: Any) -> None:
        with _undisturbed():
            self.end(*self._running)

    def start(
        self, name: str, program: str, arguments: Sequence[str], env: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> Group:  # fmt: skip
        """
        Args:
            before: words of a command that becomes the program, such as `ip netns exec NAME`.
        """
        logs = (self.folder / (f"{name}-{i}.log" if i else f"{name}.log") for i in itertools.count())
        log = next(path for path in logs if not path.exists())  # what one before it said is not what this one says
        with log.open("xb") as out:
            process = subprocess.Popen(
                [*before, _program(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._environment(name) | dict(env or {}),
                start_new_session=True,
            )
        group = Group(name, process, log)
        self._running.append(group)
        return group

    def ready(self, group: Group, sign: str, limit_s: float) -> str:
        """Waits for a line of its output with this pattern.

        Returns:
            What the pattern found.

        Raises:
            RunError: E316 it ended, or said nothing of the kind in time.
        """
        end = time.monotonic() + limit_s
        while True:
            ended = group.process.poll()
            found = re.search(sign, _plain(group.log.read_text(encoding="utf-8", errors="replace")))
            if found:
                return found[0]
            if ended is not None or time.monotonic() >= end:
                how = f"ended with {ended}" if ended is not None else f"was not ready after {limit_s:g} s"
                raise RunError(f"{group.name} {how}:\n{group.tail()}", code="E316", where=str(group.log))
            time.sleep(0.1)

    def ask(self, name: str, arguments: Sequence[str], limit_s: float = 120.0) -> dict[str, Any]:
        """What `flwr ... --format json` says. Raises RunError E316."""
        try:
            done = subprocess.run(
                [_program("flwr"), *arguments, "--format", "json"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=self._environment(name),
                timeout=limit_s,
                check=False,
            )
            text = _plain(done.stdout.decode(errors="replace"))
            found = re.search(r"^\{.*\}", text, re.DOTALL | re.MULTILINE)
            answer: dict[str, Any] = json.loads(found[0] if found else "")
        except (subprocess.TimeoutExpired, ValueError) as error:
            said = (
                error if isinstance(error, subprocess.TimeoutExpired) else _plain((done.stdout + done.stderr).decode())
            )
            raise RunError(f"flwr {arguments[0]}: {said}", code="E316", where="flwr") from error
        if not answer.get("success"):
            raise RunError(f"flwr {arguments[0]}: {answer.get('error-message', answer)}", code="E316", where="flwr")
        return answer

    def end(self, *groups: Group, how: int = signal.SIGTERM) -> None:
        """With all that they have started, in other sessions too. Those that do not end by themselves are killed."""
        started = [pid for group in groups for pid in _descendants(group.process.pid)]
        for group in groups:
            _signal(group, how)
        if how == signal.SIGKILL:
            _kill(started)
        end = time.monotonic() + _PATIENCE_S
        while (any(map(_alive, groups)) or any(map(_there, started))) and time.monotonic() < end:
            time.sleep(0.05)
        for group in groups:
            _signal(group, signal.SIGKILL)
            group.process.wait()
            if group in self._running:
                self._running.remove(group)
        _kill(started)

    def home(self, name: str) -> Path:
        """FLWR_HOME of a program: apps are unpacked there, so no two programs may share one."""
        home = self.folder / "flwr" / name
        home.mkdir(parents=True, exist_ok=True)
        return home

    def _environment(self, name: str) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        near = ",".join(filter(None, [os.environ.get("NO_PROXY", ""), "127.0.0.1", "localhost"]))
        here = {"FLWR_HOME": str(self.home(name)), "PATH": path, "NO_PROXY": near, "no_proxy": near}
        return {**os.environ, **_SETTINGS, **here}


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody has now."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            held = stack.enter_context(socket.socket())
            held.bind(("127.0.0.1", 0))
            found.append(int(held.getsockname()[1]))
        return found


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        remedy = "pip install 'lamina[flower]'"
        raise ConfigError(f"{name} is not installed: deployment needs Flower", where="flwr", remedy=remedy)
    return found


def _signal(group: Group, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group.process.pid, number)


def _alive(group: Group) -> bool:
    group.process.poll()
    try:
        os.killpg(group.process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _descendants(pid: int) -> list[int]:
    """All that a process has started, and what these have."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found, at = [pid], 0
    while at < len(found):
        found += children.get(found[at], [])
        at += 1
    return found[1:]


def _parents() -> Iterator[tuple[int, int]]:
    """(process, its parent) of all processes."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
        yield from ((int(pid), int(parent)) for pid, parent in map(str.split, listed.splitlines()))
        return
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            yield int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def _there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with contextlib.suppress(OSError):  # one that nobody has waited for yet has ended all the same
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not leave anything running."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, where no signal arrives
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
