"""What was sent: bytes by layer, when each layer travelled, what is no layer, and whether the accounts agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lamina.report.figure import (
    DOWN,
    NARROW_LABEL,
    TWO,
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
    numbers,
    plain,
    tall,
    titled,
)
from lamina.report.layers import names_of, shown
from lamina.report.tables import Ledger, Tables, bins, last_of, means
from lamina.terminal import size

_BARS = 80  # rows of the byte figure
_TREES = {
    "_shared": "headers, framing",
    "_buffers": "buffers",
    "_moments": "moments",
    "_unused": "answers not owed",
}
_WITHHOLD = ("fedlama", "fedluar", "personal", "localonly")


def page(tables: Tables, most: int) -> Page:
    up, down = tables.info["bytes_up"], tables.info["bytes_down"]
    lead = (
        f"{up:,} bytes up and {down:,} down, everything that travelled, framing included; 1 kB is 1000 bytes. "
        f"Codecs: up {tables.info['uplink']}, down {tables.info['downlink']}."
    )
    blocks = [_bytes(tables), _timeline(tables, most), _cost(tables), _overhead(tables), _checks(tables)]
    return Page("communication", "Communication", lead, blocks)


# ---- by layer


def _bytes(tables: Tables) -> Figure | Note:
    title = "Bytes by layer"
    rows = _rows(tables)
    total = sum(up + down for _, up, down in rows)
    if not total:
        return Note(title, "Nothing has been sent yet.")
    names = [name for name, _, _ in rows]
    unit, factor = next(u for u in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1)) if total >= u[1])
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": way,
            "x": numbers(n / factor for n in values),
            "y": list(range(len(rows))),
            "marker": {"color": colour},
            "customdata": [[plain(name), f"{n:,}"] for name, n in zip(names, values, strict=True)],
            "hovertemplate": f"%{{customdata[0]}}<br>{way} %{{customdata[1]}} bytes<extra></extra>",
        }
        for way, colour, values in (("up", UP, [row[1] for row in rows]), ("down", DOWN, [row[2] for row in rows]))
    ]
    shape = layout(
        tall(len(rows), 200),
        barmode="stack",
        bargap=0.25,
        xaxis={"title": titled(unit), "fixedrange": True},
        yaxis={**depth_axis(names), "fixedrange": True},
        showlegend=True,
    )
    return Figure(
        "bytes",
        title,
        "All rounds and clients together, by the parameter that the bytes were for.",
        data,
        shape,
        _heavy(tables, rows, total),
        narrow={"yaxis.ticktext": depth_axis(names, NARROW_LABEL)["ticktext"]},
    )


def _rows(tables: Tables) -> list[tuple[str, int, int]]:
    """Name, bytes up, bytes down: layers in model order, small ones together where there are many, then the rest."""
    up, down = tables.sent["up"], tables.sent["down"]
    own = {part.name for part in tables.parts}
    single = [part.name for part in tables.parts]
    if len(single) > _BARS:
        single = names_of(tables, tables.matrices)
    if len(single) > _BARS:
        largest = set(sorted(single, key=lambda n: -(up.get(n, 0) + down.get(n, 0)))[: _BARS - 5])
        single = [name for name in single if name in largest]
    rows = [(name, up.get(name, 0), down.get(name, 0)) for name in single]
    rest = own - set(single)
    if rest:
        rows.append(
            (f"{len(rest)} further parameters", sum(up.get(n, 0) for n in rest), sum(down.get(n, 0) for n in rest))
        )
    for name in dict.fromkeys([*up, *down]):
        if name not in own:
            rows.append((_tree(name), up.get(name, 0), down.get(name, 0)))
    return rows


def _tree(name: str) -> str:
    return _TREES.get(name, f"{name.removeprefix('_')} (method)")


def _heavy(tables: Tables, rows: Sequence[tuple[str, int, int]], total: int) -> list[str]:
    names = {part.name for part in tables.parts}
    layers = [(name, up + down) for name, up, down in rows if name in names]
    if not layers:
        return []
    name, most = max(layers, key=lambda row: row[1])
    share = most / total
    said = [f"{name} is {100 * share:.1f} % of all bytes ({size(most)} of {size(total)})."]
    if share > 0.5 and not set(tables.methods) & set(_WITHHOLD) and tables.info["uplink"] == "fp32":
        half = tables.sent["up"].get(name, 0) / 2
        said.append(
            f"Sending its update every second round alone would have saved {size(int(half))} of "
            f"{size(tables.info['bytes_up'])} "
            "up. `method=fedlama` and `method=fedluar` find such layers themselves; `uplink=topk:0.05` with "
            "`method=errorfeedback` thins every layer."
        )
    return said


# ---- when


def _timeline(tables: Tables, most: int) -> Figure | Note:
    title = "Which layer was aggregated when"
    which = shown(tables)
    grid = tables.column("uploaded")[which]
    if not grid.size or np.isnan(grid).all():
        return Note(title, "No round is finished yet.")
    if np.nanmin(grid) == 1:
        return Note(
            title,
            f"Every layer was uploaded in each of the {tables.rounds} rounds: no method in this run leaves layers out. "
            "`method=fedlama` makes layers that diverge little wait, `method=fedluar` repeats the last update "
            "of layers "
            "that move little.",
        )
    groups = bins(tables.rounds, most)
    names = names_of(tables, which)
    data, shape, narrow = heat(names, columns(groups), means(grid, groups), "share of rounds", scale=TWO, top=1)
    data[0]["showscale"] = False
    shows = (
        "Blue: the layer's updates were uploaded and averaged in this round. Pale: it waited, was repeated or "
        "stayed with the clients."
    )
    if any(len(group) > 1 for group in groups):
        shows += " A column is several rounds; the deeper the blue, the more of them."
    return Figure("timeline", title, shows, data, shape | {"showlegend": False}, _waits(tables, which), narrow=narrow)


def _waits(tables: Tables, which: Sequence[int]) -> list[str]:
    grid = tables.column("uploaded")[which]
    sums = np.nansum(grid, axis=1).astype(int)
    names = names_of(tables, which)
    rare = [j for j in range(len(which)) if sums[j] < tables.rounds]
    few = sorted(rare, key=lambda j: int(sums[j]))[:3]
    said = [
        f"{len(rare)} of {len(which)} weight tensors were not sent in every round; least often "
        + join([f"{names[j]} ({sums[j]} of {tables.rounds} rounds)" for j in few])
        + "."
    ]
    numel = [tables.parts[i].numel for i in which]
    if all(numel) and rare:
        share = sum(numel[j] or 0 for j in rare) / sum(n or 0 for n in numel)
        said.append(f"They hold {100 * share:.1f} % of the weights.")
    saved = tables.rows[-1].saving
    if saved > 0.005:
        base = tables.rows[-1].fedavg_up
        said.append(
            f"Up, the run sent {size(tables.info['bytes_up'])} where FedAvg with fp32 sends {size(base)} in the "
            "same rounds."
        )
    return said


# ---- what a value costs


def _cost(tables: Tables) -> Table | Note:
    """Bytes up per entry of a layer and message, against 4."""
    title = "What a value costs on the way up"
    up, density = tables.column("bytes_up"), last_of(tables.column("density"))
    sent = np.nan_to_num(tables.column("uploaded"))
    messages = np.array([row.clients for row in tables.rows], dtype=float)
    rows, bars, ratios = [], [], {}
    for i in shown(tables):
        part = tables.parts[i]
        times = float((sent[i] * messages).sum())
        if not part.numel or not times:
            continue
        each = float(np.nansum(np.where(sent[i] > 0, up[i], 0))) / (times * part.numel)
        ratios[part.name] = each
        rows.append(
            [
                part.name,
                f"{part.numel:,}",
                f"{int(times):,}",
                f"{each:.3f}",
                f"{4 / each:.1f}×" if each else "-",
                "-" if np.isnan(density[i]) else f"{density[i]:.3f}",
            ]
        )
        bars.append(min(1.0, each / 4))
    if not rows:
        return Note(title, "No layer of known size was uploaded.")
    said = []
    least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    if ratios[most] - ratios[least] > 0.02 * ratios[most]:
        said.append(
            f"Cheapest per value is {least} ({ratios[least]:.3f} bytes), dearest {most} ({ratios[most]:.3f}); "
            "fp32 is 4."
        )
    elif abs(ratios[most] - 4) < 0.01:
        said.append("Four bytes a value everywhere: nothing is compressed.")
    head = ["layer", "values", "messages", "bytes per value", "against fp32", "share sent"]
    shows = (
        "Bytes up of each weight tensor, divided by its values and by the messages that had it. Framing is not in it."
    )
    return Table(title, shows, head, rows, tuple(range(1, 6)), said, bars)


def _overhead(tables: Tables) -> Table:
    names = {part.name for part in tables.parts}
    whole = {way: sum(tables.sent[way].values()) for way in ("up", "down")}
    kinds: dict[str, dict[str, int]] = {"values of parameters": {"up": 0, "down": 0}}
    for way in ("up", "down"):
        for name, n in tables.sent[way].items():
            kind = "values of parameters" if name in names else _tree(name)
            kinds.setdefault(kind, {"up": 0, "down": 0})[way] += n
    rows = []
    for kind, ways in kinds.items():
        rows.append(
            [kind]
            + [
                text
                for way in ("up", "down")
                for text in (f"{ways[way]:,}", f"{100 * ways[way] / whole[way]:.2f} %" if whole[way] else "-")
            ]
        )
    said = []
    total = sum(whole.values())
    if total:
        frames = sum(kinds.get("headers, framing", {}).values())
        said.append(f"Headers and framing are {100 * frames / total:.2f} % of all bytes.")
        if frames > 0.1 * total:
            said.append(
                "That is much: the messages are small. Larger layers, or fewer and longer rounds, make it less."
            )
        probe = sum(tables.probe.values())
        if probe:
            said.append(f"{size(probe)} were sent before round 0, to begin with (a probe of all clients).")
    head = ["what", "up", "", "down", ""]
    return Table(
        "Values, headers and the rest",
        "All bytes by what they were for. Moments: squared lengths of the updates, which the diagnostics and "
        "some methods need. Buffers: BatchNorm statistics and the like.",
        head,
        rows,
        (1, 2, 3, 4),
        said,
    )


def _verdict(check: Ledger) -> str:
    difference = abs(check.rows - check.total)
    if not check.agrees:
        return f"differ by {difference:,}"
    return f"agree, and {difference:,} came from others than were asked" if difference else "agree"


def _checks(tables: Tables) -> Table:
    rows = [
        [
            check.what,
            f"{check.rows:,}",
            f"{check.total:,}",
            _verdict(check),
        ]
        for check in tables.ledger
    ]
    wrong = [check for check in tables.ledger if not check.agrees]
    if wrong:
        said = f"{len(wrong)} of {len(rows)} sums differ: `lamina verify {tables.run.path}` names the file."
    else:
        said = f"All {len(rows)} sums agree to the byte."
    shows = (
        "The same bytes, added up from different files. That they are what a socket carries, "
        "`lamina verify RUN --wire` shows."
    )
    return Table("Ledger check", shows, ["the same bytes, added up twice", "first", "second", ""], rows, (1, 2), [said])
