"""What a plan costs each client: it is sent only the values it does not hold.

Every value has a tag, a 64-bit hash of its bytes at the server, like the ETag of a web page. A client's row keeps the
tags of what it was last sent; what differs is what it lacks. So a layer nobody touched costs nothing, a newcomer pays
in full, and nothing has to be kept in step with a checkpoint: tags are recomputed from the values.

A codec that replaces values (TopK, RandomK, sign) cannot code parameters. It codes the server's last *step* instead,
for clients that hold the parameters from before it; any other is sent them as they are.

``Dense("lossless")`` codes parameters by their distance to those that a client holds, where that is smaller: the server
keeps the last versions it sent, and the tags say which of them a client has. Who has none of them is sent planes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
import xxhash
from torch import Tensor

from lamina import wire
from lamina.errors import RunError
from lamina.method import Plan
from lamina.store import Held
from lamina.tree import Message, Params, cut
from lamina.wire import frame, values

_AT_ONCE = 4  # encoded plans that are kept, for the next client that lacks as much
HISTORY = 2  # versions of the parameters that the server keeps, if their codec makes use of them
RAW = wire.Dense()  # codes all that is neither parameters nor a step
CHANGE = "change"  # the tree, and what a client lacks, when the last step is all it needs of the parameters


class Change(NamedTuple):
    """The server's last step on its way down."""

    base: Held  # "params/name" -> tag before the step
    step: Params  # before it is coded
    codec: str  # with which clients know it; another would give them another model
    seed: int
    round: int  # in which it was made

    def coded(self, codec: wire.Codec, schema: wire.Schema, mask: Params | None) -> tuple[Params, wire.Size]:
        """What every receiver adds to the parameters, and its bytes."""
        return codec.transmit(self.step, self.context(schema, mask))

    def context(self, schema: wire.Schema, mask: Params | None) -> wire.Context:
        return wire.Context(schema, mask, None, self.seed, "downlink", self.round)


class Version(NamedTuple):
    """The parameters of an earlier plan, which some clients still hold."""

    tags: Held  # of them and of the mask that cut them: who holds just these holds `params`
    params: Params  # as clients decode them


def codes_values(codec: wire.Codec) -> TypeGuard[wire.Dense]:
    """Whether a codec may code parameters: it brings every one near its value."""
    return isinstance(codec, wire.Dense) and codec.values != "sign"


