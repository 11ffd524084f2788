"""The short forms of benchmarks/soak/byzantine.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from soak import ROWS, Row, byzantine

MINE = [r for r in ROWS if r.id in ("S5", "S6")]


@pytest.mark.parametrize("row", MINE, ids=lambda row: row.name)
def test_short(row: Row) -> None:
    result = row.run(True)
    assert result.met, f"{row.name}: {result.figure}, expected: {row.goal}"


def test_an_undefended_run_is_lost() -> None:
    """Else the rows above would show nothing."""
    with byzantine.settled():
        base = byzantine.mean("digits", "none", 0, "mean", 1, 10)
        for attack in ("scale", "sign_flip", "one_layer"):
            assert base - byzantine.mean("digits", attack, 4, "mean", 1, 10) > 0.3, attack


def test_every_rule_stands_with_eight_of_twenty() -> None:
    """Their preconditions hold in the table, so its figures are theirs."""
    for defence, (rule, _) in byzantine.DEFENCES.items():
        for f in (0, *byzantine.TOLD):
            made = rule(f, "client-0")
            assert made == "mean" or made.expect(byzantine.CLIENTS) is None, defence
