"""Depth, width, receptive field and shortcuts against accuracy and divergence, for clients with IID data."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.recipes.observed import depth_table, last_round
from lamina.recipes.recipe import (
    Claim,
    Extra,
    Judge,
    Recipe,
    Table,
    Variant,
    Verdict,
    accuracy,
    higher,
    missing,
    part,
    unrecorded,
)
from lamina.runs import Run

ABSTRACT = "abstract of arXiv 2306.02701"
NO_FIGURE = "no figure was available to us for it alone"
GAIN = "wider and smaller together give ResNet-101 on Tiny-ImageNet as much as 43 %"


def divergences(runs: Mapping[str, Sequence[Run]]) -> Extra:
    """Relative and absolute divergence of every weight tensor at the end of the run."""
    federated = {label: own for label, own in runs.items() if not label.startswith("centralised")}
    relative = {label: last_round(own, "divergence") for label, own in federated.items()}
    absolute = {label: last_round(own, "divergence_std") for label, own in federated.items()}
    titles = (
        "Relative divergence after the last round: sqrt(E|u - Eu|^2 / |Eu|^2) of the clients' updates u",
        "Absolute divergence after the last round: the standard deviation over clients and entries",
    )
    text = "\n\n".join(depth_table(title, of) for title, of in zip(titles, (relative, absolute), strict=True))
    return Extra(text, {"divergence": relative, "divergence_std": absolute})


def _more_divergent(deep: str, shallow: str) -> Judge:
    def judge(table: Table) -> Verdict:
        if absent := unrecorded(table, "divergence", deep, shallow):
            return absent
        means = [statistics.fmean(table.extra["divergence"][label].values()) for label in (deep, shallow)]
        firsts = [next(iter(table.extra["divergence"][label].values())) for label in (deep, shallow)]
        said = (
            f"mean over layers {means[0]:.3f} in {deep}, {means[1]:.3f} in {shallow}; first layer {firsts[0]:.3f}, "
            f"{firsts[1]:.3f}"
        )
        return Verdict(means[0] > means[1], said)

    return judge


def _gap_grows(deep: str, shallow: str) -> Judge:
    """Whether the federated model loses more against its centralised twin where it is deeper."""

    def judge(table: Table) -> Verdict:
        pairs = [(f"centralised {label}", label) for label in (deep, shallow)]
        if absent := missing(table, *(label for pair in pairs for label in pair)):
            return absent
        numbers = [[table.arms[label].mean("accuracy") for label in pair] for pair in pairs]
        words = "; ".join(", ".join(accuracy(table.arms[label]) for label in pair) for pair in pairs)
        gaps = [a - b for a, b in numbers if a is not None and b is not None]
        if len(gaps) < 2:
            return Verdict(None, words)
        said = f"{words}: the gap is {100 * gaps[0]:.2f} points in {deep}, {100 * gaps[1]:.2f} in {shallow}"
        return Verdict(gaps[0] > gaps[1], said)

    return judge


def _claims(shallow: str, middle: str, deep: str) -> tuple[Claim, ...]:
    return (
        Claim(f"With depth, clients' models diverge more ({deep} against {shallow}).", ABSTRACT,
              _more_divergent(deep, shallow)),
        Claim(f"Federated training loses more against centralised training in {deep} than in {shallow}.", ABSTRACT,
              _gap_grows(deep, shallow)),
        Claim(f"{deep} is less accurate than {shallow} when trained federated, IID clients or not.", ABSTRACT,
              higher(shallow, deep)),
        Claim(f"Wider models gain ({middle} at twice the width); {GAIN}, {NO_FIGURE}.", ABSTRACT,
              higher(f"{middle} wide", middle)),
        Claim(f"A smaller receptive field gains ({middle}); {NO_FIGURE}.", ABSTRACT,
              higher(f"{middle} small field", middle)),
        Claim(f"Without shortcuts {middle} loses.", "the author's working tree compares both; " + NO_FIGURE,
              higher(middle, f"{middle} plain")),
    )  # fmt: skip


def _arms(
    depths: Sequence[tuple[str, str]],
    middle: tuple[str, str],
    common: dict[str, Any],
    width: int,
    field: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    def model(name: str, **knobs: Any) -> dict[str, Any]:
        return {"model": {"name": name, **common, "width": width, **knobs}}

    label, name = middle
    return {
        **{title: model(net) for title, net in depths},
        f"{label} wide": model(name, width=2 * width),
        f"{label} small field": model(name, **field),
        f"{label} plain": model(name, residual=False),
        **{f"centralised {title}": {**model(net), "method": "centralised"} for title, net in (depths[0], depths[-1])},
    }


_LOCAL = {"lr": 0.02, "momentum": 0.9, "batch_size": 64, "epochs": 8}

CIFAR10 = Recipe(
    name="deeper-cifar10",
    title="Divergence accumulation: depth, width, receptive field and shortcuts of ResNets, CIFAR-10",
    paper="Divergence accumulation in deeper models, and the guidelines against it, arXiv 2306.02701",
    arxiv="2306.02701",
    source="clients, local epochs, rounds, batch, learning rate, momentum and models from the author's working tree "
    "of days before the paper, which trains on Tiny-ImageNet; whether the paper's own settings are these is not known",
    compares="ResNets of growing depth; width x2, a smaller receptive field, no shortcuts; centralised",
    dataset="cifar10",
    published=Variant(
        base={
            "rounds": 40,
            "evaluate_every": 4,
            "cohort": "all",
            "weights": "uniform",
            "buffers": "average",
            "model": "resnet10",
            "data": {"name": "cifar10", "clients": 30, "partition": "iid", "augment": True},
            "method": "fedavg",
            "local": _LOCAL,
        },
        arms=_arms(
            [
                ("ResNet-10", "resnet10"),
                ("ResNet-18", "resnet18"),
                ("ResNet-34", "resnet34"),
                ("ResNet-50", "resnet50"),
                ("ResNet-101", "resnet101"),
            ],
            ("ResNet-34", "resnet34"),
            {"stem": "7x7"},
            64,
            {"stem": "3x3"},
        ),
        claims=_claims("ResNet-10", "ResNet-34", "ResNet-101"),
        floor=0.60,
        why="no figure is published for CIFAR-10; well above what a linear model reaches",
        reference="ResNet-10",
        size="10 arms, 160 million examples: estimated two weeks on 2 cores",
        extra=divergences,
    ),
    scaled=Variant(
        base={
            "rounds": 10,
            "evaluate_every": 2,
            "cohort": "all",
            "weights": "uniform",
            "buffers": "average",
            "model": "resnet8",
            "data": {
                "entry": part("first"),
                "dataset": "cifar10",
                "clients": 10,
                "per_client": 500,
                "partition": "iid",
                "augment": True,
            },
            "method": "fedavg",
            "local": {**_LOCAL, "lr": 0.1, "batch_size": 32, "epochs": 3},
        },
        arms=_arms(
            [("ResNet-8", "resnet8"), ("ResNet-20", "resnet20"), ("ResNet-32", "resnet32")],
            ("ResNet-20", "resnet20"),
            {"stem": "3x3"},
            8,
            {"receptive_field": 31},
        ),
        claims=_claims("ResNet-8", "ResNet-20", "ResNet-32"),
        floor=0.38,
        why="a first run of ResNet-8 alone, seed 0, reached 44.27 %",
        reference="ResNet-8",
        size="8 arms, 1.2 million examples: about 15 minutes on 2 cores",
        scaled="ResNets of the CIFAR family (8, 20 and 32 layers, width 8) for those of the ImageNet family, 10 "
        "clients of 500 images for 30 of 1,666, 10 rounds of 3 epochs with batches of 32 and learning rate 0.1 for 40 "
        "of 8 with 64 and 0.02; the smaller receptive field is 31 pixels (3x3 convolutions become 1x1) for a 3x3 stem",
        extra=divergences,
    ),
    differs=("Tiny-ImageNet is not in the box", "crops and mirrors of CIFAR-10 for random resized crops"),
)
