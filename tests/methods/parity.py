"""What every method is compared with a plain loop by: small models, a few clients, both sides run and matched.

The two sides share no code and sum in different orders, so they agree to rounding: 1e-12 in float64, 1e-5 in float32.
Clients are of unequal sizes, so they take unequal numbers of local steps, and some last batches have one example.
"""

import itertools

import torch
from torch import nn

import lamina
from lamina.models import mlp

ROUNDS, LR, SEED = 10, 0.1, 3
SIZES = (5, 9, 3, 12, 7, 4, 10)  # examples of the clients: 2, 3, 1, 3, 2, 1, 3 batches of at most 4
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-14}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}

DTYPES = (torch.float64, torch.float32)
WEIGHTS = ("examples", "uniform")
MOMENTA = (0.0, 0.9)
COHORTS = ("all", 3)
FULL = list(itertools.product(DTYPES, WEIGHTS, MOMENTA, COHORTS))
PAIRS = [  # every pair of values of two settings comes up
    (torch.float64, "examples", 0.0, 3),
    (torch.float64, "uniform", 0.9, 3),
    (torch.float64, "uniform", 0.0, "all"),
    (torch.float64, "examples", 0.9, "all"),
    (torch.float32, "examples", 0.9, 3),
    (torch.float32, "uniform", 0.0, 3),
    (torch.float32, "uniform", 0.9, "all"),
    (torch.float32, "examples", 0.0, "all"),
]


def small_mlp(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mlp((6, 8, 5, 3)).to(dtype)


def small_cnn(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(),
            nn.Linear(16, 3),
        ).to(dtype)  # fmt: skip


def examples(dtype, shape=(6,)):
    source = torch.Generator().manual_seed(1)
    clients = []
    for client, n in enumerate(SIZES):
        y = torch.randint(3, (n,), generator=source)
        x = torch.randn(n, *shape, generator=source, dtype=torch.float64) + 0.3 * client
        clients.append((x.to(dtype), y))
    return clients


def with_lamina(method, model, clients, *, cohort="all", weights="examples", uplink=None, downlink=None, rounds=ROUNDS,
                **local):  # fmt: skip
    """States and records of a run."""
    data = lamina.ClientData.from_clients({f"client {i}": pair for i, pair in enumerate(clients)}, test=clients[0])
    fed = lamina.Federation(
        model,
        data,
        method=method,
        uplink=uplink,
        downlink=downlink,
        local=lamina.LocalSGD(**({"lr": LR, "batch_size": 4} | local)),
        cohort=cohort,
        weights=weights,
        seed=SEED,
        engine="loop",
    )
    return list(fed.run(rounds, evaluate_every=rounds))


def from_scratch(loop, model, clients, *, cohort="all", rounds=ROUNDS, **settings):
    participants = None if cohort == "all" else cohort
    settings = {"lr": LR, "batch_size": 4} | settings
    return loop(model, clients, rounds=rounds, participants=participants, seed=SEED, **settings)


def assert_equal_rounds(ours, theirs, dtype, tolerance=None):
    assert len(ours) == len(theirs) == ROUNDS
    for t, ((state, _), expected) in enumerate(zip(ours, theirs, strict=True)):
        actual = {**state.params, **state.buffers}
        assert actual.keys() == expected.keys()
        for name, x in actual.items():
            assert x.dtype == expected[name].dtype
            close = (tolerance or TOLERANCE[dtype]) if x.is_floating_point() else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(
                x, expected[name], **close,
                msg=lambda text, t=t, name=name: f"round {t}, {name}: {text}",
            )  # fmt: skip


def compare(method, loop, model, clients, dtype, *, uplink=None, downlink=None, mine=None, tolerance=None,
            **settings):  # fmt: skip
    """`mine`: the method's own settings, by the names of the plain loop."""
    ours = with_lamina(method, model, clients, uplink=uplink, downlink=downlink, **settings)
    theirs = from_scratch(loop, model, clients, **settings, **(mine or {}))
    assert_equal_rounds(ours, theirs, dtype, tolerance)
    assert any(not torch.equal(x, model.state_dict()[name]) for name, x in ours[-1][0].params.items())
    return ours
