"""The command line. Everything heavy is imported inside the commands, so that help comes at once.

Exit codes: 0 done, 2 usage and config (E1xx), 3 data (E2xx), 4 a run failed (E3xx), 5 storage (E4xx), 130 interrupted
after a commit (143 by SIGTERM, 129 by SIGHUP).
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer

from lamina.cli import chaos, comparing, explaining, flower, here, inspecting, looking, reporting, running, scaffolding
from lamina.cli.base import complain

app = typer.Typer(
    name="lamina",
    help="Layer-wise, communication-efficient federated learning, measured in bytes that really travel.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (running.run, running.resume, running.demo, running.reproduce, looking.verify):
    app.command()(command)
app.command()(inspecting.inspect)
app.command()(chaos.chaos)
app.command("list")(looking.list_)
app.command()(comparing.compare)
app.command()(reporting.report)
app.command()(comparing.sweep)
app.command()(comparing.export)
app.command()(scaffolding.new)
app.command()(here.doctor)
app.command()(explaining.explain)
app.command()(flower.parity)
app.add_typer(here.app, name="data")
app.add_typer(flower.app, name="flower")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"lamina {installed('lamina')}")
        raise typer.Exit


def main() -> None:
    """Entry point of the program `lamina`."""
    warnings.showwarning = _warn
    app()


def _warn(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
    complain(f"! {message}")
