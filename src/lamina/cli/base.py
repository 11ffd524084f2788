"""What the commands share: common options, errors that end a command, which run is meant, what is printed."""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lamina.errors import ConfigError, LaminaError, StorageError
from lamina.redaction import hidden, printable

if TYPE_CHECKING:
    from rich.console import Console

    from lamina.runs import Watcher

Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, nothing else on the standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the run folder, and errors.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="As NO_COLOR in the environment.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Where runs lie; default LAMINA_RUNS, else ./runs.")
]
Keys = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", show_default=False)]
F = TypeVar("F", bound=Callable[..., Any])


def guarded(command: F) -> F:
    """Errors become one message on the error output and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except LaminaError as error:
            complain(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            complain(str(error) or "interrupted")
            raise typer.Exit(getattr(error, "exit_code", 130)) from error
        except BrokenPipeError as error:  # `lamina ... | head`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error
        except Exception as error:
            if isinstance(error, typer.Exit | typer.Abort | typer.BadParameter):
                raise
            notes = getattr(error, "__notes__", [])
            if not notes:
                complain(traceback.format_exc())
            said = " ".join(hidden(str(error)).split())[:300]
            complain(f"E300  {type(error).__name__}: {said}  [{'; '.join(notes) or 'traceback above'}]")
            raise typer.Exit(4) from error

    return guarded  # type: ignore[return-value]  # the same signature, by functools.wraps


def watcher_for(out: Console, json: bool, quiet: bool, log_every: int | None) -> Watcher:
    from lamina import terminal

    return terminal.Objects() if json else terminal.Quiet() if quiet else terminal.Terminal(out, log_every)


def say(out: Console, lines: Sequence[str]) -> None:
    from rich.text import Text

    for line in lines:
        out.print(Text(printable(line)), soft_wrap=True)


def complain(text: str) -> None:
    """On the error output: no secret, and nothing that a terminal obeys."""
    print(printable(hidden(text)), file=sys.stderr)


def written(files: Sequence[Path], json: bool, no_color: bool) -> None:
    from lamina import terminal

    if json:
        terminal.emit({"event": "written", "files": [str(file) for file in files]})
        return
    say(terminal.console(no_color=no_color), [f"  {file}" for file in files])


def find_all(text: str, root: Path) -> list[Path]:
    if (span := re.fullmatch(r"(\d{3,})-(\d{3,})", text)) and not Path(text).exists():
        there = sorted({number for number, _ in _numbered(root) if int(span[1]) <= number <= int(span[2])})
        return [find(f"{number:03d}", root) for number in there or [int(span[1])]]
    return [find(text, root)]


def find(text: str, root: Path) -> Path:
    """A folder, one under the root of runs, "latest", or a number: of the latest experiment, if several have it."""
    for folder in (Path(text), root / text):
        if (folder / "run.json").is_file():
            return folder.resolve() if folder.is_symlink() else folder
    found = [folder for number, folder in _numbered(root) if re.fullmatch(r"\d+", text) and number == int(text)]
    if len(found) > 1:
        experiment = (root / "latest").resolve().parent.name
        found = [folder for folder in found if folder.parent.name == experiment] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{text}: {', '.join(map(str, found))} have this number", remedy="name the folder")
    raise StorageError(f"there is no run {text!r} under {root}", code="E403", remedy="`lamina list runs` names them")


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """The runs that have numbers, by them."""
    from lamina.runs import number_of

    found = ((number_of(file.parent), file.parent) for file in root.glob("*/*-*/run.json"))
    return sorted((number, folder) for number, folder in found if number and not folder.parent.is_symlink())
