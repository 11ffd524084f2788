"""Runs side by side: seeds folded, splits checked, bytes to a target, the Pareto front, and the tables of it."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lamina import cli
from lamina.compare import bytes_to, compare, deviation, mean, pareto
from lamina.comparison import as_csv, as_latex, as_markdown, as_text
from lamina.config import build, load
from lamina.errors import ConfigError
from lamina.folder import Row
from lamina.runs import Run, fit
from lamina.tabular import commas, escaped, inert, latex, markdown
from lamina.terminal import Column, table

SMALL = ("engine=loop", "model.widths=[64, 12, 10]", "data.clients=6", "cohort=3", "local.epochs=1")


def make(path: Path, *arguments: str, rounds: int = 1) -> Run:
    config = load("quickstart", [*SMALL, f"rounds={rounds}", *arguments], {})
    return fit(build(config), rounds, path, config=config, progress=False)


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """FedAvg and FedLAMA, two rounds, seeds 0 and 1."""
    top = tmp_path_factory.mktemp("seeded") / "runs"
    names = [(seed, method) for seed in (0, 1) for method in ("fedavg", "fedlama")]
    return [
        make(top / f"00{i}-{method}", f"method={method}", f"seed={seed}", rounds=2)
        for i, (seed, method) in enumerate(names, start=1)
    ]


# ---- splits


def test_comparing_needs_the_same_split(tmp_path: Path) -> None:
    first, second = make(tmp_path / "1", rounds=8), make(tmp_path / "2", "method=fedlama", "method.phi=4", rounds=8)
    rows = compare([first, second])
    assert rows[1]["bytes_up"] < rows[0]["bytes_up"]
    assert rows[1]["vs_first"] == pytest.approx(rows[0]["bytes_total"] / rows[1]["bytes_total"])
    assert rows[0]["split_sha256"] == rows[1]["split_sha256"]
    other = make(tmp_path / "3", "data.seed=1", rounds=1)
    with pytest.raises(ConfigError, match="another split"):
        compare([first, other])
    assert len(compare([first, other], force=True)) == 2


def test_a_centralised_run_stands_beside_federated_ones_on_the_same_examples(tmp_path: Path) -> None:
    federated, central = make(tmp_path / "1", rounds=1), make(tmp_path / "2", "method=centralised", rounds=1)
    rows = compare([federated, central])
    assert [row["partition"] for row in rows] == ["dirichlet:0.5", "pooled"]
    assert len(compare([central, federated])) == 2
    other = make(tmp_path / "3", "data.seed=1", rounds=1)
    with pytest.raises(ConfigError, match="another split"):
        compare([central, federated, other])
    central.info["pool_sha256"] = "0"
    with pytest.raises(ConfigError, match="2 has other examples than 1"):
        compare([federated, central])
    assert len(compare([federated, central], force=True)) == 2


def test_the_same_split_of_other_examples_is_another(tmp_path: Path) -> None:
    first, second = make(tmp_path / "1", rounds=1), make(tmp_path / "2", rounds=2)
    assert "same split yes" in said(compare([first, second]))
    second.info["pool_sha256"] = "0"
    with pytest.raises(ConfigError, match="2 has other examples than 1"):
        compare([first, second])
    second.info["engine"] = "processes"
    rows = compare([first, second], force=True)
    assert "same split NO" in said(rows)
    assert "same engine yes" in said(rows)
    assert "same rounds NO (1, 2)" in said(rows)
    assert [row["rounds"] for row in rows] == [1, 2]
    assert " rounds " in as_text(rows, None)[0]
    second.info["engine"] = "threads"
    assert "same engine NO" in said(compare([first, second], force=True))


def said(rows: list[dict[str, Any]]) -> str:
    return as_markdown(rows)[-1]


# ---- seeds


def test_runs_that_differ_only_in_the_seed_are_one_row(seeded: list[Run]) -> None:
    rows = compare(seeded)
    assert [(row["method"], row["seeds"], row["n"]) for row in rows] == [("fedavg", [0, 1], 2), ("fedlama", [0, 1], 2)]
    a, b = (run.final.accuracy for run in (seeded[0], seeded[2]) if run.final is not None)
    assert a is not None
    assert b is not None
    assert rows[0]["accuracy"] == pytest.approx((a + b) / 2)
    assert rows[0]["accuracy_deviation"] == pytest.approx(abs(a - b) / 2**0.5)
    assert rows[0]["bytes_up"] == seeded[0].info["bytes_up"]
    assert isinstance(rows[0]["bytes_up"], int)
    assert rows[0]["runs"] == [str(seeded[0].path), str(seeded[2].path)]
    assert rows[0]["final_sha256"] == [seeded[0].info["final_sha256"], seeded[2].info["final_sha256"]]
    assert "same init yes" in said(rows)
    assert "± is the deviation over 2 seeds (n - 1)" in said(rows)
    assert re.search(r"0\.\d{4} ± 0\.\d{4}", as_text(rows, None)[1])


def test_a_second_run_of_a_seed_is_a_row_of_its_own(seeded: list[Run], tmp_path: Path) -> None:
    again = make(tmp_path / "again", "method=fedavg", "seed=0", rounds=2)
    assert [row["seeds"] for row in compare([seeded[0], again, seeded[2]])] == [[0, 1], [0]]


def test_a_seed_that_was_stopped_early_is_not_averaged_with_the_others(seeded: list[Run]) -> None:
    stopped = Run.open(seeded[2].path)
    stopped.info |= {"status": "interrupted", "rounds_done": 1}
    rows = compare([seeded[0], stopped])
    assert [row["status"] for row in rows] == ["done", "interrupted"]
    assert "status" in as_text(rows, None)[0]


def test_seeds_that_each_stopped_where_they_were_good_enough_are_one_row(seeded: list[Run]) -> None:
    early = Run.open(seeded[2].path)
    early.info |= {"rounds_done": 1}
    (row,) = compare([seeded[0], early])
    assert (row["n"], row["rounds"]) == (2, 1.5)


def test_runs_of_other_settings_are_not_folded_and_the_table_says_which(tmp_path: Path) -> None:
    made = [make(tmp_path / str(i), f"local.lr={lr}", f"seed={i}") for i, lr in enumerate((0.1, 0.3))]
    rows = compare(made)
    assert [row["settings"] for row in rows] == [{"local.lr": 0.1}, {"local.lr": 0.3}]
    assert "lr=0.3" in as_text(rows, None)[2]
    assert "same init NO" in said(rows)  # other seeds


def test_runs_that_put_up_with_something_else_are_not_folded(tmp_path: Path) -> None:
    made = [make(tmp_path / str(i), f"faults.min_replies={n}", f"seed={i}") for i, n in enumerate((1, 3))]
    assert [row["settings"] for row in compare(made)] == [{"faults.min_replies": 1}, {"faults.min_replies": 3}]


def test_a_run_without_a_config_is_a_row_of_its_own(seeded: list[Run], tmp_path: Path) -> None:
    fed = build(load("quickstart", SMALL, {}))
    bare = [fit(fed, 1, tmp_path / name, progress=False) for name in ("a", "b")]
    assert [row["n"] for row in compare(bare)] == [1, 1]


def test_mean_and_deviation() -> None:
    """(1 + 2 + 6) / 3 = 3; ((-2)^2 + (-1)^2 + 3^2) / 2 = 7."""
    assert mean([1, 2, 6]) == 3
    assert deviation([1, 2, 6]) == pytest.approx(7**0.5)
    assert deviation([1]) is None
    assert mean([1, None]) is None
    assert mean([2**60, 2**60 + 2]) == 2**60 + 1


# ---- target, Pareto


def rows_of(*accuracies: float | None, waits: int | None = None) -> Run:
    """A run whose round t has sent 10 (t + 1) bytes up and 5 (t + 1) down."""
    row = Row(0, True, None, 1.0, None, None, {}, 1.0, 0.1, 3, 0, 4, 4, 10, 5, 0, 0, 0, 0, 0.1)
    records = [
        row._replace(round=t, accuracy=a, in_sync=t != waits, total_up=10 * (t + 1), total_down=5 * (t + 1))
        for t, a in enumerate(accuracies)
    ]
    return Run(Path("x"), {"personal": False, "status": "done", "rounds_done": 0, "rounds": 0}, records, None, None)


def test_bytes_to_a_target_are_those_of_the_first_tested_round_in_sync() -> None:
    assert bytes_to(rows_of(0.1, 0.5, 0.6), 0.5) == (1, 30)
    assert bytes_to(rows_of(0.1, 0.5, 0.6, waits=1), 0.5) == (2, 45)
    assert bytes_to(rows_of(0.1, None, 0.6), 0.5) == (2, 45)
    assert bytes_to(rows_of(0.1, 0.2), 0.5) is None


def test_the_front_holds_what_nothing_beats() -> None:
    """B is beaten by A (as accurate, fewer bytes), D by C; two alike are both on it."""
    figures = [(0.8, 10), (0.8, 12), (0.9, 20), (0.7, 25), (None, 1), (0.9, 20)]
    rows = [{"accuracy": a, "loss": None, "bytes_total": b} for a, b in figures]
    assert pareto(rows) == [True, False, True, False, False, True]
    by_loss = [{"accuracy": None, "loss": loss, "bytes_total": 1} for loss in (0.5, 0.4)]
    assert pareto(by_loss) == [False, True]


def test_the_target_is_said_in_the_table_and_can_be_named(seeded: list[Run]) -> None:
    """95 % of the best row, rounded down to a hundredth."""
    rows = compare(seeded)
    best = max(row["best"] for row in rows)
    assert 0.95 * best - 0.01 < rows[0]["target"] <= 0.95 * best
    assert f"to {rows[0]['target']:g}: bytes both ways" in said(rows)
    easy = compare(seeded, target=0.01)
    assert [row["reached"] for row in easy] == [2, 2]
    assert easy[0]["to_target"] == sum(seeded[0].records[0][i] for i in (15, 16))
    assert easy[0]["to_target_round"] == 0
    hard = compare(seeded, target=1)
    assert [row["to_target"] for row in hard] == [None, None]
    tops = sorted(run.best.accuracy or 0 for run in seeded[::2] if run.best is not None)
    assert tops[0] < tops[1]
    assert "1 of 2" in as_text(compare(seeded[::2], target=tops[1]), None)[1]


@pytest.mark.parametrize("target", [0, -0.5, 1.5, 75, float("nan")])
def test_a_target_that_is_no_share_is_refused(seeded: list[Run], target: float) -> None:
    with pytest.raises(ConfigError, match=r"expected 0 < target <= 1") as error:
        compare(seeded, target=target)
    assert error.value.remedy == "0.75 is 75 %"


# ---- tables

ROWS: list[dict[str, Any]] = [
    {
        "run": f"runs/cifar10-resnet20/{i:03d}-{method}", "runs": [], "seeds": [0, 1, 2], "n": 3, "method": method,
        "codec": codec, "status": "done", "settings": settings, "rounds": 200, "accuracy": accuracy,
        "accuracy_deviation": 0.0031, "loss": 0.7, "loss_deviation": 0.01, "accuracy_round": 199, "best": 0.79,
        "personal_accuracy": None, "bytes_up": up, "bytes_down": 2_180_443_918, "bytes_total": up + 2_180_443_918,
        "vs_first": 4_360_000_000 / (up + 2_180_443_918), "up_vs_first": up / 2_180_000_000, "seconds": 3912.0,
        "personal": False, "partition": "iid", "split_sha256": "5a1c", "pool_sha256": "y",
        "initial_sha256": ["x", "y", "z"], "torch": "2.13.0", "engine": "loop", "bits": "one thread", "target": 0.75,
        "to_target": up, "reached": 3, "pareto": True,
    }
    for i, (method, codec, settings, accuracy, up) in enumerate(
        [
            ("fedavg", "fp32", {}, 0.78411, 2_180_000_000),
            ("fedlama+fedadam", "topk:0.01:global:sign / fp16", {"method.0.phi": 4}, 0.77, 64_201_336),
        ],
        start=1,
    )
]  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_table_drops_columns_and_never_cuts_a_number(width: int) -> None:
    lines = as_text(ROWS, width)
    assert all(len(line) <= width for line in lines)
    assert "…" not in "".join(lines)
    cells = {word for line in as_text(ROWS, None) for word in line.split()}
    for line in lines[1:3]:
        assert set(line.split()) <= cells
    assert "0.064 GB" in lines[2]
    assert "0.7841 ± 0.0031" in lines[1]


def test_latex_has_the_rules_of_booktabs_one_unit_and_the_best_in_bold() -> None:
    lines = as_latex(ROWS)
    assert [rule for rule in ("toprule", "midrule", "bottomrule") if f"  \\{rule}" in lines] == [
        "toprule", "midrule", "bottomrule",
    ]  # fmt: skip
    titles, first, second = (re.split(r" & ", line.strip().removesuffix(r" \\")) for line in (lines[3], *lines[5:7]))
    assert titles == [
        "method", "codec", "settings", "accuracy", "up (GB)", "down (GB)", "total (GB)", "to 0.75 (GB)",
    ]  # fmt: skip
    assert first[3] == r"\textbf{0.7841 $\pm$ 0.0031}"
    assert second[3] == r"0.7700 $\pm$ 0.0031"
    assert first[4:] == ["2.180", r"\textbf{2.180}", "4.360", "2.180"]
    assert second[4:] == [r"\textbf{0.064}", r"\textbf{2.180}", r"\textbf{2.245}", r"\textbf{0.064}"]
    assert lines[1] == r"\begin{tabular}{lllrrrrr}"
    assert all(line.startswith("%") for line in lines[9:])


def test_latex_sets_every_letter_as_it_is() -> None:
    assert escaped(r"50 % of a_b & {c} #1 $x^2 ~ \d") == (
        r"50 \% of a\_b \& \{c\} \#1 \$x\textasciicircum{}2 \textasciitilde{} \textbackslash{}d"
    )
    assert latex([Column("a", ["1"])], notes=["two\nlines"])[-1] == "% two lines"


def test_csv_has_all_digits_and_no_formula(seeded: list[Run]) -> None:
    rows = compare(seeded)
    rows[0]["method"] = '=HYPERLINK("http://x")'
    found = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert found[0]["method"] == '\'=HYPERLINK("http://x")'
    assert float(found[0]["accuracy"]) == rows[0]["accuracy"]
    assert int(found[1]["bytes_total"]) == rows[1]["bytes_total"]
    assert found[0]["seeds"] == "0 1"
    assert found[0]["n"] == "2"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1"])
def test_no_cell_begins_a_formula(text: str) -> None:
    assert inert(text).startswith("'")
    assert inert(text).replace("'", "") == text
    (title, row) = csv.reader(io.StringIO(commas([{text: text}], [text]), newline=""))
    assert title == row == [inert(text)]
    assert commas([{"a": [text, "b"], "b": -0.5, "c": None}], ["b", "c"]) == "b,c\r\n-0.5,\r\n"


def test_markdown_keeps_cells_with_spaces_and_bars_whole() -> None:
    lines = markdown([Column("a  b", ["x  y", "p|q"], left=True), Column("n", ["1", ""])])
    assert lines == ["| a  b | n |", "| --- | ---: |", "| x  y | 1 |", "| p\\|q |  |"]


def test_columns_of_none_are_not_in_the_table() -> None:
    assert table([Column("a", ["1"])], 80) == ["  a", "  1"]


# ---- the command


def lamina(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["compare", *arguments])


def test_compare_folds_seeds_and_takes_a_target(seeded: list[Run]) -> None:
    paths = [str(run.path) for run in seeded]
    rows = [json.loads(line) for line in lamina(*paths, "--json", "--target", "0.01").stdout.splitlines()]
    assert [row["to_target_round"] for row in rows] == [0, 0]
    assert lamina(*paths, "--latex").stdout.startswith("% \\usepackage{booktabs}")
    refused = lamina(*paths, "--target", "75")
    assert refused.exit_code == 2
    assert "0.75 is 75 %" in refused.stderr
    both = lamina(*paths, "--md", "--csv")
    assert both.exit_code == 2
    assert "--md, --csv: expected one of them" in both.stderr
