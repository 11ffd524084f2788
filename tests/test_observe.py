from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
import torch

from lamina import (
    Chain,
    ClientData,
    ConfigError,
    ErrorFeedback,
    FedAdam,
    Federation,
    FedLAMA,
    LayerRecord,
    LocalOnly,
    LocalSGD,
    Method,
    RoundRecord,
    Scaffold,
    Traffic,
    observe,
    wire,
)
from lamina.layers import matrices
from lamina.models import mlp, resnet20
from lamina.tree import add, scale

CLIENTS = 4


class Recording(Method):
    """Looks at what the clients train; `loop` runs them in this process."""

    def __init__(self):
        self.start, self.updates = {}, []

    def report(self, client, plan, work, message):
        self.start.update(plan.params)
        if any(x.any() for x in message["update"].values()):  # it is asked about an update of zeros, too
            self.updates.append(message["update"])
        return message, client


def clients(sizes=(12,) * CLIENTS, same=False, dtype=torch.float64):
    draw = torch.Generator().manual_seed(3)
    made = {}
    for i, n in enumerate(sizes):
        if i == 0 or not same:
            x, y = torch.randn(n, 6, generator=draw, dtype=dtype), torch.randint(3, (n,), generator=draw)
        made[f"c{i}"] = (x, y)
    return ClientData.from_clients(made)


def net(dtype=torch.float64, widths=(6, 7, 5, 3)):
    torch.manual_seed(0)
    return mlp(widths).to(dtype)


def federation(method=None, data=None, *, dtype=torch.float64, local=None, **options):
    local = local or LocalSGD(lr=0.1, momentum=0.9, batch_size=5, epochs=2)
    data = data or clients(dtype=dtype)
    return Federation(net(dtype), data, method=method, local=local, engine="loop", **{"weights": "uniform", **options})


def one_round(**options):
    """A round's rows by layer, the global model before it, and the clients' updates."""
    recording = Recording()
    fed = federation(recording, **options)
    _, record = next(fed.run(1))
    return {row.layer: row for row in observe.divergence([record], fed.layers)}, recording.start, recording.updates


def relative(updates, name):
    """sqrt(sum |d_k - dbar|^2 / (K |dbar|^2)), as the definition has it."""
    stack = torch.stack([u[name] for u in updates])
    mean = stack.mean(0)
    return sqrt(float((stack - mean).square().sum()) / (len(updates) * float(mean.square().sum())))


# ---- the direct definition


def test_the_worked_example():
    """Two clients at (1, 2) and (3, 2): deviations (-1, 0) and (1, 0), unbiased std sqrt(2/3) = .8165.

    From a common start at 0: mean update (2, 2), relative sqrt(2 / (2 * 8)) = .3536.
    """
    weights = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 2.0])}]
    assert observe.divergence_std_of(weights)["w"] == pytest.approx(0.8165, abs=5e-5)
    assert relative(weights, "w") == pytest.approx(0.3536, abs=5e-5)


def test_the_federation_finds_the_worked_example():
    """One linear layer, one step of plain SGD from 0 on targets that move client 1 to (1, 2), client 2 to (3, 2)."""
    data = ClientData.from_clients(
        {
            name: (torch.eye(2, dtype=torch.float64), torch.tensor(target, dtype=torch.float64)[:, None])
            for name, target in (("a", [1.0, 2.0]), ("b", [3.0, 2.0]))
        }
    )
    model = mlp((2, 1), bias=False).double()
    torch.nn.init.zeros_(model.fc1.weight)
    fed = Federation(
        model, data, loss=lambda out, y: (out - y).square().sum() / 2, local=LocalSGD(lr=1.0, batch_size=None)
    )
    state, record = next(fed.run(1))
    assert state.params["fc1.weight"].tolist() == [[2.0, 2.0]]
    (row,) = observe.divergence([record], fed.layers)
    assert row.divergence_std == pytest.approx(sqrt(2 / 3), rel=1e-12)
    assert row.divergence == pytest.approx(sqrt(1 / 8), rel=1e-12)
    assert row.alignment == pytest.approx(8 / 9, rel=1e-12)  # |(2, 2)|^2 = 8 of (5 + 13) / 2 = 9


