"""STC by hand, against a plain loop, and what travels down."""

import itertools

import pytest
import torch
from from_scratch.stc import stc
from parity import PAIRS, compare, examples, small_mlp, with_lamina
from torch import nn

import lamina
from lamina import wire

TERNARY = wire.TopK(0.5, values="sign")


class Drift(nn.Module):
    """Two weights; the loss is their product with the client's input, so the gradient *is* that input."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return x @ self.w


def drift(*gradients, **options):
    """One client per gradient, one step of lr 1 a round: every update is minus the gradient."""
    clients = {str(i): (torch.tensor([g]), torch.zeros(1)) for i, g in enumerate(gradients)}
    return lamina.Federation(
        Drift(),
        lamina.ClientData.from_clients(clients),
        **{"method": lamina.STC(), "uplink": TERNARY, "downlink": TERNARY, "local": lamina.LocalSGD(lr=1.0),
           "loss": lambda output, _: output.mean(), "engine": "loop"} | options,
    )  # fmt: skip


def test_two_rounds_by_hand():
    """One entry of two travels, each way. Client a: update (4, 2); client b: (-2, -6). All weights 1/2.

    Round 0. a sends (4, 0), keeps (0, 2); b sends (0, -6), keeps (-2, 0). Mean (2, -3): down goes (0, -3), the server
      keeps (2, 0). x = (0, -3).
    Round 1. a: (4, 2) + (0, 2) = (4, 4), a tie: the lower index, sends (4, 0), keeps (0, 4). b: (-2, -6) + (-2, 0) =
      (-4, -6) sends (0, -6), keeps (-4, 0). Mean (2, -3) + (2, 0) = (4, -3): down goes (4, 0), the server keeps
      (0, -3). x = (4, -3).
    """
    expected = [
        ([0, -3], [2, 0], [0, 2], [-2, 0]),
        ([4, -3], [0, -3], [0, 4], [-4, 0]),
    ]
    for (state, _), (x, server, a, b) in zip(drift((-4.0, -2.0), (2.0, 6.0)).run(2), expected, strict=True):
        assert state.params["w"].tolist() == x
        assert state.server.residual["w"].tolist() == server
        assert [state.clients.get(c).row.method.residual["w"].tolist() for c in (0, 1)] == [a, b]


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_stc_against_a_plain_loop(dtype, weights, momentum, cohort):
    """To the rounding of a float32 also in float64: the code's magnitudes travel as one."""
    compare(lamina.STC(), stc, small_mlp(dtype), examples(dtype), dtype,
            uplink=wire.TopK(0.2, values="sign"), downlink=wire.TopK(0.35, values="sign"),
            mine={"density": 0.2, "density_down": 0.35}, tolerance={"rtol": 1e-5, "atol": 1e-6},
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


def test_nothing_is_lost_only_late():
    """x + the server's residual + the clients' mean residual = all mean updates, in float64."""
    model, clients = small_mlp(torch.float64), examples(torch.float64)
    coarse = {"uplink": wire.TopK(0.1), "downlink": wire.TopK(0.1), "weights": "uniform"}
    sent = []

    class Watching(lamina.STC):
        def report(self, client, plan, work, message):
            sent.append({name: u.clone() for name, u in message["update"].items()})
            return super().report(client, plan, work, message)

    state = with_lamina(Watching(), model, clients, **coarse)[-1][0]
    for name, start in model.named_parameters():
        residuals = [state.clients.get(c).row.method.residual[name] for c in range(len(clients))]
        kept = state.params[name] + state.server.residual[name] + sum(residuals) / len(clients)
        made = start + sum(u[name] for u in sent) / len(clients)
        torch.testing.assert_close(kept, made, rtol=1e-12, atol=1e-13)


def down(record, phase="round"):
    return {t.layer: t.bytes for t in record.traffic if t.direction == "down" and t.phase == phase}


def test_the_step_travels_to_those_who_have_the_model_from_before_it():
    """A layer of the coded step costs its ternary code; the first round, and whoever missed one, costs fp32."""
    model, clients = small_mlp(torch.float32), examples(torch.float32)
    code = wire.TopK(0.1, values="sign")
    records = [r for _, r in with_lamina(lamina.STC(), model, clients, uplink=code, downlink=code)]
    whole = down(records[0])["fc1.weight"]
    assert whole == 4 * model.fc1.weight.numel() * len(clients)
    assert all(down(r)["fc1.weight"] < whole / 8 for r in records[1:])

    some = [r for _, r in with_lamina(lamina.STC(), model, clients, uplink=code, downlink=code, cohort=3)]
    for before, record in itertools.pairwise(some):
        stayed = set(record.cohort) & set(before.cohort)
        least = 4 * model.fc1.weight.numel() * (3 - len(stayed))
        assert least <= down(record)["fc1.weight"] < least + whole / 8
    assert any(set(a.cohort) & set(b.cohort) for a, b in itertools.pairwise(some))


def test_a_downlink_that_codes_values_is_as_without_it():
    """The residual at the server stays zero: this is ErrorFeedback."""
    model, clients = small_mlp(torch.float32), examples(torch.float32)
    for downlink in (None, wire.Dense("fp16")):
        both = {"uplink": wire.TopK(0.2), "downlink": downlink}
        ours = with_lamina(lamina.STC(), model, clients, **both)[-1][0]
        plain = with_lamina(lamina.ErrorFeedback(), model, clients, **both)[-1][0]
        assert ours.sha256() == plain.sha256()
        assert not any(x.any() for x in ours.server.residual.values())


def test_a_sparse_downlink_needs_a_method_that_keeps_what_it_loses():
    with pytest.raises(lamina.ConfigError, match=r"lamina\.STC sends the server's step") as refused:
        drift((1.0, 1.0), method=lamina.ErrorFeedback())
    assert refused.value.code == "E113"


@pytest.mark.parametrize("first", [lamina.FedAvgM(), lamina.FedLAMA(phi=2)])
def test_it_stands_last(first):
    assert lamina.Chain(first, lamina.STC()).compensates
    with pytest.raises(lamina.ConfigError, match=r"put .* before STC") as refused:
        lamina.Chain(lamina.STC(), first)
    assert refused.value.code == "E115"


def test_two_that_send_again_what_was_lost_are_refused():
    with pytest.raises(lamina.ConfigError, match="both would send again what the uplink lost"):
        lamina.Chain(lamina.ErrorFeedback(), lamina.STC())


def test_layers_that_wait_keep_both_residuals():
    method = lamina.Chain(lamina.FedLAMA(phi=3), lamina.STC())
    coarse = {"uplink": wire.TopK(0.1), "downlink": wire.TopK(0.1)}
    pairs = with_lamina(method, small_mlp(torch.float64), examples(torch.float64), **coarse)
    waited = 0
    for (before, _), (state, record) in itertools.pairwise(pairs):
        for name, row in record.layers.items():
            stores = [
                (s.server[1].residual[name], s.clients.get(0).row.method[1].residual[name]) for s in (before, state)
            ]
            same = [torch.equal(a, b) for a, b in zip(*stores, strict=True)]
            assert same == [True, True] if not row.uploaded else same == [False, False]
            waited += not row.uploaded
    assert waited


def test_a_layer_that_is_absent_is_not_forgotten():
    """`settle` and `absorb` see only what was sent."""
    method, x = lamina.STC(), {"a": torch.ones(2), "b": torch.full((2,), 3.0)}
    client, server = method.init_client(x)._replace(residual=x), method.init(x)._replace(residual=x)
    sent, received = {"update": {"a": torch.full((2,), 5.0)}}, {"update": {"a": torch.ones(2)}}
    assert method.settle(client, sent, received).residual["b"].tolist() == [3, 3]
    assert method.absorb(server, sent, received).residual["b"].tolist() == [3, 3]
    assert method.absorb(server, sent, received).residual["a"].tolist() == [4, 4]


def test_a_step_coded_by_another_codec_is_sent_to_nobody():
    """Whoever goes on with another downlink sends the model itself: the old step would lead elsewhere."""
    model, clients = small_mlp(torch.float32), examples(torch.float32)
    data = lamina.ClientData.from_clients({str(i): pair for i, pair in enumerate(clients)})

    def federation(density):
        codec = wire.TopK(density)
        return lamina.Federation(model, data, method=lamina.STC(), uplink=codec, downlink=codec, engine="loop")

    *_, (state, _) = federation(0.1).run(2)
    whole = 4 * model.fc1.weight.numel() * len(clients)
    assert down(next(federation(0.2).run(1, state=state))[1])["fc1.weight"] == whole
    assert down(next(federation(0.1).run(1, state=state))[1])["fc1.weight"] < whole
