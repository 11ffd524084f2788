"""Any index coding with any value coding brings any tree back, and both decoders agree on it.

`make test` draws 200 examples for each coding, `make nightly` 100,000.
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import forced
import numpy as np
import pytest
import torch
from forced import (
    DTYPES,
    IDS,
    INDICES,
    KINDS,
    alike,
    fast,
    fast_scalars,
    force,
    memory,
    same,
    slow,
    slow_scalars,
    tensor,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lamina.wire import Context, Spec, index, layout, schema_of
from lamina.wire.codec import Support

each_coding = settings(
    max_examples=max(200, settings().max_examples), deadline=None, suppress_health_check=list(HealthCheck)
)

SHAPES = [(), (0,), (1,), (3,), (0, 5), (3, 0), (2, 4), (4, 1), (1, 6), (2, 3, 2), (17,), (5, 7), (8, 2, 2), (9,)]
LONG = [(300,), (70,), (12, 22), (2, 130)]  # beyond a block of int4, of int8, a byte of counts
BLOCKS = [(1030,), (3, 400)]  # beyond a block of index id 10
LAYOUTS = ["flat", "turned", "stepped", "expanded"]
SPECIAL = {
    "float32": [
        0,
        1 << 31,
        1,
        0x80000001,
        0x7FFFFF,
        0x800000,
        0x7F7FFFFF,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0x7F800001,
        0xFFFFFFFF,
        0x7FFFFFFF,
        0x3F800000,
        0x3F800001,
        0xBF7FFFFF,
        0x477FEFFF,
        0x33000000,
        0x3F808000,
    ],
    "float64": [0, 1 << 63, 1, 0x7FF0000000000000, 0xFFF8000000000001, 0x47EFFFFFE0000000, 0x36A0000000000000],
    "float16": [0, 0x8000, 1, 0x03FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF, 0x3C00],
    "bfloat16": [0, 0x8000, 1, 0x007F, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x3F80],
}
INTEGERS = [0, 1, -1, 127, -128, 255, (1 << 31) - 1, -(1 << 31), (1 << 63) - 1, -(1 << 63)]


def entries(rng: np.random.Generator, words: list[int], dtype: str, n: int) -> torch.Tensor:
    """n entries: of a normal distribution, or of a few words and special values."""
    kind = DTYPES[dtype]
    if dtype == "bool":
        return torch.from_numpy(rng.random(n) < rng.random())
    if kind.is_floating_point and rng.random() < 0.6:
        return torch.from_numpy(rng.standard_normal(n) * 10.0 ** rng.integers(-9, 9)).to(kind)
    pool = np.array(
        [(w + (1 << 63)) % (1 << 64) - (1 << 63) for w in [*SPECIAL.get(dtype, INTEGERS), *words]], np.int64
    )
    drawn = torch.from_numpy(rng.choice(pool, n))
    if not kind.is_floating_point:
        return drawn.to(kind)
    of_width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[kind.itemsize]
    return drawn.to(of_width).view(kind)


def laid_out(x: torch.Tensor, shape: tuple[int, ...], layout: str) -> torch.Tensor:
    """The same entries in the same order, elsewhere in memory."""
    x = x.reshape(shape)
    if layout == "turned" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "stepped" and x.ndim:
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    if layout == "expanded" and x.ndim and x.numel():
        return x[:1].expand(shape)
    return x


@st.composite
def examples(draw: st.DrawFn, index_ids: list[int], kinds: list[str]) -> tuple[forced.Forced, Context, int, str]:
    index_id, kind = draw(st.sampled_from(index_ids)), draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    words = draw(st.lists(st.integers(-(2**63), 2**64 - 1), max_size=3))
    tree, mask, near = {}, {}, {}
    pool = SHAPES * 3 + LONG + BLOCKS * (index_ids == [index.ENUMERATED])
    for i, shape in enumerate(draw(st.lists(st.sampled_from(pool), max_size=4))):
        dtype, n = draw(st.sampled_from(KINDS[kind])), math.prod(shape)
        tree[f"t{i}"] = laid_out(entries(rng, words, dtype, n), shape, draw(st.sampled_from(LAYOUTS)))
        share = draw(st.sampled_from([None, None, 0.0, 0.1, 0.5, 1.0]))
        if share is not None:
            mask[f"t{i}"] = torch.from_numpy(rng.random(n) < share).reshape(shape)
        if kind == "REF":
            steps = torch.from_numpy(rng.integers(-3, 4, n).astype(np.int32)).reshape(shape)
            moved = (tree[f"t{i}"].contiguous().view(torch.int32) + steps).view(torch.float32)
            near[f"t{i}"] = moved if rng.random() < 0.7 else entries(rng, words, dtype, n).reshape(shape)
    context = Context(schema_of(tree), mask if draw(st.booleans()) else None, near if kind == "REF" else None)
    secret = rng.bytes(rng.integers(16, 65)) if draw(st.booleans()) else None
    context = replace(context, key=secret, scalars=numbers(rng, draw(st.sampled_from([0, 0, 1, 5, 14, 15, 64]))))
    whole = draw(st.booleans())
    sent = {name: x for name, x in tree.items() if whole or draw(st.booleans())}
    n = Support(context, sent).total
    assume(n or index_id != index.SQUEEZED)  # there is no frame of no bytes
    message = force(
        sent,
        context,
        index_id,
        kind,
        positions(draw(st.sampled_from(["none", "one", "few", "half", "most", "all", "stretch"])), n, rng),
        seed=draw(st.integers(0, 2**64 - 1)),
        bits=draw(st.integers(1, 63)),
        by_row=draw(st.lists(st.booleans(), max_size=4)),
    )
    return message, context, index_id, kind


def numbers(rng: np.random.Generator, count: int) -> dict[int, float]:
    """Any bit patterns under any keys, in any order."""
    keys = rng.choice(256, count, replace=False).tolist()
    return {key: x for key, (x,) in zip(keys, struct.iter_unpack("<d", rng.bytes(8 * count)), strict=True)}


def positions(how: str, n: int, rng: np.random.Generator) -> np.ndarray:
    if how == "stretch":
        start, stop = sorted(rng.integers(0, n + 1, 2).tolist())
        return np.arange(start, stop)
    k = {"none": 0, "one": 1, "few": n // 12, "half": n // 2, "most": n - n // 9, "all": n}[how]
    return np.sort(rng.choice(n, min(k, n), replace=False))


def check(message: forced.Forced, context: Context, index_id: int, kind: str) -> None:
    assert (message.blob[4], message.blob[5], message.blob[6] & 1) == (index_id, IDS[kind], kind == "REF")
    received = fast(message.blob, context)
    assert not isinstance(received, str), f"refused with {received}"
    assert list(received) == list(message.expected)
    for name, x in message.expected.items():
        assert same(tensor(received[name], context.schema[name]), x)
        assert IDS[kind] in forced.NEAR or received[name] == memory(x)
    assert alike(received, slow(message.blob, context), context, IDS[kind])
    assert layout(message.blob, context).total == len(message.blob)
    beside = {key: struct.pack("<d", context.scalars[key]) for key in sorted(context.scalars)}
    assert fast_scalars(message.blob, context) == slow_scalars(message.blob, context) == beside
    assert message.blob[6] & 12 == 4 * (context.key is not None) + 8 * (len(beside) > 0)


@pytest.mark.parametrize("index_id", INDICES)
def test_an_index_coding_brings_any_positions_back(index_id):
    @given(examples([index_id], list(KINDS)))
    @each_coding
    def holds(example):
        check(*example)

    holds()


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_coding_brings_any_entries_back(kind):
    @given(examples(INDICES, [kind]))
    @each_coding
    def holds(example):
        check(*example)

    holds()


@pytest.mark.parametrize("kind", [kind for kind, id in IDS.items() if id not in forced.NEAR and kind != "ring"])
def test_exact_codings_change_no_bit(kind):
    """What the check above takes from the coding itself is the input."""
    rng = np.random.default_rng(0)
    for dtype in KINDS[kind]:
        x = entries(rng, [], dtype, 500)
        x = torch.ones(500, dtype=torch.bool) if kind == "none" else x
        context = Context(schema_of({"x": x}), None, {"x": x.flip(0)})
        assert memory(force({"x": x}, context, index.DENSE, kind).expected["x"]) == memory(x)


def test_zero_dimensions_hide_nothing():
    """Tensors without entries whose other dimensions are as large as can be."""
    schema = {"a": Spec((0, 1 << 40), torch.float32), "b": Spec((1 << 40, 0, 1 << 40), torch.float32)}
    tree = {name: torch.empty(spec.shape) for name, spec in schema.items()}
    for index_id in sorted({*INDICES} - {index.SQUEEZED}):
        for kind in ("fp32", "lossless", "int8", "sign"):
            message = force(tree, Context(schema), index_id, kind)
            assert fast(message.blob, Context(schema)) == slow(message.blob, Context(schema)) == {"a": b"", "b": b""}
