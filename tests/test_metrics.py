"""Metrics by name, against scikit-learn and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
from lamina import ClientData, ConfigError, Federation, LocalSGD
from lamina.config import build, load
from lamina.errors import LaminaError
from lamina.metrics import (
    METRICS,
    auc,
    balanced_accuracy,
    chosen,
    f1,
    mae,
    measured,
    per_class,
    r2,
    rmse,
    top5,
)

reference = pytest.importorskip("sklearn.metrics")


def drawn(n: int, classes: int, seed: int, ties: bool) -> tuple[Tensor, Tensor]:
    """Outputs and labels; with ties, outputs of few values, and every row twice with another label."""
    source = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=source)
    outputs = torch.randn(n, classes, generator=source) + 0.7 * nn.functional.one_hot(y, classes)
    if ties:
        outputs, y = outputs.round(), torch.randint(classes, (n,), generator=source)
        outputs[n // 2 :] = outputs[: n // 2 + n % 2].clone()
    return outputs, y


CASES = pytest.mark.parametrize(
    ("n", "classes", "seed", "ties"),
    [(n, classes, 10 * n + classes, ties) for n in (40, 501) for classes in (2, 3, 10) for ties in (False, True)],
)


@CASES
def test_accuracies_and_f1_are_those_of_scikit_learn(n: int, classes: int, seed: int, ties: bool) -> None:
    outputs, y = drawn(n, classes, seed, ties)
    said = outputs.argmax(1)
    labels = sorted(set(y.tolist()))
    expected = reference.recall_score(y, said, labels=labels, average=None, zero_division=0)
    found = per_class(outputs, y)
    assert {c: x for c, x in found.items() if x is not None} == pytest.approx(
        dict(zip(map(str, labels), expected, strict=True)), abs=1e-15
    )
    assert balanced_accuracy(outputs, y) == pytest.approx(np.mean(expected), abs=1e-15)
    assert f1(outputs, y) == pytest.approx(reference.f1_score(y, said, average="macro", zero_division=0), abs=1e-15)


@CASES
def test_auc_is_that_of_scikit_learn(n: int, classes: int, seed: int, ties: bool) -> None:
    outputs, y = drawn(n, classes, seed, ties)
    likely = outputs.double().softmax(1).round(decimals=12)  # what is equal but for rounding is a tie
    expected = (
        reference.roc_auc_score(y, likely[:, 1])
        if classes == 2
        else reference.roc_auc_score(y, likely, multi_class="ovr", average="macro")
    )
    assert auc(outputs, y) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_one_output_of_two_classes_is_a_score(ties: bool) -> None:
    """As with a sigmoid: [n] or [n, 1], targets 0 and 1 as floats."""
    outputs, y = drawn(200, 2, 3, ties)
    score, wanted = outputs[:, 1], y.float()
    expected = reference.roc_auc_score(y, score)
    assert auc(score, wanted) == pytest.approx(expected, abs=1e-12)
    assert auc(score[:, None], wanted) == auc(score, y) == auc(score, wanted)
    both = torch.stack([score, -score], 1), torch.stack([wanted, wanted], 1)
    assert auc(*both) == pytest.approx(reference.roc_auc_score(both[1], both[0]), abs=1e-12)


@pytest.mark.parametrize("classes", [6, 20])
def test_top5_is_that_of_scikit_learn(classes: int) -> None:
    outputs, y = drawn(300, classes, classes, ties=False)
    expected = reference.top_k_accuracy_score(y, outputs, k=5, labels=range(classes))
    assert top5(outputs, y) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("columns", [(), (1,), (3,)])
def test_errors_of_a_regression_are_those_of_scikit_learn(columns: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(4)
    y = 100 + torch.randn(77, *columns, generator=source)
    outputs = y + torch.randn(77, *columns, generator=source)
    for own, theirs in (
        (mae, reference.mean_absolute_error),
        (rmse, reference.root_mean_squared_error),
        (r2, reference.r2_score),
    ):
        assert own(outputs, y) == pytest.approx(theirs(y.double(), outputs.double()), rel=1e-12)


def test_by_hand() -> None:
    """Scores 1, 2, 2, 3 with classes 0, 0, 1, 1: of four pairs three are in order and one is a tie: 3.5 / 4.

    Predictions 0, 1, 1, 2 of 0, 0, 1, 3: 2 TP / (2 TP + FP + FN) is 2 / (2 + 0 + 1) for class 0, 2 / (2 + 1 + 0) for
    class 1, and 0 for 2 (predicted, never a label) and 3 (a label, never predicted).
    """
    assert auc(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])) == 3.5 / 4
    outputs, y = nn.functional.one_hot(torch.tensor([0, 1, 1, 2]), 4).float(), torch.tensor([0, 0, 1, 3])
    assert f1(outputs, y) == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)
    assert per_class(outputs, y) == {"0": 0.5, "1": 1.0, "2": None, "3": 0.0}
    assert balanced_accuracy(outputs, y) == 0.5


def test_of_equal_outputs_the_first_counts_as_larger() -> None:
    """As where argmax takes the first of equals: of seven equal outputs five are among the first five."""
    assert top5(torch.zeros(7, 7), torch.arange(7)) == 5 / 7


def test_the_order_of_small_probabilities_is_kept() -> None:
    """softmax(-800) is 0 in float64 and would tie with softmax(-900). Class 0 does tie, nobody is of class 2: 3 / 4."""
    outputs = torch.tensor([[0.0, -900.0, 0.0], [0.0, -800.0, 0.0]])
    assert METRICS["auc"](outputs, torch.tensor([0, 1])) == 0.75


def test_what_is_undefined_has_no_value_and_enters_no_mean() -> None:
    outputs, _ = drawn(30, 4, 1, ties=False)
    y = torch.arange(30) % 3  # nobody is of class 3
    found = measured(chosen(NAMES), outputs, y)
    assert found["per_class/3"] is None
    assert found["balanced_accuracy"] == pytest.approx(sum(found[f"per_class/{c}"] for c in range(3)) / 3)  # type: ignore[misc]
    likely = outputs.double().softmax(1)
    each = [reference.roc_auc_score(y == c, likely[:, c]) for c in range(3)]
    assert found["auc"] == pytest.approx(np.mean(each))
    one = measured(chosen(NAMES), outputs, torch.zeros(30, dtype=torch.int64))
    assert one["auc"] is None
    assert [name for name, value in one.items() if value is None] == [
        "per_class/1",
        "per_class/2",
        "per_class/3",
        "auc",
    ]
    assert r2(torch.randn(5), torch.full((5,), 0.1)) is None
    assert auc(torch.tensor([float("nan"), 1.0]), torch.tensor([0, 1])) is None
    assert measured({"mine": lambda output, y: float("inf")}, None, None) == {"mine": None}


NAMES = ["per_class", "balanced_accuracy", "auc", "f1"]


def test_nothing_is_broadcast() -> None:
    """[n, 1] against [n] would be n x n differences."""
    x = torch.randn(6)
    assert mae(x[:, None], x) == 0.0
    for metric in (mae, rmse, r2):
        with pytest.raises(ConfigError, match=r"expected outputs and targets of one shape; got outputs \[6, 2\]"):
            metric(torch.zeros(6, 2), x)


def test_a_text_is_as_many_examples_as_it_has_characters() -> None:
    outputs, y = drawn(24, 5, 9, ties=False)
    grid = outputs.view(4, 6, 5).movedim(2, 1), y.view(4, 6)
    for name in NAMES:
        assert METRICS[name](*grid) == METRICS[name](outputs, y)


# ---- chosen by name


def test_metrics_are_chosen_by_name_or_are_functions() -> None:
    own = cases.small
    assert chosen(["auc", "f1"]) == {"auc": auc, "f1": f1}
    assert chosen({"area": "auc", "mine": own}) == {"area": auc, "mine": own}
    assert chosen(None) == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["acu"], "metrics.acu: expected one of per_class, .*; got 'acu'"),
        ({"a": 3}, r"metrics\['a'\]=3: expected a function"),
        ("auc", r"metrics='auc': expected a list of names"),
        (["mae"], r"metrics.mae: expected outputs and targets of one shape; got outputs \[8, 4\]"),
        (["top5"], "metrics.top5: the model has 4 outputs, so the label is always among the first 5"),
    ],
)
def test_metrics_that_do_not_fit_are_refused_before_any_round(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cases.federation(metrics=given)


def test_labels_of_other_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected labels from 0 to 3, got one of 0 to 4"):
        per_class(torch.zeros(5, 4), torch.arange(5))
    with pytest.raises(ConfigError, match="expected outputs"):
        auc({"logits": torch.zeros(5, 4)}, torch.arange(5))


def test_trying_them_changes_no_bit() -> None:
    """`Odd` leaves a value behind in every forward pass."""
    plain, _ = cases.finish(cases.federation(), 2)
    watched, _ = cases.finish(cases.federation(metrics=NAMES), 2)
    assert cases.everything(plain) == cases.everything(watched)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def test_a_regression_is_measured_by_name() -> None:
    """The model is w x with w near 2 after some steps: the residuals are those of its own outputs."""
    x = torch.linspace(-1, 1, 20)[:, None]
    data = ClientData.from_clients({"a": (x, 2 * x[:, 0])}, test=(x, 2 * x[:, 0]))

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output[:, 0] - y).square().mean()

    fed = Federation(
        Line, data, loss=loss, metrics=["mae", "rmse", "r2"], engine="loop", local=LocalSGD(lr=0.5, batch_size=None)
    )
    (*_, (state, record)) = fed.run(3)
    off = 2 - float(state.params["w"])
    assert record.metrics["mae"] == pytest.approx(off * float(x.abs().mean()), rel=1e-5)
    assert record.metrics["rmse"] == pytest.approx(record.loss**0.5, rel=1e-5)  # type: ignore[operator]
    assert record.metrics["r2"] == pytest.approx(1 - (off / 2) ** 2, rel=1e-5)


# ---- in a config, a run folder and a terminal

FILE = """
engine = "loop"
rounds = 1
model = "mine.py:model"
data = "mine.py:data"
"""
MINE = """
import torch
import lamina

