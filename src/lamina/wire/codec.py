"""Codecs: tree -> bytes -> tree. What they share is here; they differ in which entries they select (dense, sparse).

A blob describes itself to a receiver that knows the schema (and the mask, if there is one). Everything counts **kept**
entries: under `Context.mask` a tensor with a mask entry consists of its entries under the mask, in row-major order,
whatever its strides; entries outside are not sent and decode to 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.errors import WireError
from lamina.tree import Params
from lamina.wire import container, index, scalars, values
from lamina.wire.coding import only
from lamina.wire.container import (
    HEADER,
    MAC,
    MAC_SIZE,
    MASKED,
    REF,
    SCALARS,
    SUBSET,
    Buffer,
    Header,
    Indices,
    Reader,
    Schema,
    Spec,
    schema_of,
)
from lamina.wire.values import Coding, Vectors

__all__ = [
    "Codec",
    "Content",
    "Context",
    "Schema",
    "Size",
    "Spec",
    "decode",
    "encode",
    "layout",
    "read",
    "schema_of",
    "sized",
    "transmit",
]


class Size(NamedTuple):
    """Bytes of one encoded tree, by tensor.

    Args:
        rows: name -> bytes that are this tensor's own, and its share (by entries, rounded down) of joint sections.
        shared: headers, scalars, the MAC, and what the shares leave over.
        entries: name -> entries that travelled.
    """

    rows: dict[str, int]
    shared: int
    entries: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.rows.values()) + self.shared


@dataclass(frozen=True)
class Context:
    """What both ends know without being told.

    Args:
        schema: every tensor that could come, in order.
        mask: name -> bool tensor; a tensor without an entry is dense. Any codec works under a mask; what others call a
            masked codec is one that does.
        reference: a tree the receiver holds exactly, with every tensor that comes; ``lossless`` values may be coded by
            their distance to it. Other values pay no heed to it.
        seed, purpose, round, client: the address from which `RandomK` draws; only the sender needs it.
        key: a secret of 16 to 64 bytes. Every blob is sent with a MAC under it, and one without is refused.
        scalars: numbers that travel beside the tree, by keys 0 to 255, at most 64; only the sender needs them. Here
            and not beside the tree, so that any codec sends them and counts them.
    """

    schema: Schema
    mask: Params | None = None
    reference: Params | None = None
    seed: int = 0
    purpose: str = "wire"
    round: int = 0
    client: int = 0
    key: bytes | None = field(default=None, repr=False)
    scalars: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        if self.key is not None:
            container.check_key(self.key)
        scalars.check(self.scalars or {})


class Codec(Protocol):
    """A way to put trees on the wire, in any format. Derive from it: only `encode` and `decode` have no default, and
    the others' are slow but correct."""

    @property
    def lossless(self) -> bool:
        """decode(encode(tree)) == tree, bit for bit (entries outside a mask are taken to be 0)."""
        ...

    def encode(self, tree: Params, context: Context) -> bytes: ...

    def decode(self, blob: bytes, context: Context) -> Params:
        """The tree in `blob`; WireError, and nothing else, unless it is what this codec could have sent."""
        ...

    def transmit(self, tree: Params, context: Context) -> tuple[Params, Size]:
        """What the receiver will hold and the bytes it takes: decode(encode(tree)) bit for bit, and len(encode(tree)).

        Tensors that need no change are returned as they are, not copied.
        """
        blob = self.encode(tree, context)
        return self.decode(blob, context), self.layout(blob, context)

    def layout(self, blob: bytes, context: Context) -> Size:
        """The bytes of a blob that can be decoded, by tensor: what `transmit` says of it. Where it is not of lamina's
        format, every tensor has its share by entries."""
        with contextlib.suppress(WireError):
            return layout(blob, context)
        tree = self.decode(blob, context)
        rows = container.share(len(blob), [x.numel() for x in tree.values()])
        entries = {name: x.numel() for name, x in tree.items()}
        return Size(dict(zip(tree, rows, strict=True)), len(blob) - sum(rows), entries)

    def size(self, names: Iterable[str], context: Context) -> Size | None:
        """The exact size of a tree with these tensors when it follows from shapes and context alone, else None."""
        return None


