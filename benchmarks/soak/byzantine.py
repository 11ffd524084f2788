"""S5, S6: clients that attack. 20 clients, Dirichlet 0.5, an MLP, 30 rounds; f of them attack in every round.

    python benchmarks/soak/byzantine.py --seeds 5    the whole table on the digits, as in docs/robust.md

The defences are told f. `mean` is the weighted mean behind the check that is always on, for values that are not finite;
"whole" bounds each client's whole update by the round's median length, where `faults.norm` bounds every layer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import lamina
from lamina.admission import unused
from lamina.attacks import ATTACKS, attacked, attackers, fooled
from lamina.client import Reply
from lamina.engine.base import Engine, Kind
from lamina.method import Plan
from lamina.robust import FLTrust, GeometricMedian, Krum, Median, MultiKrum, TrimmedMean
from lamina.tree import Params, squared_norm
from soak import Result, row

CLIENTS = 20
ROUNDS = 30
SEEDS = 5
TOLD = (4, 8)  # attackers
GATED = tuple(name for name in ATTACKS if name != "backdoor")
FAILED = 0.0  # accuracy of a run that ends with an error: nothing is learnt; "ends" in the table
PRESET = "norm=median"


@dataclass(frozen=True)
class WholeClip:
    """The weighted mean of updates that are cut, as a whole, to the median length of the round."""

    def expect(self, clients: int) -> None:
        pass

    def combine(self, updates: Mapping[str, Params], weights: Mapping[str, float]) -> Params:
        lengths = {name: sum(map(squared_norm, u.values())) ** 0.5 for name, u in updates.items()}
        bound = statistics.median(lengths.values())
        shares = {name: w * min(1.0, bound / (lengths[name] or 1.0)) for name, w in weights.items()}
        first = next(iter(updates.values()))
        return {layer: sum(updates[name][layer] * s for name, s in shares.items()) for layer in first}


Defence = tuple[Callable[[int, str], Any], str]  # rule for f attackers and the name of an honest client; faults.norm
DEFENCES: dict[str, Defence] = {
    "mean": (lambda f, honest: "mean", "off"),
    "whole": (lambda f, honest: WholeClip(), "off"),
    "norm=clip:8x": (lambda f, honest: "mean", "clip:8x"),
    "norm=clip:1x": (lambda f, honest: "mean", "clip:1x"),
    PRESET: (lambda f, honest: "mean", "median"),
    "norm=median + trimmed": (lambda f, honest: TrimmedMean(max(f, 1) / CLIENTS), "median"),
    "norm=adaptive:0.5": (lambda f, honest: "mean", "adaptive:0.5"),
    "trimmed": (lambda f, honest: TrimmedMean(max(f, 1) / CLIENTS), "off"),
    "median": (lambda f, honest: Median(), "off"),
    "krum": (lambda f, honest: Krum(f), "off"),
    "multikrum": (lambda f, honest: MultiKrum(f), "off"),
    "geomedian": (lambda f, honest: GeometricMedian(), "off"),
    "fltrust": (lambda f, honest: FLTrust(honest), "off"),
}


def federation(data: str, rule: Any, norm: str, seed: int) -> lamina.Federation:
    made: Callable[..., lamina.ClientData] = getattr(lamina.data, data)
    split = made(clients=CLIENTS, partition="dirichlet:0.5", seed=seed)
    widths, batch, epochs, lr = {"digits": ((64, 64, 10), 16, 2, 0.1), "fashion_mnist": ((784, 64, 10), 64, 1, 0.05)}[
        data
    ]
    return lamina.Federation(
        lambda: lamina.models.mlp(widths), split, aggregate=rule, faults={"norm": norm}, seed=seed, diagnostics=False,
        local=lamina.LocalSGD(lr=lr, momentum=0.9, batch_size=batch, epochs=epochs), workers=1,
    )  # fmt: skip


@cache
def accuracy(
    data: str, attack: str, f: int, defence: str, seed: int, rounds: int = ROUNDS
) -> tuple[float, float | None]:
    """At the end, and how often a marked picture is taken for the backdoor's label."""
    rule, norm = DEFENCES[defence]
    plain = federation(data, "mean", "off", seed).data
    liars = attackers(plain, f / CLIENTS, seed) if f else ()
    honest = next(name for c, name in enumerate(plain.names) if c not in liars)
    fed = federation(data, rule(f, honest), norm, seed)
    if f:
        fed = attacked(fed, attack, f / CLIENTS, seed)
    try:
        state, record = list(fed.run(rounds, evaluate_every=rounds))[-1]
    except lamina.LaminaError as error:
        print(f"  {attack} f={f} {defence} seed {seed}: {error}", file=sys.stderr)
        return FAILED, None
    return record.accuracy or FAILED, fooled(fed, state) if attack == "backdoor" else None


