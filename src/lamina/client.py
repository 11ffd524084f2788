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
from lamina.errors import expect, is_whole
from lamina.method import Method, Plan, Work
from lamina.random import address, generator
from lamina.store import Row
from lamina.tree import Message, Params, flatten, select, skeleton, squared_norms, sub, unflatten
from lamina.wire import frame

Loss: TypeAlias = Callable[[Any, Any], Tensor]
BUFFERS = ("average", "keep", "skip")


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
        finite = 0 < self.lr < math.inf
        expect(finite, f"lr={self.lr}: expected a number > 0", where="local.lr")
        expect(0 <= self.momentum < 1, f"momentum={self.momentum}: expected 0 <= momentum < 1", where="local.momentum")
        decay = self.weight_decay
        expect(0 <= decay < math.inf, f"weight_decay={decay}: expected a number >= 0", where="local.weight_decay")
        for name in ("batch_size", "epochs", "steps"):
            value = getattr(self, name)
            fine = is_whole(value, 1) or (value is None and name != "epochs")
            expect(fine, f"{name}={value}: expected a whole number >= 1", where=f"local.{name}")
        expect(self.clip is None or self.clip > 0, f"clip={self.clip}: expected a number > 0", where="local.clip")
        self.rate(0, 1)

    def rate(self, round: int, rounds: int) -> float:
        """Learning rate of this round in a run of so many rounds."""
        factor = schedule.parse(self.schedule) if isinstance(self.schedule, str) else self.schedule
        return self.lr * factor(round, rounds)

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
    through_bytes: bool  # really encode and decode every plan, message and state


class Reply(NamedTuple):
    """What the server has of a client after its round (or its probe, or an evaluation)."""

    client: int
    message: Message  # as decoded by the server
    row: Row | None  # the client's state if the server accepts the message; else it keeps the one from before
    sizes: dict[str, wire.Size]  # exact bytes, tree by tree; "" is the frame around them
    loss: float  # mean training loss over the local steps
    steps: int
    refused: str | None  # why the message must not be used: the first tensor with a non-finite value


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
        kept = set(model.state_dict(keep_vars=True))
        self.buffers = {name: b for name, b in model.named_buffers() if name in kept}
        self._unsaved = [(b, b.clone()) for name, b in model.named_buffers() if name not in kept]
        self.weights: list[Tensor] = list(self.params.values())
        self._held: Plan | None = None

    def hold(self, plan: Plan) -> None:
        """Load the plan's model, unless it is loaded already."""
        if self._held is not plan:
            self.load(plan.params, plan.buffers)
            self._held = plan

    def load(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        self._held = None
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(params[name])
            for name, b in self.buffers.items():
                b.copy_(buffers[name])
            for buffer, initial in self._unsaved:  # e.g. caches a forward pass writes: never carried between clients
                buffer.copy_(initial)

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
                        named = dict(zip(self.params, g, strict=True))
                        g = list(correct(torch.tensor(k), self.detached(), named).values())
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
    if setup.through_bytes:
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
    message, state = method.report(row.method, plan, work, message)
    taken = {"moments", "steps"} & set(message)
    expect(not taken, f"{method!r} writes the tree {sorted(taken)}: reserved for the engine", code="E116")
    message["steps"] = {"steps": work.steps.double()}

    received, sizes = transmit_message(message, setup, plan, client, loss)
    state = method.settle(state, message, received)
    kept = work.buffers if setup.buffers == "keep" else {}
    return Reply(client, received, Row(state, kept), sizes, loss, int(work.steps), _non_finite(received))


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
    sizes = {tree: DENSE.transmit(x, wire.Context(wire.schema_of(x)))[1] for tree, x in message.items()}
    sizes[""] = wire.Size({}, frame.overhead("message", {"loss": 0.0}, {t: s.total for t, s in sizes.items()}))
    return Reply(client, message, None, sizes, float(loss), 0, _non_finite(message))


DENSE = wire.Dense()


def transmit_message(
    message: Message, setup: Setup, plan: Plan, client: int, loss: float
) -> tuple[Message, dict[str, wire.Size]]:
    """What the server will decode, and the exact bytes of every tree. The uplink codes "update"; the rest is raw."""
    received: Message = {}
    sizes: dict[str, wire.Size] = {}
    blobs: dict[str, bytes] = {}
    for tree, content in message.items():
        if tree == "steps":
            continue
        codec = setup.uplink if tree == "update" else DENSE
        full = plan.params if tree == "update" else content
        mask = plan.mask if tree == "update" else None
        context = wire.Context(wire.schema_of(full), mask, None, setup.seed, f"uplink/{tree}", plan.round, client)
        received[tree], sizes[tree], blobs[tree] = _send(codec, content, context, setup.through_bytes)
    if setup.moments:
        moments = {n: torch.tensor(v, dtype=torch.float64) for n, v in squared_norms(received["update"]).items()}
        context = wire.Context(wire.schema_of(moments))
        received["moments"], sizes["moments"], blobs["moments"] = _send(DENSE, moments, context, setup.through_bytes)
    received["steps"] = message["steps"]
    scalars = {"steps": float(message["steps"]["steps"]), "loss": loss}
    if setup.through_bytes:
        blob = frame.pack(frame.Frame("message", plan.round, client, scalars, blobs))
        received["steps"] = {"steps": torch.tensor(frame.unpack(blob).scalars["steps"], dtype=torch.float64)}
    sizes[""] = wire.Size({}, frame.overhead("message", scalars, {t: s.total for t, s in sizes.items()}))
    return received, sizes


def _send(codec: wire.Codec, tree: Params, context: wire.Context, really: bool) -> tuple[Params, wire.Size, bytes]:
    if not really:
        return *codec.transmit(tree, context), b""
    blob = codec.encode(tree, context)
    return codec.decode(blob, context), wire.layout(blob, context), blob


def _through_bytes(row: Row) -> Row:
    leaves = flatten(row)
    context = wire.Context(wire.schema_of(leaves))
    again: Row = unflatten(row, skeleton(row), DENSE.decode(DENSE.encode(leaves, context), context))
    return again


def _non_finite(message: Message) -> str | None:
    for tree, content in message.items():
        if tree in ("steps", "moments"):
            continue
        for name, x in content.items():
            if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                return name if tree == "update" else f"{tree}/{name}"
    return None


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
