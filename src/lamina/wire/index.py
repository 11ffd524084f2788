"""Index codings: which entries of the flat vector of n kept entries travel. The positions ascend.

====  ============  ====================================================================================
 id   name          section
====  ============  ====================================================================================
  0   dense         empty: all of them
  1   mask id       8 bytes, id of a mask both ends hold: all of its entries
  2   bitmap        uv k; ceil(n/8) bytes
  3   RR-flat       uv k; a body over one segment of n entries (`lamina.wire.rice`)
  4   RR-mixed      uv k; ceil(T/8) bytes, bit t = by row; per tensor present: uv k_t, or the counts of its rows;
                    a body over a segment per tensor, or per row of it
  5   gaps          uv k; if k > 0: uv L; a zstd frame of the k gaps in LEB128 (first position, then distance - 1)
  6   bitmap+zstd   uv k; uv L; a zstd frame of the ceil(n/8) bytes of the bitmap
  8   drawn         uv k; u64 seed: the positions are `draw(n, k, seed)`
 10   enumerated    uv k; the counts of blocks of 1024 entries, and which of the sets of so many they are; n is at most
                    65,536 (`lamina.wire.enumerated`)
====  ============  ====================================================================================

Rows are those along the first dimension; under a mask the kept entries of each row that keeps any, so that a pruned row
costs nothing and both ends count alike. A tensor of fewer than two dimensions has none.

A further coding is a row here, a branch of `read`, and a candidate in `choose`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.errors import WireError
from lamina.wire import enumerated, rice
from lamina.wire.container import Indices, Reader, compress, decompress, pack_bits, refuse, share, unpack_bits, uv

DENSE, MASK_ID, BITMAP, FLAT, MIXED, GAPS, SQUEEZED, DRAWN, ENUMERATED = 0, 1, 2, 3, 4, 5, 6, 8, 10
CHOSEN = frozenset({BITMAP, FLAT, MIXED, GAPS, SQUEEZED, ENUMERATED})  # what `choose` takes when something is left out
SPARSE = CHOSEN | {DRAWN}
LONGEST = 1 << 31  # entries a sparse message may range over: keeps gaps in 5 bytes and their sums in 63 bits


@dataclass(frozen=True)
class Extent:
    """What the positions range over: kept entries, tensor by tensor and row by row.

    Args:
        lengths: entries of each tensor.
        rows: i -> entries of each row of tensor i that has any; all of them as one row if it has no rows.
    """

    lengths: Sequence[int]
    rows: rice.Rows

    @property
    def total(self) -> int:
        return sum(self.lengths)


class Section(NamedTuple):
    """An index section of known size: its id, how to write it, and how many bytes are each tensor's own (none: of no
    tensor)."""

    size: int
    id: int
    write: Callable[[], bytes]
    own: Sequence[int] = ()

    @staticmethod
    def of(id: int, body: bytes) -> Section:
        """One that has been written already."""
        return Section(len(body), id, lambda: body)


class Found(NamedTuple):
    """What a section said: the positions, and how many of its bytes are each tensor's own."""

    positions: Indices
    own: Sequence[int] = ()


def choose(positions: Indices, extent: Extent) -> Section:
    """The smallest coding, the lowest id of equal ones; dense when nothing is left out.

    Those of a known size are compared by it and none is written here. zstd, whose size shows when it is done, is tried
    where it may pay (`worth_squeezing`), and the slowest is left out where it does not (`worth_enumerating`).
    """
    n, k = extent.total, len(positions)
    if k == n:
        return Section.of(DENSE, b"")
    refuse(n > LONGEST, f"sparse message over {n} entries: at most {LONGEST}")
    quick = candidates(positions, extent)
    best = min(quick, key=by_size)
    others = []
    if worth_squeezing(n, k, best.size):
        if DENSEST * k <= n:
            others.append(Section.of(GAPS, write_gaps(positions)))
        if SPARSEST * k > n or (k <= FEW and SPARSEST_OF_FEW * k > n):
            others.append(Section.of(SQUEEZED, write_squeezed(positions, n)))
    if n <= enumerated.LONGEST:
        slowest = enumerate_sets(positions, n)
        others += [slowest] * worth_enumerating(slowest.size, best.size)
    smallest = min([best, *others], key=by_size)
    even = n < DENSEST * k < (DENSEST - 1) * n  # a share that a bitmap is made for
    if even and n > enumerated.LONGEST and 8 * smallest.size > 1.02 * log2_choose(n, k):
        thorough = Section.of(SQUEEZED, write_squeezed(positions, n, thorough=True))
        smallest = min([smallest, thorough], key=by_size)
    return smallest


