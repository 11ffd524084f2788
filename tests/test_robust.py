"""The rules that a few wrong updates cannot move far: worked by hand, against plain loops, and in a federation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import lamina
from lamina import cli, runs, verify
from lamina.attacks import attacked
from lamina.config import build, load, to_toml
from lamina.remote import over
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


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45])
def test_the_geometric_median_comes_back_from_any_distance(share: float) -> None:
    """Steps from the mean shrink the distance by a factor only: with 45 % at 1e20 they would end at about 1e18."""
    m = 20
    given = random_updates(m)
    bad = int(share * m)
    spread = max(float((flat(a) - flat(b)).norm()) for a in given.values() for b in given.values())
    good = {name: u for i, (name, u) in enumerate(given.items()) if i >= bad}
    alone = flat(GeometricMedian().combine(good, even(good)))
    for far in (1e3, 1e10, 1e20):
        for i in range(bad):
            given[f"c{i}"] = {name: torch.full_like(x, far) for name, x in given[f"c{i}"].items()}
        assert float((flat(GeometricMedian().combine(given, even(given))) - alone).norm()) < spread


def test_the_geometric_median_is_where_half_of_the_weight_is() -> None:
    assert value(GeometricMedian(), 7, 7, 7, 0, 900) == 7
    weights = {"c0": 0.6, "c1": 0.2, "c2": 0.2}
    assert value(GeometricMedian(), 5, 0, 900, weights=weights) == pytest.approx(5, abs=1e-6)


@pytest.mark.parametrize("rule", [Krum(1), MultiKrum(1), GeometricMedian(), Median(), TrimmedMean(0.2)], ids=repr)
def test_a_number_whose_square_is_infinite_is_only_far_away(rule: Rule) -> None:
    """1e200 squared is no float64; whoever stands where, the others decide."""
    for at in range(6):
        given = random_updates(6)
        given[f"c{at}"] = {name: torch.full_like(x, 1e200) for name, x in given[f"c{at}"].items()}
        made = flat(rule.combine(given, even(given)))
        assert torch.isfinite(made).all()
        assert float(made.norm()) < 100


def test_fltrust_does_not_trust_what_is_too_long_to_measure() -> None:
    given = random_updates(4)
    given["c1"] = {name: torch.full_like(x, 1e200) for name, x in given["c1"].items()}
    assert torch.isfinite(flat(FLTrust("c0").combine(given, even(given)))).all()


def test_a_layer_longer_than_a_piece_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    given = random_updates(7)
    rules = (Median(), TrimmedMean(0.2), Krum(1), GeometricMedian())
    whole = [flat(rule.combine(given, even(given))) for rule in rules]
    monkeypatch.setattr("lamina.robust._PIECE", 5)
    for rule, expected in zip(rules, whole, strict=True):
        torch.testing.assert_close(flat(rule.combine(given, even(given))), expected)


def test_layers_without_entries_go_through() -> None:
    given = {name: {**u, "none": torch.zeros(0, 3, dtype=torch.float64)} for name, u in random_updates(7).items()}
    for rule in (Median(), TrimmedMean(0.2), Krum(1), MultiKrum(1), GeometricMedian(), FLTrust("c0")):
        assert rule.combine(given, even(given))["none"].shape == (0, 3)


def test_ties_go_to_the_first_in_the_schedule() -> None:
    """Two pairs of equals: 0 and 0, 1 and 1, and one between; all of one pair have the same score."""
    given = {name: {"w": torch.tensor([x])} for name, x in zip("abcde", (1.0, 1.0, 0.0, 0.0, 0.5), strict=True)}
    assert float(Krum(1).combine(given, even(given))["w"]) == 1.0
    turned = dict(reversed(given.items()))
    assert float(Krum(1).combine(turned, even(turned))["w"]) == 0.0


def test_a_share_is_what_it_says_whatever_floats_make_of_it() -> None:
    """0.07 x 100 is 7.000000000000001 in floats; 7 on either side, not 8."""
    assert TrimmedMean(0.07)._cut(100) == 7
    assert TrimmedMean(0.2)._cut(20) == 4
    assert TrimmedMean(0.21)._cut(20) == 5


# ---- preconditions


def test_multikrum_keeps_no_more_than_can_be_right() -> None:
    MultiKrum(2, keep=8).expect(10)
    with pytest.raises(lamina.ConfigError, match="rounds of 11 clients"):
        MultiKrum(2, keep=9).expect(10)


@pytest.mark.parametrize("rule", [Median(), TrimmedMean()], ids=repr)
def test_entry_by_entry_rules_are_refused_under_a_sparse_uplink(rule: Rule) -> None:
    """Most clients leave an entry out, so its median is 0, and nothing would be learnt."""
    with pytest.raises(lamina.ConfigError, match="E115") as caught:
        federation(rule, lamina.ErrorFeedback(), uplink=lamina.wire.TopK(0.1))
    assert "geomedian" in caught.value.remedy
    made(federation(GeometricMedian(), lamina.ErrorFeedback(), uplink=lamina.wire.TopK(0.1)))


def test_a_round_with_too_few_answers_for_the_rule_ends_the_run() -> None:
    """Krum(f=1) needs five; two of six send NaN."""
    fed = attacked(federation(Krum(1)), "nan", 0.34, 0)
    with pytest.raises(lamina.RunError, match="E318"):
        made(fed)


@pytest.mark.parametrize(
    ("make", "clients"),
    [
        (lambda: Median(), 2), (lambda: TrimmedMean(0.3), 2), (lambda: Krum(2), 6), (lambda: MultiKrum(1, keep=9), 9),
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
@pytest.mark.parametrize(
    "method",
    [
        None,
        pytest.param(lamina.FedLAMA(phi=2), marks=pytest.mark.slow),
        pytest.param(lamina.FedAdam(lr=0.01), marks=pytest.mark.slow),
    ],
    ids=repr,
)
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


# ---- by a config


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ([], "mean"),
        (["aggregate=median"], Median()),
        (["aggregate=trimmed", "aggregate.share=0.3"], TrimmedMean(0.3)),
        (['aggregate={name="krum",f=2}'], Krum(2)),
        (["aggregate=multikrum", "aggregate.keep=none"], MultiKrum(1)),
        (["aggregate=geomedian"], GeometricMedian()),
        (["aggregate=fltrust", 'aggregate.root="3"'], FLTrust("3")),
    ],
)
def test_a_rule_is_a_part_of_the_config(arguments: list[str], rule: Any, tmp_path: Path) -> None:
    config = load("quickstart", [*arguments, "cohort=all"], {})
    fed = build(config)
    assert fed.aggregate == (rule if rule == "mean" else repr(rule))
    file = tmp_path / "again.toml"
    file.write_text(to_toml(config))
    again = load(file, env={})
    assert again.aggregate == config.aggregate
    assert (again.sha256, again.settings) == (config.sha256, config.settings)


def test_a_config_says_where_a_rule_is_wrong() -> None:
    for arguments, said in (
        (["aggregate=krumm"], "did you mean 'krum'"),
        (["aggregate=krum", "aggregate.f=-1"], "aggregate.f=-1"),
        (["aggregate=median", "aggregate.f=1"], "median takes no arguments"),
        (["aggregate=fltrust"], "aggregate.root is missing"),
        (["faults.norm=medium"], "faults.norm='medium'"),
    ):
        with pytest.raises(lamina.ConfigError) as caught:
            load("quickstart", arguments, {})
        assert said in f"{caught.value}  {caught.value.remedy}"
        assert "command line" in str(caught.value)
    with pytest.raises(lamina.ConfigError, match=r"E115.*9 clients"):
        build(load("quickstart", ["aggregate=krum", "aggregate.f=3", "cohort=8"], {}))


def test_a_rule_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Largest:\n    power: int = 1\n\n"
        "    def expect(self, clients):\n        pass\n\n    def combine(self, updates, weights):\n"
        "        return dict(updates[max(weights, key=weights.get)])\n\n\nclass Not:\n    pass\n"
    )
    entry = f"{tmp_path}/mine.py"
    fed = build(load("quickstart", [f"aggregate={entry}:Largest", "aggregate.power=2"], {}))
    assert fed.aggregate == "Largest(power=2)"
    made(fed, 1)
    with pytest.raises(lamina.ConfigError, match="E106"):
        load("quickstart", [f"aggregate={entry}:Not"], {})


def test_a_rule_and_a_bound_change_the_fingerprint_of_a_config() -> None:
    given = ([], ["aggregate=median"], ["faults.norm=median"], ["aggregate=krum"], ["aggregate=krum", "aggregate.f=2"])
    configs = [load("quickstart", arguments, {}) for arguments in given]
    assert len({config.sha256 for config in configs}) == len(configs)
    assert len({str(config.settings) for config in configs}) == len(configs)


def test_a_run_says_its_rule_and_is_resumed_and_verified(tmp_path: Path) -> None:
    arguments = ["aggregate=multikrum", "faults.norm=median", "cohort=all", "rounds=3"]
    config = load("quickstart", arguments, {})
    whole = build(config).fit(3, tmp_path / "whole", config=config, progress=False)
    assert whole.info["aggregate"] == "MultiKrum(f=1, keep=None)"
    half = build(config).fit(2, tmp_path / "half", config=config, progress=False)
    resumed = runs.resume(half.path, 3, progress=False)
    assert resumed.info["final_sha256"] == whole.info["final_sha256"]
    assert not [check for check in verify.files(resumed.path) if check.problem]
    checked = verify.resend(whole.path, afresh=True, say=lambda said: None)
    assert all(model.sha256 == model.written for model in checked.models)


@pytest.mark.parametrize(
    ("options", "key"), [({"aggregate": Median()}, "aggregate"), ({"faults": {"norm": "median"}}, "faults.norm")]
)
def test_nodes_that_answer_for_several_clients_are_refused(options: dict[str, Any], key: str) -> None:
    fed = federation(options.pop("aggregate", "mean"), **options)
    with pytest.raises(lamina.ConfigError, match="E118") as caught:
        over(fed, None, together=True)
    assert caught.value.where == key


def test_rules_are_listed() -> None:
    result = CliRunner().invoke(cli.app, ["list", "rules", "--json"])
    names = [json.loads(line)["name"] for line in result.stdout.splitlines()]
    assert names == ["mean", *RULES]
    assert "E115" not in result.output
    shown = CliRunner().invoke(cli.app, ["list", "rules"], env={"COLUMNS": "160"})
    assert "share=0.2" in shown.stdout
