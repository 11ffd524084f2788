"""Our codecs for an app that is not ours: what a client sends back travels coded.

    app = ClientApp(mods=[mod.coded("topk:0.01")])               # client_app.py
    strategy.start(grid=mod.Decoding(grid), ...)                 # server_app.py

A client's arrays are coded by their distance to those that it was sent under the same name: one opaque array instead of
one object per layer. What the codec loses is lost: error feedback needs a client's state, and is our own methods' part.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message

from lamina import wire
from lamina.errors import WireError, expect
from lamina.remote.envelope import seal, unseal
from lamina.tree import Params

STYPE = "lamina.coded.v1"
_NAME = "lamina.coded"
_MAGIC = b"LMF1"
_KEPT = 4096  # messages whose arrays are remembered, as their answers may still come

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


def coded(codec: str | wire.Codec) -> Mod:
    """A mod for `ClientApp(mods=[...])`.

    Args:
        codec: `"int8"`, `"topk:0.01"`, `"randomk:0.1:sign"`, or one of `lamina.wire`.

    Raises:
        ConfigError: an unknown codec.
    """
    chosen = wire.parse(codec)

    def mod(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        sent = {name: _params(record) for name, record in message.content.array_records.items()}
        reply = call_next(message, context)
        if reply.has_content():
            for name, record in [*reply.content.array_records.items()]:
                if name in sent and _alike(record, sent[name]):
                    reply.content[name] = _encoded(chosen, record, sent[name], message.metadata.message_id)
        return reply

    return mod


class Decoding:
    """A Grid that decodes what comes back, for a `Strategy` or a loop of one's own; all else is the grid's.

    Raises:
        WireError: bytes that are not what the arrays that were sent imply.
    """

    def __init__(self, grid: Any):
        self._grid = grid
        self._sent: OrderedDict[str, dict[str, ArrayRecord]] = OrderedDict()  # by message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        going = [*messages]
        trees = [dict(message.content.array_records.items()) for message in going]
        ids = [*self._grid.push_messages(going)]
        self._remember(zip(ids, trees, strict=False))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._decoded(reply) for reply in self._grid.pull_messages(message_ids)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        going = [*messages]
        trees = [dict(message.content.array_records.items()) for message in going]
        replies = [*self._grid.send_and_receive(going, timeout=timeout)]
        ids = [message.metadata.message_id for message in going]
        self._remember(zip(ids, trees, strict=True))
        return [self._decoded(reply) for reply in replies]

    def _remember(self, sent: Iterable[tuple[str | None, dict[str, ArrayRecord]]]) -> None:
        """What was sent last is kept whole, however much that is: its answers come next."""
        new = {said: tree for said, tree in sent if said is not None}
        self._sent |= new
        while len(self._sent) > max(_KEPT, len(new)):
            self._sent.popitem(last=False)

    def _decoded(self, reply: Message) -> Message:
        sent = self._sent.pop(reply.metadata.reply_to_message_id, {})
        if reply.has_content():
            for name, record in [*reply.content.array_records.items()]:
                array = record.get(_NAME)
                if array is not None and array.stype == STYPE:
                    reply.content[name] = _restored(array.data, name, sent)
        return reply


def _encoded(codec: wire.Codec, record: ArrayRecord, sent: Params, said: str) -> ArrayRecord:
    values = _params(record)
    moving = {name: x for name, x in values.items() if x.is_floating_point()}
    fixed = {name: x for name, x in values.items() if name not in moving}
    update = {name: (x - sent[name]).float() for name, x in moving.items()}
    seed = int.from_bytes(hashlib.sha256(said.encode()).digest()[:4], "little")  # another one in every message
    blob = codec.encode(update, wire.Context(wire.schema_of(update), seed=seed))
    rest = wire.Dense().encode(fixed, wire.Context(wire.schema_of(fixed))) if fixed else b""
    data = seal(_MAGIC, {"moving": [*moving], "fixed": [*fixed], "bytes": len(blob)}, blob, rest)
    return ArrayRecord({_NAME: Array("uint8", (len(data),), STYPE, data)})


def _restored(data: bytes, name: str, sent: dict[str, ArrayRecord]) -> ArrayRecord:
    if name not in sent:
        raise WireError(f"{name!r}: what it is to be added to was not sent from here", code="E345")
    base = _params(sent[name])
    head, body = unseal(_MAGIC, data)
    try:
        moving, fixed = ({n: base[n] for n in head[key]} for key in ("moving", "fixed"))
        length = int(head["bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"{name!r}: the head is not that of a coded record", code="E345") from error
    if {*moving, *fixed} != {*base} or not all(x.is_floating_point() for x in moving.values()):
        raise WireError(f"{name!r}: it is of other arrays than those that were sent", code="E345")
    schema = {n: wire.Spec(tuple(x.shape), torch.float32) for n, x in moving.items()}
    update = wire.decode(bytes(body[:length]), schema)
    rest = wire.decode(bytes(body[length:]), fixed) if fixed else {}
    whole = {n: (base[n] + update[n]).to(base[n].dtype) if n in update else rest.get(n, base[n]) for n in base}
    return ArrayRecord({n: Array(x.contiguous().numpy()) for n, x in whole.items()})


def _params(record: ArrayRecord) -> Params:
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}


def _alike(record: ArrayRecord, sent: Params) -> bool:
    """Whether it is the same arrays with other values. Raises ConfigError where it is theirs, with other shapes."""
    if [*record] != [*sent]:
        return False
    other = [name for name, array in record.items() if tuple(array.shape) != tuple(sent[name].shape)]
    expect(not other, f"{other[:1]}: its shape is not that which was sent", code="E118", where="mod")
    return True
