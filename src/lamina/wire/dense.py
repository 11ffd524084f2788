"""Dense: every (kept) entry of every tensor present."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.errors import ConfigError
from lamina.wire import index
from lamina.wire.codec import Context, Selecting, Selection, Support, everything
from lamina.wire.values import EXACT, VALUES


@dataclass(frozen=True)
class Dense(Selecting):
    """Every entry; under a mask the kept ones and the mask's id.

    Args:
        values: "fp32" raw (other dtypes raw in their own) | "lossless" compressed, the same bits |
            "fp16" | "bf16" | "int8" blocks of 256 with one scale | "sign" with one scale per tensor.
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


def check_values(values: str) -> None:
    if values not in VALUES:
        raise ConfigError(f"values={values!r}: expected one of {', '.join(VALUES)}")


def check_density(density: float) -> None:
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not (number and 0 < density <= 1):
        raise ConfigError(f"density={density!r}: expected 0 < density <= 1 (a share, not a percentage)")
