"""One client per core: worker processes forked after the data is loaded, tensors in shared memory.

    parent   plan -> arena, "round" -> every worker;  then one job at a time to whoever is idle, longest first
    worker   row <- its slot;  client_round;  message and new row -> the same slot;  "done" -> parent
    parent   takes the replies in the schedule's order, whatever order they came in

Only small JSON lines travel through the pipes. One client runs on one thread, exactly as in `loop`, and the parent
sums in the same order, so both give the same bits for any number of workers.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

import torch

from lamina import wire
from lamina.client import Reply, Setup, Trainer
from lamina.engine.allocator import keep_memory
from lamina.engine.arena import Arena, Full, layout
from lamina.engine.base import Kind, subject, work
from lamina.errors import LaminaError, RunError, class_of
from lamina.method import Plan
from lamina.store import Row
from lamina.tree import Message, flatten, skeleton, unflatten

_SLOT_BUDGET = 512 << 20  # bytes of shared memory for replies that wait for their turn


def available() -> bool:
    return hasattr(os, "fork") and sys.platform != "darwin"  # macOS: system libraries do not survive a fork


class ProcessEngine:
    """Args: workers: processes; each trains one client at a time on one thread."""

    name = "processes"

    def __init__(self, trainer: Trainer, setup: Setup, workers: int, reason: str):
        self.workers = workers
        self.reason = reason
        self._trainer = trainer
        self._setup = setup
        self._pool: _Pool | None = None

    def replies(self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row]) -> Iterator[Reply]:
        done = 0
        need = 0
        while True:
            if self._pool is None:
                self._pool = _Pool(self._trainer, self._setup, self.workers, plan, need)
            try:
                for reply in self._pool.replies(kind, plan, clients[done:], rows):
                    done += 1
                    yield reply
                return
            except Full as full:  # a method's trees outgrew the slots: fork again with larger ones, go on from there
                self.close()
                need = 2 * full.needed

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class _Pool:
    def __init__(self, trainer: Trainer, setup: Setup, workers: int, plan: Plan, need: int):
        _, size = layout({"p": plan.params, "b": plan.buffers})
        _, shared = layout({"mask": plan.mask or {}, **plan.shared})
        self._plans = Arena(2 * size + 4 * shared + (1 << 20))
        self._slot = max(need, (6 + 2 * len(setup.method.sends)) * size + (1 << 16))
        slots = max(2 * workers, min(16 * workers, _SLOT_BUDGET // self._slot))
        self._replies = Arena(slots * self._slot)
        self._setup = setup
        self._like = Row(setup.method.init_client(plan.params), {})  # names the classes of a row
        self._free = list(range(slots))
        self._pipes: list[Connection] = []
        self._pids: list[int] = []
        gc.collect()
        gc.freeze()  # so that the collector does not touch, and thereby copy, the pages the workers share
        try:
            for _ in range(workers):
                self._fork(trainer)
        except BaseException:  # also Ctrl-C: whoever was forked already must not be left behind
            self.close()
            raise
        finally:
            gc.unfreeze()

    def _fork(self, trainer: Trainer) -> None:
        ours, theirs = Pipe()
        # The kernel tells a child that its parent died when the forking *thread* ends, so only the main one counts.
        lasting = threading.current_thread() is threading.main_thread()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C waits until both sides are ready
        try:
            with warnings.catch_warnings():
                # Python warns of forking beside other threads. Ours are torch's idle pool, which a child on one
                # thread never wakes.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                try:  # whatever happens, the child never returns into the caller's code
                    for pipe in (*self._pipes, ours):
                        pipe.close()
                    if lasting:
                        _die_with_parent()
                    _Worker(theirs, trainer, self._setup, self._plans, self._replies, self._slot, self._like).run()
                finally:
                    os._exit(1)
            theirs.close()
            self._pipes.append(ours)
            self._pids.append(pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def replies(self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row]) -> Iterator[Reply]:
        self._announce(kind, plan)
        idle = list(self._pipes)
        busy: dict[Connection, int] = {}  # pipe -> index of its job
        slots: dict[int, int] = {}  # index of a job -> slot
        ready: dict[int, dict[str, Any]] = {}
        sent = 0

        def feed() -> None:
            nonlocal sent
            while idle and self._free and sent < len(clients):
                pipe = idle.pop(0)
                slots[sent] = self._free.pop()
                busy[pipe] = sent
                self._give(pipe, clients[sent], rows.get(clients[sent]), slots[sent])
                sent += 1

        for turn in range(len(clients)):
            while turn not in ready:
                feed()
                answered = wait(list(busy))
                for pipe in [p for p in busy if p in answered]:
                    index = busy.pop(pipe)
                    ready[index] = self._receive(pipe, self._activity(kind, clients[index]))
                    idle.append(pipe)
                feed()  # before the parent turns to its sum
            yield self._reply(clients[turn], ready.pop(turn), slots[turn])
            self._free.append(slots.pop(turn))

    def _announce(self, kind: Kind, plan: Plan) -> None:
        trees: Message = {"params": plan.params, "buffers": plan.buffers, "mask": plan.mask or {}}
        trees |= {f"shared/{name}": tree for name, tree in plan.shared.items()}
        entries, _ = self._plans.write(trees, 0, self._plans.size)
        numbers = {f.name: getattr(plan, f.name) for f in fields(plan) if f.name not in ("params", "buffers", "mask")}
        numbers |= {"upload": sorted(plan.upload), "shared": list(plan.shared), "masked": plan.mask is not None}
        line = json.dumps({"kind": kind, "plan": numbers, "entries": entries}).encode()
        for pipe in self._pipes:
            self._send(pipe, line)

    def _give(self, pipe: Connection, client: int, row: Row | None, slot: int) -> None:
        start = slot * self._slot
        job: dict[str, Any] = {"client": client, "slot": slot, "used": 0}
        if row is not None:
            entries, end = self._replies.write({"row": flatten(row)}, start, start + self._slot)
            job |= {"row": skeleton(row), "entries": entries, "used": end - start}
        self._send(pipe, json.dumps(job).encode())

    def _send(self, pipe: Connection, line: bytes) -> None:
        try:
            pipe.send_bytes(line)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died(pipe, "") from None

    def _activity(self, kind: Kind, client: int) -> str:
        doing = "training" if kind in ("round", "judged", "probe") else "being evaluated"
        return f" while {subject(kind, self._setup, client)} was {doing}"

    def _receive(self, pipe: Connection, activity: str) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = json.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise self._died(pipe, activity) from None
        if "full" in answer:
            raise Full(answer["full"])
        if "error" in answer:
            raise class_of(answer["code"])(
                answer["error"], code=answer["code"], where=answer["where"], remedy=answer["remedy"]
            )
        return answer

    def _died(self, pipe: Connection, activity: str) -> RunError:
        pid = self._pids[self._pipes.index(pipe)]
        _, status = os.waitpid(pid, 0)
        self._pids[self._pipes.index(pipe)] = 0
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        return RunError(
            f"a worker process ended with {how}{activity}",
            code="E303",
            remedy="signal 9 is often the kernel running out of memory: fewer workers or a smaller batch_size",
        )

    def _reply(self, client: int, answer: dict[str, Any], slot: int) -> Reply:
        trees = self._replies.read(answer["entries"])
        leaves = {name: x.clone() for name, x in trees.pop("row", {}).items()}
        row: Row | None = unflatten(self._like, answer["row"], leaves)
        sizes = {tree: wire.Size(*size) for tree, size in answer["sizes"].items()}
        message = {tree: trees.get(tree, {}) for tree in answer["trees"]}
        return Reply(client, message, row, sizes, answer["loss"], answer["steps"], answer["refused"])

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # a worker ends when its pipe does
        for pid in self._pids:
            if pid:
                try:
                    os.kill(pid, signal.SIGKILL)  # it may be in the middle of a long step, and has nothing to save
                    os.waitpid(pid, 0)
                except (ProcessLookupError, ChildProcessError):
                    pass  # already gone, or reaped by the embedding program


class _Worker:
    """The child's side. It never returns: it ends with its pipe, and does not run the parent's exit handlers."""

    def __init__(
        self, pipe: Connection, trainer: Trainer, setup: Setup, plans: Arena, replies: Arena, slot: int, like: Row
    ):
        self._pipe = pipe
        self._trainer = trainer
        self._setup = setup
        self._plans = plans
        self._replies = replies
        self._slot = slot
        self._like = like

    def run(self) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        keep_memory()
        try:
            self._serve()
        except (EOFError, ConnectionResetError, BrokenPipeError):
            pass  # the parent closed the pipe: the run is over
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _serve(self) -> None:
        kind: Kind = "round"
        plan: Plan | None = None
        while True:
            job = json.loads(self._pipe.recv_bytes())
            if "plan" in job:
                kind, plan = job["kind"], self._plan(job)
                continue
            try:
                answer = self._work(kind, plan, job)
            except Full as full:
                answer = {"full": job["used"] + full.needed}
            except LaminaError as error:
                answer = {"error": error.message, "code": error.code, "where": error.where, "remedy": error.remedy}
            self._pipe.send_bytes(json.dumps(answer).encode())

    def _plan(self, job: dict[str, Any]) -> Plan:
        trees = self._plans.read(job["entries"])
        numbers = job["plan"]
        masked, shared = numbers.pop("masked"), numbers.pop("shared")
        numbers["upload"] = frozenset(numbers["upload"])
        return Plan(
            params=trees.get("params", {}),
            buffers=trees.get("buffers", {}),
            mask=trees.get("mask", {}) if masked else None,
            shared={name: trees.get(f"shared/{name}", {}) for name in shared},
            **numbers,
        )

    def _work(self, kind: Kind, plan: Plan | None, job: dict[str, Any]) -> dict[str, Any]:
        assert plan is not None  # the parent announces a plan before the first job
        start = job["slot"] * self._slot
        row = None
        if "row" in job:
            leaves = self._replies.read(job["entries"]).get("row", {})
            row = unflatten(self._like, job["row"], leaves)
        reply = work(kind, self._trainer, self._setup, plan, job["client"], row)
        # What came in may live on in what goes out (an untouched residual), so the reply is laid down behind it.
        trees = reply.message | {"row": flatten(reply.row)}
        entries, _ = self._replies.write(trees, start + job["used"], start + self._slot)
        return {
            "entries": entries,
            "trees": list(reply.message),
            "row": skeleton(reply.row),
            "sizes": {tree: tuple(size) for tree, size in reply.sizes.items()},
            "loss": reply.loss,
            "steps": reply.steps,
            "refused": reply.refused,
        }


def _die_with_parent() -> None:
    """Linux: the kernel ends this process when its parent ends, however that happens."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
