"""A message as the server reads it: from bytes it does not trust, against a form that it derives itself.

What a client has to say follows from the plan (`lamina.admission.Form`). So the names, shapes and dtypes of every tree
are known before a byte is read, and how long a message can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lamina import wire
from lamina.admission import Form, Refusal, listed
from lamina.aggregate import Mean, total
from lamina.client import DENSE, Reply, Setup, non_finite, uplink_context
from lamina.errors import LaminaError, WireError, expect
from lamina.method import Plan
from lamina.privacy.secure import SecureSum
from lamina.remote.envelope import Answer, Member
from lamina.tree import Message
from lamina.wire import Schema, frame

_SLACK = 4096  # bytes beyond twice the raw values: heads, and an index section that costs more than it saves
_PER_MEMBER = 64  # bytes in the head of a message for several clients
_PER_TENSOR = 256  # bytes; names in a frame, seeds and scales


class Expected(NamedTuple):
    """What a plan implies of its messages.

    Args:
        schemas: tree -> schema; of "update", of all that could come.
        scalars: names of the numbers beside them.
        longest: bytes of a frame.
    """

    kind: str
    schemas: dict[str, Schema]
    scalars: frozenset[str]
    longest: int

    @classmethod
    def of(cls, setup: Setup, kind: str, plan: Plan) -> Expected:
        schemas = Form.of(setup, kind, plan).schemas
        scalars = frozenset({"loss"} if kind == "probe" else {"steps", "loss"})
        raw = sum(s.numel * s.dtype.itemsize for schema in schemas.values() for s in schema.values())
        tensors = sum(map(len, schemas.values()))
        return cls(kind, schemas, scalars, 2 * raw + _PER_TENSOR * tensors + _SLACK)

    def most(self, clients: int) -> int:
        """Bytes that no right answer exceeds, when so many clients were asked."""
        return self.longest + _SLACK + _PER_MEMBER * clients


class Refused(Exception):
    """A message that can be read, and must not be used."""

    def __init__(self, code: str, why: str, layer: str = ""):
        super().__init__(why)
        self.refusal = Refusal(code, why, layer)


def read(setup: Setup, plan: Plan, expected: Expected, answer: Answer) -> Reply:
    """The reply in an answer that is a message: of one client, or the first of several.

    Raises:
        WireError: its bytes are not what the plan implies.
        Refused: what they say is not.
    """
    members = answer.members or (Member(answer.client, 0, 0.0),)
    due = {member.client: setup.local.count(int(setup.data.sizes[member.client])) for member in members}
    arrived = frame.unpack(answer.frame, max_bytes=expected.longest)
    found = f"a {arrived.kind} of round {arrived.round} from client {arrived.client}"
    if arrived.kind != "message":
        raise WireError(found, code="E345")
    if arrived.client != answer.client:
        raise Refused("E330", found)
    if arrived.round != plan.round:
        raise Refused("E332", found)
    if arrived.scalars.keys() != expected.scalars or arrived.sections.keys() != expected.schemas.keys():
        got, needed = {*arrived.scalars, *arrived.sections}, {*expected.scalars, *expected.schemas}
        raise Refused("E322", f"it has {listed(sorted(got))}, expected {listed(sorted(needed))}", min(got ^ needed))
    received: Message = {}
    sizes: dict[str, wire.Size] = {}
    codec: wire.Codec
    for tree, schema in expected.schemas.items():
        blob = arrived.sections[tree]
        if tree == "moments":  # one for each tensor that came
            schema = {name: schema[name] for name in received["update"]}
        codec, context = DENSE, wire.Context(schema)
        if tree == "update":
            codec, context = setup.uplink, uplink_context(setup, plan, answer.client)
        received[tree] = codec.decode(blob, context)
        sizes[tree] = wire.sized(codec, blob, context)
        unasked = sorted(received[tree].keys() - (plan.upload if tree == "update" else schema.keys()))
        absent = sorted(schema.keys() - received[tree].keys()) if tree != "update" else []
        if unasked or absent:
            name = (unasked or absent)[0]
            said = "was not asked for" if unasked else "is absent"
            raise Refused("E322", said, name if tree == "update" else f"{tree}/{name}")
    around = len(answer.frame) - sum(size.total for size in sizes.values())
    sizes[""] = wire.Size({}, around, {})
    loss = arrived.scalars["loss"]
    moments = received.get("moments", {})
    refused = non_finite({tree: x for tree, x in received.items() if tree != "moments"}, None)
    refused = refused or next((f"moments/{name}" for name, x in moments.items() if not torch.isfinite(x)), None)
    refused = refused or answer.why or (None if math.isfinite(loss) else "loss")
    if expected.kind == "probe":
        return Reply(answer.client, received, None, sizes, loss, 0, refused)
    steps, own = arrived.scalars["steps"], due[answer.client]
    wrong = next((m for m in answer.members if m.steps != due[m.client]), None)
    if wrong is not None or not min(due.values()) <= steps <= max(due.values()):
        claimed = steps if wrong is None else wrong.steps
        raise Refused("E314", f"{claimed:g} local steps, this client's examples make {own}")
    received["steps"] = {"steps": torch.tensor(steps, dtype=torch.float64)}
    if answer.members:
        loss = answer.members[0].loss
    return Reply(
        answer.client, received, None, sizes, loss, own, refused, members=tuple(m.client for m in answer.members)
    )


def expect_raw(uplink: wire.Codec | str) -> None:
    """Raises ConfigError (E118) for an uplink that loses something, or sends less than everything: a mean of messages
    has all entries, and would be coded a second time."""
    remedy = "send every client's message by itself, or set uplink='fp32'"
    expect(uplink == DENSE, f"together=True with uplink={uplink!r}", code="E118", where="uplink", remedy=remedy)


def expect_taken_together(rule: str, norm: str) -> None:
    """Raises ConfigError (E118) for what looks at every client's update by itself."""
    remedy = "let every client send its own message"
    for where, said, plain in (("aggregate", rule, "mean"), ("faults.norm", norm, "off")):
        message = f"together=True with {where}={said!r}: it looks at every client's update"
        expect(said == plain, message, code="E118", where=where, remedy=remedy)


