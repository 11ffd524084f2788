"""How worker processes begin and end: forked, or spawned where fork is not to be had.

A forked child has all that its parent has, copy-on-write. A spawned one starts Python anew and is handed what it needs:
data and arenas in shared memory, of which there is one for all, and a model of its own. multiprocessing does the
handing over, by the names of classes and functions; `expect_sendable` says beforehand what cannot be named.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from lamina import entry
from lamina.client import Setup
from lamina.data.client_data import ClientData
from lamina.engine import gemm
from lamina.engine.arena import shared_memory
from lamina.engine.base import Worker
from lamina.engine.stack import Stack, Vmapped
from lamina.errors import ConfigError, RunError
from lamina.training import Trainer

Serve = Callable[[Connection, Worker], NoReturn]
_ALIGN = 64


class Child(Protocol):
    pid: int

    def ended(self) -> str:
        """Waits for its end: how that was, "signal 9" or "status 1"."""
        ...

    def kill(self) -> None:
        """It may be in the middle of a long step, and has nothing to save."""
        ...


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits until both sides are ready, at the child until it has said what to do about it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- forked


class Forked:
    def __init__(self, pid: int):
        self.pid = pid
        self._alive = True

    def ended(self) -> str:
        _, status = os.waitpid(self.pid, 0)
        self._alive = False
        return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"

    def kill(self) -> None:
        if self._alive:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # gone, or reaped by the embedding program
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)


def fork(serve: Serve, worker: Worker, open_pipes: Sequence[Connection]) -> tuple[Connection, Forked]:
    """Args: open_pipes: to other children, which this one has no use for."""
    ours, theirs = Pipe()
    # The kernel tells a child that its parent died when the forking *thread* ends, so only the main one counts.
    lasting = threading.current_thread() is threading.main_thread()
    with warnings.catch_warnings():
        # Python warns of forking beside other threads. Ours are torch's idle pool, which a child on one thread never
        # wakes.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
        if pid == 0:
            try:  # whatever happens, the child never returns into the caller's code
                for pipe in (*open_pipes, ours):
                    pipe.close()
                if lasting:
                    _die_with_parent()
                serve(theirs, worker)
            finally:
                os._exit(1)
    theirs.close()
    return ours, Forked(pid)


def _die_with_parent() -> None:
    """Linux: the kernel ends this process when its parent ends, however that happens."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


# ---- spawned


class Spawned:
    def __init__(self, process: Any):
        self.pid: int = process.pid
        self._process = process

    def ended(self) -> str:
        self._process.join()
        code = self._process.exitcode
        return f"signal {-code}" if code < 0 else f"status {code}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()


class Parcel(NamedTuple):
    """A worker as it is handed over: what it holds in shared memory, no closures."""

    trainer: Trainer
    setup: Setup
    width: int | None  # of the stack, None without one
    written: bool  # whether its gradient is the written-out one


def packed(worker: Worker) -> Parcel:
    """Made once for all children. The data's own tensors move to shared memory when they are handed over; the many
    small ones of clients' test sets and of the model are gathered in one piece, as each piece takes a descriptor."""
    data = worker.setup.data
    if data.client_tests is not None:
        gathered = copy.copy(data)
        vars(gathered)["client_tests"] = _gathered(data.client_tests)
        data = gathered
    worker.trainer.load(worker.trainer.detached(), {})  # holding nobody's plan
    trainer = _apart(worker.trainer, data)
    tensors = [*{id(x): x for x in (*trainer.model.parameters(), *trainer.model.buffers())}.values()]
    for x, place in zip(tensors, _places([x.detach() for x in tensors]), strict=True):
        x.data = place
    stack = worker.stack
    return Parcel(
        trainer,
        worker.setup._replace(data=data),
        None if stack is None else stack.width,
        stack is not None and not isinstance(stack.gradient, Vmapped),
    )


def unpacked(parcel: Parcel) -> Worker:
    """The child's worker, with a model of its own."""
    trainer = _apart(parcel.trainer, parcel.setup.data)
    if parcel.width is None:
        return Worker(trainer, parcel.setup)
    gradient = gemm.recognise(trainer) if parcel.written else None
    return Worker(trainer, parcel.setup, Stack(trainer, gradient or Vmapped(trainer), parcel.width))


