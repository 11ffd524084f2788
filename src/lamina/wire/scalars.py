"""Numbers beside a tree, flag SCALARS: ``uv L``, then L bytes of pairs ``u8 key, float64``, ascending by key.

What a key means is the callers' affair. Numbers with names travel in a frame (`lamina.wire.frame`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from lamina.errors import WireError, expect
from lamina.wire.container import Reader, uv, uv_size

PAIR = struct.Struct("<Bd")
MOST = 64
EXACT = 1 << 53  # whole numbers up to here are float64


def check(scalars: Mapping[int, float]) -> None:
    """ConfigError for what cannot travel."""
    expect(len(scalars) <= MOST, f"{len(scalars)} scalars: expected at most {MOST}", remedy="send them as a tensor")
    for key, number in scalars.items():
        whole = isinstance(key, int) and not isinstance(key, bool)
        expect(whole and 0 <= key < 256, f"scalar {key!r}: expected a whole number from 0 to 255 as its key")
        small = isinstance(number, int) and not isinstance(number, bool) and abs(number) <= EXACT
        message = f"scalar {key}={number!r}: expected a float, or a whole number of at most 2**53"
        expect(isinstance(number, float) or small, message)


def write(scalars: Mapping[int, float]) -> bytes:
    body = b"".join(PAIR.pack(key, scalars[key]) for key in sorted(scalars))
    return uv(len(body)) + body


def size(scalars: Mapping[int, float]) -> int:
    """len(write(scalars))"""
    return uv_size(PAIR.size * len(scalars)) + PAIR.size * len(scalars)


def read(reader: Reader) -> dict[int, float]:
    length = reader.uv("scalars length", most=PAIR.size * MOST)
    if length % PAIR.size:
        raise WireError(f"scalars of {length} bytes, expected a multiple of {PAIR.size}", code="E345")
    found: dict[int, float] = {}
    last = -1
    for key, number in PAIR.iter_unpack(reader.take(length, "scalars")):
        if key <= last:
            raise WireError(f"scalar {key} behind {last}, expected ascending keys", code="E345")
        found[key] = number
        last = key
    return found
