"""Functions of round records: they look at a run and touch nothing, so they serve every method.

Of no records they give []. Records that have not what a function reads are refused with the reason.

The divergence columns of a record come from one number per tensor and client, |u|^2, and from the mean: with
u_k = w_k - w the update of client k of m, and E their mean,

    divergence     = sqrt(E|u - Eu|^2 / |Eu|^2)
    divergence_std = sqrt(m E|u - Eu|^2 / (m numel - 1))      E|u - Eu|^2 = E|u|^2 - |Eu|^2
    alignment      = |Eu|^2 / E|u|^2                           1: all clients agree

With uniform weights `divergence_std` is the standard deviation of w_k - mean w over clients and entries, as the first
author of arXiv 2306.02701 logs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from lamina.errors import expect
from lamina.layers import Layer, matrices
from lamina.record import RoundRecord
from lamina.tree import Params


class Divergence(NamedTuple):
    """One weight tensor in one round; None where the layer was not uploaded, or nothing moved."""

    round: int
    layer: str
    depth_from_input: int  # position among the weight tensors with two or more dimensions, in model order; 0 is first
    depth_from_loss: int  # the same, counted from the last
    divergence: float | None
    divergence_std: float | None
    alignment: float | None


class Inertia(NamedTuple):
    """How far one parameter of the global model is from where it was after round 2."""

    round: int
    layer: str
    inertia: float | None  # |w(t) - w(2)| / |w(2)|; None where w(2) is zero
    inertia_l2: float | None  # |w(t) - w(2)|
    inertia_cosine: float | None  # of the angle between w(t) and w(2)


class Gap(NamedTuple):
    """Test accuracy around one aggregation."""

    round: int
    before: float  # mean over the clients' models
    after: float  # the global model
    gap: float  # after - before: what the aggregation gained


class LayerBytes(NamedTuple):
    layer: str  # as in `Traffic`: a parameter, or ``_shared``, ``_buffers``, ``_moments``, ...
    up: int
    down: int


def divergence(records: Iterable[RoundRecord], layers: Iterable[Layer]) -> list[Divergence]:
    """How far the clients were apart, by depth. Needs records made with `diagnostics=True`, the default.

    Literature is divided on whether the layers near the input or those near the loss diverge more: plot both depths.

    Args:
        records: of a run.
        layers: the layer table of its model, `fed.layers`: a record does not say which parameters are weights.

    Raises:
        ConfigError: E101 for records of another model, or made with `diagnostics=False`.
    """
    names = [layer.name for layer in matrices(layers)]
    last = len(names) - 1
    rows = []
    known = _records(records)
    for record in known:
        missing = next((name for name in names if name not in record.layers), None)
        expect(
            missing is None,
            f"layers: the records are of another model, they have no layer {missing!r}",
            where="layers",
            remedy="give fed.layers of the federation that made the records",
        )
        for depth, name in enumerate(names):
            seen = record.layers[name]
            rows.append(
                Divergence(
                    record.round, name, depth, last - depth, seen.divergence, seen.divergence_std, seen.alignment
                )
            )
    moved = [seen for record in known for name in names if (seen := record.layers[name]).update_norm]
    expect(
        not moved or any(seen.discrepancy is not None for seen in moved),
        "records: they have no divergence, because they were made with diagnostics=False",
        where="records",
        remedy="Federation(..., diagnostics=True), which is the default; on the command line diagnostics=true",
    )
    return rows


def inertia(records: Iterable[RoundRecord]) -> list[Inertia]:
    """Per round and parameter, from round 2 on (rounds count from 0): before, there is nothing to compare with.

    Raises:
        ConfigError: E101 for records of earlier rounds only.
    """
    known = _records(records)
    last = max((record.round for record in known), default=None)
    expect(
        last is None or last >= 2,
        f"records: they have no inertia, which begins with round 2, and the last of them is of round {last}",
        where="records",
        remedy="run at least three rounds: they count from 0",
    )
    return [
        Inertia(record.round, name, seen.inertia, seen.inertia_l2, seen.inertia_cosine)
        for record in known
        for name, seen in record.layers.items()
        if seen.inertia_l2 is not None
    ]


def accuracy_gap(records: Iterable[RoundRecord]) -> list[Gap]:
    """Rounds in which the clients' models were tested before aggregation and the global model after it.

    Needs `Federation(accuracy_before=True)`, which costs an evaluation per client.

    Raises:
        ConfigError: E101 for records none of which has both.
    """
    known = _records(records)
    expect(
        not known or any(record.accuracy is not None for record in known),
        "records: they have no accuracy: the data has no test set, or none of these rounds was tested",
        where="records",
        remedy="give ClientData a test set; evaluate_every says which rounds are tested",
    )
    expect(
        not known or any(record.accuracy_before is not None for record in known),
        "records: they have no accuracy of the clients' models before aggregation",
        where="records",
        remedy="Federation(..., accuracy_before=True); on the command line accuracy_before=true",
    )
    return [
        Gap(record.round, record.accuracy_before, record.accuracy, record.accuracy - record.accuracy_before)
        for record in known
        if record.accuracy_before is not None and record.accuracy is not None
    ]


def traffic(records: Iterable[RoundRecord]) -> list[LayerBytes]:
    """Bytes of every layer over all rounds, clients and phases, in the order in which they first travelled."""
    up: Counter[str] = Counter()
    down: Counter[str] = Counter()
    order: dict[str, None] = {}
    for record in _records(records):
        for row in record.traffic:
            order[row.layer] = None
            (up if row.direction == "up" else down)[row.layer] += row.bytes
    return [LayerBytes(layer, up[layer], down[layer]) for layer in order]


def _records(records: Iterable[RoundRecord]) -> list[RoundRecord]:
    """All of them. Raises ConfigError for anything else."""
    known = list(records)
    other = next((record for record in known if not isinstance(record, RoundRecord)), None)
    expect(
        other is None,
        f"records: expected those that Federation.run gives, got {type(other).__name__}",
        where="records",
        remedy="[record for _, record in fed.run(10)]; of a run in a folder layers.jsonl has the same columns",
    )
    return known


def divergence_std_of(weights: Sequence[Params]) -> dict[str, float | None]:
    """The definition itself, from the models of all clients: what the records have without holding them together.

    Unbiased standard deviation, over all clients and entries, of w_k - mean w, in float64.

    Args:
        weights: one tree per client, of the same names.
    """
    expect(len(weights) > 0, "weights: expected the model of at least one client", where="weights")
    found: dict[str, float | None] = {}
    for name in weights[0]:
        stack = torch.stack([tree[name].double() for tree in weights])  # [K, ...]
        apart = stack - stack.mean(0)
        found[name] = float(apart.std()) if apart.numel() > 1 else None
    return found
