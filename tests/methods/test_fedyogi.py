"""FedYogi by hand."""

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


def test_v_rises_falls_and_stays():
    """lr 1, b1 = b2 = 1/2, eps 1, so v starts at 1.

    D = 4: D^2 > v, v = 1 + 16/2 = 9 (FedAdam: 17/2), m = 2, step 2 / (3 + 1) = 1/2.
    D = 1: D^2 < v, v = 9 - 1/2 = 17/2 (FedAdam from 9: 5), m = 3/2.
    D^2 = v: v stays.
    """
    method = lamina.FedYogi(lr=1.0, b1=0.5, b2=0.5, eps=1.0)
    rounds = list(steps(method, [{"w": 4}, {"w": 1}]))
    assert [moments["w"] for _, moments in rounds] == [(2, 9), (1.5, 8.5)]
    assert rounds[0][0] == {"w": 0.5}
    assert rounds[1][0]["w"] == pytest.approx(1.5 / (8.5**0.5 + 1), rel=1e-15)
    assert next(steps(method, [{"w": -1}]))[1]["w"] == (-0.5, 1)


def test_a_parameter_absent_from_the_mean_is_left_alone_moments_included():
    method = lamina.FedYogi(lr=1.0, b1=0.5, b2=0.5, eps=1.0)
    rounds = list(steps(method, [{"w": 0, "b": 4}, {"w": 0}, {"w": 0, "b": 1}]))
    assert [moments["b"] for _, moments in rounds] == [(2, 9), (2, 9), (1.5, 8.5)]
    assert rounds[1][0] == {"w": 0}


def test_its_settings_are_checked_like_fedadams():
    with pytest.raises(lamina.ConfigError, match="b2=1: expected 0 <= b2 < 1"):
        lamina.FedYogi(b2=1)
    with pytest.raises(lamina.ConfigError, match="eps=0: expected a number > 0"):
        lamina.FedYogi(eps=0)
