"""Frames: named numbers and sections."""

import contextlib
import math
import struct

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import ConfigError
from lamina.wire import WireError
from lamina.wire.frame import KINDS, Frame, overhead, pack, unpack

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
frames = st.builds(
    Frame,
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.dictionaries(names, st.floats(allow_nan=False), max_size=5),
    st.dictionaries(names, st.binary(max_size=300), max_size=5),
)


def code(blob, **options) -> str:
    with pytest.raises(WireError) as caught:
        unpack(blob, **options)
    return caught.value.code


def framed(head: bytes, rest: bytes = b"", front: bytes = b"LMF\x01") -> bytes:
    """A frame with this head and a checksum that holds."""
    front += struct.pack("<I", len(head))
    return (
        front + xxhash.xxh3_64_intdigest(head, seed=xxhash.xxh3_64_intdigest(front)).to_bytes(8, "little") + head + rest
    )


@given(frames)
@settings(max_examples=60, deadline=None)
def test_a_frame_survives_and_its_overhead_is_known(frame):
    blob = pack(frame)
    assert unpack(blob, max_bytes=len(blob)) == frame
    assert list(unpack(blob).sections) == list(frame.sections)
    sizes = {name: len(section) for name, section in frame.sections.items()}
    assert overhead(frame.kind, frame.scalars, sizes) == len(blob) - sum(sizes.values())


def test_overhead_depends_on_names_and_lengths_only():
    assert overhead("plan", {}, {}) == 16 + 9 + 2
    assert overhead("message", {"n": 1.0}, {"update": 100}) == 27 + (1 + 1 + 8) + (1 + 6 + 1)
    assert overhead("message", {"n": 1.0}, {"update": 128}) == overhead("message", {"n": 2.0}, {"update": 127}) + 1
    big = {f"t{i}": i * 1000 for i in range(200)}
    frame = Frame("state", 2**32 - 1, 0, {}, {name: bytes(size) for name, size in big.items()})
    assert len(pack(frame)) - sum(big.values()) == overhead("state", {}, big)


def test_numbers_keep_their_bits():
    sent = {"nan": math.nan, "inf": -math.inf, "zero": -0.0, "tiny": 5e-324}
    received = unpack(pack(Frame("plan", 0, 0, sent, {}))).scalars
    assert [struct.pack("<d", x) for x in received.values()] == [struct.pack("<d", x) for x in sent.values()]


def test_impossible_frames_are_refused_by_the_sender():
    for frame in (
        Frame("letter", 0, 0, {}, {}),
        Frame("plan", -1, 0, {}, {}),
        Frame("plan", 0, 1 << 32, {}, {}),
        Frame("plan", 0, 0, {"": 1.0}, {}),
        Frame("plan", 0, 0, {}, {"x" * 1025: b""}),
    ):
        with pytest.raises(ConfigError):
            pack(frame)


def test_damaged_frames_are_refused():
    blob = pack(Frame("message", 1, 2, {"n": 3.0}, {"update": b"abc"}))
    fixed = bytes(9)
    assert {code(blob[:end]) for end in range(len(blob))} == {"E340"}
    assert code(blob + b"!") == code(blob, max_bytes=len(blob) - 1) == code(None) == "E340"
    assert code(b"FLC" + blob[3:]) == code(blob[:3] + b"\x02" + blob[4:]) == "E341"
    assert code(blob[:20] + b"\xff" + blob[21:]) == "E343"
    assert code(framed(b"\x03" + bytes(10))) == "E344"  # a kind of a later version
    assert code(framed(fixed + b"\x00\x00\x00")) == "E340"  # a byte too many in the head
    assert code(framed(fixed + b"\x7f\x00")) == "E345"  # more scalars than bytes
    assert code(framed(fixed + b"\x00\x01\x00\x00")) == "E345"  # an empty name
    assert code(framed(fixed + b"\x00\x01\x01\xff\x00")) == "E345"  # a name that is not UTF-8
    assert code(framed(fixed + b"\x00\x02\x01a\x00\x01a\x00")) == "E345"  # a name twice
    assert code(framed(fixed + b"\x00\x01\x01a\x05", b"1234")) == "E340"
    assert (
        code(framed(fixed + b"\x00\x01\x01a" + b"\xff" * 8 + b"\x7f")) == "E340"
    )  # 2**63 - 1 bytes, allocated by nobody
    assert unpack(framed(fixed + b"\x00\x01\x01a\x04", b"1234")).sections == {"a": b"1234"}


@given(st.binary(max_size=60), st.binary(max_size=20))
@settings(max_examples=200, deadline=None)
def test_random_heads_are_unpacked_or_refused(head, rest):
    for blob in (head, b"LMF\x01" + head, framed(head, rest), framed(b"\x01" + bytes(8) + head, rest)):
        with contextlib.suppress(WireError):
            assert unpack(blob).kind in KINDS
