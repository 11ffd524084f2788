"""Instead of the weighted mean of the updates: rules that a few wrong ones cannot move far.

    updates of the accepted clients, in the schedule's order  ->  one update

All but the mean look at every client's update by itself, so as many models as there are clients in a round are in
memory, and messages are not taken together (`stacked`, nodes that answer for several clients). Only the update goes
through the rule: buffers and a method's further trees (a control variate) stay averages, which nothing defends but
`faults.norm`. Figures of the records (divergence and the like) stay those of the mean: they say what the clients did,
not what was made of it.

A number too large for its square is farther away than any other, and never the reason for a NaN.

Sources: trimmed mean and median, Yin et al. 2018; Krum and Multi-Krum, Blanchard et al. 2017; geometric median,
Pillutla et al. 2022 (RFA); FLTrust, Cao et al. 2021, with a client that the server trusts in the place of its own data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from lamina.errors import expect, is_number, is_whole
from lamina.tree import Params


@runtime_checkable
class Rule(Protocol):
    """How the updates of a round become one. A frozen dataclass, so that a run can say which it was."""

    def expect(self, clients: int) -> None:
        """Raises ConfigError (E115) if it says nothing about so many updates."""
        ...

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        """One update.

        Args:
            updates: by client, in the schedule's order; all have the same names and shapes and are finite.
            weights: of the same clients, > 0, with sum 1.
        """
        ...


@dataclass(frozen=True)
class Median:
    """Each entry's median over the clients; of an even number the mean of the two in the middle. Weights do not count.

    Holds against fewer than half of the clients.
    """

    entrywise: ClassVar[bool] = True  # an entry that most clients leave out is 0

    def expect(self, clients: int) -> None:
        _expect(self, clients, 3, "the median of fewer updates is one of them, or their mean")

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        m = len(updates)
        low, high = (m - 1) // 2, m // 2
        return _entrywise(updates, lambda s: s[:, low] if low == high else (s[:, low] + s[:, high]) / 2)


@dataclass(frozen=True)
class TrimmedMean:
    """Each entry's mean without its largest and its smallest values. Weights do not count.

    Args:
        share: of the clients on either side, rounded up, 0 < share < 0.5: at least the share of those who may be wrong.
    """

    share: float = 0.2

    entrywise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        fine = is_number(self.share, 0, 0.5) and self.share > 0
        expect(fine, f"share={self.share}: expected 0 < share < 0.5", code="E115", where="aggregate.share")

    def _cut(self, clients: int) -> int:
        return math.ceil(round(self.share * clients, 9))  # 0.07 of 100 clients are 7, whatever floats make of it

    def expect(self, clients: int) -> None:
        fine = 2 * self._cut(clients) < clients
        said = f"share={self.share} of {clients} clients leaves none between the {self._cut(clients)} on either side"
        expect(fine, said, code="E115", where="aggregate.share", remedy="more clients, or a smaller share")

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        cut = self._cut(len(updates))
        return _entrywise(updates, lambda s: s[:, cut : s.shape[1] - cut].mean(1))


@dataclass(frozen=True)
class Krum:
    """The one update with the smallest sum of squared distances to its clients - f - 2 nearest others.

    Args:
        f: clients that may be wrong, >= 0; a round needs 2 f + 3.
    """

    f: int = 1

    def __post_init__(self) -> None:
        expect(is_whole(self.f, 0), f"f={self.f}: expected a whole number >= 0", code="E115", where="aggregate.f")

    def expect(self, clients: int) -> None:
        _expect(self, clients, 2 * self.f + 3, "it would listen to those who are wrong")

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        best = _krum_order(list(updates.values()), self.f)[0]
        return {name: x.clone() for name, x in list(updates.values())[best].items()}


@dataclass(frozen=True)
class MultiKrum:
    """The weighted mean of the updates that Krum likes best.

    Args:
        f: clients that may be wrong, >= 0; a round needs 2 f + 3.
        keep: how many updates, >= 1, at most all but f; None: all but f.
    """

    f: int = 1
    keep: int | None = None

    def __post_init__(self) -> None:
        expect(is_whole(self.f, 0), f"f={self.f}: expected a whole number >= 0", code="E115", where="aggregate.f")
        fine = self.keep is None or is_whole(self.keep, 1)
        expect(fine, f"keep={self.keep}: expected a whole number >= 1", code="E115", where="aggregate.keep")

    def expect(self, clients: int) -> None:
        least = max(2 * self.f + 3, self.f + (self.keep or 0))
        _expect(self, clients, least, "it would listen to those who are wrong")

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        names = list(updates)
        order = _krum_order(list(updates.values()), self.f)
        kept = sorted(order[: self.keep or len(names) - self.f])
        some = [names[i] for i in kept]
        return _weighted({name: updates[name] for name in some}, {name: weights[name] for name in some})


@dataclass(frozen=True)
class GeometricMedian:
    """The point with the smallest weighted sum of distances to the updates, by smoothed Weiszfeld steps.

    Args:
        steps: at most, >= 1; it ends before them where a step changes nothing any more.
        smooth: distances below this share of the median one count as it, > 0.
    """

    steps: int = 100
    smooth: float = 1e-6

    def __post_init__(self) -> None:
        expect(is_whole(self.steps, 1), f"steps={self.steps}: expected >= 1", code="E115", where="aggregate.steps")
        fine = is_number(self.smooth, 0) and self.smooth > 0
        expect(fine, f"smooth={self.smooth}: expected a number > 0", code="E115", where="aggregate.smooth")

    def expect(self, clients: int) -> None:
        _expect(self, clients, 3, "the geometric median of fewer updates is one of them, or anything between them")

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        """Everything follows from the products of the updates: the point is always a weighted mean of them.

        The first step is taken from the update that has half of the others nearest to it, not from the mean: that may
        be as far off as somebody likes, and steps come back from there by a constant factor only.
        """
        each = list(updates.values())
        gram = _gram(each)
        p = torch.tensor([weights[name] for name in updates], dtype=torch.float64)
        apart = _distances(gram).sqrt()
        scales = [_weighted_median(row, p) for row in apart]
        nearest = scales.index(min(scales))
        distances, scale = apart[nearest], scales[nearest]
        if scale == 0:  # half of the weight is at this very point
            return {name: x.clone() for name, x in each[nearest].items()}
        if not math.isfinite(scale):
            raise LookupError("most updates are too long for their squares to be numbers")
        usable = distances.isfinite()  # the products of the others are not
        gram = torch.where(usable[:, None] & usable[None, :], gram, 0.0)
        beta = _normal(p / distances.clamp(min=scale))
        for _ in range(self.steps):
            squares = gram.diagonal() - 2 * (gram @ beta) + beta @ gram @ beta
            distances = torch.where(usable, squares.clamp(min=0).sqrt(), torch.inf)
            least = self.smooth * _weighted_median(distances, p)
            if least == 0:
                break
            before, beta = beta, _normal(p / distances.clamp(min=least))
            if float((beta - before).abs().max()) < 1e-12:
                break
        shares = {name: share for name, share in zip(updates, beta.tolist(), strict=True) if share > 0}
        return _weighted(updates, shares)


@dataclass(frozen=True)
class FLTrust:
    """The mean of the updates, each scaled to the length of a trusted client's and weighted by its cosine to it.

    An update that points the other way has no weight.

    Args:
        root: name of the client that the server trusts: its own data. It takes part in every round; its update is the
            yardstick and no part of the mean.
    """

    root: str

    needs: ClassVar[str] = "root"  # the argument that names a client who is in every cohort

    def expect(self, clients: int) -> None:
        _expect(self, clients, 2, "there is nobody beside the trusted client")

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        if self.root not in updates:
            raise LookupError(f"the trusted client {self.root!r} sent no update that can be used")
        others = [name for name in updates if name != self.root]
        gram = _gram([updates[name] for name in (self.root, *others)])
        lengths = gram.diagonal().clamp(min=0).sqrt()
        trust = {}
        for i, name in enumerate(others, start=1):
            both = float(lengths[0] * lengths[i])
            cosine = float(gram[0, i]) / both if both > 0 else 0.0
            trust[name] = max(0.0, cosine)
        whole = sum(trust.values())
        root = updates[self.root]
        if whole == 0:  # nobody goes its way: the model stays
            return {name: torch.zeros_like(x) for name, x in root.items()}
        scale = {
            name: trust[name] / whole * float(lengths[0] / lengths[i])
            for i, name in enumerate(others, 1)
            if trust[name]
        }
        return {layer: _sum((updates[name][layer], factor) for name, factor in scale.items()) for layer in root}


RULES: dict[str, Callable[..., Any]] = {
    "median": Median,
    "trimmed": TrimmedMean,
    "krum": Krum,
    "multikrum": MultiKrum,
    "geomedian": GeometricMedian,
    "fltrust": FLTrust,
}


def _expect(rule: Any, clients: int, least: int, why: str) -> None:
    said = f"{rule!r} needs rounds of {least} clients, and these have {clients}: with fewer {why}"
    remedy = "a larger cohort, or faults.min_replies that high where clients may be missing"
    expect(clients >= least, said, code="E115", where="aggregate", remedy=remedy)


_PIECE = 1 << 16  # entries of a layer that are looked at together, over all clients


def _pieces(updates: Sequence[Params], name: str) -> Iterator[Tensor]:
    """A layer of all clients as [entries, clients], some entries at a time: never a second copy of everything."""
    flat = [update[name].reshape(-1) for update in updates]
    for start in range(0, max(1, len(flat[0])), _PIECE):
        yield torch.stack([x[start : start + _PIECE] for x in flat], dim=1)


def _entrywise(updates: Mapping[str, Params], one: Callable[[Tensor], Tensor]) -> Params:
    """Each entry's own value from [entries, clients], sorted."""
    each = list(updates.values())
    made = {name: [one(piece.sort(1).values) for piece in _pieces(each, name)] for name in each[0]}
    return {name: torch.cat(parts).view(each[0][name].shape) for name, parts in made.items()}


