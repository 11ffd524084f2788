"""Bytes from anywhere: a tree of the receiver's own schema, or a WireError, and nothing else."""

import time
import tracemalloc

import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.wire import Context, Dense, RandomK, Spec, TopK, WireError, decode, encode, schema_of
from lamina.wire.container import schema_id, uv
from lamina.wire.values import VALUES

TREE = {
    "w": torch.randn(20, 30, generator=torch.Generator().manual_seed(0)),
    "b": torch.randn(20, generator=torch.Generator().manual_seed(1)),
    "s": torch.tensor(1.0),
}
MASK = {"w": torch.rand(20, 30, generator=torch.Generator().manual_seed(2)) < 0.5}
SCHEMA = schema_of(TREE)
CODECS = [
    make(values) for values in VALUES for make in (Dense, lambda v: TopK(0.1, values=v), lambda v: RandomK(0.1, v))
]
CODECS += [TopK(0.5), TopK(0.01)]


def sealed(front: bytes, body: bytes) -> bytes:
    """A blob with a checksum that holds."""
    digest = xxhash.xxh3_64_intdigest(body, seed=xxhash.xxh3_64_intdigest(front[:16]))
    return front[:16] + digest.to_bytes(8, "little") + body


def blob_of(index: int, values: int, body: bytes, flags: int = 0, schema=SCHEMA) -> bytes:
    return sealed(b"FLC\x01" + bytes([index, values, flags, 0]) + schema_id(schema), body)


def code(blob, like=SCHEMA, **known) -> str:
    with pytest.raises(WireError) as caught:
        decode(blob, like, **known)
    return caught.value.code


def survives(blob, schema=SCHEMA, **known) -> None:
    """Decodes to tensors of the schema, or is refused."""
    decoded, refusal = {}, "E34"
    try:
        decoded = decode(blob, schema, **known)
    except WireError as error:
        refusal = error.code
    assert refusal.startswith("E34")
    for name, x in decoded.items():
        assert (tuple(x.shape), x.dtype) == tuple(schema[name])


ONES = {"x": torch.ones(100)}
HUNDRED = schema_of(ONES)


def of_hundred(index: int, values: int, body: bytes, flags: int = 0) -> str:
    return code(blob_of(index, values, body, flags, HUNDRED), HUNDRED)


def gaps(raw: bytes, k: int, values: bytes = b"") -> bytes:
    frame = zstandard.compress(raw, 1)
    return uv(k) + uv(len(frame)) + frame + values


def test_the_envelope_is_checked_first():
    blob = encode(TREE, Dense())
    assert code(b"") == code(blob[:23]) == "E340"
    assert code(blob, max_bytes=len(blob) - 1) == "E340"
    assert code(None) == code("text") == "E340"
    assert code(b"PNG" + blob[3:]) == "E341"
    assert code(blob[:3] + b"\x02" + blob[4:]) == "E341"
    assert code(blob[:7] + b"\x01" + blob[8:]) == "E341"
    assert code(blob, {"other": torch.zeros(621)}) == "E342"
    assert code(blob, {name: x.double() for name, x in TREE.items()}) == "E342"
    assert code(blob, dict(reversed(TREE.items()))) == "E342"
    assert code(blob[:-1] + bytes([blob[-1] ^ 1])) == "E343"
    assert code(blob[:16] + bytes(8) + blob[24:]) == "E343"
    assert code(blob + b"\x00") == "E343"
    decode(bytearray(blob), TREE, max_bytes=len(blob))
    decode(memoryview(blob), TREE)


def test_ids_and_flags_of_later_versions_are_refused():
    for index in set(range(256)) - {0, 1, 2, 3, 4, 5, 6, 8, 10}:
        assert of_hundred(index, 0, bytes(400)) == "E344"
    for values in set(range(256)) - {0, 1, 3, 4, 5, 6, 7, 8, 9, 128}:
        assert of_hundred(0, values, bytes(400)) == "E344"
    for flag in (1, 32, 64, 128):
        assert of_hundred(0, 0, bytes(400), flag) == "E344"
    assert of_hundred(0, 0, bytes(408), flags=16) == "E344"  # MASKED is for sparse indices


def test_a_codec_accepts_what_it_could_have_sent():
    context = Context(SCHEMA)
    for blob in (encode(TREE, TopK(0.1)), encode(TREE, Dense("fp16"))):
        with pytest.raises(WireError) as caught:
            Dense("fp32").decode(blob, context)
        assert caught.value.code == "E344"


