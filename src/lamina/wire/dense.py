"""Dense: every (kept) entry of every tensor present. Mask: where bool tensors are True."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lamina.errors import ConfigError
from lamina.wire import index
from lamina.wire.codec import Context, Selecting, Selection, Support, everything, some
from lamina.wire.container import refuse
from lamina.wire.values import CHOICES, EXACT, NONE, Vectors, named


@dataclass(frozen=True)
class Dense(Selecting):
    """Every entry; under a mask the kept ones and the mask's id.

    Args:
        values: "fp32" raw (other dtypes raw in their own) | "lossless" compressed, the same bits, against
            `Context.reference` where that is smaller | "fp16" | "bf16" | "int8" blocks of 256 with one scale | "int4"
            blocks of 64 | "sign" with one scale per tensor | "ring:B" integers mod 2**B in int64 tensors, B bits each,
            not compressed: the sums of secure aggregation.
    """

    values: str = "fp32"

    def __post_init__(self) -> None:
        check_values(self.values)

    @property
    def lossless(self) -> bool:
        return self.values in EXACT

    @property
    def indices(self) -> frozenset[int]:
        return frozenset({index.DENSE, index.MASK_ID})

    def foresee(self, support: Support, context: Context) -> Selection:
        return everything(support)


@dataclass(frozen=True)
class Mask(Selecting):
    """Bool tensors by where they are True: an index section, the smallest of all codings, and no values."""

    @property
    def values(self) -> str:
        return NONE

    @property
    def lossless(self) -> bool:
        return True

    @property
    def indices(self) -> frozenset[int]:
        return index.CHOSEN | {index.DENSE, index.MASK_ID}

    def foresee(self, support: Support, context: Context) -> None:
        return None

    def select(self, support: Support, vectors: Vectors) -> Selection:
        for x in vectors:
            refuse(x.dtype != torch.bool, f"Mask: cannot send {x.dtype}, only torch.bool tensors")
        return some(support, [np.flatnonzero(x.numpy()) for x in vectors])


def check_values(values: str) -> None:
    if not isinstance(values, str) or named(values) is None:
        raise ConfigError(f"values={values!r}: expected one of {', '.join(CHOICES)}")


def check_density(density: float) -> None:
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not (number and 0 < density <= 1):
        raise ConfigError(f"density={density!r}: expected 0 < density <= 1 (a share, not a percentage)")
