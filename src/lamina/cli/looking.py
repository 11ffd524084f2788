"""`lamina verify`, `list`: what was run, and what there is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli.base import Json, NoColor, RunDir, find, guarded, say
from lamina.errors import ConfigError, LaminaError, StorageError

if TYPE_CHECKING:
    from lamina.terminal import Column


@guarded
def verify(
    path: Annotated[str, typer.Argument(metavar="RUN", show_default=False)],
    wire: Annotated[
        bool, typer.Option("--wire", help="Make its last rounds once more, every frame through a socket.")
    ] = False,
    replay: Annotated[
        int | None, typer.Option("--replay", metavar="N", min=1, help="Make N of its rounds once more: the same bits?")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="With --replay: of the draw of these rounds.", min=0)] = 0,
    afresh: Annotated[bool, typer.Option("--afresh", help="With --wire or --replay: all its rounds.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="With --wire: a line per layer.")] = False,
    run_dir: RunDir = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Whether a run's files agree with each other, with what a socket carries, and with its rounds made once more."""
    from lamina import runs, terminal
    from lamina import verify as verifying

    if layers and not wire:
        raise ConfigError("--layers is of --wire", where="command line")
    if (afresh and not (wire or replay)) or (seed and not replay):
        said = "--afresh is of --wire and --replay" if afresh else "--seed is of --replay"
        raise ConfigError(said, where="command line")
    folder = find(path, runs.runs_root(run_dir))
    out = terminal.console(no_color=no_color)
    width = terminal.width_of(out)
    checks = verifying.files(folder)
    problems = [f"{check.file}: {check.problem}" for check in checks if check.problem]
    code = "E404"
    if json:
        for check in checks:
            terminal.emit({"event": "file", **check._asdict()})
    else:
        say(out, verifying.files_table(checks, width))

    def note(text: str) -> None:
        if json:
            terminal.emit({"event": "note", "text": text})
        else:
            say(out, ["", f"  {text}"])

    if replay is not None:
        replayed = verifying.replay(folder, replay, seed=seed, afresh=afresh, say=note)
        code = code if problems else "E408"
        problems += replayed.problems
        if json:
            for event in replayed.events():
                terminal.emit(event)
        else:
            say(out, verifying.replay_table(replayed, width))
    if wire:
        resent = verifying.resend(folder, afresh=afresh, say=note)
        code = code if problems else "E407"
        problems += resent.problems
        if json:
            for event in resent.events(layers):
                terminal.emit(event)
        else:
            say(out, verifying.wire_table(resent, width))
            say(out, verifying.layers_table(resent, width) if layers else [])
    if json:
        terminal.emit({"event": "verified", "run": str(folder), "problems": problems})
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise StorageError(f"{problems[0]}{more}", code=code, where=str(folder))


LISTS = {
    "methods": "what happens beyond plain averaging: fedavg, fedlama, ...",
    "codecs": "how updates are packed for the uplink and the downlink",
    "data": "data sets in the box, and which of them are here",
    "partitions": "rules by which examples are split between clients",
    "presets": "experiments that run as they stand",
    "models": "networks in the box",
    "rules": "how the server combines updates: the mean, and robust ones",
    "recipes": "published experiments, for `lamina reproduce`",
    "runs": "what has been run",
}


@guarded
def list_(
    what: Annotated[str | None, typer.Argument(metavar=f"[{'|'.join(LISTS)}]", show_default=False)] = None,
    run_dir: RunDir = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """What there is; without an argument, what can be listed."""
    from lamina import terminal

    if what is not None and what not in LISTS:
        raise ConfigError(f"list {what}: expected one of {', '.join(LISTS)}", where="command line, argument 1")
    if run_dir is not None and what != "runs":
        raise ConfigError(f"--run-dir is of `lamina list runs`, not of {what or 'a list without an argument'}")
    rows, columns = _rows(what, run_dir)
    out = terminal.console(no_color=no_color)
    if json:
        for row in rows:
            terminal.emit(row)
    elif not rows:
        say(out, ["  none"])
    elif columns is None:
        say(out, terminal.fields([(row["name"], _sentence(row, what)) for row in rows], terminal.width_of(out)))
    else:
        say(out, terminal.table(columns, terminal.width_of(out)))
    say(out, [] if json else _AFTER.get(what, ()))


_AFTER: dict[str | None, tuple[str, ...]] = {
    None: ("", "  e.g. lamina list methods"),
    "methods": (
        "",
        '  several at once: lamina run quickstart "method=[ssfl,fedlama]" method.1.phi=4',
        "  which go together, and in which order: docs/methods/composition.md",
    ),
    "models": ("", "  what one takes, with defaults: lamina explain resnet20, or --json here"),
}


def _rows(what: str | None, run_dir: Path | None) -> tuple[list[dict[str, Any]], list[Column] | None]:
    """The objects of a list, and its columns; none, where sentences are wrapped that a table would drop."""
    match what:
        case None:
            return [{"name": name, "about": about} for name, about in LISTS.items()], None
        case "runs":
            return _runs_listed(run_dir)
        case "data":
            return _data_listed()
        case "recipes":
            return _recipes_listed()
    rows = _named(what)
    return rows, _method_columns(rows) if what == "methods" else None


def _sentence(row: dict[str, Any], what: str | None) -> str:
    takes = row.get("takes") if what != "models" else None  # a network's settings are a page
    return f"{row['about']} · takes {takes}" if takes else str(row["about"])


def _named(what: str) -> list[dict[str, Any]]:
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

        section = {"methods": "method", "codecs": "uplink", "models": "model", "rules": "aggregate"}[what]
        rows = []
        for name, thing in configs.catalogue(section).items():
            defaults = {key: taken.default for key, taken in configs.arguments_of(section, thing).items()}
            said = [key if v is type(v) or repr(v).startswith("<") else f"{key}={v}" for key, v in defaults.items()]
            rows.append({"name": name, "about": configs.about(section, name), "takes": ", ".join(said)})
    return rows


def _method_columns(rows: list[dict[str, Any]]) -> list[Column]:
    """What a method does goes last: its settings stand on its page too."""
    from lamina.terminal import Column

    return [
        Column("methods", [row["name"] for row in rows], left=True),
        Column("takes", [row["takes"] for row in rows], 2, left=True),
        Column("about", [row["about"] for row in rows], 1, left=True),
    ]


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
    from lamina.runs import Run, number_of, runs_root
    from lamina.terminal import Column, share, size

    rows: list[dict[str, Any]] = []
    nothing = dict.fromkeys(("accuracy", "rounds", "rounds_done", "bytes_up", "bytes_down", "uplink"))
    found = runs_root(run_dir).glob("*/*-*/run.json")
    for file in sorted(found, key=lambda file: (file.parent.parent, number_of(file.parent), file)):
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
