"""A network without one: bytes go from a server to nodes in this process, and back. Tests say what it does to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import cases
from lamina import ClientData, Federation, State
from lamina.remote import Lost, MemoryShelf, Node, Roll, Shelf, over, register
from lamina.remote.bundle import bundled, unbundled

Happens = Callable[[int, bytes], "Iterable[tuple[int, bytes | Lost]]"]  # client, answer -> what arrives instead


class Streets:
    """A `Post`: nodes answer when the first answer is waited for. `down` and `up` count bytes."""

    def __init__(self, nodes: Sequence[Node]):
        self.nodes = list(nodes)
        self.happens: Happens = lambda client, blob: [(client, blob)]
        self.down = self.up = self.letters = 0
        self._bags: dict[int, list[tuple[int, bytes]]] = {}
        self._arrived: deque[tuple[int, bytes | Lost]] = deque()

    def send(self, letters: Iterable[tuple[int, bytes]], most: int) -> None:
        for client, blob in letters:
            self.down += len(blob)
            self.letters += 1
            (home,) = [i for i, node in enumerate(self.nodes) if client in node.clients]
            self._bags.setdefault(home, []).append((client, bytes(blob)))

    def receive(self, timeout_s: float | None) -> tuple[int, bytes | Lost] | None:
        bags, self._bags = self._bags, {}
        for home in sorted(bags, reverse=True):  # not in the order in which they were sent
            bag = unbundled(bundled(reversed(bags[home])))
            for client, blob in unbundled(bundled(self.nodes[home].answer(bag))):
                self.up += len(blob)
                self._arrived.extend(self.happens(client, blob))
        return self._arrived.popleft() if self._arrived else None


@cache
def shared(dtype: Any = None) -> ClientData:
    """The laws' data without the clients' own test sets."""
    data = cases.data() if dtype is None else cases.data(dtype)
    return replace(data, client_tests=None, check=False)


def registry(data: ClientData) -> ClientData:
    rolls = [Roll.unpacked(Roll.of(data.subset([c])).packed()) for c in range(len(data))]
    return ClientData.registry(register(rolls), test=data.test)


def connected(
    make: Callable[..., Federation], homes: Sequence[Sequence[int]], shelf: Callable[[Federation], Shelf] | None = None,
    data: ClientData | None = None, together: bool = False, **more: Any,
) -> tuple[Federation, Streets]:  # fmt: skip
    """A server and its nodes, which have nothing in common but what `make(examples)` makes.

    Args:
        homes: the clients of each node.
        shelf: of a node; None: in memory.
        more: options of the server alone.
    """
    data = data or shared()
    nodes = []
    for home in homes:
        fed = make(examples=replace(data.subset(home), test=None, check=False).among(data.names))
        nodes.append(Node(fed, MemoryShelf() if shelf is None else shelf(fed)))
    streets = Streets(nodes)
    return over(make(examples=registry(data), **more), streets, together=together), streets


def rows(state: State, nodes: Sequence[Node]) -> dict[int, Any]:
    """What the clients of a state remember at their nodes, to the bit, as `cases.everything` has it."""
    found = {}
    for c in state.clients:
        accepted = state.clients.entry(c).accepted
        (node,) = [node for node in nodes if c in node.clients]
        holding = node.shelf.get(c)
        found[c] = cases.bits(holding.rows[accepted]) if holding and accepted >= 0 else cases.bits(None)
    return found