def expect_in_the_clear(secure: SecureSum | None) -> None:
    """Raises ConfigError (E118) where clients send masked messages: a node cannot take means of what they hide."""
    said = "together=True with secure sums: each client masks its own message"
    expect(secure is None, said, code="E118", where="secure", remedy="let every client send its own message")


def together(setup: Setup, plan: Plan, parts: Sequence[tuple[Reply, float]]) -> Answer | None:
    """The weighted mean of several clients' messages as one; None where they have not all the same form.

    Args:
        parts: replies as `read` makes them, and the weights of their clients.
    """
    first = parts[0][0].message
    forms = [{tree: wire.schema_of(content) for tree, content in reply.message.items()} for reply, _ in parts]
    voted = any(x.dtype == torch.bool for tree, content in first.items() if tree != "buffers" for x in content.values())
    if voted or any(form != forms[0] for form in forms):
        return None
    whole, even = total(weight for _, weight in parts), 1.0 / len(parts)
    mean, uniform = Mean(total(weight / whole for _, weight in parts)), Mean(total(even for _ in parts))
    alike = {*setup.method.uniform, *({"moments"} if "update" in setup.method.uniform else ())}
    loss = 0.0
    for reply, weight in parts:
        loss += reply.loss * weight / whole
        for tree, content in reply.message.items():
            (uniform if tree in alike else mean).add(tree, content, even if tree in alike else weight / whole)
    made = mean.result() | uniform.result()
    steps = float(made.pop("steps")["steps"])
    client = parts[0][0].client
    blobs = {}
    for tree in first:
        if tree != "steps":
            context = uplink_context(setup, plan, client) if tree == "update" else wire.Context(forms[0][tree])
            blobs[tree] = DENSE.encode(made[tree], context)
    packed = frame.pack(frame.Frame("message", plan.round, client, {"steps": steps, "loss": loss}, blobs))
    members = tuple(Member(reply.client, reply.steps, reply.loss) for reply, _ in parts)
    return Answer("message", client, "", "", packed, members)


def why(error: Exception) -> str:
    """In one line."""
    said = f"{error.code} {error.message}" if isinstance(error, LaminaError) else f"{type(error).__name__}: {error}"
    return said.replace("\n", " ")[:500]
