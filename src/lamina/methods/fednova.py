"""FedNova: every client's update is divided by how much gradient it adds up, so that many steps do not weigh more.

Wang, Liu, Liang, Joshi, Poor, *Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization*,
NeurIPS 2020 (arXiv 2007.07481). A client's update is -lr * (its K gradients, weighted by a_i):

    plain SGD:     a_i = (1, ..., 1)                             ||a_i||_1 = K
    momentum rho:  a_i = (1 - rho^K, ..., 1 - rho) / (1 - rho)   ||a_i||_1 = (K - rho (1 - rho^K)/(1 - rho)) / (1 - rho)
    client:        sends update / ||a_i||_1, and ||a_i||_1
    server:        tau_eff = mean of ||a_i||_1;  x <- x + tau_eff * mean of what was sent

All clients taking the same number of steps, it is FedAvg to rounding. Weight decay is a part of the local gradient, and
a clipped gradient is one like any other: a_i says how gradients add up, not what they are.
It takes away the bias towards clients with many steps in the limit of small learning rates. At a finite one a client's
gradient changes on its way, and what that leaves of the bias goes as the learning rate.

Differs from the released code: no server momentum of its own (chain a FedAvgM after it) and no proximal variant; with
FedProx the pull is taken for a part of the local gradient, where the paper changes a_i.
With others: before everything that reads or replaces the mean update, and before error feedback, whose residual is
then in units of the divided update. Refused with FedLAMA: the spread of divided updates is not that of the updates,
and a layer that waits spans several rounds' a_i.
Cost: one float64 per client and round, in a frame section of its own; no state.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lamina.method import Method, Plan, Work
from lamina.tree import Message, scale, tmap


def accumulated(steps: Tensor, momentum: float) -> Tensor:
    """||a_i||_1 of so many steps of SGD: what a gradient that never changes would be multiplied by."""
    k = steps.double()
    tail = momentum * (1 - momentum**k) / (1 - momentum)
    return (k - tail) / (1 - momentum)


@dataclass(frozen=True)
class FedNova(Method[tuple[()], tuple[()]]):
    """No arguments: momentum is the local training's."""

    sends = frozenset({"update", "norm"})
    neutral = False  # equal to FedAvg to rounding, where all clients take the same number of steps
    encodes = True

    def report(self, client: tuple[()], plan: Plan, work: Work, message: Message) -> tuple[Message, tuple[()]]:
        norm = accumulated(work.steps, self.task.momentum)
        update = tmap(lambda u: u / norm, message["update"])
        return message | {"update": update, "norm": {"norm": norm}}, client

    def step(self, server: tuple[()], plan: Plan, mean: Message) -> tuple[Message, tuple[()]]:
        effective = float(mean["norm"]["norm"])  # tau_eff
        return mean | {"update": scale(mean["update"], effective)}, server
