"""What a federated method is: a difference from FedAvg, written for one client. Read this file first.

          plan ───────────── Plan ──[ledger]──▶ begin → K × (gradient → correct → SGD) → report
 State ──┤                                                                                 │
          step ◀── mean ◀── Message ◀──[codec]── settle ◀──────────── sent, received ◀─────┘

Every hook has an identity default, so the base class *is* FedAvg. Hooks are pure: they change nothing they were
given. `Chain(a, b, c)` folds every hook over its methods from left to right, their states side by side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

from torch import Tensor

from lamina.errors import ConfigError, expect
from lamina.layers import Layer
from lamina.tree import Message, Params

S = TypeVar("S")  # server state:  NamedTuple (or tuple, dict) of tensors, trees and numbers
C = TypeVar("C")  # client state:  NamedTuple (or tuple, dict) of tensors and trees


class Task(NamedTuple):
    """What a method may know of where it runs."""

    layers: Sequence[Layer]  # trainable parameters in model order
    clients: int
    cohort: int
    weights: str  # "examples" | "uniform"
    seed: int
    hold: int  # of the whole chain
    lr: float
    momentum: float
    weight_decay: float
    clip: float | None
    buffers: str = ""  # policy for the model's buffers; "" when it has none


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Server -> cohort, one per round."""

    round: int
    seed: int  # of this round: server hooks draw from generator(plan.seed, purpose); 0 at the clients
    params: Params  # the global model, as clients decode it; in the plan handed to `step` the server's own
    buffers: Params
    upload: frozenset[str]  # parameters whose update is sent back
    lr: float  # client learning rate of this round
    participation: float = 1.0  # cohort / clients; in the plan handed to `step` accepted messages / clients
    mask: Params | None = None  # common support (1 = kept), known to both ends: only kept values travel
    in_sync: bool = True  # False when the round leaves layers waiting
    shared: dict[str, Params] = field(default_factory=dict)  # further trees clients must hold; sent when changed
    config: dict[str, float] = field(default_factory=dict)  # further numbers

    def keep(self, names: Iterable[str]) -> Plan:
        """Upload at most these: an intersection, so the order of methods does not matter."""
        return replace(self, upload=self.upload & frozenset(names))

    def share(self, **trees: Params) -> Plan:
        """Further trees for the clients. Raises ConfigError (E116) for a name that is taken."""
        _refuse_reserved(trees, ("params", "buffers", "mask", "upload"))
        return replace(self, shared=_disjoint(self.shared, trees, "shared tree"))

    def set(self, **numbers: float) -> Plan:
        """Further numbers for the clients. Raises ConfigError (E116) for a name that is taken."""
        _refuse_reserved(numbers, ("lr", "participation", "in_sync", "accepted"))
        return replace(self, config=_disjoint(self.config, numbers, "plan number"))

    def under(self, mask: Params) -> Plan:
        """Only the entries under this mask exist: name -> bool tensor, 1 = kept; a tensor without an entry is whole.
        Raises ConfigError (E116) when there is a mask already."""
        expect(self.mask is None, "two methods of the chain set a mask", code="E116")
        return replace(self, mask=mask)

    def kept(self, name: str) -> int:
        """Entries of a parameter that exist under the mask."""
        mask = self.mask.get(name) if self.mask else None
        return self.params[name].numel() if mask is None else int(mask.sum())


class Work(NamedTuple):
    """What local training leaves behind."""

    params: Params
    buffers: Params
    grads: Params  # loss gradient of the last minibatch at the weights before the last step, untouched by any hook
    steps: Tensor  # 0-d, number of local steps


