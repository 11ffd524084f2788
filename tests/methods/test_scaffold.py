"""SCAFFOLD by hand: one weight y, half the squared distance to the target, so the gradient is y - target."""

import pytest
import torch
from torch import nn

import lamina


def half_squared(output, target):
    """NaN for targets from 100 on: such a client's message cannot be used."""
    return ((output - target) ** 2).mean() / 2 * (float("nan") if target.max() >= 100 else 1)


def federation(targets, method=None, **settings):
    """One client per target, with as many examples as `targets` says; full batches, lr 1/2, two steps a round."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    clients = {str(y): (torch.ones(n, 1).double(), torch.full((n, 1), y).double()) for y, n in targets.items()}
    return lamina.Federation(
        model,
        lamina.ClientData.from_clients(clients),
        method=method or lamina.Scaffold(),
        loss=half_squared,
        engine="loop",
        **{"local": lamina.LocalSGD(lr=0.5, batch_size=None, epochs=2)} | settings,
    )


def numbers(state):
    """x, c and the c_i of all clients."""
    rows = [state.clients.get(i).row for i in range(2)]
    controls = [None if row is None else row.method.control["weight"].item() for row in rows]
    return state.params["weight"].item(), state.server.control["weight"].item(), controls


def test_controls_after_two_rounds():
    """Targets 2 and 6, K * lr = 1.

    Round 0, x = 0, all controls 0. Client 1: y = 1, 3/2; c_1 = 0 - 0 + (0 - 3/2) = -3/2.
      Client 2: y = 3, 9/2; c_2 = -9/2. x = (3/2 + 9/2) / 2 = 3, c = (-3/2 - 9/2) / 2 = -3.
    Round 1. Client 1: g - c_1 + c = (y - 2) + 3/2 - 3 = y - 7/2, so y = 3, 13/4, 27/8;
      c_1 = -3/2 + 3 + (3 - 27/8) = 9/8, the mean of its gradients 1 and 5/4.
      Client 2: (y - 6) + 9/2 - 3 = y - 9/2, so y = 3, 15/4, 33/8; c_2 = -9/2 + 3 + (3 - 33/8) = -21/8.
      x = (27/8 + 33/8) / 2 = 15/4, c = (9/8 - 21/8) / 2 = -3/4.
    """
    rounds = [numbers(state) for state, _ in federation({2: 1, 6: 1}).run(2)]
    assert rounds == [(3, -3, [-1.5, -4.5]), (3.75, -0.75, [1.125, -2.625])]


def test_the_control_mean_is_uniform_where_the_update_is_weighted():
    """Targets 2 (one example) and 6 (three): x = (3/2 + 3 * 9/2) / 4 = 15/4, but c = (-3/2 - 9/2) / 2 = -3."""
    state, _ = next(federation({2: 1, 6: 3}).run(1))
    assert numbers(state) == (3.75, -3, [-1.5, -4.5])


def test_the_control_moves_by_the_share_of_clients_that_took_part():
    """One of the two clients: c = 0 + 1/2 * (-3/2 or -9/2); who is absent has no control of its own yet."""
    state, record = next(federation({2: 1, 6: 1}, cohort=1).run(1))
    present = record.cohort[0]
    x, c, own = numbers(state)
    assert (x, c, own[present]) == [(1.5, -0.75, -1.5), (4.5, -2.25, -4.5)][present]
    assert own[1 - present] is None


def test_only_accepted_messages_move_the_control():
    """Two of three clients are accepted: c = 2/3 * mean(-3/2, -9/2) = -2; the third one keeps what it had."""
    fed = federation({2: 1, 6: 1, 100: 1})
    (first, _), (second, _) = fed.run(2)
    assert numbers(first) == (3, pytest.approx(-2, rel=1e-15), [-1.5, -4.5])
    assert first.clients.get(2).row is None
    assert second.clients.get(2).row is None


def test_clients_take_their_own_number_of_steps():
    """Batches of one example, lr 1/2: client 1 (one example) steps once, client 2 (two examples) twice.

    y_1 = 1, K * lr = 1/2, c_1 = (0 - 1) / (1/2) = -2. y_2 = 9/2, K * lr = 1, c_2 = -9/2. c = (-2 - 9/2) / 2 = -13/4.
    """
    local = lamina.LocalSGD(lr=0.5, batch_size=1)
    state, _ = next(federation({2: 1, 6: 2}, local=local, weights="uniform").run(1))
    assert numbers(state) == (2.75, -3.25, [-2, -4.5])


class Every2(lamina.Method):
    """The weight is asked for in every second round only, and trained on locally in the one before."""

    hold = 2

    def init_client(self, params):
        return {}

    def plan(self, server, plan):
        return plan if plan.round % 2 else plan.keep(())

    def begin(self, client, plan, params):
        return params | client if plan.round % 2 else params

    def report(self, client, plan, work, message):
        return message, work.params


def test_a_waiting_layer_counts_all_its_steps_when_it_is_due():
    """Targets 2 and 6; nothing is asked for in round 0, so the controls of round 1 span four steps, K * lr = 2.

    Client 1: y = 1, 3/2, 7/4, 15/8; c_1 = (0 - 15/8) / 2 = -15/16, the mean of -2, -1, -1/2, -1/4.
    Client 2: three times that. x = 2 * 15/8 = 15/4, c = -2 * 15/16 = -15/8.
    """
    fed = federation({2: 1, 6: 1}, lamina.Chain(Every2(), lamina.Scaffold()))
    (waiting, first), (due, second) = fed.run(2)
    assert waiting.params["weight"].item() == 0
    assert waiting.server[1].control["weight"].item() == 0
    assert not first.layers["weight"].uploaded
    assert second.layers["weight"].uploaded
    assert due.params["weight"].item() == 3.75
    assert due.server[1].control["weight"].item() == -1.875
    assert [due.clients.get(i).row.method[1].control["weight"].item() for i in range(2)] == [-0.9375, -2.8125]
    assert [due.clients.get(i).row.method[1].travelled for i in range(2)] == [{}, {}]


class Spoil(lamina.Method):
    """Makes the update of the client with the steeper gradient NaN in round 1."""

    def report(self, client, plan, work, message):
        if plan.round != 1 or work.grads["weight"].item() > -0.5:
            return message, client
        return message | {"update": {"weight": message["update"]["weight"] * float("nan")}}, client


def test_what_a_cycle_lost_does_not_count_in_the_next():
    """As above, but in round 1 client 2 is refused, so all that it did since round 0 is gone.

    x = 15/8, c = 1/2 * (-15/16) = -15/32, c_2 = 0. Rounds 2 and 3: (y - 6) - 15/32 = y - 207/32, four steps from
    15/8, each halving the distance: x - y = -147/32 * 15/16 = -2205/512.
    c_2 = 15/32 - 2205/512 / 2 = -1725/1024, the mean of its four gradients.
    """
    fed = federation({2: 1, 6: 1}, lamina.Chain(Every2(), Spoil(), lamina.Scaffold()))
    states = [state for state, _ in fed.run(4)]
    assert states[1].params["weight"].item() == 15 / 8
    assert states[1].server[2].control["weight"].item() == -15 / 32
    assert states[3].clients.get(1).row.method[2].control["weight"].item() == -1725 / 1024


@pytest.mark.parametrize(("name", "value"), [("momentum", 0.9), ("weight_decay", 1e-4), ("clip", 1.0)])
def test_what_makes_option_ii_inexact_is_refused(name, value):
    local = lamina.LocalSGD(batch_size=None, **{name: value})
    with pytest.raises(lamina.ConfigError) as refused:
        federation({2: 1, 6: 1}, local=local)
    assert refused.value.message == f"Scaffold with local.{name}={value}: option II assumes plain SGD"
    assert refused.value.code == "E117"
    assert refused.value.where == f"local.{name}"
    assert refused.value.remedy == f"set local.{name} to 0, or say Scaffold(approximate=True)"
    federation({2: 1, 6: 1}, lamina.Scaffold(approximate=True), local=local)


def test_two_methods_that_send_a_control_are_refused():
    with pytest.raises(lamina.ConfigError, match="both correct the same drift") as refused:
        lamina.Chain(lamina.Scaffold(), lamina.FedProx(), lamina.Scaffold(approximate=True))
    assert refused.value.code == "E115"
    assert "Scaffold(approximate=False)" in refused.value.message
    assert "Scaffold(approximate=True)" in refused.value.message
