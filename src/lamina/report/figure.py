"""What a page is made of, and figures as plotly reads them: plain dictionaries.

Words that come from a run (layers, clients, metrics) pass through `plain` before they enter a figure: plotly reads a
little markup in its texts. What enters the page outside of figures is escaped by the templates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

UP, DOWN = "#2563a8", "#d98324"  # up and down have these colours everywhere
LINES = ("#2563a8", "#d98324", "#3a8f5c", "#b3446c", "#6f58b8", "#5b6675", "#1098a3", "#a2772b")
GREY = "#8a94a3"
SCALE = [[0.0, "#f3f6fa"], [0.25, "#bcd4ea"], [0.5, "#6fa3d0"], [0.75, "#2f6fae"], [1.0, "#0f3561"]]
TWO = [[0.0, "#f0f2f5"], [1.0, "#2563a8"]]
NARROW_LABEL = 18  # characters of a layer's name beside a figure on a phone

SHOWN = 120  # layers in one figure


class Figure(NamedTuple):
    """One figure and its words.

    `frames` are what a slider below it shows, each {"name", "x"} for the first trace; `narrow` is what changes on a
    narrow screen: keys of the layout (None: it goes), and "hide", positions of traces that are left out there.
    """

    id: str
    title: str
    shows: str  # how to read it
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    concludes: Sequence[str] = ()  # from this run's numbers; empty where they say nothing
    frames: Sequence[dict[str, Any]] = ()
    slider: str = ""  # what a frame is, e.g. "rounds"
    narrow: dict[str, Any] | None = None


class Table(NamedTuple):
    """Cells are text; `numeric` columns stand to the right."""

    title: str
    shows: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    concludes: Sequence[str] = ()
    bars: Sequence[float] = ()  # a share in [0, 1] per row, drawn behind its first cell


class Note(NamedTuple):
    """A sentence where a figure would be."""

    title: str
    text: str


class Code(NamedTuple):
    title: str
    text: str


class Card(NamedTuple):
    label: str
    value: str
    more: str = ""


class Cards(NamedTuple):
    cards: Sequence[Card]


class Page(NamedTuple):
    id: str
    title: str
    lead: str
    blocks: Sequence[Figure | Table | Note | Code | Cards]


def plain(text: object) -> str:
    """Text of which plotly shows every character, and nothing else."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def short(text: object, most: int = 34) -> str:
    """The end of a long name: what tells layers apart stands there."""
    said = str(text)
    return said if len(said) <= most else "…" + said[1 - most :]


