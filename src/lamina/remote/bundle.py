"""Several letters to one node, or its answers, as one piece of bytes.

The clients of a node are sent the same plan, and most often the same bytes of it. A bundle has equal ones once: letters
are cut where their frame's sections begin, as what stands before differs from client to client. So one more client at
a node costs its head and no second model. Ledgers count every client's frame, as if it had come alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import xxhash

from lamina.errors import WireError
from lamina.remote.envelope import seal, sections_at, unseal

_MAGIC = b"LMB1"


def bundled(parts: Iterable[tuple[int, bytes]]) -> bytes:
    """Of (client, letter) or (client, answer), in their order."""
    rows: list[tuple[int, int, int]] = []  # client, bytes of its head, which of the bodies
    heads: list[bytes] = []
    bodies: list[memoryview] = []
    places: dict[bytes, int] = {}
    for client, blob in parts:
        cut = sections_at(blob)
        body = memoryview(blob)[cut:]
        which = places.setdefault(xxhash.xxh3_128_digest(body), len(bodies))
        if which == len(bodies):
            bodies.append(body)
        heads.append(blob[:cut])
        rows.append((client, cut, which))
    return seal(_MAGIC, {"parts": rows, "bodies": [*map(len, bodies)]}, *heads, *bodies)


def unbundled(blob: bytes, max_bytes: int | None = None) -> Iterator[tuple[int, bytes]]:
    """What was bundled, each made when it is asked for. Raises WireError (at once) and nothing else."""
    head, content = unseal(_MAGIC, blob, max_bytes)
    rows, sizes = head.get("parts"), head.get("bodies")
    fine = isinstance(rows, list) and isinstance(sizes, list) and all(_whole(size) for size in sizes)
    fine = fine and all(isinstance(row, list) and len(row) == 3 and all(map(_whole, row)) for row in rows or ())
    if not fine or any(which >= len(sizes or ()) for _, _, which in rows or ()):
        raise WireError("the head is not that of a bundle", code="E345")
    assert isinstance(rows, list)  # said above, and so is this
    assert isinstance(sizes, list)
    start = sum(cut for _, cut, _ in rows)
    if start + sum(sizes) != len(content):
        raise WireError(f"{len(content)} bytes, the head says {start + sum(sizes)}", code="E340")
    begins = itertools.accumulate([start, *sizes])
    return _parts(rows, [content[at : at + size] for at, size in zip(begins, sizes, strict=False)], content)


def _parts(rows: list[list[int]], bodies: list[memoryview], content: memoryview) -> Iterator[tuple[int, bytes]]:
    at = 0
    for client, cut, which in rows:
        yield client, b"".join([content[at : at + cut], bodies[which]])
        at += cut


def _whole(x: object) -> bool:
    return type(x) is int and x >= 0
