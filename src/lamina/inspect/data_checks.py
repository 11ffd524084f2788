"""What `lamina inspect` says of data: four things that are legitimate, and often a mistake (W310)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import xxhash
from torch import Tensor

from lamina.data import ClientData
from lamina.data.transform import Batch
from lamina.inspect.checks import Finding, named

MOST = 500_000  # examples that are remembered; of larger sets those with certain hashes, so that copies stay together
_CODE = "W310"


def of_data(data: ClientData, batch_size: int | None) -> Iterator[Finding]:
    """Args: batch_size: of local training; None: all of a client's examples."""
    yield from _short(data, batch_size)
    yield from _single(data)
    yield from _copied(data)


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


def _copied(data: ClientData) -> Iterator[Finding]:
    """Examples of one client that another has, or the test set."""
    step, known = one_in(data), set[int]()
    if data.test is not None:
        known = {key for key in _hashes(data.test[0], torch.arange(_length(data.test[1]))) if not key % step}
    owners = torch.repeat_interleave(torch.arange(len(data)), data.offsets.diff())
    first: dict[int, int] = {}
    clients: set[int] = set()
    shared = leaked = 0
    for key, client in zip(_hashes(data.x, data.indices), owners.tolist(), strict=True):
        if key % step:
            continue
        leaked += key in known
        other = first.setdefault(key, client)
        if other != client:
            shared += 1
            clients |= {other, client}
    among = "" if step == 1 else f" of the one in {step} that were looked at"
    if shared:
        names = [data.names[c] for c in sorted(clients)]
        yield Finding(
            _CODE,
            f"{shared:,} examples{among} are equal to one of another client: {named(names)}",
            "often a join gone wrong: the same record counts twice, and clients look more alike than they are",
            "remove the duplicates before splitting, or keep them where the clients really share them",
            tuple(names),
        )
    if data.test is not None and leaked:
        yield Finding(
            _CODE,
            f"{leaked:,} training examples{among} are also in the test set of {_length(data.test[1]):,}",
            "accuracy then measures memory",
            "split off the test set after removing duplicates",
        )


def one_in(data: ClientData) -> int:
    """Of how many examples one is compared with others. Which they are is in their bytes: two copies are or are not."""
    most = max(len(data.indices), 0 if data.test is None else _length(data.test[1]))
    return max(1, -(-most // MOST))


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
