"""A round whose messages are summed securely: replies go in, and the server has their mean alone.

All roles are in one process here, and say to each other exactly what they would over a network: every table, every
sealed share and every masked vector is made, encoded, counted and read. Keys and shares come before training, so a
client that has nothing to send after it (it is gone, its training diverged, its update is beyond the limit) has
dropped out of the sum, and its masks are made again from the others' shares. With clients that are elsewhere it is
`lamina.remote.summing`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lamina import wire
from lamina.client import Reply, Setup
from lamina.method import Plan
from lamina.privacy.protocol import Client, Server
from lamina.privacy.secure import SecureSum
from lamina.privacy.trees import Mean, Trees, of_reply
from lamina.wire import frame
from lamina.wire.container import Buffer

BEYOND, TOO_FEW = "E319", "E307"

Sizes = Mapping[int, dict[str, wire.Size]]  # client -> step or tree -> what it weighs


def summed(
    secure: SecureSum, setup: Setup, plan: Plan, clients: Sequence[int], replies: Iterable[Reply]
) -> Iterator[Reply]:
    """The same replies in the same order: the first that came has the mean, as that of all its `members`, and none has
    a message of its own. Where too few came all are refused (E307).

    Args:
        clients: who was asked.
    """
    stubs = []
    sum_: _Sum | None = None
    for reply in replies:
        if reply.refused is None:
            sum_ = sum_ or _Sum(secure, setup, plan, clients, reply)
            reply = sum_.taken(reply)
        stubs.append(reply)
    yield from stubs if sum_ is None else sum_.over(stubs)


def weights(setup: Setup, clients: Sequence[int]) -> dict[int, float]:
    """Of their numbers, the largest 1."""
    raw = setup.weights_of(clients)
    return {c: w / max(raw) for c, w in zip(clients, raw, strict=True)}


def too_few(left: int, asked: int, needed: int) -> str:
    return f"{left} of {asked} clients were left, the sum needs {needed}"


def told(stubs: Iterable[Reply], came: Sequence[int], made: Mean | str, up: Sizes, down: Sizes) -> Iterator[Reply]:
    """The replies with what all that was said weighs, and the mean at the first.

    Args:
        came: who is in the sum.
        made: their mean; why there is none.
    """
    for stub in stubs:
        if stub.beside:
            yield stub
            continue
        stub = stub._replace(sizes=up[stub.client], down=down[stub.client])
        if stub.refused is not None:
            yield stub._replace(loss=math.nan)
        elif isinstance(made, str):
            yield stub._replace(row=None, refused=made, code=TOO_FEW, within=False, loss=math.nan)
        elif stub.client == came[0]:
            yield stub._replace(loss=made.loss, message=made.message, members=tuple(came), within=False)
        else:
            yield stub._replace(loss=made.loss)


class _Sum:
    """One sum over the clients that were asked, with their keys and shares.

    Args:
        first: the first reply; all others are like it.
    """

    def __init__(self, secure: SecureSum, setup: Setup, plan: Plan, clients: Sequence[int], first: Reply):
        self._weights = weights(setup, clients)
        self._trees = Trees(secure, setup, plan, len(clients), of_reply(first))
        self._steps: dict[int, float] = {}
        self._up: dict[int, dict[str, wire.Size]] = {c: {} for c in clients}
        self._down: dict[int, dict[str, wire.Size]] = {c: {} for c in clients}
        self._needed = secure.needed(len(clients))
        widths = self._trees.widths
        self._server = Server(widths, self._needed)
        self._clients = {c: Client(c, widths) for c in clients}
        for c, client in self._clients.items():
            self._server.keys(c, _said(self._up[c], "keys", client.keys()))
        for c, client in self._clients.items():
            roster = _said(self._down[c], "keys", self._server.roster())
            self._server.shares(c, _said(self._up[c], "shares", client.shares(roster, self._needed)))
        for c, client in self._clients.items():
            client.take(_said(self._down[c], "shares", self._server.shares_for(c)))

    def taken(self, reply: Reply) -> Reply:
        """What is left of a reply once its message is in the sum, or why it is not."""
        c, trees = reply.client, of_reply(reply)
        beyond = self._trees.refuses(trees)
        if beyond is not None:
            return reply._replace(message={}, row=None, refused=beyond.why, code=BEYOND, layer=beyond.layer)
        hidden = self._clients[c].masked(self._trees.elements(trees, self._weights[c]))
        scalars: dict[str, float] = {}
        if "steps" in reply.message:
            self._steps[c] = scalars["steps"] = float(reply.message["steps"]["steps"])
        framed = self._trees.packed(c, hidden, scalars)
        elements, sizes = self._trees.unpacked(frame.unpack(framed).sections)
        self._up[c] |= sizes | {"": around(framed, sizes)}
        self._server.masked(c, elements)
        return reply._replace(message={}, residual={}, within=True)

    def over(self, stubs: Sequence[Reply]) -> Iterator[Reply]:
        """The replies, once all are taken."""
        came = self._server.came
        made: Mean | str = too_few(len(came), len(self._clients), self._needed)
        if len(came) >= self._needed:
            list_ = self._server.who_came()
            answers = {}
            for c in came:
                asked = _said(self._down[c], "unmask", list_)
                answers[c] = _said(self._up[c], "unmask", self._clients[c].unmask(asked))
            steps = [self._steps[c] for c in came] if self._steps else []
            made = self._trees.mean(self._server.sums(answers), [self._weights[c] for c in came], steps)
        return told(stubs, came, made, self._up, self._down)


def around(framed: Buffer, sizes: Mapping[str, wire.Size]) -> wire.Size:
    """What of a frame is in none of its trees."""
    return wire.Size({}, len(framed) - sum(size.total for size in sizes.values()), {})


def _said(sizes: dict[str, wire.Size], step: str, content: bytes) -> bytes:
    """These bytes, in a frame of their own, counted."""
    overhead = frame.overhead("message", {}, {step: len(content)})
    sizes[step] = wire.Size({}, overhead + len(content), {})
    return content
