"""Engines run client rounds. `choose` decides between them from static features, never from a timing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from lamina.client import Setup
from lamina.engine import children, cuda, gemm, processes
from lamina.engine.base import Engine, Worker
from lamina.engine.loop import LoopEngine
from lamina.engine.processes import ProcessEngine
from lamina.engine.stack import WIDTH, Stack, Vmapped, descends, minibatches
from lamina.errors import ConfigError, expect, is_whole
from lamina.training import Trainer, batches
from lamina.tree import Params

ENGINES = ("auto", "loop", "processes", "threads", "stacked", "cuda")
_SMALL = 100_000  # parameters of a network that `auto` stacks
_LIGHT = 15e6  # floating-point operations of a step that `auto` stacks
_FEWEST = 2  # clients in a stack that `auto` makes


def bits(name: str) -> str:
    """Engines with the same word give the same bits: `loop` and `processes`, for any number of workers."""
    return "one thread" if name in ("loop", "processes") else name


_share: ContextVar[int | None] = ContextVar("share", default=None)


@contextlib.contextmanager
def sharing(share: int | None) -> Iterator[None]:
    """Inside, there are so many cores at most; None: all."""
    before = _share.set(share)
    try:
        yield
    finally:
        _share.reset(before)


def cores() -> int:
    """Processors this process may use."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(there, _share.get() or there)


