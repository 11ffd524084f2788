"""A federation and its rounds. Read this file third.

cohort -> plan -> what each client lacks -> client rounds -> mean -> step -> new State, RoundRecord
"""

from __future__ import annotations

import copy
import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import nn

from lamina import engine as engines
from lamina import wire
from lamina.aggregate import Mean, total
from lamina.books import Books, Observed
from lamina.client import BUFFERS, Setup
from lamina.cohort import Faults, draw
from lamina.data.client_data import ClientData
from lamina.downlink import Broadcast, Change, Version, codes_values
from lamina.engine import mkl
from lamina.engine.base import Engine, Kind, Missing, score_of, threads
from lamina.errors import ConfigError, RunError, expect, is_whole
from lamina.evaluate import Score, loss_function, pieces, score_at_once
from lamina.layers import Layer, layer_table
from lamina.method import Chain, FedAvg, Method, Plan, Task
from lamina.preflight import ready
from lamina.random import address
from lamina.record import RoundRecord
from lamina.store import ClientStore, Held, Row, Stored, empty_store, expect_kind
from lamina.training import LocalSGD, Loss, Trainer, addressed_rng
from lamina.tree import Message, Params, add, cut
from lamina.wire import frame

if TYPE_CHECKING:
    from lamina.runs import Run

Metric: TypeAlias = Callable[[Any, Any], float]


class Evaluation(NamedTuple):
    """What a state is worth. None where it does not apply: no test set, targets that are no class labels."""

    accuracy: float | None
    loss: float | None
    metrics: dict[str, float]
    personal_accuracy: float | None


