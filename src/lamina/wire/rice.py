"""Positions as runs: how many entries are skipped before each one listed (Golomb's code, without its parameter).

A **segment** is C consecutive entries of which k travel; both ends know C and k, and everything else follows. Listed
are the c = min(k, C - k) entries that are fewer: those that travel if 2k <= C, else those that do not. Per entry::

    gap         entries between it and the one listed before it, or the start of the segment
    divisor     d = ((2C - c) * 45426 + c * 65536) div (c * 131072): ln 2 (C/c - 1/2), rounded (45426/65536 = ln 2)
    width       w = floor(log2 d);  short = 2**(w+1) - d
    quotient    gap div d, unary: that many zeros, then a one
    remainder   rest = gap mod d: below short in w bits; else rest + short in w + 1 bits, the lowest of them apart

A **body** is all quotients, then for w = 1, 2, ... the w bits of the entries whose segment has that width, then the
lowest bits of the long remainders; each part fills whole bytes and is absent when empty. No length is written: the
unary part ends with the byte of its last one. ``numbers of w bits``: floor(w/8) planes, the lowest byte of each number
first, then a string of the w mod 8 bits left of each.

Example: C = 24 and the k = 5 entries 1 4 5 9 20. c = 5; d = (43 * 45426 + 5 * 65536) div (5 * 131072) = 3, so w = 1 and
short = 1. Gaps 1 2 0 3 10, quotients 0 0 0 1 3, rests 1 2 0 0 1. Unary 1 1 1 01 0001 is 17 01. Rests from 1 on become
2 3 . . 2, so the bits are 1 1 0 0 1 = 13 and the lowest bits apart 0 1 0 = 02. Section: 05 17 01 13 02.

Why not powers of two alone (Rice's code): for k of n positions at random it costs up to 1.9 % more than log2 C(n, k) at
k/n < 0.05, 2.2 at 0.1, 2.7 at 0.2 and 3.4 at 0.3; this code 0.6, 0.8, 1.3 and 1.5 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lamina.errors import WireError
from lamina.wire import planes
from lamina.wire.container import Indices, Reader, pack_bits, unpack_bits, uv

Numbers: TypeAlias = NDArray[np.signedinteger[Any]]
Rows: TypeAlias = Callable[[int], Indices]
"""Entries of each row of tensor i that has any, as in `index.Extent`."""

MOST_LOW = 19  # low bits of a count


class Cut(NamedTuple):
    """Per segment: how many entries are listed and how their gaps are divided."""

    turned: NDArray[np.bool_]  # those that do not travel are listed
    listed: Indices
    divisor: Indices
    width: Indices
    short: Indices


def cut(lengths: Indices, counts: Indices) -> Cut:
    listed = np.minimum(counts, lengths - counts)
    some = np.maximum(listed, 1)
    divisor = np.maximum(((2 * lengths - listed) * 45426 + listed * 65536) // (some * 131072), 1)
    width = np.frexp(divisor.astype(np.float64))[1].astype(np.int64) - 1
    return Cut(2 * counts > lengths, listed, divisor, width, (2 << width) - divisor)


class Runs(NamedTuple):
    """Per listed entry: what is written of its gap."""

    cut: Cut
    quotients: NDArray[np.int32]
    rests: NDArray[np.int32]
    long: NDArray[np.bool_]

    @property
    def size(self) -> int:
        """Length of the body."""
        lows = sum(packed_size(int(self.cut.listed[of].sum()), w) for w, of in of_width(self.cut))
        ones = bytes_of(len(self.quotients) + int(self.quotients.sum(dtype=np.int64)))
        return ones + lows + bytes_of(int(np.count_nonzero(self.long)))

    def bits(self) -> Indices:
        """Bits of each segment."""
        before = np.concatenate(([0], np.cumsum(self.quotients + self.long, dtype=np.int64)))
        ends = np.cumsum(self.cut.listed)
        bits: Indices = before[ends] - before[ends - self.cut.listed] + self.cut.listed * (1 + self.cut.width)
        return bits

    def write(self) -> bytes:
        coded = self.rests + np.repeat(self.cut.short.astype(np.int32), self.cut.listed) * self.long
        lows = coded >> self.long
        parts = [write_unary(self.quotients)]
        parts += [pack(lows[np.repeat(of, self.cut.listed)], w) for w, of in of_width(self.cut)]
        return b"".join([*parts, pack_bits(coded[self.long] & 1 == 1)])


def of_width(c: Cut) -> list[tuple[int, NDArray[np.bool_]]]:
    """The widths above 0 that occur, ascending, and which segments have each."""
    return [(w, c.width == w) for w in np.unique(c.width[c.listed > 0]).tolist() if w > 0]


def measure(positions: Indices, lengths: Indices, counts: Indices) -> Runs:
    """The runs of ascending `positions`, `counts` of them in each segment."""
    c = cut(lengths, counts)
    listed = turn(positions, lengths, counts, c.turned)
    some = c.listed > 0
    firsts, starts = (np.cumsum(c.listed) - c.listed)[some], (np.cumsum(lengths) - lengths)[some]
    gaps = (np.diff(listed, prepend=-1) - 1).astype(np.int32)
    gaps[firsts] = listed[firsts] - starts
    # In 32 bits, since a gap stays below its segment's length; exact, since a/b of such numbers is either an integer or
    # further from the next one than a float64 rounds.
    quotients = (gaps / np.repeat(c.divisor.astype(np.float64), c.listed)).astype(np.int32)
    rests = gaps - quotients * np.repeat(c.divisor.astype(np.int32), c.listed)
    return Runs(c, quotients, rests, rests >= np.repeat(c.short.astype(np.int32), c.listed))


def read_body(reader: Reader, lengths: Indices, counts: Indices) -> Indices:
    """The positions of a body, `counts` of them in each segment."""
    c = cut(lengths, counts)
    some = c.listed > 0
    most = (lengths - c.listed) // c.divisor
    quotients = read_unary(reader, int(c.listed.sum()), int(most[some].sum()), "runs")
    if bool(np.any(quotients > np.repeat(most, c.listed))):
        raise WireError("a run is longer than its segment", code="E345")
    rests = np.zeros(len(quotients), np.int64)
    for w, of in of_width(c):
        rests[np.repeat(of, c.listed)] = unpack(reader, int(c.listed[of].sum()), w, "runs")
    short = np.repeat(c.short, c.listed)
    long = np.flatnonzero(rests >= short)
    last = unpack_bits(reader.take(bytes_of(len(long)), "runs"), len(long), "runs")
    rests[long] = 2 * rests[long] + last - short[long]
    # No overflow: at most 2**30 steps, none longer than two segments of at most 2**31.
    ends = np.cumsum(quotients * np.repeat(c.divisor, c.listed) + rests + 1)
    upto = np.concatenate(([0], ends))[np.cumsum(c.listed)]
    before = np.concatenate(([0], upto[:-1]))[: len(upto)]
    if bool(np.any(upto - before > lengths)):
        raise WireError("a position behind the end of its segment", code="E345")
    starts = np.cumsum(lengths) - lengths
    return turn(ends - 1 + np.repeat(starts - before, c.listed), lengths, c.listed, c.turned)


def turn(positions: Indices, lengths: Indices, counts: Indices, turned: NDArray[np.bool_]) -> Indices:
    """The positions with those of the segments in `turned` replaced by the others of these segments."""
    if not turned.any():
        return positions
    stretch, others = lengths[turned], np.where(turned, lengths - counts, counts)
    shift = (np.cumsum(lengths) - lengths)[turned] - (np.cumsum(stretch) - stretch)  # back from these segments alone
    here, there = np.repeat(turned, counts), np.repeat(turned, others)
    left = np.ones(int(stretch.sum()), np.bool_)
    left[positions[here] - np.repeat(shift, counts[turned])] = False
    out = np.empty(len(there), np.int64)
    out[there] = np.flatnonzero(left) + np.repeat(shift, others[turned])
    out[~there] = positions[~here]
    return out


class Mixed(NamedTuple):
    """A section with one segment per tensor, or one per row where that is shorter."""

    by_row: NDArray[np.bool_]
    heads: list[bytes]  # per tensor: its count, or the counts of its rows
    runs: Runs

    @property
    def size(self) -> int:
        return bytes_of(len(self.heads)) + sum(map(len, self.heads)) + self.runs.size

    def write(self) -> bytes:
        return b"".join([pack_bits(self.by_row), *self.heads, self.runs.write()])


def mix(positions: Indices, lengths: Sequence[int], rows: Rows) -> Mixed:
    """Each tensor as a whole or row by row, whichever takes fewer bits."""
    sizes = np.array(lengths, np.int64)
    counts = np.diff(np.searchsorted(positions, np.cumsum(sizes)), prepend=0)
    heads = [uv(count) for count in counts.tolist()]
    whole = measure(positions, sizes, counts)
    bits = whole.bits() + 8 * np.array([len(head) for head in heads], np.int64)
    # A row costs a bit at least: where that alone is too much, its counts need not be looked at.
    tried = {i: rows(i) for i in np.flatnonzero(counts).tolist()}
    tried = {i: r for i, r in tried.items() if 1 < len(r) < bits[i]}
    by_row = np.zeros(len(sizes), np.bool_)
    if tried:
        by_row[list(tried)] = True
        inside, ranges, of_rows = by_rows(positions, counts, by_row, sizes, list(tried.values()))
        firsts = np.cumsum([0, *map(len, tried.values())])
        cost = np.add.reduceat(measure(inside, ranges, of_rows).bits(), firsts[:-1])
        for at, i in enumerate(tried):
            part = of_rows[firsts[at] : firsts[at + 1]]
            low, size = best_low(part)
            by_row[i] = 8 * size + cost[at] < bits[i]
            if by_row[i]:
                heads[i] = write_counts(part, low)
    if not by_row.any():
        return Mixed(by_row, heads, whole)
    segments = [tried[i] if one else sizes[i : i + 1] for i, one in enumerate(by_row.tolist())]
    stops = np.cumsum(np.concatenate(segments))
    named = np.diff(np.searchsorted(positions, stops), prepend=0)
    return Mixed(by_row, heads, measure(positions, np.concatenate(segments), named))


def by_rows(
    positions: Indices, counts: Indices, chosen: NDArray[np.bool_], sizes: Indices, rows: Sequence[Indices]
) -> tuple[Indices, Indices, Indices]:
    """The positions within the chosen tensors as if there were no others, their rows, and the positions per row."""
    shift = np.cumsum(np.where(chosen, 0, sizes))
    inside = (positions - np.repeat(shift, counts))[np.repeat(chosen, counts)]
    lengths = np.concatenate(rows)
    return inside, lengths, np.diff(np.searchsorted(inside, np.cumsum(lengths)), prepend=0)


def read_mixed(reader: Reader, k: int, lengths: Sequence[int], rows: Rows) -> tuple[Indices, list[int]]:
    """The positions of a mixed section, and the bytes of each tensor's head."""
    by_row = unpack_bits(reader.take(bytes_of(len(lengths)), "modes"), len(lengths), "modes").tolist()
    segments, counts, heads, left = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [], k
    for i, length in enumerate(lengths):
        start = reader.at
        if by_row[i]:
            segments.append(rows(i))
            counts.append(read_counts(reader, segments[-1], most=min(length, left)))
        else:
            segments.append(np.array([length], np.int64))
            counts.append(np.array([reader.uv("count of a tensor", most=min(length, left))], np.int64))
        heads.append(reader.at - start)
        left -= int(counts[-1].sum())
    if left:
        raise WireError(f"counts of {k - left} entries declared {k}", code="E345")
    return read_body(reader, np.concatenate(segments), np.concatenate(counts)), heads


