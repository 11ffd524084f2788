"""A run for people to look at: one HTML file that needs nothing else, figures of the papers, and cards for notebooks.

`tables` turns a run folder into plain tables. One file per page makes figures, and words that follow from them;
`render` puts the pages into one file. `papers` draws single figures with matplotlib; `watching` rewrites a report while
the run goes.
"""

from __future__ import annotations

from lamina.report.render import LIMIT, build, cards_html, place_for, write

__all__ = ["LIMIT", "build", "cards_html", "place_for", "write"]