class Method(Generic[S, C]):
    """A two-sided transformation of FedAvg. As it stands, this is FedAvg.

    The server learns from the weighted mean of the messages, tree by tree; `update` = local - global everywhere, and
    the server adds ``step(...)["update"]`` to its own full-precision parameters.
    """

    hold: int = 1  # rounds for which a cohort stays together
    sends: frozenset[str] = frozenset({"update"})  # trees of its message
    uniform: frozenset[str] = frozenset()  # trees averaged uniformly whatever the federation's weights
    needs_moments: bool = False
    rounds: int | None = None  # horizon of its own schedule: a run of another length warns
    withholds: str | None = None  # why it keeps layers from being uploaded: "waiting" | "recycled" | "personal"
    neutral: bool = True  # its neutral setting is bit-identical to FedAvg
    alone: bool = False  # combining it with others is meaningless
    optimises: bool = False  # its `step` replaces the mean update: nothing after it can measure the mean
    encodes: bool = False  # its "update" is a code of the update, of which its `step` makes the mean
    compensates: bool = False  # it keeps what the uplink lost, and sends it later
    masks: Literal["fixed", "server", "clients"] | None = None  # it sets plan.mask; who changes that, if anybody
    measures: bool = False  # its `step` reads the mean update
    shocks: bool = False  # some rounds start from a model that is not the global one
    controls: bool = False  # it corrects the clients' drift by what it knows of their gradients
    task: Task  # set by bind

    def bind(self, task: Task) -> Self:
        """The method for this task, at Federation construction. Raises ConfigError for a task it cannot serve."""
        bound = copy.copy(self)
        object.__setattr__(bound, "task", task)  # methods are frozen dataclasses; this is the copy's first breath
        return bound

    def init(self, params: Params) -> S:
        return ()  # type: ignore[return-value]  # S is the empty tuple for a method without server state

    def init_client(self, params: Params) -> C:
        return ()  # type: ignore[return-value]

    def probe(self, params: Params, grads: Params) -> Message:
        """Client, once before round 0: trees to average, from one gradient at the initial model."""
        return {}

    def setup(self, server: S, params: Params, mean: Message) -> tuple[Params, S]:
        """Server, once before round 0, with the mean of the probes (``{}`` when no method probes)."""
        return params, server

    def plan(self, server: S, plan: Plan) -> Plan:
        """Server: what to ask for."""
        return plan

    def begin(self, client: C, plan: Plan, params: Params) -> Params:
        """Client: where to start."""
        return params

    def correct(self, client: C, plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        """Client, each local step: how to descend. `step` is a 0-d tensor: torch.where, no branching on it."""
        return grads

    def report(self, client: C, plan: Plan, work: Work, message: Message) -> tuple[Message, C]:
        """Client: what to send."""
        return message, client

    def settle(self, client: C, sent: Message, received: Message) -> C:
        """Client: what was lost. `received` is what the server will decode."""
        return client

    def step(self, server: S, plan: Plan, mean: Message) -> tuple[Message, S]:
        """Server: how to learn."""
        return mean, server

    def absorb(self, server: S, sent: Message, received: Message) -> S:
        """Server, after `step`, where the downlink codes the step itself: what was lost on the way down. A method with
        this hook allows such a downlink (TopK, RandomK, sign)."""
        return server

    def observe(self, server: S) -> Mapping[str, Mapping[str, float]]:
        """For the records only: column -> layer -> number, e.g. the interval of each layer."""
        return {}

    def has(self, hook: str) -> bool:
        """Whether the hook does anything: one that does not costs nothing."""
        return getattr(type(self), hook) is not getattr(Method, hook)


@dataclass(frozen=True)
class FedAvg(Method[tuple[()], tuple[()]]):
    """McMahan et al. 2017 (arXiv 1602.05629): the mean of the clients' updates, weighted by their examples.

    With others: the neutral element; adding it to a chain changes nothing.
    """


class Chain(Method[tuple[Any, ...], tuple[Any, ...]]):
    """Several methods as one; hooks run from left to right.

    Methods that *measure* a message stand after those that *change* it, server optimisers last.

    Raises:
        ConfigError: E115 for combinations that are known to be meaningless, with the reason.
    """

    def __init__(self, *methods: Method[Any, Any]):
        expect(bool(methods), "Chain() is empty: expected at least one method")
        for m in methods:
            expect(
                isinstance(m, Method),
                f"Chain: expected methods, got {m!r}",
                remedy="for example Chain(lamina.SSFL(0.3), lamina.FedLAMA(phi=4)), not names, lists or classes",
            )
        flat = [part for m in methods for part in (m.methods if isinstance(m, Chain) else (m,))]
        _refuse_meaningless(flat)
        self.methods: tuple[Method[Any, Any], ...] = tuple(flat)
        self.hold = math.lcm(*(m.hold for m in flat))
        self.sends = frozenset().union(*(m.sends for m in flat))
        self.uniform = frozenset().union(*(m.uniform for m in flat))
        self.rounds = next((m.rounds for m in flat if m.rounds is not None), None)
        self.withholds = ", ".join(dict.fromkeys(m.withholds for m in flat if m.withholds is not None)) or None
        self.neutral = all(m.neutral for m in flat)
        self.needs_moments = any(m.needs_moments for m in flat)
        self.optimises = any(m.optimises for m in flat)
        self.encodes = any(m.encodes for m in flat)
        self.compensates = any(m.compensates for m in flat)
        self.masks = next((m.masks for m in flat if m.masks is not None), None)
        self.measures = any(m.measures for m in flat)
        self.shocks = any(m.shocks for m in flat)
        self.controls = any(m.controls for m in flat)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.methods))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self.methods == other.methods

    def __hash__(self) -> int:
        return hash(self.methods)

    def has(self, hook: str) -> bool:
        return any(m.has(hook) for m in self.methods)

    def bind(self, task: Task) -> Chain:
        bound = Chain(*(m.bind(task) for m in self.methods))
        bound.task = task
        return bound

    def init(self, params: Params) -> tuple[Any, ...]:
        return tuple(m.init(params) for m in self.methods)

    def init_client(self, params: Params) -> tuple[Any, ...]:
        return tuple(m.init_client(params) for m in self.methods)

    def probe(self, params: Params, grads: Params) -> Message:
        message: Message = {}
        for m in self.methods:
            message = _disjoint(message, m.probe(params, grads), "probe tree")
        return message

    def setup(self, server: tuple[Any, ...], params: Params, mean: Message) -> tuple[Params, tuple[Any, ...]]:
        states = []
        for m, s in zip(self.methods, server, strict=True):
            params, state = m.setup(s, params, mean)
            states.append(state)
        return params, tuple(states)

    def plan(self, server: tuple[Any, ...], plan: Plan) -> Plan:
        for m, s in zip(self.methods, server, strict=True):
            plan = m.plan(s, plan)
        return plan

    def begin(self, client: tuple[Any, ...], plan: Plan, params: Params) -> Params:
        for m, c in zip(self.methods, client, strict=True):
            params = m.begin(c, plan, params)
        return params

    def correct(self, client: tuple[Any, ...], plan: Plan, step: Tensor, params: Params, grads: Params) -> Params:
        for m, c in zip(self.methods, client, strict=True):
            grads = m.correct(c, plan, step, params, grads)
        return grads

    def report(
        self, client: tuple[Any, ...], plan: Plan, work: Work, message: Message
    ) -> tuple[Message, tuple[Any, ...]]:
        states = []
        for m, c in zip(self.methods, client, strict=True):
            before = message
            message, state = m.report(c, plan, work, message)
            lost = [tree for tree in before if tree not in _OPEN and message.get(tree) is not before[tree]]
            expect(not lost, f"{m!r} overwrites the tree {lost} of another method", code="E116")
            states.append(state)
        return message, tuple(states)

    def settle(self, client: tuple[Any, ...], sent: Message, received: Message) -> tuple[Any, ...]:
        return tuple(m.settle(c, sent, received) for m, c in zip(self.methods, client, strict=True))

    def step(self, server: tuple[Any, ...], plan: Plan, mean: Message) -> tuple[Message, tuple[Any, ...]]:
        states = []
        for m, s in zip(self.methods, server, strict=True):
            mean, state = m.step(s, plan, mean)
            states.append(state)
        return mean, tuple(states)

    def absorb(self, server: tuple[Any, ...], sent: Message, received: Message) -> tuple[Any, ...]:
        return tuple(m.absorb(s, sent, received) for m, s in zip(self.methods, server, strict=True))

    def observe(self, server: tuple[Any, ...]) -> Mapping[str, Mapping[str, float]]:
        columns: dict[str, Mapping[str, float]] = {}
        for m, s in zip(self.methods, server, strict=True):
            columns.update(m.observe(s))
        return columns


