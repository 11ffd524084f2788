"""Codings that bring back every bit of what they are for: floats, ring elements, a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lamina.errors import WireError
from lamina.wire.coding import Coding, Dtypes, Vectors, only
from lamina.wire.container import Buffer, Reader, pack_bits, raw_bytes, raw_tensor, refuse, share, unpack_bits
from lamina.wire.planes import (
    Words,
    distance,
    left,
    moved,
    pack,
    read_planes,
    reference_id,
    right,
    unpack,
    words,
    write_planes,
)
from lamina.wire.threads import Span, each, spans


class Own(Coding):
    """Raw, each tensor in its own dtype. Also serves as id 0, where every dtype is float32."""

    elementwise = True

    def __init__(self, id: int):
        self.id = id

    def encode(self, vectors: Vectors) -> list[Buffer]:
        return [pack_bits(x.numpy()) if x.dtype == torch.bool else raw_bytes(x) for x in vectors]

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        if self.id == 0:
            only(dtypes, {torch.float32})
        return [self._read(reader, count, dtype) for count, dtype in zip(counts, dtypes, strict=True)]

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return sum(self.split(0, counts, dtypes))

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        return [_width(count, dtype) for count, dtype in zip(counts, dtypes, strict=True)]

    @staticmethod
    def _read(reader: Reader, count: int, dtype: torch.dtype) -> Tensor:
        view = reader.take(_width(count, dtype), "values")
        return torch.from_numpy(unpack_bits(view, count, "values")) if dtype == torch.bool else raw_tensor(view, dtype)


class Lossless(Coding):
    """Exact float32 as byte planes of rotated bits, which compress where exponents are alike."""

    id = 1

    def encode(self, vectors: Vectors) -> list[Buffer]:
        return write_planes([(words(x, np.uint32),) for x in vectors], left, 4, squeeze=True)

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        only(dtypes, {torch.float32})
        return [_floats(bits) for bits in read_planes(reader, counts, np.uint32, right)]

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return None

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        return share(size, counts)


class Distance(Lossless):
    """Exact float32 as byte planes of their distances to a reference that both ends hold: small where it is near.

    Args:
        reference: its entries at the positions that travel, one vector per tensor.
    """

    def __init__(self, reference: Vectors):
        self.reference_id = reference_id(reference)
        self._reference = [words(x, np.uint32) for x in reference]

    def encode(self, vectors: Vectors) -> list[Buffer]:
        sources = [(words(x, np.uint32), known) for x, known in zip(vectors, self._reference, strict=True)]
        return write_planes(sources, distance, 4, squeeze=True)

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        only(dtypes, {torch.float32})
        known = [(x,) for x in self._reference]
        return [_floats(bits) for bits in read_planes(reader, counts, np.uint32, moved, known)]


class Ring(Coding):
    """Integers mod 2**bits in int64, packed to that many bits: what clients add up without being seen.

    Nothing is compressed: elements that hide something are uniform, and a length must not tell what they hide. Entries
    are taken mod 2**bits, so that a negative one arrives as its complement; what is decoded is 0 to 2**bits - 1.

    Args:
        bits: 1 to 63; None reads any.
    """

    id = 8
    elementwise = True

    def __init__(self, bits: int | None):
        self._bits = bits

    @property
    def bits(self) -> int:
        if self._bits is None:
            raise TypeError("a ring of any number of bits is for reading")
        return self._bits

    def check(self, dtypes: Dtypes) -> None:
        for dtype in dtypes:
            refuse(dtype != torch.int64, f"values='ring:{self.bits}': cannot code {dtype}, only torch.int64 tensors")

    def encode(self, vectors: Vectors) -> list[Buffer]:
        (whole, rest), counts = divmod(self.bits, 8), [len(x) for x in vectors]
        columns = [words(x, np.uint8).reshape(-1, 8) for x in vectors]
        planes = np.empty((whole, sum(counts)), np.uint8)
        high = np.empty(sum(counts) if rest else 0, np.uint8)

        def fill(span: Span) -> None:
            piece = columns[span.i][span.start : span.stop]
            planes[:, span.joined] = piece[:, :whole].T
            if rest:
                high[span.joined] = piece[:, whole] & np.uint8((1 << rest) - 1)

        each(fill, spans(counts), planes.nbytes + high.nbytes)
        return [bytes([self.bits]), planes.reshape(-1).data, pack(high, rest).data]

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        only(dtypes, {torch.int64})
        bits = reader.take(1, "ring bits")[0]
        if not 1 <= bits <= 63 or bits != (self._bits or bits):
            raise WireError(f"ring of {bits} bits, expected {self._bits or '1 to 63'}", code="E345")
        (whole, rest), k = divmod(bits, 8), sum(counts)
        planes = np.frombuffer(reader.take(whole * k, "ring planes"), np.uint8).reshape(whole, k)
        high = unpack(reader.take((k * rest + 7) // 8, "ring bits"), k if rest else 0, rest, "ring bits")
        vectors = [torch.zeros(count, dtype=torch.int64) for count in counts]
        columns = [words(x, np.uint8).reshape(-1, 8) for x in vectors]

        def fill(span: Span) -> None:
            piece = columns[span.i][span.start : span.stop]
            piece[:, :whole] = planes[:, span.joined].T
            if rest:
                piece[:, whole] = high[span.joined]

        each(fill, spans(counts), 8 * k)
        return vectors

    def cast(self, x: Tensor) -> Tensor:
        return x & ((1 << self.bits) - 1)

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return 1 + (sum(counts) * self.bits + 7) // 8

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        return share(size - 1, counts)


class Nothing(Coding):
    """No values: what travels is the mask alone, 1 where an entry is kept."""

    id = 7
    elementwise = True

    def encode(self, vectors: Vectors) -> list[Buffer]:
        return []

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        return [torch.ones(count, dtype=dtype) for count, dtype in zip(counts, dtypes, strict=True)]

    def cast(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return 0

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        return [0 for _ in counts]


def _floats(bits: Words) -> Tensor:
    return torch.from_numpy(bits.view(np.float32))


def _width(count: int, dtype: torch.dtype) -> int:
    """Bytes of `count` raw entries."""
    return (count + 7) // 8 if dtype == torch.bool else count * dtype.itemsize
