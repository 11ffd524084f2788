"""Who takes part in a round: who is there, who of them is drawn, and how many must answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from lamina.errors import ConfigError, expect, is_number, is_whole, meant
from lamina.per_client import rows
from lamina.random import generator, stream

_PATIENCE = 10_000  # rounds

There: TypeAlias = Callable[[int, int], bool]  # (round, client) -> whether the client is available in that round


@dataclass(frozen=True)
class Faults:
    """What a round puts up with.

    Args:
        reply_deadline_s: seconds after which clients that are elsewhere are waited for no longer; None: none.
        min_replies: messages that must be accepted: a number >= 1, or a share of the cohort, 0 < share <= 1.0.
        on_quorum: what a round with fewer does: "fail", which ends the run, or "skip": the model stays as it was, and
            so do its clients.
        over_select: so many times the cohort is asked, >= 1, and the first of them in the schedule's order are used
            until there is a cohort; of clients that are elsewhere, the first that answer.
        rest_rounds: rounds in which a client that gave no answer is not drawn, >= 0.
        norm: bounds on the length of each layer's update: "off", "fixed:2", "clip:8x", "median", "adaptive:0.5" or
            "reject:20x", see `lamina.norms`. It changes the result.
    """

    reply_deadline_s: float | None = None
    min_replies: int | float = 1
    on_quorum: str = "fail"
    over_select: float = 1.0
    rest_rounds: int = 0
    norm: str = "off"

    def __post_init__(self) -> None:
        fine = self.reply_deadline_s is None or (is_number(self.reply_deadline_s, 0) and self.reply_deadline_s > 0)
        where = "faults.reply_deadline_s"
        expect(fine, f"reply_deadline_s={self.reply_deadline_s}: expected a number of seconds > 0", where=where)
        least = self.min_replies
        fine = is_whole(least, 1) or (isinstance(least, float) and 0 < least <= 1)
        said = f"min_replies={least}: expected a whole number >= 1, or a share of the cohort, 0 < share <= 1.0"
        expect(fine, said, code="E112", where="faults.min_replies")
        said = f"on_quorum={self.on_quorum!r}: expected 'fail' or 'skip'"
        expect(self.on_quorum in ("fail", "skip"), said, code="E103", where="faults.on_quorum")
        said = f"over_select={self.over_select}: expected a number >= 1, e.g. 1.3"
        fine = is_number(self.over_select, 1) and self.over_select < math.inf
        expect(fine, said, code="E112", where="faults.over_select")
        said = f"rest_rounds={self.rest_rounds}: expected a whole number >= 0"
        expect(is_whole(self.rest_rounds, 0), said, code="E112", where="faults.rest_rounds")

    def needed(self, cohort: int) -> int:
        """Messages that a round of so many clients needs."""
        if isinstance(self.min_replies, float):
            return max(1, math.ceil(self.min_replies * cohort - 1e-9))
        return self.min_replies

    def asked(self, cohort: int, clients: int) -> int:
        """Clients that are asked where a cohort is wanted."""
        return min(clients, math.ceil(self.over_select * cohort - 1e-9))

    @classmethod
    def of(cls, table: Mapping[str, Any], cohort: int) -> Faults:
        """Raises ConfigError: E102 for an unknown key, E112 for more replies than there are clients in a round."""
        known = [f.name for f in fields(cls)]
        for key in table:
            remedy = meant(key, known) or f"known are {', '.join(known)}"
            expect(key in known, f"faults: {key!r} is unknown", code="E102", where=f"faults.{key}", remedy=remedy)
        made = cls(**table)
        expect(
            made.needed(cohort) <= cohort,
            f"min_replies={made.min_replies}: a round has {cohort} clients",
            code="E112",
            where="faults.min_replies",
            remedy="a larger cohort, or fewer replies",
        )
        return made


def draw(seed: int, key: int, clients: int, m: int, there: There | None = None) -> tuple[int, ...]:
    """m of the clients, uniformly without replacement, ascending; fewer, down to none, where fewer are available.

    Args:
        key: the round that stands for the whole hold: ``round - round % hold``.
        there: who is available; None: everybody.

    For up to half of the clients, positions are drawn one by one until m different ones are there, so the cost follows
    m, not the population; for more, the first m of a permutation are taken.
    """
    if there is None and m >= clients:
        return tuple(range(clients))
    source = generator(seed, "cohort", key)
    if 2 * m > clients:
        order = torch.randperm(clients, generator=source).tolist()
        return tuple(sorted([c for c in order if there is None or there(key, c)][:m]))
    chosen: set[int] = set()
    absent: set[int] = set()
    while len(chosen) < m and 2 * (len(chosen) + len(absent)) <= clients:
        c = int(torch.randint(clients, (1,), generator=source))
        if c not in chosen and c not in absent:
            (chosen if there is None or there(key, c) else absent).add(c)
    if len(chosen) < m and there is not None:  # few are left: one after the other, instead of by chance
        rest = [c for c in torch.randperm(clients, generator=source).tolist() if c not in chosen and c not in absent]
        chosen.update([c for c in rest if there(key, c)][: m - len(chosen)])
    return tuple(sorted(chosen))


def draw_there(seed: int, key: int, clients: int, m: int, there: There) -> tuple[int, ...]:
    """The same among those who are available. A round in which nobody is waits for the next one in which somebody is,
    at most 10,000 rounds; then nobody is drawn."""
    for later in range(_PATIENCE):
        drawn = draw(seed, key, clients, m, lambda t, c, later=later: there(t + later, c))  # type: ignore[misc]
        if drawn:
            return drawn
    return ()


def availability(said: str, names: Sequence[str], seed: int) -> There | None:
    """Who is available when.

    Args:
        said: "always"; "random:P", each client in each round with probability P; "day:SHARE:PERIOD", each client for
            this share of a period of so many rounds, which begins at a time of its own; or "file:PATH", a CSV file with
            columns `client`, `from`, `to`: the rounds, first and last, in which a client is there; who is not named in
            it is always there.

    Raises:
        ConfigError: E103 for anything else.
    """
    kind, _, rest = said.partition(":")
    where = "availability"
    if said == "always":
        return None
    if kind == "random":
        p = _share(rest, said)
        return lambda t, c: float(torch.rand((), generator=generator(seed, "available", t, c), dtype=torch.float64)) < p
    if kind == "day":
        first, _, last = rest.partition(":")
        p = _share(first, said)
        fine = last.isdecimal() and int(last) >= 1
        expect(fine, f"{said!r}: expected day:SHARE:PERIOD with a period of rounds >= 1", code="E103", where=where)
        period = int(last)

        def awake(t: int, c: int) -> bool:
            start = float(torch.rand((), generator=generator(seed, "available", 0, c), dtype=torch.float64))
            return (t / period + start) % 1.0 < p

        return awake
    if kind == "file" and rest:
        spans = _spans(Path(rest), names)
        return lambda t, c: c not in spans or any(first <= t <= last for first, last in spans[c])
    known = "always, random:P, day:SHARE:PERIOD or file:PATH"
    raise ConfigError(f"{said!r}: expected {known}", code="E103", where=where)


def _share(text: str, said: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    expect(0 < share <= 1, f"{said!r}: expected a share, 0 < share <= 1", code="E103", where="availability")
    return share


def _spans(path: Path, names: Sequence[str]) -> dict[int, list[tuple[int, int]]]:
    positions = {name: i for i, name in enumerate(names)}
    spans: dict[int, list[tuple[int, int]]] = {}
    for where, client, row in rows(path, names, "availability", ("from", "to"), needed=("from", "to")):
        first, last = row.get("from", ""), row.get("to", "")
        fine = first.isdecimal() and last.isdecimal() and int(first) <= int(last)
        expect(fine, f"{first!r} to {last!r}: expected rounds, first and last", code="E103", where=where)
        spans.setdefault(positions[client], []).append((int(first), int(last)))
    return spans


def draw_each(key: bytes, t: int, clients: int, share: float) -> tuple[int, ...]:
    """Every client by itself with this probability (to 2^-53), so any number of them, also none; ascending.

    Args:
        key: must stay secret where the draw has to.
    """
    if share >= 1:
        return tuple(range(clients))
    bits = np.frombuffer(stream(key, "cohort", t, 8 * clients), "<u8") >> 11
    return tuple(np.flatnonzero(bits < round(share * 2**53)).tolist())
