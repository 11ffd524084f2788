"""FedProx: a proximal pull of the local weights towards the global model.

Li et al., *Federated Optimization in Heterogeneous Networks*, MLSys 2020 (arXiv 1812.06127).

    client, each step:   g <- g + mu * (w - w_global)          # gradient of mu/2 * ||w - w_global||^2
    server:              as FedAvg

Differs from the released code, which is an optimiser class and also simulates stragglers (some clients run fewer
epochs): ours is a corrected gradient, and every client runs the epochs it is asked for. Clients are drawn uniformly
and averaged with the federation's weights.
With others: the anchor is plan.params, the last aggregated value of every layer, also of one that waits.
Cost: no bytes, no state.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lamina.errors import expect, is_number
from lamina.method import Method, Plan
from lamina.tree import Params, tmap


@dataclass(frozen=True)
class FedProx(Method[tuple[()], tuple[()]]):
    """Args: mu: strength of the pull, >= 0; 0 is FedAvg."""

    mu: float = 0.01

    def __post_init__(self) -> None:
        expect(is_number(self.mu, 0), f"mu={self.mu}: expected a number >= 0")

    def correct(self, client: tuple[()], plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return tmap(lambda g, w, anchor: g + self.mu * (w - anchor), grads, params, plan.params)
