"""Partitions: laws of all rules, then each rule's own."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.partition import MINIMUM, PARTITIONS, split
from lamina.errors import ConfigError

RULES = ("iid", "dirichlet:0.5", "dirichlet:0.5:balanced", "pathological:2", "quantity:0.5")


def sizes(parts: list[torch.Tensor]) -> list[int]:
    return [len(part) for part in parts]


def held(parts: list[torch.Tensor], labels: torch.Tensor) -> list[int]:
    """Number of classes by client."""
    return [len(labels[part].unique()) for part in parts]


# ---- laws of all rules


@settings(deadline=None, max_examples=60)
@given(
    rule=st.sampled_from(RULES),
    clients=st.integers(3, 30),
    n=st.integers(150, 400),
    classes=st.integers(2, 6),
    seed=st.integers(0, 2**70),
    skew=st.booleans(),
)
def test_every_example_belongs_to_exactly_one_client(rule, clients, n, classes, seed, skew):
    labels = torch.arange(n) % classes
    if skew:
        labels[: n // 2] = 0
    parts = split(rule, labels, clients, seed, n)
    assert len(parts) == clients
    assert min(sizes(parts)) >= 1
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))
    assert all(part.dtype == torch.int64 and bool((part.diff() > 0).all()) for part in parts)


@pytest.mark.parametrize("rule", RULES)
def test_a_split_is_a_function_of_the_seed(rule: str):
    labels = torch.arange(600) % 5
    one, same, other = (split(rule, labels, 8, seed, 600) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("rule", ["dirichlet:0.5", "dirichlet:0.5:balanced", "pathological:2"])
def test_the_names_of_the_labels_do_not_matter(rule: str):
    labels = torch.arange(300) % 5
    for one, other in zip(split(rule, labels, 7, 0, 300), split(rule, labels * 1000 + 3, 7, 0, 300), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rule", [*RULES, "dirichlet:0.01", "dirichlet:0.01:balanced", "quantity:0.01"])
def test_a_thousand_clients_take_less_than_two_seconds(rule: str):
    labels = torch.from_numpy(np.random.RandomState(0).randint(0, 10, 60_000))
    begin = time.perf_counter()
    split(rule, labels, 1000, 0, 60_000)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("rule", ["dirichlet:{}", "dirichlet:{}:balanced", "quantity:{}"])
@pytest.mark.parametrize("a", ["1e-300", "1e-4", "1e9", "1e308"])
def test_extreme_concentrations_still_split(rule: str, a: str):
    labels = torch.arange(1000) % 10
    parts = split(rule.format(a), labels, 20, 0, 1000)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))
    assert min(sizes(parts)) >= MINIMUM


def test_one_client_gets_all_and_as_many_clients_as_examples_get_one_each():
    labels = torch.arange(12) % 3
    for rule in ("iid", "dirichlet:0.5", "dirichlet:0.5:balanced", "pathological:1", "quantity:0.5"):
        assert sizes(split(rule, labels, 12, 0, 12)) == [1] * 12
    for rule in ("iid", "dirichlet:0.5", "dirichlet:0.5:balanced", "pathological:3", "quantity:0.5"):
        assert sizes(split(rule, labels, 1, 0, 12)) == [12]


# ---- each rule's own


def test_iid_clients_are_of_equal_size_to_one_example():
    assert sizes(split("iid", None, 4, 0, 10)) == [3, 3, 2, 2]


@pytest.mark.parametrize("rule", ["dirichlet:0.05", "quantity:0.05"])
def test_unequal_clients_have_ten_examples_or_their_fair_share(rule: str):
    labels = torch.arange(1000) % 10
    assert min(sizes(split(rule, labels, 50, 0, 1000))) == 10
    assert sizes(split(rule, labels, 250, 0, 1000)) == [4] * 250
    assert len(set(sizes(split(rule, labels, 50, 0, 1000)))) > 3


def test_a_client_with_its_fair_share_gets_nothing_of_further_classes():
    # Classes 0 and 1 are half of the data each; with so small an a one client takes all of class 0 and another
    # one all of class 1. Topping up then moves 10 examples to every poor client afterwards.
    labels = torch.arange(4000) // 2000
    parts = split("dirichlet:1e-4", labels, 4, 0, 4000)
    assert sorted(sizes(parts))[2:] == [1990, 1990]
    big = [set(labels[part].tolist()) for part in parts if len(part) > 100]
    assert big in ([{0}, {1}], [{1}, {0}])


def test_small_concentrations_leave_fewer_classes_per_client():
    labels = torch.arange(5000) % 10
    for form in ("dirichlet:{}", "dirichlet:{}:balanced"):
        few, many = (np.mean(held(split(form.format(a), labels, 50, 0, 5000), labels)) for a in (0.05, 100))
        assert few < 5
        assert many > 9.5


def test_balanced_clients_are_of_equal_size_whatever_the_concentration():
    labels = torch.arange(5000) % 10
    for a in ("0.01", "0.5", "100"):
        assert set(sizes(split(f"dirichlet:{a}:balanced", labels, 50, 0, 5000))) == {100}
    assert set(sizes(split("dirichlet:0.5:balanced", labels, 48, 0, 5000))) == {104, 105}


def test_balanced_clients_follow_their_prior_while_it_lasts():
    # With as many examples of every class as all clients together could want, and a large a, each client's labels are
    # near uniform: 400 examples of 4 classes, expected 100 +- 8.7 each (5 standard deviations allowed).
    labels = torch.arange(4000) % 4
    for part in split("dirichlet:1e6:balanced", labels, 10, 0, 4000):
        assert torch.bincount(labels[part], minlength=4).sub(100).abs().max() < 44


@settings(deadline=None, max_examples=60)
@given(clients=st.integers(1, 25), k=st.integers(1, 6), seed=st.integers(0, 1000))
def test_pathological_clients_hold_exactly_k_classes(clients, k, seed):
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate((90, 40, 40, 30, 60, 50))])
    if clients * k < 6:
        with pytest.raises(ConfigError, match="cannot hold all 6 classes"):
            split(f"pathological:{k}", labels, clients, seed, len(labels))
        return
    assert held(split(f"pathological:{k}", labels, clients, seed, len(labels)), labels) == [k] * clients


def test_pathological_shards_of_equal_classes_are_equal():
    labels = torch.arange(6000) % 10
    parts = split("pathological:2", labels, 100, 0, 6000)
    assert set(sizes(parts)) == {60}
    assert len({tuple(labels[part].unique().tolist()) for part in parts}) > 25  # of 45 possible pairs


# ---- what is refused


@pytest.mark.parametrize(
    ("spec", "clients", "words"),
    [
        ("dirichelt:0.5", 4, "did you mean 'dirichlet'"),
        ("zipf", 4, "known: iid, dirichlet:a"),
        ("", 4, "unknown partition ''"),
        ("iid:3", 4, "expected the form 'iid'"),
        ("dirichlet", 4, "expected the form 'dirichlet:a'.*e.g. dirichlet:0.5"),
        ("dirichlet:0.5:balnced", 4, "did you mean 'balanced'"),
        ("dirichlet:0.5:balanced:1", 4, "expected the form"),
        ("dirichlet:0", 4, "a=0: expected a finite number > 0"),
        ("dirichlet:-1:balanced", 4, "a=-1: expected a finite number > 0"),
        ("dirichlet:nan", 4, "a=nan"),
        ("dirichlet:inf", 4, "a=inf"),
        ("dirichlet:much", 4, "a=much"),
        ("quantity:0", 4, "b=0"),
        ("pathological:0", 4, "k=0: expected a whole number >= 1"),
        ("pathological:1.5", 4, "k=1.5: expected a whole number"),
        ("pathological:4", 4, "k=4: expected 1 <= k <= 3, the number of classes"),
        ("pathological:1", 2, "cannot hold all 3 classes.*k >= 2"),
        ("pathological:3", 30, "need 90 shards: the classes have examples for 30"),
        ("column:site", 4, "needs a column of values"),
        ("iid", 31, "clients=31: expected 1 <= clients <= 30"),
        ("iid", 0, "clients=0: expected 1 <= clients"),
    ],
)
def test_impossible_rules_say_what_is_possible(spec: str, clients: int, words: str):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        split(spec, torch.arange(30) % 3, clients, 0, 30)


def test_rules_over_classes_need_labels():
    with pytest.raises(ConfigError, match="dirichlet needs labels"):
        split("dirichlet:0.5", None, 2, 0, 10)
    assert sizes(split("iid", None, 2, 0, 10)) == [5, 5]


def test_every_rule_has_one_line_of_description():
    assert {form.split(":")[0] for form in PARTITIONS} == {"iid", "dirichlet", "pathological", "quantity", "column"}
    assert all(line and "\n" not in line for line in PARTITIONS.values())
