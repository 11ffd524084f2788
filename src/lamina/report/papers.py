"""Figures as papers draw them, from runs, with matplotlib: `lamina report RUN --figure lips-inertia --out x.svg`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.errors import ConfigError, meant
from lamina.folder import standing, storing
from lamina.report.figure import LINES, log_ticks, short
from lamina.report.layers import REFERENCE, names_of
from lamina.report.sparsity import MASKS
from lamina.report.tables import Grid, Tables, last_of, mean_of, read
from lamina.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDINGS = (".svg", ".png", ".pdf")


class Curve(NamedTuple):
    """One line or one set of bars: what is drawn, as numbers, so that it can be checked."""

    label: str
    x: list[float]
    y: list[float]


class Drawing(NamedTuple):
    """What a figure shows."""

    x: str
    y: str
    curves: Sequence[Curve]
    kind: str = "lines"  # or "bars"
    names: Sequence[str] = ()  # of the x positions, for bars
    log: bool = False  # x
    mark: float | None = None  # a vertical line


class Known(NamedTuple):
    about: str
    make: Callable[[Sequence[Tables]], Drawing]


class _Cannot(Exception):
    """The run lacks what this figure needs."""


def draw(name: str, found: Sequence[Run], path: str | Path) -> Path:
    """Raises ConfigError: an unknown name or ending, runs that cannot produce the figure, no matplotlib."""
    path = Path(path)
    if name not in FIGURES:
        known = "; ".join(f"{key}: {figure.about}" for key, figure in FIGURES.items())
        raise ConfigError(
            f"--figure={name}: expected one of {', '.join(FIGURES)}",
            code="E102",
            where="--figure",
            remedy=" ".join(filter(None, [meant(name, FIGURES), known])),
        )
    if path.suffix not in ENDINGS:
        raise ConfigError(f"--out={path}: expected a name that ends with {' or '.join(ENDINGS)}", where="--out")
    drawing = drawing_of(name, [read(run) for run in found])
    with storing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        _drawn(drawing, path)
    return path


def drawing_of(name: str, every: Sequence[Tables]) -> Drawing:
    """What a figure shows, as numbers. Raises ConfigError where the runs do not have it."""
    try:
        return FIGURES[name].make(every)
    except _Cannot as error:
        runs = ", ".join(tables.title for tables in every)
        raise ConfigError(f"{name} cannot be drawn from {runs}: {error}", where="--figure") from None


def _drawn(drawing: Drawing, path: Path) -> None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "figures of papers need matplotlib, which is not installed", remedy="pip install 'lamina[plots]'"
        ) from error
    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e3e7ec",
        "axes.axisbelow": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "lamina",  # equal runs give equal files
        "text.parse_math": False,  # a layer's name is no formula
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        (_bars if drawing.kind == "bars" else _lines)(axes, drawing)
        axes.set_xlabel(drawing.x)
        axes.set_ylabel(drawing.y)
        if len(drawing.curves) > 1:
            small = {"fontsize": 7} if len(drawing.curves) > 6 else {}
            axes.legend(frameon=False, ncols=1 if len(drawing.curves) <= 8 else 2, **small)
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=200, metadata=metadata or None)


def _lines(axes: Axes, drawing: Drawing) -> None:
    from matplotlib.ticker import MaxNLocator

    few = len(drawing.curves) <= len(LINES)
    for i, curve in enumerate(drawing.curves):
        colour: Any = LINES[i] if few else (0.06 + 0.75 * i / len(drawing.curves),) * 3
        marker = "o" if len(curve.x) <= 30 else None
        axes.plot(curve.x, curve.y, label=_label(curve.label), color=colour, linewidth=1.4, marker=marker, markersize=3)
    if drawing.log:
        axes.set_xscale("log")
        ticks, texts, ends = log_ticks(x for curve in drawing.curves for x in curve.x)
        axes.set_xticks(ticks, texts)
        axes.set_xticks([], minor=True)
        axes.set_xlim(*ends)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if drawing.mark is not None:
        axes.axvline(drawing.mark, color="#8a94a3", linestyle=":", linewidth=1)


def _bars(axes: Axes, drawing: Drawing) -> None:
    width = 0.8 / len(drawing.curves)
    for i, curve in enumerate(drawing.curves):
        at = [x + width * (i - (len(drawing.curves) - 1) / 2) for x in curve.x]
        axes.bar(at, curve.y, width, label=_label(curve.label), color=LINES[i % len(LINES)])
    step = max(1, -(-len(drawing.names) // 25))
    axes.set_xticks(range(0, len(drawing.names), step), [short(n, 24) for n in drawing.names[::step]], rotation=90)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(False, axis="x")


def _label(text: str) -> str:
    """matplotlib leaves out of a legend what begins with an underscore."""
    return f" {text}" if text.startswith("_") else text


# ---- what the papers draw


def _one(every: Sequence[Tables]) -> Tables:
    if len(every) != 1:
        raise _Cannot(f"it is of one run, and {len(every)} were given")
    return every[0]


def _layers_with(tables: Tables, column: str, why: str) -> tuple[list[int], Any]:
    which = tables.matrices
    grid = tables.column(column)[which]
    if not grid.size or np.isnan(grid).all():
        raise _Cannot(why)
    return which, grid


def _inertia(every: Sequence[Tables]) -> Drawing:
    tables = _one(every)
    why = f"inertia is measured from the model after round {REFERENCE}, and it has {tables.rounds} rounds"
    which, grid = _layers_with(tables, "inertia", why)
    curves = [
        Curve(name, [float(t) for t in np.flatnonzero(~np.isnan(line))], [float(v) for v in line[~np.isnan(line)]])
        for name, line in zip(names_of(tables, which), grid, strict=True)
    ]
    return Drawing("round", "|w(t) - w(2)| / |w(2)|", curves)


def _discrepancies(tables: Tables) -> list[tuple[str, float, int]]:
    """Name, discrepancy and entries of every weight tensor, at its last aggregation, by ascending discrepancy."""
    why = "it has no discrepancy: `diagnostics=false`, or no round"
    which, grid = _layers_with(tables, "discrepancy", why)
    masked = any(name in MASKS for name in tables.methods)
    density = last_of(tables.column("density"))
    found = []
    for i, d in zip(which, last_of(grid), strict=True):
        part = tables.parts[i]
        if part.numel is None:
            raise _Cannot(f"the size of {part.name} is not known: the run has no saved model yet")
        if not np.isnan(d):
            found.append((part.name, float(d), round(part.numel * (density[i] if masked else 1.0))))
    return sorted(found, key=lambda entry: entry[1])


def _crossing(every: Sequence[Tables]) -> Drawing:
    """delta and 1 - lambda over how many layers wait: where they cross, FedLAMA stops."""
    rows = _discrepancies(_one(every))
    total, size = sum(d * dim for _, d, dim in rows), sum(dim for _, _, dim in rows)
    if not total > 0:
        raise _Cannot("all clients agree: every discrepancy is 0")
    delta, rest = [0.0], [1.0]
    for _, d, dim in rows:
        delta.append(delta[-1] + d * dim / total)
        rest.append(rest[-1] - dim / size)
    at = [float(i) for i in range(len(delta))]
    crossed = next(float(i) for i in range(1, len(at)) if rest[i] < delta[i])
    return Drawing(
        "layers that wait, by ascending discrepancy",
        "share",
        [
            Curve("delta: share of the discrepancy", at, delta),
            Curve("1 - lambda: share of the parameters left", at, rest),
        ],
        mark=crossed,
    )


def _syncs(every: Sequence[Tables]) -> Drawing:
    return _bar_each(every, "uploaded", "no round is finished yet", "aggregations", lambda grid: np.nansum(grid, 1))


def _bar_each(
    every: Sequence[Tables], column: str, none: str, said: str, value: Callable[[Grid], NDArray[np.float64]]
) -> Drawing:
    """A bar a layer and run; the runs have to be of one model."""
    curves = []
    names: list[str] = []
    for tables in every:
        which, grid = _layers_with(tables, column, none)
        own = names_of(tables, which)
        if names and own != names:
            raise _Cannot("the runs are of different models")
        names = own
        curves.append(Curve(tables.title, [float(i) for i in range(len(own))], [float(v) for v in value(grid)]))
    return Drawing("", said, curves, "bars", names)


def _against_sparsity(every: Sequence[Tables]) -> Drawing:
    """Accuracy over the share of the entries that travelled up, a line per method."""
    points: dict[str, list[tuple[float, float]]] = {}
    for tables in every:
        final = tables.run.final
        worth = None if final is None else standing(final, tables.run.personal)
        if worth is None:
            raise _Cannot(f"{tables.title} has no test accuracy")
        points.setdefault(str(tables.info["method"]), []).append((_share_sent(tables), worth))
    if len({x for own in points.values() for x, _ in own}) < 2:
        raise _Cannot("it needs runs of at least two densities, e.g. `lamina sweep` over uplink.density")
    curves = []
    for method, own in points.items():
        own.sort()
        curves.append(Curve(method, [x for x, _ in own], [y for _, y in own]))
    return Drawing("share of the entries that were sent up", "test accuracy", curves, log=True)


def _share_sent(tables: Tables) -> float:
    density, sent = mean_of(tables.column("density")), mean_of(tables.column("uploaded"))
    sizes = [part.numel for part in tables.parts]
    known = [i for i, n in enumerate(sizes) if n and not np.isnan(density[i])]
    if not known:
        raise _Cannot(f"the density or the sizes of the layers of {tables.title} are not known")
    whole = sum(n for n in sizes if n)
    return float(sum(density[i] * sent[i] * (sizes[i] or 0) for i in known) / whole)


def _density(every: Sequence[Tables]) -> Drawing:
    drawing = _bar_each(every, "density", "no layer was uploaded", "density", lambda grid: np.nan_to_num(last_of(grid)))
    if all(v > 0.9995 for curve in drawing.curves for v in curve.y):
        raise _Cannot("every layer was sent whole, so every density is 1; `method=ssfl` masks layers")
    return drawing


def _divergence(every: Sequence[Tables]) -> Drawing:
    curves = []
    for tables in every:
        which, grid = _layers_with(tables, "divergence", "it has no divergence: `diagnostics=false`, or no round")
        values = mean_of(grid, tables.rounds // 2)
        known = [i for i in range(len(which)) if not np.isnan(values[i])]
        curves.append(Curve(tables.title, [float(i) for i in known], [float(values[i]) for i in known]))
    return Drawing("depth, weight tensors from the input", "divergence, mean over the second half", curves)


FIGURES: dict[str, Known] = {
    "lips-inertia": Known("how far each layer has moved since round 2, over the rounds", _inertia),
    "fedlama-crossing": Known("where delta crosses 1 - lambda", _crossing),
    "fedlama-syncs": Known("how often each layer was aggregated; one run or several", _syncs),
    "flare-sparsity": Known("accuracy against the share that was sent, over several runs", _against_sparsity),
    "ssfl-density": Known("density of each layer at the end; one run or several", _density),
    "divergence-depth": Known("how far clients diverge, by depth; one run or several", _divergence),
}
