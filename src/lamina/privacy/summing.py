"""A round whose messages are summed securely: replies go in, and the server has their mean alone.

All roles are in one process here, and say to each other exactly what they would over a network: every table, every
sealed share and every masked vector is made, encoded, counted and read. Keys and shares come before training, so a
client that has nothing to send after it (it is gone, its training diverged, its update is beyond the limit) has
dropped out of the sum, and its masks are made again from the others' shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamina import wire
from lamina.aggregate import total
from lamina.client import Reply, Setup
from lamina.method import Plan
from lamina.privacy.fixed import WIDE, Ring, exponent, fits, from_ring, to_ring
from lamina.privacy.protocol import Client, Server
from lamina.privacy.secure import SecureSum
from lamina.tree import Message, Params
from lamina.wire import frame

BEYOND, TOO_FEW = "E319", "E307"
_LOSS = 2.0**20  # a loss above it has diverged


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
            sum_ = sum_ or _Sum(secure, setup, plan, clients, _trees(reply))
            reply = sum_.taken(reply)
        stubs.append(reply)
    yield from stubs if sum_ is None else sum_.over(stubs)


def _trees(reply: Reply) -> Message:
    """What of a reply goes into the sum. The number of local steps does not: it follows from what is registered."""
    trees = {tree: content for tree, content in reply.message.items() if tree != "steps"}
    return {**trees, "loss": {"loss": torch.tensor(reply.loss, dtype=torch.float64)}}


class _Tree(NamedTuple):
    """How the entries of a tree become elements of a ring, and how these travel."""

    bits: int
    limits: dict[str, float]  # by tensor
    exponents: dict[str, int]
    like: wire.Schema  # of the tensors that it has
    context: wire.Context
    kept: dict[str, Tensor]  # masks of those that have one

    @classmethod
    def of(cls, tree: str, content: Params, secure: SecureSum, plan: Plan, clients: int) -> _Tree:
        update = tree == "update"
        bits = secure.bits if update else WIDE
        limits = dict.fromkeys(content, secure.limit)
        if tree == "moments":  # |u|^2 <= limit^2 * entries
            limits = {name: secure.limit**2 * max(1, plan.kept(name)) for name in content}
        if tree == "loss":
            limits = {"loss": _LOSS}
        exponents = {name: exponent(bits, clients, limit) for name, limit in limits.items()}
        mask = plan.mask if update else None
        of = plan.params if update else content
        schema = {name: wire.Spec(tuple(x.shape), torch.int64) for name, x in of.items()}
        kept = {name: m for name, m in (mask or {}).items() if name in content}
        return cls(bits, limits, exponents, wire.schema_of(content), wire.Context(schema, mask), kept)

    @property
    def codec(self) -> wire.Dense:
        return wire.Dense(f"ring:{self.bits}")

    def refuses(self, content: Params) -> str | None:
        """The first tensor that does not fit."""
        if wire.schema_of(content) != self.like:
            return next(iter({**content, **self.like}), "")
        return next((name for name, x in content.items() if not fits(x, self.limits[name])), None)

    def elements(self, content: Params, weight: float) -> Ring:
        parts = [
            to_ring(self._entries(name, x), weight, self.exponents[name], self.bits) for name, x in content.items()
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    def tensors(self, elements: Ring) -> Params:
        """In the shapes of the model, 0 outside the mask."""
        flat = torch.from_numpy(elements.view(np.int64))
        return {name: self._whole(name, part) for name, part in self._parts(flat)}

    def numbers(self, elements: Ring, over: float) -> Params:
        """What the elements of a sum stand for, divided by this, in the tensors' own types."""
        made = {}
        for name, part in self._parts(torch.from_numpy(elements.view(np.int64))):
            real = torch.from_numpy(from_ring(part.numpy().view(np.uint64), self.exponents[name], self.bits)) / over
            made[name] = self._whole(name, real).to(self.like[name].dtype)
        return made

    def flat(self, tensors: Params) -> Ring:
        """The elements again, as they came."""
        parts = [self._entries(name, tensors[name]).reshape(-1).numpy() for name in self.like]
        return np.concatenate(parts).view(np.uint64) if parts else np.empty(0, np.uint64)

    def _entries(self, name: str, x: Tensor) -> Tensor:
        return x[self.kept[name]] if name in self.kept else x

    def _parts(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        at = 0
        for name, spec in self.like.items():
            count = int(self.kept[name].sum()) if name in self.kept else spec.numel
            yield name, flat[at : at + count]
            at += count

    def _whole(self, name: str, part: Tensor) -> Tensor:
        shape = self.like[name].shape
        if name not in self.kept:
            return part.reshape(shape)
        whole = torch.zeros(shape, dtype=part.dtype)
        whole[self.kept[name]] = part
        return whole


class _Sum:
    """One sum over the clients that were asked, with their keys and shares.

    Args:
        first: the trees of one client; those of all others are like it.
    """

    def __init__(self, secure: SecureSum, setup: Setup, plan: Plan, clients: Sequence[int], first: Message):
        self._secure = secure
        self._round = plan.round
        alike = {"loss", *setup.method.uniform}
        self._alike = alike | ({"moments"} if "update" in alike else set())
        weights = setup.weights_of(clients)
        self._weights = {c: w / max(weights) for c, w in zip(clients, weights, strict=True)}
        self._trees = {tree: _Tree.of(tree, x, secure, plan, len(clients)) for tree, x in first.items()}
        self._steps: dict[int, float] = {}
        self._up: dict[int, dict[str, wire.Size]] = {c: {} for c in clients}
        self._down: dict[int, dict[str, wire.Size]] = {c: {} for c in clients}
        self._needed = secure.needed(len(clients))
        widths = {tree: form.bits for tree, form in self._trees.items()}
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
        c, trees = reply.client, _trees(reply)
        odd = next((tree for tree in {**trees, **self._trees} if tree not in trees or tree not in self._trees), None)
        for tree, form in self._trees.items():
            wrong = odd if odd is not None else form.refuses(trees[tree])
            if wrong is not None:
                layer = wrong if tree == "update" or odd is not None else f"{tree}/{wrong}"
                said = f"an entry beyond secure.limit={self._secure.limit:g}"
                return reply._replace(message={}, row=None, refused=said, code=BEYOND, layer=layer)
        given = {
            tree: form.elements(trees[tree], 1.0 if tree in self._alike else self._weights[c])
            for tree, form in self._trees.items()
        }
        self._server.masked(c, self._carried(c, self._clients[c].masked(given), reply))
        return reply._replace(message={}, residual={}, within=True)

    def _carried(self, c: int, hidden: dict[str, Ring], reply: Reply) -> dict[str, Ring]:
        """What the server reads of the bytes."""
        blobs = {
            tree: form.codec.encode(form.tensors(hidden[tree]), form.context) for tree, form in self._trees.items()
        }
        scalars: dict[str, float] = {}
        if "steps" in reply.message:
            self._steps[c] = scalars["steps"] = float(reply.message["steps"]["steps"])
        framed = frame.pack(frame.Frame("message", self._round, c, scalars, blobs))
        arrived = frame.unpack(framed).sections
        sizes = {tree: wire.layout(arrived[tree], form.context) for tree, form in self._trees.items()}
        around = len(framed) - sum(size.total for size in sizes.values())
        self._up[c] |= {**sizes, "": wire.Size({}, around, {})}
        return {tree: form.flat(form.codec.decode(arrived[tree], form.context)) for tree, form in self._trees.items()}

    def over(self, stubs: Sequence[Reply]) -> Iterator[Reply]:
        """The replies with what all that was said weighs, and the mean at the first."""
        came = self._server.came
        enough = len(came) >= self._needed
        message, loss = self._mean() if enough else ({}, 0.0)
        for stub in stubs:
            c = stub.client
            if not stub.beside:
                stub = stub._replace(sizes=self._up[c], down=self._down[c])
            if stub.refused is None and not enough:
                said = f"{len(came)} of {len(self._clients)} clients were left, the sum needs {self._needed}"
                stub = stub._replace(row=None, refused=said, code=TOO_FEW, within=False)
            elif stub.refused is None:
                stub = stub._replace(loss=loss)
                if c == came[0]:
                    stub = stub._replace(message=message, members=tuple(came), within=False)
            yield stub

    def _mean(self) -> tuple[Message, float]:
        """Of all who came, and of their losses."""
        came = self._server.came
        list_ = self._server.who_came()
        answers = {}
        for c in came:
            asked = _said(self._down[c], "unmask", list_)
            answers[c] = _said(self._up[c], "unmask", self._clients[c].unmask(asked))
        sums = self._server.sums(answers)
        shares = [self._weights[c] for c in came]
        over = {tree: float(len(came)) if tree in self._alike else total(shares) for tree in self._trees}
        message = {tree: form.numbers(sums[tree], over[tree]) for tree, form in self._trees.items()}
        loss = float(message.pop("loss")["loss"])
        if self._steps:
            steps = total(self._steps[c] * w for c, w in zip(came, shares, strict=True)) / total(shares)
            message["steps"] = {"steps": torch.tensor(steps, dtype=torch.float64)}
        return message, loss


def _said(sizes: dict[str, wire.Size], step: str, content: bytes) -> bytes:
    """These bytes, in a frame of their own, counted."""
    around = frame.overhead("message", {}, {step: len(content)})
    sizes[step] = wire.Size({}, around + len(content), {})
    return content
