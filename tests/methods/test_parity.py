"""Every method against a plain loop written from its paper (`from_scratch`), parameter by parameter, over 10 rounds.

How they are compared: see parity.py.
"""

import pytest
import torch
from from_scratch import addresses
from from_scratch.error_feedback import error_feedback
from from_scratch.fedadagrad import fedadagrad
from from_scratch.fedadam import fedadam
from from_scratch.fedavg import fedavg
from from_scratch.fedavgm import fedavgm
from from_scratch.fedlama import fedlama
from from_scratch.fedprox import fedprox
from from_scratch.fedyogi import fedyogi
from from_scratch.scaffold import scaffold
from parity import (
    COHORTS,
    DTYPES,
    FULL,
    PAIRS,
    ROUNDS,
    SEED,
    WEIGHTS,
    assert_equal_rounds,
    compare,
    examples,
    from_scratch,
    small_cnn,
    small_mlp,
    with_lamina,
)

import lamina
from lamina.cohort import draw


@pytest.mark.parametrize(("clients", "m"), [(7, 3), (7, 4), (7, 7), (100, 10), (5, 1), (10, 5)])
def test_cohorts_and_streams_are_functions_of_their_addresses(clients, m):
    for key in range(20):
        assert list(draw(SEED, key, clients, m)) == addresses.cohort(SEED, key, clients, m)


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), FULL)
def test_fedavg(dtype, weights, momentum, cohort):
    compare(lamina.FedAvg(), fedavg, small_mlp(dtype), examples(dtype), dtype,
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "local",
    [
        {"weight_decay": 0.05},
        {"clip": 0.2},
        {"weight_decay": 0.05, "clip": 0.2, "momentum": 0.9},
        {"epochs": 3, "momentum": 0.9},
        {"steps": 5},
        {"steps": 2, "clip": 0.5},
        {"batch_size": None, "epochs": 2},
        {"batch_size": 100, "momentum": 0.5},
    ],
    ids=str,
)
def test_fedavg_with_other_local_training(dtype, local):
    compare(lamina.FedAvg(), fedavg, small_mlp(dtype), examples(dtype), dtype, cohort=4, **local)


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS[:2] + PAIRS[-2:])
def test_fedavg_averages_batch_norm_statistics(dtype, weights, momentum, cohort):
    model, clients = small_cnn(dtype), examples(dtype, (1, 5, 5))
    settings = {"weights": weights, "momentum": momentum, "cohort": cohort, "lr": 0.03}
    ours = with_lamina(lamina.FedAvg(), model, clients, **settings)
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} == ours[-1][0].buffers.keys()
    assert_equal_rounds(ours, from_scratch(fedavg, model, clients, **settings), dtype)


