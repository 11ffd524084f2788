"""FedAdagrad by hand."""

import pytest
import torch

import lamina
from lamina.method import Plan


def steps(method, means):
    """What the server adds to its weights in every round, given the mean update of each; and its v afterwards."""
    params = {"w": torch.zeros(1, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.float64)}
    server = method.init(params)
    for t, mean in enumerate(means):
        tree = {name: torch.tensor([x], dtype=torch.float64) for name, x in mean.items()}
        plan = Plan(round=t, seed=0, params=params, buffers={}, upload=frozenset(mean), lr=0.1)
        stepped, server = method.step(server, plan, {"update": tree})
        yield {name: x.item() for name, x in stepped["update"].items()}, {n: x.item() for n, x in server.v.items()}


def test_two_rounds():
    """lr 1, eps 3, so v starts at 9. D = 4: v = 25, step 4 / (5 + 3) = 1/2. D = -12: v = 169, step -12 / 16 = -3/4."""
    rounds = list(steps(lamina.FedAdagrad(lr=1.0, eps=3.0), [{"w": 4}, {"w": -12}]))
    assert rounds == [({"w": 0.5}, {"w": 25, "b": 9}), ({"w": -0.75}, {"w": 169, "b": 9})]


def test_a_parameter_absent_from_the_mean_is_left_alone():
    """b: v = 9 + 16 = 25; absent; then 25 + 144 = 169."""
    rounds = list(steps(lamina.FedAdagrad(lr=1.0, eps=3.0), [{"w": 4, "b": 4}, {"w": 0}, {"w": 0, "b": 12}]))
    assert [v["b"] for _, v in rounds] == [25, 25, 169]
    assert [update.get("b") for update, _ in rounds] == [0.5, None, 0.75]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1}, "lr=-1: expected 0 <= lr < inf"),
        ({"eps": 0}, "eps=0: expected a number > 0"),
        ({"eps": float("nan")}, "eps=nan: expected a number > 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.FedAdagrad(**setting)
    assert refused.value.message == message
