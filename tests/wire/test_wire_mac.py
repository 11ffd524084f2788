"""Blobs under a key: what its holder did not write is refused before it is looked at, and the key is never told."""

from __future__ import annotations

import hashlib
import hmac
import traceback

import forced
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import ConfigError, WireError
from lamina.wire import Context, Dense, RandomK, TopK, container, decode, encode, layout, read, schema_of, transmit

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
TREE = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(-1.0)}
MASK = {"w": torch.arange(12).reshape(3, 4) % 2 == 0}
CODECS = [Dense(), Dense("lossless"), Dense("int4"), TopK(0.5), TopK(0.5, values="bf16"), RandomK(0.5)]
SEALED = encode(TREE, Dense(), key=KEY, scalars={1: 0.5})


def code(blob: bytes, key: bytes | None = KEY) -> str:
    with pytest.raises(WireError) as caught:
        decode(blob, TREE, key=key)
    return caught.value.code


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("key", [bytes(16), KEY, bytes(range(64))], ids=len)
def test_a_key_brings_back_the_same_tree_for_sixteen_bytes_more(codec, key):
    for known in ({}, {"mask": MASK}):
        plain, blob = encode(TREE, codec, **known), encode(TREE, codec, key=key, **known)
        assert blob[6] == plain[6] | 4
        assert (blob[24:-16], len(blob)) == (plain[24:], len(plain) + 16)
        assert blob[-16:] == hashlib.blake2b(blob[:-16], key=key, digest_size=16).digest()
        one, two = decode(blob, TREE, key=key, **known), decode(plain, TREE, **known)
        assert all(torch.equal(one[name], x) for name, x in two.items())
        size, alone = transmit(TREE, codec, key=key, **known)[1], transmit(TREE, codec, **known)[1]
        assert (size.rows, size.shared, size.total) == (alone.rows, alone.shared + 16, len(blob))
        context = Context(schema_of(TREE), known.get("mask"), key=key)
        assert layout(blob, context) == read(blob, TREE, key=key, **known).size == size
        assert codec.size(TREE, context) in (size, None)
        assert codec.decode(codec.encode(TREE, context), context).keys() == TREE.keys()


def test_both_ends_need_the_same_key():
    plain = encode(TREE, Dense())
    assert code(SEALED, OTHER) == code(SEALED, None) == code(plain) == "E349"
    assert code(SEALED, KEY[:16]) == code(SEALED, KEY + bytes(1)) == "E349"
    for use in (lambda c: Dense().decode(SEALED, c), lambda c: layout(SEALED, c)):
        for key in (None, OTHER):
            with pytest.raises(WireError) as caught:
                use(Context(schema_of(TREE), key=key))
            assert caught.value.code == "E349"


