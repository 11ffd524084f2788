"""Local-only training: every client trains alone and no update travels. A point of reference, no federated method.

    client:   starts from its own last weights; uploads nothing
    server:   keeps the initial model

Its accuracy stands in `personal_accuracy`; the global model stays the initial one.
With others: meaningless, and refused. A model with buffers needs ``buffers="keep"``: averaged ones would be shared.
Cost: no uplink values; one model of state per client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

from lamina.errors import expect
from lamina.method import Method, Plan, Task, Work
from lamina.tree import Message, Params


class Client(NamedTuple):
    own: Params


@dataclass(frozen=True)
class LocalOnly(Method[tuple[()], Client]):
    """No arguments."""

    withholds = "personal"
    neutral = False
    alone = True

    def bind(self, task: Task) -> Self:
        expect(
            task.buffers in ("", "keep"),
            f"LocalOnly with buffers={task.buffers!r}: the model's buffers would be shared",
            code="E117",
            where="buffers",
            remedy="set buffers='keep'",
        )
        return super().bind(task)

    def init_client(self, params: Params) -> Client:
        return Client({})

    def plan(self, server: tuple[()], plan: Plan) -> Plan:
        return plan.keep(())

    def begin(self, client: Client, plan: Plan, params: Params) -> Params:
        return params | client.own

    def report(self, client: Client, plan: Plan, work: Work, message: Message) -> tuple[Message, Client]:
        return message, Client(work.params)
