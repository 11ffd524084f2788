"""Magnitude pruning at the server: the smallest global weights go for good, many at first and then ever fewer.

Zhu, Gupta, *To prune, or not to prune*, 2017 (arXiv 1710.01878), with the rounds of a federation as its steps.

    after the aggregation of round t = start, start + every, ..., end:
        density_t = density + (1 - density) * (1 - (t - start) / (end - start))^3
        mask      = the floor(density_t * numel) largest |w| among those still kept;   w <- w * mask
    every step:  g <- g * mask

In round `start` the density is still 1 (with end = start it falls at once). Pruned weights do not come back.

Differs from the paper, which prunes one model while it is trained in one place: the server prunes the aggregated model,
and clients train within the mask in force.
With others: stands after a server optimiser, and undoes what its memory would put back; after methods that change the
gradient, too, so that the mask has the last word; layers may not wait or be recycled under a mask that changes.
Cost: the mask, one bit per entry of masked layers, with a client's first plan after every pruning; kept values only,
both ways: in all more than a mask that is sparse from the start. The server keeps the mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from lamina.errors import expect, is_whole
from lamina.method import Plan
from lamina.methods.masking import Masked, Server, expect_density, partial, prunable, split
from lamina.tree import Message, Params, add, select, top_fraction

SCOPES = ("layer", "global")


def largest(weights: Params, mask: Params, density: float, scope: str) -> Params:
    """The mask that keeps this share of the largest |w|, at least one entry of every layer, within the mask before.
    Ties go to the earlier layer, then to the lower index."""
    sizes = {name: x.abs() for name, x in weights.items()}
    sizes = {name: torch.where(mask[name], x, -1) if name in mask else x for name, x in sizes.items()}
    if scope == "layer":
        return {name: top_fraction(x, max(1, math.floor(density * x.numel()))) for name, x in sizes.items()}
    first = {name: top_fraction(x, 1) for name, x in sizes.items()}
    flat = torch.cat([torch.where(first[name], math.inf, x).reshape(-1) for name, x in sizes.items()])
    return split(top_fraction(flat, max(len(sizes), math.floor(density * flat.numel()))), sizes)


@dataclass(frozen=True)
class MagnitudePruning(Masked):
    """Args:
    density: share of the maskable weights that is kept in the end, in (0, 1]; 1 is FedAvg.
    start: round after which the density begins to fall, >= 0.
    end: round after which it has fallen, >= start.
    every: rounds between two prunings, >= 1; end - start is a multiple of it.
    scope: "layer" = the same share of every layer; "global" = one threshold for all, but one entry at least of each.
    """

    density: float = 0.2
    start: int = 0
    end: int = 100
    every: int = 10
    scope: Literal["layer", "global"] = "layer"

    masks = "server"

    def __post_init__(self) -> None:
        expect_density(self.density)
        fine = is_whole(self.start, 0)
        expect(fine, f"start={self.start}: expected a whole number of rounds >= 0", where="method.start")
        fine = is_whole(self.end, self.start)
        expect(fine, f"end={self.end}: expected a whole number of rounds >= start={self.start}", where="method.end")
        fine = is_whole(self.every, 1)
        expect(fine, f"every={self.every}: expected a whole number of rounds >= 1", where="method.every")
        span = self.end - self.start
        expect(
            span % self.every == 0,
            f"every={self.every}: expected a divisor of the {span} rounds from start={self.start} to end={self.end}",
            where="method.every",
            remedy=f"end={self.end - span % self.every} would do",
        )
        fine = self.scope in SCOPES
        expect(fine, f"scope={self.scope!r}: expected one of {', '.join(SCOPES)}", where="method.scope")

    def kept(self, round: int) -> float | None:
        """The density to which the model is pruned after this round; None where it is not."""
        if not self.start <= round <= self.end or (round - self.start) % self.every:
            return None
        left = 1 - (round - self.start) / (self.end - self.start) if self.end > self.start else 0.0
        return self.density + (1 - self.density) * left**3

    def step(self, server: Server, plan: Plan, mean: Message) -> tuple[Message, Server]:
        update, mask, density = mean["update"], server.mask, self.kept(plan.round)
        weights = add(select(update, (layer.name for layer in prunable(self.task.layers))), plan.params)
        if density is not None and weights:
            mask = mask | partial(largest(weights, mask, density, self.scope))
        pruned = {n: torch.where(mask[n], u, -plan.params[n]) if n in mask else u for n, u in update.items()}
        return mean | {"update": pruned}, Server(mask)
