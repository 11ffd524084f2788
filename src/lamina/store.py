"""Where clients' states live between rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lamina.tree import Params

Held = dict[str, int]  # what a client holds: "tree/name" -> tag of the value it was last sent


class Row(NamedTuple):
    """What a client itself remembers between rounds."""

    method: Any  # the method's client state
    buffers: Params  # its own, under buffers="keep"; else empty


class Stored(NamedTuple):
    """A client's row, with what the server knows of it."""

    row: Row | None  # None: it has received something but none of its messages was accepted yet
    held: Held
    accepted: int  # last round accepted from it, -1 for none


class ClientStore:
    """Rows by client position, in memory. A value: `updated` makes a new store that shares the untouched rows.

    A client that never took part has no row; one that is absent keeps its row as it is.
    """

    def __init__(self, rows: Mapping[int, Stored] | None = None):
        self._rows = dict(rows or {})

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._rows))

    def get(self, client: int) -> Stored:
        return self._rows.get(client, _NOTHING)

    def updated(self, rows: Mapping[int, Stored]) -> ClientStore:
        return ClientStore({**self._rows, **rows})


_NOTHING = Stored(None, {}, -1)
