"""S10: epsilon is what others' accountants say, and is there only where it means something; secure sums are exact, and
refused where messages are no sum. Over every method there is."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lamina
from lamina import DP, ClientData, Federation, LocalSGD, SecureSum
from lamina.errors import ConfigError
from lamina.methods import METHODS
from lamina.privacy.accountant import Made, epsilon
from lamina.privacy.fixed import Ring
from lamina.privacy.protocol import Client, Server, plain_sum
from soak import Result, row

sys.path.append(str(Path(__file__).parents[2] / "tests"))

SETTINGS: dict[str, dict[str, Any]] = {
    "ssfl": {"density": 0.5},
    "lips": {"rounds": 20},
    "personal": {"layers": "head"},
    "feddst": {"density": 0.5},
}
UPLINKS = {"errorfeedback": "topk:0.1", "dgc": "topk:0.1", "flare": "topk:0.1", "ef21": "topk:0.1", "stc": "topk:0.1"}
COVERED = frozenset(
    {"fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "feddyn", "personal", "randommask",
     "magnitudepruning"}
)  # fmt: skip
ADDITIVE = COVERED | {"scaffold", "ssfl", "fedlama", "fedluar", "lips"}


@row("S10", "accountant", goal="epsilon within 1 % of Opacus and of dp-accounting, on 13 settings", minutes=1)
def accountant(_: str, short: bool) -> Result:
    from test_privacy_accountant import REFERENCE

    worst = 0.0
    for q, noise, rounds, delta, opacus, google, _ in REFERENCE[: 4 if short else None]:
        found = epsilon([Made(q, noise, rounds)], delta)
        worst = max(worst, abs(found / opacus - 1), abs(found / google - 1))
    return Result(f"{100 * worst:.2f} % at most", worst <= 0.01, "opacus 1.6.0, dp-accounting 0.6.0")


@row(
    "S10",
    "methods",
    goal="every method either has an epsilon and an exact sum, or is refused with its reason",
    minutes=5,
)
def methods(_: str, short: bool) -> Result:
    rounds, wrong = (2 if short else 20), []
    said = {"privacy": 0, "secure": 0}
    for name in METHODS:
        made = METHODS[name](**SETTINGS.get(name, {}))
        uplink = lamina.wire.parse(UPLINKS.get(name, "fp32"))
        private = _last(made, rounds, uplink, weights="uniform", privacy=DP(1.0, 1.0))
        if (private is not None) != (name in COVERED) or (private and private[1].epsilon is None):
            wrong.append(f"{name} with privacy")
        summed = _last(made, rounds, uplink, secure=SecureSum(bits=48))
        if (summed is not None) != (name in ADDITIVE):
            wrong.append(f"{name} with secure sums")
        plain = _last(made, rounds, uplink)
        assert plain is not None  # every method runs without
        if plain[1].epsilon is not None:
            wrong.append(f"{name} has an epsilon without privacy")
        if summed is not None and _far(summed[0], plain[0]):
            wrong.append(f"the secure sum of {name} leads elsewhere")
        said["privacy"] += private is not None
        said["secure"] += summed is not None
    n = len(METHODS)
    figure = f"{n} methods: {said['privacy']} with an epsilon, {said['secure']} with secure sums, the others refused"
    return Result(figure, not wrong, "; ".join(wrong))


@row("S10", "sums", goal="every sum is exact, whoever drops out at whatever step", minutes=8)
def sums(_: str, short: bool) -> Result:
    many, source, exact = (15 if short else 3000), random.Random(0), 0
    for i in range(many):
        n = source.randint(3, 8 if short else 40)
        threshold = source.randint(n // 2 + 1, n)
        exact += _exact(n, threshold, i, source)
    return Result(f"{exact} of {many}", exact == many, "three to 40 clients, drop-outs at three steps")


def _exact(n: int, threshold: int, seed: int, source: random.Random) -> bool:
    """Whether a sum is that of the plain elements; and there is none where fewer than the threshold are left."""
    widths = {"update": source.choice([8, 16, 24, 32, 48]), "moments": 63}
    numbers = np.random.default_rng(seed)
    given: dict[int, dict[str, Ring]] = {
        c: {tree: numbers.integers(0, 2**bits, 17, np.uint64) for tree, bits in widths.items()}
        for c in source.sample(range(10_000), n)
    }
    server, clients = Server(widths, threshold), {c: Client(c, widths) for c in given}
    gone = {c: source.choice(["shares", "vector", "answer"]) for c in given if source.random() < 0.15}
    for c, client in clients.items():
        server.keys(c, client.keys())
    there = [c for c in given if gone.get(c) != "shares"]
    for c in there:
        server.shares(c, clients[c].shares(server.roster(), threshold))
    for c in there:
        clients[c].take(server.shares_for(c))
    came = [c for c in there if gone.get(c) != "vector"]
    for c in came:
        server.masked(c, clients[c].masked(given[c]))
    answers = {c: clients[c].unmask(server.who_came()) for c in came if gone.get(c) != "answer"}
    try:
        made = server.sums(answers)
    except ValueError:
        return len(answers) < threshold
    expected = plain_sum([given[c] for c in came], widths)
    return len(answers) >= threshold and all(np.array_equal(made[tree], expected[tree]) for tree in widths)


def _data() -> ClientData:
    source = torch.Generator().manual_seed(0)

    def examples(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(n, 5, generator=source), torch.randint(0, 3, (n,), generator=source)

    return ClientData.from_clients({f"c{i}": examples(12 + i) for i in range(6)}, test=examples(9))


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def _last(method: Any, rounds: int, uplink: Any, **more: Any) -> tuple[lamina.State, lamina.RoundRecord] | None:
    """The end of a run; None where it is refused for what privacy or a secure sum cannot do."""
    try:
        local = LocalSGD(lr=0.05, batch_size=8)
        fed = Federation(_model, _data(), method=method, uplink=uplink, local=local, cohort=4, engine="loop", **more)
    except ConfigError as error:
        if error.code not in ("E122", "E123"):
            raise
        return None
    import warnings

    with warnings.catch_warnings():  # of methods whose own schedule is longer
        warnings.simplefilter("ignore")
        return [*fed.run(rounds)][-1]


def _far(one: lamina.State, other: lamina.State) -> bool:
    return any(not torch.allclose(one.params[n], x, rtol=1e-3, atol=1e-4) for n, x in other.params.items())
