"""`lamina report`: a run as one HTML file, or as a figure of a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.base import Json, NoColor, Quiet, RunDir, find_all, guarded, say, written
from lamina.errors import ConfigError


@guarded
def report(
    paths: Annotated[list[str], typer.Argument(metavar="RUN...", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Where to; default report.html in the run's folder.", show_default=False
        ),
    ] = None,
    figure: Annotated[
        str | None,
        typer.Option("--figure", metavar="NAME", help="A figure of a paper instead, as .svg, .png or .pdf."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Write it again while the run goes, until it ends.")] = False,
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", help="With --watch.", min=0.2)] = 5.0,
    run_dir: RunDir = None,
    json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """What happened, layer by layer, as one file that opens in a browser: folders, numbers (003) or ranges (001-004).

    Figures: lips-inertia, fedlama-crossing, fedlama-syncs, flare-sparsity, ssfl-density, divergence-depth.
    """
    if watch and figure is not None:
        raise ConfigError(
            "--watch writes a report, --figure a single figure: expected one of them", where="command line"
        )
    from lamina import report as reports
    from lamina import terminal
    from lamina.runs import Run, runs_root

    root = runs_root(run_dir)
    folders = list({folder.resolve(): folder for path in paths for folder in find_all(path, root)}.values())
    found = [Run.open(folder) for folder in folders]
    if figure is not None:
        from lamina.report import papers

        made = papers.draw(figure, found, out or reports.place_for(found).parent / f"{figure}.svg")
    elif out is not None and out.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out={out}: expected a name that ends with .html", where="--out")
    elif watch:
        from lamina.report.watching import watch as watching

        console = terminal.console(no_color=no_color)

        def note(text: str) -> None:
            if json:
                terminal.emit({"event": "note", "text": text})
            elif not quiet:
                say(console, [f"  {text}"])

        made = watching(folders, out or reports.place_for(found), every, note)
    else:
        made = reports.write(found, out or reports.place_for(found))
    if quiet and not json:
        print(made)
    else:
        written([made], json, no_color)
