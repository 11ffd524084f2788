"""What travels around a frame: a letter to a client, its answer, and what says that both know the same plan.

::

    0   4  magic "LML1" (letter), "LMA1" (answer), "LMR1" (roll)   16   H bytes of head: UTF-8 JSON, an object
    4   4  u32 H, length of the head                                    then a frame (`lamina.wire.frame`), to the end
    8   8  XXH3-64 of the head, seeded with that of bytes 0..7

A letter that belongs to a secure sum has magic "LMS1", and between head and frame `u32 L` and the L bytes of that
step's own frame; where there is no plan with it, nothing follows.

Heads belong to the transport: no ledger counts them. Frames are what the ledger counts. A head may end with a signature
of itself and of the frame (`lamina.remote.signing`).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import xxhash

from lamina.errors import WireError
from lamina.method import Plan
from lamina.remote import signing
from lamina.remote.keys import Keys
from lamina.remote.signing import Signed
from lamina.remote.terms import LONGEST, MOST
from lamina.tree import Params
from lamina.wire import Schema, Spec
from lamina.wire import frame as frames
from lamina.wire.container import Buffer, as_view, checksum

_PLAIN, _STEP = b"LML1", b"LMS1"  # letters
_FRONT = struct.Struct("<4sI")
_LENGTH = struct.Struct("<I")
_START = _FRONT.size + 8
HEAD_MOST = 1 << 24  # bytes of a head


def seal(magic: bytes, head: dict[str, Any], *body: Buffer, keys: Keys | None = None) -> bytes:
    """
    Args:
        keys: sign it; None: nobody does.
    """
    text = json.dumps(head, separators=(",", ":")).encode()
    if keys is not None:
        text = signing.sign(magic, text, body, keys)
    front = _FRONT.pack(magic, len(text))
    return b"".join([front, checksum(front, [text]).to_bytes(8, "little"), text, *body])


def unseal(magic: bytes, blob: Buffer, max_bytes: int | None = None) -> tuple[dict[str, Any], memoryview]:
    """Head and frame, which is not copied. Raises WireError (E340, E341, E343, E345) and nothing else."""
    view = as_view(blob, max_bytes)
    if len(view) < _START:
        raise WireError(f"{len(view)} bytes, expected at least {_START}", code="E340")
    found, size = _FRONT.unpack_from(view)
    if found != magic:
        raise WireError(f"magic {found.hex()}, expected {magic.hex()}", code="E341")
    if size > min(HEAD_MOST, len(view) - _START):
        raise WireError(f"a head of {size} bytes in {len(view)}", code="E340")
    text = view[_START : _START + size]
    if int.from_bytes(view[_FRONT.size : _START], "little") != checksum(bytes(view[: _FRONT.size]), [text]):
        raise WireError("checksum of the head does not match", code="E343")
    try:
        head = json.loads(bytes(text))
    except (ValueError, RecursionError) as error:
        raise WireError(f"the head is not JSON: {error}", code="E345") from None
    if not isinstance(head, dict):
        raise WireError("the head is no object", code="E345")
    return head, view[_START + size :]


def expect_by(who: str | None, blob: Buffer, keys: Keys) -> None:
    """Raises signing.Rejected unless the client of this name, or the server (None), signed it. It must be whole."""
    magic, size = _FRONT.unpack_from(blob)
    view = memoryview(blob)
    signing.expect_by(who, magic, view[_START : _START + size], view[_START + size :], keys)


def sections_at(blob: Buffer) -> int:
    """Where the sections of the last frame in a letter or an answer begin; at its end where there is none."""
    try:
        magic, size = _FRONT.unpack_from(blob)
        start = _START + size
        if magic == _STEP:
            own = start + _LENGTH.size
            behind = own + _LENGTH.unpack_from(blob, start)[0]
            start = behind if behind < len(blob) else own
        _, _, head = frames.FRONT.unpack_from(blob, start)
    except struct.error:
        return len(blob)
    cut: int = min(start + frames.FRONT.size + 8 + head, len(blob))
    return cut


class Step(NamedTuple):
    """Which step of a secure sum a letter asks for.

    Args:
        name: one of `STEPS`.
        frame: what it says of the sum; empty for the first.
        asked: how many clients were asked.
        largest: the largest of their weights, before they are normalised.
    """

    name: str
    frame: Buffer = b""
    asked: int = 0
    largest: float = 0.0

    @classmethod
    def of(cls, said: Any, frame: Buffer) -> Step:
        """Raises WireError for what is none."""
        if not isinstance(said, list) or [type(x) for x in said] != [str, int, float] or said[0] not in STEPS:
            raise WireError("what is said of a secure sum has not the form of it", code="E345")
        return cls(said[0], frame, said[1], said[2])


STEPS = ("keys", "shares", "masked", "unmask")


class Letter(NamedTuple):
    """To one client: a plan, and what of its form the client cannot know.

    Args:
        kind: "round" or "probe".
        fingerprint: of the plan as every client must read it.
        mask: the parameters that have a mask, in the mask's order.
        shared: tree -> schema, of all further trees of the plan, also those that the client holds already.
        together: its node may answer for several clients in one message.
        frame: the plan.
        terms: `terms.stamp` of the server's.
        signed: what it says where it is signed.
        step: of a secure sum; the plan goes with "masked" alone.
    """

    kind: str
    client: int
    round: int
    fingerprint: str
    mask: tuple[str, ...]
    shared: dict[str, Schema]
    together: bool
    frame: Buffer
    terms: str = ""
    signed: Signed | None = None
    step: Step | None = None

    def packed(self, keys: Keys | None = None) -> bytes:
        head: dict[str, Any] = {
            "kind": self.kind,
            "client": self.client,
            "round": self.round,
            "plan": self.fingerprint,
        }
        if self.signed is not None:
            head["signed"] = self.signed.said()
        if self.terms:
            head["terms"] = self.terms
        if self.together:
            head["together"] = True
        if self.mask:
            head["mask"] = self.mask
        if self.shared:
            head["shared"] = {
                tree: {name: [str(spec.dtype).removeprefix("torch."), *spec.shape] for name, spec in schema.items()}
                for tree, schema in self.shared.items()
            }
        if self.step is None:
            return seal(_PLAIN, head, self.frame, keys=keys)
        name, frame, asked, largest = self.step
        head["step"] = [name, asked, float(largest)]
        return seal(_STEP, head, _LENGTH.pack(len(frame)), frame, self.frame, keys=keys)

    @classmethod
    def unpacked(cls, blob: Buffer, max_bytes: int | None = None) -> Letter:
        """Raises WireError and nothing else; E340 for more than `max_bytes`, before anything in it is looked at."""
        stepping = bytes(as_view(blob, max_bytes)[:4]) == _STEP
        head, frame = unseal(_STEP if stepping else _PLAIN, blob, max_bytes)
        step = None
        if stepping:
            own, frame = _cut(frame)
            step = Step.of(head.get("step"), own)
        try:
            shared = {
                str(tree): {str(name): _spec(form) for name, form in schema.items()}
                for tree, schema in head.get("shared", {}).items()
            }
            return cls(
                str(head["kind"]),
                int(head["client"]),
                int(head["round"]),
                str(head["plan"]),
                tuple(map(str, head.get("mask", ()))),
                shared,
                head.get("together") is True,
                frame,
                str(head.get("terms", "")),
                Signed.of(head.get("signed")),
                step,
            )
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise WireError(f"the head is not that of a letter: {error!r}", code="E345") from None


def _cut(content: memoryview) -> tuple[memoryview, memoryview]:
    """A step's own frame, and the plan's. Raises WireError."""
    if len(content) < _LENGTH.size:
        raise WireError(f"{len(content)} bytes of a step, expected at least {_LENGTH.size}", code="E340")
    end = _LENGTH.size + _LENGTH.unpack_from(content)[0]
    if end > len(content):
        raise WireError(f"a step of {end} bytes in {len(content)}", code="E340")
    return content[_LENGTH.size : end], content[end:]


class Member(NamedTuple):
    """Of a message for several clients."""

    client: int
    steps: int
    loss: float


def _is_member(x: Any) -> bool:
    formed = isinstance(x, list) and [type(part) for part in x] == [int, int, float]
    return bool(formed and x[0] >= 0 and x[1] >= 1 and math.isfinite(x[2]))


def _are_terms(x: Any) -> bool:
    fine = isinstance(x, dict) and len(x) <= MOST and all(isinstance(text, str) for text in x.values())
    return fine and all(len(text) <= LONGEST for pair in x.items() for text in pair)


class Answer(NamedTuple):
    """From one client.

    Args:
        said: "message"; "plan": it cannot read the plan with what it holds; "row": it does not have the state that it
            had after the round that the plan names as accepted; "terms": it has other ones; "failed": it cannot answer;
            "out": it leaves itself out of a secure sum.
        plan: the letter's fingerprint; "" when no letter could be read.
        why: for "message" the reason why the client itself refuses it ("" for none), else what is the matter.
        frame: the message; empty but for "message".
        members: of a message for several clients, this one first; their local steps and losses.
        terms: for "terms" those that it has.
        signed: of its letter, where it is signed.
        step: of a secure sum that it answers; "" for none.
        code, layer: of the reason, for "out" and "failed"; "" where there is none.
    """

    said: str
    client: int
    plan: str
    why: str = ""
    frame: Buffer = b""
    members: tuple[Member, ...] = ()
    terms: Mapping[str, str] = MappingProxyType({})
    signed: Signed | None = None
    step: str = ""
    code: str = ""
    layer: str = ""

    def packed(self, keys: Keys | None = None) -> bytes:
        head: dict[str, Any] = {"said": self.said, "client": self.client, "plan": self.plan, "why": self.why}
        if self.members:
            head["members"] = self.members
        if self.terms:
            head["terms"] = dict(self.terms)
        if self.signed is not None:
            head["signed"] = self.signed.said()
        head |= {key: x for key in ("step", "code", "layer") if (x := getattr(self, key))}
        return seal(b"LMA1", head, self.frame, keys=keys)

    @classmethod
    def unpacked(cls, blob: Buffer, max_bytes: int | None = None) -> Answer:
        """Raises WireError and nothing else; E340 for more than `max_bytes`, before anything in it is looked at."""
        head, frame = unseal(b"LMA1", blob, max_bytes)
        said, client, plan, why = (head.get(key) for key in ("said", "client", "plan", "why"))
        step, code, layer = (head.get(key, "") for key in ("step", "code", "layer"))
        known = said in _SAID and all(isinstance(text, str) for text in (plan, why, step, code, layer))
        if not known or type(client) is not int:
            raise WireError("the head is not that of an answer", code="E345")
        members = head.get("members", [])
        terms = head.get("terms", {})
        if not isinstance(members, list) or not all(map(_is_member, members)) or not _are_terms(terms):
            raise WireError("the head is not that of an answer", code="E345")
        reason, counted = str(why)[:LONGEST_REASON], tuple(Member(*m) for m in members)
        signed, about = Signed.of(head.get("signed")), (step, code[:LONGEST_CODE], layer[:LONGEST_REASON])
        return cls(str(said), client, str(plan), reason, frame, counted, terms, signed, *about)


_SAID = ("message", "plan", "row", "terms", "failed", "out")
LONGEST_CODE = 8  # characters
LONGEST_REASON = 500  # characters


def fingerprint(plan: Plan) -> str:
    """128-bit hash of all that a client reads of a plan: numbers, what is asked for, and every bit of every tree."""
    numbers = {"lr": plan.lr, "participation": plan.participation, "in_sync": plan.in_sync, **plan.config}
    said = [plan.round, sorted(plan.upload), {name: float(x) for name, x in numbers.items()}]
    digest = xxhash.xxh3_128(json.dumps(said).encode())
    trees = {"params": plan.params, "buffers": plan.buffers, "mask": plan.mask or {}}
    for tree, content in (trees | {f"shared/{name}": x for name, x in plan.shared.items()}).items():
        digest.update(f"{tree}:{len(content)};".encode())
        add_to(digest, content)
    return str(digest.hexdigest())


def add_to(digest: Any, tree: Params) -> None:
    for name, x in tree.items():
        digest.update(f"{name}:{tuple(x.shape)}:{x.dtype};".encode())
        if x.numel():
            digest.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _spec(form: list[Any]) -> Spec:
    dtype = getattr(torch, form[0])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{form[0]} is no dtype")
    return Spec(tuple(map(int, form[1:])), dtype)