def test_one_client_and_one_entry_have_no_deviation():
    assert observe.divergence_std_of([{"w": torch.ones(1)}]) == {"w": None}
    assert observe.divergence_std_of([{"w": torch.tensor([1.0, 5.0])}]) == {"w": 0.0}


# ---- what the records have is the definition


def test_the_scalar_identity_equals_the_direct_definition():
    rows, start, updates = one_round()
    assert len(updates) == CLIENTS
    direct = observe.divergence_std_of([add(start, u) for u in updates])
    for name, row in rows.items():
        assert row.divergence_std == pytest.approx(direct[name], rel=1e-12)
        assert row.divergence == pytest.approx(relative(updates, name), rel=1e-12)


def test_alignment_is_the_share_of_the_mean():
    rows, _, updates = one_round()
    for name, row in rows.items():
        stack = torch.stack([u[name] for u in updates])
        share = float(stack.mean(0).square().sum()) / float(stack.square().sum() / CLIENTS)
        assert row.alignment == pytest.approx(share, rel=1e-12)
        assert row.alignment == pytest.approx(1 / (1 + row.divergence**2), rel=1e-12)


def test_by_examples_the_relative_divergence_weighs_the_clients():
    sizes = (3, 9, 12, 24)
    rows, _, updates = one_round(data=clients(sizes), weights="examples", local=LocalSGD(lr=0.1, batch_size=None))
    p = [n / sum(sizes) for n in sizes]  # one step each, so they train in this order
    for name, row in rows.items():
        mean = sum(pk * u[name] for pk, u in zip(p, updates, strict=True))
        spread = sum(pk * float((u[name] - mean).square().sum()) for pk, u in zip(p, updates, strict=True))
        assert row.divergence == pytest.approx(sqrt(spread / float(mean.square().sum())), rel=1e-10)


def test_identical_clients_do_not_diverge():
    """Four equal updates sum without rounding: exactly 0 in float64."""
    rows, _, _ = one_round(data=clients(same=True), local=LocalSGD(lr=0.1, momentum=0.9, batch_size=None, epochs=3))
    assert [(row.divergence_std, row.divergence, row.alignment) for row in rows.values()] == [(0.0, 0.0, 1.0)] * 3


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_of_identical_clients_only_the_rounding_of_the_mean_is_left(dtype, bound):
    """Three equal updates: their mean is rounded, and the square root of what a difference of squares leaves of it."""
    data = clients((12,) * 3, same=True, dtype=dtype)
    rows, _, _ = one_round(data=data, dtype=dtype, local=LocalSGD(lr=0.1, batch_size=None, epochs=3))
    assert all(row.divergence <= bound for row in rows.values())


def test_one_step_of_sgd_diverges_by_the_rate_times_the_gradients():
    lr = 0.05
    data = clients()
    rows, start, _ = one_round(data=data, local=LocalSGD(lr=lr, batch_size=None))
    model = net()
    model.load_state_dict(start)
    grads = []
    for c in range(CLIENTS):
        x, y = data.examples(data.indices_of(c))
        loss = torch.nn.functional.cross_entropy(model(x), y)
        grads.append(dict(zip(start, torch.autograd.grad(loss, list(model.parameters())), strict=True)))
    direct = observe.divergence_std_of(grads)
    for name, row in rows.items():
        assert row.divergence_std == pytest.approx(lr * direct[name], rel=1e-10)


