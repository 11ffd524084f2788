"""A plan as its client reads it: from the bytes of its letter and what it holds, and from nothing else.

    mask  ->  params = held, or decoded against them; or held + the step that is sent; cut by the mask  ->  the rest

The other side of this is `lamina.downlink`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lamina import wire
from lamina.downlink import CHANGE, RAW, codes_values
from lamina.errors import WireError
from lamina.federation import Federation
from lamina.method import Plan
from lamina.remote.envelope import Letter, fingerprint
from lamina.remote.shelf import Holding
from lamina.tree import Message, Params, add, cut
from lamina.wire import Schema, Spec, frame

_TREES = 12  # the size of a model: parameters, what they change by, a mask, and further ones
_PER_TENSOR = 256  # bytes; names in a frame, scales
_SLACK = 4096


class Form(NamedTuple):
    """What a client knows without being told.

    Args:
        longest: bytes of a letter: more than `_TREES` models are taken for a mistake.
    """

    params: Schema
    buffers: Schema
    downlink: wire.Codec
    longest: int

    @classmethod
    def of(cls, fed: Federation) -> Form:
        params, buffers = fed.initial
        schemas = wire.schema_of(params), wire.schema_of(buffers)
        specs = [spec for schema in schemas for spec in schema.values()]
        model = sum(spec.numel * spec.dtype.itemsize + _PER_TENSOR for spec in specs)
        return cls(*schemas, fed.downlink, _TREES * model + _SLACK)


def opened(letter: Letter) -> frame.Frame:
    """The frame of a letter. Raises WireError when it is of another round or client than its head says."""
    arrived = frame.unpack(letter.frame)
    found, said = (arrived.kind, arrived.round, arrived.client), ("plan", letter.round, letter.client)
    if found != said:
        raise WireError(f"a {found[0]} of round {found[1]} to client {found[2]} in a letter of {said}", code="E345")
    return arrived


def read(form: Form, letter: Letter, arrived: frame.Frame, holding: Holding | None) -> Plan:
    """The plan, to the bit as the server says it is.

    Args:
        arrived: the letter's frame.
        holding: None for a newcomer.

    Raises:
        WireError: E348 when it is not: the client does not hold what the server takes it to hold.
    """
    sent, numbers = arrived.sections, dict(arrived.scalars)
    again = holding is not None and holding.plan == letter.fingerprint  # it has read this very plan before
    trees = holding.trees if holding is not None else {}
    expected = {"params", "buffers", "mask", CHANGE, "upload", *letter.shared}
    if not sent.keys() <= expected or "upload" not in sent:
        raise WireError(f"sections {sorted(sent)}, expected upload and some of {sorted(expected)}", code="E345")
    try:
        if not again:
            trees = _trees(form, letter, sent, trees)
        del numbers["accepted"]
        bits = np.frombuffer(sent["upload"], np.uint8)
        asked = np.unpackbits(bits, count=len(form.params), bitorder="little")
        plan = Plan(
            round=arrived.round,
            seed=0,
            params=trees["params"],
            buffers=trees["buffers"],
            upload=frozenset(name for name, bit in zip(form.params, asked, strict=True) if bit),
            lr=numbers.pop("lr"),
            participation=numbers.pop("participation"),
            mask=trees["mask"] or None,
            in_sync=bool(numbers.pop("in_sync")),
            shared={tree: trees[tree] for tree in letter.shared},
            config=numbers,
        )
    except (KeyError, ValueError) as error:
        raise WireError(f"the plan cannot be read: {error!r}", code="E348") from None
    if fingerprint(plan) != letter.fingerprint:
        raise WireError("what was read is not the server's plan", code="E348")
    return plan


def trees_of(plan: Plan) -> Message:
    """What of a plan stays with its client."""
    return {"params": plan.params, "buffers": plan.buffers, "mask": plan.mask or {}, **plan.shared}


def _trees(form: Form, letter: Letter, sent: dict[str, bytes], held: Message) -> Message:
    """Raises WireError, or KeyError for what is neither sent nor held."""
    masks = {name: Spec(form.params[name].shape, torch.bool) for name in letter.mask}
    mask = _tree("mask", masks, sent, held)
    known = held.get("params", {})
    params = dict(known)
    if CHANGE in sent:
        step = form.downlink.decode(sent[CHANGE], wire.Context(form.params, mask or None))
        params |= add(step, params)
    if "params" in sent:
        codec = form.downlink if codes_values(form.downlink) else RAW
        params |= codec.decode(sent["params"], wire.Context(form.params, mask or None, known or None))
    return {
        "params": cut({name: params[name] for name in form.params}, mask),
        "buffers": _tree("buffers", form.buffers, sent, held),
        "mask": mask,
        **{tree: _tree(tree, schema, sent, held) for tree, schema in letter.shared.items()},
    }


def _tree(tree: str, schema: Schema, sent: dict[str, bytes], held: Message) -> Params:
    content = dict(held.get(tree, {}))
    if tree in sent:
        content |= RAW.decode(sent[tree], wire.Context(schema))
    for name, spec in schema.items():
        x = content[name]
        if x.shape != spec.shape or x.dtype != spec.dtype:  # held from a plan of another form
            raise KeyError(f"{tree}/{name}")
    return {name: content[name] for name in schema}
