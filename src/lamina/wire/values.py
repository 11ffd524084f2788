"""Value codings: how the k entries that travel become bytes. One vector (1-d tensor) per tensor present.

====  ==========  =====================================================================================
 id   name        section
====  ==========  =====================================================================================
  0   fp32        4k bytes
  1   lossless    4 planes of the bits rotated left by one (the sign last)
  3   fp16        2 planes of the nearest fp16
  4   bf16        2 planes of the nearest bf16, rotated left by one
  5   int8        per tensor ceil(k_t/256) fp32 scales; then one plane of int8
  6   sign        one fp32 scale per tensor with k_t > 0; then ceil(k/8) bits, 1 = non-negative
  7   none        empty (a mask alone)
128   own         each tensor raw in its own dtype, bool as ceil(k_t/8) bytes of bits
====  ==========  =====================================================================================

A plane holds one byte of every word, lowest first: uv L; then L > 0: one zstd frame of L bytes, L = 0: k raw bytes.
fp16, bf16 and int8 write raw planes, so that their size follows from shapes alone; any plane may be read compressed.

``fp32`` and ``lossless`` are exact and leave other dtypes to ``own``; the lossy ones go through float32, and a tensor
comes back in the dtype of the schema. Values that are not finite stay so: one in a block (int8) or a tensor (sign)
makes all of it not finite, because its scale is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.errors import WireError
from lamina.wire.container import (
    Buffer,
    Reader,
    compress,
    decompress,
    pack_bits,
    raw_bytes,
    raw_tensor,
    refuse,
    share,
    unpack_bits,
    uv,
)

Vectors: TypeAlias = list[Tensor]
Dtypes: TypeAlias = Sequence[torch.dtype]
Floats: TypeAlias = NDArray[np.float32]
Words: TypeAlias = NDArray[np.unsignedinteger[Any]]

BLOCK = 256  # entries of one int8 scale
PIECE = 1 << 16  # entries worked on at a time, so that temporaries stay in the cache; a multiple of BLOCK


class Coding(Protocol):
    """One way of writing vectors. `counts` are their lengths."""

    @property
    def id(self) -> int: ...
    def encode(self, vectors: Vectors) -> list[Buffer]: ...
    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors: ...
    def transmit(self, vectors: Vectors) -> Vectors:
        """decode(encode(vectors)), bit for bit."""
        ...

    @property
    def elementwise(self) -> bool:
        """Every entry is coded for itself: `cast` says what becomes of it."""
        ...

    def cast(self, x: Tensor) -> Tensor: ...

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        """Length of the section, when it does not depend on the data."""
        ...

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        """Bytes per tensor of a section of `size` bytes: its own ones, and its share of planes by entries."""
        ...


class Own:
    """Raw, each tensor in its own dtype. Also serves as id 0, where every dtype is float32."""

    elementwise = True

    def __init__(self, id: int):
        self.id = id

    def encode(self, vectors: Vectors) -> list[Buffer]:
        return [pack_bits(x.numpy()) if x.dtype == torch.bool else raw_bytes(x) for x in vectors]

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        if self.id == RAW.id:
            only(dtypes, {torch.float32})
        return [self._read(reader, count, dtype) for count, dtype in zip(counts, dtypes, strict=True)]

    def transmit(self, vectors: Vectors) -> Vectors:
        return vectors

    def cast(self, x: Tensor) -> Tensor:
        return x

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return sum(self.split(0, counts, dtypes))

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        return [width(count, dtype) for count, dtype in zip(counts, dtypes, strict=True)]

    @staticmethod
    def _read(reader: Reader, count: int, dtype: torch.dtype) -> Tensor:
        view = reader.take(width(count, dtype), "values")
        return torch.from_numpy(unpack_bits(view, count, "values")) if dtype == torch.bool else raw_tensor(view, dtype)


class Lossless:
    """Exact float32 as byte planes of rotated bits, which compress where exponents are alike."""

    id = 1
    elementwise = True

    def encode(self, vectors: Vectors) -> list[Buffer]:
        words = joined(vectors, np.uint32)
        return write_planes(words << np.uint32(1) | words >> np.uint32(31), squeeze=True)

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        only(dtypes, {torch.float32})
        words = read_planes(reader, sum(counts), np.uint32)
        exact = (words >> np.uint32(1) | words << np.uint32(31)).view(np.float32)
        return [torch.from_numpy(exact[part].copy()) for part in parts(counts)]

    def transmit(self, vectors: Vectors) -> Vectors:
        return vectors

    def cast(self, x: Tensor) -> Tensor:
        return x

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return None

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        return share(size, counts)


class Half:
    """Two-byte floats, by torch's cast (to nearest, ties to even)."""

    elementwise = True

    def __init__(self, id: int, dtype: torch.dtype, rotate: bool):
        self.id = id
        self.dtype = dtype
        self.rotate = rotate

    def encode(self, vectors: Vectors) -> list[Buffer]:
        words = joined([x.float().to(self.dtype) for x in vectors], np.uint16)
        return write_planes(words << np.uint16(1) | words >> np.uint16(15) if self.rotate else words, squeeze=False)

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        only(dtypes, FLOATING)
        words = read_planes(reader, sum(counts), np.uint16)
        words = words >> np.uint16(1) | words << np.uint16(15) if self.rotate else words
        halves = torch.from_numpy(words.view(np.int16)).view(self.dtype)
        return [halves[part].float().to(dtype) for part, dtype in zip(parts(counts), dtypes, strict=True)]

    def transmit(self, vectors: Vectors) -> Vectors:
        return [self.cast(x) for x in vectors]

    def cast(self, x: Tensor) -> Tensor:
        return x.float().to(self.dtype).float().to(x.dtype)

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return 2 + 2 * sum(counts)

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        return share(size - 2, counts)