# The counts of a tensor's rows: u8 number of low bits, unary of the high bits, low bits.


def best_low(counts: Indices) -> tuple[int, int]:
    """The number of low bits that gives the fewest bytes, and these."""
    most = min(MOST_LOW, int(counts.max()).bit_length())
    high = (counts >> np.arange(most + 1)[:, None]).sum(axis=1).tolist()
    sizes = [1 + bytes_of(len(counts) + bits) + packed_size(len(counts), low) for low, bits in enumerate(high)]
    return sizes.index(min(sizes)), min(sizes)


def write_counts(counts: Indices, low: int) -> bytes:
    return bytes([low]) + write_unary(counts >> low) + pack(counts & ((1 << low) - 1), low)


def read_counts(reader: Reader, lengths: Indices, most: int) -> Indices:
    """How many of each row travel, at most its length and together at most `most`."""
    if len(lengths) < 2:
        raise WireError("counts by row of a tensor without rows", code="E345")
    counts = read_numbers(reader, len(lengths), most, "counts")
    if bool(np.any(counts > lengths)) or int(counts.sum()) > most:
        raise WireError(f"counts of a row or of all above {most} or their lengths", code="E345")
    return counts


def read_numbers(reader: Reader, count: int, most: int, what: str) -> Indices:
    """`count` numbers of `write_counts`, which together are at most `most`: looks no further than they could reach."""
    low = reader.take(1, what)[0]
    if low > MOST_LOW:
        raise WireError(f"{what} of {low} low bits, expected at most {MOST_LOW}", code="E345")
    high = read_unary(reader, count, most >> low, what)
    return high << low | unpack(reader, count, low, what)


