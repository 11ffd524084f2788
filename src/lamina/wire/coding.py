"""What a value coding is: how the entries that travel become bytes. One vector (1-d tensor) per tensor present."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lamina.errors import WireError
from lamina.wire.container import Buffer, Reader

Vectors: TypeAlias = list[Tensor]
Dtypes: TypeAlias = Sequence[torch.dtype]

FLOATING = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


class Coding(Protocol):
    """One way of writing vectors. `counts` are their lengths.

    Attributes:
        id: in the header.
        elementwise: every entry is coded for itself: `cast` says what becomes of it.
        reference_id: of the reference without which the section cannot be read; empty if it needs none.
    """

    id: int
    elementwise: bool = False
    reference_id: bytes = b""

    def check(self, dtypes: Dtypes) -> None:
        """ConfigError for a dtype that a sender cannot have coded."""
        return

    def encode(self, vectors: Vectors) -> list[Buffer]: ...
    def decode(self, reader: Reader, counts: Sequence[int], dtypes: Dtypes) -> Vectors: ...
    def transmit(self, vectors: Vectors) -> Vectors:
        """decode(encode(vectors)), bit for bit."""
        return [self.cast(x) for x in vectors]

    def cast(self, x: Tensor) -> Tensor:
        """What becomes of the entries of `x`, when each is coded for itself."""
        return x

    def size(self, counts: Sequence[int], dtypes: Dtypes) -> int | None:
        """Length of the section, when it does not depend on the data."""
        ...

    def split(self, size: int, counts: Sequence[int], dtypes: Dtypes) -> list[int]:
        """Bytes per tensor of a section of `size` bytes: its own ones, and its share of planes by entries."""
        ...


def only(dtypes: Dtypes, allowed: frozenset[torch.dtype] | set[torch.dtype]) -> None:
    for dtype in dtypes:
        if dtype not in allowed:
            raise WireError(f"values of another kind than the schema's {dtype}", code="E344")


def parts(counts: Sequence[int]) -> list[slice]:
    """Where each vector lies when they are joined."""
    ends = list(accumulate(counts))
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
