"""Job after job in this process: `loop` and `stacked` on one thread, `threads` with one client on all cores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lamina.client import Reply
from lamina.engine.allocator import keep_memory
from lamina.engine.base import Kind, Pack, Worker, threads
from lamina.method import Plan
from lamina.store import Row


class LoopEngine:
    """Args: cores: threads that one job may use."""

    workers = 1

    def __init__(self, name: str, worker: Worker, cores: int, reason: str):
        self.name = name
        self.reason = reason
        self._worker = worker
        self._cores = cores
        keep_memory()

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        for job in self._worker.jobs(kind, clients):
            with threads(self._cores):
                done = self._worker.do(kind, plan, job, [rows.get(client) for client in job])
            yield from done

    def close(self) -> None:
        pass