def choose(
    name: str, cohort: int, workers: int | None, stack: Stack | None = None, why: str = ""
) -> tuple[str, int, str]:
    """Name, workers and reason of the engine to use, from static features only: results never depend on a timing.

    Networks of linear layers are written out, small ones stacked; else one client per core wins on every work of
    docs/performance.md. A GPU is not taken unasked as long as nobody has measured it.

    Args:
        name: what was asked for; "auto" applies the rule.
        cohort: clients per round.
        workers: processes asked for, None for one per core; on GPUs clients at once, None for 8 a device.
        stack, why: what `stack_for` says of the federation.

    Raises:
        ConfigError: E103 for an unknown name, E118 for one this machine cannot run.
    """
    expect(name in ENGINES, f"engine={name!r}: expected one of {', '.join(ENGINES)}", code="E103", where="engine")
    expect(workers is None or is_whole(workers, 1), f"workers={workers}: expected a whole number >= 1", where="workers")
    if name == "cuda":
        return _on_gpus(cohort, workers)
    limit = min(workers or cores(), cohort)
    if name == "processes":
        return name, limit, "asked for"
    if name in ("loop", "threads"):
        return name, 1, "asked for"
    if stack is not None:  # a script that did not ask for workers need not be fit for them to be spawned
        alone = name == "auto" and not processes.available()
        return "stacked", 1 if alone else min(limit, -(-cohort // stack.width)), why
    instead = f"stacked was asked for, but {why}; " if name == "stacked" else ""
    idle = "; engine='cuda' would use the GPU" if cuda.available() else ""
    if cohort < cores():
        return "threads", 1, f"{instead}{cohort} clients a round are fewer than {cores()} cores{idle}"
    if not processes.available():
        return "threads", 1, f"{instead}this system cannot fork, and auto spawns no workers{idle}"
    if limit == 1:
        return "loop", 1, f"{instead}one core{idle}"
    return "processes", limit, f"{instead}one client a process, {limit} at a time on {cores()} cores{idle}"


def _on_gpus(cohort: int, workers: int | None) -> tuple[str, int, str]:
    if not cuda.available():
        raise ConfigError(
            "engine='cuda': torch finds no GPU",
            code="E118",
            where="engine",
            remedy="engine='auto'; with a GPU in the machine, a driver and a torch that is built for CUDA",
        )
    return "cuda", min(workers or cuda.STREAMS * len(cuda.devices()), cohort), "asked for"


def stack_for(name: str, trainer: Trainer, setup: Setup, params: Params, cohort: int) -> tuple[Stack | None, str]:
    """The stack of a federation and why, or None and why not.

    Args:
        name: the engine asked for. Under "auto" only what is sure to gain is stacked.
        params: the initial model.
    """
    if name not in ("auto", "stacked"):
        return None, "another engine was asked for"
    if not len(setup.data.indices):
        return None, "the examples are elsewhere"
    written = gemm.recognise(trainer)
    parameters = sum(w.numel() for w in trainer.weights)
    batch = setup.local.batch_size or int(setup.data.sizes.max())
    light = parameters <= _SMALL and 6 * parameters * batch <= _LIGHT
    width = min(WIDTH, -(-cohort // 4))  # a function of the cohort, not of the cores: results do not depend on them
    if written is not None and not light:
        width = 1  # what is won is the step without a gradient
    gains = written is not None and (width >= _FEWEST if light else descends(setup) and cohort > 1)
    if name == "auto" and not gains:
        if trainer.local.precision != "fp32":
            return None, f"only fp32 is written out, not {trainer.local.precision}"
        return None, "not a network of linear layers under plain SGD, or few clients a round"
    if trainer.buffers:
        return None, f"the model has buffers ({next(iter(trainer.buffers))}), which training may change"
    stack = Stack(trainer, written or Vmapped(trainer), width)
    failure = _tried(stack, trainer, setup, params)
    if failure:
        return None, failure
    how = f"{parameters:,} parameters in linear layers" if written else "asked for, by torch's vmap"
    if trainer.local.precision != "fp32":
        how += f" (only fp32 is written out, not {trainer.local.precision})"
    return stack, f"{how}, {'one client' if width == 1 else f'{width} clients'} at a time"


def _tried(stack: Stack, trainer: Trainer, setup: Setup, params: Params) -> str:
    """Why the stack does not work for this model; "" when its gradients are those of one client after the other."""
    data = setup.data
    sizes = data.offsets.diff()
    clients = [c for c in sizes.argsort(descending=True, stable=True)[:2].tolist() if sizes[c]]
    steps = [setup.local.count(int(sizes[c])) for c in clients]
    weights = {name: torch.stack([x] * len(clients)) for name, x in params.items()}
    trainer.model.train()
    trainer.load(params, {})
    try:
        given = next(minibatches(setup, 0, clients, steps, draws=False))
        grads, _ = stack.gradient(weights, given)
    except Exception as error:  # whatever the user's model does not allow
        return f"the model cannot be stacked ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    rtol, atol = (2e-2, 2e-2) if trainer.local.precision == "bf16" else (1e-3, 1e-4)
    for i, client in enumerate(clients):
        x, y = trainer.batch(next(batches(data, client, setup.local, setup.seed, 0)), None)
        expected, _ = trainer.gradient(x, y)
        for (name, g), one in zip(grads.items(), expected, strict=True):
            scale = float(one.abs().max())
            if not torch.allclose(g[i], one, rtol=rtol, atol=atol * scale):
                return f"the stacked gradient of {name} differs from that of one client"
    return ""


def expect_sendable(name: str, workers: int, trainer: Trainer, setup: Setup) -> None:
    """Raises ConfigError E118 where the engine must spawn its workers and something cannot be handed to them."""
    if _in_processes(name, workers) and not processes.available():
        children.expect_sendable(trainer, setup)


def _in_processes(name: str, workers: int) -> bool:
    return name == "processes" or (name == "stacked" and workers > 1)


def make(name: str, workers: int, reason: str, trainer: Trainer, setup: Setup, stack: Stack | None = None) -> Engine:
    if name == "cuda":
        return cuda.CudaEngine(trainer, setup, workers, reason, cuda.devices())
    worker = Worker(trainer, setup, stack)
    if _in_processes(name, workers):
        return ProcessEngine(name, worker, workers, reason)
    return LoopEngine(name, worker, cores() if name == "threads" else 1, reason)


__all__ = ["ENGINES", "Engine", "bits", "choose", "cores", "expect_sendable", "make", "stack_for"]
