"""The short forms of R8, R9, R10, R11, R13 and R17; that of R13:flower is in tests/flower."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from soak import ROWS, Row, admission
from soak import schedules as _rows  # noqa: F401  # registers R10

HERE = [r for r in ROWS if r.id in ("R8", "R9", "R10", "R11", "R13", "R17") and r.variant != "flower"]


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.name)
def test_a_row_meets_its_goal(row: Row) -> None:
    result = row.run(True)
    assert result.met, f"{result.figure}: {result.notes}"


def test_rows_notice_what_they_are_there_for() -> None:
    """A model with all clients is not that of the others, and a code that is in no event was not said."""
    oracle = admission.Oracle(lambda: admission.cases.case("fedavg", cohort="all", examples=admission.network.shared()))
    honest = admission.judged(admission.cases.case("fedavg", cohort="all", examples=admission.network.shared()))
    assert oracle.right(admission.HONEST, honest)
    assert not oracle.right(admission.SURVIVE, honest)
    assert not admission.said(honest, "E310", "cyd")
