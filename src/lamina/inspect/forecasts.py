"""What an experiment will send, before it is run: its own rounds, with clients that need no training.

The federation's rounds do the counting: cohorts, plans, masks, what each client holds, codecs, frames. Only the
training is stood in for (`stand_in`). So bytes that do not depend on values come out exact, by construction; those that
do come out twice, with updates that keep their size and with updates that shrink, and the two are a range.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lamina import wire
from lamina.books import Books
from lamina.client import Reply, Setup
from lamina.engine.base import Kind, Pack, Worker, threads
from lamina.engine.loop import LoopEngine
from lamina.evaluate import pieces
from lamina.federation import Federation
from lamina.inspect.stand_in import CLIENTS, Sample, StandIn
from lamina.method import Method, Plan
from lamina.preflight import ready
from lamina.store import ClientStore, Row
from lamina.training import Trainer
from lamina.tree import Params

SAMPLES = 3  # real rounds of two clients
DECAYS = (0.0, 0.5)
LAYERS = 0.12  # either side: a method that chooses layers by what it measures
MASK = 0.03  # one that chooses entries, of which there are always as many
CODED = 0.02  # a codec whose sizes depend on the values
_WORK = 400_000_000  # entries that may pass through codecs; beyond it, some clients' messages stand for the others'
_LONG = 4_000_000_000  # entries of all rounds' models; beyond it, the last rounds are taken to be like those before


class Range(NamedTuple):
    low: int
    high: int

    @property
    def exact(self) -> bool:
        return self.low == self.high

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Forecast:
    """Of a whole experiment.

    Attributes:
        up, down: bytes in all. Exact where both ends are equal.
        fedavg_up, fedavg_down: the same under plain FedAvg with fp32.
        seconds: in all, evaluation included; about.
        memory: peak bytes of all its processes, about; None where the system does not say.
        sampled: clients that were really trained, and for how many rounds.
        counted: rounds that were gone through; the others are taken to be like the last of these.
        why: what makes the range; "" where there is none.
    """

    rounds: int
    up: Range
    down: Range
    fedavg_up: int
    fedavg_down: int
    seconds: float
    sampled: tuple[int, int]
    sampling_seconds: float
    memory: int | None
    counted: int
    why: str


class Totals(NamedTuple):
    up: int
    down: int
    fedavg_up: int
    fedavg_down: int
    steps: int
    server_seconds: float
    counted: int


def forecast(fed: Federation, rounds: int, *, evaluate_every: int = 1) -> Forecast:
    """What `fed.run(rounds)` will cost. The federation is left as it is, and nothing is written.

    Raises:
        RunError: E310 where the two clients' training diverges.
    """
    trainer = ready(fed.model, fed.loss, fed.data, fed.local, fed.seed)
    before = _memory()
    samples: Sequence[Sample] | None = None
    totals = []
    sampling = 0.0
    for i, decay in enumerate(DECAYS):
        stand_in = StandIn(trainer, fed.setup, samples, min(SAMPLES, rounds), decay, i)
        totals.append(count(fed, rounds, stand_in))
        samples = stand_in.samples
        sampling += stand_in.seconds
    assert samples  # the first round made them
    first = totals[0]
    margin, why = _margin(fed, samples[0])
    seconds, memory = _cost(fed, rounds, evaluate_every, first, samples[-1], trainer, before)
    return Forecast(
        rounds,
        _range([t.up for t in totals], margin),
        _range([t.down for t in totals], margin),
        first.fedavg_up,
        first.fedavg_down,
        seconds,
        (min(CLIENTS, len(fed.data)), len(samples)),
        sampling,
        memory,
        first.counted,
        why,
    )


def count(fed: Federation, rounds: int, stand_in: StandIn, most: int | None = None, each: int | None = None) -> Totals:
    """The ledger of so many rounds with clients that need no training.

    Args:
        most: rounds that are gone through; None: all, as long as the model is not large.
        each: clients of a round that make a message of their own; None: all, as long as these are not many values.
    """
    twin = copy.copy(fed)
    twin.store = ClientStore()
    size = sum(x.numel() for x in fed.initial.params.values())
    each = each or max(CLIENTS, _WORK // max(1, size * rounds))
    counted = min(rounds, most or max(2 * SAMPLES * fed.method.hold, _LONG // size))
    engine = _Thinned(stand_in, fed.setup, each)
    up, down, fedavg_up, fedavg_down = [], [], 0, 0
    with threads(1):
        state, books = twin.start(engine)
        began = time.perf_counter()
        for _ in range(counted):
            state, record = twin.round(state, engine, rounds, False, books)
            books = Books()
            up.append(record.bytes_up)
            down.append(record.bytes_down)
            fedavg_up += record.fedavg_up
            fedavg_down += record.fedavg_down
    seconds = time.perf_counter() - began - stand_in.seconds
    longer = rounds / counted
    return Totals(
        _extended(up, rounds, fed.method.hold),
        _extended(down, rounds, fed.method.hold),
        round(fedavg_up * longer),
        round(fedavg_down * longer),
        round(stand_in.steps * longer),
        seconds * longer,
        counted,
    )


class _Thinned(LoopEngine):
    """Makes the messages of so many clients a round; further ones send what one of these sent, with as many local steps
    as are their own."""

    def __init__(self, stand_in: StandIn, setup: Setup, each: int):
        super().__init__("loop", Worker(stand_in, setup), 1, "nothing is trained")
        self._stand_in = stand_in
        self._each = each

    def replies(
        self, kind: Kind, plan: Plan, clients: Sequence[int], rows: Mapping[int, Row], pack: Pack | None = None
    ) -> Iterator[Reply]:
        made: list[Reply] = []
        for i, client in enumerate(clients):
            if i < self._each:
                made.append(self._worker.do(kind, plan, (client,), [rows.get(client)])[0])
                yield made[-1]
            else:
                yield self._like(made[i % len(made)], client)

    def _like(self, reply: Reply, client: int) -> Reply:
        """The same from this client."""
        if "steps" not in reply.message:  # a probe
            return reply._replace(client=client)
        count = self._stand_in.count(client)
        self._stand_in.steps += count
        steps = {"steps": torch.tensor(count, dtype=torch.float64)}
        return reply._replace(client=client, steps=count, message={**reply.message, "steps": steps})


def _extended(counted: Sequence[int], rounds: int, hold: int) -> int:
    """With the rounds that were not counted, taken to be like the later half of those that were."""
    rest = rounds - len(counted)
    if not rest:
        return sum(counted)
    like = counted[-max(hold, len(counted) // 2 // hold * hold) :]
    return sum(counted) + round(rest * sum(like) / len(like))


def _range(values: Sequence[int], margin: float) -> Range:
    low, high = min(values), max(values)
    middle = (low + high) / 2
    return Range(min(low, round(middle * (1 - margin))), max(high, round(middle * (1 + margin))))


def _margin(fed: Federation, sample: Sample) -> tuple[float, str]:
    """How far values can move the bytes that two scenarios have in common, and why."""
    method = fed.method
    reasons = []
    margin = 0.0
    if _withholds(method):
        reasons.append("the method chooses layers by what it measures")
        margin += LAYERS
    if _chooses_mask(method):
        reasons.append("the method's mask depends on the values")
        margin += MASK
    loose = [name for name, codec in (("uplink", fed.uplink), ("downlink", fed.downlink)) if not fixed(codec, sample)]
    if loose:
        reasons.append(f"the sizes of the {' and the '.join(loose)} depend on the values")
        margin += CODED
    return margin, "; ".join(reasons)


def decides(method: Method[Any, Any]) -> bool:
    """Whether what travels depends on what the method measures during the run."""
    return _withholds(method) or _chooses_mask(method)


def _withholds(method: Method[Any, Any]) -> bool:
    return bool({"waiting", "recycled"} & set((method.withholds or "").split(", ")))


def _chooses_mask(method: Method[Any, Any]) -> bool:
    return method.masks in ("server", "clients") or (method.masks is not None and method.has("probe"))


def fixed(codec: wire.Codec, sample: Sample) -> bool:
    """Whether a codec's sizes depend on shapes alone: found by trying it on different values."""
    ramp = {name: torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape) for name, x in sample.mean.items()}
    sizes = {
        codec.transmit(tree, wire.Context(wire.schema_of(tree)))[1].total for tree in (sample.mean, sample.spread, ramp)
    }
    return len(sizes) == 1


