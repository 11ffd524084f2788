"""Clients that lie: what each attack makes of a message, who lies, and that it does what it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lamina
from lamina import cli
from lamina.attacks import ATTACKS, TURNS, attacked, attackers, fooled
from lamina.chaos import Chaos
from lamina.client import Reply
from lamina.config import load
from lamina.random import generator
from lamina.survival import survive
from lamina.tree import Params
from test_robust import federation, made, plan_of

OWN = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])}
HONEST = [
    {"a": torch.tensor([[0.0, 2.0]]), "b": torch.tensor([1.0])},
    {"a": torch.tensor([[4.0, 2.0]]), "b": torch.tensor([3.0])},
]


def turned(name: str, honest: Any = ()) -> dict[str, list[Any]]:
    return {n: x.tolist() for n, x in TURNS[name](OWN, honest, generator(0, "test")).items()}


def test_attacks_worked_by_hand() -> None:
    """Honest means a = (2, 2), b = 2; deviations a = (2, 0), b = 1."""
    assert turned("scale") == {"a": [[100, 200]], "b": [300]}
    assert turned("sign_flip") == {"a": [[-10, -20]], "b": [-30]}
    assert turned("one_layer") == {"a": [[-30, -60]], "b": [3]}  # the last one with weights, not a bias
    assert turned("alie", HONEST) == {"a": [[0, 2]], "b": [1]}
    assert turned("ipm", HONEST) == {"a": [[-1, -1]], "b": [-1]}
    assert all(x != x for x in turned("nan")["a"][0])


def test_gaussian_noise_has_deviation_three() -> None:
    sent = TURNS["gaussian"]({"a": torch.zeros(10_000)}, (), generator(0, "test"))["a"]
    assert float(sent.std()) == pytest.approx(3, rel=0.05)


def test_attackers_without_anybody_to_copy_use_their_own() -> None:
    assert turned("ipm") == {"a": [[-0.5, -1]], "b": [-1.5]}
    assert turned("alie") == {"a": [[1, 2]], "b": [3]}


def test_attackers_are_a_share_of_the_clients_drawn_by_the_seed() -> None:
    data = lamina.data.digits(clients=20)
    assert len(attackers(data, 0.2)) == 4
    assert len(attackers(data, 0.01)) == 1
    assert attackers(data, 0.2, 1) == attackers(data, 0.2, 1) != attackers(data, 0.2, 2)


@pytest.mark.parametrize("share", [0, 1, -0.2, 1.5, float("nan"), "0.2", True])
def test_an_impossible_share_is_refused(share: Any) -> None:
    with pytest.raises(lamina.ConfigError, match="E103"):
        attacked(federation("mean"), "nan", share)


def test_an_unknown_attack_is_answered_by_one_that_is_close() -> None:
    with pytest.raises(lamina.ConfigError, match="E103") as caught:
        attacked(federation("mean"), "sign_flop", 0.2)
    assert caught.value.remedy == "did you mean 'sign_flip'?"


def replies(fed: lamina.Federation) -> dict[int, Reply]:
    """Of the first round, in the schedule's order."""
    engine = fed.made_engine()
    plan = fed.method.plan(fed.method.init(fed.initial.params), plan_of(fed))
    found = {}
    for r in engine.replies("round", plan, [1, 2, 3, 4, 5, 0], {}):
        found[r.client] = r._replace(message={t: {n: x.clone() for n, x in c.items()} for t, c in r.message.items()})
    engine.close()
    return found


@pytest.mark.parametrize("engine", ["loop", "processes", "stacked"])
@pytest.mark.parametrize("name", TURNS)
def test_only_attackers_say_something_else(name: str, engine: str) -> None:
    plain = federation("mean", lamina.Scaffold(), engine=engine, workers=2 if engine == "processes" else 1)
    fed = attacked(plain, name, 0.34, 5)
    liars = attackers(plain.data, 0.34, 5)
    assert len(liars) == 2
    before, after = replies(plain.through(lambda engine: engine)), replies(fed)
    honest = [before[c].message["update"] for c in before if c not in liars]
    for c in range(6):
        for tree in ("update", "control"):
            for layer, x in before[c].message[tree].items():
                same = c not in liars or (name == "one_layer" and not (tree == "update" and layer == "fc2.weight"))
                assert torch.equal(after[c].message[tree][layer], x) == same
        assert after[c].sizes == before[c].sizes
        assert (after[c].refused is not None) == (name == "nan" and c in liars)
    if name == "ipm":
        mean = torch.stack([u["fc1.weight"] for u in honest]).mean(0)
        torch.testing.assert_close(after[liars[0]].message["update"]["fc1.weight"], -0.5 * mean)


def test_moments_fit_the_lie() -> None:
    fed = attacked(federation("mean"), "scale", 0.2, 0)
    for r in replies(fed).values():
        for name, x in r.message["update"].items():
            assert float(r.message["moments"][name]) == pytest.approx(float(x.double().square().sum()))


def test_an_attack_is_the_same_again_and_another_with_another_seed() -> None:
    def end(seed: int) -> str:
        return made(attacked(federation("mean"), "gaussian", 0.2, seed)).sha256()

    assert end(1) == end(1) != end(2)


