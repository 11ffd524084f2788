"""`lamina explain`: what a word means, without a network."""

from __future__ import annotations

from typing import Annotated

import typer

from lamina.cli.base import Json, NoColor, guarded, say


@guarded
def explain(
    word: Annotated[
        str | None, typer.Argument(metavar="CODE|METHOD|KEY|FILE|codes|keys|files|schema", show_default=False)
    ] = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """What an error code, a method, a config key or a file of a run means: `lamina explain E103`, `fedlama`,
    `local.lr`, `files`. `lamina explain schema > lamina.schema.json` is the config for an editor.
    """
    from lamina import explain as explaining
    from lamina import terminal

    answer = explaining.topics() if word is None else explaining.explain(word)
    out = terminal.console(no_color=no_color)
    if answer.kind == "schema":
        print("\n".join(answer.lines(None)))
    elif json:
        terminal.emit({"kind": answer.kind, **answer.facts})
    else:
        say(out, answer.lines(terminal.width_of(out)))
