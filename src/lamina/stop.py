"""When a run has reached what was wanted of it, before its last round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lamina.errors import expect, is_number, meant
from lamina.folder import Row, counts, standing
from lamina.units import SIZES, quantity


@dataclass(frozen=True)
class Stop:
    """Conditions, of which the first that holds after a round ends the run.

    Args:
        accuracy: at least so much, in [0, 1], in a round that was tested and in which no layer waits.
        bytes: at least so many, up and down, of all clients since the start: a number, or "1.5GB".
        minutes: at least so many, > 0, since the start, pauses between a stop and its `resume` left out. The only one
            that does not give the same bits on another day.
        network_minutes: the same on the virtual network's clock (see `lamina.network`).
    """

    accuracy: float | None = None
    bytes: float | str | None = None
    minutes: float | None = None
    network_minutes: float | None = None

    def __post_init__(self) -> None:
        fine = self.accuracy is None or (is_number(self.accuracy, 0) and self.accuracy <= 1)
        expect(fine, f"accuracy={self.accuracy}: expected 0 <= accuracy <= 1", code="E103", where="stop.accuracy")
        for name in ("minutes", "network_minutes"):
            value = getattr(self, name)
            fine = value is None or (is_number(value, 0) and value > 0)
            expect(fine, f"{name}={value}: expected a number > 0", code="E103", where=f"stop.{name}")
        expect(self._bytes is None or self._bytes > 0, "bytes=0: expected more", code="E103", where="stop.bytes")

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Stop:
        """Raises ConfigError E102 for an unknown key."""
        known = [f.name for f in fields(cls)]
        for key in table:
            remedy = meant(key, known) or f"known are {', '.join(known)}"
            expect(key in known, f"stop: {key!r} is unknown", code="E102", where=f"stop.{key}", remedy=remedy)
        return cls(**table)

    @property
    def _bytes(self) -> float | None:
        return None if self.bytes is None else quantity(self.bytes, SIZES, "stop.bytes")

    def reached(self, row: Row, personal: bool, seconds: float) -> dict[str, str]:
        """Name -> sentence of every condition that holds after this round, `seconds` after the start."""
        found: dict[str, str] = {}
        value = standing(row, personal) if counts(row) else None
        if self.accuracy is not None and value is not None and value >= self.accuracy:
            found["accuracy"] = f"accuracy {value:.4f} >= {self.accuracy:g}"
        total = row.total_up + row.total_down
        if self._bytes is not None and total >= self._bytes:
            found["bytes"] = f"{total:,} bytes >= {self._bytes:,.0f}"
        if self.minutes is not None and seconds >= 60 * self.minutes:
            found["minutes"] = f"{seconds / 60:.1f} minutes >= {self.minutes:g}"
        clock = row.network_seconds
        if self.network_minutes is not None and clock is not None and clock >= 60 * self.network_minutes:
            found["network_minutes"] = f"{clock / 60:.1f} minutes on the network >= {self.network_minutes:g}"
        return found
