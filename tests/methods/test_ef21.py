"""EF21 by hand on two clients with constant gradients, the facts about its estimates, and a plain loop."""

import pytest
import torch
from from_scratch.ef21 import ef21
from parity import PAIRS, SEED, compare, examples, small_mlp
from torch import nn

import cases
import lamina
from lamina import EF21, FedAvg, LocalSGD, wire
from lamina.methods.ef21 import Client, Server


def nan_from_100(output, target):
    """Linear in the weights; NaN for targets from 100 on: such a client's message cannot be used."""
    return output.mean() * (float("nan") if target.max() >= 100 else 1)


def federation(slopes, targets=None, **settings):
    """One client per slope; a round is one step of lr 1, so a client's update is always minus its slope."""
    model = nn.Linear(len(slopes[0]), 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    targets = targets or [0] * len(slopes)
    clients = {
        f"{i}": (torch.tensor([slope]).double(), torch.tensor([[target]]).double())
        for i, (slope, target) in enumerate(zip(slopes, targets, strict=True))
    }
    return lamina.Federation(
        model,
        lamina.ClientData.from_clients(clients),
        method=EF21(),
        local=LocalSGD(lr=1.0, batch_size=None),
        loss=nan_from_100,
        engine="loop",
        **{"uplink": wire.TopK(0.5), "seed": SEED} | settings,
    )


def numbers(state, clients=2):
    """x, g and the g_i of all clients."""
    rows = [state.clients.get(i).row for i in range(clients)]
    own = [None if row is None else row.method.estimate["weight"].reshape(-1).tolist() for row in rows]
    return state.params["weight"].reshape(-1).tolist(), state.server.estimate["weight"].reshape(-1).tolist(), own


def test_two_clients_by_hand():
    """Updates (4, 2) and (-2, 6) in every round; of two entries the larger travels.

    Round 0: client 0 sends 4, g_0 = (4, 0); client 1 sends 6, g_1 = (0, 6). g = (2, 3), x = (2, 3).
    Round 1: (4, 2) - g_0 = (0, 2) sends 2, g_0 = (4, 2); (-2, 6) - g_1 = (-2, 0) sends -2, g_1 = (-2, 6).
      g = (1, 4), x = (3, 7). From now on both know all, nothing is lost any more: x = (4, 11).
    """
    assert [numbers(state) for state, _ in federation([[-4, -2], [2, -6]]).run(3)] == [
        ([2, 3], [2, 3], [[4, 0], [0, 6]]),
        ([3, 7], [1, 4], [[4, 2], [-2, 6]]),
        ([4, 11], [1, 4], [[4, 2], [-2, 6]]),
    ]


def test_partial_participation_by_hand():
    """The same, one client a round: 0, then 1, then 1.

    Round 0: client 0 sends 4, g_0 = (4, 0), g = 1/2 * (4, 0), x = (2, 0): the mean is over both.
    Round 1: client 1 sends 6, g_1 = (0, 6), g = (2, 0) + 1/2 * (0, 6) = (2, 3), x = (4, 3): client 0 still counts.
    Round 2: (-2, 6) - g_1 = (-2, 0) sends -2, g_1 = (-2, 6), g = (2, 3) + (-1, 0) = (1, 3), x = (5, 6).
    """
    seed = next(s for s in range(50) if drawn(s) == [(0,), (1,), (1,)])
    rounds = [numbers(state) for state, _ in federation([[-4, -2], [2, -6]], cohort=1, seed=seed).run(3)]
    assert rounds == [
        ([2, 0], [2, 0], [[4, 0], None]),
        ([4, 3], [2, 3], [[4, 0], [0, 6]]),
        ([5, 6], [1, 3], [[4, 0], [-2, 6]]),
    ]


def drawn(seed):
    return [record.cohort for _, record in federation([[-4, -2], [2, -6]], cohort=1, seed=seed).run(3)]


def test_a_refused_message_is_in_no_estimate():
    """As in the first round above, with a third client whose loss is NaN: g = (1/3)(4, 6), and it has no g_i."""
    fed = federation([[-4, -2], [2, -6], [1, 1]], [0, 0, 100])
    state, record = next(fed.run(1))
    x, g, own = numbers(state, 3)
    assert [c.refused is not None for c in record.clients] == [False, False, True]
    assert g == x == pytest.approx([4 / 3, 2], rel=1e-15)
    assert own == [[4, 0], [0, 6], None]


def test_a_layer_that_was_not_asked_for_keeps_its_estimates_and_does_not_move():
    method = EF21()
    client = Client({"a": torch.tensor([5.0]), "b": torch.tensor([7.0])})
    sent, client = method.report(client, None, None, {"update": {"a": torch.tensor([9.0])}})
    assert sent["update"] == {"a": torch.tensor([4.0])}
    assert method.settle(client, sent, {"update": {"a": torch.tensor([3.0])}}) == Client(
        {"a": torch.tensor([8.0]), "b": torch.tensor([7.0])}
    )
    params = {"a": torch.tensor([0.0]), "b": torch.tensor([0.0])}
    plan = lamina.Plan(round=0, seed=0, params=params, buffers={}, upload=frozenset("a"), lr=0.1, participation=0.5)
    server = Server({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])})
    mean, server = method.step(server, plan, {"update": {"a": torch.tensor([3.0])}})
    assert mean["update"] == {"a": torch.tensor([2.5])}  # 1 + 1/2 * 3
    assert server == Server({"a": torch.tensor([2.5]), "b": torch.tensor([2.0])})


