"""DGC: error feedback with momentum, at the client, for what is not sent yet.

Lin, Han, Mao, Wang, Dally, *Deep Gradient Compression*, ICLR 2018 (arXiv 1712.01887), its momentum correction and
momentum factor masking, on updates instead of gradients.

    client:   v <- momentum * v + update;   e <- e + v                  # momentum correction
              sent = e;   e <- sent - received                          # received: what the server decodes
              v <- 0 where received is not zero                         # momentum factor masking

Only what is left over gathers momentum: with a dense uplink every v is masked and this is error feedback, with a
lossless one FedAvg.

Differs from the paper: updates, of any number of local steps, stand for gradients; local clipping is `LocalSGD(clip=)`;
the sparsity warm-up is not part of it.
With others: as ErrorFeedback, after methods that change the update. Layers that were not asked for keep velocity and
residual as they are. Momentum of the local steps and of a server optimiser come on top.
Cost: no bytes; two models of state per client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lamina.errors import expect, is_number
from lamina.method import Method, Plan, Work
from lamina.tree import Message, Params, add, sub, tmap, zeros_like


class Client(NamedTuple):
    velocity: Params
    residual: Params


@dataclass(frozen=True)
class DGC(Method[tuple[()], Client]):
    """Args: momentum: in [0, 1); 0 is ErrorFeedback."""

    momentum: float = 0.9

    compensates = True

    def __post_init__(self) -> None:
        fine = is_number(self.momentum, 0, 1)
        expect(fine, f"momentum={self.momentum}: expected 0 <= momentum < 1; 0 is ErrorFeedback")

    def init_client(self, params: Params) -> Client:
        return Client(zeros_like(params), zeros_like(params))

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        velocity = tmap(lambda u, v: self.momentum * v + u, message["update"], client.velocity)
        sent = add(velocity, client.residual)
        return message | {"update": sent}, client._replace(velocity=client.velocity | velocity)

    def settle(self, client: Client, sent: Message, received: Message) -> Client:
        masked = tmap(lambda x, v: torch.where(x == 0, v, 0), received["update"], client.velocity)
        return Client(client.velocity | masked, client.residual | sub(sent["update"], received["update"]))
