"""Who takes part in a round, and how many of them must."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lamina.errors import expect, is_number, is_whole, meant
from lamina.random import generator


@dataclass(frozen=True)
class Faults:
    """What a round puts up with.

    Args:
        reply_deadline_s: seconds after which clients that are elsewhere are waited for no longer; None: none.
        min_replies: messages that must be accepted, or the round fails, >= 1.
    """

    reply_deadline_s: float | None = None
    min_replies: int = 1

    def __post_init__(self) -> None:
        fine = self.reply_deadline_s is None or (is_number(self.reply_deadline_s, 0) and self.reply_deadline_s > 0)
        where = "faults.reply_deadline_s"
        expect(fine, f"reply_deadline_s={self.reply_deadline_s}: expected a number of seconds > 0", where=where)
        fine = is_whole(self.min_replies, 1)
        where = "faults.min_replies"
        expect(fine, f"min_replies={self.min_replies}: expected a whole number >= 1", code="E112", where=where)

    @classmethod
    def of(cls, table: Mapping[str, Any], cohort: int) -> Faults:
        """Raises ConfigError: E102 for an unknown key, E112 for more replies than there are clients in a round."""
        known = [f.name for f in fields(cls)]
        for key in table:
            remedy = meant(key, known) or f"known are {', '.join(known)}"
            expect(key in known, f"faults: {key!r} is unknown", code="E102", where=f"faults.{key}", remedy=remedy)
        made = cls(**table)
        expect(
            made.min_replies <= cohort,
            f"min_replies={made.min_replies}: a round has {cohort} clients",
            code="E112",
            where="faults.min_replies",
            remedy="a larger cohort, or fewer replies",
        )
        return made


def draw(seed: int, key: int, clients: int, m: int) -> tuple[int, ...]:
    """m of the clients, uniformly without replacement, ascending.

    Args:
        key: the round that stands for the whole hold: ``round - round % hold``.

    For up to half of the clients, positions are drawn one by one until m different ones are there, so the cost follows
    m, not the population; for more, the first m of a permutation are taken.
    """
    if m >= clients:
        return tuple(range(clients))
    source = generator(seed, "cohort", key)
    if 2 * m > clients:
        return tuple(sorted(torch.randperm(clients, generator=source)[:m].tolist()))
    chosen: set[int] = set()
    while len(chosen) < m:
        chosen.add(int(torch.randint(clients, (1,), generator=source)))
    return tuple(sorted(chosen))
