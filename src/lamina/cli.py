"""The command line. Everything heavy is imported inside the commands, so that help comes at once.

Exit codes: 0 done, 2 usage and config (E1xx), 3 data (E2xx), 4 a run failed (E3xx), 5 storage (E4xx), 130 interrupted
after a commit (143 by SIGTERM, 129 by SIGHUP).
"""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lamina.errors import ConfigError, LaminaError, StorageError

if TYPE_CHECKING:
    from rich.console import Console

    from lamina.engine.mkl import Gain
    from lamina.runs import Run, Watcher
    from lamina.terminal import Column

app = typer.Typer(
    name="lamina",
    help="Layer-wise, communication-efficient federated learning, measured in bytes that really travel.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="The real data sets in the box.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
flower_app = typer.Typer(
    help="The same experiment on a real network, through Flower.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(flower_app, name="flower")

Json = Annotated[bool, typer.Option("--json", help="One JSON object per line, nothing else on the standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the run folder, and errors.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="As NO_COLOR in the environment.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Where runs lie; default LAMINA_RUNS, else ./runs.")
]
Keys = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", show_default=False)]
F = TypeVar("F", bound=Callable[..., Any])


def main() -> None:
    """Entry point of the program `lamina`."""
    warnings.showwarning = _warn
    app()


def _warn(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
    print(f"! {message}", file=sys.stderr)


def _guarded(command: F) -> F:
    """Errors become one message on the error output and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except LaminaError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted", file=sys.stderr)
            raise typer.Exit(getattr(error, "exit_code", 130)) from error
        except BrokenPipeError as error:  # `lamina ... | head`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from error
        except Exception as error:
            if isinstance(error, typer.Exit | typer.Abort | typer.BadParameter):
                raise
            notes = getattr(error, "__notes__", [])
            if not notes:
                traceback.print_exc()
            said = " ".join(str(error).split())[:300]
            print(f"E300  {type(error).__name__}: {said}  [{'; '.join(notes) or 'traceback above'}]", file=sys.stderr)
            raise typer.Exit(4) from error

    return guarded  # type: ignore[return-value]  # the same signature, by functools.wraps


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"lamina {installed('lamina')}")
        raise typer.Exit


# ---- run, resume, demo


@app.command()
@_guarded
def run(
    target: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", show_default=False)],
    keys: Keys = None,
    show_config: Annotated[
        str | None, typer.Option("--show-config", metavar="all|changed", help="Print the config and stop.")
    ] = None,
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
    if show_config is not None:
        _print_config(config, show_config, out, json)
        return
    with terminal.Fetching(terminal.console(no_color=no_color, stderr=True), json) as progress:
        fed = configs.build(config, progress)
    _finish(
        runs.fit(
            fed,
            config.rounds,
            root=run_dir,
            progress=_watcher(out, json, quiet, config.run.log_every),
            config=config,
        ),
        quiet and not json,
    )


@app.command()
@_guarded
def resume(
    path: Annotated[str, typer.Argument(metavar="RUN", show_default=False)],
    keys: Annotated[list[str] | None, typer.Argument(metavar="[rounds=N]", show_default=False)] = None,
    run_dir: RunDir = None,
    json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Go on with a run from its last commit, as if it had never stopped."""
    rounds = None
    for number, argument in enumerate(keys or (), start=2):
        key, _, value = argument.partition("=")
        where = f"command line, argument {number}"
        if key != "rounds":
            raise StorageError(
                f"{key} cannot change in a run that has begun", code="E405", where=where, remedy="rounds can"
            )
        if not value.isdigit():
            raise ConfigError(f"rounds: expected a whole number >= 1, got {value!r}", code="E103", where=where)
        rounds = int(value)
    from lamina import runs, terminal
    from lamina.folder import read_info

    folder = _find(path, runs.runs_root(run_dir))
    before = read_info(folder)
    done = before["status"] == "done" and rounds in (None, before["rounds"])
    watcher = _watcher(terminal.console(no_color=no_color), json, quiet, None)
    if done:
        watcher.note(f"{folder} is done; rounds=N with more than {before['rounds']} goes on")
        watcher.end(runs.Run.open(folder))
        return
    _finish(runs.resume(folder, rounds, progress=watcher), quiet and not json)


@app.command()
@_guarded
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
    """FedAvg and FedLAMA side by side on the same split, and what each of them sent. Under two minutes."""
    from lamina import demo as demos
    from lamina import runs, terminal

    out = terminal.console(no_color=no_color)
    watcher = _watcher(out, json, quiet, demos.EVERY)
    fetching = terminal.Fetching(terminal.console(no_color=no_color, stderr=True), json)
    made = demos.demo(rounds, data, runs.runs_root(run_dir), watcher, fetching)
    rows = runs.compare(made)
    if json:
        for row in rows:
            terminal.emit({"event": "compare", **row})
        return
    _say(out, demos.verdict(made, terminal.width_of(out)))


@app.command()
@_guarded
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
    watcher = _watcher(console, json, quiet, recipe.variant(scaled).log_every)
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
        _say(console, [*report.lines, "", *terminal.fields([("table", str(report.markdown))], None)])


def _numbers(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"{option}={text}: expected whole numbers >= 0, separated by commas", where=option)
    return [int(word) for word in words]


def _finish(run: Run, quiet: bool) -> None:
    if quiet:
        print(run.path)


def _watcher(out: Console, json: bool, quiet: bool, log_every: int | None) -> Watcher:
    from lamina import terminal

    return terminal.Objects() if json else terminal.Quiet() if quiet else terminal.Terminal(out, log_every)


def _print_config(config: Any, which: str, out: Console, json: bool) -> None:
    from lamina import config as configs
    from lamina import terminal

    if which not in ("all", "changed"):
        raise ConfigError(f"--show-config={which}: expected all or changed")
    if json:
        terminal.emit(config.model_dump(mode="json"))
    elif which == "all":
        _say(out, configs.to_toml(config).splitlines())
    else:
        said = configs.changed(config)
        texts = [f"{key} = {value!r}" for key, value, _ in said]
        columns = [terminal.Column("", texts, left=True), terminal.Column("", [o for *_, o in said], left=True)]
        _say(out, terminal.table(columns, None)[1:])


# ---- compare, list, data, doctor


@app.command()
@_guarded
def compare(
    paths: Annotated[list[str], typer.Argument(metavar="RUN...", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Also runs on different splits.")] = False,
    md: Annotated[bool, typer.Option("--md", help="A Markdown table.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Exact numbers, separated by commas.")] = False,
    run_dir: RunDir = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Accuracy and bytes of runs, side by side: folders, numbers (003) or ranges (001-004) of the latest experiment."""
    from lamina import runs, terminal

    root = runs.runs_root(run_dir)
    folders = {folder.resolve(): folder for path in paths for folder in _find_all(path, root)}
    found = [runs.Run.open(folder) for folder in folders.values()]
    rows = runs.compare(found, force=force)
    out = terminal.console(no_color=no_color)
    if json:
        for row in rows:
            terminal.emit(row)
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    elif md:
        columns, same = terminal.compared(rows)
        print("\n".join([*terminal.markdown(columns), "", same]))
    else:
        _say(out, terminal.comparison(rows, terminal.width_of(out)))


@app.command()
@_guarded
def verify(
    path: Annotated[str, typer.Argument(metavar="RUN", show_default=False)],
    wire: Annotated[
        bool, typer.Option("--wire", help="Make its last rounds once more, every frame through a socket.")
    ] = False,
    afresh: Annotated[bool, typer.Option("--afresh", help="With --wire: all its rounds.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="With --wire: a line per layer.")] = False,
    run_dir: RunDir = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Whether a run's files agree with each other, and its ledger with what a socket carries."""
    from lamina import runs, terminal
    from lamina import verify as verifying

    if (afresh or layers) and not wire:
        raise ConfigError(f"{'--afresh' if afresh else '--layers'} is of --wire", where="command line")
    folder = _find(path, runs.runs_root(run_dir))
    out = terminal.console(no_color=no_color)
    width = terminal.width_of(out)
    checks = verifying.files(folder)
    problems = [f"{check.file}: {check.problem}" for check in checks if check.problem]
    code = "E404"
    if json:
        for check in checks:
            terminal.emit({"event": "file", **check._asdict()})
    else:
        _say(out, verifying.files_table(checks, width))
    if wire:

        def note(text: str) -> None:
            if json:
                terminal.emit({"event": "note", "text": text})
            else:
                _say(out, ["", f"  {text}"])

        resent = verifying.resend(folder, afresh=afresh, say=note)
        code = code if problems else "E407"
        problems += resent.problems
        if json:
            for event in resent.events(layers):
                terminal.emit(event)
        else:
            _say(out, verifying.wire_table(resent, width))
            _say(out, verifying.layers_table(resent, width) if layers else [])
    if json:
        terminal.emit({"event": "verified", "run": str(folder), "problems": problems})
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise StorageError(f"{problems[0]}{more}", code=code, where=str(folder))


LISTS = ("methods", "codecs", "data", "partitions", "presets", "models", "recipes", "runs")


@app.command("list")
@_guarded
def list_(
    what: Annotated[str, typer.Argument(metavar="|".join(LISTS), show_default=False)],
    run_dir: RunDir = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """What there is."""
    from lamina import terminal

    if what not in LISTS:
        raise ConfigError(f"list {what}: expected one of {', '.join(LISTS)}", where="command line, argument 1")
    if run_dir is not None and what != "runs":
        raise ConfigError(f"--run-dir is of `lamina list runs`, not of {what}")
    special = {"runs": lambda: _runs_listed(run_dir), "data": _data_listed, "recipes": _recipes_listed}
    rows, columns = special[what]() if what in special else _named(what)
    out = terminal.console(no_color=no_color)
    if json:
        for row in rows:
            terminal.emit(row)
    elif not rows:
        _say(out, ["  none"])
    elif what == "presets":  # sentences: wrapped, where a table would drop them
        _say(out, terminal.fields([(row["name"], row["about"]) for row in rows], terminal.width_of(out)))
    else:
        _say(out, terminal.table(columns, terminal.width_of(out)))
        _say(out, _CHAINS if what == "methods" else ())


_CHAINS = (
    "",
    '  several at once: lamina run quickstart "method=[ssfl,fedlama]" method.1.phi=4',
    "  which go together, and in which order: docs/methods/composition.md",
)


def _named(what: str) -> tuple[list[dict[str, Any]], list[Column]]:
    from lamina.terminal import Column

    rows: list[dict[str, Any]]
    if what == "partitions":
        from lamina.data import PARTITIONS

        rows = [{"name": name, "about": about} for name, about in PARTITIONS.items()]
    elif what == "presets":
        from lamina.settings import presets

        texts = presets().items()
        rows = [{"name": name, "about": _head(text)} for name, text in texts]
    else:
        from lamina import config as configs

        section = {"methods": "method", "codecs": "uplink", "models": "model"}[what]
        rows = []
        for name, thing in configs.catalogue(section).items():
            defaults = {key: taken.default for key, taken in configs.arguments_of(section, thing).items()}
            said = [key if v is type(v) or repr(v).startswith("<") else f"{key}={v}" for key, v in defaults.items()]
            rows.append({"name": name, "about": configs.about(section, name), "takes": ", ".join(said)})
    columns = [
        Column(what, [row["name"] for row in rows], left=True),
        Column("about", [row["about"] for row in rows], 2, left=True),
    ]
    if what == "methods":  # what a method does goes last: its settings stand on its page too
        columns[1] = columns[1]._replace(rank=1)
    if "takes" in rows[0]:
        columns.insert(1, Column("takes", [row["takes"] for row in rows], 2 if what == "methods" else 1, left=True))
    return rows, columns


def _head(text: str) -> str:
    """The comment that a TOML file begins with, as one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in lines)


def _data_listed() -> tuple[list[dict[str, Any]], list[Column]]:
    from lamina.data import DATASETS, cached
    from lamina.terminal import Column, size

    rows = []
    for name, info in DATASETS.items():
        there = "built in" if not info.download else "cached" if cached(name) else "-"
        rows.append({**info._asdict(), "sources": list(info.sources), "here": there})
    columns = [
        Column("data", list(DATASETS), left=True),
        Column("here", [row["here"] for row in rows], left=True),
        Column("examples", [f"{row['examples']:,}" for row in rows], 2),
        Column("test", [f"{row['test_examples']:,}" for row in rows], 5),
        Column("classes", [str(row["classes"]) for row in rows], 4),
        Column("clients", [row["clients"] or "by partition" for row in rows], 3, left=True),
        Column("download", [size(row["download"]) if row["download"] else "-" for row in rows], 1),
        Column("about", [row["description"] for row in rows], 6, left=True),
        Column("licence", [row["licence"] for row in rows], 7, left=True),
    ]
    return rows, columns


def _recipes_listed() -> tuple[list[dict[str, Any]], list[Column]]:
    from lamina.data import cached
    from lamina.recipes import RECIPES
    from lamina.terminal import Column

    rows: list[dict[str, Any]] = [
        {
            "name": recipe.name,
            "title": recipe.title,
            "paper": recipe.paper,
            "arxiv": recipe.arxiv,
            "compares": recipe.compares,
            "data": recipe.dataset,
            "here": cached(recipe.dataset),
            "arms": list(recipe.published.arms),
            "size": recipe.published.size,
            "scaled_arms": list(recipe.scaled.arms),
            "scaled_size": recipe.scaled.size,
            "scaled": recipe.scaled.scaled,
            "floor": recipe.scaled.floor,
        }
        for recipe in RECIPES.values()
    ]
    columns = [
        Column("recipe", [row["name"] for row in rows], left=True),
        Column("paper", [row["arxiv"] or "-" for row in rows], 3, left=True),
        Column("data", [f"{row['data']} {'cached' if row['here'] else '-'}" for row in rows], 2, left=True),
        Column("--scaled", [_duration(row["scaled_size"]) for row in rows], 1, left=True),
        Column("in full", [_duration(row["size"]) for row in rows], 4, left=True),
        Column("compares", [row["compares"] for row in rows], 5, left=True),
    ]
    return rows, columns


def _duration(size: str) -> str:
    """The time in a recipe's "so many arms, so many examples: about so long on 2 cores"."""
    return size.partition(": ")[2].partition(" on ")[0]


def _runs_listed(run_dir: Path | None) -> tuple[list[dict[str, Any]], list[Column]]:
    from lamina.folder import standing
    from lamina.runs import Run, runs_root
    from lamina.terminal import Column, share, size

    rows: list[dict[str, Any]] = []
    nothing = dict.fromkeys(("accuracy", "rounds", "rounds_done", "bytes_up", "bytes_down", "uplink"))
    for file in sorted(runs_root(run_dir).glob("*/*-*/run.json")):
        try:
            run = Run.open(file.parent)
        except LaminaError as error:
            if error.code == "E404":
                rows.append({**nothing, "run": str(file.parent), "status": "damaged", "error": error.message})
            continue  # a folder of another version: `compare` would say so
        final = run.final
        accuracy = final and standing(final, run.personal)
        rows.append({"run": str(file.parent), "accuracy": accuracy, **run.info})

    def damaged(row: dict[str, Any]) -> bool:
        return bool(row["status"] == "damaged")

    columns = [
        Column("run", [row["run"] for row in rows], left=True),
        Column("status", [row["status"] for row in rows], 1, left=True),
        Column("rounds", ["-" if damaged(row) else f"{row['rounds_done']}/{row['rounds']}" for row in rows], 3),
        Column("acc", [share(row["accuracy"]) for row in rows]),
        Column("up", ["-" if damaged(row) else size(row["bytes_up"]) for row in rows], 2),
        Column("down", ["-" if damaged(row) else size(row["bytes_down"]) for row in rows], 4),
        Column("codec", [row["uplink"] or "-" for row in rows], 5, left=True),
    ]
    return rows, columns


@data_app.command("list")
@_guarded
def data_list(json: Json = False, no_color: NoColor = False) -> None:
    """The data sets, and which of them are here."""
    list_("data", None, json, no_color)


@data_app.command("fetch")
@_guarded
def data_fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", show_default=False)],
    verify: Annotated[bool, typer.Option("--verify", help="Read what is here and compare its checksums.")] = False,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Bring data sets into the cache (LAMINA_DATA); an interrupted download goes on where it stopped."""
    from lamina import data, terminal

    out = terminal.console(no_color=no_color)
    for name in names:
        with terminal.Fetching(out, json) as progress:
            stored = data.download(name, verify=verify, progress=progress)
        if json:
            terminal.emit({"event": "fetched", "data": name, "folder": str(stored.folder), "source": stored.source})
        else:
            _say(out, [f"  {name}  {stored.folder}  from {stored.source}" + ("  verified" if verify else "")])


@data_app.command("show")
@_guarded
def data_show(
    target: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", show_default=False)],
    keys: Keys = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Who holds what: `lamina data show quickstart data.partition=dirichlet:0.1 data.clients=20`."""
    from lamina import config as configs
    from lamina import folder, terminal

    config = configs.load(target, keys or ())
    with terminal.Fetching(terminal.console(no_color=no_color, stderr=True)) as progress:
        split = folder.split_table(configs.data_of(config, progress))
    if json:
        terminal.emit(split)
        return
    out = terminal.console(no_color=no_color)
    _say(out, terminal.split_lines(split, terminal.width_of(out)))


@app.command()
@_guarded
def doctor(
    run_dir: RunDir = None,
    mkl: Annotated[bool, typer.Option("--mkl", help="Try what LAMINA_MKL=amd brings: two processes, seconds.")] = False,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """What this machine has, and what lamina would make of it."""
    import platform
    import shutil

    import torch

    from lamina import data, engine, machine, runs, terminal
    from lamina.engine.mkl import gain, label

    def free(folder: Path) -> str:
        return f"{folder} · {terminal.size(shutil.disk_usage(there(folder)).free)} free"

    def there(folder: Path) -> Path:
        return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())

    root = runs.runs_root(run_dir)
    synced = machine.sync_seconds(there(root))
    memory = machine.free_memory()
    name, workers, reason = engine.choose("auto", 10, None)
    extras = {"scikit-learn": "digits", "pillow": "PNG of CIFAR-10"}
    missing = [f"{package} (for {use})" for package, use in extras.items() if machine.installed(package) is None]
    sets = [f"{name} {'yes' if data.cached(name) else 'no'}" for name, info in data.DATASETS.items() if info.download]
    facts = {
        "lamina": f"{machine.installed('lamina')} · python {platform.python_version()} · {platform.platform()}",
        "torch": f"{label()} · {torch.get_num_threads()} threads",
        **({"mkl": _gained(gain())} if mkl else {}),
        "cpu": f"{machine.cpu_name()} · {engine.cores()} cores",
        "engine": f"auto, for a model of 1 MiB and 10 clients a round: {name}"
        + (f" x{workers}" if name == "processes" else "")
        + f" · {reason}",
        "memory": "unknown" if memory is None else f"{terminal.size(memory)} free",
        "same bits": "loop and processes, for any number of workers, with this torch on this kind of cpu · other ones "
        "may differ in the last bits",
        "runs": f"{free(root)} · "
        + ("cannot be written" if synced is None else f"a small file is safe in {1000 * synced:.1f} ms"),
        "cache": free(data.cache_folder()),
        "data": " · ".join(sets),
        "extras": "all here" if not missing else "missing: " + ", ".join(missing) + " · pip install 'lamina[demo]'",
    }
    if json:
        terminal.emit(facts)
        return
    out = terminal.console(no_color=no_color)
    _say(out, terminal.fields(list(facts.items()), terminal.width_of(out)))


def _gained(gain: Gain | str) -> str:
    if isinstance(gain, str):
        return gain
    return (
        f"products of matrices at {gain.before:.0f} GFLOP/s a core, {gain.after:.0f} with LAMINA_MKL=amd in the "
        f"environment (error {gain.error:.0e}; no documented switch, so a run records it)"
    )


def _say(out: Console, lines: Sequence[str]) -> None:
    from rich.text import Text

    for line in lines:
        out.print(Text(line), soft_wrap=True)


# ---- deployment


def _written(files: Sequence[Path], json: bool, no_color: bool) -> None:
    from lamina import terminal

    if json:
        terminal.emit({"event": "written", "files": [str(file) for file in files]})
        return
    _say(terminal.console(no_color=no_color), [f"  {file}" for file in files])


@flower_app.command("new")
@_guarded
def flower_new(
    target: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    keys: Keys = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Write an app that `flwr run` takes: `lamina flower new exp.toml app rounds=50`."""
    from lamina import config as configs
    from lamina.flower import project

    files = project.write(configs.load(target, keys or ()), folder)
    _written(files, json, no_color)


@flower_app.command("keys")
@_guarded
def flower_keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    host: Annotated[
        list[str] | None, typer.Option("--host", metavar="NAME", help="How the server is reached; again for more.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="How many SuperNode keys.")] = 2,
    days: Annotated[int, typer.Option("--days", help="For which the certificates hold.")] = 365,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Make certificates for the server and keys for its nodes: `lamina flower keys keys --host fl.example.org`."""
    from lamina.flower import keys as keyring

    files = keyring.write(folder, host or ["127.0.0.1", "localhost"], nodes, days)
    _written(files, json, no_color)


@flower_app.command("rehearse")
@_guarded
def flower_rehearse(
    target: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", show_default=False)],
    keys: Keys = None,
    nodes: Annotated[int, typer.Option("--nodes", help="SuperNodes; the clients are dealt out to them.")] = 2,
    tls: Annotated[bool, typer.Option("--tls", help="With certificates and SuperNode keys, made anew.")] = False,
    host: Annotated[str, typer.Option("--host", help="Where the SuperLink listens.")] = "127.0.0.1",
    together: Annotated[
        bool, typer.Option("--together", help="A node sends its clients' mean as one message.")
    ] = False,
    run_dir: RunDir = None,
    json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Run an experiment through a SuperLink and SuperNodes on this machine, and end them all."""
    import tempfile

    from lamina import config as configs
    from lamina import runs, terminal
    from lamina.flower import project, rehearsal

    config = configs.load(target, keys or ())
    out = terminal.console(no_color=no_color)

    def see(event: dict[str, Any]) -> None:
        if json and event["event"] != "line":
            terminal.emit(event)
        elif not json and not quiet and event["event"] == "line":
            _say(out, [event["text"]])

    rehearsal.expect_guarded(host, tls)
    with _ending(), tempfile.TemporaryDirectory(prefix="lamina-rehearsal-") as made:
        top = Path(made)
        project.write(config, top / "app")
        if not json and not quiet:
            _say(out, [f"  starting a SuperLink and {nodes} SuperNode{'s' if nodes > 1 else ''}"])
        with rehearsal.Rehearsal(top, nodes, tls=tls, host=host) as rehearsed:
            said = {"run-dir": str(runs.runs_root(run_dir).resolve()), "together": together}
            outcome = rehearsed.wait(rehearsed.submit(top / "app", said), see)
    if outcome.exit_code:
        print(outcome.error, file=sys.stderr)
        raise typer.Exit(outcome.exit_code)
    if quiet and not json:
        print(outcome.folder)


@app.command()
@_guarded
def parity(
    targets: Annotated[list[str], typer.Argument(metavar="PRESET_OR_TOML [key=value]...", show_default=False)],
    rounds: Annotated[int, typer.Option("--rounds", min=1)] = 3,
    nodes: Annotated[int, typer.Option("--nodes", min=1)] = 2,
    tls: Annotated[bool, typer.Option("--tls", help="With certificates and SuperNode keys, made anew.")] = False,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Whether the simulator and Flower's processes give the same model and the same ledger. Exit code 1 if not."""
    from lamina import config as configs
    from lamina import terminal
    from lamina.flower import parity as comparing

    cut = next((i for i, word in enumerate(targets) if "=" in word), len(targets))
    if not cut:
        raise ConfigError(f"{targets[0]}: expected a preset or a file before keys", where="command line, argument 1")
    loaded = [configs.load(target, targets[cut:]) for target in targets[:cut]]
    out = terminal.console(no_color=no_color)
    same = True
    with _ending():
        for row in comparing.compare(loaded, rounds, nodes, (lambda text: None) if json else _noted(out), tls=tls):
            same &= row.same
            if json:
                terminal.emit({"event": "parity", "same": row.same, **row._asdict()})
            else:
                _say(out, terminal.fields(_compared(row), terminal.width_of(out)))
    if not same:
        raise typer.Exit(1)


def _noted(out: Console) -> Callable[[str], None]:
    return lambda text: _say(out, [f"  {text}"])


def _compared(row: Any) -> list[tuple[str, str]]:
    carried = row.carried
    return [
        ("method", row.title),
        ("model", f"{row.simulator[:16]} in the simulator, {row.flower[:16]} through Flower"),
        ("ledger", f"up {row.bytes_up:,} · down {row.bytes_down:,}, per client and layer"),
        ("framing", f"{carried['messages']} messages: packed up {carried['packed_up']:,} · down "
         f"{carried['packed_down']:,}; Flower's records up {carried['framing_up']:,} · down "
         f"{carried['framing_down']:,}; counted at the SuperLink up {row.traffic.get('inbound-bytes', 0):,} · down "
         f"{row.traffic.get('outbound-bytes', 0):,}, roll call and objects' heads included"),
        ("result", "the same" if row.same else "DIFFERENT"),
        *(("", text) for text in row.differences),
    ]  # fmt: skip


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """SIGTERM and SIGHUP end what was started here, as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        stopped = KeyboardInterrupt("stopped")
        stopped.exit_code = 128 + number  # type: ignore[attr-defined]
        raise stopped

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- which run is meant


def _find_all(text: str, root: Path) -> list[Path]:
    if (span := re.fullmatch(r"(\d{3})-(\d{3})", text)) and not Path(text).exists():
        numbers = range(int(span[1]), int(span[2]) + 1)
        there = [f"{n:03d}" for n in numbers if _numbered(f"{n:03d}", root)]
        return [_find(number, root) for number in there or [span[1]]]
    return [_find(text, root)]


def _find(text: str, root: Path) -> Path:
    """A folder, one under the root of runs, "latest", or a number: of the latest experiment, if several have it."""
    for folder in (Path(text), root / text):
        if (folder / "run.json").is_file():
            return folder.resolve() if folder.is_symlink() else folder
    found = _numbered(text, root)
    if len(found) > 1:
        experiment = (root / "latest").resolve().parent.name
        found = [folder for folder in found if folder.parent.name == experiment] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{text}: {', '.join(map(str, found))} have this number", remedy="name the folder")
    raise StorageError(f"there is no run {text!r} under {root}", code="E403", remedy="`lamina list runs` names them")


def _numbered(text: str, root: Path) -> list[Path]:
    if not re.fullmatch(r"\d{1,3}", text):
        return []
    return sorted(p.parent for p in root.glob(f"*/{int(text):03d}-*/run.json") if not p.parent.is_symlink())


if __name__ == "__main__":
    main()