def test_a_refusal_says_what_to_do():
    for blob, key, remedy in (
        (SEALED, None, "give the receiver the sender's key"),
        (encode(TREE, Dense()), KEY, "the sender is to encode with the same key"),
        (SEALED, OTHER, "another key, or changed on the way"),
    ):
        with pytest.raises(WireError, match="MAC") as caught:
            decode(blob, TREE, key=key)
        assert remedy in str(caught.value)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_bit_can_be_changed_even_by_who_seals_it_again(data):
    """Version, schema id and unknown flags are looked at before the MAC."""
    raw = bytearray(SEALED)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(4, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    mended = forced.resealed(bytes(raw[:-16])) + bytes(raw[-16:])
    for blob in {bytes(raw), mended} - {SEALED}:
        assert code(blob) in ("E349", "E341", "E342", "E344")
        if blob[:4] + blob[6:16] == SEALED[:4] + SEALED[6:16]:
            assert code(blob) == "E349"


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_nothing_can_be_cut_out_put_in_or_moved(data):
    body, mac = SEALED[:-16], SEALED[-16:]
    start = data.draw(st.integers(24, len(SEALED)))
    stop = data.draw(st.integers(start, len(SEALED)))
    other = SEALED[:start] + data.draw(st.binary(max_size=20)) + SEALED[stop:]
    moved = body[:start] + mac + body[start:]
    for blob in {other, moved, forced.resealed(other), forced.resealed(other + mac)} - {SEALED}:
        assert code(blob) in ("E349", "E340")
        assert len(blob) < 40 or code(blob) == "E349"


@given(st.binary(min_size=16, max_size=64), st.binary(min_size=16, max_size=64))
@settings(max_examples=50, deadline=None)
def test_any_two_keys_differ(one, two):
    blob = encode(TREE, TopK(0.5), key=one)
    if one == two:
        assert decode(blob, TREE, key=two).keys() == TREE.keys()
    else:
        assert code(blob, two) == "E349"


def test_the_mac_can_be_stripped_only_for_a_receiver_without_a_key():
    stripped = forced.resealed(SEALED[:6] + bytes([SEALED[6] & ~4]) + SEALED[7:-16])
    assert decode(stripped, TREE).keys() == TREE.keys()
    assert code(stripped) == "E349"


def test_a_blob_can_be_sent_twice():
    """What a MAC does not find; a number in the scalars that the receiver expects does."""
    assert read(SEALED, TREE, key=KEY).scalars == read(SEALED, TREE, key=KEY).scalars == {1: 0.5}


def test_the_mac_comes_before_any_section(monkeypatch):
    seen = []
    monkeypatch.setattr(container, "checksum", lambda *args: seen.append("checksum"))
    monkeypatch.setattr(container, "read_subset", lambda *args: seen.append("subset"))
    assert code(SEALED, OTHER) == "E349"
    assert seen == []


def test_macs_are_compared_in_constant_time(monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((bytes(a), bytes(b))) or real(a, b))
    decode(SEALED, TREE, key=KEY)
    assert compared == [(SEALED[-16:], SEALED[-16:])]


def test_what_is_under_a_good_mac_is_checked_like_anything_else():
    def signed(blob: bytes) -> bytes:
        return forced.resealed(blob + bytes(16), KEY)

    body = SEALED[:-16]
    assert code(signed(body[:-1])) == code(signed(body + b"\0")) == "E340"
    assert code(signed(body[:4] + b"\x07" + body[5:])) == "E344"
    broken = body[:16] + bytes(8) + body[24:]
    assert code(broken + hashlib.blake2b(broken, key=KEY, digest_size=16).digest()) == "E343"


def test_an_accident_is_told_from_a_missing_key():
    broken = SEALED[:40] + bytes([SEALED[40] ^ 1]) + SEALED[41:]
    assert code(broken, None) == "E343"


@pytest.mark.parametrize("key", [b"", bytes(15), bytes(65), "a passphrase of some length", bytearray(32), 7], ids=str)
def test_what_is_no_key_is_refused_when_it_is_given(key):
    for use in (
        lambda: Context({}, key=key),
        lambda: encode(TREE, Dense(), key=key),
        lambda: encode(TREE, Dense(), key=key, context=Context(schema_of(TREE), key=KEY)),
        lambda: decode(SEALED, TREE, key=key),
        lambda: read(SEALED, TREE, key=key),
    ):
        with pytest.raises(ConfigError, match="expected 16 to 64 bytes") as caught:
            use()
        assert "passphrase" not in str(caught.value)


def test_the_secret_is_never_told():
    secret = b"do-not-tell-me-to-anyone-at-all!"
    context = Context(schema_of(TREE), key=secret)
    texts = [repr(context), str(context)]
    blob = encode(TREE, Dense(), key=secret)
    for attempt in (
        lambda: Context({}, key=secret * 3),
        lambda: Context({}, key=secret[:15]),
        lambda: Context({}, key=secret.decode()),
        lambda: decode(encode(TREE, Dense()), TREE, key=secret),
        lambda: decode(blob[:-1] + bytes([blob[-1] ^ 1]), TREE, key=secret),
        lambda: decode(encode(TREE, Dense(), key=OTHER), TREE, key=secret),
    ):
        with pytest.raises((ConfigError, WireError)) as caught:
            attempt()
        texts += ["".join(traceback.format_exception(caught.value)), repr(vars(caught.value))]
    right = hashlib.blake2b(encode(TREE, Dense(), key=OTHER)[:-16], key=secret, digest_size=16).hexdigest()
    for text in texts:
        assert "do-not-tell" not in text
        assert secret.hex() not in text
        assert right not in text
