"""Which layers move, which diverge, and what of their place, width and receptive field stands beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.report.figure import (
    LINES,
    NARROW_LABEL,
    SHOWN,
    UP,
    Figure,
    Note,
    Page,
    Table,
    columns,
    depth_axis,
    heat,
    join,
    layout,
    log_axis,
    number,
    numbers,
    plain,
    short,
    tall,
    titled,
)
from lamina.report.tables import Grid, Tables, bins, last_of, lasts, mean_of, means

REFERENCE = 2  # inertia is measured from the global model after this round
_CLEARLY = 0.8  # a mean below so many times another is called less


def shown(tables: Tables) -> list[int]:
    """The weight tensors that figures show: all, or the largest where there are very many."""
    found = tables.matrices
    if len(found) <= SHOWN:
        return found
    weight = [tables.parts[i].numel or 0 for i in found]
    largest = sorted(range(len(found)), key=lambda j: -weight[j])[:SHOWN]
    return [found[j] for j in sorted(largest)]


def names_of(tables: Tables, which: Sequence[int]) -> list[str]:
    return [tables.parts[i].name for i in which]


def page(tables: Tables, most: int) -> Page:
    count, total = len(tables.matrices), len(tables.parts)
    lead = (
        f"{count} weight tensors, from the input at the top to the loss at the bottom, among {total} parameters in all."
    )
    if count > SHOWN:
        lead += f" Figures show the {SHOWN} largest of them."
    blocks = [_inertia(tables, most), _divergence(tables, most), _norms(tables, most), _facts(tables)]
    return Page("layers", "Layers", lead, blocks)


# ---- inertia


def _inertia(tables: Tables, most: int) -> Figure | Note:
    title = "How far each layer has moved"
    which = shown(tables)
    grid = tables.column("inertia")[which]
    if tables.rounds <= REFERENCE or np.isnan(grid).all():
        return Note(
            title, "It is measured from the model after round 2 (rounds count from 0): this run has no later round."
        )
    grid = grid[:, REFERENCE:]
    groups = bins(grid.shape[1], most)
    said = columns([group + REFERENCE for group in groups])
    data, shape, narrow = heat(names_of(tables, which), said, lasts(grid, groups), "moved", title="moved")
    widths = [tables.parts[i].width for i in which]
    fields = [tables.parts[i].field for i in which]
    strips = [("width", widths, LINES[2])] + ([("field", fields, LINES[4])] if any(fields) else [])
    if any(widths):
        share = 0.13
        shape["xaxis"]["domain"] = [0, round(1 - share * len(strips) - 0.02, 4)]
        data[0]["colorbar"] |= {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.0,
            "yanchor": "bottom",
            "len": 0.5,
        }
        data[0]["colorbar"]["title"] = {"text": ""}
        hidden: dict[str, Any] = {}
        for j, (name, values, colour) in enumerate(strips):
            start = 1 - share * (len(strips) - j) + 0.015
            shape[f"xaxis{j + 2}"] = {
                "domain": [round(start, 4), round(min(1.0, start + share - 0.015), 4)],
                "anchor": "y",
                "title": titled(name),
                "showgrid": False,
                "zeroline": False,
                "showticklabels": False,
                "fixedrange": True,
                "range": [0, 1.75 * max(v or 0 for v in values)],
            }
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": numbers(values),
                    "y": data[0]["y"],
                    "xaxis": f"x{j + 2}",
                    "marker": {"color": colour, "opacity": 0.65},
                    "text": ["" if v is None else str(v) for v in values],
                    "textposition": "outside",
                    "textfont": {"size": 11},
                    "cliponaxis": False,
                    "hovertemplate": f"{name} %{{x}}<extra></extra>",
                    "showlegend": False,
                }
            )
            hidden[f"xaxis{j + 2}"] = None
        narrow |= hidden | {"xaxis.domain": [0, 1], "hide": list(range(1, len(data)))}
    beside = " On a wide screen, beside it: the width (outputs)" + (
        " and the receptive field in pixels of the input." if any(fields) else "."
    )
    return Figure(
        "inertia",
        title,
        "Distance of each layer of the global model from where it was after round 2, relative to its size then: "
        "dark layers have moved far, pale ones stayed. Papers call a layer that stays inert."
        + (beside if any(widths) else ""),
        data,
        shape | {"showlegend": False, "bargap": 0.35},
        _inert(tables, which, last_of(grid)),
        narrow=narrow,
    )


def _inert(tables: Tables, which: Sequence[int], moved: NDArray[np.float64]) -> list[str]:
    names = names_of(tables, which)
    known = [j for j in range(len(which)) if not np.isnan(moved[j])]
    if len(known) < 2:
        return []
    most, least = max(known, key=lambda j: moved[j]), min(known, key=lambda j: moved[j])
    said = []
    if moved[least] < _CLEARLY * moved[most]:
        said.append(
            f"{names[most]} has moved farthest ({moved[most]:.3g} of its size), {names[least]} least "
            f"({moved[least]:.3g})."
        )
    if len(known) < 3:
        said.append("With fewer than three weight tensors there is no middle to compare with the ends.")
        return said
    first, last = moved[known[0]], moved[known[-1]]
    middle = float(np.mean([moved[j] for j in known[1:-1]]))
    figures = f"{middle:.3g} on average against {first:.3g} for the first layer and {last:.3g} for the last"
    if middle < _CLEARLY * min(first, last):
        if "lips" in tables.methods:
            said.append(
                f"The middle layers lag even with LIPS: {figures}. A lower `method.density` shocks them harder."
            )
        else:
            said.append(f"The middle layers lag behind both ends: {figures}. That is what `method=lips` acts on.")
    elif middle > min(first, last):
        also = "" if "lips" in tables.methods else ", so LIPS would have little to act on here"
        said.append(f"The middle layers do not lag behind both ends: {figures}{also}.")
    return said


# ---- divergence


def _divergence(tables: Tables, most: int) -> Figure | Note:
    title = "How far the clients diverge, by depth"
    which = shown(tables)
    grid = tables.column("divergence")[which]
    if np.isnan(grid).all():
        why = (
            "this run was made with `diagnostics=false`"
            if tables.setting("diagnostics") is False
            else "no round in it has updates to compare"
        )
        return Note(title, f"There is no divergence to draw: {why}.")
    names = names_of(tables, which)
    groups = bins(tables.rounds, min(60, most))
    binned = means(grid, groups)
    whole = mean_of(grid, tables.rounds // 2)
    highest = float(np.nanmax(binned))
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "x": numbers(whole),
            "y": list(range(len(names))),
            "marker": {"color": UP},
            "name": "divergence",
            "customdata": [plain(name) for name in names],
            "hovertemplate": "%{customdata}<br>%{x:.4g}<extra></extra>",
        }
    ]
    shape = layout(
        tall(len(names), 180),
        xaxis={
            "title": titled("divergence (1: as much disagreement as common step)"),
            "range": [0, 1.05 * max(1.0, highest)],
            "fixedrange": True,
        },
        yaxis={**depth_axis(names), "fixedrange": True},
        showlegend=False,
        bargap=0.3,
        shapes=[
            {
                "type": "line",
                "x0": 1,
                "x1": 1,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": "#b3446c", "dash": "dot"},
            }
        ],
    )
    frames = [{"name": f"rounds {tables.rounds // 2}-{tables.rounds - 1}, mean", "x": numbers(whole)}]
    frames += [
        {"name": f"round {said}", "x": numbers(binned[:, j])}
        for j, said in enumerate(columns(groups))
        if not np.isnan(binned[:, j]).all()
    ]
    return Figure(
        "divergence",
        title,
        "Root of the clients' mean squared distance from their common step, over that step's length. 0: all clients "
        "went the same way. Above 1 (dotted) they disagree by more than they move together. Layers that waited in a "
        "round have no bar.",
        data,
        shape,
        _diverging(tables, names, whole),
        frames=frames,
        slider="rounds",
        narrow={
            "yaxis.ticktext": depth_axis(names, NARROW_LABEL)["ticktext"],
            "xaxis.title.text": "divergence",
        },
    )


def _diverging(tables: Tables, names: Sequence[str], values: NDArray[np.float64]) -> list[str]:
    known = [j for j in range(len(names)) if not np.isnan(values[j])]
    if len(known) < 2:
        return []
    said = []
    top, low = max(known, key=lambda j: values[j]), min(known, key=lambda j: values[j])
    half = f"Over rounds {tables.rounds // 2} to {tables.rounds - 1}"
    if values[low] < _CLEARLY * values[top]:
        said.append(
            f"{half}, {names[top]} diverged most ({values[top]:.2f}) and {names[low]} least ({values[low]:.2f})."
        )
    else:
        said.append(f"{half}, all layers diverged alike: from {values[low]:.2f} to {values[top]:.2f}.")
    above = [names[j] for j in known if values[j] > 1]
    if above and len(above) == len(known):
        fix = "" if "scaffold" in tables.methods else f"control variates ({tables.control_variates}), "
        said.append(
            f"In all {len(known)} layers the clients disagreed by more than they moved together. What acts on it: {fix}"
            "fewer local steps, or more clients a round."
        )
    elif above:
        said.append(f"Above 1: {join([short(name) for name in above[:4]])}{' and others' if len(above) > 4 else ''}.")
    third = max(1, len(known) // 3)
    if len(known) >= 3:
        near, far = (float(np.mean([values[j] for j in part])) for part in (known[:third], known[-third:]))
        if far > 1.25 * near:
            said.append(
                f"It grows towards the loss ({near:.2f} near the input, {far:.2f} near the loss), as where the last "
                "layers follow each client's labels. Keeping them with the clients (`method=personal`) acts on that, "
                "if a model for each client is what is wanted."
            )
        elif near > 1.25 * far:
            said.append(
                f"It grows towards the input ({near:.2f} near the input, {far:.2f} near the loss), as it does where "
                "differences add up in back-propagation. Wider layers, smaller receptive fields and shortcuts act on "
                "that: docs/methods/deeper_models.md."
            )
    return said


# ---- norms


def _norms(tables: Tables, most: int) -> Figure | Note:
    title = "Length of the common step"
    which = shown(tables)
    grid = tables.column("update_norm")[which]
    if np.isnan(grid).all():
        return Note(title, "No layer was uploaded in this run, so there is no common step.")
    names = names_of(tables, which)
    groups = bins(tables.rounds, min(120, most))
    binned = means(grid, groups)
    middles = [number(float(group.mean())) for group in groups]
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": plain(short(name)),
            "x": middles,
            "y": numbers(None if v <= 0 else v for v in binned[j]),
            "connectgaps": True,
            "line": {
                "width": 1.8,
                "color": LINES[j % len(LINES)] if len(names) <= len(LINES) else _shade(j, len(names)),
            },
            "hovertemplate": f"{plain(short(name))}<br>round %{{x}}<br>%{{y:.4g}}<extra></extra>",
        }
        for j, name in enumerate(names)
    ]
    shape = layout(
        340,
        xaxis={"title": titled("round")},
        yaxis={"title": titled("|mean update|"), **log_axis(binned.ravel())},
        showlegend=len(names) <= len(LINES),
    )
    lengths = "" if len(names) <= len(LINES) else " Light lines are near the input, dark ones near the loss."
    return Figure(
        "norms",
        title,
        "Length of the mean of the clients' updates, layer by layer (logarithmic)." + lengths,
        data,
        shape,
        _steps(names, grid),
    )


def _shade(j: int, count: int) -> str:
    x = j / max(1, count - 1)
    low, high = (176, 202, 228), (15, 40, 80)
    return "rgb({},{},{})".format(*(round(a + (b - a) * x) for a, b in zip(low, high, strict=True)))


def _steps(names: Sequence[str], grid: Grid) -> list[str]:
    rounds = grid.shape[1]
    if rounds < 8:
        return []
    quarter = rounds // 4
    early, late = mean_of(grid[:, :quarter]), mean_of(grid, rounds - quarter)
    ratios = {j: late[j] / early[j] for j in range(len(names)) if early[j] > 0 and not np.isnan(late[j])}
    if not ratios:
        return []
    middle = float(np.median(list(ratios.values())))
    grown = [j for j, ratio in ratios.items() if ratio > 1.25]
    last = f"in the last {quarter} rounds"
    if grown:
        worst = max(grown, key=lambda j: ratios[j])
        return [
            f"Steps grow in {len(grown)} of {len(ratios)} layers, most in {names[worst]}: {ratios[worst]:.2g} times "
            f"as long {last} as in the first. A falling rate (`local.schedule=cosine`) or a smaller `local.lr` acts on "
            "that."
        ]
    if middle < _CLEARLY:
        still = [names[j] for j, ratio in ratios.items() if ratio > _CLEARLY]
        not_so = f"; not so in {join([short(name) for name in still[:3]])}" if still else ""
        return [
            f"Steps shrink, as they do where training settles: {last} they are {middle:.2g} times as long as in "
            f"the first, in the median layer{not_so}."
        ]
    return [f"Steps are as long {last} as in the first ({middle:.2g} times): the model has not settled."]


# ---- the table beside


def _facts(tables: Tables) -> Table:
    total = sum(part.numel or 0 for part in tables.parts)
    moved, apart = last_of(tables.column("inertia")), mean_of(tables.column("divergence"), tables.rounds // 2)
    fields = any(part.field for part in tables.parts)
    head = ["layer", "shape", "parameters", "share", "width", *(["field"] if fields else []), "moved", "divergence"]
    rows, bars = [], []
    for i in shown(tables):
        part = tables.parts[i]
        share = (part.numel or 0) / total if total else 0.0
        rows.append(
            [
                part.name,
                "-" if part.shape is None else " × ".join(map(str, part.shape)),
                "-" if part.numel is None else f"{part.numel:,}",
                "-" if part.numel is None else f"{100 * share:.1f} %",
                "-" if part.width is None else str(part.width),
                *(["-" if part.field is None else str(part.field)] if fields else []),
                "-" if np.isnan(moved[i]) else f"{moved[i]:.3f}",
                "-" if np.isnan(apart[i]) else f"{apart[i]:.2f}",
            ]
        )
        bars.append(share)
    shows = (
        "Weight tensors in model order. Width: outputs. Moved: as in the first figure, at the end. Divergence: mean "
        "over the second half."
    )
    if fields:
        shows += " Field: receptive field in pixels of the input; a linear layer sees all of its input."
    elif tables.run._fed is None and tables.setting("model.entry"):
        shows += " Receptive fields are left out: the model is in a file of yours, which a report does not run."
    return Table("Layers", shows, head, rows, tuple(range(1, len(head))), bars=bars)
