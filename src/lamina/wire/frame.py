"""One message on the wire: named numbers and named sections (encoded trees) in one frame.

::

    0   3  magic "LMF"                    H bytes of head:
    3   1  version = 1                      u8 kind (0 plan, 1 message, 2 state), u32 round, u32 client
    4   4  u32 H, length of the head        uv number of scalars; each: uv length, name, float64
    8   8  XXH3-64 of the head, seeded      uv number of sections; each: uv length, name, uv bytes
           with the XXH3-64 of bytes 0..7   then the sections one after the other; nothing may follow

Sections carry checksums of their own. Names are UTF-8 of 1 to 1024 bytes and differ from each other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from lamina.errors import ConfigError, WireError, expect
from lamina.wire.container import Buffer, Reader, as_view, checksum, uv, uv_size

MAGIC = b"LMF"
VERSION = 1
FRONT = struct.Struct("<3sBI")
FIXED = struct.Struct("<BII")
KINDS = ("plan", "message", "state")
LONGEST_NAME = 1024


class Frame(NamedTuple):
    """A plan (to a client), a message (from one) or a state. Round and client number what it belongs to."""

    kind: str
    round: int
    client: int
    scalars: dict[str, float]
    sections: dict[str, bytes]


# Kind of a frame, and its bytes -> the bytes that arrive; None: those that were sent, and somebody else reads them.
Carry: TypeAlias = Callable[[str, bytes], bytes | None]


def in_memory(kind: str, blob: bytes) -> bytes:
    """A Carry to someone in this process."""
    return blob


def pack(frame: Frame) -> bytes:
    """The bytes of a frame."""
    expect(frame.kind in KINDS, f"kind={frame.kind!r}: expected one of {', '.join(KINDS)}")
    for key, number in (("round", frame.round), ("client", frame.client)):
        expect(0 <= number < 1 << 32, f"{key}={number}: expected 0 <= {key} < 2**32")
    parts = [FIXED.pack(KINDS.index(frame.kind), frame.round, frame.client), uv(len(frame.scalars))]
    parts += [_name(name) + struct.pack("<d", number) for name, number in frame.scalars.items()]
    parts += [uv(len(frame.sections))]
    parts += [_name(name) + uv(len(section)) for name, section in frame.sections.items()]
    head = b"".join(parts)
    front = FRONT.pack(MAGIC, VERSION, len(head))
    return b"".join([front, checksum(front, [head]).to_bytes(8, "little"), head, *frame.sections.values()])


def unpack(blob: Buffer, *, max_bytes: int | None = None) -> Frame:
    """The frame in `blob`, of at most `max_bytes` bytes. Raises WireError and nothing else."""
    reader = Reader(as_view(blob, max_bytes))
    front = reader.take(FRONT.size, "frame")
    magic, version, size = FRONT.unpack(front)
    if magic != MAGIC or version != VERSION:
        raise WireError(f"magic {magic.hex()} version {version}, expected {MAGIC.hex()} version {VERSION}", code="E341")
    digest = int.from_bytes(reader.take(8, "frame checksum"), "little")
    head = reader.take(size, "frame head")
    if digest != checksum(front, [head]):
        raise WireError("checksum of the frame head does not match", code="E343")
    kind, round, client, scalars, sizes = _read_head(Reader(head))
    sections = {name: bytes(reader.take(length, f"section {name!r}")) for name, length in sizes.items()}
    reader.end()
    return Frame(kind, round, client, scalars, sections)


def overhead(kind: str, scalars: Mapping[str, float], sections: Mapping[str, int]) -> int:
    """len(pack(frame)) less the lengths of its sections, given as name -> length; of all kinds and rounds alike."""
    expect(kind in KINDS, f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    of_scalars = uv_size(len(scalars)) + sum(len(_name(name)) + 8 for name in scalars)
    of_sections = uv_size(len(sections)) + sum(len(_name(name)) + uv_size(size) for name, size in sections.items())
    return FRONT.size + 8 + FIXED.size + of_scalars + of_sections


def _read_head(reader: Reader) -> tuple[str, int, int, dict[str, float], dict[str, int]]:
    kind, round, client = FIXED.unpack(reader.take(FIXED.size, "frame head"))
    if kind >= len(KINDS):
        raise WireError(f"frame kind {kind}, expected 0 to {len(KINDS) - 1}", code="E344")
    scalars: dict[str, float] = {}
    for _ in range(reader.uv("number of scalars", most=reader.left)):
        name = _read_name(reader, scalars)
        (scalars[name],) = struct.unpack("<d", reader.take(8, "scalar"))
    sizes: dict[str, int] = {}
    for _ in range(reader.uv("number of sections", most=reader.left)):
        name = _read_name(reader, sizes)
        sizes[name] = reader.uv("section length", most=(1 << 63) - 1)
    reader.end()
    return KINDS[kind], round, client, scalars, sizes


def _name(name: str) -> bytes:
    text = name.encode()
    if not 0 < len(text) <= LONGEST_NAME:
        raise ConfigError(f"name of {len(text)} bytes: expected 1 to {LONGEST_NAME}")
    return uv(len(text)) + text


def _read_name(reader: Reader, known: Mapping[str, object]) -> str:
    text = bytes(reader.take(reader.uv("name length", most=LONGEST_NAME), "name"))
    try:
        name = text.decode()
    except UnicodeDecodeError:
        raise WireError("a name is not UTF-8", code="E345") from None
    if not name or name in known:
        raise WireError(f"name {name!r} is empty or not the first of its kind", code="E345")
    return name