_OPEN = frozenset({"update", "buffers"})  # trees that every method may change


def _disjoint(old: Mapping[str, Any], new: Mapping[str, Any], what: str) -> dict[str, Any]:
    taken = set(old) & set(new)
    if taken:
        raise ConfigError(f"{what} {sorted(taken)[0]!r} is used by two methods of the chain", code="E116")
    return {**old, **new}


def _refuse_reserved(names: Iterable[str], reserved: Sequence[str]) -> None:
    for name in names:
        expect(name not in reserved, f"{name!r} is a part of every plan: choose another name", code="E116")


def _refuse_meaningless(methods: Sequence[Method[Any, Any]]) -> None:
    """E115 with the reason for what means nothing together, or nothing in this order."""
    for i, first in enumerate(methods):
        for second in methods[i + 1 :]:
            for one, other, why in _REFUSED:
                for a, b in ((first, second), (second, first)):
                    if one(a) and other(b):
                        raise ConfigError(f"{a!r} with {b!r}: {why}", code="E115")
            for late, early, why in _ORDER:
                if late(first) and early(second):
                    raise ConfigError(
                        f"{first!r} before {second!r}: {why}",
                        code="E115",
                        remedy=f"put {second!r} before {first!r}",
                    )
    writers: dict[str, Method[Any, Any]] = {}
    for m in methods:
        for tree in sorted(m.sends - _OPEN):
            if tree in writers:
                raise ConfigError(f"{writers[tree]!r} and {m!r} both send the tree {tree!r}", code="E116")
            writers[tree] = m


