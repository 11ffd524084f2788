"""Engines run client rounds. `choose` decides between them from static features, never from a timing."""

from __future__ import annotations

import os

import torch

from lamina.client import Setup
from lamina.engine import gemm, processes
from lamina.engine.base import Engine, Worker
from lamina.engine.loop import LoopEngine
from lamina.engine.processes import ProcessEngine
from lamina.engine.stack import WIDTH, Stack, Vmapped
from lamina.errors import ConfigError, expect, is_whole
from lamina.training import Trainer, batches
from lamina.tree import Params

ENGINES = ("auto", "loop", "processes", "threads", "stacked")
_SMALL = 100_000  # parameters of a network that `auto` stacks
_LIGHT = 15e6  # floating-point operations of a step that `auto` stacks
_FEWEST = 2  # clients in a stack that `auto` makes


def bits(name: str) -> str:
    """Engines with the same word give the same bits: `loop` and `processes`, for any number of workers."""
    return "one thread" if name in ("loop", "processes") else name


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose(
    name: str, cohort: int, workers: int | None, stack: Stack | None = None, why: str = ""
) -> tuple[str, int, str]:
    """Name, workers and reason of the engine to use, from static features only: results never depend on a timing.

    Small networks of linear layers are stacked; else one client per core wins on every work of docs/performance.md, the
    one whose model exceeds the cache included.

    Args:
        name: what was asked for; "auto" applies the rule.
        cohort: clients per round.
        workers: processes asked for, None for one per core.
        stack, why: what `stack_for` says of the federation.

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
    if name in ("loop", "threads"):
        return name, 1, "asked for"
    if stack is not None:
        return "stacked", min(limit, -(-cohort // stack.width)) if processes.available() else 1, why
    instead = f"stacked was asked for, but {why}; " if name == "stacked" else ""
    if cohort < cores():
        return "threads", 1, f"{instead}{cohort} clients a round are fewer than {cores()} cores"
    if not processes.available():
        return "threads", 1, f"{instead}this system cannot fork"
    if limit == 1:
        return "loop", 1, f"{instead}one core"
    return "processes", limit, f"{instead}one client a process, {limit} at a time on {cores()} cores"


def stack_for(name: str, trainer: Trainer, setup: Setup, params: Params, cohort: int) -> tuple[Stack | None, str]:
    """The stack of a federation and why, or None and why not.

    Args:
        name: the engine asked for. Under "auto" only what is sure to gain is stacked.
        params: the initial model.
    """
    if name not in ("auto", "stacked"):
        return None, "another engine was asked for"
    written = gemm.recognise(trainer)
    parameters = sum(w.numel() for w in trainer.weights)
    batch = setup.local.batch_size or int(setup.data.sizes.max())
    light = parameters <= _SMALL and 6 * parameters * batch <= _LIGHT
    width = min(WIDTH, -(-cohort // 8))  # a function of the cohort, not of the cores: results do not depend on them
    if name == "auto" and (written is None or not light or width < _FEWEST):
        return None, "not a small network of linear layers, or few clients a round"
    if trainer.buffers:
        return None, f"the model has buffers ({next(iter(trainer.buffers))}), which training may change"
    stack = Stack(trainer, written or Vmapped(trainer), width)
    failure = _tried(stack, trainer, setup, params)
    if failure:
        return None, failure
    how = f"{parameters:,} parameters in linear layers" if written else "asked for, by torch's vmap"
    return stack, f"{how}, {width} clients at a time"


def _tried(stack: Stack, trainer: Trainer, setup: Setup, params: Params) -> str:
    """Why the stack does not work for this model; "" when its gradients are those of one client after the other."""
    data = setup.data
    clients = data.sizes.argsort(descending=True, stable=True)[:2].tolist()
    chunks = [next(batches(data, c, setup.local, setup.seed, 0)) for c in clients]
    weights = {name: torch.stack([x] * len(clients)) for name, x in params.items()}
    trainer.model.train()
    trainer.load(params, {})
    try:
        grads, _ = stack.gradient(weights, chunks, stack.fetch(setup, 0, clients, draws=False))
    except Exception as error:  # whatever the user's model does not allow
        return f"the model cannot be stacked ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    for i, chunk in enumerate(chunks):
        x, y = trainer.batch(chunk, None)
        expected, _ = trainer.gradient(x, y)
        for (name, g), one in zip(grads.items(), expected, strict=True):
            scale = float(one.abs().max())
            if not torch.allclose(g[i], one, rtol=1e-3, atol=1e-4 * scale):
                return f"the stacked gradient of {name} differs from that of one client"
    return ""


def make(name: str, workers: int, reason: str, trainer: Trainer, setup: Setup, stack: Stack | None = None) -> Engine:
    worker = Worker(trainer, setup, stack)
    if name == "processes" or (name == "stacked" and workers > 1):
        return ProcessEngine(name, worker, workers, reason)
    return LoopEngine(name, worker, cores() if name == "threads" else 1, reason)


__all__ = ["ENGINES", "Engine", "bits", "choose", "cores", "make", "stack_for"]
