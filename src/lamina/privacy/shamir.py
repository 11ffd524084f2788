"""Shamir's secret sharing: n points of a polynomial whose value at 0 is the secret; t of them are enough, t - 1 say
nothing: through any t - 1 points and any secret at all there is exactly one polynomial.

Shamir, *How to share a secret*, Communications of the ACM 22 (1979). Over the integers mod the first prime above 2^256,
so that a secret of 32 bytes is one element, and a share 33 bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

PRIME = 2**256 + 297
SECRET, SHARE = 32, 33  # bytes


def split(secret: bytes, points: Iterable[int], threshold: int) -> dict[int, bytes]:
    """A share for every point.

    Args:
        secret: 32 bytes.
        points: distinct whole numbers, 1 to 2^32.
        threshold: shares that are enough to have the secret, 1 to the number of points.
    """
    at = list(points)
    if len(secret) != SECRET or len({*at}) != len(at) or not all(0 < x <= 1 << 32 for x in at):
        raise ValueError(f"a secret of {len(secret)} bytes at points {at}")
    if not 1 <= threshold <= len(at):
        raise ValueError(f"threshold={threshold}: expected 1 to {len(at)}")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {x: _value(coefficients, x).to_bytes(SHARE, "big") for x in at}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of as many shares as the threshold was, or more.

    Raises ValueError for shares that belong to no secret: fewer than the threshold almost always do.
    """
    points = {x: int.from_bytes(y, "big") for x, y in shares.items()}
    if any(y >= PRIME for y in points.values()):
        raise ValueError("a share is no element of the field")
    secret = 0
    for x, y in points.items():
        above, below = 1, 1
        for other in points:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        secret = (secret + y * above * pow(below, -1, PRIME)) % PRIME
    if secret >> 8 * SECRET:
        raise ValueError("these shares belong to no secret: too few, or one is damaged")
    return secret.to_bytes(SECRET, "big")


def _value(coefficients: list[int], x: int) -> int:
    made = 0
    for c in reversed(coefficients):
        made = (made * x + c) % PRIME
    return made
