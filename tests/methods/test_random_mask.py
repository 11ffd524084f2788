"""RandomMask: its layouts by hand, what it sends, and against a plain loop."""

import pytest
import torch
from from_scratch.random_mask import erk, random_mask
from parity import PAIRS, compare, examples, small_cnn, small_mlp
from torch import nn

import cases
import lamina
from lamina import RandomMask, wire
from lamina.layers import Layer, layer_table
from lamina.methods.masking import counts, prunable


def layers(*shapes):
    return [Layer(str(i), "conv2d", "weight", shape) for i, shape in enumerate(shapes)]


def test_erk_gives_every_layer_its_share_of_the_dimensions():
    """(40, 60), (20, 80), (10, 10): sums of dimensions 100, 100 and 20, together 220; 4,100 entries.

    A tenth is 410: c = 410 / 220 = 1.8636, so 186.4, 186.4 and 37.3 entries: densities .078, .116 and .37.
    """
    assert counts(layers((40, 60), (20, 80), (10, 10)), 0.1, "erk") == {"0": 186, "1": 186, "2": 37}


def test_erk_keeps_a_layer_whole_that_would_have_more_than_all():
    """(40, 60), (20, 80), (3, 3): sums 100, 100, 6, entries 2400, 1600 and 9; .2 of 4,009 are 801.8.

    c = 801.8 / 206 = 3.89 would give 23 of 9: whole. The rest: c = (801.8 - 9) / 200 = 3.964, 396.4 each.
    """
    assert counts(layers((40, 60), (20, 80), (3, 3)), 0.2, "erk") == {"0": 396, "1": 396, "2": 9}


def test_erk_counts_the_kernel():
    """(8, 4, 3, 3) and (10, 32): sums 18 and 42, 288 and 320 entries; half is 304, c = 304 / 60: 91.2 and 212.8."""
    assert counts(layers((8, 4, 3, 3), (10, 32)), 0.5, "erk") == {"0": 91, "1": 213}


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9, 0.999])
def test_erk_keeps_the_density_of_the_whole_model(density):
    table = prunable(layer_table(lamina.models.resnet20(10)))
    kept = counts(table, density, "erk")
    total = sum(layer.numel for layer in table)
    assert abs(sum(kept.values()) - density * total) <= len(table) / 2
    assert all(1 <= kept[layer.name] <= layer.numel for layer in table)
    assert list(kept.values()) == erk([torch.Size(layer.shape) for layer in table], density)


def test_a_density_of_1_keeps_every_layer_whole():
    for layout in ("erk", "uniform"):
        assert counts(layers((7, 3), (7, 3), (2, 5)), 1.0, layout) == {"0": 21, "1": 21, "2": 10}


def test_uniform_rounds_and_keeps_at_least_one():
    """.3 of 21 is 6.3, of 10 it is 3, of 1 it is .3."""
    assert counts(layers((7, 3), (2, 5), (1, 1)), 0.3, "uniform") == {"0": 6, "1": 3, "2": 1}


def test_a_layer_that_is_whole_costs_no_mask():
    """ERK of (7, 64), (5, 7), (4, 5): sums 71, 12, 9, together 92. .35 of 503 are 176.05: 135.9, 23.0 and 17.2 of 20
    entries; .4 of them are 201.2: 155.3, 26.2 and 19.7, which is all 20."""
    for density, whole in ((0.35, set()), (0.4, {"fc3.weight"})):
        state, _ = next(cases.federation(RandomMask(density), model="small").run(1))
        assert {"fc1.weight", "fc2.weight", "fc3.weight"} - state.server.mask.keys() == whole


def test_the_mask_stays_and_only_kept_values_travel():
    fed = cases.federation(RandomMask(0.4), model="small", cohort="all", diagnostics=False)
    masks = []
    for state, record in fed.run(3):
        masks.append(cases.bits(state.server.mask))
        kept = {name: int(m.sum()) for name, m in state.server.mask.items()}
        for name, x in state.params.items():
            assert record.layers[name].bytes_up == 5 * 4 * kept.get(name, x.numel())
            if name in kept:
                assert not x[~state.server.mask[name]].any()
        down = {t.layer: t.bytes for t in record.traffic if t.direction == "down"}
        size = len(wire.encode(state.server.mask, wire.Dense()))
        assert down.get("_mask", 0) == (5 * size if record.round == 0 else 0)
    assert masks[0] == masks[1] == masks[2]
    assert kept == {"fc1.weight": 155, "fc2.weight": 26}


def test_the_mask_depends_on_the_seed_alone():
    def mask(seed, **options):
        return cases.states(cases.federation(RandomMask(0.3), model="small", seed=seed, **options), 1)[0].server.mask

    assert cases.bits(mask(1)) == cases.bits(mask(1, cohort=1, local=lamina.LocalSGD(lr=1.0)))
    assert cases.bits(mask(1)) != cases.bits(mask(2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"density": 0}, "density=0: expected 0 < density <= 1"),
        ({"density": 20}, "density=20: expected 0 < density <= 1"),
        ({"layout": "er"}, "layout='er': expected one of erk, uniform"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(lamina.ConfigError, match=said):
        RandomMask(**settings)


def test_a_model_without_weights_to_mask_is_refused():
    data = lamina.ClientData.from_clients({"a": (torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1]))})
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.LayerNorm(6))
    with pytest.raises(lamina.ConfigError, match="the model has none"):
        lamina.Federation(model, data, method=RandomMask())


@pytest.mark.parametrize("layout", ["erk", "uniform"])
@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_parity(dtype, weights, momentum, cohort, layout):
    compare(RandomMask(density=0.4, layout=layout), random_mask, small_mlp(dtype), examples(dtype), dtype,
            mine={"density": 0.4, "layout": layout}, weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


def test_parity_with_convolutions_and_decay():
    cnn = small_cnn(torch.float64)
    compare(RandomMask(density=0.5), random_mask, nn.Sequential(cnn[0], *cnn[2:]), examples(torch.float64, (1, 5, 5)),
            torch.float64, mine={"density": 0.5, "layout": "erk"}, lr=0.03, weight_decay=0.05)  # fmt: skip
