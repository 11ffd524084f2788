"""Error feedback by hand: three weights and a loss that is linear in them, so every update is the same."""

import pytest
import torch
from torch import nn

import lamina
from lamina.methods.error_feedback import Client, ErrorFeedback


def run(rounds, slope, uplink, method=None):
    """(weights, residual) after every round of one client; a round is one step of lr 1: the update is -slope."""
    model = nn.Linear(len(slope), 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    data = lamina.ClientData.from_clients({"a": (torch.tensor([slope]).double(), torch.zeros(1, 1).double())})
    fed = lamina.Federation(
        model,
        data,
        method=method or lamina.ErrorFeedback(),
        uplink=uplink,
        local=lamina.LocalSGD(lr=1.0, batch_size=None),
        loss=lambda output, target: output.mean(),
        engine="loop",
    )
    for state, _ in fed.run(rounds):
        client = state.clients.get(0).row.method
        residual = client.residual["weight"].reshape(-1).tolist() if isinstance(client, Client) else None
        yield state.params["weight"].reshape(-1).tolist(), residual


def test_residual_after_top_1_of_3_entries():
    """Update (-3, 2, -1) in every round; the largest of update + residual travels.

    0: (-3, 2, -1) sends -3, leaves (0, 2, -1).    1: (-3, 4, -2) sends 4, leaves (-3, 0, -2).
    2: (-6, 2, -3) sends -6, leaves (0, 2, -3).    3: (-3, 4, -4) sends 4: of equal ones the first; (-3, 0, -4).
    """
    assert list(run(4, [3, -2, 1], lamina.wire.TopK(1 / 3))) == [
        ([-3, 0, 0], [0, 2, -1]),
        ([-3, 4, 0], [-3, 0, -2]),
        ([-9, 4, 0], [0, 2, -3]),
        ([-9, 8, 0], [-3, 0, -4]),
    ]


def test_without_it_the_small_entries_never_arrive():
    weights = [w for w, _ in run(4, [3, -2, 1], lamina.wire.TopK(1 / 3), lamina.FedAvg())]
    assert weights[-1] == [-12, 0, 0]


@pytest.mark.parametrize(
    "uplink",
    [
        lamina.wire.Dense("sign"),
        lamina.wire.Dense("int8"),
        lamina.wire.Dense("int4"),
        lamina.wire.TopK(0.5, values="sign"),
        lamina.wire.RandomK(0.5),
    ],
    ids=repr,
)
def test_what_arrived_and_what_is_left_add_up_to_all_updates(uplink):
    """Whatever the uplink does: after t rounds of update u, weights + residual = t * u."""
    slope = [3.0, -2.0, 1.0, 0.125, -7.0, 0.75]
    for t, (weights, residual) in enumerate(run(6, slope, uplink), start=1):
        total = torch.tensor(weights) + torch.tensor(residual)
        torch.testing.assert_close(total, -t * torch.tensor(slope), rtol=1e-6, atol=1e-6)
    assert any(residual)


def test_sign_leaves_the_distance_to_the_mean_magnitude():
    """Update (-3, 2, -1): the mean magnitude is 2, so (-2, 2, -2) arrives and (-1, 0, 1) is left."""
    assert next(run(1, [3, -2, 1], lamina.wire.Dense("sign"))) == ([-2, 2, -2], [-1, 0, 1])


def test_a_lossless_uplink_leaves_nothing():
    rounds = list(run(2, [3, -2, 1], lamina.wire.Dense()))
    assert rounds == [([-3, 2, -1], [0, 0, 0]), ([-6, 4, -2], [0, 0, 0])]


def test_a_layer_that_was_not_asked_for_keeps_its_residual():
    """Residuals 5 (a) and 7 (b); only a is asked for: 5 + 1 is sent, 4 arrives, 2 is left; b stays 7."""
    method, client = ErrorFeedback(), Client({"a": torch.tensor([5.0]), "b": torch.tensor([7.0])})
    sent, client = method.report(client, None, None, {"update": {"a": torch.tensor([1.0])}})
    assert sent["update"] == {"a": torch.tensor([6.0])}
    client = method.settle(client, sent, {"update": {"a": torch.tensor([4.0])}})
    assert client == Client({"a": torch.tensor([2.0]), "b": torch.tensor([7.0])})


def test_other_trees_are_not_compensated():
    method, buffers = ErrorFeedback(), {"mean": torch.tensor([1.0])}
    client = method.init_client({"a": torch.tensor([0.0])})
    message = {"update": {"a": torch.tensor([1.0])}, "buffers": buffers}
    sent, _ = method.report(client, None, None, message)
    assert sent["buffers"] is buffers
