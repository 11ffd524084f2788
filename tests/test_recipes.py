"""Every recipe resolves to configs, models and methods, and judges its claims; nothing here needs data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lamina.data
from lamina import ClientData, ConfigError, Task, cli
from lamina.config import Config, load, load_tables, local_of, method_of, model_of, to_toml
from lamina.layers import layer_table
from lamina.method import Method
from lamina.recipes import RECIPES, Arm, Claim, Outcome, Table, Variant
from lamina.recipes import parts as recipe_parts
from lamina.recipes.observed import depth_table, is_weight
from lamina.recipes.recipe import both, cheaper, higher, judged
from lamina.reproduce import folder_name

VARIANTS = [(name, scaled) for name in RECIPES for scaled in (False, True)]
ARMS = [(name, scaled, label) for name, scaled in VARIANTS for label in RECIPES[name].variant(scaled).arms]


def variant(name: str, scaled: bool) -> Variant:
    return RECIPES[name].variant(scaled)


@cache
def resolved(name: str, scaled: bool, label: str) -> Config:
    return variant(name, scaled).config(name, label, 3)


_SEEN: dict[str, nn.Module] = {}


def skeleton(config: Config) -> nn.Module:
    """The model without its numbers, each once."""
    key = json.dumps(config.model.model_dump(), sort_keys=True)
    if key not in _SEEN:
        with torch.device("meta"):
            _SEEN[key] = model_of(config)()
    return _SEEN[key]


def bound(config: Config, model: nn.Module) -> Method[Any, Any]:
    method = method_of(config)
    local = local_of(config)
    clients = int(config.data.arguments["clients"])
    cohort = clients if config.cohort == "all" else config.cohort
    task = Task(
        layer_table(model), clients, cohort, config.weights, config.seed, method.hold, local.lr, local.momentum,
        local.weight_decay, local.clip, config.buffers if list(model.buffers()) else "",
    )  # fmt: skip
    return method.bind(task)


# ---- settings


@pytest.mark.parametrize(("name", "scaled", "label"), ARMS)
def test_every_arm_resolves_and_its_model_and_method_are_made(
    tmp_path: Path, name: str, scaled: bool, label: str
) -> None:
    config = resolved(name, scaled, label)
    assert config.seed == config.data.arguments.get("seed", 3) == 3
    model = skeleton(config)
    assert sum(p.numel() for p in model.parameters()) > 0
    method = bound(config, model)
    assert method.rounds in (None, config.rounds), "it plans for a run of another length"
    assert config.rounds % method.hold == 0, "the run would end with layers waiting"
    assert config.rounds % config.evaluate_every == 0
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load(file, env={}).model_dump() == config.model_dump()


def test_every_key_says_which_recipe_or_arm_it_comes_from() -> None:
    config = variant("fedlama-cifar10", True).config("fedlama-cifar10", "FedLAMA phi=4", 2)
    assert config.origin("cohort") == "recipe fedlama-cifar10"
    assert config.origin("method.phi") == "arm FedLAMA phi=4"
    assert config.origin("seed") == "--seeds"


def test_a_wrong_key_of_a_table_is_refused_with_its_origin() -> None:
    with pytest.raises(ConfigError, match=r"method\.fi") as caught:
        load_tables(
            ("recipe toy", {"model": "mlp", "data": "digits"}), ("arm a", {"method": {"name": "fedlama", "fi": 2}})
        )
    assert caught.value.where == "arm a"


def test_a_part_that_an_arm_names_anew_forgets_what_the_base_said() -> None:
    base = {"model": {"name": "resnet20", "width": 8}, "data": "cifar10"}
    config = load_tables(("base", base), ("arm", {"model": "resnet8"}))
    assert config.model.arguments["width"] == 64


@pytest.mark.parametrize(("name", "scaled"), VARIANTS)
def test_arms_are_told_apart_on_the_command_line_and_on_disk(name: str, scaled: bool) -> None:
    labels = list(variant(name, scaled).arms)
    assert len({folder_name(label).lower() for label in labels}) == len(labels)
    assert not any("," in folder_name(label) for label in labels)
    assert all(folder_name(label) == folder_name(folder_name(label)) for label in labels)
    assert variant(name, scaled).reference in labels


@pytest.mark.parametrize(("name", "scaled"), VARIANTS)
def test_all_arms_have_the_same_clients(name: str, scaled: bool) -> None:
    configs = [resolved(name, scaled, label) for label in variant(name, scaled).arms]
    assert len({json.dumps(c.data.model_dump(), sort_keys=True) for c in configs}) == 1
    assert len({(c.cohort, c.weights, c.buffers, c.loss) for c in configs}) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_scaled_recipe_says_what_was_scaled_and_a_floor_above_chance(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.dataset in lamina.data.DATASETS
    assert recipe.scaled.scaled
    assert not recipe.published.scaled
    classes = lamina.data.DATASETS[recipe.dataset].classes
    for one in (recipe.published, recipe.scaled):
        assert 2 / classes < one.floor < 1
        assert one.why
        assert one.size
        assert one.claims
    assert [claim.source for claim in recipe.scaled.claims]


@pytest.mark.parametrize(("name", "scaled"), VARIANTS)
def test_no_text_of_a_recipe_was_left_open(name: str, scaled: bool) -> None:
    recipe, one = RECIPES[name], variant(name, scaled)
    texts = [recipe.title, recipe.paper, recipe.source, recipe.compares, *recipe.differs, one.why, one.size, one.scaled]
    assert not any("TODO" in text for text in texts)


@pytest.mark.parametrize("scaled", [False, True])
def test_every_arm_of_fedlama_takes_the_same_number_of_local_steps(scaled: bool) -> None:
    configs = [resolved("fedlama-cifar10", scaled, label) for label in variant("fedlama-cifar10", scaled).arms]
    assert len({c.rounds * int(c.local.arguments["steps"]) for c in configs}) == 1
    assert [c.local.arguments["steps"] for c in configs] == [6, 12, 24, 6, 6]


def test_the_models_of_the_published_variants_have_the_sizes_of_the_papers() -> None:
    sizes = {
        ("fedlama-cifar10", "FedAvg"): 272_762,
        ("fedluar-cifar10", "FedAvg"): 272_762,
        ("ssfl-cifar10", "FedAvg"): 11_173_962,
        ("lips-cifar10", "FedAvg"): 3_918_858,
        ("flare-mnist-fc", "FedAvg"): 36_356_525,
        ("flare-mnist-cnn", "FedAvg"): 582_026,
    }
    for (name, label), size in sizes.items():
        model = skeleton(resolved(name, False, label))
        assert sum(p.numel() for p in model.parameters()) == size, name


# ---- judging


def outcome(seed: int = 0, accuracy: float | None = 0.5, up: int = 100, diverged: int | None = None) -> Outcome:
    return Outcome(seed, accuracy, 9, accuracy, up, up, 10, 1.0, 0, diverged, False, None, "")


def arm(label: str, *accuracies: float | None, up: int = 100, diverged: int | None = None) -> Arm:
    return Arm(label, tuple(outcome(seed, a, up, diverged) for seed, a in enumerate(accuracies)))


def table(*arms: Arm, floor: float = 0.1, extra: Mapping[str, Any] | None = None) -> Table:
    return Table({a.label: a for a in arms}, "FedAvg", floor, extra or {})


def test_one_seed_is_judged_by_its_sign() -> None:
    assert higher("A", "FedAvg")(table(arm("FedAvg", 0.5), arm("A", 0.51))).held is True
    assert higher("A", "FedAvg")(table(arm("FedAvg", 0.5), arm("A", 0.49))).held is False
    assert higher("A", "FedAvg", within=0.02)(table(arm("FedAvg", 0.5), arm("A", 0.49))).held is True
    assert higher("A", "FedAvg", within=0.02)(table(arm("FedAvg", 0.5), arm("A", 0.47))).held is False


def test_with_more_seeds_a_difference_within_its_standard_error_is_not_judged() -> None:
    """Differences 0.03 and -0.01: mean 0.01, deviation 0.02828, standard error 0.02. With 0.03 and 0.01 it is 0.01
    around 0.02."""
    base = arm("FedAvg", 0.50, 0.50)
    assert higher("A", "FedAvg")(table(base, arm("A", 0.53, 0.49))).held is None
    assert higher("A", "FedAvg")(table(base, arm("A", 0.53, 0.51))).held is True
    words = higher("A", "FedAvg")(table(base, arm("A", 0.53, 0.51))).words
    assert words == "A 52.00 % ± 1.41, FedAvg 50.00 % ± 0.00: +2.00 points ± 1.00 over 2 seeds"


def test_differences_are_taken_seed_by_seed() -> None:
    """Both arms vary by 0.1 from seed to seed, but A is better by 0.01 and 0.02 in each."""
    held = higher("A", "FedAvg")(table(arm("FedAvg", 0.4, 0.5), arm("A", 0.41, 0.52)))
    assert held.held is True


def test_who_diverges_loses_and_two_who_do_are_not_judged() -> None:
    good, lost = arm("FedAvg", 0.5), arm("A", None, diverged=7)
    assert higher("A", "FedAvg")(table(good, lost)).held is False
    assert higher("FedAvg", "A")(table(good, lost)).held is True
    assert "A diverged at round 7" in higher("A", "FedAvg")(table(good, lost)).words
    assert higher("A", "B")(table(lost, arm("B", None, diverged=1))).held is None
    assert cheaper("A", 0.5)(table(good, lost)).held is None


def test_bytes_are_judged_against_the_reference() -> None:
    arms = (arm("FedAvg", 0.5, up=200), arm("A", 0.5, up=90), arm("B", 0.5, up=120))
    assert cheaper("A", 0.45)(table(*arms)).held is True
    assert cheaper("B", 0.45)(table(*arms)).held is False
    assert cheaper("A", 0.7, than="B")(table(*arms)).held is False  # 75 %
    assert (
        cheaper("A", 0.45)(table(*arms)).words == "A sent up 45.00 % of what FedAvg did; at most 45.00 % counts as held"
    )


def test_of_several_the_one_that_fails_decides() -> None:
    arms = table(arm("FedAvg", 0.5, up=100), arm("A", 0.6, up=90))
    better, dear, unknown = higher("A", "FedAvg"), cheaper("A", 0.5), higher("A", "nobody")
    assert both(better, dear)(arms).held is False
    assert both(better, unknown)(arms).held is None
    assert both(dear, unknown)(arms).held is False
    assert both(better, better)(arms).held is True


def test_a_claim_is_not_judged_without_a_reference_at_the_floor() -> None:
    claim = Claim("x", "y", higher("A", "FedAvg"))
    assert judged(claim, table(arm("FedAvg", 0.09), arm("A", 0.6))).held is None
    assert judged(claim, table(arm("FedAvg", 0.10), arm("A", 0.6))).held is True
    assert judged(claim, table(arm("A", 0.6))).words == "not run: FedAvg"
    assert judged(claim, table(arm("FedAvg", None, diverged=3), arm("A", 0.6))).held is None


@pytest.mark.parametrize(("name", "scaled"), VARIANTS)
def test_every_claim_can_be_judged_once_all_arms_are_there(name: str, scaled: bool) -> None:
    """Accuracies fall and bytes shrink from arm to arm; the middle layers stay, the ends move."""
    one = variant(name, scaled)
    arms = {
        label: arm(label, 0.99 - 0.01 * i, up=1000 // (i + 1)) for i, label in enumerate([one.reference, *one.arms])
    }
    layers = {"first": 0.5, "a": 0.1, "b": 0.2, "last": 0.4}
    extra = {what: dict.fromkeys(one.arms, layers) for what in ("inertia", "divergence", "divergence_std")}
    full = Table(arms, one.reference, one.floor, extra)
    for claim in one.claims:
        verdict = judged(claim, full)
        assert verdict.held is not None, f"{claim.text}: {verdict.words}"
        assert any(character.isdigit() for character in verdict.words)


def test_the_middle_is_between_the_ends() -> None:
    from lamina.recipes.lips import _inert, _stirred

    flat = {"first": 0.5, "a": 0.1, "b": 0.2, "last": 0.4}  # the middle moves 0.15, the lesser end 0.4
    moved = {"first": 0.5, "a": 0.5, "b": 0.6, "last": 0.4}
    arms = (arm("FedAvg", 0.5), arm("LIPS", 0.6))
    still = table(*arms, extra={"inertia": {"FedAvg": flat, "LIPS": moved}})
    assert _inert(still).held is True
    assert _inert(still).words == "FedAvg moved its first layer 0.500, the mean middle layer 0.150, its last 0.400"
    assert _stirred(still).held is True
    assert _inert(table(*arms, extra={"inertia": {"FedAvg": moved, "LIPS": flat}})).held is False
    assert _stirred(table(*arms, extra={"inertia": {"FedAvg": moved, "LIPS": flat}})).held is False


def test_an_arm_without_records_leaves_its_claims_open() -> None:
    from lamina.recipes.lips import _inert, _stirred

    silent = table(
        arm("FedAvg", 0.5), arm("LIPS", None, diverged=0), extra={"inertia": {"FedAvg": {"a": 1.0}, "LIPS": {}}}
    )
    assert _stirred(silent).words == "no inertia of LIPS"
    assert _stirred(silent).held is None
    assert _inert(table(arm("FedAvg", 0.5), extra={"inertia": {"FedAvg": {}}})).held is None


def test_weights_are_told_from_norms_and_biases_by_name() -> None:
    names = ("conv1.weight", "layer1.0.norm1.weight", "layer2.0.shortcut.norm.weight", "layer2.0.shortcut.conv.weight",
             "fc.bias", "rnn.weight_hh_l0", "embed.weight")  # fmt: skip
    assert [name for name in names if is_weight(name)] == [
        "conv1.weight", "layer2.0.shortcut.conv.weight", "rnn.weight_hh_l0", "embed.weight",
    ]  # fmt: skip


def test_a_depth_table_has_the_quarters_and_the_mean_of_the_middle() -> None:
    text = depth_table("T", {"A": {str(i): float(i) for i in range(5)}, "none": {}})
    assert "| A | 0 | 1 | 2 | 3 | 4 | 2 | 5 |" in text
    assert "none" not in text


# ---- parts


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> ClientData:
    y = torch.arange(40) % 4
    x = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 2, 2, 3).contiguous()
    whole = ClientData.from_dataset((x, y), (x[:8], y[:8]), clients=1)
    monkeypatch.setattr(lamina.data, "load", lambda name, **options: whole)
    return whole


def test_clients_by_position_hold_the_first_images_in_order(images: ClientData) -> None:
    data = recipe_parts.first("mnist", clients=3, per_client=5)
    assert [data.indices_of(c).tolist() for c in range(3)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert len(data.x) == 15  # type: ignore[arg-type]
    x, _ = data.examples(torch.tensor([14]))
    assert float(data.transform(x, None).max()) == pytest.approx(14 / 255)  # type: ignore[union-attr]
    assert data.test is not None


def test_a_part_of_a_set_can_be_split_by_any_rule(images: ClientData) -> None:
    data = recipe_parts.first("cifar10", clients=4, per_client=6, partition="dirichlet:0.5:balanced", seed=1)
    assert data.sizes.tolist() == [6, 6, 6, 6]
    assert int(data.indices.max()) < 24


def test_more_images_than_there_are_is_refused(images: ClientData) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 40 images"):
        recipe_parts.first("mnist", clients=9, per_client=5)


def test_speeches_predict_the_next_character_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two roles of 23 and 9 characters; in sequences of 4 + 1 the first gives 4, the second 1, which is too few."""
    text = torch.arange(32)
    groups = {"ann": torch.arange(0, 23), "bob": torch.arange(23, 32)}
    tests = {"ann": (torch.zeros(11), torch.arange(100, 111)), "bob": (torch.zeros(6), torch.arange(200, 206))}
    plays = ClientData.from_index(torch.zeros(32), text, groups, client_tests=tests)
    monkeypatch.setattr(lamina.data, "shakespeare", lambda: plays)
    data = recipe_parts.speeches(clients=1, least=2, most=3, length=4)
    assert data.names == ("ann",)
    x, y = data.examples(data.indices_of(0))
    assert x.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]  # type: ignore[union-attr]
    assert y.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9], [11, 12, 13, 14]]  # type: ignore[union-attr]
    assert data.test is not None
    assert data.test[1].tolist() == [[101, 102, 103, 104], [106, 107, 108, 109]]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="1 roles have 2 sequences"):
        recipe_parts.speeches(clients=2, least=2, length=4)


def test_keras_weights_are_glorots() -> None:
    """Of a layer from 300 to 100: the uniform variant ends at sqrt(6 / 400) = 0.1225; biases are zero."""
    torch.manual_seed(0)
    weight, bias = recipe_parts.linear_fc((300, 100, 10)).fc1.parameters()  # type: ignore[union-attr]
    assert 0.1215 < float(weight.detach().abs().max()) <= 0.12248
    assert not bias.any()


def test_recipes_are_listed_with_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli.app, ["list", "recipes", "--json"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["name"] for row in rows] == list(RECIPES)
    assert rows[0]["scaled_arms"] == list(RECIPES["fedlama-cifar10"].scaled.arms)
    monkeypatch.setenv("COLUMNS", "80")
    plain = CliRunner().invoke(cli.app, ["list", "recipes"]).stdout
    row = next(line for line in plain.splitlines() if "fedlama-cifar10" in line)
    assert "about 12 minutes" in row
    assert "2110.10302" in row
    assert all(0 < len(cli.looking._duration(v.size)) < 30 for r in RECIPES.values() for v in (r.published, r.scaled))