def model():
    return torch.nn.Linear(2, 3)

def data():
    x, y = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
    return lamina.ClientData.from_clients({"a": (x, y), "b": (x, y)}, test=(x, y))

def worst(outputs, targets):
    return None

def pair(outputs, targets):
    return {"first": 0.5, 1: torch.tensor(0.25)}
"""


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    path = tmp_path / "exp.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ('metrics = ["auc", "f1"]', {"auc": "auc", "f1": "f1"}),
        ('metrics = { area = "auc" }', {"area": "auc"}),
        ('metrics = "auc"', {"auc": "auc"}),
        ('[metrics]\narea = "auc"', {"area": "auc"}),
    ],
)
def test_a_file_names_metrics_in_a_list_or_a_table(line: str, names: dict[str, str], exp: Path) -> None:
    exp.write_text(f"{FILE}{line}\n", encoding="utf-8")
    config = load(exp, env={})
    assert config.metrics == names
    assert config.origin(f"metrics.{next(iter(names))}").startswith("exp.toml:")
    assert build(config).metrics.keys() == names.keys()


def test_a_list_holds_entries_too_and_stands_on_a_command_line(exp: Path) -> None:
    exp.write_text(f'{FILE}metrics = ["mine.py:worst", "f1"]\n', encoding="utf-8")
    config = load(exp, ["metrics=[auc]"], {})
    assert list(config.metrics) == ["worst", "f1", "auc"]
    assert config.metrics["worst"] == f"{exp.parent.resolve() / 'mine.py'}:worst"


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("metrics=[acu]", "did you mean 'auc'"),
        ("metrics.a=acu", "metrics.a: expected one of"),
        ("metrics.a=mine.py:nothing", "no such file"),
        ("metrics=[3]", "E103"),
        ("metrics=3", "expected a table"),
        ("metrics=[mae]", "metrics.mae: expected outputs and targets of one shape"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_with_its_origin(argument: str, said: str, exp: Path) -> None:
    with pytest.raises(LaminaError) as raised:
        build(load(exp, [argument], {}))
    assert said in str(raised.value)
    assert "command line, argument 2" in str(raised.value.where)
    assert raised.value.code in ("E103", "E106")


def test_what_is_undefined_is_null_in_the_file_and_said_in_the_terminal(exp: Path) -> None:
    named = [f"metrics.{name}={exp.parent / 'mine.py'}:{name}" for name in ("worst", "pair")]
    config = load(exp, ["metrics=[per_class,auc]", *named], {})
    run = build(config).fit(1, exp.parent / "out", progress=False, config=config)
    text = (exp.parent / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    found = json.loads(text)["metrics"]
    assert found["per_class/2"] is None
    assert found["worst"] is None
    assert (found["pair/first"], found["pair/1"]) == (0.5, 0.25)
    assert 0 <= found["auc"] <= 1
    said = run.summary()
    assert "worst undefined" in said
    assert ", 1 undefined" in said
    assert "pair 0.2500 (1) to 0.5000 (first)" in said
