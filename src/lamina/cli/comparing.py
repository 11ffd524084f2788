"""`lamina compare`, `sweep`, `export`: runs side by side, many at once, and for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli.base import Json, NoColor, RunDir, complain, find, find_all, guarded, say, watcher_for, written
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

Target = Annotated[
    float | None,
    typer.Option("--target", metavar="ACC", help="The accuracy of bytes-to-target; default: 95 % of the best."),
]


@guarded
def compare(
    paths: Annotated[list[str], typer.Argument(metavar="RUN...", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Also runs on different splits.")] = False,
    target: Target = None,
    md: Annotated[bool, typer.Option("--md", help="A Markdown table.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Exact numbers, separated by commas.")] = False,
    as_latex: Annotated[bool, typer.Option("--latex", help="A table for a paper, with booktabs.")] = False,
    run_dir: RunDir = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Accuracy and bytes of runs, side by side: folders, numbers (003) or ranges (001-004) of the latest experiment.

    Runs that differ only in their seed are one row: means, with deviations.
    """
    asked = [f"--{name}" for name, on in (("md", md), ("csv", as_csv), ("latex", as_latex), ("json", json)) if on]
    if len(asked) > 1:
        raise ConfigError(f"{', '.join(asked)}: expected one of them", where="command line")
    from lamina import compare as comparing
    from lamina import comparison, terminal
    from lamina.runs import Run, runs_root

    root = runs_root(run_dir)
    folders = {folder.resolve(): folder for path in paths for folder in find_all(path, root)}
    rows = comparing.compare([Run.open(folder) for folder in folders.values()], force=force, target=target)
    if as_csv:
        print(comparison.as_csv(rows), end="")
    elif md or as_latex:
        print("\n".join(comparison.as_markdown(rows) if md else comparison.as_latex(rows)))
    else:
        _shown(rows, terminal.console(no_color=no_color), json)


def _shown(rows: list[dict[str, Any]], out: Console, json: bool, event: str | None = None) -> None:
    from lamina import comparison, terminal

    if json:
        for row in rows:
            terminal.emit({**({} if event is None else {"event": event}), **row})
    else:
        say(out, comparison.as_text(rows, terminal.width_of(out)))


@guarded
def sweep(
    target: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", show_default=False)],
    keys: Annotated[list[str] | None, typer.Argument(metavar="[key=a,b,c]...", show_default=False)] = None,
    seeds: Annotated[int | None, typer.Option(metavar="N", help="Every combination with the seeds 0 to N - 1.")] = None,
    jobs: Annotated[int, typer.Option(metavar="N", help="Runs at once, each with its share of the cores.")] = 1,
    accuracy: Target = None,
    run_dir: RunDir = None,
    json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only the run folders, the table at the end, and errors.")
    ] = False,
    no_color: NoColor = False,
) -> None:
    """Every combination of values: `lamina sweep exp.toml method=fedavg,fedlama local.lr=0.1,0.03 --seeds 3`.

    What is finished is not run again, what was stopped goes on. One table at the end.
    """
    from lamina import compare as comparing
    from lamina import comparison, terminal
    from lamina import sweep as sweeping

    planned = sweeping.points(target, keys or (), seeds)
    out = terminal.console(no_color=no_color)
    errors = terminal.console(no_color=no_color, stderr=True)

    def told(event: dict[str, Any]) -> None:
        if json:
            terminal.emit(event)
        elif not quiet:
            say(out, [_told(event)])

    done = sweeping.sweep(
        planned,
        run_dir,
        jobs,
        watcher_for(out, json, quiet, None),
        told,
        terminal.Fetching(errors, json),
    )
    if quiet and not json and done.runs:
        print("\n".join(str(run.path) for run in done.runs))
    if done.runs:
        rows = comparing.compare(done.runs, force=True, target=accuracy)
        if json:
            for row in rows:
                terminal.emit({"event": "compare", **row})
        elif quiet:
            say(out, ["", *comparison.as_text(rows, terminal.width_of(out))])
        else:
            again = f"lamina compare {_called([run.path for run in done.runs], run_dir)} --latex"
            say(out, ["", *comparison.as_text(rows, terminal.width_of(out)), "", f"  next  {again}"])
    if done.failed:
        complain(f"{len(done.failed)} of {len(planned)} runs failed")
        for failure in done.failed:
            named = " ".join(f"{key}={value}" for key, value in failure["settings"].items())
            said = f"! {failure['run'] or named} seed {failure['seed']}: {failure['error']}"
            complain(said)
        raise typer.Exit(4)


def _called(folders: list[Path], run_dir: Path | None) -> str:
    """The shortest names by which `find` finds them: ranges of numbers, where they are of the latest experiment."""
    from lamina.runs import number_of, runs_root

    root = runs_root(run_dir)
    where = "" if run_dir is None else f" --run-dir {run_dir}"
    if {folder.resolve().parent for folder in folders} != {(root / "latest").resolve().parent}:
        return " ".join(str(folder) for folder in folders)
    numbers = sorted(number_of(folder) for folder in folders)
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return " ".join("-".join(f"{number:03d}" for number in span) for span in spans) + where


def _told(event: dict[str, Any]) -> str:
    """A line on what happens in a sweep."""
    from lamina.terminal import clock, share

    if event["event"] == "sweep":
        return f"  {event['runs']} runs: {event['finished']} finished before, {event['to_do']} to do"
    named = " ".join(f"{key}={value}" for key, value in event["settings"].items())
    name = " · ".join([event["run"] or "-", *([named] if named else []), f"seed {event['seed']}"])
    if event["event"] == "start":
        return f"  begun {name}"
    if event["event"] == "failed":
        return f"! failed {name} · {event['error']}"
    return f"  {event['status']:<6}  {name} · acc {share(event['accuracy'])} · {clock(event['seconds'])}"


@guarded
def export(
    path: Annotated[str, typer.Argument(metavar="RUN", show_default=False)],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="csv, latex, md, safetensors, tensorboard, mlflow, wandb.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Default: export/FORMAT in the run's folder.")] = None,
    run_dir: RunDir = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """A run for other programs. Nothing goes online: wandb writes what `wandb sync` can send."""
    from lamina import export as exporting
    from lamina.runs import runs_root

    written(exporting.export(find(path, runs_root(run_dir)), to, out), json, no_color)
