"""Three readers of bytes from anywhere, and what must hold of each for any input.

Whatever comes, the fast decoder returns a tree of the receiver's schema or raises WireError; it takes no longer than
50 ms; it allocates no more than the schema and the input imply; and the slow decoder, tests/wire/reference.py, returns
the same tree or refuses with the same code. The last two cost thirty times what the first two do, so they are asked of
one input in SAMPLED, picked by its own bytes, and of every input of `kept`: those that went where none had gone.

An input begins with a byte that picks what the receiver holds and a byte or more that pick what is read, so that a
mutated input is still one of the format.
"""

from __future__ import annotations

import gc
import random
import struct
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "wire"))

import forced
import numpy as np
import reference
import torch

from lamina.wire import Context, Spec, WireError, index, values
from lamina.wire.codec import Support, open_blob
from lamina.wire.container import MAC, Reader

SLOWEST = 0.05  # seconds
SAMPLED = 16
LONGEST = 4096  # bytes of an input

Read = Callable[[], Any]


class Case(NamedTuple):
    """Both readers of one input, and the entries of the schema."""

    fast: Read
    slow: Read
    entries: int
    near: bool = False  # a NaN may become another


def run(case: Case, data: bytes) -> Any:
    """What the readers make of an input: a code, or what they found."""
    found, taken = timed(case.fast)
    for _ in range(3):  # again, in case something else was going on
        if taken > SLOWEST:
            found, taken = timed(case.fast)
    assert taken <= SLOWEST, f"{taken * 1e3:.0f} ms"
    if every or zlib.crc32(data) % SAMPLED == 0:
        compare(case, len(data), found)
    return found


every = True  # is every input compared, or one in SAMPLED?


def compare(case: Case, size: int, found: Any) -> None:
    """The memory that the fast reader asks for, and what the slow one makes of the same input."""
    again, peak = measured(case.fast)
    assert again == found, f"{found!r} at first, then {again!r}"
    most = (1 << 16) + 64 * (case.entries + size)
    assert peak <= most, f"{peak} bytes allocated for {case.entries} entries and {size} bytes, expected at most {most}"
    try:
        known = case.slow()
    except reference.Refused as refused:
        known = refused.code
    assert found == known or (case.near and alike(found, known)), f"fast {found!r}, slow {known!r}"


def read(fast: Read) -> Any:
    try:
        return fast()
    except WireError as error:
        return error.code


def timed(fast: Read) -> tuple[Any, float]:
    started = time.thread_time()
    found = read(fast)
    return found, time.thread_time() - started


def measured(fast: Read) -> tuple[Any, int]:
    if not tracemalloc.is_tracing():  # once: starting and stopping it for every input loses memory each time
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    found = read(fast)
    return found, tracemalloc.get_traced_memory()[1] - before


def alike(found: Any, known: Any) -> bool:
    """The same tensors as (memory, dtype), where one NaN is as good as another."""
    if isinstance(found, str) or isinstance(known, str) or len(found) != len(known):
        return False
    every = [
        (forced.tensor(a, Spec((-1,), forced.DTYPES[t])), forced.tensor(b, Spec((-1,), forced.DTYPES[t])))
        for (a, t), (b, _) in zip(found, known, strict=True)
    ]
    return all(forced.same(x, y) for x, y in every)


# What receivers hold.

SHAPES = [
    {"w": (3, 4), "b": (5,), "e": (0, 3), "s": ()},
    {"w": (6, 9), "c": (12, 2, 2), "b": (7,)},
    {"x": (100,)},
    {"x": (300,), "y": (2, 70)},
    {},
]


