"""Files that are there whole or not at all, and that notice when a bit has flipped."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from lamina.errors import StorageError
from lamina.store.segment import damaged


def sealed(document: Mapping[str, Any]) -> bytes:
    """With a checksum in front: in plain JSON a flipped bit may read as another number."""
    text = json.dumps(document, indent=1).encode()
    return b"%s\n%s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)


def unsealed(path: Path, key: str) -> dict[str, Any]:
    """Raises StorageError E404 when it is not what was sealed, or has no such key: then it is another file."""
    try:
        seal, _, text = path.read_bytes().partition(b"\n")
        if seal != xxhash.xxh3_64_hexdigest(text.removesuffix(b"\n")).encode():
            raise ValueError("it does not match its checksum")
        document: dict[str, Any] = json.loads(text)
        if key not in document:
            raise ValueError(f"it has no {key}, so it is another file")
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    return document


def beside(path: Path) -> Path:
    """Where it is written first. A link that somebody has put there goes, so that nothing is written through it."""
    temporary = path.with_name(f".{path.name}.tmp")
    if temporary.is_symlink():
        temporary.unlink()
    return temporary


def replace(path: Path, blob: bytes) -> None:
    """The old content or the new, never something between; and the names in its folder are durable."""
    rewrite(path, [blob])


def rewrite(path: Path, blobs: Iterable[bytes]) -> None:
    """The same, piece by piece."""
    temporary = beside(path)
    with temporary.open("wb") as file:
        file.writelines(blobs)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Makes the names in a folder durable; a folder cannot be opened for that on Windows."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(
            f"a client's state cannot be stored: {error.strerror or error}",
            code="E401",
            where=str(path),
            remedy=f"{'make room' if full else 'make it writable'}; what was checkpointed is intact",
        ) from error
