"""FedAvg by hand: one weight w, half the squared distance to the client's targets, so the gradient is w - target."""

import pytest
import torch
from torch import nn

import lamina


def half_squared(output, target):
    """NaN for targets from 100 on: such a client's message cannot be used."""
    return ((output - target) ** 2).mean() / 2 * (float("nan") if target.max() >= 100 else 1)


def run(rounds, targets, *, method=None, weights="examples", **local):
    """w after every round; a client holds as many copies of its target as `targets` says."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    clients = {str(y): (torch.ones(n, 1).double(), torch.full((n, 1), y).double()) for y, n in targets.items()}
    fed = lamina.Federation(
        model,
        lamina.ClientData.from_clients(clients),
        method=method or lamina.FedAvg(),
        local=lamina.LocalSGD(**({"lr": 0.5, "batch_size": None} | local)),
        weights=weights,
        loss=half_squared,
        engine="loop",
    )
    return [state.params["weight"].item() for state, _ in fed.run(rounds)]


def test_mean_weighted_by_examples():
    """Targets 2 (one example) and 4 (three examples), lr 1/2, one step a round.

    Round 0, w = 0: clients reach 0 - 1/2 (0 - 2) = 1 and 2; (1 * 1 + 3 * 2) / 4 = 7/4.
    Round 1, w = 7/4: 7/4 + 1/8 = 15/8 and 7/4 + 9/8 = 23/8; (15/8 + 69/8) / 4 = 21/8.
    """
    assert run(2, {2: 1, 4: 3}) == [1.75, 2.625]


def test_uniform_mean():
    """As above: (1 + 2) / 2 = 3/2; then 3/2 + 1/4 = 7/4 and 3/2 + 5/4 = 11/4, mean 9/4."""
    assert run(2, {2: 1, 4: 3}, weights="uniform") == [1.5, 2.25]


@pytest.mark.parametrize(("weights", "expected"), [("examples", 1.75), ("uniform", 1.5)])
def test_the_weights_are_normalised_over_the_accepted_messages(weights, expected):
    """As above, with a third client of four examples whose weights become NaN."""
    assert run(1, {2: 1, 4: 3, 100: 4}, weights=weights) == [expected]


def test_momentum_starts_from_zero_every_round():
    """One client, target 4, lr 1/2, momentum 1/2, two steps a round.

    Round 0: g = -4, v = -4, w = 2; g = -2, v = -2 - 2 = -4, w = 4.
    Round 1: g = 0, v = 0 (a kept buffer would be -2 and give w = 5), w = 4; again 4.
    """
    assert run(2, {4: 1}, momentum=0.5, epochs=2) == [4, 4]


def test_weight_decay_is_added_after_clipping():
    """One client, target 8, lr 1/2, weight decay 1/2, clip 2, two steps.

    Step 0: g = -8, clipped to -2, plus 0, w = 1. Step 1: g = -7, clipped to -2, plus 1/2 = -3/2, w = 7/4.
    (Decay before clipping: -7 + 1/2 clipped to -2, w = 2.)
    """
    assert run(1, {8: 1}, weight_decay=0.5, clip=2.0, epochs=2) == [1.75]


def test_a_gradient_below_the_clip_is_left_alone():
    assert run(1, {8: 1}, clip=8.0) == run(1, {8: 1}) == [4]


def test_a_zero_gradient_is_not_clipped_to_nan():
    assert run(1, {0: 1}, clip=1.0) == [0]


def test_adding_it_to_a_chain_changes_nothing():
    alone, chain = lamina.FedProx(0.5), lamina.Chain(lamina.FedAvg(), lamina.FedProx(0.5), lamina.FedAvg())
    assert run(3, {2: 1, 8: 3}, method=chain, epochs=3) == run(3, {2: 1, 8: 3}, method=alone, epochs=3)


def test_a_chain_of_nothing_is_refused():
    with pytest.raises(lamina.ConfigError, match=r"Chain\(\) is empty: expected at least one method"):
        lamina.Chain()