def test_entries_outside_a_mask_do_not_move_but_are_not_forgotten():
    """g = (1, 2) + (1, 0), the second entry pruned: the step is (2, 0), and g = (2, 2) still the mean of the g_i."""
    mask = {"a": torch.tensor([True, False])}
    plan = lamina.Plan(
        round=0, seed=0, params={"a": torch.zeros(2)}, buffers={}, upload=frozenset("a"), lr=0.1, mask=mask
    )
    mean, server = EF21().step(Server({"a": torch.tensor([1.0, 2.0])}), plan, {"update": {"a": torch.tensor([1.0, 0])}})
    assert mean["update"]["a"].tolist() == [2, 0]
    assert server.estimate["a"].tolist() == [2, 2]


MANY = LocalSGD(lr=0.1, momentum=0.9, batch_size=8, epochs=2)


@pytest.mark.parametrize("uplink", [wire.TopK(0.1), wire.Dense("sign"), wire.RandomK(0.3)], ids=repr)
@pytest.mark.parametrize("cohort", ["all", 2])
def test_the_servers_estimate_is_the_mean_of_the_clients(uplink, cohort):
    """In float64, after every round, whatever the weights; a client that has never taken part counts as 0."""
    fed = cases.federation(EF21(), "double", local=MANY, uplink=uplink, cohort=cohort, weights="examples")
    for state, _ in fed.run(6):
        for name, g in state.server.estimate.items():
            total = sum(state.clients.get(c).row.method.estimate[name] for c in state.clients)
            torch.testing.assert_close(g, total / 5, rtol=1e-13, atol=1e-15)


def test_with_a_lossless_uplink_an_estimate_is_the_last_update():
    fed = cases.federation(EF21(), "double", cohort="all", weights="uniform", local=MANY)
    before = fed.initial.params
    for state, _ in fed.run(3):
        for name, x in state.params.items():  # the mean of the last updates is how the model moved
            mean = sum(state.clients.get(c).row.method.estimate[name] for c in state.clients) / 5
            torch.testing.assert_close(before[name] + mean, x, rtol=1e-13, atol=1e-15)
        before = state.params
    chain = lamina.Chain(Remember(), EF21())
    for state, record in cases.federation(chain, "double", cohort=1, local=MANY).run(4):
        last, client = state.clients.get(record.cohort[0]).row.method
        for name, u in last.items():
            torch.testing.assert_close(client.estimate[name], u, rtol=1e-13, atol=1e-16)


class Remember(lamina.Method):
    """A client's last update, as trained."""

    def init_client(self, params):
        return {}

    def report(self, client, plan, work, message):
        return message, message["update"]


def test_when_nothing_is_lost_and_all_count_alike_it_is_fedavg_to_rounding():
    options = {"cohort": "all", "weights": "uniform", "local": MANY, "model": "double"}
    ours, plain = (cases.states(cases.federation(m, **options), 5) for m in (EF21(), FedAvg()))
    for a, b in zip(ours, plain, strict=True):
        for name, x in a.params.items():
            torch.testing.assert_close(x, b.params[name], rtol=1e-12, atol=1e-14)


def test_the_federations_weights_have_no_say():
    shas = [
        cases.states(cases.federation(EF21(), weights=weights, uplink=wire.TopK(0.2), buffers="keep"))[-1].params
        for weights in ("examples", "uniform")
    ]
    assert cases.bits(shas[0]) == cases.bits(shas[1])


@pytest.mark.parametrize("density", [0.1, 0.35])
@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_it_agrees_with_a_plain_loop(dtype, weights, momentum, cohort, density):
    """Whose server keeps every client's g_i and takes their mean anew."""
    compare(EF21(), ef21, small_mlp(dtype), examples(dtype), dtype, uplink=wire.TopK(density),
            mine={"density": density}, weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_agrees_with_a_plain_loop_over_two_epochs(dtype):
    compare(EF21(), ef21, small_mlp(dtype), examples(dtype), dtype, uplink=wire.TopK(0.1), mine={"density": 0.1},
            momentum=0.9, cohort=3, epochs=2)  # fmt: skip


def test_it_stands_before_what_reads_or_replaces_the_mean():
    lamina.Chain(EF21(), lamina.FedAdam())
    for wrong, why in (
        ((lamina.FedAdam(), EF21()), "it steps by the mean update, which the other recovers"),
        ((EF21(), lamina.FedLAMA()), "the spread of the codes that one sends is not that of the updates"),
        ((lamina.FedLAMA(), EF21()), "the spread of the codes that one sends is not that of the updates"),
        ((lamina.ErrorFeedback(), EF21()), "both would send again what the uplink lost"),
    ):
        with pytest.raises(lamina.ConfigError, match=why) as refused:
            lamina.Chain(*wrong)
        assert refused.value.code == "E115"