def test_sections_are_exact():
    assert of_hundred(0, 0, bytes(399)) == "E340"
    assert of_hundred(0, 0, bytes(401)) == "E340"
    assert of_hundred(0, 7, b"\x00") == "E340"
    assert of_hundred(0, 5, bytes(8 + 1 + 99)) == "E340"
    assert of_hundred(0, 6, bytes(4) + bytes(12) + b"\x10") == "E345"  # 100 bits: the last byte has 4
    assert of_hundred(0, 0, b"\x02" + bytes(400), flags=2) == "E345"  # one tensor: one bit
    assert of_hundred(0, 0, b"", flags=2) == "E340"


def test_bitmaps_are_counted():
    assert of_hundred(2, 7, uv(101) + bytes(13)) == "E345"
    assert of_hundred(2, 7, uv(1) + bytes(13)) == "E345"
    assert of_hundred(2, 7, uv(0) + bytes(12) + b"\x80") == "E345"
    assert of_hundred(2, 7, uv(1) + b"\x01" + bytes(11)) == "E340"


def test_numbers_are_minimal_and_short():
    assert of_hundred(5, 7, b"\x80\x00") == "E345"
    assert of_hundred(5, 7, b"\xff" * 9 + b"\x01") == "E345"
    assert of_hundred(5, 7, b"\x81") == "E340"
    assert of_hundred(8, 7, uv(1 << 62)) == "E345"


def test_gaps_stay_inside():
    assert of_hundred(5, 7, gaps(b"\x63\x00", 2)) == "E345"  # 99, then 100
    assert of_hundred(5, 7, gaps(b"\xe4\x00", 1)) == "E345"  # 100 in two bytes that could be one: not minimal
    assert of_hundred(5, 7, gaps(b"\xff\xff\xff\xff\x7f" * 3, 3)) == "E345"
    assert of_hundred(5, 7, gaps(b"\x80" * 5, 1)) == "E345"
    assert of_hundred(5, 7, gaps(b"\x80\x80\x80\x80\x80\x01", 2)) == "E345"
    assert of_hundred(5, 7, gaps(b"\x00\x00\x80", 2)) == "E345"
    assert of_hundred(5, 7, gaps(b"\x00\x00\x00", 2)) == "E345"
    assert of_hundred(5, 7, gaps(b"\x00", 1, b"!")) == "E340"
    decoded = decode(blob_of(5, 7, gaps(b"\x63", 1), schema=HUNDRED), HUNDRED)
    assert decoded["x"].nonzero().tolist() == [[99]]


def test_compressed_frames_are_bounded_before_they_are_opened():
    bomb = zstandard.compress(bytes(1 << 28), 1)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(b"\x00")
    skippable = b"\x50\x2a\x4d\x18\x01\x00\x00\x00!"
    two = zstandard.compress(b"\x00") * 2
    started = time.perf_counter()
    tracemalloc.start()
    for frame in (
        bomb,
        unsized,
        skippable,
        two,
        b"",
        b"\x28\xb5\x2f\xfd",
        zstandard.compress(b"\x00")[:-1],
        b"no frame",
    ):
        assert of_hundred(5, 7, uv(1) + uv(len(frame)) + frame) == "E347"
    for frame in (bomb, zstandard.compress(bytes(99)), zstandard.compress(bytes(101)), unsized, skippable):
        assert of_hundred(0, 3, uv(len(frame)) + frame + uv(0) + bytes(100)) == "E347"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert time.perf_counter() - started < 5


def test_planes_may_come_compressed():
    """A later encoder may compress what this one writes raw."""
    low, high = zstandard.compress(bytes(100)), zstandard.compress(b"\x3c" * 100)
    blob = blob_of(0, 3, uv(len(low)) + low + uv(len(high)) + high, schema=HUNDRED)
    assert torch.equal(decode(blob, HUNDRED)["x"], torch.ones(100))


def test_masks_must_agree():
    for codec in (Dense(), TopK(0.1), RandomK(0.1)):
        blob = encode(TREE, codec, mask=MASK)
        other = {"w": ~MASK["w"]}
        assert (
            code(blob) == code(blob, mask=other) == code(blob, mask={"b": torch.ones(20, dtype=torch.bool)}) == "E346"
        )
        assert decode(blob, TREE, mask=MASK).keys() == TREE.keys()
    assert torch.equal(decode(encode(TREE, Dense()), TREE, mask=MASK)["w"], TREE["w"])  # sent without: nothing is cut


def test_values_fit_the_dtypes_of_the_schema():
    integers = schema_of({"x": torch.arange(100)})
    for values in (0, 1, 3, 4, 5, 6, 9):
        assert code(blob_of(0, values, bytes(400), schema=integers), integers) == "E344"


