"""Value codings by name and by id, and which of them a section is written in.

====  ==========  =====================================================================================
 id   name        section
====  ==========  =====================================================================================
  0   fp32        4k bytes
  1   lossless    4 planes of the bits rotated left by one (the sign last); under flag REF instead of
                  the zig-zag distance to a reference both ends hold
  3   fp16        2 planes of the nearest fp16
  4   bf16        2 planes of the nearest bf16, rotated left by one
  5   int8        per tensor ceil(k_t/256) fp32 scales; then one plane of int8
  6   sign        one fp32 scale per tensor with k_t > 0; then ceil(k/8) bits, 1 = non-negative
  7   none        empty (a mask alone)
  8   ring:B      u8 B; then the low B bits of int64: B div 8 raw bytes planes, B mod 8 bits packed
  9   int4        per tensor ceil(k_t/64) fp32 scales; then one plane of packed 4-bit codes
128   own         each tensor raw in its own dtype, bool as ceil(k_t/8) bytes of bits
====  ==========  =====================================================================================

fp16, bf16, int8 and int4 write raw planes, so that their size follows from shapes alone; any plane may be read
compressed. ``fp32`` and ``lossless`` are exact and leave trees with other dtypes than float32 to ``own``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from lamina.wire.coding import FLOATING, Coding, Dtypes, Vectors
from lamina.wire.container import Buffer
from lamina.wire.exact import Distance, Lossless, Nothing, Own, Ring
from lamina.wire.lossy import Half, Scaled, Sign

__all__ = ["EXACT", "FLOATING", "VALUES", "Coding", "Distance", "Vectors"]

RAW, LOSSLESS, OWN = Own(0), Lossless(), Own(128)
NAMED: dict[str, Coding] = {
    "fp32": RAW,
    "lossless": LOSSLESS,
    "fp16": Half(3, "fp16", torch.float16, rotate=False),
    "bf16": Half(4, "bf16", torch.bfloat16, rotate=True),
    "int8": Scaled(5, "int8", block=256, width=8),
    "int4": Scaled(9, "int4", block=64, width=4),
    "sign": Sign(6, "sign"),
}
VALUES = tuple(NAMED)  # of float tensors; and ring:B of integers
CHOICES = (*VALUES, "ring:1 to ring:63")  # for messages
EXACT = frozenset({"fp32", "lossless"})
NONE = "none"  # not a choice: what `Mask` sends
NOTHING = Nothing()
CODINGS: dict[int, Coding] = {coding.id: coding for coding in (*NAMED.values(), NOTHING, Ring(None), OWN)}


@cache
def named(values: str) -> Coding | None:
    """The coding that can be chosen by that name, if there is one."""
    ring = re.fullmatch(r"ring:([1-9]|[1-5]\d|6[0-3])", values, re.ASCII)
    return Ring(int(ring[1])) if ring else NAMED.get(values)


def coding(values: str, dtypes: Dtypes) -> Coding:
    """The coding that `values` means for tensors of these dtypes."""
    if values in EXACT and any(dtype != torch.float32 for dtype in dtypes):
        return OWN
    chosen = NOTHING if values == NONE else named(values)
    if chosen is None:
        raise KeyError(values)
    chosen.check(dtypes)
    return chosen


def write(values: str, vectors: Vectors, reference: Vectors | None = None) -> tuple[Coding, list[Buffer]]:
    """The coding used and its section. ``lossless`` is raw, planes or distances to the reference: the smallest."""
    chosen = coding(values, [x.dtype for x in vectors])
    if chosen is not LOSSLESS:
        return chosen, chosen.encode(vectors)
    candidates = [RAW, LOSSLESS] if reference is None else [RAW, LOSSLESS, Distance(reference)]
    sections = [(candidate, candidate.encode(vectors)) for candidate in candidates]
    return min(sections, key=lambda it: len(it[0].reference_id) + length(it[1]))  # of equal ones the first


def weigh(values: str, vectors: Vectors, reference: Vectors | None = None) -> tuple[Coding, int]:
    """The coding that `write` would use and the length of its section."""
    chosen = coding(values, [x.dtype for x in vectors])
    size = chosen.size([len(x) for x in vectors], [x.dtype for x in vectors])
    if size is None:
        chosen, section = write(values, vectors, reference)
        return chosen, length(section)
    return chosen, size


def refers(values: str, dtypes: Dtypes) -> bool:
    """Whether `write` can use a reference."""
    return coding(values, dtypes) is LOSSLESS


def accepted(values: str) -> Mapping[int, Coding]:
    """What `write` may choose, by id."""
    first = coding(values, [])
    return {chosen.id: chosen for chosen in ((first, RAW, OWN) if values in EXACT else (first,))}


def length(section: Sequence[Buffer]) -> int:
    return sum(memoryview(part).nbytes for part in section)
