"""Index codings: which entries of the flat vector of n kept entries travel. The positions ascend.

====  ===========  ====================================================================================
 id   name         section
====  ===========  ====================================================================================
  0   dense        empty: all of them
  1   mask id      8 bytes, id of a mask both ends hold: all of its entries
  2   bitmap       uv k; ceil(n/8) bytes
  5   gaps         uv k; if k > 0: uv L; a zstd frame of the k gaps in LEB128 (first position, then distance - 1)
  8   drawn        uv k; u64 seed: the positions are `draw(n, k, seed)`
====  ===========  ====================================================================================

A further coding is a row here, a branch of `read`, and a candidate in `choose`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.errors import WireError
from lamina.wire.container import Indices, Reader, compress, decompress, pack_bits, refuse, share, unpack_bits, uv

DENSE, MASK_ID, BITMAP, GAPS, DRAWN = 0, 1, 2, 5, 8
SPARSE = frozenset({BITMAP, GAPS, DRAWN})
LONGEST = 1 << 31  # entries a sparse message may range over: keeps gaps in 5 bytes and their sums in 63 bits


class Section(NamedTuple):
    """An index section: its id and its bytes."""

    id: int
    body: bytes


def choose(positions: Indices, n: int) -> Section:
    """The smaller of bitmap and gaps, the lower id when equal; dense when nothing is left out."""
    if len(positions) == n:
        return Section(DENSE, b"")
    refuse(n > LONGEST, f"sparse message over {n} entries: at most {LONGEST}")
    gaps = write_gaps(positions)
    bitmap_size = len(uv(len(positions))) + (n + 7) // 8
    return Section(GAPS, gaps) if len(gaps) < bitmap_size else Section(BITMAP, write_bitmap(positions, n))


def read(id: int, reader: Reader, n: int) -> Indices:
    """The positions of a sparse section."""
    if n > LONGEST:
        raise WireError(f"sparse message over {n} entries: at most {LONGEST}", code="E345")
    k = reader.uv("index count", most=n)
    if id == BITMAP:
        return read_bitmap(reader, k, n)
    if id == GAPS:
        return read_gaps(reader, k, n)
    if id == DRAWN:
        return draw(n, k, int.from_bytes(reader.take(8, "index seed"), "little"))
    raise WireError(f"index id {id} unknown", code="E344")


def split(id: int, size: int, counts: list[int], lengths: list[int]) -> list[int]:
    """Bytes of the section per tensor: a bitmap is shared by entries it ranges over, gaps by entries they name."""
    if id in (BITMAP, GAPS):
        return share(size, lengths if id == BITMAP else counts)
    return [0 for _ in counts]


def write_bitmap(positions: Indices, n: int) -> bytes:
    bits = np.zeros(n, np.bool_)
    bits[positions] = True
    return uv(len(positions)) + pack_bits(bits)


def read_bitmap(reader: Reader, k: int, n: int) -> Indices:
    bits = unpack_bits(reader.take((n + 7) // 8, "bitmap"), n, "bitmap")
    positions = np.flatnonzero(bits)
    if len(positions) != k:
        raise WireError(f"bitmap of {len(positions)} entries declared {k}", code="E345")
    return positions


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
