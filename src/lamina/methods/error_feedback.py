"""Error feedback: what the uplink lost is sent with the next update.

Seide et al. 2014; Karimireddy et al., *Error Feedback Fixes SignSGD*, ICML 2019 (arXiv 1901.09847); the update form,
per client, as in the sparse federated literature.

    client:   sent     = update + residual
              residual = sent - received            # received: what the server decodes, whatever the uplink did to it

With others: put it after methods that change the update (proximal, control) and before none; layers that were not
asked for keep their residual. Only the tree "update" is compensated.
Cost: no bytes; one model of state per client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lamina.method import Method, Plan, Work
from lamina.tree import Message, Params, add, sub, zeros_like


class Client(NamedTuple):
    residual: Params


@dataclass(frozen=True)
class ErrorFeedback(Method[tuple[()], Client]):
    """With a lossless uplink the residual stays zero: FedAvg."""

    compensates = True

    def init_client(self, params: Params) -> Client:
        return Client(zeros_like(params))

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        return message | {"update": add(message["update"], client.residual)}, client

    def settle(self, client: Client, sent: Message, received: Message) -> Client:
        return Client(client.residual | sub(sent["update"], received["update"]))
