"""Nodes that are processes of this machine, each with a socket to its server, which may kill or stop them."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from lamina import ClientData, Federation
from lamina.remote import DiskShelf, Lost, Node

_LENGTH = struct.Struct("<IQ")  # client, bytes


class Nodes:
    """A `Post` to as many processes, each with some of the clients.

    Args:
        make: the federation, of a node's data.

    Attributes:
        doomed: node -> seconds after the letters went when it is killed; used once.
        kills: how many there were.
    """

    def __init__(self, make: Callable[[ClientData], Federation], data: ClientData, count: int):
        torch.set_num_threads(1)
        self.doomed: dict[int, float] = {}
        self.kills = 0
        self._make = make
        self._data = data
        self._homes = [range(i, len(data), count) for i in range(count)]
        self._folder = Path(tempfile.mkdtemp())
        self._pids: dict[int, int] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._pending: dict[int, set[int]] = {i: set() for i in range(count)}
        self._partial: dict[int, bytearray] = {i: bytearray() for i in range(count)}
        self._arrived: deque[tuple[int, bytes | Lost]] = deque()
        self._due: dict[int, float] = {}

    def __enter__(self) -> Nodes:
        self.revive()
        return self

    def __exit__(self, *exception: Any) -> None:
        for node in [*self._pids]:
            self._kill(node)
        for own in self._sockets.values():
            own.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def revive(self) -> None:
        """Starts those that are not there."""
        for node in range(len(self._homes)):
            if node not in self._pids:
                self._start(node)

    def stop(self, node: int) -> None:
        os.kill(self._pids[node], signal.SIGSTOP)

    def go_on(self, node: int) -> None:
        os.kill(self._pids[node], signal.SIGCONT)

    def send(self, letters: Iterable[tuple[int, bytes]], most: int) -> None:
        now = time.monotonic()
        self._due |= {node: now + wait for node, wait in self.doomed.items()}
        self.doomed = {}
        for client, blob in letters:
            node = client % len(self._homes)
            self._pending[node].add(client)
            try:
                self._sockets[node].sendall(_LENGTH.pack(client, len(blob)) + blob)
            except OSError:
                self._gone(node)

    def receive(self, timeout_s: float | None) -> tuple[int, bytes | Lost] | None:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._arrived:
            now = time.monotonic()
            for node in [node for node, due in self._due.items() if due <= now]:
                del self._due[node]
                self._kill(node)
                self._gone(node)
            if self._arrived:
                break
            if not any(self._pending.values()) or (end is not None and now >= end):
                return None
            wake = [*self._due.values(), *([] if end is None else [end])]
            self._pull(max(0.0, min(wake) - now) if wake else None)
        return self._arrived.popleft()

    def _pull(self, wait: float | None) -> None:
        owners = {own: node for node, own in self._sockets.items()}
        ready, _, _ = select.select([*owners], [], [], wait)
        for own in ready:
            node = owners[own]
            try:
                came = own.recv(1 << 20)
            except OSError:
                came = b""
            if not came:
                self._gone(node)
                continue
            held = self._partial[node]
            held += came
            while len(held) >= _LENGTH.size:
                client, length = _LENGTH.unpack_from(held)
                if len(held) < _LENGTH.size + length:
                    break
                self._arrived.append((client, bytes(held[_LENGTH.size : _LENGTH.size + length])))
                del held[: _LENGTH.size + length]
                self._pending[node].discard(client)

    def _gone(self, node: int) -> None:
        if node in self._sockets:
            self._sockets.pop(node).close()
        self._partial[node].clear()
        lost, self._pending[node] = self._pending[node], set()
        self._arrived.extend((client, Lost("its node is gone")) for client in sorted(lost))
        self._bury(node)

    def _kill(self, node: int) -> None:
        with contextlib.suppress(KeyError, ProcessLookupError):
            os.kill(self._pids[node], signal.SIGKILL)
            self.kills += 1
        self._bury(node)

    def _bury(self, node: int) -> None:
        pid = self._pids.pop(node, None)
        if pid is not None:
            with contextlib.suppress(ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _start(self, node: int) -> None:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            for other in self._sockets.values():
                other.close()
            self._serve(node, theirs)
        theirs.close()
        self._pids[node] = pid
        self._sockets[node] = ours
        self._pending[node] = set()

    def _serve(self, node: int, pipe: socket.socket) -> NoReturn:
        try:
            own = replace(self._data.subset([*self._homes[node]]), test=None, check=False).among(self._data.names)
            fed = self._make(own)
            with Node(fed, DiskShelf(fed, self._folder / str(node), "soak")) as here:
                stream = pipe.makefile("rb")
                while front := stream.read(_LENGTH.size):
                    client, length = _LENGTH.unpack(front)
                    for answered, blob in here.answer([(client, stream.read(length))]):
                        pipe.sendall(_LENGTH.pack(answered, len(blob)) + blob)
        finally:
            os._exit(0)
