"""What the run came to: accuracy, bytes, time, faults."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lamina.folder import Row, counts, standing
from lamina.report.figure import (
    DOWN,
    GREY,
    LINES,
    UP,
    Card,
    Cards,
    Figure,
    Note,
    Page,
    evenly,
    layout,
    numbers,
    plain,
    titled,
)
from lamina.report.tables import Tables
from lamina.runs import Run
from lamina.terminal import against, clock, share, size

_POINTS = 500  # in one line
_ENOUGH = 8  # tested rounds to say anything of a trend
_STATUS = {"done": "done", "running": "running", "interrupted": "stopped", "failed": "failed"}


def page(tables: Tables, most: int) -> Page:
    info = tables.info
    lead = (
        f"{info['method_repr']} on {info['data']}, {info['clients']:,} clients ({info['partition']}), "
        f"{info['cohort']:,} of them a round; up {info['uplink']}, down {info['downlink']}."
    )
    points = min(_POINTS, most)
    blocks = [cards(tables.run), *_accuracy(tables, points), *_by_bytes(tables, points), *_loss(tables, points)]
    return Page("overview", "Overview", lead, [*blocks, *_metrics(tables, points)])


def cards(run: Run) -> Cards:
    info = run.info
    final, best = run.final, run.best
    found = []
    worth = None if final is None else standing(final, run.personal)
    if final is not None and best is not None and worth is not None:
        whose = "accuracy of the clients' own models" if run.personal else "accuracy"
        found.append(Card(whose, share(worth), f"best {share(standing(best, run.personal))} in round {best.round}"))
    elif final is not None:
        found.append(Card("loss", share(final.loss), f"round {final.round}"))
    found.append(Card("sent up", size(info["bytes_up"]), f"{info['bytes_up']:,} bytes"))
    found.append(Card("sent down", size(info["bytes_down"]), f"{info['bytes_down']:,} bytes"))
    if run.records:
        found.append(Card("against FedAvg fp32", _saved(run.records[-1].saving), "both ways, the same rounds"))
    state = _STATUS.get(info["status"], info["status"])
    found.append(Card("rounds", f"{info['rounds_done']:,} of {info['rounds']:,}", f"{state}, {clock(info['seconds'])}"))
    refused = sum(row.refused for row in run.records)
    found.append(Card("updates not used", f"{refused:,}", "see Clients" if refused else "every answer counted"))
    return Cards(found)


def _saved(saving: float) -> str:
    return "as much" if abs(saving) < 0.0005 else against(saving)


# ---- accuracy


def _tested(tables: Tables) -> list[tuple[Row, float]]:
    """Tested rounds in sync, with the accuracy that they stand for."""
    personal = tables.run.personal
    return [(row, worth) for row in tables.rows if counts(row) and (worth := standing(row, personal)) is not None]


def _accuracy(tables: Tables, most: int) -> list[Figure | Note]:
    tested = _tested(tables)
    title = "Accuracy by round"
    if not tested:
        why = "this run has no test set of class labels" if tables.rows else "no round is finished yet"
        return [Note(title, f"There is no accuracy to draw: {why}.")]
    personal = tables.run.personal
    lines = [("the clients' own models" if personal else "global model", UP, tested)]
    before = [(row, row.accuracy_before) for row in tables.rows if row.accuracy_before is not None]
    own = [(row, row.personal_accuracy) for row in tables.rows if row.personal_accuracy is not None]
    if before:
        lines.append(("clients' models before aggregation", DOWN, before))
    if own and not personal:
        lines.append(("clients' own models, on their own tests", LINES[2], own))
    data = []
    for name, colour, rows in lines:
        kept = [rows[i] for i in evenly(len(rows), most)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(kept) <= 40 else "lines",
                "name": name,
                "x": [row.round for row, _ in kept],
                "y": numbers(value for _, value in kept),
                "line": {"color": colour, "width": 2},
                "marker": {"size": 6},
                "hovertemplate": "round %{x}<br>%{y:.4f}<extra></extra>",
            }
        )
    waiting = sum(not row.in_sync for row in tables.rows)
    shows = "Share of test examples that are classified correctly after each round."
    if waiting:
        shows += (
            f" {waiting} rounds are left out in which some layers waited: the global model is whole after the others."
        )
    shape = layout(
        330, xaxis={"title": titled("round")}, yaxis={"title": titled("accuracy")}, showlegend=len(lines) > 1
    )
    return [Figure("accuracy", title, shows, data, shape, _trend(tables, tested))]


def _trend(tables: Tables, tested: Sequence[tuple[Row, float]]) -> list[str]:
    """Whether it still rises, and how steadily."""
    if len(tested) < _ENOUGH:
        return []
    cut = len(tested) - len(tested) // 4
    earlier, later = tested[:cut], tested[cut:]
    gained = max(v for _, v in later) - max(v for _, v in earlier)
    best, worth = max(tested, key=lambda entry: entry[1])
    said = []
    first = later[0][0].round
    half = [value for _, value in tested[len(tested) // 2 :]]
    steps = [b - a for a, b in pairwise(half)]
    swing = (sum(map(abs, steps)) - abs(sum(steps))) / len(steps)  # to and fro: a steady rise is none
    unclear = swing > abs(gained)
    if not unclear and gained > 0.005:
        total = 2 * tables.info["rounds"]
        said.append(
            f"It was still rising: the rounds from {first} on added {100 * gained:.1f} points. Going on may pay: "
            f"`lamina resume {tables.run.path} rounds={total}`."
        )
    elif not unclear:
        gain = f"added {100 * gained:.1f} points" if gained > 0 else "added nothing"
        said.append(
            f"It has levelled off: the best is {worth:.4f} in round {best.round}, and the rounds from {first} on "
            f"{gain}. "
            "Fewer rounds would have cost fewer bytes."
        )
    if swing > 0.02 or unclear:
        cohort, clients = tables.info["cohort"], tables.info["clients"]
        remedy = (
            f"a larger cohort (`cohort={min(clients, 2 * cohort)}`)" if cohort < clients else "a smaller `local.lr`"
        )
        said.append(
            f"From one tested round to the next it goes to and fro by {100 * swing:.1f} points on average in the "
            f"second half, so single rounds say little{', nor can be told whether it still rises' if unclear else ''}. "
            f"What steadies it: {remedy}, or a server that remembers its steps (`method=fedavgm`)."
        )
    return said


def _by_bytes(tables: Tables, most: int) -> list[Figure]:
    tested = _tested(tables)
    if not tested:
        return []
    kept = [tested[i] for i in evenly(len(tested), most)]
    sent = [(row.total_up + row.total_down) / 1e6 for row, _ in kept]
    base = [(row.fedavg_up + row.fedavg_down) / 1e6 for row, _ in kept]
    worths = numbers(value for _, value in kept)
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "the same rounds at FedAvg's bytes (fp32)",
            "x": numbers(base),
            "y": worths,
            "line": {"color": GREY, "width": 1.5, "dash": "dot"},
            "hovertemplate": "%{x:.4g} MB<br>%{y:.4f}<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "lines+markers" if len(kept) <= 40 else "lines",
            "name": "this run",
            "x": numbers(sent),
            "y": worths,
            "line": {"color": UP, "width": 2},
            "marker": {"size": 6},
            "customdata": [row.round for row, _ in kept],
            "hovertemplate": "round %{customdata}<br>%{x:.4g} MB<br>%{y:.4f}<extra></extra>",
        },
    ]
    shape = layout(330, xaxis={"title": titled("MB sent, up and down")}, yaxis={"title": titled("accuracy")})
    best = max(value for _, value in tested)
    row, worth = next((row, value) for row, value in tested if value >= 0.95 * best)
    said = []
    if len(tested) >= _ENOUGH:
        part, whole = row.total_up + row.total_down, tables.rows[-1].total_up + tables.rows[-1].total_down
        said.append(
            f"95 % of the best accuracy was there in round {row.round} ({worth:.4f}) after {size(part)}, "
            f"{100 * part / max(1, whole):.0f} % of all bytes."
        )
    saving = tables.rows[-1].saving
    if abs(saving) >= 0.005:
        more = "less" if saving > 0 else "more"
        said.append(f"In all it sent {100 * abs(saving):.1f} % {more} than FedAvg with fp32 in the same rounds.")
    if abs(saving) < 0.005:
        data = data[1:]
        said.append(
            "It sent what FedAvg with fp32 sends. What sends less: a codec (`uplink=int8`, or `uplink=topk:0.05` with "
            "`method=errorfeedback`), or a method that leaves layers out (`method=fedlama`)."
        )
    return [
        Figure(
            "accuracy-bytes",
            "Accuracy by bytes",
            "The same accuracies over what had been sent until then, in both directions and by all clients.",
            data,
            shape | {"showlegend": len(data) > 1},
            said,
        )
    ]


def _loss(tables: Tables, most: int) -> list[Figure]:
    tested = [(row, row.loss) for row in tables.rows if row.in_sync and row.loss is not None]
    trained = [(row, row.train_loss) for row in tables.rows if row.train_loss is not None]
    lines = [("test set", UP, tested), ("the clients' training, mean over the round", GREY, trained)]
    data = []
    for name, colour, rows in lines:
        kept = [rows[i] for i in evenly(len(rows), most)]
        if kept:
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": name,
                    "x": [row.round for row, _ in kept],
                    "y": numbers(value for _, value in kept),
                    "line": {"color": colour, "width": 2},
                    "hovertemplate": "round %{x}<br>%{y:.4g}<extra></extra>",
                }
            )
    if not data:
        return []
    said = []
    if len(tested) >= _ENOUGH and len(trained) >= _ENOUGH:
        row, least = min(tested, key=lambda entry: entry[1])
        last = tested[-1][1]
        there = next(value for r, value in trained if r.round == row.round)
        if row.round < 0.75 * tables.rounds and last > 1.05 * least and trained[-1][1] < there:
            said.append(
                f"The test loss was lowest in round {row.round} ({least:.4f}) and has risen to {last:.4f} since, while "
                "the clients' own went on falling: they fit what they hold. Less local work (`local.epochs`, "
                "`local.lr`) or a pull to the global model (`method=fedprox`) acts on that."
            )
    shape = layout(
        300, xaxis={"title": titled("round")}, yaxis={"title": titled("loss"), "rangemode": "tozero"}, showlegend=True
    )
    shows = "Mean loss on the test set, and of the clients while they train."
    return [Figure("loss", "Loss by round", shows, data, shape, said)]


def _metrics(tables: Tables, most: int) -> list[Figure]:
    keys = dict.fromkeys(key for row in tables.rows for key in row.metrics or {})
    data = []
    for i, key in enumerate(keys):
        rows = [
            (row, value)
            for row in tables.rows
            if row.in_sync and isinstance(value := (row.metrics or {}).get(key), int | float)
        ]
        kept = [rows[j] for j in evenly(len(rows), most)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": plain(key),
                "x": [row.round for row, _ in kept],
                "y": numbers(value for _, value in kept),
                "line": {"color": LINES[i % len(LINES)], "width": 2},
                "hovertemplate": f"{plain(key)}<br>round %{{x}}<br>%{{y:.4g}}<extra></extra>",
            }
        )
    if not data:
        return []
    shows = "What this experiment measures besides, over the whole test set, in rounds in sync."
    shape = layout(300, xaxis={"title": titled("round")}, showlegend=True)
    return [Figure("metrics", "Further metrics", shows, data, shape)]
