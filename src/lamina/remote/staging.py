"""Answers that have come before it is their turn: in memory up to a limit, beyond it in a file that goes with us.

A server reads answers in the schedule's order, whatever order they come in. So at worst all but one of them wait, and
each may be as long as a model.
"""

from __future__ import annotations

import contextlib
import tempfile
from typing import IO

from lamina.remote.envelope import Answer

LIMIT = 256 << 20  # bytes of frames in memory


class Staging:
    """Args: limit: bytes of frames in memory."""

    def __init__(self, limit: int = LIMIT):
        self._limit = limit
        self._held: dict[int, Answer] = {}
        self._size = 0
        self._file: IO[bytes] | None = None
        self._places: dict[int, tuple[Answer, int, int]] = {}  # client -> the answer without its frame, start, length

    def put(self, client: int, answer: Answer) -> None:
        length = len(answer.frame)
        if self._size + length > self._limit:
            with contextlib.suppress(OSError):  # no room there either: then in memory
                self._write(client, answer, length)
                return
        self._held[client] = answer
        self._size += length

    def take(self, client: int) -> Answer:
        if client in self._held:
            answer = self._held.pop(client)
            self._size -= len(answer.frame)
            return answer
        answer, start, length = self._places.pop(client)
        assert self._file is not None  # something was written
        self._file.seek(start)
        frame = self._file.read(length)
        if not self._places:
            self.close()
        return answer._replace(frame=frame)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, client: int, answer: Answer, length: int) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the last that lies in it
        start = self._file.seek(0, 2)
        self._file.write(answer.frame)
        self._file.flush()
        self._places[client] = answer._replace(frame=b""), start, length
