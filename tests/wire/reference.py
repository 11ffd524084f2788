"""A slow decoder of the whole format, as docs/wire-format.md has it: no numpy, no torch, one entry at a time.

A tensor is its memory here: the entries in row-major order, little endian, a bool as one byte. What it returns and what
it refuses, with which code, is what `lamina.wire` must return and refuse.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import xxhash
import zstandard

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
WIDTHS = dict(zip(DTYPES, (4, 8, 2, 2, 8, 4, 2, 1, 1, 1), strict=True))
FLOATS = frozenset(DTYPES[:4])
ONES = {"float32": b"\0\0\x80\x3f", "float64": struct.pack("<d", 1), "float16": b"\0\x3c", "bfloat16": b"\x80\x3f"}

REF, SUBSET, MAC, SCALARS, MASKED = 1, 2, 4, 8, 16
DENSE, MASK_ID, BITMAP, FLAT, MIXED, GAPS, SQUEEZED, DRAWN, ENUMERATED = 0, 1, 2, 3, 4, 5, 6, 8, 10
INDICES = frozenset({DENSE, MASK_ID, BITMAP, FLAT, MIXED, GAPS, SQUEEZED, DRAWN, ENUMERATED})
SPARSE = INDICES - {DENSE, MASK_ID}
VALUES = frozenset({0, 1, 3, 4, 5, 6, 7, 8, 9, 128})


class Refused(Exception):
    def __init__(self, code: str):
        self.code = code
        super().__init__(code)


def refuse(condition: bool, code: str) -> None:
    if condition:
        raise Refused(code)


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Masks = Mapping[str, Sequence[bool]]
Memory = Mapping[str, bytes]


class Reader:
    def __init__(self, raw: bytes):
        self.raw, self.at = raw, 0

    @property
    def left(self) -> int:
        return len(self.raw) - self.at

    def take(self, size: int) -> bytes:
        refuse(size > self.left, "E340")
        self.at += size
        return self.raw[self.at - size : self.at]

    def uv(self, most: int) -> int:
        number = 0
        for place in range(9):
            (byte,) = self.take(1)
            number += (byte & 127) << 7 * place
            if byte < 128:
                refuse(byte == 0 and place > 0, "E345")
                refuse(number > most, "E345")
                return number
        raise Refused("E345")

    def bits(self, count: int) -> list[int]:
        """`count` bits, with padding that is zero."""
        raw = self.take(octets(count))
        every = [byte >> i & 1 for byte in raw for i in range(8)]
        refuse(any(every[count:]), "E345")
        return every[:count]

    def numbers(self, count: int, width: int) -> list[int]:
        """`count` numbers of `width` bits, one after the other."""
        bits = self.bits(count * width)
        return [sum(bits[j * width + i] << i for i in range(width)) for j in range(count)]

    def lows(self, count: int, width: int) -> list[int]:
        """`count` numbers of `width` bits: planes of whole bytes, then the bits left of each."""
        numbers = [0] * count
        for place in range(width // 8):
            for j, byte in enumerate(self.take(count)):
                numbers[j] += byte << 8 * place
        high = self.numbers(count, width % 8) if width % 8 else [0] * count
        return [number + (bits << (width - width % 8)) for number, bits in zip(numbers, high, strict=True)]

    def unary(self, count: int, most: int) -> list[int]:
        """`count` numbers that can add up to no more than `most`."""
        if not count:
            return []
        numbers, zeros = [], 0
        for place in range(8 * min(self.left, octets(count + most))):
            if self.raw[self.at + place // 8] >> place % 8 & 1:
                numbers.append(zeros)
                zeros = -1
            zeros += 1
            if len(numbers) == count:
                refuse(self.raw[self.at + place // 8] >> place % 8 > 1, "E345")
                self.take(place // 8 + 1)
                return numbers
        raise Refused("E345")

    def frame(self, least: int, most: int) -> bytes:
        """uv L and a frame of L bytes."""
        return content(self.take(self.uv(self.left)), least, most)


def octets(bits: int) -> int:
    return -(-bits // 8)


def content(frame: bytes, least: int, most: int) -> bytes:
    """What is in exactly one zstd frame whose header (RFC 8878, 3.1.1.1) says `least` to `most` bytes, and not none."""
    refuse(frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 5, "E347")
    descriptor, at = frame[4], 5
    single = descriptor >> 5 & 1
    refuse(bool(descriptor >> 3 & 1), "E347")
    window = 0
    if not single:
        refuse(len(frame) < 6, "E347")
        base = 1 << (10 + (frame[5] >> 3))
        window, at = base + base // 8 * (frame[5] & 7), 6
    for_dictionary = (0, 1, 2, 4)[descriptor & 3]
    for_size = (single, 2, 4, 8)[descriptor >> 6]
    refuse(len(frame) < at + for_dictionary + for_size or not for_size, "E347")
    refuse(any(frame[at : at + for_dictionary]), "E347")
    at += for_dictionary
    size = int.from_bytes(frame[at : at + for_size], "little") + 256 * (for_size == 2)
    refuse(not max(1, least) <= size <= most or window > max(1 << 23, most), "E347")
    opened = zstandard.ZstdDecompressor().decompressobj()
    try:
        out: bytes = opened.decompress(frame)
    except zstandard.ZstdError:
        raise Refused("E347") from None
    refuse(not opened.eof or bool(opened.unused_data) or len(out) != size, "E347")
    return out


# What both ends know.


def uv(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def schema_id(schema: Sequence[Tensor]) -> bytes:
    text = b"FLC1-schema"
    for name, shape, dtype in schema:
        text += uv(len(name.encode())) + name.encode() + uv(len(shape)) + b"".join(map(uv, shape))
        text += bytes([DTYPES.index(dtype)])
    return hashlib.blake2b(text, digest_size=8).digest()


def mask_id(schema: Sequence[Tensor], mask: Masks) -> bytes:
    text = b"FLC1-mask"
    for name, _, _ in schema:
        if name in mask:
            kept = sum(bool(bit) << i for i, bit in enumerate(mask[name]))
            packed = kept.to_bytes(octets(len(mask[name])), "little")
            text += uv(len(name.encode())) + name.encode() + uv(len(mask[name])) + packed
    return hashlib.blake2b(text, digest_size=8).digest()


def checksum(front: bytes, body: bytes) -> bytes:
    return int(xxhash.xxh3_64_intdigest(body, seed=xxhash.xxh3_64_intdigest(front))).to_bytes(8, "little")


# The whole blob.


def decode(
    blob: bytes,
    schema: Sequence[Tensor],
    mask: Masks | None = None,
    reference: Memory | None = None,
    key: bytes | None = None,
) -> dict[str, bytes]:
    """name -> memory of each tensor that came."""
    return read(blob, schema, mask, reference, key).tree


class Content(NamedTuple):
    """name -> memory of each tensor, key -> the 8 bytes of each number."""

    tree: dict[str, bytes]
    scalars: dict[int, bytes]


def read(
    blob: bytes,
    schema: Sequence[Tensor],
    mask: Masks | None = None,
    reference: Memory | None = None,
    key: bytes | None = None,
) -> Content:
    mask = mask or {}
    refuse(len(blob) < 24, "E340")
    refuse(blob[:4] != b"FLC\x01" or blob[7] != 0, "E341")
    refuse(blob[8:16] != schema_id(schema), "E342")
    index_id, value_id, flags = blob[4:7]
    refuse(bool(flags & ~(REF | SUBSET | MAC | SCALARS | MASKED)), "E344")
    if flags & MAC:
        refuse(len(blob) < 40, "E340")
        blob, mac = blob[:-16], blob[-16:]
        refuse(key is not None and mac != hashlib.blake2b(blob, key=key or b"", digest_size=16).digest(), "E349")
    else:
        refuse(key is not None, "E349")
    refuse(blob[16:24] != checksum(blob[:16], blob[24:]), "E343")
    refuse(bool(flags & MAC) and key is None, "E349")
    refuse(index_id not in INDICES or value_id not in VALUES, "E344")
    refuse(bool(flags & MASKED) and index_id not in SPARSE, "E344")
    refuse(bool(flags & REF) and value_id != 1, "E344")
    reader = Reader(blob[24:])
    reference_id = reader.take(8) if flags & REF else None
    here = reader.bits(len(schema)) if flags & SUBSET else [1] * len(schema)
    scalars = read_scalars(reader) if flags & SCALARS else {}
    if flags & MASKED or index_id == MASK_ID:
        refuse(reader.take(8) != mask_id(schema, mask), "E346")
    else:
        mask = {}
    present = [tensor for tensor, bit in zip(schema, here, strict=True) if bit]
    kept = [[i for i, bit in enumerate(mask[t.name]) if bit] if t.name in mask else range(t.numel) for t in present]
    positions = read_index(reader, index_id, [rows(t, k) for t, k in zip(present, kept, strict=True)])
    # entries that travel, by their place in the tensor
    places, start = [], 0
    for entries in kept:
        places.append([entries[p - start] for p in positions if start <= p < start + len(entries)])
        start += len(entries)
    known = None
    if reference_id is not None:
        refuse(any(t.dtype != "float32" for t in present), "E344")
        refuse(reference is None or any(len(reference.get(t.name, b"?")) != 4 * t.numel for t in present), "E348")
        assert reference is not None
        known = [[reference[t.name][4 * i : 4 * i + 4] for i in at] for t, at in zip(present, places, strict=True)]
        refuse(reference_id != identity(known), "E348")
    vectors = read_values(reader, value_id, [len(at) for at in places], [t.dtype for t in present], known)
    refuse(reader.left > 0, "E340")
    received = {}
    for t, at, entries in zip(present, places, vectors, strict=True):
        memory = [bytes(WIDTHS[t.dtype])] * t.numel
        for i, entry in zip(at, entries, strict=True):
            memory[i] = entry
        received[t.name] = b"".join(memory)
    return Content(received, scalars)


def read_scalars(reader: Reader) -> dict[int, bytes]:
    size = reader.uv(64 * 9)
    refuse(size % 9 > 0, "E345")
    raw = reader.take(size)
    pairs = [(raw[at], raw[at + 1 : at + 9]) for at in range(0, size, 9)]
    refuse(any(a >= b for (a, _), (b, _) in itertools.pairwise(pairs)), "E345")
    return dict(pairs)


def identity(known: Sequence[Sequence[bytes]]) -> bytes:
    joined = b"".join(entry for entries in known for entry in entries)
    return int(xxhash.xxh3_64_intdigest(joined)).to_bytes(8, "little")


# Index sections.


def rows(tensor: Tensor, kept: Sequence[int]) -> list[int]:
    """How many entries each row keeps, without rows that keep none; all as one where there are no rows."""
    if len(tensor.shape) < 2 or not kept:
        return [len(kept)]
    stretch = tensor.numel // tensor.shape[0]
    if len(kept) == tensor.numel:
        return [stretch] * tensor.shape[0]
    counts = [0] * tensor.shape[0]
    for i in kept:
        counts[i // stretch] += 1
    return [count for count in counts if count]


def read_index(reader: Reader, index_id: int, of_rows: Sequence[Sequence[int]]) -> list[int]:
    """The positions; `of_rows` are the kept entries of every row of every tensor that is present."""
    n = sum(map(sum, of_rows))
    if index_id in (DENSE, MASK_ID):
        return list(range(n))
    refuse(n > 1 << 31, "E345")
    k = reader.uv(n)
    if index_id == BITMAP:
        return ones(reader, k, n)
    if index_id == FLAT:
        return read_body(reader, [(n, k)])
    if index_id == MIXED:
        return read_mixed(reader, k, of_rows)
    if index_id == GAPS:
        return read_gaps(reader, k, n)
    if index_id == SQUEEZED:
        return ones(Reader(reader.frame(octets(n), octets(n))), k, n)
    if index_id == ENUMERATED:
        return read_sets(reader, k, n)
    refuse(index_id != DRAWN, "E344")
    return draw(n, k, int.from_bytes(reader.take(8), "little"))


def ones(reader: Reader, k: int, n: int) -> list[int]:
    positions = [i for i, bit in enumerate(reader.bits(n)) if bit]
    refuse(len(positions) != k, "E345")
    return positions


def read_gaps(reader: Reader, k: int, n: int) -> list[int]:
    if not k:
        return []
    raw = reader.frame(k, 5 * k)
    positions, at, last = [], 0, -1
    for _ in range(k):
        gap, place = 0, 0
        while True:
            refuse(at == len(raw) or place == 5, "E345")
            gap += (raw[at] & 127) << 7 * place
            at, place = at + 1, place + 1
            if raw[at - 1] < 128:
                break
        refuse(raw[at - 1] == 0 and place > 1, "E345")
        last += gap + 1
        refuse(last >= n, "E345")
        positions.append(last)
    refuse(at != len(raw), "E345")
    return positions


def read_mixed(reader: Reader, k: int, of_rows: Sequence[Sequence[int]]) -> list[int]:
    segments: list[tuple[int, int]] = []
    left = k
    for lengths, by_row in zip(of_rows, reader.bits(len(of_rows)), strict=True):
        most = min(sum(lengths), left)
        if by_row:
            refuse(len(lengths) < 2, "E345")
            (low,) = reader.take(1)
            refuse(low > 19, "E345")
            high = reader.unary(len(lengths), most >> low)
            counts = [(a << low) + b for a, b in zip(high, reader.lows(len(lengths), low), strict=True)]
            refuse(any(c > length for c, length in zip(counts, lengths, strict=True)) or sum(counts) > most, "E345")
            segments += zip(lengths, counts, strict=True)
        else:
            counts = [reader.uv(most)]
            segments.append((sum(lengths), counts[0]))
        left -= sum(counts)
    refuse(left > 0, "E345")
    return read_body(reader, segments)


def read_body(reader: Reader, segments: Sequence[tuple[int, int]]) -> list[int]:
    refuse(sum(min(k, length - k) for length, k in segments) > 8 * reader.left, "E345")  # each takes a bit at least
    listed: list[tuple[int, int, int]] = []  # of each entry: its segment, d and w
    most = []  # largest quotient of each segment
    for s, (length, k) in enumerate(segments):
        c = min(k, length - k)
        d = ((2 * length - c) * 45426 + c * 65536) // (c * 131072) if c else 1
        most.append((length - c) // d if c else 0)
        listed += [(s, d, d.bit_length() - 1)] * c
    quotients = reader.unary(len(listed), sum(most))
    refuse(any(q > most[s] for q, (s, _, _) in zip(quotients, listed, strict=True)), "E345")
    rests = [0] * len(listed)
    for width in sorted({w for _, _, w in listed} - {0}):
        of = [j for j, (_, _, w) in enumerate(listed) if w == width]
        for j, number in zip(of, reader.lows(len(of), width), strict=True):
            rests[j] = number
    long = [j for j, (_, d, w) in enumerate(listed) if rests[j] >= 2 ** (w + 1) - d]
    for j, bit in zip(long, reader.bits(len(long)), strict=True):
        rests[j] = 2 * rests[j] + bit - (2 ** (listed[j][2] + 1) - listed[j][1])
    positions, start, j = [], 0, 0
    for s, (length, k) in enumerate(segments):
        inside, last = set(), -1
        while j < len(listed) and listed[j][0] == s:
            last += quotients[j] * listed[j][1] + rests[j] + 1
            refuse(last >= length, "E345")
            inside.add(last)
            j += 1
        positions += [start + p for p in range(length) if (p in inside) != (2 * k > length)]
        start += length
    return positions


def read_sets(reader: Reader, k: int, n: int) -> list[int]:
    refuse(n > 65536, "E345")
    blocks = [range(start, min(n, start + 1024)) for start in range(0, n, 1024)]
    counts = []
    if len(blocks) > 1:
        (low,) = reader.take(1)
        refuse(low > 19, "E345")
        high = reader.unary(len(blocks) - 1, 2048 * (len(blocks) - 1) >> low)
        for a, b in zip(high, reader.lows(len(high), low), strict=True):
            word = (a << low) + b
            counts.append(k * 1024 // n + (-(word + 1) // 2 if word % 2 else word // 2))
    counts += [k - sum(counts)] * (len(blocks) > 0)
    refuse(any(c < 0 or c > len(block) for c, block in zip(counts, blocks, strict=True)), "E345")
    widths = [(choices(len(block), c) - 1).bit_length() for block, c in zip(blocks, counts, strict=True)]
    bits = reader.bits(sum(widths))
    positions: list[int] = []
    for block, c, width in zip(blocks, counts, widths, strict=True):
        number = int("0" + "".join(map(str, reversed(bits[:width]))), 2)
        bits = bits[width:]
        refuse(number >= choices(len(block), c), "E345")
        inside = []
        for i in range(c, 0, -1):  # the largest p with C(p, i) <= number, below the one before
            p = next(p for p in range(inside[-1] - 1 if inside else len(block) - 1, -1, -1) if choices(p, i) <= number)
            number -= choices(p, i)
            inside.append(p)
        positions += [block[p] for p in reversed(inside)]
    return positions


choices = functools.lru_cache(1 << 14)(math.comb)


def draw(n: int, k: int, seed: int) -> list[int]:
    wanted = min(k, n - k)
    words, marked = twister(seed % 2**32), set()
    while len(marked) < wanted:
        for _ in range(wanted - len(marked)):
            high, low = next(words), next(words)
            marked.add(((high << 32) + low) % 2**62 % n)
    return [i for i in range(n) if (i in marked) == (wanted == k)]


def twister(seed: int):
    """The 32-bit numbers of MT19937, initialised from one number (init_genrand of Matsumoto and Nishimura)."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) % 2**32)
    while True:
        for i in range(624):
            y = state[i] & 1 << 31 | state[(i + 1) % 624] & (1 << 31) - 1
            state[i] = state[(i + 397) % 624] ^ y >> 1 ^ 0x9908B0DF * (y & 1)
        for y in list(state):
            y ^= y >> 11
            y ^= y << 7 & 0x9D2C5680
            y ^= y << 15 & 0xEFC60000
            yield y ^ y >> 18


