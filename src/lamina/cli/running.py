"""`lamina run`, `resume`, `demo`, `reproduce`: what trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli import inspecting
from lamina.cli.base import Json, Keys, NoColor, Quiet, RunDir, find, guarded, say, watcher_for
from lamina.errors import ConfigError
from lamina.settings import CHANGEABLE

if TYPE_CHECKING:
    from rich.console import Console

    from lamina.runs import Run


@guarded
def run(
    target: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", show_default=False)],
    keys: Keys = None,
    show_config: Annotated[
        str | None, typer.Option("--show-config", metavar="all|changed", help="Print the config and stop.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Forecast bytes, time and memory from a few real rounds, and stop.")
    ] = False,
    run_dir: RunDir = None,
    json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Train: `lamina run quickstart`, `lamina run exp.toml method=fedlama method.phi=4 rounds=200`.

    Several methods at once, a chain, are a list, and its members have numbers: `lamina run quickstart
    "method=[ssfl,fedlama]" method.0.density=0.4 method.1.phi=4`.
    """
    from lamina import config as configs
    from lamina import runs, terminal

    config = configs.load(target, keys or ())
    out = terminal.console(no_color=no_color)
    if config.budget is not None:
        config = _fitted(config, out, json, quiet)
    if show_config is not None:
        _print_config(config, show_config, out, json)
        if not dry_run:
            return
    if dry_run:
        config = config.model_copy(update={"store": "memory"})  # a store on disk would be made
    with terminal.Fetching(terminal.console(no_color=no_color, stderr=True), json) as progress:
        fed = configs.build(config, progress)
    if dry_run:
        inspecting.dry_run(fed, config, out, json)
        return
    finish(
        runs.fit(
            fed,
            config.rounds,
            root=run_dir,
            progress=watcher_for(out, json, quiet, config.run.log_every),
            config=config,
        ),
        quiet and not json,
    )


@guarded
def resume(
    path: Annotated[str, typer.Argument(metavar="RUN", show_default=False)],
    keys: Annotated[list[str] | None, typer.Argument(metavar="[rounds=N] [key=value]...", show_default=False)] = None,
    run_dir: RunDir = None,
    json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Go on with a run from its last commit, as if it had never stopped."""
    from lamina import runs, terminal
    from lamina.folder import read_info

    folder = find(path, runs.runs_root(run_dir))
    before = read_info(folder)
    changes = runs.changes(folder, keys or ())
    rounds = changes.get("rounds", before["rounds"])
    done = before["status"] == "done" and rounds == before["rounds"] and not (before.get("stopped") and changes)
    watcher = watcher_for(terminal.console(no_color=no_color), json, quiet, changes.get("run.log_every"))
    if done:
        watcher.note(f"{folder} is done; rounds=N with more than {before['rounds']} goes on")
        watcher.end(runs.Run.open(folder))
        return
    finish(runs.resume(folder, keys=keys or (), progress=watcher), quiet and not json)


resume.__doc__ = f"""{resume.__doc__}

    What may change: {", ".join(CHANGEABLE)}. An engine, where the bits stay the same; faults, for the rounds that come.
    """


@guarded
def demo(
    rounds: Annotated[int, typer.Option(help="Of each of the two runs.", min=1)] = 24,
    data: Annotated[
        str | None, typer.Option(help="fashion_mnist or digits; default: the first that can be had.")
    ] = None,
    run_dir: RunDir = None,
    json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """FedAvg and FedLAMA side by side on the same split, and what each of them sent.

    Under two minutes on two idle cores.
    """
    from lamina import demo as demos
    from lamina import runs, terminal
    from lamina.compare import compare

    out = terminal.console(no_color=no_color)
    watcher = watcher_for(out, json, quiet, demos.EVERY)
    fetching = terminal.Fetching(terminal.console(no_color=no_color, stderr=True), json)
    made = demos.demo(rounds, data, runs.runs_root(run_dir), watcher, fetching)
    if json:
        for row in compare(made):
            terminal.emit({"event": "compare", **row})
        return
    say(out, demos.verdict(made, terminal.width_of(out)))


@guarded
def reproduce(
    name: Annotated[str, typer.Argument(metavar="RECIPE", show_default=False)],
    scaled: Annotated[
        bool, typer.Option("--scaled", help="The smaller variant: at most 30 minutes on 2 cores.")
    ] = False,
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="One run of every arm each.")] = "0",
    arms: Annotated[
        str | None, typer.Option(metavar="a,b", help="Run only these; the table holds all that are finished.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the table goes; default: beside the runs.")
    ] = None,
    run_dir: RunDir = None,
    json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """A published experiment with its baselines: a table, and whether the paper's claims held."""
    from lamina import reproduce as reproducing
    from lamina import runs, terminal

    recipe = reproducing.find(name)
    console = terminal.console(no_color=no_color)
    root = runs.runs_root(run_dir)
    watcher = watcher_for(console, json, quiet, recipe.variant(scaled).log_every)
    try:
        report = reproducing.reproduce(
            recipe,
            scaled,
            _numbers(seeds, "--seeds"),
            None if arms is None else [arm.strip() for arm in arms.split(",")],
            root,
            out or root,
            watcher,
            terminal.Fetching(terminal.console(no_color=no_color, stderr=True), json),
        )
    except runs.Interrupted:
        watcher.note("stopped: the same command goes on from here")
        raise
    if json:
        terminal.emit({"event": "reproduced", "markdown": str(report.markdown), **report.data})
    elif quiet:
        print(report.markdown)
    else:
        say(console, [*report.lines, "", *terminal.fields([("table", str(report.markdown))], None)])


def _numbers(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"{option}={text}: expected whole numbers >= 0, separated by commas", where=option)
    return [int(word) for word in words]


def finish(run: Run, quiet: bool) -> None:
    if quiet:
        print(run.path)


def _fitted(config: Any, out: Console, json: bool, quiet: bool) -> Any:
    """The config with the setting that keeps it within its budget."""
    from lamina import terminal
    from lamina.inspect import within

    with terminal.Fetching(terminal.console(stderr=True), json) as progress:
        fitted = within(config, progress)
    if json:
        terminal.emit({"event": "budget", "budget": config.budget, "chosen": fitted.said})
    elif not quiet:
        say(out, terminal.fields([("budget", fitted.said)], terminal.width_of(out)))
    return fitted.config


def _print_config(config: Any, which: str, out: Console, json: bool) -> None:
    from lamina import config as configs
    from lamina import terminal

    if which not in ("all", "changed"):
        raise ConfigError(f"--show-config={which}: expected all or changed")
    if json:
        origins = {key: origin for key, _, origin in configs.changed(config)}  # of all others: "default"
        terminal.emit({**config.model_dump(mode="json"), "origins": origins})
    elif which == "all":
        say(out, configs.to_toml(config).splitlines())
    else:
        said = configs.changed(config)
        texts = [f"{key} = {value!r}" for key, value, _ in said]
        columns = [terminal.Column("", texts, left=True), terminal.Column("", [o for *_, o in said], left=True)]
        say(out, terminal.table(columns, None)[1:])
