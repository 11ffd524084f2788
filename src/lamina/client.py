"""One client's round. Read this file second.

begin -> K x (gradient -> correct -> clip -> weight decay -> momentum -> step) -> report -> [codec] -> settle
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamina import wire
from lamina.data.client_data import ClientData
from lamina.errors import expect
from lamina.method import Method, Plan, Work
from lamina.random import generator
from lamina.store import Row
from lamina.training import Correct, LocalSGD, Loss, Trainer
from lamina.tree import Message, Params, flatten, select, skeleton, squared_norms, sub, unflatten
from lamina.wire import frame

BUFFERS = ("average", "keep", "skip")
# trees and ledger rows of the engine's own
RESERVED = frozenset({"moments", "steps", "buffers", "shared", "score", "change", "unused"})


class Setup(NamedTuple):
    """What every client round of a federation has in common."""

    data: ClientData
    method: Method[Any, Any]  # bound
    local: LocalSGD
    loss: Loss
    uplink: wire.Codec
    buffers: str  # policy: "average" | "keep" | "skip"
    moments: bool
    seed: int
    weights: str  # of the messages in their mean: "examples" | "uniform"
    apart: bool  # whether the server looks at every client's update by itself
    carry: frame.Carry | None  # takes every frame, so plans, messages and states are really encoded; None: they are not

    def weights_of(self, clients: Sequence[int]) -> list[float]:
        """Of their messages in a mean, before they are normalised."""
        if self.weights == "uniform":
            return [1.0] * len(clients)
        return [float(n) for n in self.data.sizes_of(clients)]


class Reply(NamedTuple):
    """What the server has of a client after its round (or its probe, or an evaluation)."""

    client: int
    message: Message  # as decoded by the server
    row: Row | None  # the client's state if the server accepts the message; else it keeps the one from before
    sizes: dict[str, wire.Size]  # exact bytes, tree by tree; "" is the frame around them
    loss: float  # mean training loss over the local steps
    steps: int
    refused: str | None  # why the message must not be used: the first tensor with a non-finite value, or "loss"
    code: str = "E310"  # of that reason; others come from clients that are elsewhere
    again: str | None = None  # why it was sent the whole plan after the one for what it was thought to hold
    residual: dict[str, float] = {}  # noqa: RUF012 |r|^2 by layer of what its method keeps back; only where the client is here
    members: tuple[int, ...] = ()  # whose weighted mean its message is, itself first; none of the others has one
    within: bool = False  # its message is within that of another, who names it as a member
    round: int | None = None  # that it answers; None: the one in which it was asked
    layer: str = ""  # that the refusal is about, where it does not name one itself
    beside: bool = False  # it is refused and not the answer that its client owes, which may still come
    down: dict[str, wire.Size] = {}  # noqa: RUF012 exact bytes of what it was sent beside the plan
    sent: bool = True  # whether it was sent the plan at all


class Start(NamedTuple):
    """Where a client begins its local training."""

    row: Row
    params: Params
    buffers: Params


def client_round(trainer: Trainer, setup: Setup, plan: Plan, client: int, row: Row | None) -> Reply:
    """One client's part of a round, the whole of it, as it runs in every engine and on a real network.

    `row` is what the client remembers; None: it has never taken part.
    """
    start = begin(setup, plan, row)
    method = setup.method
    correct: Correct | None = None
    if method.has("correct"):

        def correct(step: Tensor, params: Params, grads: Params) -> Params:
            return method.correct(start.row.method, plan, step, params, grads)

    work, loss = trainer.train(client, plan, start.params, start.buffers, correct)
    return finish(setup, plan, client, start.row, work, loss)


def known(setup: Setup, plan: Plan, row: Row | None) -> Row:
    """The row, or that of a client which has never taken part."""
    return Row(setup.method.init_client(plan.params), {}) if row is None else row


def begin(setup: Setup, plan: Plan, row: Row | None) -> Start:
    """The client's side up to its first step."""
    row = known(setup, plan, row)
    if setup.carry is not None:
        row = _through_bytes(row)
    buffers = row.buffers if setup.buffers == "keep" and row.buffers else plan.buffers
    return Start(row, setup.method.begin(row.method, plan, plan.params), buffers)


def finish(setup: Setup, plan: Plan, client: int, row: Row, work: Work, loss: float) -> Reply:
    """The client's side after its last step: what it sends, what of it arrives, what it remembers."""
    message, state = compose(setup, plan, row, work)
    message["steps"] = {"steps": work.steps.double()}
    received, sizes = transmit_message(message, setup, plan, client, loss)
    state = setup.method.settle(state, message, received)
    kept = work.buffers if setup.buffers == "keep" else {}
    row = Row(state, kept)
    refused = non_finite(received, row) or (None if math.isfinite(loss) else "loss")
    residual = _residual(state) if setup.moments else {}
    return Reply(client, received, row, sizes, loss, int(work.steps), refused, residual=residual)


def _residual(state: Any) -> dict[str, float]:
    """Squared norms of a method's client state called `residual`, whatever chain it is in. In the tensors' precision:
    the figure is for a person."""
    found: dict[str, float] = {}
    for path, x in flatten(state).items():
        before, _, name = path.partition("residual/")
        if name and isinstance(x, Tensor) and (not before or before.endswith("/")):
            found[name] = found.get(name, 0.0) + float(torch.linalg.vector_norm(x)) ** 2
    return found