# Value sections.


def read_values(
    reader: Reader,
    value_id: int,
    counts: Sequence[int],
    dtypes: Sequence[str],
    known: Sequence[Sequence[bytes]] | None = None,
) -> list[list[bytes]]:
    """The memory of each entry that travels, tensor by tensor; `known` are the entries of the reference under REF."""
    k = sum(counts)
    if value_id in (0, 128):
        refuse(value_id == 0 and any(dtype != "float32" for dtype in dtypes), "E344")
        return [raw(reader, count, dtype) for count, dtype in zip(counts, dtypes, strict=True)]
    if value_id == 7:
        return [
            [ONES.get(t, (1).to_bytes(WIDTHS[t], "little"))] * count for count, t in zip(counts, dtypes, strict=True)
        ]
    if value_id == 8:
        refuse(any(dtype != "int64" for dtype in dtypes), "E344")
        (width,) = reader.take(1)
        refuse(not 1 <= width <= 63, "E345")
        return divide([number.to_bytes(8, "little") for number in reader.lows(k, width)], counts)
    if value_id == 1:
        refuse(any(dtype != "float32" for dtype in dtypes), "E344")
        words = planes(reader, k, 4)
        if known is None:
            bits = [word >> 1 | (word & 1) << 31 for word in words]
        else:
            near = [int.from_bytes(entry, "little") for entries in known for entry in entries]
            bits = [moved(word, r) for word, r in zip(words, near, strict=True)]
        return divide([word.to_bytes(4, "little") for word in bits], counts)
    refuse(any(dtype not in FLOATS for dtype in dtypes), "E344")
    numbers = {3: halves, 4: brains, 5: blocks, 6: signs, 9: blocks}[value_id](reader, value_id, counts)
    vectors = divide(numbers, counts)
    return [[cast(x, dtype) for x in vector] for vector, dtype in zip(vectors, dtypes, strict=True)]


