"""The store as a value: what the server keeps of every client, over a shelf that holds the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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


class Entry(NamedTuple):
    """The same, with the place of the row on its shelf instead of the row."""

    place: Any  # None: no row
    held: Held
    accepted: int


class Shelf(Protocol):
    """Holds rows. A place that it gave out stays good for as long as somebody has it."""

    def put(self, client: int, accepted: int, row: Row) -> Any: ...

    def get(self, client: int, place: Any) -> Row: ...

    def will_need(self, places: Iterable[Any]) -> None:
        """Read ahead, if that helps."""

    def tidied(self, entries: dict[int, Entry]) -> dict[int, Entry]:
        """The entries of a new store, some of their rows in better places."""

    def begin(self) -> None:
        """Before round 0 of a new run. Raises StorageError when the shelf is another's."""

    def claim(self) -> None:
        """Before a run that goes on changes anything. Raises StorageError when another process is at the shelf."""

    def pin(self, holder: Path, places: Iterable[Any]) -> None:
        """Make these durable, and keep them for as long as there is something at the path `holder`."""

    def unpin(self, folder: Path) -> None:
        """Let go of what was kept for paths in this folder that are no more."""


class Memory:
    """Rows are their own places."""

    def put(self, client: int, accepted: int, row: Row) -> Row:
        return row

    def get(self, client: int, place: Row) -> Row:
        return place

    def will_need(self, places: Iterable[Row]) -> None:
        pass

    def tidied(self, entries: dict[int, Entry]) -> dict[int, Entry]:
        return entries

    def begin(self) -> None:
        pass

    def claim(self) -> None:
        pass

    def pin(self, holder: Path, places: Iterable[Row]) -> None:
        pass

    def unpin(self, folder: Path) -> None:
        pass


MEMORY = Memory()
_NOTHING = Entry(None, {}, -1)


class ClientStore:
    """Rows by client position. A value: `updated` makes a new store that shares the untouched rows.

    A client that never took part has no row; one that is absent keeps its row as it is.
    """

    def __init__(self, shelf: Shelf = MEMORY, entries: Mapping[int, Entry] | None = None):
        self.shelf = shelf
        self._entries = dict(entries or {})

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._entries))

    def entry(self, client: int) -> Entry:
        """What is known of a client, without reading its row."""
        return self._entries.get(client, _NOTHING)

    def get(self, client: int) -> Stored:
        place, held, accepted = self.entry(client)
        return Stored(None if place is None else self.shelf.get(client, place), held, accepted)

    @property
    def rows(self) -> Mapping[int, Row]:
        """The rows of the clients that have one, each read when it is asked for."""
        return _Rows(self)

    def will_need(self, clients: Iterable[int]) -> None:
        """These are read soon."""
        self.shelf.will_need(place for c in clients if (place := self.entry(c).place) is not None)

    def writing(self) -> Writer:
        return Writer(self)

    def updated(self, rows: Mapping[int, Stored]) -> ClientStore:
        writer = self.writing()
        for client, stored in rows.items():
            writer.put(client, stored)
        return writer.done()

    def told(self, tags: Held) -> ClientStore:
        """Every client here now holds these, too. Tables that clients share stay shared."""
        tables = {id(entry.held): entry.held | tags for entry in self._entries.values()}
        entries = {c: entry._replace(held=tables[id(entry.held)]) for c, entry in self._entries.items()}
        return ClientStore(self.shelf, entries)

    def on(self, shelf: Shelf) -> ClientStore:
        """The same on another shelf: the rows are copied there one by one."""
        if shelf is self.shelf:
            return self
        writer = ClientStore(shelf).writing()
        for client in self:
            writer.put(client, self.get(client))
        return writer.done()

    def pin(self, holder: Path) -> None:
        """Makes the rows durable, and keeps them for as long as the checkpoint at this path is there.

        Raises:
            OSError: the disk is full or fails.
        """
        places = (entry.place for entry in self._entries.values())
        self.shelf.pin(holder, [place for place in places if place is not None])


class Writer:
    """Takes a round's rows one at a time, so that they need never be in memory together; `done` is the new store."""

    def __init__(self, store: ClientStore):
        self._store = store
        self._changed: dict[int, Entry] = {}

    def put(self, client: int, stored: Stored) -> None:
        row, held, accepted = stored
        place = None if row is None else self._store.shelf.put(client, accepted, row)
        self._changed[client] = Entry(place, held, accepted)

    def tell(self, client: int, held: Held) -> None:
        """It was sent these, and its row stays as it was."""
        self._changed[client] = self._store.entry(client)._replace(held=held)

    def done(self) -> ClientStore:
        entries = {**self._store._entries, **self._changed}
        return ClientStore(self._store.shelf, self._store.shelf.tidied(entries))


class _Rows(Mapping[int, Row]):
    def __init__(self, store: ClientStore):
        self._store = store

    def __getitem__(self, client: int) -> Row:
        row = self._store.get(client).row
        if row is None:
            raise KeyError(client)
        return row

    def __iter__(self) -> Iterator[int]:
        return (c for c in self._store if self._store.entry(c).place is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)
