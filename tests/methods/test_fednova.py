"""FedNova by hand: one weight y, half the squared distance to the target, so the gradient is y - target.

Batches hold one example, so a client takes as many steps as it has examples.
"""

import pytest
import torch
from from_scratch.fednova import fednova
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import DTYPES, PAIRS, TOLERANCE, compare, examples, small_mlp, with_lamina
from torch import nn

import lamina
from lamina.methods.fednova import accumulated


def half_squared(output, target):
    return ((output - target) ** 2).mean() / 2


def product(output, target):
    """Its gradient is the target, wherever y is."""
    return (output * target).mean()


def federation(targets, method=None, *, start=0.0, loss=half_squared, lr=0.5, momentum=0.0, **more):
    """One client per target, with as many examples as `targets` says."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, start)
    clients = {str(y): (torch.ones(n, 1).double(), torch.full((n, 1), y).double()) for y, n in targets.items()}
    return lamina.Federation(
        model,
        lamina.ClientData.from_clients(clients),
        method=method or lamina.FedNova(),
        loss=loss,
        engine="loop",
        local=lamina.LocalSGD(lr=lr, momentum=momentum, batch_size=1),
        **{"weights": "uniform"} | more,
    )


def weights(fed, rounds):
    return [state.params["weight"].item() for state, _ in fed.run(rounds)]


def test_a_round_by_hand():
    """Targets 2 (one step) and 6 (three steps), lr 1/2, from 0.

    Client 1: y = 1; sends 1/1. Client 2: y = 3, 9/2, 21/4; sends 21/4 / 3 = 7/4. tau_eff = (1 + 3) / 2 = 2.
    x = 2 * (1 + 7/4) / 2 = 11/4 (FedAvg: (1 + 21/4) / 2 = 25/8).
    """
    assert weights(federation({2: 1, 6: 3}), 1) == [2.75]
    assert weights(federation({2: 1, 6: 3}, lamina.FedAvg()), 1) == [3.125]


def test_the_effective_steps_are_weighted_as_the_update_is():
    """By examples p = 1/4, 3/4: tau_eff = (1 + 9) / 4 = 5/2, x = 5/2 * (1/4 + 3/4 * 7/4) = 125/32."""
    assert weights(federation({2: 1, 6: 3}, weights="examples"), 1) == [125 / 32]


def test_only_accepted_messages_count():
    """The third client's loss is infinite: x as in the first example."""

    def loss(output, target):
        return half_squared(output, target) * (float("inf") if target.max() >= 100 else 1)

    assert weights(federation({2: 1, 6: 3, 100: 2}, loss=loss), 1) == pytest.approx([2.75], rel=1e-14)


@pytest.mark.parametrize(("momentum", "norms"), [(0.0, (1, 2, 3)), (0.5, (1, 2.5, 4.25))])
def test_under_a_gradient_that_never_changes_all_clients_weigh_the_same(momentum, norms):
    """Gradients 1, -4 and 9 for one, two and three steps, lr 1/2. Momentum 1/2: the buffer is g (1, 3/2, 7/4), in all
    1, 5/2, 17/4 times g. x = -1/2 * tau_eff * (1 - 4 + 9) / 3 = -tau_eff, tau_eff = 2 or 31/12.
    """
    fed = federation({1: 1, -4: 2, 9: 3}, loss=product, momentum=momentum)
    assert weights(fed, 1) == pytest.approx([-sum(norms) / 3], rel=1e-14)
    plain = federation({1: 1, -4: 2, 9: 3}, lamina.FedAvg(), loss=product, momentum=momentum)
    expected = -0.5 * sum(n * g for n, g in zip(norms, (1, -4, 9), strict=True)) / 3
    assert weights(plain, 1) == pytest.approx([expected], rel=1e-14)


def fixed_point(lr, steps, norms):
    """Targets 2 and 6: K steps go 1 - (1 - lr)^K of the way, so x* = sum r_i b_i / sum r_i, r_i = that / norm_i."""
    r = [(1 - (1 - lr) ** k) / n for k, n in zip(steps, norms, strict=True)]
    return (r[0] * 2 + r[1] * 6) / sum(r)


@pytest.mark.parametrize(
    ("lr", "fedavg", "nova"), [(1 / 2, 0.5455, -0.5263), (1 / 8, 0.9013, -0.1274), (1 / 64, 0.9882, -0.0157)]
)
def test_the_bias_towards_many_steps_vanishes_with_the_learning_rate(lr, fedavg, nova):
    """Targets 2 (one step) and 6 (three), uniform weights: the minimum of the mean loss is 4.

    Where a round ends where it started: FedAvg at lr 1/2 (1/2 * 2 + 7/8 * 6) / (11/8) = 50/11, FedNova
    (1/2 * 2 + 7/24 * 6) / (19/24) = 66/19. As lr -> 0, FedAvg's goes to (2 + 3 * 6) / 4 = 5, FedNova's to 4: its
    bias is about -lr, because the gradient of who takes three steps shrinks on the way.
    """
    for method, norms, bias in ((lamina.FedAvg(), (1, 1), fedavg), (lamina.FedNova(), (1, 3), nova)):
        x = fixed_point(lr, (1, 3), norms)
        assert x - 4 == pytest.approx(bias, abs=5e-5)
        assert weights(federation({2: 1, 6: 3}, method, start=x, lr=lr), 1) == pytest.approx([x], rel=1e-13)