def test_a_common_shift_changes_nothing_and_a_factor_scales():
    _, start, updates = one_round()
    weights = [add(start, u) for u in updates]
    base = observe.divergence_std_of(weights)
    shifted = observe.divergence_std_of([add(w, scale(start, 7.0)) for w in weights])
    scaled = observe.divergence_std_of([scale(u, 3.0) for u in updates])
    for name, value in base.items():
        assert shifted[name] == pytest.approx(value, rel=1e-10)
        assert scaled[name] == pytest.approx(3 * value, rel=1e-10)
        assert relative([scale(u, 3.0) for u in updates], name) == pytest.approx(relative(updates, name), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (lambda: Scaffold(approximate=True), {}),
        (lambda: FedAdam(), {}),
        (lambda: FedLAMA(phi=2), {}),
        (lambda: Chain(ErrorFeedback(), FedLAMA(phi=2)), {"uplink": wire.TopK(0.3)}),
    ],
)
def test_every_method_is_observed_and_looking_changes_nothing(method, options):
    fed = federation(method(), **options)
    blind = federation(method(), diagnostics=False, **options)
    *_, (state, _) = runs = list(fed.run(4))
    *_, (unseen, _) = blind.run(4)
    assert state.sha256() == unseen.sha256()
    rows = observe.divergence([record for _, record in runs], fed.layers)
    assert len(rows) == 4 * 3
    for row in rows:
        seen = runs[row.round][1].layers[row.layer]
        assert (row.divergence is None) == (not seen.uploaded)
        assert row.divergence is None or row.divergence > 0


# ---- rows


def test_depth_counts_the_weight_tensors_from_both_ends():
    model = resnet20(width=1)
    fed = Federation(
        model,
        ClientData.from_clients({c: (torch.randn(2, 3, 8, 8), torch.tensor([0, 1])) for c in "ab"}),
        local=LocalSGD(steps=1),
    )
    records = [record for _, record in fed.run(2)]
    rows = observe.divergence(records, fed.layers)
    names = [layer.name for layer in matrices(fed.layers)]
    assert len(names) == 22
    assert [row.layer for row in rows] == names * 2
    assert [row.round for row in rows] == [0] * 22 + [1] * 22
    assert [(r.depth_from_input, r.depth_from_loss) for r in rows[:22]] == [(i, 21 - i) for i in range(22)]
    assert rows[0].layer == "conv1.weight"
    assert rows[21].layer == "fc.weight"


def test_records_of_another_model_are_refused():
    fed = federation()
    records = [record for _, record in fed.run(1)]
    other = Federation(net(widths=(6, 4, 4, 4, 3)), clients(), local=LocalSGD(steps=1))
    with pytest.raises(ConfigError, match=r"no layer 'fc4\.weight'"):
        observe.divergence(records, other.layers)


def test_inertia_begins_after_round_2_and_is_measured_from_there():
    fed = federation()
    runs = list(fed.run(5))
    rows = observe.inertia([record for _, record in runs])
    assert sorted({row.round for row in rows}) == [2, 3, 4]
    then, now = runs[2][0].params, runs[4][0].params
    for row in rows[-6:]:
        a, b = then[row.layer].flatten(), now[row.layer].flatten()
        assert row.round == 4
        assert row.inertia_l2 == pytest.approx(float((b - a).norm()), rel=1e-9)
        assert row.inertia == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-9)
        assert row.inertia_cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, 0)), rel=1e-9)


def record(t, layers=None, traffic=(), before=None, after=None):
    """A record by hand."""
    return RoundRecord(
        round=t, cohort=(0,), in_sync=True, bytes_up=0, bytes_down=0, seconds=0.0, layers=layers or {},
        traffic=tuple(traffic), clients=(), train_loss=0.0, lr=0.1, accuracy=after, accuracy_before=before,
    )  # fmt: skip


def test_the_gap_is_what_aggregation_gained():
    """.50 on average before, .75 after: .25. Rounds without both are left out."""
    records = [record(0, before=0.5, after=0.75), record(1, after=0.8), record(2), record(3, before=0.5, after=0.25)]
    assert observe.accuracy_gap(records) == [(0, 0.5, 0.75, 0.25), (3, 0.5, 0.25, -0.25)]


