"""Magnitude pruning by hand, what it sends, and against a plain loop."""

import pytest
import torch
from from_scratch.magnitude_pruning import magnitude_pruning
from parity import PAIRS, compare, examples, small_cnn, small_mlp
from torch import nn

import cases
import lamina
from lamina import MagnitudePruning, wire
from lamina.methods.magnitude_pruning import largest


def still(method, rounds, weights=((8.0, -7, 6, -5, 4, -3, 2, -1),)):
    """Weights after every round of a Linear whose gradient is 0."""
    model = nn.Linear(len(weights[0]), len(weights), bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor(weights, dtype=torch.float64)
    data = lamina.ClientData.from_clients({"a": (torch.zeros(1, len(weights[0])).double(), torch.zeros(1, 1).double())})
    fed = lamina.Federation(model, data, method=method, loss=lambda output, target: output.mean(), engine="loop")
    return [state.params["weight"][0].tolist() for state, _ in fed.run(rounds)]


def test_eight_weights_fall_to_two_along_the_cubic():
    """density 1/4 from round 1 to round 5: 1/4 + 3/4 * (1, 27/64, 1/8, 1/64, 0) = 1, .566, .344, .262, .25, of eight
    entries 8, 4, 2, 2, 2. Nothing happens before round 1."""
    method = MagnitudePruning(density=0.25, start=1, end=5, every=1)
    assert [method.kept(t) for t in range(7)] == [None, 1.0, 0.56640625, 0.34375, 0.26171875, 0.25, None]
    rounds = still(method, 7)
    assert [sum(w != 0 for w in row) for row in rounds] == [8, 8, 4, 2, 2, 2, 2]
    assert rounds[2] == [8, -7, 6, -5, 0, 0, 0, 0]
    assert rounds[-1] == [8, -7, 0, 0, 0, 0, 0, 0]


def test_it_is_pruned_every_so_many_rounds():
    """start=0, end=4, every=2: after rounds 0, 2 and 4."""
    method = MagnitudePruning(density=0.25, end=4, every=2)
    assert [t for t in range(9) if method.kept(t) is not None] == [0, 2, 4]
    assert [sum(w != 0 for w in row) for row in still(method, 6)] == [8, 8, 2, 2, 2, 2]


def test_with_no_rounds_in_between_the_density_falls_at_once():
    assert still(MagnitudePruning(density=0.25, start=1, end=1, every=3), 3)[1:] == [[8, -7] + [0] * 6] * 2


def test_ties_keep_the_lower_index_and_pruned_ones_stay_out():
    """Five equal weights at half: floor(2.5) = 2, the first two. And a weight of 0 within the mask goes before any
    outside."""
    ones = torch.ones(5)
    mask = largest({"a": ones}, {}, 0.5, "layer")["a"]
    assert mask.tolist() == [1, 1, 0, 0, 0]
    last = torch.tensor([0, 0, 0, 1, 1], dtype=torch.bool)
    assert largest({"a": torch.zeros(5)}, {"a": last}, 0.2, "layer")["a"].tolist() == [0, 0, 0, 1, 0]


def test_one_threshold_for_all_layers_leaves_one_entry_of_each():
    """floor(.5 * 8) = 4 of (9 8 7 6 5 4), (.1 .2): 9 8 7, and .2, the largest of its layer."""
    weights = {"a": torch.tensor([9.0, 8, 7, 6, 5, 4]), "b": torch.tensor([0.1, -0.2])}
    masks = largest(weights, {}, 0.5, "global")
    assert masks["a"].tolist() == [1, 1, 1, 0, 0, 0]
    assert masks["b"].tolist() == [0, 1]
    assert [int(m.sum()) for m in largest(weights, {}, 0.01, "global").values()] == [1, 1]
    assert [int(m.sum()) for m in largest(weights, {}, 0.01, "layer").values()] == [1, 1]


OPTIMISERS = [(), (lamina.FedAvgM(),), (lamina.FedAdam(lr=0.1),), (lamina.FedYogi(lr=0.1),)]


@pytest.mark.parametrize("before", OPTIMISERS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_was_pruned_stays_zero_also_after_an_optimiser_with_a_memory(before, scope):
    local = lamina.LocalSGD(lr=0.1, momentum=0.9, weight_decay=0.05, batch_size=8)
    method = MagnitudePruning(density=0.2, end=4, every=2, scope=scope)
    earlier = {}
    for state, _ in cases.federation(lamina.Chain(*before, method), local=local).run(7):
        mask = state.server[-1].mask
        for name, m in mask.items():
            assert not state.params[name][~m].any()
            assert not (m & ~earlier.get(name, torch.ones_like(m))).any()  # nothing comes back
        earlier = mask
    total = sum(m.numel() for m in earlier.values())
    kept = sum(int(m.sum()) for m in earlier.values())
    assert kept == int(0.2 * total) if scope == "global" else 0.1 < kept / total <= 0.2


def test_an_optimiser_after_it_is_refused():
    with pytest.raises(lamina.ConfigError, match="an optimiser would fill again what was pruned") as refused:
        lamina.Chain(MagnitudePruning(), lamina.FedAvgM())
    assert refused.value.code == "E115"


@pytest.mark.parametrize("other", [lamina.FedLAMA(), lamina.FedLUAR(), lamina.SSFL(), lamina.FedDST()])
def test_it_does_not_go_with(other):
    with pytest.raises(lamina.ConfigError):
        lamina.Chain(other, MagnitudePruning())


def test_only_kept_values_travel_and_the_mask_after_every_pruning():
    """Prunings after rounds 1 and 2 (round 0 keeps all): the mask goes down in rounds 2 and 3."""
    method = MagnitudePruning(density=0.25, end=2, every=1)
    fed = cases.federation(method, model="small", cohort="all", diagnostics=False)
    mask = {}
    for state, record in fed.run(5):
        up = {t.layer: t.bytes for t in record.traffic if t.direction == "up"}
        down = {t.layer: t.bytes for t in record.traffic if t.direction == "down"}
        for name, x in state.params.items():
            kept = int(mask[name].sum()) if name in mask else x.numel()
            assert up[name] == 5 * 4 * kept
            assert down[name] == 5 * 4 * kept
        size = len(wire.encode(mask, wire.Dense())) if mask else 0
        assert down.get("_mask", 0) == (5 * size if record.round in (2, 3) else 0)
        mask = state.server.mask
    assert {name: int(m.sum()) for name, m in mask.items()} == {"fc1.weight": 112, "fc2.weight": 8, "fc3.weight": 5}


def test_a_personal_layer_is_never_pruned():
    chain = lamina.Chain(lamina.Personal("head"), MagnitudePruning(density=0.2, end=1, every=1))
    state = cases.states(cases.federation(chain), 3)[-1]
    assert set(state.server[1].mask) == {"conv.weight", "first.weight"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"density": 0}, "density=0: expected 0 < density <= 1"),
        ({"start": -1}, "start=-1: expected a whole number of rounds >= 0"),
        ({"start": 5, "end": 4}, "end=4: expected a whole number of rounds >= start=5"),
        ({"every": 0}, "every=0: expected a whole number of rounds >= 1"),
        ({"scope": "model"}, "scope='model': expected one of layer, global"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(lamina.ConfigError, match=said):
        MagnitudePruning(**settings)


def test_the_interval_must_divide_the_span():
    with pytest.raises(lamina.ConfigError, match="expected a divisor of the 95 rounds") as refused:
        MagnitudePruning(start=5, end=100, every=10)
    assert refused.value.remedy == "end=95 would do"


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_parity(dtype, weights, momentum, cohort, scope):
    method = MagnitudePruning(density=0.3, start=1, end=7, every=2, scope=scope)
    compare(method, magnitude_pruning, small_mlp(dtype), examples(dtype), dtype,
            mine={"sparsity": 0.7, "t0": 1, "n": 3, "dt": 2, "scope": scope},
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


def test_parity_with_convolutions_and_decay():
    cnn = small_cnn(torch.float64)
    method = MagnitudePruning(density=0.25, start=0, end=8, every=4)
    compare(method, magnitude_pruning, nn.Sequential(cnn[0], *cnn[2:]), examples(torch.float64, (1, 5, 5)),
            torch.float64, mine={"sparsity": 0.75, "t0": 0, "n": 2, "dt": 4, "scope": "layer"}, lr=0.03,
            weight_decay=0.05)  # fmt: skip
