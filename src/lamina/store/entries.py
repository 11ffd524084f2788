"""A map from client positions to entries that is a value: a new one shares all with the old one but the way to what
changed, so it costs what changed, however many clients there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

Held = dict[str, int]  # what a client holds: "tree/name" -> tag of the value it was last sent


class Entry(NamedTuple):
    """What the server keeps of a client. Clients of which it is the same may have one together."""

    place: Any  # of its row on the shelf; None: no row
    held: Held
    accepted: int  # last round accepted from it, -1 for none


NOTHING = Entry(None, {}, -1)
_BITS = 5
_WIDTH = 1 << _BITS

_Node: TypeAlias = "list[Any] | None"  # of nodes, at the lowest level of entries; never changed; None: nothing below


class Entries:
    """A tree of nodes with 32 places each; a position's bits, five by five, are the way to its entry."""

    def __init__(self, content: Mapping[int, Entry] | None = None):
        self._root: _Node = None
        self._levels = 1
        self._count = 0
        if content:
            self._grow(content)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, client: int) -> Entry:
        """That of a client of which nothing is known is NOTHING."""
        if client >> _BITS * self._levels:
            return NOTHING
        found: Any = self._root
        for level in reversed(range(self._levels)):
            if found is None:
                return NOTHING
            found = found[client >> _BITS * level & _WIDTH - 1]
        return NOTHING if found is None else found

    def items(self) -> Iterator[tuple[int, Entry]]:
        """By position."""
        return _below(self._root, self._levels - 1, 0)

    def with_(self, changed: Mapping[int, Entry]) -> Entries:
        made = Entries()
        made._root, made._levels, made._count = self._root, self._levels, self._count
        if changed:
            made._grow(changed)
        return made

    def _grow(self, changed: Mapping[int, Entry]) -> None:
        largest = max(changed)
        while largest >> _BITS * self._levels:
            self._root = None if self._root is None else [self._root, *[None] * (_WIDTH - 1)]
            self._levels += 1
        self._root, new = _put(self._root, self._levels - 1, sorted(changed.items()))
        self._count += new


def _put(node: _Node, level: int, changed: list[tuple[int, Entry]]) -> tuple[list[Any], int]:
    """A node with these below it, and how many of them are new."""
    made = [None] * _WIDTH if node is None else list(node)
    new = 0
    if level == 0:
        for client, entry in changed:
            new += made[client & _WIDTH - 1] is None
            made[client & _WIDTH - 1] = entry
        return made, new
    parts: dict[int, list[tuple[int, Entry]]] = {}
    for client, entry in changed:
        parts.setdefault(client >> _BITS * level & _WIDTH - 1, []).append((client, entry))
    for at, part in parts.items():
        made[at], more = _put(made[at], level - 1, part)
        new += more
    return made, new


def _below(node: _Node, level: int, start: int) -> Iterator[tuple[int, Entry]]:
    for at, found in enumerate(node or ()):
        if found is not None:
            client = start + (at << _BITS * level)
            if level == 0:
                yield client, found
            else:
                yield from _below(found, level - 1, client)