class Initial(NamedTuple):
    """The model before round 0."""

    params: Params
    buffers: Params


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on. A checkpoint is exactly one of these."""

    params: Params
    buffers: Params
    server: Any
    clients: ClientStore
    round: int = 0  # rounds done, and the index of the next one
    bytes_up: int = 0
    bytes_down: int = 0
    observed: Observed = field(default_factory=lambda: Observed({}, {}))
    change: Change | None = None  # the last step, where it is what travels down
    past: tuple[Version, ...] = ()  # parameters sent before, newest first, where their distance to new ones travels

    def sha256(self) -> str:
        """Fingerprint of the global model: names, shapes and bytes of its parameters and buffers."""
        digest = hashlib.sha256()
        for name, x in sorted({**self.params, **self.buffers}.items()):
            digest.update(f"{name}:{tuple(x.shape)}:{x.dtype};".encode())
            digest.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class Federation:
    """A model, its clients' data, and how they learn together.

    Args:
        model: an nn.Module (copied, never changed), or a function that makes one (called under the seed).
        data: the clients' examples.
        method: what is done differently from FedAvg; `Chain` for several.
        uplink, downlink: codecs for the updates and for the parameters sent down.
        local: local training.
        cohort: "all", or how many clients are drawn per round, kept together for `method.hold` rounds.
        weights: "examples" or "uniform", normalised over the accepted messages.
        buffers: non-parameter tensors such as BatchNorm statistics: "average" (weighted mean; integers take the
            maximum), "keep" (personal), "skip" (every client starts each round from the initial ones).
        loss: "cross_entropy", or a function (output, target) -> scalar mean loss.
        metrics: name -> function (outputs, targets) over the whole test set.
        aggregate: "mean".
        seed: every random number follows from it.
        engine: "auto", "loop", "processes", "threads", "stacked" or "cuda"; `workers`: processes, None for one per
            core; on GPUs clients at once, None for 8 a device.
        diagnostics: per-layer divergence in the records; costs one float64 per tensor and client on the wire.
        accuracy_before: test every client's model before aggregation too, in rounds that are evaluated; costs an
            evaluation per client, on no wire.
        through_bytes: really encode and decode every plan, message and client state. Slower; changes nothing else.
        store: where the clients' states are between rounds: "memory", or "disk:PATH" (from the working directory).
        faults: `{"reply_deadline_s": 60, "min_replies": 8}`, see `lamina.cohort.Faults`.

    Raises:
        ConfigError: a value out of range, parts that do not fit, or a model that fails on a batch of the data (E121).
        StorageError: what the store's path holds is damaged (E404), or of another model or method (E405).
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        data: ClientData,
        *,
        method: Method[Any, Any] | None = None,
        uplink: wire.Codec | None = None,
        downlink: wire.Codec | None = None,
        local: LocalSGD | None = None,
        cohort: int | Literal["all"] = "all",
        weights: Literal["examples", "uniform"] = "examples",
        buffers: Literal["average", "keep", "skip"] = "average",
        loss: Literal["cross_entropy"] | Loss = "cross_entropy",
        metrics: Mapping[str, Metric] | None = None,
        aggregate: Literal["mean"] = "mean",
        seed: int = 0,
        engine: str = "auto",
        workers: int | None = None,
        diagnostics: bool = True,
        accuracy_before: bool = False,
        through_bytes: bool = False,
        store: str = "memory",
        faults: Mapping[str, Any] | None = None,
    ):
        mkl.switch()
        _expect_a("data", data, ClientData, "lamina.ClientData.from_clients({...})")
        _expect_a("method", method, Method, "lamina.FedAvg()")
        _expect_a("local", local, LocalSGD, "lamina.LocalSGD(lr=0.1)")
        coder = uplink is None or (not isinstance(uplink, type) and hasattr(uplink, "transmit"))
        expect(coder, f"uplink={uplink!r}: expected a codec, e.g. lamina.wire.Dense('int8')", where="uplink")
        clients = len(data)
        self.cohort = clients if cohort == "all" else _cohort(cohort, clients)
        expect(weights in ("examples", "uniform"), f"weights={weights!r}: expected 'examples' or 'uniform'")
        expect(buffers in BUFFERS, f"buffers={buffers!r}: expected one of {', '.join(BUFFERS)}", where="buffers")
        expect(aggregate == "mean", f"aggregate={aggregate!r}: expected 'mean'", where="aggregate")
        expect(is_whole(seed, 0), f"seed={seed!r}: expected a whole number >= 0", where="seed")
        expect_kind(store)
        self.faults = Faults.of(faults or {}, self.cohort)
        self.data = data
        self.local = local or LocalSGD()
        self.weights = weights
        self.metrics = dict(metrics or {})
        for name, metric in self.metrics.items():
            expect(callable(metric), f"metrics[{name!r}]={metric!r}: expected a function (outputs, targets) -> number")
        self.seed = seed
        self.uplink = uplink or wire.Dense()
        self.downlink = _downlink(downlink or wire.Dense(), method)
        self.buffers = buffers

        with addressed_rng(seed, "model"):
            made = _made(model)
        self.loss = loss_function(loss)
        self._trainer: Trainer = ready(made, self.loss, data, self.local, seed)
        self.layers: tuple[Layer, ...] = layer_table(made)

        parts = method or FedAvg()
        task = Task(
            self.layers, clients, self.cohort, weights, seed, parts.hold, self.local.lr, self.local.momentum,
            self.local.weight_decay, self.local.clip, buffers if self._trainer.buffers else "",
        )  # fmt: skip
        self.method = parts.bind(task)
        self._diagnostics = diagnostics
        expect(
            not accuracy_before or data.test is not None,
            "accuracy_before=True: the data has no test set",
            where="accuracy_before",
        )
        self._judges = accuracy_before
        moments = diagnostics or self.method.needs_moments
        self._setup = Setup(
            data, self.method, self.local, self.loss, self.uplink, buffers, moments, seed, weights,
            frame.in_memory if through_bytes else None,
        )  # fmt: skip
        buffers_now = {n: b.clone() for n, b in self._trainer.buffers.items()}
        self.initial = Initial(self._trainer.snapshot(), buffers_now)
        like = Row(self.method.init_client(self.initial.params), {})
        self.store = empty_store(store, self.initial.params | buffers_now, like, data.names)
        self._schema = wire.schema_of(self.initial.params)
        self._sizes = data.sizes.tolist()
        self._stack, why = engines.stack_for(engine, self._trainer, self._setup, self.initial.params, self.cohort)
        self.engine, self.workers, self.engine_reason = engines.choose(engine, self.cohort, workers, self._stack, why)
        engines.expect_sendable(self.engine, self.workers, self._trainer, self._setup)
        expect(
            self.local.precision != "tf32" or self.engine == "cuda",
            f"precision='tf32': only a GPU has it, and this is engine={self.engine!r}",
            code="E118",
            where="local.precision",
            remedy="local.precision='fp32' or 'bf16'",
        )
        self._elsewhere: Callable[[], Engine] | None = None
        self._fedavg = self._fedavg_bytes()

    @property
    def setup(self) -> Setup:
        """What its client rounds have in common."""
        return self._setup

    @property
    def model(self) -> nn.Module:
        """A fresh copy of the model with its initial weights."""
        return self.module(State(*self.initial, (), ClientStore()))

    def module(self, state: State) -> nn.Module:
        """A plain nn.Module with the global weights of this state, in ordinary memory layout."""
        self._trainer.load(state.params, state.buffers)
        made = copy.deepcopy(self._trainer.model)
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.data = tensor.data.contiguous(memory_format=torch.contiguous_format).clone()
        return made.eval()

    def run(
        self, rounds: int, state: State | None = None, *, evaluate_every: int = 1
    ) -> Iterator[tuple[State, RoundRecord]]:
        """The rounds, one at a time. `break` to stop.

        Args:
            rounds: how many more.
            state: where to go on from; None starts anew.
            evaluate_every: test after every so many rounds, and after the last.
        """
        return run(self, state, rounds, evaluate_every=evaluate_every)

    def fit(self, rounds: int, out: str | Path | None = None, **options: Any) -> Run:
        """The same with a run folder, checkpoints and progress. See `lamina.runs.fit`."""
        from lamina.runs import fit  # the one import from a higher level, so that `fed.fit` can exist

        return fit(self, rounds, out, **options)

    def over(self, carry: frame.Carry) -> Federation:
        """The same with every plan and message really encoded and taken by `carry`, in this process: engine "loop" for
        "processes". What its clients remember stays in memory, so a run that is looked at again is not written to."""
        made = copy.copy(self)
        made._setup = self._setup._replace(carry=carry)
        made.store = ClientStore()
        made.engine = "loop" if self.engine == "processes" else self.engine
        made.workers = 1
        return made

    def by(self, name: str, reason: str, make: Callable[[Setup, Engine], Engine]) -> Federation:
        """The same by another engine, whose clients are elsewhere: what they remember is with them.

        Args:
            make: is given the engine that would be used otherwise.

        Raises:
            ConfigError: E118 for what would be tested at the clients.
        """
        said = "clients that are elsewhere do not test their models"
        expect(not self._judges, f"accuracy_before=True: {said}", code="E118", where="accuracy_before")
        remedy = "leave the clients' own test sets out of the server's data"
        expect(self.data.client_tests is None, f"client_tests: {said}", code="E118", where="data", remedy=remedy)
        made = copy.copy(self)
        made.store = ClientStore()
        made.engine, made.workers, made.engine_reason = name, 1, reason
        made._elsewhere = lambda: make(self._setup, self.made_engine())
        return made

    def made_engine(self, carry: frame.Carry | None = None) -> Engine:
        """Its engine, to be closed after use.

        Args:
            carry: takes every frame instead of what takes them otherwise.
        """
        if self._elsewhere is not None:
            return self._elsewhere()
        setup = self._setup if carry is None else self._setup._replace(carry=carry)
        return engines.make(self.engine, self.workers, self.engine_reason, self._trainer, setup, self._stack)

    def start(self, engine: Engine) -> tuple[State, Books]:
        """The state before round 0: the method's states, its probe and its setup."""
        params, buffers = self.initial
        server = self.method.init(params)
        books = Books()
        self.store.shelf.begin()
        store = self.store
        mean: Message = {}
        past: tuple[Version, ...] = ()
        if self.method.has("probe"):
            everyone = tuple(range(len(self.data)))
            plan = self._plan(params, buffers, 0, self.local.lr, len(everyone))
            probed = self._broadcast(plan)
            mean, store = self._collect("probe", engine, probed, everyone, store, books)
            past = probed.past
            if not mean:
                remedy = "the loss or its gradient is not finite at the initial model: check the data and the loss"
                raise _nobody("every client's probe was refused", books.events, remedy)
        params, server = self.method.setup(server, params, mean)
        if mean:
            first = self._broadcast(
                self.method.plan(server, self._plan(params, buffers, 0, self.local.lr, self.cohort))
            )
            store = store.told(_made_by_mask(probed.plan, first))
        return State(params, buffers, server, store, past=past), books

    def round(
        self, state: State, engine: Engine, horizon: int, evaluating: bool, books: Books
    ) -> tuple[State, RoundRecord]:
        """One round: the new state, and its record."""
        began = time.perf_counter()
        t = state.round
        with threads(1 if engine.name != "threads" else engines.cores()):
            cohort = self._drawn(t)
            lr = self.local.rate(t, horizon)
            plan = self.method.plan(state.server, self._plan(state.params, state.buffers, t, lr, len(cohort)))
            broadcast = self._broadcast(plan, state.change, state.past)
            order = sorted(cohort, key=lambda c: (-self.local.count(self._sizes[c]), c))
            kind: Kind = "judged" if evaluating and self._judges else "round"
            told = len(books.events)  # those of a probe stand before
            mean, store = self._collect(kind, engine, broadcast, order, state.clients, books)
            if not books.accepted:
                remedy = "training diverged on every client: lower local.lr, or set local.clip"
                raise _nobody(f"round {t}: every message was refused", books.events[told:], remedy, f"round {t}")
            if books.accepted < self.faults.min_replies:
                raise RunError(
                    f"round {t}: {books.accepted} of {len(cohort)} messages were accepted, expected at least "
                    f"{self.faults.min_replies}; the first that was not, of {_first(books.events[told:])}",
                    code="E314",
                    where=f"round {t}",
                    remedy="the state from before it is kept: go on from there (resume), or lower faults.min_replies",
                )
            seen = mean
            truth = replace(plan, params=state.params, participation=books.accepted / len(self.data))
            mean, server = self.method.step(state.server, truth, mean)
            change = None
            if not codes_values(self.downlink):
                base = {key: known for key, known in broadcast.tags.items() if key.startswith("params/")}
                change = Change(base, mean["update"], repr(self.downlink), self.seed, t)
                mean = {**mean, "update": change.coded(self.downlink, self._schema, plan.mask)[0]}
                server = self.method.absorb(server, {"update": change.step}, {"update": mean["update"]})
            params = state.params | add(mean["update"], state.params)
            buffers = state.buffers | mean.get("buffers", {})
            intervals = self.method.observe(state.server).get("interval", {})  # those in force in this round
            observed, layers = books.layers(state.observed, plan, seen, params, intervals)
        new = State(
            params, buffers, server, store, t + 1, state.bytes_up + books.up.total(),
            state.bytes_down + books.down.total(), observed, change, broadcast.past,
        )  # fmt: skip
        result = self.evaluate(new, engine) if evaluating else Evaluation(None, None, {}, None)
        seconds = time.perf_counter() - began
        clients = sorted(books.clients)
        accepted = [c for c in clients if c.refused is None]
        record = RoundRecord(
            round=t,
            cohort=cohort,
            in_sync=plan.in_sync,
            bytes_up=books.up.total(),
            bytes_down=books.down.total(),
            seconds=seconds,
            layers=layers,
            traffic=tuple(books.traffic()),
            clients=tuple(clients),
            train_loss=total(c.loss for c in accepted) / len(accepted),
            lr=plan.lr,
            accuracy=result.accuracy,
            loss=result.loss,
            personal_accuracy=result.personal_accuracy,
            accuracy_before=books.accuracy_before(),
            metrics=result.metrics,
            events=tuple(books.events),
            fedavg_up=self._fedavg[0] * len(cohort),
            fedavg_down=self._fedavg[1] * len(cohort),
        )
        return new, record

    def evaluate(self, state: State, engine: Engine | None = None) -> Evaluation:
        """The global model of this state on the test set, and the personal models on the clients' own test sets.

        Accuracy counts ``output.argmax(1) == target`` where targets are integer labels. The personal one is the mean
        over the clients that have a test set; where none has and nothing is shared, over all on the common test set.
        """
        engine = engine or engines.make("threads", 1, "", self._trainer, self._setup)
        plan = self._plan(state.params, state.buffers, state.round, self.local.lr, self.cohort)
        score: Score | None = None
        metrics: dict[str, float] = {}
        personal = None
        if self.data.test is not None and self.metrics:
            with threads(engines.cores()):
                score, metrics = score_at_once(self._trainer, self._setup, plan, self.metrics)
        elif self.data.test is not None:
            parts = range(pieces(self.data.test))
            score = Score.total([score_of(reply) for reply in engine.replies("test", plan, parts, {})])
        tests = self.data.client_tests
        personally = tests is not None or ("personal" in (self.method.withholds or "") and score is not None)
        if personally and self._elsewhere is None:
            plan = self._broadcast(self.method.plan(state.server, plan)).plan  # as clients would decode it
            having = [c for c, name in enumerate(self.data.names) if tests is None or name in tests]
            replies = engine.replies("personal", plan, having, state.clients.rows)
            scores = [score_of(reply).accuracy for reply in replies]
            known = [accuracy for accuracy in scores if accuracy is not None]
            personal = total(known) / len(known) if known else None
        if score is None:
            return Evaluation(None, None, metrics, personal)
        return Evaluation(score.accuracy, score.loss / score.examples, metrics, personal)

    def _drawn(self, t: int) -> tuple[int, ...]:
        """The cohort of round t."""
        return draw(self.seed, t - t % self.method.hold, len(self.data), self.cohort)

    def _plan(self, params: Params, buffers: Params, t: int, lr: float, cohort: int) -> Plan:
        return Plan(
            round=t,
            seed=address(self.seed, "round", t),
            params=params,
            buffers=buffers,
            upload=frozenset(params),
            lr=lr,
            participation=cohort / len(self.data),
        )

    def _broadcast(self, plan: Plan, change: Change | None = None, past: tuple[Version, ...] = ()) -> Broadcast:
        return Broadcast(plan, self.downlink, self._schema, self._setup.carry, change, past)

    def _collect(
        self, kind: Kind, engine: Engine, broadcast: Broadcast, order: Sequence[int],
        store: ClientStore, books: Books,
    ) -> tuple[Message, ClientStore]:  # fmt: skip
        """Sends the plan, takes the replies in order, and sums what is accepted."""
        parts = dict(zip(order, self._setup.weights_of(order), strict=True))
        whole = total(parts.values())
        shares = {c: parts[c] / whole for c in order}
        even = 1.0 / len(order)
        mean = Mean(total(shares.values()))
        uniform = Mean(total(even for _ in order))
        phase = "probe" if kind == "probe" else "round"
        weighing = {"moments": "update"}  # a tree whose weights are those of another
        if kind != "probe":
            store.will_need({*self._drawn(broadcast.plan.round + 1)} - {*order})  # while this cohort trains
        writer = store.writing()

        def pack(client: int, missing: Missing) -> bytes:
            known = store.entry(client)
            accepted = -1 if missing == "row" else known.accepted
            return broadcast.packed({} if missing else known.held, accepted, client)

        nothing: Held = {}  # is what a client counts as holding of which nothing usable came
        for reply in engine.replies(kind, broadcast.plan, order, store.rows, pack):
            c = reply.client
            before = store.entry(c)
            down = books.sent(phase, "down", broadcast.sizes(before.held, before.accepted, c))
            if reply.again is not None:
                down += books.sent(phase, "down", broadcast.sizes({}, before.accepted, c))
            up = books.sent(phase, "up", reply.sizes)
            books.client(c, self.data.names[c], self._sizes[c], reply, up, down, phase)
            if reply.refused is not None:
                writer.tell(c, broadcast.tags if reply.code == "E310" else nothing)
                continue
            members = reply.members or (c,)
            share = total(shares[member] for member in members)
            for tree, content in reply.message.items():
                if tree == "score":
                    books.before.append(score_of(reply).accuracy)
                elif weighing.get(tree, tree) in self.method.uniform:
                    uniform.add(tree, content, even * len(members))
                else:
                    mean.add(tree, content, share)
            if "update" in reply.message:
                books.count(reply.sizes["update"].entries, share)
            writer.put(c, Stored(reply.row, broadcast.tags, broadcast.plan.round if kind != "probe" else -1))
        return mean.result() | uniform.result(), writer.done()

    def _fedavg_bytes(self) -> tuple[int, int]:
        """Bytes up and down of one client and round under plain FedAvg with fp32, with the same diagnostics."""
        params, buffers = self.initial
        plan = Broadcast(self._plan(params, buffers, 0, self.local.lr, self.cohort), wire.Dense(), self._schema, None)
        down = sum(size.total for size in plan.sizes({}, -1).values())
        trees = {"update": params}
        if self.buffers == "average" and buffers:
            trees["buffers"] = buffers
        if self._diagnostics:
            trees["moments"] = {name: torch.zeros((), dtype=torch.float64) for name in params}
        raw = wire.Dense()
        lengths = {t: raw.transmit(x, wire.Context(wire.schema_of(x)))[1].total for t, x in trees.items()}
        up = sum(lengths.values()) + frame.overhead("message", {"steps": 0.0, "loss": 0.0}, lengths)
        return up, down


