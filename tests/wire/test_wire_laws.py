"""Laws that hold for every codec: what is transmitted is what is decoded, and its size is what travels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.wire import Context, Dense, RandomK, TopK, decode, encode, layout, schema_of, transmit
from lamina.wire.values import VALUES

CODECS = [
    *(Dense(values) for values in VALUES),
    *(TopK(0.1, values=values) for values in VALUES),
    *(TopK(0.1, scope="global", values=values) for values in VALUES),
    *(RandomK(0.3, values=values) for values in VALUES),
    TopK(0.6),
    TopK(0.1, keep="released"),
    TopK(0.1, scope="global", keep="released"),
    TopK(1.0, values="int8"),
    TopK(1.0, keep="released"),
    RandomK(1.0),
    RandomK(0.9),
]
LOSSLESS = [codec for codec in CODECS if codec.lossless]


def words(x):
    """The entries in row-major order, as integers of their bits."""
    flat = x.detach().reshape(-1).clone().contiguous()
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    return flat.view(size).tolist()


def same(a, b):
    """Equal names, order, shapes, dtypes and bits."""
    return list(a) == list(b) and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and words(a[k]) == words(b[k]) for k in a
    )


def model(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    tree = {
        "conv": torch.randn(8, 4, 3, 3, generator=g).to(memory_format=torch.channels_last),
        "bias": torch.randn(8, generator=g) * 1e-3,
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(0.25),
        "odd": torch.randn(5, 3, generator=g)[:1, 1],  # one entry, stride 3
        "turned": torch.randn(30, 20, generator=g).T,
        "zeros": torch.zeros(7),
    }
    return {name: x.to(dtype) for name, x in tree.items()}


def mask_of(tree):
    g = torch.Generator().manual_seed(2)
    return {name: torch.rand(x.shape, generator=g) < 0.5 for name, x in tree.items() if x.ndim > 1}


def contexts():
    tree = model()
    for dtype in (torch.float32, torch.float64):
        tree = model(dtype)
        yield f"{dtype}", tree, Context(schema_of(tree))
        yield f"{dtype}-mask", tree, Context(schema_of(tree), mask=mask_of(tree), round=3)
        part = {name: tree[name] for name in ("turned", "bias", "odd")}  # another order than the schema's
        yield f"{dtype}-subset", part, Context(schema_of(tree), client=2)
        yield f"{dtype}-subset-mask", part, Context(schema_of(tree), mask=mask_of(tree))
    yield "nothing", {}, Context(schema_of(tree))
    yield "no-schema", {}, Context({})
    nothing_kept = {"turned": torch.zeros(20, 30, dtype=torch.bool)}
    yield "mask-of-zeros", {"turned": tree["turned"]}, Context(schema_of(tree), mask=nothing_kept)
    numbers = {3: 0.5, 0: float("nan"), 255: -1.0}
    for beside in ({"scalars": numbers}, {"key": bytes(20)}, {"scalars": numbers, "key": bytes(20)}):
        told = "-".join(beside)
        yield told, tree, Context(schema_of(tree), **beside)
        yield f"{told}-subset-mask", part, Context(schema_of(tree), mask=mask_of(tree), **beside)
        yield f"{told}-nothing", {}, Context({}, **beside)
    mixed = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(300.0).half(), "c": torch.arange(9.0).double()}
    yield "mixed", mixed, Context(schema_of(mixed))


CASES = [pytest.param(tree, context, id=name) for name, tree, context in contexts()]


@pytest.mark.parametrize(("tree", "context"), CASES)
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_transmit_is_decode_of_encode_and_its_size_is_the_length(codec, tree, context):
    before = {name: x.clone() for name, x in tree.items()}
    blob = codec.encode(tree, context)
    received, size = codec.transmit(tree, context)
    decoded = codec.decode(blob, context)
    assert same(received, decoded)
    assert same(received, decode(blob, context.schema, mask=context.mask, key=context.key))
    assert list(received) == [name for name in context.schema if name in tree]
    assert size.total == len(blob)
    assert size == layout(blob, context)
    assert list(size.rows) == list(received)
    assert min([size.shared, *size.rows.values()]) >= 0
    assert codec.size(tree, context) in (size, None)
    assert same(tree, before)


@pytest.mark.parametrize(("tree", "context"), CASES)
@pytest.mark.parametrize("codec", LOSSLESS, ids=str)
def test_a_lossless_codec_returns_the_same_bits(codec, tree, context):
    kept = {n: torch.where(m, tree[n], 0.0) for n, m in (context.mask or {}).items() if n in tree}
    expected = {name: kept.get(name, tree[name]) for name in context.schema if name in tree}
    assert same(codec.decode(codec.encode(tree, context), context), expected)


@pytest.mark.parametrize("values", [v for v in VALUES if v != "lossless"])
@pytest.mark.parametrize(("tree", "context"), CASES)
def test_sizes_of_dense_and_random_k_follow_from_shapes(values, tree, context):
    for codec in (Dense(values), RandomK(0.3, values)):
        assert codec.size(tree, context) == codec.transmit(tree, context)[1]
        assert codec.size(schema_of(tree), context) == codec.size(list(tree), context)


def test_sizes_that_depend_on_the_data_are_not_foretold():
    context = Context(schema_of(model()))
    assert Dense("lossless").size(model(), context) is None
    assert TopK(0.1).size(model(), context) is None


@pytest.mark.parametrize("codec", [c for c in CODECS if c.values in ("fp32", "int8", "sign")], ids=str)
def test_laws_hold_for_large_tensors(codec):
    """Beyond the sizes at which pieces and samples begin: 65,536 entries at a time."""
    g = torch.Generator().manual_seed(3)
    tree = {"w": torch.randn(211, 1000, generator=g), "v": torch.randn(70_001, generator=g) ** 3}
    mask = {"w": torch.rand(211, 1000, generator=g) < 0.7}
    for context in (Context(schema_of(tree)), Context(schema_of(tree), mask)):
        blob = codec.encode(tree, context)
        received, size = codec.transmit(tree, context)
        assert same(received, codec.decode(blob, context))
        assert (size.total, size) == (len(blob), layout(blob, context))


def test_encoding_is_deterministic_and_independent_of_threads():
    g = torch.Generator().manual_seed(4)
    tree = {"w": torch.randn(300_000, generator=g)}
    threads = torch.get_num_threads()
    blobs = set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            blobs |= {encode(tree, codec) for codec in (TopK(0.01, values="sign"), TopK(0.01, values="sign"))}
            blobs |= {encode(tree, Dense("int8"))}
    finally:
        torch.set_num_threads(threads)
    assert len(blobs) == 2


def test_raw_fp32_is_not_copied():
    tree = model()
    received, size = transmit(tree, Dense("fp32"))
    assert all(received[name] is x for name, x in tree.items())
    assert size.rows == {name: 4 * x.numel() for name, x in tree.items()}
    assert size.shared == 24


def test_decoded_tensors_are_writable_and_own_their_memory():
    tree = model()
    for codec in CODECS:
        blob = encode(tree, codec)
        decoded = decode(blob, tree)
        for x in decoded.values():
            x.add_(1)
            assert x.untyped_storage().nbytes() == x.nbytes
        assert encode(tree, codec) == blob


shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=4)


@given(shapes, st.data())
@settings(max_examples=60, deadline=None)
def test_any_bit_pattern_survives_the_exact_codings(shapes, data):
    tree = {}
    for i, shape in enumerate(shapes):
        n = int(np.prod(shape))
        bits = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=n, max_size=n))
        tree[f"t{i}"] = torch.tensor(bits, dtype=torch.int32).view(torch.float32).reshape(shape)
    for codec in (Dense("fp32"), Dense("lossless"), TopK(1.0)):
        assert same(decode(encode(tree, codec), tree), tree)
        assert same(transmit(tree, codec)[0], tree)
    for codec in (TopK(0.3), RandomK(0.3), TopK(0.3, "global", "lossless")):  # special values and all
        received, size = transmit(tree, codec)
        blob = encode(tree, codec)
        assert same(received, decode(blob, tree))
        assert size.total == len(blob)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_laws_hold_for_random_trees_masks_and_subsets(data):
    finite = st.floats(-1e6, 1e6, width=32)
    tree, mask = {}, {}
    for i in range(data.draw(st.integers(1, 5))):
        n = data.draw(st.integers(0, 40))
        tree[f"t{i}"] = torch.tensor(data.draw(st.lists(finite, min_size=n, max_size=n)), dtype=torch.float32)
        if data.draw(st.booleans()):
            mask[f"t{i}"] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    context = Context(schema_of(tree), mask, seed=data.draw(st.integers(0, 9)))
    sent = {name: x for name, x in tree.items() if data.draw(st.booleans())}
    codec = data.draw(st.sampled_from(CODECS))
    blob = codec.encode(sent, context)
    received, size = codec.transmit(sent, context)
    assert same(received, codec.decode(blob, context))
    assert size.total == len(blob)
    assert size == layout(blob, context)