def mean(data: str, attack: str, f: int, defence: str, seeds: int, rounds: int = ROUNDS) -> float:
    return statistics.fmean(accuracy(data, attack, f, defence, seed, rounds)[0] for seed in range(seeds))


def points(x: float) -> str:
    return f"{100 * x:.1f}"


def told(attack: str, f: int, seeds: int) -> str:
    """What every defence came to."""
    return f"f={f}: " + ", ".join(f"{d} {points(mean('digits', attack, f, d, seeds))}" for d in DEFENCES)


@row("S5", "none", goal="norm=median loses at most 1 point where nobody attacks", minutes=3)
def clean(variant: str, short: bool) -> Result:
    with settled():
        if short:
            return _short("none", 0)
        loss = mean("digits", "none", 0, "mean", SEEDS) - mean("digits", "none", 0, PRESET, SEEDS)
        return Result(f"{points(loss)} points lost", loss <= 0.01, told("none", 0, SEEDS))


@row("S5", *GATED, goal="norm=median loses at most 3 points with 4 attackers of 20", minutes=8)
def under_attack(attack: str, short: bool) -> Result:
    with settled():
        if short:
            return _short(attack, 4)
        loss = mean("digits", "none", 0, "mean", SEEDS) - mean("digits", attack, 4, PRESET, SEEDS)
        notes = "; ".join(told(attack, f, SEEDS) for f in TOLD)
        return Result(f"{points(loss)} points lost", loss <= 0.03, notes)


@row(
    "S5", "best", goal="with 8 of 20, the best defence loses at most 5 points under at least 6 of 8 attacks", minutes=40
)
def the_best(variant: str, short: bool) -> Result:
    if short:
        return _short("sign_flip", 8)
    with settled():
        base = mean("digits", "none", 0, "mean", SEEDS)
        found = {attack: max((mean("digits", attack, 8, d, SEEDS), d) for d in DEFENCES) for attack in GATED}
        near = sum(base - reached <= 0.05 for reached, _ in found.values())
        said = ", ".join(f"{attack} {points(base - reached)} ({d})" for attack, (reached, d) in found.items())
        return Result(f"{near} of {len(GATED)} attacks", near >= 6, said)


@row("S5", "backdoor", goal="reported: how often a marked picture is taken for the attackers' label", minutes=8)
def backdoor(variant: str, short: bool) -> Result:
    with settled():
        if short:
            return _short("backdoor", 4)
        said = []
        for defence in DEFENCES:
            found = [accuracy("digits", "backdoor", 4, defence, seed)[1] for seed in range(SEEDS)]
            said.append(f"{defence} {points(statistics.fmean(x for x in found if x is not None))}")
        return Result(f"fooled in % of cases, f=4: {', '.join(said)}", True, "no defence here is one against it")


@row(
    "S5",
    "fashion_mnist",
    goal="norm=median loses at most 3 points under each of 8 attacks by 4 of 20, 1 clean",
    minutes=30,
)
def on_fashion_mnist(variant: str, short: bool) -> Result:
    if short:
        return _short("sign_flip", 4)
    with settled():
        base = mean("fashion_mnist", "none", 0, "mean", SEEDS)
        lost = {attack: base - mean("fashion_mnist", attack, 4, PRESET, SEEDS) for attack in GATED}
        lost_clean = base - mean("fashion_mnist", "none", 0, PRESET, SEEDS)
        met = max(lost.values()) <= 0.03 and lost_clean <= 0.01
        said = ", ".join(f"{attack} {points(loss)}" for attack, loss in lost.items())
        return Result(f"at most {points(max(lost.values()))} points lost, clean {points(lost_clean)}", met, said)


def _short(attack: str, f: int) -> Result:
    """One seed, ten rounds: it is far from where an undefended run goes, and near where a clean one does."""
    base = mean("digits", "none", 0, "mean", 1, 10)
    loss = base - mean("digits", attack, f, PRESET, 1, 10)
    return Result(f"{points(loss)} points lost after 10 rounds", loss <= 0.08)


# ---- S6