class Support:
    """The flat vector one message ranges over: the kept entries of the tensors present, in schema order."""

    def __init__(self, context: Context, names: Iterable[str]):
        schema, present = context.schema, frozenset(names)
        unknown = present - schema.keys()
        if unknown:
            raise WireError(f"{min(unknown)!r} is not in the schema of {len(schema)} tensors", code="E342")
        self.context = context
        self.schema = schema
        self.mask = context.mask or {}
        self.scalars = context.scalars or {}
        self.names = [name for name in schema if name in present]
        self.partial = len(self.names) < len(schema)
        self.specs = [schema[name] for name in self.names]
        self.dtypes = [spec.dtype for spec in self.specs]

    @cached_property
    def bits(self) -> list[NDArray[np.bool_] | None]:
        """The mask of each tensor, row-major; None where it is dense."""
        return [flat_mask(self.mask, name, spec) for name, spec in zip(self.names, self.specs, strict=True)]

    @property
    def masked(self) -> bool:
        return any(bits is not None for bits in self.bits)

    @cached_property
    def counts(self) -> list[int]:
        """Kept entries of each tensor."""
        return [
            spec.numel if bits is None else int(np.count_nonzero(bits))
            for spec, bits in zip(self.specs, self.bits, strict=True)
        ]

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def extent(self) -> index.Extent:
        return index.Extent(self.counts, self.rows)

    def rows(self, tensor: int) -> Indices:
        """Kept entries of each row along the first dimension that keeps any; without rows, all as one."""
        spec, bits, count = self.specs[tensor], self.bits[tensor], self.counts[tensor]
        if len(spec.shape) < 2 or not count:
            return np.full(min(count, 1), count, np.int64)
        if bits is None:
            return np.broadcast_to(np.int64(count // spec.shape[0]), spec.shape[:1])
        kept: Indices = np.count_nonzero(bits.reshape(spec.shape[0], -1), axis=1)
        return kept[kept > 0]

    def unmasked(self) -> Support:
        """The same tensors with all of their entries."""
        return self if not self.mask else Support(replace(self.context, mask=None), self.names)

    def mask_id(self) -> bytes:
        """Of the whole mask, whichever tensors are present."""
        every = ((name, flat_mask(self.mask, name, spec)) for name, spec in self.schema.items())
        return index.mask_id((name, bits) for name, bits in every if bits is not None)

    def tensors(self, tree: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors of `tree`, checked against the schema."""
        return [self._tensor(name, spec, tree[name]) for name, spec in zip(self.names, self.specs, strict=True)]

    @staticmethod
    def _tensor(name: str, spec: Spec, x: Tensor) -> Tensor:
        if x.shape != spec.shape or x.dtype != spec.dtype:
            got = f"{tuple(x.shape)} {x.dtype}"
            raise WireError(f"{name}: {got}, the schema says {spec.shape} {spec.dtype}", code="E342")
        container.dtype_code(name, x.dtype)
        return x.detach() if x.requires_grad else x

    def gather(self, tensors: Sequence[Tensor]) -> Vectors:
        """The kept entries, one CPU vector per tensor: a view where that is possible."""
        flat = [container.flat_vector(x) for x in tensors]
        return [x if b is None else x[torch.from_numpy(b)] for x, b in zip(flat, self.bits, strict=True)]

    def scatter(self, vectors: Vectors, positions: list[Indices] | None) -> Params:
        """The tree whose entries at `positions` (None: all) of the kept ones are `vectors`; 0 elsewhere."""
        received = {}
        for i, (name, spec) in enumerate(zip(self.names, self.specs, strict=True)):
            flat = vectors[i]
            if positions is not None:
                flat = spread(flat, positions[i], self.counts[i])
            bits = self.bits[i]
            if bits is not None:
                flat = spread(flat, np.flatnonzero(bits), spec.numel)
            received[name] = flat.reshape(spec.shape)
        return received

    def cut(self, tensors: Sequence[Tensor]) -> Params:
        """These tensors as a tree, with 0 outside the mask."""
        tree = dict(zip(self.names, tensors, strict=True))
        if self.masked:
            for name in self.mask.keys() & tree.keys():
                x = tree[name]
                tree[name] = torch.where(
                    self.mask[name].to(x.device), x, torch.zeros((), dtype=x.dtype, device=x.device)
                )
        return tree

    def partition(self, positions: Indices) -> list[Indices]:
        """Flat positions as positions within each tensor."""
        ends = np.cumsum(self.counts, dtype=np.int64)
        parts = np.split(positions, np.searchsorted(positions, ends[:-1])) if len(ends) else []
        return [part - (end - count) for part, end, count in zip(parts, ends.tolist(), self.counts, strict=True)]

    def flatten(self, positions: list[Indices]) -> Indices:
        """Inverse of `partition`."""
        starts = np.cumsum([0, *self.counts], dtype=np.int64)[:-1].tolist()
        return np.concatenate([np.empty(0, np.int64), *(p + s for p, s in zip(positions, starts, strict=True))])

    def base(self, reference: Params, positions: list[Indices] | None) -> Vectors:
        """What `reference` has where entries travel."""
        tensors = []
        for name, spec in zip(self.names, self.specs, strict=True):
            x = reference.get(name)
            if x is None or x.shape != spec.shape or x.dtype != spec.dtype:
                held = "none" if x is None else f"{tuple(x.shape)} {x.dtype}"
                raise WireError(f"reference of {name}: {held}, expected {spec.shape} {spec.dtype}", code="E348")
            tensors.append(x.detach())
        return at(positions, self.gather(tensors))

    def head(self, sparse: bool, reference_id: bytes) -> tuple[int, list[Buffer]]:
        """Flags and the parts between header and index section."""
        reference = [reference_id] if reference_id else []
        present = set(self.names)
        subset = [container.write_subset([name in present for name in self.schema])] if self.partial else []
        numbers = [scalars.write(self.scalars)] if self.scalars else []
        mask = [self.mask_id()] if sparse and self.masked else []
        flags = REF * len(reference) | SUBSET * len(subset) | SCALARS * len(numbers) | MASKED * len(mask)
        return flags, [*reference, *subset, *numbers, *mask]

    def overhead(self, sparse: bool, reference_id: bytes) -> int:
        """Bytes before the index section and behind the values."""
        subset = (len(self.schema) + 7) // 8 * self.partial
        numbers = scalars.size(self.scalars) if self.scalars else 0
        mac = 0 if self.context.key is None else MAC_SIZE
        return HEADER.size + len(reference_id) + subset + numbers + 8 * (sparse and self.masked) + mac

    def attribute(self, sent: Sent, overhead: int | None = None) -> Size:
        """Bytes by tensor; `overhead` those of neither section, if they are not what this end would have sent."""
        of_index = index.split(sent.index_id, sent.index_size, sent.index_own, sent.counts, self.counts)
        of_values = sent.coding.split(sent.values_size, sent.counts, self.dtypes)
        rows = {name: a + b for name, a, b in zip(self.names, of_index, of_values, strict=True)}
        if overhead is None:
            overhead = self.overhead(sent.index_id in index.SPARSE, sent.coding.reference_id)
        total = overhead + sent.index_size + sent.values_size
        return Size(rows, total - sum(rows.values()), dict(zip(self.names, sent.counts, strict=True)))


class Sent(NamedTuple):
    """What was sent, as far as sizes go."""

    index_id: int
    index_size: int
    index_own: Sequence[int]  # bytes of the index that are each tensor's own; empty: of no tensor
    coding: Coding
    values_size: int
    counts: list[int]  # entries sent of each tensor


class Selection(NamedTuple):
    """Which entries travel: positions within the kept entries of each tensor (None: all) and their index section."""

    positions: list[Indices] | None
    index_id: int
    index_size: int
    write: Callable[[], bytes] | None  # the index section; None: the id of the support's mask
    index_own: Sequence[int] = ()  # bytes of the section that are each tensor's own

    def counts(self, support: Support) -> list[int]:
        return support.counts if self.positions is None else [len(p) for p in self.positions]

    def take(self, vectors: Vectors) -> Vectors:
        return at(self.positions, vectors)


def at(positions: list[Indices] | None, vectors: Vectors) -> Vectors:
    """The entries at these positions of each vector (None: all)."""
    if positions is None:
        return vectors
    return [x[torch.from_numpy(p)] for x, p in zip(vectors, positions, strict=True)]


def everything(support: Support) -> Selection:
    """All kept entries."""
    return Selection(None, index.MASK_ID, 8, None) if support.masked else Selection(None, index.DENSE, 0, bytes)


def some(support: Support, positions: list[Indices], section: index.Section | None = None) -> Selection:
    """These kept entries of each tensor, their index coded as `section` or as is best."""
    section = section or index.choose(support.flatten(positions), support.extent)
    if section.id == index.DENSE:
        return everything(support)
    return Selection(positions, section.id, section.size, section.write, section.own)


class Selecting(Codec, Protocol):
    """A codec that selects entries and codes their values. One of its kind says which entries."""

    @property
    def values(self) -> str: ...

    @property
    def indices(self) -> frozenset[int]:
        """Index ids it may send."""
        ...

    def foresee(self, support: Support, context: Context) -> Selection | None:
        """The entries to send, when the data does not matter."""
        ...

    def select(self, support: Support, vectors: Vectors) -> Selection:
        """The entries to send. Asked only when they could not be foreseen."""
        return everything(support)

    def encode(self, tree: Params, context: Context) -> bytes:
        support = Support(context, tree)
        vectors = support.gather(support.tensors(tree))
        selection = self.foresee(support, context) or self.select(support, vectors)
        base = self._base(support, selection, context)
        coding, section = values.write(self.values, selection.take(vectors), base)
        flags, head = support.head(selection.index_id in index.SPARSE, coding.reference_id)
        body = support.mask_id() if selection.write is None else selection.write()
        header = Header(selection.index_id, coding.id, flags)
        return container.seal(header, container.schema_id(context.schema), [*head, body, *section], context.key)

    def decode(self, blob: bytes, context: Context) -> Params:
        return open_blob(blob, context, accept=(self.indices, values.accepted(self.values))).tree()

    def transmit(self, tree: Params, context: Context) -> tuple[Params, Size]:
        support = Support(context, tree)
        tensors = support.tensors(tree)
        selection = self.foresee(support, context)
        quick = self._transmit_each(support, selection, tensors)
        if quick is not None:
            return quick
        vectors = support.gather(tensors)
        selection = selection or self.select(support, vectors)
        kept = selection.take(vectors)
        coding, size = values.weigh(self.values, kept, self._base(support, selection, context))
        sent = Sent(selection.index_id, selection.index_size, selection.index_own, coding, size, [len(x) for x in kept])
        received = support.scatter(coding.transmit(kept), selection.positions)
        return {name: x.to(tree[name].device) for name, x in received.items()}, support.attribute(sent)

    def size(self, names: Iterable[str], context: Context) -> Size | None:
        support = Support(context, names)
        return self._foreseen_size(support, self.foresee(support, context))

    def _base(self, support: Support, selection: Selection, context: Context) -> Vectors | None:
        """What the receiver's reference has where entries travel, if there is one and it is of use."""
        if context.reference is None or not values.refers(self.values, support.dtypes):
            return None
        return support.base(context.reference, selection.positions)

    def _transmit_each(
        self, support: Support, selection: Selection | None, tensors: Sequence[Tensor]
    ) -> tuple[Params, Size] | None:
        """The fast path: every entry travels and is coded for itself, nothing has to be gathered or scattered."""
        if selection is None or selection.positions is not None:
            return None
        size = self._foreseen_size(support, selection)
        coding = values.coding(self.values, support.dtypes)
        if size is None or not coding.elementwise:
            return None
        return support.cut([coding.cast(x) for x in tensors]), size

    def _foreseen_size(self, support: Support, selection: Selection | None) -> Size | None:
        if selection is None:
            return None
        coding, counts = values.coding(self.values, support.dtypes), selection.counts(support)
        size = coding.size(counts, support.dtypes)
        if size is None:
            return None
        own = selection.index_own
        return support.attribute(Sent(selection.index_id, selection.index_size, own, coding, size, counts))


class Opened(NamedTuple):
    """A blob whose header and index section have been read and checked; the reader stands before the values."""

    support: Support
    positions: list[Indices] | None
    index_id: int
    index_size: int
    index_own: Sequence[int]
    coding: Coding
    reader: Reader
    overhead: int  # bytes before the index section and behind the values
    scalars: dict[int, float]

    @property
    def counts(self) -> list[int]:
        return self.support.counts if self.positions is None else [len(p) for p in self.positions]

    def tree(self) -> Params:
        vectors = self.coding.decode(self.reader, self.counts, self.support.dtypes)
        self.reader.end()
        return self.support.scatter(vectors, self.positions)

    def size(self) -> Size:
        sent = Sent(self.index_id, self.index_size, self.index_own, self.coding, self.reader.left, self.counts)
        return self.support.attribute(sent, self.overhead)


Accept = tuple[frozenset[int], Mapping[int, Coding]]  # index ids; codings by value id
EVERY_ID: Accept = (index.SPARSE | {index.DENSE, index.MASK_ID}, values.CODINGS)


def open_blob(blob: Any, context: Context, *, max_bytes: int | None = None, accept: Accept = EVERY_ID) -> Opened:
    """Check a blob up to its values, in the order of the format, against the receiver's own schema and mask."""
    view = container.as_view(blob, max_bytes)
    header, reader = container.unseal(view, container.schema_id(context.schema), context.key)
    if header.index_id not in accept[0]:
        raise WireError(f"index id {header.index_id}, expected one of {sorted(accept[0])}", code="E344")
    if header.value_id not in accept[1]:
        raise WireError(f"value id {header.value_id}, expected one of {sorted(accept[1])}", code="E344")
    sparse = header.index_id in index.SPARSE
    if header.flags & MASKED and not sparse:
        raise WireError(f"flag MASKED with index id {header.index_id}", code="E344")
    coding = accept[1][header.value_id]
    if header.flags & REF and coding is not values.LOSSLESS:
        raise WireError(f"flag REF with value id {header.value_id}", code="E344")
    reference_id = bytes(reader.take(8, "reference id")) if header.flags & REF else b""
    names = container.read_subset(reader, context.schema) if header.flags & SUBSET else list(context.schema)
    numbers = scalars.read(reader) if header.flags & SCALARS else {}
    support = Support(context, names)
    if header.flags & MASKED or header.index_id == index.MASK_ID:
        check_mask(reader, support)
    else:
        support = support.unmasked()
    start = reader.at
    found = index.read(header.index_id, reader, support.extent) if sparse else None
    positions = support.partition(found.positions) if found else None
    size = 8 if header.index_id == index.MASK_ID else reader.at - start
    if reference_id:
        coding = check_reference(reference_id, context, support, positions)
    own = found.own if found else ()
    before = start - 8 if header.index_id == index.MASK_ID else start
    overhead = before + (MAC_SIZE if header.flags & MAC else 0)
    return Opened(support, positions, header.index_id, size, own, coding, reader, overhead, numbers)


def check_reference(
    sender: bytes, context: Context, support: Support, positions: list[Indices] | None
) -> values.Distance:
    """Distances to what the receiver's own reference has at these positions."""
    only(support.dtypes, {torch.float32})
    if context.reference is None:
        raise WireError(f"coded against reference {sender.hex()}, the receiver holds none", code="E348")
    coding = values.Distance(support.base(context.reference, positions))
    if coding.reference_id != sender:
        message = f"coded against reference {sender.hex()}, the receiver holds {coding.reference_id.hex()}"
        raise WireError(message, code="E348", remedy="the sender is to send it again without a reference")
    return coding


def check_mask(reader: Reader, support: Support) -> None:
    sender, own = bytes(reader.take(8, "mask id")), support.mask_id()
    if sender != own:
        held = own.hex() if support.mask else "none"
        raise WireError(f"sent under mask {sender.hex()}, the receiver holds {held}", code="E346")


def flat_mask(mask: Mapping[str, Tensor], name: str, spec: Spec) -> NDArray[np.bool_] | None:
    """The mask of one tensor in row-major order; None if it has none."""
    entry = mask.get(name)
    if entry is None:
        return None
    if entry.dtype != torch.bool or entry.shape != spec.shape:
        raise WireError(
            f"mask of {name}: {tuple(entry.shape)} {entry.dtype}, expected {spec.shape} torch.bool", code="E346"
        )
    bits: NDArray[np.bool_] = container.flat_vector(entry).numpy()
    return bits


def spread(entries: Tensor, positions: Indices, n: int) -> Tensor:
    """A vector of n with `entries` at `positions` and 0 elsewhere."""
    out = torch.zeros(n, dtype=entries.dtype)
    out[torch.from_numpy(positions)] = entries
    return out


# What callers use, with any codec.


def encode(
    tree: Params,
    codec: Codec,
    *,
    mask: Params | None = None,
    reference: Params | None = None,
    key: bytes | None = None,
    scalars: Mapping[int, float] | None = None,
    context: Context | None = None,
) -> bytes:
    """`tree` as bytes.

    Args:
        tree: parameter name -> tensor.
        codec: how.
        mask: name -> bool tensor, known to the receiver too: entries outside are not sent.
        reference: a tree that the receiver holds exactly: ``lossless`` values travel as their distance to it where
            that is smaller.
        key: a secret of 16 to 64 bytes that the receiver holds too: adds a MAC of 16 bytes.
        scalars: at most 64 numbers that travel beside the tree, by keys 0 to 255: 9 bytes each.
        context: for a receiver that knows more tensors than these, and for the address of `RandomK`. What is given
            beside it replaces its own.

    Raises:
        ConfigError: a key or scalars that are none, or what the codec cannot send.
        WireError: E342 a tree that is not of the context's schema; E346, E348 a mask or reference of another one.
    """
    return codec.encode(tree, _context(tree, mask, reference, key, scalars, context))


def decode(
    blob: bytes,
    like: Mapping[str, Tensor] | Mapping[str, Spec],
    *,
    mask: Params | None = None,
    reference: Params | None = None,
    key: bytes | None = None,
    max_bytes: int | None = None,
) -> Params:
    """The tree in `blob`, whatever codec made it; tensors that were not sent are absent.

    `read` returns the scalars as well.

    Args:
        blob: bytes from anywhere. Nothing larger than the schema implies is allocated because of them.
        like: the receiver's own schema, or a tree of that shape.
        mask: the mask both ends hold.
        reference: the tree that the sender took for one this receiver holds.
        key: the sender's secret. With it, a blob whose MAC is missing or not made with it is refused before anything
            in it is looked at; without, one that has a MAC is.
        max_bytes: refuse a longer blob unread.

    Raises:
        WireError: and nothing else, whatever `blob` is. Code E340 length, E341 magic or version, E342 schema, E343
            checksum, E344 an id or flag that is not supported, E345 a section, E346 mask, E347 compression, E348
            reference, E349 MAC.
        ConfigError: a key that is none.
    """
    return open_blob(blob, Context(schema_of(like), mask, reference, key=key), max_bytes=max_bytes).tree()


class Content(NamedTuple):
    """All that is in a blob.

    Args:
        tree: the tensors that were sent.
        scalars: the numbers beside them, by ascending key.
        size: the bytes by tensor, as `layout` has them.
    """

    tree: Params
    scalars: dict[int, float]
    size: Size


def read(
    blob: bytes,
    like: Mapping[str, Tensor] | Mapping[str, Spec],
    *,
    mask: Params | None = None,
    reference: Params | None = None,
    key: bytes | None = None,
    max_bytes: int | None = None,
) -> Content:
    """All that is in `blob`; arguments and errors are those of `decode`."""
    opened = open_blob(blob, Context(schema_of(like), mask, reference, key=key), max_bytes=max_bytes)
    size = opened.size()
    return Content(opened.tree(), opened.scalars, size)


def transmit(
    tree: Params,
    codec: Codec,
    *,
    mask: Params | None = None,
    reference: Params | None = None,
    key: bytes | None = None,
    scalars: Mapping[int, float] | None = None,
    context: Context | None = None,
) -> tuple[Params, Size]:
    """What the receiver of `encode(tree, codec, ...)` will hold, and how many bytes travel."""
    return codec.transmit(tree, _context(tree, mask, reference, key, scalars, context))


def sized(codec: Codec, blob: bytes, context: Context) -> Size:
    """`codec.layout`; that of `Codec` for one that has the other methods without deriving from it."""
    return codec.layout(blob, context) if hasattr(codec, "layout") else Codec.layout(codec, blob, context)


def layout(blob: bytes, context: Context) -> Size:
    """The bytes of an encoded blob by tensor, from the blob itself."""
    return open_blob(blob, context).size()


def _context(
    tree: Params,
    mask: Params | None,
    reference: Params | None,
    key: bytes | None,
    scalars: Mapping[int, float] | None,
    context: Context | None,
) -> Context:
    if context is None:
        return Context(schema_of(tree), mask, reference, key=key, scalars=scalars)
    return replace(
        context,
        mask=mask or context.mask,
        reference=reference or context.reference,
        key=context.key if key is None else key,
        scalars=context.scalars if scalars is None else scalars,
    )
