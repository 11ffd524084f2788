"""Who holds what, who took part, what it cost them, and whose updates were not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.report.figure import (
    DOWN,
    LINES,
    SCALE,
    UP,
    Figure,
    Note,
    Page,
    Table,
    evenly,
    join,
    layout,
    numbers,
    plain,
    short,
    table,
    tall,
    titled,
)
from lamina.report.tables import Client, Tables
from lamina.terminal import size

_ALIKE = 0.03  # share of a client's labels that is not worth a word
_SHOWN = 60  # clients, and labels, in one figure
_KEPT = "Whose answers came is in clients.jsonl, which this run did not keep: `run.keep_clients_log=true`."


def page(tables: Tables) -> Page:
    info = tables.info
    lead = f"{info['clients']:,} clients, {info['cohort']:,} of them a round."
    blocks = [
        _labels(tables),
        _participation(tables),
        _waiting(tables),
        _bytes(tables),
        _time(tables),
        _refused(tables),
    ]
    return Page("clients", "Clients", lead, blocks)


# ---- what they hold


def _labels(tables: Tables) -> Figure | Note:
    title = "Who holds which labels"
    split = tables.split
    holders = [] if split is None else split.get("clients") or []
    if split is None or not holders:
        return Note(title, "This run has no split.json.")
    if any(row["labels"] is None for row in holders):
        few = sorted(row["examples"] for row in holders)
        return Note(
            title,
            f"The targets are no class labels. Clients hold {few[0]:,} to {few[-1]:,} examples, "
            f"{few[len(few) // 2]:,} in "
            "the middle.",
        )
    counts = np.array([row["labels"] for row in holders], dtype=float)
    kept = evenly(len(holders), _SHOWN)
    labels = evenly(counts.shape[1], _SHOWN)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    names = [str(holders[i]["client"]) for i in kept]
    called = [plain(tables.label(label)) for label in labels]
    marked = list(range(0, len(labels), max(1, len(labels) // 12)))
    data: list[dict[str, Any]] = [
        {
            "type": "heatmap",
            "z": table(shares[np.ix_(kept, labels)]),
            "x": list(range(len(labels))),
            "y": list(range(len(names))),
            "colorscale": SCALE,
            "zmin": 0,
            "zmax": 1,
            "xgap": 1,
            "ygap": 1 if len(kept) <= 40 else 0,
            "customdata": [
                [[plain(names[j]), int(counts[i, label]), called[k]] for k, label in enumerate(labels)]
                for j, i in enumerate(kept)
            ],
            "hovertemplate": "client %{customdata[0]}<br>label %{customdata[2]}<br>%{customdata[1]} examples"
            "<br>%{z:.1%} of its own<extra></extra>",
            "colorbar": {"thickness": 10, "outlinewidth": 0, "tickformat": ".0%"},
        }
    ]
    step = max(1, -(-len(names) // 30))
    at = list(range(0, len(names), step))
    shape = layout(
        tall(len(names), 240, 11, 640),
        xaxis={
            "title": titled("label"),
            "tickmode": "array",
            "tickvals": marked,
            "ticktext": [plain(short(tables.label(labels[j]), 16)) for j in marked],
            "showgrid": False,
            "fixedrange": True,
        },
        yaxis={
            "title": titled("client"),
            "tickmode": "array",
            "tickvals": at,
            "ticktext": [plain(short(names[j], 16)) for j in at],
            "range": [len(names) - 0.5, -0.5],
            "showgrid": False,
            "fixedrange": True,
            "tickfont": {"size": 11},
        },
    )
    shows = "A row is a client, a column a label: the share of the client's examples that have it."
    if len(kept) < len(holders):
        shows += f" {len(kept)} of {len(holders):,} clients are drawn, evenly picked; the words below count all."
    said = _skew(counts, [row["examples"] for row in holders], tables)
    narrow = {"xaxis.title.text": ""}  # names that stand upright would meet it
    return Figure("labels", title, shows, data, shape, said, narrow=narrow if split.get("label_names") else None)


def _skew(counts: Any, examples: Sequence[int], tables: Tables) -> list[str]:
    few = sorted(examples)
    said = [f"Clients hold {few[0]:,} to {few[-1]:,} examples, {few[len(few) // 2]:,} in the middle."]
    classes = counts.shape[1]
    if len(counts) < 2 or classes < 2:
        return said
    top = counts.max(1) / np.maximum(1, counts.sum(1))
    lacking = float((counts == 0).sum(1).mean())
    pooled = counts.sum(0) / counts.sum()
    usual, commonest = float(pooled.max()), f"label {tables.label(int(pooled.argmax()))}"
    mean = float(top.mean())
    if mean > usual + 0.1:
        said.append(
            f"Labels are skewed: on average {100 * mean:.0f} % of a client's examples have one label (of all examples "
            f"together: {100 * usual:.0f} %, {commonest}), and a client lacks {lacking:.1f} of {classes} labels."
        )
        acting = {"scaffold", "feddyn", "fedprox", "personal"} & set(tables.methods)
        said.append(
            f"{join(sorted(acting))} is there to act on it."
            if acting
            else f"What acts on that: {tables.control_variates} or `method=feddyn` (drift), `method=fedprox` (a pull "
            "to the global model), `method=personal` (layers of their own)."
        )
        holders = (counts > 0).sum(0)
        rarest = int(holders.argmin())
        if holders[rarest] < len(counts):
            said.append(f"Label {tables.label(rarest)} is with fewest: {holders[rarest]:,} of {len(counts):,} clients.")
    elif (apart := _apart(counts)) > _ALIKE:
        said.append(
            f"Labels differ somewhat: on average {100 * apart:.0f} % of a client's examples, beyond what chance makes, "
            "would need another label to have them in the shares of all clients together, the commonest of which is "
            f"{100 * usual:.0f} % ({commonest})."
        )
    else:
        said.append(
            f"Labels are spread alike: {100 * mean:.0f} % of a client's examples have its commonest label, of all "
            f"together {100 * usual:.0f} % ({commonest})."
        )
    single = int((top > 0.999).sum())
    if single:
        said.append(f"{single} clients hold a single label.")
    return said


def _apart(counts: NDArray[np.int64]) -> float:
    """Distance (total variation) of a client's shares of the labels from those of all, less what it would be by chance
    with so many examples; the mean over clients."""
    pooled = counts.sum(0) / counts.sum()
    n = np.maximum(1, counts.sum(1, keepdims=True))
    found = np.abs(counts / n - pooled).sum(1) / 2
    chance = np.sqrt(2 * pooled * (1 - pooled) / (np.pi * n)).sum(1) / 2  # mean of a normal's absolute value
    return float((found - chance).mean())


# ---- who took part


def _participation(tables: Tables) -> Figure | Note:
    title = "Who took part"
    clients = tables.clients
    info = tables.info
    if clients is None:
        every = info["cohort"] == info["clients"]
        if every:
            return Note(title, f"All {info['clients']:,} clients were asked in every round. {_KEPT}")
        return Note(title, f"{info['cohort']:,} of {info['clients']:,} clients were drawn a round. {_KEPT}")
    if not clients:
        return Note(title, "No round is finished yet.")
    times = Counter(len(client.rounds) for client in clients)
    never = info["clients"] - len(clients)
    if never > 0:
        times[0] = never
    keys = sorted(times)
    if len(keys) == 1:
        return Note(
            title, f"All {info['clients']:,} clients took part equally often: in {keys[0]} of {tables.rounds} rounds."
        )
    data = _histogram(times, "clients", UP)
    shape = _count_layout(times, "rounds taken part in", "clients")
    said = []
    if never > 0:
        share = 100 * never / info["clients"]
        said.append(
            f"{never:,} of {info['clients']:,} clients ({share:.0f} %) never took part: what they hold is not in "
            "the model."
        )
    often = max(clients, key=lambda client: len(client.rounds))
    said.append(f"Client {often.name} took part most often: in {len(often.rounds)} of {tables.rounds} rounds.")
    return Figure("participation", title, "How many clients took part in how many rounds.", data, shape, said)


def _waiting(tables: Tables) -> Figure | Note:
    title = "Staleness"
    clients = tables.clients
    said_always = (
        "A round waits for its cohort, so no answer is older than its round: there is no staleness of messages here."
    )
    if clients is None:
        return Note(title, f"{said_always} {_KEPT}")
    gaps = Counter(b - a for client in clients for a, b in zip(client.rounds, client.rounds[1:], strict=False))
    if len(gaps) < 2:
        return Note(title, said_always)
    middle = sorted(gaps.elements())[gaps.total() // 2]
    return Figure(
        "staleness",
        "Rounds between two turns of a client",
        f"{said_always} What a client keeps for itself (residuals, control variates, layers of its own) is as "
        "old as its last turn.",
        _histogram(gaps, "times", LINES[4]),
        _count_layout(gaps, "rounds since its last turn", "times"),
        [
            f"Who came back did so after {middle} {'round' if middle == 1 else 'rounds'} or less in half of the "
            "cases, and "
            f"after {max(gaps)} at the most."
        ],
    )


def _histogram(counted: Mapping[int, int], what: str, colour: str) -> list[dict[str, Any]]:
    keys = sorted(counted)
    return [
        {
            "type": "bar",
            "x": keys,
            "y": [counted[key] for key in keys],
            "width": 0.85,
            "marker": {"color": colour},
            "hovertemplate": f"%{{x}}: %{{y}} {what}<extra></extra>",
        }
    ]


def _count_layout(counted: Mapping[int, int], x: str, y: str) -> dict[str, Any]:
    low, high = min(counted), max(counted)
    across = {"title": titled(x), "range": [low - 0.6, high + 0.6], "fixedrange": True, "showgrid": False}
    if high - low <= 20:
        across["dtick"] = 1
    return layout(240, xaxis=across, yaxis={"title": titled(y), "rangemode": "tozero", "fixedrange": True})


# ---- what it cost them


def _bytes(tables: Tables) -> Figure | Note:
    title = "Bytes by client"
    clients = tables.clients
    if clients is None:
        return Note(title, _KEPT)
    if not clients:
        return Note(title, "No round is finished yet.")

    def whole(client: Client) -> int:
        return client.bytes_up + client.bytes_down

    ranked = sorted(clients, key=whole, reverse=True)
    kept = [ranked[i] for i in evenly(len(ranked), _SHOWN)]
    factor = 1e6 if whole(ranked[0]) >= 1e6 else 1e3
    unit = "MB" if factor == 1e6 else "kB"
    data = [
        {
            "type": "bar",
            "name": way,
            "x": list(range(len(kept))),
            "y": numbers(getattr(client, f"bytes_{way}") / factor for client in kept),
            "marker": {"color": colour},
            "customdata": [[plain(client.name), client.examples, len(client.rounds)] for client in kept],
            "hovertemplate": "client %{customdata[0]}<br>%{customdata[1]} examples, %{customdata[2]} rounds<br>"
            f"{way} %{{y:.4g}} {unit}<extra></extra>",
        }
        for way, colour in (("up", UP), ("down", DOWN))
    ]
    at = list(range(0, len(kept), max(1, -(-len(kept) // 30))))
    shape = layout(
        280,
        barmode="stack",
        bargap=0.2,
        xaxis={
            "title": titled("client"),
            "tickmode": "array",
            "tickvals": at,
            "ticktext": [plain(short(kept[i].name, 10)) for i in at],
            "showgrid": False,
            "fixedrange": True,
        },
        yaxis={"title": titled(unit), "rangemode": "tozero", "fixedrange": True},
        showlegend=True,
    )
    few = at[:: max(1, -(-len(at) // 8))]
    narrow = {"xaxis.tickvals": few, "xaxis.ticktext": [plain(short(kept[i].name, 6)) for i in few]}
    said = []
    mean = sum(map(whole, ranked)) / len(ranked)
    most, least = ranked[0], ranked[-1]
    if whole(most) > 1.1 * whole(least):
        said.append(
            f"Client {most.name} sent and received most: {size(whole(most))} in {len(most.rounds)} rounds, "
            f"{whole(most) / max(1.0, mean):.1f} times the mean of those who took part."
        )
    else:
        said.append(f"All who took part sent and received alike: {size(whole(least))} to {size(whole(most))}.")
    shows = "What each client sent and received over all rounds, from most to least."
    if len(kept) < len(ranked):
        shows += f" {len(kept)} of {len(ranked):,} are drawn, evenly picked."
    return Figure("client-bytes", title, shows, data, shape, said, narrow=narrow)


def _time(tables: Tables) -> Note:
    title = "Time by client"
    rounds = sorted(row.seconds for row in tables.rows)
    whole = f" A round took {rounds[len(rounds) // 2]:.2f} s in the middle." if rounds else ""
    return Note(title, f"This run does not record the time of single clients.{whole}")


# ---- whose updates were not used


def _refused(tables: Tables) -> Table | Note:
    title = "Updates that were not used"
    asked = sum(row.clients for row in tables.rows)
    refused = [event for event in tables.events if event.get("event") == "refused"]
    if not refused:
        return Note(title, f"None: all {asked:,} answers of {tables.rounds} rounds were used.")
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for event in refused:
        kinds.setdefault(str(event.get("code")), []).append(event)
    rows = []
    for code, events in sorted(kinds.items()):
        by_client = Counter(str(event.get("client")) for event in events)
        names = join([short(name, 24) for name, _ in by_client.most_common(4)])
        more = f" and {len(by_client) - 4} more" if len(by_client) > 4 else ""
        where = Counter(str(event.get("layer")) for event in events if event.get("layer")).most_common(1)
        what = (f"{where[0][0]} has " if where else "") + str(events[0].get("message"))
        rows.append([code, f"{len(events):,}", names + more, what, str(events[0].get("remedy", "-"))])
    worst = Counter(str(event.get("client")) for event in refused).most_common(1)[0]
    said = [
        f"{len(refused):,} of {asked:,} answers were not used or had to be repeated; {worst[0]} has {worst[1]} of them."
    ]
    return Table(title, "By code, from events.jsonl.", ["code", "times", "clients", "what", "remedy"], rows, (1,), said)
