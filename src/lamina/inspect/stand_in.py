"""Clients that need no training: each sends what it might have learned, made of what two of them really learned.

    round of two clients of median size, trained from the initial model   ->  their updates a, b  ->  mean, spread
    any other client and round: update = decay * (mean + sqrt(lasting) * own + sqrt(1 - lasting) * new)
        own, new = z * spread, moved along the outputs;  z ~ N(0, 1) and the way are a client's own, or new every round

So updates have the sizes and the spread that were measured, tensor by tensor, and differ between clients from round to
round as lastingly as those of the two did, but no values come twice. All else is
the real thing: the engine's worker, the method's hooks, the codecs and the server's rounds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lamina.client import Setup, begin
from lamina.data.transform import Batch
from lamina.method import Plan, Work
from lamina.random import generator
from lamina.training import Correct, Trained, Trainer
from lamina.tree import Params, add, sub, tmap

CLIENTS = 2  # that are really trained
_LASTING = 0.5  # where one round tells nothing of it


class Sample(NamedTuple):
    """What one real round of the clients showed."""

    mean: Params  # of their updates; of a masked tensor the kept entries, as a vector
    spread: Params  # one standard deviation between clients, likewise
    buffers: tuple[Params, ...]  # what each did to the model's buffers
    grads: tuple[Params, ...]
    loss: float
    seconds: float  # per local step, of the client that trained last: the first one warms up


def chosen(sizes: Tensor) -> list[int]:
    """Two clients in the middle by number of examples; one where there is one."""
    order = sizes.argsort(stable=True).tolist()
    middle = max(0, (len(order) - CLIENTS) // 2)
    return [int(c) for c in order[middle : middle + CLIENTS]]


def sampled(trainer: Trainer, setup: Setup, plan: Plan, rounds: int) -> tuple[Sample, ...]:
    """So many real rounds of two clients on their own, with the method's say in how they train."""
    samples: list[Sample] = []
    clients = [c for c in chosen(setup.data.sizes) if len(setup.data.indices_of(c))]
    for t in range(rounds):
        works, losses, seconds = [], [], 0.0
        for c in clients:
            start = begin(setup, plan, None)
            began = time.perf_counter()
            work, loss = trainer.train(c, plan, start.params, start.buffers, _correct(setup, plan))
            seconds = (time.perf_counter() - began) / max(1, int(work.steps))
            works.append(work)
            losses.append(loss)
        updates = [sub(work.params, plan.params) for work in works]
        a, b = updates[0], updates[-1]
        mean = tmap(lambda x, y: (x + y) / 2, a, b)
        spread = tmap(lambda x, y: (x - y) / 2**0.5, a, b)
        moved = tuple(sub(work.buffers, plan.buffers) for work in works)
        grads = tuple(work.grads for work in works)
        kept = (_kept(mean, plan.mask or {}), _kept(spread, plan.mask or {}))
        samples.append(Sample(*kept, moved, grads, sum(losses) / len(losses), seconds))
        plan = _after(plan, mean, works[-1].buffers, t + 1)
    return tuple(samples)


def _correct(setup: Setup, plan: Plan) -> Correct | None:
    method, state = setup.method, setup.method.init_client(plan.params)
    if not method.has("correct"):
        return None
    return lambda step, params, grads: method.correct(state, plan, step, params, grads)


def _after(plan: Plan, mean: Params, buffers: Params, t: int) -> Plan:
    return replace(plan, round=t, params=add(plan.params, mean), buffers=buffers)


