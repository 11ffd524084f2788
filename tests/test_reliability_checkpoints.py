"""The short forms of the rows in benchmarks/soak/checkpoints.py: killed, damaged, cut off, interrupted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import soak.checkpoints
from soak import ROWS, Row

MINE = [row for row in ROWS if row.id in ("R1", "R2", "R3", "R4", "R5", "R6", "R18", "R22")]
QUICK = ("R1:fedlama", "R2", "R3", "R5", "R6:full", "R18", "R22:once")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes by fork, and /proc")


def quick(row: Row) -> bool:
    return row.id in QUICK or row.name in QUICK


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=() if quick(row) else pytest.mark.slow) for row in MINE]
)
def test_row(row: Row) -> None:
    result = row.run(True)
    assert result.met, result


def test_every_row_of_checkpoints_is_tried() -> None:
    assert {row.id for row in MINE} == {"R1", "R2", "R3", "R4", "R5", "R6", "R18", "R22"}
    assert soak.checkpoints.METHODS.keys() == {row.variant for row in MINE if row.id == "R1"}
