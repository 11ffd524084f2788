"""One or more GPUs: examples resident as they are stored, several clients at once on streams of their own, the local
step captured once as a CUDA graph and replayed.

    CPU      begin -> start, order of examples           report -> codec -> settle (or nothing: the mean on the device)
    device      copies at fixed addresses -> K x [gather -> transform -> gradient -> correct -> SGD] -> one copy back

A replica is a model on a device with a stream. Clients are dealt to replicas in turn, most steps first, and their
replies taken in that order: nothing depends on who is done first. With device "cpu" everything but streams and capture
runs as it does on a GPU.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lamina.client import Reply, Setup, Start, begin, finish, transmit_message
from lamina.data.transform import Batch
from lamina.engine.base import Kind, Pack, Worker, blaming, enclosed, score_tree
from lamina.engine.device import (
    Copies,
    Form,
    Parcel,
    arithmetic,
    device_rng,
    form_of,
    on,
    resident,
    rng_of,
    setup_on,
    trainer_on,
    trees_of,
    with_trees,
)
from lamina.engine.stack import says_nothing
from lamina.errors import LaminaError
from lamina.evaluate import score_local
from lamina.method import Plan, Work
from lamina.random import generator
from lamina.store import Row
from lamina.training import Correct, Trainer, batches, clipped
from lamina.tree import Message, Params, flatten, select, skeleton, unflatten
from lamina.wire import Size

STREAMS = 8  # clients at once on one device, where `workers` says nothing
_OFTEN = 50  # steps of one batch size after which a replica captures it: about what a capture costs
_WARM = 3  # steps before a capture, as in torch.cuda.make_graphed_callables
_PATIENCE = 1000  # so many more, once a capture went stale because of a number in the plan
_FORMS = 4  # forms of client states that a replica keeps captures for


def available() -> bool:
    return torch.cuda.is_available()


def devices() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def names() -> list[str]:
    """What the devices are, for the record."""
    return [torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in devices()]


class CudaEngine:
    """Args:
    workers: clients at once, over all devices.
    devices: where to train; the first one evaluates and takes the sums.
    """

    name = "cuda"

    def __init__(self, trainer: Trainer, setup: Setup, workers: int, reason: str, devices: Sequence[torch.device]):
        self.workers = workers
        self.reason = reason
        self._setup = setup
        self._precision = setup.local.precision
        self._sizes: tuple[frozenset[str], dict[str, Size]] | None = None
        devices = devices[:workers]
        with arithmetic(self._precision):
            self._places = [_Place(trainer, setup, device) for device in devices]
            first = self._places[0]
            self._worker = Worker(first.trainer, setup_on(setup, first.data, first.trainer))
            at_once = workers if not first.draws() else min(workers, len(devices))
            self._replicas = [_Replica(trainer, setup, self._places[i % len(devices)]) for i in range(at_once)]

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        if kind in ("round", "judged"):
            yield from self._rounds(kind, plan, clients, rows)
            return
        for client in clients:
            with arithmetic(self._precision if kind == "probe" else "fp32"), on(self._places[0].device):
                (reply,) = self._worker.do(kind, plan, [client], [rows.get(client)])
            yield reply

    def _rounds(self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row]) -> Iterator[Reply]:
        for place in self._places:
            place.hold(plan)
        sizes = self._raw_sizes(plan) if self._stays(plan) else None
        flying: deque[_Flight] = deque()
        for i, client in enumerate(clients):
            if len(flying) == len(self._replicas):
                yield self._landed(kind, plan, flying.popleft(), sizes)
            with blaming(kind, self._setup, plan, [client]), arithmetic(self._precision):
                start = begin(self._setup, plan, rows.get(client))
                replica = self._replicas[i % len(self._replicas)]
                flying.append(replica.launch(client, plan, start, sizes is not None))
        while flying:
            yield self._landed(kind, plan, flying.popleft(), sizes)

    def _raw_sizes(self, plan: Plan) -> dict[str, Size]:
        """Bytes of a message with a raw update: they follow from the names and shapes."""
        if self._sizes is None or self._sizes[0] != plan.upload:
            message: Message = {"update": select(plan.params, plan.upload), "steps": {"steps": torch.zeros(())}}
            self._sizes = plan.upload, transmit_message(message, self._setup, plan, 0, 0.0)[1]
        return self._sizes[1]

    def _stays(self, plan: Plan) -> bool:
        """Whether updates are averaged on the device: nobody on the CPU has anything to say about them."""
        return says_nothing(self._setup, plan) and not self._worker.trainer.buffers and bool(plan.upload)

    def _landed(self, kind: Kind, plan: Plan, flight: _Flight, sizes: dict[str, Size] | None) -> Reply:
        replica, client = flight.replica, flight.client
        with blaming(kind, self._setup, plan, [client]):
            arrived = replica.arrived()
            loss = float(arrived["total"]["total"]) / flight.steps
            if sizes is None:
                params, buffers, grads = (arrived.get(tree, {}) for tree in ("params", "buffers", "grads"))
                work = Work(params, buffers, grads, torch.tensor(flight.steps))
                reply = finish(self._setup, plan, client, flight.row, work, loss)
            else:
                update = {name: x.to(self._places[0].device) for name, x in replica.update.items()}
                reply = _as_it_is(self._setup, plan, flight, update, arrived["squares"], loss, sizes)
            if kind == "judged":
                with arithmetic("fp32"), on(replica.place.device):
                    setup = setup_on(self._setup, replica.place.data, replica.trainer)
                    reply.message.update(score_tree(score_local(replica.trainer, setup)))
        (reply,) = enclosed(self._setup, [reply])
        return reply

    def close(self) -> None:
        for place in self._places:
            if place.device.type == "cuda":
                torch.cuda.synchronize(place.device)


class _Place:
    """One device: its examples, and the plan of the round at addresses that stay."""

    def __init__(self, trainer: Trainer, setup: Setup, device: torch.device):
        self.device = device
        self.data = resident(setup.data, device)
        self.trainer = trainer_on(trainer, self.data, device)  # for evaluation and trials
        self.plan: Plan
        self.times = 0  # how often the addresses have changed
        self.captures = device.type == "cuda"  # until it fails
        self._setup = setup
        self._copies: Copies | None = None

    def hold(self, plan: Plan) -> None:
        trees = trees_of(plan)
        with on(self.device):
            if self._copies is None or self._copies.form != form_of(trees):
                self._copies = Copies(trees, self.device)
                self.times += 1
            else:
                self._copies.write(trees)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # replicas read them on streams of their own
        self.plan = with_trees(plan, self._copies.trees)

    def draws(self) -> bool:
        """Whether a step takes random numbers from the device's one generator (dropout): then one client at a time. In
        older torch all graphs of a generator read seed and offset from one place, at once on several streams."""
        trainer, setup = self.trainer, self._setup
        params, buffers = trainer.snapshot(), {name: x.clone() for name, x in trainer.buffers.items()}
        rng = rng_of(self.device)
        with on(self.device), device_rng(self.device, setup.seed, "trial", 0, 0):
            before = rng.get_state()
            trainer.model.train()
            with contextlib.suppress(Exception):  # a model that fails fails again, and is reported, where it is used
                trainer.gradient(*trainer.batch(next(batches(setup.data, 0, setup.local, setup.seed, 0)), None))
            drawn = not torch.equal(rng.get_state(), before)
            trainer.load(params, buffers)
        return drawn


class _Flight(NamedTuple):
    """A client whose local training has been launched."""

    replica: _Replica
    client: int
    row: Row
    steps: int


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    grads: tuple[Tensor, ...]  # written by every replay
    x: Batch | None  # read by every replay, where the transform draws random numbers
    y: Batch | None
    read: dict[str, Any]  # what `correct` read of the plan beside its trees: these values are in the graph


class _Ground:
    """What the steps of clients with states of one form stand on: copies of a state, and the graphs that read them."""

    def __init__(self, state: Any, device: torch.device):
        self.copies = Copies({"state": flatten(state)}, device)
        self.state = unflatten(state, skeleton(state), self.copies.trees["state"])
        self.graphs: dict[int, _Captured] = {}  # by batch size
        self.seen: Counter[int] = Counter()


class _Replica:
    """One client at a time: a model on a device, and all that its step reads and writes at addresses that stay."""

    def __init__(self, trainer: Trainer, setup: Setup, place: _Place):
        self.place = place
        self.trainer = trainer_on(trainer, place.data, place.device)
        self.update: Params = {}  # of the last client, where it stays on the device
        self._setup = setup
        self._augments: bool = getattr(setup.data.transform, "augments", True)
        self._wanted = setup.method.has("report")  # the last gradients
        device, weights = place.device, self.trainer.weights
        double = any(w.dtype == torch.float64 for w in weights)
        self._lr = torch.zeros((), dtype=torch.float64 if double else torch.float32, device=device)
        self._total = torch.zeros((), dtype=torch.float64, device=device)  # of the losses
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._at = torch.zeros((), dtype=torch.int64, device=device)  # where in the order the next minibatch begins
        self._order = torch.zeros(_longest(setup), dtype=torch.int64, device=device)
        self._velocity = [torch.zeros_like(w) for w in weights] if setup.local.momentum else []
        self._grounds: dict[tuple[Form, str], _Ground] = {}
        self._times = 0
        self._parcel: Parcel | None = None
        self._stream, self._event, self._pool = _lane(device)

    # ---- one client

    def launch(self, client: int, plan: Plan, start: Start, stays: bool) -> _Flight:
        """Returns once all that the client does on the device is in the queue of its stream."""
        setup = self._setup
        chunks = list(batches(setup.data, client, setup.local, setup.seed, plan.round))
        with on(self.place.device), on(self.place.device, self._stream):
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.default_stream(self.place.device))  # whoever still reads `update`
            ground = self._ground(start)
            self._capture_what_is_frequent(ground, chunks)
            self._reset(plan, start, ground, chunks)
            with device_rng(self.place.device, setup.seed, "dropout", plan.round, client):
                raw = self._train(client, plan, ground, chunks)
            self._send(plan, raw, stays)
            if self._event is not None:
                self._event.record(self._stream)
        return _Flight(self, client, start.row, len(chunks))

    def arrived(self) -> Message:
        """What the last client left behind; waits for it."""
        assert self._parcel is not None  # something was launched
        if self._event is not None:
            self._event.synchronize()
        return self._parcel.open()

    def _ground(self, start: Start) -> _Ground:
        if self._times != self.place.times or len(self._grounds) > _FORMS:
            self._grounds.clear()  # their graphs read the plan where it was
            self._times = self.place.times
        state = start.row.method if self._setup.method.has("correct") else ()
        form = form_of({"state": flatten(state)}), str(skeleton(state))
        if form not in self._grounds:
            self._grounds[form] = _Ground(state, self.place.device)
        ground = self._grounds[form]
        ground.copies.write({"state": flatten(state)})
        return ground

    def _reset(self, plan: Plan, start: Start, ground: _Ground, chunks: Sequence[Tensor]) -> None:
        own = self.place.plan  # the same values, on the device already
        params = own.params if start.params is plan.params else start.params
        self.trainer.load(params, own.buffers if start.buffers is plan.buffers else start.buffers)
        self.trainer.model.train()
        order = torch.cat(list(chunks))
        self._order[: len(order)].copy_(order)
        self._lr.fill_(plan.lr)
        for counter in (self._total, self._step, self._at, *self._velocity):
            counter.zero_()

    def _train(self, client: int, plan: Plan, ground: _Ground, chunks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the last step."""
        augment = generator(self._setup.seed, "augment", plan.round, client)
        correct = self._correct(ground, None)
        raw: tuple[Tensor, ...] = ()
        at = 0
        for chunk in chunks:
            n = len(chunk)
            captured = ground.graphs.get(n)
            if self._augments:
                drawn = self._examples(self._order[at : at + n], augment)
                if captured is None:
                    raw = self._descend(*drawn, correct)
                else:
                    _write(captured.x, drawn[0])
                    _write(captured.y, drawn[1])
            elif captured is None:
                raw = self._descend(*self._next(n), correct)
            if captured is not None:
                captured.graph.replay()
                raw = captured.grads
            at += n
        return raw

    def _send(self, plan: Plan, raw: tuple[Tensor, ...], stays: bool) -> None:
        trainer = self.trainer
        trees: Message = {"total": {"total": self._total}}
        if stays:
            base = self.place.plan.params
            if not self.update or self.update.keys() != plan.upload:
                self.update = {n: torch.empty_like(x) for n, x in select(base, plan.upload).items()}
            for name, u in self.update.items():
                torch.sub(trainer.params[name].detach(), base[name], out=u)
            norms = {n: torch.linalg.vector_norm(u, dtype=torch.float64) for n, u in self.update.items()}
            trees["squares"] = {name: norm**2 for name, norm in norms.items()}
        else:
            trees |= {"params": trainer.detached(), "buffers": trainer.buffers}
            if self._wanted:
                trees["grads"] = dict(zip(trainer.params, raw, strict=True))
        if self._parcel is None or self._parcel.form != form_of(trees):
            self._parcel = Parcel(trees, self.place.device)
        self._parcel.dispatch(trees)

    # ---- one step

    def _next(self, n: int) -> tuple[Batch, Batch]:
        """The next n examples of the order. Which they are is read on the device, so it is the same in a graph."""
        indices = self._order.index_select(0, self._at + torch.arange(n, device=self.place.device))
        self._at.add_(n)
        return self._examples(indices, None)

    def _examples(self, indices: Tensor, augment: torch.Generator | None) -> tuple[Batch, Batch]:
        return self.trainer.batch(indices, augment)

    def _descend(self, x: Batch, y: Batch, correct: Correct | None) -> tuple[Tensor, ...]:
        """The step of `Trainer.train`, in its order, on numbers that are all on the device."""
        trainer, local = self.trainer, self._setup.local
        raw, loss = trainer.gradient(x, y)
        with torch.no_grad():
            g = list(raw)
            if correct is not None:
                corrected = correct(self._step, trainer.detached(), dict(zip(trainer.params, g, strict=True)))
                g = [corrected[name] for name in trainer.params]
            if local.clip is not None:
                g = clipped(g, local.clip)
            if local.weight_decay:
                g = list(torch._foreach_add(g, trainer.weights, alpha=local.weight_decay))
            if self._velocity:
                torch._foreach_mul_(self._velocity, local.momentum)  # from zero: the first step's is the gradient
                torch._foreach_add_(self._velocity, g)
                g = self._velocity
            torch._foreach_sub_(trainer.weights, torch._foreach_mul(g, self._lr))
            self._total.add_(loss)
            self._step.add_(1)
        return raw

    def _correct(self, ground: _Ground, read: dict[str, Any] | None) -> Correct | None:
        method = self._setup.method
        if not method.has("correct"):
            return None
        plan = self.place.plan if read is None else cast(Plan, _Noting(self.place.plan, read))
        return lambda step, params, grads: method.correct(ground.state, plan, step, params, grads)

    # ---- capture

    def _capture_what_is_frequent(self, ground: _Ground, chunks: Sequence[Tensor]) -> None:
        if not self.place.captures:
            return
        plan = self.place.plan
        for n, graph in list(ground.graphs.items()):
            if any(getattr(plan, name) != value for name, value in graph.read.items()):
                del ground.graphs[n]
                ground.seen[n] = -_PATIENCE  # a hook that reads what changes every round is not worth a capture
        for n, times in Counter(map(len, chunks)).items():
            ground.seen[n] += times
            if n in ground.graphs or ground.seen[n] < _OFTEN:
                continue
            with device_rng(self.place.device, self._setup.seed, "trial", 0, 0):
                failure = self._capture(ground, n)
            if failure:
                self.place.captures = False
                warnings.warn(f"engine='cuda' goes step by step, without a CUDA graph: {failure}", stacklevel=2)
                return

    def _capture(self, ground: _Ground, n: int) -> str:
        """Captures the step for minibatches of n. Returns why it cannot be captured, "" when it was.

        It really trains, on the example at position 0: the client's start is loaded afterwards.
        """
        self._order.zero_()
        self.trainer.load(self.place.plan.params, self.place.plan.buffers)
        self.trainer.model.train()

        def step(read: dict[str, Any]) -> tuple[Tensor, ...]:
            return self._descend(*(drawn or self._next(n)), self._correct(ground, read))

        read: dict[str, Any] = {}
        try:
            drawn = self._examples(self._order[:n], None) if self._augments else None
            for _ in range(_WARM):
                self._at.zero_()
                step({})
            self._at.zero_()
            graph, grads = _recorded(step, read, self._stream, self._pool)
        except LaminaError:
            raise
        except Exception as error:  # whatever the user's model, loss or method does
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if self.trainer.replaced is not None:
            return f"the model puts another tensor in the place of its buffer {self.trainer.replaced}"
        x, y = drawn or (None, None)
        ground.graphs[n] = _Captured(graph, grads, x, y, read)
        return ""