def mask_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Every third entry pruned, and the first row of each matrix."""
    mask = {name: torch.arange(int(np.prod(shape))).reshape(shape) % 3 > 0 for name, shape in shapes.items() if shape}
    for kept in mask.values():
        if kept.ndim > 1:
            kept[:1] = False
    return mask


def contexts() -> Iterator[Context]:
    for shapes in SHAPES:
        for dtype in ("float32", "bfloat16", "int64", "bool"):
            schema = {name: Spec(shape, forced.DTYPES[dtype]) for name, shape in shapes.items()}
            held = {name: torch.arange(float(spec.numel)).reshape(spec.shape) for name, spec in schema.items()}
            yield Context(schema, mask_of(shapes), held if dtype == "float32" else None)
    yield Context({name: Spec((3,), dtype) for name, dtype in forced.DTYPES.items()})


CONTEXTS = list(contexts())
KEY = bytes(range(32))
SCALARS = {0: 1.0, 7: float("nan"), 255: -0.0}
UNLIKE = 0xC0  # from this first byte on, a key is where none is needed and none where one is
EXTENTS = [Support(Context(c.schema, mask), c.schema) for c in CONTEXTS[::4] for mask in (None, c.mask)]
BLOCKS = Context({"x": Spec((1100,), torch.bool), "y": Spec((10, 100), torch.bool)})  # three of index id 10
EXTENTS.append(Support(BLOCKS, BLOCKS.schema))
SPARSE = sorted(index.SPARSE)
COUNTS = [([5, 0, 12], ["float32"] * 3), ([], []), ([0], ["float32"]), ([300], ["float32"])]
COUNTS += [([3, 4, 70], ["float16", "bfloat16", "float64"]), ([9, 1], ["int64"] * 2), ([9, 12], ["bool", "uint8"])]
COUNTS += [([2] * 10, list(reference.DTYPES))]
KINDS = list(forced.KINDS)


# The targets.


def whole(data: bytes) -> Any:
    """A whole blob: the context, index id, value id, flags, and the body, under a checksum and a MAC that hold."""
    if len(data) < 4:
        return None
    context = CONTEXTS[data[0] % len(CONTEXTS)]
    blob = forced.sealed(*data[1:4], context.schema, data[4:], KEY if data[3] & MAC else None)
    keyed = bool(data[3] & MAC) != (data[0] >= UNLIKE)
    context = replace(context, key=KEY if keyed else None)

    def fast() -> list[tuple[bytes, str]]:
        opened = open_blob(blob, context)
        size = opened.size()
        tree = opened.tree()
        assert size.total == len(blob)
        assert min([size.shared, *size.rows.values()]) >= 0
        for name, x in tree.items():
            assert (tuple(x.shape), x.dtype) == tuple(context.schema[name])
        numbers = [(bytes([key]) + struct.pack("<d", x), "uint8") for key, x in opened.scalars.items()]
        return numbers + [(forced.memory(x), forced.NAMES[x.dtype]) for x in tree.values()]

    def slow() -> list[tuple[bytes, str]]:
        dtypes = {name: forced.NAMES[spec.dtype] for name, spec in context.schema.items()}
        content = reference.read(blob, *forced.known(context))
        numbers = [(bytes([key]) + raw, "uint8") for key, raw in content.scalars.items()]
        return numbers + [(raw, dtypes[name]) for name, raw in content.tree.items()]

    entries = sum(spec.numel for spec in context.schema.values())
    return run(Case(fast, slow, entries, data[2] in forced.NEAR), data)


def index_section(data: bytes) -> Any:
    """An index section: what its positions range over, its id, and the section."""
    if len(data) < 2:
        return None
    support, id = EXTENTS[data[0] % len(EXTENTS)], SPARSE[data[1] % len(SPARSE)]

    def fast() -> list[int]:
        reader = Reader(memoryview(data)[2:])
        found = index.read(id, reader, support.extent)
        reader.end()
        return found.positions.tolist()

    def slow() -> list[int]:
        reader = reference.Reader(data[2:])
        found = reference.read_index(reader, id, [support.rows(i).tolist() for i in range(len(support.counts))])
        reference.refuse(reader.left > 0, "E340")
        return found

    found = run(Case(fast, slow, support.total), data)
    if not isinstance(found, str):
        assert found == sorted(set(found))
        assert all(0 <= p < support.total for p in found)
    return found


def value_section(data: bytes) -> Any:
    """A value section: the vectors it is for, its coding, and the section."""
    if len(data) < 2:
        return None
    (counts, dtypes), kind = COUNTS[data[0] % len(COUNTS)], KINDS[data[1] % len(KINDS)]
    id, near = forced.IDS[kind], [torch.arange(float(count)) for count in counts]

    def fast() -> list[tuple[bytes, str]]:
        reader = Reader(memoryview(data)[2:])
        coding = values.Distance(near) if kind == "REF" else values.CODINGS[id]
        vectors = coding.decode(reader, counts, [forced.DTYPES[t] for t in dtypes])
        reader.end()
        assert [len(x) for x in vectors] == counts
        return [(forced.memory(x), t) for x, t in zip(vectors, dtypes, strict=True)]

    def slow() -> list[tuple[bytes, str]]:
        reader = reference.Reader(data[2:])
        known = [[forced.memory(x)[4 * i : 4 * i + 4] for i in range(len(x))] for x in near] if kind == "REF" else None
        vectors = reference.read_values(reader, id, counts, dtypes, known)
        reference.refuse(reader.left > 0, "E340")
        return [(b"".join(vector), t) for vector, t in zip(vectors, dtypes, strict=True)]

    return run(Case(fast, slow, sum(counts), id in forced.NEAR), data)


TARGETS: dict[str, Callable[[bytes], Any]] = {"whole": whole, "index": index_section, "values": value_section}


# Inputs to begin with.


def seeds(target: str) -> list[bytes]:
    """Messages that decode, and what was found worth keeping."""
    path = Path(__file__).parent / "corpus" / f"{target}.txt"
    kept = [bytes.fromhex(line) for line in path.read_text().split()] if path.exists() else []
    return list(dict.fromkeys([*{"whole": of_blobs, "index": of_indices, "values": of_values}[target](), *kept]))


def of_blobs() -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for at, context in enumerate(CONTEXTS):
        for id in forced.INDICES:
            for kind in KINDS:
                fits = {forced.NAMES[spec.dtype] for spec in context.schema.values()} <= set(forced.KINDS[kind])
                fits = fits and not (id == index.SQUEEZED and not context.schema)
                if fits and (at + id) % 3 == 0 and (kind != "REF" or context.reference):
                    blob = blob_of(rng, context, id, kind)
                    yield bytes([at]) + blob[4:7] + blob[24:]
    for at in (0, 3, 20, 210):  # the last beyond UNLIKE
        for scalars, key in ((SCALARS, None), (None, KEY), (SCALARS, KEY)):
            blob = blob_of(rng, replace(CONTEXTS[at % len(CONTEXTS)], scalars=scalars, key=key), index.BITMAP, "own")
            yield bytes([at]) + blob[4:7] + blob[24 : len(blob) - 16 * (key is not None)]


def blob_of(rng: np.random.Generator, context: Context, id: int, kind: str) -> bytes:
    part = [name for name in context.schema if rng.random() < 0.8]
    tree = {name: (torch.arange(context.schema[name].numel) + 1).to(context.schema[name].dtype) for name in part}
    tree = {name: x.reshape(context.schema[name].shape) for name, x in tree.items()}
    masked = context if id == index.MASK_ID or rng.random() < 0.5 else replace(context, mask=None)
    n = Support(masked, tree).total
    positions = np.flatnonzero(rng.random(n) < rng.random())
    return forced.force(tree, masked, id, kind, positions, seed=7, by_row=[True, False, True]).blob


def of_indices() -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for at, support in enumerate(EXTENTS):
        for place, id in enumerate(SPARSE):
            if id == index.SQUEEZED and not support.total:
                continue
            for share in (0.0, 0.05, 0.3, 0.9, 1.0):
                positions = np.flatnonzero(rng.random(support.total) < share)
                section = forced.select(support, id, positions, 7, [True, False, True]).write()
                yield bytes([at, place]) + section


def of_values() -> Iterator[bytes]:
    for at, (counts, dtypes) in enumerate(COUNTS):
        for place, kind in enumerate(KINDS):
            if set(dtypes) <= set(forced.KINDS[kind]) or kind == "none":
                tree = {
                    f"t{i}": (torch.arange(c) + 1).to(forced.DTYPES[t])
                    for i, (c, t) in enumerate(zip(counts, dtypes, strict=True))
                }
                held = {name: torch.arange(float(len(x))) for name, x in tree.items()}
                context = Context({name: Spec(tuple(x.shape), x.dtype) for name, x in tree.items()}, None, held)
                blob = forced.force(tree, context, 0, kind).blob
                yield bytes([at, place]) + blob[24 + 8 * (kind == "REF") :]


# Mutations, where there is no atheris.

BYTES = [0, 1, 2, 0x0F, 0x10, 0x40, 0x7F, 0x80, 0x81, 0xFF]


def mutated(rng: random.Random, pool: list[bytes]) -> bytes:
    """An input of the pool with one to four changes."""
    data = bytearray(rng.choice(pool))
    for _ in range(rng.randint(1, 4)):
        at, how = rng.randrange(len(data) + 1), rng.randrange(8)
        stop = min(len(data), at + rng.randint(1, 8))
        if how < 3 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 3:
            data[at : at + 1] = bytes([rng.choice(BYTES)])
        elif how == 4:
            del data[at:stop]
        elif how == 5:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
        elif how == 6:
            data[at:at] = data[at:stop]
        else:
            other = rng.choice(pool)
            data[at:] = other[min(at, len(other)) :]
    return bytes(data[:LONGEST])


def settle() -> None:
    """Before the first input: what is alive now need not be looked at by the collector again."""
    gc.collect()
    gc.freeze()
