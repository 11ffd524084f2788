"""Bounds on the length of what a client says, layer by layer: `faults.norm`.

    "off"            none (the default)
    "fixed:2"        longer updates of a layer are cut to length 2
    "clip:8x"        to 8 times the layer's running median
    "median"         to the running median itself, and a client with a layer 8 times as long is not used in that round
                     (E312), unless most are: the robust preset
    "adaptive:0.5"   to a length that tracks this quantile (Andrew et al. 2021, arXiv 1905.03871)
    "reject:20x"     nothing is cut: a client with a layer 20 times as long is not used

The running median of a layer is that of its last ten rounds' medians, over all finite updates that came, those cut or
refused included: a change that is there to stay is followed after a few rounds. A length of 0 enters no median. The
lengths of a round that is being received do not count: so messages still go one by one into the sum, and who is in one
round's cohort does not decide what is long. Only where a layer is seen for the first time, in round 0, are the messages
held back until all are there, and that round's own median is the bound; as many models as clients are in memory then.

Off by default, because honest updates come in bursts: LIPS shocks its layers, a FedLAMA layer that waited brings
several rounds at once, a learning rate drops. A median of ten rounds calls some of them long, and "median" cuts half of
all updates in every round. A burst of most clients is cut and not refused by "median"; by "reject" it is.

Every tree that the method sends is bounded like the update, each tensor by itself; buffers are not, for they are no
steps but values. What a client says of its own lengths (`moments`) is replaced by what is used of it. What is cut off
is lost: it comes to nobody's residual, and SCAFFOLD's control is no longer quite the mean of its clients'.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lamina.admission import own
from lamina.client import RESERVED, Reply
from lamina.errors import ConfigError
from lamina.record import LayerRecord
from lamina.tree import Message, Params, squared_norm

REFUSED = "E312"
ROUNDS = 10  # whose medians are remembered
PRESET = 8.0  # times the median: beyond it "median" cuts no longer, but refuses
RATE = 0.2  # by which an adaptive bound moves, as in the paper

Known: TypeAlias = Mapping[str, tuple[float, ...]]  # layer -> its last medians, the newest last; or its adaptive bound

_FORMS = {
    "fixed": re.compile(r"fixed:(.+)"),
    "clip": re.compile(r"clip:(.+)x"),
    "adaptive": re.compile(r"adaptive:(.+)"),
    "reject": re.compile(r"reject:(.+)x"),
}


class Bound(NamedTuple):
    """Of a layer in one round."""

    cut: float  # longer ones are cut to it
    most: float = math.inf  # the message of one that is longer still is refused


NOTHING = Bound(math.inf)


class Policy(NamedTuple):
    kind: str  # "off" | "fixed" | "median" | "adaptive": what a bound follows from
    cut: float = math.inf  # the length itself, times the median, or the quantile
    most: float = math.inf  # times the median

    @classmethod
    def of(cls, said: str) -> Policy:
        """Raises ConfigError E103."""
        if said in ("off", "median"):
            return cls("off") if said == "off" else cls("median", 1.0, PRESET)
        for kind, form in _FORMS.items():
            found = form.fullmatch(said) if isinstance(said, str) else None
            value = _number(found[1]) if found else math.nan
            if value > 0 and (kind != "adaptive" or value < 1) and (kind != "reject" or value > 1):
                made = {"clip": cls("median", value), "reject": cls("median", most=value)}
                return made.get(kind, cls(kind, value))
        raise ConfigError(
            f"norm={said!r}: expected off, median, fixed:LENGTH, clip:FACTORx, adaptive:QUANTILE (between 0 and 1) or "
            "reject:FACTORx (above 1)",
            code="E103",
            where="faults.norm",
            remedy="median is the robust preset, clip:8x only cuts what is far off",
        )

    @property
    def acts(self) -> bool:
        return self.kind != "off"

    @property
    def cuts(self) -> bool:
        """Whether parts of a message may be used."""
        return self.acts and self.cut < math.inf

    def bound(self, past: tuple[float, ...]) -> Bound | None:
        """Of a layer with this past; None: it has none, and needs one."""
        if self.kind == "fixed":
            return Bound(self.cut)
        if not past:
            return None
        if self.kind == "adaptive":
            return Bound(past[-1])
        median = statistics.median(past)
        return Bound(self.cut * median, self.most * median)

    def first(self, lengths: list[float]) -> Bound:
        """Of a layer that is seen for the first time, from all lengths of the round."""
        lengths = _counted(lengths)
        if not lengths:
            return NOTHING
        start = _quantile(lengths, self.cut) if self.kind == "adaptive" else statistics.median(lengths)
        return self.bound((start,)) or NOTHING

    def after(self, past: tuple[float, ...], bound: Bound, lengths: list[float]) -> tuple[float, ...]:
        """The past of the next round."""
        lengths = _counted(lengths)
        if self.kind == "fixed" or not lengths:
            return past
        if self.kind == "adaptive":
            within = sum(length <= bound.cut for length in lengths) / len(lengths)
            return (bound.cut * math.exp(-RATE * (within - self.cut)),)
        return (*past, statistics.median(lengths))[-ROUNDS:]


class Refused(NamedTuple):
    layer: str
    why: str

    def on(self, reply: Reply) -> Reply:
        return reply._replace(refused=self.why, code=REFUSED, layer=self.layer)


class Bounds:
    """Bounds the messages of one round.

    Args:
        known: of the rounds before.

    Attributes:
        clipped: layer -> how many messages it was cut in.
    """

    def __init__(self, policy: Policy, known: Known):
        self.clipped: Counter[str] = Counter()
        self._policy = policy
        self._known = known
        self._bounds: dict[str, Bound | None] = {}
        self._lengths: dict[str, list[float]] = {}

    def through(self, replies: Iterable[Reply]) -> Iterator[Reply]:
        """The same replies: cut, or refused. One that may be either comes after the others, in the same order."""
        if not self._policy.acts:
            yield from replies
            return
        judged = 0
        long: list[tuple[Reply, dict[str, float], Refused]] = []
        for reply, squares in self._measurable(replies):
            judged += reply.refused is None
            refused = self._refused(squares)
            if refused is None:
                yield self._cut(reply, squares)
            elif self._policy.cuts:
                long.append((own(reply), squares, refused))
            else:
                yield refused.on(reply)
        burst = 2 * len(long) > judged  # whoever most are, they are not the few that a bound is against
        while long:
            reply, squares, refused = long.pop(0)
            yield self._cut(reply, squares) if burst else refused.on(reply)

    def shown(self, layers: dict[str, LayerRecord], accepted: int) -> dict[str, LayerRecord]:
        """With the share of so many messages in which each layer was cut."""
        if not self._policy.cuts or not accepted:
            return layers
        return {
            name: row._replace(clipped=self.clipped[name] / accepted) if name in self._bounds else row
            for name, row in layers.items()
        }

    def after(self) -> Known:
        """What the next round knows, when all replies are through."""
        made = dict(self._known)
        for layer, lengths in self._lengths.items():
            bound = self._bounds[layer]
            past = self._policy.after(made.get(layer, ()), bound or NOTHING, lengths)
            if past:
                made[layer] = past
        return made

    def _measurable(self, replies: Iterable[Reply]) -> Iterator[tuple[Reply, dict[str, float]]]:
        """Each with the squares of its layers' lengths, once these layers have bounds; without any where it is refused
        already."""
        held: list[tuple[Reply, dict[str, float]]] = []
        for reply in replies:
            squares = {} if reply.refused is not None else self._measured(reply.message)
            if held or any(self._bounds[layer] is None and square > 0 for layer, square in squares.items()):
                held.append((own(reply), squares))
            else:
                yield reply, squares
        if held:
            for layer, bound in self._bounds.items():
                if bound is None:
                    self._bounds[layer] = self._policy.first(self._lengths[layer])
        while held:
            yield held.pop(0)

    def _measured(self, message: Message) -> dict[str, float]:
        squares = {layer: squared_norm(x) for layer, x in _layers(message)}
        for layer, square in squares.items():
            self._lengths.setdefault(layer, []).append(square**0.5)
            if layer not in self._bounds:
                self._bounds[layer] = self._policy.bound(self._known.get(layer, ()))
        return squares

    def _refused(self, squares: Mapping[str, float]) -> Refused | None:
        for layer, square in squares.items():
            most = (self._bounds[layer] or NOTHING).most
            if square**0.5 > most:
                times = f"{self._policy.most:g} times its running median"
                return Refused(layer, f"a norm of {square**0.5:.3g}, expected at most {most:.3g}, {times}")
        return None

    def _cut(self, reply: Reply, squares: Mapping[str, float]) -> Reply:
        factors: dict[str, float] = {}
        for layer, square in squares.items():
            length, bound = square**0.5, self._bounds[layer] or NOTHING
            if length > bound.cut:
                factors[layer] = bound.cut / length
        self.clipped.update(factors.keys())
        message = {tree: _times(tree, content, factors) for tree, content in reply.message.items()}
        if squares and "moments" in message:
            used = {name: squares[name] * factors.get(name, 1.0) ** 2 for name in message["moments"]}
            message["moments"] = {name: torch.tensor(x, dtype=torch.float64) for name, x in used.items()}
        return reply._replace(message=message)


def _number(text: str) -> float:
    try:
        made = float(text)
    except ValueError:
        return math.nan
    return made if math.isfinite(made) else math.nan


def _counted(lengths: list[float]) -> list[float]:
    return [length for length in lengths if 0 < length < math.inf]


def _quantile(lengths: list[float], q: float) -> float:
    """The smallest length that so large a share of them does not exceed."""
    return sorted(lengths)[max(0, math.ceil(round(q * len(lengths), 9)) - 1)]


def _layers(message: Message) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that is bounded; those of the update by their own names."""
    for tree, content in message.items():
        if tree not in RESERVED:
            for name, x in content.items():
                if x.is_floating_point():
                    yield _layer(tree, name), x


def _layer(tree: str, name: str) -> str:
    return name if tree == "update" else f"{tree}/{name}"


def _times(tree: str, content: Params, factors: Mapping[str, float]) -> Params:
    if tree in RESERVED:
        return content
    return {name: x * factors[key] if (key := _layer(tree, name)) in factors else x for name, x in content.items()}
