"""Several runs side by side: accuracy against bytes, which of them are worth having, and bytes to a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lamina.compare import bytes_to, compare
from lamina.errors import ConfigError
from lamina.folder import counts, standing
from lamina.report.figure import (
    GREY,
    LINES,
    Figure,
    Note,
    Page,
    Table,
    evenly,
    join,
    layout,
    number,
    numbers,
    plain,
    short,
    titled,
)
from lamina.report.tables import Tables
from lamina.terminal import share, size, sizes

_POINTS = 300

Row = dict[str, Any]  # of `lamina.compare`: one experiment, its seeds folded


def page(every: Sequence[Tables], most: int) -> Page:
    if len(every) == 1:
        text = (
            "This report is of one run. Several in one file are compared here: `lamina report RUN RUN...`, and in the "
            "terminal `lamina compare RUN...`."
        )
        return Page("compare", "Compare", "", [Note("Nothing to compare with", text)])
    found = [tables.run for tables in every]
    lead = f"{len(every)} runs, all on the same split of the same examples."
    try:
        rows = compare(found)
    except ConfigError as error:
        rows = compare(found, force=True)
        lead = f"{len(every)} runs. Careful: {error.message}."
    title_of = {str(tables.run.path): tables.title for tables in every}
    names = [title_of[row["run"]] + (f" and {row['n'] - 1} more seeds" if row["n"] > 1 else "") for row in rows]
    if not any(row["accuracy"] is not None for row in rows):
        text = "None of these runs was tested with class labels."
        return Page("compare", "Compare", lead, [_table(names, rows), Note("Accuracy", text)])
    row_of = {path: i for i, row in enumerate(rows) for path in row["runs"]}
    colours = [LINES[row_of[str(tables.run.path)] % len(LINES)] for tables in every]
    curves = _curves(every, colours, min(_POINTS, most), rows[0]["target"])
    blocks = [curves, _pareto(names, rows), _to_target(names, rows), _table(names, rows)]
    return Page("compare", "Compare", lead, blocks)


def _curves(every: Sequence[Tables], colours: Sequence[str], most: int, target: float | None) -> Figure:
    data = []
    for tables, colour in zip(every, colours, strict=True):
        run = tables.run
        tested = [
            (row, worth) for row in tables.rows if counts(row) and (worth := standing(row, run.personal)) is not None
        ]
        kept = [tested[i] for i in evenly(len(tested), most)]
        name = plain(tables.title)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(kept) <= 40 else "lines",
                "name": name,
                "x": numbers((row.total_up + row.total_down) / 1e6 for row, _ in kept),
                "y": numbers(worth for _, worth in kept),
                "customdata": [row.round for row, _ in kept],
                "line": {"color": colour, "width": 2},
                "marker": {"size": 5},
                "hovertemplate": f"{name}<br>round %{{customdata}}<br>%{{x:.4g}} MB<br>%{{y:.4f}}<extra></extra>",
            }
        )
    shape = layout(
        380, xaxis={"title": titled("MB sent, up and down")}, yaxis={"title": titled("accuracy")}, showlegend=True
    )
    said = []
    if target is not None:
        at = [(there.bytes, tables.title) for tables in every if (there := bytes_to(tables.run, target)) is not None]
        if len(at) > 1 and min(at)[0] < 0.95 * max(at)[0]:
            said.append(
                f"At an accuracy of {target:.2f}, {min(at)[1]} stands furthest left, {max(at)[1]} furthest right."
            )
    shows = "Test accuracy over what each run had sent until then. Further left is cheaper, further up is better."
    return Figure("compare-bytes", "Accuracy against bytes", shows, data, shape, said)


def _pareto(names: Sequence[str], rows: Sequence[Row]) -> Figure:
    front = sorted((i for i, row in enumerate(rows) if row["pareto"]), key=lambda i: rows[i]["bytes_total"])
    tested = [i for i, row in enumerate(rows) if row["accuracy"] is not None]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": numbers(rows[i]["bytes_total"] / 1e6 for i in front),
            "y": numbers(rows[i]["accuracy"] for i in front),
            "line": {"color": GREY, "dash": "dot", "width": 1.5, "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]
    for i in tested:
        row, colour = rows[i], LINES[i % len(LINES)]
        spread = row["accuracy_deviation"]
        point: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers",
            "name": plain(names[i]),
            "x": [number(row["bytes_total"] / 1e6)],
            "y": numbers([row["accuracy"]]),
            "marker": {
                "color": colour if row["pareto"] else "#ffffff",
                "size": 13,
                "line": {"color": colour, "width": 2},
            },
            "hovertemplate": f"{plain(names[i])}<br>%{{x:.4g}} MB<br>%{{y:.4f}}"
            + ("" if spread is None else f" ± {spread:.4f}")
            + "<extra></extra>",
        }
        if spread is not None:
            point["error_y"] = {"type": "data", "array": numbers([spread]), "thickness": 1.5, "color": colour}
        data.append(point)
    shape = layout(
        380,
        xaxis={"title": titled("MB sent, up and down"), "rangemode": "tozero"},
        yaxis={"title": titled("final accuracy")},
        showlegend=True,
    )
    shows = (
        "A point is a run at its end; full points are those that no other beats in both. Bars: deviation over seeds."
    )
    return Figure("pareto", "What accuracy costs", shows, data, shape, _worth(names, rows, front, tested))


def _worth(names: Sequence[str], rows: Sequence[Row], front: Sequence[int], tested: Sequence[int]) -> list[str]:
    if len(tested) < 2:
        return []
    out = [names[i] for i in tested if i not in front]
    said = []
    if out:
        said.append(f"Beaten by another run in accuracy and bytes: {join([short(name) for name in out])}.")
    else:
        said.append("No run is beaten by another in both: each is worth its bytes to somebody.")
    cheap, good = front[0], front[-1]
    if cheap != good:
        points = 100 * (rows[good]["accuracy"] - rows[cheap]["accuracy"])
        times = rows[good]["bytes_total"] / max(1, rows[cheap]["bytes_total"])
        said.append(
            f"From the cheapest ({names[cheap]}, {share(rows[cheap]['accuracy'])}) to the most accurate "
            f"({names[good]}, "
            f"{share(rows[good]['accuracy'])}) it is {points:.1f} points for {times:.1f} times the bytes."
        )
    else:
        said.append(f"{names[good]} is the most accurate and the cheapest.")
    fallen = {names[i]: rows[i]["best"] - rows[i]["accuracy"] for i in tested}
    swung = [name for name, lost in fallen.items() if lost > 0.03]
    if swung:
        most = 100 * max(fallen.values())
        said.append(
            f"The last tests of {join([short(name) for name in swung])} stand up to {most:.0f} points below "
            "their best: "
            "accuracies swing, and the order of these points is partly chance."
        )
    if all(rows[i]["n"] == 1 for i in tested):
        said.append("One seed each: a difference of a point or two may be chance. Repeat with `seed=1` and `seed=2`.")
    return said


def _to_target(names: Sequence[str], rows: Sequence[Row]) -> Figure | Note:
    title, target = "Bytes to a target", rows[0]["target"]
    if target is None:
        return Note(title, "No run has an accuracy above 0.")
    widest = max((row["to_target"] or 0) for row in rows) or 1
    there = [(row["to_target"], i) for i, row in enumerate(rows) if row["to_target"] is not None]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "x": numbers(0 if row["to_target"] is None else row["to_target"] / 1e6 for row in rows),
            "y": list(range(len(rows))),
            "marker": {"color": [LINES[i % len(LINES)] for i in range(len(rows))]},
            "text": [_told(row) for row in rows],
            "textposition": ["inside" if (row["to_target"] or 0) > 0.4 * widest else "outside" for row in rows],
            "cliponaxis": False,
            "customdata": [plain(name) for name in names],
            "hovertemplate": "%{customdata}<br>%{text}<extra></extra>",
        }
    ]
    labels = [plain(short(name, 26)) for name in names]
    shape = layout(
        max(180, 90 + 34 * len(rows)),
        xaxis={"title": titled("MB sent, up and down"), "fixedrange": True, "range": [0, 1.04 * widest / 1e6]},
        yaxis={
            "tickmode": "array",
            "tickvals": list(range(len(rows))),
            "ticktext": labels,
            "range": [len(rows) - 0.5, -0.5],
            "showgrid": False,
            "fixedrange": True,
        },
        bargap=0.3,
        showlegend=False,
    )
    said = []
    if len(there) > 1:
        least, most = min(there), max(there)
        if least[0] < 0.95 * most[0]:
            said.append(
                f"{names[least[1]]} was there first in bytes: {size(round(least[0]))}, where {names[most[1]]} needed "
                f"{size(round(most[0]))}, {most[0] / least[0]:.1f} times as many."
            )
        else:
            said.append(
                f"Those that reached it needed about as many: {size(round(least[0]))} to {size(round(most[0]))}."
            )
    lacking = [names[i] for i, row in enumerate(rows) if row["to_target"] is None]
    if lacking:
        said.append(f"It was not reached by {join([short(name) for name in lacking])}.")
    shows = (
        f"What each run had sent when a test first showed an accuracy of {target:.2f}: 95 % of the best that any of "
        "them reached, rounded down."
    )
    return Figure("to-target", title, shows, data, shape, said)


def _told(row: Row) -> str:
    if row["to_target"] is None:
        return "not reached" if row["n"] == 1 else f"reached by {row['reached']} of {row['n']} seeds"
    return f"{size(round(row['to_target']))}, round {row['to_target_round']:.4g}"


def _table(names: Sequence[str], rows: Sequence[Row]) -> Table:
    ups, downs, totals = (sizes([round(row[key]) for row in rows]) for key in ("bytes_up", "bytes_down", "bytes_total"))
    cells = []
    for i, row in enumerate(rows):
        spread, times = row["accuracy_deviation"], row["vs_first"]
        cells.append(
            [
                names[i],
                str(row["method"]),
                str(row["codec"]),
                str(row["rounds"]),
                share(row["accuracy"]) + ("" if spread is None else f" ± {spread:.4f}"),
                share(row["best"]),
                ups[i],
                downs[i],
                totals[i],
                "-" if times is None else f"{times:.2f}×",
                "yes" if row["pareto"] else "no",
            ]
        )
    head = ["run", "method", "codec", "rounds", "accuracy", "best", "up", "down", "total", "fewer", "Pareto"]
    shows = (
        f"Fewer: how many times fewer bytes than {names[0]}. Pareto: no other run is at least as accurate for at "
        "most as "
        "many bytes, and better in one of them."
    )
    return Table("The runs", shows, head, cells, tuple(range(3, 10)))
