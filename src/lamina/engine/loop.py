"""One client after another in this process: `loop` on one thread, `threads` with one client on all cores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lamina.client import Reply, Setup, Trainer
from lamina.engine.allocator import keep_memory
from lamina.engine.base import Kind, threads, work
from lamina.method import Plan
from lamina.store import Row


class LoopEngine:
    """Args: cores: threads that one client's round may use; 1 is the strategy `loop`."""

    workers = 1

    def __init__(self, trainer: Trainer, setup: Setup, cores: int, reason: str):
        self.name = "loop" if cores == 1 else "threads"
        self.reason = reason
        self._trainer = trainer
        self._setup = setup
        self._cores = cores
        keep_memory()

    def replies(self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row]) -> Iterator[Reply]:
        for client in clients:
            with threads(self._cores):
                reply = work(kind, self._trainer, self._setup, plan, client, rows.get(client))
            yield reply

    def close(self) -> None:
        pass
