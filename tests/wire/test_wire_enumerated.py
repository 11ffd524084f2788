"""Index id 10, positions by number: worked examples, round trips over several blocks, sizes, the choice, and refusals.

One block by hand, n = 24 and positions 1 4 5 9 20: C(1, 1) + C(4, 2) + C(5, 3) + C(9, 4) + C(20, 5) = 1 + 6 + 10 +
126 + 15504 = 15647 = 3d1f, in 16 bits, since C(24, 5) = 42504 is above 2^15. Section: k, 1f 3d.

Two blocks by hand, n = 1030 and positions 3, 1027: blocks of 1024 and 6 entries, 2 * 1024 div 1030 = 1 expected in the
first and 1 found, difference 0: no low bits, 00, and unary 1 = 01. Ranks C(3, 1) = 3 of 1024 in 10 bits and C(3, 1) = 3
of 6 in 3 bits: 3 + (3 << 10) = 0c03. Section: k, 00, 01, 03 0c.
"""

import itertools
import math
import tracemalloc

import forced
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import ConfigError, WireError
from lamina.wire import Context, Mask, Spec, TopK, decode, encode, enumerated, index, layout, transmit
from lamina.wire.container import Reader, uv
from lamina.wire.enumerated import BLOCK, LONGEST, rank, unrank, width
from lamina.wire.index import BITMAP, ENUMERATED, FLAT, Extent, choose, log2_choose


def one(n) -> Extent:
    return Extent([n], lambda i: np.full(min(n, 1), n))


def written(positions, n) -> bytes:
    return index.enumerate_sets(np.asarray(positions, np.int64), n).write()


def read(section, n) -> list[int]:
    reader = Reader(memoryview(bytes(section)))
    found = index.read(ENUMERATED, reader, one(n)).positions
    reader.end()
    assert found.dtype == np.int64
    return found.tolist()


def slow(section, n) -> list[int]:
    reader = reference.Reader(bytes(section))
    positions = reference.read_index(reader, ENUMERATED, [[n]])
    reference.refuse(reader.left > 0, "E340")
    return positions


def check(positions, n):
    """Both decoders give the positions back, and the section is as long as was said."""
    positions = np.asarray(positions, np.int64)
    section = written(positions, n)
    assert len(section) == index.enumerate_sets(positions, n).size
    assert read(section, n) == slow(section, n) == positions.tolist()


def at_random(rng, n, k) -> np.ndarray:
    return np.sort(rng.choice(n, k, replace=False)) if n else np.empty(0, np.int64)


def test_the_worked_examples():
    for positions, n, section in (
        ([1, 4, 5, 9, 20], 24, "05 1f 3d"),
        ([3, 1027], 1030, "02 00 01 03 0c"),
        ([], 24, "00"),
        (range(24), 24, "18"),
        ([], 0, "00"),
    ):
        assert written(positions, n).hex(" ") == section
        assert read(bytes.fromhex(section), n) == slow(bytes.fromhex(section), n) == list(positions)


@pytest.mark.parametrize("length", range(1, 10))
def test_every_set_has_a_rank_of_its_own_below_their_number(length):
    for count in range(length + 1):
        sets = sorted(itertools.combinations(range(length), count), key=lambda s: s[::-1])
        assert [rank(list(s), length) for s in sets] == list(range(math.comb(length, count)))
        assert [tuple(unrank(i, length, count)) for i in range(len(sets))] == sets


