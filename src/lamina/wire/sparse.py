"""TopK and RandomK: a share of the (kept) entries, the largest or drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.errors import ConfigError
from lamina.random import address
from lamina.wire import index
from lamina.wire.codec import Context, Selecting, Selection, Support, everything, some
from lamina.wire.container import Indices, refuse, uv
from lamina.wire.dense import check_density, check_values
from lamina.wire.values import EXACT, FLOATING, Vectors

Bits = NDArray[np.signedinteger[Any]]

SAMPLE = 1 << 15  # entries looked at to guess a threshold
PIECE = 1 << 16  # entries compared with it at a time


@dataclass(frozen=True)
class TopK(Selecting):
    """The entries of largest magnitude; the others are 0 to the receiver.

    Magnitudes are compared by their bits, so that infinities and NaN come first and are seen by the receiver.

    Args:
        density: share of the entries that travel.
        scope: "layer": of each tensor for itself, all tensors alike; "global": of all tensors together.
        values: how the values travel, as in `Dense`.
        keep: "exact": max(1, round(density * n)) of n entries, ties keep the lower flat index; "released" (as FLARE's
            code does): those strictly above the (round(density * n) + 2)-th largest, which without ties are
            round(density * n) + 1; everything when n is no more than that.
    """

    density: float
    scope: str = "layer"
    values: str = "fp32"
    keep: str = "exact"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_values(self.values)
        if self.scope not in ("layer", "global"):
            raise ConfigError(f"scope={self.scope!r}: expected 'layer' or 'global'")
        if self.keep not in ("exact", "released"):
            raise ConfigError(f"keep={self.keep!r}: expected 'exact' or 'released'")

    @property
    def lossless(self) -> bool:
        return self.density == 1 and self.values in EXACT

    @property
    def indices(self) -> frozenset[int]:
        return index.CHOSEN | {index.DENSE, index.MASK_ID}

    def foresee(self, support: Support, context: Context) -> Selection | None:
        lengths = support.counts if self.scope == "layer" else [support.total]
        return everything(support) if all(self._wanted(n) >= n for n in lengths) else None

    def select(self, support: Support, vectors: Vectors) -> Selection:
        for x in vectors:
            refuse(x.dtype not in FLOATING, f"TopK: cannot rank {x.dtype}, only floating-point tensors")
        if self.scope == "layer":
            return some(support, [self._largest(magnitudes(x), len(x)) for x in vectors])
        return some(support, support.partition(self._largest(*together(vectors))))

    def _wanted(self, n: int) -> int:
        """Entries of n that travel when there are no ties."""
        k = round(self.density * n)
        return max(1, k) if self.keep == "exact" else k + 1

    def _largest(self, bits: Bits, n: int) -> Indices:
        wanted = self._wanted(n)
        if wanted >= n:
            return np.arange(n)
        return largest(bits, wanted) if self.keep == "exact" else above(bits, wanted + 1)


@dataclass(frozen=True)
class RandomK(Selecting):
    """A share of all entries, drawn anew at every address; only a seed of 8 bytes travels as the index.

    Values are not rescaled by 1 / density. max(1, round(density * n)) of the n entries of all tensors together.

    Args:
        density: share of the entries that travel.
        values: how the values travel, as in `Dense`.
    """

    density: float
    values: str = "fp32"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_values(self.values)

    @property
    def lossless(self) -> bool:
        return self.density == 1 and self.values in EXACT

    @property
    def indices(self) -> frozenset[int]:
        return frozenset({index.DENSE, index.MASK_ID, index.DRAWN})

    def foresee(self, support: Support, context: Context) -> Selection:
        n = support.total
        k = max(1, round(self.density * n))
        if k >= n:
            return everything(support)
        refuse(n > index.LONGEST, f"RandomK over {n} entries: at most {index.LONGEST}")
        seed = address(context.seed, context.purpose, context.round, context.client)
        section = index.Section.of(index.DRAWN, uv(k) + seed.to_bytes(8, "little"))
        return some(support, support.partition(index.draw(n, k, seed)), section)


def magnitudes(x: Tensor) -> Bits:
    """The bits of a floating-point vector as signed integers; without the sign bit they order by magnitude."""
    bits: Bits = x.view(torch.int64).numpy() if x.dtype == torch.float64 else x.float().view(torch.int32).numpy()
    return bits


def together(vectors: Vectors) -> tuple[Bits, int]:
    """Magnitudes of all entries, one vector after the other, and their number."""
    widest = torch.float64 if any(x.dtype == torch.float64 for x in vectors) else torch.float32
    joined = torch.cat([x.to(widest) for x in vectors]) if vectors else torch.empty(0)
    return magnitudes(joined), len(joined)


def largest(bits: Bits, k: int) -> Indices:
    """Positions of the k largest magnitudes, ascending; of equal ones the first. 1 <= k < len(bits)."""
    positions, keys = candidates(bits, k)
    threshold = np.partition(keys, len(keys) - k)[len(keys) - k]
    keep = keys > threshold
    ties = np.flatnonzero(keys == threshold)
    keep[ties[: k - int(np.count_nonzero(keep))]] = True
    chosen: Indices = positions[keep]
    return chosen


def above(bits: Bits, rank: int) -> Indices:
    """Positions, ascending, of the magnitudes strictly above the `rank`-th largest. 1 <= rank <= len(bits)."""
    positions, keys = candidates(bits, rank)
    chosen: Indices = positions[keys > np.partition(keys, len(keys) - rank)[len(keys) - rank]]
    return chosen


def candidates(bits: Bits, k: int) -> tuple[Indices, Bits]:
    """Positions, ascending, and magnitudes of all entries from some threshold on: at least k of them.

    The threshold is guessed from a sample; a bad guess costs time and changes nothing.
    """
    n, digits = len(bits), np.iinfo(bits.dtype).max
    if n >= 2 * SAMPLE and 4 * k <= n:
        sample = bits[:: n // SAMPLE] & digits
        expected = k / n * len(sample)
        rank = min(len(sample), int(1.1 * expected + 4 * expected**0.5 + 8))
        positions = reaching(bits, np.partition(sample, len(sample) - rank)[len(sample) - rank])
        if len(positions) >= k:
            return positions, bits[positions] & digits
    return np.arange(n), bits & digits


def reaching(bits: Bits, threshold: np.signedinteger[Any]) -> Indices:
    """Positions of the magnitudes of at least `threshold`, a piece at a time so that temporaries stay in the cache."""
    digits = np.iinfo(bits.dtype).max
    found = [np.flatnonzero(bits[at : at + PIECE] & digits >= threshold) + at for at in range(0, len(bits), PIECE)]
    return np.concatenate(found)
