"""Who is there: every node is asked once which clients it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, MessageType

from lamina.errors import ConfigError, RunError, WireError
from lamina.flower.records import packed, unpacked
from lamina.remote import Roll

POLL_S = 0.2


class RollCall:
    """Asks each node as it appears.

    Attributes:
        rolls: node id -> its roll, in the order in which they came.
    """

    def __init__(self, grid: Any):
        self.rolls: dict[int, Roll] = {}
        self._grid = grid
        self._asked: dict[str, int] = {}  # message id -> node id

    @property
    def asked(self) -> set[int]:
        """Nodes that have not answered yet."""
        return {*self._asked.values()}

    @property
    def known(self) -> set[int]:
        return {*self.rolls} | self.asked

    def ask(self, nodes: Iterable[int]) -> None:
        """Those that have not been asked before."""
        fresh = [node for node in nodes if node not in self.known]
        calls = [Message(packed(b""), dst_node_id=node, message_type=MessageType.QUERY) for node in fresh]
        ids = self._grid.push_messages(calls) if calls else []
        self._asked |= {said: node for said, node in zip(ids, fresh, strict=False) if said is not None}

    def take(self) -> None:
        """What has been answered by now.

        Raises:
            RunError: E315 a node that is there cannot say which clients it has.
        """
        if not self._asked:
            return
        for reply in self._grid.pull_messages([*self._asked]):
            node = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            if reply.has_error():
                if node in self._grid.get_node_ids():
                    raise _mute(node, reply.error.reason)
                continue
            try:
                self.rolls[node] = Roll.unpacked(unpacked(reply.content)[0])
            except WireError as error:
                raise _mute(node, str(error)) from error

    def wait(self, clients: int, nodes: int, limit_s: float, say: Callable[[str], None]) -> None:
        """Until so many are there.

        Raises:
            ConfigError: E118 when they are not in time.
            RunError: E315 as `take`.
        """
        end = time.monotonic() + limit_s
        said = ""
        while True:
            self.ask(self._grid.get_node_ids())
            self.take()
            here = sum(len(roll.sizes) for roll in self.rolls.values())
            if here >= clients and len(self.rolls) >= nodes:
                return
            status = f"{len(self.rolls)} of {nodes} nodes, {here} of {clients} clients are there"
            if status != said:
                say(f"waiting: {status}")
                said = status
            if time.monotonic() >= end:
                raise ConfigError(
                    f"{status} after {limit_s:g} s",
                    code="E118",
                    where="run config",
                    remedy="start the other SuperNodes, or set clients, nodes and wait-s of the run config",
                )
            time.sleep(POLL_S)


def _mute(node: int, reason: str | None) -> RunError:
    return RunError(
        f"node {node} cannot say which clients it has: {reason or 'no reason given'}",
        code="E315",
        where=f"node {node}",
        remedy="its SuperNode's log has the whole error; lamina, the data and the extra must be installed there too",
    )