class Saying:
    """An engine one of whose clients says something else; all updates are kept.

    Args:
        liar: who, or None for nobody.
        lie: instead of its update; None: it does not answer.
        loss: instead of its loss.
    """

    def __init__(self, engine: Engine, liar: int | None, lie: Params | None, loss: float):
        self.name, self.reason, self.workers = engine.name, engine.reason, engine.workers
        self.updates: dict[int, Params] = {}
        self._engine = engine
        self._liar = liar
        self._lie = lie
        self._loss = loss

    def replies(self, kind: Kind, plan: Plan, *arguments: Any) -> Iterator[Reply]:
        for reply in self._engine.replies(kind, plan, *arguments):
            if kind == "round":
                if reply.client == self._liar and self._lie is None:
                    yield unused(reply.client, "E311", "no answer")
                    continue
                if reply.client == self._liar:
                    reply = reply._replace(message={**reply.message, "update": self._lie}, loss=self._loss)
                self.updates[reply.client] = {n: x.clone() for n, x in reply.message["update"].items()}
            yield reply

    def close(self) -> None:
        self._engine.close()


@row("S6", goal="no client moves the model by more than its registered share of what it says otherwise", minutes=2)
def influence(short: bool) -> Result:
    """One client says anything at all in round 1, of its loss too: against the same round without the lie, no layer
    moves by more than the client's share of the examples, times how far the lie is from its update. Where the lie is
    refused, the model is that of a round in which the client does not answer, which is in its power anyway."""
    draws = 20 if short else 2000
    source = torch.Generator().manual_seed(0)
    sizes = (3, 20, 7, 11)
    clients = {f"c{i}": (torch.randn(n, 5, generator=source), torch.arange(n) % 2) for i, n in enumerate(sizes)}
    data = lamina.ClientData.from_clients(clients)
    worst, exact, left_out, wrong = 0.0, 0.0, 0, 0
    for policy in ("off", "clip:1x", "median"):
        fed = lamina.Federation(
            lambda: lamina.models.mlp((5, 4, 2)), data, faults={"norm": policy}, engine="loop", diagnostics=False
        )
        start, _ = next(iter(fed.run(1)))
        honest, told, _ = _said(fed, start, None, {}, 0.0)
        without = [_said(fed, start, liar, None, 0.0)[0] for liar in range(len(sizes))]
        for _ in range(draws):
            liar = int(torch.randint(len(sizes), (), generator=source))
            size, loss = (10.0 ** float(torch.empty(()).uniform_(-4, 6, generator=source)) for _ in range(2))
            lie = {n: size * torch.randn(x.shape, generator=source) for n, x in fed.initial.params.items()}
            moved, _, used = _said(fed, start, liar, lie, loss)
            if not used:
                left_out += 1
                wrong += any(not torch.equal(x, without[liar][name]) for name, x in moved.items())
                continue
            for name, x in moved.items():
                most = sizes[liar] / sum(sizes) * float((lie[name] - told[liar][name]).double().norm())
                share = float((x.double() - honest[name].double()).norm()) / most
                worst = max(worst, share)
                if policy == "off":
                    exact = max(exact, abs(share - 1))
    figure = (
        f"at most {worst:.4f} of its share, of {3 * draws - left_out} lies; without bounds its share to {exact:.0e}"
    )
    refused = f"{left_out} others were refused, {wrong} of them with another model than without their client"
    return Result(figure, worst <= 1.001 and exact <= 1e-3 and not wrong, refused)


def _said(
    fed: lamina.Federation, start: lamina.State, liar: int | None, lie: Params | None, loss: float
) -> tuple[Params, dict[int, Params], bool]:
    """The model after one more round, all updates, and whether the liar's was used."""
    engines: list[Saying] = []

    def wrap(engine: Engine) -> Saying:
        engines.append(Saying(engine, liar, lie, loss))
        return engines[-1]

    state, record = next(iter(fed.through(wrap).run(1, start)))
    used = all(client.refused is None for client in record.clients if client.client == liar)
    return state.params, engines[0].updates, used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--data", default="digits")
    options = parser.parse_args()
    with settled():
        print(f"| f | attack | {' | '.join(DEFENCES)} |", flush=True)
        print(f"|---|---|{'---|' * len(DEFENCES)}", flush=True)
        for f, attack in [(0, "none"), *((f, attack) for f in TOLD for attack in ATTACKS)]:
            cells = []
            for defence in DEFENCES:
                found = [accuracy(options.data, attack, f, defence, seed) for seed in range(options.seeds)]
                ended = any(x == FAILED for x, _ in found)
                cell = "ends" if ended else points(statistics.fmean(x for x, _ in found))
                caught = [x for _, x in found if x is not None]
                cells.append(f"{cell} ({points(statistics.fmean(caught))})" if caught else cell)
            print(f"| {f} | {attack} | {' | '.join(cells)} |", flush=True)
    return 0


class settled(warnings.catch_warnings):
    """One thread, and no warnings of runs that are meant to fail."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
