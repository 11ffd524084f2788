"""Numbers as elements of a ring, so that sums of them are exact and can be hidden.

    x -> round(x * weight * 2^f) mod 2^bits,    f the largest with  clients * (limit * 2^f + 1) < 2^(bits - 1)

With |x| <= limit and weight <= 1 no sum of so many clients leaves the range, whoever of them drops out, so the sum of
the elements is the element of the sum.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lamina.errors import ConfigError

Ring = NDArray[np.uint64]  # elements mod 2^bits, in 64 bits each
WIDE = 63  # bits of all that is no update: there are few of them, or their small differences count
_LEAST = 7  # bits that a number of the size of the limit must have


def exponent(bits: int, clients: int, limit: float) -> int:
    """f. Raises ConfigError E123 where numbers of this size would have fewer than 7 bits."""
    room = ((1 << (bits - 1)) - 1) / clients - 1
    f = math.floor(math.log2(room / limit)) if room > 0 else -1024
    if room <= 0 or limit * 2.0**f < 2**_LEAST:
        raise ConfigError(
            f"bits={bits}: sums of {clients} clients with limit={limit:g} leave a number fewer than {_LEAST} bits",
            code="E123",
            where="secure.bits",
            remedy="more bits, or a smaller limit",
        )
    return f


def fits(x: Tensor, limit: float) -> bool:
    """Whether no entry is beyond the limit; NaN is."""
    return not x.numel() or bool((x.abs() <= limit).all())


def to_ring(x: Tensor, weight: float, f: int, bits: int) -> Ring:
    """The entries, flat. They must fit."""
    whole = (x.detach().double() * (weight * 2.0**f)).round().long().reshape(-1)
    return whole.numpy().view(np.uint64) & low(bits)


def from_ring(total: Ring, f: int, bits: int) -> NDArray[np.float64]:
    """The sum that they stand for."""
    return signed(total, bits).astype(np.float64) * 2.0**-f


def signed(total: Ring, bits: int) -> NDArray[np.int64]:
    """Elements as the whole numbers of -2^(bits - 1) to 2^(bits - 1) - 1."""
    shift = np.uint64(64 - bits)
    return (total << shift).view(np.int64) >> shift.view(np.int64)


def low(bits: int) -> np.uint64:
    """A mask of the low bits."""
    return np.uint64((1 << bits) - 1)