def raw(reader: Reader, count: int, dtype: str) -> list[bytes]:
    if dtype == "bool":
        return [bytes([bit]) for bit in reader.bits(count)]
    memory, width = reader.take(WIDTHS[dtype] * count), WIDTHS[dtype]
    return [memory[width * i : width * i + width] for i in range(count)]


def divide(entries: list, counts: Sequence[int]) -> list[list]:
    """Joined entries tensor by tensor."""
    out, at = [], 0
    for count in counts:
        out.append(entries[at : at + count])
        at += count
    return out


def planes(reader: Reader, k: int, width: int) -> list[int]:
    """Words from their planes, whose lengths are read before any is opened."""
    found = []
    for _ in range(width):
        size = reader.uv(reader.left)
        found.append((size, reader.take(size or k)))
    opened = [content(plane, k, k) if size else plane for size, plane in found]
    return [sum(plane[j] << 8 * place for place, plane in enumerate(opened)) for j in range(k)]


def moved(word: int, reference: int) -> int:
    """The bits that lie `word` (zig-zag) floats away from those of the reference."""
    steps = word >> 1 if word % 2 == 0 else -(word >> 1) - 1
    place = (order(reference) + steps) % 2**32
    return place ^ (1 << 31 if place >> 31 else 2**32 - 1)


