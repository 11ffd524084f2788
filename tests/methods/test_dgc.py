"""DGC by hand on three weights with a constant gradient, what momentum masking does, and a plain loop."""

import pytest
import torch
from from_scratch.dgc import dgc
from parity import PAIRS, compare, examples, small_mlp
from torch import nn

import cases
import lamina
from lamina import DGC, ErrorFeedback, FedAvg, LocalSGD, wire
from lamina.methods.dgc import Client


def run(rounds, method, uplink):
    """(weights, velocity, residual) after every round of one client, whose update is always (3, 2, -1)."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    fed = lamina.Federation(
        model,
        lamina.ClientData.from_clients({"a": (torch.tensor([[-3.0, -2, 1]]).double(), torch.zeros(1, 1).double())}),
        method=method,
        uplink=uplink,
        local=LocalSGD(lr=1.0, batch_size=None),
        loss=lambda output, target: output.mean(),
        engine="loop",
    )
    for state, _ in fed.run(rounds):
        client = state.clients.get(0).row.method
        yield tuple(tree["weight"].reshape(-1).tolist() for tree in (state.params, client.velocity, client.residual))


def test_three_rounds_by_hand():
    """Update (3, 2, -1), momentum 1/2; the largest of three entries travels.

    Round 0: v = e = (3, 2, -1); 3 is sent and masked: v = e = (0, 2, -1).
    Round 1: v = (3, 1 + 2, -1/2 - 1) = (3, 3, -3/2), e = (3, 5, -5/2); 5 is sent: v = (3, 0, -3/2), e = (3, 0, -5/2).
    Round 2: v = (3/2 + 3, 2, -3/4 - 1), e = (15/2, 2, -17/4); 15/2 is sent: v = (0, 2, -7/4), e = (0, 2, -17/4).
    """
    assert list(run(3, DGC(momentum=0.5), wire.TopK(1 / 3))) == [
        ([3, 0, 0], [0, 2, -1], [0, 2, -1]),
        ([3, 5, 0], [3, 0, -1.5], [3, 0, -2.5]),
        ([10.5, 5, 0], [0, 2, -1.75], [0, 2, -4.25]),
    ]


def test_a_quantised_value_is_sent_and_what_it_lost_is_left_without_momentum():
    """The mean magnitude of (3, 2, -1) is 2: (2, 2, -2) arrives, (1, 0, 1) is left, every velocity is masked."""
    assert next(run(1, DGC(momentum=0.5), wire.Dense("sign"))) == ([2, 2, -2], [0, 0, 0], [1, 0, 1])


def test_an_entry_that_waits_k_rounds_has_gathered_momentum():
    """Update u, momentum m: v = u (1 + ... + m^(k-1)), e = the sum of those. At m = 1/2, k = 3: 1 + 3/2 + 7/4."""
    *_, (_, v, e) = run(3, DGC(momentum=0.5), wire.TopK(1 / 3))
    assert (v[2], e[2]) == (-7 / 4, -17 / 4)


MANY = LocalSGD(lr=0.1, momentum=0.9, weight_decay=0.01, clip=1.0, batch_size=8, epochs=2)


@pytest.mark.parametrize("uplink", [wire.Dense(), wire.Dense("lossless"), wire.TopK(1.0)], ids=repr)
@pytest.mark.parametrize("model", ["odd", "double"])
def test_where_everything_arrives_it_is_fedavg_for_any_momentum(uplink, model):
    plain = cases.states(cases.federation(FedAvg(), model, local=MANY, uplink=uplink), 4)
    ours = cases.states(cases.federation(DGC(momentum=0.99), model, local=MANY, uplink=uplink), 4)
    assert [s.sha256() for s in ours] == [s.sha256() for s in plain]
    rows = [ours[-1].clients.get(c).row.method for c in ours[-1].clients]
    assert not any(x.any() for row in rows for tree in row for x in tree.values())


@pytest.mark.parametrize("uplink", [wire.TopK(0.2), wire.RandomK(0.3), wire.Dense("int8")], ids=repr)
def test_without_momentum_it_is_error_feedback_bit_for_bit(uplink):
    ours = cases.states(cases.federation(DGC(momentum=0.0), local=MANY, uplink=uplink), 4)
    plain = cases.states(cases.federation(ErrorFeedback(), local=MANY, uplink=uplink), 4)
    for a, b in zip(ours, plain, strict=True):
        assert a.sha256() == b.sha256()
        for c in b.clients:
            own, other = (s.clients.get(c).row.method.residual for s in (a, b))
            assert cases.bits(own) == cases.bits(other)


def test_velocity_is_masked_where_something_arrived_and_nowhere_else():
    fed = cases.federation(DGC(), local=MANY, uplink=wire.TopK(0.2), cohort="all")
    before = None
    for state, _ in fed.run(3):
        for c in state.clients:
            client = state.clients.get(c).row.method
            for name, v in client.velocity.items():
                e = client.residual[name]
                assert not v[e == 0].any()  # fp32: what is sent is sent whole, and leaves nothing
                if before is None:
                    assert torch.equal(v, e)
        before = state
    assert any(x.any() for x in client.velocity.values())


def test_a_layer_that_was_not_asked_for_keeps_velocity_and_residual():
    method = DGC(momentum=0.5)
    client = Client(
        {"a": torch.tensor([4.0]), "b": torch.tensor([6.0])}, {"a": torch.tensor([1.0]), "b": torch.tensor([7.0])}
    )
    sent, client = method.report(client, None, None, {"update": {"a": torch.tensor([3.0])}})
    assert sent["update"] == {"a": torch.tensor([6.0])}  # 1/2 * 4 + 3 + 1
    client = method.settle(client, sent, {"update": {"a": torch.tensor([4.0])}})
    assert client == Client(
        {"a": torch.tensor([0.0]), "b": torch.tensor([6.0])}, {"a": torch.tensor([2.0]), "b": torch.tensor([7.0])}
    )


@pytest.mark.parametrize("density", [0.1, 0.35])
@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_it_agrees_with_a_plain_loop(dtype, weights, momentum, cohort, density):
    compare(DGC(momentum=0.8), dgc, small_mlp(dtype), examples(dtype), dtype, uplink=wire.TopK(density),
            mine={"density": density, "correction": 0.8},
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


def test_it_agrees_with_a_plain_loop_as_it_stands():
    compare(DGC(), dgc, small_mlp(torch.float64), examples(torch.float64), torch.float64, uplink=wire.TopK(0.1),
            mine={"density": 0.1, "correction": 0.9}, cohort=3, epochs=2)  # fmt: skip


@pytest.mark.parametrize("momentum", [-0.1, 1, 1.5, float("nan"), "0.9"])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(lamina.ConfigError) as refused:
        DGC(momentum=momentum)
    assert refused.value.code == "E101"
    assert refused.value.message == f"momentum={momentum}: expected 0 <= momentum < 1; 0 is ErrorFeedback"


def test_with_error_feedback_it_is_refused():
    with pytest.raises(lamina.ConfigError, match="both would send again what the uplink lost"):
        lamina.Chain(ErrorFeedback(), DGC())
