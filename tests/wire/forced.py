"""Blobs with any index id and any value coding, whether or not an encoder would have chosen them; and both decoders."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import reference
import torch
import xxhash
from torch import Tensor

from lamina.wire import Context, Schema, Spec, WireError, decode, index, read, rice, values
from lamina.wire.codec import Selection, Support
from lamina.wire.container import Header, flat_vector, raw_bytes, schema_id, seal, uv

DTYPES = {name: getattr(torch, name) for name in reference.DTYPES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = tuple(reference.DTYPES[:4])

# Value codings by what they are called here, and the dtypes they are for.
KINDS = {
    "fp32": ("float32",),
    "lossless": ("float32",),
    "REF": ("float32",),
    "fp16": FLOATS,
    "bf16": FLOATS,
    "int8": FLOATS,
    "int4": FLOATS,
    "sign": FLOATS,
    "none": ("bool",),
    "ring": ("int64",),
    "own": reference.DTYPES,
}
IDS = dict(zip(KINDS, (0, 1, 1, 3, 4, 5, 9, 6, 7, 8, 128), strict=True))
INDICES = sorted(reference.INDICES)
NEAR = frozenset({3, 4, 5, 6, 9})  # ids under which a NaN may become another


class Forced(NamedTuple):
    """A blob and the tree that its receiver is to hold."""

    blob: bytes
    expected: dict[str, Tensor]


def force(
    tree: Mapping[str, Tensor],
    context: Context,
    index_id: int,
    kind: str,
    positions: Sequence[int] = (),
    *,
    seed: int = 0,
    bits: int = 12,
    by_row: Sequence[bool] = (),
) -> Forced:
    """`positions` count kept entries; DENSE and MASK_ID take all of them, DRAWN as many as there are in `positions`."""
    support = Support(context, tree)
    if index_id == index.DENSE:
        support = support.unmasked()
    chosen = select(support, index_id, np.asarray(positions, np.int64), seed, by_row)
    vectors = chosen.take(support.gather(support.tensors(tree)))
    coding = coding_of(kind, support, chosen, context, bits)
    flags, head = support.head(index_id in index.SPARSE, coding.reference_id)
    body = support.mask_id() if chosen.write is None else chosen.write()
    front = Header(index_id, IDS[kind], flags)
    blob = seal(front, schema_id(context.schema), [*head, body, *coding.encode(vectors)], context.key)
    return Forced(blob, support.scatter(coding.transmit(vectors), chosen.positions))


def select(support: Support, index_id: int, positions: np.ndarray, seed: int, by_row: Sequence[bool]) -> Selection:
    if index_id == index.DENSE:
        return Selection(None, index_id, 0, bytes)
    if index_id == index.MASK_ID:
        return Selection(None, index_id, 8, None)
    n, k = support.total, len(positions)
    if index_id == index.DRAWN:
        positions = index.draw(n, k, seed)
        section = uv(k) + seed.to_bytes(8, "little")
    elif index_id == index.MIXED:
        section = uv(k) + mixed(positions, support, by_row)
    elif index_id == index.GAPS:
        section = index.write_gaps(positions)
    elif index_id == index.SQUEEZED:
        section = index.write_squeezed(positions, n)
    elif index_id == index.ENUMERATED:
        section = index.enumerate_sets(positions, n).write()
    else:
        section = next(c for c in index.candidates(positions, support.extent) if c.id == index_id).write()
    return Selection(support.partition(positions), index_id, len(section), lambda: section)


def mixed(positions: np.ndarray, support: Support, by_row: Sequence[bool]) -> bytes:
    """The section with these tensors by row; those beyond the end of `by_row`, or without rows, as a whole."""
    modes = [i < len(by_row) and by_row[i] and len(support.rows(i)) > 1 for i in range(len(support.counts))]
    segments, heads = [np.empty(0, np.int64)], []
    for i, part in enumerate(support.partition(positions)):
        lengths = support.rows(i) if modes[i] else np.array([support.counts[i]])
        counts = np.diff(np.searchsorted(part, np.cumsum(lengths)), prepend=0)
        segments.append(lengths)
        heads.append(rice.write_counts(counts, rice.best_low(counts)[0]) if modes[i] else uv(len(part)))
    lengths = np.concatenate(segments)
    counts = np.diff(np.searchsorted(positions, np.cumsum(lengths)), prepend=0)
    return rice.Mixed(np.array(modes, np.bool_), heads, rice.measure(positions, lengths, counts)).write()


def coding_of(kind: str, support: Support, chosen: Selection, context: Context, bits: int) -> values.Coding:
    if kind == "REF":
        return values.Distance(support.base(context.reference, chosen.positions))
    if kind == "own":
        return values.OWN
    return values.NOTHING if kind == "none" else values.named(f"ring:{bits}" if kind == "ring" else kind)


def sealed(index_id: int, value_id: int, flags: int, schema: Schema, body: bytes, key: bytes | None = None) -> bytes:
    """A blob with this body and a checksum that holds; with a key, and a MAC that does."""
    return seal(Header(index_id, value_id, flags), schema_id(schema), [body], key)


def resealed(blob: bytes, key: bytes | None = None) -> bytes:
    """`blob` with a checksum that holds; with a key, and a MAC that does in place of its last 16 bytes."""
    stop = len(blob) if key is None else len(blob) - 16
    digest = xxhash.xxh3_64_intdigest(blob[24:stop], seed=xxhash.xxh3_64_intdigest(blob[:16]))
    blob = blob[:16] + digest.to_bytes(8, "little") + blob[24:stop]
    return blob if key is None else blob + hashlib.blake2b(blob, key=key, digest_size=16).digest()


# Trees as memory, and the two decoders.


def memory(x: Tensor) -> bytes:
    return raw_bytes(flat_vector(x.detach())).tobytes()


def tensor(raw: bytes, spec: Spec) -> Tensor:
    flat = torch.frombuffer(bytearray(raw), dtype=spec.dtype) if raw else torch.empty(0, dtype=spec.dtype)
    return flat.reshape(spec.shape)


class Known(NamedTuple):
    """What the receiver holds, for the slow decoder."""

    schema: list[reference.Tensor]
    mask: dict[str, list[bool]]
    reference: dict[str, bytes] | None
    key: bytes | None


def known(context: Context) -> Known:
    schema = [reference.Tensor(name, tuple(s.shape), NAMES[s.dtype]) for name, s in context.schema.items()]
    mask = {name: x.reshape(-1).tolist() for name, x in (context.mask or {}).items()}
    held = None if context.reference is None else {name: memory(x) for name, x in context.reference.items()}
    return Known(schema, mask, held, context.key)


Outcome = dict[str, bytes] | str  # the memory of each tensor, or the code it was refused with
Numbers = dict[int, bytes] | str


def fast(blob: bytes, context: Context) -> Outcome:
    try:
        tree = decode(blob, context.schema, mask=context.mask, reference=context.reference, key=context.key)
    except WireError as error:
        return error.code
    return {name: memory(x) for name, x in tree.items()}


def fast_scalars(blob: bytes, context: Context) -> Numbers:
    try:
        found = read(blob, context.schema, mask=context.mask, reference=context.reference, key=context.key).scalars
    except WireError as error:
        return error.code
    return {key: struct.pack("<d", number) for key, number in found.items()}


def slow_scalars(blob: bytes, context: Context) -> Numbers:
    try:
        return reference.read(blob, *known(context)).scalars
    except reference.Refused as refused:
        return refused.code


def slow(blob: bytes, context: Context) -> Outcome:
    try:
        return reference.decode(blob, *known(context))
    except reference.Refused as refused:
        return refused.code


def alike(a: Outcome, b: Outcome, context: Context, value_id: int) -> bool:
    """The same refusal, or the same tensors bit for bit; under NEAR, any NaN for a NaN."""
    if a == b or value_id not in NEAR or isinstance(a, str) or isinstance(b, str):
        return a == b
    return list(a) == list(b) and all(
        same(tensor(a[name], context.schema[name]), tensor(b[name], context.schema[name])) for name in a
    )


def same(x: Tensor, y: Tensor) -> bool:
    """Equal bits, or NaN on both sides."""
    if memory(x) == memory(y):
        return True
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return memory(x.nan_to_num(0)) == memory(y.nan_to_num(0)) and torch.equal(x.isnan(), y.isnan())
