"""FedDST: sparse training under a common mask that clients readjust now and then: they prune, regrow and vote.

Bibikar, Vikalo, Wang, Chen, *Federated Dynamic Sparse Training*, AAAI 2022 (arXiv 2112.09824).

    every step:      g <- g * mask
    in rounds t = every, 2 every, ... before `until`, with alpha = ratio / 2 * (1 + cos(pi * t / until)):
      client, layer by layer, after training: of its k kept weights all but the floor((1 - alpha) k) largest |w| go;
                     as many entries outside the mask come, those of the largest |gradient of the last minibatch|;
                     it sends the update and its new mask m_i
      server:        W = sum p_i m_i w_i / sum p_i m_i, where a regrown w_i is 0;   mask <- the k largest |W| of the
                     layer, of equal ones those with more votes, then the lower index;   w <- W * mask

What a client prunes goes only where all do, or where |W| is small; what it regrows comes where another entry went, and
is trained from the next round on. In between, and with ratio=0, it is RandomMask.

Differs from the released code: the first mask is random, not the largest initial weights, and laid out as in RigL (see
RandomMask); theirs grows the largest gradients of the whole layer, kept weights among them, which it resets to 0, ours
only entries outside the mask; theirs takes `ratio` twice (ratio^2 in the schedule), ours once; theirs readjusts in
rounds 1, 1 + every, ...; its server prunes only when the sum of the masks came out denser, entries of weight 0 in no
order, ours always comes back to k, by votes; sparsity is constant (theirs may drift between two values). As there,
clients train under the server's mask and readjust after their last epoch, and the pull of FedProx is no part of the
gradient that they grow by, which is the one before the last step (theirs: once more after it).
With others: its step makes a mean of its own, so it stands last and no server optimiser follows; methods that change
the gradient stand before it, so that the mask has the last word; layers may not wait or be recycled under a mask that
changes; what the uplink lost of a pruned weight could not be sent later. Its votes stand beside any lossy uplink, raw.
Cost: the mask, one bit per entry, with a client's first plan and after every readjustment; kept values only, both ways;
in a readjustment one bit per entry of masked layers up (tree "votes"). The server keeps the mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import expect, is_number, is_whole
from lamina.method import Plan, Work
from lamina.methods.masking import Masked, Server, counts, drawn, expect_density, expect_layout, partial, prunable
from lamina.random import generator
from lamina.tree import Message, Params, cut, select, tmap, top_fraction


def readjusted(w: Tensor, grad: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """A client's own mask, with as many entries; ties go to the lower index."""
    kept = int(mask.sum())
    change = min(kept - math.floor((1 - alpha) * kept), mask.numel() - kept)
    stays = top_fraction(torch.where(mask, w.abs(), -1), kept - change)
    return stays | top_fraction(torch.where(mask, -1, grad.abs()), change)


def elected(w: Tensor, share: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest |w|; of equal ones those with the larger share of votes, then the lower index."""
    by_votes = torch.sort(share.reshape(-1), descending=True, stable=True).indices
    order = by_votes[torch.sort(w.abs().reshape(-1)[by_votes], descending=True, stable=True).indices]
    mask = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
    mask[order[:keep]] = True
    return mask.reshape(w.shape)


@dataclass(frozen=True)
class FedDST(Masked):
    """Args:
    density: share of the maskable weights that is kept, in (0, 1]; 1 is FedAvg.
    every: rounds between two readjustments, >= 1; the first is in round `every`.
    ratio: share of a layer's kept weights that the first ones would exchange, in [0, 1); 0 is RandomMask.
    layout: "erk" or "uniform": how the density is divided among the layers.
    until: no readjustment from this round on, >= 1; the ratio falls to 0 there along a cosine.
    """

    density: float = 0.2
    every: int = 10
    ratio: float = 0.01
    layout: Literal["erk", "uniform"] = "erk"
    until: int = 200

    sends = frozenset({"update", "votes"})
    masks = "clients"
    optimises = True

    def __post_init__(self) -> None:
        expect_density(self.density)
        fine = is_whole(self.every, 1)
        expect(fine, f"every={self.every}: expected a whole number of rounds >= 1", where="method.every")
        fine = is_number(self.ratio, 0, 1)
        expect(fine, f"ratio={self.ratio}: expected 0 <= ratio < 1", where="method.ratio")
        expect_layout(self.layout)
        fine = is_whole(self.until, 1)
        expect(fine, f"until={self.until}: expected a whole number of rounds >= 1", where="method.until")

    def exchanged(self, round: int) -> float:
        """Share of its kept weights that a client exchanges in this round: 0 where none is readjusted."""
        if round == 0 or round % self.every or round >= self.until:
            return 0.0
        return self.ratio / 2 * (1 + math.cos(math.pi * round / self.until))

    def setup(self, server: Server, params: Params, mean: Message) -> tuple[Params, Server]:
        layers = prunable(self.task.layers)
        mask = drawn(layers, counts(layers, self.density, self.layout), generator(self.task.seed, "mask"))
        return cut(params, mask), Server(mask)

    def report(self, client: tuple[()], plan: Plan, work: Work, message: Message) -> tuple[Message, tuple[()]]:
        alpha = self.exchanged(plan.round)
        masked = select(plan.mask or {}, plan.upload) if alpha else {}
        if not masked:
            return message, client
        votes = tmap(lambda m, w, g: readjusted(w, g, m, alpha), masked, work.params, work.grads)
        # Left out of the sum like this, a pruned weight needs no value of its own: W - x = sum p m (w - x) / sum p m.
        update = message["update"] | cut(select(message["update"], votes), votes)
        return message | {"update": update, "votes": votes}, client

    def step(self, server: Server, plan: Plan, mean: Message) -> tuple[Message, Server]:
        mask, update = dict(server.mask), dict(mean["update"])
        for name, share in mean.get("votes", {}).items():
            x, u = plan.params[name], update[name]
            u = torch.where(share > 0, u / share.to(u.dtype), -x)
            mask[name] = elected(x + u, share, int(mask[name].sum()))
            update[name] = torch.where(mask[name], u, -x)
        return mean | {"update": update}, Server(partial(mask))
