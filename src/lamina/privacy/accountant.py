"""What a run's noise is worth: Renyi differential privacy of the Gaussian mechanism under Poisson sampling.

    one round, order a > 1:   (a - 1) RDP(a) = log E[ ((1 - q) + q exp((2z - 1) / 2s^2)) ^ a ],   z ~ N(0, s^2)
    rounds:                   RDP adds up
    (epsilon, delta):         epsilon = min over a of  RDP(a) - (log delta + log a) / (a - 1) + log((a - 1) / a)

q is the chance of every client to be drawn, s the noise in units of the clip. Neighbours are two sets of clients of
which one has one more. The expectation is that of Mironov, Talwar & Zhang 2019 (arXiv 1908.10530, theorem 5 and
equation 4: it is the larger of the two directions); the conversion that of Canonne, Kamath & Steinke 2020 (arXiv
2004.00010, proposition 12).

The integral is a trapezoidal sum, which for such a function converges faster than any power of its step: it has no
singularity nearer to the real line than pi s^2, and falls like exp(-z^2 / 2s^2). Terms are added as logarithms. The
binomial sum, which exists for whole a, says the same to 1e-12.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ORDERS: tuple[float, ...] = (
    *(1 + i / 100 for i in range(1, 10)),
    *(1 + i / 10 for i in range(1, 100)),
    *(float(a) for a in range(11, 64)),
    *(float(round(64 * 2 ** (i / 4))) for i in range(25)),  # up to 4096: much noise, few rounds
)
_REACH = 40.0  # standard deviations on either side; what lies outside is below exp(-800)
_FINE = 8.0  # steps in the smaller of the two widths, s and s^2
_LEAST = 0.2  # noise below which sampling is left out: an upper bound, of an epsilon that is no promise anyway


class Made(NamedTuple):
    """So many rounds with this chance of every client to be drawn and this noise."""

    q: float
    noise: float
    rounds: int


def epsilon(made: Iterable[Made], delta: float) -> float:
    """Of all these rounds together; infinite where there is no such number."""
    spent: NDArray[np.float64] = np.zeros(len(ORDERS))
    for one in made:
        spent = spent + one.rounds * curve(one.q, one.noise)
    if not spent.any():
        return 0.0
    a = np.array(ORDERS)
    found = spent - (math.log(delta) + np.log(a)) / (a - 1) + np.log1p(-1 / a)
    return max(0.0, float(found.min()))


@lru_cache(maxsize=256)
def curve(q: float, noise: float) -> NDArray[np.float64]:
    """RDP of one round at every order."""
    made = np.array([rdp(q, noise, order) for order in ORDERS])
    made.flags.writeable = False
    return made


def rdp(q: float, noise: float, order: float) -> float:
    """Of one round, at one order.

    Args:
        q: 0 <= q <= 1.
        noise: standard deviation in units of the clip, > 0.
        order: > 1.
    """
    if q == 0:
        return 0.0
    if q == 1 or noise < _LEAST:
        return order / (2 * noise**2)
    s2 = noise**2
    step = min(noise, s2) / _FINE
    low, high = -_REACH * noise, order + _REACH * noise
    z = np.arange(math.floor(low / step), math.ceil(high / step) + 1) * step
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * s2))
    terms = order * ratio - z**2 / (2 * s2)
    peak = float(terms.max())
    sum_ = math.fsum(np.exp(terms - peak))
    log = peak + math.log(sum_) + math.log(step) - math.log(noise) - math.log(2 * math.pi) / 2
    return max(0.0, log) / (order - 1)


def noise_for(target: float, q: float, rounds: int, delta: float) -> float:
    """The least noise, to a thousandth, with which so many rounds stay within epsilon = target.

    Raises ValueError where no noise up to 1e6 does.
    """
    low, high = 0.0, 1.0
    while epsilon([Made(q, high, rounds)], delta) > target:
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(f"epsilon={target}: no noise is enough for {rounds} rounds")
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon([Made(q, middle, rounds)], delta) <= target else (middle, high)
    return high
