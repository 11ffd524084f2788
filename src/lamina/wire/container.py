"""The container FLC1: what the receiver knows (schema), a sealed 24-byte header, and a reader that trusts nothing.

All integers are little endian; ``uv`` is an unsigned LEB128 number of minimal length (at most 9 bytes); in bit strings
bit i is bit (i mod 8) of byte (i div 8) and padding bits are zero::

    0   3  magic "FLC"            8  8  schema id, BLAKE2b-64 (see `schema_id`)
    3   1  version = 1           16  8  XXH3-64 of the bytes from 24 on, seeded with the XXH3-64 of bytes 0..15
    4   1  index id              24     [REF: 8 bytes, XXH3-64 of the reference's entries at the positions that travel]
    5   1  value id                     [SUBSET: ceil(T/8) bytes, which of the T tensors of the schema are here]
    6   1  flags                        [SCALARS: numbers beside the tree (scalars.py)]
    7   1  reserved = 0                 [MASKED: 8 bytes, id of the mask whose kept entries the indices count]
                                        index section (index.py), value section (values.py)
                                        [MAC: 16 bytes, keyed BLAKE2b-128 of all before them]; nothing may follow

The checksum stops before the MAC, which covers it: XXH3 finds accidents, the MAC forgeries.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import xxhash
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from lamina.errors import ConfigError, WireError, expect

Buffer: TypeAlias = bytes | memoryview
Indices: TypeAlias = NDArray[np.int64]

MAGIC = b"FLC"
VERSION = 1
HEADER = struct.Struct("<3sBBBBB8sQ")

# Flags. MASKED is there because sparse indices under a mask are meaningless without the same mask, and no other field
# would notice.
REF, SUBSET, MAC, SCALARS, MASKED = 1, 2, 4, 8, 16
KNOWN_FLAGS = REF | SUBSET | MAC | SCALARS | MASKED

MAC_SIZE = 16
KEY_SIZES = range(16, 65)  # bytes; BLAKE2b takes no more

# Code of each dtype in the schema id; a dtype that is not here does not travel.
DTYPES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float64: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.int16: 6,
    torch.int8: 7,
    torch.uint8: 8,
    torch.bool: 9,
}

WINDOW = 1 << 23  # bytes of history a zstd frame may ask of a receiver (what RFC 8878 recommends to support)

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("lamina.wire reads and writes tensors in place and needs a little-endian machine")


class Spec(NamedTuple):
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Schema: TypeAlias = dict[str, Spec]


def schema_of(like: Mapping[str, Tensor] | Mapping[str, Spec]) -> Schema:
    """The schema of a tree (or of a schema: itself)."""
    return {name: x if isinstance(x, Spec) else Spec(tuple(x.shape), x.dtype) for name, x in like.items()}


def schema_id(schema: Mapping[str, Spec]) -> bytes:
    """BLAKE2b-64 of "FLC1-schema" and, per tensor: uv length of the name, name, uv rank, uv dims, u8 dtype code."""
    parts = [b"FLC1-schema"]
    for name, spec in schema.items():
        text = name.encode()
        parts += [uv(len(text)), text, uv(len(spec.shape)), *map(uv, spec.shape), bytes([dtype_code(name, spec.dtype)])]
    return hashlib.blake2b(b"".join(parts), digest_size=8).digest()


def dtype_code(name: str, dtype: torch.dtype) -> int:
    code = DTYPES.get(dtype)
    if code is None:
        raise WireError(f"{name}: {dtype} does not travel", code="E342", remedy=f"one of {', '.join(map(str, DTYPES))}")
    return code


def uv(number: int) -> bytes:
    """`number` as unsigned LEB128 of minimal length."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def uv_size(number: int) -> int:
    """len(uv(number))"""
    return max(1, (number.bit_length() + 6) // 7)


class Reader:
    """Reads a buffer from front to back; every failure is a WireError."""

    def __init__(self, buffer: memoryview, at: int = 0):
        self.buffer = buffer
        self.at = at

    @property
    def left(self) -> int:
        return len(self.buffer) - self.at

    def take(self, size: int, what: str) -> memoryview:
        """The next `size` bytes, not copied."""
        if size > self.left:
            raise WireError(f"{what}: {size} bytes expected, {self.left} left", code="E340")
        self.at += size
        return self.buffer[self.at - size : self.at]

    def uv(self, what: str, most: int) -> int:
        """A number of at most `most`."""
        number = 0
        for place in range(9):
            byte = self.take(1, what)[0]
            number |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if byte == 0 and place > 0:
                    raise WireError(f"{what}: number longer than it needs to be", code="E345")
                if number > most:
                    raise WireError(f"{what}: {number}, expected at most {most}", code="E345")
                return number
        raise WireError(f"{what}: number of more than 9 bytes", code="E345")

    def end(self) -> None:
        if self.left:
            raise WireError(f"{self.left} bytes after the end", code="E340")


def as_view(blob: Any, max_bytes: int | None) -> memoryview:
    """`blob` as flat bytes, not longer than `max_bytes`."""
    if not isinstance(blob, (bytes, bytearray, memoryview)):
        raise WireError(f"expected bytes, got {type(blob).__name__}", code="E340")
    view = memoryview(blob)
    if max_bytes is not None and view.nbytes > max_bytes:
        raise WireError(f"{view.nbytes} bytes, at most {max_bytes} allowed", code="E340")
    return view if view.format == "B" and view.ndim == 1 and view.contiguous else memoryview(view.tobytes())


# Bits, compressed frames and raw tensors: what sections are made of.


def pack_bits(bits: NDArray[np.bool_]) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_bits(view: memoryview, count: int, what: str) -> NDArray[np.bool_]:
    """The first `count` bits of ceil(count/8) bytes; the padding must be zero."""
    packed = np.frombuffer(view, np.uint8)
    if count % 8 and packed[-1] >> (count % 8):
        raise WireError(f"{what}: padding bits are not zero", code="E345")
    return np.unpackbits(packed, count=count, bitorder="little").view(np.bool_)


def compress(raw: NDArray[np.uint8], thorough: bool = False) -> bytes:
    """One zstd frame with its content size: of level 1, or with the strategy btultra, which codes bytes that hardly
    differ in frequency where level 1 gives up. It is given next to no memory to look for repetitions in."""
    if thorough:
        made = zstandard.ZstdCompressor(compression_params=_BTULTRA)
    else:
        made = zstandard.ZstdCompressor(level=1, write_content_size=True)
    packed: bytes = made.compress(raw.data)
    return packed


_BTULTRA = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_BTULTRA, window_log=17, chain_log=6, hash_log=6, search_log=1, min_match=7,
    target_length=1, write_content_size=True,
)  # fmt: skip


