"""Learning-rate factors by round, in numbers."""

from __future__ import annotations

import pytest

from lamina import ConfigError, LocalSGD
from lamina.schedule import parse


@pytest.mark.parametrize(
    ("spec", "rounds", "factors"),
    [
        ("constant", 3, [1, 1, 1]),
        ("exp:0.5", 4, [1, 0.5, 0.25, 0.125]),
        ("step:1,3:0.1", 5, [1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", 4, [1, 0.8535533905932737, 0.5, 0.1464466094067263]),
        ("cosine:2", 4, [1, 0.5, 0, 0]),
        ("warmup:4", 6, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("warmup:2 exp:0.5", 4, [0.5, 0.5, 0.25, 0.125]),
        ("warmup:2 step:2:0.1 exp:0.5", 3, [0.5, 0.5, 0.025]),
    ],
)
def test_factors_by_round(spec: str, rounds: int, factors: list[float]) -> None:
    schedule = parse(spec)
    assert [schedule(t, rounds) for t in range(rounds)] == pytest.approx(factors, abs=1e-15)


WRONG = [
    ("exp", ["", "0", "1.5", "nan", "x"]),
    ("step", ["", "3", ":0.1", "3:0", "a:0.1"]),
    ("cosine", ["", "0", "x"]),
    ("warmup", ["", "0", "1.5"]),
]


@pytest.mark.parametrize(
    "spec",
    ["", " ", "cosin", "constant:1", "exp:0.9 nonsense", *(f"{name}:{x}" for name, values in WRONG for x in values)],
)
def test_what_is_no_schedule_is_refused_with_the_forms_allowed(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"schedule=.*expected") as caught:
        parse(spec)
    assert caught.value.code == "E103"
    assert caught.value.where == "local.schedule"


def test_the_rate_of_a_round_is_the_base_times_the_factor() -> None:
    local = LocalSGD(lr=0.5, schedule="exp:0.5")
    assert [local.rate(t, 3) for t in range(3)] == [0.5, 0.25, 0.125]
    assert LocalSGD(lr=0.5, schedule=lambda t, n: t / n).rate(3, 4) == 0.375


def test_a_bad_schedule_is_refused_at_construction() -> None:
    with pytest.raises(ConfigError, match="schedule='fast'"):
        LocalSGD(schedule="fast")