def _recorded(
    step: Callable[[dict[str, Any]], tuple[Tensor, ...]], read: dict[str, Any], stream: Any, pool: Any
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The step as a graph, and the tensors that a replay writes its result to. Only here is a GPU needed."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")  # what waits for the device spoils a capture: find out before it begins
    try:
        step({})
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        result = step(read)
    return graph, result


class _Noting:
    """A plan that notes which of its numbers are read: in a graph they are what they were when it was captured."""

    def __init__(self, plan: Plan, read: dict[str, Any]):
        self._plan = plan
        self._read = read

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._plan, name)
        if name in ("params", "buffers", "mask", "shared"):
            return value
        if callable(value):
            raise RuntimeError(f"`correct` calls plan.{name}, which may look at values")
        self._read[name] = value
        return value


def _lane(device: torch.device) -> tuple[Any, Any, Any]:
    """Stream, event and memory pool of a replica."""
    if device.type == "cpu":
        return None, None, None
    with torch.cuda.device(device):
        made: tuple[Any, Any] = torch.cuda.Stream(device), torch.cuda.Event()  # type: ignore[no-untyped-call]
        return *made, torch.cuda.graph_pool_handle()


def _longest(setup: Setup) -> int:
    """Examples that the client with most of them takes in a round, or more."""
    local, most = setup.local, int(setup.data.sizes.max())
    if local.steps is None:
        return local.epochs * most
    return local.steps * min(local.batch_size or most, most)


def _as_it_is(
    setup: Setup, plan: Plan, flight: _Flight, update: Params, squares: Params, loss: float, sizes: dict[str, Size]
) -> Reply:
    """`finish` of a client with a raw update, which stays on the device."""
    message: Message = {"update": update}
    if setup.moments:
        message["moments"] = squares
    message["steps"] = {"steps": torch.tensor(flight.steps, dtype=torch.float64)}
    wrong = (name for name, x in squares.items() if not torch.isfinite(x))
    refused = next(wrong, None if torch.isfinite(torch.tensor(loss)) else "loss")
    row = Row(setup.method.init_client(plan.params), {})
    return Reply(flight.client, message, row, sizes, loss, flight.steps, refused)


def _write(there: Batch | None, here: Batch) -> None:
    if isinstance(there, dict):
        for name, x in there.items():
            x.copy_(here[name])  # type: ignore[index]
    elif there is not None:
        there.copy_(here)  # type: ignore[arg-type]