def test_a_rank_takes_no_more_bits_than_its_number_of_sets_needs():
    for length in (1, 2, 152, BLOCK):
        for count in {0, 1, length // 3, length // 2, length - 1, length}:
            assert 2 ** width(length, count) >= math.comb(length, count) > 2 ** (width(length, count) - 1)
            most = [*range(length - count, length)]
            assert rank(most, length) == math.comb(length, count) - 1
            assert unrank(math.comb(length, count) - 1, length, count) == most


@pytest.mark.parametrize("n", [1, 2, 7, 1023, 1024, 1025, 1030, 2048, 2049, 5000])
def test_none_one_all_and_all_but_one(n):
    for positions in ([], [0], [n - 1], range(n), range(n - 1), range(1, n)):
        check(positions, n)


@given(st.integers(0, 2600), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_any_positions_come_back(n, share, uneven, seed):
    """Of blocks alike, and of blocks of which some are full and others empty."""
    rng = np.random.default_rng(seed)
    scores = rng.random(n) * (1 - uneven) + uneven * (np.arange(n) * 7919 // BLOCK % 5 / 5)
    check(np.flatnonzero(scores < share), n)


def test_the_most_entries_there_may_be():
    rng = np.random.default_rng(0)
    for k in (0, 1, 700, LONGEST // 2, LONGEST - 1, LONGEST):
        positions = at_random(rng, LONGEST, k)
        section = written(positions, LONGEST)
        assert len(section) == index.enumerate_sets(positions, LONGEST).size
        assert read(section, LONGEST) == positions.tolist()


def test_more_entries_than_that_are_refused_at_both_ends():
    with pytest.raises(ConfigError, match="65536"):
        index.enumerate_sets(np.array([0]), LONGEST + 1)
    assert refused(b"\x00" + bytes(20), LONGEST + 1) == "E345"
    positions = at_random(np.random.default_rng(0), LONGEST + 1, LONGEST * 2 // 5)
    assert choose(positions, one(LONGEST + 1)).id != ENUMERATED
    assert choose(positions[positions < LONGEST], one(LONGEST)).id == ENUMERATED


@given(st.booleans(), st.booleans(), st.booleans(), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_blocks_range_over_kept_entries_of_the_tensors_present(masked, part, keyed, share, seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (30, 40), "b": (7,), "c": (1100,), "d": ()}
    tree = {name: torch.from_numpy(rng.standard_normal(shape)).float() for name, shape in shapes.items()}
    kept = {"a": torch.from_numpy(rng.random((30, 40)) < 0.7), "b": torch.zeros(7, dtype=torch.bool)}
    schema = {name: Spec(shape, torch.float32) for name, shape in shapes.items()}
    context = Context(schema, kept if masked else None, key=bytes(16) if keyed else None)
    sent = {name: tree[name] for name in (("a", "c") if part else tree)}
    n = forced.Support(context, sent).total
    blob, expected = forced.force(sent, context, ENUMERATED, "fp32", np.flatnonzero(rng.random(n) < share))
    assert (blob[4], blob[6]) == (ENUMERATED, 2 * part | 4 * keyed | 16 * masked)
    received = {name: forced.memory(x) for name, x in expected.items()}
    assert forced.fast(blob, context) == forced.slow(blob, context) == received
    size = layout(blob, context)
    assert size.total == len(blob)
    assert min([size.shared, *size.rows.values()]) >= 0


def test_bytes_are_divided_by_entries_that_travel():
    assert index.split(ENUMERATED, 12, (), [3, 1], [8, 3]) == [9, 3]


# The choice.


@pytest.mark.parametrize("k", [1000, 2000, 5000, 10_000])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.15, 0.2, 0.23, 0.25, 0.3, 0.34, 0.38, 0.4, 0.42, 0.46, 0.5])
def test_positions_at_random_cost_two_percent_more_than_their_entropy(k, share):
    """With nothing but the ids below 10 it is 1.053 at k = 1000 and k/n = 0.38."""
    n = round(k / share)
    for seed in (0, 1):
        positions = at_random(np.random.default_rng(seed), n, k)
        for some, travel in ((positions, k), (np.setdiff1d(np.arange(n), positions), n - k)):
            chosen = choose(some, one(n))
            assert 1 <= 8 * chosen.size / log2_choose(n, travel) <= 1.02


def test_it_is_sent_if_it_saves_half_a_percent_of_what_is_quick():
    """n = 1000 and every third position: C(1000, 334) in 915 bits, 115 bytes, against 2 + 125 of the bitmap."""
    rng = np.random.default_rng(0)
    positions = at_random(rng, 1000, 334)
    known = {c.id: c.size for c in index.candidates(positions, one(1000))}
    assert known[BITMAP] == 127
    chosen = choose(positions, one(1000))
    assert (chosen.id, chosen.size) == (ENUMERATED, 117)
    assert index.worth_enumerating(199, 200)
    assert not index.worth_enumerating(200, 200)
    assert not index.worth_enumerating(1000, 1004)
    half = at_random(rng, 40_000, 20_000)  # 0.1 % above log2 C(n, k), and so is a bitmap
    assert choose(half, one(40_000)).id == BITMAP
    few = at_random(rng, 60_000, 600)
    assert index.enumerate_sets(few, 60_000).size > 0.995 * choose(few, one(60_000)).size
    assert choose(few, one(60_000)).id == FLAT


def test_ranks_are_computed_for_a_message_alone(monkeypatch):
    """transmit and the choice know the size without."""
    tree = {"x": torch.randn(3000, generator=torch.Generator().manual_seed(0))}
    mask = {"x": tree["x"] > 0.3}
    blobs = [encode(tree, TopK(0.38)), encode(mask, Mask())]
    assert [blob[4] for blob in blobs] == [ENUMERATED, ENUMERATED]
    assert torch.equal(decode(blobs[1], mask)["x"], mask["x"])

    def ranked(*args):
        raise AssertionError("a rank")

    monkeypatch.setattr(enumerated, "rank", ranked)
    assert transmit(tree, TopK(0.38))[1].total == len(blobs[0])
    assert transmit(mask, Mask())[1].total == len(blobs[1])


# Hostile sections: tests/wire/vectors has one of each kind.


def refused(section, n) -> str:
    with pytest.raises(WireError) as caught:
        read(section, n)
    return caught.value.code


def test_a_section_cut_off_anywhere_or_with_a_byte_behind_is_refused():
    rng = np.random.default_rng(0)
    for n, k in ((100, 30), (1030, 400), (5000, 1900), (2600, 100)):
        section = written(at_random(rng, n, k), n)
        for end in range(len(section)):
            assert refused(section[:end], n) in ("E340", "E345")
        assert refused(section + b"\x00", n) == "E340"


def test_counts_that_lie_allocate_nothing():
    tracemalloc.start()
    for k in (1, 1000, LONGEST // 2, LONGEST - 1):
        for tail in (b"", b"\x00" + bytes(1000), b"\x00" + b"\xff" * 1000, b"\x13" + b"\xff" * 1000):
            assert refused(uv(k) + tail, LONGEST) in ("E340", "E345")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def outcome(reader, section, n):
    try:
        return reader(section, n)
    except WireError as error:
        return error.code
    except reference.Refused as refusal:
        return refusal.code


@given(st.sampled_from([10, 100, 1024, 1030, 2100]), st.floats(0, 1), st.integers(0, 999), st.data())
@settings(max_examples=150, deadline=None)
def test_changed_sections_are_read_as_the_slow_decoder_reads_them_or_refused_alike(n, share, seed, data):
    rng = np.random.default_rng(seed)
    section = bytearray(written(np.flatnonzero(rng.random(n) < share), n))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, min(8, len(section) - 1)), st.integers(0, len(section) - 1)))
        section[at] ^= 1 << data.draw(st.integers(0, 7))
    section += data.draw(st.sampled_from([b"", b"", b"\x00"]))
    assert outcome(read, section, n) == outcome(slow, section, n)