_Is = Callable[[Method[Any, Any]], bool]


def _anything(m: Method[Any, Any]) -> bool:
    return True


def _alone(m: Method[Any, Any]) -> bool:
    return m.alone


def _waits(m: Method[Any, Any]) -> bool:
    return m.withholds == "waiting"


def _recycles(m: Method[Any, Any]) -> bool:
    return m.withholds == "recycled"


def _optimises(m: Method[Any, Any]) -> bool:
    return m.optimises


def _encodes(m: Method[Any, Any]) -> bool:
    return m.encodes


def _compensates(m: Method[Any, Any]) -> bool:
    return m.compensates


def _masks(m: Method[Any, Any]) -> bool:
    return m.masks is not None


def _moves_mask(m: Method[Any, Any]) -> bool:
    return m.masks in ("server", "clients")


def _reads_spread(m: Method[Any, Any]) -> bool:
    return m.needs_moments


def _reads_mean(m: Method[Any, Any]) -> bool:
    return m.measures or m.needs_moments


def _controls(m: Method[Any, Any]) -> bool:
    return m.controls


def _absorbs(m: Method[Any, Any]) -> bool:
    return m.has("absorb")


_REFUSED: tuple[tuple[_Is, _Is, str], ...] = (
    (_alone, _anything, "it shares nothing that another method could act on"),
    (_waits, _recycles, "they cannot decide about the same layers: one that waits keeps training, one that is recycled "
     "replays; choose one of the two"),
    (_waits, _waits, "both decide which layers wait"),
    (_recycles, _recycles, "both decide which layers are recycled"),
    (_optimises, _optimises, "each replaces the mean update by a step of its own: use one"),
    (_compensates, _compensates, "both would send again what the uplink lost: use one"),
    (_encodes, _encodes, "both put a code in the place of the update: use one"),
    (_encodes, _reads_spread, "the spread of the codes that one sends is not that of the updates, which the other "
     "measures"),
    (_controls, _controls, "both correct the same drift, and each would take the other's correction for a gradient"),
    (_encodes, lambda m: m.shocks, "after a shock an update begins with what was pruned, which is no sum of gradients "
     "and must not be divided or remembered like one"),
    (_encodes, lambda m: m.masks == "clients", "what a client prunes is no sum of gradients and must not be divided or "
     "remembered like one"),
    (_encodes, lambda m: m.compensates and m.has("correct"), "its pull is in units of weights, the residual would be "
     "in those of the code"),
    (_masks, _masks, "both set the mask: use one"),
    (_moves_mask, _waits, "the mask would change under layers that wait at the clients"),
    (_moves_mask, _recycles, "a recycled update would fall outside a mask that has changed"),
    (_moves_mask, _absorbs, "what is pruned must arrive at once, not when its turn comes on a sparse downlink"),
    (_absorbs, _absorbs, "both would send down again what the downlink lost: use one"),
    (lambda m: m.masks == "clients", _compensates, "what a client prunes must arrive at once, not with a later round"),
)  # fmt: skip

_ORDER: tuple[tuple[_Is, _Is, str], ...] = (  # (must stand later, must stand earlier, why)
    (_optimises, _reads_mean, "it replaces the mean update before the other can read it"),
    (_compensates, _encodes, "what the uplink loses is counted in the units that travel"),
    (_reads_mean, _encodes, "it reads the mean update, which the other recovers from what is sent"),
    (_optimises, _encodes, "it steps by the mean update, which the other recovers from what is sent"),
    (_moves_mask, _controls, "a control remembers entries that the mask has dropped since, and would move them"),
    (_absorbs, _optimises, "the optimiser's step is what travels down"),
    (_absorbs, _reads_mean, "it adds what the downlink lost to the mean update, which the other reads"),
    (
        lambda m: m.masks == "server",
        _encodes,
        "it prunes the model that the mean update leads to, which the other recovers from what is sent",
    ),
    (lambda m: m.masks == "server", _optimises, "an optimiser would fill again what was pruned"),
)
