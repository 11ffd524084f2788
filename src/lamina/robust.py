"""Instead of the weighted mean of the updates: rules that a few wrong ones cannot move far.

    updates of the accepted clients, in the schedule's order  ->  one update

All but the mean look at every client's update by itself, so as many models as there are clients in a round are in
memory, and messages are not taken together (`stacked`, nodes that answer for several clients). Figures of the records
(divergence and the like) stay those of the mean: they say what the clients did, not what was made of it.

Sources: trimmed mean and median, Yin et al. 2018; Krum and Multi-Krum, Blanchard et al. 2017; geometric median,
Pillutla et al. 2022 (RFA); FLTrust, Cao et al. 2021, with a client that the server trusts in the place of its own data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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

    def expect(self, clients: int) -> None:
        _expect(self, clients, 3, "the median of fewer updates is one of them, or their mean")

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        m = len(updates)
        low, high = (m - 1) // 2, m // 2

        def middle(x: Tensor) -> Tensor:
            s = x.sort(0).values
            return (s[low] + s[high]) / 2

        return _by_layer(updates, middle)


@dataclass(frozen=True)
class TrimmedMean:
    """Each entry's mean without its largest and its smallest values. Weights do not count.

    Args:
        share: of the clients on either side, rounded up, 0 < share < 0.5: at least the share of those who may be wrong.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        fine = is_number(self.share, 0, 0.5) and self.share > 0
        expect(fine, f"share={self.share}: expected 0 < share < 0.5", code="E115", where="aggregate.share")

    def _cut(self, clients: int) -> int:
        return -int(-self.share * clients // 1)

    def expect(self, clients: int) -> None:
        fine = 2 * self._cut(clients) < clients
        said = f"share={self.share} of {clients} clients leaves none between the {self._cut(clients)} on either side"
        expect(fine, said, code="E115", where="aggregate.share", remedy="more clients, or a smaller share")

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        cut = self._cut(len(updates))
        return _by_layer(updates, lambda x: x.sort(0).values[cut : len(x) - cut].mean(0))


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
        keep: how many updates, >= 1; None: all but f.
    """

    f: int = 1
    keep: int | None = None

    def __post_init__(self) -> None:
        expect(is_whole(self.f, 0), f"f={self.f}: expected a whole number >= 0", code="E115", where="aggregate.f")
        fine = self.keep is None or is_whole(self.keep, 1)
        expect(fine, f"keep={self.keep}: expected a whole number >= 1", code="E115", where="aggregate.keep")

    def expect(self, clients: int) -> None:
        _expect(self, clients, max(2 * self.f + 3, self.keep or 0), "it would listen to those who are wrong")

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
        steps: >= 1.
        smooth: distances below this share of the median one count as it, > 0.
    """

    steps: int = 16
    smooth: float = 1e-6

    def __post_init__(self) -> None:
        expect(is_whole(self.steps, 1), f"steps={self.steps}: expected >= 1", code="E115", where="aggregate.steps")
        fine = is_number(self.smooth, 0) and self.smooth > 0
        expect(fine, f"smooth={self.smooth}: expected a number > 0", code="E115", where="aggregate.smooth")

    def expect(self, clients: int) -> None:
        _expect(self, clients, 3, "the geometric median of fewer updates is one of them, or anything between them")

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        """Everything follows from the products of the updates: the point is always a weighted mean of them."""
        each = list(updates.values())
        gram = _gram(each)
        p = torch.tensor([weights[name] for name in updates], dtype=torch.float64)
        beta = p / p.sum()
        for _ in range(self.steps):
            distances = (gram.diagonal() - 2 * (gram @ beta) + beta @ gram @ beta).clamp(min=0).sqrt()
            least = self.smooth * float(distances.median())
            if least == 0:
                break
            beta = p / distances.clamp(min=least)
            beta = beta / beta.sum()
        return _weighted(updates, dict(zip(updates, beta.tolist(), strict=True)))


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


def _by_layer(updates: Mapping[str, Params], one: Callable[[Tensor], Tensor]) -> Params:
    """Layer by layer from [clients, ...], so that only one layer is stacked at a time."""
    each = list(updates.values())
    return {name: one(torch.stack([update[name] for update in each])) for name in each[0]}


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
        flat = torch.stack([update[name].flatten() for update in updates]).double()
        made += flat @ flat.T
    return made


def _krum_order(updates: Sequence[Params], f: int) -> list[int]:
    """Positions by score, best first; the lower position among equals."""
    gram = _gram(updates)
    norms = gram.diagonal()
    distances = (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0)
    distances.fill_diagonal_(torch.inf)
    nearest = distances.sort(1).values[:, : len(updates) - f - 2]
    return sorted(range(len(updates)), key=lambda i: (float(nearest[i].sum()), i))
