"""Pages become one HTML file: styles, script, plotly and figures inside, and nothing from anywhere else.

Its own policy (Content-Security-Policy) lets the browser run the scripts whose sums it names, and fetch nothing. So
even markup that got past the escaping would do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lamina.errors import ConfigError
from lamina.folder import standing, storing
from lamina.report import clients, communication, comparison, layers, overview, reproducing, sparsity
from lamina.report.figure import Cards, Code, Figure, Note, Page, Table, evenly, number
from lamina.report.tables import Tables, read
from lamina.runs import Run
from lamina.store.files import replace

LIMIT = 6_000_000  # bytes of a report; plotly is 4.8 million of them
_MOST = (400, 200, 100, 50, 25, 12)  # columns of rounds in a heatmap: the first that fits


def write(found: Sequence[Run], path: str | Path, *, reload: float | None = None) -> Path:
    """The report of these runs, at `path`: the old file or the new, never something between.

    Args:
        reload: seconds after which the page reads itself again; None: never.

    Raises:
        StorageError: E401 it cannot be written, E404 a run that cannot be read.
    """
    blob = build(found, reload=reload).encode()
    path = Path(path)
    with storing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, blob)
    return path


def place_for(found: Sequence[Run]) -> Path:
    """Where a report goes unless somebody says: into the run's folder; of several, beside them."""
    if len(found) == 1:
        return found[0].path / "report.html"
    parents = [run.path.absolute().parent for run in found]
    common = Path(os.path.commonpath(parents))
    names = [re.match(r"\d+|.+", run.path.name) for run in found]
    label = "-".join(match[0] for match in names if match) if len(set(parents)) == 1 and len(found) <= 8 else "runs"
    return common / f"report-{label}.html"


def build(found: Sequence[Run], *, reload: float | None = None) -> str:
    """The report as text, thinned until it is within `LIMIT`."""
    if not found:
        raise ConfigError("a report is of at least one run", where="RUN")
    every = [read(run, title) for run, title in zip(found, titles(found), strict=True)]
    for most in _MOST:
        text = _rendered(every, most, reload)
        if len(text.encode()) <= LIMIT:
            return text
    raise ConfigError(
        f"{len(found)} runs do not fit into one report of {LIMIT / 1e6:g} MB",
        where="RUN",
        remedy="give fewer runs; `lamina compare` has no such limit",
    )


def titles(found: Sequence[Run]) -> list[str]:
    """What the runs are called: by their folders, with the experiment where they are of several."""
    names = [run.path.name for run in found]
    if len({run.path.absolute().parent for run in found}) > 1:
        names = [f"{run.path.absolute().parent.name}/{run.path.name}" for run in found]
    return names if len(set(names)) == len(names) else [str(run.path) for run in found]


def pages_of(tables: Tables, most: int) -> list[Page]:
    thinned = [make(tables, most) for make in (overview.page, layers.page, communication.page, sparsity.page)]
    return [*thinned, clients.page(tables), reproducing.page(tables)]


def _rendered(every: Sequence[Tables], most: int, reload: float | None) -> str:
    own = [pages_of(tables, most) for tables in every]
    common = comparison.page(every, most)
    order = [*own[0][:-1], common, own[0][-1]]  # Reproduce comes last
    sections = [(i, page) for i, pages in enumerate(own) for page in pages] + [(-1, common)]
    figures = {
        f"{i}-{block.id}": _figure(block) for i, page in sections for block in page.blocks if isinstance(block, Figure)
    }
    script, plotly = _text("report.js"), _plotly()
    running = [tables for tables in every if tables.info["status"] == "running"]
    return _templates().get_template("report.html").render(
        title=every[0].title if len(every) == 1 else f"{len(every)} runs",
        every=every,
        order=order,
        sections=sections,
        figures=Markup(_json(figures)),
        plotly=Markup(plotly),
        script=Markup(script),
        style=Markup(_text("report.css")),
        sums=" ".join(f"'sha256-{_sum(text)}'" for text in (plotly, script)),
        reload=reload,
        running=running,
    )  # fmt: skip


def _figure(figure: Figure) -> dict[str, Any]:
    said = {"data": figure.data, "layout": figure.layout, "narrow": figure.narrow, "frames": list(figure.frames)}
    return {key: value for key, value in said.items() if value}


def _json(value: Any) -> str:
    """For a script element: no `<` in it can end that."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _sum(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- templates


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("lamina.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    kinds = {kind.__name__.lower(): kind for kind in (Figure, Table, Note, Code, Cards)}
    made.filters["ticked"] = ticked
    made.tests |= {name: _is_a(kind) for name, kind in kinds.items()}
    return made


def _is_a(kind: type) -> Any:
    return lambda block: isinstance(block, kind)


def ticked(text: str) -> Markup:
    """What stands between backticks is code; everything is escaped."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


@cache
def _text(name: str) -> str:
    return (importlib.resources.files("lamina.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """plotly's JavaScript as it is installed. Browsers sum up scripts with plain line ends."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError("a report needs plotly, which is not installed", remedy="pip install plotly") from error
    text: str = get_plotlyjs()
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---- notebooks


def cards_html(run: Run) -> str:
    """What a run came to, as a fragment of HTML without scripts: for notebooks."""
    tested = [
        (row.round, worth) for row in run.records if row.in_sync and (worth := standing(row, run.personal)) is not None
    ]
    points = _points([tested[i] for i in evenly(len(tested), 120)])
    template = _templates().get_template("cards.html")
    return template.render(run=run, info=run.info, cards=overview.cards(run).cards, points=points)


def _points(tested: Sequence[tuple[int, float]]) -> str:
    """A line for an svg of 240 x 60; "" where there are fewer than two points."""
    if len(tested) < 2:
        return ""
    first, last = tested[0][0], tested[-1][0]
    low, high = min(v for _, v in tested), max(v for _, v in tested)
    span = (high - low) or 1.0
    return " ".join(
        f"{number(240 * (t - first) / (last - first))},{number(56 - 52 * (v - low) / span)}" for t, v in tested
    )
