"""A federation and its rounds. Read this file third.

cohort -> plan -> what each client lacks -> client rounds -> mean -> step -> new State, RoundRecord
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lamina import engine as engines
from lamina import wire
from lamina.aggregate import total
from lamina.assembly import cohort_of, downlink_of, expect_a, expect_separable, model_of, rule_of
from lamina.books import Books
from lamina.client import BUFFERS, Setup
from lamina.cohort import Faults, draw, draw_there
from lamina.cohort import availability as availability_of
from lamina.collect import Rules, collect, nobody, used
from lamina.data.client_data import ClientData
from lamina.downlink import Broadcast, Change, Version, codes_values
from lamina.engine import mkl
from lamina.engine.base import Engine, Kind, score_of, threads
from lamina.errors import RunError, expect, is_whole
from lamina.evaluate import Score, loss_function, pieces, score_at_once
from lamina.layers import Layer, layer_table
from lamina.method import Chain, FedAvg, Method, Plan, Task
from lamina.metrics import Metric, Number, chosen
from lamina.network import Network
from lamina.norms import Bounds, Policy
from lamina.preflight import ready, try_metrics
from lamina.privacy.dp import DP, Guard, Terms, expect_covered
from lamina.privacy.secure import Plain, SecureSum, expect_additive
from lamina.random import address
from lamina.record import RoundRecord
from lamina.robust import Rule
from lamina.state import Evaluation, Initial, State
from lamina.store import ClientStore, Row, empty_store, expect_kind
from lamina.training import LocalSGD, Loss, Trainer, addressed_rng
from lamina.tree import Message, Params, add, cut, sha256
from lamina.wire import frame

if TYPE_CHECKING:
    from lamina.runs import Run


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
        metrics: names in `lamina.metrics.METRICS`, or name -> one of those or a function (outputs, targets) over the
            whole test set: a number, label -> number, or None where it is undefined. With any, the test runs in one
            process on all cores while the workers wait, and all outputs are in memory: examples x outputs x 4 B.
        aggregate: "mean", weighted; or a rule of `lamina.robust` for the updates (everything else is averaged), which
            a few wrong clients cannot move far. It keeps the updates of all clients of a round in memory.
        seed: every random number follows from it.
        engine: "auto", "loop", "processes", "threads", "stacked" or "cuda"; `workers`: processes, None for one per
            core; on GPUs clients at once, None for 8 a device.
        diagnostics: per-layer divergence in the records; costs one float64 per tensor and client on the wire.
        accuracy_before: test every client's model before aggregation too, in rounds that are evaluated; costs an
            evaluation per client, on no wire.
        through_bytes: really encode and decode every plan, message and client state. Slower; changes nothing else.
        store: where the clients' states are between rounds: "memory", or "disk:PATH" (from the working directory).
        faults: `{"reply_deadline_s": 60, "min_replies": 8}`, see `lamina.cohort.Faults`.
        availability: who is there in which round: "always", "random:0.8", "day:0.3:24" or "file:PATH", see
            `lamina.cohort.availability`. A cohort that is kept together is drawn from those who are there at its start.
        network: links on which every round's time is reckoned from its bytes; None: none.
        privacy: client-level differential privacy; `cohort` is then the expected size of a Poisson draw, and there are
            no diagnostics of the clients' updates. None: none.
        secure: the server learns the sum of the clients' messages only; needs the extra `secure`. None: it sees each.

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
        metrics: Mapping[str, str | Metric] | Iterable[str] | None = None,
        aggregate: Literal["mean"] | Rule = "mean",
        seed: int = 0,
        engine: str = "auto",
        workers: int | None = None,
        diagnostics: bool = True,
        accuracy_before: bool = False,
        through_bytes: bool = False,
        store: str = "memory",
        faults: Mapping[str, Any] | None = None,
        availability: str = "always",
        network: Network | None = None,
        privacy: DP | None = None,
        secure: SecureSum | None = None,
    ):
        mkl.switch()
        expect_a("data", data, ClientData, "lamina.ClientData.from_clients({...})")
        expect_a("method", method, Method, "lamina.FedAvg()")
        expect_a("local", local, LocalSGD, "lamina.LocalSGD(lr=0.1)")
        expect_a("privacy", privacy, DP, "lamina.DP(clip=1.0, noise=1.0)")
        expect_a("secure", secure, SecureSum, "lamina.SecureSum(bits=32)")
        coder = uplink is None or (not isinstance(uplink, type) and hasattr(uplink, "transmit"))
        expect(coder, f"uplink={uplink!r}: expected a codec, e.g. lamina.wire.Dense('int8')", where="uplink")
        clients = len(data)
        self.cohort = clients if cohort == "all" else cohort_of(cohort, clients)
        expect(weights in ("examples", "uniform"), f"weights={weights!r}: expected 'examples' or 'uniform'")
        expect(buffers in BUFFERS, f"buffers={buffers!r}: expected one of {', '.join(BUFFERS)}", where="buffers")
        self._rule = rule_of(aggregate, self.cohort, data)
        expect(is_whole(seed, 0), f"seed={seed!r}: expected a whole number >= 0", where="seed")
        expect_kind(store)
        self.faults = Faults.of(faults or {}, self.cohort)
        self._asks = self.faults.asked(self.cohort, clients)
        expect(
            self.faults.over_select == 1 or self._asks > self.cohort,
            f"over_select={self.faults.over_select}: a cohort of {self.cohort} of {clients} clients leaves nobody else",
            code="E112",
            where="faults.over_select",
            remedy="a smaller cohort, or 1.0",
        )
        self._norm = Policy.of(self.faults.norm)
        self._there = availability_of(availability, data.names, seed)
        self._links = None if network is None else network.links(data.names, seed)
        self.data = data
        self.local = local or LocalSGD()
        self.weights = weights
        self.metrics = chosen(metrics)
        self.seed = seed
        self.uplink = uplink or wire.Dense()
        self.downlink = downlink_of(downlink or wire.Dense(), method)
        self.buffers = buffers

        with addressed_rng(seed, "model"):
            made = model_of(model)
        self.loss = loss_function(loss)
        self._trainer: Trainer = ready(made, self.loss, data, self.local, seed)
        try_metrics(self._trainer, self.metrics)
        self.layers: tuple[Layer, ...] = layer_table(made)

        parts = method or FedAvg()
        task = Task(
            self.layers, clients, self.cohort, weights, seed, parts.hold, self.local.lr, self.local.momentum,
            self.local.weight_decay, self.local.clip, buffers if self._trainer.buffers else "",
        )  # fmt: skip
        self.method = parts.bind(task)
        expect_separable(self.method, self.uplink, self._rule, self._norm)
        policy = task.buffers
        if privacy is not None:
            terms = Terms(weights, policy, availability, self.faults, self._rule is not None, self.uplink, clients)
            expect_covered(privacy, self.method, terms)
        if secure is not None:
            plain = Plain(
                self.uplink, policy, self._rule is not None, privacy is not None, accuracy_before, self.faults.norm,
                self.faults.over_select, self.cohort,
            )  # fmt: skip
            expect_additive(secure, self.method, plain)
        self.privacy = None if privacy is None else Guard(privacy, seed, clients, self.cohort)
        self.secure = secure
        self._diagnostics = diagnostics and privacy is None
        expect(
            not accuracy_before or data.test is not None,
            "accuracy_before=True: the data has no test set",
            where="accuracy_before",
        )
        self._judges = accuracy_before
        moments = self._diagnostics or self.method.needs_moments
        apart = self._rule is not None or self._norm.acts or privacy is not None or secure is not None
        self._setup = Setup(
            data, self.method, self.local, self.loss, self.uplink, buffers, moments, seed, weights,
            apart, frame.in_memory if through_bytes else None,
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
        self._wrap: Callable[[Engine], Engine] | None = None
        self._fedavg = self._fedavg_bytes()

    @property
    def setup(self) -> Setup:
        """What its client rounds have in common."""
        return self._setup

    @property
    def aggregate(self) -> str:
        """How updates become one, in words: "mean", or the rule with its settings."""
        return "mean" if self._rule is None else repr(self._rule)

    @property
    def enough(self) -> int | None:
        """Messages that a round uses where more clients are asked; None: all that come."""
        return self.cohort if self._asks > self.cohort else None

    @property
    def channels_last(self) -> bool:
        """Whether clients train in NHWC memory: the model convolves, and ran so when it was tried."""
        return self._trainer.channels_last

    @cached_property
    def frozen(self) -> str:
        """SHA-256 of the parameters that are not trained, which no message has; "" where all are."""
        frozen = self._trainer.frozen
        return sha256(frozen) if frozen else ""

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
        said = "secure: what travels is not the messages that could be looked at on the way"
        expect(self.secure is None, said, code="E118", where="secure", remedy="look at the same run without it")
        made = copy.copy(self)
        made._setup = self._setup._replace(carry=carry)
        made.store = ClientStore()
        made.engine = "loop" if self.engine == "processes" else self.engine
        made.workers = 1
        return made

    def by(
        self, name: str, reason: str, make: Callable[[Setup, Engine], Engine], *, sums: bool = False
    ) -> Federation:  # fmt: skip
        """The same by another engine, whose clients are elsewhere: what they remember is with them.

        Args:
            make: is given the engine that would be used otherwise.
            sums: it sums securely where `secure` is set, and gives the sum for replies.

        Raises:
            ConfigError: E118 for what would be tested at the clients, and for secure sums where it has none.
        """
        said = "secure: this engine asks its clients for messages, and not for their part of a sum"
        fine = self.secure is None or (sums and self._wrap is None)
        expect(fine, said, code="E118", where="secure", remedy="lamina.remote.over has sums, if nothing is in between")
        said = "clients that are elsewhere do not test their models"
        expect(not self._judges, f"accuracy_before=True: {said}", code="E118", where="accuracy_before")
        remedy = "leave the clients' own test sets out of the server's data"
        expect(self.data.client_tests is None, f"client_tests: {said}", code="E118", where="data", remedy=remedy)
        made = copy.copy(self)
        made.store = ClientStore()
        made.engine, made.workers, made.engine_reason = name, 1, reason
        made._elsewhere = lambda: make(self._setup, self.made_engine())
        return made

    def on(self, data: ClientData) -> Federation:
        """The same with other examples at the same clients, as many as they had."""
        same = data.names == self.data.names and data.sizes.equal(self.data.sizes)
        expect(same, "data: other clients, or other numbers of examples", code="E119", where="data")
        made = copy.copy(self)
        made.data = data
        made._trainer = copy.copy(self._trainer)
        made._trainer.data = data
        made._setup = self._setup._replace(data=data)
        made._stack, _ = engines.stack_for(self.engine, made._trainer, made._setup, self.initial.params, self.cohort)
        return made

    def through(self, wrap: Callable[[Engine], Engine]) -> Federation:
        """The same with its replies, each client's by itself, passing through what `wrap` makes of its engine.

        Raises ConfigError E118 where they come as a secure sum.
        """
        said = "secure: what comes of clients that are elsewhere is a sum, and no reply of one of them"
        expect(self.secure is None or self._elsewhere is None, said, code="E118", where="secure")
        made = copy.copy(self)
        made._setup = self._setup._replace(apart=True)
        before = self._wrap
        made._wrap = wrap if before is None else lambda engine: wrap(before(engine))
        return made

    def made_engine(self, carry: frame.Carry | None = None) -> Engine:
        """Its engine, to be closed after use.

        Args:
            carry: takes every frame instead of what takes them otherwise.
        """
        setup = self._setup if carry is None else self._setup._replace(carry=carry)
        made = (
            engines.make(self.engine, self.workers, self.engine_reason, self._trainer, setup, self._stack)
            if self._elsewhere is None
            else self._elsewhere()
        )
        return made if self._wrap is None else self._wrap(made)

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
            came = collect(self._rules, "probe", engine, probed, everyone, store, books, Bounds(self._norm, {}))
            mean, store, past = came.mean, came.store, probed.past
            if not mean:
                remedy = "the loss or its gradient is not finite at the initial model: check the data and the loss"
                raise nobody("every client's probe was refused", books.lost, remedy)
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
            cohort = self._drawn(t, state.resting)
            if not cohort and self.privacy is None:
                said = f"round {t}: no client is available, then and for long after"
                raise RunError(said, code="E317", where="availability", remedy="more clients, or another availability")
            lr, wanted = self.local.rate(t, horizon), min(len(cohort), self.cohort)
            if self.privacy is not None:
                wanted = self.cohort  # how many were drawn is nobody's business
            plan = self.method.plan(state.server, self._plan(state.params, state.buffers, t, lr, wanted))
            broadcast = self._broadcast(plan, state.change, state.past)
            order = sorted(cohort, key=lambda c: (-self.local.count(self._sizes[c]), c))
            kind: Kind = "judged" if evaluating and self._judges else "round"
            told = len(books.lost)  # those of a probe stand before
            bounds = Bounds(self._norm, state.norms)
            state.clients.will_need({*self._drawn(t + 1, {})} - {*order})  # while this cohort trains
            came = collect(self._rules, kind, engine, broadcast, order, state.clients, books, bounds)
            seen = came.mean
            params, buffers, server, change = state.params, state.buffers, state.server, state.change
            try:
                if self.privacy is None:
                    mean = used(self._rule, self.faults, came, books, told, wanted, t)
                else:
                    mean = self.privacy.released(came.mean, plan, books.accepted)
                    seen = self.privacy.seen(came.mean, mean)
            except RunError as error:
                if self.faults.on_quorum == "fail":
                    raise
                seen = {"update": {}, "steps": {"steps": torch.zeros((), dtype=torch.float64)}}
                store = came.forgotten(state.clients)
                books.skip(error.message)
            else:
                store = came.store
                part = wanted if self.privacy is not None else books.accepted
                truth = replace(plan, params=state.params, participation=part / len(self.data))
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
            observed, layers = books.layers(state.observed, plan, seen, params, intervals, self.method.masks != "fixed")
        new = State(
            params, buffers, server, store, t + 1, state.bytes_up + books.up.total(),
            state.bytes_down + books.down.total(), observed, change, broadcast.past, bounds.after(),
            self._resting(state.resting, books, t), self.privacy.after(state.spent) if self.privacy else None,
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
            layers=bounds.shown(layers, books.accepted),
            traffic=tuple(books.traffic()),
            clients=tuple(clients),
            train_loss=total(c.loss for c in accepted) / len(accepted) if accepted else math.nan,
            lr=plan.lr,
            accuracy=result.accuracy,
            loss=result.loss,
            personal_accuracy=result.personal_accuracy,
            accuracy_before=books.accuracy_before(),
            metrics=result.metrics,
            events=tuple(books.events),
            fedavg_up=self._fedavg[0] * len(cohort),
            fedavg_down=self._fedavg[1] * len(cohort),
            network_seconds=None if self._links is None else total(map(self._links.seconds, books.exchanges.values())),
            epsilon=None if self.privacy is None else self.privacy.epsilon(new.spent),
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
        metrics: dict[str, Number] = {}
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

    def _drawn(self, t: int, resting: Mapping[int, int]) -> tuple[int, ...]:
        """Who is asked in round t. Who began to rest before the cohort was drawn is not drawn, and who did so since
        is left out of it, unless nobody is left."""
        if self.privacy is not None:
            return self.privacy.drawn(t)
        key = t - t % self.method.hold
        asleep = {c for c, until in resting.items() if until - self.faults.rest_rounds <= key < until}
        there = self._there
        if asleep and len(asleep) < len(self.data):
            before = there or (lambda t, c: True)
            there = lambda t, c: c not in asleep and before(t, c)  # noqa: E731
        asked = draw if there is None else draw_there
        drawn = asked(self.seed, key, len(self.data), self._asks, there)  # type: ignore[arg-type]
        drawn = tuple(c for c in drawn if resting.get(c, 0) <= t) or drawn
        root = getattr(self._rule, "root", None)
        return drawn if root is None else tuple(sorted({*drawn, self.data.names.index(root)}))

    def _resting(self, before: Mapping[int, int], books: Books, t: int) -> dict[int, int]:
        """Who rests after round t, until when."""
        again = t + 1 - (t + 1) % self.method.hold  # what rounds still to come are drawn by
        silent = [c.client for c in books.clients if c.refused == "E311"] if self.faults.rest_rounds else []
        kept = {c: until for c, until in before.items() if until > again}
        return kept | dict.fromkeys(silent, t + 1 + self.faults.rest_rounds)

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

    @property
    def _rules(self) -> Rules:
        here = self.secure if self._elsewhere is None else None  # else what comes is a sum already
        return Rules(self._setup, self._sizes, self._rule, self.privacy, here, self.enough)

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
        if fed.privacy is not None:
            state = replace(state, spent=fed.privacy.again(state.spent))
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
