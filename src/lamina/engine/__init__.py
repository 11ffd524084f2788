"""Engines run client rounds. `choose` decides between them from static features, never from a timing."""

from __future__ import annotations

import os

from lamina.client import Setup, Trainer
from lamina.engine import processes
from lamina.engine.base import Engine
from lamina.engine.loop import LoopEngine
from lamina.engine.processes import ProcessEngine
from lamina.errors import ConfigError, expect, is_whole

ENGINES = ("auto", "loop", "processes", "threads")


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose(name: str, cohort: int, workers: int | None) -> tuple[str, int, str]:
    """Name, workers and reason of the engine to use, from static features only: results never depend on a timing.

    One client per core wins on every work of docs/performance.md, the one whose model exceeds the cache included.

    Args:
        name: what was asked for; "auto" applies the rule.
        cohort: clients per round.
        workers: processes asked for, None for one per core.

    Raises:
        ConfigError: E103 for an unknown name, E118 for one this machine cannot run.
    """
    expect(name in ENGINES, f"engine={name!r}: expected one of {', '.join(ENGINES)}", code="E103", where="engine")
    expect(workers is None or is_whole(workers, 1), f"workers={workers}: expected a whole number >= 1", where="workers")
    limit = min(workers or cores(), cohort)
    if name == "processes":
        if not processes.available():
            raise ConfigError("engine='processes' needs fork", code="E118", where="engine", remedy="engine='threads'")
        return name, limit, "asked for"
    if name != "auto":
        return name, 1, "asked for"
    if cohort < cores():
        return "threads", 1, f"{cohort} clients a round are fewer than {cores()} cores"
    if not processes.available():
        return "threads", 1, "this system cannot fork"
    if limit == 1:
        return "loop", 1, "one core"
    return "processes", limit, f"one client a process, {limit} at a time on {cores()} cores"


def make(name: str, workers: int, reason: str, trainer: Trainer, setup: Setup) -> Engine:
    match name:
        case "processes":
            return ProcessEngine(trainer, setup, workers, reason)
        case "threads":
            return LoopEngine(trainer, setup, cores(), reason)
        case _:
            return LoopEngine(trainer, setup, 1, reason)


__all__ = ["ENGINES", "Engine", "choose", "cores", "make"]
