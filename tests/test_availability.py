"""Who is there, and who of them is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lamina
from lamina.cohort import availability, draw

NAMES = tuple(f"c{i}" for i in range(40))


def federation(said: str, cohort: int = 3, method: lamina.Method | None = None) -> lamina.Federation:
    torch.manual_seed(0)
    data = {name: (torch.randn(4, 3), torch.randint(2, (4,))) for name in NAMES[:10]}
    return lamina.Federation(
        torch.nn.Linear(3, 2), lamina.ClientData.from_clients(data), method=method, cohort=cohort, engine="loop",
        availability=said,
    )  # fmt: skip


def test_only_who_is_there_is_drawn_and_everybody_there_when_they_are_few() -> None:
    for m in (1, 5, 20, 30, 40):
        for there in (range(0), range(3), range(18), range(40)):
            drawn = draw(0, 4, 40, m, lambda t, c, there=there: c in there)  # type: ignore[misc]
            assert len(drawn) == min(m, len(there))
            assert set(drawn) <= set(there)
            assert list(drawn) == sorted(drawn)


def test_each_of_those_there_is_drawn_equally_often() -> None:
    """5 of 20 there, drawn 2 at a time in 1,000 rounds: 400 times each, standard deviation 15."""
    counts = torch.zeros(20)
    for t in range(1000):
        counts[list(draw(0, t, 20, 2, lambda _, c: c % 4 == 0))] += 1
    assert (counts[::4] - 400).abs().max() < 75
    assert counts.sum() == 2000


def test_always_draws_as_ever() -> None:
    assert availability("always", NAMES, 0) is None
    assert draw(0, 7, 40, 4) == draw(0, 7, 40, 4, None)


def test_random_is_there_with_its_probability_and_always_the_same() -> None:
    there = availability("random:0.3", NAMES, 5)
    assert there is not None
    table = [[there(t, c) for c in range(40)] for t in range(50)]
    assert table == [[there(t, c) for c in range(40)] for t in range(50)]
    assert abs(sum(map(sum, table)) / 2000 - 0.3) < 0.04


def test_a_day_is_one_stretch_of_each_period() -> None:
    there = availability("day:0.25:24", NAMES, 1)
    assert there is not None
    for c in range(10):
        row = [there(t, c) for t in range(48)]
        assert row[:24] == row[24:]
        assert sum(row[:24]) == 6
        assert sum(row[t] != row[t - 1] for t in range(24)) == 2
    starts = {tuple(there(t, c) for t in range(24)) for c in range(40)}
    assert len(starts) > 10


def test_a_file_says_the_rounds(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("client,from,to\nc0,0,2\nc0,5,5\nc1,3,9\n")
    there = availability(f"file:{file}", NAMES, 0)
    assert there is not None
    assert [t for t in range(8) if there(t, 0)] == [0, 1, 2, 5]
    assert [t for t in range(8) if there(t, 1)] == [3, 4, 5, 6, 7]
    assert all(there(t, 2) for t in range(8))


@pytest.mark.parametrize(
    "said",
    ["", "often", "random:", "random:0", "random:1.5", "day:0.5", "day:0.5:0", "day:x:24", "file:", "file:none.csv"],
)
def test_anything_else_is_refused(said: str) -> None:
    with pytest.raises(lamina.ConfigError, match="E103"):
        availability(said, NAMES, 0)


@pytest.mark.parametrize("line", ["nobody,0,1", "c0,3,2", "c0,x,2", "c0,-1,2"])
def test_a_wrong_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(f"client,from,to\nc1,0,1\n{line}\n")
    with pytest.raises(lamina.ConfigError) as caught:
        availability(f"file:{file}", NAMES, 0)
    assert caught.value.where == f"availability, {file}:3"


def test_a_round_has_those_who_are_there_and_waits_where_nobody_is(tmp_path: Path) -> None:
    """Five are there in rounds 0 and 1, five in 3: round 2 has those of 3, and after that nobody ever comes."""
    file = tmp_path / "trace.csv"
    file.write_text("\n".join(["client,from,to", *[f"c{i},{3 * (i // 5)},{1 + 2 * (i // 5)}" for i in range(10)]]))
    rounds = federation(f"file:{file}", cohort=8).run(6)
    cohorts = [next(rounds)[1].cohort for _ in range(4)]
    assert cohorts == [tuple(range(5))] * 2 + [tuple(range(5, 10))] * 2
    with pytest.raises(lamina.RunError, match="E317"):
        next(rounds)


def test_a_cohort_that_is_kept_is_of_those_there_at_its_start() -> None:
    fed = federation("random:0.5", method=lamina.FedLAMA(phi=2))
    cohorts = [record.cohort for _, record in fed.run(4)]
    there = availability("random:0.5", NAMES[:10], 0)
    assert there is not None
    assert cohorts[0] == cohorts[1]
    assert all(there(0, c) for c in cohorts[0])
    assert all(there(2, c) for c in cohorts[2])
