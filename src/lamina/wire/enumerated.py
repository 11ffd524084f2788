"""Positions by number: which of the C(L, c) sets of c of L entries they are, block by block.

The n entries are cut into blocks of `BLOCK`; the last one is what is left. Per block, in which c of L entries travel::

    rank        C(p_1, 1) + C(p_2, 2) + ... + C(p_c, c) for the positions p_1 < p_2 < ... < p_c within the block:
                below C(L, c), and another one for every set
    width       ceil(log2 C(L, c)) bits: none where nothing or everything travels

A section is the counts of all blocks but the last, whose count is what is left of k, then the ranks one after the other
as one string of bits. A count is written as what it differs from k * BLOCK div n, zig-zag (0, -1, 1, -2 are 0, 1, 2,
3), and these as the counts of rows are (`rice.write_counts`); a single block has none.

Example: n = 1030, positions 3 and 1027. Expected are 2 * 1024 div 1030 = 1, the first block has 1: difference 0, low 0,
unary 1. Rank C(3, 1) = 3 of C(1024, 1) in 10 bits, then C(3, 1) = 3 of C(6, 1) in 3 bits: 3 + (3 << 10) = 0c03.
Section: 02 00 01 03 0c.

Per block a count and what rounding up adds, two bits or so, are lost beyond log2 C(n, k): 0.2 % of 1024 positions at
random. No other coding comes as near where a third to half of few entries travel. It is the slowest, though: a step of
arithmetic on a number of up to 1024 bits for every entry, 10 to 20 ms for the most entries there may be.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lamina.errors import WireError
from lamina.wire import rice
from lamina.wire.container import Indices, Reader

BLOCK = 1 << 10  # twice as many save 0.05 % and take 1.5 times as long, half as many lose 0.15 %
LONGEST = 1 << 16  # entries: keeps either end below 50 ms


class Blocks(NamedTuple):
    """Positions by block.

    Args:
        positions: of all blocks, counted from the first entry.
        lengths: entries of each block.
        counts: how many of them travel.
    """

    positions: Indices
    lengths: list[int]
    counts: list[int]

    @property
    def differences(self) -> Indices:
        """Of the counts of all blocks but the last from what is expected, zig-zag."""
        off = np.array(self.counts[:-1], np.int64) - expected(sum(self.counts), sum(self.lengths))
        return np.where(off < 0, -2 * off - 1, 2 * off)

    @property
    def bits(self) -> int:
        """Of the ranks."""
        return sum(map(width, self.lengths, self.counts))

    @property
    def size(self) -> int:
        """Length of the section behind k."""
        head = rice.best_low(self.differences)[1] if len(self.counts) > 1 else 0
        return head + rice.bytes_of(self.bits)

    def write(self) -> bytes:
        differences = self.differences
        head = rice.write_counts(differences, rice.best_low(differences)[0]) if len(differences) else b""
        joined, at = 0, 0
        starts = np.cumsum([0, *self.counts])
        for i, (length, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            joined |= rank((self.positions[starts[i] : starts[i + 1]] - i * BLOCK).tolist(), length) << at
            at += width(length, count)
        return head + joined.to_bytes(rice.bytes_of(at), "little")


def divide(positions: Indices, n: int) -> Blocks:
    lengths = lengths_of(n)
    return Blocks(positions, lengths, np.bincount(positions // BLOCK, minlength=len(lengths)).tolist())


def lengths_of(n: int) -> list[int]:
    """Entries of each block; none has none."""
    return [min(BLOCK, n - start) for start in range(0, n, BLOCK)]


def expected(k: int, n: int) -> int:
    """How many of a block of full length travel if those that travel are anywhere."""
    return k * BLOCK // max(1, n)


@lru_cache(maxsize=4 * BLOCK)
def width(length: int, count: int) -> int:
    """Bits of a rank below C(length, count)."""
    return (math.comb(length, count) - 1).bit_length()


def rank(positions: list[int], length: int) -> int:
    """The number of this set of positions within a block.

    From the last entry down, so that the next binomial is the one before times and by numbers of 10 bits.
    """
    travels = [False] * length
    for p in positions:
        travels[p] = True
    total, c = 0, len(positions)
    p, choices = length - 1, math.comb(max(length - 1, 0), c)  # C(p, c)
    while 0 < c <= p:
        if travels[p]:
            total += choices
            choices = choices * c // p  # C(p - 1, c - 1)
            c -= 1
        else:
            choices = choices * (p - c) // p  # C(p - 1, c)
        p -= 1
    return total  # C(p, c) is 0 for the c entries that are left


def unrank(number: int, length: int, count: int) -> list[int]:
    """The positions, ascending, whose `rank` is `number`, which is below C(length, count)."""
    positions, c = [], count
    p, choices = length - 1, math.comb(max(length - 1, 0), c)
    while 0 < c <= p:
        if number >= choices:
            number -= choices
            positions.append(p)
            choices = choices * c // p
            c -= 1
        else:
            choices = choices * (p - c) // p
        p -= 1
    return [*range(c), *reversed(positions)]


def read_blocks(reader: Reader, k: int, n: int) -> Indices:
    """The k positions of a section, behind k."""
    if n > LONGEST:
        raise WireError(f"enumerated positions of {n} entries: at most {LONGEST}", code="E345")
    lengths = lengths_of(n)
    counts = read_counts(reader, k, lengths)
    bits = sum(map(width, lengths, counts))
    joined = int.from_bytes(reader.take(rice.bytes_of(bits), "ranks"), "little")
    if joined >> bits:
        raise WireError("ranks: padding bits are not zero", code="E345")
    parts = [np.empty(0, np.int64)]
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        wide = width(length, count)
        number = joined & ((1 << wide) - 1)
        joined >>= wide
        if number >= math.comb(length, count):
            raise WireError(f"a rank beyond the sets of {count} of {length} entries", code="E345")
        parts.append(np.array(unrank(number, length, count), np.int64) + i * BLOCK)
    return np.concatenate(parts)


def read_counts(reader: Reader, k: int, lengths: list[int]) -> list[int]:
    """How many of each block travel: at most its length, and k in all."""
    if not lengths:
        return []
    told = len(lengths) - 1
    differences = rice.read_numbers(reader, told, 2 * BLOCK * told, "counts") if told else np.empty(0, np.int64)
    counts = expected(k, sum(lengths)) + np.where(differences % 2, -(differences + 1) // 2, differences // 2)
    every: list[int] = [*counts.tolist(), k - int(counts.sum())]
    if any(not 0 <= count <= length for count, length in zip(every, lengths, strict=True)):
        raise WireError(f"counts of blocks below 0, above their lengths, or that are not {k} in all", code="E345")
    return every
