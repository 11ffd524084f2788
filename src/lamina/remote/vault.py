"""Where a client's secrets of a secure sum are between two letters of its round: in memory, and nowhere else."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from lamina.errors import ConfigError
from lamina.store.files import storing

_HEAD = struct.Struct("<qq")
_STALE_S = 86_400.0  # after which nobody takes what is left of a run
_MEMORY = Path("/dev/shm")  # a folder whose files are in memory, where there is one


class Kept(NamedTuple):
    """Of one client.

    Args:
        round: in which the sum is.
        number: of the last letter that was answered, where letters are signed.
        secrets: b"" once they were taken.
    """

    round: int
    number: int
    secrets: bytes

    def __repr__(self) -> str:
        return f"Kept(round={self.round}, number={self.number}, secrets=***)"


class Vault(Protocol):
    def get(self, client: int) -> Kept | None:
        """What was put last."""
        ...

    def take(self, client: int) -> Kept | None:
        """The same; nobody gets these secrets again, neither here nor in another process. None: there are none."""
        ...

    def put(self, client: int, kept: Kept) -> None: ...

    def forget(self, before: int) -> None:
        """All that is of a round before this one."""
        ...


class MemoryVault:
    """Gone when the process ends."""

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}

    def get(self, client: int) -> Kept | None:
        return self._kept.get(client)

    def take(self, client: int) -> Kept | None:
        kept = self._kept.get(client)
        if kept is None or not kept.secrets:
            return None
        self._kept[client] = kept._replace(secrets=b"")
        return kept

    def put(self, client: int, kept: Kept) -> None:
        self._kept[client] = kept

    def forget(self, before: int) -> None:
        self._kept = {client: kept for client, kept in self._kept.items() if kept.round >= before}


class FileVault:
    """Files that only their owner can read, for nodes that are a new process with every letter. In memory where the
    system has a folder for that; they are gone once taken, and with the next round.

    Args:
        folder: made if need be; None: one of this user's, in memory, or in the folder for what does not last.
        experiment: what sets this run's files apart from those of others.

    Raises:
        ConfigError: E123 for a folder that others can enter.
    """

    def __init__(self, folder: Path | None, experiment: str):
        top = folder or _own()
        with storing(top):
            top.mkdir(mode=0o700, parents=True, exist_ok=True)
        _expect_own(top)
        self.folder = top / experiment
        for path in top.glob("*/sum-*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()

    def get(self, client: int) -> Kept | None:
        try:
            return _kept(self._file(client).read_bytes())
        except FileNotFoundError:
            return None

    def take(self, client: int) -> Kept | None:
        found = self.get(client)
        if found is None or not found.secrets:
            return None
        mine = self._file(client).with_suffix(f".{secrets.token_hex(8)}")
        try:
            self._file(client).rename(mine)  # one process does, whoever else wants to
        except FileNotFoundError:
            return None
        kept = _kept(mine.read_bytes())
        mine.unlink()
        self.put(client, kept._replace(secrets=b""))
        return kept if kept.secrets else None

    def put(self, client: int, kept: Kept) -> None:
        path = self._file(client)
        with storing(path):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside = path.with_suffix(f".{secrets.token_hex(8)}")
            binary = getattr(os, "O_BINARY", 0)
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | binary, 0o600), "wb") as file:
                file.write(_HEAD.pack(kept.round, kept.number) + kept.secrets)
            beside.replace(path)

    def forget(self, before: int) -> None:
        for path in self._files():
            with contextlib.suppress(OSError, struct.error):
                if _kept(path.read_bytes()).round < before:
                    path.unlink()

    def _file(self, client: int) -> Path:
        return self.folder / f"sum-{client:06d}"

    def _files(self) -> Iterator[Path]:
        return self.folder.glob("sum-*")


def _kept(blob: bytes) -> Kept:
    round, number = _HEAD.unpack_from(blob)
    return Kept(round, number, blob[_HEAD.size :])


def _own() -> Path:
    top = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    return top / f"lamina-{os.getuid()}" if hasattr(os, "getuid") else Path.home() / ".lamina" / "sums"


def _expect_own(folder: Path) -> None:
    """Raises ConfigError."""
    if not hasattr(os, "getuid"):
        return
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return
    raise ConfigError(
        f"{folder}: it is another user's, or others can enter it",
        code="E123",
        where="secret-dir",
        remedy=f"chmod 700 {folder}, or name another folder as secret-dir of the node",
    )
