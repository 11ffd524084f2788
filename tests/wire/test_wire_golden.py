"""Worked examples: blobs written out byte by byte."""

import hashlib
import struct

import numpy as np
import pytest
import torch
import xxhash
import zstandard

from lamina.random import address
from lamina.wire import Context, Dense, RandomK, TopK, decode, encode, read, schema_of
from lamina.wire.frame import Frame, pack, unpack
from lamina.wire.index import draw, leb128, unleb128

A = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
B = torch.tensor(3.0)
TREE = {"a": A, "b": B}
# name "a", rank 2, dims 2 2, float32; name "b", rank 0, float32
SCHEMA = hashlib.blake2b(b"FLC1-schema" + bytes.fromhex("01 61 02 02 02 00  01 62 00 00"), digest_size=8).hexdigest()


def header(blob: bytes) -> str:
    return blob[:8].hex(" ")


def test_dense_fp32_is_a_header_and_the_raw_values():
    blob = encode(TREE, Dense("fp32"))
    assert header(blob) == "46 4c 43 01 00 00 00 00"  # FLC, version 1, index 0 dense, values 0 fp32, no flags
    assert blob[8:16].hex() == SCHEMA == "12312332a9a6ba01"
    assert blob[24:].hex(" ") == "00 00 80 3f 00 00 00 c0 00 00 00 3f 00 00 00 00 00 00 40 40"
    assert len(blob) == 24 + 4 * 5


def test_checksum_is_xxh3_of_the_body_seeded_with_that_of_the_header():
    blob = encode(TREE, Dense("fp32"))
    seed = xxhash.xxh3_64_intdigest(blob[:16])
    assert int.from_bytes(blob[16:24], "little") == xxhash.xxh3_64_intdigest(blob[24:], seed=seed)
    assert blob[16:24].hex() == "d395e4b719f88166"


def test_subset_is_one_bit_per_tensor_of_the_schema():
    blob = encode({"b": B}, Dense("fp32"), context=Context(schema_of(TREE)))
    assert header(blob) == "46 4c 43 01 00 00 02 00"
    assert blob[24:].hex(" ") == "02 00 00 40 40"  # the second tensor; 3.0
    assert decode(blob, TREE) == {"b": B}


def test_dense_under_a_mask_is_the_mask_id_and_the_kept_values():
    mask = {"a": torch.tensor([[True, False], [True, True]])}
    blob = encode(TREE, Dense("fp32"), mask=mask)
    identity = hashlib.blake2b(b"FLC1-mask" + bytes.fromhex("01 61 04 0d"), digest_size=8)  # bits 1011, lowest first
    assert header(blob) == "46 4c 43 01 01 00 00 00"
    assert blob[24:32] == identity.digest()
    assert blob[32:].hex(" ") == "00 00 80 3f 00 00 00 3f 00 00 00 00 00 00 40 40"


def test_top_k_of_a_tiny_tree_is_a_bitmap():
    blob = encode(TREE, TopK(0.5))  # 2 of a's 4 entries: positions 0 1; max(1, round(0.5)) = 1 of b's: position 4
    assert header(blob) == "46 4c 43 01 02 00 00 00"
    assert blob[24:].hex(" ") == "03 13 00 00 80 3f 00 00 00 c0 00 00 40 40"  # k = 3; bits 0 1 4; values


def test_top_k_under_a_mask_counts_kept_entries_and_names_the_mask():
    mask = {"a": torch.tensor([[True, False], [True, True]])}
    blob = encode({"a": A}, TopK(0.4), mask=mask)  # 1 of 3 kept entries
    assert header(blob) == "46 4c 43 01 02 00 10 00"  # flag MASKED
    assert blob[32:].hex(" ") == "01 01 00 00 80 3f"


def test_sparse_entries_of_a_longer_vector_are_runs():
    """Divisor (199997 * 45426 + 3 * 65536) div (3 * 131072) = 23105, of 14 bits, short = 32768 - 23105 = 9663.

    Gaps 3, 196 and 79799 = 3 * 23105 + 10484: quotients 0 0 3; 10484 is long, (10484 + 9663) = 2 * 10073 + 1.
    """
    x = torch.zeros(100_000)
    x[[3, 200, 80_000]] = 1.0
    blob = encode({"x": x}, TopK(3e-5))
    assert header(blob) == "46 4c 43 01 03 00 00 00"
    # k = 3; 1 1 0001; low bytes of 3, 196, 10073 = 27 59; six high bits 0, 0, 27 = 39 at bit 12; the last bit
    assert blob[24:33].hex(" ") == "03 23 03 c4 59 00 70 02 01"
    assert blob[33:] == struct.pack("<3f", 1, 1, 1)
    assert torch.equal(decode(blob, {"x": x})["x"], x)