def spawn(main: Callable[..., NoReturn], parcel: Parcel, *more: Any) -> tuple[Connection, Spawned]:
    """A process that runs main(_, pipe, parcel, *more), as soon as it has imported all that it needs."""
    ours, theirs = Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=main, args=(_Entries(), theirs, parcel, *more), daemon=True)
    try:
        process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return ours, Spawned(process)


class _Entries:
    """Stands before what may be of a user's files that are no modules by name: to read it is to load those."""

    def __reduce__(self) -> tuple[Any, ...]:
        return entry.load, (entry.loaded(),)


def follow_parent() -> None:
    """In a spawned process: ends it when its parent ends, however that happens, also in the middle of a job."""

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


_GUARD = (
    "a script's work belongs below `if __name__ == '__main__':`, what it is made of into a file that can be imported"
)


def failed_to_start(how: str) -> RunError | ConfigError:
    """What to say of a spawned process that ended before it was ready."""
    if how.startswith("signal"):
        return RunError(f"a worker process ended with {how} while it started", code="E303")
    return ConfigError(
        f"a worker process could not start ({how}); why stands above",
        code="E118",
        where="engine",
        remedy=f"{_GUARD}; or engine='threads'",
    )


def expect_sendable(trainer: Trainer, setup: Setup) -> None:
    """Raises ConfigError E118 for what a spawned process cannot be handed: a lambda, a class defined in a function."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        message = "a worker process that starts runs this script from its top, and comes here"
        raise ConfigError(message, code="E118", where="engine", remedy=_GUARD)
    parts = {
        "model": trainer.model,
        "loss": setup.loss,
        "method": setup.method,
        "uplink": setup.uplink,
        "local": setup.local,
        "transform": setup.data.transform,
    }
    for name, part in parts.items():
        try:
            _Trial(io.BytesIO()).dump(part)
        except Exception as error:  # PicklingError, AttributeError, TypeError, or whatever a part raises
            raise ConfigError(
                f"{name}: this system cannot fork, so its workers start anew, and it cannot be handed to them: {error}",
                code="E118",
                where=name,
                remedy="define it at the top level of a file, by a name of its own; or engine='threads'",
            ) from error


class _Trial(ForkingPickler):
    """Writes what a process would be handed, but for tensors."""

    def reducer_override(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return int, ()
        fileless = not hasattr(sys.modules["__main__"], "__file__")
        if fileless and isinstance(x, type | FunctionType) and x.__module__ == "__main__":
            raise TypeError(f"{x.__qualname__} is defined in an interactive session, which no other process sees")
        return NotImplemented


def _apart(trainer: Trainer, data: ClientData) -> Trainer:
    """A copy with a model of its own, on these data."""
    return copy.deepcopy(trainer, {id(trainer.data): data, id(data): data})


def _gathered(tests: Mapping[str, Any]) -> dict[str, Any]:
    """The same test sets, their tensors in one piece of shared memory."""
    flat = [
        x for pair in tests.values() for part in pair for x in (part.values() if isinstance(part, dict) else [part])
    ]
    places = iter(_places(flat))

    def placed(part: Any) -> Any:
        return {key: next(places) for key in part} if isinstance(part, dict) else next(places)

    return {name: (placed(x), placed(y)) for name, (x, y) in tests.items()}


def _places(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in one piece of shared memory, each with the strides that it has."""
    offsets, end = [], 0
    for x in tensors:
        offsets.append(end)
        end += -(-x.numel() * x.dtype.itemsize // _ALIGN) * _ALIGN
    memory = shared_memory(max(end, 1))
    made = []
    for x, at in zip(tensors, offsets, strict=True):
        flat = memory[at : at + x.numel() * x.dtype.itemsize].view(x.dtype)
        place = torch.empty_like(x, device="meta")  # dense strides, in the order of x's
        made.append(flat.as_strided(x.shape, place.stride()).copy_(x))
    return made
