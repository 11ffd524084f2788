"""Writes the test vectors: every pair of codings, special cases, and messages that must be refused.

    python tests/wire/vectors/write.py

and lists them in docs/wire-format.md between the marks there. A vector that exists is never changed, since what was
sent once must decode forever: this adds new ones, and stops where one of the same name would differ.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import struct
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from forced import (  # noqa: E402
    FLOATS,
    IDS,
    INDICES,
    KINDS,
    NAMES,
    fast,
    fast_scalars,
    force,
    memory,
    resealed,
    sealed,
)

from lamina.wire import Context, Spec, WireError, index, schema_of  # noqa: E402
from lamina.wire.codec import Support  # noqa: E402
from lamina.wire.container import checksum, uv  # noqa: E402
from lamina.wire.frame import Frame, pack, unpack  # noqa: E402

# What receivers hold.

SHAPES = {"w": (3, 4), "b": (5,), "e": (0, 3), "s": ()}
MASK = {"w": torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)}
SPECIAL = [
    0x3F800000,
    0xC0000000,
    0x80000000,
    1,
    0x7FC00001,
    0x7F800000,
    0xFF800000,
    0x7F800001,
    0x3F800001,
    0xFFFFFFFF,
]


def specs(dtype: torch.dtype) -> dict[str, Spec]:
    return {name: Spec(shape, dtype) for name, shape in SHAPES.items()}


def filled(numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    parts = numbers.split(sizes)
    return {name: part.reshape(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


WORDS = torch.tensor(SPECIAL + [0x3F000000 + 8 * i for i in range(8)], dtype=torch.int64).to(torch.int32)
EXACT = filled(WORDS.view(torch.float32))
BEFORE = filled((WORDS + torch.tensor([0, 1, -1] * 6, dtype=torch.int32)).view(torch.float32))
FINITE = filled(torch.tensor([(-1) ** i * (i + 0.25) / 8 for i in range(18)]))
RING = filled(torch.tensor([(i * 0x9E3779B97F4A7C15 + 1) % 2**63 - 2**62 for i in range(18)]))
BITS = filled(torch.tensor([i % 3 > 0 for i in range(18)]))
DTYPES = {
    dtype: torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)
    if dtype == torch.bool
    else torch.tensor([1, 2, 100]).to(dtype)
    for dtype in NAMES
}
MIXED = {f"{name}": DTYPES[dtype] for dtype, name in NAMES.items()}
WIDE = {"x": torch.arange(600).float().sin().reshape(2, 300), "y": torch.zeros(70)}

CONTEXTS = {
    "floats": Context(specs(torch.float32), MASK, BEFORE),
    "bare": Context(specs(torch.float32)),
    "integers": Context(specs(torch.int64), MASK),
    "bits": Context(specs(torch.bool), MASK),
    "dtypes": Context(schema_of(MIXED)),
    "hundred": Context({"x": Spec((100,), torch.float32)}),
    "rows": Context({"a": Spec((2, 4), torch.float32), "b": Spec((3,), torch.float32)}),
    "wide": Context(schema_of(WIDE)),
    "none": Context({}),
    "zero": Context({"a": Spec((0, 1 << 40), torch.float32), "b": Spec((1 << 40, 0), torch.float32)}),
    "huge": Context({"x": Spec((65536, 32768), torch.float32)}),
    "beyond": Context({"x": Spec((65536, 32768), torch.float32), "y": Spec((), torch.float32)}),
}
KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
SHORTEST, LONGEST = bytes(16), bytes(range(64))
CONTEXTS |= {
    "two blocks": Context({"x": Spec((1030,), torch.bool)}),
    "three blocks": Context(
        {"m": Spec((4, 300), torch.bool), "v": Spec((1000,), torch.bool)},
        {"m": (torch.arange(1200) % 3 > 0).reshape(4, 300)},
    ),
    "65 blocks": Context({"x": Spec((65537,), torch.bool)}),
}
CONTEXTS |= {
    "keyed": replace(CONTEXTS["floats"], key=KEY),
    "keyed otherwise": replace(CONTEXTS["floats"], key=OTHER),
    "keyed rows": replace(CONTEXTS["rows"], key=KEY),
    "keyed none": replace(CONTEXTS["none"], key=KEY),
    "shortest key": replace(CONTEXTS["none"], key=SHORTEST),
    "longest key": replace(CONTEXTS["none"], key=LONGEST),
}
HOME = {"ring": ("integers", RING), "none": ("bits", BITS), "own": ("dtypes", MIXED)}
HOME |= dict.fromkeys(("fp32", "lossless", "REF"), ("floats", EXACT))


# What is decoded.

Vector = dict[str, Any]
valid: list[Vector] = []
hostile: list[Vector] = []
frames: list[Vector] = []


def good(name: str, context: str, blob: bytes) -> None:
    tree = fast(blob, CONTEXTS[context])
    assert not isinstance(tree, str), (name, tree)
    found = {"name": name, "context": context, "blob": blob.hex(), "tree": {k: v.hex() for k, v in tree.items()}}
    scalars = fast_scalars(blob, CONTEXTS[context])
    assert not isinstance(scalars, str), (name, scalars)
    valid.append(found | ({"scalars": {str(k): v.hex() for k, v in scalars.items()}} if scalars else {}))


def pairs() -> None:
    for index_id in INDICES:
        for kind in KINDS:
            context, tree = HOME.get(kind, ("floats", FINITE))
            known = CONTEXTS[context]
            if index_id != index.MASK_ID:
                known = Context(known.schema, None, known.reference)
            n = sum(x.numel() for x in tree.values())
            message = force(tree, known, index_id, kind, range(1, n, 3), seed=7, by_row=[True])
            good(f"index {index_id}, values {IDS[kind]}{' REF' * (kind == 'REF')}", context, message.blob)


def special() -> None:
    floats = CONTEXTS["floats"]
    plain = Context(floats.schema, None, floats.reference)
    part = {"b": EXACT["b"], "s": EXACT["s"]}
    masked = range(0, 12, 2)

    def add(name: str, *args: Any, **known: Any) -> None:
        good(name, "floats", force(*args, **known).blob)

    add("a subset of the tensors", part, plain, 0, "fp32")
    add("a subset of no tensors", {}, plain, 0, "fp32")
    for index_id in (2, 3, 4, 5, 6, 8):
        add(f"index {index_id} under a mask", EXACT, floats, index_id, "fp32", masked, by_row=[True], seed=1)
        add(f"index {index_id}, no entry", EXACT, plain, index_id, "fp32")
        add(f"index {index_id}, every entry", EXACT, plain, index_id, "fp32", range(18), seed=1)
        add(f"index {index_id}, all but one", EXACT, plain, index_id, "fp32", [*range(9), *range(10, 18)], seed=2)
    add("REF, SUBSET and MASKED", {"w": EXACT["w"], "s": EXACT["s"]}, floats, 3, "REF", [0, 2, 6])
    add("REF and SUBSET", {"w": EXACT["w"]}, plain, 0, "REF")
    add("REF and MASKED", EXACT, floats, 5, "REF", [1, 2, 11])
    add("SUBSET and MASKED", {"w": EXACT["w"], "b": EXACT["b"]}, floats, 4, "lossless", [1, 2, 10], by_row=[True])
    add("REF over no entry", EXACT, plain, 2, "REF")
    add(
        "SUBSET with the mask's id, whichever tensors are present",
        {"b": FINITE["b"], "w": FINITE["w"]},
        floats,
        1,
        "sign",
    )
    good("a subset of every tensor", "floats", sealed(0, 0, 2, floats.schema, b"\x0f" + bytes(72)))
    unmasked = b"\x02" + Support(floats, floats.schema).mask_id() + b"\x01\x01" + bytes(4)
    good("MASKED, and no tensor present has a mask", "floats", sealed(2, 0, 18, floats.schema, unmasked))
    for width in (1, 8, 16, 63):
        message = force(RING, CONTEXTS["integers"], 0, "ring", bits=width)
        good(f"ring of {width} bits", "integers", message.blob)
    for kind in ("int8", "int4", "sign", "lossless", "bf16"):
        good(f"{kind} across blocks and tensors", "wide", force(WIDE, CONTEXTS["wide"], 0, kind).blob)
    for dtype in FLOATS[1:]:
        tree = {name: x.to(getattr(torch, dtype)) for name, x in FINITE.items()}
        CONTEXTS[dtype] = Context(schema_of(tree))
        for kind in ("fp16", "bf16", "int8", "int4", "sign"):
            good(f"{kind} of {dtype}", dtype, force(tree, CONTEXTS[dtype], 0, kind).blob)
    for kind in ("fp32", "lossless", "int8", "none", "own"):
        good(f"{kind} without a tensor", "none", force({}, CONTEXTS["none"], 0, kind).blob)
    good("dimensions of zero and 2^40", "zero", sealed(4, 1, 0, CONTEXTS["zero"].schema, b"\0\0\0\0" + bytes(4)))
    low, high = zstandard.compress(bytes(100)), zstandard.compress(b"\x3c" * 100)
    squeezed = uv(len(low)) + low + uv(len(high)) + high
    good("fp16 in compressed planes", "hundred", sealed(0, 3, 0, CONTEXTS["hundred"].schema, squeezed))
    good(
        "gaps of the most bytes they may take", "hundred", sealed(5, 7, 0, CONTEXTS["hundred"].schema, gaps(b"\x63", 1))
    )


def number(bits: int) -> float:
    (x,) = struct.unpack("<d", bits.to_bytes(8, "little"))
    return float(x)


NUMBERS = {0: 1.0, 1: -0.0, 7: number(0x7FF8000000000001), 254: number(0xFFF0000000000000), 255: number(1)}
MOST = {3 * i: 1 / (i + 1) for i in range(64)}


def beside() -> None:
    """SCALARS and MAC, with every other flag."""
    part = {"w": EXACT["w"], "s": EXACT["s"]}
    flags = {"REF": 1, "SUBSET": 2, "MAC": 4, "SCALARS": 8, "MASKED": 16}
    for chosen in itertools.product((False, True), repeat=5):
        names = [name for name, flag in zip(flags, chosen, strict=True) if flag]
        if not {"MAC", "SCALARS"} & set(names):
            continue
        home = "keyed" if "MAC" in names else "floats"
        known = replace(CONTEXTS[home], scalars=NUMBERS if "SCALARS" in names else None)
        known = known if "MASKED" in names else replace(known, mask=None)
        tree, kind = (part if "SUBSET" in names else EXACT), ("REF" if "REF" in names else "fp32")
        blob = force(tree, known, 2, kind, [0, 2, 5]).blob
        assert blob[6] == sum(flags[name] for name in names), names
        good(f"flags {', '.join(names)}", home, blob)
    keyed = CONTEXTS["keyed"]
    good("MAC and SCALARS with the mask's id", "keyed", force(EXACT, replace(keyed, scalars=NUMBERS), 1, "fp32").blob)
    good("a tree of no tensors and the most scalars", "none", force({}, Context({}, scalars=MOST), 0, "fp32").blob)
    good("scalars of no pairs", "none", sealed(0, 0, 8, {}, b"\0"))
    for home in ("keyed none", "shortest key", "longest key"):
        good(f"nothing but a MAC, {home}", home, force({}, CONTEXTS[home], 0, "fp32").blob)


# What is refused.


def bad(name: str, code: str, context: str, blob: bytes) -> None:
    refused = fast(blob, CONTEXTS[context])
    if refused != code:
        print(f"{name}: {code} expected, {refused if isinstance(refused, str) else 'accepted'}", file=sys.stderr)
    hostile.append({"name": name, "code": code, "context": context, "blob": blob.hex()})


def of(name: str, code: str, context: str, ids: tuple[int, int], body: bytes | str, flags: int = 0) -> None:
    raw = bytes.fromhex(body) if isinstance(body, str) else body
    bad(name, code, context, sealed(*ids, flags, CONTEXTS[context].schema, raw))


def gaps(raw: bytes, k: int) -> bytes:
    return uv(k) + framed(zstandard.compress(raw, 1))


def framed(frame: bytes) -> bytes:
    return uv(len(frame)) + frame


def envelope() -> None:
    blob = force(EXACT, CONTEXTS["bare"], 0, "fp32").blob

    def change(name: str, code: str, at: int, to: int, *, seal: bool = True, context: str = "floats") -> None:
        changed = blob[:at] + bytes([to]) + blob[at + 1 :]
        bad(name, code, context, resealed(changed) if seal else changed)

    bad("nothing", "E340", "floats", b"")
    bad("a header that lacks a byte", "E340", "floats", blob[:23])
    bad("a header and nothing else", "E340", "floats", resealed(blob[:24]))
    bad("the last byte cut off", "E343", "floats", blob[:-1])
    bad("the last byte cut off, sealed again", "E340", "floats", resealed(blob[:-1]))
    bad("a byte behind the end", "E343", "floats", blob + b"\0")
    bad("a byte behind the end, sealed again", "E340", "floats", resealed(blob + b"\0"))
    bad("twice the same blob", "E343", "floats", blob + blob)
    bad("twice the same blob, sealed again", "E340", "floats", resealed(blob + blob))
    bad("a PNG", "E341", "floats", b"\x89PNG\r\n\x1a\n" + bytes(40))
    change("another magic", "E341", 2, ord("D"))
    change("version 0", "E341", 3, 0)
    change("version 2", "E341", 3, 2)
    change("version 255", "E341", 3, 255)
    change("a reserved byte of 1", "E341", 7, 1)
    change("a schema id with a bit flipped", "E342", 8, blob[8] ^ 1)
    bad("the schema of another model", "E342", "hundred", blob)
    bad("the schema in another dtype", "E342", "integers", blob)
    bad("a blob of no schema", "E342", "none", blob)
    change("a checksum with a bit flipped", "E343", 16, blob[16] ^ 1, seal=False)
    change("an index id changed behind the seal", "E343", 4, 1, seal=False)
    change("a value id changed behind the seal", "E343", 5, 3, seal=False)
    change("a flag set behind the seal", "E343", 6, 2, seal=False)
    change("a value changed behind the seal", "E343", 30, blob[30] ^ 128, seal=False)
    for id in (7, 9, 16, 255):
        change(f"index id {id}", "E344", 4, id)
    for id in (2, 10, 127, 129, 255):
        change(f"value id {id}", "E344", 5, id)
    change("flag MAC", "E343", 6, 4)  # without one: the last values are taken for it
    change("flag SCALARS", "E340", 6, 8)  # without any: the first value is taken for their length
    for flag in (32, 64, 128, 255):
        change(f"flag {flag}", "E344", 6, flag)
    change("flag MASKED on a dense index", "E344", 6, 16)
    for id in sorted({0, 3, 4, 5, 6, 7, 8, 9, 128}):
        of(f"flag REF on value id {id}", "E344", "floats", (0, id), bytes(80), flags=1)


def heads() -> None:
    of("flag MASKED on the mask's id", "E344", "floats", (1, 0), bytes(80), flags=16)
    blob = force(EXACT, Context(CONTEXTS["floats"].schema, None, BEFORE), 0, "REF").blob
    bad("REF for a receiver without a reference", "E348", "bare", blob)
    bad("REF to another reference", "E348", "floats", resealed(blob[:24] + bytes(8) + blob[32:]))
    bad("REF cut off in the reference's id", "E340", "floats", resealed(blob[:31]))
    bad("REF cut off behind the reference's id", "E340", "floats", resealed(blob[:32]))
    some = force(EXACT, Context(CONTEXTS["floats"].schema, None, BEFORE), 2, "REF", range(9)).blob
    others = some[:32] + bytes([some[32]]) + b"\xfe\x03\0" + some[36:]
    bad("REF with the reference's entries of other positions", "E348", "floats", resealed(others))
    of("REF over integers", "E344", "integers", (0, 1), bytes(80), flags=1)
    of("REF over several dtypes", "E344", "dtypes", (0, 1), bytes(80), flags=1)
    of("a subset without its bits", "E340", "floats", (0, 0), b"", flags=2)
    of("a subset with a fifth tensor of four", "E345", "floats", (0, 0), b"\x18" + bytes(24), flags=2)
    of("a subset of no tensors with values", "E340", "floats", (0, 0), b"\0" + bytes(4), flags=2)
    of("a subset with the values of all", "E340", "floats", (0, 0), b"\x08" + bytes(72), flags=2)
    of("a subset of an empty schema", "E340", "none", (0, 0), b"\0", flags=2)
    under = force(EXACT, CONTEXTS["floats"], 2, "fp32", range(5)).blob
    bad("MASKED for a receiver without a mask", "E346", "bare", under)
    bad("MASKED with another mask", "E346", "floats", resealed(under[:24] + b"\0" + under[25:]))
    bad("MASKED cut off in the mask's id", "E340", "floats", resealed(under[:30]))
    cleared = resealed(under[:6] + b"\0" + under[7:])
    bad("a mask's id without flag MASKED", "E345", "floats", cleared)
    everything = force(EXACT, CONTEXTS["floats"], 1, "fp32").blob
    bad("the id of a mask for a receiver without one", "E346", "bare", everything)
    bad("the id of another mask", "E346", "floats", resealed(everything[:24] + bytes(8) + everything[32:]))
    bad("the id of a mask cut off", "E340", "floats", resealed(everything[:28]))


def indices() -> None:
    for id in (2, 3, 4, 5, 6, 8):
        of(f"index {id}: more positions than entries", "E345", "hundred", (id, 7), b"\x65" + bytes(20))
        of(f"index {id}: 2^62 positions", "E345", "hundred", (id, 7), uv(1 << 62) + bytes(20))
        of(f"index {id}: no number of positions", "E340", "hundred", (id, 7), b"")
        of(f"index {id}: a number longer than it needs to be", "E345", "hundred", (id, 7), b"\x80\0" + bytes(20))
        of(f"index {id}: over more than 2^31 entries", "E345", "beyond", (id, 7), b"\0" + bytes(20))
    of("a number of ten bytes", "E345", "hundred", (3, 7), b"\xff" * 9 + b"\x01")
    of("a number that does not end", "E340", "hundred", (3, 7), b"\xff" * 5)
    twelve = bytes(12)
    of("a bitmap with fewer ones than declared", "E345", "hundred", (2, 7), b"\x01" + twelve + b"\0")
    of("a bitmap with more ones than declared", "E345", "hundred", (2, 7), b"\x01\x03" + twelve)
    of("a bitmap with a bit behind its end", "E345", "hundred", (2, 7), b"\x01" + twelve + b"\x10")
    of("a bitmap cut off", "E340", "hundred", (2, 7), b"\x01\x01" + bytes(11))
    of("a bitmap with a byte too many", "E340", "hundred", (2, 7), b"\x01\x01" + bytes(13))
    for name, code, body in (
        ("no runs", "E345", "03"),
        ("fewer runs than positions", "E345", "03 01 00"),
        ("a run that does not end", "E345", "01 00 00"),
        ("a run longer than the vector", "E345", "01 04 00"),
        ("a position one behind the end", "E345", "01 02 1f"),
        ("a position far behind the end", "E345", "01 02 3c 00"),
        ("the lowest bit of a rest missing", "E340", "01 01 3b"),
        ("the rests missing", "E340", "01 01"),
        ("a lowest bit too many", "E345", "01 01 3b 02"),
        ("a run too many", "E345", "01 05 00"),
        ("a rest too many", "E345", "01 01 40"),
        ("a byte behind the rests", "E340", "01 01 00 00"),
    ):
        of(f"RR-flat: {name}", code, "hundred", (3, 7), body)
    for name, body in (
        ("counts that do not add up", "05 01 01 05 02 01 0a 00"),
        ("counts above what is left", "03 01 01 05 02 01 0a 00"),
        ("a third tensor of two", "04 05 01 05 02 01 0a 00"),
        ("rows of a tensor that has none", "04 02 03 01 05 02 0a 00"),
        ("20 low bits in a count", "04 01 14 05 02 01 0a 00"),
        ("more of a row than it has", "04 01 01 09 02 01 0a 00"),
        ("a row too many", "04 01 01 0d 02 01 0a 00"),
        ("the low bits of a row too many", "04 01 01 05 06 01 0a 00"),
        ("more of a tensor than it has", "04 01 01 05 02 04 0a 00"),
        ("a run too many", "04 01 01 05 02 01 1a 00"),
        ("a run missing", "04 01 01 05 02 01 02 00"),
        ("a run longer than its row", "04 01 01 05 02 01 14 00"),
        ("a position behind its tensor", "04 01 01 05 02 01 0a 02"),
        ("a rest too many", "04 01 01 05 02 01 0a 04"),
    ):
        of(f"RR-mixed: {name}", "E345", "rows", (4, 7), body)
    of("RR-mixed: no modes", "E340", "rows", (4, 7), "04")
    of("RR-mixed: no counts", "E340", "rows", (4, 7), "04 01")
    for name, body in (
        ("a position behind the end", gaps(b"\x64", 1)),
        ("positions that add up to one behind the end", gaps(b"\x32\x31\0", 3)),
        ("a gap of 2^35", gaps(b"\xff\xff\xff\xff\x7f", 1)),
        ("a gap longer than it needs to be", gaps(b"\xe3\0", 1)),
        ("a gap of six bytes", gaps(b"\x80\x80\x80\x80\x80\x01", 2)),
        ("a gap that does not end", gaps(b"\0\x80", 2)),
        ("fewer gaps than positions", gaps(b"\x80\x01", 2)),
        ("more gaps than positions", gaps(b"\0\0\0", 2)),
        ("a frame longer than what is left", b"\x01\x7f"),
    ):
        of(f"gaps: {name}", "E345", "hundred", (5, 7), body)
    of("drawn: half a seed", "E340", "hundred", (8, 7), b"\x05" + bytes(4))
    of("drawn: a byte behind the seed", "E340", "hundred", (8, 7), b"\x05" + bytes(9))
    for k in (1, 1 << 30):
        of(f"RR-flat: {k} of 2^31 positions in no bytes", "E345", "huge", (3, 0), uv(k))
        of(f"RR-mixed: {k} of 2^31 positions by row in no bytes", "E345", "huge", (4, 0), uv(k) + b"\x01\0")
        of(f"bitmap of 2^31 entries in four bytes, {k} positions", "E340", "huge", (2, 0), uv(k) + bytes(4))
        of(f"gaps: {k} of 2^31 positions in four bytes", "E347", "huge", (5, 0), uv(k) + b"\x04" + bytes(4))


def compression() -> None:
    """Frames of 13 bytes, a bitmap, and of 100, a plane."""
    frame = zstandard.compress(bytes(13))

    def lying(declared: int, block: bytes = b"\x6b\0\0\0") -> bytes:
        """A frame that declares any length; by default one block of 13 zeros."""
        return b"\x28\xb5\x2f\xfd\xe0" + declared.to_bytes(8, "little") + block

    cases = {
        "of 1 MiB": zstandard.compress(bytes(1 << 20)),
        "that declares 2^40 bytes": lying(1 << 40),
        "that declares 2^64 - 1 bytes": lying(2**64 - 1),
        "that declares a byte too few": lying(12),
        "that declares a byte too many": lying(14),
        "of the right length by its header alone": lying(13, b"\x23\0\0\0"),
        "with more in it than it declares": lying(13, b"\xeb\x03\0\0"),
        "without its length": zstandard.ZstdCompressor(write_content_size=False).compress(bytes(13)),
        "of no bytes": b"",
        "of a magic alone": frame[:4],
        "with half a header": frame[:5],
        "cut off": frame[:-1],
        "with a byte behind it": frame + b"\0",
        "followed by another": frame + frame,
        "that is to be skipped": b"\x50\x2a\x4d\x18\x0d\0\0\0" + bytes(13),
        "of another magic": b"\x27" + frame[1:],
        "that is none": bytes(13),
        "with a dictionary": b"\x28\xb5\x2f\xfd\x21\x01\x0d\x6b\0\0\0",
        "with a window of 16 MiB": b"\x28\xb5\x2f\xfd\x80\x70\x0d\0\0\0\x6b\0\0\0",
        "with a window of 3.75 TiB": b"\x28\xb5\x2f\xfd\x80\xff\x0d\0\0\0\x6b\0\0\0",
        "with a reserved bit": b"\x28\xb5\x2f\xfd\x28\x0d\x6b\0\0\0",
        "with a reserved kind of block": b"\x28\xb5\x2f\xfd\x20\x0d\x6f\0\0\0",
        "with a wrong checksum": b"\x28\xb5\x2f\xfd\x24\x0d\x6b\0\0\0" + bytes(4),
        "of an empty frame with more behind it": zstandard.compress(b"") + bytes(20),
    }
    for name, raw in cases.items():
        of(f"a bitmap in a frame {name}", "E347", "hundred", (6, 7), b"\0" + framed(raw))
    of("gaps in a frame of more bytes than they can take", "E347", "hundred", (5, 7), gaps(bytes(6), 1))
    of("gaps in a frame of fewer bytes than they must take", "E347", "hundred", (5, 7), gaps(bytes(1), 2))
    of("gaps in a frame of no bytes", "E347", "hundred", (5, 7), b"\x01\0")
    raw = b"\0" + bytes(100)
    for name in ("of 1 MiB", "that declares 2^40 bytes", "without its length", "that is to be skipped", "that is none"):
        of(f"a plane in a frame {name}", "E347", "hundred", (0, 3), framed(cases[name]) + raw)
    of("a plane in a frame of 99 bytes", "E347", "hundred", (0, 3), framed(zstandard.compress(bytes(99))) + raw)
    of("a plane in a frame of 101 bytes", "E347", "hundred", (0, 3), raw + framed(zstandard.compress(bytes(101))))
    empty = zstandard.compress(b"")
    for name, body in (("an empty frame", empty), ("an empty frame with more behind it", empty + b"smuggled")):
        of(f"a plane of no entries in {name}", "E347", "none", (0, 3), framed(body) + b"\0")
    of(
        "a plane of no entries in a frame to be skipped",
        "E347",
        "none",
        (0, 3),
        framed(b"\x50\x2a\x4d\x18" + bytes(4)) + b"\0",
    )


def values() -> None:
    for name, code, ids, body in (
        ("fp32: a byte too few", "E340", (0, 0), bytes(399)),
        ("fp32: a byte too many", "E340", (0, 0), bytes(401)),
        ("lossless: three planes", "E340", (0, 1), (b"\0" + bytes(100)) * 3),
        ("lossless: five planes", "E340", (0, 1), (b"\0" + bytes(100)) * 5),
        ("lossless: a plane longer than what is left", "E345", (0, 1), b"\xff\x01" + bytes(200)),
        ("lossless: a length longer than it needs to be", "E345", (0, 1), b"\x80\0" + bytes(404)),
        ("fp16: a plane a byte short", "E340", (0, 3), b"\0" + bytes(100) + b"\0" + bytes(99)),
        ("bf16: one plane", "E340", (0, 4), b"\0" + bytes(100)),
        ("int8: half a scale", "E340", (0, 5), bytes(2)),
        ("int8: codes short of one", "E340", (0, 5), bytes(4) + b"\0" + bytes(99)),
        ("int8: a code too many", "E340", (0, 5), bytes(4) + b"\0" + bytes(101)),
        ("int4: a scale missing", "E340", (0, 9), bytes(4) + b"\0" + bytes(50)),
        ("int4: codes short of two", "E340", (0, 9), bytes(8) + b"\0" + bytes(49)),
        ("sign: no scale", "E340", (0, 6), b""),
        ("sign: a sign behind the last one", "E345", (0, 6), bytes(16) + b"\x10"),
        ("sign: signs short of eight", "E340", (0, 6), bytes(4) + bytes(12)),
        ("none: a value", "E340", (0, 7), bytes(1)),
        ("ring: over floats", "E344", (0, 8), b"\x08" + bytes(100)),
        ("own: a byte too few", "E340", (0, 128), bytes(399)),
        ("no value for a position", "E340", (2, 0), b"\x01\x01" + bytes(12)),
        ("two values for one position", "E340", (2, 0), b"\x01\x01" + bytes(12) + bytes(8)),
    ):
        of(name, code, "hundred", ids, body)
    of("int4: a code behind the last one", "E345", "rows", (0, 9), bytes(8) + b"\0" + bytes(5) + b"\x10")
    for bits in (0, 64, 255):
        of(f"ring of {bits} bits", "E345", "integers", (0, 8), bytes([bits]) + bytes(200))
    of("ring: nothing", "E340", "integers", (0, 8), b"")
    of("ring: a byte of elements missing", "E340", "integers", (0, 8), b"\x0c" + bytes(26))
    of("ring: bits behind the last element", "E345", "integers", (0, 8), b"\x05" + bytes(11) + b"\x04")
    for id in (0, 1, 3, 4, 5, 6, 9):
        of(f"value id {id} over integers", "E344", "integers", (0, id), bytes(100))
    of("value id 1 over several dtypes", "E344", "dtypes", (0, 1), bytes(100))
    of("own: a truth value behind the last one", "E345", "bits", (0, 128), b"\0\x10\0\x01")


def forged() -> None:
    """MAC and SCALARS. KEY is the key of the contexts that are keyed."""
    plain = force(EXACT, CONTEXTS["bare"], 0, "fp32").blob
    blob = force(EXACT, replace(CONTEXTS["bare"], key=KEY), 0, "fp32").blob
    body, mac = blob[:-16], blob[-16:]
    others = force(FINITE, replace(CONTEXTS["bare"], key=KEY), 0, "fp32").blob
    changed = blob[:40] + bytes([blob[40] ^ 1]) + blob[41:]

    def keyed(name: str, code: str, raw: bytes) -> None:
        bad(name, code, "keyed", raw)

    def forge(name: str, at: int, to: int) -> None:
        keyed(name, "E349", resealed(body[:at] + bytes([to]) + body[at + 1 :]) + mac)

    bad("a MAC for a receiver without a key", "E349", "floats", blob)
    bad("a MAC for a receiver with another key", "E349", "keyed otherwise", blob)
    keyed("no MAC for a receiver with a key", "E349", plain)
    keyed("a MAC under another key", "E349", resealed(blob, OTHER))
    keyed("a MAC with a bit flipped", "E349", body + bytes([mac[0] ^ 1]) + mac[1:])
    keyed("a MAC with its last bit flipped", "E349", body + mac[:-1] + bytes([mac[-1] ^ 128]))
    keyed("a MAC of zeros", "E349", body + bytes(16))
    keyed("the MAC of another blob", "E349", body + others[-16:])
    keyed("a MAC back to front", "E349", body + mac[::-1])
    keyed("a MAC without a key", "E349", body + hashlib.blake2b(body, digest_size=16).digest())
    keyed("a MAC cut from a longer one", "E349", body + hashlib.blake2b(body, key=KEY).digest()[:16])
    keyed("a MAC of everything but the header", "E349", body + mac_of(body[24:]))
    keyed("a MAC over a checksum of zeros", "E349", body + mac_of(body[:16] + bytes(8) + body[24:]))
    keyed("a MAC behind the header", "E349", resealed(body[:24] + mac + body[24:-16]) + body[-16:])
    keyed("a MAC cut off", "E349", body)
    keyed("a MAC cut off, sealed again", "E349", resealed(body))
    keyed("a MAC cut off, and its flag, sealed again", "E349", resealed(body[:6] + b"\0" + body[7:]))
    keyed("a MAC without its flag", "E349", resealed(body[:6] + b"\0" + body[7:]) + mac)
    keyed("a MAC that lacks a byte", "E349", blob[:-1])
    keyed("a MAC and a byte behind it", "E349", blob + b"\0")
    keyed("a MAC twice", "E349", blob + mac)
    keyed("twice the same blob with a MAC", "E349", blob + blob)
    keyed("a value changed behind the MAC", "E349", changed)
    forge("a value changed behind the MAC, sealed again", 40, body[40] ^ 1)
    forge("an index id changed behind the MAC, sealed again", 4, 2)
    forge("a value id changed behind the MAC, sealed again", 5, 1)
    forge("a flag set behind the MAC, sealed again", 6, 6)
    keyed("a header with flag MAC and nothing else", "E340", blob[:24])
    keyed("a header with flag MAC and 15 bytes", "E340", blob[:24] + mac[:15])
    bad("a header with flag MAC and 15 bytes, without a key", "E340", "floats", blob[:24] + mac[:15])
    bad("a value changed behind the MAC, without a key", "E343", "floats", changed)
    bad("a MAC cut off, without a key", "E343", "floats", body)
    keyed("another magic with a MAC", "E341", resealed(b"FLD" + blob[3:], KEY))
    bad("the schema of another model with a MAC", "E342", "keyed rows", blob)
    keyed("a checksum of zeros under a MAC that holds", "E343", under(blob[:16] + bytes(8) + blob[24:-16]))
    keyed("flag 32 under a MAC that holds", "E344", resealed(blob[:6] + b"\x24" + blob[7:], KEY))
    keyed("index id 7 under a MAC that holds", "E344", resealed(blob[:4] + b"\x07" + blob[5:], KEY))
    keyed("a byte before the MAC", "E340", resealed(body + b"\0" + mac, KEY))
    keyed("a byte missing before the MAC", "E340", resealed(blob[:-17] + mac, KEY))

    def beside(name: str, code: str, numbers: bytes, rest: bytes = bytes(44)) -> None:
        of(f"scalars: {name}", code, "rows", (0, 0), numbers + rest, flags=8)

    def pairs(*keys: int) -> bytes:
        return uv(9 * len(keys)) + b"".join(bytes([key]) + struct.pack("<d", 0.5) for key in keys)

    beside("a key twice", "E345", pairs(1, 2, 2))
    beside("the first key twice", "E345", pairs(0, 0))
    beside("keys that descend", "E345", pairs(2, 1))
    beside("a key out of order at the end", "E345", pairs(*range(1, 64), 0))
    beside("65 pairs", "E345", pairs(*range(65)))
    beside("256 pairs", "E345", pairs(*range(256)))
    beside("half a pair", "E345", b"\x05" + bytes(5))
    beside("a byte more than a pair", "E345", b"\x0a" + bytes(10))
    beside("a byte less than a pair", "E345", b"\x08" + bytes(8))
    beside("2^62 bytes", "E345", uv(1 << 62))
    beside("a length longer than it needs to be", "E345", b"\x89\0" + pairs(1)[1:])
    beside("a length of ten bytes", "E345", b"\xff" * 9 + b"\x01")
    beside("nothing", "E340", b"", b"")
    beside("a length that does not end", "E340", b"\x80", b"")
    beside("a pair that is not there", "E340", b"\x09", b"")
    beside("a pair cut off", "E340", b"\x12" + bytes(17), b"")
    beside("and no values", "E340", pairs(1), b"")
    beside("a pair more than their length says", "E340", b"\x09" + pairs(1, 2)[1:])
    beside("a pair less than their length says", "E345", b"\x12" + pairs(1)[1:])
    of("scalars without their flag", "E340", "rows", (0, 0), pairs(1) + bytes(44))
    of("scalars before the bits of the subset", "E345", "floats", (0, 0), pairs(1) + b"\x08" + bytes(4), flags=10)
    masked = force(EXACT, replace(CONTEXTS["floats"], scalars={1: 0.5}), 2, "fp32", range(5)).blob
    moved = masked[:24] + masked[34:42] + masked[24:34] + masked[42:]
    bad("scalars behind the mask's id", "E345", "floats", resealed(moved))
    referred = force(EXACT, Context(CONTEXTS["floats"].schema, None, BEFORE, scalars={1: 0.5}), 0, "REF").blob
    bad("scalars before the reference's id", "E345", "floats", resealed(swapped(referred, 24, 32, 42)))
    keys = replace(CONTEXTS["rows"], scalars={1: 0.5}, key=KEY)
    under_key = force({"a": torch.zeros(2, 4), "b": torch.zeros(3)}, keys, 0, "fp32").blob
    bad("scalars changed behind the MAC", "E349", "keyed rows", swapped(under_key, 32, 33, 34))
    twice = under_key[:24] + pairs(1, 1) + under_key[34:]
    bad("a key twice under a MAC that holds", "E345", "keyed rows", resealed(twice, KEY))


def mac_of(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, key=KEY, digest_size=16).digest()


def under(raw: bytes) -> bytes:
    """`raw` as it is with a MAC that holds."""
    return raw + mac_of(raw)


def swapped(raw: bytes, start: int, middle: int, stop: int) -> bytes:
    return raw[:start] + raw[middle:stop] + raw[start:middle] + raw[stop:]


def around() -> None:
    """Frames of several blobs."""
    sample = Frame("message", 3, 5, {"n": 1.0, "loss": math.nan}, {"update": b"\x01\x02", "e": b""})
    for name, frame in (
        ("a message", sample),
        ("an empty plan", Frame("plan", 0, 0, {}, {})),
        ("a state", Frame("state", 2**32 - 1, 7, {}, {"ü" * 512: bytes(130)})),
    ):
        blob = pack(frame)
        scalars = {key: struct.pack("<d", x).hex() for key, x in frame.scalars.items()}
        sections = {key: x.hex() for key, x in frame.sections.items()}
        kinds = {"kind": frame.kind, "round": frame.round, "client": frame.client}
        frames.append({"name": name, "blob": blob.hex(), **kinds, "scalars": scalars, "sections": sections})

    def add(name: str, code: str, blob: bytes) -> None:
        try:
            unpack(blob)
            print(f"frame, {name}: {code} expected, accepted", file=sys.stderr)
        except WireError as error:
            if error.code != code:
                print(f"frame, {name}: {code} expected, {error.code}", file=sys.stderr)
        frames.append({"name": name, "blob": blob.hex(), "code": code})

    def headed(head: bytes, rest: bytes = b"") -> bytes:
        front = b"LMF\x01" + struct.pack("<I", len(head))
        return front + checksum(front, [head]).to_bytes(8, "little") + head + rest

    blob, fixed = pack(sample), bytes(9)
    for name, code, raw in (
        ("nothing", "E340", b""),
        ("a front alone", "E340", blob[:16]),
        ("another magic", "E341", b"FLC" + blob[3:]),
        ("version 2", "E341", blob[:3] + b"\x02" + blob[4:]),
        ("a head of 4 GiB", "E340", blob[:4] + b"\xff\xff\xff\xff" + blob[8:]),
        ("a head with a bit flipped", "E343", blob[:20] + bytes([blob[20] ^ 1]) + blob[21:]),
        ("the last byte cut off", "E340", blob[:-1]),
        ("a byte behind the end", "E340", blob + b"\0"),
        ("a kind of a later version", "E344", headed(b"\x03" + bytes(10))),
        ("a byte too many in the head", "E340", headed(fixed + bytes(3))),
        ("more numbers than bytes", "E345", headed(fixed + b"\x7f\0")),
        ("more sections than bytes", "E345", headed(fixed + b"\0\x7f")),
        ("a name of no bytes", "E345", headed(fixed + b"\0\x01\0\0")),
        ("a name of 1025 bytes", "E345", headed(fixed + b"\0\x01\x81\x08")),
        ("a name that is not UTF-8", "E345", headed(fixed + b"\0\x01\x01\xff\0")),
        (
            "a number's name twice",
            "E345",
            headed(fixed + (b"\x02" + b"\x01a" + bytes(8) + b"\x01a" + bytes(8)) + b"\0"),
        ),
        ("a section's name twice", "E345", headed(fixed + b"\0\x02\x01a\0\x01a\0")),
        ("a section of 2^63 - 1 bytes", "E340", headed(fixed + b"\0\x01\x01a" + b"\xff" * 8 + b"\x7f")),
        ("a section longer than it needs to say", "E345", headed(fixed + b"\0\x01\x01a\x80\0")),
        ("a section with a byte missing", "E340", headed(fixed + b"\0\x01\x01a\x05", b"1234")),
    ):
        add(name, code, raw)


def sets() -> None:
    """Index id 10. Blocks of 1024 and 6 entries, of 1024, 1024 and 152, and of 18."""
    floats, blocks, pair = CONTEXTS["floats"], CONTEXTS["three blocks"], CONTEXTS["two blocks"]
    plain = Context(floats.schema, None, floats.reference)

    def add(name: str, *args: Any) -> None:
        good(name, "floats", force(*args).blob)

    add("index 10 under a mask", EXACT, floats, 10, "fp32", range(0, 12, 2))
    add("index 10, no entry", EXACT, plain, 10, "fp32")
    add("index 10, every entry", EXACT, plain, 10, "fp32", range(18))
    add("index 10, all but one", EXACT, plain, 10, "fp32", [*range(9), *range(10, 18)])
    spread = [i for i in range(2200) if (i * 0x9E3779B1 >> 7) % 5 < 2]
    cases = {
        "anywhere": spread,
        "in the first block alone": range(0, 1024, 3),
        "in the last block alone": range(2050, 2200, 3),
        "one": [1500],
        "none": [],
        "all but one": [*range(1024), *range(1025, 2200)],
        "every one": range(2200),
    }
    whole = {name: torch.ones(spec.shape, dtype=torch.bool) for name, spec in blocks.schema.items()}
    for name, positions in cases.items():
        message = force(whole, Context(blocks.schema), 10, "none", positions)
        good(f"enumerated in three blocks, {name}", "three blocks", message.blob)
    kept = [i for i in spread if i < 1800]  # of the 1800 that the mask keeps
    good("enumerated in three blocks, under a mask", "three blocks", force(whole, blocks, 10, "none", kept).blob)
    part, kept = {"m": whole["m"]}, [i for i in spread if i < 800]
    good("enumerated, a subset under a mask", "three blocks", force(part, blocks, 10, "none", kept).blob)
    good("enumerated in two blocks", "two blocks", sealed(10, 7, 0, pair.schema, bytes.fromhex("02 00 01 03 0c")))

    of("index 10: more positions than entries", "E345", "hundred", (10, 7), b"\x65" + bytes(20))
    of("index 10: 2^62 positions", "E345", "hundred", (10, 7), uv(1 << 62) + bytes(20))
    of("index 10: no number of positions", "E340", "hundred", (10, 7), b"")
    of("index 10: a number longer than it needs to be", "E345", "hundred", (10, 7), b"\x80\0" + bytes(20))
    of("index 10: over more than 2^31 entries", "E345", "beyond", (10, 7), b"\0" + bytes(20))
    of("index 10: over 65537 entries", "E345", "65 blocks", (10, 7), b"\0" + bytes(20))
    for k in (1, 1 << 30):
        of(f"enumerated: {k} of 2^31 positions in four bytes", "E345", "huge", (10, 0), uv(k) + bytes(4))
    half = math.comb(100, 50)
    for name, code, context, body in (
        ("no rank", "E340", "hundred", "01"),
        ("the first rank there is not", "E345", "hundred", "01 64"),
        ("a rank of 7 bits and one more", "E345", "hundred", "01 80"),
        ("a byte behind the rank", "E340", "hundred", "01 05 00"),
        ("a rank of all entries", "E340", "hundred", "64 00"),
        ("a rank of none", "E340", "hundred", "00 00"),
        ("as many as there are sets of half", "E345", "hundred", "32" + half.to_bytes(13, "little").hex()),
        ("a rank of half cut off", "E340", "hundred", "32" + (half - 1).to_bytes(13, "little").hex()[:-2]),
        ("no counts", "E340", "two blocks", "02"),
        ("20 low bits in a count", "E345", "two blocks", "02 14 01 03 0c"),
        ("a count that does not end", "E345", "two blocks", "02 00 00"),
        ("a count too many", "E345", "two blocks", "02 00 03 03 0c"),
        ("the low bits of a count missing", "E340", "two blocks", "02 01 01"),
        ("the low bits of a count too many", "E345", "two blocks", "02 01 01 02 03 0c"),
        ("a count below 0", "E345", "two blocks", "02 00 08 03 0c"),
        ("a count above k", "E345", "two blocks", "02 00 10 03 0c"),
        ("a count above its block", "E345", "two blocks", "86 08 00 04"),
        ("a count left for the last block above it", "E345", "two blocks", "08 00 00 08 00 00"),
        ("no ranks", "E340", "two blocks", "02 00 01"),
        ("the last rank cut off", "E340", "two blocks", "02 00 01 03"),
        ("a byte behind the ranks", "E340", "two blocks", "02 00 01 03 0c 00"),
        ("a bit behind the ranks", "E345", "two blocks", "02 00 01 03 2c"),
        ("a rank beyond the last block", "E345", "two blocks", "02 00 01 03 18"),
        ("a rank beyond the first block", "E345", "two blocks", "02 00 04 00 fe 07"),
    ):
        of(f"enumerated: {name}", code, context, (10, 7), body)


# Files.


def known(context: Context) -> dict[str, Any]:
    schema = [[name, list(spec.shape), NAMES[spec.dtype]] for name, spec in context.schema.items()]
    mask = {name: "".join("01"[bit] for bit in x.reshape(-1).tolist()) for name, x in (context.mask or {}).items()}
    held = {name: memory(x).hex() for name, x in context.reference.items()} if context.reference else None
    secret = {"key": context.key.hex()} if context.key else {}
    return {"schema": schema, "mask": mask, "reference": held, **secret}


def save(name: str, vectors: list[Vector]) -> None:
    path = HERE / name
    old: list[Vector] = json.loads(path.read_text()) if path.exists() else []
    before = {vector["name"]: vector for vector in old}
    assert len({vector["name"] for vector in vectors}) == len(vectors), "a name twice"
    for vector in vectors:
        if before.get(vector["name"], vector) != vector:
            sys.exit(f"{name}, {vector['name']!r}: differs from the one that was published")
    every = old + [vector for vector in vectors if vector["name"] not in before]
    path.write_text("[\n" + ",\n".join(json.dumps(vector, separators=(",", ":")) for vector in every) + "\n]\n")
    print(f"{name}: {len(every)} vectors, {path.stat().st_size} bytes")


def document(path: Path) -> None:
    """The list in the document: names by code."""
    lines = []
    for what, vectors in (("messages", hostile), ("frames", [v for v in frames if "code" in v])):
        for code in sorted({vector["code"] for vector in vectors}):
            names = [vector["name"] for vector in vectors if vector["code"] == code]
            text = f"**{code}**, {len(names)} {what}: {' · '.join(names)}."
            lines += [*textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False), ""]
    before, rest = path.read_text().split(OPEN)
    unframed = sum("code" not in vector for vector in frames)
    counts = (
        f"{len(valid)} messages and {unframed} frames that decode",
        f"{len(hostile)} hostile messages and {len(frames) - unframed} hostile frames",
    )
    for count in counts:
        before = re.sub(re.sub(r"\d+", r"[0-9@A-Z]+", count), count, before)
    path.write_text(before + OPEN + "\n\n" + "\n".join(lines) + CLOSE + rest.split(CLOSE)[1])


OPEN, CLOSE = "<!-- hostile vectors -->", "<!-- end of hostile vectors -->"

if __name__ == "__main__":
    torch.manual_seed(0)
    np.seterr(all="ignore")
    for write in (pairs, special, beside, envelope, heads, indices, compression, values, forged, around, sets):
        write()
    save("contexts.json", [{"name": name, **known(context)} for name, context in CONTEXTS.items()])
    save("valid.json", valid)
    save("hostile.json", hostile)
    save("frames.json", frames)
    document(HERE.parents[2] / "docs" / "wire-format.md")