def test_runs_end_at_these_points():
    assert weights(federation({2: 1, 6: 3}), 60)[-1] == pytest.approx(66 / 19, rel=1e-12)
    assert weights(federation({2: 1, 6: 3}, lamina.FedAvg()), 60)[-1] == pytest.approx(50 / 11, rel=1e-12)


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(0, 0.99))
def test_the_closed_form_adds_up_the_momentum_buffer(steps, momentum):
    buffer = total = 0.0
    for _ in range(steps):
        buffer = momentum * buffer + 1
        total += buffer
    assert float(accumulated(torch.tensor(steps), momentum)) == pytest.approx(total, rel=1e-10)


def test_without_momentum_it_counts_steps_exactly():
    assert [float(accumulated(torch.tensor(k), 0.0)) for k in (1, 2, 3, 1000)] == [1, 2, 3, 1000]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_fedavg_to_rounding_where_all_take_the_same_number_of_steps(dtype, momentum):
    runs = [with_lamina(method, small_mlp(dtype), examples(dtype), cohort=3, steps=4, momentum=momentum)
            for method in (lamina.FedNova(), lamina.FedAvg())]  # fmt: skip
    for (ours, _), (plain, _) in zip(*runs, strict=True):
        for name, x in ours.params.items():
            torch.testing.assert_close(x, plain.params[name], **TOLERANCE[dtype])


def test_it_costs_one_number_per_client_in_a_section_of_its_own():
    nova, plain = (next(federation({2: 1, 6: 3}, m).run(1))[1] for m in (lamina.FedNova(), lamina.FedAvg()))
    rows = {t.layer: t.bytes for t in nova.traffic if t.direction == "up"}
    same = {t.layer: t.bytes for t in plain.traffic if t.direction == "up"}
    assert rows["weight"] == same["weight"]
    assert 2 * 8 <= rows["_norm"] < 2 * 64
    assert nova.bytes_up - plain.bytes_up < 2 * 96  # with its entry in the frame
    assert nova.bytes_down == plain.bytes_down


# With others


def test_fedluar_stores_the_update_that_was_recovered():
    model = small_mlp(torch.float64)
    (state, _), *_ = with_lamina(lamina.Chain(lamina.FedNova(), lamina.FedLUAR()), model, examples(torch.float64))
    for name, u in state.server[1].updates.items():
        torch.testing.assert_close(model.state_dict()[name] + u, state.params[name], rtol=1e-14, atol=1e-15)


def test_error_feedback_keeps_what_the_uplink_lost_of_the_divided_update():
    """Two weights of the same input, lr 1/4, so their sum goes half of the way to the target with every step.

    Client 1 (target 2, one step): 1/2 each. Client 2 (target 6, three steps): the sum is 21/4, 21/8 each, divided 7/8.
    Top-1 sends the first weight: x = 2 * (1/2 + 7/8) / 2 = 11/8 and 0; the residuals of the second are 1/2 and 7/8.
    """
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    clients = {str(y): (torch.ones(n, 2).double(), torch.full((n, 1), y).double()) for y, n in {2: 1, 6: 3}.items()}
    fed = lamina.Federation(
        model,
        lamina.ClientData.from_clients(clients),
        method=lamina.Chain(lamina.FedNova(), lamina.ErrorFeedback()),
        uplink=lamina.wire.TopK(0.5),
        local=lamina.LocalSGD(lr=0.25, batch_size=1),
        weights="uniform",
        loss=half_squared,
        engine="loop",
    )
    state, _ = next(fed.run(1))
    residuals = [state.clients.get(c).row.method[1].residual["weight"].tolist() for c in range(2)]
    assert state.params["weight"].tolist() == [[11 / 8, 0]]
    assert residuals == [[[0, 0.5]], [[0, 0.875]]]


@pytest.mark.parametrize("swap", [False, True])
def test_it_is_refused_with_fedlama(swap):
    pair = [lamina.FedLAMA(), lamina.FedNova()]
    with pytest.raises(lamina.ConfigError, match="the spread of the codes that one sends") as refused:
        lamina.Chain(*(pair[::-1] if swap else pair))
    assert refused.value.code == "E115"


@pytest.mark.parametrize("first", [lamina.FedAvgM(), lamina.FedAdam(), lamina.FedLUAR(), lamina.ErrorFeedback()])
def test_it_stands_before_what_reads_or_replaces_the_mean_or_keeps_what_was_lost(first):
    with pytest.raises(lamina.ConfigError) as refused:
        lamina.Chain(first, lamina.FedNova())
    assert refused.value.code == "E115"
    assert refused.value.remedy == f"put FedNova() before {first!r}"
    assert lamina.Chain(lamina.FedNova(), first).encodes


# Against a plain loop


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_parity(dtype, weights, momentum, cohort):
    compare(lamina.FedNova(), fednova, small_mlp(dtype), examples(dtype), dtype,
            weights=weights, momentum=momentum, cohort=cohort, epochs=2)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("local", [{"weight_decay": 0.05}, {"clip": 0.2}, {"clip": 0.2, "weight_decay": 0.05}], ids=str)
def test_parity_with_weight_decay_and_clipping(dtype, local):
    compare(lamina.FedNova(), fednova, small_mlp(dtype), examples(dtype), dtype, cohort=3, momentum=0.9, epochs=2,
            **local)  # fmt: skip
