"""Many runs of one config: every combination of values that keys are given, each with several seeds.

runs/<name>/<NNN>-<method>/   run folders, as those of `lamina run`; what is finished is not run again (by the hash of
                              the config, which is of all keys that can change the result), what was stopped goes on

A sum depends on the number of threads that share it, and how many cores a run has on `--jobs`: so here `auto` never
takes the engine "threads", and results do not depend on `--jobs`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lamina import runs
from lamina.config import Config, build, resolve
from lamina.data import DATASETS, cached, download
from lamina.engine import processes
from lamina.errors import ConfigError, LaminaError, RunError, StorageError, expect, is_whole
from lamina.federation import Federation
from lamina.folder import other_settings, read_environment, read_info, standing
from lamina.jobs import Job, follow, going
from lamina.redaction import hidden
from lamina.runs import Run, Watcher
from lamina.settings import IDLE, Values, collect
from lamina.terminal import Fetching, Quiet

DIVERGED = ("E310", "E312")  # no message of a round could be used: a result of its settings
Told = Callable[[dict[str, Any]], None]


class Point(NamedTuple):
    """One run of a sweep."""

    swept: dict[str, str]  # key -> value, of the keys with several
    seed: int
    values: Values
    config: Config

    @property
    def title(self) -> str:
        return " ".join([*(f"{key}={value}" for key, value in self.swept.items()), f"seed={self.seed}"])


class Swept(NamedTuple):
    """What came out, in the order of the points."""

    runs: list[Run]
    failed: list[dict[str, Any]]  # {"run", "settings", "seed", "error"}; the folder is None where it came to none


class Stopped(KeyboardInterrupt):
    """Ctrl-C: what ran is committed, and the same call goes on from there."""

    def __init__(self, exit_code: int, done: int, total: int):
        super().__init__(f"stopped: {done} of {total} runs are finished; the same command goes on from here")
        self.exit_code = exit_code


# ---- what to run


def points(target: str | Path, arguments: Sequence[str], seeds: int | None = None) -> list[Point]:
    """Every combination, the first key slowest, all with the first seed before any with the second.

    Args:
        arguments: `key=a,b,c`, see `alternatives`.
        seeds: 0 to seeds - 1 as `seed`; None: as the config says.

    Raises:
        ConfigError: E101 to E106 as a run would; E103 for two points that are the same experiment.
    """
    fits = seeds is None or is_whole(seeds, 1)
    expect(fits, f"--seeds={seeds}: expected a whole number >= 1", code="E103", where="--seeds")
    keys = [argument.partition("=") for argument in arguments]
    for number, (key, *_) in enumerate(keys):
        again = key in [other for other, *_ in keys[:number]]
        expect(not again, f"{key} is given twice", where=f"command line, argument {number + 2}", remedy="key=a,b")
    choices = [
        alternatives(text, f"{key}, command line, argument {i}") for i, (key, _, text) in enumerate(keys, start=2)
    ]
    drawn: Sequence[int | None] = [None] if seeds is None else range(seeds)
    if seeds is not None and any(key == "seed" for key, *_ in keys):
        raise ConfigError(
            "seed is given, and --seeds too", where="--seeds", remedy="one of them: seed=3,7 or --seeds 2"
        )
    made: dict[str, Point] = {}
    for seed, chosen in itertools.product(drawn, itertools.product(*choices)):
        said = [f"{key}{equals}{value}" for (key, equals, _), value in zip(keys, chosen, strict=True)]
        values = collect(target, said, None, Config.model_fields)
        if seed is not None:
            values["seed",] = (seed, "--seeds")
        config = resolve(values)
        several = zip(keys, choices, chosen, strict=True)
        swept = {key: value for (key, *_), known, value in several if len(known) > 1 and key != "seed"}
        point = Point(swept, config.seed, values, config)
        other = made.setdefault(f"{config.name} {config.sha256}", point)
        expect(
            other is point,
            f"{point.title} and {other.title} are the same experiment",
            code="E103",
            where="command line",
            remedy=f"keys that cannot change the result ({', '.join(IDLE)}) have one value in a sweep",
        )
    return list(made.values())


def alternatives(text: str, where: str) -> list[str]:
    """The values between commas; those inside brackets, braces and quotes separate nothing.

    Raises:
        ConfigError: E101 where one is empty.
    """
    found, depth, quote, escaped = [""], 0, "", False
    for letter in text:
        if letter == "," and not depth and not quote:
            found.append("")
            continue
        if quote:
            quote = "" if letter == quote and not escaped else quote
            escaped = letter == "\\" and not escaped and quote == '"'
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        found[-1] += letter
    values = [value.strip() for value in found]
    expect(all(values) or values == [""], f"{text!r}: a value between commas is empty", where=where)
    return values


# ---- running


def sweep(
    planned: Sequence[Point],
    root: str | Path | None,
    jobs: int,
    watcher: Watcher,
    told: Told,
    fetching: Fetching | None = None,
) -> Swept:
    """Runs what is not finished yet.

    Args:
        root: where run folders lie; None: LAMINA_RUNS, else ./runs.
        jobs: runs at once. One runs in this process; several are processes, each with its share of the cores.
        watcher: looks on where one runs at a time.
        told: is told {"event": "sweep" | "start" | "end" | "failed", ...} as it happens.

    Raises:
        ConfigError: E103 for jobs that are none, E118 for an engine whose results depend on the cores.
        Stopped: Ctrl-C, after every run has been committed; a second one stops at once.
    """
    expect(is_whole(jobs, 1), f"--jobs={jobs}: expected a whole number >= 1", code="E103", where="--jobs")
    for point in planned if jobs > 1 else ():
        if point.config.engine == "threads":
            message = "engine=threads sums on as many cores as it is given, so results would depend on --jobs"
            where = point.config.origin("engine")
            raise ConfigError(message, code="E118", where=where, remedy="engine=processes, or --jobs 1")
    top = runs.runs_root(root)
    folders = [_folder_of(top, point.config) for point in planned]
    to_do = [i for i, point in enumerate(planned) if finished(folders[i], point.config) is None]
    told({"event": "sweep", "runs": len(planned), "finished": len(planned) - len(to_do), "to_do": len(to_do)})
    for name in {str(planned[i].config.data.name) for i in to_do if planned[i].config.data.name in DATASETS}:
        if DATASETS[name].download and not cached(name) and fetching is not None:
            with fetching as progress:
                download(name, progress=progress)
    errors: dict[int, str] = {}
    outcomes = (
        _one_by_one(planned, folders, to_do, top, watcher, told)
        if jobs == 1
        else _at_once(planned, folders, to_do, top, jobs, told)
    )
    with contextlib.closing(outcomes):
        for i, folder, error in outcomes:
            folders[i] = folder
            if error is not None:
                errors[i] = error
            told(_end(planned[i], folder, error))
    made = [Run.open(folder) for folder in folders if folder is not None]
    failed = [{**_naming(planned[i], folders[i]), "error": error} for i, error in sorted(errors.items())]
    return Swept(made, failed)


_Outcomes = Generator[tuple[int, Path | None, str | None]]  # number of the point, its folder, what went wrong


def _one_by_one(
    planned: Sequence[Point],
    folders: Sequence[Path | None],
    to_do: Sequence[int],
    top: Path,
    watcher: Watcher,
    told: Told,
) -> _Outcomes:
    for count, i in enumerate(to_do):
        point = planned[i]
        folder = folders[i] or runs.new_folder(point.config.name, point.config.method_title, top)
        told({"event": "start", **_naming(point, folder)})
        error = None
        try:
            run_once(folder, point.config, watcher, federation)
        except runs.Interrupted as stop:
            raise Stopped(stop.exit_code, len(planned) - len(to_do) + count, len(planned)) from stop
        except LaminaError as failure:
            error = str(failure)
        except Exception as failure:  # the model's, the data's, the method's: the other runs may do without it
            error = f"E300  {type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        finally:
            runs.discard(folder)
        yield i, folder if (folder / "run.json").exists() else None, error


def _at_once(
    planned: Sequence[Point],
    folders: Sequence[Path | None],
    to_do: Sequence[int],
    top: Path,
    jobs: int,
    told: Told,
) -> _Outcomes:
    def begun(i: int) -> Job:
        point = planned[i]
        folder = folders[i] or runs.new_folder(point.config.name, point.config.method_title, top)
        told({"event": "start", **_naming(point, folder)})
        return Job(i, folder, json.dumps({"folder": str(folder), "values": plain(point.values)}))

    done = len(planned) - len(to_do)
    with runs.Interrupts() as interrupts:
        for job, error in going("lamina.sweep", (begun(i) for i in to_do), jobs, lambda: interrupts.asked):
            runs.discard(job.folder)
            if error is None or not interrupts.asked:
                done += error is None
                yield job.number, job.folder if (job.folder / "run.json").exists() else None, error
    if interrupts.asked:
        raise Stopped(interrupts.exit_code, done, len(planned))


def plain(values: Values) -> list[Any]:
    """As JSON: what a job is handed is what was read when the sweep began."""
    return [[list(path), value, origin] for path, (value, origin) in values.items()]


def main() -> None:
    """A run in a process of its own, as `_at_once` describes it."""
    job = json.loads(sys.stdin.buffer.readline())
    follow()
    values = {tuple(path): (value, origin) for path, value, origin in job["values"]}
    try:
        run_once(Path(job["folder"]), resolve(values), Quiet(), federation)
    except runs.Interrupted as stop:
        raise SystemExit(stop.exit_code) from stop
    except LaminaError as error:
        print(hidden(str(error)), file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except Exception as error:
        print(hidden(traceback.format_exc()), file=sys.stderr)
        raise SystemExit(1) from error


def federation(config: Config) -> Federation:
    """With an engine whose results do not depend on how many cores there are."""
    made = build(config)
    if config.engine != "auto" or made.engine != "threads":
        return made
    return build(config.model_copy(update={"engine": "processes" if processes.available() else "loop"}))


def _naming(point: Point, folder: Path | None) -> dict[str, Any]:
    return {"run": None if folder is None else str(folder), "settings": point.swept, "seed": point.seed}


def _end(point: Point, folder: Path | None, error: str | None) -> dict[str, Any]:
    named = _naming(point, folder)
    if folder is None or error is not None:
        return {"event": "failed", **named, "error": error}
    run = Run.open(folder)
    accuracy = run.final and standing(run.final, run.personal)
    return {"event": "end", **named, "status": run.info["status"], "accuracy": accuracy, "seconds": run.info["seconds"]}


# ---- one run


def run_once(folder: Path, config: Config, watcher: Watcher, make: Callable[[Config], Federation] = build) -> Run:
    """The run of this config in this folder: as it is, gone on with, or begun. To diverge is a result."""
    done = finished(folder, config)
    if done is not None:
        return done
    try:
        if (folder / "run.json").exists():
            return runs.resume(folder, progress=watcher)
        return runs.fit(make(config), config.rounds, folder, progress=watcher, config=config)
    except RunError as error:
        if error.code not in DIVERGED:
            raise
        watcher.note(f"diverged, which is a result: {error.message}")
        return Run.open(folder)


def finished(folder: Path | None, config: Config) -> Run | None:
    """The run in this folder, if it has come to an end, by success or by divergence.

    Raises:
        StorageError: E402, it is of other settings.
    """
    if folder is None or not (folder / "run.json").exists():
        return None
    run = Run.open(folder)
    other = other_settings(folder, config)
    other += ["rounds"] if run.info["rounds"] != config.rounds else []
    if other:
        raise StorageError(
            f"{folder} holds a run of other settings: {', '.join(other)}",
            code="E402",
            where=str(folder),
            remedy="move it away, or give another folder with --run-dir",
        )
    return run if run.info["status"] == "done" or diverged(run) is not None else None


def diverged(run: Run) -> int | None:
    """The round in which every message was refused."""
    failed = run.info["status"] == "failed" and str(run.info.get("error")).startswith(DIVERGED)
    return int(run.info["rounds_done"]) if failed else None


def _folder_of(top: Path, config: Config) -> Path | None:
    """Where this experiment was run before, with the same files of the user's own: where it was finished, else last."""
    found = []
    parent = runs.experiment_folder(config.name, top)
    for file in sorted(parent.glob("*/run.json")) if parent.is_dir() else ():
        folder = file.parent
        with contextlib.suppress(LaminaError):  # a damaged folder, or one of another version, is none of ours
            info = read_info(folder)
            if info["config_sha256"] != config.sha256 or not runs.number_of(folder):
                continue
            if read_environment(folder).get("entries", {}) == config.entry_sha256:
                found.append((info["status"] == "done", runs.number_of(folder), folder))
    return max(found)[2] if found else None


if __name__ == "__main__":
    main()
