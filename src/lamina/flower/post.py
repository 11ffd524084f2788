"""Letters and answers as Flower messages: one to a node and one back, however many clients it has.

Flower names a node anew when its SuperNode is started again, unless it has a key. So nodes are known by the clients
that they said they have: who appears is asked, and its clients are written to there from then on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import xxhash
from flwr.app import Message, MessageType

from lamina.errors import LaminaError, WireError
from lamina.flower.records import framing, packed, unpacked
from lamina.flower.rollcall import POLL_S, RollCall
from lamina.remote import Lost, Roll, bundled, register, unbundled
from lamina.remote.envelope import sections_at

_CLOCKS_S = 60.0  # by which a node's clock may be off: Flower drops what is older than it should be by the clock
_AGAIN_S = 20.0  # seconds a node that has just appeared has, to say which clients it has
_SLACK = 4096  # bytes of a bundle beyond its parts
_PER_PART = 64


class Carried(NamedTuple):
    """Bytes since the beginning. `packed`: letters and answers, equal plans of a node's clients once; `framing`: what
    Flower's records add to them."""

    messages: int = 0
    packed_down: int = 0
    packed_up: int = 0
    framing_down: int = 0
    framing_up: int = 0

    def plus(self, **more: int) -> Carried:
        return self._replace(**{key: getattr(self, key) + n for key, n in more.items()})


class _Parcel(NamedTuple):
    """A message under way."""

    clients: tuple[int, ...]
    most: int  # bytes of the whole answer


class GridPost:
    """A `lamina.remote.Post` on Flower's Grid.

    Args:
        call: with the rolls of the nodes.
        names: of the clients, by their numbers.
        experiment: under which nodes keep what they remember.
        patience_s: seconds after which nobody waits for an answer any more; None: there are none.
        say: is told of what happens to nodes.
    """

    def __init__(
        self, grid: Any, call: RollCall, names: Sequence[str], experiment: str, patience_s: float | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.carried = Carried()
        self._grid = grid
        self._call = call
        self._names = tuple(names)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._experiment = experiment
        self._ttl = None if patience_s is None else patience_s + _CLOCKS_S
        self._say = say
        self._homes: dict[int, int] = {}  # client -> node id
        for node, roll in call.rolls.items():
            self._settle(node, roll)
        self._letters: list[tuple[int, bytes, bytes]] = []  # not sent yet: client, what is its own, hash of the rest
        self._bodies: dict[bytes, bytes] = {}  # the rest, which letters of a plan have in common
        self._most = 0
        self._under_way: dict[str, _Parcel] = {}
        self._arrived: deque[tuple[int, bytes | Lost]] = deque()

    def send(self, letters: Iterable[tuple[int, bytes]], most: int) -> None:
        """They go when an answer is waited for: what is said to several clients of a node then goes in one message."""
        for client, blob in letters:
            cut = sections_at(blob)
            body = xxhash.xxh3_128_digest(memoryview(blob)[cut:])
            self._bodies.setdefault(body, blob[cut:])
            self._letters.append((client, blob[:cut], body))
        self._most = max(self._most, most)

    def receive(self, timeout_s: float | None) -> tuple[int, bytes | Lost] | None:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._arrived:
            self._post()
            if not self._arrived and not self._under_way:
                return None
            self._pull()
            if self._arrived or not self._under_way:
                continue
            left = POLL_S if end is None else min(POLL_S, end - time.monotonic())
            if left <= 0:
                return None
            time.sleep(left)
        return self._arrived.popleft()

    def _post(self) -> None:
        if not self._letters:
            return
        here = self._around()
        letters, bodies, most = self._letters, self._bodies, self._most
        self._letters, self._bodies, self._most = [], {}, 0
        nodes: dict[int, list[tuple[int, bytes, bytes]]] = {}
        for letter in letters:
            nodes.setdefault(self._homes[letter[0]], []).append(letter)
        for node, own in nodes.items():
            clients = tuple(client for client, _, _ in own)
            self._forget(clients)
            if node not in here:
                self._lose(clients, "its node is not connected")
                continue
            blob = bundled((client, head + bodies[body]) for client, head, body in own)
            content = packed(blob, self._about(clients))
            message = Message(content, dst_node_id=node, message_type=MessageType.TRAIN, ttl=self._ttl)
            pushed = [*self._grid.push_messages([message])]
            if not pushed or pushed[0] is None:
                self._lose(clients, "Flower did not take the message to its node")
                continue
            self._under_way[pushed[0]] = _Parcel(clients, (most + _PER_PART) * len(clients) + _SLACK)
            self.carried = self.carried.plus(messages=1, packed_down=len(blob), framing_down=framing(content))

    def _forget(self, clients: Sequence[int]) -> None:
        """What is under way to these clients from before: whatever comes of it is not meant any more."""
        for said, parcel in [*self._under_way.items()]:
            if not {*parcel.clients}.isdisjoint(clients):
                del self._under_way[said]

    def _about(self, clients: Sequence[int]) -> dict[str, Any]:
        return {
            "experiment": self._experiment,
            "clients": len(self._names),
            "numbers": list(clients),
            "names": [self._names[client] for client in clients],
        }

    def _pull(self) -> None:
        for reply in self._grid.pull_messages([*self._under_way]):
            parcel = self._under_way.pop(reply.metadata.reply_to_message_id, None)
            if parcel is None:
                continue
            if reply.has_error():
                self._lose(parcel.clients, f"its node says: {reply.error.reason or 'no reason given'}")
                continue
            try:
                blob, _ = unpacked(reply.content)
                self.carried = self.carried.plus(packed_up=len(blob), framing_up=framing(reply.content))
                answers = [part for part in unbundled(blob, parcel.most) if part[0] in parcel.clients]
            except WireError as error:
                self._lose(parcel.clients, f"what its node sent is refused: {error.code} {error.message}")
                continue
            self._arrived.extend(answers)

    def _lose(self, clients: Iterable[int], reason: str) -> None:
        self._arrived.extend((client, Lost(reason)) for client in clients)

    def _around(self) -> set[int]:
        """The nodes that are connected. One that has appeared is asked for its clients first."""
        here = {*self._grid.get_node_ids()}
        fresh = here - self._call.known
        self._ask(here)
        end = time.monotonic() + _AGAIN_S
        while fresh & self._call.asked and time.monotonic() < end:
            time.sleep(POLL_S)
            self._ask(())
        return here

    def _ask(self, here: Iterable[int]) -> None:
        before = {*self._call.rolls}
        try:
            self._call.ask(here)
            self._call.take()
        except LaminaError as error:
            self._say(f"{error.code}  {error.message}")
        for node, roll in self._call.rolls.items():
            if node not in before:
                self._settle(node, roll)

    def _settle(self, node: int, roll: Roll) -> None:
        """Where its clients are from now on; those that the run does not know are left out."""
        if not roll.sizes:
            self._say(f"node {node} is here, without clients")
            return
        try:
            register([roll])
        except LaminaError as error:
            self._say(f"{error.code}  {error.message}: node {node} is left out")
            return
        here = {self._numbers[name]: node for name in roll.sizes if name in self._numbers}
        self._homes |= here
        self._say(f"node {node} is here, with {len(here)} clients")
