"""Codings that bring values near: narrower floats, small integers with a scale, signs.

All go through float32, and a tensor comes back in the dtype of the schema. Values that are not finite stay so: one in
a block (int8, int4) or in a tensor (sign) makes all of it not finite, because its scale is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.wire.coding import FLOATING, Coding, Dtypes, Vectors, only, parts
from lamina.wire.container import Buffer, Reader, pack_bits, raw_tensor, refuse, share, unpack_bits
from lamina.wire.planes import (
    Bytes,
    left,
    pack,
    read_plane,
    read_planes,
    right,
    same,
    unpack,
    words,
    write_plane,
    write_planes,
)
from lamina.wire.threads import PIECE, Span, each, spans

Floats: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.int8]


class Lossy(Coding):
    """For floating-point tensors only."""

    def __init__(self, id: int, name: str):
        self.id = id
        self.name = name

    def check(self, dtypes: Dtypes) -> None:
        for dtype in dtypes:
            message = f"values={self.name!r}: cannot code {dtype}, only floating-point tensors"
            refuse(dtype not in FLOATING, message)


class Half(Lossy):
    """Two-byte floats, by torch's cast (to nearest, ties to even)."""

    elementwise = True

    def __init__(self, id: int, name: str, dtype: torch.dtype, rotate: bool):
        super().__init__(id, name)
        self.dtype = dtype
        self.there, self.back = (left, right) if rotate else (same, same)

    def encode(self, vectors: Vectors) -> list[Buffer]:
        halves = [(words(x.float().to(self.dtype), np.uint16),) for x in vectors]
        return write_planes(halves, self.there, 2, squeeze=False)

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        only(dtypes, FLOATING)
        halves = read_planes(reader, counts, np.uint16, self.back)
        return [
            torch.from_numpy(bits.view(np.int16)).view(self.dtype).float().to(dtype)
            for bits, dtype in zip(halves, dtypes, strict=True)
        ]

    def cast(self, x: Tensor) -> Tensor:
        return x.float().to(self.dtype).float().to(x.dtype)

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return 2 + 2 * sum(counts)

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        return share(size - 2, counts)


