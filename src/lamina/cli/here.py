"""`lamina data` and `lamina doctor`: the data sets, and this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli import looking
from lamina.cli.base import Json, Keys, NoColor, RunDir, guarded, say

if TYPE_CHECKING:
    from lamina.engine.mkl import Gain

app = typer.Typer(help="The real data sets in the box.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
@guarded
def data_list(json: Json = False, no_color: NoColor = False) -> None:
    """The data sets, and which of them are here."""
    looking.list_("data", None, json, no_color)


@app.command("fetch")
@guarded
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
        info = data.DATASETS.get(name)
        if info is not None and not info.download:
            data.load(name)  # its package is here, or E219 says which one is not
            if json:
                terminal.emit({"event": "fetched", "data": name, "folder": None, "source": info.sources[0]})
            else:
                say(out, [f"  {name}  nothing to fetch: it comes with the {info.sources[0]}, which is here"])
            continue
        with terminal.Fetching(out, json) as progress:
            stored = data.download(name, verify=verify, progress=progress)
        if json:
            terminal.emit({"event": "fetched", "data": name, "folder": str(stored.folder), "source": stored.source})
        else:
            say(out, [f"  {name}  {stored.folder}  from {stored.source}" + ("  verified" if verify else "")])


@app.command("show")
@guarded
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
    say(out, terminal.split_lines(split, terminal.width_of(out)))


@guarded
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
    extras = machine.extras()
    sets = [f"{name} {'yes' if data.cached(name) else 'no'}" for name, info in data.DATASETS.items() if info.download]
    facts: dict[str, Any] = {
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
    }
    if json:
        here = [extra for extra, missing in extras.items() if not missing]
        lacking = [{"extra": extra, "packages": missing} for extra, missing in extras.items() if missing]
        terminal.emit({**facts, "extras": {"here": here, "missing": lacking}})
        return
    facts["extras"] = _said(extras)
    out = terminal.console(no_color=no_color)
    say(out, terminal.fields(list(facts.items()), terminal.width_of(out)))


def _said(extras: Mapping[str, Sequence[str]]) -> str:
    """Which extras are here, which are not for want of what."""
    here = ", ".join(extra for extra, missing in extras.items() if not missing)
    lacking = ", ".join(f"{extra} ({', '.join(missing)})" for extra, missing in extras.items() if missing)
    said = [f"here: {here or 'none'}"] + ([f"missing: {lacking}", "pip install 'lamina[NAME]'"] if lacking else [])
    return " · ".join(said) if extras else "unknown: lamina is not installed as a package"


def _gained(gain: Gain | str) -> str:
    if isinstance(gain, str):
        return gain
    return (
        f"products of matrices at {gain.before:.0f} GFLOP/s a core, {gain.after:.0f} with LAMINA_MKL=amd in the "
        f"environment (error {gain.error:.0e}; no documented switch, so a run records it)"
    )
