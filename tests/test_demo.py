"""The demonstration, on the digits and in few rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lamina import cli, demo
from lamina.errors import DataError


def test_the_demo_ends_in_a_comparison_and_says_where_the_runs_lie(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["demo", "--rounds", "8", "--data", "digits", "--run-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    (fedavg,) = [row for row in rows if row[1:3] == ["fedavg", "fp32"]]
    (fedlama,) = [row for row in rows if row[1:3] == ["fedlama", "fp32"]]
    assert (fedavg[0], fedlama[0]) == ("001", "002")
    infos = [
        json.loads((tmp_path / "demo-digits" / name / "run.json").read_text()) for name in ("001-fedavg", "002-fedlama")
    ]
    assert infos[0]["split_sha256"] == infos[1]["split_sha256"]
    assert infos[0]["initial_sha256"] == infos[1]["initial_sha256"]
    assert [info["options"]["evaluate_every"] for info in infos] == [demo.EVERY, demo.EVERY]
    share = 100 * infos[1]["bytes_up"] / infos[0]["bytes_up"]
    assert share < 100
    assert f"sent {share:.1f} % of FedAvg's uplink bytes" in " ".join(result.stdout.split())
    assert str(tmp_path / "demo-digits" / "001-fedavg") in " ".join(result.stdout.split())
    assert "keeps each cohort for 4 rounds, FedAvg draws one per round · one seed" in " ".join(result.stdout.split())


def test_the_demo_says_plainly_when_it_runs_on_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any) -> None:
        raise DataError("no source could give it", code="E220")

    monkeypatch.setattr(demo, "data_of", nothing)
    result = CliRunner().invoke(cli.app, ["demo", "--rounds", "2", "--run-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Fashion-MNIST cannot be had here, so this demo runs on scikit-learn's digits" in result.stdout
    assert (tmp_path / "demo-digits" / "002-fedlama" / "model.safetensors").is_file()
    said = " ".join(result.stdout.split())
    assert "has waited yet" in said
    assert "of FedAvg's uplink bytes" not in said


def test_the_demo_in_objects(tmp_path: Path) -> None:
    arguments = ["demo", "--rounds", "2", "--data", "digits", "--json", "--run-dir", str(tmp_path)]
    rows = [json.loads(line) for line in CliRunner().invoke(cli.app, arguments).stdout.splitlines()]
    assert [row["method"] for row in rows if row["event"] == "compare"] == ["fedavg", "fedlama"]
