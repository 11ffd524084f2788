"""One client's round. Read this file second.

begin -> K x (gradient -> correct -> clip -> weight decay -> momentum -> step) -> report -> [codec] -> settle
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lamina import schedule, wire
from lamina.data.client_data import ClientData
from lamina.data.transform import Batch
from lamina.errors import expect, is_number, is_whole
from lamina.method import Method, Plan, Work
from lamina.random import address, generator
from lamina.store import Row
from lamina.tree import Message, Params, flatten, select, skeleton, squared_norms, sub, unflatten
from lamina.wire import frame

Loss: TypeAlias = Callable[[Any, Any], Tensor]
BUFFERS = ("average", "keep", "skip")
# trees and ledger rows of the engine's own
RESERVED = frozenset({"moments", "steps", "buffers", "shared", "score", "change"})


@dataclass(frozen=True)
class LocalSGD:
    """Local training: SGD from fresh optimiser state each round.

    Args:
        lr: learning rate, > 0.
        momentum: in [0, 1); one buffer, from zero each round.
        weight_decay: added to the gradient as weight_decay * w, >= 0.
        batch_size: examples per step; None = all of the client's examples in their given order, no shuffling.
        epochs: passes over the client's data per round; ignored when `steps` is given.
        steps: local steps per round, going on over epochs.
        schedule: factor of lr by round (see lamina.schedule), or a function (round, rounds) -> factor.
        clip: largest global norm of the corrected gradient, > 0; scaled by exactly clip / norm (torch's
            clip_grad_norm_ adds 1e-6 to the norm).
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int | None = 32
    epochs: int = 1
    steps: int | None = None
    schedule: str | schedule.Schedule = "constant"
    clip: float | None = None

    def __post_init__(self) -> None:
        fine = is_number(self.lr, 0) and self.lr > 0
        expect(fine, f"lr={self.lr}: expected a number > 0", where="local.lr")
        fine = is_number(self.momentum, 0, 1)
        expect(fine, f"momentum={self.momentum}: expected 0 <= momentum < 1", where="local.momentum")
        fine = is_number(self.weight_decay, 0)
        expect(fine, f"weight_decay={self.weight_decay}: expected a number >= 0", where="local.weight_decay")
        for name in ("batch_size", "epochs", "steps"):
            value = getattr(self, name)
            fine = is_whole(value, 1) or (value is None and name != "epochs")
            expect(fine, f"{name}={value}: expected a whole number >= 1", where=f"local.{name}")
        fine = self.clip is None or (is_number(self.clip, 0) and self.clip > 0)
        expect(fine, f"clip={self.clip}: expected a number > 0", where="local.clip")
        known = isinstance(self.schedule, str) or callable(self.schedule)
        expect(known, f"schedule={self.schedule!r}: expected e.g. 'exp:0.998', or a function", where="local.schedule")
        self.rate(0, 1)

    def rate(self, round: int, rounds: int) -> float:
        """Learning rate of this round in a run of so many rounds."""
        factor = schedule.parse(self.schedule) if isinstance(self.schedule, str) else self.schedule
        lr = self.lr * factor(round, rounds)
        expect(0 <= lr < math.inf, f"the schedule gives lr={lr} in round {round}", code="E103", where="local.schedule")
        return lr

    def count(self, examples: int) -> int:
        """Local steps of a client with so many examples."""
        if self.steps is not None:
            return self.steps
        return self.epochs * (1 if self.batch_size is None else -(-examples // self.batch_size))


def batches(data: ClientData, client: int, local: LocalSGD, seed: int, round: int) -> Iterator[Tensor]:
    """Example indices of each local step. Each epoch is a fresh permutation, drawn in succession from one generator;
    the last short batch of an epoch is kept; `steps` goes on over epochs."""
    indices = data.indices_of(client)
    n = len(indices)
    left = local.count(n)
    if local.batch_size is None:
        yield from (indices for _ in range(left))
        return
    order = generator(seed, "order", round, client)
    while left > 0:
        for chunk in torch.split(indices[torch.randperm(n, generator=order)], local.batch_size)[:left]:
            left -= 1
            yield chunk


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
    carry: frame.Carry | None  # takes every frame, so plans, messages and states are really encoded; None: they are not


class Reply(NamedTuple):
    """What the server has of a client after its round (or its probe, or an evaluation)."""

    client: int
    message: Message  # as decoded by the server
    row: Row | None  # the client's state if the server accepts the message; else it keeps the one from before
    sizes: dict[str, wire.Size]  # exact bytes, tree by tree; "" is the frame around them
    loss: float  # mean training loss over the local steps
    steps: int
    refused: str | None  # why the message must not be used: the first tensor with a non-finite value, or "loss"


class Trainer:
    """The one model of a worker, with buffers it reuses in place from client to client.

    Args:
        model: its parameters are overwritten before every use.
        channels_last: keep 4-D weights and image batches in NHWC memory, where convolutions and pools are faster.
    """

    def __init__(self, model: nn.Module, loss: Loss, data: ClientData, local: LocalSGD, seed: int, channels_last: bool):
        self.model = model
        self.loss = loss
        self.data = data
        self.local = local
        self.seed = seed
        self.channels_last = channels_last
        if channels_last:
            for tensor in model.parameters():
                tensor.data = _nhwc(tensor.data)
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights: list[Tensor] = list(self.params.values())
        # Where each buffer lives, not the tensor: a forward pass may put another one in its place.
        modules = dict(model.named_modules())
        places = {name: name.rpartition(".") for name, _ in model.named_buffers()}
        self._places = {name: (modules[owner]._buffers, leaf) for name, (owner, _, leaf) in places.items()}
        kept = set(model.state_dict(keep_vars=True))
        self._unsaved = {name: b.clone() for name, b in model.named_buffers() if name not in kept}
        self._held: Plan | None = None

    @property
    def buffers(self) -> Params:
        """The model's buffers as they are now, those of its state_dict."""
        return {name: x for name in self._places if name not in self._unsaved and (x := self._buffer(name)) is not None}

    def hold(self, plan: Plan) -> None:
        """Load the plan's model; its parameters only when they are not loaded already."""
        if self._held is plan:
            self._load_buffers(plan.buffers)
        else:
            self.load(plan.params, plan.buffers)
            self._held = plan

    def load(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        self._held = None
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(params[name])
        self._load_buffers(buffers)

    def _load_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Also those that are in no state_dict, such as caches a forward pass writes: nothing leaks between clients."""
        for name, value in {**self._unsaved, **buffers}.items():
            place, leaf = self._places[name]
            place[leaf] = value.clone()

    def _buffer(self, name: str) -> Tensor | None:
        place, leaf = self._places[name]
        found: Tensor | None = place[leaf]
        return found

    def batch(self, indices: Tensor, augment: torch.Generator | None) -> tuple[Batch, Batch]:
        x, y = self.data.examples(indices)
        return self.arrange(self.data.transform(x, augment)), y

    def arrange(self, x: Batch) -> Batch:
        return _nhwc(x) if self.channels_last and isinstance(x, Tensor) else x

    def forward(self, x: Batch) -> Any:
        """A batch that is a dictionary of tensors becomes keyword arguments."""
        return self.model(**x) if isinstance(x, dict) else self.model(x)

    def gradient(self, x: Batch, y: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Fresh tensors every time: no zeroing, no accumulation."""
        loss = self.loss(self.forward(x), y)
        return torch.autograd.grad(loss, self.weights, materialize_grads=True), loss.detach()

    def train(self, client: int, plan: Plan, start: Params, buffers: Params, correct: Correct | None) -> Trained:
        """K local steps from `start`. The order of one step: gradient, correct, clip, weight decay, momentum, step."""
        local, weights = self.local, self.weights
        self.load(start, buffers)
        self.model.train()
        augment = generator(self.seed, "augment", plan.round, client)
        velocity: list[Tensor] | None = None
        losses: list[Tensor] = []
        raw: tuple[Tensor, ...] = ()
        with addressed_rng(self.seed, "dropout", plan.round, client):
            for k, indices in enumerate(batches(self.data, client, local, self.seed, plan.round)):
                x, y = self.batch(indices, augment)
                raw, loss = self.gradient(x, y)
                losses.append(loss)
                with torch.no_grad():
                    g = list(raw)
                    if correct is not None:
                        corrected = correct(torch.tensor(k), self.detached(), dict(zip(self.params, g, strict=True)))
                        g = [corrected[name] for name in self.params]
                    if local.clip is not None:
                        g = _clipped(g, local.clip)
                    if local.weight_decay:
                        g = list(torch._foreach_add(g, weights, alpha=local.weight_decay))
                    if local.momentum:
                        if velocity is None:
                            velocity = [x.clone() for x in g]
                        else:
                            torch._foreach_mul_(velocity, local.momentum)
                            torch._foreach_add_(velocity, g)
                        g = velocity
                    torch._foreach_add_(weights, g, alpha=-plan.lr)
        steps = torch.tensor(len(losses))
        grads = {name: g.contiguous() for name, g in zip(self.params, raw, strict=True)}
        work = Work(self.snapshot(), {name: b.clone() for name, b in self.buffers.items()}, grads, steps)
        return Trained(work, float(torch.stack(losses).double().mean()))

    def detached(self) -> Params:
        return {name: p.detach() for name, p in self.params.items()}

    def snapshot(self) -> Params:
        """Copies of the weights in row-major memory."""
        return {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in self.params.items()}


Correct: TypeAlias = Callable[[Tensor, Params, Params], Params]


class Trained(NamedTuple):
    work: Work
    loss: float


def client_round(trainer: Trainer, setup: Setup, plan: Plan, client: int, row: Row) -> Reply:
    """One client's part of a round, the whole of it, as it runs in every engine and on a real network."""
    method = setup.method
    if setup.carry is not None:
        row = _through_bytes(row)
    start = method.begin(row.method, plan, plan.params)
    buffers = row.buffers if setup.buffers == "keep" and row.buffers else plan.buffers
    correct: Correct | None = None
    if method.has("correct"):

        def correct(step: Tensor, params: Params, grads: Params) -> Params:
            return method.correct(row.method, plan, step, params, grads)

    work, loss = trainer.train(client, plan, start, buffers, correct)
    message: Message = {"update": sub(select(work.params, plan.upload), plan.params)}
    if setup.buffers == "average" and work.buffers:
        message["buffers"] = work.buffers
    own = set(message)
    message, state = method.report(row.method, plan, work, message)
    taken = set(message) & RESERVED - own
    expect(not taken, f"{method!r} writes the tree {sorted(taken)}: reserved for the engine", code="E116")
    message["steps"] = {"steps": work.steps.double()}

    received, sizes = transmit_message(message, setup, plan, client, loss)
    state = method.settle(state, message, received)
    kept = work.buffers if setup.buffers == "keep" else {}
    row = Row(state, kept)
    refused = _non_finite(received, row) or (None if math.isfinite(loss) else "loss")
    return Reply(client, received, row, sizes, loss, int(work.steps), refused)


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
    grads = {name: g.contiguous() for name, g in zip(trainer.params, raw, strict=True)}
    message = setup.method.probe(plan.params, grads)
    post = _Post(plan, client, setup.carry)
    for tree, content in message.items():
        post.send(tree, DENSE, content, wire.Context(wire.schema_of(content)))
    received, _ = post.delivered({"loss": float(loss)})
    return Reply(client, received, None, post.sizes, float(loss), 0, _non_finite(received, None))


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
            self.sizes[tree] = wire.layout(self._blobs[tree], context)
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
        arrived = frame.unpack(self._carry("message", blob))
        trees = {t: codec.decode(arrived.sections[t], context) for t, (codec, context) in self._coding.items()}
        return trees, arrived.scalars


def transmit_message(
    message: Message, setup: Setup, plan: Plan, client: int, loss: float
) -> tuple[Message, dict[str, wire.Size]]:
    """What the server will decode, and the exact bytes of every tree. The uplink codes "update"; the rest is raw."""
    post = _Post(plan, client, setup.carry)
    for tree, content in message.items():
        if tree == "update":
            schema = wire.schema_of(plan.params)
            context = wire.Context(schema, plan.mask, None, setup.seed, "uplink", plan.round, client)
            update = post.send(tree, setup.uplink, content, context)
        elif tree != "steps":
            post.send(tree, DENSE, content, wire.Context(wire.schema_of(content)))
    if setup.moments:
        moments = {name: torch.tensor(v, dtype=torch.float64) for name, v in squared_norms(update).items()}
        post.send("moments", DENSE, moments, wire.Context(wire.schema_of(moments)))
    received, scalars = post.delivered({"steps": float(message["steps"]["steps"]), "loss": loss})
    return received | {"steps": {"steps": torch.tensor(scalars["steps"], dtype=torch.float64)}}, post.sizes


def _through_bytes(row: Row) -> Row:
    leaves = flatten(row)
    context = wire.Context(wire.schema_of(leaves))
    again: Row = unflatten(row, skeleton(row), DENSE.decode(DENSE.encode(leaves, context), context))
    return again


def _non_finite(message: Message, row: Row | None) -> str | None:
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
    return not x.is_floating_point() or bool(torch.isfinite(x).all())


def _clipped(grads: list[Tensor], limit: float) -> list[Tensor]:
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    return list(torch._foreach_mul(grads, (limit / norm).clamp(max=1.0)))


def _nhwc(x: Tensor) -> Tensor:
    """4-D tensors in real NHWC strides, also where a size of 1 makes both layouts look alike to torch."""
    if x.dim() != 4:
        return x
    n, c, h, w = x.shape
    if x.stride() == (h * w * c, 1, w * c, c):
        return x
    store = torch.empty((n, h, w, c), dtype=x.dtype, device=x.device)
    view = store.permute(0, 3, 1, 2)
    view.copy_(x)
    return view


class addressed_rng:
    """Within it torch's global generator starts from an address (dropout and the like); afterwards it is as before."""

    def __init__(self, seed: int, purpose: str, round: int = 0, client: int = 0):
        self.start = address(seed, purpose, round, client)

    def __enter__(self) -> None:
        self.before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self.start)

    def __exit__(self, *exception: object) -> None:
        torch.default_generator.set_state(self.before)
