"""What share of each layer travelled or is kept, how masks change, and what positions cost beside values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lamina.report.figure import (
    LINES,
    Figure,
    Note,
    Page,
    Table,
    columns,
    heat,
    layout,
    number,
    numbers,
    plain,
    short,
    titled,
)
from lamina.report.layers import names_of, shown
from lamina.report.tables import Tables, bins, last_of, mean_of, means

MASKS = ("ssfl", "randommask", "feddst", "magnitudepruning")  # methods under which clients have a common mask
_WIDTHS = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}  # bytes of a value, where it is the same for all
_WHOLE = 0.9995
_CHURN = "Share of the kept entries that another entry took the place of, layer by layer."


def page(tables: Tables, most: int) -> Page:
    masked = [name for name in tables.methods if name in MASKS]
    if masked:
        lead = f"{masked[0]} trains under one mask for all clients: what it drops is not sent, up or down."
    else:
        lead = "No method in this run has a mask. What a sparse uplink leaves out is shown here too."
    blocks = [
        _density(tables, most),
        _recorded(tables, most, "mask_churn", "How much the mask changes", _CHURN, _no_churn(tables)),
        _recorded(
            tables, most, "residual_norm", "What is kept for later",
            "Length of what the clients hold back because the uplink left it out, layer by layer.",
            "Nothing is recorded here: a residual is kept under a lossy uplink by `method=errorfeedback`, `dgc`, "
            "`ef21` or `flare`.",
        ),
        _split(tables),
    ]  # fmt: skip
    return Page("sparsity", "Sparsity", lead, blocks)


def _no_churn(tables: Tables) -> str:
    moving = [name for name in tables.methods if name in ("feddst", "magnitudepruning")]
    if moving:
        return f"{moving[0]} changes its mask, but this run does not record by how much."
    if any(name in MASKS for name in tables.methods):
        return (
            "The mask of this method stays as it is after the setup, and is the same for all clients: it does not "
            "churn, and overlaps with itself in full."
        )
    return "There is no mask in this run. Masks that change come with `method=feddst` and `method=magnitudepruning`."


def _density(tables: Tables, most: int) -> Figure | Note:
    title = "Density by layer"
    which = shown(tables)
    grid = tables.column("density")[which]
    if np.isnan(grid).all():
        return Note(title, "No layer was uploaded, so there is no density.")
    if np.nanmin(grid) > _WHOLE:
        return Note(
            title,
            "Every layer that was uploaded was uploaded whole: density 1 everywhere. `uplink=topk:0.05` with "
            "`method=errorfeedback`, or one subnetwork for all (`method=ssfl`), would send a part of it.",
        )
    groups = bins(tables.rounds, most)
    data, shape, narrow = heat(
        names_of(tables, which), columns(groups), means(grid, groups), "density", title="density"
    )
    return Figure(
        "density",
        title,
        "Share of each layer's entries that its updates carry. White: nothing was uploaded in that round.",
        data,
        shape | {"showlegend": False},
        _sparse(tables, which, last_of(grid)),
        narrow=narrow,
    )


def _sparse(tables: Tables, which: Sequence[int], density: Any) -> list[str]:
    names = names_of(tables, which)
    known = [j for j in range(len(which)) if not np.isnan(density[j])]
    if not known:
        return []
    low, high = min(known, key=lambda j: density[j]), max(known, key=lambda j: density[j])
    numel = [tables.parts[which[j]].numel or 0 for j in known]
    overall = float(np.dot([density[j] for j in known], numel) / sum(numel)) if sum(numel) else None
    whole = f"At the end {100 * overall:.1f} % of the weights travel" if overall is not None else "At the end"
    said = []
    if density[low] < 0.8 * density[high]:
        said.append(
            f"{whole}: least of {names[low]} ({100 * density[low]:.2f} %), most of {names[high]} "
            f"({100 * density[high]:.2f} %)."
        )
    else:
        said.append(f"{whole}, alike in all layers.")
    empty = [names[j] for j in known if density[j] < 0.001]
    if empty and any(name in MASKS for name in tables.methods):
        said.append(
            f"{len(empty)} layers are all but empty ({', '.join(short(n) for n in empty[:3])}): a higher "
            "`method.density`, or a layout by layer (`method.layout=erk`, where the method has one), keeps them alive."
        )
    return said


def _recorded(tables: Tables, most: int, column: str, title: str, shows: str, otherwise: str) -> Figure | Note:
    """Lines by layer of a column that only some runs have."""
    which = shown(tables)
    grid = tables.column(column)[which]
    if not grid.size or np.isnan(grid).all():
        return Note(title, otherwise)
    if column == "mask_churn" and not np.nansum(grid):
        return Note(title, f"It never did: the mask was the same in all {tables.rounds} rounds. {otherwise}")
    names = names_of(tables, which)
    groups = bins(tables.rounds, min(120, most))
    binned = means(grid, groups)
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": plain(short(name)),
            "x": [number(float(group.mean())) for group in groups],
            "y": numbers(binned[j]),
            "connectgaps": True,
            "line": {"width": 1.8, "color": LINES[j % len(LINES)]},
            "hovertemplate": f"{plain(short(name))}<br>round %{{x}}<br>%{{y:.4g}}<extra></extra>",
        }
        for j, name in enumerate(names)
    ]
    shape = layout(
        300,
        xaxis={"title": titled("round")},
        yaxis={"rangemode": "tozero"},
        showlegend=len(names) <= len(LINES),
    )
    half = mean_of(grid, tables.rounds // 2)
    known = [j for j in range(len(names)) if not np.isnan(half[j])]
    said = []
    if known and (top := max(known, key=lambda j: half[j])) is not None and half[top] > 0:
        said.append(f"Over the second half it is highest in {names[top]}: {half[top]:.3g} on average.")
    return Figure(column.replace("_", "-"), title, shows, data, shape, said)


def _split(tables: Tables) -> Table | Note:
    """Bytes of values, by what a value of this codec takes, and what is left: positions and codec headers."""
    title = "Values and positions"
    sparse = tables.setting("uplink.name") not in (None, "dense")
    width = _WIDTHS.get(str(tables.setting("uplink.values")))
    if not sparse:
        return Note(title, "The uplink is dense: it sends values alone, and no positions.")
    if width is None:
        return Note(title, "The run does not record how this codec's bytes divide into values and positions.")
    up, density, sent = (tables.column(name) for name in ("bytes_up", "density", "uploaded"))
    messages = np.array([row.clients for row in tables.rows], dtype=float)
    rows = []
    shares = {}
    for i in shown(tables):
        numel = tables.parts[i].numel
        if not numel or np.isnan(density[i]).all():
            continue
        values = int(np.nansum(density[i] * numel * messages * np.nan_to_num(sent[i])) * width)
        whole = int(np.nansum(up[i]))
        if whole:
            shares[tables.parts[i].name] = 1 - values / whole
            rows.append(
                [
                    tables.parts[i].name,
                    f"{whole:,}",
                    f"{values:,}",
                    f"{max(0, whole - values):,}",
                    f"{100 * (1 - values / whole):.1f} %",
                ]
            )
    if not rows:
        return Note(title, "No layer of known size was uploaded.")
    most = max(shares, key=shares.__getitem__)
    said = [f"Positions take most of {most}: {100 * shares[most]:.1f} % of its bytes."]
    head = ["layer", "bytes up", "values", "positions", "share"]
    shows = (
        f"At {width:g} bytes a value; computed from the density of each round, so exact where every client sends as "
        "many."
    )
    return Table(title, shows, head, rows, (1, 2, 3, 4), said)
