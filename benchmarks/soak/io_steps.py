"""Every step by which a process changes files, counted, and cut short at one of them.

A step is an open for writing, a write, a flush to the disk, a rename, a removal, a new folder, a link or a cut, in a
folder that is watched. At one of them the process is killed, or the step fails; a write may have been made by half
before. `Journal` keeps the steps instead, with their content, to build what is left after the power fails.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

CHANGING = {"open", "write", "mkdir", "fsync", "rename", "link"}  # what a full disk may refuse


def forked(work: Callable[[], int | None], errors: Path | None = None) -> int:
    """Process number of a child that does this and ends with what it returns, by default 0; 70 after an error."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(null, handle)
        code = work() or 0
    except BaseException as error:
        code = getattr(error, "exit_code", 70)
        if errors is not None:
            errors.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def ended(pid: int, timeout: float = 120.0) -> int:
    """Its exit code, or minus the signal that ended it."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"no end within {timeout} s")


class Step(NamedTuple):
    kind: str
    path: str
    content: Any = None  # of a write: (offset, bytes); of a cut: the length; of a rename: to where


class Steps:
    """Watches this process from `begin` on.

    Args:
        folder: what lies in it is watched.
        at: the step at which `act` is called, from 1; 0: none.
        act: None: the process is killed; else the number of an error that this step ends with.
        half: a write is made by half before.
        on: with `act`, every later step fails, too.
        where: is given every step, for `Journal`.
    """

    def __init__(
        self, folder: Path, at: int = 0, act: int | None = None, half: bool = False, on: bool = False,
        where: Callable[[Step], None] | None = None,
    ):  # fmt: skip
        self.folder = os.path.realpath(folder)
        self.at = at
        self.act = act
        self.half = half
        self.on = on
        self.where = where
        self.count = 0

    def step(self, kind: str, path: Any, content: Any = None, tear: Callable[[], None] | None = None) -> None:
        place = os.path.abspath(os.fsdecode(path))
        if not (place == self.folder or place.startswith(self.folder + os.sep)):
            return
        if self.where is not None:
            self.where(Step(kind, place, content))
        self.count += 1
        if self.count == self.at or (self.on and self.at and self.count > self.at):
            if self.act in (errno.ENOSPC, errno.EDQUOT) and kind not in CHANGING:
                return
            if self.half and tear is not None:
                tear()
            if self.act is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.act, os.strerror(self.act or 0), place)

    def begin(self) -> Steps:
        opened = io.open
        steps = self

        def open_(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return opened(file, mode, *rest, **named)
            steps.step("open", file, "w" in mode)
            return _Written(opened(file, mode, *rest, **named), steps, os.fspath(file), "b" in mode)

        builtins.open = io.open = open_  # type: ignore[assignment]
        self._patch()
        return self

    def _patch(self) -> None:
        names = "open write fsync rename replace unlink remove rmdir mkdir truncate ftruncate symlink link"
        real = {name: getattr(os, name) for name in names.split()}

        def named(handle: int) -> str:
            return os.readlink(f"/proc/self/fd/{handle}")

        def at(path: Any, dir_fd: int | None) -> str:
            return os.path.join(named(dir_fd), os.fsdecode(path)) if dir_fd is not None else os.fsdecode(path)

        def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self.step("open", at(path, dir_fd), bool(flags & os.O_TRUNC))
            return int(real["open"](path, flags, mode, dir_fd=dir_fd))

        def write(handle: int, blob: Any) -> int:
            place = named(handle) if handle > 2 else "/dev"
            if place.startswith(self.folder):
                view = memoryview(blob)
                content = (os.lseek(handle, 0, os.SEEK_CUR), bytes(view))
                self.step("write", place, content, lambda: real["write"](handle, view[: len(view) // 2]))
            return int(real["write"](handle, blob))

        def fsync(handle: Any) -> None:
            number = handle if isinstance(handle, int) else handle.fileno()
            self.step("fsync", named(number))
            real["fsync"](number)

        def ftruncate(handle: int, length: int) -> None:
            self.step("truncate", named(handle), length)
            real["ftruncate"](handle, length)

        def truncate(path: Any, length: int) -> None:
            self.step("truncate", path, length)
            real["truncate"](path, length)

        def rename(name: str) -> Callable[..., None]:
            def call(old: Any, new: Any, **more: Any) -> None:
                self.step("rename", old, os.path.abspath(os.fsdecode(new)))
                real[name](old, new, **more)

            return call

        def single(name: str, kind: str) -> Callable[..., None]:
            def call(path: Any, *rest: Any, dir_fd: int | None = None, **more: Any) -> None:
                self.step(kind, at(path, dir_fd))
                real[name](path, *rest, **({} if dir_fd is None else {"dir_fd": dir_fd}), **more)

            return call

        def symlink(old: Any, new: Any, *rest: Any, **more: Any) -> None:
            self.step("symlink", new, os.fsdecode(old))
            real["symlink"](old, new, *rest, **more)

        def link(old: Any, new: Any, *rest: Any, **more: Any) -> None:
            self.step("link", new, os.path.abspath(os.fsdecode(old)))
            real["link"](old, new, *rest, **more)

        made: dict[str, Any] = {
            "open": open_, "write": write, "fsync": fsync, "ftruncate": ftruncate, "truncate": truncate,
            "rename": rename("rename"), "replace": rename("replace"), "unlink": single("unlink", "unlink"),
            "remove": single("remove", "unlink"), "rmdir": single("rmdir", "rmdir"), "mkdir": single("mkdir", "mkdir"),
            "symlink": symlink, "link": link,
        }  # fmt: skip
        for name, function in made.items():
            setattr(os, name, function)


class _Written:
    """A file that is written to. What was not flushed when the process is killed is lost, as it would be."""

    def __init__(self, file: Any, steps: Steps, path: str, binary: bool):
        self._file = file
        self._steps = steps
        self._path = path
        self._binary = binary

    def write(self, content: Any) -> int:
        def tear() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        blob = bytes(content) if self._binary else content.encode()
        offset = self._file.tell() if self._file.seekable() else 0
        self._steps.step("write", self._path, (offset, blob), tear)
        return int(self._file.write(content))

    def writelines(self, contents: Any) -> None:
        for content in contents:
            self.write(content)

    def truncate(self, size: int | None = None) -> int:
        self._steps.step("truncate", self._path, self._file.tell() if size is None else size)
        return int(self._file.truncate(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


# ---- what is left when the power fails


class _Node:
    def __init__(self, folder: bool):
        self.folder = folder
        self.steps: list[tuple[int, str, Any]] = []  # number of the step, kind, content: of a file
        self.names: list[tuple[int, str, str, _Node | None]] = []  # number, new name, name that goes, node: of a folder
        self.link: str | None = None
        self.flushed = 0  # how many of them are durable


class Journal:
    """What a list of steps made of an empty folder, step by step, and what of it is durable."""

    def __init__(self, folder: Path):
        self.root = os.path.realpath(folder)
        self.top = _Node(True)
        self._now: dict[str, _Node] = {self.root: self.top}
        self.count = 0

    def take(self, step: Step) -> None:
        self.count += 1
        kind, path, content = step
        holder, name = self._now.get(os.path.dirname(path)), os.path.basename(path)
        node = self._now.get(path)
        if kind == "fsync" and node is not None:
            node.flushed = len(node.names if node.folder else node.steps)
        elif kind in ("open", "mkdir", "symlink"):
            if node is None and holder is not None:
                node = self._now[path] = _Node(kind == "mkdir")
                node.link = content if kind == "symlink" else None
                holder.names.append((self.count, name, "", node))
            elif kind == "open" and content and node is not None:
                node.steps.append((self.count, "truncate", 0))
        elif kind == "link" and holder is not None and content in self._now:
            node = self._now[path] = self._now[content]
            holder.names.append((self.count, name, "", node))
        elif kind in ("write", "truncate") and node is not None:
            node.steps.append((self.count, kind, content))
        elif kind in ("unlink", "rmdir") and node is not None and holder is not None:
            holder.names.append((self.count, "", name, None))
            del self._now[path]
        elif kind == "rename" and node is not None and holder is not None:
            holder.names.append((self.count, os.path.basename(content), name, node))
            for old in [p for p in self._now if p == path or p.startswith(path + os.sep)]:
                self._now[content + old[len(path) :]] = self._now.pop(old)

    def build(self, folder: Path, data: Callable[[int], int], names: Callable[[int], int]) -> None:
        """One of the possible ends, written into `folder`.

        Args:
            data: how many of so many steps on a file that were not flushed are there all the same.
            names: the same of changes to the names in a folder.
        """
        self._build(self.top, folder, data, names)

    def _build(self, node: _Node, path: Path, data: Callable[[int], int], names: Callable[[int], int]) -> None:
        if node.link is not None:
            path.symlink_to(node.link)
            return
        if not node.folder:
            content = bytearray()
            for _, kind, value in node.steps[: node.flushed + data(len(node.steps) - node.flushed)]:
                if kind == "truncate":
                    del content[value:]
                    content.extend(bytes(value - len(content)))
                else:
                    offset, blob = value
                    content.extend(bytes(max(0, offset - len(content))))
                    content[offset : offset + len(blob)] = blob
            path.write_bytes(content)
            return
        path.mkdir(exist_ok=True)
        there: dict[str, _Node] = {}
        for _, new, old, inner in node.names[: node.flushed + names(len(node.names) - node.flushed)]:
            there.pop(old, None)
            if inner is not None:
                there[new] = inner
        for name, inner in there.items():
            self._build(inner, path / name, data, names)