def by_size(section: Section) -> tuple[int, int]:
    return section.size, section.id


def candidates(positions: Indices, extent: Extent) -> list[Section]:
    """The codings whose sizes have a closed form and which are quick."""
    n, k = extent.total, len(positions)
    count = uv(k)
    flat = rice.measure(positions, np.array([n]), np.array([k]))
    mixed = rice.mix(positions, extent.lengths, extent.rows)
    return [
        Section(len(count) + (n + 7) // 8, BITMAP, partial(write_bitmap, positions, n)),
        Section(len(count) + flat.size, FLAT, lambda: count + flat.write()),
        Section(len(count) + mixed.size, MIXED, lambda: count + mixed.write(), [len(head) for head in mixed.heads]),
    ]


DENSEST = 4  # above a share of 1/4 gaps take twice the bytes of the bitmap before either is squeezed
FEW = 1 << 12  # positions that zstd goes through in no time
SPARSEST = 1 << 6  # below this share a bitmap takes longer to go through than the gaps, and squeezes no better ...
SPARSEST_OF_FEW = 1 << 10  # ... but for few positions in runs


def worth_squeezing(n: int, k: int, size: int) -> bool:
    """Whether to try zstd: few positions, many, or fewer bytes already than positions at random take."""
    return k <= FEW or 20 * k > n or 8 * size < 0.97 * log2_choose(n, k)


def enumerate_sets(positions: Indices, n: int) -> Section:
    """The coding by the numbers of sets."""
    refuse(n > enumerated.LONGEST, f"enumerated positions of {n} entries: at most {enumerated.LONGEST}")
    count, blocks = uv(len(positions)), enumerated.divide(positions, n)
    return Section(len(count) + blocks.size, ENUMERATED, lambda: count + blocks.write())


def worth_enumerating(size: int, best: int) -> bool:
    """Whether `size` bytes save half a percent of the best of those that take no time in comparison."""
    return 200 * size <= 199 * best


def log2_choose(n: int, k: int) -> float:
    """log2 of the number of sets of k out of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def read(id: int, reader: Reader, extent: Extent) -> Found:
    """The positions of a sparse section."""
    n = extent.total
    if n > LONGEST:
        raise WireError(f"sparse message over {n} entries: at most {LONGEST}", code="E345")
    k = reader.uv("index count", most=n)
    if id == BITMAP:
        return Found(read_bitmap(reader.take((n + 7) // 8, "bitmap"), k, n))
    if id == FLAT:
        return Found(rice.read_body(reader, np.array([n]), np.array([k])))
    if id == MIXED:
        return Found(*rice.read_mixed(reader, k, extent.lengths, extent.rows))
    if id == GAPS:
        return Found(read_gaps(reader, k, n))
    if id == SQUEEZED:
        return Found(read_squeezed(reader, k, n))
    if id == ENUMERATED:
        return Found(enumerated.read_blocks(reader, k, n))
    if id == DRAWN:
        return Found(draw(n, k, int.from_bytes(reader.take(8, "index seed"), "little")))
    raise WireError(f"index id {id} unknown", code="E344")


def split(id: int, size: int, own: Sequence[int], counts: list[int], lengths: list[int]) -> list[int]:
    """Bytes of the section per tensor: its own, and its share of the rest.

    A bitmap is shared by the entries it ranges over, runs and gaps by the entries they name.
    """
    if id not in CHOSEN:
        return [0 for _ in counts]
    shares = share(size - sum(own), lengths if id in (BITMAP, SQUEEZED) else counts)
    return [a + b for a, b in zip(own, shares, strict=True)] if own else shares


def write_bitmap(positions: Indices, n: int) -> bytes:
    return uv(len(positions)) + bitmap(positions, n)


def bitmap(positions: Indices, n: int) -> bytes:
    bits = np.zeros(n, np.bool_)
    bits[positions] = True
    return pack_bits(bits)


def read_bitmap(view: memoryview, k: int, n: int) -> Indices:
    bits = unpack_bits(view, n, "bitmap")
    if int(np.count_nonzero(bits)) != k:
        raise WireError(f"bitmap of {int(np.count_nonzero(bits))} entries declared {k}", code="E345")
    return np.flatnonzero(bits)


def write_squeezed(positions: Indices, n: int, thorough: bool = False) -> bytes:
    frame = compress(np.frombuffer(bitmap(positions, n), np.uint8), thorough)
    return uv(len(positions)) + uv(len(frame)) + frame


def read_squeezed(reader: Reader, k: int, n: int) -> Indices:
    size = (n + 7) // 8
    frame = reader.take(reader.uv("bitmap length", most=reader.left), "bitmap")
    return read_bitmap(decompress(frame, size, size, "bitmap").data, k, n)


def write_gaps(positions: Indices) -> bytes:
    if len(positions) == 0:
        return uv(0)
    frame = compress(leb128(np.diff(positions, prepend=-1) - 1))
    return uv(len(positions)) + uv(len(frame)) + frame


def read_gaps(reader: Reader, k: int, n: int) -> Indices:
    if k == 0:
        return np.empty(0, np.int64)
    frame = reader.take(reader.uv("gaps length", most=reader.left), "gaps")
    gaps = unleb128(decompress(frame, k, 5 * k, "gaps"), k)
    if int(gaps.max()) >= n:
        raise WireError(f"gap of {int(gaps.max())} in a vector of {n}", code="E345")
    positions = np.cumsum(gaps + 1) - 1
    if int(positions[-1]) >= n:
        raise WireError(f"position {int(positions[-1])} in a vector of {n}", code="E345")
    return positions


def leb128(numbers: Indices) -> NDArray[np.uint8]:
    """Numbers below 2**35 as unsigned LEB128, one after the other."""
    if int(numbers.max(initial=0)) < 0x80:
        return numbers.astype(np.uint8)
    lengths = np.ones(len(numbers), np.int64)
    for place in range(1, 5):
        lengths += numbers >= 1 << (7 * place)
    starts = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), np.uint8)
    for place in range(int(lengths.max(initial=0))):
        some = lengths > place
        more = np.where(lengths[some] > place + 1, 0x80, 0)
        out[starts[some] + place] = (numbers[some] >> (7 * place)) & 0x7F | more
    return out


def unleb128(raw: NDArray[np.uint8], k: int) -> Indices:
    """Exactly `k` numbers of at most 5 bytes each and of minimal length."""
    ends = np.flatnonzero(raw < 0x80)
    if len(ends) != k or ends[-1] != len(raw) - 1:
        raise WireError(f"{len(ends)} gaps, expected {k}", code="E345")
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if int(lengths.max()) > 5 or bool(np.any((raw[ends] == 0) & (lengths > 1))):
        raise WireError("gap longer than it needs to be", code="E345")
    numbers = np.zeros(k, np.int64)
    for place in range(int(lengths.max())):
        some = np.flatnonzero(lengths > place)
        numbers[some] |= (raw[starts[some] + place].astype(np.int64) & 0x7F) << (7 * place)
    return numbers


def draw(n: int, k: int, seed: int) -> Indices:
    """k of n positions, uniformly without replacement, as a function of the seed.

    With g = ``torch.Generator().manual_seed(seed)``: draw as many words ``torch.randint(0, 2**62, generator=g)`` as
    positions are missing, mark the positions word mod n, and repeat until k are marked. If 2k > n, the n - k positions
    left out are drawn instead. (A word is two outputs of MT19937 seeded with the low 32 bits of the seed, the first
    one high, mod 2**62: the same in every version of torch that lamina supports, and outside of it.)
    """
    words = torch.Generator().manual_seed(seed)
    wanted = min(k, n - k)
    marked = np.zeros(n, np.bool_)
    missing = wanted
    while missing:
        drawn = torch.randint(0, 1 << 62, (missing,), generator=words).numpy()
        marked[drawn % n] = True
        missing = wanted - int(np.count_nonzero(marked))
    return np.flatnonzero(marked if wanted == k else ~marked)


def mask_id(masks: Iterable[tuple[str, NDArray[np.bool_]]]) -> bytes:
    """BLAKE2b-64 of "FLC1-mask" and, per masked tensor in schema order: uv length, name, uv entries, packed bits."""
    digest = hashlib.blake2b(b"FLC1-mask", digest_size=8)
    for name, bits in masks:
        text = name.encode()
        digest.update(uv(len(text)) + text + uv(len(bits)) + pack_bits(bits))
    return digest.digest()
