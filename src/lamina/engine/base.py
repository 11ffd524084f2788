"""What an engine is: something that runs client rounds and hands back their replies in the order asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch

from lamina.client import Reply, Setup, Trainer, client_probe, client_round
from lamina.errors import LaminaError, RunError, place
from lamina.evaluate import Score, score_local, score_personal, score_piece
from lamina.method import Plan
from lamina.store import Row
from lamina.tree import Message

Kind = Literal["round", "judged", "probe", "test", "personal"]  # judged: a round, with its client's model tested


class Engine(Protocol):
    name: str
    reason: str  # why this one was chosen, for the record
    workers: int

    def replies(self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row]) -> Iterator[Reply]:
        """The replies in the order of `clients`. A reply's message may be overwritten once the next one is asked for.

        Args:
            kind: what to do; for "test", `clients` are pieces of the test set.
            rows: what the clients remember; one that is missing starts from the method's `init_client`.
        """
        ...

    def close(self) -> None: ...


def work(kind: Kind, trainer: Trainer, setup: Setup, plan: Plan, client: int, row: Row | None) -> Reply:
    """One job. What goes wrong in the user's model, loss or method comes out as a RunError (E304) that says where."""
    try:
        return _work(kind, trainer, setup, plan, client, row)
    except LaminaError:
        raise
    except Exception as error:
        raise RunError(
            f"{type(error).__name__}: {error}",
            code="E304",
            where=f"{subject(kind, setup, client)}, round {plan.round}, {place(error)}",
        ) from error


def subject(kind: Kind, setup: Setup, client: int) -> str:
    """Whom a job is about, for messages."""
    return "the test set" if kind == "test" else f"client {setup.data.names[client]!r}"


def _work(kind: Kind, trainer: Trainer, setup: Setup, plan: Plan, client: int, row: Row | None) -> Reply:
    if kind == "probe":
        return client_probe(trainer, setup, plan, client)
    if kind == "test":
        return _scored(client, score_piece(trainer, setup, plan, client))
    if row is None:
        row = Row(setup.method.init_client(plan.params), {})
    if kind == "personal":
        return _scored(client, score_personal(trainer, setup, plan, client, row))
    reply = client_round(trainer, setup, plan, client, row)
    if kind == "judged":
        reply.message.update(_numbers(score_local(trainer, setup)))
    return reply


def score_of(reply: Reply) -> Score:
    loss, examples, hits, targets = reply.message["score"]["score"].tolist()
    return Score(loss, int(examples), int(hits), int(targets))


def _scored(client: int, score: Score) -> Reply:
    return Reply(client, _numbers(score), None, {}, 0.0, 0, None)


def _numbers(score: Score) -> Message:
    return {"score": {"score": torch.tensor(score, dtype=torch.float64)}}


@contextmanager
def threads(n: int) -> Iterator[None]:
    """torch on n threads within it. One thread is what makes loop and processes agree to the last bit: sums over
    several threads depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