class Int8:
    """Blocks of 256 entries of one tensor: scale = absmax / 127, code = nearest integer to x / scale."""

    id = 5
    elementwise = False

    def encode(self, vectors: Vectors) -> list[Buffer]:
        scales = [np.empty(blocks(len(x)), np.float32) for x in vectors]
        codes = np.empty(sum(len(x) for x in vectors), np.int8)
        at = 0
        for x, scale in zip(vectors, scales, strict=True):
            for start, stop, some, quantised in self._pieces(floats(x)):
                scale[start // BLOCK : start // BLOCK + len(some)] = some
                codes[at + start : at + stop] = quantised.reshape(-1)[: stop - start]
            at += len(x)
        return [
            *(x.tobytes() for x in scales),
            *write_planes(codes.view(np.uint8), squeeze=False),
        ]

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        only(dtypes, FLOATING)
        scales = [raw_tensor(reader.take(4 * blocks(k), "int8 scales"), torch.float32).numpy() for k in counts]
        codes = read_planes(reader, sum(counts), np.uint8).view(np.int8)
        vectors = []
        for part, scale, dtype in zip(parts(counts), scales, dtypes, strict=True):
            own = codes[part]
            out = np.empty(len(own), np.float32)
            whole = len(own) // BLOCK
            self._restore(own[: whole * BLOCK].reshape(-1, BLOCK), scale[:whole], out[: whole * BLOCK])
            self._restore(own[whole * BLOCK :].reshape(1, -1), scale[whole:], out[whole * BLOCK :])
            vectors.append(torch.from_numpy(out).to(dtype))
        return vectors

    def transmit(self, vectors: Vectors) -> Vectors:
        received = []
        for x in vectors:
            out = np.empty(len(x), np.float32)
            for start, stop, scale, codes in self._pieces(floats(x)):
                if (stop - start) % BLOCK:
                    filled = np.empty(codes.size, np.float32)
                    self._restore(codes, scale, filled)
                    out[start:stop] = filled[: stop - start]
                else:
                    self._restore(codes, scale, out[start:stop])
            received.append(torch.from_numpy(out).to(x.dtype))
        return received

    def cast(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return 1 + sum(4 * blocks(k) + k for k in counts)

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        scales = [4 * blocks(k) for k in counts]
        return [a + b for a, b in zip(scales, share(size - 1 - sum(scales), counts), strict=True)]

    @staticmethod
    def _restore(codes: NDArray[np.int8], scales: Floats, out: Floats) -> None:
        """out = codes * scale, row by row."""
        if len(scales):
            with np.errstate(invalid="ignore", over="ignore"):
                np.multiply(codes, scales[:, None], out=out.reshape(codes.shape))

    @staticmethod
    def _pieces(x: Floats) -> Iterator[tuple[int, int, Floats, NDArray[np.int8]]]:
        """(start, stop, scales [b], codes [b, 256]) of a vector, piece by piece; a last block is filled up with 0."""
        for start in range(0, len(x), PIECE):
            piece = x[start : start + PIECE]
            stop = start + len(piece)
            if len(piece) % BLOCK:
                piece = np.concatenate((piece, np.zeros(-len(piece) % BLOCK, np.float32)))
            rows = piece.reshape(-1, BLOCK)
            with np.errstate(invalid="ignore"):  # inf / inf in a block whose scale is not finite: code 0
                scales = np.abs(rows).max(axis=1) / np.float32(127)
                codes = np.rint(rows / np.where(scales == 0, np.float32(1), scales)[:, None])
                np.clip(codes, -127, 127, out=codes)
                if not np.isfinite(scales).all():
                    codes[~np.isfinite(scales)] = 0  # 0 * scale is NaN
                yield start, stop, scales, codes.astype(np.int8)


class Sign:
    """One bit per entry and one scale per tensor, the mean of |x| over the entries that travel."""

    id = 6
    elementwise = False

    def encode(self, vectors: Vectors) -> list[Buffer]:
        scales = np.array([mean_abs(floats(x)) for x in vectors if len(x)], np.float32)
        signs = [floats(x) >= 0 for x in vectors]
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
        return [self._signed(mean_abs(floats(x)), floats(x) >= 0, x.dtype) for x in vectors]

    def cast(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return 4 * sum(k > 0 for k in counts) + (sum(counts) + 7) // 8

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        scales = [4 * (k > 0) for k in counts]
        return [a + b for a, b in zip(scales, share(size - sum(scales), counts), strict=True)]

    @staticmethod
    def _signed(scale: np.float32, signs: NDArray[np.bool_], dtype: torch.dtype) -> Tensor:
        both = np.array([-scale, scale], np.float32)
        return torch.from_numpy(both[signs.view(np.uint8)]).to(dtype)


class Nothing:
    """No values: what travels is the mask alone, 1 where an entry is kept."""

    id = 7
    elementwise = True

    def encode(self, vectors: Vectors) -> list[Buffer]:
        return []

    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors:
        return [torch.ones(count, dtype=dtype) for count, dtype in zip(counts, dtypes, strict=True)]

    def transmit(self, vectors: Vectors) -> Vectors:
        return [torch.ones_like(x) for x in vectors]

    def cast(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        return 0

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        return [0 for _ in counts]


RAW, LOSSLESS, OWN = Own(0), Lossless(), Own(128)
NAMED: dict[str, Coding] = {
    "fp32": RAW,
    "lossless": LOSSLESS,
    "fp16": Half(3, torch.float16, rotate=False),
    "bf16": Half(4, torch.bfloat16, rotate=True),
    "int8": Int8(),
    "sign": Sign(),
}
VALUES = tuple(NAMED)
EXACT = frozenset({"fp32", "lossless"})
CODINGS: dict[int, Coding] = {coding.id: coding for coding in (*NAMED.values(), Nothing(), OWN)}
FLOATING = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


def coding(values: str, dtypes: Dtypes) -> Coding:
    """The coding that `values` means for tensors of these dtypes."""
    if values in EXACT:
        return NAMED[values] if all(dtype == torch.float32 for dtype in dtypes) else OWN
    for dtype in dtypes:
        refuse(dtype not in FLOATING, f"values={values!r}: cannot code {dtype}, only floating-point tensors")
    return NAMED[values]


def write(values: str, vectors: Vectors) -> tuple[Coding, list[Buffer]]:
    """The coding used and its section. Planes that would not be smaller than raw float32 travel raw."""
    chosen = coding(values, [x.dtype for x in vectors])
    section = chosen.encode(vectors)
    if chosen is LOSSLESS and length(section) >= 4 * sum(len(x) for x in vectors):
        return RAW, RAW.encode(vectors)
    return chosen, section


def weigh(values: str, vectors: Vectors) -> tuple[Coding, int]:
    """The coding that `write` would use and the length of its section."""
    chosen = coding(values, [x.dtype for x in vectors])
    size = chosen.size([len(x) for x in vectors], [x.dtype for x in vectors])
    if size is None:
        chosen, section = write(values, vectors)
        return chosen, length(section)
    return chosen, size


def accepted(values: str) -> frozenset[int]:
    """Ids that `write` may choose."""
    return frozenset({NAMED[values].id, RAW.id, OWN.id} if values in EXACT else {NAMED[values].id})


def length(section: Sequence[Buffer]) -> int:
    return sum(len(part) for part in section)


def only(dtypes: Dtypes, allowed: frozenset[torch.dtype] | set[torch.dtype]) -> None:
    for dtype in dtypes:
        if dtype not in allowed:
            raise WireError(f"values of another kind than the schema's {dtype}", code="E344")


def width(count: int, dtype: torch.dtype) -> int:
    """Bytes of `count` raw entries."""
    return (count + 7) // 8 if dtype == torch.bool else count * dtype.itemsize


def parts(counts: Sequence[int]) -> list[slice]:
    """Where each vector lies when they are joined."""
    ends = list(accumulate(counts))
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


def blocks(count: int) -> int:
    return (count + BLOCK - 1) // BLOCK


def floats(x: Tensor) -> Floats:
    out: Floats = x.float().numpy()
    return out


def mean_abs(x: Floats) -> np.float32:
    """Mean of |x|, summed in float64 in a fixed order; 0 of nothing."""
    total = sum(float(np.abs(x[at : at + PIECE]).sum(dtype=np.float64)) for at in range(0, len(x), PIECE))
    return np.float32(total / max(1, len(x)))


def joined(vectors: Vectors, word: type[np.unsignedinteger[Any]]) -> Words:
    """All entries in one array, their bits read as words."""
    raw = [x.view(torch.uint8).numpy() for x in vectors]
    return (np.concatenate(raw) if raw else np.empty(0, np.uint8)).view(word)


def write_planes(words: Words, squeeze: bool) -> list[Buffer]:
    """Byte planes, lowest first; compressed where asked for and smaller."""
    columns = words.view(np.uint8).reshape(len(words), words.itemsize)
    section: list[Buffer] = []
    for place in range(words.itemsize):
        plane = np.ascontiguousarray(columns[:, place])
        frame = compress(plane) if squeeze else None
        if frame is not None and len(frame) < len(plane):
            section += [uv(len(frame)), frame]
        else:
            section += [uv(0), plane.data]
    return section


def read_planes(reader: Reader, k: int, word: type[np.unsignedinteger[Any]]) -> Words:
    """k words from their byte planes."""
    words = np.empty(k, word)
    columns = words.view(np.uint8).reshape(k, words.itemsize)
    for place in range(words.itemsize):
        size = reader.uv("plane length", most=reader.left)
        raw = reader.take(size or k, "plane")
        columns[:, place] = decompress(raw, k, k, "plane") if size else np.frombuffer(raw, np.uint8)
    return words
