"""FedDyn by hand: one weight y, half the squared distance to the target, so the gradient is y - target.

With alpha = 1 and lr = 1/2 one step lands on the minimum of the regularised loss: its curvature is 2.
"""

import pytest
import torch
from from_scratch.feddyn import feddyn
from parity import DTYPES, PAIRS, assert_equal_rounds, examples, from_scratch, small_mlp, with_lamina
from torch import nn
from torch.nn.utils import parameters_to_vector

import lamina


def half_squared(output, target):
    """NaN for targets from 100 on: such a client's message cannot be used."""
    return ((output - target) ** 2).mean() / 2 * (float("nan") if target.max() >= 100 else 1)


def federation(targets, method=None, inputs=None, **settings):
    """One client per target, with as many examples as `targets` says, all with input 1; full batches, lr 1/2."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    inputs = inputs or dict.fromkeys(targets, 1.0)
    clients = {
        str(y): (torch.full((n, 1), inputs[y]).double(), torch.full((n, 1), y).double()) for y, n in targets.items()
    }
    return lamina.Federation(
        model,
        lamina.ClientData.from_clients(clients),
        method=method or lamina.FedDyn(alpha=1.0),
        loss=half_squared,
        engine="loop",
        **{"local": lamina.LocalSGD(lr=0.5, batch_size=None)} | settings,
    )


def numbers(state, clients=2):
    """x, S and the h_k of all clients."""
    rows = [state.clients.get(k).row for k in range(clients)]
    slopes = [None if row is None else row.method.slope["weight"].item() for row in rows]
    return state.params["weight"].item(), state.server.total["weight"].item(), slopes


def test_two_rounds():
    """Targets 2 and 6.

    Round 0, x = 0, h = S = 0. Client 1: (y - 2) - 0 + (y - 0) = 2 (y - 1), so y = 1, h_1 = 0 - (1 - 0) = -1.
      Client 2: y = 3, h_2 = -3. u = 2, S = 0 + 2 = 2, x = 0 + 2 + 2 = 4.
    Round 1. Client 1: (y - 2) + 1 + (y - 4) = 2 (y - 5/2), so y = 5/2, h_1 = -1 - (5/2 - 4) = 1/2 = 5/2 - 2.
      Client 2: (y - 6) + 3 + (y - 4) = 2 (y - 7/2), so y = 7/2, h_2 = -3 + 1/2 = -5/2 = 7/2 - 6.
      u = -1, S = 2 - 1 = 1 = -(1/2 - 5/2) / 2, x = 4 - 1 + 1 = 4, the mean of the targets.
    """
    rounds = [numbers(state) for state, _ in federation({2: 1, 6: 1}).run(2)]
    assert rounds == [(4, 2, [-1, -3]), (4, 1, [0.5, -2.5])]


def test_more_local_steps_stay_at_the_minimum():
    local = lamina.LocalSGD(lr=0.5, batch_size=None, epochs=5)
    rounds = [numbers(state) for state, _ in federation({2: 1, 6: 1}, local=local).run(2)]
    assert rounds == [(4, 2, [-1, -3]), (4, 1, [0.5, -2.5])]


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_the_mean_is_uniform_whatever_the_weights(weights):
    fed = federation({2: 1, 6: 3}, weights=weights)
    assert numbers(next(fed.run(1))[0]) == (4, 2, [-1, -3])


def test_the_server_moves_by_the_share_of_clients_that_took_part():
    """One of the two clients: u = 1 or 3, S = u / 2, x = u + S; who is absent has no h_k of its own yet."""
    state, record = next(federation({2: 1, 6: 1}, cohort=1).run(1))
    present = record.cohort[0]
    x, s, slopes = numbers(state)
    assert (x, s, slopes[present]) == [(1.5, 0.5, -1), (4.5, 1.5, -3)][present]
    assert slopes[1 - present] is None


def test_only_accepted_messages_count():
    """Two of three clients are accepted: u = 2, S = 2/3 * 2, x = 10/3; the third one keeps what it had."""
    state, _ = next(federation({2: 1, 6: 1, 100: 1}).run(1))
    assert numbers(state, 3) == (pytest.approx(10 / 3), pytest.approx(4 / 3), [-1, -3, None])


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_clients_that_disagree_meet_at_the_minimum_of_the_mean_loss(weights):
    """Losses (w - 2)^2 / 2 and (2w - 6)^2 / 2, trained to the end of each round: FedAvg stays at a mean of the minima
    2 and 3. The mean loss has its own where (w - 2) + 2 (2w - 6) = 0: w = 14/5."""
    settings = {"local": lamina.LocalSGD(lr=0.2, batch_size=None, epochs=50), "weights": weights}
    clients = {2: 1, 6: 2}, {2: 1.0, 6: 2.0}
    *_, (state, _) = federation(clients[0], lamina.FedDyn(alpha=1.0), clients[1], **settings).run(60)
    assert state.params["weight"].item() == pytest.approx(14 / 5, rel=1e-9)
    *_, (plain, _) = federation(clients[0], lamina.FedAvg(), clients[1], **settings).run(60)
    assert plain.params["weight"].item() == pytest.approx({"uniform": 5 / 2, "examples": 8 / 3}[weights], rel=1e-5)


def test_the_minimum_does_not_depend_on_the_size_of_the_cohort():
    """With one of the two clients a round it is the same 14/5, also where they hold unlike numbers of examples."""
    settings = {"local": lamina.LocalSGD(lr=0.2, batch_size=None, epochs=50), "cohort": 1}
    *_, (state, _) = federation({2: 1, 6: 2}, lamina.FedDyn(alpha=1.0), {2: 1.0, 6: 2.0}, **settings).run(200)
    assert state.params["weight"].item() == pytest.approx(14 / 5, rel=1e-6)


def test_weight_decay_is_a_part_of_the_local_loss():
    """Loss (y - 2)^2 / 2 + y^2 / 2 with alpha = 2: 4 (y - 1/2), so lr = 1/4 lands at 1/2; h = -2 * 1/2 = -1 is its
    gradient there, 2 * 1/2 - 2."""
    local = lamina.LocalSGD(lr=0.25, batch_size=None, weight_decay=1.0)
    state, _ = next(federation({2: 1, 6: 1}, lamina.FedDyn(alpha=2.0), local=local).run(1))
    assert numbers(state)[2] == [-1, -3]


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


def test_a_layer_that_waits_is_pulled_to_its_last_aggregated_value_and_its_books_wait():
    """Round 0 asks for nothing: y = 1 and 3, no h_k, no S, x = 0. Round 1 goes on from there, at the minima of the
    same regularised losses, as x has not moved: x, S and the h_k become those of round 0 above."""
    fed = federation({2: 1, 6: 1}, lamina.Chain(Every2(), lamina.FedDyn(alpha=1.0)))
    (waiting, _), (due, _) = fed.run(2)
    assert waiting.params["weight"].item() == waiting.server[1].total["weight"].item() == 0
    assert [waiting.clients.get(k).row.method[1].slope["weight"].item() for k in range(2)] == [0, 0]
    assert (due.params["weight"].item(), due.server[1].total["weight"].item()) == (4, 2)
    assert [due.clients.get(k).row.method[1].slope["weight"].item() for k in range(2)] == [-1, -3]


@pytest.mark.parametrize("alpha", [0, 0.0, -1, float("nan"), float("inf"), True, "1"])
def test_what_is_no_strength_is_refused(alpha):
    with pytest.raises(lamina.ConfigError, match=r"alpha=.*: expected a number > 0"):
        lamina.FedDyn(alpha=alpha)


@pytest.mark.parametrize("other", [lamina.FedAdam(), lamina.FedAvgM(), lamina.FedDyn()])
def test_two_server_optimisers_are_refused(other):
    with pytest.raises(lamina.ConfigError, match="use one") as refused:
        lamina.Chain(lamina.FedDyn(alpha=0.1), other)
    assert refused.value.code == "E115"


def test_what_measures_the_mean_stands_before_it():
    with pytest.raises(lamina.ConfigError, match="before the other can read it"):
        lamina.Chain(lamina.FedDyn(), lamina.FedLAMA())


# Against a plain loop


def compare(dtype, alpha, **settings):
    model, clients = small_mlp(dtype), examples(dtype)
    ours = with_lamina(lamina.FedDyn(alpha=alpha), model, clients, **settings)
    theirs = from_scratch(feddyn, model, clients, alpha=alpha, **settings)
    assert_equal_rounds(ours, [r.server for r in theirs], dtype)
    close = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for (state, _), expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameters_to_vector(state.server.total.values()), -expected.h / alpha, **close)
        rows = {k: state.clients.get(k).row.method for k in state.clients}
        assert rows.keys() == expected.slopes.keys()
        for k, slope in expected.slopes.items():
            torch.testing.assert_close(parameters_to_vector(rows[k].slope.values()), slope, **close)


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_feddyn_agrees_with_a_plain_loop(dtype, weights, momentum, cohort):
    compare(dtype, 0.3, weights=weights, momentum=momentum, cohort=cohort)


@pytest.mark.parametrize("dtype", DTYPES)
def test_feddyn_agrees_with_a_plain_loop_under_weight_decay(dtype):
    compare(dtype, 0.05, weight_decay=0.05, epochs=2, cohort=4)
