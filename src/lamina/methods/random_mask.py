"""RandomMask: training under one random mask that all clients share and nobody changes.

The baseline of Bibikar et al., *Federated Dynamic Sparse Training*, AAAI 2022 (arXiv 2112.09824): FedDST without its
readjustments.

    once, server:   mask_l = a random choice of k_l entries of every layer;   w <- w * mask
    every step:     g <- g * mask
    layout "erk":   k_l = c * (sum of the layer's dimensions), at most all of it; c so that sum k_l = density * d
    layout "uniform":   k_l = density * numel_l

Differs from the released code, whose first mask keeps the largest initial weights of every layer: ours is random, from
the run's seed; where theirs divides *sparsity* in proportion to 1 - (sum of dimensions) / numel, ours is the density of
RigL (Evci et al., ICML 2020), of which both take the name; first and last layer are masked, biases are not, as there.
With others: as SSFL: the mask never changes.
Cost: the mask, one bit per entry, with a client's first plan; kept values only, both ways. The server keeps the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lamina.methods.masking import Masked, Server, counts, drawn, expect_density, expect_layout, prunable
from lamina.random import generator
from lamina.tree import Message, Params, cut


@dataclass(frozen=True)
class RandomMask(Masked):
    """Args:
    density: share of the maskable weights that is kept, in (0, 1]; 1 is FedAvg.
    layout: "erk" or "uniform": how it is divided among the layers; each keeps at least one entry.
    """

    density: float = 0.2
    layout: Literal["erk", "uniform"] = "erk"

    masks = "fixed"

    def __post_init__(self) -> None:
        expect_density(self.density)
        expect_layout(self.layout)

    def setup(self, server: Server, params: Params, mean: Message) -> tuple[Params, Server]:
        layers = prunable(self.task.layers)
        mask = drawn(layers, counts(layers, self.density, self.layout), generator(self.task.seed, "mask"))
        return cut(params, mask), Server(mask)
