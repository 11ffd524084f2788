"""Cohorts: drawn without replacement, from an address."""

from __future__ import annotations

from collections import Counter

import pytest

import cases
from lamina import FedAvg, FedLAMA
from lamina.cohort import draw


@pytest.mark.parametrize(("clients", "m"), [(5, 1), (5, 2), (5, 3), (5, 5), (1000, 7), (10**9, 4)])
def test_a_cohort_is_m_different_clients_ascending(clients: int, m: int) -> None:
    cohort = draw(3, 8, clients, m)
    assert len(set(cohort)) == m
    assert list(cohort) == sorted(cohort)
    assert all(0 <= c < clients for c in cohort)


def test_everybody_takes_part_when_the_cohort_is_the_population() -> None:
    assert draw(3, 8, 4, 4) == (0, 1, 2, 3)
    assert draw(3, 8, 4, 9) == (0, 1, 2, 3)


def test_a_cohort_is_a_function_of_seed_and_key() -> None:
    assert draw(3, 8, 100, 10) == draw(3, 8, 100, 10)
    assert len({draw(seed, key, 100, 10) for seed in range(5) for key in range(5)}) == 25


@pytest.mark.parametrize("m", [2, 4])  # the two ways of drawing: few of many, most of few
def test_every_client_is_drawn_equally_often(m: int) -> None:
    """600 draws of m out of 6: 100 m per client, standard deviation about 10."""
    drawn = Counter(c for key in range(600) for c in draw(0, key, 6, m))
    assert all(abs(drawn[c] - 100 * m) < 50 for c in range(6))


@pytest.mark.parametrize(("method", "hold"), [(FedAvg(), 1), (FedLAMA(phi=3), 3)])
def test_a_cohort_stays_together_for_the_hold_of_the_method(method, hold: int) -> None:
    cohorts = [record.cohort for _, record in cases.federation(method, cohort=2).run(6)]
    assert cohorts == [draw(7, t - t % hold, 5, 2) for t in range(6)]
    assert len(set(cohorts)) > 1
