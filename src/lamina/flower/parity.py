"""The same rounds in the simulator and through Flower's processes: one model, one ledger, to the bit and the byte."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lamina import runs
from lamina.config import Config, build, data_of
from lamina.errors import RunError
from lamina.flower import project
from lamina.flower.rehearsal import Rehearsal
from lamina.flower.settings import deployable
from lamina.folder import CLIENTS, read_log
from lamina.remote import Roll, register
from lamina.runs import Run

_LEDGERS = ("bytes.jsonl", CLIENTS)  # by layer and direction; by client
_MOST = 5  # differences that are told


class Compared(NamedTuple):
    """One config, both ways.

    Args:
        simulator, flower: sha256 of the global model after the last round.
        bytes_up, bytes_down: of the simulator's ledger.
        differences: the first rows that are not the same; empty when all are.
        carried: what Flower carried, summed over the rounds (`post.Carried`).
        traffic: what Flower itself counted between its SuperLink and the nodes, all in all.
    """

    title: str
    simulator: str
    flower: str
    bytes_up: int
    bytes_down: int
    differences: tuple[str, ...]
    carried: dict[str, int]
    traffic: dict[str, int]

    @property
    def same(self) -> bool:
        return self.simulator == self.flower and not self.differences


def compare(
    configs: Sequence[Config], rounds: int = 3, nodes: int = 2, say: Callable[[str], None] = lambda text: None,
    *, folder: Path | None = None, tls: bool = False,
) -> Iterator[Compared]:  # fmt: skip
    """One after the other, through the same SuperLink. All train with the engine `loop`, whose bits do not depend on
    how clients are dealt out.

    Args:
        folder: for runs and logs; None: one that is gone afterwards.

    Raises:
        ConfigError: E118 what cannot be deployed.
        RunError: a run that fails.
    """
    fixed = [_fixed(deployable(config), rounds) for config in configs]
    with _folder(folder) as top, Rehearsal(top, nodes, tls=tls) as rehearsal:
        for i, config in enumerate(fixed):
            here = top / f"{i}"
            say(f"{config.method_title}: {rounds} rounds in the simulator")
            local = _simulated(config, here / "simulator")
            say(f"{config.method_title}: {rounds} rounds through Flower, {nodes} nodes")
            project.write(config, here / "app")
            run = rehearsal.submit(here / "app", {"run-dir": str(here / "runs"), "clients": local.info["clients"]})
            outcome = rehearsal.wait(run, lambda event: say(event["text"]) if event["event"] == "note" else None)
            if outcome.exit_code or outcome.folder is None:
                raise RunError(f"{config.method_title} through Flower: {outcome.error}", code="E316", where="parity")
            yield _compared(config, local, Run.open(outcome.folder), outcome.traffic)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="lamina-parity-") as made:
        yield Path(made)


def _fixed(config: Config, rounds: int) -> Config:
    options = config.run.model_copy(update={"keep_clients_log": True})
    changes = {"rounds": rounds, "engine": "loop", "workers": None, "store": "memory", "run": options}
    return config.model_copy(update=changes)


def _simulated(config: Config, folder: Path) -> Run:
    data = data_of(config)
    names = [*register([Roll.of(data)])]  # the numbers that clients have by their nodes' rolls
    fed = build(config, data=data.among(names))
    return runs.fit(fed, config.rounds, folder, config=config, progress=False)


def _compared(config: Config, local: Run, remote: Run, traffic: dict[str, int]) -> Compared:
    differences = [text for log in _LEDGERS for text in _differences(log, local, remote)]
    log = remote.path / "flower.jsonl"
    rows = [*read_log(log, log.stat().st_size)]
    carried = {key: sum(row[key] for row in rows) for key in rows[0] if key != "round"}
    title = f"{config.method_title}, up {local.info['uplink']}, down {local.info['downlink']}"
    finals = str(local.info["final_sha256"]), str(remote.info["final_sha256"])
    sums = int(local.info["bytes_up"]), int(local.info["bytes_down"])
    return Compared(title, *finals, *sums, tuple(differences[:_MOST]), carried, traffic)


def _differences(log: str, local: Run, remote: Run) -> list[str]:
    ours, theirs = (_rows(run, log) for run in (local, remote))
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return [
        f"{log} {' '.join(map(str, key))}: {ours.get(key, 'nothing')} in the simulator, {theirs.get(key, 'nothing')}"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def _rows(run: Run, log: str) -> dict[tuple[Any, ...], Any]:
    """What was counted, by what it was counted for."""
    found: dict[tuple[Any, ...], Any] = {}
    for row in read_log(run.path / log, run.info["lengths"][log]):
        if "layer" in row:
            found[row["round"], row["phase"], row["direction"], row["layer"]] = row["bytes"]
        else:
            found[row["round"], "client", row["name"]] = {key: row[key] for key in row if key not in ("round", "name")}
    return found
