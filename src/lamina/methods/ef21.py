"""EF21: clients send how their update differs from the one the server remembers of them.

Richtarik, Sokolov, Fatkhullin, *EF21: A New, Simpler, Theoretically Better, and Practically Faster Error Feedback*,
NeurIPS 2021 (arXiv 2106.05203); partial participation as in Fatkhullin et al., *EF21 with Bells & Whistles* (arXiv
2110.03294); in update form.

    client:   sent = update - g_i;   g_i <- g_i + received              # received: what the server decodes
    server:   g <- g + 1/N * sum of received;   x <- x + g              # g: the mean of g_i over the whole population

g and all g_i start at 0, so a client's first round is the paper's start g_i = C(update). The mean is uniform whatever
the federation's weights, and g runs over all N clients: who is absent goes on acting on the model through its g_i, and
who has never taken part counts as 0. With a lossless uplink g_i is the client's last update; when everybody takes part
with equal weights that is FedAvg, to rounding.

With others: first in a chain, its `step` makes the mean update of what was sent; methods that need the spread of the
updates (FedLAMA) are refused, for it sends differences. A parameter that was not asked for does not move, and keeps g
and g_i; entries outside a mask do not move. The records' divergence is that of the differences.
Cost: no bytes; one model of state per client and one at the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from lamina.method import Method, Plan, Work
from lamina.tree import Message, Params, add, sub, tmap, zeros_like


class Server(NamedTuple):
    estimate: Params  # g: always the mean of all clients' estimates


class Client(NamedTuple):
    estimate: Params  # g_i: what the server takes this client's update to be


@dataclass(frozen=True)
class EF21(Method[Server, Client]):
    """It has no arguments: how much is lost is the uplink's setting."""

    uniform = frozenset({"update"})
    encodes = True
    compensates = True
    neutral = False  # g + (update - g) is the update to rounding only

    def init(self, params: Params) -> Server:
        return Server(zeros_like(params))

    def init_client(self, params: Params) -> Client:
        return Client(zeros_like(params))

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        return message | {"update": sub(message["update"], client.estimate)}, client

    def settle(self, client: Client, sent: Message, received: Message) -> Client:
        return Client(client.estimate | add(received["update"], client.estimate))

    def step(self, server: Server, plan: Plan, mean: Message) -> tuple[Message, Server]:
        estimate = tmap(lambda c, g: g + plan.participation * c, mean["update"], server.estimate)  # m/N * 1/m * sum
        mask = plan.mask or {}
        update = {name: torch.where(mask[name], g, 0) if name in mask else g for name, g in estimate.items()}
        return mean | {"update": update}, Server(server.estimate | estimate)
