"""Runs side by side: what each reached, what it sent, and what it sent until it reached it.

Runs whose configs differ only in `seed`, and that were to have equally many rounds, are one row: means over seeds, with
deviations. A run that was made from no config is a row of its own, and so is a second run of a seed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from lamina.data.client_data import POOLED
from lamina.engine import bits
from lamina.errors import ConfigError, StorageError, expect, is_number
from lamina.folder import counts, read_environment, standing
from lamina.runs import Run

_SHARE = 0.95  # of the best accuracy: the target, where nobody names one
_SPREAD = (
    "accuracy",
    "loss",
    "best",
    "personal_accuracy",
    "bytes_up",
    "bytes_down",
    "bytes_total",
    "rounds",
    "seconds",
)
_NAMES = ("name", "entry")


class Reached(NamedTuple):
    """Where a run first reached an accuracy, and what it had sent until then, both ways."""

    round: int
    bytes: int


def compare(runs: Sequence[Run], *, force: bool = False, target: float | None = None) -> list[dict[str, Any]]:
    """A row per experiment: accuracy in rounds in sync, bytes, and how many times fewer than the first row.

    A run on pooled data (centralised) may stand beside any on the same examples. `accuracy` is that of the clients' own
    models where `personal` says so. `settings` are the keys in which rows of the same parts differ.

    Args:
        force: also runs on different splits.
        target: the accuracy of `to_target`; None: 95 % of the best that any row reached, rounded down to a hundredth.

    Raises:
        ConfigError: E109 when the runs are of different splits, unless `force`; a target that is no share of 1.
    """
    expect(bool(runs), "compare: expected one run or more", where="runs")
    if target is not None:
        fits = is_number(target, 0.0, 1.0 + 1e-12) and target > 0
        expect(fits, f"target={target}: expected 0 < target <= 1", where="--target", remedy="0.75 is 75 %")
    if not force:
        _expect_one_split(runs)
    groups = _folded(runs)
    rows = [_row(group) for group in groups]
    tops = [row["best"] for row in rows if row["best"] is not None]
    if target is None and tops and max(tops) > 0:
        target = math.floor(100 * _SHARE * max(tops) + 1e-9) / 100 or None
    first, settings = rows[0], _settings([group[0].settings for group in groups])
    for group, row, own in zip(groups, rows, settings, strict=True):
        total, up = row["bytes_total"], first["bytes_up"]
        row |= {"vs_first": first["bytes_total"] / total if total else None}
        row |= {"up_vs_first": row["bytes_up"] / up if up else None, "settings": own}
        row |= _until(group, target)
    return [{**row, "pareto": front} for row, front in zip(rows, pareto(rows), strict=True)]


def bytes_to(run: Run, target: float) -> Reached | None:
    """Where a run first reached this accuracy in a tested round in sync; None: it never did."""
    for row in run.records:
        reached = standing(row, run.personal)
        if counts(row) and reached is not None and reached >= target:
            return Reached(row.round, row.total_up + row.total_down)
    return None


def pareto(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Of each row, whether no other one is at least as accurate for at most as many bytes, and better in one of them.
    By loss, where no row has an accuracy; a row without a figure is never on the front."""
    tested = any(row["accuracy"] is not None for row in rows)

    def worth(row: dict[str, Any]) -> float | None:
        loss = row["loss"]
        return row["accuracy"] if tested else None if loss is None else -loss

    places = [(worth(row), row["bytes_total"]) for row in rows]

    def beaten(mine: float, sent: float) -> bool:
        return any(w is not None and w >= mine and b <= sent and (w > mine or b < sent) for w, b in places)

    return [mine is not None and not beaten(mine, sent) for mine, sent in places]


def measured(run: Run) -> dict[str, Any]:
    """The figures of one run: accuracies of rounds in sync, bytes of all."""
    info, final, best = run.info, run.final, run.best
    return {
        "accuracy": final and standing(final, run.personal),
        "loss": final and final.loss,
        "accuracy_round": final and final.round,
        "best": best and standing(best, run.personal),
        "best_round": best and best.round,
        "personal_accuracy": final and final.personal_accuracy,
        "personal": run.personal,
        "bytes_up": info["bytes_up"],
        "bytes_down": info["bytes_down"],
        "bytes_total": info["bytes_up"] + info["bytes_down"],
        "rounds": info["rounds_done"],
        "seconds": info["seconds"],
    }


def mean(values: Sequence[Any]) -> Any:
    """None unless every run has the number. Of whole numbers it is whole where it can be."""
    if not values or any(v is None for v in values):
        return None
    return statistics.mean(values) if all(isinstance(v, int) for v in values) else statistics.fmean(values)