# ---- time and memory


def _cost(
    fed: Federation, rounds: int, every: int, totals: Totals, sample: Sample, trainer: Trainer, before: int | None
) -> tuple[float, int | None]:
    """Seconds and peak bytes, as far as two clients and a piece of the test set tell."""
    if fed.engine in ("stacked", "cuda"):
        training = _measured_round(fed, rounds) * rounds
    else:
        training = totals.steps * sample.seconds / fed.workers + totals.server_seconds
    tests = rounds // every + bool(rounds % every)
    after = _memory()
    memory = (
        None
        if after is None or before is None
        else after + (fed.workers if fed.workers > 1 else 0) * max(after - before, 4 * _size(fed.initial.params))
    )
    return training + tests * _test_seconds(fed, trainer), memory


def _measured_round(fed: Federation, rounds: int) -> float:
    """Seconds of one whole real round in its own engine, after one that warms up."""
    twin = copy.copy(fed)
    twin.store = ClientStore()
    engine = fed.made_engine()
    try:
        with threads(1):
            state, books = twin.start(engine)
        state, _ = twin.round(state, engine, rounds, False, books)
        began = time.perf_counter()
        twin.round(state, engine, rounds, False, Books())
        return time.perf_counter() - began
    finally:
        engine.close()


def _test_seconds(fed: Federation, trainer: Trainer) -> float:
    if fed.data.test is None:
        return 0.0
    n = pieces(fed.data.test)
    plan = Plan(round=0, seed=0, params=fed.initial.params, buffers=fed.initial.buffers, upload=frozenset(), lr=0.0)
    engine = LoopEngine("loop", Worker(trainer, fed.setup), 1, "")
    some = range(min(n, 2))
    began = time.perf_counter()
    for _ in engine.replies("test", plan, some, {}):
        pass
    return (time.perf_counter() - began) / len(some) * -(-n // fed.workers)


def _size(params: Params) -> int:
    return sum(x.numel() * x.element_size() for x in params.values())


def _memory() -> int | None:
    """Peak bytes of this process so far."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
