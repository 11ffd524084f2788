"""Errors carry a code, a place and a remedy, and give the exit code."""

from __future__ import annotations

import pytest

from lamina.errors import ConfigError, DataError, LaminaError, RunError, StorageError, WireError, expect


def test_an_error_prints_code_message_place_and_remedy() -> None:
    error = ConfigError("mu=-1: expected a number >= 0", where="method.mu", remedy="use 0 for FedAvg")
    assert str(error) == "E101  mu=-1: expected a number >= 0  [method.mu]\n      use 0 for FedAvg"
    assert str(RunError("it stopped")) == "E301  it stopped"


@pytest.mark.parametrize(
    ("family", "code", "exit_code"),
    [
        (ConfigError, "E101", 2),
        (DataError, "E201", 3),
        (RunError, "E301", 4),
        (WireError, "E340", 4),
        (StorageError, "E401", 5),
    ],
)
def test_every_family_has_a_default_code_and_an_exit_code(family: type[LaminaError], code: str, exit_code: int) -> None:
    error = family("what")
    assert isinstance(error, LaminaError)
    assert (error.code, error.exit_code) == (code, exit_code)


def test_the_first_digit_of_the_code_is_the_exit_code_less_one() -> None:
    assert LaminaError("what", code="E501").exit_code == 6


def test_a_wrong_value_is_also_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)


def test_expect_raises_only_when_its_condition_is_false() -> None:
    expect(True, "never said")
    with pytest.raises(ConfigError) as caught:
        expect(False, "said", code="E103", where="here", remedy="do that")
    assert (caught.value.code, caught.value.message) == ("E103", "said")
    assert (caught.value.where, caught.value.remedy) == ("here", "do that")
