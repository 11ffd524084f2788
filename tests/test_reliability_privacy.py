"""The short forms of the rows of the reliability table about privacy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("cryptography")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from soak import ROWS, Row
from soak import privacy as _rows  # noqa: F401  # registers them

MINE = [row for row in ROWS if row.id == "S10"]


@pytest.mark.parametrize("row", MINE, ids=lambda row: row.name)
def test_a_row_meets_its_goal(row: Row) -> None:
    result = row.run(True)
    assert result.met, f"{result.figure}: {result.notes}"
