"""What a run is told beside its config, in Flower's words: a run's keys, and a node's.

Both are flat tables of plain values, given as `flwr run --run-config` and `flower-supernode --node-config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from lamina import wire
from lamina.config import CENTRALISED, Config, load, secure_of
from lamina.errors import ConfigError, expect, is_number, is_whole
from lamina.remote.keys import Keys, opened
from lamina.remote.message import expect_in_the_clear, expect_raw, expect_taken_together

CONFIG_FILE = "lamina.toml"


@dataclass(frozen=True)
class RunKeys:
    """Keys of `run_config`.

    Args:
        resume: a run folder at the server to go on with; "": a new one.
        rounds: in total; 0: as the config says.
        clients: wait until so many clients are there; 0: as many as the server's own data set has, or one.
        nodes: and so many nodes.
        wait_s: seconds to wait for them.
        together: a node sends its clients' mean as one message; for a raw uplink.
        evaluate: the server loads the config's data for its test set.
        run_dir: where runs lie at the server; "": LAMINA_RUNS, else ./runs of the SuperLink.
        report: file at the server for what is also printed, as JSON lines; "": none.
    """

    resume: str = ""
    rounds: int = 0
    clients: int = 0
    nodes: int = 1
    wait_s: float = 600.0
    together: bool = False
    evaluate: bool = True
    run_dir: str = ""
    report: str = ""

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> RunKeys:
        """Of a run's config; keys that are not ours are left to others. Raises ConfigError E103."""
        own = {f.name.replace("_", "-"): f for f in fields(cls)}
        made = {}
        for key, value in table.items():
            if key not in own:
                continue
            default = own[key].default
            fine = is_whole(value, 0) if type(default) is int else isinstance(value, type(default))
            if type(default) is float:
                fine = is_number(value, 0)
            kind = {int: "a whole number >= 0", float: "a number >= 0", bool: "true or false", str: "a text"}
            expect(fine, f"{key}: expected {kind[type(default)]}, got {value!r}", code="E103", where="run config")
            made[own[key].name] = value
        return cls(**made)

    def table(self) -> dict[str, Any]:
        return {f.name.replace("_", "-"): getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class NodeKeys:
    """Keys of `node_config`.

    Args:
        mine: which of the clients that the config's data has are here.
        state_dir: where this node keeps what its clients remember.
        secret_dir: where secrets of a secure sum are during a round; None: in memory, see `lamina.remote.FileVault`.
        cores: of the machine that its clients are trained on; None: all.
        data: `data.*` and `sign.*` keys of the config that are this node's own, as on a command line.
    """

    mine: str
    state_dir: Path
    data: tuple[str, ...]
    secret_dir: Path | None = None
    cores: int | None = None

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> NodeKeys:
        """Raises ConfigError E103."""
        part = {"partition-id", "num-partitions"} & table.keys()
        expect(len(part) != 1, f"{', '.join(part)}: expected partition-id and num-partitions", where="node config")
        expect(not part or "clients" not in table, "clients, partition-id: expected one of them", where="node config")
        mine = str(table.get("clients", ""))
        if part:
            mine = f"{table['partition-id']}/{table['num-partitions']}"
        cores = table.get("cores")
        fine = cores is None or is_whole(cores, 1)
        expect(fine, f"cores={cores!r}: expected a whole number >= 1", code="E103", where="node config")
        whose = sorted((key, value) for key, value in table.items() if key != "cores")
        named = xxhash.xxh3_64_hexdigest(repr(whose).encode())
        folder = table.get("state-dir") or Path.home() / ".lamina" / "nodes" / named
        data = [f"{key}={_said(value)}" for key, value in table.items() if key.startswith(("data.", "sign."))]
        secret = table.get("secret-dir") or None
        secret_dir = None if secret is None else Path(str(secret)).expanduser()
        return cls(mine, Path(str(folder)).expanduser(), tuple(data), secret_dir, cores)

    def chosen(self, count: int) -> list[int]:
        """Positions among `count` clients. Raises ConfigError E103."""
        part, _, parts = self.mine.partition("/")
        if parts:
            fine = part.isdecimal() and parts.isdecimal() and int(part) < int(parts)
            expect(fine, f"partition {part} of {parts}: expected 0 <= partition-id < num-partitions", code="E103")
            first, end = (count * (int(part) + i) // int(parts) for i in (0, 1))
            return list(range(first, end))
        chosen: dict[int, None] = {}
        for word in filter(None, self.mine.replace(" ", "").split(",")):
            first_text, _, last_text = word.partition("-")
            ends = (first_text, last_text or first_text)
            if not all(end.isdecimal() for end in ends) or int(ends[1]) >= count or int(ends[0]) > int(ends[1]):
                raise ConfigError(
                    f"clients={self.mine!r}: expected positions from 0 to {count - 1}, such as '0-7' or '0,2,5-9'",
                    code="E103",
                    where="node config",
                )
            chosen |= dict.fromkeys(range(int(ends[0]), int(ends[1]) + 1))
        return list(chosen) if self.mine else list(range(count))


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def loaded(path: Path, arguments: tuple[str, ...] = ()) -> Config:
    """The app's config; nothing of this machine's environment goes into it, and no store: clients have a shelf.
    Raises ConfigError."""
    return deployable(load(path, arguments, env={})).model_copy(update={"store": "memory"})


def keys_of(config: Config) -> Keys | None:
    """This end's keys; None where nothing is signed. Raises ConfigError E123, E124."""
    return None if config.sign.key is None else opened(config.sign.key, config.sign.roster)


def deployable(config: Config) -> Config:
    """Raises ConfigError (E118) for what has no clients that are elsewhere."""
    expect(
        all(part.name != CENTRALISED for part in config.method),
        "method: centralised has all examples in one place",
        code="E118",
        where=config.origin("method"),
    )
    return config


def expect_together(config: Config) -> None:
    """Raises ConfigError (E118) for an uplink with which a node's messages cannot be taken together, before anything is
    started."""
    part = config.uplink
    expect_raw(part.entry if part.entry is not None else wire.parse({"name": part.name, **part.arguments}))
    expect_taken_together(config.aggregate.title, config.faults.norm)
    expect_in_the_clear(secure_of(config))


def back(config: Config) -> int:
    """Rounds between two checkpoints of the server, over which nodes must remember."""
    every = config.run.checkpoint_every
    return 1 if every == "auto" else every
