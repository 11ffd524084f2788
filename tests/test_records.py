"""Columns of the layer records that a method's state makes: what clients keep back, and how a mask moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lamina


def federation(method: lamina.Method[Any, Any] | None = None, **options: Any) -> lamina.Federation:
    data = lamina.data.digits(clients=6, partition="dirichlet:0.5", seed=0)
    return lamina.Federation(
        lambda: lamina.models.mlp((64, 16, 10)), data, method=method, cohort=3, engine=options.pop("engine", "loop"),
        local=lamina.LocalSGD(lr=0.1, batch_size=32), **options,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["loop", "processes", "stacked"])
@pytest.mark.parametrize(
    "method", [lamina.ErrorFeedback(), lamina.DGC(), lamina.FLARE(), lamina.STC()], ids=lambda m: type(m).__name__
)
def test_the_residual_norm_is_that_of_the_cohorts_states(method: Any, engine: str) -> None:
    fed = federation(method, uplink=lamina.wire.TopK(0.05), engine=engine, workers=2 if engine == "processes" else None)
    state, record = next(iter(fed.run(1)))
    sizes = {c: float(fed.data.sizes[c]) for c in record.cohort}
    for name, layer in record.layers.items():
        squares = {c: float(state.clients.rows[c].method.residual[name].double().norm()) ** 2 for c in record.cohort}
        mean = sum(sizes[c] / sum(sizes.values()) * squares[c] for c in record.cohort)
        assert layer.residual_norm == pytest.approx(mean**0.5, rel=1e-5)
    assert any(layer.residual_norm for layer in record.layers.values())


def test_in_a_chain_it_is_found_too() -> None:
    fed = federation(lamina.Chain(lamina.FedProx(mu=0.1), lamina.ErrorFeedback()), uplink=lamina.wire.TopK(0.05))
    _, record = next(iter(fed.run(1)))
    assert all(layer.residual_norm is not None for layer in record.layers.values())


def test_where_nothing_is_kept_back_there_is_no_figure() -> None:
    _, record = next(iter(federation().run(1)))
    assert all(layer.residual_norm is None and layer.mask_churn is None for layer in record.layers.values())


def test_a_fixed_mask_is_not_remembered_and_has_no_churn() -> None:
    rounds = list(federation(lamina.SSFL(density=0.5)).run(2))
    assert all(state.observed.mask == {} for state, _ in rounds)
    churn = [{layer.mask_churn for layer in record.layers.values() if layer.density != 1} for _, record in rounds]
    assert churn == [{None}, {0.0}]


def test_churn_counts_the_entries_that_came(tmp_path: Path) -> None:
    """FedDST moves its mask: against the plans' own masks, and the same after going on from a checkpoint."""
    fed = federation(lamina.FedDST(density=0.3, every=1, ratio=0.4))
    masks: list[dict[str, torch.Tensor]] = []
    records = []
    for state, record in fed.run(4):
        masks.append(state.observed.mask)
        records.append(record)
    assert all(layer.mask_churn is None for layer in records[0].layers.values())
    moved = 0.0
    for t in range(1, 4):
        for name, layer in records[t].layers.items():
            if name in masks[t]:
                now, before = masks[t][name], masks[t - 1][name]
                expected = float((now & ~before).sum()) / float(now.sum())
                assert layer.mask_churn == pytest.approx(expected)
                moved += expected
    assert moved > 0
    run = fed.fit(2, tmp_path / "run", progress=False)
    again = lamina.runs.resume(tmp_path / "run", 4, fed=fed, progress=False)
    assert run.path == again.path
    lines = list(lamina.folder.read_log(tmp_path / "run" / "layers.jsonl", 1 << 30))
    for line in lines:
        if line["round"] == 2:
            assert line.get("mask_churn") == records[2].layers[line["layer"]].mask_churn
