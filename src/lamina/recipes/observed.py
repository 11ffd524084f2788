"""Tables from the records of runs: what every layer did in the last round, by depth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from lamina.folder import read_log
from lamina.runs import Run
from lamina.tabular import markdown
from lamina.terminal import Column


def by_round(run: Run, column: str) -> dict[int, dict[str, float]]:
    """Round -> weight tensor -> number, in model order; rounds in which no tensor has the number are left out.

    Weight tensors of norms stand beside the others in the records: they have one dimension and are left out, by name.
    """
    found: dict[int, dict[str, float]] = {}
    for row in read_log(run.path / "layers.jsonl", run.info["lengths"]["layers.jsonl"]):
        if row.get(column) is not None and is_weight(row["layer"]):
            found.setdefault(row["round"], {})[row["layer"]] = row[column]
    return found


def is_weight(name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return "weight" in leaf and "norm" not in owner.rpartition(".")[2]


def last_round(runs: Sequence[Run], column: str) -> dict[str, float]:
    """Weight tensor -> number in the last round that has it, mean over runs. {} when none has."""
    ends = [rounds[max(rounds)] for run in runs if (rounds := by_round(run, column))]
    return {name: statistics.fmean(end[name] for end in ends) for name in ends[0]} if ends else {}


def depth_table(title: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """A row per arm: the first and last layer, the quarters between, the mean of the middle, as Markdown."""
    rows = [(label, list(layers.values())) for label, layers in found.items() if len(layers) > 2]
    places = {"first": 0.0, "1/4": 0.25, "1/2": 0.5, "3/4": 0.75, "last": 1.0}
    columns = [Column("arm", [label for label, _ in rows], left=True)]
    columns += [
        Column(name, [f"{values[round(share * (len(values) - 1))]:.4g}" for _, values in rows])
        for name, share in places.items()
    ]
    columns.append(Column("mean of the middle", [f"{statistics.fmean(values[1:-1]):.4g}" for _, values in rows]))
    columns.append(Column("layers", [str(len(values)) for _, values in rows]))
    return "\n".join([f"## {title}", "", "By depth from the input, weight tensors only.", "", *markdown(columns)])
