"""Value codings: distances to a reference, blocks of four bits, ring elements, masks, and threads."""

import math
import os
import re
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import ConfigError
from lamina.wire import (
    Context,
    Dense,
    Mask,
    RandomK,
    TopK,
    WireError,
    decode,
    encode,
    layout,
    parse,
    schema_of,
    transmit,
)
from lamina.wire import threads as pool
from lamina.wire.container import schema_id
from lamina.wire.planes import distance, moved, pack, unpack

SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38]


def bits(x):
    return x.reshape(-1).view(torch.int32).tolist()


def same(a, b):
    return list(a) == list(b) and all(a[k].shape == b[k].shape and bits(a[k]) == bits(b[k]) for k in a)


def trained(seed=0, size=4000):
    """A tree and what it was a little while ago."""
    g = torch.Generator().manual_seed(seed)
    before = {"w": torch.randn(size // 40, 40, generator=g), "b": torch.randn(30, generator=g), "s": torch.tensor(1.5)}
    return {name: x + 1e-4 * torch.randn(x.shape, generator=g) for name, x in before.items()}, before


def masks(tree):
    g = torch.Generator().manual_seed(9)
    return {"w": torch.rand(tree["w"].shape, generator=g) < 0.5}


def code(act, *args, **known):
    with pytest.raises(WireError) as caught:
        act(*args, **known)
    return caught.value.code


def sealed(front, body):
    digest = xxhash.xxh3_64_intdigest(body, seed=xxhash.xxh3_64_intdigest(front[:16]))
    return front[:16] + digest.to_bytes(8, "little") + body


def blob_of(index, values, body, schema, flags=0):
    return sealed(b"FLC\x01" + bytes([index, values, flags, 0]) + schema_id(schema), body)


# Distances to a reference.


def steps(x, reference):
    """The zig-zag distance of two float32 given by value or by bits."""
    a, b = (
        np.array([v], np.uint32) if isinstance(v, int) else np.array([v], np.float32).view(np.uint32)
        for v in (x, reference)
    )
    assert moved(distance(a, b), b).tolist() == a.tolist()
    return int(distance(a, b)[0])


def test_a_distance_counts_floats_in_their_order():
    """ord(u) = u ^ (u >> 31 ? ffffffff : 80000000); distance = zigzag(ord(x) - ord(r)): 0 -1 1 -2 2 as 0 1 2 3 4.

    1.0 is 3f800000, ord bf800000; the next float up is 3f800001, two below it 3f7ffffe.
    -1.0 is bf800000, ord 407fffff; the next float towards 0 is bf7fffff, ord 40800000: one up.
    0.0 has ord 80000000 and -0.0 ord 7fffffff: one down. The smallest subnormal 00000001 is one up from 0.0.
    -1.0 to 1.0: bf800000 - 407fffff = 7f000001, twice that is fe000002; back it is one less.
    inf 7f800000 to the NaN 7fc00000: 400000 up, 800000. 1.0 to 0.5: 800000 down.
    The NaN ffffffff (ord 0) to 7fffffff (ord ffffffff): one down.
    """
    assert steps(1.0, 1.0) == 0
    assert steps(0x3F800001, 1.0) == 2
    assert steps(0x3F7FFFFE, 1.0) == 3
    assert steps(0xBF7FFFFF, -1.0) == 2
    assert steps(-0.0, 0.0) == 1
    assert steps(0x00000001, 0.0) == 2
    assert steps(1.0, -1.0) == 0xFE000002
    assert steps(-1.0, 1.0) == 0xFE000001
    assert steps(0.5, 1.0) == 0xFFFFFF
    assert steps(0x7FC00000, math.inf) == 0x800000
    assert steps(0x7FFFFFFF, 0xFFFFFFFF) == 1


def test_a_distance_has_a_section_of_four_planes_behind_the_id_of_the_reference():
    """1000 entries, each one step above its reference but for the last, which is half of it: 800000 steps below.

    Numbers 2, ..., 2, 2 * 800000 - 1 = 00ffffff: planes 02... ff, 00... ff, 00... ff, 00...
    """
    reference = {"x": torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.1}
    x = torch.nextafter(reference["x"], torch.tensor(2.0))
    x[-1] = reference["x"][-1] / 2
    blob = encode({"x": x}, Dense("lossless"), reference=reference)
    assert blob[:8].hex(" ") == "46 4c 43 01 00 01 01 00"  # index dense, values lossless, flag REF
    assert blob[24:32] == xxhash.xxh3_64(reference["x"].numpy().tobytes()).intdigest().to_bytes(8, "little")
    at, planes = 32, []
    for _ in range(4):
        planes.append(zstandard.decompress(blob[at + 1 : at + 1 + blob[at]]))
        at += 1 + blob[at]
    zeros = bytes(999)
    assert planes == [b"\x02" * 999 + b"\xff", zeros + b"\xff", zeros + b"\xff", zeros + b"\x00"]
    assert at == len(blob)
    assert same(decode(blob, reference, reference=reference), {"x": x})


@pytest.mark.parametrize("codec", [Dense("lossless"), TopK(0.3, values="lossless"), RandomK(0.5, "lossless")], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("part", [("w", "b", "s"), ("b", "w")])
def test_a_reference_gives_the_same_tree_in_fewer_bytes(codec, masked, part):
    tree, before = trained()
    sent = {name: tree[name] for name in part}
    context = Context(schema_of(tree), masks(tree) if masked else None, before)
    blob = codec.encode(sent, context)
    plain = replace(context, reference=None)
    received, size = codec.transmit(sent, context)
    assert blob[6] & 1
    assert len(blob) < len(codec.encode(sent, plain))
    assert same(received, codec.decode(blob, context))
    assert same(received, codec.transmit(sent, plain)[0])
    assert size == layout(blob, context)
    assert size.total == len(blob)
    assert same(received, decode(blob, tree, mask=context.mask, reference=before))
    # Only what travels is compared: entries and tensors that do not may differ.
    elsewhere = {name: torch.where(received[name] != 0, x, 7.0) if name in sent else x for name, x in before.items()}
    assert same(received, codec.decode(blob, replace(context, reference=elsewhere)))


def test_unrelated_references_cost_nothing():
    g = torch.Generator().manual_seed(1)
    tree = {"x": 1e-3 * torch.randn(5000, generator=g)}
    for far in (torch.zeros(5000), 1e9 * torch.randn(5000, generator=g)):
        assert encode(tree, Dense("lossless"), reference={"x": far}) == encode(tree, Dense("lossless"))
    few = {"x": torch.tensor([1.0, 2.0])}  # 8 bytes raw
    assert encode(few, Dense("lossless"), reference=few) == encode(few, Dense("fp32"))


def test_only_lossless_floats_use_a_reference():
    tree, before = trained()
    for codec in (Dense("fp32"), Dense("int8"), TopK(0.1), RandomK(0.1, "sign")):
        assert encode(tree, codec, reference=before) == encode(tree, codec)
    wide = {name: x.double() for name, x in tree.items()}
    assert encode(wide, Dense("lossless"), reference=wide) == encode(wide, Dense("lossless"))


def test_a_wrong_reference_is_refused():
    tree, before = trained()
    blob = encode(tree, Dense("lossless"), reference=before)
    assert code(decode, blob, tree) == "E348"
    assert code(decode, blob, tree, reference=tree) == "E348"
    off = {**before, "s": before["s"] + 1}
    assert code(decode, blob, tree, reference=off) == "E348"
    assert code(layout, blob, Context(schema_of(tree))) == "E348"
    negative = {name: torch.where(x == 0, -0.0, x) for name, x in before.items()}
    assert same(decode(blob, tree, reference=negative), tree)  # no zeros in it: nothing differs
    other = xxhash.xxh3_64_intdigest(b"").to_bytes(8, "little")
    assert code(decode, sealed(blob, other + blob[32:]), tree, reference=before) == "E348"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"b": torch.zeros(30)}, "reference of w: none"),
        ({"w": torch.zeros(40, 100)}, r"reference of w: \(40, 100\) torch.float32, expected \(100, 40\)"),
        ({"w": torch.zeros(100, 40).double()}, r"reference of w: \(100, 40\) torch.float64, expected"),
    ],
)
def test_a_reference_of_another_shape_or_dtype_is_refused_by_name(wrong, said):
    tree, before = trained()
    reference = wrong if "b" in wrong else before | wrong
    blob = encode(tree, Dense("lossless"), reference=before)
    for act in (
        lambda: encode(tree, Dense("lossless"), reference=reference),
        lambda: transmit(tree, Dense("lossless"), reference=reference),
        lambda: decode(blob, tree, reference=reference),
    ):
        with pytest.raises(WireError, match=said) as caught:
            act()
        assert caught.value.code == "E348"