def order(bits: int) -> int:
    return bits ^ (2**32 - 1 if bits >> 31 else 1 << 31)


def halves(reader: Reader, value_id: int, counts: Sequence[int]) -> list[float]:
    return [struct.unpack("<e", word.to_bytes(2, "little"))[0] for word in planes(reader, sum(counts), 2)]


def brains(reader: Reader, value_id: int, counts: Sequence[int]) -> list[float]:
    words = [word >> 1 | (word & 1) << 15 for word in planes(reader, sum(counts), 2)]
    return [struct.unpack("<f", (word << 16).to_bytes(4, "little"))[0] for word in words]


def blocks(reader: Reader, value_id: int, counts: Sequence[int]) -> list[float]:
    block, width = {5: (256, 8), 9: (64, 4)}[value_id]
    scales = [struct.unpack(f"<{-(-count // block)}f", reader.take(4 * -(-count // block))) for count in counts]
    size = octets(sum(counts) * width)
    plane = planes(reader, size, 1)
    codes = Reader(bytes(plane)).numbers(sum(counts), width)
    signed = divide([code - (code >> (width - 1) << width) for code in codes], counts)
    return [
        single(code * own[i // block])
        for own, vector in zip(scales, signed, strict=True)
        for i, code in enumerate(vector)
    ]


def signs(reader: Reader, value_id: int, counts: Sequence[int]) -> list[float]:
    some = sum(count > 0 for count in counts)
    scales = iter(struct.unpack(f"<{some}f", reader.take(4 * some)))
    bits = divide(reader.bits(sum(counts)), counts)
    return [(scale if bit else -scale) for vector in bits if vector for scale in [next(scales)] for bit in vector]


def single(x: float) -> float:
    """The nearest float32."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


def cast(x: float, dtype: str) -> bytes:
    """A float32 as a float of this dtype: the nearest, ties to even. Which NaN a NaN becomes is not defined."""
    if dtype == "bfloat16":
        if math.isnan(x):
            return b"\xc0\x7f"
        bits = int.from_bytes(struct.pack("<f", x), "little")
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to_bytes(2, "little")
    if dtype == "float16":
        try:
            return struct.pack("<e", x)
        except OverflowError:
            return struct.pack("<e", math.copysign(math.inf, x))
    return struct.pack("<f" if dtype == "float32" else "<d", x)


# The frame around several blobs.


def unframe(blob: bytes) -> tuple[int, int, int, dict[str, bytes], dict[str, bytes]]:
    """Kind, round, client, name -> the 8 bytes of each number, name -> section."""
    reader = Reader(blob)
    front = reader.take(8)
    refuse(front[:4] != b"LMF\x01", "E341")
    digest = reader.take(8)
    head = Reader(reader.take(int.from_bytes(front[4:], "little")))
    refuse(digest != checksum(front, head.raw), "E343")
    kind, number, client = struct.unpack("<BII", head.take(9))
    refuse(kind > 2, "E344")
    scalars: dict[str, bytes] = {}
    for _ in range(head.uv(head.left)):
        name = read_name(head, scalars)
        scalars[name] = head.take(8)
    sizes: dict[str, int] = {}
    for _ in range(head.uv(head.left)):
        name = read_name(head, sizes)
        sizes[name] = head.uv(2**63 - 1)
    refuse(head.left > 0, "E340")
    sections = {name: reader.take(size) for name, size in sizes.items()}
    refuse(reader.left > 0, "E340")
    return kind, number, client, scalars, sections


def read_name(head: Reader, known: Mapping[str, object]) -> str:
    text = head.take(head.uv(1024))
    try:
        name = text.decode()
    except UnicodeDecodeError:
        raise Refused("E345") from None
    refuse(not name or name in known, "E345")
    return name
