"""LIPS against FedAvg where clients hold little data, with the inertia of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.recipes.observed import depth_table, last_round
from lamina.recipes.recipe import Claim, Extra, Recipe, Table, Variant, Verdict, higher, part, unrecorded
from lamina.runs import Run

THESIS = "the thesis of arXiv 2506.00932; its tables were not available to us"


def inertia(runs: Mapping[str, Sequence[Run]]) -> Extra:
    """How far every weight tensor has moved from the model after round 2, relative to it, at the end of the run."""
    found = {label: last_round(own, "inertia") for label, own in runs.items()}
    title = "Inertia: |w(t) - w(2)| / |w(2)| of the global model after the last round, mean over seeds"
    return Extra(depth_table(title, found), {"inertia": found})


def middle(layers: Mapping[str, float]) -> float:
    """Mean over the weight tensors between the first and the last."""
    values = list(layers.values())[1:-1]
    return sum(values) / len(values)


def _inert(table: Table) -> Verdict:
    if absent := unrecorded(table, "inertia", "FedAvg"):
        return absent
    layers = table.extra["inertia"]["FedAvg"]
    first, *_, last = layers.values()
    said = f"FedAvg moved its first layer {first:.3f}, the mean middle layer {middle(layers):.3f}, its last {last:.3f}"
    return Verdict(middle(layers) < min(first, last), said)


def _stirred(table: Table) -> Verdict:
    if absent := unrecorded(table, "inertia", "FedAvg", "LIPS"):
        return absent
    ours, base = (middle(table.extra["inertia"][label]) for label in ("LIPS", "FedAvg"))
    return Verdict(ours > base, f"the mean middle layer moved {ours:.3f} with LIPS, {base:.3f} with FedAvg")


CLAIMS = (
    Claim("LIPS is more accurate than FedAvg in the low-data setting.", THESIS, higher("LIPS", "FedAvg")),
    Claim(
        "Choosing by saliency |g * w| is better than by magnitude |w|.",
        "saliency is what the README runs; no figures were available to us",
        higher("LIPS", "LIPS magnitude"),
    ),
    Claim("Under FedAvg the middle layers hardly move: their inertia lies below the first's and the last's.", THESIS,
          _inert),
    Claim("LIPS sets the middle layers in motion.", THESIS, _stirred),
)  # fmt: skip


def _arms(rounds: int) -> dict[str, dict[str, Any]]:
    lips = {"name": "lips", "density": 0.5, "every": 5, "rounds": rounds}
    return {
        "FedAvg": {},
        "LIPS": {"method": {**lips, "score": "saliency"}},
        "LIPS magnitude": {"method": {**lips, "score": "magnitude"}},
    }


def _base(rounds: int, every: int, width: int, clients: int, alpha: float) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "evaluate_every": every,
        "cohort": "all",
        "weights": "examples",
        "buffers": "average",
        "model": {"name": "vgg11", "layout": "lips", "width": width},
        "data": {
            "entry": part("first"),
            "dataset": "cifar10",
            "clients": clients,
            "per_client": 100,
            "partition": f"dirichlet:{alpha}:balanced",
        },
        "method": "fedavg",
        "local": {"lr": 0.1, "momentum": 0.9, "batch_size": 100, "epochs": 5},
    }


CIFAR10 = Recipe(
    name="lips-cifar10",
    title="LIPS against FedAvg, CIFAR-10 with 100 images per client",
    paper="LIPS, transient sparsity against layer-wise inertia, arXiv 2506.00932",
    arxiv="2506.00932",
    source='model (five convolutions, "vgg11_bn" there), clients, images, partition, local training, rounds, density '
    "0.5 and a shock every 5 rounds from the README "
    "and the released code; the paper's text was not available to us",
    compares="FedAvg, LIPS by saliency, LIPS by magnitude, with inertia by layer",
    dataset="cifar10",
    published=Variant(
        base=_base(rounds=300, every=10, width=64, clients=100, alpha=0.1),
        arms=_arms(300),
        claims=CLAIMS,
        floor=0.30,
        why="no figure is published; three times chance",
        size="3 arms, 45 million examples: estimated 16 hours on 2 cores",
        extra=inertia,
    ),
    scaled=Variant(
        base=_base(rounds=60, every=5, width=16, clients=20, alpha=0.5),
        arms=_arms(60),
        claims=CLAIMS,
        floor=0.40,
        why="a first run of FedAvg alone, seed 0, reached 48.21 %",
        size="3 arms, 1.8 million examples: about 5 minutes on 2 cores",
        scaled="width 16 for 64 (247,050 parameters), 20 clients for 100, 60 rounds for 300, alpha = 0.5 for 0.1 (at "
        "0.1 FedAvg stood between 22 and 35 % from round 10 to 50)",
        extra=inertia,
    ),
    differs=(
        "clients share no images, and the test is CIFAR-10's own (released: 400 images per client with its labels)",
        "norm parameters, biases and BatchNorm statistics are averaged (released: each client keeps its own)",
    ),
)
