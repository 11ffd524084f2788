"""The index section: every coding gives the positions back, its size is known, and the smallest one is sent.

RR-flat by hand, n = 20 and positions 3 9 10: listed c = 3, divisor ((40 - 3) * 45426 + 3 * 65536) div (3 * 131072) =
1877370 div 393216 = 4, so width 2 and no long remainder (short = 8 - 4 = 4). Gaps 3 5 0: quotients 0 1 0 are the bits
1 01 1 = 0d; remainders 3 1 0 in two bits each are 11 10 00 = 07, lowest bit first. Section: k, 0d, 07.

RR-mixed by hand, a: 2 x 4 by row, b: 3 as a whole; positions 4 5 7 in a, 2 in b. Modes: 1 0 = 01. Counts of a's rows,
0 and 3, with one low bit: 01, high 0 1 = bits 1 01 = 05, low 0 1 = 02. Count of b: 01. Segments of 4, 4, 3 entries;
row 1 lists the one left out: gap 2, divisor (7 * 45426 + 65536) div 131072 = 2. b lists 2: gap 2, divisor
(5 * 45426 + 65536) div 131072 = 2. Quotients 1 1 = 01 01 = 0a, remainders 0 0 = 00. Section: k, 01, 01 05 02, 01, 0a,
00.
"""

import math
import tracemalloc

import numpy as np
import pytest
import reference
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import ConfigError, WireError
from lamina.wire import Context, TopK, decode, encode, enumerated, index, layout, rice, schema_of, transmit
from lamina.wire.codec import Support
from lamina.wire.container import Reader, uv
from lamina.wire.index import (
    BITMAP,
    CHOSEN,
    DENSE,
    ENUMERATED,
    FLAT,
    GAPS,
    MIXED,
    SQUEEZED,
    Extent,
    choose,
    log2_choose,
)


