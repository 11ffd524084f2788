"""STC, sparse ternary compression: a sparse one-bit code in both directions, with a residual at either end.

Sattler, Wiedemann, Mueller, Samek, *Robust and Communication-Efficient Federated Learning from Non-i.i.d. Data*, IEEE
TNNLS 2020 (arXiv 1903.02891), Algorithm 2.

    client:   sent = update + residual;            residual = sent - received                    # as error feedback
    server:   sent = mean update + residual;       residual = sent - received
              x <- x + received                    # the model that every client can follow, step by step

The ternary code (the k largest of a tensor, each as its sign times their mean magnitude) is the codec
``lamina.wire.TopK(density, values="sign")``, to be given as uplink *and* as downlink; any other codec works too. A
client that holds the model of the round before is sent the coded step; any other is sent the parameters dense (the
paper lets it catch up by a sum of the steps it missed, which costs more than the model after 1 / density of them).
With others: last, since the step that travels down is that of the whole chain. Layers that wait keep both residuals;
recycled ones keep the clients', and their replayed step is coded on its way down like any other.
Cost: one model of state per client, and two at the server (its residual, and the step on its way).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lamina.method import Method, Plan, Work
from lamina.tree import Message, Params, add, sub, zeros_like


class Server(NamedTuple):
    residual: Params


class Client(NamedTuple):
    residual: Params


@dataclass(frozen=True)
class STC(Method[Server, Client]):
    """No arguments: densities are those of the codecs. With lossless codecs both residuals stay zero: FedAvg."""

    compensates = True

    def init(self, params: Params) -> Server:
        return Server(zeros_like(params))

    def init_client(self, params: Params) -> Client:
        return Client(zeros_like(params))

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        return message | {"update": add(message["update"], client.residual)}, client

    def settle(self, client: Client, sent: Message, received: Message) -> Client:
        return Client(client.residual | sub(sent["update"], received["update"]))

    def step(self, server: Server, plan: Plan, mean: Message) -> tuple[Message, Server]:
        return mean | {"update": add(mean["update"], server.residual)}, server

    def absorb(self, server: Server, sent: Message, received: Message) -> Server:
        return Server(server.residual | sub(sent["update"], received["update"]))
