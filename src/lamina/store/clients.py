"""The store as a value: what the server keeps of every client, over a shelf that holds the rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lamina.store.entries import NOTHING, Entries, Entry, Held
from lamina.tree import Params, flatten


class Row(NamedTuple):
    """What a client itself remembers between rounds."""

    method: Any  # the method's client state
    buffers: Params  # its own, under buffers="keep"; else empty


class Stored(NamedTuple):
    """A client's row, with what the server knows of it."""

    row: Row | None  # None: it has received something but none of its messages was accepted yet
    held: Held
    accepted: int  # last round accepted from it, -1 for none


class Shelf(Protocol):
    """Holds rows. A place that it gave out stays good for as long as somebody has it.

    Attributes:
        shares: rows that are alike may have one place.
    """

    shares: bool

    def put(self, client: int, accepted: int, row: Row) -> Any: ...

    def get(self, client: int, place: Any) -> Row: ...

    def will_need(self, places: Iterable[Any]) -> None:
        """Read ahead, if that helps."""

    def tally(self, before: Any, gone: Iterable[Any], come: Iterable[Any]) -> Any:
        """What the shelf wants to know of all rows of a store, from that of the store before (None: of an empty one)
        and the places that changed."""

    def moved(self, tally: Any, entries: Entries) -> Mapping[int, Entry]:
        """The entries of a new store of which the rows are now in better places."""
        ...

    def begin(self) -> None:
        """Before round 0 of a new run. Raises StorageError when the shelf is another's."""

    def claim(self) -> None:
        """Before a run that goes on changes anything. Raises StorageError when another process is at the shelf."""

    def pin(self, holder: Path, places: Iterable[Any]) -> None:
        """Make these durable, and keep them for as long as there is something at the path `holder`."""

    def unpin(self, folder: Path) -> None:
        """Let go of what was kept for paths in this folder that are no more."""


class Kept:
    """A row in memory.

    Attributes:
        files: the last two files of checkpoints that it was written to: round and SHA-256.
        bare: there is no tensor in it, so it is in no file.
        size: bytes.
    """

    __slots__ = ("bare", "files", "row", "size")

    def __init__(self, row: Row, files: tuple[tuple[int, str], ...] = ()):
        tensors = flatten(row).values()
        self.row = row
        self.files = files
        self.bare = not tensors
        self.size: int = sum(x.nbytes for x in tensors)


class Memory:
    """Where rows are objects."""

    shares = True

    def put(self, client: int, accepted: int, row: Row) -> Kept:
        return Kept(row)

    def get(self, client: int, place: Kept) -> Row:
        return place.row

    def will_need(self, places: Iterable[Kept]) -> None:
        pass

    def tally(self, before: None, gone: Iterable[Kept], come: Iterable[Kept]) -> None:
        pass

    def moved(self, tally: None, entries: Entries) -> Mapping[int, Entry]:
        return {}

    def begin(self) -> None:
        pass

    def claim(self) -> None:
        pass

    def pin(self, holder: Path, places: Iterable[Kept]) -> None:
        pass

    def unpin(self, folder: Path) -> None:
        pass


MEMORY = Memory()


class ClientStore:
    """Rows by client position. A value: `updated` makes a new store that shares the untouched rows.

    A client that never took part has no row; one that is absent keeps its row as it is.
    """

    def __init__(self, shelf: Shelf = MEMORY, entries: Mapping[int, Entry] | None = None):
        self.shelf = shelf
        self._entries = Entries(entries)
        self._tally = shelf.tally(None, (), _places((entries or {}).values()))

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        return (client for client, _ in self._entries.items())

    def entry(self, client: int) -> Entry:
        """What is known of a client, without reading its row."""
        return self._entries[client]

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """Of all clients, by position."""
        return self._entries.items()

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
        tables: dict[int, Held] = {}
        alike: dict[int, Entry] = {}
        for _, entry in self.entries():
            table = tables.setdefault(id(entry.held), entry.held | tags)
            alike.setdefault(id(entry), entry._replace(held=table))
        return ClientStore(self.shelf, {c: alike[id(entry)] for c, entry in self.entries()})

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
        self.shelf.pin(holder, _places(entry for _, entry in self.entries()))


class Writer:
    """Takes a round's rows one at a time, so that they need never be in memory together; `done` is the new store."""

    def __init__(self, store: ClientStore):
        self._store = store
        self._changed: dict[int, Entry] = {}
        self._bare: tuple[Row, Any] | None = None  # the last row without tensors, and its place
        self._last = NOTHING

    def put(self, client: int, stored: Stored) -> None:
        row, held, accepted = stored
        self._note(client, None if row is None else self._placed(client, accepted, row), held, accepted)

    def _placed(self, client: int, accepted: int, row: Row) -> Any:
        shelf = self._store.shelf
        if not shelf.shares or flatten(row):
            return shelf.put(client, accepted, row)
        if self._bare is None or self._bare[0] != row:  # of one method, so equal ones are of the same classes
            self._bare = row, shelf.put(client, accepted, row)
        return self._bare[1]

    def tell(self, client: int, held: Held) -> None:
        """It was sent these, and its row stays as it was."""
        place, _, accepted = self._store.entry(client)
        self._note(client, place, held, accepted)

    def _note(self, client: int, place: Any, held: Held, accepted: int) -> None:
        last = self._last
        if last.place is not place or last.held is not held or last.accepted != accepted:
            self._last = Entry(place, held, accepted)
        self._changed[client] = self._last

    def done(self) -> ClientStore:
        made = _with(self._store, self._changed)
        moved = made.shelf.moved(made._tally, made._entries)
        return _with(made, moved) if moved else made


def _with(store: ClientStore, changed: Mapping[int, Entry]) -> ClientStore:
    made = ClientStore(store.shelf)
    made._entries = store._entries.with_(changed)
    before = _places(map(store.entry, changed))
    made._tally = store.shelf.tally(store._tally, before, _places(changed.values()))
    return made


def _places(entries: Iterable[Entry]) -> Iterator[Any]:
    return (entry.place for entry in entries if entry.place is not None)


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
