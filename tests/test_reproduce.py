"""`lamina reproduce` on a recipe of three small arms: what is run, what is not run again, what is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lamina import cli, reproduce, runs
from lamina.errors import ConfigError, StorageError
from lamina.folder import Row
from lamina.recipes import RECIPES, Claim, Extra, Recipe, Table, Variant
from lamina.recipes.recipe import cheaper, higher
from lamina.runs import Run
from lamina.terminal import Quiet


def _extra(made: Mapping[str, Sequence[Run]]) -> Extra:
    return Extra("## Runs\n\nhow many", {"runs": {label: len(own) for label, own in made.items()}})


SMALL = Variant(
    base={
        "rounds": 4,
        "evaluate_every": 2,
        "cohort": 3,
        "engine": "loop",
        "model": {"name": "mlp", "widths": [64, 12, 10]},
        "data": {"name": "digits", "clients": 6},
        "local": {"lr": 0.2, "momentum": 0.9, "epochs": 1},
    },
    arms={
        "FedAvg": {},
        "FedLAMA phi=2": {"method": {"name": "fedlama", "phi": 2}},
        "hot": {"local": {"lr": 1e30}},
    },
    claims=(
        Claim("FedLAMA stays close.", "table 1", higher("FedLAMA phi=2", "FedAvg", within=0.5)),
        Claim("FedLAMA costs less.", "table 2", cheaper("FedLAMA phi=2", 0.999)),
        Claim("Hot is better.", "nowhere", higher("hot", "FedAvg")),
    ),
    floor=0.2,
    why="twice chance",
    size="seconds",
    scaled="everything",
    extra=_extra,
)
TOY = Recipe(
    name="toy",
    title="FedLAMA on the digits",
    paper="none",
    arxiv=None,
    source="none",
    compares="three arms",
    dataset="digits",
    published=replace(SMALL, scaled=""),
    scaled=SMALL,
    differs=("it is a toy",),
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(RECIPES, "toy", TOY)
    monkeypatch.setenv("LAMINA_RUNS", str(tmp_path / "runs"))


def lamina(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["reproduce", *arguments])


def table(tmp_path: Path, name: str = "toy-scaled") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "runs" / f"{name}.json").read_text())
    return found


def run(tmp_path: Path, **options: Any) -> reproduce.Report:
    given: dict[str, Any] = {"scaled": True, "seeds": [0], "arms": None, "watcher": Quiet()} | options
    return reproduce.reproduce(
        given.get("recipe", TOY), given["scaled"], given["seeds"], given["arms"], tmp_path / "runs", tmp_path / "runs",
        given["watcher"], None,  # type: ignore[arg-type]  # the digits are not fetched
    )  # fmt: skip


def test_every_arm_and_seed_has_a_run_folder_and_the_table_says_what_came_out(tmp_path: Path) -> None:
    result = lamina("toy", "--scaled", "--seeds", "0,1")
    assert result.exit_code == 0, result.output
    for arm in ("FedAvg", "FedLAMA-phi=2", "hot"):
        for seed in (0, 1):
            assert (tmp_path / "runs" / "toy-scaled" / arm / f"seed-{seed}" / "run.json").is_file()
    found = table(tmp_path)
    fedavg, fedlama = found["arms"]["FedAvg"], found["arms"]["FedLAMA phi=2"]
    finals = [o["accuracy"] for o in fedavg["runs"]]
    assert fedavg["accuracy"]["mean"] == pytest.approx(sum(finals) / 2)
    assert fedavg["accuracy"]["deviation"] == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5)  # n - 1 = 1
    assert fedavg["bytes_up_relative"] == 1.0
    ups = [sum(o["bytes_up"] for o in arm["runs"]) for arm in (fedlama, fedavg)]
    assert fedlama["bytes_up_relative"] == pytest.approx(ups[0] / ups[1])
    assert fedlama["bytes_up_relative"] < 1
    assert [o["seed"] for o in fedavg["runs"]] == [0, 1]
    assert finals[0] != finals[1]
    markdown = (tmp_path / "runs" / "toy-scaled.md").read_text()
    assert "lamina reproduce toy --scaled --seeds 0,1" in markdown
    assert "scaled: everything" in markdown
    assert "floor: FedAvg must reach 20.00 % (twice chance)" in markdown
    assert "how many" in markdown
    assert found["extra"] == {"runs": {"FedAvg": 2, "FedLAMA phi=2": 2, "hot": 2}}


def test_the_table_equals_the_run_folders(tmp_path: Path) -> None:
    run(tmp_path)
    found = table(tmp_path)["arms"]["FedLAMA phi=2"]["runs"][0]
    made = Run.open(found["path"])
    assert made.final is not None
    assert (found["accuracy"], found["accuracy_round"]) == (made.final.accuracy, made.final.round)
    assert (found["bytes_up"], found["bytes_down"]) == (made.info["bytes_up"], made.info["bytes_down"])
    assert found["final_sha256"] == made.info["final_sha256"]


def test_an_arm_that_diverges_is_a_result_and_not_a_crash(tmp_path: Path) -> None:
    result = lamina("toy", "--scaled")
    assert result.exit_code == 0, result.output
    found = table(tmp_path)
    (hot,) = found["arms"]["hot"]["runs"]
    assert hot["diverged"] == 0
    assert hot["accuracy"] is None
    assert found["arms"]["hot"]["accuracy"] == {"mean": None, "deviation": None}
    assert "diverged at round 0" in (tmp_path / "runs" / "toy-scaled.md").read_text()
    assert found["claims"][2]["held"] is False
    assert found["claims"][0]["held"] is True


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    run(tmp_path)
    files = sorted((tmp_path / "runs" / "toy-scaled").rglob("run.json"))
    before = [file.stat().st_mtime_ns for file in files]
    first = table(tmp_path)
    run(tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert table(tmp_path) == first


class Stop(Quiet):
    """Presses Ctrl-C after so many rounds."""

    def __init__(self, after: int) -> None:
        self.left = after

    def round(self, row: Row) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_what_was_stopped_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    for after in (2, 4):  # in the first arm, then in the second
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", watcher=Stop(after))
    assert not (tmp_path / "parts" / "runs" / "toy-scaled.md").exists()
    run(tmp_path / "parts")
    whole, parts = (table(tmp_path / name)["arms"] for name in ("whole", "parts"))
    for label in whole:
        for one, other in zip(whole[label]["runs"], parts[label]["runs"], strict=True):
            for key in ("accuracy", "best", "bytes_up", "bytes_down", "rounds", "diverged", "final_sha256"):
                assert one[key] == other[key], (label, key)


def test_a_folder_with_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    other = replace(TOY, scaled=replace(SMALL, base={**SMALL.base, "cohort": 2}))
    with pytest.raises(StorageError, match="cohort") as caught:
        run(tmp_path, recipe=other)
    assert caught.value.code == "E402"
    longer = replace(TOY, scaled=replace(SMALL, base={**SMALL.base, "rounds": 6}))
    with pytest.raises(StorageError, match="rounds"):
        run(tmp_path, recipe=longer)


def test_arms_are_run_by_choice_and_stand_in_the_table_together(tmp_path: Path) -> None:
    run(tmp_path, arms=["FedLAMA phi=2"])
    assert list(table(tmp_path)["arms"]) == ["FedLAMA phi=2"]
    assert [claim["held"] for claim in table(tmp_path)["claims"]] == [None, None, None]
    assert "- not run: FedAvg, hot" in (tmp_path / "runs" / "toy-scaled.md").read_text()
    run(tmp_path, arms=["FedAvg"])
    assert list(table(tmp_path)["arms"]) == ["FedAvg", "FedLAMA phi=2"]


def test_below_the_floor_no_claim_is_judged(tmp_path: Path) -> None:
    high = replace(TOY, scaled=replace(SMALL, floor=0.9999))
    report = run(tmp_path, recipe=high)
    assert [claim["held"] for claim in report.data["claims"]] == [None, None, None]
    assert all("below the floor of 99.99 %" in claim["words"] for claim in report.data["claims"])
    assert "NOT reached, so no claim is judged" in "\n".join(report.lines)


def test_published_and_scaled_runs_lie_apart(tmp_path: Path) -> None:
    run(tmp_path, arms=["FedAvg"])
    run(tmp_path, scaled=False, arms=["FedAvg"])
    assert (tmp_path / "runs" / "toy" / "FedAvg" / "seed-0").is_dir()
    assert table(tmp_path, "toy")["command"] == "lamina reproduce toy --seeds 0"


def test_the_table_goes_where_out_says(tmp_path: Path) -> None:
    result = lamina("toy", "--scaled", "--arms", "FedAvg", "--out", str(tmp_path / "tables"), "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(tmp_path / "tables" / "toy-scaled.md")]
    assert (tmp_path / "tables" / "toy-scaled.json").is_file()
    assert not (tmp_path / "runs" / "toy-scaled.md").exists()


def test_json_ends_with_the_whole_table(tmp_path: Path) -> None:
    result = lamina("toy", "--scaled", "--arms", "FedAvg,hot", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows[-1]["event"] == "reproduced"
    assert {key: value for key, value in rows[-1].items() if key not in ("event", "markdown")} == table(tmp_path)
    assert sum(row["event"] == "begin" for row in rows) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tyo",), "did you mean 'toy'"),
        (("toy", "--arms", "FedLama"), "expected one of FedAvg, FedLAMA phi=2, hot"),
        (("toy", "--seeds", "0,x"), "whole numbers"),
        (("toy", "--seeds", "1,1"), "each once"),
    ],
)
def test_bad_input_names_the_remedy_and_runs_nothing(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = lamina(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "runs").exists()


def test_an_unknown_arm_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run(tmp_path, arms=["nobody"])


def test_a_failure_that_is_no_divergence_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(runs, "fit", full)
    with pytest.raises(StorageError, match="no space"):
        run(tmp_path)


def test_the_table_of_results_is_a_pure_function_of_the_runs(tmp_path: Path) -> None:
    report = run(tmp_path)
    made = [Run.open(o["path"]) for arm in report.data["arms"].values() for o in arm["runs"]]
    arms: dict[str, list[Run]] = {}
    for label, one in zip(report.data["arms"], made, strict=True):
        arms.setdefault(label, []).append(one)
    again = reproduce.written(TOY, True, [0], arms)
    assert again.lines == report.lines
    assert isinstance(Table({}, "FedAvg", 0.1, {}).arms, dict)


def test_files_of_entries_stand_in_the_table_without_their_folder() -> None:
    """A table is committed; where lamina lies on this machine is not its business."""
    for recipe in RECIPES.values():
        for scaled in (False, True):
            report = reproduce.written(recipe, scaled, [0], {})
            assert str(Path(reproduce.__file__).parent) not in json.dumps(report.data, default=str)
            assert str(Path(reproduce.__file__).parent) not in "\n".join(report.lines)
    assert any("parts.py:first" in json.dumps(dict(r.scaled.base)) for r in RECIPES.values())


def test_small_shares_of_bytes_are_not_rounded_to_nothing() -> None:
    outcome = reproduce.Outcome(0, 0.5, 1, 0.5, 40, 10**6, 2, 1.0, 0, None, False, None, "x")
    base = reproduce.Arm("FedAvg", (outcome._replace(bytes_up=10**6),))
    table = Table({"FedAvg": base, "sparse": reproduce.Arm("sparse", (outcome,))}, "FedAvg", 0.1, {})
    row = next(line for line in reproduce.results(table) if line.startswith("| sparse"))
    assert "| 40 B | 0.004 % | 1.000 MB | 100.0 % |" in row