# Unary numbers and numbers of a fixed number of bits.


def bytes_of(bits: int) -> int:
    return (bits + 7) // 8


def write_unary(numbers: Numbers) -> bytes:
    """Each number as that many zeros and a one."""
    ones = np.cumsum(numbers + 1, dtype=np.int64)
    bits = np.zeros(int(ones[-1]) if len(ones) else 0, np.bool_)
    bits[ones - 1] = True
    return pack_bits(bits)


def read_unary(reader: Reader, count: int, most: int, what: str) -> Indices:
    """`count` numbers whose sum is at most `most`: looks no further than they could reach."""
    if count == 0:
        return np.empty(0, np.int64)
    window = min(reader.left, bytes_of(count + most))
    bits = np.unpackbits(np.frombuffer(reader.buffer, np.uint8, window, reader.at), bitorder="little")
    ones = np.flatnonzero(bits)
    if len(ones) < count:
        raise WireError(f"{what}: {len(ones)} of {count} numbers in the {window} bytes there can be", code="E345")
    end = int(ones[count - 1])
    reader.take(bytes_of(end + 1), what)
    if len(ones) > count and ones[count] < 8 * bytes_of(end + 1):
        raise WireError(f"{what}: padding bits are not zero", code="E345")
    numbers: Indices = np.diff(ones[:count], prepend=-1) - 1
    return numbers


def packed_size(count: int, width: int) -> int:
    """Length of `count` numbers of `width` bits."""
    return count * (width // 8) + bytes_of(count * (width % 8))


def pack(numbers: Numbers, width: int) -> bytes:
    """Numbers of `width` bits: planes of whole bytes, lowest first, then the bits left of each as one string."""
    parts = [(numbers >> 8 * place).astype(np.uint8) for place in range(width // 8)]
    rest = width % 8
    if rest:
        parts.append(planes.pack((numbers >> (width - rest)).astype(np.uint8), rest))
    return b"".join(part.tobytes() for part in parts)


def unpack(reader: Reader, count: int, width: int, what: str) -> Indices:
    """Inverse of `pack`."""
    numbers = np.zeros(count, np.int64)
    for place in range(width // 8):
        numbers |= np.frombuffer(reader.take(count, what), np.uint8).astype(np.int64) << 8 * place
    rest = width % 8
    if rest:
        high = planes.unpack(reader.take(bytes_of(count * rest), what), count, rest, what)
        numbers |= high.astype(np.int64) << (width - rest)
    return numbers
