"""What an engine is: something that runs client rounds and hands back their replies in the order asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, TypeAlias

import torch

from lamina.client import Reply, Setup, client_probe, client_round, known
from lamina.engine.stack import Stack, stack_round
from lamina.errors import LaminaError, RunError, place
from lamina.evaluate import Score, score_local, score_personal, score_piece
from lamina.method import Plan
from lamina.store import Row
from lamina.training import Trainer
from lamina.tree import Message, Params
from lamina.wire import frame

Kind = Literal["round", "judged", "probe", "test", "personal"]  # judged: a round, with its client's model tested
Missing = Literal["", "plan", "row"]  # what a client has lost of all that it was sent; "row": what it remembered, too
Pack: TypeAlias = Callable[[int, Missing], bytes]  # the plan's frame for a client, for what it holds if nothing is lost


class Engine(Protocol):
    name: str
    reason: str  # why this one was chosen, for the record
    workers: int

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        """The replies in the order of `clients`. A reply's message may be overwritten once the next one is asked for.

        Args:
            kind: what to do; for "test", `clients` are pieces of the test set.
            rows: what the clients remember; one that is missing starts from the method's `init_client`.
            pack: makes the bytes for clients that are elsewhere. Engines with clients of their own have no use for it.
        """
        ...

    def close(self) -> None: ...


class Worker:
    """Does jobs. A job is one client, or up to `stack.width` of them where a stack trains several at once."""

    def __init__(self, trainer: Trainer, setup: Setup, stack: Stack | None = None):
        self.trainer = trainer
        self.setup = setup
        self.stack = stack

    def jobs(self, kind: Kind, clients: Sequence[int]) -> list[Sequence[int]]:
        """The clients in their order, job by job: a function of the clients alone, never of who is idle."""
        width = self.stack.width if self.stack is not None and kind in ("round", "judged") else 1
        return [clients[at : at + width] for at in range(0, len(clients), width)]

    def do(self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Sequence[Row | None]) -> list[Reply]:
        """One job."""
        with blaming(kind, self.setup, plan, clients):
            replies = self._do(kind, plan, clients, rows)
        return enclosed(self.setup, replies)

    def _do(self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Sequence[Row | None]) -> list[Reply]:
        trainer, setup = self.trainer, self.setup

        def judge(params: Params) -> Message:
            trainer.load(params, plan.buffers)
            return score_tree(score_local(trainer, setup))

        if self.stack is not None and kind in ("round", "judged"):
            return stack_round(self.stack, setup, plan, clients, rows, judge if kind == "judged" else None)
        (client,), (row,) = clients, rows
        match kind:
            case "probe":
                return [client_probe(trainer, setup, plan, client)]
            case "test":
                return [_scored(client, score_piece(trainer, setup, plan, client))]
            case "personal":
                return [_scored(client, score_personal(trainer, setup, plan, client, known(setup, plan, row)))]
        reply = client_round(trainer, setup, plan, client, row)
        if kind == "judged":
            reply.message.update(score_tree(score_local(trainer, setup)))
        return [reply]


@contextmanager
def blaming(kind: Kind, setup: Setup, plan: Plan, clients: Sequence[int]) -> Iterator[None]:
    """What fails in the user's model, loss or method comes out as a RunError (E304) that says where."""
    try:
        yield
    except LaminaError:
        raise
    except Exception as error:
        raise RunError(
            f"{type(error).__name__}: {error}",
            code="E304",
            where=f"{subject(kind, setup, clients)}, round {plan.round}, {place(error)}",
        ) from error


class Keep:
    """A `frame.Carry` for clients whose server is elsewhere: it keeps the message's frame, by client."""

    def __init__(self) -> None:
        self.frames: dict[int, bytes] = {}

    def __call__(self, kind: str, blob: bytes) -> None:
        _, _, client = frame.FIXED.unpack_from(blob, frame.FRONT.size + 8)
        self.frames[client] = blob


def enclosed(setup: Setup, replies: list[Reply]) -> list[Reply]:
    """Where frames are kept: replies that have, instead of the message as its server would decode it, the bytes of its
    frame as the tree "frame". So they come out of worker processes like any other tensor."""
    kept = setup.carry
    if not isinstance(kept, Keep):
        return replies
    blobs = [bytearray(kept.frames.pop(reply.client)) for reply in replies]
    tensors = [torch.frombuffer(blob, dtype=torch.uint8) for blob in blobs]
    return [r._replace(message={"frame": {"frame": x}}) for r, x in zip(replies, tensors, strict=True)]


def subject(kind: Kind, setup: Setup, clients: Sequence[int]) -> str:
    """Whom a job is about, for messages."""
    if kind == "test":
        return "the test set"
    names = [repr(setup.data.names[client]) for client in clients]
    return f"client {names[0]}" if len(names) == 1 else f"one of the clients {', '.join(names)}"


def score_of(reply: Reply) -> Score:
    loss, examples, hits, targets = reply.message["score"]["score"].tolist()
    return Score(loss, int(examples), int(hits), int(targets))


def _scored(client: int, score: Score) -> Reply:
    return Reply(client, score_tree(score), None, {}, 0.0, 0, None)


def score_tree(score: Score) -> Message:
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