class StandIn(Trainer):
    """A trainer that does not train.

    Args:
        trainer: a real one.
        samples: of rounds 0, 1, ...; the last one stands for all that follow. None: they are made when the first
            client is to train, in so many real `rounds`.
        decay: updates shrink as (1 + rounds since the last sample) ** -decay.
        seed: of what is not known.
    """

    def __init__(
        self, trainer: Trainer, setup: Setup, samples: Sequence[Sample] | None, rounds: int, decay: float, seed: int
    ):
        self.__dict__.update(trainer.__dict__)
        self.samples = tuple(samples or ())
        self._lasting = _lasting(self.samples) if samples else {}
        self.steps = 0  # local ones that a real run would make
        self.seconds = 0.0  # that the real rounds took
        self._real = trainer
        self._setup = setup
        self._rounds = rounds
        self._decay = decay
        self._seed = seed
        self._gradients: list[tuple[tuple[Tensor, ...], Tensor]] = []
        self._asked = 0

    def count(self, client: int) -> int:
        """Its local steps in a round."""
        return self.local.count(int(self._setup.data.sizes[client]))

    def load(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        if len(self._gradients) < CLIENTS:
            self._real.load(params, buffers)

    def gradient(self, x: Batch, y: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Of the first clients that are asked; every other has that of one of these."""
        if len(self._gradients) < CLIENTS:
            self._gradients.append(self._real.gradient(x, y))
            return self._gradients[-1]
        self._asked += 1
        return self._gradients[self._asked % CLIENTS]

    def train(self, client: int, plan: Plan, start: Params, buffers: Params, correct: Correct | None) -> Trained:
        if not self.samples:
            began = time.perf_counter()
            self.samples = sampled(self._real, self._setup, plan, self._rounds)
            self._lasting = _lasting(self.samples)
            self.seconds = time.perf_counter() - began
        t, last = plan.round, len(self.samples) - 1
        sample = self.samples[min(t, last)]
        factor = (1.0 + max(0, t - last)) ** -self._decay
        own, new = generator(self._seed, "forecast", 0, client), generator(self._seed, "forecast", t + 1, client)
        update = {}
        for name, mean in sample.mean.items():
            spread, lasting = sample.spread[name], self._lasting[name]
            values = mean + lasting**0.5 * _drawn(spread, own) + (1 - lasting) ** 0.5 * _drawn(spread, new)
            if factor != 1:
                values = values * factor
            update[name] = _laid(values, start[name], (plan.mask or {}).get(name))
        which = int(torch.randint(len(sample.grads), (1,), generator=new))
        count = self.count(client)
        self.steps += count
        changed = {name: x + _shrunk(sample.buffers[which][name], factor) for name, x in buffers.items()}
        work = Work(add(start, update), changed, sample.grads[which], torch.tensor(count))
        return Trained(work, sample.loss)


def _kept(tree: Params, mask: Params) -> Params:
    """What may move: a masked tensor as a vector of its kept entries."""
    return {name: x[mask[name]] if name in mask else x for name, x in tree.items()}


def _drawn(spread: Tensor, source: torch.Generator) -> Tensor:
    """A deviation of this size, moved along its first axis: outputs change places, inputs (some of which may be dead)
    do not."""
    z = float(torch.randn((), generator=source))
    if not spread.dim() or not len(spread):
        return z * spread
    return z * spread.roll(int(torch.randint(len(spread), (1,), generator=source)), 0)


def _lasting(samples: Sequence[Sample]) -> dict[str, float]:
    """Which share of the difference between two clients is that of the round before."""
    shares: dict[str, list[float]] = {name: [] for name in samples[0].spread}
    for before, after in itertools.pairwise(samples):
        for name, own in shares.items():
            a, b = before.spread[name].reshape(-1), after.spread[name].reshape(-1)
            length = float(a.norm() * b.norm())
            own.append(float(a @ b) / length if length else 0.0)
    return {name: min(1.0, max(0.0, sum(own) / len(own))) if own else _LASTING for name, own in shares.items()}


def _laid(values: Tensor, like: Tensor, mask: Tensor | None) -> Tensor:
    """The values in a tensor of this shape, on the kept entries where there is a mask."""
    if mask is None:
        return values.reshape(like.shape) if values.numel() == like.numel() else _stretched(values, like.numel(), like)
    if values.shape == mask.shape:
        values = values[mask]
    out = torch.zeros_like(like)
    out[mask] = _stretched(values, int(mask.sum()), out[mask])
    return out


def _stretched(values: Tensor, n: int, like: Tensor) -> Tensor:
    """So many of them, again from the start where they are fewer."""
    flat = values.reshape(-1)
    if not len(flat):
        return torch.zeros_like(like)
    return flat.repeat(-(-n // len(flat)))[:n].reshape(like.shape)


def _shrunk(x: Tensor, factor: float) -> Tensor:
    return x * factor if x.is_floating_point() else x