def test_nan_costs_the_attackers_their_round_and_nobody_else() -> None:
    fed = attacked(federation("mean"), "nan", 0.34, 5)
    names = [fed.data.names[c] for c in attackers(fed.data, 0.34, 5)]
    for state, record in fed.run(2):
        assert sorted(event["client"] for event in record.events) == names
        assert {event["code"] for event in record.events} == {"E310"}
        assert all(torch.isfinite(x).all() for x in state.params.values())


# ---- by examples


def digits(**options: Any) -> lamina.Federation:
    return lamina.Federation(
        lambda: lamina.models.mlp((64, 32, 10)), lamina.data.digits(clients=5, partition="iid"), engine="stacked",
        local=lamina.LocalSGD(lr=0.1, momentum=0.9, batch_size=16), workers=1, **options,
    )  # fmt: skip


def test_flipped_labels_are_those_of_the_attackers_alone() -> None:
    plain = digits()
    fed = attacked(plain, "label_flip", 0.4, 0)
    for c in range(5):
        (x, y), (was_x, was_y) = (f.data.examples(f.data.indices_of(c)) for f in (fed, plain))
        assert torch.equal(x, was_x)
        assert torch.equal(y, 9 - was_y if c in attackers(plain.data, 0.4) else was_y)
    assert torch.equal(fed.data.sizes, plain.data.sizes)
    assert torch.equal(fed.data.test[1], plain.data.test[1])
    assert made(fed).sha256() != made(plain).sha256()


def test_a_backdoor_is_learnt_and_the_rest_too() -> None:
    """Half of what two clients of five have is marked and called a 0."""
    honest, fed = (list(f.run(6, evaluate_every=6))[-1] for f in (digits(), attacked(digits(), "backdoor", 0.4, 0)))
    assert fooled(digits(), honest[0]) < 0.2
    assert fooled(digits(), fed[0]) > 0.5
    assert fed[1].accuracy > honest[1].accuracy - 0.1


def test_a_backdoor_marks_every_other_example() -> None:
    plain = digits()
    fed = attacked(plain, "backdoor", 0.2, 0)
    (liar,) = attackers(plain.data, 0.2)
    (x, y), (was_x, was_y) = (f.data.examples(f.data.indices_of(liar)) for f in (fed, plain))
    assert torch.equal(x[1::2], was_x[1::2])
    assert torch.equal(y[1::2], was_y[1::2])
    assert (x[::2].flatten(1)[:, -4:] == 240).all()
    assert torch.equal(x[::2].flatten(1)[:, :-4], was_x[::2].flatten(1)[:, :-4])
    assert (y[::2] == 0).all()


def test_examples_of_another_kind_are_refused() -> None:
    clients = {c: (torch.randn(8, 5), torch.randn(8)) for c in "abc"}
    fed = lamina.Federation(
        lambda: lamina.models.mlp((5, 4, 1)), lamina.ClientData.from_clients(clients), engine="loop",
        loss=lambda out, y: ((out[:, 0] - y) ** 2).mean(),
    )  # fmt: skip
    with pytest.raises(lamina.ConfigError, match="E118"):
        attacked(fed, "label_flip", 0.3)


def test_all_attacks_are_named() -> None:
    assert set(ATTACKS) == {
        "nan", "scale", "sign_flip", "gaussian", "one_layer", "alie", "ipm", "label_flip", "backdoor",
    }  # fmt: skip


def test_examples_of_other_clients_are_refused() -> None:
    with pytest.raises(lamina.ConfigError, match="E119"):
        digits().on(lamina.data.digits(clients=6, partition="iid"))


def test_one_wrap_goes_around_another() -> None:
    """The inner one scales by 100, the outer one turns what that makes."""
    twice = attacked(attacked(federation("mean"), "scale", 0.2, 0), "sign_flip", 0.2, 0)
    once = replies(federation("mean").through(lambda engine: engine))
    (liar,) = attackers(twice.data, 0.2)
    sent: Params = replies(twice)[liar].message["update"]
    for name, x in once[liar].message["update"].items():
        torch.testing.assert_close(sent[name], -1000 * x)


# ---- by the command line


def test_chaos_with_an_attack_says_what_became_of_it(tmp_path: Path) -> None:
    arguments = ["quickstart", "rounds=2", "cohort=all", "--attack", "nan", "--attackers", "0.2", "--json"]
    result = CliRunner().invoke(cli.app, ["chaos", *arguments, "--run-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.splitlines()[-1])
    assert said["chaos"] == {"attack": "nan", "attackers": 0.2, "seed": 0}
    assert said["refused"] == {"E310": 4}  # two of ten clients, two rounds
    assert said["right"] is True


def test_chaos_reports_a_backdoor(tmp_path: Path) -> None:
    config, chaos = load("quickstart", ["rounds=8"], {}), Chaos(attack="backdoor", attackers=0.4)
    account = survive(config, chaos, tmp_path)
    assert account.fooled > 0.3
    assert account.right is True


def test_chaos_refuses_an_unknown_attack_before_anything_is_written(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["chaos", "quickstart", "--attack", "nun", "--run-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "did you mean 'nan'?" in result.stderr
    assert not list(tmp_path.iterdir())