def test_any_seed_may_come():
    for seed in (0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        for k in (0, 1, 50, 99, 100):
            blob = blob_of(8, 7, uv(k) + seed.to_bytes(8, "little"), schema=HUNDRED)
            assert decode(blob, HUNDRED)["x"].sum() == k


def test_every_truncation_is_refused():
    for codec in CODECS:
        for known in ({}, {"mask": MASK}):
            blob = encode(TREE, codec, **known)
            for end in {*range(0, min(len(blob), 80)), *range(0, len(blob), max(1, len(blob) // 40))}:
                assert code(blob[:end], **known) in ("E340", "E343")
                if end >= 24:
                    assert code(sealed(blob, blob[24:end]), **known)[:3] == "E34"


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_refused(junk, magic):
    assert code(b"FLC\x01" * magic + junk).startswith("E34")


@given(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 10]), st.sampled_from([0, 1, 3, 4, 5, 6, 7, 8, 9, 128]), st.data())
@settings(max_examples=300, deadline=None)
def test_random_sections_decode_or_are_refused(index, values, data):
    flags = data.draw(st.sampled_from([0, 0, 1, 2, 8, 10, 16, 18, 19, 26]))
    schema = schema_of({"x": torch.zeros(3, 4), "y": torch.zeros(0), "z": torch.zeros(())})
    body = b"".join(
        data.draw(
            st.lists(
                st.one_of(
                    st.binary(max_size=60),
                    st.integers(0, 20).map(uv),
                    st.binary(max_size=30).map(lambda raw: uv(len(zstandard.compress(raw))) + zstandard.compress(raw)),
                ),
                max_size=8,
            )
        )
    )
    survives(blob_of(index, values, body, flags, schema), schema)


@given(st.sampled_from(CODECS), st.booleans(), st.data())
@settings(max_examples=300, deadline=None)
def test_flipped_bits_under_a_good_checksum_decode_or_are_refused(codec, masked, data):
    known = {"mask": MASK} if masked else {}
    blob = bytearray(encode(TREE, codec, **known))
    for _ in range(data.draw(st.integers(1, 4))):
        # mostly near the front of the body, where the structure is
        at = data.draw(
            st.one_of(
                st.sampled_from([4, 5, 6]), st.integers(24, min(60, len(blob) - 1)), st.integers(24, len(blob) - 1)
            )
        )
        blob[at] ^= 1 << data.draw(st.integers(0, 7))
    survives(sealed(bytes(blob), bytes(blob[24:])), **known)
    raw = bytearray(encode(TREE, codec, **known))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    assert code(bytes(raw), **known) in ("E341", "E342", "E343", *["E344"] * (at == 6))  # a flag there is not


@given(st.sampled_from(CODECS), st.data())
@settings(max_examples=100, deadline=None)
def test_pieces_cut_out_or_put_in_decode_or_are_refused(codec, data):
    body = encode(TREE, codec)[24:]
    start = data.draw(st.integers(0, len(body)))
    stop = data.draw(st.integers(start, min(len(body), start + 20)))
    mutated = body[:start] + data.draw(st.binary(max_size=20)) + body[stop:]
    survives(sealed(encode(TREE, codec), mutated))


WIDE = {"x": Spec((400, 500), torch.float32)}
ALL = 400 * 500
LOUD = zstandard.compress(b"\x80\x80\x80\x80" * ALL)  # 5 bytes to a gap, the last of them missing
FEW_BYTES = [
    (3, uv(ALL)),
    (3, uv(ALL - 1) + b"\x01" + bytes(3)),
    (4, uv(ALL) + b"\x00" + uv(ALL)),
    (5, gaps(bytes(ALL), ALL)),
    (5, uv(ALL) + uv(len(LOUD)) + LOUD),
    (6, gaps(b"\xff" * (ALL // 8), ALL)),
    (8, uv(ALL // 2) + bytes(8)),
    (10, uv(ALL)),
    (8, uv(ALL) + bytes(8)),
]


@pytest.mark.parametrize(("index", "section"), FEW_BYTES)
def test_few_bytes_that_say_all_travel_allocate_what_the_schema_implies(index, section):
    """The values are missing; until that shows, there are the positions and what they are read with."""
    blob = blob_of(index, 0, section, schema=WIDE)
    assert len(blob) < 500
    tracemalloc.start()
    refusal = code(blob, WIDE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refusal in ("E340", "E345")
    assert peak <= 64 * ALL
