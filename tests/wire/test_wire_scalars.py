"""Numbers beside a tree: every bit of them arrives, they are counted, and they change nothing else."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
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
    read,
    schema_of,
    transmit,
)
from lamina.wire.codec import Codec

TREE = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(-1.0)}
SCHEMA = schema_of(TREE)
MASK = {"w": torch.arange(12).reshape(3, 4) % 2 == 0}
CODECS = [Dense(), Dense("lossless"), Dense("int8"), TopK(0.5), TopK(0.5, values="sign"), RandomK(0.5)]


def bits(x: float) -> int:
    return int.from_bytes(struct.pack("<d", x), "little")


def of_bits(word: int) -> float:
    (x,) = struct.unpack("<d", word.to_bytes(8, "little"))
    return float(x)


def test_numbers_come_back_by_ascending_key():
    found = read(encode(TREE, Dense(), scalars={200: 2.5, 3: 128, 0: -0.0}), TREE)
    assert list(found.scalars.items()) == [(0, 0.0), (3, 128.0), (200, 2.5)]
    assert math.copysign(1, found.scalars[0]) == -1
    assert isinstance(found.scalars[3], float)
    assert torch.equal(found.tree["w"], TREE["w"])


@given(st.dictionaries(st.integers(0, 255), st.integers(0, 2**64 - 1), max_size=64), st.sampled_from(CODECS))
@settings(max_examples=100, deadline=None)
def test_every_bit_of_a_number_arrives(words, codec):
    """NaN with their payloads, signalling ones too."""
    sent = {key: of_bits(word) for key, word in words.items()}
    for known in ({}, {"mask": MASK}, {"key": bytes(16)}):
        found = read(encode(TREE, codec, scalars=sent, **known), TREE, **known).scalars
        assert {key: bits(x) for key, x in found.items()} == words


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_pair_takes_nine_bytes_and_is_shared(codec):
    """The length takes one byte up to 14 pairs (126 bytes), two beyond."""
    plain, alone = encode(TREE, codec), transmit(TREE, codec)[1]
    for count, length in ((1, 1), (14, 1), (15, 2), (64, 2)):
        numbers = dict.fromkeys(range(count), 0.5)
        blob, size = encode(TREE, codec, scalars=numbers), transmit(TREE, codec, scalars=numbers)[1]
        assert len(blob) == len(plain) + length + 9 * count == size.total
        assert (size.rows, size.entries, size.shared) == (alone.rows, alone.entries, alone.shared + length + 9 * count)
        assert read(blob, TREE).size == layout(blob, Context(SCHEMA)) == size
        assert codec.size(TREE, Context(SCHEMA, scalars=numbers)) in (size, None)


def test_without_numbers_nothing_is_sent():
    assert encode(TREE, Dense(), scalars={}) == encode(TREE, Dense())
    assert read(encode(TREE, Dense()), TREE).scalars == {}


def test_decode_leaves_them_aside():
    for codec in CODECS:
        assert decode(encode(TREE, codec, scalars={1: 2.0}), TREE).keys() == TREE.keys()
        context = Context(SCHEMA, scalars={1: 2.0})
        assert codec.decode(codec.encode(TREE, context), context).keys() == TREE.keys()
    bools = {"w": MASK["w"]}
    assert read(encode(bools, Mask(), scalars={9: 9.0}), bools).scalars == {9: 9.0}


def test_what_is_given_beside_a_context_replaces_its_own():
    context = Context(SCHEMA, scalars={1: 1.0})
    assert read(encode(TREE, Dense(), context=context), TREE).scalars == {1: 1.0}
    assert read(encode(TREE, Dense(), context=context, scalars={2: 2.0}), TREE).scalars == {2: 2.0}
    assert read(encode(TREE, Dense(), context=context, scalars={}), TREE).scalars == {}


@pytest.mark.parametrize(
    ("scalars", "said"),
    [
        (dict.fromkeys(range(65), 0.0), "65 scalars: expected at most 64"),
        ({-1: 0.0}, "scalar -1: expected a whole number from 0 to 255"),
        ({256: 0.0}, "scalar 256: expected a whole number from 0 to 255"),
        ({"loss": 0.0}, "scalar 'loss': expected a whole number from 0 to 255"),
        ({True: 0.0}, "scalar True: expected"),
        ({1.0: 0.0}, "scalar 1.0: expected"),
        ({1: "2"}, "scalar 1='2': expected a float"),
        ({1: None}, "scalar 1=None: expected a float"),
        ({1: True}, "scalar 1=True: expected a float"),
        ({1: 2**53 + 1}, r"a whole number of at most 2\*\*53"),
        ({1: torch.tensor(1.0)}, "expected a float"),
    ],
)
def test_what_is_no_number_or_key_is_refused_when_it_is_given(scalars, said):
    with pytest.raises(ConfigError, match=said):
        Context({}, scalars=scalars)
    with pytest.raises(ConfigError, match=said):
        encode(TREE, Dense(), scalars=scalars)


def test_numbers_of_numpy_are_numbers():
    assert read(encode(TREE, Dense(), scalars={1: np.float64(0.1)}), TREE).scalars == {1: 0.1}


class Pickled(Codec):
    """A codec of someone else, who knows nothing of scalars."""

    lossless = True

    def encode(self, tree, context):
        return bytes(10)

    def decode(self, blob, context):
        return {}


def test_codecs_of_others_see_them_in_the_context():
    assert transmit(TREE, Pickled(), scalars={1: 1.0})[1].total == 10


def test_a_blob_with_numbers_is_refused_by_its_errors():
    blob = encode(TREE, Dense(), scalars={1: 1.0})
    with pytest.raises(WireError) as caught:
        read(blob[:-1], TREE)
    assert caught.value.code == "E343"
