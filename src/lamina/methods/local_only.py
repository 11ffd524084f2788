"""Local-only training: every client trains alone and nothing travels. A point of reference, not a federated method.

    client:   starts from its own last weights; uploads nothing
    server:   keeps the initial model

Its accuracy stands in `personal_accuracy`; the global model stays the initial one.
With others: meaningless; refused by what it withholds. Cost: no uplink values; one model of state per client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lamina.method import Method, Plan, Work
from lamina.tree import Message, Params


class Client(NamedTuple):
    own: Params


@dataclass(frozen=True)
class LocalOnly(Method[tuple[()], Client]):
    """No arguments."""

    withholds = "personal"
    neutral = False

    def init_client(self, params: Params) -> Client:
        return Client({})

    def plan(self, server: tuple[()], plan: Plan) -> Plan:
        return plan.keep(())

    def begin(self, client: Client, plan: Plan, params: Params) -> Params:
        return params | client.own

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        return message, Client(work.params)