def deviation(values: Sequence[Any]) -> float | None:
    """With n - 1; None for fewer than two."""
    return None if len(values) < 2 or any(v is None for v in values) else float(statistics.stdev(values))


# ---- seeds


class _Seen(NamedTuple):
    run: Run
    settings: dict[str, Any] | None  # what stands in its config and can change the result; None: it was made from none


def _folded(runs: Sequence[Run]) -> list[list[_Seen]]:
    """The runs of every row, in the order in which they were given."""
    groups: dict[str, list[_Seen]] = {}
    times: Counter[str] = Counter()
    for number, run in enumerate(runs):
        settings, entries = _recorded(run)
        info = run.info
        rest = {key: value for key, value in (settings or {}).items() if key != "seed"}
        done = info["rounds_done"] if info["status"] != "done" else None  # of done ones each may have stopped early
        key = json.dumps([rest, entries, info["rounds"], done, info["split_sha256"], info["personal"]])
        key = str(number) if settings is None else key
        again = f"{key} {info['seed']}"
        times[again] += 1
        groups.setdefault(f"{times[again]} {key}", []).append(_Seen(run, settings))
    return list(groups.values())


def _recorded(run: Run) -> tuple[dict[str, Any] | None, Any]:
    try:
        environment = read_environment(run.path)
    except StorageError:
        return None, None
    return environment.get("config"), environment.get("entries")


def _row(group: Sequence[_Seen]) -> dict[str, Any]:
    runs = [seen.run for seen in group]
    own = [measured(run) for run in runs]
    info = runs[0].info
    codec = info["uplink"] if info["downlink"] == "fp32" else f"{info['uplink']} / {info['downlink']}"
    row: dict[str, Any] = {
        "run": str(runs[0].path),
        "runs": [str(run.path) for run in runs],
        "seeds": [run.info["seed"] for run in runs],
        "n": len(runs),
        "method": info["method"],
        "codec": codec,
        "status": " / ".join(dict.fromkeys(run.info["status"] for run in runs)),
    }
    for key in own[0]:
        values = [figures[key] for figures in own]
        if key in _SPREAD:
            row |= {key: mean(values), f"{key}_deviation": deviation(values)}
        else:
            row[key] = values[0] if len(set(values)) == 1 else None
    return row | {
        "partition": info["partition"],
        "split_sha256": info["split_sha256"],
        "pool_sha256": info["pool_sha256"],
        "initial_sha256": [run.info["initial_sha256"] for run in runs],
        "final_sha256": [run.info["final_sha256"] for run in runs],
        "torch": " / ".join(dict.fromkeys(run.info["torch"] for run in runs)),
        "engine": " / ".join(dict.fromkeys(run.info["engine"] for run in runs)),
        "bits": " / ".join(dict.fromkeys(_bits(run) for run in runs)),
    }


def _bits(run: Run) -> str:
    engine = run.info["engine"]
    return f"threads on {run.info.get('cores')} cores" if engine == "threads" else bits(engine)


def _until(group: Sequence[_Seen], target: float | None) -> dict[str, Any]:
    found = [None if target is None else bytes_to(seen.run, target) for seen in group]
    return {
        "target": target,
        "to_target": mean([one and one.bytes for one in found]),
        "to_target_deviation": deviation([one and one.bytes for one in found]),
        "to_target_round": mean([one and one.round for one in found]),
        "reached": sum(one is not None for one in found),
    }


def _settings(configs: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    """Key -> value, for each, of what is not the same in all that have the key; methods, codecs and the seed are
    columns of their own."""
    found: dict[str, set[str]] = {}
    for config in configs:
        for key, value in (config or {}).items():
            found.setdefault(key, set()).add(json.dumps(value))

    def told(key: str) -> bool:
        section, last = key.split(".")[0], key.rsplit(".", 1)[-1]
        own_column = section in ("uplink", "downlink", "seed") or (section == "method" and last in _NAMES)
        return not own_column and len(found[key]) > 1

    def written(key: str, config: dict[str, Any]) -> str:
        return key if "method.1.name" in config else key.replace("method.0.", "method.", 1)

    return [{written(key, one): value for key, value in one.items() if told(key)} for one in (c or {} for c in configs)]


def _expect_one_split(runs: Sequence[Run]) -> None:
    split = next((run for run in runs if run.info["partition"] != POOLED), runs[0])
    for run in runs:
        pooled = run.info["partition"] == POOLED
        moved = not pooled and run.info["split_sha256"] != split.info["split_sha256"]
        what = "another split" if moved else "other examples"
        if moved or run.info["pool_sha256"] != split.info["pool_sha256"]:
            raise ConfigError(
                f"{run.path.name} has {what} than {split.path.name}: accuracies are not comparable",
                code="E109",
                where=str(run.path),
                remedy="give them the same data.name, clients, partition and data.seed; or --force",
            )
