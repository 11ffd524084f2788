"""Local training: SGD settings, the order of batches, and the one model of a worker."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lamina import schedule
from lamina.data.client_data import ClientData
from lamina.data.transform import Batch
from lamina.errors import expect, is_number, is_whole
from lamina.method import Plan, Work
from lamina.random import address, generator
from lamina.tree import Params

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Correct: TypeAlias = Callable[[Tensor, Params, Params], Params]
Precision = Literal["fp32", "tf32", "bf16"]


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
        precision: of the forward pass, the loss and their gradient: "fp32", "bf16" (torch.autocast), or, on a GPU,
            "tf32" products. Weights, gradients as `correct` sees them, momentum and all that travels stay as the model
            has them, and so does evaluation: it measures the model that the server holds, alike for all runs.
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int | None = 32
    epochs: int = 1
    steps: int | None = None
    schedule: str | schedule.Schedule = "constant"
    clip: float | None = None
    precision: Precision = "fp32"

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
        fine = self.precision in get_args(Precision)
        expect(
            fine,
            f"precision={self.precision!r}: expected one of {', '.join(get_args(Precision))}",
            where="local.precision",
        )
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


def passes(data: ClientData, client: int, local: LocalSGD, seed: int, round: int) -> Iterator[Tensor]:
    """Example indices of each pass over the client's data, until its steps are done. Each is a fresh permutation, drawn
    in succession from one generator."""
    indices = data.indices_of(client)
    left = local.count(len(indices))
    if local.batch_size is None:
        yield from (indices for _ in range(left))
        return
    order = generator(seed, "order", round, client)
    while left > 0:
        yield indices[torch.randperm(len(indices), generator=order)][: left * local.batch_size]
        left -= -(-len(indices) // local.batch_size)


def batches(data: ClientData, client: int, local: LocalSGD, seed: int, round: int) -> Iterator[Tensor]:
    """Example indices of each local step. The last short batch of a pass is kept; `steps` goes on over passes."""
    for order in passes(data, client, local, seed, round):
        yield from torch.split(order, local.batch_size or len(order))


class Trained(NamedTuple):
    work: Work
    loss: float


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
        self._own = dict(model.named_buffers())
        kept = set(model.state_dict(keep_vars=True))
        self._unsaved = {name: b.clone() for name, b in model.named_buffers() if name not in kept}
        self._held: Plan | None = None

    @property
    def frozen(self) -> Params:
        """The parameters that are not trained: everybody has them, and nobody sends them."""
        return {name: p.data for name, p in self.model.named_parameters() if not p.requires_grad}

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
            own = self._own[name]
            alike = own.shape == value.shape and own.dtype == value.dtype
            place[leaf] = own.copy_(value) if alike else value.to(own.device, copy=True)

    @property
    def replaced(self) -> str | None:
        """The first buffer that a forward pass has put another tensor in the place of, instead of writing into it."""
        return next((name for name, own in self._own.items() if self._buffer(name) is not own), None)

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

    def cast(self) -> torch.autocast:
        """The local step's precision, for a forward pass and its loss. Nothing is cached between two uses of a weight:
        a cache would outlive a CUDA graph's capture."""
        device = self.weights[0].device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.local.precision == "bf16", cache_enabled=False)

    def gradient(self, x: Batch, y: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Fresh tensors every time: no zeroing, no accumulation."""
        with self.cast():
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
                        g = clipped(g, local.clip)
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


def clipped(grads: list[Tensor], limit: float) -> list[Tensor]:
    """Scaled down to this global norm where theirs is larger."""
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
