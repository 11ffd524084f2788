"""The published vectors: what was sent once decodes forever, and what is hostile is refused by its code.

`vectors/write.py` made them, and adds to them; docs/wire-format.md says what is in them.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import reference
import torch
from forced import DTYPES, IDS, INDICES, KINDS, fast, fast_scalars, slow, slow_scalars, tensor

from lamina.wire import Context, Spec, WireError, frame, layout

HERE = Path(__file__).parent / "vectors"
DOCUMENT = Path(__file__).parents[2] / "docs" / "wire-format.md"


def load(name: str) -> list[dict]:
    return json.loads((HERE / name).read_text())


def context(entry: dict) -> Context:
    schema = {name: Spec(tuple(shape), DTYPES[dtype]) for name, shape, dtype in entry["schema"]}
    mask = {
        name: torch.tensor([bit == "1" for bit in bits]).reshape(schema[name].shape)
        for name, bits in entry["mask"].items()
    }
    held = entry["reference"]
    known = None if held is None else {name: tensor(bytes.fromhex(raw), schema[name]) for name, raw in held.items()}
    secret = bytes.fromhex(entry["key"]) if "key" in entry else None
    return Context(schema, mask or None, known, key=secret)


CONTEXTS = {entry["name"]: context(entry) for entry in load("contexts.json")}
VALID, HOSTILE, FRAMES = load("valid.json"), load("hostile.json"), load("frames.json")
UNFRAMED = [vector for vector in FRAMES if "code" not in vector]
REFUSED_FRAMES = [vector for vector in FRAMES if "code" in vector]


def named(vectors: list[dict]) -> list:
    return [pytest.param(vector, id=vector["name"]) for vector in vectors]


@pytest.mark.parametrize("vector", named(VALID))
def test_what_was_sent_once_decodes_forever(vector):
    blob, known = bytes.fromhex(vector["blob"]), CONTEXTS[vector["context"]]
    tree = {name: bytes.fromhex(raw) for name, raw in vector["tree"].items()}
    assert fast(blob, known) == tree
    assert slow(blob, known) == tree
    scalars = {int(key): bytes.fromhex(raw) for key, raw in vector.get("scalars", {}).items()}
    assert fast_scalars(blob, known) == slow_scalars(blob, known) == scalars
    assert layout(blob, known).total == len(blob)


@pytest.mark.parametrize("vector", named(HOSTILE))
def test_what_is_hostile_is_refused_by_its_code(vector):
    blob, known = bytes.fromhex(vector["blob"]), CONTEXTS[vector["context"]]
    tracemalloc.start()
    refusal = fast(blob, known)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refusal == vector["code"]
    assert slow(blob, known) == vector["code"]
    assert peak < 1 << 20  # whatever it declares


@pytest.mark.parametrize("vector", named(UNFRAMED))
def test_a_frame_that_was_sent_once_unpacks_forever(vector):
    blob = bytes.fromhex(vector["blob"])
    sections = {name: bytes.fromhex(raw) for name, raw in vector["sections"].items()}
    scalars = {name: bytes.fromhex(raw) for name, raw in vector["scalars"].items()}
    found = frame.unpack(blob)
    assert found[:3] == (vector["kind"], vector["round"], vector["client"])
    assert {name: struct.pack("<d", number) for name, number in found.scalars.items()} == scalars
    assert found.sections == sections
    kind, *rest = reference.unframe(blob)
    assert (frame.KINDS[kind], *rest) == (vector["kind"], vector["round"], vector["client"], scalars, sections)


@pytest.mark.parametrize("vector", named(REFUSED_FRAMES))
def test_a_hostile_frame_is_refused_by_its_code(vector):
    blob = bytes.fromhex(vector["blob"])
    with pytest.raises(WireError) as caught:
        frame.unpack(blob)
    assert caught.value.code == vector["code"]
    with pytest.raises(reference.Refused, match=vector["code"]):
        reference.unframe(blob)


def test_there_is_a_vector_for_every_pair_of_codings_and_every_flag():
    heads = [bytes.fromhex(vector["blob"])[4:7] for vector in VALID]
    pairs = {(index_id, value_id, flags & 1) for index_id, value_id, flags in heads}
    assert pairs >= {(index_id, IDS[kind], int(kind == "REF")) for index_id in INDICES for kind in KINDS}
    assert {flags for _, _, flags in heads} == set(range(32))
    assert len(HOSTILE) >= 60
    assert {vector["code"] for vector in HOSTILE} == {f"E34{i}" for i in range(10)}
    assert sum(path.stat().st_size for path in HERE.glob("*.json")) < 300_000


def test_the_document_lists_the_hostile_vectors_by_code():
    text = " ".join(DOCUMENT.read_text().split())
    for what, vectors in (("messages", HOSTILE), ("frames", REFUSED_FRAMES)):
        for code in sorted({vector["code"] for vector in vectors}):
            names = [vector["name"] for vector in vectors if vector["code"] == code]
            assert f"**{code}**, {len(names)} {what}: {' · '.join(names)}." in text
    assert f"{len(VALID)} messages and {len(UNFRAMED)} frames that decode" in text