def test_a_reference_may_lie_in_memory_as_it_likes():
    tree, before = trained()
    blob = encode(tree, Dense("lossless"), reference=before)
    strided = before | {"w": before["w"].T.contiguous().T.requires_grad_()}
    assert not strided["w"].is_contiguous()
    assert encode(tree, Dense("lossless"), reference=strided) == blob
    assert same(decode(blob, tree, reference=strided), tree)


def test_a_reference_serves_only_lossless_sections_of_float32():
    tree = {"x": torch.ones(100)}
    for values in (0, 3, 4, 5, 6, 7, 8, 9, 128):
        blob = blob_of(0, values, bytes(500), schema_of(tree), flags=1)
        assert code(decode, blob, tree, reference=tree) == "E344"
    for dtype in (torch.float64, torch.uint8, torch.bool, torch.int64):
        odd = {"x": torch.ones(3).to(dtype)}
        digest = xxhash.xxh3_64_intdigest(odd["x"].view(torch.uint8).numpy().tobytes()).to_bytes(8, "little")
        blob = blob_of(0, 1, digest + bytes(16), schema_of(odd), flags=1)
        assert code(decode, blob, odd, reference=odd) == "E344"
    for end in range(16):
        assert code(decode, blob_of(0, 1, bytes(end), schema_of(tree), flags=1), tree, reference=tree) in (
            ("E340",) if end < 8 else ("E348",)
        )


words = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.sampled_from(SPECIAL).map(lambda x: struct.unpack("<i", struct.pack("<f", x))[0]),
)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_any_bit_pattern_survives_any_reference(data):
    n = data.draw(st.integers(0, 60))
    x, r = (
        torch.tensor(data.draw(st.lists(words, min_size=n, max_size=n)), dtype=torch.int32).view(torch.float32)
        for _ in range(2)
    )
    a, b = x.numpy().view(np.uint32), r.numpy().view(np.uint32)
    assert moved(distance(a, b), b).tolist() == a.tolist()
    times = data.draw(st.sampled_from([1, 30]))  # so that distances are sometimes the smallest
    tree, reference = {"a": x.repeat(times), "b": x[:1]}, {"a": r.repeat(times), "b": r[:1]}
    for codec in (Dense("lossless"), TopK(0.4, values="lossless"), RandomK(0.4, "lossless")):
        blob = encode(tree, codec, reference=reference)
        received, size = transmit(tree, codec, reference=reference)
        assert same(received, decode(blob, tree, reference=reference))
        assert same(received, transmit(tree, codec)[0])
        assert size.total == len(blob) <= len(encode(tree, codec))


# Four bits.


def test_int4_is_scales_then_packed_codes():
    """x: scale 14 / 7 = 2, codes 7 -1 0 (0.9 / 2 rounds to 0); y: scale 0, code 0. Nibbles 7 f 0 0, low one first."""
    tree = {"x": torch.tensor([14.0, -2.0, 0.9]), "y": torch.tensor([0.0])}
    blob = encode(tree, Dense("int4"))
    assert blob[5] == 9
    assert blob[24:].hex(" ") == "00 00 00 40 00 00 00 00 00 f7 00"
    assert {k: v.tolist() for k, v in decode(blob, tree).items()} == {"x": [14, -2, 0], "y": [0]}


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200))
@settings(max_examples=50, deadline=None)
def test_int4_error_is_at_most_half_a_step_of_its_block(numbers):
    x = torch.tensor(numbers)
    received = decode(encode({"x": x}, Dense("int4")), {"x": x})["x"]
    for block, wrong in zip(x.split(64), (received - x).abs().split(64), strict=True):
        step = block.abs().max() / 7
        assert wrong.max() <= step * 0.500001 + 1e-44  # and one in the last place of the smallest floats