def _weighted(updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
    whole = sum(weights.values())
    first = next(iter(updates.values()))
    return {layer: _sum((updates[name][layer], w / whole) for name, w in weights.items()) for layer in first}


def _sum(parts: Iterable[tuple[Tensor, float]]) -> Tensor:
    made: Tensor | None = None
    for x, factor in parts:
        made = x * factor if made is None else made.add_(x, alpha=factor)
    assert made is not None  # callers have at least one
    return made


def _gram(updates: Sequence[Params]) -> Tensor:
    """Products of all pairs in float64, [m, m], layer by layer."""
    made = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in updates[0]:
        for piece in _pieces(updates, name):
            exact = piece.double()
            made += exact.T @ exact
    return made


def _distances(gram: Tensor) -> Tensor:
    """Squared distances of all pairs; infinite where numbers are too large for their squares."""
    norms = gram.diagonal()
    made = (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    made.fill_diagonal_(0.0)
    return made


def _weighted_median(x: Tensor, weights: Tensor) -> float:
    """The smallest value up to which half of the weight is."""
    order = x.argsort(stable=True)
    reached = weights[order].cumsum(0)
    return float(x[order[int((reached >= reached[-1] / 2).nonzero()[0])]])


def _normal(shares: Tensor) -> Tensor:
    return shares / shares.sum()


def _krum_order(updates: Sequence[Params], f: int) -> list[int]:
    """Positions by score, best first; the lower position among equals."""
    distances = _distances(_gram(updates))
    distances.fill_diagonal_(torch.inf)
    nearest = distances.sort(1).values[:, : len(updates) - f - 2]
    return sorted(range(len(updates)), key=lambda i: (float(nearest[i].sum()), i))
