"""Segment files: rows one behind the other, each with a head that says whose it is and a checksum over both.

     0   8  magic "LAMROW1" NUL      24   8  length of the body
     8   8  client                   32   8  XXH3-64 of bytes 0..31 and the body
    16   8  round                    40  24  zero
                                     64      body: the row's tensors, raw, each from a multiple of 64 on

Integers are little endian. Only the process that began a segment appends to it, so what stands behind the last complete
row was torn by a crash, and nobody refers to it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lamina.errors import StorageError

ALIGN = 64
_MAGIC = b"LAMROW1\0"
_FIELDS = struct.Struct("<8sqqQ")  # what the checksum covers of the head
_CHECKSUM = struct.Struct("<Q24x")
HEAD = _FIELDS.size + _CHECKSUM.size


class Segment:
    """One file of rows.

    Args:
        size: bytes of it.
        handle: of the file, open for appending in the process that began it.
    """

    def __init__(self, path: Path, size: int, handle: int | None = None):
        self.path = path
        self.size = size
        self._handle = handle

    @classmethod
    def begun(cls, path: Path) -> Segment:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        return cls(path, 0, os.open(path, flags, 0o666))

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def look(self) -> None:
        """How long it is by now: the process that began it may be appending."""
        self.size = self.path.stat().st_size if self.path.exists() else 0

    def append(self, client: int, round: int, body: Tensor) -> tuple[int, int]:
        """Offset and checksum of the row. Nothing counts that was written by half."""
        assert self._handle is not None  # only to the segment it began does a shelf append
        content = body.numpy().data
        fields = _FIELDS.pack(_MAGIC, client, round, len(content))
        checksum = _checksum(fields, content)
        os.lseek(self._handle, self.size, os.SEEK_SET)
        for part in (memoryview(fields + _CHECKSUM.pack(checksum)), content):
            while part:
                part = part[os.write(self._handle, part) :]
        offset = self.size
        self.size += HEAD + len(content)
        return offset, checksum

    def sync(self) -> None:
        if self._handle is not None:
            os.fsync(self._handle)

    def close(self) -> None:
        """Nothing more is appended."""
        self.sync()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def read(self, client: int, offset: int, length: int, checksum: int, name: str) -> Tensor:
        """The body of the row at this offset. Raises StorageError E404 when it is not what was written."""
        body = torch.empty(length, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                head = file.read(HEAD)
                file.readinto(body.numpy().data)
        except OSError as error:
            raise damaged(self.path, f"the row of {name} cannot be read: {error.strerror or error}") from error
        fields = head[: _FIELDS.size]
        whole = len(head) == HEAD and fields[:16] == _FIELDS.pack(_MAGIC, client, 0, 0)[:16]
        if not whole or _checksum(fields, body.numpy().data) != checksum:
            raise damaged(self.path, f"the row of {name} does not match its checksum")
        return body

    def will_need(self, offset: int, length: int) -> None:
        if hasattr(os, "posix_fadvise"):
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), offset, HEAD + length, os.POSIX_FADV_WILLNEED)


def verify(path: Path, end: int, names: tuple[str, ...]) -> None:
    """Reads the rows in the first `end` bytes. Raises StorageError E404 for the first that is not whole."""
    at = 0
    try:
        with path.open("rb") as file:
            while at < end:
                head = file.read(HEAD)
                if len(head) < HEAD or head[:8] != _MAGIC:
                    raise damaged(path, f"no row where one should be, at byte {at}")
                _, client, _, length = _FIELDS.unpack(head[: _FIELDS.size])
                body = file.read(length) if at + HEAD + length <= end else b""
                if len(body) != length or _checksum(head[: _FIELDS.size], body) != _CHECKSUM.unpack_from(head, 32)[0]:
                    raise damaged(path, f"the row of {named(client, names)} does not match its checksum")
                at += HEAD + length
    except OSError as error:
        raise damaged(path, f"it cannot be read: {error.strerror or error}") from error


def named(client: int, names: tuple[str, ...]) -> str:
    return f"client {names[client]!r}" if 0 <= client < len(names) else f"client {client}"


def damaged(path: Path, what: str) -> StorageError:
    return StorageError(
        f"{path.name} is damaged: {what}",
        code="E404",
        where=str(path),
        remedy="put the file back from a copy, or start again with another path: nothing there was changed",
    )


def _checksum(fields: bytes, body: memoryview | bytes) -> int:
    digest = xxhash.xxh3_64(fields)
    digest.update(body)
    return int(digest.intdigest())