def run(
    fed: Federation, state: State | None, rounds: int, *, evaluate_every: int = 1
) -> Iterator[tuple[State, RoundRecord]]:
    """The rounds of a federation, one at a time: (state after the round, its record)."""
    expect(is_whole(rounds, 1), f"rounds={rounds}: expected a whole number >= 1", where="rounds")
    expect(
        is_whole(evaluate_every, 1),
        f"evaluate_every={evaluate_every}: expected a whole number >= 1",
        where="evaluate_every",
    )
    horizon = rounds + (state.round if state else 0)
    if fed.method.rounds not in (None, horizon):
        warnings.warn(_planned_otherwise(fed.method, horizon), stacklevel=2)
    if state is not None:
        _expect_own(fed, state)
        state = replace(state, clients=state.clients.on(fed.store.shelf))
    engine = fed.made_engine()
    try:
        books = Books()
        if state is None:
            with threads(1):
                state, books = fed.start(engine)
        for _ in range(rounds):
            t = state.round
            evaluating = (t + 1) % evaluate_every == 0 or t + 1 == horizon
            state, record = fed.round(state, engine, horizon, evaluating, books)
            yield state, record
            books = Books()
    finally:
        engine.close()


def _nobody(said: str, events: Sequence[Mapping[str, str]], remedy: str, where: str | None = None) -> RunError:
    """No message was accepted."""
    code = next((event["code"] for event in events if event["code"] != "E313"), "E310")
    if code != "E310":
        remedy = "look at the clients' nodes; the state from before is kept, so the run can go on from there (resume)"
    return RunError(f"{said}; the first, of {_first(events)}", code=code, where=where, remedy=remedy)