def decompress(frame: memoryview, least: int, most: int, what: str) -> NDArray[np.uint8]:
    """The content of exactly one zstd frame of `least` to `most` bytes, known from its header before it is opened."""
    try:
        header = zstandard.get_frame_parameters(frame)
    except zstandard.ZstdError as error:
        raise WireError(f"{what}: no zstd frame ({error})", code="E347") from None
    size = header.content_size
    least = max(1, least)  # zstandard takes a frame of no content for read without looking at what follows it
    if not least <= size <= most:  # an absent size reads as 2**64 - 1
        raise WireError(f"{what}: zstd content of {size} bytes, expected {least} to {most}", code="E347")
    if header.window_size > max(WINDOW, most) or header.dict_id:
        raise WireError(f"{what}: zstd frame asks for a large window or a dictionary", code="E347")
    try:
        content = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise WireError(f"{what}: damaged zstd frame ({error})", code="E347") from None
    if len(content) != size:
        raise WireError(f"{what}: zstd frame of {len(content)} bytes declared {size}", code="E347")
    return np.frombuffer(content, np.uint8)


def raw_bytes(flat: Tensor) -> memoryview:
    """The memory of a contiguous one-dimensional CPU tensor of any dtype."""
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def raw_tensor(view: memoryview, dtype: torch.dtype) -> Tensor:
    """A writable one-dimensional tensor from its memory."""
    out = torch.empty(len(view) // dtype.itemsize, dtype=dtype)
    np.copyto(out.view(torch.uint8).numpy(), np.frombuffer(view, np.uint8))
    return out


def flat_vector(x: Tensor) -> Tensor:
    """The entries of `x` in row-major order on the CPU, with stride 1: a view where that is possible."""
    flat = x.cpu().reshape(-1).contiguous()
    return flat if flat.stride(0) == 1 else flat.as_strided(flat.shape, (1,))  # of one entry, any stride is contiguous


# The header.


class Header(NamedTuple):
    index_id: int
    value_id: int
    flags: int


def seal(header: Header, schema: bytes, parts: Iterable[Buffer], key: bytes | None = None) -> bytes:
    """Header and sections as one blob: one pass for the checksum, one copy; with a key, one pass for the MAC."""
    parts = list(parts)
    flags = header.flags if key is None else header.flags | MAC
    front = HEADER.pack(MAGIC, VERSION, header.index_id, header.value_id, flags, 0, schema, 0)[:16]
    sealed = [front, checksum(front, parts).to_bytes(8, "little"), *parts]
    return b"".join(sealed if key is None else [*sealed, mac(key, sealed)])


def unseal(view: memoryview, schema: bytes, key: bytes | None = None) -> tuple[Header, Reader]:
    """Check everything that can be checked without looking into the sections, in the order of the format.

    The reader ends where the value section does.
    """
    if len(view) < HEADER.size:
        raise WireError(f"{len(view)} bytes, a header alone has {HEADER.size}", code="E340")
    magic, version, index_id, value_id, flags, reserved, sender, digest = HEADER.unpack_from(view)
    if magic != MAGIC:
        raise WireError(f"magic {magic.hex()}, expected {MAGIC.hex()}", code="E341")
    if version != VERSION:
        raise WireError(f"format version {version}, expected {VERSION}", code="E341")
    if reserved != 0:
        raise WireError(f"reserved byte {reserved}, expected 0", code="E341")
    if sender != schema:
        raise WireError(f"schema {sender.hex()}, expected {schema.hex()}", code="E342", remedy="another model or tree?")
    if flags & ~KNOWN_FLAGS:  # before the checksum, which ends where flags say
        raise WireError(f"flags {flags:#04x} not supported here", code="E344")
    stop = len(view) - MAC_SIZE if flags & MAC else len(view)
    if stop < HEADER.size:
        raise WireError(f"{len(view)} bytes, a header and a MAC have {HEADER.size + MAC_SIZE}", code="E340")
    if key is not None:
        verify(view, stop, key)
    if digest != checksum(view[:16], [view[HEADER.size : stop]]):
        raise WireError("checksum does not match", code="E343")
    if flags & MAC and key is None:
        remedy = "give the receiver the sender's key, or let the sender send without one"
        raise WireError("sent with a MAC, the receiver holds no key", code="E349", remedy=remedy)
    return Header(index_id, value_id, flags), Reader(view[:stop], HEADER.size)


def verify(view: memoryview, stop: int, key: bytes) -> None:
    """Refuse what no holder of the key wrote. Nothing that is said here tells what would have been right."""
    if stop == len(view):
        remedy = "the sender is to encode with the same key"
        raise WireError("sent without a MAC, the receiver holds a key", code="E349", remedy=remedy)
    if not hmac.compare_digest(mac(key, [view[:stop]]), view[stop:]):
        raise WireError("MAC does not match", code="E349", remedy="another key, or changed on the way")


def mac(key: bytes, parts: Iterable[Buffer]) -> bytes:
    """BLAKE2b-128 of `parts`, keyed."""
    hasher = hashlib.blake2b(key=key, digest_size=MAC_SIZE)
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def check_key(key: object) -> None:
    """ConfigError for what is no key, without telling it."""
    message = f"key of {len(key)} bytes" if isinstance(key, bytes) else f"key: {type(key).__name__}"
    expected = f"expected {KEY_SIZES[0]} to {KEY_SIZES[-1]} bytes"
    fits = isinstance(key, bytes) and len(key) in KEY_SIZES
    expect(fits, f"{message}, {expected}", remedy="secrets.token_bytes(32), the same at both ends")


def checksum(front: Buffer, parts: Iterable[Buffer]) -> int:
    """XXH3-64 of `parts`, seeded with the XXH3-64 of `front`."""
    hasher = xxhash.xxh3_64(seed=xxhash.xxh3_64_intdigest(front))
    for part in parts:
        hasher.update(part)
    digest: int = hasher.intdigest()
    return digest


def write_subset(present: Sequence[bool]) -> bytes:
    return pack_bits(np.array(present, dtype=np.bool_))


def read_subset(reader: Reader, schema: Mapping[str, Spec]) -> list[str]:
    """Names of the tensors that are present, in schema order."""
    bits = unpack_bits(reader.take((len(schema) + 7) // 8, "subset"), len(schema), "subset")
    return [name for name, here in zip(schema, bits.tolist(), strict=True) if here]


def share(size: int, weights: Sequence[int]) -> list[int]:
    """`size` bytes divided by weight, rounded down: what is left over belongs to nobody."""
    total = sum(weights)
    return [size * weight // total for weight in weights] if total else [0 for _ in weights]


def refuse(condition: bool, message: str) -> None:
    """ConfigError for what a sender asks of a codec that it cannot do."""
    if condition:
        raise ConfigError(message)