@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS)
def test_fedprox(dtype, weights, momentum, cohort):
    compare(lamina.FedProx(mu=0.7), fedprox, small_mlp(dtype), examples(dtype), dtype, mine={"mu": 0.7},
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_fedprox_with_weight_decay_and_clipping(dtype):
    local = {"weight_decay": 0.05, "clip": 0.2, "momentum": 0.9, "epochs": 2}
    compare(lamina.FedProx(mu=2.0), fedprox, small_mlp(dtype), examples(dtype), dtype, mine={"mu": 2.0}, **local)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("cohort", COHORTS)
def test_scaffold(dtype, weights, cohort):
    compare(lamina.Scaffold(), scaffold, small_mlp(dtype), examples(dtype), dtype,
            weights=weights, cohort=cohort, epochs=2)  # fmt: skip


def test_scaffold_with_momentum_when_it_may_be_approximate():
    compare(lamina.Scaffold(approximate=True), scaffold, small_mlp(torch.float64), examples(torch.float64),
            torch.float64, momentum=0.5, cohort=3)  # fmt: skip


OPTIMISERS = {
    "fedavgm": (lamina.FedAvgM(lr=0.8, momentum=0.6), fedavgm, {"server_lr": 0.8, "beta": 0.6}),
    "fedadagrad": (lamina.FedAdagrad(lr=0.05, eps=1e-2), fedadagrad, {"server_lr": 0.05, "tau": 1e-2}),
    "fedadam": (
        lamina.FedAdam(lr=0.05, b1=0.8, b2=0.95, eps=1e-2),
        fedadam,
        {"server_lr": 0.05, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2},
    ),
    "fedyogi": (
        lamina.FedYogi(lr=0.05, b1=0.8, b2=0.95, eps=1e-2),
        fedyogi,
        {"server_lr": 0.05, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2},
    ),
}
DEFAULTS = {
    "fedavgm": (lamina.FedAvgM(), fedavgm, {"server_lr": 1.0, "beta": 0.9}),
    "fedadagrad": (lamina.FedAdagrad(), fedadagrad, {"server_lr": 1e-2, "tau": 1e-3}),
    "fedadam": (lamina.FedAdam(), fedadam, {"server_lr": 1e-2, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}),
    "fedyogi": (lamina.FedYogi(), fedyogi, {"server_lr": 1e-2, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS[:2] + PAIRS[-2:])
def test_server_optimisers(optimiser, dtype, weights, momentum, cohort):
    method, loop, mine = OPTIMISERS[optimiser]
    compare(method, loop, small_mlp(dtype), examples(dtype), dtype, mine=mine,
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


@pytest.mark.parametrize("optimiser", DEFAULTS)
def test_server_optimisers_as_they_stand(optimiser):
    method, loop, mine = DEFAULTS[optimiser]
    compare(method, loop, small_mlp(torch.float64), examples(torch.float64), torch.float64, mine=mine, cohort=3)


@pytest.mark.parametrize("density", [0.1, 0.35])
@pytest.mark.parametrize(("dtype", "weights", "momentum", "cohort"), PAIRS[:2] + PAIRS[-2:])
def test_error_feedback_with_top_k(dtype, weights, momentum, cohort, density):
    compare(lamina.ErrorFeedback(), error_feedback, small_mlp(dtype), examples(dtype), dtype,
            uplink=lamina.wire.TopK(density), mine={"density": density},
            weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


def compare_fedlama(model, clients, dtype, phi, warmup, **settings):
    ours = with_lamina(lamina.FedLAMA(phi=phi, warmup=warmup), model, clients, **settings)
    theirs = from_scratch(fedlama, model, clients, phi=phi, warmup=warmup, **settings)
    assert_equal_rounds(ours, [r.server for r in theirs], dtype)
    for t, ((state, record), expected) in enumerate(zip(ours, theirs, strict=True)):
        assert record.cohort == ours[t - t % phi][1].cohort
        uploaded = {name for name, row in record.layers.items() if row.uploaded}
        assert uploaded == expected.uploaded, t
        assert len(record.cohort) * sum(state.params[name].numel() for name in uploaded) == expected.values
        assert record.in_sync == (len(uploaded) == len(state.params))
        assert record.in_sync == (expected.spread == 0)
        in_force = theirs[t - 1].intervals if t else dict.fromkeys(expected.intervals, 1)
        assert {name: record.layers[name].interval for name in in_force} == in_force, t
        for name, d in expected.discrepancy.items():  # ours comes from sums of squares, which cancel
            assert record.layers[name].discrepancy == pytest.approx(d, rel=1e-9 if dtype == torch.float64 else 1e-3)
    relaxed = {n for _, record in ours for n, row in record.layers.items() if not row.uploaded}
    adjusted = any((t + 1) % phi == 0 and t + 1 > warmup for t in range(ROUNDS - 1))
    assert bool(relaxed) == (phi > 1 and adjusted)
    return ours


@pytest.mark.parametrize("phi", [1, 2, 4])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weights", "momentum", "cohort"), [("examples", 0.9, 3), ("uniform", 0.0, "all")])
def test_fedlama(dtype, weights, momentum, cohort, phi, warmup):
    compare_fedlama(small_mlp(dtype), examples(dtype), dtype, phi, warmup,
                    weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


@pytest.mark.parametrize(("weights", "momentum", "cohort"), [("examples", 0.0, "all"), ("uniform", 0.9, 3)])
@pytest.mark.parametrize("phi", [2, 4])
def test_fedlama_in_the_other_half_of_the_settings(weights, momentum, cohort, phi):
    compare_fedlama(small_mlp(torch.float64), examples(torch.float64), torch.float64, phi, 0,
                    weights=weights, momentum=momentum, cohort=cohort)  # fmt: skip


def test_fedlama_with_weight_decay_and_clipping():
    local = {"weight_decay": 0.05, "clip": 0.2, "momentum": 0.9, "epochs": 2}
    compare_fedlama(small_mlp(torch.float64), examples(torch.float64), torch.float64, 2, 0, cohort=3, **local)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("phi", [2, 4])
@pytest.mark.parametrize(("weights", "momentum", "cohort"), [("examples", 0.9, 3), ("uniform", 0.0, "all")])
def test_fedlama_with_batch_norm(dtype, phi, weights, momentum, cohort):
    settings = {"weights": weights, "momentum": momentum, "cohort": cohort, "lr": 0.03}
    compare_fedlama(small_cnn(dtype), examples(dtype, (1, 5, 5)), dtype, phi, 0, **settings)


def test_fedlama_relaxes_different_layers_in_different_runs():
    """Or the tests above would not tell a rule from a constant."""
    sets = set()
    for lr, momentum in ((0.1, 0.0), (0.1, 0.9), (0.5, 0.9)):
        model, clients = small_mlp(torch.float64), examples(torch.float64)
        rounds = from_scratch(fedlama, model, clients, phi=2, warmup=0, lr=lr, momentum=momentum)
        sets |= {tuple(sorted(name for name, interval in r.intervals.items() if interval > 1)) for r in rounds}
    assert len(sets - {()}) >= 2