def _first(events: Sequence[Mapping[str, str]]) -> str:
    """The first client whose message was not accepted, and why."""
    event = next(event for event in events if event["code"] != "E313")
    why = f"has non-finite values in {event['layer']}" if event["code"] == "E310" else event["why"]
    return f"client {event['client']!r}, {why}" if event["code"] == "E310" else f"client {event['client']!r}: {why}"


def _planned_otherwise(method: Method[Any, Any], horizon: int) -> str:
    """What to say of a method whose own schedule is not as long as the run, with its setting as one types it."""
    parts = method.methods if isinstance(method, Chain) else (method,)
    i, part = next((i, part) for i, part in enumerate(parts) if part.rounds is not None)
    said = f"{part!r} plans {part.rounds} rounds, this run has {horizon}"
    if "rounds" not in getattr(part, "__dataclass_fields__", {}):
        return said  # nobody can set it
    key = f"method.{i}.rounds" if isinstance(method, Chain) else "method.rounds"
    return f"{said}: give both the same, {key}={horizon}, in Python {type(part).__name__}(rounds={horizon})"


def _expect_own(fed: Federation, state: State) -> None:
    """Refuse a state of another model or method."""
    theirs = {name: x.shape for name, x in state.params.items()}
    same = theirs == {name: x.shape for name, x in fed.initial.params.items()}
    expect(same, "state: it is of another model", code="E119", where="state")
    kind = type(fed.method.init(fed.initial.params))
    expect(isinstance(state.server, kind), "state: it is of another method", code="E119", where="state")


