"""`lamina chaos`: the user's own experiment, with clients that fail and processes that are killed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli.base import Json, Keys, NoColor, Quiet, RunDir, guarded, say, watcher_for
from lamina.errors import RunError

if TYPE_CHECKING:
    from lamina.survival import Account


def _share(help: str) -> Any:
    return typer.Option(metavar="SHARE", help=help, show_default=False)


@guarded
def chaos(
    target: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", show_default=False)],
    keys: Keys = None,
    drop: Annotated[float, _share("Replies that never come.")] = 0.0,
    late: Annotated[float, _share("Replies that come in the next round.")] = 0.0,
    delay: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Mean on a virtual clock, for faults.reply_deadline_s.", show_default=False
        ),
    ] = 0.0,
    duplicate: Annotated[float, _share("Replies that come twice.")] = 0.0,
    reorder: Annotated[bool, typer.Option("--reorder", help="Replies come in another order.")] = False,
    nan: Annotated[float, _share("Updates with a NaN.")] = 0.0,
    scale: Annotated[float, _share("Updates times 1e20.")] = 0.0,
    shape: Annotated[float, _share("Updates with a layer of another shape.")] = 0.0,
    dtype: Annotated[float, _share("Updates with a layer of another type.")] = 0.0,
    layer: Annotated[float, _share("Updates with a layer nobody asked for.")] = 0.0,
    claim: Annotated[float, _share("Replies that claim a million times their steps.")] = 0.0,
    kill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT@rN", help="worker@r3, run@r7: SIGKILL in this round. Several times.", show_default=False
        ),
    ] = None,
    attack: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="nan, scale, sign_flip, gaussian, one_layer, alie, ipm, label_flip or backdoor: what some "
            "clients do in every round, of one mind.",
            show_default=False,
        ),
    ] = "",
    attackers: Annotated[float, typer.Option(metavar="SHARE", help="Of all clients, those who attack.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of whom it meets.")] = 0,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Make the run once more from the survivors, and compare.")
    ] = True,
    run_dir: RunDir = None,
    json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Train while things go wrong: `lamina chaos exp.toml --drop 0.3 --nan 0.05 --kill run@r7 faults.min_replies=0.5`.

    At the end stands who was asked, what was used and what was refused by which code, and whether the model is that of
    the clients whose messages were used. `lamina explain CODE` explains a code.
    """
    from lamina import config as configs
    from lamina import runs, survival, terminal
    from lamina.chaos import Chaos

    config = configs.load(target, keys or ())
    spec = Chaos(
        drop=drop, late=late, delay=delay, nan=nan, scale=scale, shape=shape, type=dtype, layer=layer, claim=claim,
        duplicate=duplicate, reorder=reorder, kill=tuple(kill or ()), attack=attack, attackers=attackers,
        seed=seed,
    )  # fmt: skip
    survival.expect_survivable(config, spec)
    out = terminal.console(no_color=no_color)
    account = survival.survive(
        config, spec, runs.runs_root(run_dir), watcher_for(out, json, quiet, config.run.log_every), check
    )
    if json:
        terminal.emit({"event": "chaos", "chaos": spec.said(), **account.facts()})
    elif quiet:
        print(account.run)
    else:
        say(out, ["", *terminal.fields(_pairs(account), terminal.width_of(out))])
    if account.status != "done":
        raise RunError(account.why, code=account.code or None, where=account.run)
    if account.right is False or not account.adds_up:
        said = "the model is not that of the survivors" if account.right is False else "the account does not add up"
        raise RunError(said, where=account.run, remedy="this is a mistake in lamina: please report it with chaos.json")


def _pairs(account: Account) -> list[tuple[str, str]]:
    refused = ", ".join(f"{n:,} {code}" for code, n in account.refused.items()) or "none"
    beside = ", ".join(f"{n:,} {code}" for code, n in account.beside.items())
    right = {True: "that of the survivors, to the bit", False: "NOT that of the survivors", None: account.why}
    return [
        ("rounds", f"{account.rounds:,} made, {account.skipped:,} of them skipped, resumed {account.resumed:,} times"),
        ("replies", f"{account.asked:,} asked for, {account.answered:,} came, {account.used:,} used"),
        ("not used", refused),
        ("beside", beside or "none: no second answers, none that came late"),
        ("bytes", f"{account.bytes_up:,} up, {account.bytes_down:,} down"),
        ("model", right[account.right]),
        *(
            []
            if account.fooled is None
            else [("backdoor", f"{account.fooled:.1%} of marked pictures are taken for a 0")]
        ),
        ("run", account.run),
    ]
