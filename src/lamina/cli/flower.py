"""`lamina flower` and `lamina parity`: the same experiment on a real network."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli.base import Json, Keys, NoColor, Quiet, RunDir, complain, guarded, say, written
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="The same experiment on a real network, through Flower.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("new")
@guarded
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
    written(files, json, no_color)


@app.command("keys")
@guarded
def flower_keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", show_default=False)],
    host: Annotated[
        list[str] | None, typer.Option("--host", metavar="NAME", help="How the server is reached; again for more.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="How many SuperNode keys.")] = 2,
    days: Annotated[int, typer.Option("--days", help="For which the certificates hold.")] = 365,
    sign: Annotated[
        str | None,
        typer.Option("--sign", metavar="hmac|ed25519", help="Also keys to sign with: one for all, or one for each."),
    ] = None,
    clients: Annotated[
        list[str] | None,
        typer.Option("--clients", metavar="NAMES", help="With ed25519: those of a node, such as 0-7; once for each."),
    ] = None,
    json: Json = False,
    no_color: NoColor = False,
) -> None:
    """Make certificates for the server and keys for its nodes: `lamina flower keys keys --host fl.example.org`."""
    from lamina.flower import keys as keyring

    files = keyring.write(folder, host or ["127.0.0.1", "localhost"], nodes, days, sign, clients or ())
    written(files, json, no_color)


@app.command("rehearse")
@guarded
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
    from lamina.flower.settings import expect_together

    config = configs.load(target, keys or ())
    if together:
        expect_together(config)
    out = terminal.console(no_color=no_color)

    def see(event: dict[str, Any]) -> None:
        if json and event["event"] != "line":
            terminal.emit(event)
        elif not json and not quiet and event["event"] == "line":
            say(out, [event["text"]])

    rehearsal.expect_guarded(host, tls)
    with _ending(), tempfile.TemporaryDirectory(prefix="lamina-rehearsal-") as made:
        top = Path(made)
        project.write(config, top / "app")
        if not json and not quiet:
            say(out, [f"  starting a SuperLink and {nodes} SuperNode{'s' if nodes > 1 else ''}"])
        with rehearsal.Rehearsal(top, nodes, tls=tls, host=host) as rehearsed:
            said = {"run-dir": str(runs.runs_root(run_dir).resolve()), "together": together}
            outcome = rehearsed.wait(rehearsed.submit(top / "app", said), see)
    if outcome.exit_code:
        complain(outcome.error)
        raise typer.Exit(outcome.exit_code)
    if quiet and not json:
        print(outcome.folder)


@guarded
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
                say(out, terminal.fields(_compared(row), terminal.width_of(out)))
    if not same:
        raise typer.Exit(1)


def _noted(out: Console) -> Callable[[str], None]:
    return lambda text: say(out, [f"  {text}"])


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
