"""FedDyn: every client's loss gains a term that is corrected round by round until all agree on one minimum.

Acar et al., *Federated Learning Based on Dynamic Regularization*, ICLR 2021 (arXiv 2111.04263), Algorithm 1.

    client, each step:   g   <- g - h_k + alpha * (w - w_0)     # of L_k(w) - <h_k, w> + alpha/2 ||w - w_0||^2
    client, at the end:  h_k <- h_k - alpha * (w_end - w_0)     # = its loss's gradient at w_end, at that minimum
    server:              S   <- S + m/N * u                     # u: mean update; S = -h / alpha of the paper
                         x   <- x + u + S

All means are uniform over the accepted messages, whatever the federation's weights: the mean loss over clients is what
Algorithm 1 minimises. A cohort's weighted mean would change that minimum with the size of the cohort.

Weight decay, momentum and clipping are allowed: the rule asks for a minimum of the local loss, however it is sought,
and no step size enters h_k (as in SCAFFOLD's option II). Weight decay is a part of that loss; the released code uses
it, with plain SGD and gradients clipped to a norm of 10. The correction enters the momentum with the gradient.

Differs from the released code: alpha is the same for all clients (theirs is divided by the client's share of the
examples, over the mean share); clipping, where it is set, covers the whole term (theirs leaves out alpha * w, which it
adds as weight decay); the evaluated model is x, as in the algorithm (theirs reports the mean of all clients' last
models too, and plots that one).
With others: last in a chain. A layer that is absent from the mean keeps h_k and S; w_0 is plan.params, so one that
waits (FedLAMA) is pulled to its last aggregated value until it is due, and h_k then counts its whole way from there.
Under a lossy uplink h_k counts what the client did, S what the server received.
Cost: no bytes; one model of state per client and one at the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lamina.errors import expect, is_number
from lamina.method import Method, Plan, Work
from lamina.tree import Message, Params, add, tmap, zeros_like


class Server(NamedTuple):
    total: Params  # S: the sum of all mean updates, each times the participation of its round


class Client(NamedTuple):
    slope: Params  # h_k: the gradient of its loss at its last model


@dataclass(frozen=True)
class FedDyn(Method[Server, Client]):
    """Args: alpha: strength of the regulariser, > 0."""

    alpha: float = 0.01

    uniform = frozenset({"update"})
    optimises = True
    controls = True
    neutral = False  # alpha -> 0 switches the clients' half off, not the server's

    def __post_init__(self) -> None:
        fine = is_number(self.alpha, 0) and self.alpha > 0
        expect(fine, f"alpha={self.alpha}: expected a number > 0", remedy="without a regulariser, use FedAvg()")

    def init(self, params: Params) -> Server:
        return Server(zeros_like(params))

    def init_client(self, params: Params) -> Client:
        return Client(zeros_like(params))

    def correct(self, client: Client, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        return tmap(
            lambda g, h, w, w_0: g - h + self.alpha * (w - w_0), grads, client.slope, params, plan.params
        )  # Alg. 1, the gradient of its local objective

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        fresh = {
            name: client.slope[name] - self.alpha * (work.params[name] - w_0)
            for name, w_0 in plan.params.items()
            if name in plan.upload
        }
        return message, Client(client.slope | fresh)

    def step(self, server: Server, plan: Plan, mean: Message) -> tuple[Message, Server]:
        total = tmap(lambda u, s: s + plan.participation * u, mean["update"], server.total)
        return mean | {"update": add(mean["update"], total)}, Server(server.total | total)
