"""Where clients' states live between rounds: in memory, or on disk."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lamina.errors import expect
from lamina.store.clients import MEMORY, ClientStore, Kept, Row, Shelf, Stored, Writer
from lamina.store.disk import Disk, on_disk
from lamina.store.entries import Entry, Held


def expect_kind(store: object, where: str = "store") -> None:
    """Raises ConfigError unless it is "memory" or "disk:PATH"."""
    fine = store == "memory" or (isinstance(store, str) and store.startswith("disk:") and store != "disk:")
    remedy = "for example store='disk:runs/mine/clients'; a path is relative to the working directory"
    expect(fine, f"store={store!r}: expected 'memory' or 'disk:PATH'", where=where, remedy=remedy)


def empty_store(kind: str, model: Mapping[str, Tensor], like: Row, names: tuple[str, ...]) -> ClientStore:
    """A store without clients.

    Args:
        kind: "memory", or "disk:PATH" with a path relative to the working directory.
        model: parameters and buffers, to know the store of another model by.
        like: a row, to know that of another method by.
        names: of the clients, for messages.

    Raises:
        StorageError: E404 what is at the path is damaged, E405 it is of another model or method.
    """
    if kind == "memory":
        return ClientStore()
    return ClientStore(on_disk(kind.removeprefix("disk:"), model, like, names))


__all__ = [
    "MEMORY", "ClientStore", "Disk", "Entry", "Held", "Kept", "Row", "Shelf", "Stored", "Writer", "empty_store",
    "expect_kind",
]  # fmt: skip
