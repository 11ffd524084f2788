"""FedAvgM by hand."""

import pytest
import torch

import lamina
from lamina.method import Plan


def steps(method, means):
    """What the server adds to its weights in every round, given the mean update of each."""
    params = {"w": torch.zeros(1, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    server = method.init(params)
    for t, mean in enumerate(means):
        tree = {name: torch.tensor([x], dtype=torch.float64) for name, x in mean.items()}
        plan = Plan(round=t, seed=0, params=params, buffers={}, upload=frozenset(mean), lr=0.1)
        stepped, server = method.step(server, plan, {"update": tree})
        yield {name: x.item() for name, x in stepped["update"].items()}


def test_two_rounds():
    """lr 1/2, momentum 1/2: m = 1, step 1/2; m = 1/2 + 1 = 3/2, step 3/4; m = 3/4 - 1 = -1/4, step -1/8."""
    method = lamina.FedAvgM(lr=0.5, momentum=0.5)
    assert list(steps(method, [{"w": 1}, {"w": 1}, {"w": -1}])) == [{"w": 0.5}, {"w": 0.75}, {"w": -0.125}]


def test_a_parameter_absent_from_the_mean_is_left_alone():
    """b: m = 1; absent (m would be 1/2); then m = 1/2 * 1 + 1 = 3/2, not 5/4."""
    method = lamina.FedAvgM(momentum=0.5)
    rounds = [{"w": 1, "b": 1}, {"w": 1}, {"w": 1, "b": 1}]
    assert list(steps(method, rounds)) == [{"w": 1, "b": 1}, {"w": 1.5}, {"w": 1.75, "b": 1.5}]


def test_lr_1_without_momentum_is_fedavg():
    means = [{"w": 0.3}, {"w": -0.7}]
    assert list(steps(lamina.FedAvgM(lr=1.0, momentum=0.0), means)) == means


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"momentum": 1}, "momentum=1: expected 0 <= momentum < 1"),
        ({"momentum": -0.5}, "momentum=-0.5: expected 0 <= momentum < 1"),
        ({"lr": -1}, "lr=-1: expected 0 <= lr < inf"),
        ({"lr": float("inf")}, "lr=inf: expected 0 <= lr < inf"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.FedAvgM(**setting)
    assert refused.value.message == message