def test_which_of_few_entries_travel_is_a_number():
    """1 4 5 9 20 of 24: C(1, 1) + C(4, 2) + C(5, 3) + C(9, 4) + C(20, 5) = 15647 = 3d1f, below C(24, 5) = 42504."""
    x = torch.zeros(24)
    x[[1, 4, 5, 9, 20]] = 1.0
    blob = encode({"x": x}, TopK(0.2))
    assert header(blob) == "46 4c 43 01 0a 00 00 00"  # index 10
    assert blob[24:27].hex(" ") == "05 1f 3d"  # k = 5; 16 bits
    assert blob[27:] == struct.pack("<5f", 1, 1, 1, 1, 1)
    assert torch.equal(decode(blob, {"x": x})["x"], x)


def test_numbers_of_several_blocks_stand_behind_their_counts():
    """n = 1030: blocks of 1024 and 6. Expected 2 * 1024 div 1030 = 1 and found: 0, of no low bits, unary 1.

    Ranks 3 in 10 bits (C(1024, 1)) and 3 in 3 bits (C(6, 1)): 3 + (3 << 10) = 0c03.
    """
    x = torch.zeros(1030)
    x[[3, 1027]] = 1.0
    body = bytes.fromhex("02 00 01 03 0c") + struct.pack("<2f", 1, 1)
    front = bytes.fromhex("46 4c 43 01 0a 00 00 00") + encode({"x": x}, Dense())[8:16]
    checksum = xxhash.xxh3_64_intdigest(body, seed=xxhash.xxh3_64_intdigest(front))
    assert torch.equal(decode(front + checksum.to_bytes(8, "little") + body, {"x": x})["x"], x)


def test_gaps_are_leb128_in_a_frame():
    """The first position, then distance - 1: 3; 196 = 0x44 + 1 << 7; 79799."""
    x = torch.zeros(100_000)
    x[[3, 200, 80_000]] = 1.0
    frame = zstandard.compress(bytes.fromhex("03 c4 01 b7 ef 04"), 1)
    body = b"\x03" + bytes([len(frame)]) + frame + struct.pack("<3f", 1, 1, 1)
    front = bytes.fromhex("46 4c 43 01 05 00 00 00") + encode({"x": x}, Dense())[8:16]
    checksum = xxhash.xxh3_64_intdigest(body, seed=xxhash.xxh3_64_intdigest(front))
    assert torch.equal(decode(front + checksum.to_bytes(8, "little") + body, {"x": x})["x"], x)


def test_random_k_sends_a_seed():
    tree = {"x": torch.arange(10.0)}
    blob = encode(tree, RandomK(0.2), context=Context(schema_of(tree), seed=7, purpose="up", round=3, client=5))
    seed = address(7, "up", 3, 5)
    assert header(blob) == "46 4c 43 01 08 00 00 00"
    assert blob[24:33] == b"\x02" + seed.to_bytes(8, "little")
    assert blob[33:] == draw(10, 2, seed).astype("<f4").tobytes()


def test_positions_of_a_seed_do_not_change_between_versions():
    twister = np.random.MT19937()
    twister._legacy_seeding(42)  # 32-bit outputs, two to a word, the first one high
    high, low = twister.random_raw(10).reshape(5, 2).T.tolist()
    words = [(h << 32 | x) % (1 << 62) for h, x in zip(high, low, strict=True)]
    assert draw(1000, 5, 42).tolist() == sorted(word % 1000 for word in words) == [223, 313, 595, 636, 998]
    assert draw(1000, 5, (7 << 32) + 42).tolist() == [223, 313, 595, 636, 998]  # 32 bits of a seed count
    assert draw(6, 4, 1).tolist() == [1, 2, 3, 4]  # the two left out are drawn: 0 and 5


def test_values_in_two_bytes_are_planes_lowest_byte_first():
    one_two = {"x": torch.tensor([1.0, -2.0])}
    assert encode(one_two, Dense("fp16"))[24:].hex(" ") == "00 00 00 00 3c c0"  # 3c00 c000
    assert encode(one_two, Dense("bf16"))[24:].hex(" ") == "00 00 01 00 7f 80"  # 3f80 c000, rotated: 7f00 8001
    assert encode(one_two, Dense("fp16"))[5] == 3
    assert encode(one_two, Dense("bf16"))[5] == 4


def test_int8_is_scales_then_codes():
    blob = encode({"x": torch.tensor([127.0, -1.0, 0.4]), "y": torch.tensor([0.0])}, Dense("int8"))
    assert blob[5] == 5
    assert blob[24:].hex(" ") == "00 00 80 3f 00 00 00 00 00 7f ff 00 00"  # 1.0, 0.0; raw plane: 127 -1 0, 0


def test_sign_is_one_scale_per_tensor_then_bits():
    blob = encode({"x": torch.tensor([3.0, -1.0, 2.0]), "y": torch.empty(0), "z": torch.tensor(-5.0)}, Dense("sign"))
    assert blob[5] == 6
    assert blob[24:].hex(" ") == "00 00 00 40 00 00 a0 40 05"  # 2.0, 5.0; + - + -