class Broadcast:
    """One round's plan on its way down.

    Args:
        carry: takes every client's plan to it, so each is really encoded; None: they are measured.
        change: the step that led here, for a codec that cannot code parameters.
        past: that of the broadcast before.

    Attributes:
        plan: as clients decode it. The codec codes each value once per version, so all holders have the same bits.
        tags: "tree/name" -> tag of the server's value.
    """

    def __init__(
        self,
        plan: Plan,
        codec: wire.Codec,
        schema: wire.Schema,
        carry: frame.Carry | None,
        change: Change | None = None,
        past: tuple[Version, ...] = (),
    ):
        self._codec = codec if codes_values(codec) else RAW
        self._refers = values.refers(self._codec.values, [spec.dtype for spec in schema.values()])
        self._past = past if self._refers else ()
        self._step_codec = codec
        self._change = change if change is not None and change.codec == repr(codec) else None
        self._schema = schema
        self._carry = carry
        self._server = plan
        self._known: dict[tuple[tuple[str, ...], int | None], dict[str, wire.Size]] = {}
        self._blobs: dict[tuple[tuple[str, ...], int | None], dict[str, bytes]] = {}
        self._trees: Message = {"params": plan.params, "buffers": plan.buffers, **plan.shared, "mask": plan.mask or {}}
        self.tags: Held = {f"{t}/{n}": tag(x) for t, content in self._trees.items() for n, x in content.items()}
        if self._codec.lossless:  # no need to code a model in order to know it
            params = cut(plan.params, plan.mask)
        else:
            params = self._codec.transmit(plan.params, self._context("params"))[0]
        # A client knows what travels: not the seed, from which only server hooks draw.
        self.plan = replace(plan, params=params, seed=0)
        if carry is not None:
            self.plan = self._decoded()

    @property
    def past(self) -> tuple[Version, ...]:
        """The last versions of the parameters, this one first: none where the codec makes no use of them."""
        if not self._refers:
            return ()
        this = Version(_of_model(self.tags), self.plan.params)
        known = bool(self._past) and self._past[0].tags == this.tags
        return self._past if known else (this, *self._past)[:HISTORY]

    def lacking(self, held: Held) -> tuple[str, ...]:
        lacking = tuple(key for key, tag in self.tags.items() if held.get(key) != tag)
        if self._change is None or not any(key.startswith("params/") for key in lacking):
            return lacking
        if any(held.get(key) != tag for key, tag in self._change.base.items()):
            return lacking
        return (CHANGE, *(key for key in lacking if not key.startswith("params/")))

    def sizes(self, held: Held, accepted: int, client: int = 0) -> dict[str, wire.Size]:
        """Exact bytes, tree by tree, of the plan for a client that holds these; "" is the frame."""
        lacking, base = self.lacking(held), self._base(held)
        if self._carry is not None:
            return self._delivered(lacking, base, accepted, client, self._carry)
        return self._weighed(lacking, base)

    def packed(self, held: Held, accepted: int, client: int) -> bytes:
        """The plan's frame for a client that holds these: as many bytes as `sizes` says.

        Raises:
            RunError: E343 when they are not, because a codec's `transmit` does not count what its `encode` makes.
        """
        lacking, base = self.lacking(held), self._base(held)
        blob = self._packed(lacking, base, accepted, client)
        counted = sum(size.total for size in self._weighed(lacking, base).values())
        if len(blob) != counted:
            message = f"round {self._server.round}: a plan of {len(blob):,} bytes is counted as {counted:,}"
            raise RunError(message, code="E343", where="downlink")
        return blob

    def _weighed(self, lacking: tuple[str, ...], base: int | None) -> dict[str, wire.Size]:
        if (lacking, base) not in self._known:
            self._known[lacking, base] = self._measure(lacking, base)
        return self._known[lacking, base]

    def _base(self, held: Held) -> int | None:
        """Which of the past versions a client holds."""
        own = _of_model(held) if self._past else {}
        return next((i for i, version in enumerate(self._past) if version.tags == own), None)

    def _measure(self, lacking: tuple[str, ...], base: int | None) -> dict[str, wire.Size]:
        sizes = {
            tree: self._coder(tree).transmit(content, self._context(tree, base))[1]
            for tree, content in self._parts(lacking).items()
        }
        lengths = {t: s.total for t, s in sizes.items()} | {"upload": len(self._upload())}
        return sizes | {"": wire.Size({}, frame.overhead("plan", self._scalars(0), lengths) + lengths["upload"], {})}

    def _delivered(
        self, lacking: tuple[str, ...], base: int | None, accepted: int, client: int, carry: frame.Carry
    ) -> dict[str, wire.Size]:
        """The same by really sending it, and comparing what arrives with what every client is said to hold."""
        blob = self._packed(lacking, base, accepted, client)
        carried = carry("plan", blob)
        arrived = frame.unpack(blob if carried is None else carried)
        if arrived.sections["upload"] != self._upload():  # all else has a checksum
            raise RunError(f"round {self._server.round}: what the plan asks for changed on the wire", code="E343")
        sizes = {}
        for tree in self._parts(lacking):
            context = self._context(tree, base)
            decoded = self._coder(tree).decode(arrived.sections[tree], context)
            truth = self._truth(tree)
            if any(not torch.equal(x, truth[name]) for name, x in decoded.items()):
                raise RunError(f"round {self._server.round}: the plan's {tree} changed on the wire", code="E343")
            sizes[tree] = wire.sized(self._coder(tree), arrived.sections[tree], context)
        return sizes | {"": wire.Size({}, len(blob) - sum(s.total for s in sizes.values()), {})}

    def _truth(self, tree: str) -> Params:
        """What every client is said to hold."""
        if tree == CHANGE and self._change is not None:
            return self._change.coded(self._step_codec, self._schema, self._server.mask)[0]
        return self.plan.params if tree == "params" else self._trees[tree]

    def _decoded(self) -> Plan:
        """The plan as a newcomer reads it from bytes. It is sent to nobody."""
        arrived = frame.unpack(self._packed(tuple(self.tags), None, -1, 0))
        trees: Message = {tree: {} for tree in self._trees}
        for tree, blob in arrived.sections.items():
            if tree != "upload":
                trees[tree] = self._coder(tree).decode(blob, self._context(tree))
        bits = np.frombuffer(arrived.sections["upload"], np.uint8)
        asked = np.unpackbits(bits, count=len(self._schema), bitorder="little")
        numbers = dict(arrived.scalars)
        del numbers["accepted"]
        return Plan(
            round=arrived.round,
            seed=0,
            params=trees.pop("params"),
            buffers=trees.pop("buffers"),
            upload=frozenset(name for name, bit in zip(self._schema, asked, strict=True) if bit),
            lr=numbers.pop("lr"),
            participation=numbers.pop("participation"),
            mask=trees.pop("mask") or None,
            in_sync=bool(numbers.pop("in_sync")),
            shared=trees,
            config=numbers,
        )

    def _packed(self, lacking: tuple[str, ...], base: int | None, accepted: int, client: int) -> bytes:
        """The plan's frame for a client that lacks these, and holds that version."""
        if (lacking, base) not in self._blobs:
            while len(self._blobs) >= _AT_ONCE:
                del self._blobs[next(iter(self._blobs))]
            parts = self._parts(lacking).items()
            self._blobs[lacking, base] = {t: self._coder(t).encode(x, self._context(t, base)) for t, x in parts}
        sections = self._blobs[lacking, base] | {"upload": self._upload()}
        return frame.pack(frame.Frame("plan", self._server.round, client, self._scalars(accepted), sections))

    def _parts(self, lacking: tuple[str, ...]) -> Message:
        wanted = set(lacking)
        parts = {
            tree: {name: x for name, x in content.items() if f"{tree}/{name}" in wanted}
            for tree, content in self._trees.items()
        }
        if CHANGE in wanted and self._change is not None:
            parts[CHANGE] = self._change.step
        return {tree: content for tree, content in parts.items() if content}

    def _coder(self, tree: str) -> wire.Codec:
        return {"params": self._codec, CHANGE: self._step_codec}.get(tree, RAW)

    def _context(self, tree: str, base: int | None = None) -> wire.Context:
        if tree == CHANGE and self._change is not None:
            return self._change.context(self._schema, self._server.mask)
        if tree != "params":
            return wire.Context(wire.schema_of(self._trees[tree]))
        return wire.Context(self._schema, self._server.mask, None if base is None else self._past[base].params)

    def _scalars(self, accepted: int) -> dict[str, float]:
        plan = self._server
        numbers = {"lr": plan.lr, "participation": plan.participation, "in_sync": float(plan.in_sync)}
        return {**numbers, "accepted": float(accepted), **plan.config}

    def _upload(self) -> bytes:
        """Bits over the schema: whose update is asked for."""
        return np.packbits([name in self._server.upload for name in self._schema], bitorder="little").tobytes()


def _of_model(tags: Held) -> Held:
    return {key: known for key, known in tags.items() if key.startswith(("params/", "mask/"))}


def tag(x: Tensor) -> int:
    """64-bit hash of a tensor's bytes in row-major order."""
    flat = x.detach().contiguous().reshape(-1).view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8)
    return int(xxhash.xxh3_64_intdigest(flat.numpy().data))
