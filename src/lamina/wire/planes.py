"""Words as byte planes, small numbers as bit strings, and float32 as distances to a reference.

A plane holds one byte of every word, lowest first: uv L; then L > 0: one zstd frame of L bytes, L = 0: raw bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from lamina.errors import WireError
from lamina.wire.container import Buffer, Reader, compress, decompress, raw_bytes, uv
from lamina.wire.threads import PIECE, Span, each, spans

Words: TypeAlias = NDArray[np.unsignedinteger[Any]]
Bytes: TypeAlias = NDArray[np.uint8]

# Parallel arrays: the words of one vector, and if need be those of its reference.
Source: TypeAlias = tuple[Words, ...]


def words(x: Tensor, word: type[np.unsignedinteger[Any]]) -> Words:
    """The bits of a vector, not copied."""
    return x.view(torch.uint8).numpy().view(word)


def write_planes(sources: Sequence[Source], turn: Callable[..., Words], width: int, squeeze: bool) -> list[Buffer]:
    """Planes of `turn(*source)`, words of `width` bytes, one source after the other; squeezed where that is smaller."""
    counts = [len(source[0]) for source in sources]
    planes = np.empty((width, sum(counts)), np.uint8)

    def fill(span: Span) -> None:
        turned = turn(*(x[span.start : span.stop] for x in sources[span.i]))
        planes[:, span.joined] = turned.view(np.uint8).reshape(-1, width).T

    each(fill, spans(counts), planes.nbytes)
    # The highest plane first: it alone compresses well, which takes longest.
    frames = each(compress, list(planes[::-1]), planes.nbytes)[::-1] if squeeze else [b""] * width
    section: list[Buffer] = []
    for plane, frame in zip(planes, frames, strict=True):
        section += write_plane(plane, frame)
    return section


def write_plane(plane: Bytes, frame: bytes = b"") -> list[Buffer]:
    """One plane, as its frame where there is one and it is smaller."""
    return [uv(len(frame)), frame] if 0 < len(frame) < len(plane) else [uv(0), plane.data]


def read_planes(
    reader: Reader,
    counts: Sequence[int],
    word: type[np.unsignedinteger[Any]],
    back: Callable[..., Words],
    known: Sequence[Source] | None = None,
) -> list[Words]:
    """One array per count, `back(words, *known of this vector)` of the words in the planes."""
    width, k = np.dtype(word).itemsize, sum(counts)
    found = [_take_plane(reader, k) for _ in range(width)]
    planes = each(lambda plane: _open_plane(*plane, k), found, width * k)
    out = [np.empty(count, word) for count in counts]

    def merge(span: Span) -> None:
        turned = np.empty(span.stop - span.start, word)
        columns = turned.view(np.uint8).reshape(-1, width)
        for place in range(width):
            columns[:, place] = planes[place][span.joined]
        others = known[span.i] if known is not None else ()
        out[span.i][span.start : span.stop] = back(turned, *(x[span.start : span.stop] for x in others))

    each(merge, spans(counts), width * k)
    return out


def read_plane(reader: Reader, k: int) -> Bytes:
    """One plane of k bytes."""
    return _open_plane(*_take_plane(reader, k), k)


def _take_plane(reader: Reader, k: int) -> tuple[memoryview, bool]:
    """A plane as it came, and whether it is compressed."""
    size = reader.uv("plane length", most=reader.left)
    return reader.take(size or k, "plane"), size > 0


def _open_plane(raw: memoryview, squeezed: bool, k: int) -> Bytes:
    return decompress(raw, k, k, "plane") if squeezed else np.frombuffer(raw, np.uint8)


def pack(numbers: Bytes, width: int) -> Bytes:
    """Numbers of 1 to 8 bits one after the other: number j at bit j * width."""
    out = np.empty((len(numbers) * width + 7) // 8, np.uint8)

    def fill(start: int) -> None:
        piece = numbers[start : start + PIECE]
        groups = np.zeros((len(piece) + 7) // 8, np.uint64)  # eight numbers fill `width` bytes
        for place in range(8):
            some = piece[place::8]
            groups[: len(some)] |= some.astype(np.uint64) << np.uint64(width * place)
        packed = groups.view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)
        here = out[start * width // 8 : ((start + len(piece)) * width + 7) // 8]
        here[:] = packed[: len(here)]

    each(fill, range(0, len(numbers), PIECE), len(numbers) * width)
    return out


def unpack(raw: memoryview, count: int, width: int, what: str) -> Bytes:
    """Inverse of `pack`, for exactly as many bytes as `count` numbers take."""
    packed, out = np.frombuffer(raw, np.uint8), np.empty(count, np.uint8)
    if count * width % 8 and packed[-1] >> (count * width % 8):
        raise WireError(f"{what}: padding bits are not zero", code="E345")

    def fill(start: int) -> None:
        piece = out[start : start + PIECE]
        here = packed[start * width // 8 : ((start + len(piece)) * width + 7) // 8]
        filled = np.zeros(((len(piece) + 7) // 8, width), np.uint8)
        filled.reshape(-1)[: len(here)] = here
        octets = np.zeros((len(filled), 8), np.uint8)
        octets[:, :width] = filled
        groups = octets.view(np.uint64).reshape(-1)
        for place in range(8):
            some = piece[place::8]
            some[:] = groups[: len(some)] >> np.uint64(width * place) & np.uint64((1 << width) - 1)

    each(fill, range(0, count, PIECE), count * width)
    return out


# Turns: bijections on words, undone on the other side.


def left(bits: Words) -> Words:
    """Rotated left by one: the sign last, the exponent in a byte of its own."""
    digits = np.uint8(8 * bits.itemsize - 1)
    turned: Words = bits << np.uint8(1) | bits >> digits
    return turned


def right(bits: Words) -> Words:
    digits = np.uint8(8 * bits.itemsize - 1)
    turned: Words = bits >> np.uint8(1) | bits << digits
    return turned


def same(bits: Words) -> Words:
    return bits


def distance(bits: Words, reference: Words) -> Words:
    """Steps from the reference, counted over all float32 in their order (-0.0 next to 0.0), as zig-zag numbers.

    One step up is 2, one down is 1, two up is 4; mod 2**32, so that NaN and all others come back bit for bit.
    """
    steps = _order(bits) - _order(reference)
    zigzag: Words = steps << np.uint32(1) ^ _signs(steps)
    return zigzag


def moved(zigzag: Words, reference: Words) -> Words:
    """Inverse of `distance`."""
    order = (zigzag >> np.uint32(1) ^ -(zigzag & np.uint32(1))) + _order(reference)
    bits: Words = order ^ (_signs(~order) | np.uint32(1 << 31))
    return bits


def _order(bits: Words) -> Words:
    """0 to 2**32 - 1 in the order of the float32 with these bits."""
    place: Words = bits ^ (_signs(bits) | np.uint32(1 << 31))
    return place


def _signs(numbers: Words) -> Words:
    """All ones where the highest bit is set, else 0."""
    ones: Words = (numbers.view(np.int32) >> 31).view(np.uint32)
    return ones


def reference_id(reference: Sequence[Tensor]) -> bytes:
    """XXH3-64 of the reference's entries at the positions that travel, as float32 one after the other."""
    digest = xxhash.xxh3_64()
    for x in reference:
        digest.update(raw_bytes(x))
    return int(digest.intdigest()).to_bytes(8, "little")