def test_other_dtypes_travel_raw_in_their_own():
    tree = {
        "d": torch.tensor([1.0], dtype=torch.float64),
        "i": torch.tensor(7),
        "m": torch.tensor([True, False, True]),
        "h": torch.tensor([1.0], dtype=torch.bfloat16),
    }
    blob = encode(tree, Dense("fp32"))
    assert header(blob) == "46 4c 43 01 00 80 00 00"
    assert blob[24:].hex(" ") == "00 00 00 00 00 00 f0 3f 07 00 00 00 00 00 00 00 05 80 3f"


def test_lossless_is_four_planes_of_rotated_bits():
    x = torch.ones(1000)  # 3f800000, rotated 7f000000
    blob = encode({"x": x}, Dense("lossless"))
    assert blob[5] == 1
    at, planes = 24, []
    for _ in range(4):
        planes.append(zstandard.decompress(blob[at + 1 : at + 1 + blob[at]]))
        at += 1 + blob[at]
    assert planes == [bytes(1000)] * 3 + [b"\x7f" * 1000]
    assert at == len(blob) < 200


def test_lossless_that_does_not_pay_travels_raw():
    tree = {"x": torch.tensor([1.0, 2.0])}
    assert encode(tree, Dense("lossless")) == encode(tree, Dense("fp32"))


def test_leb128_agrees_with_arithmetic():
    numbers = np.array([0, 1, 127, 128, 16383, 16384, 2097151, 2097152, (1 << 31) - 1])
    raw = leb128(numbers)
    assert raw.tobytes().hex(" ") == "00 01 7f 80 01 ff 7f 80 80 01 ff ff 7f 80 80 80 01 ff ff ff ff 07"
    assert unleb128(raw, len(numbers)).tolist() == numbers.tolist()


def test_frame_is_a_head_and_sections():
    frame = Frame("message", 3, 5, {"n": 1.0}, {"update": b"\x01\x02"})
    blob = pack(frame)
    assert blob[:8].hex(" ") == "4c 4d 46 01 1d 00 00 00"  # LMF, version 1, 29 bytes of head
    assert blob[16:25].hex(" ") == "01 03 00 00 00 05 00 00 00"  # message, round 3, client 5
    assert blob[25:36].hex(" ") == "01 01 6e 00 00 00 00 00 00 f0 3f"  # one scalar: "n" = 1.0
    assert blob[36:45] == b"\x01\x06update\x02"  # one section of 2 bytes
    assert blob[45:] == b"\x01\x02"
    assert unpack(blob) == frame


@pytest.mark.parametrize("codec", [Dense("fp32"), Dense("lossless"), TopK(0.5), TopK(1.0)])
def test_encoding_is_a_function_of_the_logical_values(codec):
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    strided = {"x": x.to(memory_format=torch.channels_last)}
    assert not strided["x"].is_contiguous()
    assert encode(strided, codec) == encode({"x": x}, codec)


def test_scalars_are_pairs_behind_their_length():
    """Between the subset's bits and the mask's id: 18 bytes, key 1 and 2.5, key 200 and 128, whatever their order."""
    blob = encode({"b": B}, Dense("fp32"), context=Context(schema_of(TREE), scalars={200: 128, 1: 2.5}))
    assert header(blob) == "46 4c 43 01 00 00 0a 00"
    assert blob[24:26].hex(" ") == "02 12"
    assert blob[26:35].hex(" ") == "01 00 00 00 00 00 00 04 40"
    assert blob[35:44].hex(" ") == "c8 00 00 00 00 00 00 60 40"
    assert blob[44:].hex(" ") == "00 00 40 40"
    assert read(blob, TREE).scalars == {1: 2.5, 200: 128.0}
    mask = {"a": torch.tensor([[True, False], [True, True]])}
    blob = encode({"a": A}, TopK(0.4), mask=mask, scalars={1: 2.5})
    assert header(blob) == "46 4c 43 01 02 00 18 00"
    assert blob[24:34].hex(" ") == "09 01 00 00 00 00 00 00 04 40"
    assert blob[34:42] == hashlib.blake2b(b"FLC1-mask" + bytes.fromhex("01 61 04 0d"), digest_size=8).digest()
    assert blob[42:].hex(" ") == "01 01 00 00 80 3f"


def test_the_mac_is_keyed_blake2b_of_all_before_it():
    key = bytes(range(16))
    blob = encode(TREE, Dense("fp32"), key=key)
    assert header(blob) == "46 4c 43 01 00 00 04 00"
    assert blob[24:44] == encode(TREE, Dense("fp32"))[24:]
    assert blob[44:] == hashlib.blake2b(blob[:44], key=key, digest_size=16).digest()
    seed = xxhash.xxh3_64_intdigest(blob[:16])
    assert int.from_bytes(blob[16:24], "little") == xxhash.xxh3_64_intdigest(blob[24:44], seed=seed)
    assert (blob[16:24].hex(" "), blob[44:].hex(" ")) == (
        "fe b5 83 6f b5 41 3b 45",
        "95 48 ab 40 08 4a ee 5e 60 ce a8 98 a4 ce 42 e3",
    )
