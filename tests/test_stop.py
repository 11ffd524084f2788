"""When a run ends before its last round, and what goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import config, runs
from lamina.stop import Stop

SMALL = ["rounds=12", "cohort=2", "local.epochs=1", "engine=loop"]


def run(out: Path, *keys: str) -> Any:
    loaded = config.load("quickstart", [*SMALL, *keys])
    return runs.fit(config.build(loaded), loaded.rounds, out, config=loaded, progress=False)


def test_bytes_end_a_run_in_the_round_that_reaches_them(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "rounds=5")
    each = whole.records[0].total_up + whole.records[0].total_down
    made = run(tmp_path / "cut", f"stop.bytes={2 * each + 1}")
    assert made.info["status"] == "done"
    assert made.info["rounds_done"] == 3
    assert made.info["stopped"] == f"{3 * each:,} bytes >= {2 * each + 1:,}"
    assert [row.accuracy for row in made.records] == [row.accuracy for row in whole.records[:3]]


def test_accuracy_ends_a_run_only_in_a_round_in_sync(tmp_path: Path) -> None:
    keys = ("method=fedlama", "method.phi=2", "stop.accuracy=0.2")
    made = run(tmp_path / "run", *keys)
    last = made.records[-1]
    assert last.in_sync
    assert last.accuracy >= 0.2
    assert all(row.accuracy < 0.2 for row in made.records[:-1] if row.in_sync)


def test_whoever_goes_on_wants_more_than_was_reached(tmp_path: Path) -> None:
    """A condition that holds already ends no run; the others still do. What is made is what was made without a stop."""
    whole = run(tmp_path / "whole", "rounds=6")
    made = run(tmp_path / "run", "rounds=6", "stop.accuracy=0.0")
    assert made.info["rounds_done"] == 1
    again = runs.resume(tmp_path / "run", 6, progress=False)
    assert again.info["rounds_done"] == 6
    assert "stopped" not in again.info
    assert again.info["final_sha256"] == whole.info["final_sha256"]


def test_minutes_count_the_time_of_the_run() -> None:
    row = lamina.folder.row_of({"in_sync": True, "total_up": 0, "total_down": 0})
    assert not Stop(minutes=2).reached(row, False, 119.9)
    assert Stop(minutes=2).reached(row, False, 120.0) == {"minutes": "2.0 minutes >= 2"}


def test_the_networks_minutes_are_its_own() -> None:
    row = lamina.folder.row_of({"in_sync": True, "total_up": 0, "total_down": 0, "network_seconds": 61.0})
    assert "network_minutes" in Stop(network_minutes=1).reached(row, False, 0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("accuracy", 1.1),
        ("bytes", "much"),
        ("bytes", 0),
        ("minutes", 0),
        ("network_minutes", -1),
        ("bytes", "3 apples"),
    ],
)
def test_an_impossible_condition_is_refused(key: str, value: Any) -> None:
    with pytest.raises(lamina.ConfigError) as caught:
        Stop(**{key: value})
    assert caught.value.where == f"stop.{key}"


def test_an_unknown_condition_is_refused_with_what_was_meant() -> None:
    with pytest.raises(lamina.ConfigError, match="E102") as caught:
        Stop.of({"acuracy": 0.5})
    assert caught.value.remedy == "did you mean 'accuracy'?"
