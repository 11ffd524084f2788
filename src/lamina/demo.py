"""The demonstration: FedAvg and FedLAMA on the same clients, and what each of them sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lamina import runs
from lamina.compare import compare
from lamina.comparison import as_text
from lamina.config import Config, build, data_of, load
from lamina.errors import ConfigError, DataError, StorageError
from lamina.runs import Run, Watcher
from lamina.terminal import Fetching, fields

PHI = 4
EVERY = 2  # rounds between two tests, which cost as much as a third of the training
SETS = {
    "fashion_mnist": ("fashion-mnist-cnn", ()),
    "digits": ("quickstart", ("data.clients=20", "cohort=10")),
}


def demo(rounds: int, data: str | None, root: Path, watcher: Watcher, fetching: Fetching) -> list[Run]:
    """FedAvg, then FedLAMA(phi=4), each in its run folder.

    Args:
        data: one of `SETS`; None: Fashion-MNIST if it is here or can be fetched, else the digits, and it is said.
    """
    if data is not None and data not in SETS:
        raise ConfigError(f"data={data}: expected one of {', '.join(SETS)}", where="--data")
    if data is None:
        data = "fashion_mnist"
        try:
            with fetching as progress:
                data_of(_config(data, rounds, "method=fedavg"), progress)
        except (DataError, StorageError) as error:
            watcher.note(f"Fashion-MNIST cannot be had here, so this demo runs on scikit-learn's digits. {error}")
            data = "digits"
    made = []
    for method in (("method=fedavg",), ("method=fedlama", f"method.phi={PHI}")):
        config = _config(data, rounds, *method)
        made.append(runs.fit(build(config), config.rounds, root=root, progress=watcher, config=config))
    return made


def verdict(made: Sequence[Run], width: int | None) -> list[str]:
    rows = compare(made)
    share = 100 * rows[1]["bytes_up"] / rows[0]["bytes_up"]
    before, after = rows[0]["accuracy"], rows[1]["accuracy"]
    kept = "" if before is None or after is None else f", at {100 * (after - before):+.1f} points of accuracy"
    said = (
        f"FedLAMA(phi={PHI}) sent {share:.1f} % of FedAvg's uplink bytes ({rows[1]['bytes_up']:,} of "
        f"{rows[0]['bytes_up']:,}){kept}"
    )
    if all(row.in_sync for row in made[1].records):
        said = f"no layer of FedLAMA(phi={PHI}) has waited yet, so nothing was saved: more rounds show a difference"
    said += f" · FedLAMA keeps each cohort for {PHI} rounds, FedAvg draws one per round · one seed: no more than a demo"
    paths = " and ".join(row["run"] for row in rows)
    return [*as_text(rows, width), "", *fields([("so", said), ("runs", paths)], width)]


def _config(data: str, rounds: int, *method: str) -> Config:
    preset, settings = SETS[data]
    return load(
        preset,
        [f"name=demo-{data.replace('_', '-')}", f"rounds={rounds}", f"evaluate_every={EVERY}", *settings, *method],
        env={},
    )