class Scaled(Lossy):
    """Blocks of entries of one tensor: scale = absmax / most, code = nearest integer to x / scale.

    Args:
        block: entries of one scale.
        width: bits of one code; the largest is most = 2**(width - 1) - 1.
    """

    def __init__(self, id: int, name: str, block: int, width: int):
        super().__init__(id, name)
        self.block = block
        self.width = width
        self.most = np.float32((1 << (width - 1)) - 1)

    def encode(self, vectors: Vectors) -> list[Buffer]:
        counts, inputs = [len(x) for x in vectors], [_floats(x) for x in vectors]
        scales = [np.empty(self._blocks(count), np.float32) for count in counts]
        codes = np.empty(sum(counts), np.int8)

        def quantise(span: Span) -> None:
            own, quantised = self._quantised(inputs[span.i][span.start : span.stop])
            scales[span.i][span.start // self.block :][: len(own)] = own
            codes[span.joined] = quantised

        each(quantise, spans(counts), 4 * len(codes))
        low = codes.view(np.uint8)
        plane = low if self.width == 8 else pack(low & np.uint8((1 << self.width) - 1), self.width)
        return [*(scale.data for scale in scales), *write_plane(plane)]

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        only(dtypes, FLOATING)
        what, k = f"{self.name} scales", sum(counts)
        scales = [raw_tensor(reader.take(4 * self._blocks(count), what), torch.float32).numpy() for count in counts]
        plane = read_plane(reader, (k * self.width + 7) // 8)
        codes = (plane if self.width == 8 else self._signed(unpack(plane.data, k, self.width, self.name))).view(np.int8)
        out = [np.empty(count, np.float32) for count in counts]

        def restore(span: Span) -> None:
            own = scales[span.i][span.start // self.block :]
            self._restore(codes[span.joined], own, out[span.i][span.start : span.stop])

        each(restore, spans(counts), 4 * k)
        return [torch.from_numpy(x).to(dtype) for x, dtype in zip(out, dtypes, strict=True)]

    def transmit(self, vectors: Vectors) -> Vectors:
        counts, inputs = [len(x) for x in vectors], [_floats(x) for x in vectors]
        out = [np.empty(count, np.float32) for count in counts]

        def there_and_back(span: Span) -> None:
            scales, codes = self._quantised(inputs[span.i][span.start : span.stop])
            self._restore(codes, scales, out[span.i][span.start : span.stop])

        each(there_and_back, spans(counts), 4 * sum(counts))
        return [torch.from_numpy(y).to(x.dtype) for x, y in zip(vectors, out, strict=True)]

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return 1 + sum(4 * self._blocks(count) for count in counts) + (sum(counts) * self.width + 7) // 8

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        scales = [4 * self._blocks(count) for count in counts]
        return [a + b for a, b in zip(scales, share(size - 1 - sum(scales), counts), strict=True)]

    def _blocks(self, count: int) -> int:
        return (count + self.block - 1) // self.block

    def _quantised(self, x: Floats) -> tuple[Floats, Codes]:
        """Scales and codes of a piece; a last block is filled up with 0."""
        filled = np.concatenate((x, np.zeros(-len(x) % self.block, np.float32))) if len(x) % self.block else x
        rows = filled.reshape(-1, self.block)
        with np.errstate(invalid="ignore"):  # inf / inf in a block whose scale is not finite: code 0
            scales = np.abs(rows).max(axis=1) / self.most
            codes = np.rint(rows / np.where(scales == 0, np.float32(1), scales)[:, None])
            np.clip(codes, -self.most, self.most, out=codes)
            if not np.isfinite(scales).all():
                codes[~np.isfinite(scales)] = 0  # 0 * scale is NaN
            return scales, codes.astype(np.int8).reshape(-1)[: len(x)]

    def _restore(self, codes: Codes, scales: Floats, out: Floats) -> None:
        """out = code * scale, block by block; the last may be short."""
        whole = len(out) // self.block
        at = whole * self.block
        with np.errstate(invalid="ignore", over="ignore"):
            blocks = (whole, self.block)
            np.multiply(codes[:at].reshape(blocks), scales[:whole, None], out=out[:at].reshape(blocks))
            if at < len(out):
                np.multiply(codes[at:], scales[whole], out=out[at:])

    def _signed(self, codes: Bytes) -> Bytes:
        """Two's complement of `width` bits as one of 8."""
        half = np.uint8(1 << (self.width - 1))
        wide: Bytes = (codes ^ half) - half
        return wide


class Sign(Lossy):
    """One bit per entry and one scale per tensor, the mean of |x| over the entries that travel."""

    def encode(self, vectors: Vectors) -> list[Buffer]:
        scales = np.array([_mean_abs(_floats(x)) for x in vectors if len(x)], np.float32)
        signs = [_floats(x) >= 0 for x in vectors]
        return [scales.tobytes(), pack_bits(np.concatenate(signs) if signs else np.empty(0, np.bool_))]

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        only(dtypes, FLOATING)
        scales = iter(raw_tensor(reader.take(4 * sum(k > 0 for k in counts), "sign scales"), torch.float32).numpy())
        k = sum(counts)
        signs = unpack_bits(reader.take((k + 7) // 8, "signs"), k, "signs")
        return [
            self._signed(next(scales) if part.stop > part.start else np.float32(0), signs[part], dtype)
            for part, dtype in zip(parts(counts), dtypes, strict=True)
        ]

    def transmit(self, vectors: Vectors) -> Vectors:
        return [self._signed(_mean_abs(_floats(x)), _floats(x) >= 0, x.dtype) for x in vectors]

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return 4 * sum(k > 0 for k in counts) + (sum(counts) + 7) // 8

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        scales = [4 * (k > 0) for k in counts]
        return [a + b for a, b in zip(scales, share(size - sum(scales), counts), strict=True)]

    @staticmethod
    def _signed(scale: np.float32, signs: NDArray[np.bool_], dtype: torch.dtype) -> Tensor:
        both = np.array([-scale, scale], np.float32)
        return torch.from_numpy(both[signs.view(np.uint8)]).to(dtype)


def _floats(x: Tensor) -> Floats:
    out: Floats = x.float().numpy()
    return out


def _mean_abs(x: Floats) -> np.float32:
    """Mean of |x|, summed in float64 in a fixed order; 0 of nothing."""
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        total = sum(float(np.abs(x[at : at + PIECE]).sum(dtype=np.float64)) for at in range(0, len(x), PIECE))
    return np.float32(total / max(1, len(x)))
