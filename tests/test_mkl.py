"""The switch for MKL on AMD processors. What it does is done in processes of their own: it cannot be undone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

import cases
from lamina.engine import mkl
from lamina.errors import ConfigError


def child(code: str, value: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, mkl.VARIABLE: value},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def works() -> bool:
    try:
        return mkl._function()() == 0
    except ConfigError:
        return False


@pytest.mark.skipif(not works(), reason="no AMD processor under an MKL that can be asked")
def test_where_it_is_asked_for_mkl_is_switched_and_still_right() -> None:
    code = "from lamina.engine import mkl; mkl.switch(); mkl.switch(); print(mkl._function()(), mkl.error() < 1e-5)"
    assert child(code, "amd") == "1 True"
    assert child(code, "") == "0 True"


def test_a_run_says_that_it_was_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(mkl.VARIABLE, raising=False)
    plain = mkl.label()
    monkeypatch.setenv(mkl.VARIABLE, "amd")
    assert mkl.label() == f"{plain}, MKL as on Intel"


def test_a_value_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(mkl.VARIABLE, "intel")
    with pytest.raises(ConfigError, match="expected 'amd'") as caught:
        cases.federation()
    assert caught.value.code == "E103"


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [("platform", "darwin", "Linux on x86-64"), ("cpuinfo", "GenuineIntel", "not AMD's"), ("symbol", "", "no MKL")],
)
def test_a_machine_that_cannot_says_why(part: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mkl.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(mkl.sys, "platform", value if part == "platform" else "linux")
    vendor = value if part == "cpuinfo" else "AuthenticAMD"
    monkeypatch.setattr(mkl.Path, "read_text", lambda self: vendor)
    if part == "symbol":
        monkeypatch.setattr(mkl, "_SYMBOL", "no_such_function")
    monkeypatch.setenv(mkl.VARIABLE, "amd")
    with pytest.raises(ConfigError, match=why) as caught:
        mkl.switch()
    assert caught.value.code == "E118"


def test_a_switch_after_which_products_are_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([0, 1])
    monkeypatch.setattr(mkl, "_function", lambda: lambda: next(answers))
    monkeypatch.setattr(mkl, "_overwrite", lambda function: None)
    monkeypatch.setattr(mkl, "error", lambda: 0.5)
    monkeypatch.setenv(mkl.VARIABLE, "amd")
    with pytest.raises(ConfigError, match="came out wrong"):
        mkl.switch()


def test_it_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(mkl, "_function", lambda: lambda: 1)
    monkeypatch.setattr(mkl, "_overwrite", done.append)
    monkeypatch.setenv(mkl.VARIABLE, "amd")
    mkl.switch()
    assert not done
