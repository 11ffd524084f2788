"""FedLUAR: the layers that move least for their size repeat their last update instead of sending a new one.

*Layer-wise Update Aggregation with Recycling for Communication-Efficient Federated Learning*, NeurIPS 2025
(arXiv 2503.11146).

    D_l = mean update of layer l, the stored D_l of an earlier round while l is recycled        # (1), (5)
    s_l = ||D_l|| / (||x_l|| + 1e-6), x before the update; frozen while l is recycled           # (2)
    x   <- x + D
    next round: `recycle` layers, one after the other without replacement, p_l ~ 1 / s_l        # (3), (4)

A layer is one weight tensor with more than one dimension; biases, norm parameters and buffers follow every round. The
first round is full. Drawn, not sorted: so no layer is recycled for ever, though nothing bounds how stale one gets.

Who can be drawn: a layer that has been seen in a mean (one that another method keeps personal never is), and never all
of these at once. A layer that did not move counts as the calmest one that did, so that it cannot repeat its zero for
ever; where none moved, all are equally likely. A mean that is not finite is neither stored nor scored.

Differs from the released code: the weights of the mean are the federation's, not uniform; zero scores are guarded
(theirs divide by them); `refresh_on_lr_drop` is ours, against replaying steps of an earlier, larger learning rate.
With others: repeats the raw mean update, so a server optimiser stands after it and takes a repeated update for a fresh
one; residuals of error feedback stay as they are while their layer is recycled; a round that starts from a shock
(LIPS) leaves scores and stored updates as they were. Refused with FedLAMA, whose layers wait.
Cost: saves the recycled layers' uplink, and no byte more; one model of weight tensors at the server, none at clients.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch

from lamina.errors import expect, is_whole
from lamina.layers import matrices
from lamina.method import Method, Plan, Task
from lamina.random import generator
from lamina.tree import Message, Params, omit, select, squared_norm


class Server(NamedTuple):
    score: dict[str, float]  # layer -> s of its last fresh mean update
    updates: Params  # layer -> that update; empty unless it is to be replayed
    recycled: dict[str, int]  # layer -> 1: drawn for the next round
    lr: float  # client learning rate of the last round


def odds(scores: Mapping[str, float]) -> dict[str, float]:
    """Numbers in (0, 1] that go as 1 / s; 1 for the calmest layer that moved, and for those that did not."""
    calmest = min((s for s in scores.values() if s > 0), default=1.0)
    return {name: max(calmest / s, 1e-300) if s > 0 else 1.0 for name, s in scores.items()}


def drawn(odds: Mapping[str, float], uniforms: Iterable[float]) -> list[str]:
    """One name per number in [0, 1), without replacement: each falls into the odds that are left, in model order."""
    left = dict(odds)
    chosen = []
    for u in uniforms:
        edges = list(itertools.accumulate(left.values()))
        point = u * edges[-1]  # below the last edge, also when rounded: u <= 1 - 2**-53
        name = list(left)[bisect.bisect_right(edges, point)]
        chosen.append(name)
        del left[name]
    return chosen


@dataclass(frozen=True)
class FedLUAR(Method[Server, tuple[()]]):
    """Args:
    recycle: layers that are recycled each round, from 0 (FedAvg) to one less than the model has.
    choose: "inverse" draws them by 1 / s; "uniform" all alike, an ablation.
    replay: False drops a recycled layer's update instead of repeating it, an ablation.
    refresh_on_lr_drop: recycle nothing in a round whose learning rate is lower than the round before's. With a
        schedule that falls every round (cosine, exp) nothing is ever recycled then.
    """

    recycle: int = 1
    choose: Literal["inverse", "uniform"] = "inverse"
    replay: bool = True
    refresh_on_lr_drop: bool = False

    withholds = "recycled"
    measures = True

    def __post_init__(self) -> None:
        expect(is_whole(self.recycle, 0), f"recycle={self.recycle!r}: expected a whole number of layers >= 0")
        expect(self.choose in ("inverse", "uniform"), f"choose={self.choose!r}: expected 'inverse' or 'uniform'")
        for name in ("replay", "refresh_on_lr_drop"):
            value = getattr(self, name)
            expect(isinstance(value, bool), f"{name}={value!r}: expected true or false")

    def bind(self, task: Task) -> Self:
        layers = matrices(task.layers)
        expect(bool(layers), "FedLUAR recycles weight tensors with ndim > 1: the model has none")
        expect(
            self.recycle < len(layers),
            f"recycle={self.recycle}: expected at most {len(layers) - 1}; the model has {len(layers)} weight tensors "
            "with ndim > 1",
            remedy="leave at least one of them to be uploaded",
        )
        return super().bind(task)

    def init(self, params: Params) -> Server:
        return Server({}, {}, {}, 0.0)

    def plan(self, server: Server, plan: Plan) -> Plan:
        return plan.keep(plan.upload - self.recycled(server, plan))

    def step(self, server: Server, plan: Plan, mean: Message) -> tuple[Message, Server]:
        recycled = self.recycled(server, plan)
        update = omit(mean["update"], recycled)
        score, stored = dict(server.score), dict(server.updates)
        layers = [layer.name for layer in matrices(self.task.layers)]
        for name, x in select(update, () if "shock" in plan.config else layers).items():
            s = squared_norm(x) ** 0.5 / (squared_norm(plan.params[name]) ** 0.5 + 1e-6)  # (2)
            if math.isfinite(s):
                score[name] = s
                if self.replay:
                    stored[name] = x
        update = update | select(server.updates, recycled)  # (5)
        candidates = odds({name: score[name] for name in layers if name in score})
        if self.choose == "uniform":
            candidates = dict.fromkeys(candidates, 1.0)
        count = min(self.recycle, max(0, len(candidates) - 1))
        uniforms = torch.rand(count, generator=generator(plan.seed, "recycle"), dtype=torch.float64)
        chosen = dict.fromkeys(drawn(candidates, uniforms.tolist()), 1)  # (3), (4)
        return mean | {"update": update}, Server(score, stored, chosen, plan.lr)

    def recycled(self, server: Server, plan: Plan) -> frozenset[str]:
        """The layers that this round recycles."""
        if self.refresh_on_lr_drop and plan.lr < server.lr:
            return frozenset()
        return frozenset(server.recycled)