def number(value: Any) -> Any:
    """Four digits, as JSON can have them."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    value = float(value)
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.4g}")


def numbers(values: Iterable[Any]) -> list[Any]:
    return [number(value) for value in values]


def table(values: Iterable[Iterable[Any]]) -> list[list[Any]]:
    return [numbers(row) for row in values]


def layout(height: int, **more: Any) -> dict[str, Any]:
    """What all figures have in common. Keys of `more` are merged one level deep."""
    axis = {"automargin": True, "gridcolor": "#e6eaf0", "zeroline": False, "linecolor": "#c3cbd6", "ticks": ""}
    base: dict[str, Any] = {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 28, "b": 8},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": "#2b3442"},
        "hoverlabel": {"font": {"size": 13}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "xanchor": "left", "traceorder": "normal"},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
        "dragmode": False,
    }
    for key, value in more.items():
        if key[:5] in ("xaxis", "yaxis"):
            base[key] = {**axis, **value}
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            base[key] = {**base[key], **value}
        else:
            base[key] = value
    return base


def log_ticks(values: Iterable[Any]) -> tuple[list[float], list[str], tuple[float, float]]:
    """For a logarithmic axis over these values (those above 0): ticks at 1, 2 and 5 times a power of ten, at the powers
    alone over more than three decades; their texts, plain numbers; and where the axis begins and ends."""
    known = [float(value) for value in values if value is not None and 1e-200 < value < 1e200]
    low, high = min(known, default=1.0), max(known, default=1.0)
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    wide = math.log10(high / low)
    steps = (1,) if wide > 3 else (1, 2, 5)
    every = max(1, math.ceil(wide / 8)) if wide > 3 else 1
    ticks = [float(f"{step}e{power}") for power in range(first, last + 1) if power % every == 0 for step in steps]
    start, end = low / 10 ** (0.04 * wide), high * 10 ** (0.04 * wide)
    while len(inside := [tick for tick in ticks if start <= tick <= end]) < 2:  # one alone would be no scale
        below, above = max(tick for tick in ticks if tick < start), min(tick for tick in ticks if tick > end)
        start, end = (below, end) if start / below < above / end else (start, above)
    return inside, [np.format_float_positional(tick, trim="-") for tick in inside], (start, end)


def log_axis(values: Iterable[Any]) -> dict[str, Any]:
    """A logarithmic axis of plotly over these values: see `log_ticks`."""
    ticks, texts, (start, end) = log_ticks(values)
    ends = [round(math.log10(start), 4), round(math.log10(end), 4)]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": texts, "range": ends}


def titled(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13, "color": "#5b6675"}}


def depth_axis(names: Sequence[str], most: int = 34) -> dict[str, Any]:
    """Layers from top (input) to bottom (loss), by position: names may repeat when they are cut."""
    step = max(1, -(-len(names) // 60))
    at = list(range(0, len(names), step))
    return {
        "tickmode": "array",
        "tickvals": at,
        "ticktext": [plain(short(names[i], most)) for i in at],
        "range": [len(names) - 0.5, -0.5],
        "showgrid": False,
        "tickfont": {"size": 12 if len(at) <= 40 else 9},
    }


def tall(rows: int, least: int = 220, each: int = 26, most: int = 900) -> int:
    """A height for so many rows."""
    return min(most, max(least, 90 + each * rows))


def heat(
    names: Sequence[str],
    rounds: Sequence[str],
    values: Iterable[Iterable[Any]],
    hover: str,
    *,
    scale: list[list[Any]] = SCALE,
    top: float | None = None,
    title: str = "",
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """A heatmap of layers and rounds: its data, its layout, and what changes on a narrow screen.

    Args:
        rounds: what a column is called.
        hover: what a value is called.
        top: where the colours end; None: at the largest.
    """
    cells = [list(row) for row in values]
    known = [value for row in cells for value in row if number(value) is not None]
    step = max(1, -(-len(rounds) // 10))
    at = list(range(0, len(rounds), step))
    few = at[:: max(1, -(-len(at) // 5))]
    down = depth_axis(names)
    trace = {
        "type": "heatmap",
        "z": table(cells),
        "x": list(rounds),
        "y": [plain(name) for name in names],
        "colorscale": scale,
        "zmin": 0,
        "zmax": number(top or max(known, default=0) or 1),
        "xgap": 1 if len(rounds) <= 60 else 0,
        "ygap": 1,
        "hoverongaps": False,
        "hovertemplate": f"%{{y}}<br>round %{{x}}<br>{hover} %{{z:.4g}}<extra></extra>",
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "title": {"text": title, "side": "right", "font": {"size": 12}},
        },
    }
    shape = layout(
        tall(len(names), 170),
        xaxis={
            "title": titled("round"),
            "type": "category",  # what a column is called may be several rounds
            "tickmode": "array",
            "tickvals": [rounds[i] for i in at],
            "ticktext": [_first(rounds[i]) for i in at],
            "showgrid": False,
            "fixedrange": True,
            "range": [-0.5, len(rounds) - 0.5],
        },
        yaxis={
            **down,
            "type": "category",
            "tickvals": [plain(names[i]) for i in down["tickvals"]],
            "fixedrange": True,
        },
    )
    narrow = {
        "xaxis.tickvals": [rounds[i] for i in few],
        "xaxis.ticktext": [_first(rounds[i]) for i in few],
        "yaxis.ticktext": depth_axis(names, NARROW_LABEL)["ticktext"],
    }
    return [trace], shape, narrow


def _first(column: str) -> str:
    """The first round of a column."""
    return column.partition("-")[0]


def columns(groups: Sequence[Any]) -> list[str]:
    """What runs of neighbouring rounds are called: "7", or "7-12"."""
    return [str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups]


def evenly(count: int, most: int) -> list[int]:
    """At most so many positions of `count`, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def join(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