def compose(setup: Setup, plan: Plan, row: Row, work: Work) -> tuple[Message, Any]:
    """The trees that a client has to say, before they are coded, and its method's state."""
    message: Message = {"update": sub(select(work.params, plan.upload), plan.params)}
    if setup.buffers == "average" and work.buffers:
        message["buffers"] = work.buffers
    own = set(message)
    message, state = setup.method.report(row.method, plan, work, message)
    taken = set(message) & RESERVED - own
    expect(not taken, f"{setup.method!r} writes the tree {sorted(taken)}: reserved for the engine", code="E116")
    return message, state


def client_probe(trainer: Trainer, setup: Setup, plan: Plan, client: int) -> Reply:
    """Before round 0: one gradient at the initial model on the client's first batch, in eval mode, no augmentation."""
    order = generator(setup.seed, "probe", 0, client)
    indices = setup.data.indices_of(client)
    if setup.local.batch_size is not None:
        indices = indices[torch.randperm(len(indices), generator=order)][: setup.local.batch_size]
    trainer.load(plan.params, plan.buffers)
    trainer.model.eval()
    x, y = trainer.batch(indices, None)
    raw, loss = trainer.gradient(x, y)
    grads = {name: g.cpu().contiguous() for name, g in zip(trainer.params, raw, strict=True)}
    message = setup.method.probe(plan.params, grads)
    post = _Post(plan, client, setup.carry)
    for tree, content in message.items():
        post.send(tree, DENSE, content, wire.Context(wire.schema_of(content)))
    received, _ = post.delivered({"loss": float(loss)})
    return Reply(client, received, None, post.sizes, float(loss), 0, non_finite(received, None))


DENSE = wire.Dense()


class _Post:
    """One message on its way up, tree by tree, and what it weighs."""

    def __init__(self, plan: Plan, client: int, carry: frame.Carry | None):
        self.sizes: dict[str, wire.Size] = {}
        self._plan = plan
        self._client = client
        self._carry = carry
        self._received: Message = {}
        self._blobs: dict[str, bytes] = {}
        self._coding: dict[str, tuple[wire.Codec, wire.Context]] = {}

    def send(self, tree: str, codec: wire.Codec, content: Params, context: wire.Context) -> Params:
        """What the server will decode of this tree."""
        if self._carry is not None:
            self._coding[tree] = codec, context
            self._blobs[tree] = codec.encode(content, context)
            self.sizes[tree] = wire.sized(codec, self._blobs[tree], context)
            self._received[tree] = codec.decode(self._blobs[tree], context)
        else:
            self._received[tree], self.sizes[tree] = codec.transmit(content, context)
        return self._received[tree]

    def delivered(self, scalars: dict[str, float]) -> tuple[Message, dict[str, float]]:
        """The whole message as it arrives, in its frame; the frame's own bytes are the size ""."""
        lengths = {tree: size.total for tree, size in self.sizes.items()}
        self.sizes[""] = wire.Size({}, frame.overhead("message", scalars, lengths), {})
        if self._carry is None:
            return self._received, scalars
        blob = frame.pack(frame.Frame("message", self._plan.round, self._client, scalars, self._blobs))
        carried = self._carry("message", blob)
        if carried is None:
            return self._received, scalars
        arrived = frame.unpack(carried)
        trees = {t: codec.decode(arrived.sections[t], context) for t, (codec, context) in self._coding.items()}
        return trees, arrived.scalars


def transmit_message(
    message: Message, setup: Setup, plan: Plan, client: int, loss: float
) -> tuple[Message, dict[str, wire.Size]]:
    """What the server will decode, and the exact bytes of every tree. The uplink codes "update"; the rest is raw."""
    post = _Post(plan, client, setup.carry)
    for tree, content in message.items():
        if tree == "update":
            update = post.send(tree, setup.uplink, content, uplink_context(setup, plan, client))
        elif tree != "steps":
            post.send(tree, DENSE, content, wire.Context(wire.schema_of(content)))
    if setup.moments:
        moments = {name: torch.tensor(v, dtype=torch.float64) for name, v in squared_norms(update).items()}
        post.send("moments", DENSE, moments, wire.Context(wire.schema_of(moments)))
    received, scalars = post.delivered({"steps": float(message["steps"]["steps"]), "loss": loss})
    return received | {"steps": {"steps": torch.tensor(scalars["steps"], dtype=torch.float64)}}, post.sizes


def uplink_context(setup: Setup, plan: Plan, client: int) -> wire.Context:
    """What both ends know of an update's coding."""
    schema = wire.schema_of(plan.params)
    return wire.Context(schema, plan.mask, None, setup.seed, "uplink", plan.round, client)


def _through_bytes(row: Row) -> Row:
    leaves = flatten(row)
    context = wire.Context(wire.schema_of(leaves))
    again: Row = unflatten(row, skeleton(row), DENSE.decode(DENSE.encode(leaves, context), context))
    return again


def non_finite(message: Message, row: Row | None) -> str | None:
    """The first tensor with a NaN or an infinity, in what the server decoded or in what the client would keep."""
    moments = message.get("moments", {})  # a finite sum of squares has finite terms: no need to look at them again
    for tree, content in message.items():
        if tree in ("steps", "moments"):
            continue
        for name, x in content.items():
            seen = tree == "update" and name in moments and math.isfinite(moments[name])
            if not seen and not _finite(x):
                return name if tree == "update" else f"{tree}/{name}"
    return next((f"state/{name}" for name, x in flatten(row).items() if not _finite(x)), None)


def _finite(x: Tensor) -> bool:
    """A finite sum says so of all its terms, and takes a sixtieth of the time."""
    return not x.is_floating_point() or bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