def _made_by_mask(before: Plan, first: Broadcast) -> dict[str, int]:
    """Tags of what a client that holds `before` has of the first plan, by cutting it with the plan's mask. Not where
    a codec gives other values to what is left (int8: blocks run over kept entries)."""
    held = cut(before.params, first.plan.mask)
    same = [name for name, x in first.plan.params.items() if torch.equal(x, held[name])]
    return {f"params/{name}": first.tags[f"params/{name}"] for name in same}


def _made(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """A model of our own."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    try:
        made = model() if callable(model) else model
    except TypeError as error:
        name = getattr(model, "__name__", "it")
        remedy = f"for example lambda: {name}(...)"
        raise ConfigError(
            f"model: {name} cannot be called without arguments: {error}", where="model", remedy=remedy
        ) from error
    expect(isinstance(made, nn.Module), f"model: expected an nn.Module, got {type(made).__name__}", where="model")
    return made


def _expect_a(name: str, value: object, kind: type, example: str) -> None:
    fine = value is None or isinstance(value, kind)
    got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    expect(fine, f"{name}: expected a {kind.__name__}, got {got}", where=name, remedy=f"for example {example}")


def _cohort(cohort: int | str, clients: int) -> int:
    if isinstance(cohort, str) or not is_whole(cohort, 1) or cohort > clients:
        raise ConfigError(
            f"cohort={cohort!r}: expected 'all' or a whole number from 1 to {clients}, the number of clients",
            code="E112",
            where="cohort",
            remedy=f"a cohort is drawn without replacement from the {clients} clients",
        )
    return cohort


def _downlink(codec: wire.Codec, method: Method[Any, Any] | None) -> wire.Codec:
    coder = not isinstance(codec, type) and hasattr(codec, "transmit")
    if codes_values(codec) or (coder and method is not None and method.has("absorb")):
        return codec
    raise ConfigError(
        f"downlink={codec!r}: expected Dense with values in fp32, lossless, fp16, bf16, int8",
        code="E113",
        where="downlink",
        remedy="the downlink codes parameters, not updates: sparse or one-bit values would replace the model itself. "
        "lamina.STC sends the server's step instead, and keeps what such a codec loses",
    )
