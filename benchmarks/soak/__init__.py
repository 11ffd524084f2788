"""The rows of the reliability table. A file per area; each row says its goal, does its work, and says what came out.

@row("R1", "fedavg", goal="200 of 200 resumed runs end with the same model", minutes=15)
def killed_at_random(short: bool) -> Result: ...
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """Of one row."""

    figure: str  # what came out, e.g. "200 of 200"
    met: bool
    notes: str = ""


class Row(NamedTuple):
    id: str  # "R1"
    variant: str  # "fedavg"; "" where there is one only
    goal: str
    minutes: float  # that it takes in full, at most 60
    run: Callable[[bool], Result]  # True: the short form, seconds, as in `make test`
    area: str  # the file here that it is in

    @property
    def name(self) -> str:
        return f"{self.id}:{self.variant}" if self.variant else self.id


ROWS: list[Row] = []


def row(id: str, *variants: str, goal: str, minutes: float) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Registers a function as a row, or as one for each variant, which it is given first if it takes two arguments."""

    def register(run: Callable[..., Result]) -> Callable[..., Result]:
        both = len(signature(run).parameters) > 1
        area = run.__module__.rpartition(".")[2]
        for variant in variants or ("",):
            asked = (lambda v: lambda s: run(v, s) if both else run(s))(variant)
            ROWS.append(Row(id, variant, goal, minutes, asked, area))
        return run

    return register


def every() -> list[Row]:
    """All rows of all files here, by number."""
    for file in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        importlib.import_module(f"soak.{file.stem}")
    return sorted(ROWS, key=lambda r: (r.id[0], int(r.id[1:]), r.variant))