def support(shapes, masks=None):
    """Tensors t0, t1, ... of these shapes; masks: number -> kept entries."""
    tree = {f"t{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}
    mask = {f"t{i}": torch.as_tensor(kept).reshape(shapes[i]) for i, kept in (masks or {}).items()}
    return Support(Context(schema_of(tree), mask), tree)


def one(n) -> Extent:
    return support([(n,)]).extent


def written(positions, extent) -> dict[int, bytes]:
    """The section of every coding."""
    positions = np.asarray(positions, np.int64)
    sections = {c.id: c.write() for c in index.candidates(positions, extent)}
    sections[GAPS] = index.write_gaps(positions)
    if extent.total:  # there is no frame of no bytes
        sections[SQUEEZED] = index.write_squeezed(positions, extent.total)
    if extent.total <= enumerated.LONGEST:
        sections[ENUMERATED] = index.enumerate_sets(positions, extent.total).write()
    return sections


def read(id, section, extent) -> index.Found:
    reader = Reader(memoryview(section))
    found = index.read(id, reader, extent)
    reader.end()
    return found


def slow(id, section, extent) -> list[int]:
    reader = reference.Reader(bytes(section))
    positions = reference.read_index(reader, id, [extent.rows(i).tolist() for i in range(len(extent.lengths))])
    assert reader.left == 0
    return positions


def random_positions(rng, n, k):
    return np.sort(rng.choice(n, k, replace=False))


def clustered(rng, shapes, share):
    """Positions that prefer some tensors and, within them, some rows."""
    sums = []
    for shape in shapes:
        n, rows = math.prod(shape), shape[0] if len(shape) > 1 else 1
        favour = np.exp(rng.normal(0, 1.5)) * np.exp(rng.normal(0, 1.5, rows))
        sums.append(np.repeat(favour, n // max(1, rows)) * np.abs(rng.standard_normal(n)))
    scores = np.concatenate(sums)
    return np.sort(np.argsort(-scores, kind="stable")[: max(1, round(share * len(scores)))])


# Sizes and round trips.


def check(positions, extent):
    """Every coding gives the positions back, agrees with the slow decoder, and is as long as was said."""
    sections = written(positions, extent)
    for id, section in sections.items():
        found = read(id, section, extent)
        assert found.positions.dtype == np.int64
        assert found.positions.tolist() == list(positions)
        assert slow(id, section, extent) == list(positions)
    known = index.candidates(np.asarray(positions, np.int64), extent)
    assert [c.id for c in known] == [BITMAP, FLAT, MIXED]
    known.append(index.enumerate_sets(np.asarray(positions, np.int64), extent.total))
    assert [c.size for c in known] == [len(sections[c.id]) for c in known]
    check_choice(positions, extent, sections)


def check_choice(positions, extent, sections):
    chosen = choose(np.asarray(positions, np.int64), extent)
    body = chosen.write()
    assert len(body) == chosen.size
    if len(positions) == extent.total:
        assert (chosen.id, body, chosen.own) == (DENSE, b"", ())
        return
    quick = min((len(sections[id]), id) for id in (BITMAP, FLAT, MIXED))
    worth = len(sections[ENUMERATED]) <= 0.995 * quick[0]
    assert (chosen.size, chosen.id) <= min([quick, *[(len(sections[ENUMERATED]), ENUMERATED)] * worth])
    assert worth or chosen.id != ENUMERATED
    assert body == sections[chosen.id]
    found = read(chosen.id, body, extent)
    assert found.positions.tolist() == list(positions)
    assert list(found.own) == list(chosen.own)


shapes = st.lists(
    st.one_of(st.just(()), st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)), min_size=1, max_size=5
)


@given(shapes, st.data())
@settings(max_examples=50, deadline=None)
def test_every_coding_gives_any_positions_back(shapes, data):
    masks = {}
    for i, shape in enumerate(shapes):
        if data.draw(st.booleans()):
            share = data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
            masks[i] = np.random.default_rng(i).random(math.prod(shape)) < share
    extent = support(shapes, masks).extent
    n = extent.total
    kind = data.draw(st.sampled_from(["none", "all", "one", "some", "stretch"]))
    if kind == "one" and n:
        positions = [data.draw(st.integers(0, n - 1))]
    elif kind == "some":
        positions = [i for i in range(n) if data.draw(st.booleans())] if n < 40 else []
        positions = positions or random_positions(np.random.default_rng(n), n, n // 3).tolist()
    elif kind == "stretch" and n:
        start = data.draw(st.integers(0, n - 1))
        positions = list(range(start, data.draw(st.integers(start, n))))
    else:
        positions = list(range(n)) if kind == "all" else []
    check(positions, extent)


MODEL = [(16, 3, 3, 3), (16,), (32, 16, 3, 3), (32,), (0, 5), (), (64, 32, 3, 3), (10, 64), (10,), (3, 1)]


@pytest.mark.parametrize("share", [0.0002, 0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_coding_gives_clustered_and_uniform_positions_back(share, seed):
    rng = np.random.default_rng(seed)
    full = support(MODEL)
    kept = {i: rng.random(math.prod(shape)) < 0.5 for i, shape in enumerate(MODEL) if len(shape) > 1}
    kept[2][: 20 * 144] = False  # a pruned stretch of rows
    masked = support(MODEL, kept)
    check(clustered(rng, MODEL, share), full.extent)
    check(random_positions(rng, full.total, round(share * full.total)), full.extent)
    check(random_positions(rng, masked.total, round(share * masked.total)), masked.extent)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 1000])
def test_none_one_and_all_positions(n):
    for positions in ([], [0], [n - 1], list(range(n)), list(range(n - 1)), list(range(1, n))):
        check(positions, one(n))
        check(positions, support([(1, n)]).extent)
        check(positions, support([(n, 1)]).extent)


def test_a_range_of_two_to_the_31():
    n = index.LONGEST
    extent = Extent([n // 2, n // 2], lambda i: np.full(2, n // 4))
    for positions in ([], [0], [n - 1], [0, n // 4, n // 2 - 1, n // 2, n - 1]):
        for coding in index.candidates(np.array(positions, np.int64), extent)[1:]:
            section = coding.write()
            assert len(section) == coding.size
            assert read(coding.id, section, extent).positions.tolist() == positions
        chosen = choose(np.array(positions, np.int64), extent)
        assert read(chosen.id, chosen.write(), extent).positions.tolist() == positions
    beyond = Extent([n, 1], lambda i: np.array([extent.lengths[i]]))
    with pytest.raises(ConfigError):
        choose(np.array([0]), beyond)
    assert refused(FLAT, b"\x00", beyond) == "E345"


def test_the_worked_examples():
    section = bytes.fromhex("03 0d 07")
    assert written([3, 9, 10], one(20))[FLAT] == section
    assert read(FLAT, section, one(20)).positions.tolist() == [3, 9, 10]

    section = bytes.fromhex("05 17 01 13 02")  # with a divisor that is no power of two: in the docstring of rice.py
    assert written([1, 4, 5, 9, 20], one(24))[FLAT] == section
    assert read(FLAT, section, one(24)).positions.tolist() == [1, 4, 5, 9, 20]

    section = bytes.fromhex("04 01 01 05 02 01 0a 00")
    found = read(MIXED, section, support([(2, 4), (3,)]).extent)
    assert found.positions.tolist() == [4, 5, 7, 10]
    assert found.own == [3, 1]


def test_a_segment_lists_what_is_rarer():
    """All but position 5 of 24: c = 1, divisor (47 * 45426 + 65536) div 131072 = 16; gap 5 = 0 * 16 + 5."""
    section = bytes.fromhex("17 01 05")
    assert written([i for i in range(24) if i != 5], one(24))[FLAT] == section
    assert written(range(24), one(24))[FLAT] == bytes.fromhex("18")


def test_pruned_rows_are_no_rows():
    """Rows 0 and 2 keep nothing, row 1 keeps 3 entries, row 3 keeps 1."""
    kept = [[0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    s = support([(4, 4), (4,), ()], {0: torch.tensor(kept, dtype=torch.bool)})
    assert s.rows(0).tolist() == [3, 1]
    assert s.rows(1).tolist() == [4]
    assert s.rows(2).tolist() == [1]
    assert support([(3, 2, 5), (0, 3), (3, 0)]).rows(0).tolist() == [10, 10, 10]
    assert support([(3, 2, 5), (0, 3), (3, 0)]).rows(2).tolist() == []


# The choice.


def test_each_coding_is_chosen_where_it_is_the_smallest():
    rng = np.random.default_rng(0)
    matrix = [(256, 256)]
    n = 256 * 256
    octets = np.flatnonzero(np.repeat(rng.random(n // 8) < 0.2, 8))  # whole bytes of the bitmap
    stretches = (np.arange(0, n, 4096)[:, None] + np.array([3, 5, 100, 102])).reshape(-1)
    cases = {
        DENSE: np.arange(n),
        BITMAP: random_positions(rng, n, n // 2),
        FLAT: random_positions(rng, n, n // 100),
        ENUMERATED: random_positions(rng, n, n * 2 // 5),
        MIXED: clustered(rng, matrix, 0.02),
        GAPS: stretches,
        SQUEEZED: octets,
    }
    for id, positions in cases.items():
        extent = support(matrix).extent
        chosen = choose(positions, extent)
        assert chosen.id == id
        if id != DENSE:
            assert chosen.size == min(map(len, written(positions, extent).values()))


def test_equal_sizes_go_to_the_lower_id():
    """k = 2 of 4, positions 0 and 3: divisor (6 * 45426 + 2 * 65536) div (2 * 131072) = 1, so gaps 0 2 are 1 001 = 09.

    Of the C(4, 2) = 6 sets it is number C(0, 1) + C(3, 2) = 3.
    """
    sections = written([0, 3], one(4))
    assert sections[FLAT].hex(" ") == "02 09"
    assert sections[BITMAP].hex(" ") == "02 09"
    assert sections[ENUMERATED].hex(" ") == "02 03"
    assert choose(np.array([0, 3]), one(4)).id == BITMAP
    assert written([], one(1000))[FLAT] == written([], one(1000))[GAPS] == b"\x00"
    nothing = choose(np.empty(0, np.int64), one(1000))
    assert (nothing.id, nothing.write(), nothing.own) == (FLAT, b"\x00", ())


def test_zstd_is_tried_only_where_it_may_pay(monkeypatch):
    tried = []
    for name in ("write_gaps", "write_squeezed"):
        real = getattr(index, name)
        monkeypatch.setattr(index, name, lambda *a, name=name, real=real: tried.append(name) or real(*a))
    rng = np.random.default_rng(0)
    n = 500_000
    choose(random_positions(rng, n, 5_000), one(n))
    assert tried == []  # 1 % at random
    choose(random_positions(rng, n, 4_000), one(n))
    assert tried == ["write_gaps", "write_squeezed"]  # so few that it costs nothing
    choose(random_positions(rng, n, 30_000), one(n))
    assert tried[2:] == ["write_gaps", "write_squeezed"]  # more than 5 %
    choose(np.arange(5_000), support([(1000, 500)]).extent)
    assert tried[4:] == ["write_gaps"]  # fewer bytes than positions at random, and a share no bitmap is made for
    choose(random_positions(rng, 5_000_000, 4_000), one(5_000_000))
    assert tried[5:] == ["write_gaps"]  # too few of many for a bitmap
    choose(random_positions(rng, 100_000, 30_000), one(100_000))
    assert tried[6:] == ["write_squeezed"]  # too many for gaps


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("k", "share"),
    [
        *((1000, share) for share in (1e-4, 1e-3, 0.01, 0.0584, 0.1, 0.1133, 0.15, 0.5)),
        *((10_000, share) for share in (1e-3, 0.01, 0.0584, 0.1133, 0.2139, 0.25, 0.3, 0.5)),
        *((41_000, share) for share in (0.4, 0.405, 0.41, 0.415, 0.42, 0.58, 0.6)),
    ],
)
def test_random_positions_cost_two_percent_more_than_their_entropy(k, share, seed):
    """0.0584, 0.1133, 0.2139: where two neighbouring powers of two are equally bad divisors. About 0.41: where zstd's
    fast levels find nothing in a bitmap."""
    n = round(k / share)
    chosen = choose(random_positions(np.random.default_rng(seed), n, k), one(n))
    assert 1 <= 8 * chosen.size / log2_choose(n, k) <= 1.02


def test_random_positions_of_many_tensors_cost_no_more():
    rng = np.random.default_rng(0)
    s = support([(64, 64, 3, 3), (64,)] * 8)
    positions = random_positions(rng, s.total, s.total // 100)
    chosen = choose(positions, s.extent)
    assert 8 * chosen.size / log2_choose(s.total, len(positions)) <= 1.02


def test_positions_that_prefer_rows_cost_less_than_random_ones():
    rng = np.random.default_rng(0)
    s = support([(64, 32, 3, 3), (64,), (128, 64, 3, 3), (128,)])
    positions = clustered(rng, [spec.shape for spec in s.specs], 0.01)
    chosen = choose(positions, s.extent)
    assert chosen.id == MIXED
    assert 8 * chosen.size / log2_choose(s.total, len(positions)) < 0.85


# Through a codec.


def tree_of(seed, shapes=MODEL):
    rng = np.random.default_rng(seed)
    tree = {}
    for i, shape in enumerate(shapes):
        x = rng.standard_normal(shape)
        rows = shape[0] if len(shape) > 1 else 1
        scale = np.exp(rng.normal(0, 1.0, (rows, *[1] * (len(shape) - 1)))) if len(shape) > 1 else 1.0
        tree[f"t{i}"] = torch.tensor(x * scale, dtype=torch.float32)
    return tree


@pytest.mark.parametrize("density", [0.0005, 0.01, 0.05, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("masked", [False, True])
def test_top_k_is_transmitted_decoded_and_counted_alike(density, scope, masked):
    tree = tree_of(3)
    mask = {name: x.abs() > 0.3 for name, x in tree.items() if x.ndim > 1} if masked else None
    context = Context(schema_of(tree), mask)
    codec = TopK(density, scope=scope)
    blob = encode(tree, codec, mask=mask)
    received, size = transmit(tree, codec, mask=mask)
    decoded = decode(blob, tree, mask=mask)
    assert blob[4] in CHOSEN
    assert all(torch.equal(decoded[name], received[name]) for name in tree)
    assert size.total == len(blob)
    assert size == layout(blob, context)
    assert min([size.shared, *size.rows.values()]) >= 0


def test_rows_are_counted_alike_at_both_ends_of_a_mask():
    tree = {"w": torch.randn(64, 400, generator=torch.Generator().manual_seed(0))}
    tree["w"][::8] *= 10
    kept = torch.rand(64, 400, generator=torch.Generator().manual_seed(1)) < 0.5
    kept[1::4] = False
    mask = {"w": kept}
    blob = encode(tree, TopK(0.05), mask=mask)
    assert blob[4] == MIXED
    assert torch.equal(decode(blob, tree, mask=mask)["w"], transmit(tree, TopK(0.05), mask=mask)[0]["w"])
    kept[1, 0] = True
    with pytest.raises(WireError, match="mask"):
        decode(blob, tree, mask={"w": kept})


def test_bytes_of_a_tensor_are_its_own_and_a_share():
    """The body of the mixed section is 12 - 1 - 1 - 3 - 1 = 6 bytes, for 3 and 1 entries; a bitmap is for 8 and 3."""
    assert index.split(MIXED, 12, [3, 1], [3, 1], [8, 3]) == [3 + 8 * 3 // 4, 1 + 8 * 1 // 4]
    assert index.split(FLAT, 12, (), [3, 1], [8, 3]) == [9, 3]
    assert index.split(BITMAP, 11, (), [3, 1], [8, 3]) == index.split(SQUEEZED, 11, (), [3, 1], [8, 3]) == [8, 3]
    assert index.split(index.DRAWN, 9, (), [3, 1], [8, 3]) == [0, 0]


# Hostile sections.


def refused(id, section, extent) -> str:
    with pytest.raises(WireError) as caught:
        read(id, section, extent)
    return caught.value.code


def frame(raw: bytes) -> bytes:
    packed = zstandard.compress(raw, 1)
    return uv(len(packed)) + packed


HUNDRED = one(100)
TWO = support([(2, 4), (3,)]).extent


@pytest.mark.parametrize(
    ("section", "code"),
    [
        ("65", "E345"),  # k = 101 of 100
        ("03", "E345"),  # no runs
        ("03 01 00", "E345"),  # one 1 of three
        ("01 00 00", "E345"),  # none of one
        ("01 04 00", "E345"),  # 100 at a divisor of 69: a quotient of 2
        ("01 02 1f", "E345"),  # 69 + 31 = 100
        ("01 02 3c 00", "E345"),  # 69 + 2 * 60 - 59 = 130
        ("01 01 3b", "E340"),  # the long remainder's last bit is missing
        ("01 01 3b 02", "E345"),  # one bit too many of these
        ("01 05 00", "E345"),  # a one behind the last one, in the same byte
        ("01 81 00", "E345"),
        ("01 01 40", "E345"),  # a 7th bit of 6
        ("01 01 00 00", "E340"),  # something behind
    ],
)
def test_hostile_flat_sections(section, code):
    """n = 100, k = 1: divisor (199 * 45426 + 65536) div 131072 = 69, width 6, short 128 - 69 = 59."""
    assert refused(FLAT, bytes.fromhex(section), HUNDRED) == code


@pytest.mark.parametrize(
    "section",
    [
        "05 01 01 05 02 01 0a 00",  # counts of 4, declared 5
        "03 01 01 05 02 01 0a 00",  # 3 are used up by the rows
        "04 05 01 05 02 01 0a 00",  # a third mode
        "04 02 03 01 05 02 0a 00",  # rows of a tensor that has none
        "04 01 14 05 02 01 0a 00",  # 20 low bits
        "04 01 01 09 02 01 0a 00",  # a row of 4 with 2 * 2 + 1
        "04 01 01 0d 02 01 0a 00",  # a one too many
        "04 01 01 05 06 01 0a 00",  # a low bit too many
        "04 01 01 05 02 04 0a 00",  # 4 of 3
        "04 01 01 05 02 01 1a 00",  # three runs
        "04 01 01 05 02 01 02 00",  # one run
        "04 01 01 05 02 01 14 00",  # quotient 2: gap 4 or more in a segment of 4
        "04 01 01 05 02 01 0a 02",  # gap 2 + 1 in a segment of 3
        "04 01 01 05 02 01 0a 04",  # padding
    ],
)
def test_hostile_mixed_sections(section):
    """One change each to the worked example."""
    assert refused(MIXED, bytes.fromhex(section), TWO) == "E345"


def test_truncated_sections_are_refused():
    rng = np.random.default_rng(0)
    extent = support(MODEL).extent
    for share in (0.01, 0.6):
        for id, section in written(clustered(rng, MODEL, share), extent).items():
            for end in {*range(min(40, len(section))), *range(0, len(section), max(1, len(section) // 50))}:
                assert refused(id, section[:end], extent)[:3] == "E34"
            assert refused(id, section + b"\x00", extent) == "E340"


def test_hostile_squeezed_bitmaps():
    ones = b"\xff" * 12 + b"\x0f"
    assert read(SQUEEZED, uv(100) + frame(ones), HUNDRED).positions.tolist() == list(range(100))
    assert refused(SQUEEZED, uv(99) + frame(ones), HUNDRED) == "E345"
    assert refused(SQUEEZED, uv(101) + frame(ones), HUNDRED) == "E345"
    assert refused(SQUEEZED, uv(100) + frame(ones[:-1] + b"\x1f"), HUNDRED) == "E345"
    assert refused(SQUEEZED, uv(100) + frame(ones + b"\x00"), HUNDRED) == "E347"
    assert refused(SQUEEZED, uv(96) + frame(ones[:-1]), HUNDRED) == "E347"
    assert refused(SQUEEZED, uv(0) + frame(bytes(1 << 26)), HUNDRED) == "E347"
    assert refused(SQUEEZED, uv(100) + uv(1000), HUNDRED) == "E345"
    assert refused(SQUEEZED, uv(0) + frame(b""), support([]).extent) == "E347"  # no entry, no bitmap, no frame


def test_counts_that_lie_allocate_nothing():
    n = index.LONGEST
    huge = Extent([n], lambda i: np.broadcast_to(np.int64(2), n // 2))
    tracemalloc.start()
    for k in (1, 1000, n // 2, n - n // 8, n - 1):
        assert refused(FLAT, uv(k), huge) == "E345"
        assert refused(FLAT, uv(k) + bytes(1000), huge) == "E345"
        assert refused(MIXED, uv(k) + b"\x01\x00" + bytes(1000), huge) == "E345"
        assert refused(MIXED, uv(k) + b"\x00" + uv(k) + bytes(1000), huge) == "E345"
        assert refused(SQUEEZED, uv(k) + frame(bytes(1000)), huge) == "E347"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@given(st.sampled_from(sorted(CHOSEN)), st.integers(0, 40), st.binary(max_size=40))
@settings(max_examples=50, deadline=None)
def test_random_sections_agree_with_the_slow_decoder_or_are_refused(id, k, tail):
    extent = support([(2, 4), (), (4, 3), (5,)]).extent
    section = uv(k) + tail
    try:
        accepted = read(id, section, extent).positions.tolist()
    except WireError:
        return
    assert accepted == sorted(set(accepted))
    assert accepted == slow(id, section, extent)
    assert all(0 <= p < extent.total for p in accepted)


@given(st.integers(0, 3), st.data())
@settings(max_examples=50, deadline=None)
def test_flipped_bits_are_read_as_the_slow_decoder_reads_them_or_refused(seed, data):
    shapes = [(6, 9), (), (7,), (12, 2, 2)]
    extent = support(shapes).extent
    positions = clustered(np.random.default_rng(seed), shapes, data.draw(st.sampled_from([0.1, 0.4, 0.8])))
    id = data.draw(st.sampled_from([FLAT, MIXED]))
    section = bytearray(written(positions, extent)[id])
    section[data.draw(st.integers(0, len(section) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = read(id, bytes(section), extent).positions.tolist()
    except WireError:
        return
    assert found == slow(id, bytes(section), extent)


def test_counts_of_rows_take_the_fewest_bytes():
    rng = np.random.default_rng(0)
    for scale in (0, 1, 5, 300, 1 << 22):
        counts = rng.integers(0, scale + 1, 200)
        low, size = rice.best_low(counts)
        lengths = [len(rice.write_counts(counts, r)) for r in range(rice.MOST_LOW + 1) if counts.sum() >> r < 1 << 20]
        assert size == len(rice.write_counts(counts, low)) == min(lengths)
        reader = Reader(memoryview(rice.write_counts(counts, low)))
        assert rice.read_counts(reader, np.full(200, scale), int(counts.sum())).tolist() == counts.tolist()
        reader.end()
