"""One job per core: worker processes started after the data is loaded, tensors in shared memory.

    parent   plan -> arena, "round" -> every worker;  then one job at a time to whoever is idle, longest first
    worker   rows <- its slot;  client_round;  messages and new rows -> the same slot;  "done" -> parent
    parent   takes the replies in the schedule's order, whatever order they came in

A job is one client (`processes`) or a stack of them (`stacked`). Only small JSON lines travel through the pipes. A job
runs on one thread, as it does in `loop`, and the parent sums in the same order, so both give the same bits for any
number of workers.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch

from lamina import wire
from lamina.client import Reply, known
from lamina.engine.allocator import keep_memory
from lamina.engine.arena import Arena, Full, anonymous_memory, layout, shared_memory
from lamina.engine.base import Kind, Pack, Worker, subject
from lamina.engine.children import (
    Child,
    Parcel,
    failed_to_start,
    follow_parent,
    fork,
    interrupts_wait,
    packed,
    spawn,
    unpacked,
)
from lamina.engine.stack import Alike
from lamina.errors import LaminaError, RunError, class_of
from lamina.method import Plan
from lamina.redaction import hidden, printable
from lamina.store import Row
from lamina.tree import Message, flatten, skeleton, unflatten

_SLOT_BUDGET = 512 << 20  # bytes of shared memory for replies that wait for their turn


def available() -> bool:
    """Whether this system can fork."""
    return hasattr(os, "fork") and sys.platform != "darwin"  # macOS: system libraries do not survive a fork


class ProcessEngine:
    """Args: workers: processes; each does one job at a time on one thread."""

    def __init__(self, name: str, worker: Worker, workers: int, reason: str):
        self.name = name
        self.workers = workers
        self.reason = reason
        self._worker = worker
        self._pool: _Pool | None = None

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        jobs = self._worker.jobs(kind, clients)
        done = 0
        need = 0
        while True:
            if self._pool is None:
                self._pool = _Pool(self._worker, self.workers, plan, need)
            try:
                for replies in self._pool.replies(kind, plan, jobs[done:], rows):
                    done += 1
                    yield from replies
                return
            except Full as full:  # a method's trees outgrew the slots: begin again with larger ones, go on from there
                self.close()
                need = 2 * full.needed

    @property
    def pids(self) -> tuple[int, ...]:
        """Of its worker processes, while there are any."""
        return () if self._pool is None else self._pool.pids

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class _Pool:
    def __init__(self, worker: Worker, workers: int, plan: Plan, need: int):
        setup, width = worker.setup, worker.stack.width if worker.stack else 1
        _, size = layout({"p": plan.params, "b": plan.buffers})
        _, shared = layout({"mask": plan.mask or {}, **plan.shared})
        memory = anonymous_memory if available() else shared_memory
        self._plans = Arena(memory(2 * size + 4 * shared + (1 << 20)))
        self._slot = max(need, width * (6 + 2 * len(setup.method.sends)) * size + (1 << 16))
        slots = max(2 * workers, min(16 * workers, _SLOT_BUDGET // self._slot))
        self._replies = Arena(memory(slots * self._slot))
        self._setup = setup
        self._like = known(setup, plan, None)  # names the classes of a row
        self._free = list(range(slots))
        self._pipes: list[Connection] = []
        self._children: list[Child] = []
        try:
            self._start(worker, workers)
        except BaseException:  # also Ctrl-C: whoever was started already must not be left behind
            self.close()
            raise

    def _start(self, worker: Worker, workers: int) -> None:
        if available():

            def serve(pipe: Connection, worker: Worker) -> NoReturn:
                _Child(pipe, worker, self._plans, self._replies, self._slot, self._like).run()

            gc.freeze()  # so that the collector does not touch, and thereby copy, the pages the workers share
            try:
                for _ in range(workers):
                    with interrupts_wait():
                        self._add(*fork(serve, worker, self._pipes))
            finally:
                gc.unfreeze()
            return
        parcel = packed(worker)
        for _ in range(workers):  # they start at the same time
            with interrupts_wait():
                self._add(*spawn(_serve_spawned, parcel, self._plans, self._replies, self._slot))
        for pipe, child in zip(self._pipes, self._children, strict=True):
            try:
                pipe.recv_bytes()
            except (EOFError, ConnectionResetError):
                raise failed_to_start(child.ended()) from None

    def _add(self, pipe: Connection, child: Child) -> None:
        self._pipes.append(pipe)
        self._children.append(child)

    def replies(
        self, kind: Kind, plan: Plan, jobs: Sequence[Sequence[int]], rows: Mapping[int, Row]
    ) -> Iterator[list[Reply]]:
        self._announce(kind, plan)
        idle = list(self._pipes)
        busy: dict[Connection, int] = {}  # pipe -> index of its job
        slots: dict[int, int] = {}  # index of a job -> slot
        ready: dict[int, dict[str, Any]] = {}
        sent = 0

        def feed() -> None:
            nonlocal sent
            while idle and self._free and sent < len(jobs):
                pipe = idle.pop(0)
                slots[sent] = self._free.pop()
                busy[pipe] = sent
                self._give(pipe, jobs[sent], rows, slots[sent])
                sent += 1

        for turn in range(len(jobs)):
            while turn not in ready:
                feed()
                answered = wait(list(busy))
                for pipe in [p for p in busy if p in answered]:
                    index = busy.pop(pipe)
                    ready[index] = self._receive(pipe, self._activity(kind, jobs[index]))
                    idle.append(pipe)
                feed()  # before the parent turns to its sum
            yield self._read(jobs[turn], ready.pop(turn))
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

    def _give(self, pipe: Connection, clients: Sequence[int], rows: Mapping[int, Row], slot: int) -> None:
        start = slot * self._slot
        known = ((i, rows[client]) for i, client in enumerate(clients) if client in rows)
        given = {i: row for i, row in known if row.method != () or row.buffers}  # else it is a newcomer's
        entries, end = self._replies.write(
            {f"{i}": flatten(row) for i, row in given.items()}, start, start + self._slot
        )
        shapes = {i: skeleton(row) for i, row in given.items()}
        job = {"clients": list(clients), "slot": slot, "rows": shapes, "entries": entries, "used": end - start}
        self._send(pipe, json.dumps(job).encode())

    def _send(self, pipe: Connection, line: bytes) -> None:
        try:
            pipe.send_bytes(line)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died(pipe, "") from None

    def _activity(self, kind: Kind, clients: Sequence[int]) -> str:
        doing = "training" if kind in ("round", "judged", "probe") else "being evaluated"
        return f" while {subject(kind, self._setup, clients)} was {doing}"

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
        how = self._children[self._pipes.index(pipe)].ended()
        return RunError(
            f"a worker process ended with {how}{activity}",
            code="E303",
            remedy="signal 9 is often the kernel running out of memory: fewer workers or a smaller batch_size",
        )

    def _read(self, clients: Sequence[int], answer: dict[str, Any]) -> list[Reply]:
        trees = self._replies.read(answer["entries"])
        if not answer["alike"]:
            each = enumerate(zip(clients, answer["replies"], strict=True))
            return [self._reply(c, figures, trees, f"{i}/") for i, (c, figures) in each]
        _, *others = zip(clients, answer["loss"], answer["steps"], strict=True)
        one = self._reply(clients[0], answer["replies"][0], trees, "")
        return [one._replace(members=tuple(clients))] + [
            Reply(client, {}, one.row, one.sizes, loss, steps, None, within=True) for client, loss, steps in others
        ]

    def _reply(self, client: int, figures: dict[str, Any], trees: Message, prefix: str) -> Reply:
        leaves = {name: x.clone() for name, x in trees.get(f"{prefix}/row", {}).items()}
        row: Row | None = unflatten(self._like, figures["row"], leaves)
        sizes = {name: wire.Size(*size) for name, size in figures["sizes"].items()}
        message = {name: trees.get(f"{prefix}{name}", {}) for name in figures["trees"]}
        return Reply(
            client, message, row, sizes, figures["loss"], figures["steps"], figures["refused"],
            residual=figures["residual"],
        )  # fmt: skip

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(child.pid for child in self._children)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # a worker ends when its pipe does
        with interrupts_wait():  # who presses Ctrl-C twice leaves no process behind either
            for child in self._children:
                child.kill()


class _Child:
    """The child's side. It never returns: it ends with its pipe, and does not run the parent's exit handlers."""

    def __init__(self, pipe: Connection, worker: Worker, plans: Arena, replies: Arena, slot: int, like: Row):
        self._pipe = pipe
        self._worker = worker
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
            print(printable(hidden(traceback.format_exc())), file=sys.stderr, flush=True)
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
        start, end = job["slot"] * self._slot, (job["slot"] + 1) * self._slot
        leaves = self._replies.read(job["entries"])
        rows = [
            unflatten(self._like, job["rows"][str(i)], leaves.get(str(i), {})) if str(i) in job["rows"] else None
            for i in range(len(job["clients"]))
        ]
        replies = self._worker.do(kind, plan, job["clients"], rows)
        # What came in may live on in what goes out (an untouched residual), so the reply is laid down behind it.
        start += job["used"]
        if isinstance(replies, Alike):
            entries, _ = self._replies.write(replies[0].message, start, end)
            return {"alike": True, "entries": entries, "replies": [_figures(replies[0])]} | {
                "loss": [reply.loss for reply in replies],
                "steps": [reply.steps for reply in replies],
            }
        trees = {f"{i}/{tree}": content for i, reply in enumerate(replies) for tree, content in reply.message.items()}
        trees |= {f"{i}//row": flatten(reply.row) for i, reply in enumerate(replies)}
        entries, _ = self._replies.write(trees, start, end)
        return {"alike": False, "entries": entries, "replies": [_figures(reply) for reply in replies]}


def _figures(reply: Reply) -> dict[str, Any]:
    """What of a reply is not in tensors."""
    return {
        "trees": list(reply.message),
        "row": skeleton(reply.row),
        "sizes": {tree: tuple(size) for tree, size in reply.sizes.items()},
        "loss": reply.loss,
        "steps": reply.steps,
        "refused": reply.refused,
        "residual": reply.residual,
    }


def _serve_spawned(_: object, pipe: Connection, parcel: Parcel, plans: Arena, replies: Arena, slot: int) -> NoReturn:
    """Where a spawned process begins."""
    follow_parent()
    worker = unpacked(parcel)
    del parcel
    like = Row(worker.setup.method.init_client(worker.trainer.snapshot()), {})
    pipe.send_bytes(b"ready")
    _Child(pipe, worker, plans, replies, slot, like).run()
