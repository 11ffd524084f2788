"""FLARE: local weights are pulled to where they would be if what was not sent yet had arrived.

Greidi, Cohen, *Sparse Training for Federated Learning with Regularized Error Correction*, IEEE JSTSP 2024
(arXiv 2312.13795).

    client, first steps:  g   <- g + tau_t * M * sign((w - w0) - A)      # the slope of tau_t * sum M |w - (w0 + A)|
                          tau_t = tau / decay^(t+1);   M = |A| above its percentile, tensor by tensor
    client, at the end:   send update + A;   A <- sent - received        # error feedback, whatever the uplink
    server:               the mean of what arrived

w0 is the global model and A the residual, in units of weights. The percentile is the entry at index
round(percentile/100 * (n-1)) of the ascending magnitudes of a tensor's n (kept) entries, and M is strictly above it,
so where nothing is left over nothing is pulled: round 0, and every round of a lossless uplink, is FedAvg.

Differs from the released code: the sparsifier is the uplink, `TopK(density, keep="released")` for theirs; one momentum
buffer per round, which carries a pull on (theirs starts again after the pulled steps); w - w0 is compared with A, since
w0 + A rounds to w0 where A is small; a mean with the federation's weights (theirs: uniform); tau=0 switches the pull
off (theirs breaks with 0 pulled steps).
With others: after methods that change the update. Where a server optimiser or step size moves the model otherwise than
by the mean, w0 + A is no longer where the residual would have led. A layer that waits (FedLAMA) is pulled like every
other, towards the same w0 + A, but accumulates nothing: it keeps residual and mask until its whole drift is sent.
Cost: no bytes; one model of state per client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamina.errors import expect, is_number, is_whole
from lamina.method import Method, Plan, Work
from lamina.tree import Message, Params, add, sub, tmap, zeros_like


class Client(NamedTuple):
    residual: Params
    threshold: Params  # name -> 0-d: entries of the residual above it are pulled
    kept: Params  # name -> 0-d: entries that exist, of masked tensors; from report to settle only


@dataclass(frozen=True)
class FLARE(Method[tuple[()], Client]):
    """With a lossless uplink the residual stays zero: FedAvg. With tau=0 it is ErrorFeedback.

    Args:
        tau: strength of the pull, >= 0, added to the gradient: a pulled step moves a weight by lr * tau_t more, which
            local momentum m carries on, up to 1 / (1 - m) times. What matters is lr * tau against the residual.
        decay: tau is divided by it in every round, the first included; >= 1. Above 1 all pulls on a weight together are
            at most steps * lr * tau / (decay - 1), times 1 / (1 - m); 1 never lets go, and below 1 the pull would
            outgrow the loss.
        percentile: in [0, 100]; the share of a tensor's entries that is not pulled.
        steps: how many local steps are pulled, >= 1, from the first on.
    """

    tau: float = 0.5
    decay: float = 1.05
    percentile: float = 50.0
    steps: int = 1

    compensates = True

    def __post_init__(self) -> None:
        expect(is_number(self.tau, 0), f"tau={self.tau}: expected a number >= 0; 0 is ErrorFeedback")
        fine = is_number(self.decay, 1)
        expect(fine, f"decay={self.decay}: expected a number >= 1; below 1 the pull would grow from round to round")
        fine = is_number(self.percentile, 0) and self.percentile <= 100
        expect(fine, f"percentile={self.percentile}: expected 0 <= percentile <= 100")
        expect(is_whole(self.steps, 1), f"steps={self.steps}: expected a whole number >= 1; tau=0 pulls in no step")

    def init_client(self, params: Params) -> Client:
        return Client(zeros_like(params), tmap(lambda w: torch.zeros((), dtype=w.dtype), params), {})

    def correct(self, client: Client, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        if not self.tau:
            return grads
        tau = self.tau * self.decay ** -(plan.round + 1)  # goes to 0 where decay^(t+1) would overflow
        pulled = {}
        for name, g in grads.items():
            a = client.residual[name]
            mask = _under(plan, name, a).abs() > client.threshold[name]
            pull = tau * torch.sign((params[name] - plan.params[name]) - a)
            pulled[name] = torch.where(mask & (step < self.steps), g + pull, g)
        return pulled

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        sent = add(message["update"], client.residual)
        kept = {name: torch.tensor(plan.kept(name)) for name in sent if name in (plan.mask or {})}
        update = {name: _under(plan, name, x) for name, x in sent.items()}
        return message | {"update": update}, client._replace(kept=kept)

    def settle(self, client: Client, sent: Message, received: Message) -> Client:
        residual = sub(sent["update"], received["update"])
        threshold = {name: self._threshold(a, int(client.kept.get(name, a.numel()))) for name, a in residual.items()}
        return Client(client.residual | residual, client.threshold | threshold, {})

    def _threshold(self, residual: Tensor, kept: int) -> Tensor:
        """The percentile of the kept magnitudes. The others are exactly 0, so they come first in the whole order."""
        if not kept:
            return residual.new_zeros(())
        rank = residual.numel() - kept + round(self.percentile / 100 * (kept - 1))
        magnitudes = residual.abs().reshape(-1)
        wide = magnitudes if residual.dtype == torch.float64 else magnitudes.float()  # numpy knows no bfloat16
        return torch.tensor(np.partition(wide.numpy(), rank)[rank], dtype=residual.dtype)


def _under(plan: Plan, name: str, x: Tensor) -> Tensor:
    """x with 0 outside the mask: what a mask that has moved left behind is not kept."""
    mask = plan.mask.get(name) if plan.mask else None
    return x if mask is None else torch.where(mask, x, 0)
