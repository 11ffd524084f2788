"""Law: what `transmit` says arrives is what decode(encode(.)) gives, and what it says it costs is len(encode(.))."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import cases
from lamina import Params, wire
from lamina.tree import select, sub
from lamina.wire import Context


@cache
def trees(model: str) -> dict[str, tuple[Params, Context]]:
    """Trees that a federation of this model really sends, with what the receiver knows."""
    fed = cases.federation(model=model)
    (first, _), (second, _) = fed.run(2)
    update = sub(second.params, first.params)
    schema = wire.schema_of(update)
    some = [name for i, name in enumerate(schema) if i % 2]
    mask = {n: torch.arange(x.numel()).reshape(x.shape) % 3 != 0 for n, x in update.items() if x.dim() > 1}

    def at(tree: Params, mask: Params | None = None) -> Context:
        return Context(wire.schema_of(tree), mask, None, 7, "uplink/update", 1, 2)

    return {
        "params": (first.params, at(first.params)),
        "update": (update, at(update)),
        "part of an update": (select(update, some), at(update)),
        "masked update": (update, at(update, mask)),
        "part of a masked update": (select(update, some), at(update, mask)),
        "zeros": ({n: torch.zeros_like(x) for n, x in update.items()}, at(update)),
        "nothing": ({}, at(update)),
    }


def same(a: Params, b: Params) -> bool:
    return cases.bits(a) == cases.bits(b)


@pytest.mark.parametrize("codec", cases.CODECS)
@pytest.mark.parametrize("model", ["odd", "double"])
def test_transmit_is_decode_of_encode_and_its_size_the_length(codec: str, model: str) -> None:
    coder = cases.CODECS[codec]
    for what, (tree, context) in trees(model).items():
        before = cases.bits(tree)
        blob = coder.encode(tree, context)
        received, size = coder.transmit(tree, context)
        assert same(coder.decode(blob, context), received), what
        assert size.total == len(blob), what
        assert wire.layout(blob, context) == size, what
        foreseen = coder.size(tree, context)
        assert foreseen is None or foreseen == size, what
        assert list(received) == [name for name in context.schema if name in tree], what
        assert wire.schema_of(received) == {n: context.schema[n] for n in received}, what
        if coder.lossless:
            assert same(received, cut(tree, context.mask)), what
        assert cases.bits(tree) == before, what
        assert coder.encode(tree, context) == blob, what


def cut(tree: Params, mask: Params | None) -> Params:
    return {n: torch.where(mask[n], x, 0) if mask and n in mask else x for n, x in tree.items()}


@pytest.mark.parametrize("codec", cases.CODECS)
def test_a_value_that_is_not_finite_is_seen_by_the_receiver(codec: str) -> None:
    """Else a client that diverged would be taken for one that did not move. RandomK may leave the entry out."""
    coder = cases.CODECS[codec]
    for bad in (float("nan"), float("inf"), -float("inf")):
        tree, context = trees("odd")["update"]
        spoiled = {n: x.clone() for n, x in tree.items()}
        spoiled["head.weight"][1, 2] = bad
        received, _ = coder.transmit(spoiled, context)
        arrives = coder.encode(spoiled, context) != coder.encode(tree, context)
        assert arrives or isinstance(coder, wire.RandomK)
        assert not finite(received["head.weight"]) or (isinstance(coder, wire.RandomK) and not arrives)


def finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


@pytest.mark.parametrize("tree", ["buffers", "moments"])
def test_raw_trees_of_every_dtype_come_back_as_they_were(tree: str) -> None:
    state = cases.states(cases.federation(), 1)[0]
    moments = {n: torch.tensor(float(x.sum()), dtype=torch.float64) for n, x in state.params.items()}
    content = state.buffers if tree == "buffers" else moments
    context = Context(wire.schema_of(content))
    raw = wire.Dense()
    assert same(raw.decode(raw.encode(content, context), context), content)
    assert len(raw.encode(content, context)) == raw.transmit(content, context)[1].total
