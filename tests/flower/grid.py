"""Flower's Grid without Flower's processes: nodes are apps in this process, which answer when they are asked.

The two places where a message must be given what the SuperLink would give it are here, and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from lamina import config, runs
from lamina.flower import server as serving
from lamina.flower.settings import RunKeys
from lamina.runs import Run

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0


class Node:
    """A SuperNode: what is in its memory, and the app."""

    def __init__(self, app: Callable[[Message, Context], Message], number: int, config: Mapping[str, Any]):
        self.app = app
        self.context = Context(1, number, dict(config), RecordDict(), {})

    def answer(self, message: Message) -> Message:
        try:
            return self.app(message, self.context)
        except Exception as error:
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)


class FakeGrid:
    """Messages are answered when they are pulled for.

    Attributes:
        happens: (node, message, reply) -> what comes instead; None: nothing.
        pushed: (node id, message type) of all messages.
    """

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.happens: Callable[[int, Message, Message], Message | None] = lambda node, message, reply: reply
        self.pushed: list[tuple[int, str]] = []
        self.requests = 0
        self._numbers = itertools.count(1)
        self._open: dict[str, Message] = {}

    def join(self, number: int, app: Any, state: Path, **config: Any) -> None:
        self.nodes[number] = Node(app, number, {"state-dir": str(state), **config})

    def get_node_ids(self) -> list[int]:
        self.requests += 1
        return [*self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.pushed.append((node, message.metadata.message_type))
            said = f"message-{next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = said
            self._open[said] = message
            ids.append(said if node in self.nodes else None)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for said in message_ids:
            message = self._open.pop(said, None)
            if message is None:
                continue
            number = message.metadata.dst_node_id
            if number not in self.nodes:
                found.append(Message(Error(5, "Node Unavailable"), reply_to=message))
                continue
            reply = self.happens(number, message, self.nodes[number].answer(message))
            found += [] if reply is None else [reply]
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages([said for said in self.push_messages(messages) if said is not None])


def served(path: Path, grid: FakeGrid, folder: Path, **keys: Any) -> Run:
    with serving.Report("") as report:
        return serving.serve(path, RunKeys(run_dir=str(folder / "runs"), **keys), grid, report)


def simulated(path: Path) -> Run:
    loaded = config.load(path, env={})
    return runs.fit(config.build(loaded), loaded.rounds, path.parent.parent / "local", config=loaded, progress=False)