def test_one_client_gains_nothing_from_aggregation():
    data = clients((12,))
    data = ClientData.from_clients(
        {"only": data.examples(data.indices_of(0))}, test=clients((9,)).examples(torch.arange(9))
    )
    fed = federation(data=data, accuracy_before=True)
    gaps = observe.accuracy_gap([record for _, record in fed.run(3)])
    assert [gap.gap for gap in gaps] == [0.0] * 3


def test_traffic_is_summed_by_layer_and_direction():
    """fc: up 3 + 4, down 5; headers: up 1 in the probe, 2 in the round."""
    one = [Traffic("probe", "up", "_shared", 1), Traffic("round", "up", "fc", 3), Traffic("round", "down", "fc", 5)]
    two = [Traffic("round", "up", "_shared", 2), Traffic("round", "up", "fc", 4)]
    assert observe.traffic([record(0, traffic=one), record(1, traffic=two)]) == [("_shared", 3, 0), ("fc", 7, 5)]


def test_traffic_of_a_run_adds_up_to_its_bytes():
    fed = federation(FedLAMA(phi=2))
    *_, (state, _) = runs = list(fed.run(4))
    rows = observe.traffic([record for _, record in runs])
    assert (sum(row.up for row in rows), sum(row.down for row in rows)) == (state.bytes_up, state.bytes_down)


def test_a_layer_that_waits_has_no_divergence():
    waiting = LayerRecord(uploaded=False, interval=2, bytes_up=0, bytes_down=0)
    fed = federation()
    records = [replace(r, layers=r.layers | {"fc2.weight": waiting}) for _, r in fed.run(1)]
    row = observe.divergence(records, fed.layers)[1]
    assert row == (0, "fc2.weight", 1, 1, None, None, None)


def test_an_empty_cohort_has_no_definition():
    with pytest.raises(ConfigError, match="at least one client"):
        observe.divergence_std_of([])


# ---- records that have not what is read


def test_no_records_give_no_rows():
    assert observe.divergence([], federation().layers) == observe.inertia([]) == observe.traffic([]) == []
    assert observe.accuracy_gap([]) == []


def test_divergence_without_diagnostics_is_refused_with_the_setting():
    fed = federation(diagnostics=False)
    with pytest.raises(ConfigError, match=r"no divergence, because .* diagnostics=False") as refused:
        observe.divergence((record for _, record in fed.run(1)), fed.layers)
    assert "diagnostics=True" in refused.value.remedy


def test_where_nothing_is_uploaded_there_is_no_divergence_and_that_is_no_fault():
    fed = federation(LocalOnly())
    rows = observe.divergence([record for _, record in fed.run(1)], fed.layers)
    assert [row.divergence for row in rows] == [None] * 3


def test_inertia_of_two_rounds_is_refused():
    records = [record for _, record in federation().run(3)]
    with pytest.raises(ConfigError, match="begins with round 2, and the last of them is of round 1") as refused:
        observe.inertia(records[:2])
    assert "three rounds" in refused.value.remedy
    assert len(observe.inertia(records)) == 6


def test_a_gap_that_was_not_measured_is_refused_with_the_setting():
    with pytest.raises(ConfigError, match="no accuracy of the clients' models before") as refused:
        observe.accuracy_gap([record(0, after=0.5)])
    assert "accuracy_before=True" in refused.value.remedy
    with pytest.raises(ConfigError, match="no test set, or none of these rounds was tested"):
        observe.accuracy_gap([record(0)])


@pytest.mark.parametrize("look", [observe.inertia, observe.accuracy_gap, observe.traffic])
def test_what_is_no_record_is_refused_by_its_type(look):
    with pytest.raises(ConfigError, match=r"expected those that Federation\.run gives, got tuple") as refused:
        look(federation().run(1))
    assert "[record for _, record in fed.run" in refused.value.remedy
