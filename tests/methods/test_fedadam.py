"""FedAdam by hand."""

import pytest
import torch

import lamina
from lamina.method import Plan


def steps(method, means):
    """What the server adds to its weights in every round, given the mean update of each; and its m, v afterwards."""
    params = {"w": torch.zeros(1, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    server = method.init(params)
    for t, mean in enumerate(means):
        tree = {name: torch.tensor([x], dtype=torch.float64) for name, x in mean.items()}
        plan = Plan(round=t, seed=0, params=params, buffers={}, upload=frozenset(mean), lr=0.1)
        stepped, server = method.step(server, plan, {"update": tree})
        moments = {name: (server.m[name].item(), server.v[name].item()) for name in params}
        yield {name: x.item() for name, x in stepped["update"].items()}, moments


def test_two_rounds_without_bias_correction():
    """lr 3, b1 = b2 = 1/2, eps 1, so v starts at 1.

    D = 7: m = 7/2, v = 1/2 + 49/2 = 25, step 3 * 3.5 / (5 + 1) = 7/4.
    D = 5: m = 7/4 + 5/2 = 17/4, v = 25/2 + 25/2 = 25, step 3 * 4.25 / 6 = 17/8.
    """
    rounds = list(steps(lamina.FedAdam(lr=3.0, b1=0.5, b2=0.5, eps=1.0), [{"w": 7}, {"w": 5}]))
    assert [update["w"] for update, _ in rounds] == [1.75, 2.125]
    assert [moments["w"] for _, moments in rounds] == [(3.5, 25), (4.25, 25)]


def test_a_parameter_absent_from_the_mean_is_left_alone_moments_included():
    method = lamina.FedAdam(lr=3.0, b1=0.5, b2=0.5, eps=1.0)
    rounds = list(steps(method, [{"w": 0, "b": 7}, {"w": 0}, {"w": 0, "b": 5}]))
    assert [moments["b"] for _, moments in rounds] == [(3.5, 25), (3.5, 25), (4.25, 25)]
    assert [update.get("b") for update, _ in rounds] == [1.75, None, 2.125]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1}, "lr=-1: expected 0 <= lr < inf"),
        ({"b1": 1}, "b1=1: expected 0 <= b1 < 1"),
        ({"b2": 1.5}, "b2=1.5: expected 0 <= b2 < 1"),
        ({"eps": -1e-3}, "eps=-0.001: expected a number > 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.FedAdam(**setting)
    assert refused.value.message == message


@pytest.mark.parametrize("second", [lamina.FedAvgM(), lamina.FedAdagrad(), lamina.FedAdam(lr=1.0), lamina.FedYogi()])
@pytest.mark.parametrize("between", [(), (lamina.FedProx(),)])
def test_two_server_optimisers_are_refused(second, between):
    first = lamina.FedAdam()
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.Chain(first, *between, second)
    assert refused.value.code == "E115"
    assert refused.value.message == (
        f"{first!r} with {second!r}: each replaces the mean update by a step of its own: use one"
    )
