"""FedProx by hand: one weight w, half the squared distance to the target, so the gradient is w - target."""

import pytest
import torch
from torch import nn

import lamina


def run(rounds, targets, method, **local):
    """w after every round; one example per client."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    clients = {str(y): (torch.ones(1, 1).double(), torch.full((1, 1), y).double()) for y in targets}
    fed = lamina.Federation(
        model,
        lamina.ClientData.from_clients(clients),
        method=method,
        local=lamina.LocalSGD(**({"lr": 0.5, "batch_size": None, "epochs": 2} | local)),
        loss=lambda output, target: ((output - target) ** 2).mean() / 2,
        engine="loop",
    )
    return [state.params["weight"].item() for state, _ in fed.run(rounds)]


def test_the_pull_is_towards_the_global_weight_of_the_round():
    """Target 2, mu 1/2, lr 1/2, two steps a round.

    Round 0, anchor 0: g = -2 + 0, w = 1; g = -1 + 1/2 * 1 = -1/2, w = 5/4 (FedAvg: 3/2).
    Round 1, anchor 5/4: g = -3/4, w = 13/8; g = -3/8 + 1/2 * 3/8 = -3/16, w = 55/32.
    """
    assert run(2, [2], lamina.FedProx(mu=0.5)) == [1.25, 1.71875]
    assert run(1, [2], lamina.FedAvg()) == [1.5]


def test_the_first_step_is_not_pulled():
    assert run(3, [2, 8], lamina.FedProx(mu=5.0), epochs=1) == run(3, [2, 8], lamina.FedAvg(), epochs=1)


def test_the_pull_is_added_before_clipping():
    """Target 2, mu 1/2, lr 1/2, clip 1.

    Step 0: g = -2, clipped to -1, w = 1/2. Step 1: g = -3/2 + 1/2 * 1/2 = -5/4, clipped to -1, w = 1.
    (Pull after clipping: -1 + 1/4 = -3/4, w = 7/8.)
    """
    assert run(1, [2], lamina.FedProx(mu=0.5), clip=1.0) == [1.0]


def test_weight_decay_pulls_to_zero_besides():
    """Target 2, mu 1/2, decay 1/2: g = -2, w = 1; g = -1 + 1/2 (prox) + 1/2 (decay) = 0, w = 1. Then anchor 1:
    g = -1 + 1/2 = -1/2, w = 5/4; g = -3/4 + 1/8 + 5/8 = 0, w = 5/4."""
    assert run(2, [2], lamina.FedProx(mu=0.5), weight_decay=0.5) == [1.0, 1.25]


def test_mu_0_is_fedavg():
    assert run(3, [2, 8], lamina.FedProx(mu=0)) == run(3, [2, 8], lamina.FedAvg())


@pytest.mark.parametrize("mu", [-1, -1e-9, float("inf"), float("nan")])
def test_mu_below_zero_or_not_finite_is_refused(mu):
    with pytest.raises(lamina.ConfigError, match=f"mu={mu}: expected a number >= 0") as refused:
        lamina.FedProx(mu=mu)
    assert refused.value.code == "E101"