def test_int4_blocks_do_not_cross_tensors():
    tree = {"a": torch.tensor([1000.0]), "b": torch.tensor([0.07, -0.02])}
    received, size = transmit(tree, Dense("int4"))
    assert received["b"].tolist() == pytest.approx([0.07, -0.02])
    # scales of 4 bytes each; 2 bytes of codes, of which a third is a's; 24 + 1 and the remainder in common
    assert size[:2] == ({"a": 4 + 0, "b": 4 + 1}, 24 + 1 + 1)
    tree = {"a": torch.randn(200), "b": torch.randn(100)}
    assert transmit(tree, Dense("int4"))[1][:2] == ({"a": 4 * 4 + 100, "b": 2 * 4 + 50}, 24 + 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_of_four_bits_that_is_not_finite_stays_so(bad):
    x = torch.linspace(-1, 1, 130)
    x[70] = bad
    received = decode(encode({"x": x}, Dense("int4")), {"x": x})["x"]
    assert not received[64:128].isfinite().any()
    assert received[:64].isfinite().all()
    assert received[128:].isfinite().all()


def test_the_largest_floats_do_not_overflow_in_four_bits():
    most = torch.finfo(torch.float32).max
    assert transmit({"x": torch.tensor([most, -most])}, Dense("int4"))[0]["x"].isfinite().all()


def test_bits_behind_the_last_code_are_zero():
    tree = {"x": torch.ones(3)}
    blob = encode(tree, Dense("int4"))
    assert code(decode, sealed(blob, blob[24:-1] + b"\x17"), tree) == "E345"
    assert code(decode, sealed(blob, blob[24:-1]), tree) == "E340"
    assert code(decode, sealed(blob, blob[24:] + b"\x00"), tree) == "E340"


# Ring elements.


def test_ring_elements_are_byte_planes_and_the_bits_left():
    """12 bits: 0x123, 0xfff, -1 = 0xfff, 0x1000 = 0. Low bytes 23 ff ff 00; high 4 bits 1 f f 0, packed f1 0f."""
    tree = {"x": torch.tensor([0x123, 0xFFF, -1]), "y": torch.tensor(0x1000)}
    blob = encode(tree, Dense("ring:12"))
    assert blob[5] == 8
    assert blob[24:].hex(" ") == "0c 23 ff ff 00 f1 0f"
    assert {k: v.tolist() for k, v in decode(blob, tree).items()} == {"x": [0x123, 0xFFF, 0xFFF], "y": 0}


@given(st.integers(1, 63), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=60), st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_ring_elements_come_back_modulo_their_ring(b, numbers, cut):
    x = torch.tensor(numbers, dtype=torch.int64)
    tree, codec = {"a": x[:cut], "b": x[cut:]}, Dense(f"ring:{b}")
    context = Context(schema_of(tree))
    blob = codec.encode(tree, context)
    received, size = codec.transmit(tree, context)
    decoded = codec.decode(blob, context)
    expected = [n % 2**b for n in numbers]
    assert received["a"].tolist() + received["b"].tolist() == expected
    assert decoded["a"].tolist() + decoded["b"].tolist() == expected
    assert len(blob) == 24 + 1 + -(-len(numbers) * b // 8) == size.total
    assert codec.size(tree, context) == size == layout(blob, context)


def test_sums_of_ring_elements_are_elements_of_sums():
    g = torch.Generator().manual_seed(0)
    codec, shares = Dense("ring:20"), [torch.randint(-(2**16), 2**16, (100,), generator=g) for _ in range(7)]
    total = sum(transmit({"x": x}, codec)[0]["x"] for x in shares)
    assert torch.equal(transmit({"x": total}, codec)[0]["x"], torch.stack(shares).sum(0) % 2**20)


def test_rings_serve_masks_subsets_and_random_positions():
    tree = {"x": torch.arange(100).reshape(10, 10), "y": torch.arange(7)}
    mask = {"x": tree["x"] % 3 == 0}
    for codec in (Dense("ring:7"), RandomK(0.2, "ring:7")):
        for sent in (tree, {"x": tree["x"]}):
            context = Context(schema_of(tree), mask)
            received, size = codec.transmit(sent, context)
            blob = codec.encode(sent, context)
            assert size == codec.size(sent, context)
            assert size.total == len(blob)
            assert all(torch.equal(received[k], v) for k, v in codec.decode(blob, context).items())


def test_rings_are_of_integers_and_agreed_on():
    with pytest.raises(ConfigError, match=r"values='ring:16': cannot code torch\.float32, only torch\.int64 tensors"):
        encode({"x": torch.ones(3)}, Dense("ring:16"))
    tree = {"x": torch.arange(100)}
    context = Context(schema_of(tree))
    blob = Dense("ring:7").encode(tree, context)
    assert torch.equal(decode(blob, tree)["x"], tree["x"])
    assert code(Dense("ring:8").decode, blob, context) == "E345"
    assert code(Dense().decode, blob, context) == "E344"


def test_ring_sections_are_exact():
    like = schema_of({"x": torch.arange(3)})
    for body, expected in (
        (b"", "E340"),
        (b"\x00" + bytes(3), "E345"),
        (b"\x40" + bytes(24), "E345"),
        (b"\xff" + bytes(100), "E345"),
        (b"\x05" + bytes(1), "E340"),
        (b"\x05" + bytes(3), "E340"),
        (b"\x05\x00\x80", "E345"),  # bit 15 of 15
        (b"\x0c" + bytes(4), "E340"),
        (b"\x0c" + bytes(6), "E340"),
    ):
        assert code(decode, blob_of(0, 8, body, like), like) == expected
    floats = schema_of({"x": torch.ones(3)})
    assert code(decode, blob_of(0, 8, b"\x08" + bytes(3), floats), floats) == "E344"


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
@settings(max_examples=50, deadline=None)
def test_packing_agrees_with_arithmetic(width, numbers):
    small = [n % 2**width for n in numbers]
    whole = sum(n << width * j for j, n in enumerate(small))
    packed = pack(np.array(small, np.uint8), width)
    assert packed.tobytes() == whole.to_bytes(-(-len(small) * width // 8), "little")
    assert unpack(packed.data, len(small), width, "numbers").tolist() == small


# Masks.


def test_a_mask_is_an_index_without_values():
    g = torch.Generator().manual_seed(0)
    tree = {"x": torch.rand(1000, generator=g) < 0.02, "y": torch.tensor([[True, False]])}
    for context in (Context(schema_of(tree)), Context(schema_of(tree), {"x": torch.arange(1000) % 2 == 0})):
        blob = Mask().encode(tree, context)
        received, size = Mask().transmit(tree, context)
        assert blob[5] == 7
        assert len(blob) < len(Dense().encode(tree, context))
        assert (size.total, size) == (len(blob), layout(blob, context))
        kept = (context.mask or {}).get("x", torch.ones(1000, dtype=torch.bool))
        assert torch.equal(received["x"], tree["x"] & kept)
        assert all(torch.equal(v, received[k]) for k, v in Mask().decode(blob, context).items())


@pytest.mark.parametrize("value", [True, False])
def test_masks_of_one_value_are_a_header_and_little_more(value):
    tree = {"x": torch.full((5000,), value)}
    blob = encode(tree, Mask())
    assert len(blob) <= 24 + 1
    assert torch.equal(decode(blob, tree)["x"], tree["x"])
    with pytest.raises(ConfigError, match=r"cannot send torch\.float32"):
        encode({"x": torch.ones(3)}, Mask())


# Names.


def test_config_values_name_the_codings():
    assert parse("int4") == Dense("int4")
    assert parse("topk:0.01:int4") == TopK(0.01, values="int4")
    assert parse("ring:24") == parse("dense:ring:24") == Dense("ring:24")
    assert parse("randomk:0.1:ring:9") == parse("randomk:ring:9:0.1") == RandomK(0.1, "ring:9")
    assert parse({"name": "randomk:0.1", "values": "ring:63"}) == RandomK(0.1, "ring:63")


@pytest.mark.parametrize(
    "values",
    ["none", "ring", "ring:", "ring:0", "ring:64", "ring:07", "ring:-1", "ring:1.5", "RING:8", "int2", None, 8],
)
def test_values_that_are_none_are_refused_with_those_that_are(values):
    known = "expected one of fp32, lossless, fp16, bf16, int8, int4, sign, ring:1 to ring:63"
    for make in (Dense, lambda v: TopK(0.1, values=v), lambda v: RandomK(0.1, v)):
        with pytest.raises(ConfigError, match=re.escape(known)):
            make(values)


@pytest.mark.parametrize("spec", ["ring", "ring:64", "topk:0.1:ring:0", "int5"])
def test_config_errors_name_the_rings(spec):
    with pytest.raises(ConfigError) as caught:
        parse(spec)
    assert "ring:1 to ring:63" in str(caught.value) or "did you mean" in str(caught.value)


# Threads.


def large():
    g = torch.Generator().manual_seed(5)
    floats = {"w": torch.randn(701, 1000, generator=g), "v": torch.randn(65_537, generator=g), "e": torch.empty(0)}
    before = {name: x + 1e-3 * torch.randn(x.shape, generator=g) for name, x in floats.items()}
    integers = {name: (x * 1e9).long() for name, x in floats.items()}
    return floats, before, integers


def test_bytes_are_the_same_with_any_number_of_threads():
    floats, before, integers = large()
    known = torch.get_num_threads()
    results = set()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            blobs = [encode(floats, Dense(v)) for v in ("lossless", "fp16", "bf16", "int8", "int4", "sign")]
            blobs += [encode(floats, Dense("lossless"), reference=before), encode(integers, Dense("ring:45"))]
            assert same(decode(blobs[0], floats), floats)
            assert same(decode(blobs[6], floats, reference=before), floats)
            assert all(torch.equal(x, integers[n] & (1 << 45) - 1) for n, x in decode(blobs[7], integers).items())
            for values, blob in zip(("fp16", "bf16", "int8", "int4"), blobs[1:], strict=False):
                assert same(decode(blob, floats), transmit(floats, Dense(values))[0])
            results.add(tuple(xxhash.xxh3_64_hexdigest(blob) for blob in blobs))
    finally:
        torch.set_num_threads(known)
    assert len(results) == 1


def test_threads_are_for_large_work_and_end_with_it(monkeypatch):
    seen = []

    def work(_):
        seen.append(threading.current_thread())
        return os.getpid()

    monkeypatch.setattr(pool.torch, "get_num_threads", lambda: 2)
    assert pool.each(work, range(8), pool.WORTH - 1) == [os.getpid()] * 8
    assert set(seen) == {threading.current_thread()}
    seen.clear()
    pool.each(work, range(8), pool.WORTH)
    assert threading.current_thread() not in seen
    assert not any(thread.is_alive() for thread in seen)
    seen.clear()
    monkeypatch.setattr(pool.torch, "get_num_threads", lambda: 1)  # as in a worker process
    pool.each(work, range(8), 100 * pool.WORTH)
    assert set(seen) == {threading.current_thread()}


def test_a_damaged_plane_is_refused_in_a_thread_too(monkeypatch):
    floats, before, _ = large()
    monkeypatch.setattr(pool.torch, "get_num_threads", lambda: 2)
    blob = encode(floats, Dense("lossless"), reference=before)
    at = blob.rindex(b"\x28\xb5\x2f\xfd")  # the last frame
    damaged = blob[24 : at + 12] + bytes(30) + blob[at + 42 :]
    assert code(decode, sealed(blob, damaged), floats, reference=before) == "E347"


# Bytes from anywhere.

MODEL, BEFORE = trained(size=400)
WHOLE = {name: (x * 1e3).long() for name, x in MODEL.items()}
BITS = {name: x > 0.5 for name, x in MODEL.items()}
SENT = [
    (Dense("lossless"), MODEL),
    (TopK(0.5, values="lossless"), MODEL),
    (Dense("int4"), MODEL),
    (TopK(0.2, values="int4"), MODEL),
    (Dense("ring:13"), WHOLE),
    (RandomK(0.3, "ring:8"), WHOLE),
    (Mask(), BITS),
]


@given(st.sampled_from(SENT), st.booleans(), st.data())
@settings(max_examples=50, deadline=None)
def test_damaged_sections_decode_to_the_schema_or_are_refused(sent, masked, data):
    codec, tree = sent
    known = {"mask": masks(MODEL)} if masked else {}
    if tree is MODEL:
        known["reference"] = BEFORE
    blob = bytearray(encode(tree, codec, **known))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.sampled_from([4, 5, 6]), st.integers(24, len(blob) - 1)))
        blob[at] ^= 1 << data.draw(st.integers(0, 7))
    body = bytes(blob[24 : data.draw(st.one_of(st.just(len(blob)), st.integers(24, len(blob))))])
    decoded, refusal = {}, "E34"
    try:
        decoded = decode(sealed(bytes(blob), body), tree, **known)
    except WireError as error:
        refusal = error.code
    assert refusal.startswith("E34")
    assert all((x.shape, x.dtype) == (tree[name].shape, tree[name].dtype) for name, x in decoded.items())
