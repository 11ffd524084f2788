"""`lamina inspect`: a model and its data before anything is trained; and what `lamina run --dry-run` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli.base import Json, Keys, NoColor, guarded, say
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


@guarded
def inspect(
    target: Annotated[str, typer.Argument(metavar="FILE:OBJECT|PRESET|TOML", show_default=False)],
    keys: Keys = None,
    input_size: Annotated[
        str | None, typer.Option("--input", metavar="C,H,W", help="Shape of one example, where there is no data.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="NAME|FILE:OBJECT", help="A data set, or your own.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="A row per parameter tensor.")] = False,
    forecast: Annotated[
        bool | None,
        typer.Option(
            "--forecast/--no-forecast", help="Bytes per method and codec; default: unless the model is large."
        ),
    ] = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """A model before it is trained: layers, warnings, bytes. `lamina inspect mine.py:model --input 3,32,32`.

    Beside a model in a file of your own, a function `data` in the same file is its data.
    """
    from lamina import terminal
    from lamina.inspect import target as targets
    from lamina.inspect import view
    from lamina.inspect.inspection import of_target

    shape = None if input_size is None else _shape(input_size)
    with terminal.Fetching(terminal.console(no_color=no_color, stderr=True), json) as progress:
        found = targets.found(target, keys or (), input_size=shape, data=data, progress=progress)
    made = of_target(found, forecast)
    if json:
        for row in _objects(made):
            terminal.emit(row)
        return
    out = terminal.console(no_color=no_color)
    say(out, view.lines(made, terminal.width_of(out), every))


def _shape(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.replace("x", ",").split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise ConfigError(
            f"--input {text}: expected whole numbers >= 1, separated by commas",
            where="--input",
            remedy="the shape of one example without the batch, e.g. 3,32,32",
        )
    return tuple(map(int, words))


def _objects(made: Any) -> list[dict[str, Any]]:
    head = {
        "event": "model", "title": made.title, "parameters": made.params, "bytes": made.bytes,
        "dtypes": list(made.dtypes), "buffers_policy": made.policy, **made.rest._asdict(),
    }  # fmt: skip
    rows = [{"event": "stage", **row._asdict()} for row in made.stages]
    rows += [{"event": "tensor", **row._asdict()} for row in made.tensors]
    rows += [{"event": "finding", **finding._asdict()} for finding in made.findings]
    if made.budget is not None:
        rows += [{"event": "bytes", **cell._asdict()} for cell in made.budget.cells]
        rows += [{"event": "left_out", "method": m, "why": why} for m, why in made.budget.left_out.items()]
        rows += [{"event": "time", "seconds_per_step": made.budget.seconds_per_step}]
    return [head, *rows, {"event": "inspected", "no_forecast": made.skipped or None}]


def dry_run(fed: Any, config: Any, out: Console, json: bool) -> None:
    """What the experiment will cost. Nothing is written."""
    from lamina import terminal
    from lamina.inspect import forecast, view

    made = forecast(fed, config.rounds, evaluate_every=config.evaluate_every)
    if json:
        row = {key: value for key, value in vars(made).items() if key not in ("up", "down", "sampled")}
        spans = {"up": made.up._asdict(), "down": made.down._asdict()}
        sampled = {"clients": made.sampled[0], "rounds": made.sampled[1]}
        terminal.emit({"event": "forecast", **spans, **row, "sampled": sampled, "written": False})
        return
    say(out, view.dry_run(made, len(fed.data), terminal.width_of(out)))
