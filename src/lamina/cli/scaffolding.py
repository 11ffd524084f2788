"""`lamina new`: a folder to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.base import Json, NoColor, guarded, say, written
from lamina.errors import ConfigError


@guarded
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    image: Annotated[bool, typer.Option("--image", help="Images, a folder for each client.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Texts in a CSV file.")] = False,
    tabular: Annotated[bool, typer.Option("--tabular", help="Numbers in a CSV file.")] = False,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Write a folder with a model, data and settings of your own to begin with: `lamina new DIR --tabular`."""
    import shlex

    from lamina import scaffold, terminal

    kinds = [kind for kind, asked in (("image", image), ("text", text), ("tabular", tabular)) if asked]
    if len(kinds) != 1:
        said = ", ".join(f"--{kind}" for kind in kinds) or "no kind of data"
        raise ConfigError(
            f"{said}: expected one of --image, --text, --tabular",
            where="command line",
            remedy=f"lamina new {folder} --tabular",
        )
    written(scaffold.write(kinds[0], folder), json, no_color)
    if not json:
        say(terminal.console(no_color=no_color), [f"  lamina run {shlex.quote(str(folder / 'exp.toml'))}"])
