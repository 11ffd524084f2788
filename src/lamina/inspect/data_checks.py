"""What `lamina inspect` says of data: four things that are legitimate, and often a mistake (W310)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor

from lamina.data import ClientData
from lamina.data.transform import Batch
from lamina.inspect.checks import Finding, named

MOST = 500_000  # examples that are compared; of larger sets, that many, evenly apart
_CODE = "W310"


def of_data(data: ClientData, batch_size: int | None) -> Iterator[Finding]:
    """Args: batch_size: of local training; None: all of a client's examples."""
    yield from _short(data, batch_size)
    yield from _single(data)
    yield from _shared(data)
    yield from _leaked(data)


def _short(data: ClientData, batch_size: int | None) -> Iterator[Finding]:
    short = [name for name, n in zip(data.names, data.sizes.tolist(), strict=True) if n < (batch_size or 1)]
    if short:
        least = int(data.sizes.min())
        yield Finding(
            _CODE,
            f"{len(short)} of {len(data)} clients have less than one batch of {batch_size}, the smallest {least}: "
            f"{named(short)}",
            "they make one step a pass, on a batch of another size; BatchNorm fails on one of a single example",
            "a smaller local.batch_size, or leave these clients out",
            tuple(short),
        )


def _single(data: ClientData) -> Iterator[Finding]:
    table = data.label_table()
    if table is None or (data.classes or 0) < 2:
        return
    single = [data.names[c] for c in ((table > 0).sum(1) == 1).nonzero().view(-1).tolist()]
    if single:
        yield Finding(
            _CODE,
            f"{len(single)} of {len(data)} clients have examples of one class only: {named(single)}",
            "their updates say nothing about other classes, and pull the head away from them",
            "if the split is not meant to be like this, another data.partition (dirichlet with a larger alpha)",
            tuple(single),
        )


def _shared(data: ClientData) -> Iterator[Finding]:
    held = data.indices
    owner = torch.repeat_interleave(torch.arange(len(data)), data.offsets.diff())
    step = max(1, -(-len(held) // MOST))
    held, owner = held[::step], owner[::step]
    first: dict[int, int] = {}
    clients: set[int] = set()
    examples = 0
    for key, client in zip(_hashes(data.x, held), owner.tolist(), strict=True):
        other = first.setdefault(key, client)
        if other != client:
            examples += 1
            clients |= {other, client}
    if examples:
        names = [data.names[c] for c in sorted(clients)]
        yield Finding(
            _CODE,
            f"{examples:,} examples are equal to one of another client{_partly(step)}: {named(names)}",
            "often a join gone wrong: the same record counts twice, and clients look more alike than they are",
            "remove the duplicates before splitting, or keep them where the clients really share them",
            tuple(names),
        )


def _leaked(data: ClientData) -> Iterator[Finding]:
    if data.test is None:
        return
    n = _length(data.test[1])
    step = max(1, -(-n // MOST))
    test = set(_hashes(data.test[0], torch.arange(0, n, step)))
    held = data.indices[:: max(1, -(-len(data.indices) // MOST))]
    leaked = sum(key in test for key in _hashes(data.x, held))
    if leaked:
        yield Finding(
            _CODE,
            f"{leaked:,} training examples are also in the test set of {n:,}",
            "accuracy then measures memory",
            "split off the test set after removing duplicates",
        )


def _partly(step: int) -> str:
    return "" if step == 1 else f" (looked at every {step}th)"


def _hashes(x: Batch, indices: Tensor) -> Iterator[int]:
    """A 64-bit hash of each example's bytes, a few thousand examples at a time."""
    for chunk in torch.split(indices, 4096):
        parts = [x] if isinstance(x, Tensor) else [x[key] for key in sorted(x)]
        rows = [part.index_select(0, chunk).reshape(len(chunk), -1).contiguous().numpy() for part in parts]
        for i in range(len(chunk)):
            digest = xxhash.xxh3_64()
            for row in rows:
                digest.update(row[i].tobytes())
            yield digest.intdigest()


def _length(y: Batch) -> int:
    return len(y) if isinstance(y, Tensor) else len(next(iter(y.values())))
