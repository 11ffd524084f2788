"""The rules that a few wrong updates cannot move far: worked by hand, against plain loops, and in a federation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lamina
from lamina.robust import RULES, FLTrust, GeometricMedian, Krum, Median, MultiKrum, Rule, TrimmedMean
from lamina.tree import Params


def updates(*values: float) -> dict[str, Params]:
    return {f"c{i}": {"w": torch.tensor([value], dtype=torch.float64)} for i, value in enumerate(values)}


def even(given: dict[str, Params]) -> dict[str, float]:
    return dict.fromkeys(given, 1 / len(given))


def value(rule: Rule, *values: float, weights: dict[str, float] | None = None) -> float:
    given = updates(*values)
    rule.expect(len(given))
    return float(rule.combine(given, weights or even(given))["w"])


def random_updates(m: int, seed: int = 0) -> dict[str, Params]:
    source = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": ()}
    return {
        f"c{i}": {name: torch.randn(shape, generator=source, dtype=torch.float64) for name, shape in shapes.items()}
        for i in range(m)
    }


def flat(update: Params) -> Tensor:
    return torch.cat([x.flatten() for x in update.values()])


# ---- worked by hand


def test_the_median() -> None:
    assert value(Median(), 1, 2, 900) == 2
    assert value(Median(), 4, 1, 2, 900) == 3


def test_the_trimmed_mean() -> None:
    """20 % of five, rounded up, is one on either side: (2 + 3 + 4) / 3."""
    assert value(TrimmedMean(0.2), -500, 2, 3, 4, 900) == 3
    assert value(TrimmedMean(0.25), 1, 2, 3, 4, 900) == 3  # 1.25 is two on either side


def test_krum_takes_the_one_with_the_nearest_neighbours() -> None:
    """f=1 of five: the two nearest. 1: .01+.04, 1.1: .01+.01, 1.2: .01+.04, 9: 1.44+..., so 1.1."""
    assert value(Krum(f=1), 1.0, 1.1, 1.2, 9.0, 10.2) == 1.1


def test_multikrum_is_the_weighted_mean_of_the_best() -> None:
    assert value(MultiKrum(f=1, keep=3), 1.0, 1.1, 1.2, 9.0, 10.2) == pytest.approx(1.1)
    weights = {"c0": 0.4, "c1": 0.1, "c2": 0.1, "c3": 0.2, "c4": 0.2}
    assert value(MultiKrum(f=1, keep=3), 1.0, 1.1, 1.2, 9.0, 10.2, weights=weights) == pytest.approx(0.63 / 0.6)


def test_the_geometric_median_of_a_line_is_its_median() -> None:
    assert value(GeometricMedian(steps=200), 0, 1, 2, 3, 900) == pytest.approx(2, abs=1e-3)


def test_fltrust_listens_to_those_who_go_the_trusted_clients_way() -> None:
    """Root (1, 0). a = (3, 3): cosine .7071, scaled to length 1 (.7071, .7071). b = (-5, 0): against it. c = (0, 2):
    across it. Only a is left."""
    given = {
        "root": {"w": torch.tensor([1.0, 0.0])},
        "a": {"w": torch.tensor([3.0, 3.0])},
        "b": {"w": torch.tensor([-5.0, 0.0])},
        "c": {"w": torch.tensor([0.0, 2.0])},
    }
    made = FLTrust("root").combine(given, even(given))["w"]
    torch.testing.assert_close(made, torch.tensor([0.5**0.5, 0.5**0.5]))
    against = {name: given[name] for name in ("root", "b")}
    assert FLTrust("root").combine(against, even(against))["w"].tolist() == [0.0, 0.0]


# ---- against plain loops


def test_krum_agrees_with_a_plain_loop() -> None:
    for seed in range(20):
        given = random_updates(9, seed)
        vectors = [flat(u) for u in given.values()]
        scores = []
        for i, x in enumerate(vectors):
            distances = sorted(float(((x - y) ** 2).sum()) for j, y in enumerate(vectors) if j != i)
            scores.append(sum(distances[: 9 - 2 - 2]))
        best = scores.index(min(scores))
        made = Krum(f=2).combine(given, even(given))
        assert torch.equal(flat(made), vectors[best])


def test_the_geometric_median_has_no_nearer_point() -> None:
    given = random_updates(7, 3)
    weights = {f"c{i}": (i + 1) / 28 for i in range(7)}
    vectors = {name: flat(u) for name, u in given.items()}
    made = flat(GeometricMedian(steps=200).combine(given, weights))

    def cost(point: Tensor) -> float:
        return sum(weights[name] * float((point - x).norm()) for name, x in vectors.items())

    source = torch.Generator().manual_seed(1)
    for _ in range(50):
        near = made + 0.01 * torch.randn(made.shape, generator=source, dtype=torch.float64)
        assert cost(near) >= cost(made) - 1e-9


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(0.3), Krum(1), MultiKrum(1), GeometricMedian()], ids=repr)
def test_one_client_far_off_moves_the_result_little(rule: Rule) -> None:
    """Within the spread of the others, however far off it is."""
    given = random_updates(7)
    spread = max(float((flat(a) - flat(b)).norm()) for a in given.values() for b in given.values())
    before = flat(rule.combine(given, even(given)))
    for far in (1e3, 1e9):
        given["c3"] = {name: x * far for name, x in given["c3"].items()}
        after = flat(rule.combine(given, even(given)))
        assert float((after - before).norm()) < spread


# ---- preconditions


@pytest.mark.parametrize(
    ("make", "clients"),
    [
        (lambda: Median(), 2), (lambda: TrimmedMean(0.3), 2), (lambda: Krum(2), 6), (lambda: MultiKrum(1, keep=9), 8),
        (lambda: GeometricMedian(), 2), (lambda: FLTrust("a"), 1),
    ],
)  # fmt: skip
def test_too_few_clients_are_refused(make: Any, clients: int) -> None:
    with pytest.raises(lamina.ConfigError, match="E115"):
        make().expect(clients)
    make().expect(clients + 1)


@pytest.mark.parametrize(
    "make",
    [lambda: TrimmedMean(0.5), lambda: TrimmedMean(0), lambda: Krum(-1), lambda: MultiKrum(1, 0),
     lambda: GeometricMedian(0), lambda: GeometricMedian(smooth=0.0)],
)  # fmt: skip
def test_impossible_settings_are_refused(make: Any) -> None:
    with pytest.raises(lamina.ConfigError, match="E115"):
        make()


# ---- in a federation


def federation(rule: Any, method: lamina.Method | None = None, **options: Any) -> lamina.Federation:
    source = torch.Generator().manual_seed(0)
    clients = {}
    for i in range(6):
        x = torch.randn(20 + i, 5, generator=source)
        y = (x[:, 0] > 0).long()
        clients[f"c{i}"] = (x, y)
    return lamina.Federation(
        lambda: lamina.models.mlp((5, 8, 2)), lamina.ClientData.from_clients(clients), method=method, aggregate=rule,
        engine=options.pop("engine", "loop"), local=lamina.LocalSGD(lr=0.1, batch_size=5), **options,
    )  # fmt: skip


def made(fed: lamina.Federation, rounds: int = 3) -> lamina.State:
    return list(fed.run(rounds))[-1][0]


def test_the_rule_is_given_every_update_and_its_weight() -> None:
    seen: list[tuple[list[str], dict[str, float]]] = []

    class First:
        def expect(self, clients: int) -> None:
            pass

        def combine(self, updates: Any, weights: Any) -> Params:
            seen.append((list(updates), dict(weights)))
            return dict(next(iter(updates.values())))

    fed = federation(First())
    (state, _) = next(iter(fed.run(1)))
    ((names, weights),) = seen
    assert names == ["c1", "c2", "c3", "c4", "c5", "c0"]  # the schedule's order: most steps first
    assert weights["c1"] == pytest.approx(21 / 135)
    own = lamina.Federation(
        lambda: lamina.models.mlp((5, 8, 2)), fed.data, local=fed.local, engine="loop", weights="uniform"
    )
    alone = next(r for r in own.made_engine().replies("round", plan_of(own), [1], {}))
    moved = {n: state.params[n] - fed.initial.params[n] for n in state.params}
    for name, x in alone.message["update"].items():
        torch.testing.assert_close(moved[name], x)


def plan_of(fed: lamina.Federation) -> Any:
    return fed._plan(*fed.initial, 0, 0.1, 6)


@pytest.mark.parametrize(
    "rule", [Median(), TrimmedMean(), Krum(), MultiKrum(), GeometricMedian(), FLTrust("c2")], ids=repr
)
@pytest.mark.parametrize("method", [None, lamina.FedLAMA(phi=2), lamina.FedAdam(lr=0.01)], ids=repr)
def test_every_rule_runs_and_no_engine_changes_it(rule: Rule, method: Any) -> None:
    loop = made(federation(rule, method))
    processes = made(federation(rule, method, engine="processes", workers=2))
    stacked = made(federation(rule, method, engine="stacked", workers=1))
    assert loop.sha256() == processes.sha256()
    for name, x in loop.params.items():
        torch.testing.assert_close(stacked.params[name], x, rtol=1e-4, atol=1e-5)


def test_records_stay_those_of_the_mean() -> None:
    plain = next(iter(federation("mean").run(1)))[1]
    robust = next(iter(federation(Median()).run(1)))[1]
    assert {n: row.divergence for n, row in plain.layers.items()} == {n: r.divergence for n, r in robust.layers.items()}
    assert plain.bytes_up == robust.bytes_up


def test_the_trusted_client_is_in_every_cohort() -> None:
    fed = federation(FLTrust("c3"), cohort=2)
    for _, record in fed.run(5):
        assert 3 in record.cohort


def test_what_is_no_rule_is_refused() -> None:
    for rule in ("krumm", 3, Krum, None):
        with pytest.raises(lamina.ConfigError, match="aggregate"):
            federation(rule)
    with pytest.raises(lamina.ConfigError, match="no such client") as caught:
        federation(FLTrust("c33"))
    assert caught.value.remedy == "did you mean 'c3'?"
    with pytest.raises(lamina.ConfigError, match="E115"):
        federation(Krum(f=2))


def test_every_rule_has_a_name() -> None:
    assert set(RULES) == {"median", "trimmed", "krum", "multikrum", "geomedian", "fltrust"}
