"""Who is there: every node is asked once which clients it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, MessageType

from lamina.errors import ConfigError, RunError, WireError
from lamina.flower.records import packed, unpacked
from lamina.remote import AtServer, Roll
from lamina.remote.roll import call, expect_answered
from lamina.remote.signing import Rejected, Signed

POLL_S = 0.2


class RollCall:
    """Asks each node as it appears.

    Args:
        signing: calls are signed with this, and nodes that do not answer so are left out; None: nothing is signed.
        say: is told of those.

    Attributes:
        rolls: node id -> its roll, in the order in which they came.
    """

    def __init__(self, grid: Any, signing: AtServer | None = None, say: Callable[[str], None] = lambda text: None):
        self.rolls: dict[int, Roll] = {}
        self._grid = grid
        self._signing = signing
        self._say = say
        self._asked: dict[str, int] = {}  # message id -> node id
        self._calls: dict[int, Signed] = {}  # node id -> what it was asked with
        self._left_out: set[int] = set()

    @property
    def asked(self) -> set[int]:
        """Nodes that have not answered yet."""
        return {*self._asked.values()}

    @property
    def known(self) -> set[int]:
        return {*self.rolls} | self.asked | self._left_out

    def ask(self, nodes: Iterable[int]) -> None:
        """Those that have not been asked before."""
        fresh = [node for node in nodes if node not in self.known]
        calls = [Message(packed(self._call(n)), dst_node_id=n, message_type=MessageType.QUERY) for n in fresh]
        ids = self._grid.push_messages(calls) if calls else []
        self._asked |= {said: node for said, node in zip(ids, fresh, strict=False) if said is not None}

    def _call(self, node: int) -> bytes:
        if self._signing is None:
            return b""
        self._calls[node] = self._signing.call()
        return call(self._calls[node], self._signing.keys)

    def _roll(self, node: int, blob: bytes) -> Roll:
        """Raises WireError, Rejected."""
        roll = Roll.unpacked(blob)
        if self._signing is not None:
            expect_answered(roll, blob, self._calls.pop(node), self._signing.keys)
        return roll

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
                    self._mute(node, reply.error.reason)
                continue
            try:
                self.rolls[node] = self._roll(node, unpacked(reply.content)[0])
            except (WireError, Rejected) as error:
                self._mute(node, str(error))

    def _mute(self, node: int, reason: str | None) -> None:
        """Anybody can be a node: where nodes sign, one that does not ends no run. Raises RunError E315."""
        if self._signing is None:
            raise _mute(node, reason)
        self._left_out.add(node)
        self._say(f"node {node} is left out: {reason or 'no reason given'}")

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
